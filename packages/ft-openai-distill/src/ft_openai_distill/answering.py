"""Ask an LLM or a query engine, and keep what the answer took: time, tokens, errors."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ft_core.datasets.chat_messages import text_of
from ft_core.errors import ArgumentError
from ft_core.generation.failures import describe
from ft_core.hooks import Call, Hook
from ft_openai_distill.messages import Message, to_chat_message, to_openai_answer
from ft_openai_distill.schema_check import calls_of, parse_json

if TYPE_CHECKING:
    from pydantic import BaseModel

Tokenizer = Callable[[str], Sequence[Any]]


@dataclass(frozen=True)
class Question:
    """What is asked, in the form of OpenAI's chat API."""

    text: str
    """The question itself: what a query engine is asked."""
    messages: list[Message]
    """What an LLM is sent."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the LLM's call: tools, response format."""


@dataclass(frozen=True)
class Answer:
    """What one candidate said to one question."""

    message: Message
    """An assistant message; without content where the call failed."""
    seconds: float
    error: str | None = None
    """Why there is no answer."""
    problem: str | None = None
    """Why the answer did not become an object of the wanted class."""
    tokens: tuple[int, int] | None = None
    """Into and out of every LLM that was called; None where no LLM was seen."""
    estimated: bool = False
    """Whether any of the tokens were counted here."""

    @property
    def text(self) -> str:
        """The answer as text, tool calls included."""
        return answer_text(self.message)


def answer_text(message: Mapping[str, Any]) -> str:
    """Return an assistant message as text that can be compared, tool calls included."""
    calls = [f"{name} {_canonical(arguments)}" for name, arguments in calls_of(message)]
    return "\n".join(part for part in (text_of(dict(message)), *calls) if part)


