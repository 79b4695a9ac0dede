"""Comparison of results: Spider's definition, checked against all permutations, and odd values."""

from __future__ import annotations

import itertools
import math
import sqlite3
from collections import Counter
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_core.errors import ArgumentError
from ft_core.metrics import results_match

Rows = list[tuple[Any, ...]]


def by_definition(gold: Rows, predicted: Rows, *, ordered: bool) -> bool:
    """Try every order of the columns."""
    if not gold and not predicted:
        return True
    if len(gold) != len(predicted) or len(gold[0]) != len(predicted[0]):
        return False
    for order in itertools.permutations(range(len(gold[0]))):
        rows = [tuple(row[index] for index in order) for row in predicted]
        if gold == rows if ordered else Counter(gold) == Counter(rows):
            return True
    return False


@st.composite
def two_results(draw: st.DrawFn) -> tuple[Rows, Rows]:
    """Draw a result and one that is nearly the same: few values, so that columns are alike."""
    width = draw(st.integers(1, 4))
    value = st.sampled_from([0, 1, None, "1"][: draw(st.integers(1, 4))])
    gold = draw(st.lists(st.tuples(*[value] * width), max_size=6))
    order = draw(st.permutations(range(width)))
    predicted = [tuple(row[index] for index in order) for row in draw(st.permutations(gold))]
    if predicted and draw(st.booleans()):
        row = draw(st.integers(0, len(predicted) - 1))
        predicted[row] = draw(st.tuples(*[value] * width))
    return gold, predicted


@settings(deadline=None)
@given(two_results(), st.booleans())
def test_it_is_what_trying_all_permutations_says(results: tuple[Rows, Rows], ordered: bool) -> None:
    assert results_match(*results, ordered=ordered) == by_definition(*results, ordered=ordered)


@pytest.mark.parametrize(
    ("gold", "predicted", "in_bag", "in_order"),
    [
        ([], [], True, True),
        ([], [(1,)], False, False),
        ([(1,), (2,)], [(2,), (1,)], True, False),
        ([(1,), (1,), (2,)], [(1,), (2,), (2,)], False, False),  # a bag is no set
        ([(1,), (1,)], [(1,)], False, False),
        ([(1, 2)], [(2, 1)], True, True),
        ([(1, 2), (3, 4)], [(2, 1), (4, 3)], True, True),
        ([(1, 2), (3, 4)], [(2, 1), (3, 4)], False, False),  # one order for all rows
        ([(1, 2)], [(1,)], False, False),
        ([(1, 1)], [(1, 2)], False, False),
        ([(None,)], [(None,)], True, True),
        ([(None,)], [(0,)], False, False),
        ([(None,)], [("",)], False, False),
        ([(1,)], [(1.0,)], True, True),
        ([(1,)], [(True,)], True, True),
        ([(1,)], [("1",)], False, False),
        ([(0.1 + 0.2,)], [(0.3,)], False, False),
        ([("a",)], [("A",)], False, False),
        ([(math.nan,)], [(math.nan,)], True, True),
        ([(math.nan,)], [(None,)], False, False),
        ([(Decimal("1.50"),)], [(1.5,)], True, True),
        ([(Decimal("2"),)], [(2,)], True, True),
        ([(Decimal("NaN"),)], [(math.nan,)], True, True),
        ([(Decimal("1E+999999"),)], [(Decimal("1E+999999"),)], True, True),
        ([(b"x",)], [(memoryview(b"x"),)], True, True),
        ([([1, 2.0],)], [([1.0, 2],)], True, True),
        ([([1, 2],)], [([2, 1],)], False, False),
        ([({"a": [1]},)], [({"a": [1]},)], True, True),
        ([()], [()], True, True),
    ],
)
def test_values_rows_and_columns(gold: Rows, predicted: Rows, in_bag: bool, in_order: bool) -> None:
    assert results_match(gold, predicted, ordered=False) is in_bag
    assert results_match(predicted, gold, ordered=False) is in_bag
    assert results_match(gold, predicted, ordered=True) is in_order


def test_it_takes_rows_as_databases_give_them() -> None:
    connection = sqlite3.connect(":memory:")
    connection.row_factory = sqlite3.Row
    query = "SELECT 1 AS a, 'x' AS b UNION ALL SELECT NULL, 'y'"
    assert results_match(connection.execute(query), connection.execute(query), ordered=True)
    swapped = "SELECT 'y' AS b, NULL AS a UNION ALL SELECT 'x', 1"
    assert results_match(connection.execute(query), connection.execute(swapped), ordered=False)
    connection.close()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["ab"], "predicted_rows: row 0 is a str, not a tuple of values"),
        ([(1,), {"a": 1}], "predicted_rows: row 1 is a dict"),
        ([3], "predicted_rows: row 0 is a int"),
        ([(1,), (1, 2)], "predicted_rows: row 1 has 2 values and row 0 has 1"),
    ],
)
def test_what_is_no_result_is_refused(rows: Any, message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        results_match([(1,)], rows, ordered=False)
    assert str(error.value).startswith(message)


def rings(*sizes: int) -> Rows:
    """Return the incidence of rings: each row has two ones, and so has each column."""
    width = sum(sizes)
    rows: Rows = []
    start = 0
    for size in sizes:
        for step in range(size):
            ones = {start + step, start + (step + 1) % size}
            rows.append(tuple(int(column in ones) for column in range(width)))
        start += size
    return rows


class TestBounds:
    def test_many_rows_and_permuted_columns(self) -> None:
        gold = [(n, str(n % 97), n / 2, None, n % 3) for n in range(100_000)]
        predicted = [row[::-1] for row in reversed(gold)]
        assert results_match(gold, predicted, ordered=False)
        predicted[7] = (*predicted[7][:-1], -1)
        assert not results_match(gold, predicted, ordered=False)

    def test_hundreds_of_columns_that_are_all_alike(self) -> None:
        gold = [(n % 2,) * 500 for n in range(200)]
        assert results_match(gold, gold[::-1], ordered=False)
        shifted = [tuple(int((n + 1) % 300 == m) for m in range(300)) for n in range(300)]
        diagonal = [tuple(int(n == m) for m in range(300)) for n in range(300)]
        assert results_match(diagonal, shifted, ordered=False)

    def test_columns_that_only_a_search_tells_apart(self) -> None:
        turned = [row[5:] + row[:5] for row in reversed(rings(10, 30))]
        assert results_match(rings(10, 30), turned, ordered=False)
        assert not results_match(rings(6, 7), rings(5, 8), ordered=False)

    def test_a_search_without_end_is_given_up(self) -> None:
        # Every column of 40 rings of 5 may be each of 200: only bounds end this.
        assert not results_match(rings(*[5] * 38, 4, 6), rings(*[5] * 40), ordered=False)
