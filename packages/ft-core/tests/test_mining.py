"""Hard negatives from real sources: an embedding, a vector index's retriever, BM25."""

import logging
import math
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_index.core import VectorStoreIndex
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import NodeWithScore, TextNode
from pydantic import PrivateAttr

from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.datasets.duplicates import similarity
from ft_core.errors import ArgumentError
from ft_core.mining import bm25_tokens, mine_hard_negatives


class HashEmbedding(BaseEmbedding):
    """A bag of hashed words: deterministic, and alike where words are shared."""

    sign: float = 1.0
    _asked: list[str] = PrivateAttr(default_factory=list)

    def _vector(self, text):
        self._asked.append(text)
        vector = np.zeros(64)
        for word in text.lower().split():
            vector[zlib.crc32(word.encode()) % 64] += 1
        return list(vector)

    def _get_text_embedding(self, text):
        return self._vector(text)

    def _get_query_embedding(self, query):
        return [self.sign * value for value in self._vector(query)]

    async def _aget_query_embedding(self, query):
        return self._get_query_embedding(query)


class ScriptedRetriever(BaseRetriever):
    """Answers every query with the same nodes and scores."""

    def __init__(self, results):
        super().__init__()
        self.results = results

    def _retrieve(self, query_bundle):
        return [
            NodeWithScore(node=TextNode(id_=key, text=key), score=score)
            for key, score in self.results
        ]


def dataset_of(queries, corpus, relevant):
    return EmbeddingQAFinetuneDataset(queries=queries, corpus=corpus, relevant_docs=relevant)


@pytest.fixture
def dataset():
    corpus = {
        "answer": "net revenue in 2021 was 3.2 billion dollars for the company",
        "close": "net revenue in 2021 excludes the bookings of drivers",
        "closer": "net revenue in 2021 for the segment",
        "copy": "Net revenue in 2021 was 3.2 billion dollars, for the company.",
        "far": "our headquarters are in San Francisco California",
        "other": "auditors opinion on internal control",
    }
    queries = {
        "q1": "what was net revenue in 2021 was dollars",
        "q2": "auditors opinion on control",
    }
    return dataset_of(queries, corpus, {"q1": ["answer"], "q2": ["other"]})


def retriever_over(dataset, model, **options):
    nodes = [TextNode(id_=key, text=text) for key, text in dataset.corpus.items()]
    return VectorStoreIndex(nodes, embed_model=model).as_retriever(**options)


@pytest.fixture(params=["bm25", "embedding", "retriever"])
def source(request, dataset):
    model = HashEmbedding()
    return {
        "bm25": lambda: "bm25",
        "embedding": lambda: model,
        "retriever": lambda: retriever_over(dataset, model, similarity_top_k=2),
    }[request.param]()


def test_every_source_finds_the_hard_ones_first(dataset, source):
    negatives = mine_hard_negatives(dataset, source, num_negatives=2, range_max=5)
    assert list(negatives) == ["q1", "q2"]
    assert negatives["q1"] == ["closer", "close"]
    assert "other" not in negatives["q2"]
    assert "copy" not in negatives["q1"]  # another id and other commas, the same text


def test_without_the_guards_the_copy_comes_first(dataset, source):
    negatives = mine_hard_negatives(
        dataset,
        source,
        num_negatives=2,
        range_max=5,
        relative_margin=None,
        duplicate_threshold=None,
    )
    assert negatives["q1"][0] == "copy"


def test_the_callers_retriever_is_left_as_it_was(dataset):
    retriever = retriever_over(dataset, HashEmbedding(), similarity_top_k=2)
    assert len(mine_hard_negatives(dataset, retriever, range_max=5)["q1"]) > 2
    assert retriever.similarity_top_k == 2


def test_each_distinct_text_is_embedded_once(dataset):
    corpus = dict(dataset.corpus, again=dataset.corpus["far"], answer2=dataset.corpus["answer"])
    queries = dict(dataset.queries, q3=dataset.queries["q1"])
    relevant = dict(dataset.relevant_docs, q3=["answer2"])
    model = HashEmbedding()
    negatives = mine_hard_negatives(
        dataset_of(queries, corpus, relevant), model, range_max=8, duplicate_threshold=None
    )
    assert sorted(model._asked) == sorted({*corpus.values(), *queries.values()})
    # An equal text under another id is no negative even with the duplicate guard off.
    assert {"answer", "answer2"}.isdisjoint(negatives["q1"] + negatives["q3"])
    assert not {"far", "again"} <= set(negatives["q1"])


