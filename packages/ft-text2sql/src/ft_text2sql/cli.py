"""The pack's commands: `ft text2sql train` and `ft text2sql ask`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ft_core.console import JsonOption, note, progress_notes, show, show_losses
from ft_core.options import (
    DeviceOption,
    EpochsOption,
    LearningRateOption,
    LoraRankOption,
    SeedOption,
    sft_settings,
)

text2sql = typer.Typer(
    help="Train a model to write SQL for a database, and ask it.", no_args_is_help=True
)


@text2sql.command()
def train(
    data: Annotated[Path, typer.Argument(help="Questions with SQL as JSON Lines.")],
    base_model: Annotated[str, typer.Option(help="Hub name or folder of the model to train.")],
    output: Annotated[Path, typer.Option(help="Folder for the model.")],
    validation: Annotated[Path | None, typer.Option(help="Held-out questions.")] = None,
    database: Annotated[
        str | None,
        typer.Option(help="Database that the questions are about: a SQLite file or a URL."),
    ] = None,
    schema_style: Annotated[
        str, typer.Option(help="How the prompt writes tables: typed, lines or create.")
    ] = "typed",
    epochs: EpochsOption = None,
    learning_rate: LearningRateOption = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a step.")] = None,
    lora_rank: LoraRankOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Train a model on DATA; the same command goes on with a run that was killed."""
    from ft_text2sql.engine import Text2SQLFinetuneEngine

    settings = sft_settings(
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        lora_rank=lora_rank,
        seed=seed,
    )
    engine = Text2SQLFinetuneEngine(
        data,
        base_model,
        output,
        val_data=validation,
        database=database,
        schema_style=schema_style,  # type: ignore[arg-type]  # the engine checks it
        device=device,
        **settings,
    )
    with progress_notes("ft_text2sql"):
        job = engine.finetune()
    show_losses({"model": output}, job.raw.metrics, json=json)


@text2sql.command()
def ask(
    model: Annotated[Path, typer.Argument(help="Folder that `train` made.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    database: Annotated[str, typer.Option(help="A SQLite file, or a URL.")],
    n: Annotated[int, typer.Option(help="Queries whose results are voted on.")] = 1,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Let the model write a query for QUESTION, and run it read-only."""
    from ft_core.errors import ArgumentError
    from ft_text2sql.engine import Text2SQLFinetuneEngine
    from ft_text2sql.errors import SQLError

    if not question.strip():
        raise ArgumentError("QUESTION", "is empty")
    engine = Text2SQLFinetuneEngine.load(model, device=device)
    response = engine.get_query_engine(database, n=n).query(question)
    metadata = response.metadata or {}
    note(metadata["sql_query"])
    if metadata["error"] is not None:
        raise SQLError(metadata["error"])
    if metadata["truncated"]:
        note(f"the first {len(metadata['result']):,} rows; there are more")
    lines = [metadata["col_keys"], *metadata["result"]]
    text = "\n".join("\t".join(map(str, line)) for line in lines)
    show({"response": str(response), **metadata}, text, json=json)
