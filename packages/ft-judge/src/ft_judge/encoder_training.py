"""Train an encoder to judge: the one place of this pack that imports transformers' Trainer."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ft_core.errors import TrainingError
from ft_core.sft.job_folder import Cancelled
from ft_core.sft.training import keeping_random_state
from ft_core.training import device_named, quiet_unless_terminal, trainer_arguments, writing
from ft_core.weights import add_lora, freeze_lowest, merge_lora, set_dropout
from ft_judge.calibration import AS_TRAINED
from ft_judge.encoder_model import (
    CHUNK,
    Read,
    Reader,
    load_encoder,
    padded,
    score_part,
    scores_of,
    window,
)
from ft_judge.encoder_rows import Row
from ft_judge.encoder_settings import EncoderSettings
from ft_judge.students import EXTRA

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """One training run: what `train` needs."""

    base_model: str
    settings: EncoderSettings
    checkpoints: Path
    """Folder of the checkpoints."""
    rows: Sequence[Row]
    watched: Sequence[Row]
    """What the model is evaluated on after each epoch; may be empty."""
    cuts: Sequence[float] | None
    """Of grades, where one ends and the next begins, as scores; of pairs None."""
    loss_of: Callable[[NDArray[np.float64]], float]
    """From the scores of `watched` to the validation loss."""
    checkpoint: str | None = None
    """One of `checkpoints` to go on from."""
    device: str | None = None
    lora: Mapping[str, Any] | None = None
    cancelled: Callable[[], bool] = lambda: False
    log: Callable[[dict[str, float]], None] = lambda metrics: None
    """Gets each logged step and evaluation."""
    show_progress: bool = True


@dataclass
class Trained:
    """What came out of a run."""

    encoder: Any
    tokenizer: Any
    scores: NDArray[np.float64]
    """Of `watched`, as `scores_of` returns them."""
    max_length: int
    """Tokens that were read of a question and an answer."""
    metrics: dict[str, float] = field(default_factory=dict)
    """`train_loss`, `seconds`, `cut_share`; `base_loss` where the base model came with a head."""


def train(run: Run) -> Trained:
    """Train, and return the encoder with its last weights, or the best with early stopping.

    Raises:
        ArgumentError: the model cannot be loaded, or a setting does not fit it.
        Cancelled: `run.cancelled` said so; the newest checkpoint stays.
        TrainingError: the weights became NaN, or a checkpoint cannot be written.
    """
    with keeping_random_state():
        return _trained(run)


def _trained(run: Run) -> Trained:
    started = time.perf_counter()
    settings = run.settings
    device = device_named(run.device)
    encoder, tokenizer, has_head = load_encoder(run.base_model, device, settings.seed)
    max_length = min(window(encoder, tokenizer), settings.max_length or math.inf)
    reader = Reader(tokenizer, int(max_length))
    read, watched = reader.rows(run.rows), reader.rows(run.watched)
    metrics = {"cut_share": reader.warn_of_cuts()}
    if has_head and watched:
        metrics["base_loss"] = run.loss_of(scores_of(encoder, tokenizer, watched))
    network = _Network(encoder)
    _prepare(network, run)
    set_seed(settings.seed)
    with quiet_unless_terminal(), writing("a checkpoint", run.checkpoints, "run it again"):
        trainer, watch = _trainer(network, tokenizer, read, watched, run)
        result = trainer.train(resume_from_checkpoint=run.checkpoint)
    _check(network, watch, settings)
    if run.lora is not None:
        merge_lora(encoder, encoder)
    encoder.requires_grad_(True).eval()
    metrics |= {
        "train_loss": float(result.training_loss),
        "seconds": time.perf_counter() - started,
    }
    return Trained(
        encoder, tokenizer, scores_of(encoder, tokenizer, watched), int(max_length), metrics
    )


# --- The parts of training -----------------------------------------------------------------------


class _Network(torch.nn.Module):
    """What the Trainer trains: around the encoder, so that checkpoints are whole with LoRA too."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, parts: Sequence[Mapping[str, Any]], order: Any) -> Any:
        """Return the scores of texts that come in parts, in their order."""
        return torch.cat([score_part(self.encoder, part) for part in parts])[order]


def _prepare(network: _Network, run: Run) -> None:
    """Choose which weights are trained."""
    encoder, settings = network.encoder, run.settings
    set_dropout(network, settings.dropout)
    prefix = encoder.base_model_prefix
    if run.lora is None:
        freeze_lowest(network, getattr(encoder, prefix, None), settings.frozen_share)
        return
    heads = [
        name
        for name, module in encoder.named_children()
        if name != prefix and any(True for _ in module.parameters())
    ]
    add_lora(encoder, {"modules_to_save": heads, **run.lora}, task_type="SEQ_CLS", extra=EXTRA)


def _check(network: _Network, watch: _Watch, settings: EncoderSettings) -> None:
    if watch.cancelled:
        raise Cancelled("cancelled; the newest checkpoint is kept")
    if not all(torch.isfinite(weight).all() for weight in network.parameters()):
        raise TrainingError(
            "the weights became NaN or infinite; lower learning_rate (it was "
            f"{settings.learning_rate}) or set precision='fp32'"
        )


