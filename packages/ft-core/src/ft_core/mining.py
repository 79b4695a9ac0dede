"""Hard negatives: documents that a model ranks high for a query though they do not answer it.

What ranks high without being marked relevant is often relevant all the same. Two guards keep
such false negatives out: near-duplicates of a relevant document are never taken, nor is a
document that scores as high as a relevant one, less a margin.
"""

from __future__ import annotations

import copy
import functools
import logging
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np

from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.datasets.duplicates import DEFAULT_THRESHOLD, fold, jaccard, shingles
from ft_core.embedding import embed_corpus, embed_queries, unit
from ft_core.errors import ArgumentError
from ft_core.progress import progress
from ft_core.search import exact_top_k

if TYPE_CHECKING:
    from llama_index.core.base.base_retriever import BaseRetriever
    from llama_index.core.base.embeddings.base import BaseEmbedding

T = TypeVar("T")

logger = logging.getLogger(__name__)

_QUERY_BLOCK = 4096  # queries searched for at a time: bounds what the search returns
_KEPT_SHINGLES = 4096  # documents whose shingles are remembered

# Scripts that put no space between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, Han.
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff]+"
)


class Ranking(NamedTuple):
    """What a source returns for one query."""

    documents: list[str]
    """Ids, best first, relevant ones included."""
    scores: list[float | None]
    """Of each document; higher is better."""
    relevant: float | None
    """The lowest score of a relevant document, None where the source does not say."""

    def cut(self, depth: int) -> Ranking:
        """Return the ranking with no more documents than `depth`."""
        return Ranking(self.documents[:depth], self.scores[:depth], self.relevant)


def mine_hard_negatives(
    dataset: EmbeddingQAFinetuneDataset,
    source: BaseEmbedding | BaseRetriever | Literal["bm25"],
    *,
    num_negatives: int = 4,
    range_min: int = 0,
    range_max: int = 100,
    relative_margin: float | None = 0.05,
    absolute_margin: float | None = None,
    duplicate_threshold: float | None = DEFAULT_THRESHOLD,
    sampling_strategy: Literal["top", "random"] = "top",
    seed: int = 0,
    show_progress: bool = True,
) -> dict[str, list[str]]:
    """Return query id to the ids of its hard negatives, hardest first.

    The arguments have the names and meanings of `mine_hard_negatives` in sentence-transformers.
    The relative margin is TopK-PercPos of NV-Retriever (Moreira et al. 2024,
    arXiv:2407.15831), with 95 % as its paper recommends; where scores are negative, the
    margin is a fraction of their magnitude.

    Args:
        dataset: its relevant documents are never negatives.
        source: what ranks the corpus. A `BaseEmbedding` ranks by cosine, exactly, and embeds
            each distinct text once. A `BaseRetriever` is asked each query, and its node ids
            are the dataset's document ids and its higher score the better match; where it
            has a `similarity_top_k`, a copy of it gets one that is deep enough. "bm25" needs
            no model and reads any language.
        num_negatives: how many for each query, at most: what the guards leave may be fewer,
            or none. A log message says for how many queries.
        range_min: how many of the best-ranked documents, relevant ones not counted, to skip.
        range_max: the rank, relevant ones not counted, to stop at.
        relative_margin: take only documents that score at most the relevant score less this
            fraction of its magnitude. Of several relevant documents the lowest score counts.
            For a retriever that does not return a relevant document, or gives it no score,
            ranks alone decide.
        absolute_margin: take only documents that score at most the relevant score less this.
        duplicate_threshold: leave out documents this similar to a relevant one, or to a
            negative already taken (`ft_core.datasets.duplicates.similarity`); None turns it off.
        sampling_strategy: "top" takes the best-ranked, "random" any that pass.
        seed: for "random": the same seed takes the same ones.
        show_progress: show bars on stderr where that is a terminal.

    Raises:
        ArgumentError: a bad argument, a vector or score with a NaN (names the text), or a
            retriever that returns no document of the dataset.
    """
    dataset = EmbeddingQAFinetuneDataset.coerce(dataset)
    _check_range(num_negatives, range_min, range_max)
    margins = _Margins(relative_margin, absolute_margin)
    novelty = _Novelty(dataset.corpus, duplicate_threshold)
    if sampling_strategy not in ("top", "random"):
        raise ArgumentError("sampling_strategy", f'is "top" or "random", not {sampling_strategy!r}')
    # Deep enough that `range_max` others are left once the relevant ones are taken out.
    depth = range_max + max(map(len, dataset.relevant_docs.values()))
    negatives: dict[str, list[str]] = {}
    for query, ranking in _rankings(dataset, source, depth, show_progress):
        relevant = dataset.relevant_docs[query]
        candidates = margins.below(ranking, set(relevant), slice(range_min, range_max))
        order = list(candidates)
        if sampling_strategy == "random":
            # Of the query's own, so that other queries change nothing.
            random.Random(f"{seed} {query}").shuffle(order)
        taken = set(novelty.first(order, relevant, num_negatives))
        negatives[query] = [document for document in candidates if document in taken]
    _report(negatives, num_negatives)
    return negatives


