"""Evaluation of real LlamaIndex objects, against LlamaIndex's own evaluator."""

import asyncio
import hashlib
import itertools
import json
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.evaluation import RetrieverEvaluator
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeRelationship, NodeWithScore, RelatedNodeInfo, TextNode

from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.errors import ArgumentError, DatasetError
from ft_core.evaluation import (
    DEFAULT_METRICS,
    Evaluation,
    compare,
    evaluate_embedding,
    evaluate_retriever,
    evaluate_vectors,
)

FRUIT = ["apple", "cherry", "fig", "grape", "lime", "mango", "melon", "peach", "pear", "plum"]


class HashedWords(BaseEmbedding):
    """A real, deterministic embedding: each word adds to one of `width` places."""

    width: int = 64

    def _embed(self, text):
        vector = [0.0] * self.width
        for word in text.lower().split():
            place = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big") % self.width
            vector[place] += 1.0
        return vector

    def _get_text_embedding(self, text):
        return self._embed(text)

    def _get_query_embedding(self, query):
        return self._embed(query)

    async def _aget_query_embedding(self, query):
        return self._embed(query)


class SharedWords(BaseRetriever):
    """A keyword retriever: the nodes that share most words with the query."""

    def __init__(self, nodes, top_k):
        super().__init__()
        self.nodes, self.top_k, self.threads = nodes, top_k, set()

    def _retrieve(self, query_bundle):
        self.threads.add(threading.get_ident())
        time.sleep(0.002)
        words = set(query_bundle.query_str.split())
        found = [NodeWithScore(node=n, score=len(words & set(n.text.split()))) for n in self.nodes]
        found.sort(key=lambda result: result.score, reverse=True)
        return found[: self.top_k]


class Fixed(BaseRetriever):
    """Returns what it is given."""

    def __init__(self, nodes):
        super().__init__()
        self.results = [NodeWithScore(node=node) for node in nodes]

    def _retrieve(self, query_bundle):
        return self.results


@pytest.fixture
def dataset():
    rng = np.random.default_rng(0)
    corpus = {f"d{i}": " ".join(rng.choice(FRUIT, size=6)) for i in range(40)}
    chosen = rng.choice(40, size=25, replace=False)
    return EmbeddingQAFinetuneDataset(
        queries={f"q{i}": " ".join(corpus[f"d{d}"].split()[:2]) for i, d in enumerate(chosen)},
        corpus=corpus,
        relevant_docs={
            f"q{i}": list(dict.fromkeys([f"d{d}", f"d{(d + 1) % 40}"]))
            for i, d in enumerate(chosen)
        },
        grades={"q0": {f"d{chosen[0]}": 3}},
    )


@pytest.fixture
def nodes(dataset):
    return [TextNode(id_=key, text=text) for key, text in dataset.corpus.items()]


def test_embedding_ranks_as_its_vectors_do(dataset):
    model = HashedWords(embed_batch_size=7)
    evaluation = evaluate_embedding(model, dataset, name="words")
    corpus = np.array([model.get_text_embedding(text) for text in dataset.corpus.values()])
    queries = np.array([model.get_query_embedding(text) for text in dataset.queries.values()])
    by_vectors = evaluate_vectors(queries, corpus, dataset, name="vectors")
    assert evaluation.rankings == by_vectors.rankings
    assert evaluation.scores == by_vectors.scores
    assert set(evaluation.scores) == set(DEFAULT_METRICS)
    assert list(evaluation.rankings) == list(dataset.queries)
    assert evaluation.dataset_hash == dataset.content_hash
    assert evaluation.seconds > 0

    cosine = queries @ corpus.T / np.linalg.norm(queries, axis=1)[:, None]
    cosine /= np.linalg.norm(corpus, axis=1)
    ids = list(dataset.corpus)
    for row, ranking in enumerate(evaluation.rankings.values()):
        assert sorted(ranking) == sorted(ids)
        ranked = [cosine[row, ids.index(document)] for document in ranking]
        assert all(a >= b - 1e-6 for a, b in itertools.pairwise(ranked))


def test_equal_documents_rank_as_in_trec_eval():
    dataset = EmbeddingQAFinetuneDataset(
        queries={"q": "x"},
        corpus={"a": "x", "b": "x", "c": "y"},
        relevant_docs={"q": ["a"]},
    )
    evaluation = evaluate_embedding(HashedWords(), dataset, metrics=["mrr"])
    assert evaluation.rankings == {"q": ["b", "a", "c"]}
    assert evaluation.mean("mrr") == 0.5


