"""Watch the components of a live LlamaIndex app without ever breaking it.

A pack's recorder subclasses `Hook`: it names the component types and the methods to watch and
says in `observe` what to do with a finished call. This module finds the components inside
whatever the app is built of, taps the calls, and keeps every failure of the hook to itself.

How a call is tapped: the method of the component's *class* is replaced by one that looks up
whether this very object is watched; all other objects of the class pass straight through.
The object itself is not touched, so that a copy or a pickle of it is clean (a wrapper in the
instance's `__dict__` would send a copy's calls to the original), and it does not matter when
or with which callback manager the app was built.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import time
import types
import weakref
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

from ft_core.errors import ArgumentError

logger = logging.getLogger(__name__)

_MAX_OBJECTS = 100_000
_MAX_ENTRIES = 1_000  # a longer list or dict holds data, not the parts of an app


@dataclass(slots=True, eq=False)
class Call:
    """One call of a watched method; `observe` gets it when the call has ended."""

    target: Any
    """The component that was called."""
    method: str
    """The name of the method."""
    args: tuple[Any, ...]
    """Positional arguments, without `self`."""
    kwargs: dict[str, Any]
    """Keyword arguments."""
    result: Any = None
    """What the call returned, the object itself; of a stream, the last item that was read."""
    error: BaseException | None = None
    """What the call raised, or None."""
    complete: bool = True
    """False for a stream that was dropped before its end, so that `result` is only a part."""
    seconds: float = 0.0
    """Wall time; of a stream, until its end."""
    outer: tuple[Call, ...] = ()
    """The calls of the same hook that this one is inside of, the outermost first."""
    state: Any = None
    """Free for the hook: what `started` keeps for `observe`."""


class Hook(ABC):
    """Base of the callbacks that attach to a live app.

    Whatever goes wrong in `wants`, `started` or `observe` is logged once per kind (with its
    traceback), counted in `failures`, and swallowed; the app's own exception passes through
    untouched.

    A call that happens inside another watched call of the same hook is not reported, unless
    `wants` says otherwise: of a retriever that asks other retrievers, the outermost one counts.
    This holds across tasks and threads that inherit the context, as LlamaIndex's own do. A
    method that returns a generator is reported when the generator ends or is closed.
    """

    methods: ClassVar[tuple[str, ...]]
    """Names of the methods to watch; one that a component lacks is passed over."""

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()
        """Kind of failure inside the hook to how often it happened."""

    @abstractmethod
    def components(self) -> tuple[type, ...]:
        """Return the component types to watch (here, so that they are imported late)."""

    def wants(self, call: Call) -> bool:
        """Return whether to report this call, which is about to start.

        A call that is not wanted is no part of `outer` for the calls inside it.
        """
        return not call.outer

    def started(self, call: Call) -> None:  # noqa: B027 - optional
        """Take note of what the call may change; `call.state` keeps it for `observe`."""

    @abstractmethod
    def observe(self, call: Call) -> None:
        """Record a call that has ended, well or badly."""

    def attach(self, target: Any) -> Attachment:
        """Watch every component found inside `target`; the app need not be rebuilt.

        `target` is an engine, a retriever, a tool, an agent, or a list or dict of them, or an
        object of the app that holds them. Components that it gets later are not seen: attach
        again, which adds what is new.

        Returns:
            An object that detaches these components again: `with hook.attach(engine): ...`.

        Raises:
            ArgumentError: there is no such component inside, so nothing would be recorded.
        """
        wanted = self.components()
        found = find_components(target, wanted)
        if not found:
            names = " or ".join(kind.__name__ for kind in wanted)
            raise ArgumentError(
                "target",
                f"found no {names} inside a {type(target).__name__}; attach to the object that "
                "the app calls (of an index, its query engine, chat engine or retriever)",
            )
        attachment = Attachment(self, [])
        try:
            for component in found:
                if _watch(component, self):
                    attachment.components.append(component)
        except BaseException:
            attachment.detach()
            raise
        return attachment

    def detach(self, target: Any = None) -> None:
        """Stop watching the components inside `target`; all of this hook's by default."""
        if target is None:
            components = [ref() for ref, hooks in list(_watched.values()) if self in hooks]
        else:
            components = find_components(target, self.components())
        for component in components:
            _unwatch(component, self)

    def running(self) -> tuple[Call, ...]:
        """Return this hook's calls that this context is inside of, the outermost first."""
        return tuple(
            call
            for observation in _running.get()
            for hook, call in observation.calls
            if hook is self
        )

    def _guarded(self, step: Callable[[Call], Any], call: Call) -> Any:
        try:
            return step(call)
        except Exception as error:
            self._failed(error)
            return None

    def _failed(self, error: Exception) -> None:
        """Count and, the first time, log an error of the hook; call it inside `except`."""
        with suppress(Exception):  # a logging handler may raise too
            kind = type(error).__name__
            if isinstance(error, OSError) and error.errno:
                kind += f" {error.errno}"
            self.failures[kind] += 1
            if self.failures[kind] == 1:
                slip = isinstance(error, ArgumentError)  # the caller's, which its message explains
                logger.warning(
                    "%s lost a record%s; the app goes on. More errors of this kind are counted in "
                    "`failures`, not logged.",
                    type(self).__name__,
                    f": {error}" if slip else "",
                    exc_info=not slip,
                )


