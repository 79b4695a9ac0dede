"""How an encoder is trained to judge: the numbers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from typing_extensions import Self

from ft_core.errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """What an `EncoderJudgeStudent` trains with.

    Raises:
        ArgumentError: a value is out of its range.
    """

    epochs: int = 4
    """Passes over the judgements."""
    learning_rate: float = 1e-4
    """Peak, reached after the warm-up; with LoRA, ten times as much suits."""
    batch_size: int = 16
    """Pairs, or graded answers, in a step."""
    scheduler: str = "linear"
    """Any name of transformers' `lr_scheduler_type`."""
    warmup_ratio: float = 0.1
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.01
    dropout: float = 0.0
    """In the encoder and its head. On a CPU it more than doubles the time of training: attention
    with dropout is computed in the plain way, with a random number for each weight."""
    frozen_share: float = 0.0
    """Share of the encoder's layers, from the lowest, that stay as they are together with the
    token embeddings. Ignored with LoRA."""
    max_length: int | None = None
    """Tokens of a question and an answer; the model's own window by default. What is beyond is
    cut from the end of the longer of the two."""
    validation_share: float = 0.1
    """Share of the judgements, by question, that is not learned from where there is no
    `val_data`: the temperature and the threshold of ties are fitted to it. 0 leaves the
    probabilities as they are."""
    early_stopping_patience: int | None = None
    """Epochs without a better validation loss before training stops; the best epoch is kept
    then. None keeps the last."""
    precision: str = "auto"
    """Of training: `fp32`, `bf16`, `fp16`, or `auto`: bf16 where the hardware multiplies in it.
    A trained judge computes in fp32."""
    seed: int = 42

    def __post_init__(self) -> None:
        """Check every number."""
        for name, lowest in (
            ("epochs", 1),
            ("batch_size", 1),
            ("max_length", 8),
            ("early_stopping_patience", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            optional = name in ("max_length", "early_stopping_patience")
            if not (value is None and optional) and (type(value) is not int or value < lowest):
                raise ArgumentError(name, f"is a whole number from {lowest}, not {value!r}")
        if self.seed >= 2**32:
            raise ArgumentError("seed", f"is below 2**32, not {self.seed!r}")
        rate = self.learning_rate
        if not (_is_number(rate) and 0 < rate < math.inf):
            raise ArgumentError("learning_rate", f"is a number above 0, not {rate!r}")
        for name in ("warmup_ratio", "weight_decay", "dropout", "frozen_share", "validation_share"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value < 1):
                raise ArgumentError(name, f"is at least 0 and below 1, not {value!r}")
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise ArgumentError("precision", f"is auto, fp32, bf16 or fp16, not {self.precision!r}")

    @classmethod
    def of(cls, given: dict[str, Any]) -> Self:
        """Return the defaults with what is given.

        Raises:
            ArgumentError: there is no such setting.
        """
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise ArgumentError(
                    name, f"is no argument of an encoder, whose settings are {', '.join(known)}"
                )
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as `ft.json` records them."""
        return asdict(self)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
