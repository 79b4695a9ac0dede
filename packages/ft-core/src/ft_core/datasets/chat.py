"""Conversations to learn from: OpenAI's chat format, one example a line of a JSON Lines file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, field_validator, model_validator
from typing_extensions import Self

from ft_core import files
from ft_core.datasets import chat_messages
from ft_core.datasets.base import check_text
from ft_core.datasets.chat_messages import Message
from ft_core.datasets.duplicates import fold
from ft_core.datasets.examples import Example, ExampleDataset, median_words, write_lines
from ft_core.errors import DatasetError

_WRAPPED = (
    # The prompts that LlamaIndex's query engines send by default: what stands before the
    # query, what stands behind it, and how the prompt ends.
    ("answer the query.\nQuery: ", "\nAnswer:", "Answer:"),
    ("\nQuery: ", "\nOriginal Answer:", "New Answer:"),
    (
        "The original query is as follows: ",
        "\nWe have provided an existing answer:",
        "Refined Answer:",
    ),
)


class OpenAIExample(Example):
    """An example that has a line in OpenAI's fine-tuning file."""

    def to_openai(self) -> dict[str, Any]:
        """Return the line of OpenAI's fine-tuning file."""
        raise NotImplementedError


OpenAIExampleT = TypeVar("OpenAIExampleT", bound=OpenAIExample)


class OpenAIDataset(ExampleDataset[OpenAIExampleT], Generic[OpenAIExampleT]):
    """Examples that OpenAI's fine-tuning takes."""

    def to_openai_jsonl(self, path: Path | str) -> None:
        """Write the file that OpenAI's fine-tuning takes: without `metadata` and the like."""
        write_lines(path, (example.to_openai() for example in self.examples))


class ChatExample(OpenAIExample):
    """A conversation that ends with the answer to learn.

    Raises:
        DatasetError: the messages or tools break a rule of the format (the roles, the fields
            and parts of each; tool calls and their answers; weights); it names the place.
    """

    messages: list[Message]
    """OpenAI chat messages; the last one, the answer, is by the assistant."""
    tools: list[dict[str, Any]] | None = None
    """Definitions of the tools that the model was offered."""
    parallel_tool_calls: StrictBool | None = None
    """Whether one turn may call several tools."""
    functions: list[dict[str, Any]] | None = None
    """Definitions as they were before there were tools."""
    response_format: dict[str, Any] | None = None
    """What the call asked for; OpenAI's fine-tuning file has no place for it."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """What a journal knows of the call, such as its id, time, model and query."""

    @field_validator("messages")
    @classmethod
    def _tidy(cls, messages: list[Message]) -> list[Message]:
        return [chat_messages.without_absent(message) for message in messages]

    @field_validator("tools", "functions")
    @classmethod
    def _none_if_empty(cls, value: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        return value or None

    @model_validator(mode="after")
    def _check(self) -> Self:
        chat_messages.check_messages(self.messages)
        chat_messages.check_tools(self.tools or ())
        chat_messages.check_functions(self.functions or ())
        for name in type(self).model_fields:
            check_text(getattr(self, name), name)
        return self

    def asked(self) -> str:
        """Return `metadata["query"]`, or what the first message of the user's asks.

        LlamaIndex's default question-answering and refine prompts are unwrapped to the query,
        so that all calls about one query have one question, whatever context they quote.
        """
        query = self.metadata.get("query")
        return query if isinstance(query, str) and query.strip() else _asked(self.messages)

    def answer(self) -> str:
        """Return the text of the last message; "" for a tool call alone."""
        return chat_messages.text_of(self.messages[-1])

    def to_openai(self) -> dict[str, Any]:
        """Return what OpenAI's fine-tuning file takes: messages, tools, functions."""
        line: dict[str, Any] = {"messages": self.messages}
        if self.tools:
            line["tools"] = self.tools
            if self.parallel_tool_calls is not None:  # refused where there are no tools
                line["parallel_tool_calls"] = self.parallel_tool_calls
        if self.functions:
            line["functions"] = self.functions
        return line


class PreferenceInput(BaseModel):
    """The conversation that the two answers of a `PreferenceExample` go on from."""

    model_config = ConfigDict(extra="forbid")

    messages: list[Message]
    """OpenAI chat messages, the last one not by the assistant."""
    tools: list[dict[str, Any]] | None = None
    """Definitions of the tools that the model was offered."""
    parallel_tool_calls: StrictBool | None = None
    """Whether one turn may call several tools."""

    @field_validator("messages")
    @classmethod
    def _tidy(cls, messages: list[Message]) -> list[Message]:
        return [chat_messages.without_absent(message) for message in messages]


