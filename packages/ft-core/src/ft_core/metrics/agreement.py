"""How far one judge agrees with another, and what sways it: order, length, false confidence.

Labels are numbers: a pairwise verdict (1 first better, 0 second, 0.5 tie), a score, or 1 and
0 for a pass and a fail. A verdict that a judge did not give is no label: the functions that
allow for one take None, all others refuse NaN.

A statistic that is not defined is 0, which claims nothing: the kappa of two judges that give
one and the same label throughout, and the correlation with a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ft_core.errors import ArgumentError
from ft_core.metrics.significance import Interval, Vector, checked

Verdicts = Sequence[float | None]
"""One verdict for each pair; None where the judge gave none."""


class PositionBias(NamedTuple):
    """What the order of two answers does to a judge's verdicts."""

    flips: float
    """Share of the pairs whose verdict changes with the order; 0 where no pair can tell."""
    first: float
    """Share of the pairs where each order's verdict is for the answer that stood first."""
    second: float
    """Share of the pairs where each order's verdict is for the answer that stood second."""
    pairs: int
    """How many pairs have a verdict in both orders."""


class LengthBias(NamedTuple):
    """What the length of an answer does to a judge, beside what it does to a reference judge."""

    longer: float
    """How often the judge prefers the longer answer; a tie counts half."""
    reference_longer: float
    """How often the reference judge does, of the same pairs."""
    excess: float
    """`longer - reference_longer`: the preference that the reference does not share."""
    correlation: float
    """Spearman's, of what the judge gives the first answer beyond the reference with how much
    longer that answer is."""
    pairs: int
    """How many pairs have two answers of different length and a verdict by both judges."""


def agreement(first: ArrayLike, second: ArrayLike) -> float:
    """Return the share of equal labels, shapes (n,) and (n,).

    Raises:
        ArgumentError: no labels, different lengths, or something that is not a finite number.
    """
    a, b = _paired("first", first, "second", second)
    return float((a == b).mean())


def cohen_kappa(
    first: ArrayLike,
    second: ArrayLike,
    *,
    weights: Literal["linear", "quadratic"] | None = None,
) -> float:
    """Return Cohen's kappa: agreement beyond what the two judges' own habits give by chance.

    1 is full agreement, 0 is chance, below 0 is less than chance. With `weights`, a
    disagreement counts by its distance or squared distance (J. Cohen, "Weighted kappa",
    Psychological Bulletin 70, 1968); the distance is that of the labels themselves, so that 1
    and 5 are four times as far apart as 1 and 2, whichever labels occur.

    Args:
        first: labels of one judge, shape (n,).
        second: labels of the other, shape (n,); the order of the two does not matter.
        weights: None counts every disagreement the same.

    Returns:
        Kappa; 0 where both judges gave one and the same label throughout.

    Raises:
        ArgumentError: as for `agreement`, or unknown weights.
    """
    a, b = _paired("first", first, "second", second)
    labels, codes = np.unique(np.concatenate([a, b]), return_inverse=True)
    codes = codes.reshape(2, len(a))
    counts = np.bincount(codes[0] * len(labels) + codes[1], minlength=len(labels) ** 2)
    observed = counts.reshape(len(labels), len(labels)) / len(a)
    expected = np.outer(observed.sum(axis=1), observed.sum(axis=0))
    distance = np.abs(labels[:, None] - labels[None, :])
    if weights is None:
        distance = (distance > 0).astype(np.float64)
    elif weights == "quadratic":
        distance = (distance / max(float(np.ptp(labels)), np.finfo(float).tiny)) ** 2
    elif weights != "linear":
        raise ArgumentError("weights", f'is None, "linear" or "quadratic", not {weights!r}')
    by_chance = float((distance * expected).sum())
    return 1.0 - float((distance * observed).sum()) / by_chance if by_chance > 0 else 0.0


