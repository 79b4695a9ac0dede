"""Compare runs over one dataset: terminal table, JSON, and one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

from ft_core.errors import ArgumentError
from ft_core.report.answers import AnswerReport
from ft_core.report.base import BaseReport
from ft_core.report.comparison import (
    QueryChange,
    RankChanges,
    check_comparable,
    query_changes,
    rank_changes,
)
from ft_core.report.judges import JudgeReport
from ft_core.report.statistics import Statistic
from ft_core.report.text import plural
from ft_core.report.text2sql import Text2SQLReport

if TYPE_CHECKING:
    from ft_core.datasets import EmbeddingQAFinetuneDataset, RerankDataset
    from ft_core.evaluation import Evaluation

__all__ = ["AnswerReport", "JudgeReport", "Report", "Statistic", "Text2SQLReport"]


class Report(BaseReport["Evaluation"]):
    """A comparison of any number of runs over the same dataset with one of them, the baseline.

    `BaseReport` says what it holds and how it is shown.

    Args:
        evaluations: the runs; their names are different, their dataset is the same.
        dataset: what they were evaluated on.
        title: the heading of the page.
        baseline: name of the run that the others are compared with; the first by default.
        primary: the metric of the verdicts and of each query's gain or loss; nDCG@10 by
            default, or the baseline's first where it has none.
        examples: how many of the queries that gained most, and as many that lost most, are
            shown with their texts.

    Raises:
        ArgumentError: no run, two of one name, an unknown baseline or metric, or a run of
            another dataset.
    """

    template: ClassVar[str] = "retrieval.html.j2"

    def __init__(
        self,
        evaluations: Sequence[Evaluation],
        dataset: EmbeddingQAFinetuneDataset | RerankDataset,
        *,
        title: str = "Comparison of runs",
        baseline: str | None = None,
        primary: str | None = None,
        examples: int = 5,
    ) -> None:
        from ft_core.datasets import RerankDataset

        content_hash = dataset.content_hash
        if isinstance(dataset, RerankDataset):
            dataset = dataset.to_embedding_qa()
        check_comparable(evaluations, content_hash, dataset.queries)
        for run in evaluations:
            for metric, scores in run.scores.items():
                if len(scores) != len(dataset.queries):
                    raise ArgumentError(
                        "evaluations",
                        f"{run.name!r} has {metric} of {len(scores)} queries, the dataset has "
                        f"{len(dataset.queries)}; evaluate it again",
                    )
        if examples < 0:
            raise ArgumentError("examples", f"is {examples}; give 0 or more")
        super().__init__(
            evaluations,
            title=title,
            baseline=baseline,
            primary=primary,
            default_primary=["ndcg@10"],
        )
        self.dataset = dataset
        self.examples = examples

    @property
    def size(self) -> int:
        """How many queries there are."""
        return len(self.dataset.queries)

    def facts(self) -> list[str]:
        """Return what stands under the title."""
        return [
            plural(len(self.runs), "run"),
            plural(self.size, "query", "queries"),
            plural(len(self.dataset.corpus), "document"),
            f"dataset {self.baseline.dataset_hash[:12]}",
        ]

    def ranks(self, run: str) -> RankChanges:
        """Return how the rank of each query's best relevant document changed in a run."""
        return rank_changes(self.baseline, self._run(run), self.dataset.relevant_docs)

    def gained(self, run: str) -> list[QueryChange]:
        """Return the queries that gained most in a run, the greatest gain first."""
        return [change for change in self._changes(run) if change.change > 0][: self.examples]

    def lost(self, run: str) -> list[QueryChange]:
        """Return the queries that lost most in a run, the greatest loss first."""
        lost = [change for change in reversed(self._changes(run)) if change.change < 0]
        return lost[: self.examples]

    def to_dict(self) -> dict[str, Any]:
        """Return everything that the page shows, as JSON can hold it."""
        return {
            "title": self.title,
            "dataset": {
                "content_hash": self.baseline.dataset_hash,
                "queries": len(self.dataset.queries),
                "documents": len(self.dataset.corpus),
            },
            "baseline": self.baseline.name,
            "primary_metric": self.primary,
            "confidence": 0.95,
            "correction": {"method": "holm", "comparisons": self.comparisons},
            "runs": [self._run_dict(run) for run in self.runs],
        }

    def _run_dict(self, run: Evaluation) -> dict[str, Any]:
        result: dict[str, Any] = {
            "name": run.name,
            "seconds": run.seconds,
            "metrics": {metric: asdict(m) for metric, m in self.measures[run.name].items()},
        }
        if run is not self.baseline:
            ranks = self.ranks(run.name)
            result |= {
                "outcome": self.outcome(run.name),
                "verdict": self.verdict(run.name),
                "ranks": {
                    "depth": ranks.depth,
                    "improved": ranks.improved,
                    "same": ranks.same,
                    "worse": ranks.worse,
                },
                "gained": [asdict(change) for change in self.gained(run.name)],
                "lost": [asdict(change) for change in self.lost(run.name)],
            }
        return result

    def _sections(self) -> list[dict[str, Any]]:
        from ft_core.report.html import retrieval_sections

        return retrieval_sections(self)

    def _changes(self, run: str) -> list[QueryChange]:
        return query_changes(self.baseline, self._run(run), self.dataset, self.primary)
