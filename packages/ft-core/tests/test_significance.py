"""Intervals and tests against scipy, and against what they promise."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ft_core.errors import ArgumentError
from ft_core.metrics import bootstrap_interval, paired_max_test, paired_randomisation_test


def mean_of_difference(x, y, axis):
    return np.mean(y - x, axis=axis)


def scipy_p(base, other, resamples):
    return stats.permutation_test(
        (base, other),
        mean_of_difference,
        permutation_type="samples",
        n_resamples=resamples,
        batch=2000,
        rng=np.random.default_rng(1),
    ).pvalue


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: rng.normal(size=80),
        lambda rng: rng.exponential(size=60),
        lambda rng: (rng.random(200) < 0.9).astype(float),
    ],
    ids=["normal", "skewed", "hits"],
)
def test_interval_is_that_of_scipy(draw, seed):
    values = draw(np.random.default_rng(seed))
    ours = bootstrap_interval(values, confidence=0.9)
    theirs = stats.bootstrap(
        (values,), np.mean, confidence_level=0.9, n_resamples=10_000, method="BCa", rng=7
    ).confidence_interval
    # Both are random: within a few hundredths of their width, or one hit more or less.
    near = max(0.06 * (theirs.high - theirs.low), 1.001 / len(values))
    assert ours.low == pytest.approx(theirs.low, abs=near)
    assert ours.high == pytest.approx(theirs.high, abs=near)


def test_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        low, high = bootstrap_interval(rng.exponential(size=60), confidence=0.9, resamples=1000)
        covered += low <= 1 <= high
    assert 0.85 < covered / 400 < 0.94


def test_interval_is_reproducible():
    values = np.random.default_rng(3).random(50)
    assert bootstrap_interval(values, seed=5) == bootstrap_interval(list(values), seed=5)
    assert bootstrap_interval(values, seed=5) != bootstrap_interval(values, seed=6)


@pytest.mark.parametrize("values", [[0.5], [1.0] * 30, [0.1] * 7])
def test_equal_values_give_an_interval_of_no_width(values):
    assert bootstrap_interval(values) == (values[0], values[0])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1, 1) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=30))
def test_interval_stays_within_the_values(values):
    low, high = bootstrap_interval(values, confidence=0.999, resamples=200)
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12


@pytest.mark.parametrize("n", [2, 5, 9, 13])
def test_small_samples_give_the_exact_p_value(n):
    rng = np.random.default_rng(n)
    base, other = rng.random(n), rng.random(n) + 0.2
    # scipy enumerates too where resamples allow it.
    expected = scipy_p(base, other, np.inf)
    assert paired_randomisation_test(base, other).p_value == pytest.approx(expected, abs=1e-12)


def test_exact_p_counts_equal_sums_whatever_their_rounding():
    base = [0.0] * 6
    other = [0.1, 0.2, 0.3, 0.1, 0.2, 0.3]
    assert paired_randomisation_test(base, other).p_value == 2 / 2**6


@pytest.mark.parametrize("shift", [0.0, 0.02, 0.05])
def test_large_samples_come_close_to_scipy(shift):
    rng = np.random.default_rng(11)
    base = rng.random(300)
    other = np.clip(base + rng.normal(shift, 0.3, size=300), 0, 1)
    result = paired_randomisation_test(base, other, resamples=20_000)
    # The standard error of the distance is 0.008 at p = 0.5.
    assert result.p_value == pytest.approx(scipy_p(base, other, 20_000), abs=0.03)
    assert result.difference == pytest.approx(np.mean(other - base))
    assert result.low < result.difference < result.high
    assert result.n == 300


def test_p_is_symmetric_and_the_interval_turns_round():
    rng = np.random.default_rng(2)
    base, other = rng.random(100), rng.random(100) + 0.05
    there, back = paired_randomisation_test(base, other), paired_randomisation_test(other, base)
    assert there.p_value == back.p_value
    assert there.difference == -back.difference
    assert there.low == pytest.approx(-back.high, abs=0.01)


@pytest.mark.parametrize("n", [1, 12, 500])
def test_identical_inputs_give_p_of_one(n):
    values = np.random.default_rng(0).random(n)
    assert paired_randomisation_test(values, values) == (0.0, 0.0, 0.0, 1.0, n)


def test_p_is_never_zero():
    result = paired_randomisation_test(np.zeros(400), np.ones(400), resamples=999)
    assert result.p_value == 1 / 1000


def test_p_is_uniform_where_there_is_no_difference():
    rng = np.random.default_rng(4)
    p_values = [
        paired_randomisation_test(*rng.normal(size=(2, 40)), resamples=499, seed=trial).p_value
        for trial in range(400)
    ]
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


def test_memory_does_not_grow_with_queries_times_resamples():
    rng = np.random.default_rng(0)
    base, other = rng.random((2, 5000))
    tracemalloc.start()
    paired_randomisation_test(base, other, resamples=2000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * 2**20  # all at once would be 80 MB for the draws alone


@pytest.mark.parametrize(
    ("base", "other", "settings", "message"),
    [
        ([], [], {}, "base: needs at least one number"),
        ([1.0, 2.0], [1.0], {}, "other: has 1 values and base 2"),
        ([1.0], [float("nan")], {}, "other: the value at position 0 is not finite"),
        ([[1.0]], [1.0], {}, r"base: .* not shape \(1, 1\)"),
        (["a"], [1.0], {}, "base: needs numbers"),
        ([1.0], [1.0], {"resamples": 0}, "resamples: must be at least 1"),
        ([1.0], [1.0], {"confidence": 95}, "confidence: lies between 0 and 1"),
        ([1.0], [1.0], {"seed": -1}, "seed: must be 0 or more"),
    ],
)
def test_bad_input(base, other, settings, message):
    with pytest.raises(ArgumentError, match=message):
        paired_randomisation_test(base, other, **settings)


@pytest.mark.parametrize("n", [6, 9, 12])
@pytest.mark.parametrize("shift", [0.0, 0.1, 0.3])
def test_one_candidate_gets_the_p_value_of_the_pair(n, shift):
    rng = np.random.default_rng(n)
    base = rng.random(n)
    other = base + rng.normal(shift, 0.2, size=n)
    exact = paired_randomisation_test(base, other).p_value
    (p_value,) = paired_max_test(base, [other], resamples=20_000)
    error = np.sqrt(exact * (1 - exact) / 20_000)
    assert p_value == pytest.approx(exact, abs=4 * error + 1 / 20_000)


def test_the_worst_candidate_counts_as_much_as_the_best():
    rng = np.random.default_rng(3)
    base, step = np.zeros(50), np.abs(rng.normal(size=50)) + 0.1
    better, worse = paired_max_test(base, [step, -step])
    assert better == worse < 0.001


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(3, 40))
def test_more_candidates_never_lower_p(seed, candidates, n):
    rng = np.random.default_rng(seed)
    base = rng.random(n)
    others = base + rng.normal(0.1, 0.3, size=(candidates, n))
    for count in range(1, candidates):
        fewer = paired_max_test(base, others[:count], resamples=300)
        more = paired_max_test(base, others[: count + 1], resamples=300)
        assert (more[:count] >= fewer).all()


def test_many_unlike_candidates_cost_much_and_copies_nothing():
    rng = np.random.default_rng(0)
    base = np.zeros(60)
    best = rng.normal(0.3, 1, size=60)
    (alone,) = paired_max_test(base, [best])
    copies = paired_max_test(base, [best] * 40)
    assert copies.tolist() == [alone] * 40
    assert paired_max_test(base, [best, 3 * best]).tolist() == [alone] * 2  # nor does a scale
    among = paired_max_test(base, [best, *rng.normal(size=(40, 60))])[0]
    assert alone < 0.01
    assert among > 3 * alone


def test_a_candidate_that_changes_nothing_gets_p_of_one():
    base = np.random.default_rng(0).random(30)
    same, better = paired_max_test(base, [base, base + 0.5])
    assert same == 1
    assert better == 1 / 10_001


def test_under_the_null_the_smallest_p_is_below_a_level_as_often_as_the_level_says():
    rng = np.random.default_rng(8)
    smallest, unadjusted = [], []
    for trial in range(600):
        # Candidates that are much alike, as the epochs of one training.
        walk = np.cumsum(rng.normal(size=(8, 40)), axis=0)
        smallest.append(paired_max_test(np.zeros(40), walk, resamples=399, seed=trial).min())
        unadjusted.append(paired_max_test(np.zeros(40), [best_of(walk)], resamples=399)[0])
    # 30 expected, with a standard deviation of 5.3.
    assert 16 <= np.sum(np.array(smallest) <= 0.05) <= 46
    # Tested as if it had been the only one, the best would pass far more often.
    assert np.sum(np.array(unadjusted) <= 0.05) > 60


def best_of(candidates):
    return max(candidates, key=lambda row: abs(row.sum()) / np.sqrt((row**2).sum()))


def test_the_max_test_is_reproducible():
    rng = np.random.default_rng(1)
    base, others = rng.random(40), rng.random((3, 40)) + 0.05
    first = paired_max_test(base, others, seed=5)
    assert first.tolist() == paired_max_test(base, others, seed=5).tolist()
    assert first.tolist() != paired_max_test(base, others, seed=6).tolist()


def test_memory_of_the_max_test_does_not_grow_with_queries_times_resamples():
    rng = np.random.default_rng(0)
    base, others = rng.random(5000), rng.random((3, 5000))
    tracemalloc.start()
    paired_max_test(base, others, resamples=4000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * 2**20  # all at once would be 160 MB for the signs alone


@pytest.mark.parametrize(
    ("base", "others", "settings", "message"),
    [
        ([], [[]], {}, "base: needs at least one number"),
        ([1.0, 2.0], [1.0, 2.0], {}, r"others: needs shape \(candidates, 2\), not \(2,\)"),
        ([1.0, 2.0], [[1.0]], {}, r"others: needs shape \(candidates, 2\), not \(1, 1\)"),
        ([1.0], np.empty((0, 1)), {}, "others: needs shape"),
        ([1.0], [[float("inf")]], {}, "others: holds a NaN or an infinity"),
        ([float("nan")], [[1.0]], {}, "base: the value at position 0 is not finite"),
        ([1.0], [[1.0]], {"resamples": 0}, "resamples: must be at least 1"),
        ([1.0], [[1.0]], {"seed": -1}, "seed: must be 0 or more"),
        ([1.0, 2.0], [[1.0, 2.0], [1.0]], {}, "others: needs rows of 2 numbers each"),
        ([1.0], [["a"]], {}, "others: needs rows of 1 numbers each"),
    ],
)
def test_bad_input_of_the_max_test(base, others, settings, message):
    with pytest.raises(ArgumentError, match=message):
        paired_max_test(base, others, **settings)
