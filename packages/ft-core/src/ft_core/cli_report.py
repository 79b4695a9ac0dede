"""`ft report`: compare saved evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ft_core.console import JsonOption, note, show

if TYPE_CHECKING:
    from ft_core.evaluation import Evaluation

report_app = typer.Typer(add_completion=False)


@report_app.command()
def report(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE",
            help="Evaluations, as `Evaluation.save` writes them; NAME=FILE gives one another name.",
        ),
    ],
    dataset: Annotated[
        Path,
        typer.Option(help="The dataset that they were evaluated on; of rerankers a .jsonl file."),
    ],
    html: Annotated[
        Path | None, typer.Option(help="Write one self-contained HTML page here.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="Name of the run to compare the others with. Default: the first file's."),
    ] = None,
    primary: Annotated[
        str | None,
        typer.Option(metavar="METRIC", help="The metric of the verdict. Default: ndcg@10."),
    ] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Comparison of runs",
    json: JsonOption = False,
) -> None:
    """Compare evaluations of one dataset: intervals, paired tests, a verdict in words."""
    from ft_core.datasets import EmbeddingQAFinetuneDataset, RerankDataset
    from ft_core.report import Report

    kind = RerankDataset if dataset.suffix == ".jsonl" else EmbeddingQAFinetuneDataset
    comparison = Report(
        [_load(file) for file in files],
        kind.load(dataset),
        title=title,
        baseline=baseline,
        primary=primary,
    )
    if html is not None:
        comparison.save_html(html)
        note(f"wrote {html}")
    show(comparison.to_dict(), comparison, json=json)


def _load(argument: str) -> Evaluation:
    from ft_core.evaluation import Evaluation

    name, equals, file = argument.partition("=")
    if not equals or Path(argument).exists():
        return Evaluation.load(argument)
    return Evaluation.load(file).model_copy(update={"name": name})
