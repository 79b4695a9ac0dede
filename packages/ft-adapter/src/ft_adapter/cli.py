"""The pack's commands: `ft adapter train` and `ft adapter eval`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ft_core.console import JsonOption, note, show

if TYPE_CHECKING:
    from llama_index.core import VectorStoreIndex
    from llama_index.core.base.embeddings.base import BaseEmbedding

adapter = typer.Typer(help="Train and evaluate adapters of embedding models.", no_args_is_help=True)

ModelOption = Annotated[
    str,
    typer.Option(
        "--embed-model",
        help="openai:MODEL, openai-like:MODEL@URL, or a hub name or folder.",
    ),
]
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
    loss: Annotated[str | None, typer.Option(help="Loss by name.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data, at most.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pairs in a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    identity_pull: Annotated[
        float | None, typer.Option(help="How dear a change of the embedding is.")
    ] = None,
    negatives: Annotated[int, typer.Option(help="Hard negatives to mine per question.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Seed of training.")] = None,
    cache: CacheOption = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as a page.")] = None,
    json: JsonOption = False,
) -> None:
    """Train an adapter on DATASET, and save it, or the identity where none helps, to OUTPUT."""
    from ft_adapter.engine import EmbeddingAdapterFinetuneEngine
    from ft_adapter.models import load_embed_model

    model = load_embed_model(embed_model)
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
            _load_index(index, model), dataset, model, **settings
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
    from ft_adapter.models import load_embed_model

    model = load_embed_model(embed_model)
    report = evaluate_adapters(
        dataset,
        model,
        adapters,
        index=None if index is None else _load_index(index, model),
        cache_dir=cache,
    )
    if html is not None:
        report.save_html(html)
    show(report.to_dict(), report, json=json)


def _load_index(folder: Path, model: BaseEmbedding) -> VectorStoreIndex:
    from llama_index.core import StorageContext, VectorStoreIndex, load_index_from_storage

    from ft_core.errors import ArgumentError

    # What LlamaIndex logs while it reads a folder says nothing that the error does not.
    logging.getLogger("llama_index.core.indices.loading").setLevel(logging.ERROR)
    try:
        storage = StorageContext.from_defaults(persist_dir=str(folder))
        loaded = load_index_from_storage(storage, embed_model=model)
    except (OSError, ValueError, KeyError) as error:
        raise ArgumentError(
            "--index", f"{folder} is no folder that one index was persisted to: {error}"
        ) from None
    if not isinstance(loaded, VectorStoreIndex):
        raise ArgumentError("--index", f"{folder} holds a {type(loaded).__name__}, no vector index")
    return loaded
