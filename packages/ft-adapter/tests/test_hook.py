from __future__ import annotations

import asyncio
import copy
import gc
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_index.core import VectorStoreIndex
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.llms import MockLLM
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import TextNode
from llama_index.core.tools import QueryEngineTool
from model_assets import HashingEmbedding

from ft_adapter.adapters import LinearLayer
from ft_adapter.embedding import AdapterEmbeddingModel
from ft_adapter.hook import AdapterHook
from ft_adapter.retriever import AdaptedRetriever
from ft_adapter.saved import PROBE_TEXT, base_of, save_adapter
from ft_core.errors import ArgumentError, ArtifactError

DIM = 32
QUESTION = "what is the late fee"
FEE, DAWN = "late fee of a loan", "harbour gates open at dawn"


def new_index(base: HashingEmbedding) -> VectorStoreIndex:
    nodes = [TextNode(text=text, id_=text) for text in (FEE, DAWN)]
    return VectorStoreIndex(nodes, embed_model=base)


def swapping() -> LinearLayer:
    """An adapter that sends the question to the harbour."""
    base = HashingEmbedding()
    adapter = LinearLayer(DIM, DIM)
    adapter.linear.weight.data = torch.outer(
        torch.tensor(base.vector(DAWN)), torch.tensor(base.vector(QUESTION))
    )
    return adapter


def save(folder: Path, **kwargs: Any) -> Path:
    base = HashingEmbedding()
    save_adapter(folder, swapping(), base=base_of(base, base.vector(PROBE_TEXT)), **kwargs)
    return folder


def engine_of(index: VectorStoreIndex) -> BaseQueryEngine:
    return index.as_query_engine(llm=MockLLM(), similarity_top_k=1)


def found(engine: BaseQueryEngine) -> str:
    """Ask sync and async, which must agree."""
    answers = [engine.query(QUESTION), asyncio.run(engine.aquery(QUESTION))]
    texts = {answer.source_nodes[0].node.get_content() for answer in answers}
    assert len(texts) == 1
    return texts.pop()


@pytest.fixture
def base() -> HashingEmbedding:
    return HashingEmbedding()


@pytest.fixture
def model(base: HashingEmbedding) -> AdapterEmbeddingModel:
    return AdapterEmbeddingModel(base, swapping(), device="cpu")


def test_a_live_engine_is_adapted_and_given_back(
    base: HashingEmbedding, model: AdapterEmbeddingModel
) -> None:
    engine = engine_of(new_index(base))
    assert found(engine) == FEE
    hook = AdapterHook(model)
    with hook.attach(engine) as attachment:
        assert len(attachment.components) == 1
        assert found(engine) == DAWN
    assert found(engine) == FEE
    assert engine._retriever._embed_model is base
    attachment.detach()
    assert found(engine) == FEE


def test_the_model_of_the_retriever_goes_on_embedding(model: AdapterEmbeddingModel) -> None:
    own = HashingEmbedding()
    engine = engine_of(new_index(own))
    AdapterHook(model).attach(engine)
    found(engine)
    assert own.query_calls == 2
    assert model.base_embed_model.query_calls == 0


def test_a_folder_is_attached_and_its_base_model_checked(
    tmp_path: Path, base: HashingEmbedding
) -> None:
    index = new_index(base)
    engines = [engine_of(index), engine_of(index)]
    calls = base.query_calls
    hook = AdapterHook(save(tmp_path / "a"))
    hook.attach(engines)
    assert base.query_calls == calls + 1
    assert [found(engine) for engine in engines] == [DAWN, DAWN]
    hook.detach()
    assert [found(engine) for engine in engines] == [FEE, FEE]


def test_it_is_switched_while_the_app_runs(
    base: HashingEmbedding, model: AdapterEmbeddingModel
) -> None:
    index = new_index(base)
    engine, later = engine_of(index), engine_of(index)
    hook = AdapterHook(model)
    hook.attach(engine)
    hook.enabled = False
    assert found(engine) == FEE
    hook.attach(later)
    assert found(later) == FEE
    hook.enabled = True
    assert (found(engine), found(later), hook.enabled) == (DAWN, DAWN, True)
    hook.enabled = False
    assert model.enabled  # the caller's own is another


def test_attaching_twice_is_harmless(base: HashingEmbedding, model: AdapterEmbeddingModel) -> None:
    index = new_index(base)
    first, second = engine_of(index), engine_of(index)
    hook = AdapterHook(model)
    with hook.attach(first):
        adapter = first._retriever._embed_model
        with hook.attach([first, second]) as attachment:
            assert attachment.components == [second._retriever]
            assert first._retriever._embed_model is adapter
            with hook.attach(first) as again:
                assert again.components == []
            assert found(first) == DAWN
        assert (found(first), found(second)) == (DAWN, FEE)
    assert (found(first), found(second)) == (FEE, FEE)


def test_one_of_several_is_detached(base: HashingEmbedding, model: AdapterEmbeddingModel) -> None:
    index = new_index(base)
    first, second = engine_of(index), engine_of(index)
    hook = AdapterHook(model)
    hook.attach({"first": first, "second": second})
    hook.detach(second)
    assert (found(first), found(second)) == (DAWN, FEE)
    hook.attach(second)
    assert found(second) == DAWN


