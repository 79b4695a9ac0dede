"""The training itself: TRL's trainer over sequences of which only the answers are learned."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, pack_dataset

from ft_core.datasets.chat import ChatDataset
from ft_core.errors import ArgumentError, TrainingError, first_line
from ft_core.extras import import_extra
from ft_core.sft.chat_format import ChatFormat, Tokens
from ft_core.sft.job_folder import Cancelled
from ft_core.sft.models import EXTRA, context_window, load_model, stop_at
from ft_core.sft.processes import processes
from ft_core.sft.rows import rows_of
from ft_core.sft.settings import SFTSettings
from ft_core.sft.trainer import AnswerTrainer
from ft_core.training import has_fast_bf16, quiet_unless_terminal, writing

_PROBE_TOKENS = 32
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
    """`base_loss` and `validation_loss` (before and after, on validation: the negative
    log-likelihood of an answer token in nats, averaged within batches and then over them),
    `train_loss`, `seconds`, `tokens`."""
    is_main: bool
    """Whether this is the process that saves, of several."""


def train(run: Run) -> Trained:
    """Train, and return the model with the best validation loss (the last one without any).

    Raises:
        ArgumentError: the model cannot be loaded, or a setting does not fit it or the machine.
        DatasetError: an example cannot be used; names it.
        Cancelled: `run.cancelled` said so; the newest checkpoint stays.
        TrainingError: the weights became NaN, or a checkpoint cannot be written.
    """
    with keeping_random_state():
        set_seed(run.settings.seed)
        return _trained(run)


@contextmanager
def keeping_random_state() -> Iterator[None]:
    """Give the app its random numbers back as they were: trainers seed all generators."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _trained(run: Run) -> Trained:
    assert run.train is not None
    started = time.perf_counter()
    settings = run.settings
    if run.cancelled():
        raise Cancelled("cancelled before the first step")
    model, tokenizer = _model(run)
    use_cache = model.config.use_cache
    model.config.use_cache = False  # of no use in training
    length = min(settings.max_length or context_window(model), context_window(model))
    chat = ChatFormat(tokenizer)
    rows = rows_of(run.train.examples, chat, length, "train")
    validation = None
    if run.validation is not None:
        validation = rows_of(run.validation.examples, chat, length, "val_data")
    if settings.packing:
        check_packing(model, rows)
        # Filling the window of a long-context model could take more memory than there is.
        length = length if settings.max_length else max(len(row) for row in rows)
    trainer, cancel = _trainer(model, tokenizer, rows, validation, length, run)
    with (
        quiet_unless_terminal(),
        writing("a checkpoint", run.checkpoints, "run it again"),
        _memory_errors_explained(settings),
    ):
        result = trainer.train(resume_from_checkpoint=run.checkpoint)
    if cancel.happened:
        raise Cancelled("cancelled; the newest checkpoint is kept")
    metrics = {
        "train_loss": float(result.training_loss),
        "seconds": time.perf_counter() - started,
        # The share of an epoch counts too, after early stopping.
        "tokens": float(round(sum(len(row) for row in rows) * (trainer.state.epoch or 0.0))),
        **_validation_losses(trainer.state.log_history),
    }
    tuned = trainer.accelerator.unwrap_model(trainer.model)
    tuned.config.use_cache = use_cache
    stop_at(tuned, chat.end_ids)
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
    if (run.device or "").startswith("cuda:") and run.device != "cuda:0":
        raise ArgumentError(
            "device",
            "training takes the first GPU that it sees; start Python with "
            f"CUDA_VISIBLE_DEVICES={str(run.device)[5:]} to train on {run.device}",
        )
    return load_model(run.base_model, run.device, **kwargs)


