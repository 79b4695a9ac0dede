"""Ranking metrics against trec_eval."""

import math

import pytest
import pytrec_eval
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ft_core.errors import ArgumentError
from ft_core.metrics import parse_metric, rank_documents, score_rankings, score_run

KS = (1, 2, 3, 5, 10, 100)
ORACLE = {
    "hit_rate": "success",
    "recall": "recall",
    "precision": "P",
    "ndcg": "ndcg_cut",
    "map": "map_cut",
}
WHOLE = {"recall": "set_recall", "precision": "set_P", "ndcg": "ndcg", "map": "map"}

# Ids whose order as text, as bytes and as numbers differ.
documents = st.sampled_from([*(f"d{i}" for i in range(12)), "D1", "é", "z", "\uffee", "\U0001f600"])
# Few values, so that most runs have ties, and some that differ in float64 only.
tied = st.sampled_from([-1.0, -0.0, 0.0, 0.1, 0.1 + 1e-12, 0.5, 2.0, 1e30, 1e300])
scores = tied | st.floats(allow_nan=False)
queries = st.sampled_from(["q1", "q2", "q3"])
# No grade below 0: with one, pytrec_eval writes outside its memory.
qrels = st.dictionaries(
    queries, st.dictionaries(documents, st.integers(0, 4), min_size=1), min_size=1
)
runs = st.dictionaries(queries, st.dictionaries(documents, scores))


def oracle(qrels, run, measures):
    # trec_eval reports only queries that the run has, unless asked (-c) to count them as 0.
    whole = {query: run.get(query, {}) for query in qrels}
    return pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(whole)


@settings(max_examples=500, deadline=None)
@given(qrels=qrels, run=runs)
@example(qrels={"q1": {"d1": 1}}, run={"q1": {"d1": 1.0, "d10": 1.0, "d9": 1.0}})
def test_equals_trec_eval(qrels, run):
    measures = {f"{name}.{k}" for name in ORACLE.values() for k in KS} | {*WHOLE.values()}
    expected = oracle(qrels, run, measures)
    names = [f"{name}@{k}" for name in ORACLE for k in KS] + list(WHOLE)
    actual = score_run(qrels, run, names)
    for name in names:
        base, _, k = name.partition("@")
        measure = f"{ORACLE[base]}_{k}" if k else WHOLE[base]
        assert actual[name].keys() == qrels.keys()
        for query, value in actual[name].items():
            assert value == pytest.approx(expected[query][measure], abs=1e-9), (name, query)


@settings(max_examples=300, deadline=None)
@given(qrels=qrels, run=runs, k=st.integers(1, 12))
def test_mrr_equals_recip_rank_of_the_run_cut_at_k(qrels, run, k):
    cut = {q: {d: s[d] for d in rank_documents(s)[:k]} for q, s in run.items()}
    actual = score_run(qrels, run, [f"mrr@{k}", "mrr"])
    for metric, judged in ((f"mrr@{k}", cut), ("mrr", run)):
        expected = oracle(qrels, judged, {"recip_rank"})
        for query, value in actual[metric].items():
            assert value == pytest.approx(expected[query]["recip_rank"], abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(qrels=qrels, run=runs)
def test_hit_rate_without_k_is_whether_any_was_found(qrels, run):
    actual = score_run(qrels, run, ["hit_rate", "recall"])
    for query in qrels:
        assert actual["hit_rate"][query] == (actual["recall"][query] > 0)


def test_grade_below_zero_counts_as_not_relevant():
    run = {"q": {"a": 3.0, "b": 2.0}}
    names = ["ndcg", "map", "recall", "hit_rate@1", "mrr"]
    assert score_run({"q": {"a": -2, "b": 1}}, run, names) == score_run({"q": {"b": 1}}, run, names)


def test_by_hand():
    qrels = {"q": {"a": 3, "b": 1, "c": 0}}
    run = {"q": {"c": 0.9, "a": 0.8, "x": 0.7, "b": 0.1}}
    scores = score_run(qrels, run, ["ndcg@2", "map", "mrr@1", "mrr@2", "precision@8", "recall@2"])
    assert scores["ndcg@2"]["q"] == pytest.approx(3 / math.log2(3) / (3 + 1 / math.log2(3)))
    assert scores["map"]["q"] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert scores["mrr@1"]["q"] == 0
    assert scores["mrr@2"]["q"] == 0.5
    assert scores["precision@8"]["q"] == 2 / 8
    assert scores["recall@2"]["q"] == 0.5


def test_queries_that_the_run_lacks_count_as_zero_and_unknown_ones_are_passed_over():
    actual = score_run({"q1": {"a": 1}, "q2": {"a": 1}}, {"q2": {"a": 1}, "q9": {"a": 1}}, ["map"])
    assert actual == {"map": {"q1": 0.0, "q2": 1.0}}


def test_rankings_need_no_scores():
    assert score_rankings({"q": {"a": 1}}, {"q": ["b", "a"]}, ["mrr"]) == {"mrr": {"q": 0.5}}


def test_metric_names():
    assert parse_metric("ndcg@10") == ("ndcg", 10)
    assert parse_metric("recall") == ("recall", None)


@pytest.mark.parametrize(
    "metric", ["ndgc@10", "", "@5", "ndcg@0", "ndcg@-1", "ndcg@", "ndcg@1.5", "ndcg@ten", "ndcg@²"]
)
def test_unknown_metrics_and_bad_k_are_refused(metric):
    with pytest.raises(ArgumentError, match="metrics: "):
        score_run({"q": {"a": 1}}, {"q": {"a": 1.0}}, [metric])


def test_nan_score_names_the_document():
    with pytest.raises(ArgumentError, match="'b' is NaN"):
        score_run({"q": {"a": 1}}, {"q": {"a": 1.0, "b": math.nan}}, ["map"])


def test_document_twice_in_a_ranking_is_refused():
    with pytest.raises(ArgumentError, match="'q' has a document twice"):
        score_rankings({"q": {"a": 1}}, {"q": ["a", "a"]}, ["map"])
