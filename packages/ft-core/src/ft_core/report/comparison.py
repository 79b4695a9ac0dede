"""The numbers of a report: every run against the baseline, and each query's change."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ft_core.errors import ArgumentError
from ft_core.report.text import is_quantity

if TYPE_CHECKING:
    from ft_core.datasets import EmbeddingQAFinetuneDataset
    from ft_core.evaluation import Evaluation, Scores

ALPHA = 0.05
"""A difference is shown when its adjusted p-value is below this."""

Outcome = Literal["better", "worse", "undecided"]


@dataclass(frozen=True)
class Difference:
    """A run's metric minus the baseline's, over the same queries."""

    value: float
    low: float
    high: float
    """`low` and `high` bound the 95 % interval of the mean difference (paired bootstrap)."""
    p_value: float
    """Two-sided, of the paired randomisation test, as it is."""
    p_adjusted: float
    """The same after Holm's correction over all comparisons of the report."""
    queries: int
    """How many pairs there are."""
    lower_is_better: bool = False

    @property
    def outcome(self) -> Outcome:
        """What may be claimed: `undecided` unless the adjusted p-value is below `ALPHA`."""
        if not self.p_adjusted < ALPHA or self.value == 0:
            return "undecided"
        return "better" if (self.value < 0) == self.lower_is_better else "worse"


@dataclass(frozen=True)
class Measure:
    """One metric of one run: its mean over the queries and that mean's 95 % interval."""

    mean: float
    low: float
    high: float
    n: int
    """How many queries have a value."""
    difference: Difference | None = None
    """None for the baseline, and where the baseline was not measured by this metric."""


@dataclass(frozen=True)
class QueryChange:
    """One query under the baseline and under another run."""

    query: str
    change: float
    """In the primary metric, run minus baseline."""
    rank_before: int | None
    rank_after: int | None
    """Rank, from 1, of the relevant document that stands highest; None: not found."""
    top_before: str | None
    top_after: str | None
    """Id of the document at rank 1; None where nothing was retrieved."""


@dataclass(frozen=True)
class RankChanges:
    """Each query's best rank under the baseline and under another run."""

    depth: int
    """Ranks are compared down to here, the depth that both runs kept."""
    pairs: list[tuple[int | None, int | None]]
    """Before and after, one pair a query; None: no relevant document down to `depth`."""

    @property
    def improved(self) -> int:
        """How many queries have their first relevant document higher than before."""
        return sum(_depth(after) < _depth(before) for before, after in self.pairs)

    @property
    def worse(self) -> int:
        """How many queries have it lower than before."""
        return sum(_depth(after) > _depth(before) for before, after in self.pairs)

    @property
    def same(self) -> int:
        """How many queries have it where it was."""
        return len(self.pairs) - self.improved - self.worse


def measure(
    runs: Sequence[Scores], baseline: Scores, *, uncompared: Sequence[str] = (), seed: int = 0
) -> dict[str, dict[str, Measure]]:
    """Return run name to metric to `Measure`; a metric that a run lacks is absent there.

    Args:
        runs: what is measured.
        baseline: what all others are compared with, but for those in `uncompared`.
        uncompared: names of the runs that are measured only.
        seed: of the intervals and the tests.
    """
    measures: dict[str, dict[str, Measure]] = {}
    for run in runs:
        compared = run is not baseline and run.name not in uncompared
        measures[run.name] = {}
        for metric, values in run.scores.items():
            interval = run.interval(metric, seed=seed)
            difference = None
            # Without a query that both have a value for there is nothing to compare.
            if compared and values.keys() & baseline.scores.get(metric, {}).keys():
                difference = _difference(baseline, run, metric, seed)
            measures[run.name][metric] = Measure(
                run.mean(metric), interval.low, interval.high, len(values), difference
            )
    return _adjusted(measures)


