"""The vectors that training and selection work on, whatever they came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.embedding import unit
from ft_core.errors import ArgumentError, DatasetError

if TYPE_CHECKING:
    from ft_adapter.index_vectors import IndexVectors
    from ft_adapter.vector_cache import VectorCache

Matrix = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Vectors:
    """Queries, documents and what is relevant, as matrices of unit rows."""

    query_ids: list[str]
    document_ids: list[str]
    queries: Matrix
    """Shape (queries, d)."""
    documents: Matrix
    """Shape (documents, d)."""
    qrels: Mapping[str, Mapping[str, int]]
    """Query id to document id to grade; every id is one of the above."""

    @property
    def dimension(self) -> int:
        """The embedding's dimension d."""
        return int(self.documents.shape[1])

    @cached_property
    def rows(self) -> dict[str, int]:
        """Document id to row."""
        return {document: row for row, document in enumerate(self.document_ids)}

    @cached_property
    def relevant(self) -> list[list[int]]:
        """The rows of the relevant documents of each query."""
        return [[self.rows[document] for document in self.qrels[query]] for query in self.query_ids]

    def select(self, query_rows: Sequence[int]) -> Vectors:
        """Return the same documents with only these queries."""
        ids = [self.query_ids[row] for row in query_rows]
        return Vectors(
            ids,
            self.document_ids,
            self.queries[list(query_rows)],
            self.documents,
            {query: self.qrels[query] for query in ids},
        )


def embedded(
    dataset: EmbeddingQAFinetuneDataset, cache: VectorCache, show_progress: bool
) -> Vectors:
    """Embed a dataset, each distinct text once, or take its vectors out of the cache.

    Raises:
        ArgumentError: the embedding model failed, or gave something that is no embedding.
    """
    documents = cache.embed(dataset.corpus, "text", show_progress)
    queries = cache.embed(dataset.queries, "query", show_progress)
    return _vectors(dataset, list(dataset.corpus), queries, documents, dataset.qrels)


def from_index(
    dataset: EmbeddingQAFinetuneDataset,
    index: IndexVectors,
    cache: VectorCache,
    show_progress: bool,
    *,
    check: bool = True,
) -> Vectors:
    """Take the documents' vectors from an index, and embed the queries.

    A relevant document is a node of that id, or all nodes that were cut from it. `check`
    refuses an index whose relevant documents rank no better than any.

    Raises:
        DatasetError: the index has none of a query's relevant documents.
        ArgumentError: see `embedded`; or the vectors are not of the same model.
    """
    qrels = _node_qrels(dataset, index)
    queries = cache.embed(dataset.queries, "query", show_progress)
    vectors = _vectors(dataset, index.ids, queries, index.vectors, qrels)
    if check:
        _check_same_space(vectors)
    return vectors


def _vectors(
    dataset: EmbeddingQAFinetuneDataset,
    document_ids: list[str],
    queries: Matrix,
    documents: Matrix,
    qrels: Mapping[str, Mapping[str, int]],
) -> Vectors:
    if queries.shape[1] != documents.shape[1]:
        raise ArgumentError(
            "embed_model",
            f"gives queries of dimension {queries.shape[1]}, and the documents have "
            f"{documents.shape[1]}; use the model that the documents were embedded with",
        )
    return Vectors(list(dataset.queries), document_ids, unit(queries), unit(documents), qrels)


def _node_qrels(
    dataset: EmbeddingQAFinetuneDataset, index: IndexVectors
) -> dict[str, dict[str, int]]:
    nodes: dict[str, list[str]] = {}
    for node, document in zip(index.ids, index.ref_doc_ids, strict=True):
        if document is not None:
            nodes.setdefault(document, []).append(node)
    known = set(index.ids)
    qrels: dict[str, dict[str, int]] = {}
    for query, grades in dataset.qrels.items():
        found: dict[str, int] = {}
        for document, grade in grades.items():
            if document in known:
                found[document] = grade
            else:
                found.update(dict.fromkeys(nodes.get(document, []), grade))
        if not found:
            raise DatasetError(
                f"the index has neither a node nor a document {next(iter(grades))!r}; make the "
                "dataset from the nodes of this index",
                place=f"relevant_docs[{query!r}]",
            )
        qrels[query] = found
    return qrels


def _check_same_space(vectors: Vectors) -> None:
    """Refuse an index of another model: there, relevant documents rank no better than any."""
    rows = np.random.default_rng(0).permutation(len(vectors.document_ids))[:2000]
    sample = vectors.documents[rows]
    shares = []
    for query, relevant in zip(vectors.queries[:500], vectors.relevant, strict=False):
        best = (vectors.documents[relevant] @ query).max()
        shares.append(float((sample @ query < best).mean()))
    # Chance is 0.5; a weak model that fits has 0.8 and more. Few queries prove nothing.
    if len(shares) >= 10 and len(rows) >= 10 and np.mean(shares) < 0.6:
        raise ArgumentError(
            "index",
            "its vectors do not seem to be of this embedding model: relevant documents are "
            "no closer to their queries than others. Pass the model that the index was built "
            "with, or build the index anew; if it is the right one, and merely does not know "
            "this kind of question, pass check_index=False",
        )


def as_tensors(vectors: Vectors, device: Any) -> tuple[Any, Any]:
    """Return queries and documents as tensors on a device."""
    import torch

    return (
        torch.from_numpy(np.ascontiguousarray(vectors.queries)).to(device),
        torch.from_numpy(np.ascontiguousarray(vectors.documents)).to(device),
    )