def test_it_is_found_inside_tools_and_fusions(
    base: HashingEmbedding, model: AdapterEmbeddingModel
) -> None:
    index = new_index(base)
    retrievers = [index.as_retriever(similarity_top_k=1) for _ in range(2)]
    fusion = QueryFusionRetriever(retrievers, llm=MockLLM(), num_queries=1, use_async=False)
    tool = QueryEngineTool.from_defaults(engine_of(index))
    with AdapterHook(model).attach([fusion, tool]) as attachment:
        assert len(attachment.components) == 3
        assert [item.node.node_id for item in fusion.retrieve(QUESTION)] == [DAWN]


def test_a_retriever_of_another_model_is_left_and_logged(
    base: HashingEmbedding, model: AdapterEmbeddingModel, caplog: pytest.LogCaptureFixture
) -> None:
    ours = engine_of(new_index(base))
    other = engine_of(new_index(HashingEmbedding(model_name="other")))
    with caplog.at_level(logging.WARNING, logger="ft_adapter"):
        AdapterHook(model).attach([ours, other])
    assert (found(ours), found(other)) == (DAWN, FEE)
    assert [record.getMessage() for record in caplog.records] == [
        "A retriever of 'other' is not adapted: the adapter is for 'hashing'"
    ]
    with pytest.raises(ArgumentError, match="none of the 1 vector retrievers"):
        AdapterHook(model).attach(other)


def test_a_retriever_of_another_dimension_is_left_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = engine_of(new_index(HashingEmbedding(dim=16)))
    ours = engine_of(new_index(HashingEmbedding()))
    with caplog.at_level(logging.WARNING, logger="ft_adapter"):
        AdapterHook(save(tmp_path / "a")).attach([ours, other])
    assert (found(ours), found(other)) == (DAWN, FEE)
    assert "dimension 32" in caplog.text


@pytest.mark.parametrize("from_folder", [True, False])
def test_no_query_goes_through_two_adapters(
    tmp_path: Path, base: HashingEmbedding, model: AdapterEmbeddingModel, from_folder: bool
) -> None:
    index = new_index(base)
    own = index.as_retriever(similarity_top_k=1, embed_model=model)
    wrapped = AdaptedRetriever(index, model, similarity_top_k=1)
    hook = AdapterHook(save(tmp_path / "a") if from_folder else model)
    for retriever in (own, wrapped):
        with pytest.raises(ArgumentError, match="target"):
            hook.attach(retriever)
    assert own._embed_model is model


def test_where_there_is_no_retriever_it_says_so(model: AdapterEmbeddingModel) -> None:
    with pytest.raises(ArgumentError, match="found no VectorIndexRetriever inside a list"):
        AdapterHook(model).attach([])


def test_a_model_that_somebody_set_since_is_left(
    base: HashingEmbedding, model: AdapterEmbeddingModel
) -> None:
    engine = engine_of(new_index(base))
    hook = AdapterHook(model)
    hook.attach(engine)
    theirs = HashingEmbedding()
    engine._retriever._embed_model = theirs
    hook.detach()
    assert engine._retriever._embed_model is theirs


def test_a_retriever_that_is_gone_is_not_kept(
    base: HashingEmbedding, model: AdapterEmbeddingModel
) -> None:
    index = new_index(base)
    hook = AdapterHook(model)
    retriever = index.as_retriever()
    hook.attach(retriever)
    ref = hook._swaps[0][0]
    del retriever
    gc.collect()
    assert ref() is None
    hook.enabled = False
    hook.detach()
    assert hook._swaps == []


def test_a_failing_adapter_does_not_break_the_app(base: HashingEmbedding) -> None:
    broken = LinearLayer(DIM, DIM)
    broken.linear.weight.data.fill_(float("inf"))
    engine = engine_of(new_index(base))
    AdapterHook(AdapterEmbeddingModel(base, broken, device="cpu")).attach(engine)
    assert found(engine) == FEE


def test_it_is_switched_by_one_thread_while_others_ask(
    base: HashingEmbedding, model: AdapterEmbeddingModel
) -> None:
    engine = engine_of(new_index(base))
    hook = AdapterHook(model)
    seen: set[str] = set()
    errors: list[Exception] = []

    def ask() -> None:
        try:
            for _ in range(30):
                seen.add(engine.query(QUESTION).source_nodes[0].node.get_content())
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        with hook.attach(engine):
            hook.enabled = not hook.enabled
    assert not errors
    assert seen <= {FEE, DAWN}
    assert engine._retriever._embed_model is base


def test_a_copy_of_the_app_keeps_what_it_had(
    base: HashingEmbedding, model: AdapterEmbeddingModel
) -> None:
    retriever = new_index(base).as_retriever(similarity_top_k=1)
    hook = AdapterHook(model)
    hook.attach(retriever)
    other = copy.copy(retriever)
    hook.detach()
    assert retriever.retrieve(QUESTION)[0].node.node_id == FEE
    assert other.retrieve(QUESTION)[0].node.node_id == DAWN


def test_what_cannot_be_attached_is_named(tmp_path: Path, base: HashingEmbedding) -> None:
    both = AdapterEmbeddingModel(base, swapping(), transform_text=True)
    with pytest.raises(ArgumentError, match="documents too"):
        AdapterHook(both)
    with pytest.raises(ArgumentError, match="documents too"):
        AdapterHook(save(tmp_path / "both", sides="both"))
    with pytest.raises(ArgumentError, match="model"):
        AdapterHook(7)  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match="nowhere"):
        AdapterHook(tmp_path / "nowhere")
