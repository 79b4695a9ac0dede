"""Splits that cannot leak."""

import itertools
import logging

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.datasets.duplicates import similarity
from ft_core.errors import ArgumentError, DatasetError
from ft_core.splits import split_by_document, split_by_query

THRESHOLD = 0.8
SPLITS = [split_by_query, split_by_document]

# Texts of a few long words: repeated by chance, and often near-duplicates.
texts = st.lists(
    st.sampled_from(["revenue", "quarter", "company", "dividend", "auditors", "Lyft?"]),
    min_size=1,
    max_size=5,
).map(" ".join)


@st.composite
def datasets(draw):
    corpus = {f"d{i}": text for i, text in enumerate(draw(st.lists(texts, min_size=2, max_size=8)))}
    queries = {
        f"q{i}": text for i, text in enumerate(draw(st.lists(texts, min_size=2, max_size=8)))
    }
    ids = st.lists(st.sampled_from(list(corpus)), min_size=1, max_size=2, unique=True)
    relevant = {query: draw(ids) for query in queries}
    return EmbeddingQAFinetuneDataset(queries=queries, corpus=corpus, relevant_docs=relevant)


def independent(count):
    """A dataset in which every query has a document of its own and nothing is alike."""
    words = [f"{chr(97 + i % 26) * 3}{chr(97 + i // 26 % 26) * 4}{i:03}" for i in range(count)]
    return EmbeddingQAFinetuneDataset(
        queries={f"q{i}": f"{word} {word[::-1]}" for i, word in enumerate(words)},
        corpus={f"d{i}": f"{word[::-1]} {word}" for i, word in enumerate(words)},
        relevant_docs={f"q{i}": [f"d{i}"] for i in range(count)},
    )


def leaks(parts, texts):
    return [
        (a, b)
        for first, second in itertools.combinations(parts, 2)
        for a in first
        for b in second
        if similarity(texts[a], texts[b]) >= THRESHOLD
    ]


@settings(max_examples=150, deadline=None)
@given(datasets(), st.sampled_from(SPLITS), st.integers(0, 5), st.sampled_from(["own", "all"]))
def test_nothing_leaks_and_nothing_is_lost(dataset, split, seed, corpus):
    fractions = {"train": 3, "validation": 1}
    try:
        parts = split(dataset, fractions, seed=seed, corpus=corpus)
    except DatasetError:
        assume(False)
    assert list(parts) == ["train", "validation"]
    assert sorted(q for part in parts.values() for q in part.queries) == sorted(dataset.queries)
    assert leaks([part.queries for part in parts.values()], dataset.queries) == []
    for part in parts.values():
        assert part.queries
        assert part.relevant_docs == {q: dataset.relevant_docs[q] for q in part.queries}
        if corpus == "all":
            assert part.corpus == dataset.corpus
    if split is split_by_document:
        named = [
            {d for documents in part.relevant_docs.values() for d in documents}
            for part in parts.values()
        ]
        assert leaks(named, dataset.corpus) == []
        assert not named[0] & named[1]
        if corpus == "own":
            assert sorted(d for part in parts.values() for d in part.corpus) == sorted(
                dataset.corpus
            )
            assert leaks([part.corpus for part in parts.values()], dataset.corpus) == []
    again = split(dataset, fractions, seed=seed, corpus=corpus)
    assert {name: part.content_hash for name, part in again.items()} == {
        name: part.content_hash for name, part in parts.items()
    }


@pytest.mark.parametrize("split", SPLITS)
def test_many_small_groups_come_out_in_the_shares_asked_for(split):
    dataset = independent(500)
    parts = split(dataset, {"train": 0.7, "validation": 0.2, "test": 0.1}, seed=3)
    assert [len(part.queries) for part in parts.values()] == [350, 100, 50]


@pytest.mark.parametrize("split", SPLITS)
def test_seeds_differ_and_the_order_of_a_part_is_that_of_the_dataset(split):
    dataset = independent(40)
    parts = [split(dataset, {"a": 1, "b": 1}, seed=seed)["a"] for seed in range(4)]
    assert len({part.content_hash for part in parts}) == 4
    order = list(dataset.queries)
    assert all(list(part.queries) == sorted(part.queries, key=order.index) for part in parts)


