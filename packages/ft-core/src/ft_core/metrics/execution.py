"""Whether two queries returned the same, as Spider's execution accuracy asks."""

from __future__ import annotations

import decimal
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from ft_core.errors import ArgumentError

Row = tuple[Hashable, ...]

_NAN = ("not a number",)
_PLAIN = frozenset({type(None), str, int, bool, bytes})
_LARGEST_EXPONENT = 300  # beyond, a Decimal is no float
_SPARE_CELLS = 2_000_000  # what the search for a permutation may look at in vain: seconds


def results_match(
    gold_rows: Iterable[Sequence[Any]],
    predicted_rows: Iterable[Sequence[Any]],
    *,
    ordered: bool,
) -> bool:
    """Return whether two results hold the same rows, each as often, whatever the columns' order.

    This is `result_eq` of Spider's test-suite evaluation (Zhong, Yu and Klein 2020, "Semantic
    Evaluation for Text-to-SQL with Distilled Test Suites"; `exec_eval.py` of
    taoyds/test-suite-sql-eval), the definition of execution accuracy that Spider's leaderboard
    uses:

    - Two empty results match, whatever their columns.
    - Otherwise both have as many rows and as many columns, and there is one order of the
      predicted columns, the same for all rows, in which the rows agree. Names of columns do
      not count: "SELECT name, age" answers what "SELECT age, name" answers.
    - Duplicate rows count: the results are bags, not sets.
    - With `ordered` the rows agree in their order, too. Where the gold query leaves ties in
      any order, so may a right prediction, and it is counted as wrong.
    - NULL equals NULL and nothing else. A number equals the same number of another type, 1 and
      1.0 and true; floats are compared exactly. A number never equals a text.

    Two things go beyond the original, which knows SQLite only: a `Decimal` counts as the
    nearest float (PostgreSQL's averages), and a NaN equals a NaN.

    The result does not depend on chance, as the original's sampling may. 100,000 rows of ten
    columns take a second or two. Where very many columns are alike, the search for their
    order stops after some seconds, and the results count as different.

    Args:
        gold_rows: rows of the gold query, tuples or SQLAlchemy rows, all of one length.
        predicted_rows: rows of the predicted query.
        ordered: whether the gold query asks for an order (its outermost ORDER BY).

    Raises:
        ArgumentError: a row is not a sequence of values, or rows of one result differ in
            length.
    """
    gold = _rows(gold_rows, "gold_rows")
    predicted = _rows(predicted_rows, "predicted_rows")
    if len(gold) != len(predicted):
        return False
    if not gold:
        return True
    if len(gold[0]) != len(predicted[0]):
        return False
    if gold == predicted:
        return True
    if not gold[0]:
        return True  # as many rows of no column
    columns, others = list(zip(*gold, strict=True)), list(zip(*predicted, strict=True))
    if ordered:
        return _bag(columns) == _bag(others)
    if _bag(gold) == _bag(predicted):
        return True
    return _Permutation(columns, others).exists()


def _rows(rows: Iterable[Sequence[Any]], argument: str) -> list[Row]:
    found: list[Row] = []
    for number, row in enumerate(rows):
        if isinstance(row, str | bytes | dict) or not isinstance(row, Sequence):
            raise ArgumentError(
                argument, f"row {number} is a {type(row).__name__}, not a tuple of values"
            )
        found.append(tuple(map(_value, row)))
        if len(found[-1]) != len(found[0]):
            raise ArgumentError(
                argument,
                f"row {number} has {len(found[-1])} values and row 0 has {len(found[0])}; pass "
                "the rows of one result",
            )
    return found


