"""Record what an LLM is asked in a live app and what it answers, as examples to train on."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, overload

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.base_selector import BaseSelector
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.chat_engine.types import BaseChatEngine
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.exception import ExceptionEvent
from llama_index.core.instrumentation.events.llm import (
    LLMChatEndEvent,
    LLMChatStartEvent,
    LLMCompletionEndEvent,
    LLMCompletionStartEvent,
)
from llama_index.core.instrumentation.events.span import SpanDropEvent
from llama_index.core.instrumentation.span import active_span_id
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.question_gen.types import BaseQuestionGenerator
from llama_index.core.response_synthesizers import BaseSynthesizer
from pydantic import PrivateAttr

from ft_core.datasets import ChatDataset, ChatExample
from ft_core.errors import ArgumentError, ArtifactError, DatasetError
from ft_core.files import Journal
from ft_core.hooks import Attachment, Call, Hook, clean_text, find_components
from ft_openai_distill.calls import (
    COMPONENT_METHODS,
    LLM_METHODS,
    OpenCalls,
    StartedCall,
    answer_of,
    is_inner_call,
    of_event,
    of_method,
)
from ft_openai_distill.messages import answer_after, map_texts, to_chat_message

logger = logging.getLogger(__name__)

_MAX_DIGESTS = 10_000


class OpenAIFineTuningHandler(Hook, BaseCallbackHandler):
    """Records each call of an LLM with its answer, in the form that fine-tuning takes.

    ```python
    handler = OpenAIFineTuningHandler("teacher.jsonl")
    handler.attach(query_engine)  # or `with handler.attach(query_engine): ...`
    query_engine.query("What is the late fee?")
    dataset = handler.to_dataset()
    ```

    There are three ways to plug it in, and a call that comes by several is recorded once:
    `attach` (finds every LLM inside an app, whenever it was built), a `CallbackManager`, and
    `event_handler()` for `llama_index.core.instrumentation`. By the last two, settings that
    stand in the LLM's `additional_kwargs` are not seen.

    Chat and completion calls are recorded, streamed and async ones too, with their tools,
    tool calls and response format. Of an LLM that asks another, the outermost one counts. Not
    recorded are calls that fail, streams that the app does not read to the end, answers with
    neither text nor a tool call, and conversations that break a rule of the format (see
    `ft_core.datasets.ChatExample`): each line of the journal is an example that loads.

    Safe with threads, asyncio and several processes on one file. Nothing that goes wrong while
    the app runs reaches it: see `ft_core.hooks.Hook`. A line survives the death of the process,
    but is not forced to the disk before the app goes on: a power cut may take the last ones.

    Args:
        path: the journal, JSON Lines; one that exists is continued. An engine takes it as it
            is. Without a path the calls are kept in memory, all of them, until
            `save_finetuning_events`.
        predicate: is given each example as it would be written, and says whether to.
        sample: share of the examples to write; which ones depends on their content and `seed`.
        models: names of models to record, or patterns such as `gpt-4*`.
        components: names of classes to record, or patterns: of the LLM, or of the query
            engine, synthesizer, selector or agent of an attached app that calls it.
        redact: applied to each text of the messages, to the strings in the arguments of tool
            calls and to the query, before anything else sees them. Where it raises, nothing is
            written. The definitions of tools, which are the app's code, stay as they are.
        deduplicate: leave out a call that is the same as one of the last 10,000; exports
            leave out all that are the same.
        seed: for `sample`, and for the split of `to_dataset`.

    Raises:
        ArgumentError: `path` is a folder, or `sample` is no share.
        ArtifactError: `path` is a file that holds no examples.
    """

    methods = (*LLM_METHODS, *COMPONENT_METHODS)

    def __init__(
        self,
        path: Path | str | None = None,
        *,
        predicate: Callable[[ChatExample], bool] | None = None,
        sample: float = 1.0,
        models: str | Sequence[str] | None = None,
        components: str | Sequence[str] | None = None,
        redact: Callable[[str], str] | None = None,
        deduplicate: bool = True,
        seed: int = 0,
    ) -> None:
        Hook.__init__(self)
        ignored = [kind for kind in CBEventType if kind is not CBEventType.LLM]
        BaseCallbackHandler.__init__(self, ignored, ignored)
        if not isinstance(sample, int | float) or not 0 < sample <= 1:
            raise ArgumentError("sample", f"is a share above 0 and up to 1, not {sample!r}")
        self.path = None if path is None else Path(path)
        self._journal = None if self.path is None else _journal(self.path)
        self._events: list[dict[str, Any]] = []
        self._predicate = predicate
        self._sample = sample
        self._models = _patterns(models)
        self._components = _patterns(components)
        self._redact = redact
        self._deduplicate = deduplicate
        self._seed = seed
        self._recent = _Recent(_MAX_DIGESTS)
        self._callbacks = OpenCalls()
        self._spans = OpenCalls()
        self._event_handler = _EventHandler.of(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> OpenAIFineTuningHandler:
        # An app that copies its LLM copies the callback manager, and this with it.
        return self

    def __copy__(self) -> OpenAIFineTuningHandler:
        return self

    # --- Attached to an app ------------------------------------------------------------------

    def components(self) -> tuple[type, ...]:
        """Watch every LLM, and to know whom it answers, what calls it."""
        from llama_index.core.agent.workflow import BaseWorkflowAgent

        return (
            BaseLLM,
            BaseQueryEngine,
            BaseChatEngine,
            BaseSynthesizer,
            BaseSelector,
            BaseQuestionGenerator,
            BaseWorkflowAgent,
        )

    def attach(self, target: Any) -> Attachment:
        """Record the calls of every LLM inside `target`; see `Hook.attach`.

        Raises:
            ArgumentError: there is no LLM inside, so nothing would be recorded.
        """
        if not find_components(target, (BaseLLM,)):
            raise ArgumentError(
                "target",
                f"found no LLM inside a {type(target).__name__}; attach to the object that the "
                "app calls (of an index, its query engine or chat engine), to the LLM itself, "
                "or to `Settings`",
            )
        return super().attach(target)

    def wants(self, call: Call) -> bool:
        """Report the outermost call of an LLM, and what it happens in."""
        if not isinstance(call.target, BaseLLM):
            return True
        if isinstance(call.target, StructuredLLM) or call.method not in LLM_METHODS:
            return False  # it asks the LLM that it wraps, with the schema
        return not any(isinstance(outer.target, BaseLLM) for outer in call.outer)

    def started(self, call: Call) -> None:
        """Take down what the LLM is asked, before the app can change it."""
        if isinstance(call.target, BaseLLM):
            call.state = self._chosen(of_method(call))

    def observe(self, call: Call) -> None:
        """Record a call that ended well."""
        if call.state is not None and call.error is None and call.complete:
            self._record(call.state, call.result, call.seconds)

    # --- In a callback manager ---------------------------------------------------------------

    def on_event_start(
        self,
        event_type: CBEventType,
        payload: dict[str, Any] | None = None,
        event_id: str = "",
        parent_id: str = "",
        **kwargs: Any,
    ) -> str:
        """Take down what an LLM is asked; called by the `CallbackManager`."""
        try:
            if event_type is CBEventType.LLM and payload:
                self._callback_started(payload, event_id)
        except Exception as error:
            self._failed(error)
        return event_id

    def _callback_started(self, payload: Mapping[str, Any], event_id: str) -> None:
        asked = payload.get(EventPayload.MESSAGES, payload.get(EventPayload.PROMPT))
        llm = payload.get(EventPayload.SERIALIZED) or {}
        span = active_span_id.get()
        if asked is None or self._spans.has(span, asked) or self._is_elsewhere(llm):
            return
        settings = payload.get(EventPayload.ADDITIONAL_KWARGS) or {}
        started = self._chosen(of_event(asked, settings, llm, span, self.running()))
        if started is not None:
            started.id = event_id or started.id
            self._callbacks.add(event_id, asked, started)

    def on_event_end(
        self,
        event_type: CBEventType,
        payload: dict[str, Any] | None = None,
        event_id: str = "",
        **kwargs: Any,
    ) -> None:
        """Record a call that ended well; called by the `CallbackManager`."""
        try:
            started = self._callbacks.take(event_id) if event_type is CBEventType.LLM else None
            if started is not None and payload and EventPayload.EXCEPTION not in payload:
                response = payload.get(EventPayload.RESPONSE, payload.get(EventPayload.COMPLETION))
                self._record(started, response)
        except Exception as error:
            self._failed(error)

    def start_trace(self, trace_id: str | None = None) -> None:
        """Do nothing; the `CallbackManager` asks for it."""

    def end_trace(
        self, trace_id: str | None = None, trace_map: dict[str, list[str]] | None = None
    ) -> None:
        """Do nothing; the `CallbackManager` asks for it."""

    # --- In the instrumentation --------------------------------------------------------------

    def event_handler(self) -> BaseEventHandler:
        """Return what `llama_index.core.instrumentation` takes to report every LLM call.

        ```python
        get_dispatcher().add_event_handler(handler.event_handler())
        ```
        """
        return self._event_handler

    def _on_event(self, event: BaseEvent) -> None:
        try:
            span = str(event.span_id)
            if isinstance(event, LLMChatStartEvent):
                self._event_started(event, event.messages, span)
            elif isinstance(event, LLMCompletionStartEvent):
                self._event_started(event, event.prompt, span)
            elif isinstance(event, LLMChatEndEvent):
                self._event_ended(self._spans.take(span, event.messages), event.response)
            elif isinstance(event, LLMCompletionEndEvent):
                self._event_ended(self._spans.take(span, event.prompt), event.response)
            elif isinstance(event, ExceptionEvent | SpanDropEvent):
                self._spans.drop(span)
        except Exception as error:
            self._failed(error)

    def _event_started(self, event: Any, asked: Any, span: str) -> None:
        if self._spans.has(span, asked) or self._is_elsewhere(event.model_dict):
            return
        settings = event.additional_kwargs
        started = of_event(asked, settings, event.model_dict, event.span_id, self.running())
        self._spans.add(span, asked, self._chosen(started))

    def _event_ended(self, started: StartedCall | None, response: Any) -> None:
        if started is not None:
            self._record(started, response)

    def _is_elsewhere(self, llm: Mapping[str, Any]) -> bool:
        """Whether another report of the call that LlamaIndex now tells of is the one to record."""
        return (
            llm.get("class_name") == StructuredLLM.class_name()
            or any(isinstance(call.target, BaseLLM) for call in self.running())
            or is_inner_call()
        )

    # --- What is written ---------------------------------------------------------------------

    def _chosen(self, started: StartedCall) -> StartedCall | None:
        """Return the call if its model and component are to be recorded."""
        names = [started.component, *started.inside]
        if not _matches(self._models, [started.model]) or not _matches(self._components, names):
            return None
        return started

    def _record(self, started: StartedCall, response: Any, seconds: float | None = None) -> None:
        answer = answer_of(response)
        if answer is None:
            return
        messages = [*started.messages, answer_after(started.messages, answer)]
        settings = {k: v for k, v in started.settings.items() if k != "tool_choice"}
        metadata = started.metadata(response, seconds)
        if "query" in metadata:
            metadata["query"] = self._clean(metadata["query"])
        messages = [map_texts(message, self._clean) for message in messages]
        content = {"messages": messages, **settings}
        example = ChatExample(**content, metadata=metadata)
        digest = _digest(content)
        if not self._is_sampled(digest) or (self._predicate and not self._predicate(example)):
            return
        if not self._deduplicate:
            self._write({**content, "metadata": metadata})
        elif self._recent.add(digest):
            try:
                self._write({**content, "metadata": metadata})
            except BaseException:
                self._recent.remove(digest)
                raise

    def _write(self, line: dict[str, Any]) -> None:
        if self._journal is None:
            self._events.append(line)
        else:
            self._journal.append(line)

    def _clean(self, text: str) -> str:
        return clean_text(text, self._redact)

    def _is_sampled(self, digest: bytes) -> bool:
        if self._sample >= 1:
            return True
        key = hashlib.blake2b(digest, digest_size=8, salt=str(self._seed).encode()[:16]).digest()
        return int.from_bytes(key, "big") < self._sample * 2**64

    # --- From the record ---------------------------------------------------------------------

    def get_finetuning_events(self) -> dict[str, dict[str, Any]]:
        """Return id to `{"messages": [...], "response": ...}`, as LlamaIndex's `ChatMessage`."""
        events = {}
        for line in self._lines():
            messages = [to_chat_message(message) for message in line["messages"]]
            events[line["metadata"]["id"]] = {"messages": messages[:-1], "response": messages[-1]}
        return events

    def save_finetuning_events(self, path: Path | str) -> None:
        """Write the file that OpenAI's fine-tuning takes, whole or not at all.

        Raises:
            DatasetError: nothing is recorded.
        """
        dataset = self.to_dataset()
        dataset.to_openai_jsonl(path)
        logger.info("%s: wrote %d examples", path, len(dataset))

    @overload
    def to_dataset(self, split: None = None) -> ChatDataset: ...
    @overload
    def to_dataset(self, split: Mapping[str, float]) -> dict[str, ChatDataset]: ...
    def to_dataset(
        self, split: Mapping[str, float] | None = None
    ) -> ChatDataset | dict[str, ChatDataset]:
        """Return what is recorded, by this process and others, as a dataset.

        Args:
            split: part name to its share, as in `{"train": 0.8, "validation": 0.2}`; then the
                result is a dataset per part, with all calls about one question in one part.

        Raises:
            DatasetError: nothing is recorded, or there are too few questions for the split.
        """
        if next(self._lines(), None) is None:
            raise DatasetError(
                "no call is recorded; attach the handler to the app and use it (and see "
                "handler.failures for what could not be recorded)",
                source=self.path,
            )
        if self.path is None:
            dataset = ChatDataset.coerce(list(self._events))
        else:
            dataset = ChatDataset.load(self.path)
        if self._deduplicate:
            dataset = dataset.deduplicated()
        return dataset if split is None else dataset.split(split, seed=self._seed)

    def _lines(self) -> Iterator[dict[str, Any]]:
        if self._journal is None:
            yield from list(self._events)
        else:
            yield from _records(self._journal)