class Attachment:
    """What `Hook.attach` newly watches; leaving the `with` block detaches it."""

    def __init__(self, hook: Hook, components: Sequence[Any]) -> None:
        self.components = list(components)
        """The components that this attachment added; without those watched already."""
        self._hook = hook

    def detach(self) -> None:
        """Stop watching; a second time does nothing."""
        for component in self.components:
            _unwatch(component, self._hook)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()


def clean_text(text: str, redact: Callable[[str], str] | None) -> str:
    """Return a text as a hook may write it: redacted, and such that a UTF-8 file can hold it.

    Raises:
        ArgumentError: `redact` returned something else than a text.
    """
    if redact is not None:
        text = redact(text)
        if not isinstance(text, str):
            raise ArgumentError("redact", f"returned a {type(text).__name__}, not a string")
    # Readers of PDF leave lone surrogates, which no UTF-8 file can hold.
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def find_components(root: Any, kinds: tuple[type, ...]) -> list[Any]:
    """Return every object of these types inside `root`, nearest first.

    Looks into LlamaIndex objects (attributes and pydantic fields, private ones too), lists,
    dicts, and the closures of functions; never calls a property. Stores, nodes, prompts,
    callback managers and containers of more than 1,000 entries are data and passed over.
    """
    data = _data_types()
    found: list[Any] = []
    seen = {id(root)}
    waiting = deque([root])
    while waiting and len(seen) < _MAX_OBJECTS:
        item = waiting.popleft()
        # type(), not isinstance(): a lazy proxy must not be woken by asking for its class
        if issubclass(type(item), kinds):
            found.append(item)
        elif issubclass(type(item), data):
            continue
        for child in _children(item, is_root=item is root):
            if id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)
    return found


def _data_types() -> tuple[type, ...]:
    from llama_index.core.callbacks import CallbackManager
    from llama_index.core.data_structs.data_structs import IndexStruct
    from llama_index.core.prompts import BasePromptTemplate
    from llama_index.core.schema import BaseNode
    from llama_index.core.storage import StorageContext
    from llama_index.core.storage.docstore.types import BaseDocumentStore
    from llama_index.core.storage.index_store.types import BaseIndexStore
    from llama_index.core.storage.kvstore.types import BaseKVStore
    from llama_index.core.vector_stores.types import BasePydanticVectorStore

    return (
        BaseNode,
        BaseDocumentStore,
        BaseIndexStore,
        BaseKVStore,
        BasePydanticVectorStore,
        BasePromptTemplate,
        CallbackManager,
        IndexStruct,
        StorageContext,
    )