class PreferenceExample(OpenAIExample):
    """One conversation with a better and a worse answer, for direct preference optimisation.

    Raises:
        DatasetError: as for `ChatExample`, or the two answers are the same.
    """

    input: PreferenceInput
    """What was asked."""
    preferred_output: list[Message]
    """The better answer: one message by the assistant."""
    non_preferred_output: list[Message]
    """The worse answer: one message by the assistant."""

    @field_validator("preferred_output", "non_preferred_output")
    @classmethod
    def _tidy(cls, messages: list[Message]) -> list[Message]:
        return [chat_messages.without_absent(message) for message in messages]

    @model_validator(mode="after")
    def _check(self) -> Self:
        asked = self.input.messages
        if not asked or asked[-1].get("role") == "assistant":
            raise DatasetError(
                "ends with what the assistant is to answer, not with an answer",
                place="input.messages",
            )
        for index, message in enumerate(asked):
            chat_messages.check_message(message, f"input.messages[{index}]")
        for name in ("preferred_output", "non_preferred_output"):
            output = getattr(self, name)
            if len(output) != 1:
                raise DatasetError(f"holds one message, not {len(output)}", place=name)
            chat_messages.check_messages(output, name)
            chat_messages.check_tool_calls([*asked, *output], "input.messages")
        if self.preferred_output == self.non_preferred_output:
            raise DatasetError("is the same as preferred_output", place="non_preferred_output")
        chat_messages.check_tools(self.input.tools or (), "input.tools")
        check_text(self.content())
        return self

    def asked(self) -> str:
        """Return what the first message of the user's asks; see `ChatExample.asked`."""
        return _asked(self.input.messages)

    def to_openai(self) -> dict[str, Any]:
        """Return the line of OpenAI's file for preferences."""
        asked: dict[str, Any] = {"messages": self.input.messages}
        if self.input.tools:
            asked["tools"] = self.input.tools
            if self.input.parallel_tool_calls is not None:
                asked["parallel_tool_calls"] = self.input.parallel_tool_calls
        return {
            "input": asked,
            "preferred_output": self.preferred_output,
            "non_preferred_output": self.non_preferred_output,
        }


class ChatDataset(OpenAIDataset[ChatExample]):
    """Conversations whose last message is the answer to learn; a JSON Lines file on disk."""

    _example = ChatExample

    def stats(self) -> dict[str, Any]:
        """Return counts, and lengths in words."""
        answers = [example.messages[-1] for example in self.examples]
        return {
            "examples": len(self.examples),
            "distinct questions": len({fold(example.asked()) for example in self.examples}),
            "messages": sum(len(example.messages) for example in self.examples),
            "examples with tools": sum(bool(e.tools or e.functions) for e in self.examples),
            "answers that call a tool": sum(
                bool({"tool_calls", "function_call"} & answer.keys()) for answer in answers
            ),
            "answers in a response format": sum(bool(e.response_format) for e in self.examples),
            "median words per question": median_words(e.asked() for e in self.examples),
            "median words per answer": median_words(e.answer() for e in self.examples),
        }


class PreferenceDataset(OpenAIDataset[PreferenceExample]):
    """Conversations with a better and a worse answer each; a JSON Lines file on disk."""

    _example = PreferenceExample

    def stats(self) -> dict[str, Any]:
        """Return counts, and lengths in words."""
        text = chat_messages.text_of
        return {
            "examples": len(self.examples),
            "distinct questions": len({fold(example.asked()) for example in self.examples}),
            "examples with tools": sum(bool(example.input.tools) for example in self.examples),
            "median words per question": median_words(e.asked() for e in self.examples),
            "median words per preferred answer": median_words(
                text(example.preferred_output[0]) for example in self.examples
            ),
            "median words per other answer": median_words(
                text(example.non_preferred_output[0]) for example in self.examples
            ),
        }


def _asked(messages: list[Message]) -> str:
    """Return the query of the first message of the user's (of any, where there is none)."""
    users = [message for message in messages if message["role"] == "user"]
    first = (users or messages)[0]
    text = chat_messages.text_of(first)
    # Of a picture without a word, the picture is the question.
    return _unwrapped(text) if text.strip() else files.content_hash(first.get("content"))


def _unwrapped(prompt: str) -> str:
    for before, behind, ending in _WRAPPED:
        if prompt.rstrip().endswith(ending):
            head, _, _ = prompt.rpartition(behind)
            _, found, query = head.rpartition(before)
            if found and query.strip():
                return query.strip()
    return prompt
