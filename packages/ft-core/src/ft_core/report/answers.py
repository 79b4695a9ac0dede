"""The report of language models' answers to the same questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ft_core.errors import ArgumentError
from ft_core.report.base import BaseReport
from ft_core.report.comparison import ALPHA, Difference, check_comparable
from ft_core.report.text import is_quantity, metric_label, plural, printable

if TYPE_CHECKING:
    from ft_core.evaluation import AnswerEvaluation


@dataclass(frozen=True)
class AnswerChange:
    """One question under the baseline and under another run."""

    question: str
    """Its id."""
    change: float
    """In the primary metric, run minus baseline."""


class AnswerReport(BaseReport["AnswerEvaluation"]):
    """A comparison of what any number of models answered with what one of them, the baseline, did.

    Intervals, tests and their correction are those of every report (`BaseReport`). Where a
    metric has no value for some questions, the number of those that it has is shown, and a
    test pairs the questions that both runs have.

    Args:
        evaluations: the runs; their names are different, their questions are the same.
        questions: question id to its text.
        references: question id to the answer that was hoped for, where there is one.
        title: the heading of the page.
        baseline: name of the run that the others are compared with; the first by default.
        primary: the metric of the verdicts and of each question's gain or loss; ROUGE-L by
            default, or the first that the runs share.
        uncompared: names of runs that are shown without a test, as a teacher whose answers
            are the references.
        examples: how many of the questions that gained most, and as many that lost most, are
            shown with the answers.
        seed: of the intervals and the tests.

    Raises:
        ArgumentError: no run, two of one name, an unknown baseline or metric, or a run of
            other questions.
    """

    nouns: ClassVar[tuple[str, str]] = ("question", "questions")
    template: ClassVar[str] = "answers.html.j2"

    def __init__(
        self,
        evaluations: Sequence[AnswerEvaluation],
        questions: Mapping[str, str],
        references: Mapping[str, str] | None = None,
        *,
        title: str = "Comparison of answers",
        baseline: str | None = None,
        primary: str | None = None,
        uncompared: Sequence[str] = (),
        examples: int = 5,
        seed: int = 0,
    ) -> None:
        if evaluations:
            check_comparable(evaluations, evaluations[0].dataset_hash, questions)
        for run in evaluations:
            if run.answers.keys() != questions.keys():
                raise ArgumentError(
                    "evaluations", f"{run.name!r} answered other questions; evaluate it again"
                )
        if examples < 0:
            raise ArgumentError("examples", f"is {examples}; give 0 or more")
        super().__init__(
            evaluations,
            title=title,
            baseline=baseline,
            primary=primary,
            default_primary=["rouge_l", "faithfulness", "schema_valid", "similarity"],
            uncompared=uncompared,
            seed=seed,
        )
        self.questions = dict(questions)
        self.references = dict(references or {})
        self.examples = examples

    @property
    def size(self) -> int:
        """How many questions there are."""
        return len(self.questions)

    def facts(self) -> list[str]:
        """Return what stands under the title."""
        return [
            plural(len(self.runs), "run"),
            plural(self.size, "question"),
            f"questions {self.baseline.dataset_hash[:12]}",
        ]

    def verdict(self, run: str) -> str:
        """Say in words whether a run is better than the baseline, and where calls failed."""
        failed = {each.name: len(each.failures) for each in self.runs if each.failures}
        told = [
            f" {printable(name)} failed on {failed[name]} of {plural(self.size, *self.nouns)}."
            for name in dict.fromkeys((run, self.baseline.name))
            if name in failed
        ]
        return super().verdict(run) + "".join(told)

    def notes(self) -> list[str]:
        """Return failed calls, estimated tokens, and a warning where the questions are too few."""
        notes = []
        for run in self.runs:
            if run.failures:
                first, error = next(iter(run.failures.items()))
                notes.append(
                    f"{run.name}: {len(run.failures)} of {plural(self.size, 'call')} failed and "
                    f"count as wrong answers; question {first}: {error}"
                )
            if run.estimated:
                notes.append(
                    f"{run.name}: tokens of {len(run.estimated)} of "
                    f"{plural(self.size, 'answer')} are estimated; the model did not tell them."
                )
            for metric, reasons in run.unscored.items():
                first, reason = next(iter(reasons.items()))
                notes.append(
                    f"{run.name}: {metric_label(metric)} of {len(reasons)} of "
                    f"{plural(self.size, 'answer')} could not be judged; question {first}: "
                    f"{reason}"
                )
        missing = self.size - len(self.references)
        if self.references and missing:
            notes.append(
                f"{plural(missing, 'question')} of {self.size} without a reference answer: "
                "nothing is compared with one there."
            )
        if self.comparisons and self.size < self.questions_needed:
            notes.append(
                f"{plural(self.size, 'question')} cannot show any difference: with "
                f"{plural(self.comparisons, 'comparison')} at least {self.questions_needed} are "
                "needed."
            )
        return notes

    @property
    def questions_needed(self) -> int:
        """The fewest questions with which any difference could be shown, were all alike."""
        # The least p-value of n sign flips is 2 / 2^n, and Holm multiplies it by their number.
        needed = 1
        while self.comparisons * 2.0 ** (1 - needed) >= ALPHA:
            needed += 1
        return needed

    def gained(self, run: str) -> list[AnswerChange]:
        """Return the questions that gained most in a run, the greatest gain first."""
        return self._changes(run)[: self.examples]

    def lost(self, run: str) -> list[AnswerChange]:
        """Return the questions that lost most in a run, the greatest loss first."""
        return self._changes(run, lost=True)[: self.examples]

    def to_dict(self) -> dict[str, Any]:
        """Return everything that the page shows, as JSON can hold it."""
        return {
            "title": self.title,
            "dataset": {"content_hash": self.baseline.dataset_hash, "questions": self.size},
            "baseline": self.baseline.name,
            "primary_metric": self.primary,
            "confidence": 0.95,
            "correction": {"method": "holm", "comparisons": self.comparisons},
            "notes": self.notes(),
            "runs": [self._run_dict(run) for run in self.runs],
        }

    def _run_dict(self, run: AnswerEvaluation) -> dict[str, Any]:
        result: dict[str, Any] = {
            "name": run.name,
            "seconds": run.seconds,
            "metrics": {metric: asdict(m) for metric, m in self.measures[run.name].items()},
            "failures": run.failures,
            "invalid": run.invalid,
            "estimated": run.estimated,
            "unscored": run.unscored,
        }
        if run in self.compared:
            result |= {
                "outcome": self.outcome(run.name),
                "verdict": self.verdict(run.name),
                "gained": [self._example(run, change) for change in self.gained(run.name)],
                "lost": [self._example(run, change) for change in self.lost(run.name)],
            }
        return result

    def _example(self, run: AnswerEvaluation, change: AnswerChange) -> dict[str, Any]:
        return {
            **asdict(change),
            "text": self.questions[change.question],
            "reference": self.references.get(change.question),
            "before": self.baseline.answers[change.question],
            "after": run.answers[change.question],
        }

    def _figures(self, difference: Difference) -> str:
        return f"{super()._figures(difference)}, n = {difference.queries}"

    def _sections(self) -> list[dict[str, Any]]:
        from ft_core.report.html import answer_sections

        return answer_sections(self)

    def _changes(self, run: str, *, lost: bool = False) -> list[AnswerChange]:
        """Return the questions that gained (or lost), the greatest change first."""
        before = self.baseline.values(self.primary)
        after = self._run(run).values(self.primary)
        sign = -1 if lost != is_quantity(self.primary) else 1
        changes = [
            AnswerChange(question, after[question] - before[question])
            for question in before
            if question in after
        ]
        changes = [change for change in changes if sign * change.change > 0]
        return sorted(changes, key=lambda change: sign * change.change, reverse=True)