@dataclass(frozen=True)
class Candidates(Mapping[str, list[tuple[str, float | None]]]):
    """What a retriever finds: query id to (document id, score) of its candidates, best first."""

    dataset: EmbeddingQAFinetuneDataset
    """What was searched."""
    rankings: Mapping[str, Ranking]
    """What the source returned for each query."""

    def __getitem__(self, query: str) -> list[tuple[str, float | None]]:
        """Return the candidates of a query, relevant ones included."""
        ranking = self.rankings[query]
        return list(zip(ranking.documents, ranking.scores, strict=True))

    def __iter__(self) -> Iterator[str]:
        return iter(self.rankings)

    def __len__(self) -> int:
        return len(self.rankings)

    def negatives(
        self,
        *,
        relative_margin: float | None = 0.05,
        absolute_margin: float | None = None,
        duplicate_threshold: float | None = DEFAULT_THRESHOLD,
    ) -> dict[str, list[str]]:
        """Return query id to those candidates that are safe to call wrong answers.

        Args:
            relative_margin: see `mine_hard_negatives`, as for the other margin.
            absolute_margin: a difference of scores.
            duplicate_threshold: leave out documents this similar to a relevant one; None
                turns it off.

        Raises:
            ArgumentError: a bad argument.
        """
        margins = _Margins(relative_margin, absolute_margin)
        novelty = _Novelty(self.dataset.corpus, duplicate_threshold)
        safe: dict[str, list[str]] = {}
        for query, ranking in self.rankings.items():
            relevant = self.dataset.relevant_docs[query]
            low = margins.below(ranking, set(relevant), slice(None))
            safe[query] = [document for document in low if not novelty.repeats(document, relevant)]
        return safe


def retrieve_candidates(
    dataset: EmbeddingQAFinetuneDataset,
    source: BaseEmbedding | BaseRetriever | Literal["bm25"],
    *,
    top_k: int = 20,
    show_progress: bool = True,
) -> Candidates:
    """Return what a reranker would be given: each query's best documents with their scores.

    `RerankDataset.from_embedding_qa` joins them with what is known to be relevant, and
    `Candidates.negatives` tells which others are safe to count as wrong.

    Args:
        dataset: its queries are asked.
        source: what ranks the corpus, as for `mine_hard_negatives`. An embedding and "bm25"
            search the corpus itself; an embedding returns each text once.
        top_k: how many candidates for each query, at most.
        show_progress: show bars on stderr where that is a terminal.

    Raises:
        ArgumentError: a bad argument, a vector or score with a NaN (names the text), or a
            retriever that returns no document of the dataset.
    """
    dataset = EmbeddingQAFinetuneDataset.coerce(dataset)
    if top_k < 1:
        raise ArgumentError("top_k", f"must be at least 1, not {top_k}")
    found = _rankings(dataset, source, top_k, show_progress)
    return Candidates(dataset, {query: ranking.cut(top_k) for query, ranking in found})


def _check_range(num_negatives: int, range_min: int, range_max: int) -> None:
    if num_negatives < 1:
        raise ArgumentError("num_negatives", f"must be at least 1, not {num_negatives}")
    if range_min < 0:
        raise ArgumentError("range_min", f"must be at least 0, not {range_min}")
    if range_max < range_min + num_negatives:
        raise ArgumentError(
            "range_max",
            f"must leave room for {num_negatives} negatives above range_min={range_min}, "
            f"not {range_max}",
        )


