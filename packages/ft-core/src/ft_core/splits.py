"""Split a dataset so that no question of one part was, in other words, asked in another.

Near-duplicate queries always stay together, and in a split by document also the queries that
share a document, and near-duplicate documents. What must stay together forms groups; the
groups, largest first, go to the part that is farthest from its share.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.datasets.duplicates import DEFAULT_THRESHOLD, connected_groups, near_duplicate_pairs
from ft_core.errors import ArgumentError, DatasetError

logger = logging.getLogger(__name__)

Corpus = Literal["own", "all"]
Groups = Sequence[Sequence[str]]

_TOLERANCE = 0.1  # a share that misses what was asked for by more is worth a warning


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
    _check_arguments(fractions, corpus)
    pairs = near_duplicate_pairs(dataset.queries, threshold=threshold)
    groups = connected_groups(dataset.queries, ((a, b) for a, b, _ in pairs))
    _check_enough(groups, fractions, "its queries, near-duplicates counted as one, are")
    parts = _assign(groups, len, fractions, random.Random(seed))
    _warn_if_off(parts, fractions)
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
    _check_arguments(fractions, corpus)
    documents, queries_of = _connected_documents(dataset, threshold)
    asked = [group for group in documents if queries_of(group)]
    _check_enough(
        asked, fractions, "its documents, connected by a query or near-duplicates, form only"
    )
    rng = random.Random(seed)
    parts = _assign(asked, lambda group: len(queries_of(group)), fractions, rng)
    unasked = _assign([group for group in documents if not queries_of(group)], len, fractions, rng)
    queries = {name: queries_of(part) for name, part in parts.items()}
    _warn_if_off(queries, fractions)
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


def _assign(
    groups: Groups,
    size: Callable[[Sequence[str]], int],
    fractions: Mapping[str, float],
    rng: random.Random,
) -> dict[str, list[str]]:
    """Return part name to the members of its groups; no part is empty if there are enough."""
    shuffled = list(groups)
    rng.shuffle(shuffled)
    shuffled.sort(key=size, reverse=True)  # stable: equal sizes stay shuffled
    total, whole = sum(map(size, shuffled)), math.fsum(fractions.values())
    missing = {name: total * fraction / whole for name, fraction in fractions.items()}
    empty = set(fractions)
    parts: dict[str, list[str]] = {name: [] for name in fractions}
    for index, group in enumerate(shuffled):
        # The last groups go to parts that have none yet: a small share is still a part.
        open_parts = empty if len(shuffled) - index <= len(empty) else set(fractions)
        name = max((part for part in fractions if part in open_parts), key=missing.__getitem__)
        parts[name] += group
        missing[name] -= size(group)
        empty.discard(name)
    return parts


def _relevant(dataset: EmbeddingQAFinetuneDataset, queries: Sequence[str]) -> set[str]:
    return {document for query in queries for document in dataset.relevant_docs[query]}


def _check_arguments(fractions: Mapping[str, float], corpus: str) -> None:
    if not isinstance(fractions, Mapping) or not fractions:
        raise ArgumentError(
            "fractions", 'maps each part to its share, as in {"train": 0.8, "validation": 0.2}'
        )
    for name, fraction in fractions.items():
        if not isinstance(fraction, float | int) or not 0 < fraction < math.inf:
            raise ArgumentError("fractions", f"{name!r} needs a share above 0, not {fraction!r}")
    if corpus not in ("own", "all"):
        raise ArgumentError("corpus", f'is "own" or "all", not {corpus!r}')


def _check_enough(groups: Groups, fractions: Mapping[str, float], what: str) -> None:
    if len(groups) < len(fractions):
        raise DatasetError(
            f"no split into {len(fractions)} parts without a leak: {what} {len(groups)} group(s) "
            "that must stay together; ask for fewer parts, bring more data, or raise the threshold"
        )


def _warn_if_off(parts: Mapping[str, Sequence[str]], fractions: Mapping[str, float]) -> None:
    total, whole = sum(map(len, parts.values())), math.fsum(fractions.values())
    for name, queries in parts.items():
        got, asked = len(queries) / total, fractions[name] / whole
        if abs(got - asked) > _TOLERANCE:
            logger.warning(
                "part %r has %.0f %% of the queries instead of %.0f %%: larger groups of them "
                "must stay together",
                name,
                100 * got,
                100 * asked,
            )
