"""What a judge was shown and what it said: verdicts on pairs of answers, and scores of one.

A journal that `ft_judge.JudgeHandler` wrote is such a file too: `JudgeDataset.load` takes it
as it is, with the feedback of users in it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

from pydantic import Field, StrictFloat, field_validator, model_validator
from typing_extensions import Self

from ft_core.datasets.base import check_text
from ft_core.datasets.duplicates import fold
from ft_core.datasets.examples import Example, ExampleDataset, Rows, median_words, rows_of
from ft_core.errors import DatasetError

logger = logging.getLogger(__name__)

Task = Literal["pairwise", "correctness", "faithfulness", "relevancy", "guideline"]
"""What is judged: which of two answers is better, or one answer by a scale."""

TASKS: tuple[Task, ...] = get_args(Task)

_NEEDS: dict[str, tuple[str, ...]] = {
    "pairwise": ("query", "second_answer"),
    "correctness": ("query",),
    "faithfulness": ("contexts",),
    "relevancy": ("query", "contexts"),
    "guideline": ("query", "guideline"),
}
_SAID = (
    *("verdict", "flipped_verdict", "score", "reasoning", "flipped_reasoning"),
    *("human", "user_feedback"),
)
_ONLY_PAIRWISE = ("second_answer", "verdict", "flipped_verdict", "flipped_reasoning")


def refusal(task: str, value: float) -> str | None:
    """Return why a number is no verdict or score of this task; None where it is one.

    A pair's verdict is 1 (the first answer is better), 0 (the second) or 0.5 (a tie);
    correctness is scored from 1 to 5; all other tasks are passed, 1, or failed, 0.
    """
    # A whole number can be larger than any float, and then has no such format.
    shown = "so large a number" if abs(value) > 1e300 else f"{value:g}"
    if task == "pairwise":
        return None if value in (0, 0.5, 1) else f"{shown} is none of 1, 0 and 0.5 (a tie)"
    if task == "correctness":
        return None if 1 <= value <= 5 else f"{shown} is outside 1 to 5"
    return None if value in (0, 1) else f"{shown} is neither 1 (passed) nor 0 (failed)"


class JudgeExample(Example):
    """One answer or pair of answers, with what the teacher and people say of it.

    One without any verdict is allowed: it is still to be judged, or the teacher's answer could
    not be read.

    Raises:
        DatasetError: a field that the task needs is missing, one that it does not know is
            given, or a number is off the task's scale (`refusal`).
    """

    task: Task
    """What is judged. Where a file does not say: of two answers `pairwise`, of one
    `correctness`."""
    query: str = ""
    """What was asked; only faithfulness goes without."""
    answer: str
    """The answer; of a pair, the one that is shown first."""
    second_answer: str | None = None
    """Of a pair, the other one."""
    reference: str | None = None
    """The right answer, or what the judge is given in its place."""
    contexts: list[str] | None = None
    """What faithfulness and relevancy are judged by."""
    guideline: str | None = None
    """What the task of that name is judged by."""
    verdict: StrictFloat | None = None
    """The teacher's, of a pair as it stands here: 1 first, 0 second, 0.5 tie."""
    flipped_verdict: StrictFloat | None = None
    """The teacher's with the two answers shown in the other order, *expressed for the order
    here*: equal to `verdict` where the order did not matter."""
    score: StrictFloat | None = None
    """The teacher's, of a single answer: 1 to 5 for correctness, else 1 passed and 0 failed."""
    reasoning: str | None = None
    """The teacher's words to `verdict` or `score`."""
    flipped_reasoning: str | None = None
    """The teacher's words to `flipped_verdict`; there the first answer is the second here."""
    human: StrictFloat | None = None
    """A person's verdict or score, on the same scale."""
    user_feedback: str | None = None
    """What a user of the app said of the judgement."""
    group: str | None = None
    """A text that splits never tear apart, where the query is not the one: the instruction
    that queries have in common."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """What a journal knows of the judgement, such as its id, time, model and prompt."""

    @model_validator(mode="before")
    @classmethod
    def _of_a_task(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or "task" in value:
            return value
        if value.get("contexts") is not None or value.get("guideline") is not None:
            raise DatasetError(
                f"is missing; with contexts or a guideline it is one of {', '.join(_NEEDS)}",
                place="task",
            )
        task = "correctness" if value.get("second_answer") is None else "pairwise"
        return {"task": task, **value}

    @field_validator("score", "human", mode="before")
    @classmethod
    def _passed(cls, value: Any) -> Any:
        return float(value) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in _NEEDS[self.task]:
            value = getattr(self, name)
            if value is None or (name in ("query", "guideline") and not value.strip()):
                raise DatasetError(f"is missing; {self.task} needs it", place=name)
        for name in ("score",) if self.task == "pairwise" else _ONLY_PAIRWISE:
            if getattr(self, name) is not None:
                raise DatasetError(f"is given, but {self.task} knows no such field", place=name)
        if self.guideline is not None and self.task != "guideline":
            raise DatasetError(f"is given, but {self.task} is judged by none", place="guideline")
        for name in ("verdict", "flipped_verdict", "score", "human"):
            value = getattr(self, name)
            if value is not None and (reason := refusal(self.task, value)):
                raise DatasetError(reason, place=name)
        for name in type(self).model_fields:
            check_text(getattr(self, name), name)
        return self

    @property
    def label(self) -> float | None:
        """The teacher's verdict or score, whichever the task has."""
        return self.verdict if self.task == "pairwise" else self.score

    @property
    def consistent_label(self) -> float | None:
        """The label, but None for a pair that was not judged alike in both orders."""
        if self.task == "pairwise" and self.verdict != self.flipped_verdict:
            return None
        return self.label

    def asked(self) -> str:
        """Return what splits go by: `group`, or the query, or the answer where none was asked."""
        return self.group or self.query or self.answer

    def flipped(self) -> JudgeExample:
        """Return a pair with its answers in the other order, and every verdict to match.

        A single answer has no order and is returned as it is.
        """
        if self.task != "pairwise":
            return self
        return self.model_copy(
            update={
                "answer": self.second_answer,
                "second_answer": self.answer,
                "verdict": _opposite(self.flipped_verdict),
                "flipped_verdict": _opposite(self.verdict),
                "reasoning": self.flipped_reasoning,
                "flipped_reasoning": self.reasoning,
                "human": _opposite(self.human),
            }
        )

    def unjudged(self) -> JudgeExample:
        """Return the example without what anyone said of it: what a judge may see."""
        return self.model_copy(update={**dict.fromkeys(_SAID), "metadata": {}})

    def judged_content(self) -> tuple[Any, ...]:
        """Return what is judged, the same for a pair in either order: equal for repeats."""
        answers = [self.answer]
        if self.second_answer is not None:
            answers = sorted([self.answer, self.second_answer])
        contexts = None if self.contexts is None else tuple(self.contexts)
        return (self.task, self.query, *answers, self.reference, contexts, self.guideline)


