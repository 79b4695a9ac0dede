"""A causal language model in this process, as an LLM of LlamaIndex."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
    TextBlock,
    ToolCallBlock,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection

from ft_core.errors import ArgumentError
from ft_core.sft.chat_format import ChatFormat, new_call_id, without_beginning
from ft_core.sft.models import context_window, greedy, load_model
from ft_core.sft.sampling import Sample, written

if TYPE_CHECKING:
    from llama_index.core.tools import BaseTool


class LocalLLM(FunctionCallingLLM):
    """A model of transformers that answers in this process, by its own chat template.

    Greedy unless `temperature` is above 0. One answer is written at a time: threads and tasks
    wait for each other. Answers carry their token counts as OpenAI's do, in
    `response.raw["usage"]`.

    Make one with `LocalLLM.from_pretrained`, or get one from an engine.
    """

    model_name: str
    """Hub name or folder."""
    context_window: int
    """Tokens of prompt and answer together."""
    max_new_tokens: int = Field(default=256, gt=0)
    """The longest answer, in tokens."""
    temperature: float = Field(default=0.0, ge=0.0)
    """0 always takes the most probable token."""
    stop: list[str] = Field(default_factory=list)
    """Texts at which an answer ends; they are not part of it."""
    is_function_calling_model: bool = False
    """Whether LlamaIndex gives it tools as such; for a student that was trained on tool calls."""
    generate_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further settings of transformers' `GenerationConfig`."""

    _model: Any = PrivateAttr()
    _tokenizer: Any = PrivateAttr()
    _format: ChatFormat | None = PrivateAttr()
    _lock: Any = PrivateAttr(default_factory=threading.Lock)

    def __init__(self, model: Any, tokenizer: Any, **settings: Any) -> None:
        defaults = {
            "model_name": model.config.name_or_path,
            "context_window": context_window(model),
        }
        for name in settings.keys() - type(self).model_fields.keys():
            raise ArgumentError(name, "is no setting of a LocalLLM")  # LlamaIndex would ignore it
        super().__init__(**defaults | settings)
        self._model = model
        self._tokenizer = tokenizer
        self._format = ChatFormat(tokenizer) if tokenizer.chat_template else None

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, device: str | None = None, **settings: Any
    ) -> LocalLLM:
        """Load a model from the hub, a folder, or what an engine saved.

        Args:
            name: hub name or folder.
            device: `cpu`, `cuda`, `cuda:1`, `mps`; the best there is by default.
            settings: of this class, for example `max_new_tokens`.

        Raises:
            ArgumentError: there is no such model, or it cannot be loaded.
            MissingExtraError: `ft-core[local]` is not installed.
        """
        model, tokenizer = load_model(name, device)
        return cls(model, tokenizer, **{"model_name": str(name), **settings})

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex serialises."""
        return "LocalLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex wants to know."""
        return LLMMetadata(
            context_window=self.context_window,
            num_output=self.max_new_tokens,
            is_chat_model=self._format is not None,
            is_function_calling_model=self.is_function_calling_model,
            model_name=self.model_name,
        )

    # --- Chat ----------------------------------------------------------------------------------

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation; `tools` are OpenAI's."""
        return self._chat(messages, **kwargs)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation in a thread."""
        return await asyncio.to_thread(self._chat, messages, **kwargs)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer a conversation token by token; tool calls come with the last item."""
        return self._stream_chat(messages, **kwargs)

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        """Answer a conversation token by token, from a thread."""
        return _asynchronous(self._stream_chat(messages, **kwargs))

    def sample(
        self,
        messages: Sequence[ChatMessage],
        n: int,
        *,
        temperature: float = 1.0,
        seed: int = 0,
        greedy_first: bool = False,
        **kwargs: Any,
    ) -> list[Sample]:
        """Return `n` answers to a conversation, written side by side: little dearer than one.

        Args:
            messages: the conversation.
            n: how many answers.
            temperature: above 0; the higher, the more they differ.
            seed: the same gives the same answers, on the same device and libraries.
            greedy_first: whether the first answer is the greedy one, whatever the temperature.
            kwargs: as `chat` takes them, for example `max_tokens` or `stop`.

        Raises:
            ArgumentError: `n` or the temperature is out of range, or the conversation is longer
                than the model's window.
        """
        if type(n) is not int or n < 1:
            raise ArgumentError("n", f"is a whole number from 1, not {n!r}")
        if not 0 < temperature < float("inf"):
            raise ArgumentError("temperature", f"is a number above 0, not {temperature!r}")
        prompt, _, settings = self._chat_prompt(messages, kwargs)
        inputs, config, stop = self._generation(prompt, {**settings, "temperature": 0.0})
        with self._lock:
            answers = written(
                self._model,
                inputs,
                config,
                count=n,
                temperature=temperature,
                seed=seed,
                greedy_first=greedy_first,
                stopping=self._stopping(stop),
            )
        return [
            Sample(_up_to(_decoded(self._tokenizer, answer.ids), stop), answer.mean_logprob)
            for answer in answers
        ]

    # --- Completion ----------------------------------------------------------------------------

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt; a chat model gets it as the user's message unless `formatted`."""
        return self._complete(prompt, formatted, **kwargs)

    @llm_completion_callback()
    async def acomplete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponse:
        """Answer a prompt in a thread."""
        return await asyncio.to_thread(self._complete, prompt, formatted, **kwargs)

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseGen:
        """Answer a prompt token by token."""
        return self._stream_complete(prompt, formatted, **kwargs)

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """Answer a prompt token by token, from a thread."""
        return _asynchronous(self._stream_complete(prompt, formatted, **kwargs))

    # --- Tools ---------------------------------------------------------------------------------

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        messages = list(chat_history or [])
        if isinstance(user_msg, str):
            user_msg = ChatMessage(role=MessageRole.USER, content=user_msg)
        if user_msg is not None:
            messages.append(user_msg)
        described = [tool.metadata.to_openai_tool(skip_length_check=True) for tool in tools]
        return {"messages": messages, "tools": described or None, **kwargs}

    def _validate_chat_with_tools_response(
        self,
        response: ChatResponse,
        tools: Sequence[BaseTool],
        allow_parallel_tool_calls: bool = False,
        **kwargs: Any,
    ) -> ChatResponse:
        if not allow_parallel_tool_calls:
            calls = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
            others = [block for block in response.message.blocks if block not in calls]
            response.message.blocks = [*others, *calls[:1]]
        return response

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """Return the calls in an answer.

        Raises:
            ValueError: there is none; only with `error_on_no_tool_call`.
        """
        calls = [
            ToolSelection(
                tool_id=block.tool_call_id or "",
                tool_name=block.tool_name,
                tool_kwargs=block.tool_kwargs,
            )
            for block in response.message.blocks
            if isinstance(block, ToolCallBlock)
        ]
        if not calls and error_on_no_tool_call:
            raise ValueError(f"expected a tool call, got {response.message.content!r}")
        return calls

    # --- Generation ----------------------------------------------------------------------------

    def _chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        prompt, tools, settings = self._chat_prompt(messages, kwargs)
        text, usage = self._generated(prompt, settings)
        return self._chat_response(text, usage, bool(tools))

    def _stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        prompt, tools, settings = self._chat_prompt(messages, kwargs)
        sent = ""
        with closing(self._streamed(prompt, settings)) as stream:
            for text, usage in stream:
                if usage is not None:
                    response = self._chat_response(text, usage, bool(tools))
                    response.delta = (response.message.content or "")[len(sent) :]
                    yield response
                    return
                # What may be a tool call is no text for the app to show.
                known = self._format.certain(text) if tools and self._format else text
                if len(known) > len(sent):
                    delta, sent = known[len(sent) :], known
                    message = ChatMessage(role=MessageRole.ASSISTANT, content=sent)
                    yield ChatResponse(message=message, delta=delta)

    def _complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        text, usage = self._generated(self._completion_prompt(prompt, formatted), kwargs)
        return CompletionResponse(text=text, raw={"usage": usage}, additional_kwargs=usage)

    def _stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseGen:
        sent = ""
        with closing(self._streamed(self._completion_prompt(prompt, formatted), kwargs)) as stream:
            for text, usage in stream:
                delta, sent = text[len(sent) :], text
                raw = None if usage is None else {"usage": usage}
                yield CompletionResponse(
                    text=text, delta=delta, raw=raw, additional_kwargs=usage or {}
                )

    def _chat_prompt(
        self, messages: Sequence[ChatMessage], kwargs: dict[str, Any]
    ) -> tuple[str, Any, dict[str, Any]]:
        """Return (prompt, the tools in it, settings of the generation)."""
        if self._format is None:
            raise ArgumentError("messages", f"{self.model_name} has no chat template; use complete")
        settings = dict(kwargs)
        tools = settings.pop("tools", None)
        settings.pop("tool_choice", None)
        schema = settings.pop("response_format", None)
        dicts = [_message_dict(message) for message in messages]
        return self._format.prompt(dicts, tools, schema), tools, settings

    def _completion_prompt(self, prompt: str, formatted: bool) -> str:
        if formatted or self._format is None:
            return prompt
        return self._format.prompt([{"role": "user", "content": prompt}])

    def _chat_response(self, text: str, usage: dict[str, int], tools: bool) -> ChatResponse:
        # Without tools, JSON that looks like a call is an answer.
        rest, calls = self._format.parsed(text) if tools and self._format else (text, [])
        blocks: list[Any] = [TextBlock(text=rest)] if rest or not calls else []
        blocks += [
            ToolCallBlock(
                tool_call_id=new_call_id(), tool_name=call.name, tool_kwargs=call.arguments
            )
            for call in calls
        ]
        return ChatResponse(
            message=ChatMessage(role=MessageRole.ASSISTANT, blocks=blocks),
            raw={"usage": usage},
            additional_kwargs=usage,
        )

    def _generated(self, prompt: str, settings: dict[str, Any]) -> tuple[str, dict[str, int]]:
        """Return (answer, token counts)."""
        inputs, config, stop = self._generation(prompt, settings)
        with self._lock:
            ids = self._model.generate(**inputs, generation_config=config, **self._stopping(stop))
        return self._answer(inputs, ids, stop)

    def _streamed(
        self, prompt: str, settings: dict[str, Any]
    ) -> Generator[tuple[str, dict[str, int] | None], None, None]:
        """Yield (text so far, None) as it grows, and at the end the answer and token counts.

        Each text goes on where the one before ended.
        """
        inputs, config, stop = self._generation(prompt, settings)
        arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        cancelled = threading.Event()

        def generate() -> None:
            try:
                stopping = self._stopping(stop, cancelled.is_set)
                with self._lock:
                    result = self._model.generate(
                        **inputs,
                        generation_config=config,
                        streamer=_Streamer(arrived),
                        **stopping,
                    )
                arrived.put(("ids", result))
            except BaseException as error:
                arrived.put(("error", error))

        threading.Thread(target=generate, daemon=True, name="LocalLLM").start()
        text = ""
        decoder = _Decoder(self._tokenizer)
        try:
            while True:
                kind, value = arrived.get()
                if kind == "error":
                    raise value
                if kind == "ids":
                    yield self._answer(inputs, value, stop)
                    return
                # What may be the beginning of a stop text is held back.
                grown = without_beginning(_up_to(decoder.add(value), stop), stop)
                if len(grown) > len(text):
                    text = grown
                    yield text, None
        finally:
            cancelled.set()  # of an app that stopped reading: the model stops too

    def _generation(self, prompt: str, settings: dict[str, Any]) -> tuple[Any, Any, list[str]]:
        changes = {**self.generate_kwargs, **settings}
        stop = [one for one in (*self.stop, *_as_list(changes.pop("stop", None))) if one]
        asked = changes.pop("max_tokens", None), changes.pop("max_new_tokens", None)
        length = next((number for number in asked if number), self.max_new_tokens)
        temperature = changes.pop("temperature", None)
        if temperature is None:
            temperature = self.temperature
        inputs = self._tokenizer(
            prompt, return_tensors="pt", add_special_tokens=self._format is None
        )
        inputs.pop("token_type_ids", None)
        count = inputs["input_ids"].shape[1]
        if count >= self.context_window:
            raise ArgumentError(
                "messages",
                f"take {count} tokens, and {self.model_name} has a window of {self.context_window}",
            )
        changes |= {
            "max_new_tokens": min(length, self.context_window - count),
            "max_length": None,
            "pad_token_id": self._tokenizer.pad_token_id,
            "use_cache": True,
        }
        if ends := self._end_ids():
            changes.setdefault("eos_token_id", ends)
        if temperature > 0:
            changes |= {"do_sample": True, "temperature": temperature}
        return inputs.to(self._model.device), greedy(self._model, **changes), stop

    def _end_ids(self) -> list[int]:
        """Return the tokens that end an answer: the configuration's, and the chat template's."""
        own = self._model.generation_config.eos_token_id
        listed = own if isinstance(own, list) else [] if own is None else [own]
        return list(dict.fromkeys([*listed, *(self._format.end_ids if self._format else [])]))

    def _stopping(
        self, stop: list[str], cancelled: Callable[[], bool] | None = None
    ) -> dict[str, Any]:
        from transformers import StoppingCriteriaList, StopStringCriteria

        criteria: list[Any] = [StopStringCriteria(self._tokenizer, stop)] if stop else []
        if cancelled is not None:
            criteria.append(_Cancelled(cancelled))
        return {"stopping_criteria": StoppingCriteriaList(criteria)}

    def _answer(self, inputs: Any, ids: Any, stop: list[str]) -> tuple[str, dict[str, int]]:
        prompt = inputs["input_ids"].shape[1]
        new = ids[0][prompt:]
        text = _decoded(self._tokenizer, new)
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": len(new),
            "total_tokens": prompt + len(new),
        }
        return _up_to(text, stop), usage


