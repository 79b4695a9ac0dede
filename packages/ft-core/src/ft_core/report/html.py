"""The HTML page of a report: what the template shows, put in order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import TYPE_CHECKING, Any

from ft_core.extras import import_extra
from ft_core.report import plots
from ft_core.report.comparison import QueryChange, RankChanges
from ft_core.report.text import excerpt, metric_label, number, p_value, plural, printable

if TYPE_CHECKING:
    from ft_core.report import Report


@dataclass(frozen=True)
class _Document:
    text: str
    relevant: bool


@dataclass(frozen=True)
class _Example:
    """A query that gained or lost, with the texts that show why."""

    query: str
    change: str
    before: str
    after: str
    relevant: str
    top_before: _Document | None
    top_after: _Document | None


def render(report: Report) -> str:
    """Return the page. All texts go through the template's escaping; only the SVG does not.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    jinja2 = import_extra("jinja2", plots.EXTRA)
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        # Autoescape makes a text harmless as HTML; this, as characters.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters |= {
        "label": metric_label,
        "number": number,
        "signed": partial(number, sign=True),
        "p": p_value,
    }
    template = resources.files("ft_core.report").joinpath("page.html.j2")
    page: str = environment.from_string(template.read_text(encoding="utf-8")).render(
        report=report,
        facts=_facts(report),
        plots=_plots(report),
        sections=[_section(report, i) for i in range(1, len(report.runs))],
        colours=[plots.run_colour(i) for i in range(len(report.runs))],
    )
    return page.strip() + "\n"


def _facts(report: Report) -> list[str]:
    return [
        plural(len(report.runs), "run"),
        plural(len(report.dataset.queries), "query", "queries"),
        plural(len(report.dataset.corpus), "document"),
        f"dataset {report.baseline.dataset_hash[:12]}",
    ]


def _plots(report: Report) -> list[str]:
    runs = [report.measures[run.name] for run in report.runs]
    figures = [plots.metrics_plot(runs, report.metrics, prefix="metrics")]
    if len(runs) > 1:
        figures.append(plots.differences_plot(runs, report.metrics, prefix="differences"))
    return figures


def _section(report: Report, index: int) -> dict[str, Any]:
    """Return what the page shows of one run beside the baseline."""
    name = report.runs[index].name
    ranks = report.ranks(name)
    return {
        "name": name,
        "ranks": ranks,
        "plot": plots.ranks_plot(ranks, prefix=f"ranks{index}"),
        "gained": [_example(report, change, ranks) for change in report.gained(name)],
        "lost": [_example(report, change, ranks) for change in report.lost(name)],
    }


def _example(report: Report, change: QueryChange, ranks: RankChanges) -> _Example:
    dataset = report.dataset
    relevant = dataset.relevant_docs[change.query]
    # Of several relevant documents, one of the highest grade speaks for the query.
    grades = dataset.qrels[change.query]
    best = max(relevant, key=lambda document: grades[document])

    def document(key: str | None) -> _Document | None:
        if key is None:
            return None
        text = dataset.corpus.get(key, f"(document {key}, which the dataset does not hold)")
        return _Document(excerpt(text), key in relevant)

    def rank(value: int | None) -> str:
        return f"not in the first {ranks.depth}" if value is None else f"rank {value}"

    return _Example(
        query=excerpt(dataset.queries[change.query], 600),
        change=number(change.change, sign=True),
        before=rank(change.rank_before),
        after=rank(change.rank_after),
        relevant=excerpt(dataset.corpus[best]),
        top_before=document(change.top_before),
        top_after=document(change.top_after),
    )
