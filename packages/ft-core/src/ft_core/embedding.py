"""Embed the texts of a dataset with any LlamaIndex embedding model, and check every vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ft_core.errors import ArgumentError
from ft_core.progress import progress

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding


def embed_corpus(
    model: BaseEmbedding, corpus: Mapping[str, str], show_progress: bool
) -> NDArray[np.float32]:
    """Return the documents' vectors, shape (documents, d), rows in the order of `corpus`.

    Raises:
        ArgumentError: a vector holds a NaN or has another length than the first; names the
            document.
    """
    # Longest first: a batch of texts of one length is padded least, memory runs out at once
    # or never, and the bar is no optimist.
    ids = sorted(corpus, key=lambda document: len(corpus[document]), reverse=True)
    rows = {document: row for row, document in enumerate(corpus)}
    matrix = np.empty((0, 0), dtype=np.float32)
    batches = range(0, len(ids), model.embed_batch_size)
    for begin in progress(batches, "Documents", len(batches), show_progress):
        batch = ids[begin : begin + model.embed_batch_size]
        vectors = model.get_text_embedding_batch([corpus[document] for document in batch])
        if len(vectors) != len(batch):
            raise ArgumentError("model", f"gave {len(vectors)} vectors for {len(batch)} texts")
        for document, vector in zip(batch, vectors, strict=True):
            if not matrix.size:
                matrix = np.empty((len(corpus), len(vector)), dtype=np.float32)
            matrix[rows[document]] = _checked(vector, matrix.shape[1], f"corpus[{document!r}]")
    return matrix


def embed_queries(
    model: BaseEmbedding, queries: Mapping[str, str], length: int, show_progress: bool
) -> NDArray[np.float32]:
    """Return the queries' vectors, shape (queries, length), rows in the order of `queries`.

    Raises:
        ArgumentError: a vector holds a NaN or has another length; names the query.
    """
    matrix = np.empty((len(queries), length), dtype=np.float32)
    items = progress(queries.items(), "Queries", len(queries), show_progress)
    for row, (query, text) in enumerate(items):
        matrix[row] = _checked(model.get_query_embedding(text), length, f"queries[{query!r}]")
    return matrix


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the rows divided by their length; a row of length 0 stays."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1), dtype=np.float32)


def _checked(vector: Sequence[float], length: int, place: str) -> NDArray[np.float32]:
    values = np.asarray(vector, dtype=np.float32)
    if values.shape != (length,) or not length:
        raise ArgumentError(
            "model", f"gave a vector of length {len(vector)} for {place}, and {length} before"
        )
    if not np.isfinite(values).all():
        raise ArgumentError("model", f"gave a vector with a NaN or an infinity for {place}")
    return values
