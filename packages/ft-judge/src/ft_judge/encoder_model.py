"""An encoder that scores: loading it, turning texts into its tokens, and what it says of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from ft_core.errors import ArgumentError, first_line
from ft_core.training import device_named, quiet_unless_terminal
from ft_judge.encoder_rows import Row, Texts

logger = logging.getLogger(__name__)

CHUNK = 8
"""Texts in a pass of the encoder on a CPU: of like length, so that little is padding."""

_WINDOW = 512  # tokens, where neither the model nor its tokenizer tells


def load_encoder(source: str, device: Any = None, seed: int = 0) -> tuple[Any, Any, bool]:
    """Load a cross-encoder with one score from the hub or a folder; also any plain encoder.

    Returns:
        The model, its tokenizer, and whether it came with a head. One without gets a fresh one.

    Raises:
        ArgumentError: there is no such model, or it cannot be loaded; or no such `device`.
    """
    place = device_named(device)
    try:
        with quiet_unless_terminal(), _without_report():
            config = AutoConfig.from_pretrained(source)
            kinds = config.architectures or ()
            classifies = any(name.endswith("ForSequenceClassification") for name in kinds)
            has_head = classifies and config.num_labels == 1
            if not has_head:
                set_seed(seed)  # of its fresh weights
            model, report = AutoModelForSequenceClassification.from_pretrained(
                source,
                num_labels=1,
                dtype=torch.float32,
                ignore_mismatched_sizes=not has_head,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise ArgumentError(
            "student", f"{source!r} cannot be loaded as an encoder: {first_line(error)}"
        ) from error
    if has_head and report["missing_keys"]:
        lacking = ", ".join(sorted(report["missing_keys"])[:3])
        raise ArgumentError("student", f"{source!r} is damaged: it has no weights for {lacking}")
    if tokenizer.pad_token_id is None:
        raise ArgumentError("student", f"{source!r}: its tokenizer has no padding token")
    try:
        model = model.to(place)
    except (AssertionError, RuntimeError) as error:  # a device that this machine lacks
        raise ArgumentError("device", f"{device!r} cannot be used: {first_line(error)}") from error
    return model.eval(), tokenizer, has_head


def window(encoder: Any, tokenizer: Any) -> int:
    """Return how many tokens an encoder can read."""
    limits = [tokenizer.model_max_length]
    positions = getattr(encoder.config, "max_position_embeddings", None)
    if positions:
        # RoBERTa and its like count positions from behind the padding's.
        found = (m for n, m in encoder.named_modules() if n.endswith("position_embeddings"))
        padding = getattr(next(found, None), "padding_idx", None)
        limits.append(positions - (0 if padding is None else padding + 1))
    limit = min(limits)
    return int(limit) if limit < 1_000_000 else _WINDOW  # a tokenizer may say "endless"


@dataclass(frozen=True)
class Read:
    """A lesson in tokens."""

    inputs: list[dict[str, list[int]]]
    """Of each text, what the tokenizer returns."""
    target: float


class Reader:
    """Turns texts into tokens, and counts those that are too long.

    Args:
        tokenizer: of the model.
        max_length: tokens of a question and an answer; the longer one's end is cut first.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self.count = self.cut = 0

    def rows(self, rows: Sequence[Row]) -> list[Read]:
        """Return lessons in tokens."""
        inputs = iter(self.inputs([texts for row in rows for texts in row.texts]))
        return [Read([next(inputs) for _ in row.texts], row.target) for row in rows]

    def inputs(self, texts: Sequence[Texts]) -> list[dict[str, list[int]]]:
        """Return each text's tokens, cut to what is read."""
        if not texts:
            return []
        questions, answers = map(list, zip(*texts, strict=True))
        whole = self._tokenizer(questions, answers, verbose=False)["input_ids"]
        self.count += len(whole)
        self.cut += sum(len(tokens) > self._max_length for tokens in whole)
        encoded = self._tokenizer(
            questions, answers, truncation="longest_first", max_length=self._max_length
        )
        return [{name: encoded[name][i] for name in encoded} for i in range(len(texts))]

    def warn_of_cuts(self) -> float:
        """Say how many texts are too long to be read whole, and return their share."""
        if self.cut:
            logger.warning(
                "%d of %d answers (%.0f%%) do not fit, with their question, into the %d tokens "
                "that the model reads: the end of the longer of the two is cut",
                self.cut,
                self.count,
                100 * self.cut / self.count,
                self._max_length,
            )
        return self.cut / max(1, self.count)


def scores_of(encoder: Any, tokenizer: Any, rows: Sequence[Read]) -> NDArray[np.float64]:
    """Return what a model says of lessons: of a pair, by how much the first is better."""
    inputs = [each for row in rows for each in row.inputs]
    if not inputs:
        return np.zeros(0)
    training = encoder.training
    encoder.eval()
    with torch.inference_mode():
        parts, order = padded(tokenizer, inputs, 2 * CHUNK)
        found = torch.cat([score_part(encoder, part) for part in parts])[order]
    encoder.train(training)
    scores: NDArray[np.float64] = found.double().cpu().numpy()
    pairs = len(inputs) == 2 * len(rows)
    return scores[0::2] - scores[1::2] if pairs else scores


def score_part(encoder: Any, part: Mapping[str, Any]) -> Any:
    """Return the scores of padded texts, shape (texts,), in single precision."""
    inputs = {name: values.to(encoder.device) for name, values in part.items()}
    return encoder(**inputs).logits[:, 0].float()


def padded(
    tokenizer: Any, inputs: Sequence[Mapping[str, Any]], chunk: int
) -> tuple[list[dict[str, Any]], Any]:
    """Return texts as tensors, in parts of like length with at most `chunk` each, and an order.

    What is said of the parts, joined and indexed by the order, is in the order of the texts.
    """
    by_length = sorted(range(len(inputs)), key=lambda at: len(inputs[at]["input_ids"]))
    parts = []
    for start in range(0, len(by_length), chunk):
        texts = [inputs[at] for at in by_length[start : start + chunk]]
        tensors = tokenizer.pad(texts, return_tensors="pt", verbose=False)
        parts.append({name: tensors[name] for name in tensors})
    return parts, torch.argsort(torch.tensor(by_length))


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers from warning of a head that is missing on purpose."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
