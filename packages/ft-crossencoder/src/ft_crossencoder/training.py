"""The training itself: the one place of this pack that imports torch's Trainer."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.cross_encoder import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    losses,
)
from transformers import EarlyStoppingCallback, PrinterCallback, set_seed
from transformers.utils import logging as transformers_logging

from ft_core.errors import ArgumentError, first_line
from ft_core.training import (
    prepare_checkpoints,
    quiet_unless_terminal,
    trainer_arguments,
    writing,
)
from ft_core.weights import add_lora, check_finite, freeze_lowest, merge_lora, set_dropout
from ft_crossencoder.rows import Row
from ft_crossencoder.scoring import window

if TYPE_CHECKING:
    from ft_crossencoder.settings import TrainingSettings

_GO_ON = "go on with resume_from_checkpoint=True"
_WINDOW = 50  # batches between which rows of like length are exchanged

LOSS_CLASSES: Mapping[str, Callable[[Any], Any]] = {
    "listnet": lambda model: losses.ListNetLoss(model, mini_batch_size=-1),
    "lambda": lambda model: losses.LambdaLoss(model, mini_batch_size=-1),
    "multiple_negatives_ranking": losses.MultipleNegativesRankingLoss,
    "binary_cross_entropy": losses.BinaryCrossEntropyLoss,
    "margin_mse": losses.MarginMSELoss,
    "mse": losses.MSELoss,
}
"""The classes of `ft_crossencoder.rows.LOSSES`."""

_LIKE = {
    "LambdaLoss": "lambda",
    "ListNetLoss": "listnet",
    "ListMLELoss": "lambda",
    "PListMLELoss": "lambda",
    "RankNetLoss": "lambda",
    "ADRMSELoss": "lambda",
    "MultipleNegativesRankingLoss": "multiple_negatives_ranking",
    "CachedMultipleNegativesRankingLoss": "multiple_negatives_ranking",
    "MarginMSELoss": "margin_mse",
    "MSELoss": "mse",
}  # which rows sentence-transformers' other losses take; all others take pairs


@dataclass
class Run:
    """One training run: what `train` needs besides the model and the rows."""

    settings: TrainingSettings
    checkpoints: Path
    """Folder of the checkpoints; also says what they belong to, for `resume`."""
    fingerprint: str
    """Hash of data and settings: checkpoints of another run are not resumed."""
    loss: str | Any = "listnet"
    """A name, or a loss of sentence-transformers (or a function from the model to one)."""
    lora: Mapping[str, Any] | None = None
    validate: Callable[[CrossEncoder], Mapping[str, float]] | None = None
    """Scores the model under training: metric to value."""
    metric: str = "ndcg@10"
    patience: int | None = None
    evaluation_steps: int | None = None
    resume: bool = False
    save_steps: int | None = None
    save_limit: int | None = 1
    report_to: str | list[str] = "none"
    show_progress: bool = True
    head: bool = field(default=False, kw_only=True)
    """Whether this is the run that learns a new head, with its own learning rate."""


def load_model(
    model_id: str, *, trust_remote_code: bool = False, device: Any = None, seed: int = 0
) -> tuple[CrossEncoder, bool]:
    """Load a cross-encoder with one score from the hub or a folder; also any plain encoder.

    Returns:
        The model, and whether it came with a head. One without gets a fresh one.

    Raises:
        ArgumentError: there is no such model, it cannot be loaded, or it classifies.
    """
    set_seed(seed)  # of a fresh head's weights
    try:
        with quiet_unless_terminal():
            has_head = _has_head(model_id, trust_remote_code)
            with nullcontext() if has_head else _without_report():
                model = CrossEncoder(
                    model_id,
                    num_labels=None if has_head else 1,
                    trust_remote_code=trust_remote_code,
                    device=device,
                )
    except Exception as error:
        raise ArgumentError(
            "model_id", f"{model_id!r} cannot be loaded: {first_line(error)}"
        ) from error
    if model.num_labels != 1:
        raise ArgumentError(
            "model_id", f"{model_id!r} tells {model.num_labels} classes apart; name one that scores"
        )
    return model, has_head


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep the libraries from warning of a head that is missing on purpose."""
    before = transformers_logging.get_verbosity()
    loader = logging.getLogger("sentence_transformers.base.model")
    level = loader.level
    transformers_logging.set_verbosity_error()
    loader.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        loader.setLevel(level)


def _has_head(model_id: str, trust_remote_code: bool) -> bool:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_id, trust_remote_code=trust_remote_code)
    kinds = ("ForSequenceClassification", "ForCausalLM", "ForConditionalGeneration")
    return any(name.endswith(kinds) for name in config.architectures or ())


def train(model: CrossEncoder, rows: Sequence[Row], run: Run) -> None:
    """Train `model` in place; afterwards it holds the weights to keep.

    Raises:
        TrainingError: the weights became NaN, a checkpoint cannot be written, or the
            checkpoints are another run's.
        ArgumentError: a setting does not fit the model.
    """
    settings = run.settings
    set_seed(settings.seed)
    encoder = model.model
    own_length, model.max_seq_length = model.max_seq_length, window(model, settings.max_length)
    set_dropout(model, settings.dropout)
    if run.lora is not None:
        heads = [name for name, _ in _head_modules(model)]
        options = {"modules_to_save": heads, **run.lora}
        add_lora(model, options, task_type="SEQ_CLS", extra="ft-crossencoder[lora]")
    elif not run.head:
        base = getattr(encoder, encoder.base_model_prefix, None)
        freeze_lowest(model, base, settings.frozen_share)

    checkpoint = prepare_checkpoints(run.checkpoints, run.fingerprint, resume=run.resume)
    with quiet_unless_terminal(), writing("a checkpoint", run.checkpoints, _GO_ON):
        _trainer(model, rows, run).train(resume_from_checkpoint=checkpoint)
    rate = _rate(run)
    check_finite(model, rate, getattr(settings, rate))
    if run.lora is not None:
        merge_lora(model, encoder)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.max_seq_length = own_length
    model.eval()


