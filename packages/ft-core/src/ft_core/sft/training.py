"""The training itself: TRL's `SFTTrainer` over sequences of which only the answers are learned."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from ft_core.datasets.chat import ChatDataset
from ft_core.errors import ArgumentError, TrainingError
from ft_core.extras import import_extra
from ft_core.sft.chat_format import ChatFormat, Tokens
from ft_core.sft.models import EXTRA, context_window, load_model
from ft_core.sft.rows import rows_of
from ft_core.sft.settings import SFTSettings
from ft_core.training import has_fast_bf16, quiet_unless_terminal, writing

_CPU_TOKENS = 1_024  # per device batch: more is not faster on a CPU, and padding costs


@dataclass
class Run:
    """One training run: what `train` needs."""

    base_model: str
    settings: SFTSettings
    checkpoints: Path
    """Folder of the checkpoints."""
    checkpoint: str | None = None
    """One of them to go on from."""
    train: ChatDataset | None = None
    validation: ChatDataset | None = None
    device: str | None = None
    lora: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of peft's `LoraConfig`."""
    callbacks: Sequence[Any] = ()
    cancelled: Callable[[], bool] = lambda: False
    log: Callable[[dict[str, float]], None] = lambda metrics: None
    """Gets each logged step and evaluation."""
    report_to: str | list[str] = "none"
    show_progress: bool = True


@dataclass
class Trained:
    """What came out of a run."""

    model: Any
    """A PeftModel with LoRA, else the model itself."""
    tokenizer: Any
    metrics: dict[str, float]
    """`base_loss` and `validation_loss` (mean negative log-likelihood of an answer token on
    validation, in nats, before and after), `train_loss`, `seconds`, `tokens`."""
    is_main: bool
    """Whether this is the process that saves, of several."""


class Cancelled(TrainingError):
    """The job was cancelled while it trained."""


def train(run: Run) -> Trained:
    """Train, and return the model with the best validation loss (the last one without any).

    Raises:
        ArgumentError: the model cannot be loaded, or a setting does not fit it or the machine.
        DatasetError: an example cannot be used; names it.
        Cancelled: `run.cancelled` said so; the newest checkpoint stays.
        TrainingError: the weights became NaN, or a checkpoint cannot be written.
    """
    assert run.train is not None
    started = time.perf_counter()
    settings = run.settings
    set_seed(settings.seed)
    model, tokenizer = _model(run)
    length = min(settings.max_length or context_window(model), context_window(model))
    chat = ChatFormat(tokenizer)
    rows = rows_of(run.train.examples, chat, length, "train")
    validation = None
    if run.validation is not None:
        validation = rows_of(run.validation.examples, chat, length, "val_data")
    trainer = _trainer(model, tokenizer, rows, validation, length, run)
    with quiet_unless_terminal(), writing("a checkpoint", run.checkpoints, "run it again"):
        result = trainer.train(resume_from_checkpoint=run.checkpoint)
    if run.cancelled():
        raise Cancelled("cancelled; the newest checkpoint is kept")
    metrics = {
        "train_loss": float(result.training_loss),
        "seconds": time.perf_counter() - started,
        "tokens": float(sum(len(row) for row in rows) * settings.epochs),
        **_validation_losses(trainer.state.log_history),
    }
    tuned = trainer.accelerator.unwrap_model(trainer.model)
    if not all(torch.isfinite(weight).all() for weight in tuned.parameters()):
        raise TrainingError(
            f"the weights became NaN or infinite; lower learning_rate (it was "
            f"{settings.learning_rate}) or set precision='fp32'"
        )
    return Trained(tuned.eval(), tokenizer, metrics, trainer.is_world_process_zero())


