"""Journal what a live app retrieves, and turn it with the app's feedback into training data."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import os
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from typing_extensions import Self

from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.errors import ArgumentError, ArtifactError, DatasetError
from ft_core.files import Journal
from ft_core.hooks import Attachment, Call, Hook

logger = logging.getLogger(__name__)

_MAX_TEXTS = 100_000
_MAX_PRELOAD_BYTES = 64 * 2**20

# Context variables live as long as the process, so there is one for all handlers.
_handler_keys = itertools.count()
_last_ids: ContextVar[Mapping[int, str | None]] = ContextVar(
    "ft_embeddings_last_ids", default=MappingProxyType({})
)
_collectors: ContextVar[tuple[tuple[int, list[str]], ...]] = ContextVar(
    "ft_embeddings_collectors", default=()
)


class RetrievalHandler(Hook):
    """Records each retrieval of a live LlamaIndex app in a journal, and what users say of it.

    ```python
    handler = RetrievalHandler("traffic.jsonl")
    handler.attach(query_engine)  # or `with handler.attach(query_engine): ...`
    response = query_engine.query("What is the late fee?")
    handler.mark(handler.last_query_id, response.source_nodes[0].node_id, relevant=True)
    train = handler.to_dataset()
    ```

    Of a retriever that asks others (fusion, recursive, a router), the outermost one is
    recorded: what the app asked, and what it got. The nodes are recorded as retrieved, before
    any postprocessor. A retrieval that raises is not recorded.

    Safe with threads, asyncio and several processes on one file. Nothing that goes wrong while
    the app runs reaches it: see `ft_core.hooks.Hook`. A text is written once, not per query;
    a process that starts on a journal above 64 MiB, or several that start together, may write
    it once more.

    Args:
        path: the journal, JSON Lines; one that exists is continued.
        redact: applied to each query and node text before it is written. Where it raises,
            nothing is written. Node ids are written as they are.
        metadata_mode: which text of a node is written: `none` its text alone, `embed` with
            the metadata that its index embeds.

    Raises:
        ArgumentError: `path` is a folder, or `metadata_mode` is unknown.
        ArtifactError: `path` is a file that no `RetrievalHandler` wrote.
    """

    methods = ("retrieve", "aretrieve")

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
            _check(record, self.path)
            break

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Return a handler on a journal that exists, to export it or to go on with it.

        Raises:
            ArtifactError: there is no such file, or no `RetrievalHandler` wrote it.
        """
        if not Path(path).exists():
            raise ArtifactError(f"{path}: no such journal")
        return cls(path)

    def components(self) -> tuple[type, ...]:
        """Watch every retriever."""
        from llama_index.core.base.base_retriever import BaseRetriever

        return (BaseRetriever,)

    def attach(self, target: Any) -> Attachment:
        """Record the retrievals of every retriever inside `target`; see `Hook.attach`."""
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

    def observe(self, call: Call) -> None:
        """Append one retrieval to the journal."""
        if call.error is not None:
            return
        query = call.args[0] if call.args else next(iter(call.kwargs.values()))
        query_id = uuid.uuid4().hex
        record, texts = self._record(query_id, getattr(query, "query_str", query), call)
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

    def _record(
        self, query_id: str, query: str, call: Call
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the record, and the text of each node by its digest."""
        texts: dict[str, str] = {}
        nodes = []
        for item in call.result:
            text = self._clean(item.node.get_content(metadata_mode=self._metadata_mode))
            # Of the text as written: a digest of the original could be guessed back.
            digest = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
            texts[digest] = text
            nodes.append([item.node.node_id, digest, _finite(item.score)])
        record = {
            "type": "retrieval",
            "id": query_id,
            "time": _now(),
            "seconds": round(call.seconds, 6),
            "query": self._clean(query),
            "nodes": nodes,
        }
        return record, texts

    def _clean(self, text: str) -> str:
        if self._redact is not None:
            text = self._redact(text)
        # Readers of PDF leave lone surrogates, which no UTF-8 file can hold.
        return text if text.isascii() else text.encode("utf-8", "replace").decode()

    @property
    def last_query_id(self) -> str | None:
        """Id of the last retrieval in this thread or task; None when it was not recorded.

        Where the app retrieves in tasks of its own (agents, sub-questions), use `collect`.
        """
        return _last_ids.get().get(self._key)

    def _set_last(self, query_id: str | None) -> None:
        _last_ids.set({**_last_ids.get(), self._key: query_id})

    @contextmanager
    def collect(self) -> Iterator[list[str]]:
        """Yield a list that gets the id of every retrieval made inside the block, in order.

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
        node may be one that another query retrieved.
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
        """Return the ids of the recorded retrievals with this text, oldest first.

        Reads the whole journal.
        """
        query = self._clean(query)
        return [
            record["id"]
            for record in _records(self._journal)
            if record["type"] == "retrieval" and record["query"] == query
        ]

    def to_dataset(self, *, assume_top: float | None = None) -> EmbeddingQAFinetuneDataset:
        """Return the marked traffic as a dataset.

        Queries of the same text are one query, with the id of the first. The corpus is every
        node that was ever retrieved, as last seen; where a mark was given to an older text of
        a node, that text has the id `NODE#DIGEST`. Queries without a relevant node are left
        out; see `negatives` for the nodes marked irrelevant.

        Args:
            assume_top: take the best node of a query that has no mark at all for relevant when
                its score is at least this. Off by default, and weaker: it teaches the model
                what it already believes, its errors included.

        Raises:
            DatasetError: nothing can be exported; says what to do.
            ArtifactError: the file holds something that no `RetrievalHandler` wrote.
        """
        traffic = _Traffic(self._journal)
        positives = traffic.judged(relevant=True)
        if assume_top is not None:
            positives |= traffic.assumed(assume_top)
        if not positives:
            raise DatasetError(_nothing(traffic, assume_top), source=self.path)
        corpus = traffic.corpus()
        for documents in positives.values():
            corpus.update({traffic.name(item): traffic.texts[item[1]] for item in documents})
        return EmbeddingQAFinetuneDataset(
            queries={traffic.queries[text].id: text for text in positives},
            corpus=corpus,
            relevant_docs={
                traffic.queries[text].id: [traffic.name(item) for item in documents]
                for text, documents in positives.items()
            },
        )

    def negatives(self) -> dict[str, list[str]]:
        """Return query id to the ids of the nodes marked irrelevant, as mining returns them.

        The ids are those of `to_dataset`; only queries that have a marked relevant node too.
        An older text of a node, which the corpus does not hold, is left out.
        """
        traffic = _Traffic(self._journal)
        positives = traffic.judged(relevant=True)
        held = traffic.corpus()
        result = {}
        for text, documents in traffic.judged(relevant=False).items():
            names = [traffic.name(item) for item in documents]
            names = [name for name in names if name in held]
            if text in positives and names:
                result[traffic.queries[text].id] = names
        return result


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


_Document: TypeAlias = "tuple[str, str]"  # node id, digest of the text


@dataclass
class _Query:
    """All retrievals of one query text."""

    id: str
    scores: dict[_Document, float | None] = field(default_factory=dict)
    marks: dict[_Document, bool] = field(default_factory=dict)


class _Traffic:
    """The content of a journal, with the queries of the same text as one."""

    def __init__(self, journal: Journal) -> None:
        self.queries: dict[str, _Query] = {}
        self.texts: dict[str, str] = {}
        self.latest: dict[str, str] = {}
        self._retrievals: dict[str, tuple[str, dict[str, str]]] = {}
        lost: Counter[str] = Counter()
        for record in _records(journal):
            if record["type"] == "retrieval":
                self._add_retrieval(record)
            else:
                lost[self._add_mark(record)] += 1
        del lost[""]
        if lost:
            logger.warning("%s: marks left out: %s", journal.path, dict(lost))

    def _add_retrieval(self, record: dict[str, Any]) -> None:
        self.texts.update(record.get("texts", {}))
        text = record["query"]
        if not text.strip():
            return
        query = self.queries.setdefault(text, _Query(record["id"]))
        self._retrievals[record["id"]] = text, {node: digest for node, digest, _ in record["nodes"]}
        for node, digest, score in record["nodes"]:
            self.latest[node] = digest
            query.scores.setdefault((node, digest), score)

    def _add_mark(self, record: dict[str, Any]) -> str:
        """Take in one mark; return why it cannot be used, or nothing."""
        if record["id"] not in self._retrievals:
            return "unknown query id"
        text, retrieved = self._retrievals[record["id"]]
        node = record["node"]
        digest = retrieved.get(node) or self.latest.get(node)
        if digest is None:
            return "the node was never retrieved"
        if not self.texts.get(digest, "").strip():
            return "the node has no text"
        self.queries[text].marks[node, digest] = record["relevant"]
        return ""

    def judged(self, *, relevant: bool) -> dict[str, list[_Document]]:
        """Return query text to the documents marked so, of the queries that have one."""
        result = {}
        for text, query in self.queries.items():
            documents = [item for item, mark in query.marks.items() if mark is relevant]
            if documents:
                result[text] = documents
        return result

    def assumed(self, min_score: float) -> dict[str, list[_Document]]:
        """Return query text to its best document, of the queries without any mark."""
        result = {}
        for text, query in self.queries.items():
            scored = {
                item: score
                for item, score in query.scores.items()
                if score is not None and self.texts.get(item[1], "").strip()
            }
            if scored and not query.marks:
                best = max(scored, key=scored.__getitem__)
                if scored[best] >= min_score:
                    result[text] = [best]
        return result

    def corpus(self) -> dict[str, str]:
        """Return each node that has a text, as last seen."""
        texts = {node: self.texts.get(digest, "") for node, digest in self.latest.items()}
        return {node: text for node, text in texts.items() if text.strip()}

    def name(self, document: _Document) -> str:
        """Return the document's id in the dataset."""
        node, digest = document
        return node if self.latest[node] == digest else f"{node}#{digest[:8]}"


def _nothing(traffic: _Traffic, assume_top: float | None) -> str:
    count = len(traffic.queries)
    if not count:
        return "no retrieval is recorded; attach the handler to the app and use it"
    if assume_top is not None:
        return (
            f"of {count} queries none has a node marked relevant, or without any mark one that "
            f"scores {assume_top} or more; lower assume_top or mark some with handler.mark()"
        )
    return (
        f"of {count} queries none has a node marked relevant; mark some with "
        "handler.mark(query_id, node_id), or pass assume_top=SCORE to take the best node of each"
    )


def _records(journal: Journal) -> Iterator[dict[str, Any]]:
    for record in journal.records():
        _check(record, journal.path)
        yield record


_FIELDS: dict[Any, dict[str, type]] = {
    "retrieval": {"id": str, "query": str, "nodes": list},
    "mark": {"id": str, "node": str, "relevant": bool},
}


def _check(record: Any, path: Path) -> None:
    fields = _FIELDS.get(record.get("type")) if isinstance(record, dict) else None
    if (
        fields is None
        or not all(isinstance(record.get(name), kind) for name, kind in fields.items())
        or not all(isinstance(node, list) and len(node) == 3 for node in record.get("nodes", ()))
    ):
        raise ArtifactError(
            f"{path}: holds a line that no RetrievalHandler wrote; name another file"
        )


def _metadata_mode(name: str) -> Any:
    from llama_index.core.schema import MetadataMode

    try:
        return MetadataMode(name)
    except ValueError:
        known = ", ".join(mode.value for mode in MetadataMode)
        raise ArgumentError("metadata_mode", f"{name!r} is none of {known}") from None


def _finite(score: Any) -> float | None:
    if score is None or not math.isfinite(score):
        return None
    return float(score)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