def _rate(run: Run) -> str:
    return "head_learning_rate" if run.head else "learning_rate"


def save(model: CrossEncoder, folder: Path) -> None:
    """Write a model as sentence-transformers does."""
    with quiet_unless_terminal(), writing("the trained model", folder, _GO_ON):
        model.save_pretrained(str(folder), create_model_card=False)


def _head_modules(model: CrossEncoder) -> list[tuple[str, torch.nn.Module]]:
    """Return the modules beside the encoder proper, such as a classifier."""
    encoder = model.model
    return [
        (name, module)
        for name, module in encoder.named_children()
        if name != encoder.base_model_prefix and any(True for _ in module.parameters())
    ]


def _trainer(model: CrossEncoder, rows: Sequence[Row], run: Run) -> CrossEncoderTrainer:
    settings = run.settings
    batch_size = max(1, settings.batch_size // _documents(rows))
    arguments = trainer_arguments(
        settings,
        model.device,
        steps=max(1, -(-len(rows) // batch_size) * settings.epochs),
        output=run.checkpoints,
        batch_size=batch_size,
        metric=run.metric if run.validate else None,
        evaluation_steps=run.evaluation_steps,
        save_steps=run.save_steps,
        save_limit=run.save_limit,
        report_to=run.report_to,
        show_progress=run.show_progress,
    )
    arguments["learning_rate"] = getattr(settings, _rate(run))
    callbacks = []
    if run.validate and run.patience is not None:
        callbacks.append(EarlyStoppingCallback(run.patience))
    trainer = _Trainer(
        model=model,
        args=CrossEncoderTrainingArguments(**arguments, batch_sampler=LengthBatches),
        train_dataset=datasets.Dataset.from_list(list(rows)),
        loss=_loss(model, run.loss),
        evaluator=_Validation(run.validate) if run.validate else None,
        callbacks=callbacks,
    )
    # It prints each log line to standard output, which belongs to the caller.
    trainer.remove_callback(PrinterCallback)
    return trainer


def _documents(rows: Sequence[Row]) -> int:
    """Return how many documents the longest row has."""
    return max(
        len(row["documents"]) if "documents" in row else len(row.keys() - {"query", "label"})
        for row in rows
    )


def _loss(model: CrossEncoder, loss: Any) -> Any:
    if isinstance(loss, str):
        return LOSS_CLASSES[loss](model)
    return loss


class _Trainer(CrossEncoderTrainer):
    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Collect nothing for a model card: `ft_core.artifacts` writes its own."""


class _Validation(BaseEvaluator):
    def __init__(self, validate: Callable[[CrossEncoder], Mapping[str, float]]) -> None:
        super().__init__()
        self._validate = validate

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Return metric name to value."""
        return dict(self._validate(model))


class LengthBatches(DefaultBatchSampler):
    """Random batches of rows of like length, so that little of a batch is padding.

    Rows are shuffled, exchanged within some fifty batches, and the batches shuffled again;
    epoch and seed decide how, so that a run that goes on sees what it would have seen.
    """

    def __init__(self, dataset: Any, batch_size: int, **kwargs: Any) -> None:
        order = torch.utils.data.SequentialSampler(dataset)
        super().__init__(order, batch_size=batch_size, drop_last=kwargs.pop("drop_last", False))
        self._seed = kwargs.get("seed", 0)
        self._lengths = [_length(row) for row in dataset]

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the row numbers of each batch."""
        rng = random.Random(f"{self._seed} {getattr(self, 'epoch', 0)}")
        rows = list(range(len(self._lengths)))
        rng.shuffle(rows)
        batches = []
        for part in _chunks(rows, self.batch_size * _WINDOW):
            alike = sorted(part, key=self._lengths.__getitem__)
            batches += list(_chunks(alike, self.batch_size))
        rng.shuffle(batches)
        if self.drop_last:
            batches = [batch for batch in batches if len(batch) == self.batch_size]
        yield from batches

    def __len__(self) -> int:
        """Return the number of batches."""
        size = int(self.batch_size)
        return len(self._lengths) // size if self.drop_last else -(-len(self._lengths) // size)


def _length(row: Row) -> int:
    """Return the characters of a row's longest text."""
    columns = [row[name] for name in row if name != "label"]
    texts = [[text] if isinstance(text, str) else text for text in columns]
    longest: int = max(len(text) for text in itertools.chain.from_iterable(texts))
    return longest


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def custom_loss(model: CrossEncoder, loss: Any) -> Any:
    """Return a caller's loss: made by the class or function given, or the object itself.

    Raises:
        ArgumentError: it is neither, or cannot be made.
    """
    if isinstance(loss, torch.nn.Module):
        loss.model = model  # it was made with another, or none
        return loss
    try:
        made = loss(model)
    except Exception as error:
        raise ArgumentError(
            "loss", f"{loss!r} cannot be called with the model: {first_line(error)}"
        ) from error
    if not isinstance(made, torch.nn.Module):
        raise ArgumentError("loss", f"{loss!r} returned a {type(made).__name__}, no loss")
    return made


def rows_of(loss: Any) -> str:
    """Return the name in `LOSSES` of the loss whose rows a loss object takes."""
    return _LIKE.get(type(loss).__name__, "binary_cross_entropy")
