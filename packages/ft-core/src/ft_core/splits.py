"""Split a dataset so that no question of one part was, in other words, asked in another.

Near-duplicate queries always stay together, and in a split by document also the queries that
share a document, and near-duplicate documents (see `ft_core.datasets.grouping`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.datasets.duplicates import DEFAULT_THRESHOLD, connected_groups, near_duplicate_pairs
from ft_core.datasets.grouping import (
    check_enough,
    check_fractions,
    deal_out,
    split_texts,
    warn_if_off,
)
from ft_core.errors import ArgumentError

Corpus = Literal["own", "all"]


def split_by_query(
    dataset: EmbeddingQAFinetuneDataset,
    fractions: Mapping[str, float],
    *,
    seed: int = 0,
    corpus: Corpus = "all",
    threshold: float = DEFAULT_THRESHOLD,
) -> dict[str, EmbeddingQAFinetuneDataset]:
    """Split the queries; a document may have queries in several parts.

    This tests how a model does on new questions about documents that it was trained on.

    Args:
        dataset: what to split.
        fractions: part name to its share of the queries, as in
            `{"train": 0.8, "validation": 0.2}`; any positive numbers, scaled to a sum of 1.
        seed: the same seed gives the same parts.
        corpus: "all" gives each part the whole corpus, the honest haystack to search;
            "own" only the documents that its queries name.
        threshold: similarity from which two queries count as near-duplicates (see
            `ft_core.datasets.duplicates.similarity`).

    Returns:
        The parts by name; each query is in exactly one, and none is empty.

    Raises:
        ArgumentError: fractions that are not positive numbers, or another bad argument.
        DatasetError: there are fewer groups of queries than parts.
    """
    dataset = EmbeddingQAFinetuneDataset.coerce(dataset)
    check_fractions(fractions)
    _check_corpus(corpus)
    parts = split_texts(dataset.queries, fractions, seed=seed, threshold=threshold)
    if corpus == "all":
        return {name: dataset.select(queries) for name, queries in parts.items()}
    return {
        name: dataset.select(queries, corpus=_relevant(dataset, queries))
        for name, queries in parts.items()
    }


def split_by_document(
    dataset: EmbeddingQAFinetuneDataset,
    fractions: Mapping[str, float],
    *,
    seed: int = 0,
    corpus: Corpus = "own",
    threshold: float = DEFAULT_THRESHOLD,
) -> dict[str, EmbeddingQAFinetuneDataset]:
    """Split the documents, and the queries with them.

    This tests how a model does on documents that it never saw.

    Args:
        dataset: what to split.
        fractions: part name to its share of the queries, as in
            `{"train": 0.8, "validation": 0.2}`; any positive numbers, scaled to a sum of 1.
            Documents that no query names are dealt out in the same shares.
        seed: the same seed gives the same parts.
        corpus: "own" gives each part its own documents; "all" the whole corpus, so that
            a test searches as large a haystack as the application does, at the price that
            the other parts' documents (not their queries) stand in it.
        threshold: similarity from which two queries, or two documents, count as
            near-duplicates (see `ft_core.datasets.duplicates.similarity`).

    Returns:
        The parts by name; each query is in exactly one, and none is empty.

    Raises:
        ArgumentError: fractions that are not positive numbers, or another bad argument.
        DatasetError: there are fewer groups of connected documents than parts.
    """
    dataset = EmbeddingQAFinetuneDataset.coerce(dataset)
    check_fractions(fractions)
    _check_corpus(corpus)
    documents, queries_of = _connected_documents(dataset, threshold)
    asked = [group for group in documents if queries_of(group)]
    check_enough(
        asked, fractions, "its documents, connected by a query or near-duplicates, form only"
    )
    rng = random.Random(seed)
    parts = deal_out(asked, lambda group: len(queries_of(group)), fractions, rng)
    unasked = deal_out([group for group in documents if not queries_of(group)], len, fractions, rng)
    queries = {name: queries_of(part) for name, part in parts.items()}
    warn_if_off(queries, fractions)
    return {
        name: dataset.select(
            queries[name], corpus=None if corpus == "all" else [*parts[name], *unasked[name]]
        )
        for name in fractions
    }


def _connected_documents(
    dataset: EmbeddingQAFinetuneDataset, threshold: float
) -> tuple[list[list[str]], Callable[[Sequence[str]], list[str]]]:
    """Return the groups of documents, and a function from documents to their queries."""
    links = [(a, b) for a, b, _ in near_duplicate_pairs(dataset.corpus, threshold=threshold)]
    queries_of: dict[str, list[str]] = {document: [] for document in dataset.corpus}
    for query, documents in dataset.relevant_docs.items():
        # A query belongs to the group of its first document; the others join that group.
        queries_of[documents[0]].append(query)
        links += [(documents[0], other) for other in documents[1:]]
    for a, b, _ in near_duplicate_pairs(dataset.queries, threshold=threshold):
        links.append((dataset.relevant_docs[a][0], dataset.relevant_docs[b][0]))
    return (
        connected_groups(dataset.corpus, links),
        lambda documents: [query for document in documents for query in queries_of[document]],
    )


def _relevant(dataset: EmbeddingQAFinetuneDataset, queries: Sequence[str]) -> set[str]:
    return {document for query in queries for document in dataset.relevant_docs[query]}


def _check_corpus(corpus: str) -> None:
    if corpus not in ("own", "all"):
        raise ArgumentError("corpus", f'is "own" or "all", not {corpus!r}')
