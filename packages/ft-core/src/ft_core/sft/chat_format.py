"""How one model writes a conversation, and where in it the model itself speaks."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any

from ft_core.errors import ArgumentError, DatasetError, first_line

Message = dict[str, Any]

_TOOLS = """\
You can call the functions below. To call one, write for each call a line of the form
<tool_call>{{"name": name of the function, "arguments": {{name of one: its value}}}}</tool_call>

Functions:
{functions}"""

_CALL_TAG = "<tool_call>"
_TAGGED_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)
_LISTED_CALLS = "[TOOL_CALLS]"
_PROBE = "probe_of_a_template"


@dataclass(frozen=True)
class Tokens:
    """One training sequence."""

    input_ids: list[int]
    is_answer: list[bool]
    """Of each token, whether the model is to learn it."""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class ToolCall:
    """A call that a model wrote."""

    name: str
    arguments: dict[str, Any]


class ChatFormat:
    """The chat template of a tokenizer; tools are written as text where it has no place for them.

    Messages and tools are OpenAI's. What a template cannot take is brought into a form that
    every template takes: old `functions` become tools, `developer` becomes `system`. Ids of tool
    calls are numbered anew, as what a server rolls cannot be learned (and Mistral's templates
    take none but of nine letters and digits).

    Args:
        tokenizer: of transformers, with a chat template.

    Raises:
        ArgumentError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ArgumentError(
                "base_model",
                "has no chat template; take its instruct version, or save the tokenizer with a "
                "chat_template",
            )
        self._tokenizer = tokenizer

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the template itself writes tools into the prompt."""
        function = {"name": _PROBE, "description": "?", "parameters": {"type": "object"}}
        tools = [{"type": "function", "function": function}]
        return self._writes_probe([{"role": "user", "content": "?"}], tools)

    @cached_property
    def takes_system(self) -> bool:
        """Whether the template writes what the role `system` says."""
        turns = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "?"}]
        return self._writes_probe(turns, None)

    @cached_property
    def end(self) -> str:
        """The special token that the template writes behind an answer; "" where there is none.

        Often, but not always, the tokenizer's end of text.
        """
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        try:
            behind = self._render(turns, None, prompt=False).rpartition(_PROBE)[2].lstrip()
        except Exception:  # it will say so when it gets real messages
            return ""
        special = {str(token) for token in self._tokenizer.all_special_tokens}
        special |= {str(token) for token in self._tokenizer.get_added_vocab()}
        found = [token for token in special if token and behind.startswith(token)]
        return max(found, key=len, default="")

    @cached_property
    def end_ids(self) -> list[int]:
        """The tokens, each of which ends an answer."""
        tokenizer = self._tokenizer
        found = [tokenizer.convert_tokens_to_ids(self.end)] if self.end else []
        return [id_ for id_ in dict.fromkeys([*found, tokenizer.eos_token_id]) if id_ is not None]

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        response_format: Mapping[str, Any] | None = None,
    ) -> str:
        """Return what the model is to continue.

        Raises:
            DatasetError: the template refuses the messages; with its reason.
        """
        plain, tools = self._prepared(messages, tools, response_format)
        return self._rendered(plain, tools, prompt=True)

    def tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        response_format: Mapping[str, Any] | None = None,
        *,
        apart: bool = False,
    ) -> list[Tokens]:
        """Return a conversation as training sequences: one, or one for each answer.

        The answers are the assistant's messages whose `weight` is not 0. Templates that write
        an earlier turn otherwise once later ones follow (without its reasoning, for example)
        give one sequence for each answer, as the model will be asked for it.

        Args:
            messages: the conversation.
            tools: that the model was offered.
            response_format: that was asked for.
            apart: one sequence for each answer in any case.

        Raises:
            DatasetError: the template refuses the messages, or there is nothing to learn in one;
                with the reason.
        """
        plain, tools = self._prepared(messages, tools, response_format)
        given = [index for index, message in enumerate(messages) if _is_answer(message)]
        # Messages around the assistant's may have been added or joined, these never are.
        turns = [index for index, message in enumerate(plain) if _is_answer(message)]
        pieces = []
        for index, turn in zip(given, turns, strict=True):
            if messages[index].get("weight", 1):
                try:
                    pieces.append(self._piece(plain[: turn + 1], tools))
                except DatasetError as error:
                    raise DatasetError(error.reason, place=f"messages[{index}]") from error
        if not pieces:
            return []
        whole = pieces[-1][0]
        if not apart and all(whole.startswith(text) for text, _ in pieces):
            return [self._tokenized(whole, [(start, len(text)) for text, start in pieces])]
        return [self._tokenized(text, [(start, len(text))]) for text, start in pieces]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a rendered text; no special token is added."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def parsed(self, text: str) -> tuple[str, list[ToolCall]]:
        """Split what a model wrote, that was offered tools, into its text and its tool calls.

        Knows `<tool_call>` tags (ours, Hermes, Qwen), a bare JSON object or list (Llama 3)
        and `[TOOL_CALLS]` (Mistral). A call that is not valid JSON stays text.
        """
        calls: list[ToolCall] = []
        rest = text

        def take(match: re.Match[str]) -> str:
            found = _calls(match[1])
            calls.extend(found)
            return "" if found else match[0]

        if _CALL_TAG in text:
            rest = _TAGGED_CALL.sub(take, text)
        elif _LISTED_CALLS in text:
            rest, _, listed = text.partition(_LISTED_CALLS)
            calls = _calls(listed.strip())
        else:
            calls = _calls(text.strip())
            rest = ""
        return (rest.rstrip(), calls) if calls else (text, [])

    def certain(self, text: str) -> str:
        """Return the part of a half-written answer that `parsed` will not take for a call."""
        if text.lstrip()[:1] in ("{", "["):
            return ""
        ends = [text.find(mark) for mark in (_CALL_TAG, _LISTED_CALLS) if mark in text]
        text = text[: min(ends, default=len(text))]
        return without_beginning(text, [_CALL_TAG, _LISTED_CALLS]).rstrip()

    def _writes_probe(self, messages: list[Message], tools: Any) -> bool:
        try:
            return _PROBE in self._render(messages, tools, prompt=True)
        except Exception:  # a template that fails on something does not take it
            return False

    def _piece(self, messages: list[Message], tools: Any) -> tuple[str, int]:
        """Return the text up to and with the last message, and where its answer begins."""
        if len(messages) == 1:
            raise DatasetError("begins the conversation: there is no prompt to answer")
        if not messages[-1]["content"] and not messages[-1].get("tool_calls"):
            raise DatasetError(
                "is an answer without text or tool calls: nothing to learn; leave the example out"
            )
        prompt = self._rendered(messages[:-1], tools, prompt=True)
        text = self._ended(self._rendered(messages, tools, prompt=False))
        start = len(prompt)
        if not text.startswith(prompt):
            start = next(i for i, pair in enumerate(zip_longest(prompt, text)) if len({*pair}) > 1)
        return text, start

    def _ended(self, text: str) -> str:
        """Return a text that ends with the token that ends an answer, and nothing behind it."""
        if not self.end:  # without one, the student would never learn to stop
            return text.rstrip() + (self._tokenizer.eos_token or "")
        head, found, behind = text.rpartition(self.end)
        # A line break after the end is never generated.
        return head + found if found and not behind.strip() else text

    def _tokenized(self, text: str, answers: list[tuple[int, int]]) -> Tokens:
        if not getattr(self._tokenizer, "is_fast", False):
            return self._tokenized_in_pieces(text, answers)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        mask, spans = [], iter([*answers, (len(text) + 1, len(text) + 1)])
        start, end = next(spans)
        for first, last in encoded["offset_mapping"]:
            while first >= end:
                start, end = next(spans)
            # A token across the border is learned: the model has to write its second half.
            mask.append(last > start)
        return Tokens(encoded["input_ids"], mask)

    def _tokenized_in_pieces(self, text: str, answers: list[tuple[int, int]]) -> Tokens:
        ids: list[int] = []
        mask: list[bool] = []
        at = 0
        for start, end in answers:
            for piece, is_answer in ((text[at:start], False), (text[start:end], True)):
                piece_ids = self.encode(piece) if piece else []
                ids += piece_ids
                mask += [is_answer] * len(piece_ids)
            at = end
        return Tokens(ids, mask)

    def _prepared(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        response_format: Mapping[str, Any] | None,
    ) -> tuple[list[Message], list[Any] | None]:
        plain = [_plain(message, index) for index, message in enumerate(messages)]
        _number_calls(plain)
        schema = _schema_of(response_format)
        if schema is not None:
            _append_schema(plain, schema)
        used = [_described(tool) for tool in tools or []] or None
        if not self.takes_tools:
            plain = _with_calls_as_text(plain)
            if used:
                lines = (json.dumps(tool["function"], ensure_ascii=False) for tool in used)
                functions = "\n".join(lines)
                plain = _with_system(plain, _TOOLS.format(functions=functions))
                used = None
        if plain and plain[0]["role"] == "system" and not self.takes_system:
            plain = _without_system(plain)
        return plain, used

    def _rendered(self, messages: list[Message], tools: Any, *, prompt: bool) -> str:
        try:
            return self._render(messages, tools, prompt=prompt)
        except Exception as error:
            raise DatasetError(
                f"the chat template refuses these messages: {first_line(error)}"
            ) from error

    def _render(self, messages: list[Message], tools: Any, *, prompt: bool) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        )


def tools_of(example: Any) -> list[dict[str, Any]] | None:
    """Return an example's tools, its old `functions` among them."""
    functions = [{"type": "function", "function": function} for function in example.functions or []]
    return [*(example.tools or []), *functions] or None


