"""The HTML page of a report: what the template shows, put in order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import TYPE_CHECKING, Any

from ft_core.extras import import_extra
from ft_core.report import plots
from ft_core.report.comparison import QueryChange, RankChanges
from ft_core.report.text import (
    excerpt,
    is_quantity,
    metric_label,
    metric_value,
    number,
    p_value,
    printable,
)

if TYPE_CHECKING:
    from ft_core.evaluation import AnswerEvaluation
    from ft_core.report import AnswerReport, Report
    from ft_core.report.answers import AnswerChange
    from ft_core.report.base import BaseReport


@dataclass(frozen=True)
class _Figure:
    title: str
    caption: str
    svg: str


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


def render(report: BaseReport[Any], sections: list[dict[str, Any]]) -> str:
    """Return the page. All texts go through the template's escaping; only the SVG does not.

    Args:
        report: what is shown.
        sections: what the report's own template shows of each compared run.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    jinja2 = import_extra("jinja2", plots.EXTRA)
    folder = resources.files("ft_core.report")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text("utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        # Autoescape makes a text harmless as HTML; this, as characters.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters |= {"label": metric_label, "p": p_value}
    page: str = environment.get_template(report.template).render(
        report=report,
        value=metric_value,
        signed=partial(metric_value, sign=True),
        figures=_figures(report),
        sections=sections,
        colours=[plots.run_colour(i) for i in range(len(report.runs))],
    )
    return page.strip() + "\n"


def retrieval_sections(report: Report) -> list[dict[str, Any]]:
    """Return what the page shows of each run beside the baseline: its ranks and examples."""
    return [_section(report, index) for index in range(1, len(report.runs))]


def answer_sections(report: AnswerReport) -> list[dict[str, Any]]:
    """Return what the page shows of each compared run: the answers that changed most."""
    return [
        {
            "name": run.name,
            "gained": [_answer_example(report, run.name, c) for c in report.gained(run.name)],
            "lost": [_answer_example(report, run.name, c) for c in report.lost(run.name)],
        }
        for run in report.compared
    ]


def _figures(report: BaseReport[Any]) -> list[_Figure]:
    """Return the plots: the scores share an axis, each quantity has its own."""
    runs = [report.measures[run.name] for run in report.runs]
    scores = [metric for metric in report.metrics if not is_quantity(metric)]
    figures = []
    if scores:
        svg = plots.metrics_plot(runs, scores, prefix="metrics")
        figures.append(_Figure("Each run.", "Mean and 95 % interval.", svg))
    if any(cells[m].difference for cells in runs for m in scores if m in cells):
        svg = plots.differences_plot(runs, scores, prefix="differences")
        figures.append(_Figure("Difference to the baseline.", "Right of the line is better.", svg))
    for index, metric in enumerate(m for m in report.metrics if is_quantity(m)):
        svg = plots.metrics_plot(runs, [metric], prefix=f"quantity{index}")
        title = f"{metric_label(metric).capitalize()}."
        figures.append(_Figure(title, "Mean and 95 % interval; less is better.", svg))
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


def _answer_example(report: AnswerReport, run: str, change: AnswerChange) -> dict[str, str | None]:
    question = change.question
    reference = report.references.get(question)
    after = next(other for other in report.runs if other.name == run)
    return {
        "query": excerpt(report.questions[question], 600),
        "change": metric_value(report.primary, change.change, sign=True),
        "reference": None if reference is None else excerpt(reference, 600),
        "before": _shown_answer(report.baseline, question),
        "after": _shown_answer(after, question),
    }


def _shown_answer(run: AnswerEvaluation, question: str) -> str:
    if question in run.failures:
        return f"(the call failed: {excerpt(run.failures[question])})"
    text = excerpt(run.answers[question], 600) or "(empty)"
    problem = run.invalid.get(question)
    return text if problem is None else f"{text} (not valid: {excerpt(problem)})"


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