def test_default_names(dataset, nodes):
    assert evaluate_embedding(HashedWords(model_name="m"), dataset).name == "m"
    assert evaluate_retriever(SharedWords(nodes, 10), dataset).name == "SharedWords"


def test_vector_index_agrees_with_embedding(dataset, nodes):
    model = HashedWords()
    index = VectorStoreIndex(nodes, embed_model=model)
    retrieved = evaluate_retriever(index.as_retriever(similarity_top_k=40), dataset)
    embedded = evaluate_embedding(model, dataset)
    # The two order ties differently, so only what is found, not where.
    for query, ranking in retrieved.rankings.items():
        assert sorted(ranking) == sorted(embedded.rankings[query])
    assert retrieved.dataset_hash == embedded.dataset_hash


@pytest.mark.parametrize("top_k", [1, 5])
def test_llama_index_agrees_on_hit_rate_and_mrr(dataset, nodes, top_k):
    for retriever in (
        VectorStoreIndex(nodes, embed_model=HashedWords()).as_retriever(similarity_top_k=top_k),
        SharedWords(nodes, top_k),
    ):
        ours = evaluate_retriever(retriever, dataset, metrics=["hit_rate", "mrr"])
        evaluator = RetrieverEvaluator.from_metric_names(["hit_rate", "mrr"], retriever=retriever)

        async def theirs(evaluator=evaluator):
            # What `aevaluate_dataset` did, in the releases of llama-index-core that had it.
            pairs = dataset.query_docid_pairs
            return [await evaluator.aevaluate(text, ids, mode=dataset.mode) for text, ids in pairs]

        for query, result in zip(dataset.queries, asyncio.run(theirs()), strict=True):
            assert ours.rankings[query] == result.retrieved_ids
            for metric, value in result.metric_vals_dict.items():
                assert ours.scores[metric][query] == pytest.approx(value)


def test_workers_keep_the_order(dataset, nodes):
    alone, together = SharedWords(nodes, 10), SharedWords(nodes, 10)
    first = evaluate_retriever(alone, dataset)
    second = evaluate_retriever(together, dataset, workers=8)
    assert list(first.rankings.items()) == list(second.rankings.items())
    assert alone.threads == {threading.get_ident()}
    assert len(together.threads) > 1


def test_chunks_count_as_the_document_they_were_cut_from(dataset):
    def chunk(key, source):
        relation = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id=source)}
        return TextNode(id_=key, text="x", relationships=relation)

    retriever = Fixed([chunk("c1", "d3"), chunk("c2", "d3"), chunk("d4", "d5"), chunk("c3", "no")])
    evaluation = evaluate_retriever(retriever, dataset, metrics=["mrr"])
    assert evaluation.rankings["q0"] == ["d3", "d4", "c3"]


def test_metrics_beyond_what_a_retriever_returns_are_warned_of(dataset, nodes):
    with pytest.warns(UserWarning, match=r"at most 2 documents .* hit_rate@5, .* similarity_top_k"):
        evaluate_retriever(SharedWords(nodes, 2), dataset)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate_retriever(SharedWords(nodes, 10), dataset)


def test_bad_retrievers(dataset, nodes):
    with pytest.raises(ArgumentError, match=r"ids that .* does not know, such as 'other'.*'d0'"):
        evaluate_retriever(Fixed([TextNode(id_="other", text="x")]), dataset)
    with pytest.raises(ArgumentError, match="returned nothing for any query"):
        evaluate_retriever(Fixed([]), dataset)
    with pytest.raises(ArgumentError, match="workers: must be at least 1"):
        evaluate_retriever(Fixed(nodes), dataset, workers=0)
    with pytest.raises(ArgumentError, match="as_retriever"):
        evaluate_retriever(VectorStoreIndex(nodes, embed_model=HashedWords()), dataset)


@pytest.mark.parametrize("workers", [1, 4])
def test_failing_retriever_names_the_query(dataset, nodes, workers):
    class Failing(SharedWords):
        def _retrieve(self, query_bundle):
            if query_bundle.query_str == dataset.queries["q7"]:
                raise ConnectionError("no route")
            return super()._retrieve(query_bundle)

    with pytest.raises(ArgumentError, match=r"queries\['q7'\]: ConnectionError: no route") as info:
        evaluate_retriever(Failing(nodes, 10), dataset, workers=workers)
    assert isinstance(info.value.__cause__, ConnectionError)


