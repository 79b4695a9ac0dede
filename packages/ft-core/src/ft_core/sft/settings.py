"""How a causal language model is trained: the numbers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ft_core.errors import ArgumentError


@dataclass(frozen=True)
class SFTSettings:
    """The numbers of a training run.

    Raises:
        ArgumentError: names the first number that is out of range, and what would do.
    """

    epochs: int = 3
    """Passes over the training examples."""
    learning_rate: float = 2e-4
    """Peak, reached after the warm-up; ten times lower suits training all weights."""
    batch_size: int = 8
    """Examples per optimiser step, over all processes; packed sequences with `packing`."""
    device_batch_size: int | None = None
    """Examples that one device takes at a time; gradients add up to `batch_size`. None picks
    what is cheap: on a CPU about 1,024 tokens, so that little is padding."""
    max_length: int | None = None
    """Tokens per example; of a longer one the beginning of the prompt is cut off. None is the
    model's own window."""
    lora_rank: int | None = 16
    """Rank of the low-rank updates (LoRA, Hu et al. 2021, arXiv:2106.09685) to all linear
    layers; None trains all weights."""
    lora_alpha: float | None = None
    """The updates count `lora_alpha / lora_rank`; None is twice the rank."""
    lora_dropout: float = 0.0
    scheduler: str = "cosine"
    """Any name of transformers' `lr_scheduler_type`."""
    warmup_ratio: float = 0.1
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Longer gradients are shortened to this."""
    packing: bool = False
    """Put several examples into one sequence of `max_length` (without it, of the longest
    example), each seeing only itself. Saves padding on a GPU with many short examples."""
    gradient_checkpointing: bool | None = None
    """Compute activations anew in the backward pass: half the memory, a third more time.
    None: on a GPU only."""
    load_in_4bit: bool = False
    """Hold the base model in 4 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314); needs a
    GPU and bitsandbytes."""
    precision: str = "auto"
    """`fp32`, `bf16`, `fp16`, or `auto`: bf16 where the hardware multiplies in it."""
    early_stopping_patience: int | None = None
    """Evaluations without a better validation loss before training stops; None never does."""
    eval_steps: int | None = None
    """Optimiser steps between evaluations and checkpoints; None is once an epoch."""
    seed: int = 42

    def __post_init__(self) -> None:
        """Check every number."""
        whole = ("epochs", "batch_size", "device_batch_size", "max_length", "lora_rank")
        for name in (*whole, "early_stopping_patience", "eval_steps"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ArgumentError(name, f"is a whole number from 1, not {value!r}")
        for name in ("learning_rate", "max_grad_norm", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < math.inf):
                raise ArgumentError(name, f"is a number above 0, not {value!r}")
        for name in ("warmup_ratio", "lora_dropout", "weight_decay"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value < 1):
                raise ArgumentError(name, f"is at least 0 and below 1, not {value!r}")
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise ArgumentError("precision", f"is auto, fp32, bf16 or fp16, not {self.precision!r}")
        if self.load_in_4bit and self.lora_rank is None:
            raise ArgumentError("load_in_4bit", "holds the base model fixed; give a lora_rank")
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise ArgumentError("seed", f"is a whole number from 0 below 2**32, not {self.seed!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as `ft.json` records them."""
        return asdict(self)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
