"""Journal the queries of a live app with the nodes that they met, and what users say of them.

A pack's handler subclasses `TrafficHandler`, says which calls to watch and how to read one,
and turns the journal into its kind of dataset through `Traffic`.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import os
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias

from typing_extensions import Self

from ft_core.errors import ArgumentError, ArtifactError
from ft_core.files import Journal
from ft_core.hooks import Attachment, Call, Hook

logger = logging.getLogger(__name__)

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


class TrafficHandler(Hook):
    """Base of the hooks that journal queries with their nodes, and take feedback on them.

    A record is `{"type", "id", "time", "seconds", "query", "nodes": [[node id, digest of its
    text, score], ...]}`, with `texts` (digest to text) for those that the file does not hold
    yet, and what a subclass adds. A mark is `{"type": "mark", "id", "time", "node",
    "relevant"}`.

    Args:
        path: the journal, JSON Lines; one that exists is continued.
        redact: applied to each query and node text before it is written. Where it raises,
            nothing is written. Node ids are written as they are.
        metadata_mode: which text of a node is written: `none` its text alone, `embed` with
            the metadata that its index embeds.

    Raises:
        ArgumentError: `path` is a folder, or `metadata_mode` is unknown.
        ArtifactError: `path` is a file that no handler of this class wrote.
    """

    record_type: ClassVar[str]
    """The `type` of this handler's records."""
    own_fields: ClassVar[Mapping[str, type]] = MappingProxyType({})
    """What a record has besides, by name, and of which type."""

    def __init__(
        self,
        path: Path | str,
        *,
        redact: Callable[[str], str] | None = None,
        metadata_mode: str = "none",
    ) -> None:
        super().__init__()
        self.path = Path(path)
        self._journal = Journal(self.path)
        self._redact = redact
        self._metadata_mode = _metadata_mode(metadata_mode)
        self._key = next(_handler_keys)
        self._lock = threading.Lock()
        self._written = _WrittenTexts(self.path)
        if self.path.is_dir():
            raise ArgumentError("path", f"{self.path} is a folder; name a file in it")
        for record in self._journal.records():
            self._check(record)
            break

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

    def nodes(self, found: Iterable[Any]) -> list[tuple[str, str, float | None]]:
        """Return (node id, text as it will be written, score) of LlamaIndex's scored nodes."""
        return [
            (
                item.node.node_id,
                self.clean(item.node.get_content(metadata_mode=self._metadata_mode)),
                finite(item.score),
            )
            for item in found
        ]

    def write(
        self,
        query: str,
        nodes: Iterable[tuple[str, str, float | None]],
        seconds: float,
        **own: Any,
    ) -> None:
        """Append one record; `nodes` as from `nodes()`, `own` are the fields of a subclass."""
        query_id = uuid.uuid4().hex
        texts: dict[str, str] = {}
        rows = []
        for node, text, score in nodes:
            # Of the text as written: a digest of the original could be guessed back.
            digest = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
            texts[digest] = text
            rows.append([node, digest, score])
        record = {
            "type": self.record_type,
            "id": query_id,
            "time": _now(),
            "seconds": round(seconds, 6),
            "query": self.clean(query),
            "nodes": rows,
        } | own
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

    def clean(self, text: str) -> str:
        """Return the text redacted, and such that a UTF-8 file can hold it."""
        if self._redact is not None:
            text = self._redact(text)
        # Readers of PDF leave lone surrogates, which no UTF-8 file can hold.
        return text if text.isascii() else text.encode("utf-8", "replace").decode()

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

    def mark(self, query_id: str | None, node_id: str, relevant: bool = True) -> None:
        """Append feedback: whether the node answers the query. Never raises, as the rest.

        A later mark of the same query text and node takes the place of an earlier one. The
        node may be one that another query met.
        """
        try:
            if not isinstance(query_id, str) or not isinstance(node_id, str):
                raise ArgumentError(
                    "mark", f"takes the ids as strings, not {query_id!r} and {node_id!r}"
                )
            record = {"type": "mark", "id": query_id, "time": _now(), "node": node_id}
            self._journal.append(record | {"relevant": bool(relevant)})
        except Exception as error:
            self._failed(error)

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
            self._check(record)
            yield record

    def _check(self, record: Any) -> None:
        kinds: dict[Any, Mapping[str, type]] = {
            self.record_type: {"id": str, "query": str, "nodes": list, **self.own_fields},
            "mark": {"id": str, "node": str, "relevant": bool},
        }
        fields = kinds.get(record.get("type")) if isinstance(record, dict) else None
        if (
            fields is None
            or not all(isinstance(record.get(name), kind) for name, kind in fields.items())
            or not all(
                isinstance(node, list) and len(node) == 3 for node in record.get("nodes", ())
            )
        ):
            raise ArtifactError(
                f"{self.path}: holds a line that no {type(self).__name__} wrote; name another file"
            )


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


