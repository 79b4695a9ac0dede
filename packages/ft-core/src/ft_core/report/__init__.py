"""Compare runs over one dataset: terminal table, JSON, and one self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_core import files
from ft_core.errors import ArgumentError
from ft_core.report.comparison import (
    Difference,
    Measure,
    Outcome,
    QueryChange,
    RankChanges,
    check_comparable,
    measure,
    query_changes,
    rank_changes,
)
from ft_core.report.text import listed, metric_label, number, p_value, plural, printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table

    from ft_core.datasets import EmbeddingQAFinetuneDataset
    from ft_core.evaluation import Evaluation

__all__ = ["Report"]

_PRIMARY = "ndcg@10"


class Report:
    """A comparison of any number of runs over the same dataset with one of them, the baseline.

    Means come with 95 % bootstrap intervals. Each difference to the baseline has the 95 %
    interval and the p-value of a paired test over the queries. The p-values that are shown,
    and that the verdicts rest on, are adjusted by Holm's method for *all* comparisons of the
    report (metrics times runs), so that a long table proves nothing by its length.

    `rich.print(report)` prints table and verdicts; `to_dict`, `save_json` and `save_html`
    give the rest.

    Args:
        evaluations: the runs; their names are different, their dataset is the same.
        dataset: what they were evaluated on.
        title: the heading of the page.
        baseline: name of the run that the others are compared with; the first by default.
        primary: the metric of the verdicts and of each query's gain or loss; nDCG@10 by
            default, or the baseline's first where it has none.
        examples: how many of the queries that gained most, and as many that lost most, are
            shown with their texts.

    Raises:
        ArgumentError: no run, two of one name, an unknown baseline or metric, or a run of
            another dataset.
    """

    def __init__(
        self,
        evaluations: Sequence[Evaluation],
        dataset: EmbeddingQAFinetuneDataset,
        *,
        title: str = "Comparison of runs",
        baseline: str | None = None,
        primary: str | None = None,
        examples: int = 5,
    ) -> None:
        check_comparable(evaluations, dataset)
        names = [run.name for run in evaluations]
        if baseline is not None and baseline not in names:
            raise ArgumentError("baseline", f"no run is called {baseline!r}; there is {names}")
        if examples < 0:
            raise ArgumentError("examples", f"is {examples}; give 0 or more")
        self.dataset = dataset
        self.title = title
        self.examples = examples
        self.baseline = evaluations[names.index(baseline) if baseline is not None else 0]
        # The baseline leads wherever runs are listed.
        self.runs = [self.baseline, *[run for run in evaluations if run is not self.baseline]]
        self.metrics = list(dict.fromkeys(metric for run in self.runs for metric in run.scores))
        shared = [
            metric for metric in self.metrics if all(metric in run.scores for run in self.runs)
        ]
        if primary is None:
            primary = _PRIMARY if _PRIMARY in shared else next(iter(shared), None)
            if primary is None:
                raise ArgumentError("evaluations", "the runs have no metric in common")
        elif primary not in shared:
            raise ArgumentError(
                "primary", f"{primary!r} is not a metric of every run; these are: {shared}"
            )
        self.primary = primary

    @cached_property
    def measures(self) -> dict[str, dict[str, Measure]]:
        """Run name to metric to `Measure`; the tests run when this is first asked for."""
        return measure(self.runs, self.baseline)

    @property
    def comparisons(self) -> int:
        """How many differences are tested: what the p-values are adjusted for."""
        return sum(
            cell.difference is not None
            for cells in self.measures.values()
            for cell in cells.values()
        )

    def ranks(self, run: str) -> RankChanges:
        """Return how the rank of each query's best relevant document changed in a run."""
        return rank_changes(self.baseline, self._run(run), self.dataset.relevant_docs)

    def gained(self, run: str) -> list[QueryChange]:
        """Return the queries that gained most in a run, the greatest gain first."""
        return [change for change in self._changes(run) if change.change > 0][: self.examples]

    def lost(self, run: str) -> list[QueryChange]:
        """Return the queries that lost most in a run, the greatest loss first."""
        lost = [change for change in reversed(self._changes(run)) if change.change < 0]
        return lost[: self.examples]

    def verdict(self, run: str) -> str:
        """Say in words whether a run is better than the baseline in the primary metric."""
        difference = self._difference(run, self.primary)
        name, base = printable(run), printable(self.baseline.name)
        metric = metric_label(self.primary)
        figures = (
            f"{number(difference.value, sign=True)} "
            f"({number(difference.low, sign=True)} to {number(difference.high, sign=True)}), "
            f"{p_value(difference.p_adjusted)}"
        )
        if difference.outcome == "undecided":
            shown = f"that {plural(difference.queries, 'query', 'queries')} could show"
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
            table.add_row(name, *[_table_cell(cells.get(metric)) for metric in metrics])
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
        for run in self.runs[1:]:
            yield Text(self.verdict(run.name), style=_STYLES[self.outcome(run.name)])
            if others := self.other_metrics(run.name):
                yield Text(others)
        if self.comparisons > 1:
            yield Text(
                f"95 % intervals; p-values adjusted for {self.comparisons} comparisons (Holm).",
                style="dim",
            )

    def to_dict(self) -> dict[str, Any]:
        """Return everything that the page shows, as JSON can hold it."""
        return {
            "title": self.title,
            "dataset": {
                "content_hash": self.baseline.dataset_hash,
                "queries": len(self.dataset.queries),
                "documents": len(self.dataset.corpus),
            },
            "baseline": self.baseline.name,
            "primary_metric": self.primary,
            "confidence": 0.95,
            "correction": {"method": "holm", "comparisons": self.comparisons},
            "runs": [self._run_dict(run) for run in self.runs],
        }

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

        return render(self)

    def save_html(self, path: Path | str) -> None:
        """Write `to_html` as a file, whole or not at all."""
        page = self.to_html()
        with files.atomic_write(path) as file:
            file.write(page)

    def _run_dict(self, run: Evaluation) -> dict[str, Any]:
        result: dict[str, Any] = {
            "name": run.name,
            "seconds": run.seconds,
            "metrics": {metric: asdict(m) for metric, m in self.measures[run.name].items()},
        }
        if run is not self.baseline:
            ranks = self.ranks(run.name)
            result |= {
                "outcome": self.outcome(run.name),
                "verdict": self.verdict(run.name),
                "ranks": {
                    "depth": ranks.depth,
                    "improved": ranks.improved,
                    "same": ranks.same,
                    "worse": ranks.worse,
                },
                "gained": [asdict(change) for change in self.gained(run.name)],
                "lost": [asdict(change) for change in self.lost(run.name)],
            }
        return result

    def _difference(self, run: str, metric: str) -> Difference:
        difference = self.measures[self._run(run).name][metric].difference
        if difference is None:
            raise ArgumentError("run", f"{run!r} is the baseline; name another run")
        return difference

    def _changes(self, run: str) -> list[QueryChange]:
        return query_changes(self.baseline, self._run(run), self.dataset, self.primary)

    def _run(self, name: str) -> Evaluation:
        for run in self.runs:
            if run.name == name:
                return run
        raise ArgumentError("run", f"no run is called {name!r}")


_STYLES: dict[Outcome, str] = {"better": "bold green", "worse": "bold red", "undecided": "bold"}


def _table_cell(measure: Measure | None) -> RenderableType:
    from rich.text import Text

    if measure is None:
        return Text("–")  # noqa: RUF001
    cell = Text(number(measure.mean), style="bold")
    cell.append(f"\n{number(measure.low)}–{number(measure.high)}", style="not bold dim")  # noqa: RUF001
    if (difference := measure.difference) is not None:
        style = _STYLES[difference.outcome].replace("bold", "not bold")
        cell.append(f"\n{number(difference.value, sign=True)}", style=style)
        cell.append(f"\n{p_value(difference.p_adjusted)}", style="not bold dim")
    return cell
