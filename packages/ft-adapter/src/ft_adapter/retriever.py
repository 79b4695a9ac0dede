"""A retriever that searches an index as it is with the adapted vector of the query."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.indices.vector_store import VectorIndexRetriever, VectorStoreIndex
from llama_index.core.vector_stores.types import VectorStoreQueryMode

from ft_adapter.embedding import AdapterEmbeddingModel
from ft_core.errors import ArgumentError

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.schema import NodeWithScore, QueryBundle

_WITHOUT_EMBEDDING = (VectorStoreQueryMode.TEXT_SEARCH, VectorStoreQueryMode.SPARSE)


class AdaptedRetriever(BaseRetriever):
    """A vector retriever whose queries go through an adapter; the index stays untouched.

    It works on a copy of the retriever that it is given, which keeps its filters, query mode
    and all other settings. A query's own vector, if it has one, is taken for the base model's,
    as LlamaIndex's retrievers leave it there; the adapted vector is never left in a query, so
    a retriever that shares it, as in a fusion, does not meet it.

    Args:
        retriever: a `VectorIndexRetriever`, or a `VectorStoreIndex` to make one of.
        model: adapts; its base model is the one that the index was built with.
        as_retriever_kwargs: of an index, what its `as_retriever` takes.

    Raises:
        ArgumentError: another kind of retriever, one of another embedding model, or an adapter
            that changes documents too.
    """

    def __init__(
        self,
        retriever: VectorIndexRetriever | VectorStoreIndex,
        model: AdapterEmbeddingModel,
        **as_retriever_kwargs: Any,
    ) -> None:
        if model.transform_text:
            raise ArgumentError(
                "model",
                "adapts documents too, so no index of the base model's vectors can be asked; "
                "build the index with it (embed_model=model) and use index.as_retriever()",
            )
        self._model = model
        self._retriever = _copied(retriever, as_retriever_kwargs)
        _check_same_base(self._retriever._embed_model, model.base_embed_model)
        super().__init__(
            callback_manager=self._retriever.callback_manager,
            object_map=self._retriever.object_map,
            verbose=self._retriever._verbose,
        )

    @property
    def model(self) -> AdapterEmbeddingModel:
        """The model that adapts; `retriever.model.enabled = False` switches it off."""
        return self._model

    @property
    def similarity_top_k(self) -> int:
        """How many nodes are retrieved."""
        top_k: int = self._retriever.similarity_top_k
        return top_k

    @similarity_top_k.setter
    def similarity_top_k(self, similarity_top_k: int) -> None:
        self._retriever.similarity_top_k = similarity_top_k

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        vector = query_bundle.embedding
        if vector is None and self._must_embed(query_bundle):
            vector = self._model.base_embed_model.get_agg_embedding_from_queries(
                query_bundle.embedding_strs
            )
        nodes: list[NodeWithScore] = self._retriever._retrieve(self._adapted(query_bundle, vector))
        return nodes

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        vector = query_bundle.embedding
        if vector is None and self._must_embed(query_bundle):
            vector = await self._model.base_embed_model.aget_agg_embedding_from_queries(
                query_bundle.embedding_strs
            )
        nodes: list[NodeWithScore] = await self._retriever._aretrieve(
            self._adapted(query_bundle, vector)
        )
        return nodes

    def _must_embed(self, query_bundle: QueryBundle) -> bool:
        return (
            self._retriever._vector_store.is_embedding_query
            and self._retriever._vector_store_query_mode not in _WITHOUT_EMBEDDING
            and len(query_bundle.embedding_strs) > 0
        )

    def _adapted(self, query_bundle: QueryBundle, vector: list[float] | None) -> QueryBundle:
        """Return a copy of the query, with the adapted vector if it has one."""
        if vector is not None:
            vector = self._model.adapt_query(vector)
        return dataclasses.replace(query_bundle, embedding=vector)


def _check_same_base(own: BaseEmbedding, base: BaseEmbedding) -> None:
    """Check that a retriever's model is the base model of the adapter, by name."""
    from ft_adapter.saved import name_of

    # An index may carry an adapter that only its queries go through.
    while own is not base and isinstance(own, AdapterEmbeddingModel) and not own.transform_text:
        own = own.base_embed_model
    if own is not base and name_of(own) != name_of(base):
        raise ArgumentError(
            "retriever",
            f"searches with {name_of(own)!r}, and the adapter is for {name_of(base)!r}; load the "
            f"index with embed_model={name_of(base)!r}, or train an adapter for {name_of(own)!r}",
        )


def _copied(retriever: Any, as_retriever_kwargs: dict[str, Any]) -> VectorIndexRetriever:
    """Return a retriever that nobody else changes."""
    if isinstance(retriever, VectorStoreIndex):
        made = retriever.as_retriever(**as_retriever_kwargs)
    elif as_retriever_kwargs:
        names = ", ".join(as_retriever_kwargs)
        raise ArgumentError(names, "is for an index; set it on the retriever that you pass")
    else:
        made = retriever
    if not isinstance(made, VectorIndexRetriever):
        raise ArgumentError(
            "retriever",
            f"is a VectorIndexRetriever or a VectorStoreIndex, not a {type(made).__name__}; of one "
            "that asks others, adapt those: AdapterHook(model).attach(retriever)",
        )
    made = copy.copy(made)
    for name, value in vars(made).items():
        if isinstance(value, list | dict):
            setattr(made, name, value.copy())
    made._filters = copy.deepcopy(made._filters)
    return made
