"""How sure a mean over queries is, and whether two means differ.

Both resample queries, in blocks: memory does not grow with queries x resamples.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ft_core.errors import ArgumentError

_CELLS = 2**20
_NORMAL = NormalDist()

Vector = NDArray[np.float64]


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


class PairedTest(NamedTuple):
    """Whether two systems differ on the same queries."""

    difference: float
    """Mean of other - base."""
    low: float
    """Lower end of the paired bootstrap interval of the difference."""
    high: float
    """Upper end of it."""
    p_value: float
    """Two-sided: how often chance alone gives a difference at least this large."""
    n: int
    """Number of pairs."""


def bootstrap_interval(
    values: ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Return the bias-corrected and accelerated bootstrap interval (BCa) of the mean.

    The formula is that of Efron, "Better bootstrap confidence intervals", JASA 82 (1987);
    for a mean, the acceleration from the jackknife has a closed form. Where all values are
    equal, both ends are that value.

    Args:
        values: one number for each query, shape (n,).
        confidence: between 0 and 1.
        resamples: how many samples to draw.
        seed: equal seeds give equal intervals.

    Raises:
        ArgumentError: no values, a NaN or infinity, or a setting out of range.
    """
    sample = checked("values", values)
    _check_settings(resamples, confidence, seed)
    mean = sample.mean()
    if np.ptp(sample) == 0:
        return Interval(float(sample[0]), float(sample[0]))
    means = _resampled_means(sample, resamples, np.random.default_rng(seed))
    # The share of samples below the mean says how biased they are; ties count half, and a
    # share of 0 or 1 would mean an infinite bias.
    share = ((means < mean).mean() + (means <= mean).mean()) / 2
    bias = _NORMAL.inv_cdf(float(np.clip(share, 0.5 / resamples, 1 - 0.5 / resamples)))
    deviation = (sample - mean) / np.ptp(sample)  # a ratio: the scale only guards underflow
    acceleration = float((deviation**3).sum() / (6 * (deviation**2).sum() ** 1.5))

    def adjusted(level: float) -> float:
        z = bias + _NORMAL.inv_cdf(level)
        # Only levels far beyond the sample's reach bring the divisor to 0.
        return _NORMAL.cdf(bias + z / max(1 - acceleration * z, 1e-9))

    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [adjusted(tail), adjusted(1 - tail)])
    return Interval(float(low), float(high))


