"""The passage that a query is trained on, and what a fresh head learns."""

from collections import Counter

import numpy as np
import pytest
from model_assets import HashingEmbedding
from transformers import AutoTokenizer

from ft_core.datasets import RerankDataset
from ft_core.errors import ArgumentError
from ft_crossencoder.choosing import (
    Embedded,
    Passages,
    by_scorer,
    count_cut,
    head_rows,
    with_best_passages,
)
from ft_crossencoder.scoring import PairScorer


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


FILLER = " ".join(["museum", "library", "station", "market"] * 10)
LONG = f"{FILLER} gates dawn {FILLER} bell dusk {FILLER}"


@pytest.fixture
def dataset():
    return RerankDataset.coerce(
        [
            {
                "query": query,
                "documents": [
                    {"text": LONG, "label": 1, "id": "long"},
                    {"text": "coins", "label": 0, "retrieval_score": 0.25, "id": "short"},
                ],
            }
            for query in ("gates dawn", "bell dusk")
        ]
    )


def embedded(dataset, passages, model=None):
    return Embedded(dataset, passages.distinct(), model or HashingEmbedding(), show_progress=False)


def test_each_query_gets_the_passage_that_it_is_about(tokenizer, dataset):
    passages = Passages(dataset, tokenizer, 8)
    assert passages.any_cut
    chosen = with_best_passages(
        dataset, passages, embedded(dataset, passages).scores, show_progress=False
    )
    for example in chosen:
        long, short = example.documents
        assert example.query in long.text
        assert long.text in passages.of[LONG]
        assert (long.label, long.id) == (1, "long")
        assert (short.text, short.retrieval_score) == ("coins", 0.25)
    assert len({example.documents[0].text for example in chosen}) == 2
    assert dataset.examples[0].documents[0].text == LONG  # the caller's stays


def test_a_cross_encoder_chooses_the_passage_that_it_scores_highest(
    tokenizer, dataset, cross_encoder
):
    passages = Passages(dataset, tokenizer, 8)
    chosen = with_best_passages(
        dataset, passages, by_scorer(PairScorer(cross_encoder)), show_progress=False
    )
    for example in chosen:
        parts = passages.of[LONG]
        scores = cross_encoder.predict([(example.query, part) for part in parts])
        assert example.documents[0].text == parts[int(np.argmax(scores))]


def test_two_documents_with_one_best_passage_are_one_with_the_higher_label(tokenizer):
    shared = "gates " * 12
    data = RerankDataset.coerce(
        [
            {
                "query": "gates",
                "documents": [
                    {"text": f"{shared}{word}", "label": label}
                    for word, label in (("bell", 0), ("dusk", 1), ("late", 0))
                ],
            }
        ]
    )
    passages = Passages(data, tokenizer, 4)
    first = with_best_passages(
        data, passages, lambda query, parts: [-n for n in range(len(parts))], show_progress=False
    )
    documents = first.examples[0].documents
    assert len(documents) == 1
    assert documents[0].label == 1


def test_without_a_passage_length_documents_stay_whole(tokenizer, dataset):
    passages = Passages(dataset, tokenizer, None)
    assert passages.of == {LONG: [LONG], "coins": ["coins"]}
    assert not passages.any_cut


def test_each_text_is_embedded_once_and_scores_are_cosines(tokenizer, dataset):
    passages, model = Passages(dataset, tokenizer, 8), HashingEmbedding()
    vectors = embedded(dataset, passages, model)
    assert Counter(model.texts) == Counter(passages.distinct())
    assert sorted(model.queries) == ["bell dusk", "gates dawn"]
    expected = np.array([model.vector(text) for text in passages.distinct()]) @ model.vector(
        "bell dusk"
    )
    np.testing.assert_allclose(vectors.scores("bell dusk"), expected, atol=1e-6)
    some = ["coins", passages.distinct()[1]]
    np.testing.assert_allclose(
        vectors.scores("bell dusk", some),
        [expected[passages.distinct().index(text)] for text in some],
        atol=1e-6,
    )


