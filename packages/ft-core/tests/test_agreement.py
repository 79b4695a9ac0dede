"""Agreement metrics against scikit-learn and SciPy, and on the cases that these leave open."""

import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import assume, given
from hypothesis import strategies as st

from ft_core.errors import ArgumentError
from ft_core.metrics import (
    agreement,
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


def columns(values, count=2, min_size=1):
    rows = st.lists(st.tuples(*[values] * count), min_size=min_size, max_size=60)
    return rows.map(lambda rows: [list(column) for column in zip(*rows, strict=True)])


labels = st.integers(1, 5)
numbers = st.floats(-1e6, 1e6).map(lambda value: round(value, 6))


@given(columns(labels))
def test_agreement_and_kappas_are_scikit_learns(pair):
    first, second = pair
    assert agreement(first, second) == pytest.approx(sklearn.metrics.accuracy_score(first, second))
    for weights in (None, "linear", "quadratic"):
        if len({*first, *second}) == 1:
            assert cohen_kappa(first, second, weights=weights) == 0
            continue
        expected = sklearn.metrics.cohen_kappa_score(
            first, second, labels=range(1, 6), weights=weights
        )
        assert cohen_kappa(first, second, weights=weights) == pytest.approx(expected)
        assert cohen_kappa(second, first, weights=weights) == pytest.approx(expected)


def test_weights_go_by_the_labels_themselves():
    # Only 1, 2 and 5 occur: 5 is not next to 2.
    first, second = [1, 2, 5, 5, 1, 2], [1, 5, 5, 2, 2, 2]
    expected = sklearn.metrics.cohen_kappa_score(
        first, second, labels=range(1, 6), weights="linear"
    )
    naive = sklearn.metrics.cohen_kappa_score(first, second, weights="linear")
    assert cohen_kappa(first, second, weights="linear") == pytest.approx(expected)
    assert not math.isclose(expected, naive)
    assert cohen_kappa([1.5, 2, 4.5], [1.5, 2.5, 4.5], weights="quadratic") > 0.9
    assert cohen_kappa([1, 0, 1, 0], [0, 1, 0, 1]) == pytest.approx(-1)


@given(columns(numbers, min_size=2))
def test_correlations_are_scipys(pair):
    first, second = pair
    assume(np.std(first) > 1e-3 and np.std(second) > 1e-3)
    assert pearson(first, second) == pytest.approx(
        scipy.stats.pearsonr(first, second).statistic, abs=1e-9
    )


@given(columns(st.integers(-3, 3) | numbers, min_size=2))
def test_rank_correlations_are_scipys(pair):
    first, second = pair
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert spearman(first, second) == pearson(first, second) == 0
        return
    assert spearman(first, second) == pytest.approx(
        scipy.stats.spearmanr(first, second).statistic, abs=1e-9
    )


def test_correlations_survive_extreme_scales():
    assert pearson([1e300, 2e300, 3e300], [1e-300, 2e-300, 3e-300]) == pytest.approx(1)
    assert pearson([1, 1 + 2**-52], [0, 1]) == pytest.approx(1)
    assert pearson([4.0], [2.0]) == 0  # one point is constant


@given(columns(st.sampled_from([0, 0.5, 1])))
def test_jaccard_is_scikit_learns_weighted_mean(pair):
    reference, verdicts = pair
    expected = sklearn.metrics.jaccard_score(
        [str(value) for value in reference],
        [str(value) for value in verdicts],
        average="weighted",
        zero_division=0,
    )
    assert jaccard(reference, verdicts) == pytest.approx(expected)


@given(
    columns(st.floats(0, 1) | st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 1.0])), st.integers(1, 15)
)
def test_calibration_error_is_that_of_the_bins_one_by_one(pair, bins):
    confidences, given_right = pair
    right = [float(value > 0.5) for value in given_right]
    total = 0.0
    for m in range(1, bins + 1):
        members = [
            i for i, c in enumerate(confidences)
            if (m - 1) / bins < c <= m / bins or (m == 1 and c == 0)
        ]  # fmt: skip
        if members:
            accuracy = sum(right[i] for i in members) / len(members)
            confidence = sum(confidences[i] for i in members) / len(members)
            total += len(members) / len(confidences) * abs(accuracy - confidence)
    assert expected_calibration_error(confidences, right, bins=bins) == pytest.approx(total)


