"""`RerankHandler` on real query engines: what it records, exports, and never harms."""

import asyncio
import json

import model_assets
import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor import (
    LongContextReorder,
    SentenceTransformerRerank,
    SimilarityPostprocessor,
)
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from ft_core.datasets import RerankDataset
from ft_core.errors import ArgumentError, ArtifactError, DatasetError
from ft_core.rerank_hook import RerankHandler

TEXTS = {
    "fee": "the late fee is four euros a week",
    "hours": "the library opens at dawn and closes at dusk",
    "card": "a lost card costs four coins",
    "river": "the bridge over the river",
    "bell": "the bell of the tower",
}
QUERY = "what is the late fee"


class OverlapRerank(BaseNodePostprocessor):
    """Keeps the nodes with the most words of the query, in copies of its own."""

    top_n: int = 5
    model: str = "overlap-1"

    def _postprocess_nodes(self, nodes, query_bundle=None):
        asked = set(query_bundle.query_str.split())
        scored = [
            NodeWithScore(node=item.node, score=len(asked & set(item.node.text.split())))
            for item in nodes
        ]
        return sorted(scored, key=lambda item: -item.score)[: self.top_n]


class Reversing(BaseNodePostprocessor):
    """Reorders, and is named nothing of the kind."""

    def _postprocess_nodes(self, nodes, query_bundle=None):
        return nodes[::-1]


class FailingRerank(BaseNodePostprocessor):
    def _postprocess_nodes(self, nodes, query_bundle=None):
        raise RuntimeError("the app's own")


