"""What an encoder learns to judge from: texts to score, and what their scores should say."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from ft_core.datasets import JudgeDataset, JudgeExample
from ft_core.errors import DatasetError

logger = logging.getLogger(__name__)

Texts = tuple[str, str]
"""The question, with the reference where there is one, and an answer: what is scored."""

_MOST_GRADES = 9  # as many as there are halves from 1 to 5


@dataclass(frozen=True)
class Row:
    """One lesson."""

    texts: tuple[Texts, ...]
    """Both of a pair, or the one that is graded."""
    target: float
    """Of a pair, how far the first is better: 1, 0, or 0.5 for a tie. Else the place of the grade
    among the grades."""


def texts_of(query: str, reference: str | None, answer: str) -> Texts:
    """Return what is scored: the same in training and in use."""
    return (f"{query}\n\nReference: {reference}" if reference else query, answer)


def pair_rows(data: JudgeDataset) -> list[Row]:
    """Return each pair with its verdict; once, as the order cannot matter."""
    rows = []
    for example in data:
        assert example.verdict is not None
        rows.append(Row(_both(example), example.verdict))
    return rows


def only_ties(data: JudgeDataset) -> bool:
    """Say whether every example is a pair without a better answer."""
    return all(example.verdict == 0.5 for example in data)


def grades_in(data: JudgeDataset) -> list[float]:
    """Return the grades that answers can get, ascending: those of the data, or halves.

    Raises:
        DatasetError: all answers have the same.
    """
    grades = sorted({_score(example) for example in data})
    if len(grades) > _MOST_GRADES:
        logger.info("%d different scores are rounded to halves", len(grades))
        grades = sorted({_rounded(grade) for grade in grades})
    if len(grades) == 1:
        raise DatasetError(
            f"every answer has the score {grades[0]:g}, and nothing can be learned from that; have "
            "better and worse ones judged"
        )
    return grades


def grade_rows(data: JudgeDataset, grades: Sequence[float]) -> list[Row]:
    """Return each answer with the place of the grade that is nearest to its score."""
    return [
        Row(
            (texts_of(example.query, example.reference, example.answer),),
            float(min(range(len(grades)), key=lambda at: abs(grades[at] - _score(example)))),
        )
        for example in data
    ]


def _both(example: JudgeExample) -> tuple[Texts, Texts]:
    first, second = example.answer, example.second_answer or ""
    query, reference = example.query, example.reference
    return texts_of(query, reference, first), texts_of(query, reference, second)


def _score(example: JudgeExample) -> float:
    assert example.score is not None
    return example.score


def _rounded(score: float) -> float:
    return round(2 * score) / 2