def _model(run: Run) -> tuple[Any, Any]:
    settings = run.settings
    kwargs: dict[str, Any] = {}
    if settings.load_in_4bit:
        if not torch.cuda.is_available():
            raise ArgumentError("load_in_4bit", "needs a CUDA GPU, and there is none here")
        import_extra("bitsandbytes", "bitsandbytes")
        transformers = import_extra("transformers", EXTRA)
        kwargs["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    elif settings.lora_rank is None or run.device == "cpu":
        # All weights are trained, and updates of 1e-4 are lost in bfloat16 ones.
        kwargs["dtype"] = torch.float32
    model, tokenizer = load_model(run.base_model, run.device, **kwargs)
    model.config.use_cache = False
    return model, tokenizer


def _trainer(
    model: Any,
    tokenizer: Any,
    rows: list[Tokens],
    validation: list[Tokens] | None,
    length: int,
    run: Run,
) -> Any:
    settings = run.settings
    device_batch, accumulation = _batches(settings, rows, model.device)
    per_epoch = -(-len(rows) // settings.batch_size)
    steps = per_epoch * settings.epochs
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(model.device) else "fp32"
    on_gpu = model.device.type == "cuda"
    evaluating = validation is not None
    strategy = "epoch" if settings.eval_steps is None else "steps"
    arguments = SFTConfig(
        output_dir=str(run.checkpoints),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=device_batch,
        per_device_eval_batch_size=device_batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=round(steps * settings.warmup_ratio),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=model.device.type == "cpu",
        max_length=length,
        packing=settings.packing,
        eval_packing=False,
        **_checkpointing(settings, on_gpu),
        dataset_kwargs={"skip_prepare_dataset": not settings.packing},
        dataloader_pin_memory=on_gpu,
        ddp_find_unused_parameters=False,
        logging_steps=max(1, steps // 50),
        eval_strategy=strategy if evaluating else "no",
        eval_steps=settings.eval_steps,
        # What the base model gives, to compare with; not again when going on.
        eval_on_start=evaluating and run.checkpoint is None,
        save_strategy=strategy,
        save_steps=settings.eval_steps or 500,
        save_total_limit=2,
        load_best_model_at_end=evaluating,
        metric_for_best_model="eval_loss" if evaluating else None,
        greater_is_better=False if evaluating else None,
        report_to=run.report_to,
        disable_tqdm=not (run.show_progress and sys.stderr.isatty()),
    )
    callbacks: list[Any] = [_Journal(run.log), _Cancel(run.cancelled), *run.callbacks]
    if evaluating and settings.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(settings.early_stopping_patience))
    with quiet_unless_terminal():
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=_table(rows),
            eval_dataset=None if validation is None else _table(validation),
            processing_class=tokenizer,
            peft_config=_lora(run),
            callbacks=callbacks,
        )
    # It prints each log line to standard output, which belongs to the caller.
    trainer.remove_callback(PrinterCallback)
    if not arguments.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_Progress)
    return trainer


def _checkpointing(settings: SFTSettings, on_gpu: bool) -> dict[str, bool]:
    wanted = settings.gradient_checkpointing
    names = ("activation_checkpointing", "gradient_checkpointing")  # transformers renames it
    name = next(name for name in names if name in SFTConfig.__dataclass_fields__)
    return {name: on_gpu if wanted is None else wanted}


def _batches(settings: SFTSettings, rows: list[Tokens], device: Any) -> tuple[int, int]:
    """Return (examples per device and pass, passes per optimiser step)."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.batch_size % processes:
        raise ArgumentError(
            "batch_size", f"is a multiple of the {processes} processes, not {settings.batch_size}"
        )
    share = settings.batch_size // processes
    wanted = settings.device_batch_size
    if wanted is None:
        wanted = 8
        if device.type == "cpu":
            wanted = max(1, _CPU_TOKENS // max(len(row) for row in rows))
    fitting = max(size for size in range(1, share + 1) if share % size == 0 and size <= wanted)
    return fitting, share // fitting


def _lora(run: Run) -> Any:
    settings = run.settings
    if settings.lora_rank is None:
        return None
    peft = import_extra("peft", EXTRA)
    defaults = {
        "r": settings.lora_rank,
        "lora_alpha": settings.lora_alpha or 2 * settings.lora_rank,
        "lora_dropout": settings.lora_dropout,
        "target_modules": "all-linear",
    }
    return peft.LoraConfig(task_type="CAUSAL_LM", **{**defaults, **run.lora})


def _table(rows: list[Tokens]) -> Any:
    return datasets.Dataset.from_list(
        [
            {
                "input_ids": row.input_ids,
                "labels": [
                    token if is_answer else -100
                    for token, is_answer in zip(row.input_ids, row.is_answer, strict=True)
                ],
            }
            for row in rows
        ]
    )


def _validation_losses(history: list[dict[str, float]]) -> dict[str, float]:
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    if not losses:
        return {}
    found = {"validation_loss": min(loss for step, loss in losses.items() if step > 0)}
    if 0 in losses:
        found["base_loss"] = losses[0]
    return found


class _Journal(TrainerCallback):
    """Hands each logged line to the run."""

    def __init__(self, log: Callable[[dict[str, float]], None]) -> None:
        self._log = log

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        names = {"loss": "train_loss", "eval_loss": "valid_loss"}
        metrics = {new: float(logs[old]) for old, new in names.items() if old in logs}
        if metrics:
            self._log({"step": state.global_step, "steps": state.max_steps, **metrics})


class _Cancel(TrainerCallback):
    """Ends the training at the next step once the run is cancelled."""

    def __init__(self, cancelled: Callable[[], bool]) -> None:
        self._cancelled = cancelled

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._cancelled():
            control.should_training_stop = True
            control.should_save = True


class _Progress(ProgressCallback):
    """The bar without the lines: those go to the log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show nothing."""