class _Margins:
    """Picks documents that score too low to be an answer that nobody marked."""

    def __init__(self, relative: float | None, absolute: float | None) -> None:
        for name, margin in {"relative_margin": relative, "absolute_margin": absolute}.items():
            if margin is not None and not 0 <= margin < float("inf"):
                raise ArgumentError(name, f"must be at least 0, or None, not {margin}")
        self._relative = relative
        self._absolute = absolute

    def below(self, ranking: Ranking, relevant: set[str], ranks: slice) -> list[str]:
        """Return the documents within the ranks, relevant ones not counted, that pass."""
        limit = self._limit(ranking.relevant)
        others = [
            (document, score)
            for document, score in zip(ranking.documents, ranking.scores, strict=True)
            if document not in relevant
        ]
        return [document for document, score in others[ranks] if score is None or score <= limit]

    def _limit(self, relevant: float | None) -> float:
        limit = float("inf")
        if relevant is not None:
            if self._relative is not None:
                limit = relevant - self._relative * abs(relevant)
            if self._absolute is not None:
                limit = min(limit, relevant - self._absolute)
        return limit


class _Novelty:
    """Picks documents that repeat neither a relevant one nor each other."""

    def __init__(self, corpus: dict[str, str], threshold: float | None) -> None:
        if threshold is not None and not 0 < threshold <= 1:
            raise ArgumentError(
                "duplicate_threshold", f"is above 0 and at most 1, or None, not {threshold}"
            )
        self._threshold = threshold
        self._shingles = functools.lru_cache(_KEPT_SHINGLES)(
            lambda document: shingles(corpus[document])
        )

    def first(self, documents: Iterable[str], relevant: Sequence[str], count: int) -> list[str]:
        """Return the first `count` documents that pass; no more are compared than needed."""
        taken: list[str] = []
        for document in documents:
            if len(taken) == count:
                break
            if not self.repeats(document, [*relevant, *taken]):
                taken.append(document)
        return taken

    def repeats(self, document: str, others: Iterable[str]) -> bool:
        """Whether a document says the same as one of the others."""
        threshold = self._threshold
        return threshold is not None and any(
            jaccard(self._shingles(document), self._shingles(other)) >= threshold
            for other in others
        )


def _rankings(
    dataset: EmbeddingQAFinetuneDataset, source: Any, depth: int, show_progress: bool
) -> Iterator[tuple[str, Ranking]]:
    if isinstance(source, str) and source == "bm25":
        return _rank_by_bm25(dataset, depth, show_progress)
    if hasattr(source, "get_text_embedding_batch"):
        return _rank_by_embedding(dataset, source, depth, show_progress)
    if hasattr(source, "retrieve"):
        return _rank_by_retriever(dataset, source, depth, show_progress)
    raise ArgumentError(
        "source",
        f'is a LlamaIndex embedding, a retriever or "bm25", not '
        f"{source if isinstance(source, str) else type(source).__name__!r}",
    )


def _rank_by_embedding(
    dataset: EmbeddingQAFinetuneDataset, model: BaseEmbedding, depth: int, show_progress: bool
) -> Iterator[tuple[str, Ranking]]:
    documents, document_row = _distinct(dataset.corpus)
    queries, query_row = _distinct(dataset.queries)
    corpus_vectors = unit(embed_corpus(model, documents, show_progress))
    query_vectors = unit(embed_queries(model, queries, corpus_vectors.shape[1], show_progress))
    ids, asked = list(documents), list(dataset.queries)
    for start in range(0, len(asked), _QUERY_BLOCK):
        block = asked[start : start + _QUERY_BLOCK]
        vectors = query_vectors[[query_row[query] for query in block]]
        indices, scores = exact_top_k(vectors, corpus_vectors, depth)
        for query, vector, rows, values in zip(
            block, vectors, indices.tolist(), scores.tolist(), strict=True
        ):
            # A relevant text may stand in the corpus twice: its row goes by all of its ids.
            relevant = {
                document_row[document]: document for document in dataset.relevant_docs[query]
            }
            lowest = float((corpus_vectors[list(relevant)] @ vector).min())
            found = [relevant.get(row, ids[row]) for row in rows]
            yield query, Ranking(found, values, lowest)


