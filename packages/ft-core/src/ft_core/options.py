"""Options that the `train` commands of several packs share; None is the engine's own default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

EpochsOption = Annotated[int | None, typer.Option(help="Passes over the data.")]
LearningRateOption = Annotated[float | None, typer.Option(help="Peak learning rate.")]
LossOption = Annotated[str | None, typer.Option(help="Loss by name.")]
LoraOption = Annotated[bool, typer.Option(help="Train low-rank updates.")]
LoraRankOption = Annotated[
    int | None, typer.Option(help="Rank of the updates (LoRA); 0 trains all weights.")
]
SeedOption = Annotated[int | None, typer.Option(help="Seed of training.")]
ResumeOption = Annotated[bool, typer.Option(help="Go on from the last checkpoint.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda or mps; best by default.")]
ReportOption = Annotated[
    Path | None, typer.Option(help="Write the report as a page; needs --validation.")
]


def given(**options: Any) -> dict[str, Any]:
    """Return the options that were given: what an engine takes in the place of its defaults."""
    return {name: value for name, value in options.items() if value is not None}


def sft_settings(*, lora_rank: int | None, **options: Any) -> dict[str, Any]:
    """Return what an engine of `ft_core.sft` takes of the options that were given."""
    settings = given(lora_rank=lora_rank, **options)
    if lora_rank == 0:
        settings["lora_rank"] = None  # all weights
    return settings
