"""One call of an LLM, as it stood when it began and as it ended, whoever reported it."""

from __future__ import annotations

import sys
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from time import perf_counter
from typing import Any, Literal

from ft_core.hooks import Call
from ft_openai_distill.messages import (
    Message,
    to_openai_answer,
    to_openai_messages,
    to_openai_settings,
)

CHAT_METHODS = ("chat", "achat", "stream_chat", "astream_chat")
COMPLETION_METHODS = ("complete", "acomplete", "stream_complete", "astream_complete")
LLM_METHODS = (*CHAT_METHODS, *COMPLETION_METHODS)

_QUERY_POSITIONS = {  # of the methods of components that get a query, where it stands
    "query": 0,
    "aquery": 0,
    "synthesize": 0,
    "asynthesize": 0,
    "select": 1,
    "aselect": 1,
    "generate": 1,
    "agenerate": 1,
}
_QUERY_NAMES = ("query", "str_or_query_bundle", "query_bundle")
COMPONENT_METHODS = (*_QUERY_POSITIONS, "take_step")

_USAGE_NAMES = {
    "prompt_tokens": ("prompt_tokens", "input_tokens", "prompt_token_count", "prompt_eval_count"),
    "completion_tokens": (
        "completion_tokens",
        "output_tokens",
        "candidates_token_count",
        "eval_count",
    ),
    "total_tokens": ("total_tokens", "total_token_count"),
}


@dataclass
class StartedCall:
    """What a call asked for, in JSON values: nothing that the call does later changes it."""

    kind: Literal["chat", "completion"]
    messages: list[Message]
    settings: dict[str, Any]
    """Of `tools`, `response_format` and the like those that were given."""
    component: str
    """Name of the LLM's class."""
    model: str
    inside: list[str] = field(default_factory=list)
    """Names of the classes that this call was made for, such as a query engine."""
    query: str | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    time: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    )
    start: float = field(default_factory=perf_counter)

    def metadata(self, response: Any, seconds: float | None = None) -> dict[str, Any]:
        """Return what the journal keeps of the call beside the conversation."""
        if seconds is None:
            seconds = perf_counter() - self.start
        result: dict[str, Any] = {
            "id": self.id,
            "time": self.time,
            "seconds": round(seconds, 6),
            "model": self.model,
            "component": self.component,
            "kind": self.kind,
            "usage": usage(response),
            "finish_reason": _finish_reason(response),
            "inside": self.inside,
            "query": self.query,
            "tool_choice": self.settings.get("tool_choice"),
        }
        return {key: value for key, value in result.items() if value}


def of_method(call: Call) -> StartedCall:
    """Return a call of an LLM's method as it begins."""
    asked = call.args[0] if call.args else call.kwargs.get("messages", call.kwargs.get("prompt"))
    # The order in which OpenAI's own class merges the two.
    settings = {**call.kwargs, **(getattr(call.target, "additional_kwargs", None) or {})}
    return _started(
        asked if call.method in CHAT_METHODS else str(asked),
        settings,
        component=type(call.target).__name__,
        model=_model(call.target),
        outer=call.outer,
    )


def of_event(
    asked: Any,
    settings: Mapping[str, Any],
    llm: Mapping[str, Any],
    span: str | None,
    outer: Iterable[Call] = (),
) -> StartedCall:
    """Return a call that LlamaIndex reports: the messages or the prompt, and what it tells.

    Args:
        asked: the messages, or the prompt as a string.
        settings: keyword arguments of the call.
        llm: LlamaIndex's description of the LLM.
        span: id of the span that the call is, such as `OpenAI.chat-1b4e...`.
        outer: the watched calls around it.
    """
    name = span.partition(".")[0] if span and "." in span else str(llm.get("class_name", ""))
    model = str(llm.get("model_name") or llm.get("model") or "")
    return _started(asked, settings, component=name, model=model, outer=outer)


def _started(
    asked: Any, settings: Mapping[str, Any], *, component: str, model: str, outer: Iterable[Call]
) -> StartedCall:
    outer = [call for call in outer if call.method not in LLM_METHODS or not _is_llm(call.target)]
    is_completion = isinstance(asked, str)
    return StartedCall(
        kind="completion" if is_completion else "chat",
        messages=[{"role": "user", "content": asked}]
        if is_completion
        else to_openai_messages(asked),
        settings=to_openai_settings(settings),
        component=component,
        model=model,
        inside=list(dict.fromkeys(type(call.target).__name__ for call in outer)),
        query=next((query for call in reversed(outer) if (query := _query(call))), None),
    )


def _is_llm(target: Any) -> bool:
    from llama_index.core.base.llms.base import BaseLLM

    return isinstance(target, BaseLLM)


