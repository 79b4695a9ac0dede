from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest
import torch
from llama_index.core import QueryBundle, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.indices.vector_store import VectorIndexRetriever
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import IndexNode, NodeWithScore, TextNode
from llama_index.core.vector_stores import MetadataFilter, MetadataFilters, SimpleVectorStore
from llama_index.core.vector_stores.types import (
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)
from model_assets import HashingEmbedding

from ft_adapter.adapters import LinearLayer
from ft_adapter.embedding import AdapterEmbeddingModel
from ft_adapter.retriever import AdaptedRetriever
from ft_core.errors import ArgumentError

DIM = 32
TEXTS = {
    "fee": "late fee of a loan",
    "dawn": "harbour gates open at dawn",
    "toll": "bridge toll for lorries",
    "tower": "the tower is closed in winter",
}
COLOURS = {"fee": "red", "dawn": "blue", "toll": "red", "tower": "blue"}


def new_index(base: HashingEmbedding | None = None, **kwargs: Any) -> VectorStoreIndex:
    nodes = [
        TextNode(text=text, id_=key, metadata={"colour": COLOURS[key]})
        for key, text in TEXTS.items()
    ]
    for node in nodes:
        node.excluded_embed_metadata_keys = ["colour"]
    return VectorStoreIndex(nodes, embed_model=base or HashingEmbedding(), **kwargs)


def swapping(base: HashingEmbedding, question: str, wanted: str) -> LinearLayer:
    """An adapter that sends a question to the text `wanted`, and to no other."""
    asked, target = (torch.tensor(base.vector(text)) for text in (question, TEXTS[wanted]))
    adapter = LinearLayer(DIM, DIM)
    adapter.linear.weight.data = torch.outer(target, asked)
    return adapter


QUESTION = "what is the late fee"


@pytest.fixture
def base() -> HashingEmbedding:
    return HashingEmbedding()


@pytest.fixture
def model(base: HashingEmbedding) -> AdapterEmbeddingModel:
    """Finds the harbour, where the base model finds the fee."""
    return AdapterEmbeddingModel(base, swapping(base, QUESTION, "dawn"), device="cpu")


def ids(nodes: list[NodeWithScore]) -> list[str]:
    return [item.node.node_id for item in nodes]


def both_ways(retriever: Any, query: Any) -> list[NodeWithScore]:
    """Retrieve sync and async, which must agree."""
    found = retriever.retrieve(copy.copy(query))
    again = asyncio.run(retriever.aretrieve(copy.copy(query)))
    assert ids(again) == ids(found)
    assert [item.score for item in again] == [item.score for item in found]
    return found


def test_queries_are_adapted_and_the_index_stays(
    base: HashingEmbedding, model: AdapterEmbeddingModel
) -> None:
    index = new_index(base)
    before = copy.deepcopy(index.vector_store.to_dict())
    calls = base.text_calls
    plain = index.as_retriever(similarity_top_k=1)
    adapted = AdaptedRetriever(index, model, similarity_top_k=1)

    assert ids(both_ways(plain, QUESTION)) == ["fee"]
    found = both_ways(adapted, QUESTION)
    assert ids(found) == ["dawn"]
    assert found[0].score == pytest.approx(1.0, abs=1e-5)
    assert index.vector_store.to_dict() == before
    assert base.text_calls == calls
    assert base.query_calls == 4  # once per retrieval


def test_it_is_switched_off_and_on_while_it_runs(
    base: HashingEmbedding, model: AdapterEmbeddingModel
) -> None:
    adapted = AdaptedRetriever(new_index(base), model, similarity_top_k=1)
    adapted.model.enabled = False
    assert ids(both_ways(adapted, QUESTION)) == ["fee"]
    adapted.model.enabled = True
    assert ids(both_ways(adapted, QUESTION)) == ["dawn"]


def test_a_failing_adapter_gives_way_to_the_base_model(base: HashingEmbedding) -> None:
    broken = LinearLayer(DIM, DIM)
    broken.linear.weight.data.fill_(float("nan"))
    adapted = AdaptedRetriever(new_index(base), AdapterEmbeddingModel(base, broken, device="cpu"))
    plain = new_index(base).as_retriever()
    assert ids(both_ways(adapted, QUESTION)) == ids(both_ways(plain, QUESTION))


def test_the_vector_of_a_query_is_the_base_models(
    base: HashingEmbedding, model: AdapterEmbeddingModel
) -> None:
    adapted = AdaptedRetriever(new_index(base), model, similarity_top_k=1)
    query = QueryBundle("anything", embedding=base.vector(QUESTION))
    assert ids(both_ways(adapted, query)) == ["dawn"]
    assert base.query_calls == 0
    assert query.embedding == base.vector(QUESTION)