def pearson(first: ArrayLike, second: ArrayLike) -> float:
    """Return the product-moment correlation, shapes (n,) and (n,); 0 where one is constant.

    Raises:
        ArgumentError: as for `agreement`.
    """
    return _correlation(*_paired("first", first, "second", second))


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Return the correlation of the ranks, equal values sharing the mean of theirs.

    0 where one is constant. Raises like `agreement`.
    """
    a, b = _paired("first", first, "second", second)
    return _correlation(_ranks(a), _ranks(b))


def jaccard(reference: ArrayLike, verdicts: ArrayLike) -> float:
    """Return the Jaccard similarity of labels, as LlamaIndex's guide for judges reports it.

    For each label, the examples that both judges gave it over those that either gave it; the
    mean over the labels, weighted by how often the reference gave each. That is
    `jaccard_score(reference, verdicts, average="weighted")` of scikit-learn.

    Args:
        reference: labels of the judge that counts as right, shape (n,).
        verdicts: labels of the other, shape (n,).

    Raises:
        ArgumentError: as for `agreement`.
    """
    right, given = _paired("reference", reference, "verdicts", verdicts)
    labels = np.unique(right)
    by_reference = right[None, :] == labels[:, None]
    by_judge = given[None, :] == labels[:, None]
    both = (by_reference & by_judge).sum(axis=1)
    either = (by_reference | by_judge).sum(axis=1)  # never 0: each label is the reference's
    return float((by_reference.sum(axis=1) * both / either).sum() / len(right))


def inconclusive_rate(verdicts: Verdicts) -> float:
    """Return the share of verdicts that a judge did not give (None).

    Raises:
        ArgumentError: no verdicts, or one that is neither None nor a finite number.
    """
    return float(np.isnan(_optional("verdicts", verdicts)).mean())


def position_bias(original: Verdicts, flipped: Verdicts) -> PositionBias:
    """Return how the order of the answers sways a judge.

    Args:
        original: verdicts on each pair in one order, shape (n,); None: not given.
        flipped: verdicts on the same pairs with the answers in the other order, each
            expressed for the first order, so that equal numbers mean the same answer.

    Raises:
        ArgumentError: no pairs, different lengths, or a verdict that is none.
    """
    a, b = _optional("original", original), _optional("flipped", flipped)
    _check_lengths("original", a, "flipped", b)
    known = ~(np.isnan(a) | np.isnan(b))
    a, b = a[known], b[known]
    if not len(a):
        return PositionBias(0.0, 0.0, 0.0, 0)
    # In the flipped order the answer that stood first is the second of the original order.
    return PositionBias(
        flips=float((a != b).mean()),
        first=float(((a > 0.5) & (b < 0.5)).mean()),
        second=float(((a < 0.5) & (b > 0.5)).mean()),
        pairs=len(a),
    )


def length_bias(
    first_lengths: ArrayLike,
    second_lengths: ArrayLike,
    verdicts: Verdicts,
    reference: Verdicts,
) -> LengthBias:
    """Return how much more a judge likes the longer answer than a reference judge does.

    A judge that is right prefers longer answers as often as they are better, which the
    reference measures: only the excess is a bias.

    Args:
        first_lengths: lengths of the first answers, shape (n,), in any unit.
        second_lengths: lengths of the second answers, shape (n,).
        verdicts: the judge's, 1 for the first answer; None: not given.
        reference: the reference judge's.

    Raises:
        ArgumentError: no pairs, different lengths, or a verdict that is none.
    """
    first, second = _paired("first_lengths", first_lengths, "second_lengths", second_lengths)
    judged, right = _optional("verdicts", verdicts), _optional("reference", reference)
    _check_lengths("first_lengths", first, "verdicts", judged)
    _check_lengths("first_lengths", first, "reference", right)
    known = (first != second) & ~np.isnan(judged) & ~np.isnan(right)
    if not known.any():
        return LengthBias(0.0, 0.0, 0.0, 0.0, 0)
    difference, judged, right = (first - second)[known], judged[known], right[known]
    longer = float(np.where(difference > 0, judged, 1 - judged).mean())
    reference_longer = float(np.where(difference > 0, right, 1 - right).mean())
    return LengthBias(
        longer,
        reference_longer,
        longer - reference_longer,
        _correlation(_ranks(judged - right), _ranks(difference)),
        len(difference),
    )


def expected_calibration_error(
    confidences: ArrayLike, correct: ArrayLike, *, bins: int = 10
) -> float:
    """Return how far a judge's confidence is from how often it is right, on average.

    The confidences fall into `bins` intervals of equal width, ((m - 1) / bins, m / bins];
    the error is the mean over the intervals of |accuracy - mean confidence|, weighted by
    their numbers of verdicts (Naeini, Cooper and Hauskrecht, "Obtaining well calibrated
    probabilities using Bayesian binning", AAAI 2015; in this form equation 5 of Guo et al.,
    "On calibration of modern neural networks", ICML 2017).

    Args:
        confidences: probability that each verdict is right, shape (n,), from 0 to 1. Of a
            judge that gives the probability p of one of two verdicts it is max(p, 1 - p).
        correct: whether it was, shape (n,), 0 and 1 or a share between them.
        bins: how many intervals.

    Raises:
        ArgumentError: as for `agreement`, a number outside 0 to 1, or `bins` below 1.
    """
    confidence, right = _paired("confidences", confidences, "correct", correct)
    for name, values in (("confidences", confidence), ("correct", right)):
        if values.min() < 0 or values.max() > 1:
            raise ArgumentError(name, "lie between 0 and 1")
    if bins < 1:
        raise ArgumentError("bins", f"must be at least 1, not {bins}")
    # Edges as written, not `ceil(c * bins)`: 0.3 belongs below the edge 3 / 10.
    edges = np.arange(1, bins) / bins
    places = np.searchsorted(edges, confidence, side="left")
    gaps = np.bincount(places, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def bootstrap_statistic(
    statistic: Callable[..., float],
    *columns: ArrayLike,
    confidence: float = 0.95,
    resamples: int = 1_000,
    seed: int = 0,
) -> Interval:
    """Return the percentile bootstrap interval of a statistic that is not a mean.

    `bootstrap_statistic(cohen_kappa, teacher, student)`: rows are drawn with replacement, the
    same of each column. For means take `bootstrap_interval`, which is more exact.

    Args:
        statistic: takes as many arrays as there are columns.
        columns: numbers, each of shape (n,).
        confidence: between 0 and 1.
        resamples: how many samples to draw.
        seed: equal seeds give equal intervals.

    Raises:
        ArgumentError: no columns, different lengths, NaN, or a setting out of range.
    """
    if not columns:
        raise ArgumentError("columns", "are missing; give at least one")
    if resamples < 1 or not 0 < confidence < 1:
        raise ArgumentError("confidence", "lies between 0 and 1, and resamples are at least 1")
    arrays = [checked("columns", column) for column in columns]
    for array in arrays[1:]:
        _check_lengths("columns", arrays[0], "columns", array)
    rng = np.random.default_rng(seed)
    values = [
        statistic(*(array[rows] for array in arrays))
        for rows in rng.integers(0, len(arrays[0]), size=(resamples, len(arrays[0])))
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(float(low), float(high))


def _correlation(a: Vector, b: Vector) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    # Scaled before they are squared, so that no length under- or overflows.
    a, b = a / np.abs(a).max(), b / np.abs(b).max()
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.abs(a).max() * np.abs(b).max())
    if scale == 0:  # values that differ in the last digit only
        return 0.0
    a, b = a / np.abs(a).max(), b / np.abs(b).max()
    return float(np.clip((a @ b) / np.sqrt((a @ a) * (b @ b)), -1, 1))


def _ranks(values: Vector) -> Vector:
    """Return ranks from 1; equal values have the mean of the ranks that they take up."""
    _, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[codes.reshape(-1)])


def _paired(
    first_name: str, first: ArrayLike, second_name: str, second: ArrayLike
) -> tuple[Vector, Vector]:
    a, b = checked(first_name, first), checked(second_name, second)
    _check_lengths(first_name, a, second_name, b)
    return a, b


def _check_lengths(first_name: str, first: Vector, second_name: str, second: Vector) -> None:
    if len(first) != len(second):
        raise ArgumentError(
            second_name,
            f"has {len(second)} values and {first_name} {len(first)}; pair them one by one",
        )


def _optional(name: str, values: Verdicts) -> Vector:
    """Return verdicts as numbers, NaN where there is none."""
    given = [value for value in values if value is not None]
    if len(values) == 0:
        raise ArgumentError(name, "is empty; give at least one")
    if given:
        checked(name, given)  # refuses NaN, which is no verdict and no missing one either
    return np.asarray([np.nan if value is None else value for value in values], dtype=np.float64)
