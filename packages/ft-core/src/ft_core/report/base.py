"""What every report of runs is: means, paired tests, verdicts, a table, JSON and a page."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from ft_core import files
from ft_core.errors import ArgumentError
from ft_core.report.comparison import Difference, Measure, Outcome, measure
from ft_core.report.text import listed, metric_label, metric_value, p_value, plural, printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table

    from ft_core.evaluation import Scores

RunT = TypeVar("RunT", bound="Scores")


class BaseReport(ABC, Generic[RunT]):
    """A comparison of any number of runs over the same queries with one of them, the baseline.

    Means come with 95 % bootstrap intervals. Each difference to the baseline has the 95 %
    interval and the p-value of a paired test over the queries. The p-values that are shown,
    and that the verdicts rest on, are adjusted by Holm's method for *all* comparisons of the
    report (metrics times runs), so that a long table proves nothing by its length.

    `rich.print(report)` prints table and verdicts; `to_dict`, `save_json` and `save_html`
    give the rest.
    """

    nouns: ClassVar[tuple[str, str]] = ("query", "queries")
    """What the runs were asked, in the singular and the plural."""
    template: ClassVar[str]
    """The page's file in this package."""

    def __init__(
        self,
        runs: Sequence[RunT],
        *,
        title: str,
        baseline: str | None,
        primary: str | None,
        default_primary: Sequence[str],
        uncompared: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        names = [run.name for run in runs]
        if baseline is not None and baseline not in names:
            raise ArgumentError("baseline", f"no run is called {baseline!r}; there is {names}")
        self.title = title
        self.seed = seed
        self.baseline = runs[names.index(baseline) if baseline is not None else 0]
        # The baseline leads wherever runs are listed.
        self.runs = [self.baseline, *[run for run in runs if run is not self.baseline]]
        self.uncompared = [name for name in names if name in uncompared]
        self.metrics = list(dict.fromkeys(metric for run in self.runs for metric in run.scores))
        self.primary = self._primary(primary, default_primary)

    @property
    def compared(self) -> list[RunT]:
        """The runs that are compared with the baseline."""
        return [run for run in self.runs[1:] if run.name not in self.uncompared]

    @cached_property
    def measures(self) -> dict[str, dict[str, Measure]]:
        """Run name to metric to `Measure`; the tests run when this is first asked for."""
        return measure(self.runs, self.baseline, uncompared=self.uncompared, seed=self.seed)

    @property
    @abstractmethod
    def size(self) -> int:
        """How many queries there are."""

    @abstractmethod
    def facts(self) -> list[str]:
        """Return what stands under the title."""

    def notes(self) -> list[str]:
        """Return what a reader must know before believing the numbers."""
        return []

    @property
    def comparisons(self) -> int:
        """How many differences are tested: what the p-values are adjusted for."""
        return sum(
            cell.difference is not None
            for cells in self.measures.values()
            for cell in cells.values()
        )

    def verdict(self, run: str) -> str:
        """Say in words whether a run is better than the baseline in the primary metric."""
        difference = self._difference(run, self.primary)
        name, base = printable(run), printable(self.baseline.name)
        metric = metric_label(self.primary)
        figures = self._figures(difference)
        if difference.outcome == "undecided":
            shown = f"that {plural(difference.queries, *self.nouns)} could show"
            return f"{name} and {base}: no difference in {metric} {shown}: {figures}."
        return f"{name} is {difference.outcome} than {base} in {metric}: {figures}."

    def other_metrics(self, run: str) -> str:
        """Say in words what the other metrics show of a run; empty where there is no other."""
        found: dict[Outcome, list[str]] = {"better": [], "worse": [], "undecided": []}
        for metric, cell in self.measures[run].items():
            if cell.difference is not None and metric != self.primary:
                found[cell.difference.outcome].append(metric_label(metric))
        words = {"better": "better in", "worse": "worse in", "undecided": "no difference shown in"}
        text = "; ".join(f"{words[key]} {listed(names)}" for key, names in found.items() if names)
        return text and f"{text[0].upper()}{text[1:]}."

    def outcome(self, run: str) -> Outcome:
        """Return the verdict on a run in one word."""
        return self._difference(run, self.primary).outcome

    def table(self, metrics: Sequence[str] | None = None) -> Table:
        """Return the terminal table: a row for each run, a column for each metric.

        A cell holds the mean, its 95 % interval, and for all but the baseline the
        difference with its adjusted p-value.

        Args:
            metrics: which columns, all by default. `rich.print(report)` splits them where
                the terminal is narrow.
        """
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, leading=1)
        table.add_column("run", overflow="fold", max_width=20)
        metrics = self.metrics if metrics is None else metrics
        for metric in metrics:
            table.add_column(Text(printable(metric_label(metric))), justify="right", no_wrap=True)
        for run in self.runs:
            name = Text(printable(run.name), style="bold")
            if run is self.baseline and len(self.runs) > 1:
                name.append("\nbaseline", style="not bold dim")
            cells = self.measures[run.name]
            table.add_row(
                name, *[self._table_cell(metric, cells.get(metric)) for metric in metrics]
            )
        return table

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        from rich.measure import Measurement
        from rich.text import Text

        unbounded = options.update(max_width=10_000)
        start = 0
        while start < len(self.metrics):
            # As many columns as fit the terminal, one at least.
            end = len(self.metrics)
            while end > start + 1:
                table = self.table(self.metrics[start:end])
                if Measurement.get(console, unbounded, table).maximum <= options.max_width:
                    break
                end -= 1
            yield self.table(self.metrics[start:end])
            start = end
        for run in self.compared:
            yield Text(self.verdict(run.name), style=_STYLES[self.outcome(run.name)])
            if others := self.other_metrics(run.name):
                yield Text(others)
        for note in self.notes():
            yield Text(printable(note), style="yellow")
        if self.comparisons > 1:
            yield Text(
                f"95 % intervals; p-values adjusted for {self.comparisons} comparisons (Holm).",
                style="dim",
            )

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return everything that the page shows, as JSON can hold it."""

    def save_json(self, path: Path | str) -> None:
        """Write `to_dict` as a JSON file, whole or not at all."""
        with files.atomic_write(path) as file:
            json.dump(self.to_dict(), file, indent=2, ensure_ascii=False)
            file.write("\n")

    def to_html(self) -> str:
        """Return the page: one HTML document that loads nothing else.

        Raises:
            MissingExtraError: jinja2 or matplotlib is not installed (`ft-core[report]`).
        """
        from ft_core.report.html import render

        return render(self, self._sections())

    @abstractmethod
    def _sections(self) -> list[dict[str, Any]]:
        """Return what the template shows of each compared run."""

    def save_html(self, path: Path | str) -> None:
        """Write `to_html` as a file, whole or not at all."""
        page = self.to_html()
        with files.atomic_write(path) as file:
            file.write(page)

    def _primary(self, primary: str | None, defaults: Sequence[str]) -> str:
        shared = [
            metric
            for metric in self.metrics
            if metric in self.baseline.scores
            and all(
                run.scores.get(metric, {}).keys() & self.baseline.scores[metric].keys()
                for run in self.compared
            )
        ]
        if primary is None:
            primary = next((metric for metric in [*defaults, *shared] if metric in shared), None)
            if primary is None:
                raise ArgumentError("evaluations", "the runs have no metric in common")
        elif primary not in shared:
            raise ArgumentError(
                "primary", f"{primary!r} is not a metric of every run; these are: {shared}"
            )
        return primary

    def _figures(self, difference: Difference) -> str:
        value, low, high = (
            metric_value(self.primary, number, sign=True)
            for number in (difference.value, difference.low, difference.high)
        )
        return f"{value} ({low} to {high}), {p_value(difference.p_adjusted)}"

    def _difference(self, run: str, metric: str) -> Difference:
        cell = self.measures[self._run(run).name].get(metric)
        difference = None if cell is None else cell.difference
        if difference is None:
            role = "not compared" if run in self.uncompared else "the baseline"
            raise ArgumentError("run", f"{run!r} is {role}; name another run")
        return difference

    def _run(self, name: str) -> RunT:
        for run in self.runs:
            if run.name == name:
                return run
        raise ArgumentError("run", f"no run is called {name!r}")

    def _table_cell(self, metric: str, measure: Measure | None) -> RenderableType:
        from rich.text import Text

        if measure is None:
            return Text("–")  # noqa: RUF001
        low, high = (metric_value(metric, end) for end in (measure.low, measure.high))
        cell = Text(metric_value(metric, measure.mean), style="bold")
        cell.append(f"\n{low}–{high}", style="not bold dim")  # noqa: RUF001
        if measure.n < self.size:
            cell.append(f"\nn = {measure.n}", style="not bold dim")
        if (difference := measure.difference) is not None:
            style = _STYLES[difference.outcome].replace("bold", "not bold")
            cell.append(f"\n{metric_value(metric, difference.value, sign=True)}", style=style)
            pairs = f", n = {difference.queries}" if difference.queries < self.size else ""
            cell.append(f"\n{p_value(difference.p_adjusted)}{pairs}", style="not bold dim")
        return cell


_STYLES: dict[Outcome, str] = {"better": "bold green", "worse": "bold red", "undecided": "bold"}
