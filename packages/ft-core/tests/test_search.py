"""Exact search against a full sort, at the edges of its blocks."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_core import search
from ft_core.errors import ArgumentError
from ft_core.search import exact_top_k


def full_sort(queries, corpus, k):
    scores = np.asarray(queries, np.float32) @ np.asarray(corpus, np.float32).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(scores, order, axis=1)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that a test's corpus has many, and queries come in several parts."""
    monkeypatch.setattr(search, "_FIRST_BLOCK", 4)
    monkeypatch.setattr(search, "_CORPUS_BLOCK", 16)
    monkeypatch.setattr(search, "_CELLS", 48)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(1, 120),
    queries=st.integers(0, 9),
    k=st.integers(1, 130),
    values=st.integers(1, 4),
    seed=st.integers(0, 2**16),
    ordered=st.booleans(),
)
def test_equals_a_full_sort_with_ties(rows, queries, k, values, seed, ordered):
    rng = np.random.default_rng(seed)
    # Small whole numbers: exact in float32 and full of ties.
    corpus = rng.integers(0, values, size=(rows, 3)).astype(np.float32)
    if ordered:  # each block beats all before it
        corpus = corpus[np.argsort(corpus.sum(axis=1), kind="stable")]
    asked = rng.integers(-1, values, size=(queries, 3)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_FIRST_BLOCK", 4)
        patch.setattr(search, "_CORPUS_BLOCK", 16)
        patch.setattr(search, "_CELLS", 48)
        indices, scores = exact_top_k(asked, corpus, k)
    expected_indices, expected_scores = full_sort(asked, corpus, k)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_array_equal(scores, expected_scores)
    assert indices.dtype == np.int64
    assert scores.dtype == np.float32
    assert indices.shape == (queries, min(k, rows))


def test_real_block_sizes():
    rng = np.random.default_rng(0)
    corpus = rng.standard_normal((20_000, 8), dtype=np.float32)
    queries = rng.standard_normal((70, 8), dtype=np.float32)
    indices, scores = exact_top_k(queries, corpus, 25)
    expected_indices, expected_scores = full_sort(queries, corpus, 25)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)
    assert (indices == expected_indices).mean() > 0.999  # sums may round in another order


@pytest.mark.usefixtures("small_blocks")
def test_cosine_ignores_lengths_and_a_zero_vector_scores_zero():
    corpus = [[2.0, 0.0], [0.0, 0.0], [-1.0, 0.0], [30.0, 40.0]]
    indices, scores = exact_top_k([[5.0, 0.0], [0.0, 0.0]], corpus, 4, cosine=True)
    assert indices.tolist() == [[0, 3, 1, 2], [0, 1, 2, 3]]
    np.testing.assert_allclose(scores[0], [1, 0.6, 0, -1], rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32])
def test_other_number_types(dtype):
    corpus = np.array([[1, 0], [0, 2], [3, 3]], dtype=dtype)
    indices, _ = exact_top_k(np.array([[0, 1]], dtype=dtype), corpus, 2)
    assert indices.tolist() == [[2, 1]]


def test_arguments_are_left_as_they_were():
    corpus, queries = np.array([[3.0, 4.0]]), np.array([[1.0, 1.0]])
    exact_top_k(queries, corpus, 1, cosine=True)
    assert corpus.tolist() == [[3.0, 4.0]]
    assert queries.tolist() == [[1.0, 1.0]]


def test_memory_is_bounded_by_blocks():
    rng = np.random.default_rng(0)
    corpus = rng.standard_normal((60_000, 4), dtype=np.float32)
    queries = rng.standard_normal((1500, 4), dtype=np.float32)
    tracemalloc.start()
    exact_top_k(queries, corpus, 10)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 120 * 2**20  # all scores at once would be 343 MiB


@pytest.mark.parametrize(
    ("queries", "corpus", "k", "message"),
    [
        ([[1.0]], [[1.0], [float("nan")]], 1, "corpus: the vector of row 1 holds a NaN"),
        ([[1.0], [float("inf")]], [[1.0]], 1, "queries: the vector of row 1 holds a NaN, an inf"),
        ([[1e20]], [[1.0]], 1, "queries: the vector of row 0 .* beyond 1e"),
        (np.array([[np.inf]], np.float16), [[1.0]], 1, "queries: the vector of row 0"),
        ([[1.0, 2.0]], [[1.0]], 1, "queries: vectors of length 2 against a corpus of length 1"),
        ([[1.0]], [[1.0], [1.0, 2.0]], 1, "corpus: the vectors have different lengths"),
        ([1.0], [[1.0]], 1, r"queries: needs shape \(rows, d\), not \(1,\)"),
        ([["a"]], [[1.0]], 1, "queries: needs real numbers"),
        ([[1.0]], [[1.0]], 0, "k: must be at least 1"),
    ],
)
def test_bad_input(queries, corpus, k, message):
    with pytest.raises(ArgumentError, match=message):
        exact_top_k(queries, corpus, k)


def test_nan_far_down_names_its_row():
    corpus = np.zeros((10_000, 2))
    corpus[9_999, 1] = np.nan
    with pytest.raises(ArgumentError, match="row 9999 "):
        exact_top_k(np.zeros((1, 2)), corpus, 1)