def _children(item: Any, *, is_root: bool) -> Iterable[Any]:
    if isinstance(item, dict):
        return list(item.values()) if len(item) <= _MAX_ENTRIES else ()
    if isinstance(item, list | tuple | set | frozenset):
        return list(item) if len(item) <= _MAX_ENTRIES else ()
    if isinstance(item, types.MethodType):
        return (item.__self__,)
    if isinstance(item, functools.partial):
        return (item.func, item.args, item.keywords)
    if isinstance(item, types.FunctionType):
        return _closure(item)
    if isinstance(item, type | types.ModuleType):
        return ()
    if is_root or _is_llama_index(type(item)):
        return _attributes(item)
    return ()


def _closure(function: types.FunctionType) -> list[Any]:
    contents = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a cell that is not filled yet
            contents.append(cell.cell_contents)
    return contents


def _is_llama_index(kind: type) -> bool:
    # `workflows` is LlamaIndex's workflow engine: agents and user workflows derive from it.
    return any(base.__module__.startswith(("llama_index", "workflows")) for base in kind.__mro__)


def _attributes(item: Any) -> list[Any]:
    values: list[Any] = []
    for name in ("__dict__", "__pydantic_private__"):
        with suppress(Exception):
            attributes = object.__getattribute__(item, name)
            values.extend((attributes or {}).values())
    return values


# --- The tap ---------------------------------------------------------------------------------

_lock = threading.RLock()
_watched: dict[tuple[int, str], tuple[Callable[[], Any], tuple[Hook, ...]]] = {}
"""(id of a component, method) to a reference to it and its hooks; the tuples never change."""
_taps: dict[tuple[type, str], tuple[Any, Any]] = {}
"""(class, method) to our function and the attribute it replaced (None: it was inherited)."""
_running: ContextVar[tuple[_Observation, ...]] = ContextVar("ft_core_observations", default=())
"""The watched calls that this context is inside of."""


def _watch(component: Any, hook: Hook) -> bool:
    """Add the hook to the component; return whether it was not there yet."""
    added = False
    with _lock:
        for method in hook.methods:
            if not hasattr(type(component), method):
                continue
            key = (id(component), method)
            ref, hooks = _watched.get(key, (None, ()))
            if ref is None or ref() is not component:
                ref, hooks = _reference(component, key), ()
            if hook in hooks:
                continue
            _tap(component, method)
            _watched[key] = (ref, (*hooks, hook))
            added = True
        _remove_idle_taps()
    return added


def _unwatch(component: Any, hook: Hook) -> None:
    with _lock:
        for method in hook.methods:
            key = (id(component), method)
            ref, hooks = _watched.get(key, (None, ()))
            if ref is None or ref() is not component:
                continue
            left = tuple(other for other in hooks if other is not hook)
            if left:
                _watched[key] = (ref, left)
            else:
                _watched.pop(key, None)
        _remove_idle_taps()


def _reference(component: Any, key: tuple[int, str]) -> Callable[[], Any]:
    """Return a weak reference that forgets the entry, or a strong one where none can be had."""

    def forget(dead: Any) -> None:
        # May run at any moment, inside this module too: one atomic step, and no lock.
        if _watched.get(key, (None,))[0] is dead:
            _watched.pop(key, None)

    try:
        return weakref.ref(component, forget)
    except TypeError:
        return lambda: component


def _tap(component: Any, method: str) -> None:
    kind = type(component)
    if method in getattr(component, "__dict__", {}):
        logger.warning(
            "%s.%s is overridden on the object; calls of it are not seen", kind.__name__, method
        )
    own = kind.__dict__.get(method)
    if own is not None and own is _taps.get((kind, method), (None,))[0]:
        return
    # Also where someone patched over ours: whether theirs calls ours cannot be known, and a
    # call that passes both is reported once.
    ours = _tapped(kind, method, own)
    try:
        setattr(kind, method, ours)
    except TypeError:
        raise ArgumentError(
            "target", f"{kind.__name__} is a compiled class; its calls cannot be watched"
        ) from None
    _taps[kind, method] = (ours, own)


def _remove_idle_taps() -> None:
    """Put back the methods of the classes of which no object is watched any more."""
    busy = set()
    for (_, method), (ref, _) in list(_watched.items()):
        busy.add((type(ref()), method))
    for kind, method in list(_taps):
        ours, own = _taps[kind, method]
        # Where someone patched over ours, it stays in their chain and passes calls through.
        if (kind, method) in busy or kind.__dict__.get(method) is not ours:
            continue
        if own is None:
            delattr(kind, method)
        else:
            setattr(kind, method, own)
        del _taps[kind, method]