@pytest.mark.parametrize("split", SPLITS)
def test_a_tiny_share_is_still_a_part(split):
    parts = split(independent(10), {"train": 0.99, "validation": 0.005, "test": 0.005})
    assert [len(part.queries) for part in parts.values()] == [8, 1, 1]


def test_documents_without_a_query_are_dealt_out_too():
    dataset = independent(100)
    dataset = dataset.select(list(dataset.queries)[:10])
    parts = split_by_document(dataset, {"train": 0.8, "test": 0.2})
    assert [len(part.corpus) for part in parts.values()] == [80, 20]
    assert [len(part.queries) for part in parts.values()] == [8, 2]


def test_queries_connected_through_documents_stay_together():
    dataset = EmbeddingQAFinetuneDataset(
        queries={"q1": "first", "q2": "second", "q3": "unrelated"},
        corpus={"a": "alpha", "b": "beta", "c": "gamma"},
        relevant_docs={"q1": ["a", "b"], "q2": ["b"], "q3": ["c"]},
        grades={"q1": {"a": 2}},
    )
    parts = split_by_document(dataset, {"train": 1, "test": 1})
    held = {frozenset(part.queries): part for part in parts.values()}
    assert set(held) == {frozenset({"q1", "q2"}), frozenset({"q3"})}
    both = held[frozenset({"q1", "q2"})]
    assert set(both.corpus) == {"a", "b"}
    assert both.grades == dataset.grades


def test_one_connected_lump_is_refused_with_the_reason():
    dataset = EmbeddingQAFinetuneDataset(
        queries={"q1": "first", "q2": "second"},
        corpus={"a": "alpha"},
        relevant_docs={"q1": ["a"], "q2": ["a"]},
    )
    with pytest.raises(DatasetError, match=r"no split into 2 parts.*1 group\(s\)"):
        split_by_document(dataset, {"train": 0.8, "test": 0.2})
    same = dataset.model_copy(update={"queries": {"q1": "The same?", "q2": "the same"}})
    with pytest.raises(DatasetError, match="without a leak"):
        split_by_query(same, {"train": 0.8, "test": 0.2})


def test_a_lump_that_spoils_the_shares_is_reported(caplog):
    dataset = independent(20)
    lump = dataset.model_copy(
        update={
            "relevant_docs": {
                q: ["d0"] if i < 18 else [f"d{i}"] for i, q in enumerate(dataset.queries)
            }
        }
    )
    with caplog.at_level(logging.WARNING):
        split_by_document(lump, {"train": 0.5, "test": 0.5})
    assert "'train' has 90 % of the queries instead of 50 %" in caplog.text


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    ("fractions", "reason"),
    [
        ({}, "maps each part"),
        ([0.8, 0.2], "maps each part"),
        ({"train": 1, "test": 0}, "'test' needs a share above 0, not 0"),
        ({"train": 1, "test": -1}, "above 0"),
        ({"train": 1, "test": float("nan")}, "above 0"),
        ({"train": 1, "test": float("inf")}, "above 0"),
        ({"train": "80%"}, "above 0, not '80%'"),
    ],
)
def test_bad_fractions_are_named(split, fractions, reason):
    with pytest.raises(ArgumentError, match=f"fractions: .*{reason}"):
        split(independent(4), fractions)


def test_other_bad_arguments_are_named():
    with pytest.raises(ArgumentError, match="corpus: is"):
        split_by_query(independent(4), {"a": 1, "b": 1}, corpus="half")
    with pytest.raises(ArgumentError, match="threshold: is above 0"):
        split_by_query(independent(4), {"a": 1, "b": 1}, threshold=0)
    with pytest.raises(DatasetError, match="not an embedding QA dataset"):
        split_by_query({"queries": {}}, {"a": 1, "b": 1})
