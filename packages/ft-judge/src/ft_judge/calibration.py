"""From an encoder's scores to probabilities that mean what they say, and to verdicts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

AS_TRAINED = 0.25
"""What grades are divided by at the temperature 1, in standard deviations of the grades: narrow
enough that a score in the middle of one grade can be sure of it."""

_PRIOR = 1.0  # standard deviation of the logarithm of a temperature, before there is any data
_TEMPERATURES = np.exp(np.linspace(-3, 3, 301))
_LEAST = 1e-12  # a probability, before its logarithm is taken


def sigmoid(values: Numbers) -> Numbers:
    """Return 1 / (1 + exp(-x)), without overflow."""
    small = np.exp(-np.abs(values))
    result: Numbers = np.where(values >= 0, 1, small) / (1 + small)
    return result


def pair_probability(score: float, other: float, temperature: float) -> float:
    """Return the probability that the answer with `score` is better than the other one.

    Of the two answers in the other order it is exactly one minus this: the better one's is
    computed, which is at least a half, and from there on 1 - p is exact in floating point
    (Sterbenz 1974), and so is what is left of 1 after it.
    """
    better = float(sigmoid(np.array(abs(score - other) / temperature)))
    return better if score >= other else 1.0 - better


def pair_verdict(probability: float, tie_threshold: float) -> float:
    """Return 1 (the first is better), 0, or 0.5: a tie, no further from 0.5 than the threshold."""
    if max(probability, 1.0 - probability) - 0.5 <= tie_threshold:
        return 0.5
    return 1.0 if probability > 0.5 else 0.0


def pair_loss(differences: Numbers, verdicts: Numbers, temperature: float = 1.0) -> float:
    """Return the mean negative log-likelihood of verdicts, in nats.

    Args:
        differences: by how much the first answer scores higher, shape (n,).
        verdicts: 1, 0 or 0.5, shape (n,).
        temperature: what the differences are divided by.
    """
    better = differences / temperature
    # -v log s(d) - (1 - v) log s(-d), where log s(d) = -log(1 + exp(-d)).
    return float(np.mean(np.logaddexp(0, -better) + (1 - verdicts) * better))


def grade_probabilities(scores: Numbers, cuts: Sequence[float], temperature: float) -> Numbers:
    """Return each grade's probability, shape (n, grades): the cumulative logit model.

    That a grade is at most k has the probability sigmoid((cut k - score) / temperature)
    (McCullagh, "Regression models for ordinal data", 1980).

    Args:
        scores: shape (n,).
        cuts: on the scale of the scores, where a grade ends and the next begins; ascending.
        temperature: 1 is as it was trained.
    """
    below = sigmoid((np.asarray(cuts)[None, :] - scores[:, None]) / (temperature * AS_TRAINED))
    ones = np.ones((len(scores), 1))
    return np.diff(np.concatenate([0 * ones, below, ones], axis=1), axis=1)


def grade_loss(
    scores: Numbers, places: Numbers, cuts: Sequence[float], temperature: float = 1.0
) -> float:
    """Return the mean negative log-likelihood of grades, in nats; `places` as whole numbers."""
    found = grade_probabilities(scores, cuts, temperature)
    right = found[np.arange(len(scores)), places.astype(int)]
    return float(-np.mean(np.log(np.maximum(right, _LEAST))))


def grade_cuts(grades: Sequence[float], given: Sequence[float]) -> list[float]:
    """Return the cuts between grades, halfway, where the scores' scale is that of the data.

    Args:
        grades: ascending, at least two.
        given: the grades in the data: a score of 0 is their mean, and 1 a standard deviation more.
    """
    halfway = (np.asarray(grades)[1:] + np.asarray(grades)[:-1]) / 2
    result: list[float] = ((halfway - np.mean(given)) / (np.std(given) or 1.0)).tolist()
    return result


def fit_temperature(loss: Sequence[float] | Numbers, count: int) -> float:
    """Return the most probable temperature.

    Temperature scaling (Guo et al., "On calibration of modern neural networks", ICML 2017) with a
    prior, its logarithm normal around 0: a few judgements, all of them right, would ask for 0.

    Args:
        loss: mean negative log-likelihood at each of `temperatures()`.
        count: of how many judgements.
    """
    penalty = 0.5 * (np.log(_TEMPERATURES) / _PRIOR) ** 2
    return float(_TEMPERATURES[np.argmin(count * np.asarray(loss) + penalty)])


def temperatures() -> Numbers:
    """Return the temperatures that `fit_temperature` chooses from."""
    return _TEMPERATURES.copy()


def fit_tie_threshold(probabilities: Numbers, verdicts: Numbers) -> float:
    """Return how near to 0.5 a tie is, so that most verdicts are right; 0 where none is a tie.

    Args:
        probabilities: that the first answer is better, shape (n,).
        verdicts: 1, 0 or 0.5, shape (n,).
    """
    ties = verdicts == 0.5
    if not ties.any():
        return 0.0
    nearness = _nearness(probabilities)
    told_right = ~ties & ((probabilities > 0.5) == (verdicts == 1.0))
    thresholds = np.unique(np.append(nearness, 0.0))
    right = _at_most(nearness[ties], thresholds) + told_right.sum()
    best = int(np.argmax(right - _at_most(nearness[told_right], thresholds)))
    if best == 0 or best == len(thresholds) - 1:
        return float(thresholds[best])
    # Halfway to the next one, but never as far, however near that is.
    below_next = np.nextafter(thresholds[best + 1], 0.0)
    return float(min((thresholds[best] + thresholds[best + 1]) / 2, below_next))


def _nearness(probabilities: Numbers) -> Numbers:
    """Return how far from 0.5 probabilities are; the same for p and 1 - p, to the bit."""
    result: Numbers = np.maximum(probabilities, 1.0 - probabilities) - 0.5
    return result


def _at_most(values: Numbers, limits: Numbers) -> NDArray[np.int64]:
    """Return how many values are no larger than each limit."""
    return np.searchsorted(np.sort(values), limits, side="right")
