"""The report of text-to-SQL models: how often their queries return what the right ones return."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ft_core.report.statistics import StatisticsReport
from ft_core.report.text import plural

if TYPE_CHECKING:
    from ft_core.evaluation import AnswerEvaluation


class Text2SQLReport(StatisticsReport):
    """A comparison of what any number of models wrote as SQL with what one of them wrote.

    Means, intervals, tests and their correction are those of every report (`BaseReport`); the
    statistics are the execution accuracy at each level of difficulty.

    Args:
        evaluations: the answers are SQL, and `invalid` says what is wrong with one that does
            not run: a kind, a colon, and the reason.
        questions: id to what was asked.
        references: id to the right SQL.
        excluded: id of each question that is not evaluated to the reason.
        settings: the other arguments of `StatisticsReport`.
    """

    statistics_title: ClassVar[str] = "Execution accuracy by difficulty"
    statistics_label: ClassVar[str] = "difficulty"

    def __init__(
        self,
        evaluations: Sequence[AnswerEvaluation],
        questions: Mapping[str, str],
        references: Mapping[str, str] | None = None,
        *,
        excluded: Mapping[str, str],
        **settings: Any,
    ) -> None:
        super().__init__(evaluations, questions, references, **settings)
        self.excluded = dict(excluded)

    def notes(self) -> list[str]:
        """Return what is left out, what does not run and why, and the notes of every report."""
        notes = []
        if self.excluded:
            first, reason = next(iter(self.excluded.items()))
            total = self.size + len(self.excluded)
            notes.append(
                f"{len(self.excluded)} of {plural(total, 'question')} are left out, because "
                f"their own SQL gives nothing to compare with; question {first}: {reason}"
            )
        for run in self.runs:
            if run.invalid:
                kinds = Counter(reason.partition(":")[0] for reason in run.invalid.values())
                counts = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
                notes.append(
                    f"{run.name}: {len(run.invalid)} of {plural(self.size, 'answer')} do not "
                    f"run: {counts}."
                )
        return [*notes, *super().notes()]

    def to_dict(self) -> dict[str, Any]:
        """Return everything that the page shows, and each question's SQL, as JSON can hold it."""
        result = super().to_dict()
        result["dataset"]["excluded"] = self.excluded
        for shown, run in zip(result["runs"], self.runs, strict=True):
            shown["answers"] = run.answers
        return result