def test_calibration_error_by_hand():
    assert expected_calibration_error([0.9, 0.9, 0.6, 0.6], [1, 1, 0, 1]) == pytest.approx(0.1)
    assert expected_calibration_error([1.0, 1.0], [1, 1]) == 0
    assert expected_calibration_error([1.0], [0]) == 1
    with pytest.raises(ArgumentError, match="confidences: lie between 0 and 1"):
        expected_calibration_error([1.2], [1])
    with pytest.raises(ArgumentError, match="bins: must be at least 1"):
        expected_calibration_error([0.2], [1], bins=0)


@given(columns(st.sampled_from([None, 0.0, 0.5, 1.0])))
def test_position_bias_one_by_one(pair):
    original, flipped = pair
    known = [(a, b) for a, b in zip(original, flipped, strict=True) if None not in (a, b)]
    bias = position_bias(original, flipped)
    assert bias.pairs == len(known)
    if known:
        assert bias.flips == pytest.approx(sum(a != b for a, b in known) / len(known))
        assert bias.first == pytest.approx(sum((a, b) == (1, 0) for a, b in known) / len(known))
        assert bias.second == pytest.approx(sum((a, b) == (0, 1) for a, b in known) / len(known))
    assert inconclusive_rate(original) == original.count(None) / len(original)


def test_a_judge_that_takes_the_first_answer_is_seen():
    bias = position_bias([1.0, 1.0, 1.0], [0.0, 0.0, 1.0])
    assert bias == pytest.approx((2 / 3, 2 / 3, 0.0, 3))


def test_length_bias_is_what_the_reference_does_not_share():
    first, second = [10, 20, 30, 40, 5], [20, 10, 10, 50, 5]
    longest = [0.0, 1.0, 1.0, 0.0, 1.0]
    right = [0.0, 0.0, 1.0, 1.0, 0.0]
    bias = length_bias(first, second, longest, right)
    assert (bias.longer, bias.reference_longer, bias.excess, bias.pairs) == (1.0, 0.5, 0.5, 4)
    assert bias.correlation > 0
    assert length_bias(first, second, right, right)[2:] == (0.0, 0.0, 4)
    assert length_bias(first, second, [None] * 5, right) == (0, 0, 0, 0, 0)
    assert length_bias(second, first, [1 - v for v in longest], [1 - v for v in right]) == bias


def test_intervals_of_statistics():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2, 400)
    second = np.where(rng.random(400) < 0.8, first, 1 - first)
    low, high = bootstrap_statistic(cohen_kappa, first, second, seed=1)
    assert low < cohen_kappa(first, second) < high
    assert high - low < 0.25
    assert bootstrap_statistic(cohen_kappa, first, second, seed=1) == (low, high)
    assert bootstrap_statistic(agreement, [1, 1], [1, 1]) == (1, 1)
    with pytest.raises(ArgumentError, match="columns: has 1 values and columns 2"):
        bootstrap_statistic(agreement, [1, 2], [1])


@pytest.mark.parametrize("metric", [agreement, cohen_kappa, pearson, spearman, jaccard])
def test_what_is_no_label_is_refused(metric):
    for bad in ([1, math.nan], [1, None], [1, math.inf], ["a", "b"], [], [[1, 2]]):
        with pytest.raises(ArgumentError):
            metric(bad, bad)
    with pytest.raises(ArgumentError, match="has 1 values"):
        metric([1, 2], [1])


def test_a_nan_is_not_an_inconclusive_verdict():
    with pytest.raises(ArgumentError, match=r"verdicts: .*not finite"):
        inconclusive_rate([1.0, math.nan])
    with pytest.raises(ArgumentError, match="verdicts: is empty"):
        inconclusive_rate([])
    with pytest.raises(ArgumentError, match="flipped: has 1 values and original 2"):
        position_bias([1.0, 0.0], [1.0])
    with pytest.raises(ArgumentError, match="weights"):
        cohen_kappa([1, 2], [1, 2], weights="cubic")