class Consistency(NamedTuple):
    """What `JudgeDataset.consistent` kept, and why it dropped the rest."""

    dataset: JudgeDataset
    """What was kept."""
    dropped: dict[str, int]
    """Reason to the number of examples that it cost; empty where all were kept."""


class JudgeDataset(ExampleDataset[JudgeExample]):
    """Judgements in a JSON Lines file, one a line."""

    _example = JudgeExample

    @classmethod
    def _rows(cls, path: Path | str) -> Rows:
        return _with_marks(rows_of(path), path)

    def of_task(self, task: Task) -> Self:
        """Return the examples of one task.

        Raises:
            DatasetError: there is none.
        """
        examples = [example for example in self.examples if example.task == task]
        if not examples:
            there = ", ".join(sorted({example.task for example in self.examples}))
            raise DatasetError(f"has no example of the task {task!r}; there is {there}")
        return type(self)(examples=examples)

    def merged(self) -> Self:
        """Return the dataset with all records of the same answers as one; see `repeats_merged`."""
        return cast(Self, _kept(*repeats_merged(self.examples)))

    def consistent(self) -> Self:
        """Return what can teach: pairs judged alike in both orders, and scored answers.

        Records of the same answers are merged first: an order each makes a pair that was
        judged in both. What is dropped is logged with the reasons; `consistency` returns them.

        Raises:
            DatasetError: nothing is left; names the reasons.
        """
        return cast(Self, self.consistency().dataset)

    def consistency(self) -> Consistency:
        """Return `consistent`, with the number of examples dropped for each reason."""
        examples, dropped = repeats_merged(self.examples)
        kept = []
        for example in examples:
            reason = _unfit(example)
            dropped[reason] += 1
            if not reason:
                kept.append(example)
        del dropped[""]
        return Consistency(_kept(kept, dropped), dict(dropped))

    def both_orders(self) -> Self:
        """Return each pair in both orders, one behind the other, each with its own verdict.

        Training on both teaches that the order tells nothing. Of a pair that was judged in one
        order only, the other has no verdict: take `consistent()` first. Single answers stay.
        """
        examples = []
        for example in self.examples:
            examples.append(example)
            if example.task == "pairwise":
                examples.append(example.flipped())
        return type(self)(examples=examples)

    def stats(self) -> dict[str, Any]:
        """Return counts, and lengths in words."""
        pairs = [example for example in self.examples if example.task == "pairwise"]
        both = [e for e in pairs if e.verdict is not None and e.flipped_verdict is not None]
        humans = [e for e in self.examples if e.human is not None]
        compared = [e for e in humans if e.consistent_label is not None]
        return {
            "examples": len(self.examples),
            "tasks": dict(Counter(example.task for example in self.examples)),
            "distinct questions": len({fold(example.asked()) for example in self.examples}),
            "judged by the teacher": sum(example.label is not None for example in self.examples),
            "pairs judged in both orders": len(both),
            "pairs judged alike in both": sum(e.verdict == e.flipped_verdict for e in both),
            "labels": dict(sorted(Counter(_labels(self.examples)).items())),
            "human labels": len(humans),
            "teacher agrees with human": sum(e.consistent_label == e.human for e in compared),
            "repeats of the same answers": len(self.examples)
            - len({example.judged_content() for example in self.examples}),
            "pairs of equal answers": sum(e.answer == e.second_answer for e in pairs),
            "median words per question": median_words(e.asked() for e in self.examples),
            "median words per answer": median_words(e.answer for e in self.examples),
        }


