"""`reindex`: the same nodes under a new model, and an old index that stays as it was."""

import hashlib
import logging
from typing import Any

import numpy as np
import pytest
from llama_index.core import Document, Settings, StorageContext, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.node_parser import TokenTextSplitter
from llama_index.core.schema import IndexNode, MetadataMode, NodeRelationship, TextNode
from llama_index.core.vector_stores import SimpleVectorStore, VectorStoreQueryResult
from llama_index.core.vector_stores.types import BasePydanticVectorStore
from pydantic import Field

from ft_core.errors import ArgumentError, FTError
from ft_embeddings import reindex

DOCUMENTS = [
    Document(
        id_=f"document-{number}",
        text=" ".join(f"Sentence {number}.{part} says {'word ' * part}." for part in range(6)),
        metadata={"title": f"Title {number}", "secret": "not embedded"},
        excluded_embed_metadata_keys=["secret"],
    )
    for number in range(4)
]


class HashingEmbedding(BaseEmbedding):
    """Bag of hashed words; `seed` makes models that differ; fails or breaks on demand."""

    seed: int = 0
    fail_after: int = 10**9
    nan_on: str = "\0"
    seen: list[str] = Field(default_factory=list)

    def _vector(self, text):
        vector = np.zeros(32)
        for word in text.lower().split():
            vector[int(hashlib.md5(f"{self.seed}{word}".encode()).hexdigest(), 16) % 32] += 0.1
        return vector.tolist()

    def _get_query_embedding(self, query):
        return self._vector(query)

    async def _aget_query_embedding(self, query):
        return self._vector(query)

    def _get_text_embedding(self, text):
        self.seen.append(text)
        if len(self.seen) > self.fail_after:
            raise ConnectionError("the model went away")
        return [float("nan")] * 32 if self.nan_on in text else self._vector(text)


def model(**settings):
    return HashingEmbedding(**{"seed": 1, **settings})


class TextStore(BasePydanticVectorStore):
    """A store that keeps whole nodes, as Qdrant or pgvector do; in memory."""

    stores_text: bool = True
    collection: str = "one"
    can_list: bool = True
    fail_after: int = 10**9
    nodes: dict[str, Any] = Field(default_factory=dict)

    @property
    def client(self):
        return None

    def add(self, nodes, **kwargs):
        if len(self.nodes) + len(nodes) > self.fail_after:
            raise OSError("the store is full")
        self.nodes.update({node.node_id: node for node in nodes})
        return [node.node_id for node in nodes]

    def get_nodes(self, node_ids=None, filters=None):
        if not self.can_list:
            raise NotImplementedError("get_nodes not implemented")
        return list(self.nodes.values())

    def delete(self, ref_doc_id, **kwargs): ...

    def query(self, query, **kwargs):
        scores = {
            key: float(np.dot(node.embedding, query.query_embedding))
            for key, node in self.nodes.items()
        }
        ids = sorted(scores, key=scores.get, reverse=True)[: query.similarity_top_k]
        return VectorStoreQueryResult(
            nodes=[self.nodes[i] for i in ids], similarities=[scores[i] for i in ids], ids=ids
        )


def build(**kwargs):
    return VectorStoreIndex.from_documents(
        DOCUMENTS,
        embed_model=HashingEmbedding(),
        transformations=[TokenTextSplitter(chunk_size=40, chunk_overlap=0)],
        **kwargs,
    )


def nodes_of(index):
    return index.docstore.get_nodes(list(index.index_struct.nodes_dict.values()))


def answers(index, query="sentence 2.3 says word"):
    found = index.as_retriever(similarity_top_k=3).retrieve(query)
    return [(node.node_id, node.score) for node in found]


def state(index):
    return (
        index.storage_context.to_dict(),
        answers(index),
        [node.model_dump() for node in nodes_of(index)],
    )


def test_the_new_index_equals_one_built_with_the_new_model():
    old = build()
    before = state(old)
    new = reindex(old, model(), batch_size=3)
    direct = VectorStoreIndex(nodes_of(old), embed_model=model())
    vectors = new.vector_store.data.embedding_dict
    assert vectors == direct.vector_store.data.embedding_dict
    assert vectors != old.vector_store.data.embedding_dict
    assert answers(new) == answers(direct)
    assert state(old) == before
    assert isinstance(new, VectorStoreIndex)
    assert new.index_id != old.index_id


