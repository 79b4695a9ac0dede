"""`FinetunedReranker` beside `SentenceTransformerRerank`, and the threshold it drops under."""

import asyncio
import threading

import numpy as np
import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor import SentenceTransformerRerank
from llama_index.core.schema import IndexNode, MetadataMode, NodeWithScore, QueryBundle, TextNode
from model_assets import HashingEmbedding

from ft_core.artifacts import Manifest, saving
from ft_core.datasets import RerankDataset
from ft_core.errors import ArgumentError, DatasetError
from ft_crossencoder import FinetunedReranker, calibrate_threshold
from ft_crossencoder.reranker import KIND

QUERY = "when does the harbour open"


@pytest.fixture
def texts(all_texts):
    return all_texts[:30]


def ids(nodes):
    return [item.node.node_id for item in nodes]


def test_the_nodes_and_scores_are_llama_indexes(folder, make_nodes, texts):
    # Its own window is 512 tokens, which the tiny model has not: texts that fit into 128.
    short = [text[:200] for text in texts]
    theirs = SentenceTransformerRerank(model=folder, top_n=7, device="cpu")
    expected = theirs.postprocess_nodes(make_nodes(short), query_str=QUERY)
    for settings in ({}, {"max_tokens": 200}, {"device": "cpu"}):
        ours = FinetunedReranker(folder, 7, **settings)
        found = ours.postprocess_nodes(make_nodes(short), query_str=QUERY)
        assert ids(found) == ids(expected)
        np.testing.assert_allclose(
            [item.score for item in found], [float(item.score) for item in expected], atol=1e-5
        )
        assert all(type(item.score) is float for item in found)


def test_top_n_none_returns_all_best_first(folder, make_nodes, texts):
    found = FinetunedReranker(folder).postprocess_nodes(make_nodes(texts), query_str=QUERY)
    assert sorted(ids(found)) == sorted(ids(make_nodes(texts)))
    scores = [item.score for item in found]
    assert scores == sorted(scores, reverse=True)


def test_the_callers_nodes_stay_and_the_copies_keep_the_retrieval_score(folder, make_nodes, texts):
    nodes = make_nodes(texts)
    before = [item.model_dump() for item in nodes]
    found = FinetunedReranker(folder, 5).postprocess_nodes(nodes, query_str=QUERY)
    assert [item.model_dump() for item in nodes] == before
    given = {item.node.node_id: item for item in nodes}
    for item in found:
        original = given[item.node.node_id]
        assert item.node.metadata == {"retrieval_score": original.score}
        # For the app alone: what an LLM or an embedding model reads is as it was.
        for mode in (MetadataMode.LLM, MetadataMode.EMBED):
            assert item.node.get_content(metadata_mode=mode) == original.node.get_content(mode)
    bare = FinetunedReranker(folder, 5, keep_retrieval_score=False)
    assert all(not n.node.metadata for n in bare.postprocess_nodes(nodes, query_str=QUERY))


def test_nodes_of_other_kinds_and_without_score(folder):
    node = IndexNode(id_="i", text="harbour gates", index_id="other", metadata={"page": 1})
    (found,) = FinetunedReranker(folder).postprocess_nodes(
        [NodeWithScore(node=node)], query_str=QUERY
    )
    assert isinstance(found.node, IndexNode)
    assert found.node.metadata == {"page": 1}


def test_what_is_read_is_what_the_index_embeds_or_the_text_alone(folder, cross_encoder):
    nodes = [NodeWithScore(node=TextNode(text="gates", metadata={"place": "harbour"}), score=0.1)]
    for mode, text in (("embed", "place: harbour\n\ngates"), ("none", "gates")):
        reranker = FinetunedReranker(folder, metadata_mode=mode)
        (found,) = reranker.postprocess_nodes(nodes, query_str=QUERY)
        assert found.score == pytest.approx(float(cross_encoder.predict((QUERY, text))), abs=1e-5)


def test_fusion_sorts_by_both(folder, make_nodes, texts):
    nodes = make_nodes(texts)
    alone = ids(FinetunedReranker(folder).postprocess_nodes(nodes, query_str=QUERY))
    retrieval = FinetunedReranker(folder, retrieval_weight=1.0)
    assert ids(retrieval.postprocess_nodes(nodes, query_str=QUERY)) == ids(nodes)
    found = FinetunedReranker(folder, retrieval_weight=0.5).postprocess_nodes(
        nodes, query_str=QUERY
    )
    assert ids(found) not in (alone, ids(nodes))
    assert [item.score for item in found] == sorted((n.score for n in found), reverse=True)
    assert np.mean([item.score for item in found]) == pytest.approx(0, abs=1e-6)
    own = {item.node.node_id: item.node.metadata["rerank_score"] for item in found}
    assert sorted(own, key=own.get, reverse=True) == alone