def test_the_adapted_vector_is_left_in_no_query(
    base: HashingEmbedding, model: AdapterEmbeddingModel
) -> None:
    index = new_index(base)
    adapted = AdaptedRetriever(index, model, similarity_top_k=1)
    query = QueryBundle(QUESTION)
    adapted.retrieve(query)
    asyncio.run(adapted.aretrieve(query))
    assert query.embedding is None
    plain = index.as_retriever(similarity_top_k=1)
    assert ids(plain.retrieve(query)) == ["fee"]
    assert ids(adapted.retrieve(query)) == ["dawn"]  # with the vector that `plain` left


@pytest.mark.parametrize("use_async", [True, False])
def test_it_fuses_with_plain_retrievers(
    base: HashingEmbedding, model: AdapterEmbeddingModel, use_async: bool
) -> None:
    index = new_index(base)
    plain = index.as_retriever(similarity_top_k=1)
    adapted = AdaptedRetriever(index, model, similarity_top_k=1)
    for pair in ([plain, adapted], [adapted, plain]):
        fusion = QueryFusionRetriever(
            pair, llm=MockLLM(), num_queries=1, similarity_top_k=4, use_async=use_async
        )
        assert set(ids(fusion.retrieve(QUESTION))) == {"fee", "dawn"}


def test_wordings_of_ones_own_are_embedded_in_place_of_the_query(
    base: HashingEmbedding, model: AdapterEmbeddingModel
) -> None:
    adapted = AdaptedRetriever(new_index(base), model, similarity_top_k=1)
    query = QueryBundle("anything", custom_embedding_strs=[QUESTION, QUESTION])
    assert ids(both_ways(adapted, query)) == ["dawn"]
    assert base.queries == [QUESTION] * 4


def test_filters_and_ids_are_respected(
    base: HashingEmbedding, model: AdapterEmbeddingModel
) -> None:
    index = new_index(base)
    red = MetadataFilters(filters=[MetadataFilter(key="colour", value="red")])
    adapted = AdaptedRetriever(index, model, similarity_top_k=4, filters=red)
    assert set(ids(both_ways(adapted, QUESTION))) == {"fee", "toll"}

    some = VectorIndexRetriever(index, similarity_top_k=4, node_ids=["toll", "tower"])
    found = ids(both_ways(AdaptedRetriever(some, model), QUESTION))
    assert set(found) == {"toll", "tower"}


def test_the_number_of_results_can_be_changed(
    base: HashingEmbedding, model: AdapterEmbeddingModel
) -> None:
    plain = new_index(base).as_retriever(similarity_top_k=3)
    adapted = AdaptedRetriever(plain, model)
    assert adapted.similarity_top_k == 3
    adapted.similarity_top_k = 1
    assert len(adapted.retrieve(QUESTION)) == 1
    assert plain.similarity_top_k == 3
    assert len(plain.retrieve(QUESTION)) == 3


def test_later_changes_of_the_original_do_not_reach_it(
    base: HashingEmbedding, model: AdapterEmbeddingModel
) -> None:
    index = new_index(base)
    filters = MetadataFilters(filters=[MetadataFilter(key="colour", value="red")])
    plain = VectorIndexRetriever(index, similarity_top_k=4, filters=filters, node_ids=list(TEXTS))
    adapted = AdaptedRetriever(plain, model)
    wanted = ids(adapted.retrieve(QUESTION))
    plain.similarity_top_k = 1
    plain._node_ids.clear()
    plain._node_ids.append("tower")
    filters.filters.append(MetadataFilter(key="colour", value="blue"))
    assert ids(adapted.retrieve(QUESTION)) == wanted
    assert plain._embed_model is base


class Recording(SimpleVectorStore):
    """Keeps the queries; knows all modes, of which it does the plain one."""

    _asked: list[VectorStoreQuery] = []  # noqa: RUF012 - pydantic copies it

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        self._asked.append(copy.copy(query))
        assert kwargs == {"nprobe": 3}
        return super().query(VectorStoreQuery([1.0] * DIM, similarity_top_k=1))