def _is_answer(message: Mapping[str, Any]) -> bool:
    return bool(message["role"] == "assistant")


def _plain(message: Mapping[str, Any], index: int) -> Message:
    """Return a message of text and function calls only, as templates take it."""
    role = {"developer": "system", "function": "tool"}.get(message["role"], message["role"])
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_text_of(part, index) for part in content)
    plain: Message = {"role": role, "content": content or message.get("refusal") or ""}
    calls = [
        (call.get("id"), call["function"])
        for call in message.get("tool_calls") or []
        if "function" in call
    ]
    if message.get("function_call"):
        calls.append((None, message["function_call"]))
    if calls:
        plain["tool_calls"] = [
            {
                "type": "function",
                "id": call_id,
                "function": {"name": call["name"], "arguments": _arguments(call["arguments"])},
            }
            for call_id, call in calls
        ]
    if role == "tool":
        plain |= {key: message[key] for key in ("name", "tool_call_id") if message.get(key)}
    return plain


def _number_calls(messages: list[Message]) -> None:
    """Give calls and their results short ids in order, and each result its function's name."""
    numbered: dict[Any, tuple[str, str]] = {}  # the given id: the new one, the function
    count = 0
    for message in messages:
        for call in message.get("tool_calls", ()):
            new = f"call{count:05d}"
            count += 1
            numbered[call["id"]] = (new, call["function"]["name"])
            call["id"] = new
        if message["role"] == "tool":
            new, name = numbered.get(message.get("tool_call_id"), ("", ""))
            if new:
                message.update(tool_call_id=new, name=name)