class Candidate:
    """An LLM or a query engine under a name.

    Args:
        name: for errors.
        target: the LLM or query engine.
        output_cls: answers are to be objects of this class.
        tokenizer: counts the tokens that the model does not tell.

    Raises:
        ArgumentError: the target is neither.
    """

    def __init__(
        self,
        name: str,
        target: Any,
        output_cls: type[BaseModel] | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.is_llm = not hasattr(target, "query")
        if self.is_llm and not (hasattr(target, "chat") and hasattr(target, "complete")):
            hint = "; pass the query engine or LLM inside it" if hasattr(target, "chat") else ""
            raise ArgumentError(
                name, f"{type(target).__name__} is neither an LLM nor a query engine{hint}"
            )
        self._target = target
        self._output_cls = output_cls
        self._tokenizer = tokenizer
        self._recorder = _Recorder()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """See the LLM calls inside the candidate, for their tokens, while the block runs."""
        attachment: AbstractContextManager[Any]
        try:
            attachment = self._recorder.attach(self._target)
        except ArgumentError:  # no LLM of LlamaIndex inside, or one that cannot be watched
            attachment = nullcontext()
        with attachment:
            yield

    def ask(self, question: Question) -> Answer:
        """Return the answer, or the error of a call that failed: nothing is raised."""
        calls: list[_LLMCall] = []
        token = _calls.set(calls)
        message: Message = {"role": "assistant", "content": ""}
        error = problem = None
        start = time.perf_counter()
        try:
            message, problem = self._answer(question, calls)
        except Exception as raised:
            if self._output_cls is not None and calls and calls[-1].answer is not None:
                # The model did answer; what it said could not be parsed.
                message, problem = calls[-1].answer, describe(raised)
            else:
                error = describe(raised, getattr(self._target, "api_key", None))
        seconds = time.perf_counter() - start
        _calls.reset(token)
        tokens = [call.tokens(self._tokenizer) for call in calls if call.answer is not None]
        return Answer(
            message,
            seconds,
            error=error,
            problem=problem,
            tokens=(sum(t[0] for t in tokens), sum(t[1] for t in tokens)) if tokens else None,
            estimated=any(estimated for _, _, estimated in tokens),
        )

    def _answer(self, question: Question, calls: list[_LLMCall]) -> tuple[Message, str | None]:
        """Return the answer, and what is wrong with it as an object of `output_cls`."""
        if not self.is_llm:
            return self._query(question.text)
        if self._output_cls is not None:
            return self._object(question, self._output_cls)
        messages = [to_chat_message(message) for message in question.messages]
        response = self._response(question, messages)
        if not calls:  # not a class of LlamaIndex's, so that it was not watched
            calls.append(_LLMCall(messages, response))
        return _answer_of(response), None

    def _response(self, question: Question, messages: list[Any]) -> Any:
        metadata = getattr(self._target, "metadata", None)
        plain = len(messages) == 1 and not question.settings
        if plain and not getattr(metadata, "is_chat_model", True):
            return self._target.complete(question.text)
        return self._target.chat(messages, **question.settings)

    def _object(
        self, question: Question, output_cls: type[BaseModel]
    ) -> tuple[Message, str | None]:
        from llama_index.core.prompts import ChatPromptTemplate

        messages = [to_chat_message(message) for message in question.messages]
        prompt = ChatPromptTemplate(message_templates=messages)
        result = self._target.structured_predict(output_cls, prompt)
        return _object_answer(result, output_cls)

    def _query(self, text: str) -> tuple[Message, str | None]:
        content = _content(self._target.query(text))
        if self._output_cls is None:
            return {"role": "assistant", "content": _text(content)}, None
        return _object_answer(content, self._output_cls)


class _LLMCall:
    """One call of an LLM on the way to an answer."""

    def __init__(self, prompt: Any, response: Any) -> None:
        self._prompt = prompt
        self._response = response
        self.answer = None if response is None else _answer_of(response)

    def tokens(self, tokenizer: Tokenizer | None) -> tuple[int, int, bool]:
        """Return (in, out, estimated)."""
        told = _usage(self._response)
        if told is not None:
            return *told, False
        if tokenizer is None:
            from llama_index.core.utils import get_tokenizer

            tokenizer = get_tokenizer()
        prompt = self._prompt
        if not isinstance(prompt, str):
            prompt = "\n".join(str(message.content or "") for message in prompt)
        return len(tokenizer(prompt)), len(tokenizer(answer_text(self.answer or {}))), True


_calls: ContextVar[list[_LLMCall] | None] = ContextVar("ft_openai_distill_calls", default=None)
"""The calls on the way to the answer that this context works on."""


class _Recorder(Hook):
    """Notes every LLM call under the answer that it belongs to."""

    methods: ClassVar[tuple[str, ...]] = (
        *("chat", "complete", "stream_chat", "stream_complete"),
        *("achat", "acomplete", "astream_chat", "astream_complete"),
    )

    def components(self) -> tuple[type, ...]:
        from llama_index.core.base.llms.base import BaseLLM

        return (BaseLLM,)

    def wants(self, call: Call) -> bool:
        from llama_index.core.llms.structured_llm import StructuredLLM

        # Of a structured LLM, the one inside it knows the tokens.
        return not call.outer and not isinstance(call.target, StructuredLLM)

    def observe(self, call: Call) -> None:
        calls = _calls.get()
        if calls is not None and call.error is None:
            prompt = call.args[0] if call.args else call.kwargs.get("messages")
            calls.append(_LLMCall(prompt or call.kwargs.get("prompt") or "", call.result))


def _answer_of(response: Any) -> Message:
    """Return what an LLM's response says, as an assistant message."""
    message = getattr(response, "message", None)
    if message is None:
        return {"role": "assistant", "content": _text(getattr(response, "text", response))}
    return to_openai_answer(message) or {"role": "assistant", "content": ""}


def _object_answer(result: Any, output_cls: type[BaseModel]) -> tuple[Message, str | None]:
    if isinstance(result, output_cls):
        return {"role": "assistant", "content": result.model_dump_json()}, None
    text = _text(result)
    problem = None
    try:
        output_cls.model_validate_json(text)
    except ValueError as error:
        problem = describe(error)
    return {"role": "assistant", "content": text}, problem


def response_text(response: Any) -> str:
    """Return the text of a query engine's response; a stream is read."""
    return _text(_content(response))


def _content(response: Any) -> Any:
    if hasattr(response, "get_response"):
        response = response.get_response()
    return getattr(response, "response", response)


def _text(content: Any) -> str:
    if hasattr(content, "model_dump_json"):
        return str(content.model_dump_json())
    return "" if content is None else str(content)


def _usage(response: Any) -> tuple[int, int] | None:
    """Return the tokens (in, out) that a response tells, or None."""
    from llama_index.core.callbacks.token_counting import get_tokens_from_response

    try:
        counts: tuple[Any, Any] = get_tokens_from_response(response)
    except Exception:  # a raw response of a shape that it does not know
        counts = (0, 0)
    extra = getattr(response, "additional_kwargs", None) or {}
    if not counts[0] and isinstance(extra, Mapping):
        counts = (extra.get("prompt_tokens"), extra.get("completion_tokens"))
    if counts[0] and isinstance(counts[0], int) and isinstance(counts[1], int):
        return counts
    return None


def _canonical(arguments: str) -> str:
    try:
        return json.dumps(parse_json(arguments), ensure_ascii=False, sort_keys=True)
    except ValueError:
        return arguments