def test_modes_and_settings_reach_the_store(model: AdapterEmbeddingModel) -> None:
    base = model.base_embed_model
    index = new_index(base)
    store = Recording(data=index.vector_store.data)
    retriever = VectorIndexRetriever(
        index,
        vector_store_query_mode="hybrid",
        alpha=0.3,
        sparse_top_k=7,
        hybrid_top_k=5,
        doc_ids=["d"],
        vector_store_kwargs={"nprobe": 3},
    )
    retriever._vector_store = store
    both_ways(AdaptedRetriever(retriever, model), QUESTION)
    assert len(store._asked) == 2
    for query in store._asked:
        assert query.query_embedding == pytest.approx(base.vector(TEXTS["dawn"]), abs=1e-5)
        assert query.query_str == QUESTION
        assert query.mode == VectorStoreQueryMode.HYBRID
        assert (query.alpha, query.sparse_top_k, query.hybrid_top_k) == (0.3, 7, 5)
        assert query.doc_ids == ["d"]


@pytest.mark.parametrize("mode", ["text_search", "sparse"])
def test_modes_without_vectors_embed_nothing(model: AdapterEmbeddingModel, mode: str) -> None:
    base = model.base_embed_model
    index = new_index(base)
    store = Recording(data=index.vector_store.data)
    retriever = VectorIndexRetriever(
        index, vector_store_query_mode=mode, vector_store_kwargs={"nprobe": 3}
    )
    retriever._vector_store = store
    both_ways(AdaptedRetriever(retriever, model), QUESTION)
    assert base.query_calls == 0
    assert [query.query_embedding for query in store._asked] == [None, None]
    assert [query.query_str for query in store._asked] == [QUESTION, QUESTION]


def test_no_results_are_an_empty_list(base: HashingEmbedding, model: AdapterEmbeddingModel) -> None:
    nothing = MetadataFilters(filters=[MetadataFilter(key="colour", value="none")])
    assert both_ways(AdaptedRetriever(new_index(base), model, filters=nothing), QUESTION) == []
    empty = VectorStoreIndex([], embed_model=base)
    assert both_ways(AdaptedRetriever(empty, model), QUESTION) == []


def test_nodes_that_stand_for_objects_are_followed(
    base: HashingEmbedding, model: AdapterEmbeddingModel
) -> None:
    inner = new_index(base).as_retriever(similarity_top_k=1)
    node = IndexNode(text=TEXTS["dawn"], index_id="inner", obj=inner)
    index = VectorStoreIndex(objects=[node], embed_model=base)
    found = both_ways(AdaptedRetriever(index, model, similarity_top_k=1), QUESTION)
    # The inner retriever is asked with the query as it came, not with the adapted vector.
    assert ids(found) == ["fee"]


def test_a_retrieval_is_one_event(base: HashingEmbedding, model: AdapterEmbeddingModel) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    index = new_index(base, callback_manager=CallbackManager([debug]))
    base.callback_manager = CallbackManager([debug])
    debug.flush_event_logs()
    AdaptedRetriever(index, model).retrieve(QUESTION)
    assert len(debug.get_event_pairs(CBEventType.RETRIEVE)) == 1
    assert len(debug.get_event_pairs(CBEventType.EMBEDDING)) == 1


def test_an_engine_answers_with_it(base: HashingEmbedding, model: AdapterEmbeddingModel) -> None:
    adapted = AdaptedRetriever(new_index(base), model, similarity_top_k=1)
    engine = RetrieverQueryEngine.from_args(adapted, llm=MockLLM())
    assert ids(engine.query(QUESTION).source_nodes) == ["dawn"]


def test_an_index_that_carries_the_adapter_is_adapted_once(
    base: HashingEmbedding, model: AdapterEmbeddingModel
) -> None:
    index = new_index(model)
    plain = index.as_retriever(similarity_top_k=1)
    assert ids(AdaptedRetriever(plain, model).retrieve(QUESTION)) == ids(plain.retrieve(QUESTION))


def test_what_cannot_be_adapted_is_named(
    base: HashingEmbedding, model: AdapterEmbeddingModel
) -> None:
    index = new_index(base)
    fusion = QueryFusionRetriever([index.as_retriever()], llm=MockLLM(), num_queries=1)
    with pytest.raises(ArgumentError, match="not a QueryFusionRetriever"):
        AdaptedRetriever(fusion, model)
    with pytest.raises(ArgumentError, match="similarity_top_k: is for an index"):
        AdaptedRetriever(index.as_retriever(), model, similarity_top_k=3)
    other = new_index(HashingEmbedding(model_name="other"))
    with pytest.raises(ArgumentError, match=r"'other'.*'hashing'"):
        AdaptedRetriever(other, model)
    both = AdapterEmbeddingModel(base, LinearLayer(DIM, DIM), transform_text=True)
    with pytest.raises(ArgumentError, match="as_retriever"):
        AdaptedRetriever(index, both)