def scripted(scores, relevant, **options):
    """Mine for one query from given (document, score) pairs."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    corpus = {key: letters[i % 26] * 9 + f"{i:03}" for i, (key, _) in enumerate(scores)}
    corpus.setdefault("unreturned", "zyxwvu")
    dataset = dataset_of({"q": "query"}, corpus, {"q": relevant})
    options = {"num_negatives": 1000, "range_max": 1000, **options}
    return mine_hard_negatives(dataset, ScriptedRetriever(scores), **options)["q"]


@pytest.mark.parametrize(
    ("scores", "options", "expected"),
    [
        ({"x": 0.96, "p": 1.0, "y": 0.95, "z": 0.1}, {}, ["y", "z"]),
        ({"x": 0.96, "p": 1.0, "y": 0.95}, {"relative_margin": None}, ["x", "y"]),
        ({"x": 2.0, "p": 1.0, "y": 1.0, "z": 0.9}, {"relative_margin": 0}, ["y", "z"]),
        ({"p": 1.0, "x": 0.9, "y": 0.75, "z": 0.7}, {"absolute_margin": 0.25}, ["y", "z"]),
        ({"p": 1.0, "x": 0.9, "y": 0.7}, {"relative_margin": 0.25, "absolute_margin": 0.01}, ["y"]),
        # Below zero the margin still asks for a lower score, not a higher one.
        ({"p": -10.0, "x": -10.4, "y": -10.5, "z": -20.0}, {}, ["y", "z"]),
        ({"p": 0.0, "x": 0.1, "y": 0.0, "z": -0.1}, {}, ["y", "z"]),
    ],
)
def test_margins(scores, options, expected):
    assert scripted(list(scores.items()), ["p"], **options) == expected


def test_the_lowest_relevant_score_counts():
    scores = [("p1", 1.0), ("x", 0.9), ("p2", 0.5), ("y", 0.4)]
    assert scripted(scores, ["p1", "p2"]) == ["y"]
    assert scripted(scores, ["p1", "p2", "unreturned"]) == ["y"]


def test_without_a_score_of_the_relevant_one_ranks_decide():
    assert scripted([("x", 0.9), ("y", 0.4)], ["unreturned"]) == ["x", "y"]
    assert scripted([("x", None), ("p", None), ("y", None)], ["p"]) == ["x", "y"]


def test_the_range_counts_ranks_without_the_relevant_ones():
    scores = [("p", 9.0), *[(f"n{i}", 8.0 - i / 10) for i in range(10)]]
    options = {"num_negatives": 2, "relative_margin": None}
    assert scripted(scores, ["p"], range_min=3, range_max=6, **options) == ["n3", "n4"]
    assert scripted(scores, ["p"], range_min=3, range_max=5, **options) == ["n3", "n4"]
    assert scripted(scores, ["p"], range_min=9, range_max=11, **options) == ["n9"]


def test_random_sampling_is_seeded_and_in_range():
    scores = [("p", 9.0), *[(f"n{i}", 8.0 - i / 100) for i in range(50)]]
    options = {"num_negatives": 5, "range_max": 30, "sampling_strategy": "random"}
    draws = [scripted(scores, ["p"], seed=seed, **options) for seed in range(8)]
    assert len({tuple(draw) for draw in draws}) > 1
    assert draws[0] == scripted(scores, ["p"], seed=0, **options)
    for draw in draws:
        assert len(set(draw)) == 5
        assert set(draw) <= {f"n{i}" for i in range(30)}
        assert draw == sorted(draw, key=lambda key: int(key[1:]))  # the hardest first


def test_a_negative_is_not_taken_twice_in_other_words(dataset):
    corpus = dict(dataset.corpus, closer2="Net revenue, in 2021, for the segment!")
    twice = dataset_of(dataset.queries, corpus, dataset.relevant_docs)
    negatives = mine_hard_negatives(twice, HashEmbedding(), range_max=6)
    assert len({"closer", "closer2"} & set(negatives["q1"])) == 1


corpora = st.lists(
    st.lists(
        st.sampled_from(["red", "green", "blue", "cyan", "black", "white", "grey"]),
        min_size=1,
        max_size=6,
    ),
    min_size=2,
    max_size=9,
).map(lambda rows: {f"d{i}": " ".join(words) for i, words in enumerate(rows)})


@settings(max_examples=80, deadline=None)
@given(
    corpora, st.data(), st.sampled_from([None, 0.0, 0.05, 0.5]), st.sampled_from(["top", "random"])
)
def test_no_negative_breaks_a_rule(corpus, data, margin, sampling):
    ids = st.lists(st.sampled_from(list(corpus)), min_size=1, max_size=3, unique=True)
    relevant = {f"q{i}": data.draw(ids) for i in range(3)}
    queries = {"q0": "red green", "q1": "blue", "q2": "red red white grey"}
    dataset = dataset_of(queries, corpus, relevant)
    model = HashEmbedding()

    def score(query, document):
        a = np.array(model._vector(queries[query]))
        b = np.array(model._vector(corpus[document]))
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))

    negatives = mine_hard_negatives(
        dataset, model, num_negatives=3, relative_margin=margin, sampling_strategy=sampling
    )
    assert negatives.keys() == queries.keys()
    for query, found in negatives.items():
        assert len(set(found)) == len(found) <= 3
        lowest = min(score(query, document) for document in relevant[query])
        for document in found:
            assert document not in relevant[query]
            assert all(similarity(corpus[document], corpus[d]) < 0.8 for d in relevant[query])
            if margin is not None:
                assert score(query, document) <= lowest * (1 - margin) + 1e-6
        if sampling == "top" and not found:
            for document in corpus:
                assert (
                    document in relevant[query]
                    or any(similarity(corpus[document], corpus[d]) >= 0.8 for d in relevant[query])
                    or score(query, document) > lowest * (1 - (margin or 0)) - 1e-6
                )


def test_queries_that_get_too_few_are_counted(dataset, caplog):
    with caplog.at_level(logging.WARNING):
        negatives = mine_hard_negatives(dataset, "bm25", num_negatives=5)
    assert negatives["q2"] == []
    assert "of 2 queries, 1 have no hard negative and 1 fewer than 5" in caplog.text


def test_bm25_knows_words_of_any_language():
    assert bm25_tokens("What's the C# API, 2021?") == ["what", "s", "the", "c#", "api", "2021"]
    assert bm25_tokens("売上高は 3 Yen") == ["売上", "上高", "高は", "3", "yen"]
    assert bm25_tokens("GPU価格") == ["gpu", "価格"]
    assert bm25_tokens("株") == ["株"]
    corpus = {"a": "売上高は増加した", "b": "売上高は前年より減少", "c": "従業員数"}
    dataset = dataset_of({"q": "売上高は増加"}, corpus, {"q": ["a"]})
    assert mine_hard_negatives(dataset, "bm25")["q"] == ["b"]


def test_bm25_with_a_query_of_unknown_words(dataset):
    queries = dict(dataset.queries, q1="zzz yyy")
    unknown = dataset_of(queries, dataset.corpus, dataset.relevant_docs)
    assert mine_hard_negatives(unknown, "bm25", relative_margin=None)["q1"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_negatives": 0}, "num_negatives: must be at least 1"),
        ({"range_min": -1}, "range_min: must be at least 0"),
        ({"range_max": 3}, "range_max: must leave room for 4"),
        ({"range_min": 97}, "range_max: must leave room for 4 negatives above range_min=97"),
        ({"relative_margin": -0.1}, "relative_margin: must be at least 0"),
        ({"absolute_margin": math.nan}, "absolute_margin: must be at least 0"),
        ({"duplicate_threshold": 0}, "duplicate_threshold: is above 0"),
        ({"sampling_strategy": "best"}, 'sampling_strategy: is "top" or "random", not \'best\''),
    ],
)
def test_bad_arguments_are_named(dataset, options, message):
    with pytest.raises(ArgumentError) as caught:
        mine_hard_negatives(dataset, "bm25", **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("bad", ["bm26", None, 3, np.eye(2)])
def test_a_bad_source_is_named(dataset, bad):
    with pytest.raises(
        ArgumentError, match='source: is a LlamaIndex embedding, a retriever or "bm25"'
    ):
        mine_hard_negatives(dataset, bad)


def test_nan_vectors_and_scores_are_named(dataset):
    class Broken(HashEmbedding):
        def _get_text_embedding(self, text):
            return [math.nan if "auditors" in text else 1.0] * 4

    with pytest.raises(ArgumentError, match=r"corpus\['other'\]"):
        mine_hard_negatives(dataset, Broken())
    with pytest.raises(ArgumentError, match=r"corpus\['far'\] the score nan for queries\['q1'\]"):
        mine_hard_negatives(dataset, ScriptedRetriever([("far", math.nan)]))


def test_a_retriever_of_other_documents_is_refused(dataset):
    with pytest.raises(
        ArgumentError, match="only nodes that the corpus does not know, such as 'x'"
    ):
        mine_hard_negatives(dataset, ScriptedRetriever([("x", 1.0)]))
    with pytest.raises(ArgumentError, match="returned nothing for any query"):
        mine_hard_negatives(dataset, ScriptedRetriever([]))


def test_a_retriever_that_fails_is_named_with_the_query(dataset):
    class Down(ScriptedRetriever):
        def _retrieve(self, query_bundle):
            raise ConnectionError("the store is down")

    with pytest.raises(
        ArgumentError, match=r"source: failed on queries\['q1'\]: ConnectionError: the"
    ):
        mine_hard_negatives(dataset, Down([]))


def test_blocks_of_queries_join_up(dataset, monkeypatch):
    expected = mine_hard_negatives(dataset, HashEmbedding(), range_max=5)
    monkeypatch.setattr("ft_core.mining._QUERY_BLOCK", 1)
    assert mine_hard_negatives(dataset, HashEmbedding(), range_max=5) == expected
