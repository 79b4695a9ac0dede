"""Which passage of a long document a query is trained on, and what a fresh head learns first."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ft_core.datasets import RerankDataset, RerankExample
from ft_core.datasets.rerank import merge_repeats
from ft_core.embedding import embed_corpus, embed_queries, unit
from ft_core.progress import progress
from ft_crossencoder.passages import split_passages, token_counts

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

    from ft_crossencoder.rows import Row
    from ft_crossencoder.scoring import PairScorer

Vectors = NDArray[np.float32]

_HEAD_QUERIES = 2000  # a head is learned from no more; a larger dataset teaches the labels better


class Passages:
    """The distinct documents of a dataset, cut into passages.

    Args:
        dataset: whose documents.
        tokenizer: a fast one.
        tokens: in a passage; None leaves documents whole.

    Raises:
        ArgumentError: see `split_passages`.
    """

    def __init__(self, dataset: RerankDataset, tokenizer: Any, tokens: int | None) -> None:
        texts = list(dict.fromkeys(d.text for example in dataset for d in example.documents))
        cut = [[text] for text in texts]
        if tokens is not None:
            cut = split_passages(tokenizer, texts, tokens)
        self.of = dict(zip(texts, cut, strict=True))
        """The passages of each document."""

    def distinct(self) -> list[str]:
        """Return every passage once."""
        return list(dict.fromkeys(passage for some in self.of.values() for passage in some))

    @property
    def any_cut(self) -> bool:
        """Whether a document is longer than a passage."""
        return any(len(some) > 1 for some in self.of.values())


class Embedded:
    """Vectors of a dataset's queries and of passages, each distinct text embedded once.

    Args:
        dataset: whose queries.
        passages: what is compared with them.
        model: any embedding model of LlamaIndex.
        show_progress: on standard error, where that is a terminal.

    Raises:
        ArgumentError: the model gives a vector that is not finite, or of another length.
    """

    def __init__(
        self,
        dataset: RerankDataset,
        passages: Sequence[str],
        model: BaseEmbedding,
        *,
        show_progress: bool,
    ) -> None:
        self.passages = passages
        queries = {example.query: example.query for example in dataset}
        texts = {f"{place}: {text:.60}": text for place, text in enumerate(passages)}
        self._texts = unit(embed_corpus(model, texts, show_progress))
        length = self._texts.shape[1]
        self._queries = unit(embed_queries(model, queries, length, show_progress))
        self._query_rows = {query: row for row, query in enumerate(queries)}
        self._text_rows = {passage: row for row, passage in enumerate(passages)}

    def scores(self, query: str, passages: Sequence[str] | None = None) -> Vectors:
        """Return the cosine of a query and of each passage, by default of all."""
        texts = self._texts
        if passages is not None:
            texts = texts[[self._text_rows[passage] for passage in passages]]
        scores: Vectors = texts @ self._queries[self._query_rows[query]]
        return scores


def with_best_passages(
    dataset: RerankDataset,
    passages: Passages,
    score: Callable[[str, Sequence[str]], Iterable[float]],
    *,
    show_progress: bool,
) -> RerankDataset:
    """Return the dataset with each document as the passage of it that fits its query best.

    Args:
        dataset: with documents of any length.
        passages: of its documents.
        score: from a query and passages to their scores.
        show_progress: on standard error, where that is a terminal.
    """
    examples = []
    for example in progress(dataset, "Passages", len(dataset), show_progress):
        parts = [passages.of[document.text] for document in example.documents]
        scores = iter(score(example.query, [passage for some in parts for passage in some]))
        best = [_best(some, scores) for some in parts]
        examples.append(_with_texts(example, best))
    return RerankDataset(examples=examples)


def _best(passages: list[str], scores: Any) -> str:
    own = [next(scores) for _ in passages]
    return passages[int(np.argmax(own))]


def _with_texts(example: RerankExample, texts: Sequence[str]) -> RerankExample:
    documents = [
        document.model_copy(update={"text": text})
        for document, text in zip(example.documents, texts, strict=True)
    ]
    # Two documents may share their best passage.
    return example.model_copy(update={"documents": merge_repeats(documents)})


def count_cut(dataset: RerankDataset, tokenizer: Any, window: int) -> tuple[int, int]:
    """Return how many distinct documents do not fit into a window with a query, and of how many."""
    queries = list(dict.fromkeys(example.query for example in dataset))
    texts = list(dict.fromkeys(d.text for example in dataset for d in example.documents))
    query_tokens = dict(zip(queries, token_counts(tokenizer, queries), strict=True))
    text_tokens = dict(zip(texts, token_counts(tokenizer, texts), strict=True))
    room = window - tokenizer.num_special_tokens_to_add(pair=True)
    cut = {
        document.text
        for example in dataset
        for document in example.documents
        if query_tokens[example.query] + text_tokens[document.text] > room
    }
    return len(cut), len(texts)


def by_scorer(scorer: PairScorer) -> Callable[[str, Sequence[str]], list[float]]:
    """Return a function that scores passages with a cross-encoder."""
    return lambda query, passages: scorer.score([(query, text) for text in passages]).logits


def head_rows(dataset: RerankDataset, embedded: Embedded, *, pairs: int, seed: int) -> list[Row]:
    """Return pairs of queries and passages with an embedding model's scores, for a fresh head.

    Each query has as many: near ones, less near ones, and others by chance, so that the head
    learns the whole scale. No label is read.

    Args:
        dataset: whose queries; at most 2,000 of them, by chance.
        embedded: their vectors and those of passages.
        pairs: in all, about; fewer where the passages are few.
        seed: the same seed takes the same ones.

    Returns:
        Rows for the loss "mse"; the scores have mean 0 and deviation 1.
    """
    rng = random.Random(seed)
    queries = list(dict.fromkeys(example.query for example in dataset))
    if len(queries) > _HEAD_QUERIES:
        queries = rng.sample(queries, _HEAD_QUERIES)
    each = -(-pairs // len(queries))
    rows: list[Row] = []
    for query in queries:
        scores = embedded.scores(query)
        for place in _spread(np.argsort(-scores, kind="stable"), each, rng):
            rows.append(
                {
                    "query": query,
                    "document": embedded.passages[place],
                    "label": float(scores[place]),
                }
            )
    labels = np.array([row["label"] for row in rows])
    for row in rows:
        row["label"] = float((row["label"] - labels.mean()) / max(labels.std(), 1e-9))
    return rows


def _spread(order: NDArray[np.int64], count: int, rng: random.Random) -> list[int]:
    """Pick three eighths from the top, as many from what follows, and a quarter of the rest."""
    near = max(1, round(count * 3 / 8))
    picked = [int(place) for place in order[:near]]
    middle, rest = order[near : near * 20], order[near * 20 :]
    for places, wanted in ((middle, near), (rest, count - 2 * near)):
        taken = min(max(0, wanted), len(places))
        picked += [int(places[at]) for at in rng.sample(range(len(places)), taken)]
    return picked[:count]
