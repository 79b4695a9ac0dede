"""What a query may take, what it gives, and how it is stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ft_core.errors import ArgumentError
from ft_text2sql.errors import QueryCancelledError, QueryTimeoutError

_MOST = {"timeout": 1_000_000, "rows": 2**31 - 1, "cell": 2**31 - 1, "result": 2**31 - 1}
"""What databases take as a limit: they count in 32 bits, PostgreSQL its time in milliseconds."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of one query; all are greater than zero, and finite.

    Raises:
        ArgumentError: one is not a number greater than 0, or is more than databases take: a
            million seconds, and 2**31 - 1 of the others.
    """

    timeout: float = 10.0
    """Seconds from the start of the query to its last row."""
    rows: int = 1_000
    """Rows that are read; the rest stays in the database."""
    cell: int = 100_000
    """Characters of a text, or bytes, in one cell; what is longer is cut off.

    In SQLite no value inside the query may be larger either: that would be an error.
    """
    result: int = 10_000_000
    """Characters and bytes of all cells together; the rows behind are left out.

    A row is read whole before it is cut, and where rows get longer and longer, a few of them.
    """

    def __post_init__(self) -> None:
        for name in ("timeout", "rows", "cell", "result"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ArgumentError(name, f"must be a number greater than 0, not {value!r}")
            if value > _MOST[name]:
                raise ArgumentError(name, f"must be at most {_MOST[name]:,}, not {value!r}")


@dataclass(frozen=True, slots=True)
class QueryResult:
    """The rows of a query."""

    columns: list[str]
    """Names, in order; two columns may have the same one."""
    rows: list[tuple[Any, ...]]
    """As many as the limits allow, in the database's order."""
    truncated: bool
    """Whether rows were left out or a cell was cut off."""
    seconds: float
    """Wall time, with opening the connection and reading the rows."""


class Stop:
    """When a query must end: at its deadline, or as soon as the app says so, from any thread."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.started = time.monotonic()
        self._deadline = self.started + timeout
        self._cancelled = False
        self._interrupt: Callable[[], object] | None = None
        self._lock = threading.Lock()

    @property
    def due(self) -> bool:
        """Whether the query should end now."""
        return self._cancelled or time.monotonic() > self._deadline

    @property
    def seconds_left(self) -> float:
        """Seconds to the deadline, 0 after it."""
        return max(0.0, self._deadline - time.monotonic())

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def interrupts_with(self, interrupt: Callable[[], object] | None) -> None:
        """Say what ends a query that waits for its database; None: it has ended."""
        with self._lock:
            self._interrupt = interrupt
        if interrupt is not None and self._cancelled:
            self.cancel()

    def cancel(self) -> None:
        """End the query; one that has ended already is left alone."""
        self._cancelled = True
        self.interrupt()

    def interrupt(self) -> None:
        """Wake the thread that waits for the database, if one does."""
        with self._lock, suppress(Exception):
            if self._interrupt is not None:
                self._interrupt()

    def check(self) -> None:
        """Raise QueryTimeoutError or QueryCancelledError if the query should end now."""
        if self.due:
            raise self.error()

    def error(self) -> QueryTimeoutError | QueryCancelledError:
        """Return the error of a query that was stopped."""
        if self._cancelled:
            return QueryCancelledError("was cancelled")
        return QueryTimeoutError(
            f"ran longer than {self.timeout:g} seconds and was stopped; write a simpler query"
        )


class Rows:
    """Collects rows within the limits."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._size = 0
        self._largest = 1
        """Size of the largest row so far, before it was cut."""
        self.rows: list[tuple[Any, ...]] = []
        self.truncated = False
        self.full = False
        """Whether no further row is wanted."""

    def next_batch(self, most: int) -> int:
        """Return how many rows to read next: what fits, if they are as large as those so far.

        One to begin with, and never many times as many as are known; at least one.
        """
        known = len(self.rows)
        left = max(0, self._limits.result - self._size)
        wanted = (most, 4 * known, left // self._largest, self._limits.rows + 1 - known)
        return max(1, int(min(wanted)))

    def add(self, batch: Iterable[Sequence[Any]]) -> None:
        """Take rows until the limits are reached; one more than they allow says `truncated`."""
        for row in batch:
            if len(self.rows) >= self._limits.rows or self._size > self._limits.result:
                self.full = self.truncated = True
                return
            self._largest = max(self._largest, sum(map(_size_of, row)))
            self.rows.append(tuple(self._cell(value) for value in row))

    def _cell(self, value: Any) -> Any:
        if isinstance(value, memoryview | bytearray):
            value = bytes(value)
        if isinstance(value, str | bytes) and len(value) > self._limits.cell:
            value = value[: int(self._limits.cell)]
            self.truncated = True
        self._size += _size_of(value)
        return value


def _size_of(value: Any) -> int:
    """Return the characters and bytes of a cell, also within arrays and JSON; 8 of a number."""
    size, waiting = 0, [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str | bytes | bytearray | memoryview):
            size += len(each)
        elif isinstance(each, list | tuple):
            waiting += each
        elif isinstance(each, dict):
            waiting += [*each.keys(), *each.values()]
        else:
            size += 8
    return size
