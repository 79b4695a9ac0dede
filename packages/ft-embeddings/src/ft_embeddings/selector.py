"""Pick the choice whose text is nearest to the query, with each choice embedded only once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from llama_index.core.base.base_selector import BaseSelector, SelectorResult, SingleSelection
from numpy.typing import NDArray

from ft_core.choices import choice_text, choice_texts
from ft_core.errors import ArgumentError, FTError

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.schema import QueryBundle
    from llama_index.core.tools.types import ToolMetadata

_Vector: TypeAlias = "NDArray[np.float32]"


class EmbeddingSelector(BaseSelector):
    """A selector for `RouterQueryEngine` that embeds one text per selection: the query.

    LlamaIndex's `EmbeddingSingleSelector` embeds every choice at every call; this one keeps
    the choices' vectors. Scores are cosine similarities. Thread- and asyncio-safe: a choice is
    embedded once, however many selections wait for it.

    Args:
        embed_model: embeds queries (`get_query_embedding`) and choices (as texts).
        top_k: how many choices to select, best first; all where there are fewer.
        choice_text: what to embed of a choice: one text, or several examples, of which the
            nearest counts. By default its description, or else its name.
        cache_size: how many texts to keep vectors of; the oldest go first.

    Raises:
        ArgumentError: at selection: there are no choices, or one has no text.
        FTError: at selection: the model returns a vector that is not finite.
    """

    def __init__(
        self,
        embed_model: BaseEmbedding,
        *,
        top_k: int = 1,
        choice_text: Callable[[ToolMetadata], str | Sequence[str]] = choice_text,
        cache_size: int = 10_000,
    ) -> None:
        if top_k < 1:
            raise ArgumentError("top_k", f"is at least 1, not {top_k}")
        self._embed_model = embed_model
        self._top_k = top_k
        self._choice_text = choice_text
        self._cache_size = cache_size
        self._vectors: dict[str, _Vector] = {}
        self._lock = threading.Lock()

    @property
    def embed_model(self) -> BaseEmbedding:
        """The model, fixed: vectors of two models must not meet."""
        return self._embed_model

    def clear_cache(self) -> None:
        """Forget the choices' vectors, where the model's weights were changed in place."""
        with self._lock:
            self._vectors = {}

    def _get_prompts(self) -> dict[str, Any]:
        return {}

    def _update_prompts(self, prompts: dict[str, Any]) -> None:
        """There are none."""

    def _select(self, choices: Sequence[ToolMetadata], query: QueryBundle) -> SelectorResult:
        texts = choice_texts(choices, self._choice_text)
        vectors = self._embed(texts)
        asked = self._embed_model.get_query_embedding(query.query_str)
        return self._result(choices, texts, vectors, asked)

    async def _aselect(self, choices: Sequence[ToolMetadata], query: QueryBundle) -> SelectorResult:
        texts = choice_texts(choices, self._choice_text)
        # In a thread, for the lock that keeps two tasks from embedding the same choices.
        vectors = self._kept(texts)
        if vectors is None:
            vectors = await asyncio.to_thread(self._embed, texts)
        asked = await self._embed_model.aget_query_embedding(query.query_str)
        return self._result(choices, texts, vectors, asked)

    def _kept(self, texts: list[list[str]]) -> dict[str, _Vector] | None:
        """Return the vector of every text, or None when one is still to be embedded."""
        vectors = self._vectors
        wanted = {text for some in texts for text in some}
        return {text: vectors[text] for text in wanted} if wanted <= vectors.keys() else None

    def _embed(self, texts: list[list[str]]) -> dict[str, _Vector]:
        with self._lock:
            wanted = dict.fromkeys(text for some in texts for text in some)
            missing = [text for text in wanted if text not in self._vectors]
            if missing:
                embedded = self._embed_model.get_text_embedding_batch(missing)
                new = {
                    text: _unit(vector, f"of the choice {text!r}")
                    for text, vector in zip(missing, embedded, strict=True)
                }
                # A new dict, so that `_kept` may read without the lock.
                kept = self._vectors | new
                surplus = len(kept) - max(self._cache_size, len(wanted))
                for text in [text for text in kept if text not in wanted][: max(0, surplus)]:
                    del kept[text]
                self._vectors = kept
            return {text: self._vectors[text] for text in wanted}

    def _result(
        self,
        choices: Sequence[ToolMetadata],
        texts: list[list[str]],
        vectors: dict[str, _Vector],
        query: Sequence[float],
    ) -> SelectorResult:
        matrix = np.stack([vectors[text] for some in texts for text in some])
        asked = _unit(query, "of the query")
        if len(asked) != matrix.shape[1]:
            raise FTError(
                f"the model's query vector has {len(asked)} dimensions, its text vectors "
                f"{matrix.shape[1]}"
            )
        starts = np.cumsum([0, *(len(some) for some in texts[:-1])])
        scores = np.maximum.reduceat(matrix @ asked, starts)
        best = np.argsort(-scores, kind="stable")[: self._top_k]
        return SelectorResult(
            selections=[
                SingleSelection(
                    index=int(index),
                    reason=f"Nearest to {choices[index].name or texts[index][0]!r}: "
                    f"cosine similarity {scores[index]:.3f}",
                )
                for index in best
            ]
        )


def _unit(vector: Sequence[float], what: str) -> _Vector:
    array = np.asarray(vector, dtype=np.float32)
    norm = float(np.linalg.norm(array))
    if not np.isfinite(norm):
        raise FTError(f"the model's vector {what} is not finite; check the model")
    return array / norm if norm else array
