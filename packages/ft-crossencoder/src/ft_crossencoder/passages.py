"""Cut long texts into overlapping passages, each short enough to be read whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from ft_core.errors import ArgumentError

_OVERLAP = 0.25  # share of a passage that the next one repeats, at least
_BLOCK = 1000  # texts that are tokenized at a time: where tokens stand takes far more than a text


def split_passages(tokenizer: Any, texts: Sequence[str], tokens: int) -> list[list[str]]:
    """Return the passages of each text, in order; a text that fits is its own only one.

    The passages of a text have one length and are spread evenly over it, so that none is a
    short rest. Each repeats at least a quarter of the one before, so that what stands on a
    border stands whole in one of the two.

    Args:
        tokenizer: a fast tokenizer of transformers, which tells where its tokens stand.
        texts: any texts.
        tokens: in a passage, at most; without what the tokenizer adds around a text.

    Raises:
        ArgumentError: the tokenizer does not tell where its tokens stand.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ArgumentError(
            "passage_tokens", "needs a model with a fast tokenizer; the engine takes 0, for none"
        )
    return [
        [text[start:end] for start, end in _spans(offsets, tokens)]
        if len(offsets) > tokens
        else [text]
        for block in _blocks(texts)
        for text, offsets in zip(
            block, _encoded(tokenizer, block, offsets=True)["offset_mapping"], strict=True
        )
    ]


def token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Return the tokens of each text, without what the tokenizer adds around it."""
    return [
        len(tokens)
        for block in _blocks(texts)
        for tokens in _encoded(tokenizer, block)["input_ids"]
    ]


def _blocks(texts: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(texts), _BLOCK):
        yield list(texts[start : start + _BLOCK])


def _encoded(tokenizer: Any, texts: list[str], *, offsets: bool = False) -> Any:
    return tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=offsets,
        return_attention_mask=False,
        truncation=False,
        verbose=False,
    )


def _spans(offsets: Sequence[tuple[int, int]], tokens: int) -> list[tuple[int, int]]:
    """Return where the passages of a long text begin and end, in characters."""
    stride = tokens * (1 - _OVERLAP)
    count = 1 + math.ceil((len(offsets) - tokens) / stride)
    last = len(offsets) - tokens
    starts = [round(last * number / (count - 1)) for number in range(count)]
    return [(offsets[start][0], offsets[start + tokens - 1][1]) for start in starts]
