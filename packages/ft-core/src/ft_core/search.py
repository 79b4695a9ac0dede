"""Exact nearest-neighbour search by inner product, in memory bounded by blocks.

The corpus goes by in blocks. Each query keeps its best `k` so far, and of a new block only
the scores above the worst of those are looked at: after the first blocks that is almost
none, so that the time is that of the matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ft_core.errors import ArgumentError

Matrix = NDArray[np.float32]

_FIRST_BLOCK = 1024
_CORPUS_BLOCK = 4096
_CELLS = 1024 * 4096  # scores held at a time: 16 MiB
_LARGEST = np.float32(1e15)  # the inner product of two vectors of these still fits float32


def exact_top_k(
    queries: ArrayLike, corpus: ArrayLike, k: int, *, cosine: bool = False
) -> tuple[NDArray[np.int64], Matrix]:
    """Return the `k` rows of `corpus` with the highest inner product, for each query.

    Computed in float32. Beyond its arguments and its result it holds a few blocks of some
    16 MiB, whatever the number of rows. Equal scores stand in the order of their rows.

    Args:
        queries: vectors, shape (q, d).
        corpus: vectors, shape (n, d).
        k: how many to return, at least 1; with fewer rows than that, all of them.
        cosine: divide each vector by its length first; one of length 0 scores 0.

    Returns:
        Row numbers in `corpus` and scores, best first, each of shape (q, min(k, n)).

    Raises:
        ArgumentError: `k` is below 1, the lengths differ, or a vector holds a NaN, an
            infinity or a number beyond 1e15 (the message names its row).
    """
    if k < 1:
        raise ArgumentError("k", f"must be at least 1, not {k}")
    queries = check_vectors("queries", queries)
    corpus = check_vectors("corpus", corpus)
    if queries.shape[1] != corpus.shape[1]:
        raise ArgumentError(
            "queries",
            f"vectors of length {queries.shape[1]} against a corpus of length "
            f"{corpus.shape[1]}; embed both with the same model",
        )
    queries = _prepared(queries, cosine)
    k = min(k, len(corpus))
    indices = np.zeros((len(queries), k), dtype=np.int64)
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    for start, stop in _growing_blocks(len(corpus), k):
        block = _prepared(corpus[start:stop], cosine).T
        step = max(1, _CELLS // (stop - start))
        for first in range(0, len(queries), step):
            part = slice(first, first + step)
            _merge(indices[part], scores[part], queries[part] @ block, start)
    return indices, scores


def check_vectors(
    argument: str, vectors: ArrayLike, *, names: Sequence[str] | None = None
) -> NDArray[Any]:
    """Return `vectors` as an array after checking that it is a matrix of finite numbers.

    Args:
        argument: what to call it in the error.
        vectors: shape (rows, d); an array is returned as it is, without a copy.
        names: what to call each row in the error; its number by default.

    Raises:
        ArgumentError: rows of different lengths, not numbers, or one that holds a NaN, an
            infinity or a number beyond 1e15, whose square would leave float32.
    """
    try:
        matrix = np.asarray(vectors)
    except ValueError:
        raise ArgumentError(argument, "the vectors have different lengths") from None
    if matrix.ndim != 2:
        raise ArgumentError(argument, f"needs shape (rows, d), not {matrix.shape}")
    if matrix.dtype.kind not in "fiu":
        raise ArgumentError(argument, f"needs real numbers, not {matrix.dtype}")
    for start in range(0, len(matrix), _CORPUS_BLOCK):
        usable = (np.abs(matrix[start : start + _CORPUS_BLOCK]) <= _LARGEST).all(axis=1)
        if not usable.all():
            row = start + int(np.argmin(usable))
            name = f"row {row}" if names is None else names[row]
            raise ArgumentError(
                argument,
                f"the vector of {name} holds a NaN, an infinity or a number beyond {_LARGEST:g}",
            )
    return matrix


def _prepared(vectors: NDArray[Any], cosine: bool) -> Matrix:
    vectors = vectors.astype(np.float32, copy=False)
    if not cosine:
        return vectors
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1), dtype=np.float32)


def _growing_blocks(rows: int, k: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop); no block is larger than all before it, up to the full size.

    In a corpus in random order, a block as large as what came before holds about `k` new
    candidates per query, so that a merge never sorts much more than the result.
    """
    start, size = 0, max(_FIRST_BLOCK, k)
    while start < rows:
        yield start, min(start + size, rows)
        start += size
        size = max(size, min(start, _CORPUS_BLOCK))


def _merge(indices: NDArray[np.int64], scores: Matrix, block: Matrix, start: int) -> None:
    """Put the scores of a corpus block that begins at row `start` into the best so far."""
    queries, k = scores.shape
    # Later rows lose ties, so only what is above the worst kept score can come in.
    found = np.flatnonzero(block > scores[:, -1:])
    if len(found) > 4 * queries * k:
        # The first block, or a corpus sorted by score: cut it down to `k` a query.
        best = np.sort(np.argsort(-block, axis=1, kind="stable")[:, :k])
        found = (best + np.arange(queries)[:, None] * block.shape[1]).ravel()
    if not len(found):
        return
    query, column = np.divmod(found, block.shape[1])
    counts = np.bincount(query, minlength=queries)
    # One row for each query: the best so far, its candidates, and -inf up to the longest.
    place = k + np.arange(len(found)) - np.repeat(np.cumsum(counts) - counts, counts)
    width = k + int(counts.max())
    all_scores = np.full((queries, width), -np.inf, dtype=np.float32)
    all_indices = np.zeros((queries, width), dtype=np.int64)
    all_scores[:, :k], all_indices[:, :k] = scores, indices
    all_scores[query, place], all_indices[query, place] = block.ravel()[found], column + start
    # Stable, and rows stand in ascending order: the first of equal scores stays first.
    order = np.argsort(-all_scores, axis=1, kind="stable")[:, :k]
    indices[:] = np.take_along_axis(all_indices, order, axis=1)
    scores[:] = np.take_along_axis(all_scores, order, axis=1)