def test_nodes_keep_all_they_had():
    old = build()
    new = reindex(old, model())
    assert [node.model_dump() for node in nodes_of(new)] == [
        node.model_dump() for node in nodes_of(old)
    ]
    node = nodes_of(new)[0]
    assert node.metadata["secret"] == "not embedded"
    assert node.relationships[NodeRelationship.SOURCE].node_id == "document-0"
    assert new.ref_doc_info == old.ref_doc_info
    assert new.vector_store.data.metadata_dict == old.vector_store.data.metadata_dict


def test_the_text_for_embedding_is_embedded_each_once():
    old, embed_model = build(), model()
    reindex(old, embed_model, batch_size=4)
    expected = [node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes_of(old)]
    assert sorted(embed_model.seen) == sorted(expected)
    assert all("Title" in text and "not embedded" not in text for text in embed_model.seen)


def test_documents_can_be_refreshed_and_deleted_in_the_new_index():
    new = reindex(build(), model())
    assert new.refresh_ref_docs(DOCUMENTS) == [False] * 4
    changed = DOCUMENTS[0].model_copy(update={"id_": "document-0"})
    changed.set_content("Quite another text.")
    assert new.refresh_ref_docs([changed]) == [True]
    count = len(new.vector_store.data.embedding_dict)
    new.delete_ref_doc("document-1", delete_from_docstore=True)
    assert len(new.vector_store.data.embedding_dict) < count


def test_nodes_that_were_deleted_stay_deleted():
    old = build()
    gone = nodes_of(old)[0].node_id
    old.delete_nodes([gone])  # takes it from the vector store only
    new = reindex(old, model())
    assert gone not in new.vector_store.data.embedding_dict
    assert len(new.vector_store.data.embedding_dict) == len(old.vector_store.data.embedding_dict)


def test_a_store_that_keeps_texts_is_its_own_source_and_can_be_the_target():
    source = TextStore()
    old = build(storage_context=StorageContext.from_defaults(vector_store=source))
    vectors = {key: node.embedding for key, node in source.nodes.items()}
    target = TextStore(collection="two")
    new = reindex(old, model(), vector_store=target)
    assert set(target.nodes) == set(source.nodes)
    assert {key: node.embedding for key, node in source.nodes.items()} == vectors
    assert all(
        np.allclose(node.embedding, model()._vector(node.get_content(MetadataMode.EMBED)))
        for node in target.nodes.values()
    )
    some = next(iter(source.nodes))
    assert source.nodes[some].metadata is not target.nodes[some].metadata
    assert answers(new)

    in_memory = reindex(old, model())
    assert set(in_memory.docstore.docs) == set(source.nodes)
    with_override = build(storage_context=StorageContext.from_defaults(), store_nodes_override=True)
    assert reindex(with_override, model())._store_nodes_override


def test_a_saved_and_loaded_index(tmp_path):
    from llama_index.core import load_index_from_storage

    old = build()
    old.storage_context.persist(tmp_path / "old")
    loaded = load_index_from_storage(
        StorageContext.from_defaults(persist_dir=str(tmp_path / "old")),
        embed_model=HashingEmbedding(),
    )
    new = reindex(loaded, model())
    new.storage_context.persist(tmp_path / "new")
    again = load_index_from_storage(
        StorageContext.from_defaults(persist_dir=str(tmp_path / "new")), embed_model=model()
    )
    assert answers(again) == answers(reindex(old, model()))


def test_objects_behind_index_nodes_stay_reachable():
    from llama_index.core.base.base_retriever import BaseRetriever

    inner_index = build()
    inner, inner_ids = inner_index.as_retriever(), set(inner_index.docstore.docs)
    node = IndexNode(index_id="inner", text="about the inner retriever", obj=inner)
    old = VectorStoreIndex(objects=[node], embed_model=HashingEmbedding())
    new = reindex(old, model())
    assert isinstance(new._object_map["inner"], BaseRetriever)
    found = new.as_retriever().retrieve("Sentence 2.3")
    assert {node.node_id for node in found} <= inner_ids


def test_settings_are_untouched():
    before = Settings._embed_model, Settings._transformations, Settings._callback_manager
    reindex(build(), model())
    assert Settings._embed_model is before[0]