class _Cancelled:
    """Stops the generation as soon as nobody reads it any more."""

    def __init__(self, cancelled: Callable[[], bool]) -> None:
        self._cancelled = cancelled

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        import torch

        return torch.full((len(input_ids),), self._cancelled(), device=input_ids.device)


class _Streamer:
    """Passes on each token that `generate` writes, but not the prompt, which comes first."""

    def __init__(self, arrived: queue.SimpleQueue[Any]) -> None:
        self._arrived = arrived
        self._prompt = True

    def put(self, ids: Any) -> None:
        """Take the prompt, then one token after the other."""
        if not self._prompt:
            self._arrived.put(("token", int(ids.reshape(-1)[-1])))
        self._prompt = False

    def end(self) -> None:
        """Nothing: the ids come with the result."""


class _Decoder:
    """Turns tokens, one by one, into the text that decoding them all together gives.

    Each is decoded behind those before it, as some tokenizers drop the space that a text begins
    with; a character whose bytes are not all there yet is held back.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # of the tokens that are decoded once more
        self._known = 0  # before here, their text is part of `_text`
        self._text = ""

    def add(self, token: int) -> str:
        """Return the text so far."""
        self._ids.append(token)
        before = _decoded(self._tokenizer, self._ids[self._start : self._known])
        now = _decoded(self._tokenizer, self._ids[self._start :])
        if len(now) > len(before) and not now.endswith("\ufffd"):
            self._text += now[len(before) :]
            self._start, self._known = self._known, len(self._ids)
        return self._text


def _decoded(tokenizer: Any, ids: Any) -> str:
    # As the model wrote it: some tokenizers would tidy the spaces before punctuation.
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


async def _asynchronous(stream: Iterator[Any]) -> AsyncIterator[Any]:
    """Yield the items of a generator, each fetched in a thread."""
    end = object()
    fetched: asyncio.Future[Any] | None = None
    try:
        while True:
            fetched = asyncio.ensure_future(asyncio.to_thread(next, stream, end))
            # A cancelled task stops waiting, its thread goes on until the next item.
            item = await asyncio.shield(fetched)
            if item is end:
                return
            yield item
    finally:
        if fetched is None or fetched.done():
            stream.close()  # type: ignore[attr-defined]
        else:
            fetched.add_done_callback(lambda future: _closed(stream, future))


def _closed(stream: Iterator[Any], fetched: asyncio.Future[Any]) -> None:
    if not fetched.cancelled():
        fetched.exception()  # seen: nobody waits for it any more
    stream.close()  # type: ignore[attr-defined]


def _message_dict(message: ChatMessage) -> dict[str, Any]:
    """Return a message as OpenAI's dict, of text and tool calls."""
    calls = []
    parts: list[dict[str, Any]] = []
    for block in message.blocks:
        if isinstance(block, ToolCallBlock):
            arguments = block.tool_kwargs
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            function = {"name": block.tool_name, "arguments": arguments}
            calls.append({"id": block.tool_call_id, "type": "function", "function": function})
        elif isinstance(block, TextBlock):
            parts.append({"type": "text", "text": block.text})
        elif block.block_type != "thinking":
            parts.append({"type": block.block_type})
    role = {"chatbot": "assistant", "model": "assistant"}.get(
        message.role.value, message.role.value
    )
    result: dict[str, Any] = {"role": role, "content": parts}
    if calls:
        result["tool_calls"] = calls
    if message.additional_kwargs.get("tool_call_id"):
        result["tool_call_id"] = message.additional_kwargs["tool_call_id"]
    return result


def _up_to(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    ends = [at for at in map(text.find, stop) if at >= 0]
    return text[: min(ends)] if ends else text


def _as_list(stop: str | Sequence[str] | None) -> list[str]:
    if stop is None:
        return []
    return [stop] if isinstance(stop, str) else list(stop)