def _distinct(texts: dict[str, str]) -> tuple[dict[str, str], dict[str, int]]:
    """Return the first id of each distinct text, and the row there of every id."""
    first: dict[str, str] = {}
    for key, text in texts.items():
        first.setdefault(text, key)
    row = {text: number for number, text in enumerate(first)}
    return (
        {key: text for text, key in first.items()},
        {key: row[text] for key, text in texts.items()},
    )


def _rank_by_bm25(
    dataset: EmbeddingQAFinetuneDataset, depth: int, show_progress: bool
) -> Iterator[tuple[str, Ranking]]:
    """Rank by BM25; a document that shares no word with the query is not in the ranking."""
    import bm25s

    index = bm25s.BM25()
    index.index([bm25_tokens(text) for text in dataset.corpus.values()], show_progress=False)
    ids = list(dataset.corpus)
    row = {document: number for number, document in enumerate(ids)}
    for query, text in progress(
        dataset.queries.items(), "Queries", len(dataset.queries), show_progress
    ):
        scores = index.get_scores(bm25_tokens(text))
        found = np.flatnonzero(scores > 0)
        found = found[np.argsort(-scores[found], kind="stable")][:depth]
        lowest = min(float(scores[row[document]]) for document in dataset.relevant_docs[query])
        yield query, Ranking([ids[number] for number in found], scores[found].tolist(), lowest)


def bm25_tokens(text: str) -> list[str]:
    """Return the words of a text in any language: folded, and without a list of stop words.

    Where a script has no spaces, every two neighbouring characters make a token, as in
    Lucene's CJK analyser.
    """
    tokens = []
    for word in fold(text).split():
        end = 0
        for run in _UNSPACED.finditer(word):
            tokens += [word[end : run.start()], *_pairs(run.group())]
            end = run.end()
        tokens.append(word[end:])
    return [token for token in tokens if token]


def _pairs(characters: str) -> list[str]:
    return [characters[i : i + 2] for i in range(max(1, len(characters) - 1))]


def _rank_by_retriever(
    dataset: EmbeddingQAFinetuneDataset,
    retriever: BaseRetriever,
    depth: int,
    show_progress: bool,
) -> Iterator[tuple[str, Ranking]]:
    retriever = _deepened(retriever, depth)
    example: str | None = None
    known = False
    for query, text in progress(
        dataset.queries.items(), "Queries", len(dataset.queries), show_progress
    ):
        scores: dict[str, float | None] = {}
        try:
            results = retriever.retrieve(text)
        except Exception as error:
            raise ArgumentError(
                "source", f"failed on queries[{query!r}]: {type(error).__name__}: {error}"
            ) from error
        for result in results:
            document = result.node.node_id
            if document not in dataset.corpus:  # a node cut from a document of the corpus
                document = result.node.ref_doc_id
            if document not in dataset.corpus:
                example = result.node.node_id
                continue
            if result.score is not None and not np.isfinite(result.score):
                raise ArgumentError(
                    "source",
                    f"gave corpus[{document!r}] the score {result.score} for queries[{query!r}]",
                )
            scores.setdefault(document, result.score)
        known = known or bool(scores)
        relevant = [scores.get(document) for document in dataset.relevant_docs[query]]
        lowest = min((score for score in relevant if score is not None), default=None)
        yield query, Ranking(list(scores), list(scores.values()), lowest)
    if not known:
        raise ArgumentError(
            "source",
            "the retriever returned nothing for any query; is its index empty?"
            if example is None
            else f"the retriever returned only nodes that the corpus does not know, such as "
            f"{example!r}; build its index from nodes with the ids of the corpus",
        )


def _deepened(retriever: BaseRetriever, depth: int) -> BaseRetriever:
    """Return the retriever, or a copy that returns `depth` results where it can be told to."""
    current = getattr(retriever, "similarity_top_k", None)
    if not isinstance(current, int) or current >= depth:
        return retriever
    deeper = copy.copy(retriever)  # the caller's, perhaps live in an application, stays as it is
    deeper.similarity_top_k = depth
    return deeper


def _report(negatives: dict[str, list[str]], num_negatives: int) -> None:
    none = sum(not found for found in negatives.values())
    short = sum(len(found) < num_negatives for found in negatives.values()) - none
    if none or short:
        logger.warning(
            "of %d queries, %d have no hard negative and %d fewer than %d; a smaller margin or a "
            "larger range_max finds more",
            len(negatives),
            none,
            short,
            num_negatives,
        )