class Broken(HashingEmbedding):
    def _get_text_embeddings(self, texts):
        vectors = super()._get_text_embeddings(texts)
        return [
            [float("nan")] * 32 if "dawn" in t else v for t, v in zip(texts, vectors, strict=True)
        ]


def test_a_vector_with_a_nan_names_the_text(tokenizer, dataset):
    with pytest.raises(ArgumentError, match=r"a NaN or an infinity for corpus\['\d+: .*dawn"):
        embedded(dataset, Passages(dataset, tokenizer, 8), Broken())


def many(queries=30, documents=400):
    words = [f"w{number}" for number in range(documents)]
    return RerankDataset.coerce(
        [
            {"query": f"w{number}", "documents": [{"text": w, "label": 0} for w in words]}
            for number in range(queries)
        ]
    )


@pytest.fixture(scope="module")
def vectors(tokenizer):
    data = many()
    return data, embedded(data, Passages(data, tokenizer, None))


def test_a_head_learns_near_pairs_and_far_ones_and_no_label(vectors):
    data, model = vectors
    rows = head_rows(data, model, pairs=8 * len(data), seed=0)
    assert len(rows) == 8 * len(data)
    labels = np.array([row["label"] for row in rows])
    assert labels.mean() == pytest.approx(0, abs=1e-6)
    assert labels.std() == pytest.approx(1, abs=1e-6)
    for query in ("w0", "w29"):
        own = [row["document"] for row in rows if row["query"] == query]
        order = np.argsort(-model.scores(query), kind="stable")
        ranks = sorted(int(np.flatnonzero(order == model.passages.index(d))[0]) for d in own)
        assert ranks[:3] == [0, 1, 2]
        assert all(3 <= rank < 60 for rank in ranks[3:6])
        assert all(rank >= 60 for rank in ranks[6:])
        assert own[0] == query


def test_a_label_is_the_scaled_cosine(vectors):
    data, model = vectors
    rows = head_rows(data, model, pairs=100, seed=0)
    cosines = [model.scores(row["query"], [row["document"]])[0] for row in rows]
    assert np.corrcoef(cosines, [row["label"] for row in rows])[0, 1] > 0.9999


@pytest.mark.parametrize("pairs", [1, 2, 3, 8, 20, 1000])
def test_no_more_pairs_than_wanted_or_there_are(vectors, pairs):
    data, model = vectors
    counts = Counter(row["query"] for row in head_rows(data, model, pairs=30 * pairs, seed=0))
    assert len(counts) == len(data)
    assert set(counts.values()) == {min(pairs, 400)}


def test_a_seed_takes_the_same_pairs(vectors):
    data, model = vectors
    first, again, other = (head_rows(data, model, pairs=240, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_a_large_dataset_gives_a_head_no_more_than_a_sample_of_its_queries(vectors, monkeypatch):
    from ft_crossencoder import choosing

    monkeypatch.setattr(choosing, "_HEAD_QUERIES", 5)
    data, model = vectors
    assert len({row["query"] for row in head_rows(data, model, pairs=10, seed=0)}) == 5


def test_documents_that_do_not_fit_beside_their_query_are_counted(tokenizer):
    texts = ["harbour " * count for count in (5, 9, 10, 50)]
    data = RerankDataset.coerce(
        [
            {"query": "gates gates", "documents": [{"text": text} for text in texts]},
            {"query": "gates", "documents": [{"text": texts[2]}]},
        ]
    )
    tokens = [len(tokenizer("gates gates", text)["input_ids"]) for text in texts]
    assert tokens == [10, 14, 15, 55]
    assert count_cut(data, tokenizer, 14) == (2, 4)
    assert count_cut(data, tokenizer, 15) == (1, 4)
    assert count_cut(data, tokenizer, 55) == (0, 4)