@pytest.mark.parametrize("vector", [[float("nan")] * 64, [1.0] * 63])
def test_bad_vectors_name_the_text(dataset, vector):
    class Broken(HashedWords):
        bad: str

        def _embed(self, text):
            return vector if text == self.bad else super()._embed(text)

    with pytest.raises(ArgumentError, match=r"model: gave a vector .* for corpus\['d5'\]"):
        evaluate_embedding(Broken(bad=dataset.corpus["d5"]), dataset)
    with pytest.raises(ArgumentError, match=r"model: gave a vector .* for queries\['q5'\]"):
        evaluate_embedding(Broken(bad=dataset.queries["q5"]), dataset)


def test_bad_arguments_are_found_before_any_work(dataset):
    class Untouched(HashedWords):
        def _embed(self, text):
            raise AssertionError("embedded")

    model = Untouched()
    for settings, message in [
        ({"metrics": ["nope@3"]}, "metrics: 'nope@3'"),
        ({"metrics": "ndcg@10"}, "metrics: name at least one in a list"),
        ({"metrics": []}, "metrics: name at least one in a list"),
        ({"metrics": ["ndcg@10"], "top_k": 5}, "top_k: ndcg@10 needs at least 10"),
        ({"metrics": ["mrr"], "top_k": 0}, "top_k: must be at least 1"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            evaluate_embedding(model, dataset, **settings)
    with pytest.raises(ArgumentError, match="model: object is not a LlamaIndex embedding"):
        evaluate_embedding(object(), dataset)


def test_vectors_must_fit_the_dataset(dataset):
    corpus, queries = np.ones((40, 3)), np.ones((25, 3))
    with pytest.raises(ArgumentError, match="corpus_vectors: has 39 rows for 40 corpus"):
        evaluate_vectors(queries, corpus[:39], dataset, name="x")
    corpus[6, 1] = np.nan
    with pytest.raises(ArgumentError, match=r"corpus_vectors: the vector of corpus\['d6'\] holds"):
        evaluate_vectors(queries, corpus, dataset, name="x")


def test_save_and_load(dataset, tmp_path):
    evaluation = evaluate_embedding(HashedWords(), dataset)
    evaluation.save(tmp_path / "new" / "base.json")
    loaded = Evaluation.load(tmp_path / "new" / "base.json")
    assert loaded == evaluation
    assert loaded.interval("ndcg@10") == evaluation.interval("ndcg@10")
    low, high = loaded.interval("ndcg@10")
    assert low < loaded.mean("ndcg@10") < high
    with pytest.raises(ArgumentError, match="'mrr@3' was not evaluated for 'unknown'; there are"):
        loaded.mean("mrr@3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop("rankings"), r"base\.json: rankings: not a saved evaluation: Field req"),
        (lambda e: e["scores"]["mrr"].pop("q0"), r"base\.json: scores\['mrr'\]: other queries"),
        (lambda e: e["scores"]["mrr"].update(q0=float("nan")), r"\['q0'\]: nan is not a finite"),
        (lambda e: e.update(rankings={}), r"base\.json: rankings: has no query"),
    ],
)
def test_damaged_file(dataset, tmp_path, change, message):
    path = tmp_path / "base.json"
    evaluate_embedding(HashedWords(), dataset, metrics=["mrr"]).save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=message):
        Evaluation.load(path)


def test_compare(dataset):
    base = evaluate_embedding(HashedWords(width=4), dataset, name="narrow")
    other = evaluate_embedding(HashedWords(width=256), dataset, name="wide")
    result = compare(base, other, "ndcg@10")
    assert result.difference == pytest.approx(other.mean("ndcg@10") - base.mean("ndcg@10"))
    assert result.n == len(dataset.queries)
    assert 0 < result.p_value < 0.05
    assert result.low < result.difference < result.high
    turned = other.model_copy(
        update={"scores": {m: dict(reversed(v.items())) for m, v in other.scores.items()}}
    )
    assert compare(base, turned, "ndcg@10") == result  # paired by id, not by position


def test_compare_refuses_what_does_not_match(dataset):
    base = evaluate_embedding(HashedWords(), dataset)
    half = dataset.select([f"q{i}" for i in range(10)])
    with pytest.raises(ArgumentError, match="different datasets"):
        compare(base, evaluate_embedding(HashedWords(), half), "mrr@10")
    fewer = evaluate_embedding(HashedWords(), half).model_copy(
        update={"dataset_hash": base.dataset_hash}
    )
    with pytest.raises(ArgumentError, match="different queries"):
        compare(base, fewer, "mrr@10")


def test_no_progress_where_stderr_is_no_terminal(dataset, capfd):
    evaluate_embedding(HashedWords(), dataset)
    assert capfd.readouterr() == ("", "")


def test_import_loads_nothing_heavy():
    code = (
        "import ft_core.evaluation, sys;"
        "print([m for m in ('torch', 'transformers', 'llama_index.core', 'scipy') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
