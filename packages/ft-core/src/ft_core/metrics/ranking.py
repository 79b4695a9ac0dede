"""Ranking metrics, by the definitions of trec_eval, for each query.

| name | trec_eval | value, with R relevant documents (grade above 0) |
| --- | --- | --- |
| `hit_rate@K` | `success_K` | 1 where one of the first K is relevant |
| `recall@K` | `recall_K` | relevant ones among the first K / R |
| `precision@K` | `P_K` | relevant ones among the first K / K, even where fewer came |
| `mrr@K` | `recip_rank` | 1 / rank of the first relevant one, 0 beyond rank K |
| `ndcg@K` | `ndcg_cut_K` | DCG of the first K / DCG of the best possible K |
| `map@K` | `map_cut_K` | sum over the first K of precision at each relevant one / R |

DCG is the sum of grade / log2(rank + 1): the gain is the grade itself, not 2^grade - 1
(Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques", 2002). Without
`@K` a metric takes all that was retrieved, and `precision` divides by their number
(`set_P`). A document without a grade counts as not relevant, as does a grade below 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ft_core.errors import ArgumentError

Qrels = Mapping[str, Mapping[str, int]]
"""Query id to document id to grade."""
Run = Mapping[str, Mapping[str, float]]
"""Query id to document id to score, higher is better."""


class Metric(NamedTuple):
    """A metric's name, taken apart."""

    name: str
    """For example `ndcg`."""
    k: int | None
    """How many of the first documents count; all where None."""


def parse_metric(metric: str) -> Metric:
    """Take `ndcg@10` apart.

    Raises:
        ArgumentError: there is no such metric, or K is not a whole number of at least 1.
    """
    name, at, k = metric.partition("@")
    if name not in _FORMULAS:
        raise ArgumentError(
            "metrics", f"{metric!r} is none; choose from {', '.join(_FORMULAS)}, each with @K"
        )
    if at and not re.fullmatch(r"0*[1-9][0-9]*", k, re.ASCII):
        raise ArgumentError(
            "metrics", f"{metric!r}: K is a whole number of at least 1, as in {name}@10"
        )
    return Metric(name, int(k) if at else None)


def score_run(qrels: Qrels, run: Run, metrics: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return metric to query id to value, for each query of `qrels`.

    A query that `run` lacks counts as 0 (trec_eval's `-c`), one that `qrels` lacks is passed
    over. Documents are ordered by `rank_documents`.

    Raises:
        ArgumentError: an unknown metric, or a score that is NaN.
    """
    wanted = {query: run[query] for query in qrels if query in run}
    return score_rankings(qrels, {q: rank_documents(s) for q, s in wanted.items()}, metrics)


def score_rankings(
    qrels: Qrels, rankings: Mapping[str, Sequence[str]], metrics: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Return metric to query id to value, for each query of `qrels`.

    Args:
        qrels: grades.
        rankings: query id to document ids, best first; a query that it lacks counts as 0.
        metrics: names as in the module's table.

    Raises:
        ArgumentError: an unknown metric, or a ranking that names a document twice.
    """
    parsed = {metric: parse_metric(metric) for metric in metrics}
    scores: dict[str, dict[str, float]] = {metric: {} for metric in parsed}
    for query, grades in qrels.items():
        ranking = rankings.get(query, ())
        if len(set(ranking)) < len(ranking):
            raise ArgumentError("rankings", f"query {query!r} has a document twice")
        relevant = {document: grade for document, grade in grades.items() if grade > 0}
        gains = [relevant.get(document, 0) for document in ranking]
        ideal = sorted(relevant.values(), reverse=True)
        for metric, (name, k) in parsed.items():
            # Without a relevant document every formula is 0 / 0, which trec_eval calls 0.
            scores[metric][query] = _FORMULAS[name](gains[:k], ideal, k) if ideal else 0.0
    return scores


def rank_documents(scores: Mapping[str, float]) -> list[str]:
    """Return document ids, best first, in trec_eval's order.

    trec_eval holds scores as float32, and puts the higher document id first among equals
    (as strings: `d9` before `d10`).

    Raises:
        ArgumentError: a score is NaN.
    """
    with np.errstate(over="ignore"):  # beyond float32 is infinite there too
        values = np.fromiter(scores.values(), dtype=np.float32, count=len(scores))
    if np.isnan(values).any():
        document = next(d for d, value in zip(scores, values, strict=True) if np.isnan(value))
        raise ArgumentError("run", f"the score of document {document!r} is NaN")
    ranked = sorted(zip(values.tolist(), scores, strict=True), reverse=True)
    return [document for _, document in ranked]


# Each takes the grades of the retrieved documents in order, cut at k; the grades of all
# relevant ones, best first, at least one; and k.


def _hit_rate(gains: list[int], ideal: list[int], k: int | None) -> float:
    return float(any(gains))


def _recall(gains: list[int], ideal: list[int], k: int | None) -> float:
    return _relevant(gains) / len(ideal)


def _precision(gains: list[int], ideal: list[int], k: int | None) -> float:
    return _relevant(gains) / (k or len(gains) or 1)


def _reciprocal_rank(gains: list[int], ideal: list[int], k: int | None) -> float:
    return next((1 / rank for rank, gain in enumerate(gains, start=1) if gain), 0.0)


def _ndcg(gains: list[int], ideal: list[int], k: int | None) -> float:
    return _dcg(gains) / _dcg(ideal[:k])


def _average_precision(gains: list[int], ideal: list[int], k: int | None) -> float:
    ranks = [rank for rank, gain in enumerate(gains, start=1) if gain]
    return math.fsum(found / rank for found, rank in enumerate(ranks, start=1)) / len(ideal)


def _relevant(gains: list[int]) -> int:
    return sum(gain > 0 for gain in gains)


def _dcg(gains: list[int]) -> float:
    return math.fsum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1) if gain)


_FORMULAS: dict[str, Callable[[list[int], list[int], int | None], float]] = {
    "hit_rate": _hit_rate,
    "recall": _recall,
    "precision": _precision,
    "mrr": _reciprocal_rank,
    "ndcg": _ndcg,
    "map": _average_precision,
}