def paired_randomisation_test(
    base: ArrayLike,
    other: ArrayLike,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedTest:
    """Test whether the mean of `other` differs from that of `base` on the same queries.

    Fisher's randomisation test: under the null hypothesis the two values of each query could
    as well be swapped, that is the sign of each difference is a coin toss (Smucker, Allan
    and Carterette, "A comparison of statistical significance tests for information retrieval
    evaluation", CIKM 2007). Where `resamples` covers all sign patterns they are enumerated
    and p is exact. Otherwise p = (count + 1) / (resamples + 1), which is never 0 and never
    too small (Phipson and Smyth, 2010).

    Args:
        base: one value for each query, shape (n,).
        other: the values of the same queries in the same order, shape (n,).
        resamples: how many sign patterns to draw.
        confidence: of the paired bootstrap interval of the difference.
        seed: equal seeds give equal results.

    Raises:
        ArgumentError: different lengths, no values, a NaN or infinity, or a setting out of
            range.
    """
    first, second = checked("base", base), checked("other", other)
    if len(first) != len(second):
        raise ArgumentError(
            "other", f"has {len(second)} values and base {len(first)}; pair them query by query"
        )
    differences = second - first
    interval = bootstrap_interval(
        differences, confidence=confidence, resamples=resamples, seed=seed
    )
    # A difference of 0 has no sign to toss.
    p_value = _sign_flip_p(differences[differences != 0], resamples, seed)
    return PairedTest(float(differences.mean()), *interval, p_value, len(differences))


def paired_max_test(
    base: ArrayLike, others: ArrayLike, *, resamples: int = 10_000, seed: int = 0
) -> Vector:
    """Test which of many candidates differ from `base`, where the best of them will be taken.

    The best of many looks better than it is. Each p-value here says how often chance alone
    gives the *largest* of all candidates' statistics this value: the single-step max-T
    procedure of Westfall and Young, "Resampling-based multiple testing" (1993), on the sign
    flips of `paired_randomisation_test`. Candidates that are much alike, such as the epochs
    of one training, cost little by it, where Bonferroni's method counts each in full.

    Args:
        base: one value for each query, shape (n,).
        others: the candidates' values of the same queries, shape (candidates, n).
        resamples: how many sign patterns to draw.
        seed: equal seeds give equal results.

    Returns:
        Two-sided p-values, adjusted for all candidates, shape (candidates,).

    Raises:
        ArgumentError: shapes that do not fit, no values, a NaN or infinity, or a setting out
            of range.
    """
    first = checked("base", base)
    _check_settings(resamples, 0.95, seed)
    try:
        matrix = np.asarray(others, dtype=np.float64)
    except (TypeError, ValueError):  # no numbers, or rows of several lengths
        raise ArgumentError("others", f"needs rows of {len(first)} numbers each") from None
    if matrix.ndim != 2 or matrix.shape[1] != len(first) or not len(matrix):
        raise ArgumentError("others", f"needs shape (candidates, {len(first)}), not {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ArgumentError("others", "holds a NaN or an infinity")
    differences = matrix - first
    # Under sign flips the sum of squares stays, so that it is the scale of each statistic.
    scale = np.sqrt((differences**2).sum(axis=1))
    statistics = differences / np.where(scale > 0, scale, 1)[:, None]
    observed = np.abs(statistics.sum(axis=1))
    counts = np.zeros(len(matrix))
    for start, stop in _blocks(resamples, len(first)):
        rng = np.random.default_rng([seed, start])
        signs = rng.integers(0, 2, size=(stop - start, len(first))) * 2 - 1
        largest = np.abs(signs @ statistics.T).max(axis=1)
        counts += (largest[:, None] >= observed - 1e-9).sum(axis=0)
    return np.asarray((counts + 1) / (resamples + 1))


def _sign_flip_p(differences: Vector, resamples: int, seed: int) -> float:
    observed = abs(float(differences.sum()))
    # The same sum in another order may differ in its last digits: it counts as equal.
    threshold = observed - 1e-9 * np.abs(differences).sum()
    patterns: int = 2 ** len(differences)
    exact = patterns <= resamples
    if not exact:
        patterns = resamples
    count = 0
    for start, stop in _blocks(patterns, len(differences)):
        if exact:
            flips = (np.arange(start, stop)[:, None] >> np.arange(len(differences))) & 1
        else:
            flips = np.random.default_rng([seed, start]).integers(
                0, 2, size=(stop - start, len(differences)), dtype=np.uint8
            )
        sums = differences.sum() - 2 * (flips @ differences)
        count += int((np.abs(sums) >= threshold).sum())
    return count / patterns if exact else (count + 1) / (patterns + 1)


def _resampled_means(sample: Vector, resamples: int, rng: np.random.Generator) -> Vector:
    means = np.empty(resamples)
    for start, stop in _blocks(resamples, len(sample)):
        drawn = rng.integers(0, len(sample), size=(stop - start, len(sample)), dtype=np.int32)
        means[start:stop] = sample[drawn].mean(axis=1)
    return means


def _blocks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) so that rows x width of one block stays within `_CELLS`."""
    size = max(1, _CELLS // max(1, width))
    for start in range(0, rows, size):
        yield start, min(start + size, rows)


def checked(argument: str, values: ArrayLike) -> Vector:
    """Return one or more finite numbers as an array; anything else is an `ArgumentError`."""
    try:
        sample = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ArgumentError(argument, "needs numbers, one for each query") from None
    if sample.ndim != 1 or not len(sample):
        raise ArgumentError(
            argument, f"needs at least one number in one dimension, not shape {sample.shape}"
        )
    if not np.isfinite(sample).all():
        position = int(np.argmin(np.isfinite(sample)))
        raise ArgumentError(argument, f"the value at position {position} is not finite")
    return sample


def _check_settings(resamples: int, confidence: float, seed: int) -> None:
    if resamples < 1:
        raise ArgumentError("resamples", f"must be at least 1, not {resamples}")
    if not 0 < confidence < 1:
        raise ArgumentError("confidence", f"lies between 0 and 1, as in 0.95; not {confidence}")
    if seed < 0:
        raise ArgumentError("seed", f"must be 0 or more, not {seed}")