def _value(value: Any) -> Hashable:
    """Return a value that equals, and hashes as, what counts as the same."""
    if type(value) in _PLAIN:
        return value  # type: ignore[no-any-return]
    if isinstance(value, decimal.Decimal):
        if value.is_finite() and value.adjusted() > _LARGEST_EXPONENT:
            return value
        value = math.nan if value.is_nan() else float(value)
    if isinstance(value, float):
        return _NAN if math.isnan(value) else value
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, list | tuple):  # PostgreSQL's arrays
        return ("array", *map(_value, value))
    if isinstance(value, dict):  # and its JSON
        return ("object", frozenset((_value(k), _value(v)) for k, v in value.items()))
    return value if isinstance(value, Hashable) else repr(value)


def _bag(items: Iterable[Hashable]) -> dict[Hashable, int]:
    return dict(Counter(items))  # a dict compares in C, a Counter in Python


class _Permutation:
    """A search for an order of columns in which two bags of rows are the same.

    Columns are matched one by one; after each, the parts of the rows that are matched so far
    must be the same bags. To try few, only columns are paired whose values stand, equally
    often, in rows of the same values.
    """

    def __init__(self, gold: Sequence[Row], predicted: Sequence[Row]) -> None:
        self._ids: dict[Any, int] = {}
        self._gold = [[self._id(value) for value in column] for column in gold]
        self._predicted = [[self._id(value) for value in column] for column in predicted]
        self._cells_left = _SPARE_CELLS + 4 * len(gold) * len(gold[0])

    def _id(self, value: Any) -> int:
        return self._ids.setdefault(value, len(self._ids))

    def exists(self) -> bool:
        theirs: dict[Any, list[int]] = defaultdict(list)
        for index, profile in enumerate(self._profiles(self._predicted)):
            theirs[profile].append(index)
        candidates = [theirs.get(profile, []) for profile in self._profiles(self._gold)]
        if not all(candidates):
            return False
        # The column with the fewest candidates first: few wrong ways are gone down.
        order = sorted(range(len(candidates)), key=lambda index: len(candidates[index]))
        return self._search(order, candidates)

    def _profiles(self, columns: Sequence[Sequence[int]]) -> list[frozenset[Any]]:
        """Return of each column how often each value stands in a row of which values."""
        rows = [self._id(tuple(sorted(row))) for row in zip(*columns, strict=True)]
        pairs = (Counter(zip(column, rows, strict=True)) for column in columns)
        return [frozenset(pair.items()) for pair in pairs]

    def _search(self, order: Sequence[int], candidates: Sequence[Sequence[int]]) -> bool:
        """Match the gold columns in `order`, depth first."""
        # Columns that are equal in every row need no more than one trial.
        same = [self._id(tuple(column)) for column in self._predicted]
        free = set(range(len(same)))

        def untried(depth: int) -> list[int]:
            return list({same[i]: i for i in candidates[order[depth]] if i in free}.values())

        nothing = [0] * len(self._gold[0])
        stack = [(nothing, nothing, untried(0))]  # the parts matched so far; what to try next
        used: list[int] = []  # by all in the stack but the last
        while stack:
            gold, predicted, waiting = stack[-1]
            if not waiting or self._cells_left < 0:
                stack.pop()
                if used:
                    free.add(used.pop())
                continue
            column = waiting.pop()
            longer = self._longer(gold, order[len(used)], predicted, column)
            if longer is None:
                continue
            if len(used) + 1 == len(order):
                return True
            used.append(column)
            free.discard(column)
            stack.append((*longer, untried(len(used))))
        return False

    def _longer(
        self, gold: Sequence[int], column: int, predicted: Sequence[int], other: int
    ) -> tuple[list[int], list[int]] | None:
        """Return the parts with a column more, None where they are not the same bag."""
        self._cells_left -= 2 * len(gold)
        ids: dict[tuple[int, int], int] = {}
        first, second = (
            [ids.setdefault(pair, len(ids)) for pair in zip(parts, values, strict=True)]
            for parts, values in (
                (gold, self._gold[column]),
                (predicted, self._predicted[other]),
            )
        )
        return (first, second) if _bag(first) == _bag(second) else None