class _EventHandler(BaseEventHandler):
    """Passes LlamaIndex's events on to the handler."""

    _handler: Any = PrivateAttr()

    @classmethod
    def class_name(cls) -> str:
        return "OpenAIFineTuningHandler"

    @classmethod
    def of(cls, handler: OpenAIFineTuningHandler) -> _EventHandler:
        result = cls()
        result._handler = handler
        return result

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        self._handler._on_event(event)


class _Recent:
    """The digests of the last examples, so many and no more."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._digests: OrderedDict[bytes, None] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, digest: bytes) -> bool:
        """Return whether the digest is new, and take note of it."""
        with self._lock:
            new = digest not in self._digests
            self._digests[digest] = None
            self._digests.move_to_end(digest)
            if len(self._digests) > self._limit:
                self._digests.popitem(last=False)
            return new

    def remove(self, digest: bytes) -> None:
        with self._lock:
            self._digests.pop(digest, None)


def _digest(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _patterns(names: str | Sequence[str] | None) -> list[str] | None:
    return [names] if isinstance(names, str) else None if names is None else list(names)


def _matches(patterns: list[str] | None, names: list[str]) -> bool:
    return patterns is None or any(
        fnmatchcase(name, pattern) for name in names for pattern in patterns
    )


def _journal(path: Path) -> Journal:
    """Return the journal, after a look at what is in the file already."""
    if path.is_dir():
        raise ArgumentError("path", f"{path} is a folder; name a file in it")
    journal = Journal(path)
    next(_records(journal), None)
    return journal


def _records(journal: Journal) -> Iterator[dict[str, Any]]:
    for record in journal.records():
        metadata = record.get("metadata") if isinstance(record, dict) else None
        if not isinstance(metadata, dict) or "id" not in metadata or not record.get("messages"):
            raise ArtifactError(
                f"{journal.path}: holds a line that no OpenAIFineTuningHandler wrote; "
                "name another file"
            )
        yield record
