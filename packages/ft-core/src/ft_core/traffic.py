"""Journal the queries of a live app with the nodes that they met, and what users say of them.

A pack's handler subclasses `TrafficHandler`, says which calls to watch and how to read one,
and turns the journal into its kind of dataset through `Traffic`.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias

from ft_core.errors import ArgumentError
from ft_core.query_hook import QueryHandler, digest_of

logger = logging.getLogger(__name__)


class TrafficHandler(QueryHandler):
    """Base of the hooks that journal queries with their nodes, and take feedback on them.

    A record has `nodes`, a list of (node id, digest of its text, score), and what a subclass
    adds; a mark has `node` and `relevant`.

    Args:
        path: see `QueryHandler`.
        redact: applied to each query and node text before it is written. Where it raises,
            nothing is written. Node ids are written as they are.
        metadata_mode: which text of a node is written: `none` its text alone, `embed` with
            the metadata that its index embeds.

    Raises:
        ArgumentError: `path` is a folder, or `metadata_mode` is unknown.
        ArtifactError: `path` is a file that no handler of this class wrote.
    """

    own_fields: ClassVar[Mapping[str, type]] = MappingProxyType({})
    """What a record has besides, by name, and of which type."""

    def __init__(
        self,
        path: Path | str,
        *,
        redact: Callable[[str], str] | None = None,
        metadata_mode: str = "none",
    ) -> None:
        self._metadata_mode = _metadata_mode(metadata_mode)
        super().__init__(path, redact=redact)

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
        texts: dict[str, str] = {}
        rows = []
        for node, text, score in nodes:
            rows.append([node, digest_of(text), score])
            texts[digest_of(text)] = text
        self.write_query(query, seconds, {"nodes": rows, **own}, texts)

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
            self.write_mark(query_id, {"node": node_id, "relevant": bool(relevant)})
        except Exception as error:
            self._failed(error)

    def is_record(self, record: Mapping[str, Any]) -> bool:
        """Whether this handler may have written what calls itself its record."""
        fields: dict[str, type] = {"query": str, "nodes": list, **self.own_fields}
        return all(isinstance(record.get(name), kind) for name, kind in fields.items()) and all(
            isinstance(node, list) and len(node) == 3 for node in record["nodes"]
        )

    def is_mark(self, record: Mapping[str, Any]) -> bool:
        """Whether this handler may have written what calls itself a mark."""
        return isinstance(record.get("node"), str) and isinstance(record.get("relevant"), bool)


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
