"""How a cross-encoder is trained: the numbers, with defaults chosen on data no report shows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ft_core.errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What `CrossEncoderFinetuneEngine` trains with.

    Raises:
        ArgumentError: a value is out of its range.
    """

    epochs: int = 1
    """Passes over the training pairs."""
    batch_size: int = 32
    """Pairs of a query and a document in a step; of a loss that compares the documents of a
    query, so many queries as have that many documents."""
    learning_rate: float = 1e-4
    """Peak; reached after the warm-up."""
    scheduler: str = "linear"
    """Any name of transformers' `lr_scheduler_type`."""
    warmup_ratio: float = 0.1
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.01
    dropout: float = 0.0
    """In the encoder. Off: attention without it runs in a fused kernel, twice as fast on a
    CPU, and a teacher's scores are learned exactly."""
    frozen_share: float = 0.0
    """Share of the encoder's layers, from the lowest, that stay as they are together with
    the token embeddings. Ignored with LoRA."""
    negatives: int = 7
    """Documents that are not relevant, for each relevant one that a query is trained on."""
    passage_tokens: int = 100
    """Longer documents are read in overlapping passages of so many tokens, in training and in
    use, and the best counts; 0 reads what the model's window holds of a document, from its
    beginning."""
    head_pairs: int = 6000
    """Pairs of a query and a passage from which a head that the base model lacks is learned
    first, on scores of an embedding model; 0 goes without."""
    head_learning_rate: float = 2e-4
    """Peak while the head is learned."""
    max_length: int | None = None
    """Tokens of a pair; the model's own limit by default."""
    precision: str = "auto"
    """Of training: `fp32`, `bf16`, `fp16`, or `auto`: bf16 where the hardware multiplies in
    it."""
    seed: int = 42

    def __post_init__(self) -> None:
        for name, lowest in (
            ("epochs", 1),
            ("batch_size", 2),
            ("negatives", 1),
            ("passage_tokens", 0),
            ("head_pairs", 0),
            ("max_length", 8),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < lowest):
                raise ArgumentError(name, f"is a whole number from {lowest}, not {value!r}")
        for name in ("learning_rate", "head_learning_rate"):
            if not getattr(self, name) > 0:
                raise ArgumentError(name, f"is above 0, not {getattr(self, name)!r}")
        for name in ("warmup_ratio", "weight_decay", "dropout", "frozen_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ArgumentError(name, f"is at least 0 and below 1, not {getattr(self, name)!r}")
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise ArgumentError("precision", f"is auto, fp32, bf16 or fp16, not {self.precision!r}")

    @classmethod
    def of(cls, **given: Any) -> TrainingSettings:
        """Return the defaults with what is given and not None."""
        return cls(**{name: value for name, value in given.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as `ft.json` records them."""
        return asdict(self)
