"""How an adapter is trained: one frozen object, with defaults chosen on two filings.

They were chosen on two tasks that no report shows (see the README).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ft_core.errors import ArgumentError
from ft_core.metrics import parse_metric

Loss = Literal["full_corpus", "in_batch", "hard_negatives", "margin"]
Sides = Literal["query", "both"]

LOSSES: tuple[str, ...] = get_args(Loss)
DEPTH = 100
"""Documents in a ranking, as in `ft_core.evaluation`."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What `EmbeddingAdapterFinetuneEngine` trains with.

    Raises:
        ArgumentError: a value is out of its range.
    """

    epochs: int = 30
    """Passes over the pairs, at most: the best epoch is kept."""
    batch_size: int = 64
    """Pairs of a query and a relevant document in a step."""
    learning_rate: float = 3e-4
    """Of AdamW; it rises over the first epoch and then stays, so that each epoch is a
    candidate of its own, whatever their number."""
    weight_decay: float = 0.0
    """Pulls every weight back to where it started, in each step by this share of the
    learning rate."""
    identity_pull: float = 1.0
    """Weight of the mean squared distance between adapted and original unit vectors in the
    loss: how dear a change is. Where the dimension changes there is none to measure."""
    loss: Loss = "full_corpus"
    """What a query's document is told apart from: `full_corpus`, by softmax, from all
    documents that answer any training question; `in_batch` from those of the batch;
    `hard_negatives` from mined ones; `margin` by a hinge on the difference of cosines, from
    mined negatives where there are any and else as `full_corpus`."""
    scale: float = 20.0
    """Factor of the cosine in a softmax, the inverse of its temperature."""
    margin: float = 0.1
    """Cosine by which `margin` wants the document above all others."""
    sides: Sides = "query"
    """`both` adapts the documents too: stronger, but their index must be built anew."""
    folds: int = 5
    """Parts of the training queries that are held out in turn where there is no
    `val_dataset`."""
    early_stopping_patience: int = 10
    """Epochs without a better one on held-out queries, after which training stops; 0 never."""
    significance: float = 0.05
    """An adapter is kept only if chance alone would look as good less often than this."""
    metric: str = "ndcg@10"
    """What decides, on held-out queries."""
    seed: int = 42
    """Of batches, folds and weights."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            _check(name, isinstance(value, int) and value >= 1, "is a whole number from 1", value)
        for name in ("learning_rate", "scale"):
            _check(name, getattr(self, name) > 0, "is above 0", getattr(self, name))
        for name in (
            "weight_decay",
            "identity_pull",
            "margin",
            "seed",
            "early_stopping_patience",
        ):
            _check(name, getattr(self, name) >= 0, "is at least 0", getattr(self, name))
        _check("folds", self.folds >= 2, "is at least 2", self.folds)
        _check("significance", 0 < self.significance <= 1, "lies in (0, 1]", self.significance)
        k = parse_metric(self.metric).k
        _check("metric", k is None or k <= DEPTH, f"has at most @{DEPTH}", self.metric)
        _check("loss", self.loss in LOSSES, f"is one of {', '.join(LOSSES)}", self.loss)
        _check("sides", self.sides in get_args(Sides), "is query or both", self.sides)

    @classmethod
    def of(cls, **given: Any) -> TrainingSettings:
        """Return the defaults with what is given and not None."""
        return cls(**{name: value for name, value in given.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return asdict(self)


def _check(name: str, holds: bool, rule: str, value: Any) -> None:
    if not holds:
        raise ArgumentError(name, f"{rule}, not {value!r}")