def test_the_threshold_drops_by_the_cross_encoders_score(folder, make_nodes, texts):
    nodes = make_nodes(texts)
    ranked = FinetunedReranker(folder).postprocess_nodes(nodes, query_str=QUERY)
    middle = (ranked[9].score + ranked[10].score) / 2
    for weight in (0.0, 0.5):
        reranker = FinetunedReranker(folder, threshold=middle, retrieval_weight=weight)
        kept = reranker.postprocess_nodes(nodes, query_str=QUERY)
        assert set(ids(kept)) == set(ids(ranked[:10]))
    strict = FinetunedReranker(folder, threshold=2.0)
    assert strict.postprocess_nodes(nodes, query_str=QUERY) == []
    few = FinetunedReranker(folder, 3, threshold=middle)
    assert ids(few.postprocess_nodes(nodes, query_str=QUERY)) == ids(ranked[:3])


def test_async_gives_the_same_and_leaves_the_loop_free(folder, make_nodes, texts, monkeypatch):
    reranker = FinetunedReranker(folder, 5)
    expected = reranker.postprocess_nodes(make_nodes(texts), query_str=QUERY)
    score, threads = reranker.scorer.score, set()

    def spy(pairs):
        threads.add(threading.current_thread())
        return score(pairs)

    monkeypatch.setattr(reranker.scorer, "score", spy)

    async def several():
        return await asyncio.gather(
            *(reranker.apostprocess_nodes(make_nodes(texts), query_str=QUERY) for _ in range(4))
        )

    for found in asyncio.run(several()):
        assert ids(found) == ids(expected)
    assert threads
    assert threading.main_thread() not in threads


def test_no_nodes_no_query_and_odd_text(folder, make_nodes):
    reranker = FinetunedReranker(folder)
    assert reranker.postprocess_nodes([], query_str=QUERY) == []
    with pytest.raises(ArgumentError, match="query_bundle: is missing"):
        reranker.postprocess_nodes(make_nodes(["a"]))
    odd = ["", "\x00\x1b[31m", "\u200b", "\U0001f389 Straße 東京", "word " * 5000]
    assert len(reranker.postprocess_nodes(make_nodes(odd), query_str="\u0007")) == len(odd)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"top_n": 0}, "top_n: is at least 1"),
        ({"retrieval_weight": 1.5}, "retrieval_weight: is from 0 to 1"),
    ],
)
def test_bad_arguments(folder, settings, match):
    with pytest.raises(ArgumentError, match=match):
        FinetunedReranker(folder, **settings)


def test_in_a_query_engine_with_callbacks(folder, texts):
    debug = LlamaDebugHandler(print_trace_on_end=False)
    reranker = FinetunedReranker(folder, 3)
    nodes = [TextNode(id_=str(i), text=text) for i, text in enumerate(texts)]
    index = VectorStoreIndex(nodes, embed_model=HashingEmbedding())
    engine = index.as_query_engine(
        llm=MockLLM(), similarity_top_k=10, node_postprocessors=[reranker]
    )
    response = engine.query(QUERY)
    assert len(response.source_nodes) == 3
    again = asyncio.run(engine.aquery(QUERY))
    assert ids(again.source_nodes) == ids(response.source_nodes)
    reranker.callback_manager = CallbackManager([debug])
    reranker.postprocess_nodes(response.source_nodes, query_str=QUERY)
    (start, end), *_ = debug.get_event_pairs(CBEventType.RERANKING)
    assert start.payload["query_str"] == QUERY
    assert ids(end.payload["nodes"]) == ids(response.source_nodes)
    # The index's own nodes carry no score of this query.
    assert all(not node.metadata for node in index.docstore.docs.values())


def test_an_object_is_taken_as_it_is(cross_encoder, folder):
    reranker = FinetunedReranker(cross_encoder)
    assert reranker.model == folder
    assert reranker.score(QUERY, ["harbour"]) == pytest.approx(
        [float(cross_encoder.predict((QUERY, "harbour")))], abs=1e-5
    )
    assert reranker.to_dict()["model"] == folder


# --- A saved folder -----------------------------------------------------------------------------


@pytest.fixture
def saved(cross_encoder, tmp_path):
    """A folder as the engine saves it."""

    def made(**settings):
        with saving(
            tmp_path / "saved", Manifest(kind=KIND, base_model="b", settings=settings)
        ) as f:
            cross_encoder.save_pretrained(str(f), create_model_card=False)
        return tmp_path / "saved"

    return made


SETTINGS = {"retrieval_weight": 0.5, "passage_tokens": 20, "max_length": 64}


