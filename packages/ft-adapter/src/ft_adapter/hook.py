"""Switch an adapter on and off in a live app."""

from __future__ import annotations

import logging
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_core.errors import ArgumentError, ArtifactError
from ft_core.hooks import find_components

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.indices.vector_store import VectorIndexRetriever

    from ft_adapter.embedding import AdapterEmbeddingModel

logger = logging.getLogger(__name__)


class AdapterHook:
    """Makes the vector retrievers of a live LlamaIndex app search with adapted queries.

    ```python
    hook = AdapterHook("adapter")
    hook.attach(query_engine)  # or `with hook.attach(query_engine): ...`
    hook.enabled = False  # the base model's vectors, until it is True again
    hook.detach()
    ```

    Each retriever's embedding model is replaced by an `AdapterEmbeddingModel` around that same
    model, so its client, callbacks and cache stay in use; the index is not touched. When the
    adapter fails, the query is searched with the base model's vector.

    Retrievers leave the vector that they search with in the query that they are given. Where
    others share that query (a fusion), attach to all of them, or wrap the one in an
    `AdaptedRetriever`. A query that comes with a vector is searched with that vector.

    Args:
        model: an adapter embedding model, or the folder of a saved adapter.

    Raises:
        ArgumentError: the adapter changes documents too.
        ArtifactError: the folder cannot be used.
    """

    def __init__(self, model: AdapterEmbeddingModel | Path | str) -> None:
        from ft_adapter.embedding import AdapterEmbeddingModel
        from ft_adapter.saved import SavedAdapter, load_adapter

        self._source: AdapterEmbeddingModel | SavedAdapter
        if isinstance(model, AdapterEmbeddingModel):
            self._source, both = model, model.transform_text
            self._enabled: bool = model.enabled
        elif isinstance(model, str | Path):
            self._source = load_adapter(model)
            both = self._source.sides == "both"
            self._enabled = True
        else:
            raise ArgumentError(
                "model",
                f"is an AdapterEmbeddingModel or a folder, not a {type(model).__name__}",
            )
        if both:
            raise ArgumentError(
                "model",
                "adapts documents too, and the index of a live app holds unadapted ones; build "
                "the index with an AdapterEmbeddingModel instead",
            )
        self._lock = threading.RLock()
        self._swaps: list[tuple[weakref.ref[Any], AdapterEmbeddingModel]] = []

    @property
    def enabled(self) -> bool:
        """Whether queries are adapted; switch it while the app runs."""
        return self._enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        with self._lock:
            self._enabled = enabled
            for _, model in self._swaps:
                model.enabled = enabled

    def attach(self, target: Any) -> AdapterAttachment:
        """Adapt the queries of every vector retriever found inside `target`.

        `target` is an engine, a retriever, a tool, an agent, or a list or dict of them, or an
        object of the app that holds them. What is attached already stays so; a retriever with
        another embedding model than the adapter's is left as it is, and logged. Retrievers that
        the app gets later are not seen: attach again, which adds what is new.

        Returns:
            An object that detaches these retrievers again.

        Raises:
            ArgumentError: no vector retriever inside can be adapted; or the embedding model of
                one fails on the text that base models are told apart by.
        """
        retrievers = _find(target)
        with self._lock:
            models: dict[int, AdapterEmbeddingModel | None] = {}
            swaps: list[tuple[Any, AdapterEmbeddingModel]] = []
            attached = 0
            for retriever in retrievers:
                own = retriever._embed_model
                if self._is_ours(own):
                    attached += 1
                    continue
                if id(own) not in models:
                    models[id(own)] = self._around(own)
                model = models[id(own)]
                if model is not None:
                    swaps.append((retriever, model))
            if not swaps and not attached:
                raise ArgumentError("target", self._nothing(retrievers, target))
            for retriever, model in swaps:
                retriever._embed_model = model
                self._swaps.append((weakref.ref(retriever), model))
        return AdapterAttachment(self, [retriever for retriever, _ in swaps])

    def detach(self, target: Any = None) -> None:
        """Give the retrievers inside `target` their model back; all of this hook's by default."""
        self._restore(None if target is None else _find(target))

    def _restore(self, retrievers: list[VectorIndexRetriever] | None) -> None:
        chosen = None if retrievers is None else {id(item) for item in retrievers}
        with self._lock:
            kept = []
            for ref, model in self._swaps:
                retriever = ref()
                if retriever is None:
                    continue
                if chosen is not None and id(retriever) not in chosen:
                    kept.append((ref, model))
                elif retriever._embed_model is model:  # else somebody gave it another since
                    retriever._embed_model = model.base_embed_model
            self._swaps = kept

    def _is_ours(self, model: BaseEmbedding) -> bool:
        return any(model is ours for _, ours in self._swaps)

    def _around(self, own: BaseEmbedding) -> AdapterEmbeddingModel | None:
        """Return the adapter around a retriever's model, or None where it is for another."""
        from ft_adapter.embedding import AdapterEmbeddingModel
        from ft_adapter.saved import name_of

        given = self._source if isinstance(self._source, AdapterEmbeddingModel) else None
        if isinstance(own, AdapterEmbeddingModel) and not (given and own is given.base_embed_model):
            reason = "it has an adapter already"
        elif given:
            base = given.base_embed_model
            if own is base or name_of(own) == name_of(base):
                model = given.around(own)
                model.enabled = self._enabled
                return model
            reason = f"the adapter is for {name_of(base)!r}"
        else:
            try:
                return AdapterEmbeddingModel(own, self._source, enabled=self._enabled)
            except ArtifactError as error:
                reason = str(error)
        logger.warning("A retriever of %r is not adapted: %s", name_of(own), reason)
        return None

    def _nothing(self, retrievers: list[VectorIndexRetriever], target: Any) -> str:
        if retrievers:
            return (
                f"none of the {len(retrievers)} vector retrievers inside a "
                f"{type(target).__name__} searches with the adapter's base model; the log says "
                "which model each has"
            )
        return (
            f"found no VectorIndexRetriever inside a {type(target).__name__}; attach to the object "
            "that the app calls (of an index, its query engine, chat engine or retriever)"
        )


class AdapterAttachment:
    """What `AdapterHook.attach` newly adapts; leaving the `with` block detaches it."""

    def __init__(self, hook: AdapterHook, components: list[VectorIndexRetriever]) -> None:
        self.components = components
        """The retrievers that this attachment added; without those attached already."""
        self._hook = hook

    def detach(self) -> None:
        """Give these retrievers their model back; a second time does nothing."""
        self._hook._restore(self.components)

    def __enter__(self) -> AdapterAttachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()


def _find(target: Any) -> list[VectorIndexRetriever]:
    """Return the vector retrievers inside `target`, without those of an `AdaptedRetriever`."""
    from llama_index.core.indices.vector_store import VectorIndexRetriever

    from ft_adapter.retriever import AdaptedRetriever

    found = find_components(target, (VectorIndexRetriever, AdaptedRetriever))
    wrapped = {id(item._retriever) for item in found if isinstance(item, AdaptedRetriever)}
    return [
        item for item in found if isinstance(item, VectorIndexRetriever) and id(item) not in wrapped
    ]