def _trainer(
    model: Any,
    tokenizer: Any,
    rows: list[Tokens],
    validation: list[Tokens] | None,
    length: int,
    run: Run,
) -> tuple[Any, _Cancel]:
    settings = run.settings
    table = _table(rows)
    longest = max(len(row) for row in rows)
    if settings.packing:
        with quiet_unless_terminal():
            table, longest = pack_dataset(table, length, "bfd"), length
    device_batch, accumulation = _batches(settings, longest, model.device)
    per_epoch = -(-len(table) // settings.batch_size)
    steps = per_epoch * settings.epochs
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(model.device) else "fp32"
    on_gpu = model.device.type == "cuda"
    evaluating = validation is not None
    strategy = "epoch" if settings.eval_steps is None else "steps"
    arguments = _arguments(
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
        dataset_kwargs={"skip_prepare_dataset": True},
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
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # more would multiply the batch; `accelerate launch` divides it
    cancel = _Cancel(run.cancelled)
    callbacks: list[Any] = [_Journal(run.log), cancel, *run.callbacks]
    if evaluating and settings.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(settings.early_stopping_patience))
    with quiet_unless_terminal():
        trainer = AnswerTrainer(
            model=model,
            args=arguments,
            train_dataset=table,
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
    return trainer, cancel


def check_packing(model: Any, rows: Sequence[Tokens]) -> None:
    """Check that the model keeps packed examples apart, by trying it.

    It should from where the positions begin anew; models whose code does not would learn each
    example in the light of those packed before it.

    Raises:
        ArgumentError: it does not.
    """
    first, second = (torch.tensor(rows[i].input_ids[:_PROBE_TOKENS]) for i in (0, -1))
    first, second = first.to(model.device), second.to(model.device)
    both = torch.cat([first, second])[None]
    positions = torch.arange(len(both[0]), device=model.device)[None]
    apart = torch.where(positions < len(first), positions, positions - len(first))
    with torch.inference_mode():

        def logits(ids: Any, places: Any) -> Any:
            found = model(input_ids=ids, position_ids=places, use_cache=False).logits
            return found[0, -len(second) :].float()

        alone = logits(second[None], apart[:, len(first) :])
        leak = (logits(both, positions) - alone).abs().max()
        packed = (logits(both, apart) - alone).abs().max()
    if packed > 0.1 * leak:  # in bf16, sums in another order differ a little
        raise ArgumentError(
            "packing", f"{type(model).__name__} does not keep packed examples apart; turn it off"
        )


@contextmanager
def _memory_errors_explained(settings: SFTSettings) -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise TrainingError(
            "the GPU has not enough memory; lower device_batch_size or max_length, or set "
            f"load_in_4bit (device_batch_size was {settings.device_batch_size or 'automatic'})"
        ) from error


def _arguments(**values: Any) -> Any:
    try:
        return SFTConfig(**values)
    except ValueError as error:  # a scheduler there is not, bf16 on hardware without it
        raise ArgumentError("settings", f"do not work here: {first_line(error)}") from error


def _checkpointing(settings: SFTSettings, on_gpu: bool) -> dict[str, bool]:
    wanted = settings.gradient_checkpointing
    names = ("activation_checkpointing", "gradient_checkpointing")  # transformers renames it
    name = next(name for name in names if name in SFTConfig.__dataclass_fields__)
    return {name: on_gpu if wanted is None else wanted}


def _batches(settings: SFTSettings, longest: int, device: Any) -> tuple[int, int]:
    """Return (examples per device and pass, passes per optimiser step)."""
    count = processes()
    if settings.batch_size % count:
        raise ArgumentError(
            "batch_size", f"is a multiple of the {count} processes, not {settings.batch_size}"
        )
    share = settings.batch_size // count
    wanted = settings.device_batch_size
    if wanted is None:
        wanted = 8
        if device.type == "cpu":
            wanted = max(1, _CPU_TOKENS // longest)
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
    found = {"base_loss": losses.pop(0)} if 0 in losses else {}
    return {**found, "validation_loss": min(losses.values())} if losses else found


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
        self.happened = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        asked = state.is_world_process_zero and self._cancelled()
        if torch.distributed.is_initialized():
            # All processes end at the same step, or those left would wait for the others.
            flag = torch.tensor(float(asked), device=args.device)
            torch.distributed.broadcast(flag, 0)
            asked = bool(flag)
        if asked:
            self.happened = True
            control.should_training_stop = True
            control.should_save = True


class _Progress(ProgressCallback):
    """The bar without the lines: those go to the log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show nothing."""