CONTRADICTORY = "contradictory repeats of the same answers"
MERGED = "repeats merged into one"


def repeats_merged(
    examples: Iterable[JudgeExample],
) -> tuple[list[JudgeExample], Counter[str]]:
    """Merge records of the same answers, in either order, into the first of them.

    What the first lacks is taken from the others: the verdict in the other order, words, a
    person's verdict. Words come from a record with the verdict or score that they are of, as
    those of an answer that could not be read may say the opposite. Where two records contradict
    each other in a verdict, a score or a person's, neither can be believed, and all records of
    these answers are left out.

    Returns:
        The examples, and by reason how many records fewer they are.
    """
    groups: dict[tuple[Any, ...], list[JudgeExample]] = {}
    for example in examples:
        groups.setdefault(example.judged_content(), []).append(example)
    counts: Counter[str] = Counter()
    kept = []
    for group in groups.values():
        united = _united(group)
        if united is None:
            counts[CONTRADICTORY] += len(group)
        else:
            kept.append(united)
            counts[MERGED] += len(group) - 1
    return kept, +counts


def _united(group: list[JudgeExample]) -> JudgeExample | None:
    first, *others = group
    united: dict[str, Any] = {}
    records = [first, *(e if e.answer == first.answer else e.flipped() for e in others)]
    for name in ("verdict", "flipped_verdict", "score", "human"):
        values = {getattr(e, name) for e in records} - {None}
        if len(values) > 1:
            return None
        united[name] = next(iter(values), None)
    judged = [e for e in records if e.label is not None]
    turned = [e for e in records if e.flipped_verdict is not None]
    for name, sources in (
        ("reasoning", judged or records),
        ("flipped_reasoning", turned or records),
        ("user_feedback", records),
        ("group", records),
    ):
        texts = (getattr(e, name) for e in sources)
        united[name] = next((text for text in texts if text is not None), None)
    return first.model_copy(update=united) if others else first


def _unfit(example: JudgeExample) -> str:
    """Return why an example cannot teach, or nothing."""
    if example.task != "pairwise":
        return "" if example.score is not None else "no score by the teacher"
    known = (example.verdict is not None) + (example.flipped_verdict is not None)
    if known < 2:
        return "a verdict in one order only" if known else "no verdict by the teacher"
    return "" if example.verdict == example.flipped_verdict else "the two orders disagree"


def _kept(examples: list[JudgeExample], dropped: Mapping[str, int]) -> JudgeDataset:
    reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.items() if count)
    if not examples:
        raise DatasetError(
            f"no example is left ({reasons}); have more answers judged, each pair in both orders"
        )
    if reasons:
        logger.info("%d examples are left; dropped: %s", len(examples), reasons)
    return JudgeDataset(examples=examples)


def _labels(examples: Iterable[JudgeExample]) -> list[str]:
    return [f"{e.task} {e.label:g}" for e in examples if e.label is not None]


def _opposite(verdict: float | None) -> float | None:
    return None if verdict is None else 1 - verdict


# --- A handler's journal -----------------------------------------------------------------------


def _with_marks(rows: Rows, path: Path | str) -> Rows:
    """Write the feedback in a journal, lines with a `mark`, into the judgements that it is of."""
    kept: list[tuple[int, Any]] = []
    by_id: dict[Any, dict[str, Any]] = {}
    unused: Counter[str] = Counter()
    for number, row in rows:
        if isinstance(row, dict) and isinstance(row.get("mark"), str):
            unused[_marked(by_id.get(row["mark"]), row)] += 1
            continue
        kept.append((number, row))
        metadata = row.get("metadata") if isinstance(row, dict) else None
        if isinstance(metadata, dict) and isinstance(metadata.get("id"), str):
            by_id[metadata["id"]] = row
    del unused[""]
    if unused:
        logger.warning("%s: feedback left out: %s", path, dict(unused))
    return kept


def _marked(row: dict[str, Any] | None, mark: Mapping[str, Any]) -> str:
    """Write one mark into its judgement; return why it cannot be, or nothing."""
    if row is None:
        return "its judgement is not in the file before it"
    human = mark.get("human")
    if human is not None:
        if not isinstance(human, int | float) or refusal(row.get("task", ""), human):
            return f"not a verdict of {row.get('task')}"
        row["human"] = human
    if mark.get("user_feedback") is not None:
        row["user_feedback"] = mark["user_feedback"]
    return ""
