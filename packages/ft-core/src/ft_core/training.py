"""What every training run on this machine needs, whichever library does the training.

torch, transformers and datasets are imported when a function is called, not before.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_core.errors import ArgumentError, TrainingError, first_line
from ft_core.files import atomic_write

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def best_device() -> torch.device:
    """Return the device to train on: CUDA, else Apple's MPS, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def device_named(name: Any) -> torch.device:
    """Return the device of a name such as "cuda:1"; of None the best.

    Raises:
        ArgumentError: PyTorch knows no such device.
    """
    import torch

    if name is None:
        return best_device()
    try:
        return torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError("device", f"{name!r} cannot be used: {first_line(error)}") from None


def has_fast_bf16(device: torch.device) -> bool:
    """Say whether the device multiplies in bfloat16 faster than in float32."""
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, check, lambda: False)() for check in checks)
    return False


@contextmanager
def quiet_unless_terminal() -> Iterator[None]:
    """Keep the bars of transformers and datasets off a standard error that is no terminal.

    Both draw bars for steps of milliseconds ("Writing model shards"), on terminals or not.
    """
    import datasets
    from transformers.utils import logging as transformers_logging

    models_shown = transformers_logging.is_progress_bar_enabled()
    data_shown = not datasets.utils.are_progress_bars_disabled()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if models_shown:
            transformers_logging.enable_progress_bar()
        if data_shown:
            datasets.enable_progress_bars()


@contextmanager
def writing(what: str, folder: Path, advice: str) -> Iterator[None]:
    """Turn what the libraries raise on a full disk into one error, and let others through.

    Raises:
        TrainingError: names the folder, and what to do once there is room: `advice`.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        raise TrainingError(
            f"{folder}: {what} cannot be written: {first_line(error)}; what was saved before is "
            f"as it was. Make room, and {advice}"
        ) from error


def trainer_arguments(
    settings: Any,
    device: torch.device,
    *,
    steps: int,
    output: Path,
    batch_size: int,
    metric: str | None = None,
    evaluation_steps: int | None = None,
    save_steps: int | None = None,
    save_limit: int | None = None,
    report_to: str | list[str] = "none",
    show_progress: bool = True,
) -> dict[str, Any]:
    """Return the arguments that the `TrainingArguments` of sentence-transformers share.

    Args:
        settings: has `epochs`, `learning_rate`, `scheduler`, `warmup_ratio`, `weight_decay`,
            `precision` ("auto" is bf16 where that is fast) and `seed`.
        device: where the model is.
        steps: of the whole run.
        output: folder of the checkpoints.
        batch_size: rows of a step.
        metric: evaluate, and keep the checkpoint that is best by this; None does neither.
        evaluation_steps: between two evaluations; None is once an epoch.
        save_steps: between two checkpoints where nothing is evaluated; None is once an epoch.
        save_limit: checkpoints that are kept; None keeps all.
        report_to: any of transformers' trackers.
        show_progress: draw a bar where standard error is a terminal.

    Raises:
        ArgumentError: there is no such scheduler.
    """
    from transformers import SchedulerType

    schedulers = [each.value for each in SchedulerType]
    if settings.scheduler not in schedulers:
        raise ArgumentError(
            "scheduler", f"is one of {', '.join(schedulers)}, not {settings.scheduler!r}"
        )
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(device) else "fp32"
    evaluating = metric is not None
    save_strategy = "epoch" if save_steps is None else "steps"
    evaluation_strategy = "epoch" if evaluation_steps is None else "steps"
    if evaluating:
        # The best checkpoint can only be kept if there is one for every evaluation.
        save_strategy = evaluation_strategy
    return {
        "output_dir": str(output),
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": batch_size,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.scheduler,
        "warmup_steps": round(steps * settings.warmup_ratio),
        "weight_decay": settings.weight_decay,
        "seed": settings.seed,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "use_cpu": device.type == "cpu",
        "remove_unused_columns": False,
        "dataloader_pin_memory": device.type == "cuda",
        "logging_steps": max(1, steps // 20),
        "logging_strategy": "no" if report_to == "none" else "steps",
        "eval_strategy": evaluation_strategy if evaluating else "no",
        "eval_steps": evaluation_steps,
        "save_strategy": save_strategy,
        "save_steps": (evaluation_steps if evaluating else save_steps) or 500,
        "save_total_limit": save_limit,
        "load_best_model_at_end": evaluating,
        "metric_for_best_model": metric,
        "greater_is_better": True if evaluating else None,
        "report_to": report_to,
        "disable_tqdm": not (show_progress and sys.stderr.isatty()),
    }


def prepare_checkpoints(folder: Path, fingerprint: str, *, resume: bool) -> str | None:
    """Return the checkpoint to go on from, or None after clearing the folder for a new run.

    Args:
        folder: where transformers' `Trainer` keeps its `checkpoint-N` folders.
        fingerprint: hash of data and settings.
        resume: whether to go on from the newest whole checkpoint.

    Raises:
        TrainingError: resuming was asked for, but the checkpoints are of other data or
            settings; or the folder holds something else.
    """
    marker = folder / "run.json"
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        raise TrainingError(f"{folder}: is in the way of the checkpoints; move it")
    if marker.exists() and resume:
        if json.loads(marker.read_text())["fingerprint"] != fingerprint:
            raise TrainingError(
                f"{folder}: holds checkpoints of other data or settings; delete the folder, or "
                "train with what they were made with"
            )
        newest = newest_checkpoint(folder)
        if newest is not None:
            logger.info("resuming from %s", newest)
            return str(newest)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with atomic_write(marker) as file:
        json.dump({"fingerprint": fingerprint}, file)
    return None


def belongs_to(folder: Path, fingerprint: str) -> bool:
    """Say whether a folder holds checkpoints of this very run."""
    marker = folder / "run.json"
    return marker.exists() and json.loads(marker.read_text())["fingerprint"] == fingerprint


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole `checkpoint-N` in a folder."""
    # The state is written last: without it, the process died while saving.
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(complete, key=lambda path: int(path.name.rsplit("-", 1)[-1]), default=None)
