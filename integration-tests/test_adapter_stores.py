"""Adapters over the vector stores that people have: the real databases, the same tests for all.

A question is asked in other words than its document is written in, and the two vocabularies
correspond word by word: a linear map of the question's vector can learn that from some
questions and be right about others.
"""

import asyncio
import random
import uuid
from dataclasses import dataclass

import numpy as np
import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import NodeRelationship, QueryBundle, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores import FilterCondition, MetadataFilter, MetadataFilters
from llama_index.core.vector_stores.types import VectorStoreQueryMode
from vector_stores import BACKENDS, Backend, LongEmbedding, opened, unit

from ft_adapter import EmbeddingAdapterFinetuneEngine
from ft_adapter.index_vectors import index_vectors
from ft_adapter.saved import PROBE_TEXT
from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.errors import ArgumentError

DIM = 64
DOCUMENTS = 120
WORDS = "anchor barrel cable drum engine flange gasket hinge impeller jack keel lever motor nozzle"
OTHER = "ask bid cash debt equity fund gain hedge index junk kind loan margin note"
TRAINING = 90
TOP = 5
NAME = "filings"


def make_nodes():
    chooser = random.Random(1)
    chosen = set()
    while len(chosen) < DOCUMENTS:
        chosen.add(tuple(sorted(chooser.sample(WORDS.split(), 4))))
    return [
        TextNode(
            id_=str(uuid.UUID(int=number)),
            text=" ".join(words),
            metadata={"section": ("east", "west")[number % 2], "year": 2000 + number % 10},
            excluded_embed_metadata_keys=["section", "year"],
            relationships={
                NodeRelationship.SOURCE: RelatedNodeInfo(node_id=f"filing {number // 4}")
            },
        )
        for number, words in enumerate(sorted(chosen, key=lambda _: chooser.random()))
    ]


def make_dataset(nodes):
    """One question per node: three of its words in other words, and the fourth as it is."""
    chooser = random.Random(2)
    other = dict(zip(WORDS.split(), OTHER.split(), strict=True))
    questions = {}
    for node in nodes:
        *asked, kept = chooser.sample(node.text.split(), 4)
        questions[f"about {node.node_id}"] = " ".join([other[word] for word in asked] + [kept])
    return EmbeddingQAFinetuneDataset(
        queries=questions,
        corpus={node.node_id: node.text for node in nodes},
        relevant_docs={f"about {node.node_id}": [node.node_id] for node in nodes},
    )


def only(dataset, queries):
    return EmbeddingQAFinetuneDataset(
        queries={query: dataset.queries[query] for query in queries},
        corpus=dataset.corpus,
        relevant_docs={query: dataset.relevant_docs[query] for query in queries},
    )


NODES = make_nodes()
DATASET = make_dataset(NODES)
TRAIN = only(DATASET, list(DATASET.queries)[:TRAINING])
TEST = only(DATASET, list(DATASET.queries)[TRAINING:])
SETTINGS = {"learning_rate": 0.01, "epochs": 8, "folds": 2, "show_progress": False}


@dataclass
class Trained:
    """An index in a database, and an adapter that was trained from it."""

    backend: Backend
    index: VectorStoreIndex
    engine: EmbeddingAdapterFinetuneEngine
    texts_before: int
    texts_after: int
    questions: list[str]
    dump_before: object


@pytest.fixture(scope="module", params=list(BACKENDS))
def backend(request, tmp_path_factory):
    with opened(request.param, tmp_path_factory.mktemp(request.param)) as database:
        yield database


@pytest.fixture(scope="module")
def trained(backend, tmp_path_factory):
    model = LongEmbedding(dim=DIM)
    built = backend.build(NAME, [node.model_copy(deep=True) for node in NODES], model, DIM)
    index = backend.reopen(built, NAME, DIM)
    before, dump = model.text_calls, backend.dump(index.vector_store)
    folder = tmp_path_factory.mktemp("engine")
    engine = EmbeddingAdapterFinetuneEngine.from_index(
        index, TRAIN, model_output_path=folder / "adapter", cache_dir=folder / "cache", **SETTINGS
    )
    engine.finetune()
    questions = model.queries
    return Trained(backend, index, engine, before, model.text_calls, questions, dump)


def by_hand(trained, question, top_k=TOP, keep=lambda node: True):
    """Return node ids and cosines, best first, from vectors that no store has seen."""
    query = unit(trained.engine.get_finetuned_model().get_query_embedding(question))
    model = LongEmbedding(dim=DIM)
    scored = [
        (node.node_id, float(np.dot(query, unit(model.vector(node.text)))))
        for node in NODES
        if keep(node)
    ]
    return sorted(scored, key=lambda pair: -pair[1])[:top_k]