Document: TypeAlias = "tuple[str, str]"
"""Node id, and digest of its text."""


@dataclass
class Query:
    """All records of one query text."""

    id: str
    """Of the first record."""
    scores: dict[Document, float | None] = field(default_factory=dict)
    """Each document to the first score that it had."""
    marks: dict[Document, bool] = field(default_factory=dict)
    """Each marked document to whether it is relevant."""
    last: dict[str, Any] = field(default_factory=dict)
    """The newest record."""


class Traffic:
    """The content of a handler's journal, with the queries of the same text as one.

    Marks that cannot be used are counted in a log message.

    Raises:
        ArtifactError: the file holds something that no such handler wrote.
    """

    def __init__(self, handler: TrafficHandler) -> None:
        self.queries: dict[str, Query] = {}
        """By text."""
        self.texts: dict[str, str] = {}
        """By digest."""
        self.latest: dict[str, str] = {}
        """Node id to the digest of its text as last seen."""
        self._met: dict[str, tuple[str, dict[str, str]]] = {}
        lost: Counter[str] = Counter()
        for record in handler.records():
            if record["type"] == "mark":
                lost[self._add_mark(record)] += 1
            else:
                self._add(record)
        del lost[""]
        if lost:
            logger.warning("%s: marks left out: %s", handler.path, dict(lost))

    def _add(self, record: dict[str, Any]) -> None:
        self.texts.update(record.pop("texts", {}))
        text = record["query"]
        if not text.strip():
            return
        query = self.queries.setdefault(text, Query(record["id"]))
        query.last = record
        self._met[record["id"]] = text, {node: digest for node, digest, _ in record["nodes"]}
        for node, digest, score in record["nodes"]:
            self.latest[node] = digest
            query.scores.setdefault((node, digest), score)

    def _add_mark(self, record: dict[str, Any]) -> str:
        """Take in one mark; return why it cannot be used, or nothing."""
        if record["id"] not in self._met:
            return "unknown query id"
        text, met = self._met[record["id"]]
        node = record["node"]
        digest = met.get(node) or self.latest.get(node)
        if digest is None:
            return "the node was never retrieved"
        if not self.has_text(digest):
            return "the node has no text"
        self.queries[text].marks[node, digest] = record["relevant"]
        return ""

    def has_text(self, digest: str) -> bool:
        """Say whether a document has a text to learn from."""
        return bool(self.texts.get(digest, "").strip())

    def judged(self, *, relevant: bool) -> dict[str, list[Document]]:
        """Return query text to the documents marked so, of the queries that have one."""
        result = {}
        for text, query in self.queries.items():
            documents = [item for item, mark in query.marks.items() if mark is relevant]
            if documents:
                result[text] = documents
        return result

    def corpus(self) -> dict[str, str]:
        """Return each node that has a text, as last seen."""
        return {
            node: self.texts[digest]
            for node, digest in self.latest.items()
            if self.has_text(digest)
        }

    def name(self, document: Document) -> str:
        """Return the document's id in a dataset: its node's, and of an older text `NODE#DIGEST`."""
        node, digest = document
        return node if self.latest[node] == digest else f"{node}#{digest[:8]}"


def finite(score: Any) -> float | None:
    """Return a score as a plain number, None where it is missing or not finite."""
    if score is None or not math.isfinite(score):
        return None
    return float(score)


def _metadata_mode(name: str) -> Any:
    from llama_index.core.schema import MetadataMode

    try:
        return MetadataMode(name)
    except ValueError:
        known = ", ".join(mode.value for mode in MetadataMode)
        raise ArgumentError("metadata_mode", f"{name!r} is none of {known}") from None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
