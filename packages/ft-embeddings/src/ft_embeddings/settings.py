"""How an embedding model is trained: the numbers, and the presets that name good ones."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ft_core.errors import ArgumentError

LOSSES = (
    "multiple_negatives_ranking",
    "cached_multiple_negatives_ranking",
    "gist",
    "matryoshka",
)


@dataclass(frozen=True)
class TrainingSettings:
    """The numbers of a training run; `PRESETS` holds the ones with a name.

    The defaults were chosen on tasks that no benchmark of this project reports.
    """

    epochs: int = 3
    """Passes over the training pairs."""
    batch_size: int = 32
    """Documents per batch, each with all (up to four) of its queries."""
    learning_rate: float = 2e-4
    """Peak; reached after the warm-up."""
    scheduler: str = "linear"
    """Any name of transformers' `lr_scheduler_type`."""
    warmup_ratio: float = 0.1
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.01
    scale: float = 20.0
    """Factor on the cosine similarity in the loss, the inverse of the temperature."""
    dropout: float = 0.0
    """In the encoder. Off by default: a few epochs hardly over-fit, and attention without
    it runs in a fused kernel, twice as fast on a CPU."""
    frozen_share: float = 1 / 3
    """Share of the encoder's layers, from the lowest, that stay as they are together with
    the token embeddings. Ignored with LoRA."""
    base_weight: float = 0.5
    """Share of the base model in the weights that are kept. Above 0, the result gives up some
    of its gain on passages that had training questions and keeps more of what the base knew
    of others (WiSE-FT, Wortsman et al. 2021, arXiv:2109.01903)."""
    max_length: int | None = None
    """Tokens per text in training; the model's own limit by default, which always holds
    for the model that is returned."""
    precision: str = "auto"
    """`fp32`, `bf16`, `fp16`, or `auto`: bf16 where the hardware multiplies in it."""
    seed: int = 42

    def __post_init__(self) -> None:
        """Check every number.

        Raises:
            ArgumentError: names the argument and the values that it takes.
        """
        for name, lowest in (("epochs", 1), ("batch_size", 2), ("max_length", 8)):
            value = getattr(self, name)
            if value is not None and (value != int(value) or value < lowest):
                raise ArgumentError(name, f"is a whole number from {lowest}, not {value!r}")
        for name in ("learning_rate", "scale"):
            if not getattr(self, name) > 0:
                raise ArgumentError(name, f"is above 0, not {getattr(self, name)!r}")
        for name in ("warmup_ratio", "dropout", "frozen_share", "base_weight"):
            if not 0 <= getattr(self, name) < 1:
                raise ArgumentError(name, f"is at least 0 and below 1, not {getattr(self, name)!r}")
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise ArgumentError("precision", f"is auto, fp32, bf16 or fp16, not {self.precision!r}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> TrainingSettings:
        """Return a preset with the given numbers in place of its own; None keeps its own.

        Raises:
            ArgumentError: there is no such preset or setting, or a number is out of range.
        """
        if name not in PRESETS:
            raise ArgumentError("preset", f"is one of {', '.join(PRESETS)}, not {name!r}")
        known = {field.name for field in fields(cls)}
        for setting in changes:
            if setting not in known:
                raise ArgumentError(setting, f"is no setting; there are {', '.join(sorted(known))}")
        return replace(PRESETS[name], **{k: v for k, v in changes.items() if v is not None})

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as `ft.json` records them."""
        return asdict(self)


PRESETS = {
    "default": TrainingSettings(),
    "fast": TrainingSettings(epochs=1, batch_size=16),
}
