from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.errors import ArgumentError
from ft_embeddings.batches import (
    QUERIES_PER_UNIT,
    Collator,
    Label,
    TrainingTexts,
    length_buckets,
)

DATASET = EmbeddingQAFinetuneDataset(
    queries={"q1": "one", "q2": "two", "q3": "one ", "q4": "four"},
    corpus={"a": "alpha", "b": "beta", "c": "gamma", "d": "alpha"},
    relevant_docs={"q1": ["a", "b"], "q2": ["b"], "q3": ["c"], "q4": ["d"]},
)


def tokenize(texts: list[str], prompt: str | None = None) -> dict[str, object]:
    return {"input_ids": [f"{prompt or ''}{text}" for text in texts]}


def test_equal_texts_are_one_text_with_the_relevance_of_all_copies() -> None:
    texts = TrainingTexts.of(DATASET)
    assert texts.queries == ["one", "two", "four"]
    assert texts.documents == ["alpha", "beta", "gamma"]
    assert texts.relevant == [[0, 1, 2], [1], [0]]


def test_first_relevant_document_only_trains_it_but_knows_the_others() -> None:
    texts = TrainingTexts.of(DATASET)
    units = texts.units(seed=0, all_relevant=False)
    pairs = {(query, unit["document"]) for unit in units for query in unit["queries"]}
    assert pairs == {(0, 0), (1, 1), (2, 0)}
    batch = Collator(texts, tokenize)(units)
    assert batch["document_input_ids"] == ["alpha", "beta"]
    assert batch["label"][batch["query_input_ids"].index("one")].tolist() == [1, 1]


def test_known_relevant_documents_are_never_mined_negatives() -> None:
    texts = TrainingTexts.of(DATASET, {"q1": ["c", "b"], "q2": ["a", "a", "c"]})
    assert texts.negatives == [[], [0, 2], []]


def test_unknown_ids_among_the_negatives_are_named() -> None:
    with pytest.raises(ArgumentError, match="negatives: 'q9' is not a query of the dataset"):
        TrainingTexts.of(DATASET, {"q9": ["a"]})
    with pytest.raises(ArgumentError, match="negatives: 'z', of 'q1', is not a document"):
        TrainingTexts.of(DATASET, {"q1": ["z"]})


def test_units_hold_each_pair_once_and_no_unit_is_all_one_document() -> None:
    many = {f"q{i}": f"question {i}" for i in range(11)}
    dataset = EmbeddingQAFinetuneDataset(
        queries=many, corpus={"a": "alpha"}, relevant_docs={q: ["a"] for q in many}
    )
    units = TrainingTexts.of(dataset).units(seed=0)
    assert [len(unit["queries"]) for unit in units] == [QUERIES_PER_UNIT, QUERIES_PER_UNIT, 3]
    assert sorted(query for unit in units for query in unit["queries"]) == list(range(11))


def test_collator_encodes_each_text_once_and_labels_every_pair() -> None:
    collate = Collator(
        TrainingTexts.of(DATASET, {"q2": ["c"]}),
        tokenize,
        query_prompt="Q: ",
        document_prompt="D: ",
    )
    batch = collate([{"document": 0, "queries": [0, 2]}, {"document": 1, "queries": [0, 1]}])
    assert batch["query_input_ids"] == ["Q: one", "Q: four", "Q: two"]
    assert batch["document_input_ids"] == ["D: alpha", "D: beta", "D: gamma"]
    assert batch["label"].tolist() == [[1, 1, 1], [1, 0, 0], [0, 1, 0]]


def test_collator_takes_the_whole_corpus_where_asked() -> None:
    batch = Collator(TrainingTexts.of(DATASET), tokenize, every_document=True)(
        [{"document": 1, "queries": [1]}]
    )
    assert batch["document_input_ids"] == ["alpha", "beta", "gamma"]
    assert batch["label"].tolist() == [[0, 1, 0]]


def test_guide_ignores_what_it_scores_above_a_relevant_document() -> None:
    texts = TrainingTexts.of(DATASET)
    queries = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    documents = np.array([[1.0, 0.0], [0.6, 0.8], [0.9, 0.4]])
    batch = Collator(texts, tokenize, guide=(queries, documents))(
        [
            {"document": 1, "queries": [1]},
            {"document": 0, "queries": [2]},
            {"document": 2, "queries": [0]},
        ]
    )
    rows = dict(zip(batch["query_input_ids"], batch["label"].tolist(), strict=True))
    assert batch["document_input_ids"] == ["beta", "alpha", "gamma"]
    # The guide gives "two" and "beta" 1.0, more than the others.
    assert rows["two"] == [Label.RELEVANT, Label.NEGATIVE, Label.NEGATIVE]
    # "four" and "alpha": 0.0; the others score above that.
    assert rows["four"] == [Label.IGNORED, Label.RELEVANT, Label.IGNORED]


@given(st.lists(st.integers(1, 512), min_size=1, max_size=200))
def test_length_buckets_hold_each_row_once_with_little_padding(lengths: list[int]) -> None:
    groups = length_buckets(lengths)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups[:-1]:
        padded = max(lengths[row] for row in group) * len(group)
        assert len(group) <= 8 or sum(lengths[row] for row in group) >= 0.9 * padded


def test_labels_are_a_tensor_of_queries_by_documents() -> None:
    batch = Collator(TrainingTexts.of(DATASET), tokenize)([{"document": 0, "queries": [0, 2]}])
    assert isinstance(batch["label"], torch.Tensor)
    assert batch["label"].shape == (2, 1)
