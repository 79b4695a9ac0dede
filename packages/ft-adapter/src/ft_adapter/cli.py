"""The pack's commands: `ft adapter train` and `ft adapter eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ft_core.console import JsonOption, note, show
from ft_core.embed_models import SPEC_HELP, load_embed_model
from ft_core.indices import load_index
from ft_core.options import LossOption, SeedOption

adapter = typer.Typer(help="Train and evaluate adapters of embedding models.", no_args_is_help=True)

ModelOption = Annotated[str, typer.Option("--embed-model", help=f"{SPEC_HELP}.")]
IndexOption = Annotated[
    Path | None,
    typer.Option(help="Folder of a persisted index: its vectors are used, none is made anew."),
]
CacheOption = Annotated[
    Path | None, typer.Option(help="Folder for cached vectors; a shared one by default.")
]


@adapter.command()
def train(
    dataset: Annotated[Path, typer.Argument(help="JSON to train on.")],
    embed_model: ModelOption,
    output: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    validation: Annotated[
        Path | None,
        typer.Option(help="JSON to judge on; folds of the training questions by default."),
    ] = None,
    index: IndexOption = None,
    adapter_model: Annotated[
        str, typer.Option("--adapter", help="linear, low_rank, residual or two_layer.")
    ] = "linear",
    loss: LossOption = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data, at most.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pairs in a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    identity_pull: Annotated[
        float | None, typer.Option(help="How dear a change of the embedding is.")
    ] = None,
    negatives: Annotated[int, typer.Option(help="Hard negatives to mine per question.")] = 0,
    seed: SeedOption = None,
    cache: CacheOption = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as a page.")] = None,
    json: JsonOption = False,
) -> None:
    """Train an adapter on DATASET, and save it, or the identity where none helps, to OUTPUT."""
    from ft_adapter.engine import EmbeddingAdapterFinetuneEngine

    model = load_embed_model(embed_model, pack="ft-adapter")
    settings: dict[str, Any] = {
        "val_dataset": validation,
        "model_output_path": output,
        "adapter_model": adapter_model,
        "loss": loss,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "identity_pull": identity_pull,
        "negatives": negatives,
        "seed": seed,
        "cache_dir": cache,
    }
    engine = (
        EmbeddingAdapterFinetuneEngine(dataset, model, **settings)
        if index is None
        else EmbeddingAdapterFinetuneEngine.from_index(
            load_index(index, model), dataset, model, **settings
        )
    )
    report = engine.finetune()
    if html is not None:
        report.save_html(html)
    assert engine.selection is not None
    kept = "adapter" if engine.selection.kept else "identity"
    note(report.title)
    note(f"adapter: {output}")
    document = {"adapter": output, "kept": kept, "report": report.to_dict()}
    show(document, report, json=json)


@adapter.command(name="eval")
def evaluate(
    dataset: Annotated[Path, typer.Argument(help="JSON to score on.")],
    embed_model: ModelOption,
    adapters: Annotated[
        list[Path], typer.Option("--adapter", help="Folder of a saved adapter; may be repeated.")
    ],
    index: IndexOption = None,
    cache: CacheOption = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as a page.")] = None,
    json: JsonOption = False,
) -> None:
    """Compare adapters with the embedding model alone on DATASET."""
    from ft_adapter.evaluation import evaluate_adapters

    model = load_embed_model(embed_model, pack="ft-adapter")
    report = evaluate_adapters(
        dataset,
        model,
        adapters,
        index=None if index is None else load_index(index, model),
        cache_dir=cache,
    )
    if html is not None:
        report.save_html(html)
    show(report.to_dict(), report, json=json)
