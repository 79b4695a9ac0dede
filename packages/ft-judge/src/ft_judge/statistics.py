"""What is said of a judge beside means: kappa, correlations, bias, calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ft_core.datasets import JudgeExample
from ft_core.metrics import agreement as share_equal
from ft_core.metrics import (
    bootstrap_statistic,
    cohen_kappa,
    expected_calibration_error,
    inconclusive_rate,
    jaccard,
    length_bias,
    pearson,
    position_bias,
    spearman,
)
from ft_core.report import Statistic
from ft_judge.judging import Answer, most_probable

Vector = NDArray[np.float64]

_NONE = -1.0  # the label of a verdict that was not given, where it counts as a label


@dataclass(frozen=True)
class Judged:
    """One example with what a judge said of it and what counts as right."""

    example: JudgeExample
    answers: tuple[Answer, ...]
    """In each order that was asked for, expressed for the example's own order; of the recorded
    teacher none where it was not asked."""
    teacher: float | None
    human: float | None

    def right(self, reference: str) -> float | None:
        """Return the label of `teacher` or `human`."""
        return self.teacher if reference == "teacher" else self.human

    @property
    def consensus(self) -> float | None:
        """What an evaluator says that enforces consensus of both orders; None: inconclusive.

        Where the orders differ, a judge that gives probabilities has them averaged, as in
        `ft_judge.scored`. Others vote, as in LlamaIndex; one order may abstain by a tie, and two
        opposite votes are no tie.
        """
        verdicts = [answer.verdict for answer in self.answers if answer.verdict is not None]
        if len(verdicts) < len(self.answers):
            return None
        if len(set(verdicts)) == 1:
            return verdicts[0]
        sure = [(a.probability, a.tie) for a in self.answers if a.probability is not None]
        if len(sure) == len(verdicts):
            probability, tie = np.mean(sure, axis=0).tolist()
            return most_probable(probability - tie / 2, 1 - probability - tie / 2, tie)
        total = sum(verdicts) / len(verdicts)
        return None if total == 0.5 else float(total > 0.5)


def statistics(
    items: Sequence[Judged], references: Sequence[str], *, seed: int = 0
) -> dict[str, Statistic]:
    """Return name to number, as far as the items allow.

    Args:
        items: what one judge said; all of one task.
        references: of `teacher` and `human`, whom to compare it with.
        seed: of the intervals.
    """
    found: dict[str, Statistic] = {}
    pairs = items[0].example.task == "pairwise"
    verdicts = [answer.verdict for item in items for answer in item.answers]
    found["inconclusive"] = Statistic(inconclusive_rate(verdicts), n=len(items))
    for reference in references:
        known = [item for item in items if item.right(reference) is not None]
        if known:
            numbers = _of_reference(known, reference, seed)
            found |= {f"{name}_{reference}": value for name, value in numbers.items()}
    if pairs and all(len(item.answers) == 2 for item in items):
        found |= _position(items)
    if pairs:
        found |= _length(items)
    came = [a for item in items for a in item.answers if a.error is None and a.seconds]
    if came:
        mean = sum(answer.seconds for answer in came) / len(came)
        found["ms_per_verdict"] = Statistic(1000 * mean, n=len(came))
    return found


def _of_reference(items: Sequence[Judged], reference: str, seed: int) -> dict[str, Statistic]:
    right = np.asarray([item.right(reference) for item in items], dtype=np.float64)
    task = items[0].example.task
    found = {"kappa": _kappa(items, right, task == "pairwise", seed)}
    if task == "correctness":
        found |= _scores(items, right, seed)
    if task == "pairwise" and all(len(item.answers) == 2 for item in items):
        found |= _consensus(items, right)
    return found | _calibration(items, right)


def _kappa(items: Sequence[Judged], right: Vector, pairs: bool, seed: int) -> Statistic:
    """Kappa of all verdicts; one that was not given is a label of its own, which is never right.

    Of pairs each order counts, as it was shown: then neither judge can gain by a place that
    wins more often in this dataset.
    """
    orders = _columns(items)

    def shown(values: Vector, turned: bool) -> Vector:
        return np.where(values == _NONE, _NONE, 1 - values) if turned else values

    def kappa(reference: Vector, *columns: Vector) -> float:
        turns = [pairs and place == 1 for place in range(len(columns))]
        return cohen_kappa(
            np.concatenate([shown(reference, turned) for turned in turns]),
            np.concatenate([shown(c, turned) for c, turned in zip(columns, turns, strict=True)]),
        )

    return _with_interval(kappa, seed, right, *orders)


def _columns(items: Sequence[Judged]) -> list[Vector]:
    """Return the verdicts by order, each of shape (n,), with `_NONE` where there is none."""
    rows = [[_NONE if a.verdict is None else a.verdict for a in item.answers] for item in items]
    return list(np.asarray(rows, dtype=np.float64).T)


def _scores(items: Sequence[Judged], right: Vector, seed: int) -> dict[str, Statistic]:
    """Correlations and weighted kappa of the scores that were given."""
    (given,) = _columns(items)
    known = given != _NONE
    if not known.any():
        return {}
    columns = right[known], given[known]

    def weighted(first: Vector, second: Vector) -> float:
        return cohen_kappa(first, second, weights="quadratic")

    return {
        "weighted_kappa": _with_interval(weighted, seed, *columns),
        "pearson": _with_interval(pearson, seed, *columns),
        "spearman": _with_interval(spearman, seed, *columns),
    }


def _consensus(items: Sequence[Judged], right: Vector) -> dict[str, Statistic]:
    """What LlamaIndex's guide reports: of both orders' joint verdict, where there is one."""
    joint = [item.consensus for item in items]
    known = np.asarray([verdict is not None for verdict in joint])
    found = {"consensus_inconclusive": Statistic(float((~known).mean()), n=len(items))}
    if known.any():
        verdicts = np.asarray([v for v in joint if v is not None], dtype=np.float64)
        count = int(known.sum())
        found |= {
            "consensus_agreement": Statistic(share_equal(right[known], verdicts), n=count),
            "consensus_correlation": Statistic(pearson(right[known], verdicts), n=count),
            "consensus_jaccard": Statistic(jaccard(right[known], verdicts), n=count),
        }
    return found


def _calibration(items: Sequence[Judged], right: Vector) -> dict[str, Statistic]:
    confidences, correct = [], []
    for item, label in zip(items, right.tolist(), strict=True):
        for answer in item.answers:
            if answer.probability is None or answer.verdict is None:
                continue
            share = float(answer.verdict == label)
            confidence = answer.probability
            if item.example.task == "pairwise":
                if answer.verdict == 0.5:  # of a tie the probability says nothing
                    continue
                wins = answer.verdict == 1
                confidence = (confidence if wins else 1 - confidence) - answer.tie / 2
                if label == 0.5 and not answer.tie:  # it knows no ties, and is half right
                    share = 0.5
            confidences.append(max(0.0, confidence))
            correct.append(share)
    if not confidences:
        return {}
    error = expected_calibration_error(confidences, correct)
    return {"calibration_error": Statistic(error, n=len(confidences))}


def _position(items: Sequence[Judged]) -> dict[str, Statistic]:
    bias = position_bias(
        [item.answers[0].verdict for item in items], [item.answers[1].verdict for item in items]
    )
    return {
        "flips": Statistic(bias.flips, n=bias.pairs),
        "always_first": Statistic(bias.first, n=bias.pairs),
        "always_second": Statistic(bias.second, n=bias.pairs),
    }


def _length(items: Sequence[Judged]) -> dict[str, Statistic]:
    """Length bias beside the teacher, or beside people where no teacher judged."""
    rows = [
        (item, answer, item.human if item.teacher is None else item.teacher)
        for item in items
        for answer in item.answers
    ]
    bias = length_bias(
        [len(item.example.answer) for item, _, _ in rows],
        [len(item.example.second_answer or "") for item, _, _ in rows],
        [answer.verdict for _, answer, _ in rows],
        [right for _, _, right in rows],
    )
    if not bias.pairs:
        return {}
    return {
        "prefers_longer": Statistic(bias.longer, n=bias.pairs),
        "prefers_longer_in_excess": Statistic(bias.excess, n=bias.pairs),
        "length_correlation": Statistic(bias.correlation, n=bias.pairs),
    }


def _with_interval(statistic: Callable[..., float], seed: int, *columns: Vector) -> Statistic:
    interval = bootstrap_statistic(statistic, *columns, seed=seed)
    return Statistic(statistic(*columns), interval.low, interval.high, len(columns[0]))
