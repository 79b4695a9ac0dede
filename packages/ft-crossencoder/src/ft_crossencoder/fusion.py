"""How much the retriever's own score should count beside the cross-encoder's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ft_core.datasets import RerankDataset
from ft_core.evaluation import Evaluation, evaluate_reranker
from ft_crossencoder.scoring import PairScorer, fused

WEIGHTS = tuple(tenth / 10 for tenth in range(10))
"""What is tried as `retrieval_weight`."""

Scores = Mapping[str, Mapping[str, tuple[float, float | None]]]
"""Query to text to the cross-encoder's logit and the retriever's score."""


class Fusion(NamedTuple):
    """The weight that a validation set asks for, and what it gives there."""

    weight: float
    evaluation: Evaluation


def score_candidates(
    scorer: PairScorer, dataset: RerankDataset, *, show_progress: bool = False
) -> Scores:
    """Score every candidate of every query once."""
    from ft_core.progress import progress

    scores: dict[str, dict[str, tuple[float, float | None]]] = {}
    for example in progress(dataset, "Reranking", len(dataset), show_progress):
        texts = [document.text for document in example.candidates]
        logits = scorer.score([(example.query, text) for text in texts]).logits
        known = [document.retrieval_score for document in example.candidates]
        found = zip(texts, zip(logits, known, strict=True), strict=True)
        scores.setdefault(example.query, {}).update(found)
    return scores


def evaluate_fusion(
    scores: Scores, dataset: RerankDataset, weight: float, *, name: str, seconds: float = 0.0
) -> Evaluation:
    """Evaluate the ranking that a weight of the retriever gives."""

    def score(query: str, texts: list[str]) -> list[float]:
        pairs = [scores[query][text] for text in texts]
        logits, retrieval = zip(*pairs, strict=True)
        return [float(value) for value in fused(logits, retrieval, weight)]

    evaluation = evaluate_reranker(score, dataset, name=name, show_progress=False)
    return evaluation.model_copy(update={"seconds": seconds})


def fit_weight(
    scores: Scores, dataset: RerankDataset, metric: str, *, name: str, seconds: float = 0.0
) -> Fusion:
    """Return the weight of the retriever with the best mean of a metric; of equals, the lowest.

    Without any retrieval score in the dataset, it is 0.
    """
    known = any(score is not None for found in scores.values() for _, score in found.values())
    tried = [
        Fusion(weight, evaluate_fusion(scores, dataset, weight, name=name, seconds=seconds))
        for weight in (WEIGHTS if known else WEIGHTS[:1])
    ]
    return max(tried, key=lambda fusion: fusion.evaluation.mean(metric))