def _difference(baseline: Scores, run: Scores, metric: str, seed: int) -> Difference:
    # Heavier than this module: numpy, and what reads a retriever.
    from ft_core.evaluation import compare

    test = compare(baseline, run, metric, seed=seed)
    return Difference(
        value=test.difference,
        low=test.low,
        high=test.high,
        p_value=test.p_value,
        p_adjusted=test.p_value,
        queries=test.n,
        lower_is_better=is_quantity(metric),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's step-down method.

    S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal
    of Statistics 6 (1979). The chance that any true null hypothesis is rejected stays below
    the level, however the tests depend on each other, as the metrics of one run do.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    floor = 0.0
    for place, index in enumerate(order):
        floor = max(floor, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = floor
    return adjusted


def rank_changes(
    before: Evaluation, after: Evaluation, relevant: Mapping[str, Sequence[str]]
) -> RankChanges:
    """Return where each query's best relevant document stood before, and stands after."""
    depth = min(_kept(before), _kept(after))
    return RankChanges(
        depth,
        [
            tuple(best_rank(run, query, relevant[query], depth) for run in (before, after))  # type: ignore[misc]
            for query in relevant
        ],
    )


def query_changes(
    before: Evaluation, after: Evaluation, dataset: EmbeddingQAFinetuneDataset, metric: str
) -> list[QueryChange]:
    """Return every query's change, the greatest gain first, the greatest loss last."""
    depth = min(_kept(before), _kept(after))
    changes = [
        QueryChange(
            query=query,
            change=after.scores[metric][query] - before.scores[metric][query],
            rank_before=best_rank(before, query, relevant, depth),
            rank_after=best_rank(after, query, relevant, depth),
            top_before=next(iter(before.rankings.get(query, [])), None),
            top_after=next(iter(after.rankings.get(query, [])), None),
        )
        for query, relevant in dataset.relevant_docs.items()
    ]
    # Equal changes of a coarse metric, as of hit rate, are told apart by the rank.
    return sorted(changes, key=lambda c: (c.change, _gain(c)), reverse=True)


def best_rank(run: Evaluation, query: str, relevant: Sequence[str], depth: int) -> int | None:
    """Return the rank, from 1, of the highest relevant document down to `depth`, or None."""
    wanted = set(relevant)
    ranking = run.rankings.get(query, [])[:depth]
    return next((rank for rank, doc in enumerate(ranking, start=1) if doc in wanted), None)


def check_comparable(runs: Sequence[Scores], content_hash: str, queries: Collection[str]) -> None:
    """Refuse runs that cannot stand in one report.

    Raises:
        ArgumentError: there is none, two have one name, or one is of another dataset or
            scores a query that the dataset has not. It names the run.
    """
    if not runs:
        raise ArgumentError("evaluations", "is empty; give at least one")
    seen: set[str] = set()
    for run in runs:
        if run.name in seen:
            raise ArgumentError(
                "evaluations", f"two runs are called {run.name!r}; give each a name of its own"
            )
        seen.add(run.name)
        if run.dataset_hash != content_hash:
            raise ArgumentError(
                "dataset",
                f"{run.name!r} was evaluated on another dataset (content hash "
                f"{run.dataset_hash[:12]}, this one has {content_hash[:12]}); evaluate it on "
                "this one",
            )
        for metric, scores in run.scores.items():
            if not scores.keys() <= set(queries):
                raise ArgumentError(
                    "evaluations",
                    f"{run.name!r} has {metric} of queries that are not in the dataset; "
                    "evaluate it again",
                )
    if not any(run.scores for run in runs):
        raise ArgumentError("evaluations", "no run has a metric")


def _adjusted(measures: dict[str, dict[str, Measure]]) -> dict[str, dict[str, Measure]]:
    tested = [
        (name, metric, cell.difference)
        for name, cells in measures.items()
        for metric, cell in cells.items()
        if cell.difference is not None
    ]
    p_values = holm([difference.p_value for _, _, difference in tested])
    for (name, metric, difference), p_adjusted in zip(tested, p_values, strict=True):
        measures[name][metric] = replace(
            measures[name][metric], difference=replace(difference, p_adjusted=p_adjusted)
        )
    return measures


def _kept(run: Evaluation) -> int:
    return max(map(len, run.rankings.values()), default=0)


def _depth(rank: int | None) -> float:
    return math.inf if rank is None else rank


def _gain(change: QueryChange) -> float:
    return 1 / _depth(change.rank_after) - 1 / _depth(change.rank_before)