@pytest.fixture
def index():
    nodes = [TextNode(id_=key, text=text) for key, text in TEXTS.items()]
    return VectorStoreIndex(nodes, embed_model=model_assets.HashingEmbedding())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of an untrained cross-encoder."""
    return model_assets.tiny_cross_encoder(tmp_path_factory.mktemp("tiny"), TEXTS.values())


@pytest.fixture
def handler(tmp_path):
    handler = RerankHandler(tmp_path / "reranked.jsonl")
    yield handler
    handler.detach()


def engine_of(index, *postprocessors, top_k=4):
    return index.as_query_engine(
        llm=MockLLM(), similarity_top_k=top_k, node_postprocessors=list(postprocessors)
    )


def lines(handler):
    return [json.loads(line) for line in handler.path.read_text().splitlines()]


def nodes(*keys):
    return [
        NodeWithScore(node=TextNode(id_=key, text=TEXTS[key]), score=0.9 - place / 10)
        for place, key in enumerate(keys)
    ]


def ids(nodes):
    return [item.node.node_id for item in nodes]


@pytest.mark.parametrize("kind", ["copying", "overwriting"])
def test_query_mark_export(index, handler, folder, kind, tmp_path):
    if kind == "copying":
        reranker = OverlapRerank(top_n=2)
    else:  # writes its scores into the very nodes that it is given
        reranker = SentenceTransformerRerank(model=folder, top_n=2, device="cpu")
    engine = engine_of(index, reranker, SimilarityPostprocessor(similarity_cutoff=0.0))
    retrieved = index.as_retriever(similarity_top_k=4).retrieve(QUERY)
    handler.attach(engine)
    response = engine.query(QUERY)
    kept = ids(response.source_nodes)
    dropped = next(key for key in ids(retrieved) if key not in kept)
    handler.mark(handler.last_query_id, kept[0])
    handler.mark(handler.last_query_id, dropped, relevant=False)
    engine.query("nobody marks this")

    (record,) = [line for line in lines(handler) if line.get("query") == QUERY]
    assert [row[0] for row in record["nodes"]] == ids(retrieved)
    assert [row[2] for row in record["nodes"]] == [item.score for item in retrieved]
    assert [row[0] for row in record["kept"]] == kept
    assert [row[1] for row in record["kept"]] == [float(n.score) for n in response.source_nodes]
    assert record["seconds"] > 0

    dataset = handler.to_dataset()
    (example,) = dataset
    assert (example.id, example.query) == (record["id"], QUERY)
    assert [d.id for d in example.documents] == ids(retrieved)
    assert [d.text for d in example.documents] == [TEXTS[key] for key in ids(retrieved)]
    assert [d.retrieval_score for d in example.documents] == [item.score for item in retrieved]
    labels = {d.id: d.label for d in example.documents}
    assert labels == dict.fromkeys(ids(retrieved)) | {kept[0]: 1.0, dropped: 0.0}
    assert example.metadata["kept"] == kept
    assert example.metadata["reranker"] == type(reranker).__name__
    assert example.metadata["model"] == reranker.model
    assert example.metadata["seconds"] == record["seconds"]
    assert example.metadata["time"] == record["time"]
    assert all(d.teacher_score is None for d in example.documents)
    dataset.save(tmp_path / "train.jsonl")
    assert RerankDataset.load(tmp_path / "train.jsonl") == dataset


def test_the_rerankers_scores_teach_another(index, handler):
    engine = engine_of(index, OverlapRerank(top_n=2))
    handler.attach(engine)
    found = {n.node.node_id: n.score for n in engine.query(QUERY).source_nodes}
    (example,) = handler.to_dataset(reranker_scores=True)
    scores = {d.id: d.teacher_score for d in example.documents}
    assert scores == dict.fromkeys(scores) | found
    assert len(scores) == 4
    with pytest.raises(DatasetError, match="of 1 queries none has a marked node"):
        handler.to_dataset()
    (unmarked,) = handler.to_dataset(unmarked=True)
    assert all(d.teacher_score is None and d.label is None for d in unmarked.documents)


def test_async_and_repeated_queries_are_one_example(index, handler):
    engine = engine_of(index, OverlapRerank(top_n=2))
    with handler.attach(engine), handler.collect() as query_ids:
        engine.query(QUERY)
        asyncio.run(engine.aquery(QUERY))
    assert handler.query_ids(QUERY) == query_ids
    assert len(query_ids) == 2
    handler.mark(query_ids[1], "fee")
    (example,) = handler.to_dataset()
    assert example.id == query_ids[0]
    engine.query("after detaching")
    assert len(handler.query_ids("after detaching")) == 0


def test_a_marked_node_that_was_no_candidate_stands_behind(index, handler):
    narrow = engine_of(index, OverlapRerank(), top_k=2)
    wide = engine_of(index, OverlapRerank(), top_k=5)
    handler.attach([narrow, wide])
    wide.query("all of them")
    narrow.query(QUERY)
    candidates = ids(index.as_retriever(similarity_top_k=2).retrieve(QUERY))
    other = next(key for key in TEXTS if key not in candidates)
    handler.mark(handler.last_query_id, other)
    (example,) = handler.to_dataset()
    assert [d.id for d in example.candidates] == candidates
    (behind,) = [d for d in example.documents if not d.retrieved]
    assert (behind.id, behind.label, behind.retrieval_score) == (other, 1.0, None)


def test_what_an_earlier_call_found_keeps_its_score(handler):
    reranker = OverlapRerank()
    handler.attach(reranker)
    reranker.postprocess_nodes(nodes("fee", "hours", "river"), query_str="late?")
    handler.mark(handler.last_query_id, "river", relevant=False)
    reranker.postprocess_nodes(nodes("fee", "hours"), QueryBundle("late?"))
    reranker.postprocess_nodes(nodes("bell"), query_bundle=QueryBundle("bell?"))
    handler.mark(handler.last_query_id, "bell")
    late, bell = handler.to_dataset().examples
    assert [(d.id, d.retrieved, d.label) for d in late.documents] == [
        ("fee", True, None),
        ("hours", True, None),
        ("river", False, 0),
    ]
    assert [d.retrieval_score for d in late.documents] == [0.9, 0.8, 0.7]
    assert [d.id for d in bell.documents] == ["bell"]


def test_another_process_exports(index, handler):
    engine = engine_of(index, OverlapRerank())
    with handler.attach(engine):
        engine.query(QUERY)
        handler.mark(handler.last_query_id, "fee")
    assert RerankHandler.read(handler.path).to_dataset() == handler.to_dataset()


def test_odd_nodes(handler):
    reranker = OverlapRerank()
    items = nodes(*["fee"] * 6)
    for place, text in enumerate(["same text", "same text", " ", "\ud800 half", "z", "\u200b"]):
        items[place].node = TextNode(id_=f"n{place}", text=text)
    items[4].score = float("nan")
    with handler.attach(reranker):
        reranker.postprocess_nodes(items, query_str="text?")
        reranker.postprocess_nodes(items, query_str="\u200b")
    (example,) = handler.to_dataset(unmarked=True)
    assert [d.text for d in example.documents] == ["same text", "? half", "z"]
    assert example.documents[2].retrieval_score is None
    assert not handler.failures


def test_only_rerankers_are_watched_unless_others_are_named(index, handler, tmp_path):
    others = [SimilarityPostprocessor(similarity_cutoff=0.0), LongContextReorder(), Reversing()]
    with pytest.raises(ArgumentError, match="target: found no postprocessor whose class is named"):
        handler.attach(engine_of(index, *others))
    own = RerankHandler(tmp_path / "own.jsonl", rerankers=(Reversing,))
    engine = engine_of(index, OverlapRerank(), *others)
    with handler.attach(engine) as default, own.attach(engine) as named:
        assert [type(c) for c in default.components] == [OverlapRerank]
        assert [type(c) for c in named.components] == [Reversing]
        response = engine.query(QUERY)
    (record,) = lines(own)
    assert record["reranker"] == "Reversing"
    assert [row[0] for row in record["kept"]] == ids(response.source_nodes)
    assert [row[0] for row in record["nodes"]] == ids(response.source_nodes)[::-1]
    with pytest.raises(ArgumentError, match=r"rerankers: .* is no class of LlamaIndex"):
        RerankHandler(tmp_path / "x.jsonl", rerankers=(dict,))
    with pytest.raises(ArgumentError, match="found no Reversing inside"):
        own.attach(engine_of(index, OverlapRerank()))


def test_the_apps_errors_pass_and_are_not_recorded(index, handler):
    engine = engine_of(index, FailingRerank())
    with handler.attach(engine), pytest.raises(RuntimeError, match="the app's own"):
        engine.query(QUERY)
    assert not handler.path.exists()
    assert not handler.failures
    assert handler.last_query_id is None


def test_a_failing_hook_harms_nothing(index, tmp_path):
    def redact(text):
        raise ValueError("no redaction today")

    handler = RerankHandler(tmp_path / "r.jsonl", redact=redact)
    reranker = OverlapRerank(top_n=2)
    expected = ids(engine_of(index, reranker).query(QUERY).source_nodes)
    with handler.attach(reranker):
        assert ids(engine_of(index, reranker).query(QUERY).source_nodes) == expected
    assert handler.failures["ValueError"] == 1
    assert not handler.path.exists()
    handler.mark(None, "fee")
    assert handler.failures["ArgumentError"] == 1


def test_a_redaction_that_returns_no_text_writes_nothing(tmp_path):
    handler = RerankHandler(tmp_path / "r.jsonl", redact=lambda text: None)
    with handler.attach(OverlapRerank(top_n=2)) as attachment:
        attachment.components[0].postprocess_nodes(nodes("fee"), query_str=QUERY)
    assert handler.failures == {"ArgumentError": 1}
    assert not handler.path.exists()


def test_secrets_are_redacted(tmp_path):
    handler = RerankHandler(tmp_path / "r.jsonl", redact=lambda text: text.replace("late", "XXXX"))
    with handler.attach(OverlapRerank(top_n=2)) as attachment:
        attachment.components[0].postprocess_nodes(
            [NodeWithScore(node=TextNode(text=TEXTS["fee"]), score=1.0)], query_str=QUERY
        )
    assert "late" not in handler.path.read_text()
    assert handler.query_ids(QUERY)


def test_nothing_to_learn_from_is_not_recorded(handler, tmp_path):
    reranker = Reversing()
    own = RerankHandler(tmp_path / "own.jsonl", rerankers=(Reversing,))
    with own.attach(reranker):
        reranker.postprocess_nodes(nodes("fee"))
        reranker.postprocess_nodes(nodes("fee"), query_str=" ")
        assert reranker.postprocess_nodes([], query_str=QUERY) == []
    assert not own.path.exists()
    assert not own.failures
    assert own.last_query_id is None


def test_a_foreign_journal_is_refused(tmp_path, handler):
    path = tmp_path / "foreign.jsonl"
    path.write_text('{"type": "retrieval", "id": "a", "query": "q", "nodes": []}\n')
    with pytest.raises(ArtifactError, match="holds a line that no RerankHandler wrote"):
        RerankHandler(path)
    with pytest.raises(DatasetError, match="no reranking is recorded"):
        handler.to_dataset()
