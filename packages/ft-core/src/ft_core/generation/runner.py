"""Call a LlamaIndex LLM many times: bounded, retried, and from sync code as from async."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import tenacity

from ft_core.generation import failures
from ft_core.generation.prompts import Prompt

if TYPE_CHECKING:
    from llama_index.core.llms import LLM

T = TypeVar("T")

# LLMs that compute in this process: several threads in one of them gain nothing, and
# break its tokenizer or its native library.
_IN_PROCESS = frozenset({"HuggingFaceLLM", "LocalLLM", "LlamaCPP", "IpexLLM", "MLXLLM", "Vllm"})


def is_in_process(llm: LLM) -> bool:
    """Say whether an LLM is a model in this process rather than a service."""
    return any(kind.__name__ in _IN_PROCESS for kind in type(llm).__mro__)


class Caller:
    """Completes prompts by one LLM and tries again where that can help.

    An LLM that has no asynchronous completion of its own (every `CustomLLM`) is called in
    threads, at most `workers` of them. Use it as a context manager, which ends the threads.

    Args:
        llm: any LlamaIndex LLM.
        workers: how many threads, where threads are needed.
        max_retries: further calls after a rate limit, a server error, a timeout or a lost
            connection. Waits grow exponentially with random jitter up to half a minute; a
            server's `Retry-After` is respected.
        retry_limit: calls in all where the LLM raises an error of unknown nature. What the
            server rejects (status 400 and the like) is never asked again.
    """

    def __init__(self, llm: LLM, *, workers: int, max_retries: int, retry_limit: int) -> None:
        self._llm = llm
        self._max_retries = max_retries
        self._retry_limit = retry_limit
        self._in_threads = not _has_async_complete(llm)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="ft-generation")

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        # Not waited for: after an interrupt, a thread may sit in a long call.
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def ask(self, prompt: Prompt) -> str:
        """Return the text of the LLM's answer to a text or a conversation.

        Raises:
            Exception: the LLM's own, once no further try is left.
        """
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(_may_pass),
            stop=self._exhausted,
            wait=_wait,
            sleep=_sleep,
            reraise=True,
        )
        return await retrying(self._once, prompt)

    async def _once(self, prompt: Prompt) -> str:
        method, given = "complete", prompt
        if not isinstance(prompt, str):
            from llama_index.core.llms import ChatMessage

            method = "chat"
            given = [ChatMessage(role=role, content=content) for role, content in prompt]
        if not self._in_threads:
            try:
                return _text(await getattr(self._llm, "a" + method)(given))
            except NotImplementedError:
                self._in_threads = True
        context = contextvars.copy_context()  # LlamaIndex's instrumentation lives in it
        call = functools.partial(context.run, getattr(self._llm, method), given)
        return _text(await asyncio.get_running_loop().run_in_executor(self._threads, call))

    def _exhausted(self, state: tenacity.RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        if error is not None and failures.is_transient(error):
            return state.attempt_number > self._max_retries
        return state.attempt_number >= self._retry_limit


def _may_pass(error: BaseException) -> bool:
    if not isinstance(error, Exception) or isinstance(error, NotImplementedError):
        return False
    return not (failures.is_fatal(error) or failures.is_rejected(error))


_sleep = asyncio.sleep
_backoff = tenacity.wait_random_exponential(multiplier=0.5, max=30)


def _wait(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = failures.retry_after(error) if error is not None else None
    # The jitter on top keeps all workers from coming back in the same instant.
    return _backoff(state) if asked is None else asked + 0.1 * _backoff(state)


def _text(response: Any) -> str:
    """Return a response's text; half a surrogate pair, which no file takes, becomes `?`."""
    message = getattr(response, "message", None)  # of a chat
    text = getattr(response, "text", None) if message is None else message.content
    return str(text or "").encode("utf-8", "replace").decode("utf-8")


def _has_async_complete(llm: LLM) -> bool:
    from llama_index.core.llms import CustomLLM

    own = getattr(type(llm), "acomplete", None)
    # LlamaIndex's instrumentation wraps the method again in every subclass.
    return own is not None and inspect.unwrap(own) is not inspect.unwrap(CustomLLM.acomplete)


async def for_each(
    items: Iterable[T], work: Callable[[T], Awaitable[None]], *, workers: int
) -> None:
    """Do `work` for every item, at most `workers` at a time; the first error stops all.

    Items are taken as workers become free, so that memory does not grow with their number.
    """
    queue = iter(items)

    async def worker() -> None:
        for item in queue:
            await work(item)

    tasks = [asyncio.create_task(worker()) for _ in range(workers)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine from synchronous code, also where an event loop is running (notebooks).

    All runs share one event loop in a background thread: an LLM's asynchronous client keeps
    its connections from one run to the next, and they work only in the loop that opened them.
    """
    future = asyncio.run_coroutine_threadsafe(coroutine, _background.loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()  # Ctrl-C: stops what is in flight
        raise


class _BackgroundLoop:
    """An event loop in a daemon thread, started when first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            # After a fork the thread is gone, and its loop with it.
            if self._loop is None or self._thread is None or not self._thread.is_alive():
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="ft-generation-loop", daemon=True
                )
                self._thread.start()
            return self._loop


_background = _BackgroundLoop()
