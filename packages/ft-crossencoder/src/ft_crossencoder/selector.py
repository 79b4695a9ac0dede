"""Pick the choice that a cross-encoder scores highest for the query."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from llama_index.core.base.base_selector import BaseSelector, SelectorResult, SingleSelection

from ft_core.choices import choice_text, choice_texts
from ft_core.errors import ArgumentError
from ft_crossencoder.scoring import PairScorer

if TYPE_CHECKING:
    from llama_index.core.schema import QueryBundle
    from llama_index.core.tools.types import ToolMetadata
    from sentence_transformers import CrossEncoder


class CrossEncoderSelector(BaseSelector):
    """A selector for `RouterQueryEngine` that reads the query together with each choice.

    Slower than comparing embeddings, by one pair a choice, and more exact where choices differ
    in a word. Thread- and asyncio-safe.

    Args:
        model: hub name or folder of a cross-encoder, a `CrossEncoder`, or a `PairScorer` (a
            `FinetunedReranker` has one: `reranker.scorer`).
        top_k: how many choices to select at most, best first.
        threshold: of several, select only those with at least this score, and the best in any
            case: a router needs one.
        choice_text: what to read of a choice: one text, or several examples, of which the best
            counts. By default its description, or else its name.
        settings: further arguments of `PairScorer`.

    Raises:
        ArgumentError: an argument cannot be used; at selection: there are no choices, or one
            has no text.
        FTError: at selection: the model gives a score that is not finite.
    """

    def __init__(
        self,
        model: str | CrossEncoder | PairScorer,
        *,
        top_k: int = 1,
        threshold: float | None = None,
        choice_text: Callable[[ToolMetadata], str | Sequence[str]] = choice_text,
        **settings: Any,
    ) -> None:
        if top_k < 1:
            raise ArgumentError("top_k", f"is at least 1, not {top_k}")
        if isinstance(model, PairScorer):
            if settings:
                raise ArgumentError(next(iter(settings)), "is a setting of the PairScorer given")
            self._scorer = model
        else:
            self._scorer = PairScorer(model, **settings)
        self._top_k = top_k
        self._threshold = threshold
        self._choice_text = choice_text

    @property
    def scorer(self) -> PairScorer:
        """What computes the scores."""
        return self._scorer

    def _get_prompts(self) -> dict[str, Any]:
        return {}

    def _update_prompts(self, prompts: dict[str, Any]) -> None:
        """There are none."""

    def _select(self, choices: Sequence[ToolMetadata], query: QueryBundle) -> SelectorResult:
        texts = choice_texts(choices, self._choice_text)
        pairs = [(query.query_str, text) for some in texts for text in some]
        scores, logits = map(np.array, self._scorer.score(pairs))
        starts = np.cumsum([0, *(len(some) for some in texts[:-1])])
        order = np.argsort(-np.maximum.reduceat(logits, starts), kind="stable")
        best = [int(index) for index in order[: self._top_k]]
        highest = np.maximum.reduceat(scores, starts)
        if self._threshold is not None:
            best = [index for index in best if highest[index] >= self._threshold] or best[:1]
        return SelectorResult(
            selections=[
                SingleSelection(
                    index=index,
                    reason=f"The cross-encoder gives {choices[index].name or texts[index][0]!r} "
                    f"the score {highest[index]:.3f}",
                )
                for index in best
            ]
        )

    async def _aselect(self, choices: Sequence[ToolMetadata], query: QueryBundle) -> SelectorResult:
        return await asyncio.to_thread(self._select, choices, query)
