"""Journal what a live app is asked, one record a query; a pack says which calls, and what of them.

`QueryHandler` is the base: records that share texts, ids to mark them by, the file. What is
asked of retrievers and rerankers goes on in `ft_core.traffic`.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from typing_extensions import Self

from ft_core.errors import ArgumentError, ArtifactError
from ft_core.files import Journal
from ft_core.hooks import Attachment, Call, Hook, clean_text

_MAX_TEXTS = 100_000
_MAX_PRELOAD_BYTES = 64 * 2**20

# Context variables live as long as the process, so there is one for all handlers.
_handler_keys = itertools.count()
_last_ids: ContextVar[Mapping[int, str | None]] = ContextVar(
    "ft_core_last_ids", default=MappingProxyType({})
)
_collectors: ContextVar[tuple[tuple[int, list[str]], ...]] = ContextVar(
    "ft_core_collectors", default=()
)


class QueryHandler(Hook):
    """Base of the hooks that journal queries, and what people say of what came of them.

    A record is `{"type", "id", "time", "seconds", "query", ...}`, with `texts` (digest to
    text) for those that the file does not hold yet. A mark is `{"type": "mark", "id", "time",
    ...}`; its `id` is that of the record which it is about.

    Args:
        path: the journal, JSON Lines; one that exists is continued.
        redact: applied to each text before it is written. Where it raises, nothing is written.

    Raises:
        ArgumentError: `path` is a folder.
        ArtifactError: `path` is a file that no handler of this class wrote.
    """

    record_type: ClassVar[str]
    """The `type` of this handler's records."""

    def __init__(self, path: Path | str, *, redact: Callable[[str], str] | None = None) -> None:
        super().__init__()
        self.path = Path(path)
        self._journal = Journal(self.path)
        self._redact = redact
        self._key = next(_handler_keys)
        self._lock = threading.Lock()
        self._written = _WrittenTexts(self.path)
        if self.path.is_dir():
            raise ArgumentError("path", f"{self.path} is a folder; name a file in it")
        next(self.records(), None)

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Return a handler on a journal that exists, to export it or to go on with it.

        Raises:
            ArtifactError: there is no such file, or no handler of this class wrote it.
        """
        if not Path(path).exists():
            raise ArtifactError(f"{path}: no such journal")
        return cls(path)

    def attach(self, target: Any) -> Attachment:
        """Record what every watched component inside `target` does; see `Hook.attach`."""
        attachment = super().attach(target)
        try:
            with self._lock:
                self._written.preload(self._journal)
        except Exception as error:
            self._failed(error)
        return attachment

    # --- While the app runs ------------------------------------------------------------------

    def started(self, call: Call) -> None:
        """Forget the last id, so that no mark lands on an earlier query."""
        self._set_last(None)

    def write_query(
        self, query: str, seconds: float, fields: Mapping[str, Any], texts: Mapping[str, str]
    ) -> None:
        """Append one record.

        Args:
            query: what was asked, as it came.
            seconds: how long it took.
            fields: what else the record has, cleaned.
            texts: digest to text of what `fields` refers to by `digest`, cleaned.
        """
        query_id = uuid.uuid4().hex
        record = {
            "type": self.record_type,
            "id": query_id,
            "time": _now(),
            "seconds": round(seconds, 6),
            "query": self.clean(query),
            **fields,
        }
        with self._lock:
            new = self._written.missing(texts)
            if new:
                record["texts"] = new
            self._journal.append(record)
            self._written.add(new)
        self._set_last(query_id)
        for key, query_ids in _collectors.get():
            if key == self._key:
                query_ids.append(query_id)

    def write_mark(self, query_id: str, fields: Mapping[str, Any]) -> None:
        """Append what somebody says of a record."""
        self._journal.append({"type": "mark", "id": query_id, "time": _now(), **fields})

    def clean(self, text: str) -> str:
        """Return the text redacted, and such that a UTF-8 file can hold it."""
        return clean_text(text, self._redact)

    @property
    def last_query_id(self) -> str | None:
        """Id of the last record in this thread or task; None when there was none.

        Where the app works in tasks of its own (agents, sub-questions), use `collect`.
        """
        return _last_ids.get().get(self._key)

    def _set_last(self, query_id: str | None) -> None:
        _last_ids.set({**_last_ids.get(), self._key: query_id})

    @contextmanager
    def collect(self) -> Iterator[list[str]]:
        """Yield a list that gets the id of every record made inside the block, in order.

        Also of those that the app makes in tasks and threads that inherit this context.
        """
        query_ids: list[str] = []
        token = _collectors.set((*_collectors.get(), (self._key, query_ids)))
        try:
            yield query_ids
        finally:
            _collectors.reset(token)

    # --- From the file -----------------------------------------------------------------------

    def query_ids(self, query: str) -> list[str]:
        """Return the ids of the records with this text, oldest first; reads the whole journal."""
        query = self.clean(query)
        return [
            record["id"]
            for record in self.records()
            if record["type"] == self.record_type and record["query"] == query
        ]

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the records and marks in the file.

        Raises:
            ArtifactError: the file holds something that no handler of this class wrote.
        """
        for record in self._journal.records():
            kind = record.get("type") if isinstance(record, dict) else None
            known = kind in (self.record_type, "mark") and isinstance(record.get("id"), str)
            if not known or not (self.is_mark if kind == "mark" else self.is_record)(record):
                raise ArtifactError(
                    f"{self.path}: holds a line that no {type(self).__name__} wrote; "
                    "name another file"
                )
            yield record

    @abstractmethod
    def is_record(self, record: Mapping[str, Any]) -> bool:
        """Whether this handler may have written what calls itself its record."""

    @abstractmethod
    def is_mark(self, record: Mapping[str, Any]) -> bool:
        """Whether this handler may have written what calls itself a mark."""


def digest_of(text: str) -> str:
    """Return what stands for a text in a record.

    Of the text as written: a digest of what was redacted could be guessed back.
    """
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


class _WrittenTexts:
    """Which texts the journal holds already, as far as this process knows; bounded."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digests: dict[str, None] = {}
        self._file: tuple[int, int] | None = None
        self._size = 0

    def preload(self, journal: Journal) -> None:
        """Learn what earlier runs wrote, unless reading it would hold up the app."""
        self._look()
        if not self._digests and self._file and self._size <= _MAX_PRELOAD_BYTES:
            for record in journal.records():
                self._remember(record.get("texts", ()))

    def missing(self, texts: Mapping[str, str]) -> dict[str, str]:
        """Return those of the texts (digest to text) that the file does not hold yet."""
        self._look()
        return {digest: text for digest, text in texts.items() if digest not in self._digests}

    def add(self, digests: Mapping[str, str]) -> None:
        """Take note of texts that were written."""
        if self._file is None:
            self._look()
        self._remember(digests)

    def _remember(self, digests: Any) -> None:
        self._digests.update(dict.fromkeys(digests))
        while len(self._digests) > _MAX_TEXTS:  # the oldest goes; it is written again if seen
            del self._digests[next(iter(self._digests))]

    def _look(self) -> None:
        """Forget everything when the file was rotated, emptied or removed."""
        try:
            stat = os.stat(self._path)
            file, size = (stat.st_dev, stat.st_ino), stat.st_size
        except FileNotFoundError:
            file, size = None, 0
        if file != self._file or size < self._size:
            self._digests.clear()
        self._file, self._size = file, size


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