def _query(call: Call) -> str | None:
    """Return the query that a component's method was given."""
    position = _QUERY_POSITIONS.get(call.method)
    if position is None:
        return None
    if len(call.args) > position:
        value = call.args[position]
    else:
        value = next((call.kwargs[name] for name in _QUERY_NAMES if name in call.kwargs), None)
    text = getattr(value, "query_str", value)
    return text if isinstance(text, str) else None


def _model(llm: Any) -> str:
    for name in ("model", "model_name"):
        value = getattr(llm, name, None)
        if isinstance(value, str) and value:
            return value
    return str(llm.metadata.model_name)


def answer_of(response: Any) -> Message | None:
    """Return what an LLM answered as an assistant message, or None if it said nothing."""
    message = getattr(response, "message", None)
    if message is not None:
        return to_openai_answer(message)
    text = getattr(response, "text", response)
    if not isinstance(text, str) or not text.strip():
        return None
    return {"role": "assistant", "content": text}


def usage(response: Any) -> dict[str, int]:
    """Return the numbers of tokens that the response tells, by OpenAI's names."""
    raw, extra = getattr(response, "raw", None), getattr(response, "additional_kwargs", None)
    for source in (extra, _get(extra, "usage"), _get(raw, "usage"), _get(raw, "usage_metadata")):
        if found := _tokens(source):
            return found
    return _tokens(raw)


def _tokens(source: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    if not source:
        return found
    for name, others in _USAGE_NAMES.items():
        for other in others:
            value = _get(source, other)
            if isinstance(value, int) and value:
                found[name] = value
                break
    return found


def _finish_reason(response: Any) -> str | None:
    choices = _get(getattr(response, "raw", None), "choices")
    reason = _get(choices[0], "finish_reason") if isinstance(choices, list) and choices else None
    return reason if isinstance(reason, str) else None


def _get(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)


# --- Calls that LlamaIndex reports as two events ---------------------------------------------

_WRAPPERS = "llama_index.core.llms.callbacks"
_STRUCTURED = "llama_index.core.llms.structured_llm"


def is_inner_call() -> bool:
    """Whether LlamaIndex's report, which is on the stack, is of a call inside another LLM call.

    Many LLMs answer `complete` by their own `chat`, or the other way round, and LlamaIndex
    reports both. No event says so: their ids and spans look as if the one followed the other.
    """
    frame, callee, own = sys._getframe(1), "", True
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module == _WRAPPERS and frame.f_code.co_name.startswith("wrapped"):
            # A StructuredLLM is no LLM of its own: the call inside it is the one to record.
            if not own and callee != _STRUCTURED:
                return True
            own = False
        callee, frame = module, frame.f_back  # type: ignore[assignment]
    return False


class OpenCalls:
    """The calls that have begun, until they end.

    A stream that nobody reads never ends, so beyond `limit` the oldest is forgotten.
    """

    def __init__(self, limit: int = 4096) -> None:
        self._limit = limit
        self._calls: OrderedDict[str, list[tuple[Any, StartedCall | None]]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, key: str, asked: Any, started: StartedCall | None) -> None:
        """Keep a call under the id of its event or span; several calls may share a span."""
        with self._lock:
            self._calls.setdefault(key, []).append((_first(asked), started))
            while len(self._calls) > self._limit:
                self._calls.popitem(last=False)

    def take(self, key: str, asked: Any = None) -> StartedCall | None:
        """Return and forget the call with this key that asked this, if there is one."""
        with self._lock:
            calls = self._calls.get(key, [])
            index = self._index(calls, asked)
            if index is None:
                return None
            _, started = calls.pop(index)
            if not calls:
                del self._calls[key]
            return started

    def has(self, key: str | None, asked: Any) -> bool:
        """Whether a call with this key and asking the same is open."""
        with self._lock:
            first = _first(asked)
            return any(_same(other, first) for other, _ in self._calls.get(key or "", ()))

    def drop(self, key: str) -> None:
        """Forget the calls with this key."""
        with self._lock:
            self._calls.pop(key, None)

    @staticmethod
    def _index(calls: list[tuple[Any, Any]], asked: Any) -> int | None:
        first = _first(asked)
        same = (index for index, (other, _) in enumerate(calls) if _same(other, first))
        return next(same, 0 if len(calls) == 1 else None)

    def __len__(self) -> int:
        return len(self._calls)


def _first(asked: Any) -> Any:
    """Return what tells a call from others: its prompt, or its first message."""
    return asked[0] if isinstance(asked, list | tuple) and asked else asked


def _same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, str) and one == other)
