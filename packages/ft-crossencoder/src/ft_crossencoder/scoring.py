"""Score (query, text) pairs with a cross-encoder, in batches of texts of like length."""

from __future__ import annotations

import copy
import math
import threading
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ft_core.errors import ArgumentError, FTError, first_line
from ft_core.extras import import_extra
from ft_core.onednn import quick_products
from ft_crossencoder.passages import split_passages

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

Backend = Literal["torch", "onnx"]
"""What computes: PyTorch, or ONNX Runtime, which is quicker on many CPUs."""

Precision = Literal["fp32", "bf16"]
"""What the model's large products are computed in."""

MAX_TOKENS = 8192
"""Tokens in a batch, padding included, where the caller says nothing."""

_MAX_PAIRS = 256  # in a batch, however short: more gain nothing
_BATCH_COST = 48  # what starting a batch costs, in tokens' worth of computing


class PairScores(NamedTuple):
    """What a cross-encoder says of pairs, in their order."""

    scores: list[float]
    """Behind the model's activation, as `CrossEncoder.predict` returns them."""
    logits: list[float]
    """Before it: where a sigmoid says 1.0 of two pairs, these still differ."""


class PairScorer:
    """Scores pairs as `CrossEncoder.predict` does, quicker where lengths differ.

    The pairs are sorted by their length in tokens and cut into the batches that cost the least
    padding. Safe with threads: one batch is computed at a time, so that memory is bounded by
    `max_tokens` however many callers there are.

    Args:
        model: a `CrossEncoder`, or the hub name or folder of one.
        device: where to compute; by default where sentence-transformers puts it.
        max_length: tokens of a pair that are read, at most what the model was made for, which
            is the default. What is beyond is cut, of the longer of the two texts first.
        passage_tokens: read longer texts in overlapping passages of so many tokens; the best
            one's score is the text's (MaxP, Dai and Callan 2019, arXiv:1905.09217). None, the
            default, reads the beginning of a text, as `CrossEncoder.predict` does.
        max_tokens: tokens in a batch, padding included. One pair is never split.
        precision: "fp32", or "bf16", which is quicker where the hardware multiplies in it, and
            less exact.
        quantize: 8-bit weights in the linear layers (dynamic quantisation), on the CPU: less
            memory and, on most, quicker; the scores change a little. A model that was given as
            an object is copied.
        backend: "torch", or "onnx" with the extra `ft-crossencoder[onnx]`, on the CPU: PyTorch
            exports the model at each start, which takes seconds, and a scorer cannot be pickled.
        trust_remote_code: let the model's repository bring code of its own.

    Raises:
        ArgumentError: an argument cannot be used, the model is none that gives one score, or
            PyTorch cannot export it for the backend "onnx".
        MissingExtraError: the backend is "onnx" and its packages are not installed.
    """

    def __init__(
        self,
        model: str | CrossEncoder,
        *,
        device: str | None = None,
        max_length: int | None = None,
        passage_tokens: int | None = None,
        max_tokens: int = MAX_TOKENS,
        precision: Precision = "fp32",
        quantize: bool = False,
        backend: Backend = "torch",
        trust_remote_code: bool = False,
    ) -> None:
        for name, value in (
            ("max_length", max_length),
            ("passage_tokens", passage_tokens),
            ("max_tokens", max_tokens),
        ):
            if value is not None and value < 1:
                raise ArgumentError(name, f"must be at least 1, not {value}")
        if backend not in ("torch", "onnx"):
            raise ArgumentError("backend", f'is "torch" or "onnx", not {backend!r}')
        if quantize and device not in (None, "cpu"):
            raise ArgumentError("quantize", f'is for device="cpu", not {device!r}')
        if backend == "onnx" and device not in (None, "cpu"):
            raise ArgumentError("backend", f'"onnx" is for device="cpu", not {device!r}')
        if precision not in ("fp32", "bf16"):
            raise ArgumentError("precision", f'is "fp32" or "bf16", not {precision!r}')
        if precision == "bf16" and (quantize or backend == "onnx"):
            raise ArgumentError("precision", 'is for the backend "torch" without quantize')
        self.model = _loaded(model, device, backend, trust_remote_code)
        self.max_tokens = max_tokens
        self.passage_tokens = passage_tokens
        self._precision = precision
        labels = self.model.num_labels
        if labels != 1:
            raise ArgumentError(
                "model", f"gives {labels} scores a pair; a reranker's cross-encoder gives one"
            )
        self.max_length = window(self.model, max_length)
        if backend == "onnx":
            from ft_crossencoder.onnx_session import in_onnx

            self.model = in_onnx(self.model, quantize=quantize)
        elif quantize:
            self.model = _quantized(self.model)
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def score(self, pairs: Sequence[tuple[str, str]]) -> PairScores:
        """Return the scores of the pairs, in their order.

        Raises:
            FTError: the model gives a score that is not finite.
        """
        if not pairs:
            return PairScores([], [])
        if self.passage_tokens is None:
            return self._score_whole(pairs)
        texts = list(dict.fromkeys(text for _, text in pairs))
        with self._lock:
            cut = split_passages(self.model.tokenizer, texts, self.passage_tokens)
        passages = dict(zip(texts, cut, strict=True))
        whole = self._score_whole(
            [(query, passage) for query, text in pairs for passage in passages[text]]
        )
        starts = np.cumsum([0, *(len(passages[text]) for _, text in pairs[:-1])])
        # The activation does not change which passage is best.
        return PairScores(*(np.maximum.reduceat(values, starts).tolist() for values in whole))

    def _score_whole(self, pairs: Sequence[tuple[str, str]]) -> PairScores:
        lengths = self.lengths(pairs)
        scores, logits = np.empty(len(pairs)), np.empty(len(pairs))
        for batch in batches(lengths, self.max_tokens):
            scores[batch], logits[batch] = self._compute([pairs[index] for index in batch])
        if not np.isfinite(logits).all():
            place = int(np.flatnonzero(~np.isfinite(logits))[0])
            raise FTError(
                f"the cross-encoder's score of {pairs[place][0]!r:.60} and {pairs[place][1]!r:.60}"
                f" is {logits[place]}; check the model"
            )
        return PairScores(scores.tolist(), logits.tolist())

    def lengths(self, pairs: Sequence[tuple[str, str]]) -> list[int]:
        """Return the tokens of each pair, after cutting."""
        queries, texts = zip(*pairs, strict=True)
        with self._lock:  # a fast tokenizer keeps its settings in itself
            encoded = self.model.tokenizer(
                list(queries), list(texts), truncation=True, max_length=self.max_length
            )
        return [len(tokens) for tokens in encoded["input_ids"]]

    def _compute(self, pairs: list[tuple[str, str]]) -> tuple[Any, Any]:
        import torch

        # For this call only: the model may be the app's own.
        cut = {"text": {"max_length": self.max_length, "truncation": True}}
        with self._lock, self._autocast(), quick_products(self.model.device):
            logits = self.model.predict(
                pairs,
                batch_size=len(pairs),
                activation_fn=torch.nn.Identity(),
                convert_to_tensor=True,
                show_progress_bar=False,
                processing_kwargs=cut,
            )
        scores = self.model.activation_fn(logits)
        return scores.float().cpu().numpy(), logits.float().cpu().numpy()

    def _autocast(self) -> Any:
        import torch

        return torch.autocast(
            self.model.device.type, torch.bfloat16, enabled=self._precision == "bf16"
        )


def batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Cut items into batches of like length that cost the least in all.

    A batch costs its longest item times their number, plus a constant: fewer batches pad more,
    more batches start more often.

    Args:
        lengths: tokens of each item.
        max_tokens: what a batch may hold, padding included; one item alone may be longer.

    Returns:
        The indices of the items of each batch; every item is in one.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    best = [0.0]  # the least cost of the first n items in order
    starts = [0]  # where the last batch of that begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        most = min(_MAX_PAIRS, max(1, max_tokens // max(1, longest)), end)
        costs = [best[end - n] + n * longest + _BATCH_COST for n in range(1, most + 1)]
        count = min(range(most), key=costs.__getitem__) + 1
        best.append(costs[count - 1])
        starts.append(end - count)
    result = []
    end = len(order)
    while end:
        result.append(order[starts[end] : end])
        end = starts[end]
    return result  # the longest first: what does not fit into memory shows at once


def fused(
    scores: Sequence[float], retrieval: Sequence[float | None], weight: float
) -> NDArray[np.float64]:
    """Return the weighted sum of both kinds of score, each standardised over the one query.

    Args:
        scores: the cross-encoder's logits of one query's candidates.
        retrieval: the retriever's; a missing one counts as their mean.
        weight: of the retriever, from 0 to 1; the cross-encoder has the rest.
    """
    return (1 - weight) * _standardised(scores) + weight * _standardised(retrieval)


def _standardised(values: Sequence[float | None]) -> NDArray[np.float64]:
    array = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
    known = array[np.isfinite(array)]
    if not len(known) or known.std() < 1e-12:
        return np.zeros(len(array))
    standardised: NDArray[np.float64] = (array - known.mean()) / known.std()
    return np.where(np.isfinite(array), standardised, 0.0)


def _loaded(
    model: str | CrossEncoder, device: str | None, backend: Backend, trust_remote_code: bool
) -> Any:
    from sentence_transformers import CrossEncoder

    if backend == "onnx":  # before a large model is fetched in vain
        for module in ("onnxruntime", "onnx", "onnxscript"):
            import_extra(module, "ft-crossencoder[onnx]")
    if isinstance(model, CrossEncoder):
        return model if device is None else model.to(device)
    from ft_core.training import quiet_unless_terminal

    device = "cpu" if backend == "onnx" else device
    try:
        with quiet_unless_terminal():
            return CrossEncoder(str(model), device=device, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ArgumentError(
            "model", f"{model}: cannot be loaded as a cross-encoder: {first_line(error)}"
        ) from error


def window(model: Any, max_length: int | None) -> int:
    """Return how many tokens of a pair to read: the model's own limit, or less."""
    config = getattr(getattr(model, "model", None), "config", None)
    limits = [model.max_seq_length, getattr(config, "max_position_embeddings", None), max_length]
    return min(int(limit) for limit in limits if limit)


def _quantized(model: Any) -> Any:
    import torch

    quantize = getattr(getattr(torch.ao, "quantization", None), "quantize_dynamic", None)
    if quantize is None:
        raise ArgumentError(
            "quantize", f"PyTorch {torch.__version__} has no dynamic quantisation; leave it out"
        )
    model = copy.deepcopy(model).to("cpu")
    with warnings.catch_warnings():
        # PyTorch announces the end of this API since 2.8; the check above is for that day.
        warnings.simplefilter("ignore")
        # In place: sentence-transformers' own class must stay around the layers.
        quantize(model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
    return model
