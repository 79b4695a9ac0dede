"""Judges that look at nothing but what a lazy judge would: what a trained one must beat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from ft_core.datasets import JudgeDataset, JudgeExample
from ft_core.errors import ArgumentError


def longer_answer(example: JudgeExample) -> float:
    """Prefer the longer answer, in characters; a tie where both are as long.

    Raises:
        ArgumentError: the example is no pair.
    """
    if example.second_answer is None:
        raise ArgumentError("example", f"{example.task} has one answer; this judge compares two")
    first, second = len(example.answer), len(example.second_answer)
    return 1.0 if first > second else 0.0 if first < second else 0.5


def by_length(train: JudgeDataset) -> Callable[[JudgeExample], float]:
    """Return the judge by length that agrees best with the training data.

    It prefers the longer answer, or the shorter one where the teacher did more often, as on
    pairs that were made to mislead: there `longer_answer` alone is too easy to beat.

    Raises:
        ArgumentError: no pair has a verdict.
    """
    judged = [e for e in train if e.task == "pairwise" and e.label is not None]
    if not judged:
        raise ArgumentError("train", "has no pair with a verdict by the teacher")
    longer = sum(longer_answer(example) == example.label for example in judged)
    shorter = sum(1 - longer_answer(example) == example.label for example in judged)
    return longer_answer if longer >= shorter else lambda example: 1 - longer_answer(example)


def majority(train: JudgeDataset) -> Callable[[JudgeExample], float]:
    """Return a judge that always gives the most frequent label of the training data.

    Of pairs that is the place, first or second, that wins more often as they stand in the
    file: a judge that learns this has learnt nothing of the answers.

    Raises:
        ArgumentError: no example has a label.
    """
    labels = Counter(e.label for e in train if e.label is not None)
    if not labels:
        raise ArgumentError("train", "has no label by the teacher")
    ((label, _),) = labels.most_common(1)
    return lambda example: label