def _tapped(kind: type, method: str, own: Any) -> Any:
    """Return the function that stands in for `kind.method`."""

    def bound(self: Any) -> Any:
        # An inherited method is looked up at each call: others may patch the base meanwhile.
        return getattr(super(kind, self), method) if own is None else own.__get__(self, type(self))

    original = getattr(kind, method)
    if inspect.iscoroutinefunction(original):

        @functools.wraps(original)
        async def observed_async(self: Any, /, *args: Any, **kwargs: Any) -> Any:
            calls = _calls_of(self, method, args, kwargs)
            if not calls:
                return await bound(self)(*args, **kwargs)
            with _Observation(calls) as observation:
                result = await bound(self)(*args, **kwargs)
            return observation.returned(result)

        return observed_async

    @functools.wraps(original)
    def observed(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        calls = _calls_of(self, method, args, kwargs)
        if not calls:
            return bound(self)(*args, **kwargs)
        with _Observation(calls) as observation:
            result = bound(self)(*args, **kwargs)
        return observation.returned(result)

    return observed


def _calls_of(
    component: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[Hook, Call]]:
    """Return a call for each hook of this very object that wants it."""
    entry = _watched.get((id(component), method))
    if entry is None or entry[0]() is not component:
        return []
    calls = []
    for hook in entry[1]:
        outer = hook.running()
        if outer and outer[-1].target is component and outer[-1].method == method:
            continue  # this call itself, on its way through a second tap of ours
        call = Call(component, method, args, kwargs, outer=outer)
        if hook._guarded(hook.wants, call):
            calls.append((hook, call))
    return calls


class _Observation:
    """One call on its way: reports it to each hook, once, when it ends.

    As a context manager it is put around the host's code only: it marks this context as being
    inside the call, and reports what the host raises.
    """

    def __init__(self, calls: list[tuple[Hook, Call]]) -> None:
        self.calls = calls
        """Emptied at the end: a task that outlives the call is not inside it any more."""
        for hook, call in calls:
            hook._guarded(hook.started, call)
        self._start = time.perf_counter()

    def __enter__(self) -> _Observation:
        self._token = _running.set((*_running.get(), self))
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        # A coroutine that the garbage collector closes ends in another context.
        with suppress(ValueError):
            _running.reset(self._token)
        if error is not None and not isinstance(error, StopIteration | StopAsyncIteration):
            self._ended(error=error)

    def returned(self, result: Any) -> Any:
        """Report the result, or return a stream that will do so at its end."""
        if isinstance(result, types.GeneratorType):
            return self._stream(result)
        if isinstance(result, types.AsyncGeneratorType):
            return self._async_stream(result)
        if inspect.iscoroutine(result):  # from a plain function that returns a coroutine
            return self._awaited(result)
        self._ended(result)
        return result

    async def _awaited(self, coroutine: Any) -> Any:
        with self:
            result = await coroutine
        return self.returned(result)

    def _stream(self, stream: Any) -> Generator[Any, None, Any]:
        item = None
        try:
            while True:
                with self:
                    item = next(stream)
                yield item
        except StopIteration as stop:
            self._ended(item)
            return stop.value
        finally:
            self._ended(item, complete=False)
            stream.close()

    async def _async_stream(self, stream: Any) -> AsyncIterator[Any]:
        item = None
        try:
            while True:
                with self:
                    item = await anext(stream)
                yield item
        except StopAsyncIteration:
            self._ended(item)
        finally:
            self._ended(item, complete=False)
            await stream.aclose()

    def _ended(
        self, result: Any = None, error: BaseException | None = None, *, complete: bool = True
    ) -> None:
        """Report the end; only the first counts."""
        seconds = time.perf_counter() - self._start
        calls, self.calls = self.calls, []
        for hook, call in calls:
            call.result, call.error, call.seconds = result, error, seconds
            call.complete = complete
            hook._guarded(hook.observe, call)
