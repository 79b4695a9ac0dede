"""A report of answers with a second table: numbers of each run that are no means over questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ft_core.report.answers import AnswerReport
from ft_core.report.text import number, printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

    from ft_core.evaluation import AnswerEvaluation


class Statistic(NamedTuple):
    """One number of a run that is no mean over its questions, such as a kappa."""

    value: float
    low: float | None = None
    """`low` and `high` bound the 95 % interval (bootstrap over the questions), where there is
    one."""
    high: float | None = None
    n: int = 0
    """How many questions it rests on."""

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return number(self.value)
        return f"{number(self.value)} ({number(self.low)} to {number(self.high)})"


class StatisticsReport(AnswerReport):
    """An `AnswerReport` that also holds `statistics`, shown with an interval and without a test.

    Args:
        evaluations, questions, references: see `AnswerReport`.
        statistics: run to name to number; the names are shown as they are, `_` as a space.
        remarks: what a reader must know of the dataset.
        settings: the other arguments of `AnswerReport`.
    """

    template: ClassVar[str] = "statistics.html.j2"
    statistics_title: ClassVar[str]
    """The heading of the table of statistics."""
    statistics_label: ClassVar[str] = "statistic"
    """The heading of its first column."""

    def __init__(
        self,
        evaluations: Sequence[AnswerEvaluation],
        questions: Mapping[str, str],
        references: Mapping[str, str] | None = None,
        *,
        statistics: Mapping[str, Mapping[str, Statistic]],
        remarks: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        super().__init__(evaluations, questions, references, **settings)
        self.statistics = {name: dict(values) for name, values in statistics.items()}
        self.remarks = list(remarks)

    def notes(self) -> list[str]:
        """Return what the dataset's reader must know, and then the notes of every report."""
        return [*self.remarks, *super().notes()]

    def statistic_rows(self) -> list[tuple[str, list[str]]]:
        """Return the statistics as texts: name, and a cell for each run."""
        names = dict.fromkeys(name for run in self.runs for name in self._of(run.name))
        return [
            (
                name.replace("_", " "),
                [str(self._of(run.name).get(name, "–")) for run in self.runs],  # noqa: RUF001
            )
            for name in names
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything that the page shows, as JSON can hold it."""
        result = super().to_dict()
        for run in result["runs"]:
            run["statistics"] = {
                name: statistic._asdict() for name, statistic in self._of(run["name"]).items()
            }
        return result

    def _of(self, run: str) -> dict[str, Statistic]:
        return self.statistics.get(run, {})

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        yield from super().__rich_console__(console, options)
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column(self.statistics_label)
        for run in self.runs:
            table.add_column(Text(printable(run.name)), justify="right", overflow="fold")
        for name, cells in self.statistic_rows():
            table.add_row(Text(name), *map(Text, cells))
        yield table