def _trainer(
    network: _Network,
    tokenizer: Any,
    rows: list[Read],
    watched: list[Read],
    run: Run,
) -> tuple[_Trainer, _Watch]:
    settings = run.settings
    device = network.encoder.device
    steps = -(-len(rows) // settings.batch_size) * settings.epochs
    stops = settings.early_stopping_patience if watched else None
    arguments = trainer_arguments(
        settings,
        device,
        steps=steps,
        output=run.checkpoints,
        batch_size=settings.batch_size,
        metric=None if stops is None else "eval_loss",
        save_limit=1 if stops is None else 2,  # the best and the newest
        show_progress=run.show_progress,
    )
    arguments |= {
        "logging_strategy": "steps",
        "eval_strategy": "epoch" if watched else "no",
        "greater_is_better": None if stops is None else False,
        "save_strategy": "epoch",
    }
    made = TrainingArguments(**arguments)
    if made.n_gpu > 1:
        made._n_gpu = 1  # more would multiply the batch
    watch = _Watch(run.log, run.cancelled)
    callbacks: list[Any] = [watch]
    if stops is not None:
        callbacks.append(EarlyStoppingCallback(stops))
    trainer = _Trainer(
        model=network,
        args=made,
        train_dataset=rows,
        eval_dataset=watched or None,
        data_collator=_Batch(tokenizer, CHUNK if device.type == "cpu" else 2 * len(rows)),
        callbacks=callbacks,
    )
    trainer.cuts = None if run.cuts is None else torch.tensor(run.cuts, device=device)
    trainer.validation_loss = lambda: run.loss_of(scores_of(network.encoder, tokenizer, watched))
    # It prints each log line to standard output, which belongs to the caller.
    trainer.remove_callback(PrinterCallback)
    if not made.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_Progress)
    return trainer, watch


class _Batch:
    """Makes a batch of lessons."""

    def __init__(self, tokenizer: Any, chunk: int) -> None:
        self._tokenizer = tokenizer
        self._chunk = chunk

    def __call__(self, rows: Sequence[Read]) -> dict[str, Any]:
        """Return the texts of all rows, and the targets."""
        inputs = [each for row in rows for each in row.inputs]
        parts, order = padded(self._tokenizer, inputs, self._chunk)
        targets = torch.tensor([row.target for row in rows])
        return {"parts": parts, "order": order, "targets": targets}


class _Trainer(Trainer):
    cuts: Any = None
    validation_loss: Callable[[], float]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Return the negative log-likelihood of the verdicts, or of the grades."""
        found = model(inputs["parts"], inputs["order"])
        targets = inputs["targets"]
        if self.cuts is None:
            # Bradley and Terry (1952): log-odds are differences of scores.
            better = found[0::2] - found[1::2]
            return torch.nn.functional.binary_cross_entropy_with_logits(better, targets)
        return _ordinal_loss(found, targets.long(), self.cuts)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log the validation loss, and return it."""
        metrics = {"eval_loss": self.validation_loss()}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def _ordinal_loss(scores: Any, grades: Any, cuts: Any) -> Any:
    """Return the loss of the cumulative logit model (McCullagh 1980, "Regression models for
    ordinal data"), as `ft_judge.calibration.grade_probabilities` has it.

    Of a grade between the cuts a < b, log(sigmoid(b) - sigmoid(a)) is written so that it stays
    finite where both sigmoids round to the same: log sigmoid(b) + log sigmoid(-a) + log(1 -
    exp(a - b)).
    """
    edges = torch.cat([cuts.new_tensor([-math.inf]), cuts, cuts.new_tensor([math.inf])])
    low = (edges[grades] - scores) / AS_TRAINED
    high = (edges[grades + 1] - scores) / AS_TRAINED
    log_sigmoid = torch.nn.functional.logsigmoid
    # At an infinite edge the sigmoid is 1: its gradient must not become 0 times infinity.
    above = torch.where(torch.isinf(low), 0.0, log_sigmoid(-torch.nan_to_num(low)))
    below = torch.where(torch.isinf(high), 0.0, log_sigmoid(torch.nan_to_num(high)))
    width = (edges[grades + 1] - edges[grades]) / AS_TRAINED
    return -(above + below + torch.log(-torch.expm1(-width))).mean()


class _Watch(TrainerCallback):
    """Hands on what is logged, and ends the training at the next step once it is cancelled."""

    def __init__(
        self, log: Callable[[dict[str, float]], None], cancelled: Callable[[], bool]
    ) -> None:
        self._log = log
        self._asked = cancelled
        self.cancelled = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        names = {"loss": "train_loss", "eval_loss": "valid_loss"}
        metrics = {new: float(logs[old]) for old, new in names.items() if old in (logs or {})}
        if metrics:
            self._log({"step": state.global_step, "steps": state.max_steps, **metrics})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._asked():
            self.cancelled = True
            control.should_training_stop = True
            control.should_save = True


class _Progress(ProgressCallback):
    """The bar without the lines: those go to the log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show nothing."""
