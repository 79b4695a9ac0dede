"""Indices from the folder that an app persisted them to."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from llama_index.core import SummaryIndex, VectorStoreIndex
from llama_index.core.schema import TextNode
from model_assets import HashingEmbedding

from ft_core.errors import ArgumentError
from ft_core.indices import load_index

NODES = [TextNode(id_=good, text=f"the price of {good}") for good in ("amber", "barley", "copper")]


def test_a_vector_index_comes_back_with_its_vectors(tmp_path: Path) -> None:
    VectorStoreIndex(NODES, embed_model=HashingEmbedding()).storage_context.persist(tmp_path)
    model, logger = HashingEmbedding(), logging.getLogger("llama_index.core.indices.loading")
    level = logger.level
    (found,) = load_index(tmp_path, model).as_retriever(similarity_top_k=1).retrieve("barley?")
    assert found.node.node_id == "barley"
    assert (model.text_calls, model.query_calls) == (0, 1)
    assert logger.level == level


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "is no folder that one index was persisted to"),
        ("empty", "is no folder that one index was persisted to"),
        ("two", "is no folder that one index was persisted to: Expected to load a single index"),
        ("list", "holds a SummaryIndex, no vector index"),
    ],
)
def test_what_is_no_vector_index_is_named(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    SummaryIndex(NODES).storage_context.persist(tmp_path / "list")
    index = VectorStoreIndex(NODES, embed_model=HashingEmbedding())
    VectorStoreIndex(
        NODES, embed_model=HashingEmbedding(), storage_context=index.storage_context
    ).storage_context.persist(tmp_path / "two")
    with pytest.raises(ArgumentError, match=message) as raised:
        load_index(tmp_path / name, HashingEmbedding(), option="--from")
    assert str(raised.value).startswith(f"--from: {tmp_path / name} ")


def test_the_embedding_model_is_asked_for_by_its_option(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"^--index: needs the embedding .*, as --retriever"):
        load_index(tmp_path, None, model_option="--retriever")