def test_a_saved_folder_reranks_with_the_settings_it_was_trained_with(
    saved, folder, make_nodes, texts
):
    loaded = FinetunedReranker.load(saved(**SETTINGS), 5, device="cpu")
    same = FinetunedReranker(folder, 5, device="cpu", **SETTINGS)
    ours, expected = (
        r.postprocess_nodes(make_nodes(texts), query_str=QUERY) for r in (loaded, same)
    )
    assert ids(ours) == ids(expected)
    np.testing.assert_allclose([n.score for n in ours], [n.score for n in expected], atol=1e-5)
    plain = FinetunedReranker(folder, 5).postprocess_nodes(make_nodes(texts), query_str=QUERY)
    assert ids(ours) != ids(plain)


def test_settings_of_a_saved_folder_can_be_overridden(saved):
    loaded = FinetunedReranker.load(
        saved(**SETTINGS), retrieval_weight=0.0, passage_tokens=None, threshold=0.1
    )
    assert (loaded.top_n, loaded.retrieval_weight, loaded.threshold) == (None, 0.0, 0.1)
    assert loaded.scorer.passage_tokens is None
    assert loaded.scorer.max_length == 64


def test_a_folder_without_passages_or_settings_reads_whole_texts(saved):
    for settings in ({**SETTINGS, "passage_tokens": 0, "max_length": None}, {}):
        loaded = FinetunedReranker.load(saved(**settings))
        assert loaded.scorer.passage_tokens is None
        assert loaded.scorer.max_length == 128


# --- Threshold --------------------------------------------------------------------------------


def labelled(reranker, texts, relevant):
    """One query a list of places; the places are those of the reranker's own order."""
    examples = []
    for number, places in enumerate(relevant):
        query = f"{QUERY} {number}"
        scores = reranker.score(query, texts)
        order = sorted(range(len(texts)), key=lambda i: -scores[i])
        documents = [
            {"text": texts[i], "label": int(place in places)} for place, i in enumerate(order)
        ]
        examples.append({"query": query, "documents": documents})
    return RerankDataset(examples=examples)


def test_the_threshold_keeps_the_wanted_recall_and_no_more(folder, texts):
    reranker = FinetunedReranker(folder)
    dataset = labelled(reranker, texts, [[0, 9], [1], [25], []])
    for recall in (0.1, 0.5, 0.9, 1.0):
        chosen = calibrate_threshold(dataset, reranker, recall=recall)
        assert chosen.recall >= recall
        assert chosen.queries == 3
        kept = dropped = others = 0
        for example in dataset:
            scores = reranker.score(example.query, [d.text for d in example.documents])
            labels = [d.label for d in example.documents]
            over = [score >= chosen.threshold for score in scores]
            if any(labels):
                kept += sum(k for k, label in zip(over, labels, strict=True) if label) / sum(labels)
            dropped += sum(not k for k, label in zip(over, labels, strict=True) if not label)
            others += labels.count(0)
        assert kept / 3 == pytest.approx(chosen.recall)
        assert dropped / others == pytest.approx(chosen.dropped)
    loose, strict = (calibrate_threshold(dataset, reranker, recall=r) for r in (1.0, 0.1))
    assert loose.threshold < strict.threshold
    assert loose.dropped < strict.dropped


def test_a_reranker_with_the_threshold_keeps_what_was_promised(folder, texts):
    reranker = FinetunedReranker(folder)
    dataset = labelled(reranker, texts, [[0, 3], [1], [5]])
    chosen = calibrate_threshold(dataset, reranker, recall=1.0)
    dropping = FinetunedReranker(folder, threshold=chosen.threshold)
    for example in dataset:
        nodes = [NodeWithScore(node=TextNode(id_=d.text, text=d.text)) for d in example.documents]
        kept = ids(dropping.postprocess_nodes(nodes, query_str=example.query))
        assert {d.text for d in example.documents if d.label} <= set(kept)
    few = dropping.postprocess_nodes(
        [NodeWithScore(node=TextNode(text=d.text)) for d in dataset.examples[0].documents],
        QueryBundle(dataset.examples[0].query),
    )
    assert len(few) < len(texts)


def test_a_threshold_needs_judged_candidates(folder):
    reranker = FinetunedReranker(folder)
    unjudged = [{"query": "q", "documents": [{"text": "a"}, {"text": "b", "label": 0}]}]
    with pytest.raises(DatasetError, match="no query has a candidate with a label"):
        calibrate_threshold(unjudged, reranker)
    missed = [{"query": "q", "documents": [{"text": "a", "label": 1, "retrieved": False}]}]
    with pytest.raises(DatasetError, match="no query has a candidate with a label"):
        calibrate_threshold(missed, reranker)
    with pytest.raises(ArgumentError, match="recall: is above 0"):
        calibrate_threshold(unjudged, reranker, recall=0)
