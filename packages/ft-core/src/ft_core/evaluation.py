"""Run an embedding model, a retriever or a reranker over a dataset, and compare the outcomes.

Runs of all kinds, and the answers of language models that a pack has collected
(`AnswerEvaluation`), are `Scores`: metric to query to value.

base = evaluate_embedding(base_model, dataset)
tuned = evaluate_embedding(tuned_model, dataset)
print(tuned.mean("ndcg@10"), tuned.interval("ndcg@10"))
print(compare(base, tuned, "ndcg@10").p_value)
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from typing_extensions import Self

from ft_core.datasets import EmbeddingQAFinetuneDataset, RerankDataset, RerankDocument
from ft_core.embedding import embed_corpus, embed_queries
from ft_core.errors import ArgumentError, DatasetError
from ft_core.files import atomic_write, read_json
from ft_core.metrics import (
    Interval,
    PairedTest,
    bootstrap_interval,
    paired_randomisation_test,
    parse_metric,
    rank_documents,
    score_rankings,
)
from ft_core.progress import progress
from ft_core.search import check_vectors, exact_top_k

if TYPE_CHECKING:
    from llama_index.core.base.base_retriever import BaseRetriever
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import NodeWithScore

logger = logging.getLogger(__name__)

ScoreFunction = Callable[[str, list[str]], Sequence[float]]
"""Takes a query and texts, and returns the score of each text; higher is better."""

DEFAULT_METRICS = (
    "hit_rate@1",
    "hit_rate@5",
    "hit_rate@10",
    "recall@10",
    "mrr@10",
    "ndcg@10",
    "map@10",
)

R = TypeVar("R")
T = TypeVar("T")


class Scores(BaseModel):
    """What one run scored, query by query."""

    model_config = ConfigDict(extra="forbid")

    name: str
    """What was evaluated, as reports show it."""
    dataset_hash: str
    """`content_hash` of the dataset: only runs of the same one are compared."""
    scores: dict[str, dict[str, float]]
    """Metric to query id to value."""
    seconds: float
    """Wall-clock time, embedding included."""

    def values(self, metric: str) -> dict[str, float]:
        """Return query id to value of a metric.

        Raises:
            ArgumentError: it was not evaluated.
        """
        if metric not in self.scores:
            raise ArgumentError(
                "metric",
                f"{metric!r} was not evaluated for {self.name!r}; there are "
                f"{', '.join(self.scores)}",
            )
        return self.scores[metric]

    def mean(self, metric: str) -> float:
        """Return a metric's mean over the queries; raises like `values`."""
        values = self.values(metric)
        return math.fsum(values.values()) / len(values)

    def means(self) -> dict[str, float]:
        """Return metric to `mean`."""
        return {metric: self.mean(metric) for metric in self.scores}

    def interval(
        self, metric: str, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
    ) -> Interval:
        """Return the mean's `bootstrap_interval`; raises like `values`."""
        return bootstrap_interval(
            list(self.values(metric).values()),
            confidence=confidence,
            resamples=resamples,
            seed=seed,
        )

    def save(self, path: Path | str) -> None:
        """Write JSON, whole or not at all."""
        with atomic_write(path) as file:
            file.write(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` wrote.

        Raises:
            DatasetError: the file is missing, damaged or something else.
        """
        content = read_json(path)
        try:
            return cls.model_validate(content)
        except DatasetError as error:
            raise error.at(path) from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise DatasetError(
                f"not a saved evaluation: {first['msg']}",
                source=path,
                place=".".join(map(str, first["loc"])),
            ) from None

    def _check_finite(self) -> None:
        for metric, values in self.scores.items():
            for query, value in values.items():
                if not math.isfinite(value):
                    place = f"scores[{metric!r}][{query!r}]"
                    raise DatasetError(f"{value} is not a finite number", place=place)


class Evaluation(Scores):
    """What one model or retriever did on one dataset, query by query.

    Raises:
        DatasetError: the parts are not about the same queries, or a score is not finite.
    """

    rankings: dict[str, list[str]]
    """Query id to the ids of the retrieved documents, best first."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.rankings:
            raise DatasetError("has no query", place="rankings")
        for metric, values in self.scores.items():
            if values.keys() != self.rankings.keys():
                raise DatasetError("other queries than in rankings", place=f"scores[{metric!r}]")
        self._check_finite()
        return self


class AnswerEvaluation(Scores):
    """What one model answered to the same questions as others, and how each answer scored.

    A metric need not have a value for every question: an answer that was asked for no schema
    is neither valid nor invalid, and a call that failed has no number of tokens. Two runs are
    compared on the questions where both have one.

    Raises:
        DatasetError: a part is about a question without an answer, or a score is not finite.
    """

    answers: dict[str, str]
    """Question id to the answer's text; empty where the call failed."""
    failures: dict[str, str] = {}
    """Question id to the error of a call that failed; its answer counts as the worst."""
    invalid: dict[str, str] = {}
    """Question id to what is wrong with a structured answer."""
    estimated: list[str] = []
    """Ids of the questions whose tokens were counted here, because the model did not tell."""
    unscored: dict[str, dict[str, str]] = {}
    """Metric to question id to why it has no value: the judge failed, not the answer."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.answers:
            raise DatasetError("has no answer", place="answers")
        parts: dict[str, Iterable[str]] = {
            **{f"scores[{metric!r}]": values for metric, values in self.scores.items()},
            **{f"unscored[{metric!r}]": ids for metric, ids in self.unscored.items()},
            **{"failures": self.failures, "invalid": self.invalid, "estimated": self.estimated},
        }
        for metric, values in self.scores.items():
            if not values:
                raise DatasetError("has no value", place=f"scores[{metric!r}]")
        for place, ids in parts.items():
            if unknown := set(ids) - self.answers.keys():
                raise DatasetError(f"{min(unknown)!r} has no answer", place=place)
        self._check_finite()
        return self


def evaluate_vectors(
    query_vectors: ArrayLike,
    corpus_vectors: ArrayLike,
    dataset: EmbeddingQAFinetuneDataset,
    *,
    name: str,
    metrics: Sequence[str] = DEFAULT_METRICS,
    top_k: int = 100,
) -> Evaluation:
    """Rank the corpus for each query by cosine, exactly, and score the rankings.

    Documents with equal scores are ordered as trec_eval does (`rank_documents`).

    Args:
        query_vectors: shape (queries, d), rows in the order of `dataset.queries`.
        corpus_vectors: shape (documents, d), rows in the order of `dataset.corpus`.
        dataset: what is relevant to which query.
        name: of the evaluation.
        metrics: see `ft_core.metrics.ranking`; one without `@K` sees `top_k` documents.
        top_k: how many documents to rank for each query.

    Raises:
        ArgumentError: numbers of rows or lengths that do not fit, a NaN (names the document
            or query), an unknown metric, or one whose K is above `top_k`.
    """
    start = time.perf_counter()
    dataset = EmbeddingQAFinetuneDataset.coerce(dataset)
    _check_metrics(metrics, top_k)
    queries = _rows_of("query_vectors", query_vectors, "queries", dataset.queries)
    corpus = _rows_of("corpus_vectors", corpus_vectors, "corpus", dataset.corpus)
    indices, scores = exact_top_k(queries, corpus, top_k, cosine=True)
    ids = list(dataset.corpus)
    rankings = {
        query: rank_documents({ids[row]: score for row, score in zip(rows, values, strict=True)})
        for query, rows, values in zip(
            dataset.queries, indices.tolist(), scores.tolist(), strict=True
        )
    }
    return _evaluation(name, dataset, rankings, metrics, start)


def evaluate_embedding(
    model: BaseEmbedding,
    dataset: EmbeddingQAFinetuneDataset,
    *,
    name: str | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    top_k: int = 100,
    show_progress: bool = True,
) -> Evaluation:
    """Embed queries and corpus with any LlamaIndex embedding model, then `evaluate_vectors`.

    Args:
        model: its `get_text_embedding_batch` embeds the corpus, in batches of its own
            `embed_batch_size`, and its `get_query_embedding` the queries.
        dataset: what to retrieve.
        name: of the evaluation; the model's name by default.
        metrics: see `ft_core.metrics.ranking`; one without `@K` sees `top_k` documents.
        top_k: how many documents to rank for each query.
        show_progress: show bars on stderr where that is a terminal.

    Raises:
        ArgumentError: the model returns a vector with a NaN or of another length than the
            first (names the document or query), or see `evaluate_vectors`.
    """
    start = time.perf_counter()
    if not hasattr(model, "get_text_embedding_batch"):
        raise ArgumentError(
            "model",
            f"{type(model).__name__} is not a LlamaIndex embedding; wrap it, for example in "
            "HuggingFaceEmbedding",
        )
    dataset = EmbeddingQAFinetuneDataset.coerce(dataset)
    _check_metrics(metrics, top_k)
    if name is None:
        name = getattr(model, "model_name", None) or type(model).__name__
    corpus = embed_corpus(model, dataset.corpus, show_progress)
    queries = embed_queries(model, dataset.queries, corpus.shape[1], show_progress)
    evaluation = evaluate_vectors(queries, corpus, dataset, name=name, metrics=metrics, top_k=top_k)
    return evaluation.model_copy(update={"seconds": time.perf_counter() - start})


def evaluate_retriever(
    retriever: BaseRetriever,
    dataset: EmbeddingQAFinetuneDataset,
    *,
    name: str | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    workers: int = 1,
    show_progress: bool = True,
) -> Evaluation:
    """Ask any LlamaIndex retriever each query, and score what it returns in its own order.

    A result counts as the document with its `node_id`, or, where the corpus has none such,
    with the id of the document that the node was cut from (`ref_doc_id`). Of results that
    are the same document the first counts.

    Args:
        retriever: returns as many results as it is set to; metrics see no more than those.
        dataset: its corpus ids are the node ids (or document ids) of the index.
        name: of the evaluation; the retriever's class by default.
        metrics: see `ft_core.metrics.ranking`.
        workers: threads that ask at the same time; the retriever must allow it.
        show_progress: show a bar on stderr where that is a terminal.

    Raises:
        ArgumentError: the retriever fails (names the query), returns nothing for any query,
            or only ids that the corpus does not know; or an unknown metric.
    """
    start = time.perf_counter()
    if not hasattr(retriever, "retrieve"):
        raise ArgumentError(
            "retriever",
            f"{type(retriever).__name__} is not a LlamaIndex retriever; of an index, pass "
            "index.as_retriever(similarity_top_k=10)",
        )
    dataset = EmbeddingQAFinetuneDataset.coerce(dataset)
    _check_metrics(metrics)
    if workers < 1:
        raise ArgumentError("workers", f"must be at least 1, not {workers}")

    def ask(query: str) -> list[str]:
        try:
            results = retriever.retrieve(dataset.queries[query])
        except Exception as error:
            raise ArgumentError(
                "retriever", f"failed on queries[{query!r}]: {type(error).__name__}: {error}"
            ) from error
        return _document_ids(results, dataset.corpus)

    answers = in_order(ask, dataset.queries, workers)
    answers = progress(answers, "Queries", len(dataset.queries), show_progress)
    rankings = dict(zip(dataset.queries, answers, strict=True))
    _check_retrieved(rankings, dataset.corpus, metrics)
    return _evaluation(name or type(retriever).__name__, dataset, rankings, metrics, start)


def evaluate_reranker(
    reranker: ScoreFunction | BaseNodePostprocessor | None,
    dataset: RerankDataset,
    *,
    name: str | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    show_progress: bool = True,
) -> Evaluation:
    """Rerank each query's candidates and score the rankings.

    base = evaluate_reranker(None, dataset)
    tuned = evaluate_reranker(SentenceTransformerRerank(top_n=20), dataset)
    compare(base, tuned, "ndcg@10")

    A relevant document that the retriever missed (`RerankDocument.retrieved`) is not reranked
    and counts as not found; an unjudged one counts as not relevant. Queries without a relevant
    document are left out, as metrics say nothing of them; a log message says how many.

    Args:
        reranker: a function that scores texts for a query, where of equal scores the retriever's
            order stays; or any LlamaIndex postprocessor, of which the order of the nodes counts,
            and which may return fewer; or None, which leaves the retriever's order: the baseline.
        dataset: a `RerankDataset`, or what its `coerce` takes.
        name: of the evaluation; by default "retrieval" for None, or the type's or function's.
        metrics: see `ft_core.metrics.ranking`.
        show_progress: show a bar on stderr where that is a terminal.

    Raises:
        ArgumentError: the reranker fails (names the query), returns another number of scores
            than texts, a score that is not finite, or nodes that it was not given; or an
            unknown metric.
        DatasetError: the dataset is bad, or no query has a relevant document.
    """
    start = time.perf_counter()
    rerank = _reranker(reranker)
    dataset = RerankDataset.coerce(dataset)
    _check_metrics(metrics)
    if name is None:
        named = getattr(reranker, "__name__", None) or type(reranker).__name__
        name = "retrieval" if reranker is None else named
    relevant = dataset.qrels
    if not relevant:
        raise DatasetError("no query has a document with a label of 0.5 or more; judge some")
    if len(relevant) < len(dataset):
        logger.warning(
            "%d of %d queries have no relevant document and are not evaluated",
            len(dataset) - len(relevant),
            len(dataset),
        )
    asked = [each for each in dataset.with_ids() if each[0] in relevant]
    rankings = {}
    for query, example, documents in progress(asked, "Queries", len(asked), show_progress):
        found = {key: document for key, document in documents.items() if document.retrieved}
        try:
            rankings[query] = rerank(example.query, found) if found else []
        except ArgumentError:
            raise
        except Exception as error:
            raise ArgumentError(
                "reranker", f"failed on query {query!r}: {type(error).__name__}: {error}"
            ) from error
    _warn_if_short(rankings, [len(example.candidates) for _, example, _ in asked], metrics)
    return _evaluation(name, dataset, rankings, metrics, start)


Rerank = Callable[[str, Mapping[str, RerankDocument]], list[str]]


def _reranker(reranker: ScoreFunction | BaseNodePostprocessor | None) -> Rerank:
    """Return a function from a query and its candidates to their ids, best first."""
    if reranker is None:
        return lambda query, found: list(found)
    if hasattr(reranker, "postprocess_nodes"):
        return lambda query, found: _postprocessed(reranker, query, found)
    if callable(reranker):
        return lambda query, found: _by_score(reranker, query, found)
    raise ArgumentError(
        "reranker",
        f"{type(reranker).__name__} is none: pass a LlamaIndex postprocessor, a function from a "
        "query and its texts to scores, or None for the retriever's order",
    )


def _by_score(score: ScoreFunction, query: str, found: Mapping[str, RerankDocument]) -> list[str]:
    values = [float(value) for value in score(query, [d.text for d in found.values()])]
    if len(values) != len(found):
        raise ArgumentError(
            "reranker", f"returned {len(values)} scores for the {len(found)} texts of {query!r}"
        )
    for key, value in zip(found, values, strict=True):
        if not math.isfinite(value):
            raise ArgumentError("reranker", f"gave {key!r} the score {value} for {query!r}")
    ranked = sorted(zip(values, found, strict=True), key=lambda pair: -pair[0])  # stable
    return [key for _, key in ranked]


def _postprocessed(
    reranker: BaseNodePostprocessor, query: str, found: Mapping[str, RerankDocument]
) -> list[str]:
    from llama_index.core.schema import NodeWithScore, TextNode

    # New ones each time: a postprocessor may write into them.
    nodes = [
        NodeWithScore(node=TextNode(id_=key, text=d.text), score=d.retrieval_score)
        for key, d in found.items()
    ]
    ranked = [result.node.node_id for result in reranker.postprocess_nodes(nodes, query_str=query)]
    for place, key in enumerate(ranked):
        if key not in found or key in ranked[:place]:
            reason = "twice" if key in found else "which it was not given"
            raise ArgumentError("reranker", f"returned {key!r} for {query!r}, {reason}")
    return ranked


def _warn_if_short(
    rankings: Mapping[str, list[str]], candidates: Sequence[int], metrics: Sequence[str]
) -> None:
    """Warn of metrics that see less than they ask for because the reranker cuts."""
    most, offered = max(map(len, rankings.values())), max(candidates)
    beyond = [m for m in metrics if (parse_metric(m).k or 0) > most and most < offered]
    if beyond:
        warnings.warn(
            f"the reranker returned at most {most} of {offered} documents for a query, and "
            f"{', '.join(beyond)} saw no more; set its top_n higher",
            stacklevel=3,
        )


def compare(
    base: Scores,
    other: Scores,
    metric: str,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedTest:
    """Test whether `other` differs from `base` in a metric (`paired_randomisation_test`).

    Of two `AnswerEvaluation`s, the questions count for which both have a value.

    Raises:
        ArgumentError: they are not of the same dataset and queries, or one lacks the metric.
    """
    if base.dataset_hash != other.dataset_hash:
        raise ArgumentError(
            "other", f"{other.name!r} and {base.name!r} were evaluated on different datasets"
        )
    first, second = base.values(metric), other.values(metric)
    shared = [query for query in first if query in second]
    partial = isinstance(base, AnswerEvaluation) and isinstance(other, AnswerEvaluation)
    if not shared or not (partial or len(shared) == len(first) == len(second)):
        raise ArgumentError(
            "other", f"{other.name!r} and {base.name!r} were evaluated on different queries"
        )
    return paired_randomisation_test(
        [first[query] for query in shared],
        [second[query] for query in shared],
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )


def _evaluation(
    name: str,
    dataset: EmbeddingQAFinetuneDataset | RerankDataset,
    rankings: dict[str, list[str]],
    metrics: Sequence[str],
    start: float,
) -> Evaluation:
    return Evaluation(
        name=name,
        dataset_hash=dataset.content_hash,
        scores=score_rankings(dataset.qrels, rankings, metrics),
        rankings=rankings,
        seconds=time.perf_counter() - start,
    )


def _check_metrics(metrics: Sequence[str], top_k: int | None = None) -> None:
    """Refuse what cannot be scored, before anything is embedded or asked."""
    if isinstance(metrics, str) or not metrics:
        raise ArgumentError("metrics", "name at least one in a list, as in ['ndcg@10']")
    if top_k is not None and top_k < 1:
        raise ArgumentError("top_k", f"must be at least 1, not {top_k}")
    for metric in metrics:
        k = parse_metric(metric).k
        if top_k is not None and k is not None and k > top_k:
            raise ArgumentError("top_k", f"{metric} needs at least {k} documents, not {top_k}")


def _rows_of(
    argument: str, vectors: ArrayLike, field: str, texts: Mapping[str, str]
) -> NDArray[Any]:
    matrix = check_vectors(argument, vectors, names=[f"{field}[{key!r}]" for key in texts])
    if len(matrix) != len(texts):
        raise ArgumentError(argument, f"has {len(matrix)} rows for {len(texts)} {field}")
    return matrix


def _document_ids(results: Iterable[NodeWithScore], corpus: Mapping[str, str]) -> list[str]:
    ids = []
    for result in results:
        node = result.node
        known = node.node_id in corpus or node.ref_doc_id not in corpus
        ids.append(node.node_id if known else node.ref_doc_id)
    return list(dict.fromkeys(ids))


def _check_retrieved(
    rankings: Mapping[str, list[str]], corpus: Mapping[str, str], metrics: Sequence[str]
) -> None:
    most = max(map(len, rankings.values()))
    if not most:
        raise ArgumentError("retriever", "returned nothing for any query; is its index empty?")
    if not any(document in corpus for ranking in rankings.values() for document in ranking):
        example = next(ranking[0] for ranking in rankings.values() if ranking)
        raise ArgumentError(
            "retriever",
            f"returned only ids that the dataset's corpus does not know, such as {example!r}; "
            f"its corpus has {next(iter(corpus))!r}. Build the index from nodes with those ids",
        )
    beyond = [m for m in metrics if (parse_metric(m).k or 0) > most and most < len(corpus)]
    if beyond:
        warnings.warn(
            f"the retriever returned at most {most} documents for a query, and "
            f"{', '.join(beyond)} saw no more; set its similarity_top_k higher",
            stacklevel=3,
        )


def in_order(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Yield the results in the order of the items; `workers` threads work at the same time."""
    if workers == 1:  # in the caller's thread: some stores refuse any other
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(function, items)