def _described(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool as every server and framework describes it, whatever else one adds."""
    function = tool.get("function", tool)
    known = {key: function[key] for key in ("name", "description", "parameters") if key in function}
    return {"type": "function", "function": {"description": "", "parameters": {}, **known}}


def _text_of(part: Mapping[str, Any], index: int) -> str:
    text = part.get("text", part.get("refusal"))
    if text is None:
        raise DatasetError(
            f"has a part of type {part.get('type')!r}, which a local text model cannot take; "
            "leave such examples out",
            place=f"messages[{index}]",
        )
    return str(text)


def _arguments(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except json.JSONDecodeError:
        return arguments


def _with_calls_as_text(messages: list[Message]) -> list[Message]:
    """Write calls into the assistant's text, and their results, joined, as the user's."""
    plain: list[Message] = []
    results: Message | None = None  # the message that further results join
    for message in messages:
        content = message["content"]
        if message["role"] == "tool":
            content = f"<tool_response>{content}</tool_response>"
            if results is None:
                results = {"role": "user", "content": content}
                plain.append(results)
            else:
                results["content"] += f"\n{content}"
            continue
        results = None
        calls = [call["function"] for call in message.get("tool_calls", ())]
        lines = [f"<tool_call>{json.dumps(call, ensure_ascii=False)}</tool_call>" for call in calls]
        text = "\n".join([content, *lines] if content else lines)
        plain.append({"role": message["role"], "content": text})
    return plain


def _with_system(messages: list[Message], text: str) -> list[Message]:
    if messages and messages[0]["role"] == "system":
        first = messages[0]
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _without_system(messages: list[Message]) -> list[Message]:
    """Put the system's text before the first user message."""
    system, *rest = messages
    if not rest or rest[0]["role"] != "user":
        return [{**system, "role": "user"}, *rest]
    return [{**rest[0], "content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]


def _schema_of(response_format: Mapping[str, Any] | None) -> Any:
    if response_format is None or response_format.get("type") != "json_schema":
        return None
    asked = response_format.get("json_schema") or {}
    return _loosened(asked.get("schema")) if asked.get("strict") else asked.get("schema")


def _loosened(schema: Any) -> Any:
    """Undo what OpenAI's SDK adds to a pydantic model's schema for its strict mode."""
    if isinstance(schema, list):
        return [_loosened(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _loosened(value)
        for key, value in schema.items()
        if key != "additionalProperties" or value is not False
    }


class _Schema:
    """A JSON schema in the place of the pydantic model that it was made from."""

    def __init__(self, schema: Any) -> None:
        self._schema = schema

    def model_json_schema(self) -> Any:
        """Return the schema."""
        return self._schema


def _append_schema(messages: list[Message], schema: Any) -> None:
    """Ask for JSON where and as LlamaIndex's programs ask a model that has no JSON mode.

    A teacher's answer in such a mode is so learned under the prompt that the student will get.
    """
    from llama_index.core.output_parsers import PydanticOutputParser

    asked = [message for message in messages if message["role"] != "assistant"]
    if not asked:
        return
    target = messages[0] if messages[0]["role"] == "system" else asked[-1]
    target["content"] = PydanticOutputParser(_Schema(schema)).format(target["content"])


def _calls(text: str) -> list[ToolCall]:
    """Return the calls that a JSON text holds; none where it holds anything else."""
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return []
    calls = []
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            return []
        arguments = item.get("arguments", item.get("parameters"))
        if isinstance(arguments, str):
            arguments = _arguments(arguments)
        if not isinstance(arguments, dict):
            return []
        calls.append(ToolCall(item["name"], arguments))
    return calls


def without_beginning(text: str, marks: Sequence[str]) -> str:
    """Return a text without what may, at its end, be the beginning of one of the marks."""
    held = [
        size
        for mark in marks
        for size in range(1, min(len(mark), len(text) + 1))
        if text.endswith(mark[:size])
    ]
    return text[: len(text) - max(held, default=0)]


def new_call_id() -> str:
    """Return an id for a tool call, in OpenAI's form."""
    return f"call_{uuid.uuid4().hex[:24]}"
