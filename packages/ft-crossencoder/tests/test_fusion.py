"""How much the retriever's score counts: scored once, tried at every weight."""

import pytest

from ft_core.datasets import RerankDataset
from ft_core.evaluation import evaluate_reranker
from ft_crossencoder import FinetunedReranker
from ft_crossencoder.fusion import WEIGHTS, evaluate_fusion, fit_weight, score_candidates
from ft_crossencoder.scoring import PairScorer


def example(query, *documents):
    names = ("text", "label", "retrieval_score")
    return {
        "query": query,
        "documents": [dict(zip(names, each, strict=True)) for each in documents],
    }


def known(dataset, logits):
    """Scores as `score_candidates` returns them, with logits by text."""
    return {
        e.query: {d.text: (logits[d.text], d.retrieval_score) for d in e.candidates}
        for e in dataset
    }


@pytest.fixture
def complementary():
    """Each of the two is wrong about another query, and only both together are right."""
    return RerankDataset.coerce(
        [
            example("p", ("a", 0, 0.9), ("b", 1, 0.8), ("c", 0, 0.1)),
            example("q", ("d", 1, 0.9), ("e", 0, 0.2), ("f", 0, 0.1)),
        ]
    )


LOGITS = {"a": 0.0, "b": 5.0, "c": 4.9, "d": 2.0, "e": 2.4, "f": -3.0}


def test_the_weight_is_the_lowest_of_the_best(complementary):
    scores = known(complementary, LOGITS)
    found = fit_weight(scores, complementary, "ndcg@10", name="tuned")
    means = [
        evaluate_fusion(scores, complementary, weight, name="x").mean("ndcg@10")
        for weight in WEIGHTS
    ]
    assert means[0] < max(means) == 1.0
    assert means[-1] < 1.0
    assert found.weight == WEIGHTS[means.index(1.0)]
    assert found.evaluation.mean("ndcg@10") == 1.0
    assert found.evaluation.name == "tuned"


def test_without_retrieval_scores_the_retriever_does_not_count():
    data = RerankDataset.coerce([example("p", ("a", 0, None), ("b", 1, None))])
    found = fit_weight(known(data, {"a": 1.0, "b": 0.0}), data, "mrr@10", name="t", seconds=2.5)
    assert found.weight == 0
    assert found.evaluation.seconds == 2.5
    assert found.evaluation.mean("mrr@10") == 0.5


def test_it_ranks_as_the_reranker_does_in_the_app(folder, all_texts):
    data = RerankDataset.coerce(
        [
            example("when does the harbour open", *zip_scores(all_texts[:20])),
            example("ticket price", *zip_scores(all_texts[5:25])),
        ]
    )
    scores = score_candidates(PairScorer(folder), data)
    for weight in (0.0, 0.4):
        ours = evaluate_fusion(scores, data, weight, name="fusion")
        app = evaluate_reranker(FinetunedReranker(folder, retrieval_weight=weight), data)
        assert ours.rankings == app.rankings
        assert ours.scores == app.scores
    assert ours.rankings != evaluate_fusion(scores, data, 0.0, name="x").rankings


def zip_scores(texts):
    return [(text, place % 7 == 3, 1 - place / 30) for place, text in enumerate(texts)]


def test_queries_for_which_nothing_was_found_count_as_missed(folder):
    missed = {"text": "gates", "label": 1, "retrieved": False}
    data = RerankDataset.coerce(
        [
            {"query": "harbour", "documents": [missed]},
            example("p", ("harbour", 1, 0.5), ("bell", 0, 0.4)),
        ]
    )
    scores = score_candidates(PairScorer(folder), data)
    assert scores["harbour"] == {}
    found = fit_weight(scores, data, "recall@10", name="x")
    assert found.evaluation.values("recall@10") == {"1": 0.0, "2": 1.0}