def test_a_model_that_fails_midway_leaves_nothing_behind():
    old = build()
    before = state(old)
    target = StorageContext.from_defaults()
    with pytest.raises(ConnectionError, match="the model went away"):
        reindex(old, model(fail_after=5), storage_context=target, batch_size=2)
    assert state(old) == before
    assert target.index_store.index_structs() == []
    assert target.docstore.docs == {}
    assert target.vector_store.data.embedding_dict == {}


def test_a_target_that_fails_midway_is_reported_and_not_registered():
    old = build()
    before = state(old)
    context = StorageContext.from_defaults(vector_store=TextStore(fail_after=5))
    with pytest.raises(FTError, match=r"the target TextStore failed .*up to 6 of \d+ nodes: clear"):
        reindex(old, model(), storage_context=context, batch_size=3)
    assert context.index_store.index_structs() == []
    assert state(old) == before


def test_a_vector_that_is_not_finite_names_the_node():
    old = build()
    bad = nodes_of(old)[2]
    with pytest.raises(FTError, match=f"node {bad.node_id!r}: embed_model returned a vector that"):
        reindex(old, model(nan_on=bad.get_content(metadata_mode=MetadataMode.EMBED)))


def test_vectors_of_other_lengths_are_refused():
    class Uneven(HashingEmbedding):
        def _get_text_embedding(self, text):
            return [1.0] * (3 + ("2.5" in text))

    with pytest.raises(FTError, match=r"its vector has \d dimensions, others \d"):
        reindex(build(), Uneven())


def test_empty_nodes_are_reported(caplog):
    nodes = [TextNode(id_="full", text="text"), TextNode(id_="empty", text=" \n")]
    old = VectorStoreIndex(nodes, embed_model=HashingEmbedding())
    with caplog.at_level(logging.WARNING):
        new = reindex(old, model())
    assert "1 of 2 nodes have no text and are not in the new index: empty" in caplog.text
    assert set(new.vector_store.data.embedding_dict) == {"full"}
    with pytest.raises(ArgumentError, match="has no node with a text"):
        reindex(VectorStoreIndex([], embed_model=HashingEmbedding()), model())


def test_nodes_that_cannot_be_had_say_what_to_pass():
    store = TextStore(can_list=False)
    old = build(storage_context=StorageContext.from_defaults(vector_store=store))
    with pytest.raises(ArgumentError, match=r"its TextStore cannot list its nodes .*pass nodes="):
        reindex(old, model())
    nodes = list(store.nodes.values())
    new = reindex(old, model(), nodes=nodes)
    assert set(new.vector_store.data.embedding_dict) == set(store.nodes)
    assert all(node.embedding is not None for node in nodes)  # the old vectors, still

    holed = build()
    lost = nodes_of(holed)[1].node_id
    holed.docstore.delete_document(lost)
    with pytest.raises(ArgumentError, match=f"lacks 1 of its .* first '{lost}'; pass nodes="):
        reindex(holed, model())


def test_the_old_store_is_refused_as_target():
    old = build()
    with pytest.raises(ArgumentError, match="vector_store: is the store of the old index"):
        reindex(old, model(), vector_store=old.vector_store)
    with pytest.raises(ArgumentError, match="storage_context: is the store of the old index"):
        reindex(old, model(), storage_context=old.storage_context)
    with pytest.raises(ArgumentError, match="is the store of the old index"):
        reindex(old, model(), vector_store=SimpleVectorStore(old.vector_store.data))
    text = build(storage_context=StorageContext.from_defaults(vector_store=TextStore()))
    nodes = text.vector_store.nodes
    with pytest.raises(ArgumentError, match="is the store of the old index"):
        reindex(text, model(), vector_store=TextStore(nodes=nodes))
    with pytest.raises(ArgumentError, match="pass it inside storage_context"):
        reindex(
            old,
            model(),
            vector_store=SimpleVectorStore(),
            storage_context=StorageContext.from_defaults(),
        )


def test_wrong_arguments_are_named():
    with pytest.raises(ArgumentError, match="index: is a list, not a VectorStoreIndex"):
        reindex([], model())
    with pytest.raises(ArgumentError, match="embed_model: is a NoneType, no BaseEmbedding"):
        reindex(build(), None)
    with pytest.raises(ArgumentError, match="batch_size: is at least 1, not 0"):
        reindex(build(), model(), batch_size=0)