def assert_same(found, expected, scores=True):
    assert [node.node.node_id for node in found] == [node for node, _ in expected]
    if scores:
        assert [node.score for node in found] == pytest.approx(
            [score for _, score in expected], abs=1e-4
        )


def equals(key, value):
    return MetadataFilters(filters=[MetadataFilter(key=key, value=value)])


def units(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def hit_rate(retriever):
    hits = [
        TEST.relevant_docs[query][0] in {node.node.node_id for node in retriever.retrieve(text)}
        for query, text in TEST.queries.items()
    ]
    return sum(hits) / len(hits)


# --- Reading the vectors ---------------------------------------------------------------------


def test_every_vector_is_read_and_nothing_is_embedded(trained):
    embedded = trained.index._embed_model.text_calls
    found = index_vectors(trained.index)
    assert trained.index._embed_model.text_calls == embedded
    model = LongEmbedding(dim=DIM)
    expected = {node.node_id: model.vector(node.text) for node in NODES}
    assert found.vectors.dtype == np.float32
    assert sorted(found.ids) == sorted(expected)
    rows = found.vectors
    wanted = np.array([expected[node] for node in found.ids])
    if not trained.backend.keeps_length:
        rows, wanted = units(rows), units(wanted)
    np.testing.assert_allclose(rows, wanted, atol=1e-6)
    documents = {node.node_id: node.ref_doc_id for node in NODES}
    assert found.ref_doc_ids == [documents[node] for node in found.ids]


def test_an_index_larger_than_a_page_is_read_whole(backend, monkeypatch):
    dim, count = 4, 4500
    if backend.commits_each_node:  # a minute for so many; smaller pages are read by the same code
        count = 130
        monkeypatch.setattr("ft_adapter.index_vectors._LOCAL_PAGE", 50)
    vectors = np.random.default_rng(0).standard_normal((count, dim)).astype(np.float32)
    nodes = [
        TextNode(id_=str(uuid.UUID(int=number)), text=f"{number}", embedding=vector.tolist())
        for number, vector in enumerate(vectors)
    ]
    model = LongEmbedding(dim=dim)
    found = index_vectors(backend.build("large", nodes, model, dim))
    assert (model.text_calls, model.query_calls) == (0, 0)
    assert len(found.ids) == len(set(found.ids)) == count
    wanted = vectors if backend.keeps_length else units(vectors)
    rows = [uuid.UUID(node).int for node in found.ids]
    np.testing.assert_allclose(found.vectors, wanted[rows], atol=1e-6)


@pytest.mark.parametrize("backend", ["pgvector"], indirect=True)
def test_half_precision_columns_are_read(backend):
    nodes = [node.model_copy(deep=True) for node in NODES[:10]]
    model = LongEmbedding(dim=DIM)
    index = backend.build("half", nodes, model, DIM, use_halfvec=True)
    found = index_vectors(index)
    assert found.ids == [node.node_id for node in nodes]
    wanted = np.array([model.vector(node.text) for node in nodes])
    np.testing.assert_allclose(found.vectors, wanted, atol=2e-3)
    np.testing.assert_array_equal(found.vectors, found.vectors.astype(np.float16))


def test_an_empty_index_is_one_clear_error(backend):
    # Qdrant has no collection before its first node.
    index = backend.build("nothing", [], LongEmbedding(dim=DIM), DIM)
    with pytest.raises(
        ArgumentError, match=r"index: its \w+ (is empty|cannot be read .* not found)"
    ):
        index_vectors(index)


# --- Training --------------------------------------------------------------------------------


def test_training_embeds_no_document_and_helps(trained):
    assert trained.texts_before == len(NODES)  # to build the index
    assert trained.texts_after == trained.texts_before
    # Each question once, and the text by which a saved adapter knows its model.
    assert set(trained.questions) == {*TRAIN.queries.values(), PROBE_TEXT}
    assert len(trained.questions) == len(set(trained.questions))
    assert trained.engine.selection.kept
    assert trained.engine.selection.gain > 0.2
    base = hit_rate(trained.index.as_retriever(similarity_top_k=TOP))
    adapted = hit_rate(trained.engine.get_finetuned_retriever(trained.index, similarity_top_k=TOP))
    assert base < 0.5
    assert adapted > base + 0.4
    assert adapted > 0.8


def test_documents_may_be_named_instead_of_nodes(trained, tmp_path):
    source = {node.node_id: node.ref_doc_id for node in NODES}
    texts = {}
    for node in NODES:
        texts.setdefault(node.ref_doc_id, []).append(node.text)
    dataset = EmbeddingQAFinetuneDataset(
        queries=TRAIN.queries,
        corpus={document: "\n".join(parts) for document, parts in texts.items()},
        relevant_docs={query: [source[node]] for query, [node] in TRAIN.relevant_docs.items()},
    )
    model = LongEmbedding(dim=DIM)
    engine = EmbeddingAdapterFinetuneEngine.from_index(
        trained.index,
        dataset,
        model,
        model_output_path=tmp_path / "adapter",
        cache_dir=tmp_path / "cache",
        **{**SETTINGS, "epochs": 1},
    )
    engine.finetune()
    assert model.text_calls == 0
    # All four nodes of the document count as answers; the questions ask for one of them each.
    scores = engine.report.baseline.scores["recall@10"]
    assert set(scores) == set(TRAIN.queries)
    assert set(scores.values()) <= {0, 0.25, 0.5, 0.75, 1}
    assert set(scores.values()) & {0.25, 0.5, 0.75}


def test_an_index_of_another_dimension_is_one_clear_error(trained, tmp_path):
    model = LongEmbedding(dim=DIM // 2)
    engine = EmbeddingAdapterFinetuneEngine.from_index(
        trained.index,
        TRAIN,
        model,
        model_output_path=tmp_path / "adapter",
        cache_dir=tmp_path / "cache",
        show_progress=False,
    )
    with pytest.raises(ArgumentError, match=r"dimension 32, and the documents have 64"):
        engine.finetune()
    assert not (tmp_path / "adapter").exists()
    assert model.text_calls == 0


class Stranger(LongEmbedding):
    """Another model of the same dimension."""

    model_name: str = "stranger"

    def vector(self, text):
        return super().vector(" ".join(f"its_{word}" for word in text.split()))


def test_an_index_of_another_model_is_one_clear_error(trained, tmp_path):
    engine = EmbeddingAdapterFinetuneEngine.from_index(
        trained.index,
        TRAIN,
        Stranger(dim=DIM),
        model_output_path=tmp_path / "adapter",
        cache_dir=tmp_path / "cache",
        show_progress=False,
    )
    with pytest.raises(ArgumentError, match="do not seem to be of this embedding model"):
        engine.finetune()


# --- Retrieving ------------------------------------------------------------------------------


def test_a_retriever_of_the_index_finds_what_the_adapted_query_is_nearest_to(trained):
    for top_k in (1, TOP):
        retriever = trained.engine.get_finetuned_retriever(trained.index, similarity_top_k=top_k)
        for question in list(TEST.queries.values())[:5]:
            expected = by_hand(trained, question, top_k)
            # Chroma through LlamaIndex scores exp(-distance): the order is what counts there.
            assert_same(retriever.retrieve(question), expected, scores=not is_chroma(trained))


def is_chroma(trained):
    return type(trained.index.vector_store).__name__ == "ChromaVectorStore"


def test_a_retriever_is_wrapped_with_its_filters_and_is_not_changed(trained):
    question = next(iter(TEST.queries.values()))
    inner = trained.index.as_retriever(similarity_top_k=TOP, filters=equals("section", "west"))
    before = [node.node.node_id for node in inner.retrieve(question)]
    retriever = trained.engine.get_finetuned_retriever(inner)
    expected = by_hand(trained, question, keep=lambda node: node.metadata["section"] == "west")
    assert_same(retriever.retrieve(question), expected, scores=False)
    assert before != [node for node, _ in expected]
    retriever.similarity_top_k = 2
    assert_same(retriever.retrieve(question), expected[:2], scores=False)
    assert [node.node.node_id for node in inner.retrieve(question)] == before


def test_filters_may_be_combined(trained):
    question = list(TEST.queries.values())[1]
    filters = MetadataFilters(
        filters=[
            MetadataFilter(key="section", value="east"),
            MetadataFilter(key="year", value=2004, operator=">="),
        ],
        condition=FilterCondition.AND,
    )
    retriever = trained.engine.get_finetuned_retriever(
        trained.index, similarity_top_k=TOP, filters=filters
    )
    expected = by_hand(
        trained,
        question,
        keep=lambda node: node.metadata["section"] == "east" and node.metadata["year"] >= 2004,
    )
    found = retriever.retrieve(question)
    assert_same(found, expected, scores=False)
    assert {node.node.metadata["section"] for node in found} == {"east"}


def test_switched_off_it_finds_what_the_index_finds(trained):
    retriever = trained.engine.get_finetuned_retriever(trained.index, similarity_top_k=TOP)
    plain = trained.index.as_retriever(similarity_top_k=TOP)
    question = next(iter(TEST.queries.values()))
    adapted, base = retriever.retrieve(question), plain.retrieve(question)
    assert [node.node.node_id for node in adapted] != [node.node.node_id for node in base]
    retriever.model.enabled = False
    assert_same(retriever.retrieve(question), [(node.node.node_id, node.score) for node in base])
    retriever.model.enabled = True
    assert_same(retriever.retrieve(question), [(node.node.node_id, node.score) for node in adapted])


def test_async_retrieval_finds_the_same(trained):
    questions = list(TEST.queries.values())[:5]
    filters = equals("section", "east")
    expected = [
        by_hand(trained, question, keep=lambda node: node.metadata["section"] == "east")
        for question in questions
    ]

    async def ask(index):
        retriever = trained.engine.get_finetuned_retriever(
            index, similarity_top_k=TOP, filters=filters
        )
        return await asyncio.gather(*[retriever.aretrieve(question) for question in questions])

    for found, wanted in zip(trained.backend.ask(trained.index, NAME, ask), expected, strict=True):
        assert_same(found, wanted, scores=False)


def test_no_match_is_an_empty_list(trained):
    question = next(iter(TEST.queries.values()))
    filters = equals("section", "nowhere")
    retriever = trained.engine.get_finetuned_retriever(trained.index, filters=filters)
    assert retriever.retrieve(question) == []

    async def ask(index):
        retriever = trained.engine.get_finetuned_retriever(index, filters=filters)
        return await retriever.aretrieve(question)

    assert trained.backend.ask(trained.index, NAME, ask) == []


@pytest.mark.parametrize("backend", ["qdrant-memory", "qdrant-folder", "pgvector"], indirect=True)
def test_hybrid_search_takes_the_adapted_vector_and_the_words_as_they_are(trained):
    options = trained.backend.hybrid_options
    # Only its word finds this one: no question of the training names it.
    rare = TextNode(id_=str(uuid.UUID(int=10_000)), text="zirconium", metadata={})
    nodes = [node.model_copy(deep=True) for node in [*NODES, rare]]
    index = trained.backend.build("hybrid", nodes, trained.index._embed_model, DIM, **options)
    assert len(index_vectors(index).ids) == len(nodes)
    settings = {"similarity_top_k": 3, "sparse_top_k": 1, "hybrid_top_k": 4}
    hybrid = {**settings, "vector_store_query_mode": VectorStoreQueryMode.HYBRID}
    question = f"{OTHER.split()[0]} {OTHER.split()[1]} {OTHER.split()[2]} zirconium"
    adapted = trained.engine.get_finetuned_model().get_query_embedding(question)
    expected = index.as_retriever(**hybrid).retrieve(QueryBundle(question, embedding=adapted))
    plain = index.as_retriever(**hybrid).retrieve(question)
    found = trained.engine.get_finetuned_retriever(index, **hybrid).retrieve(question)
    assert_same(found, [(node.node.node_id, node.score) for node in expected])
    assert {node.node.node_id for node in found} != {node.node.node_id for node in plain}
    assert rare.node_id in {node.node.node_id for node in found}


@pytest.mark.parametrize("backend", ["in-memory", "chroma"], indirect=True)
def test_a_search_for_variety_takes_the_adapted_vector(trained):
    mmr = {"similarity_top_k": TOP, "vector_store_query_mode": VectorStoreQueryMode.MMR}
    question = list(TEST.queries.values())[2]
    adapted = trained.engine.get_finetuned_model().get_query_embedding(question)
    expected = trained.index.as_retriever(**mmr).retrieve(QueryBundle(question, embedding=adapted))
    plain = trained.index.as_retriever(**mmr).retrieve(question)
    found = trained.engine.get_finetuned_retriever(trained.index, **mmr).retrieve(question)
    assert_same(found, [(node.node.node_id, node.score) for node in expected])
    assert {node.node.node_id for node in found} != {node.node.node_id for node in plain}


# --- Afterwards ------------------------------------------------------------------------------


def test_what_the_database_holds_is_untouched_bit_for_bit(trained):
    retriever = trained.engine.get_finetuned_retriever(trained.index)
    for question in TEST.queries.values():
        retriever.retrieve(question)
    assert len(trained.dump_before) > 0
    after = trained.backend.dump(trained.index.vector_store)
    assert trained.backend.same(trained.dump_before, after)
