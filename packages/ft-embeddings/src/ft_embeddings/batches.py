"""Training batches that hold each text once.

A dataset becomes *units*: one document with a few of its queries. A batch is a number of
units; the collator gathers their distinct queries and documents and says how each query
relates to each document, from everything that the dataset knows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import torch

from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.errors import ArgumentError

QUERIES_PER_UNIT = 4
"""A document with more queries than this becomes several units, so that no batch is all one
document."""


class Label(IntEnum):
    """How a query of a batch relates to a document of it."""

    IGNORED = -1
    """Neither: a probable false negative."""
    NEGATIVE = 0
    RELEVANT = 1


@dataclass(frozen=True)
class TrainingTexts:
    """The distinct texts of a dataset and how they relate, by index.

    Queries or documents with the same text are one text here: two copies must not become
    each other's negatives.
    """

    queries: list[str]
    documents: list[str]
    relevant: list[list[int]]
    """Query to its relevant documents, in the dataset's order."""
    negatives: list[list[int]]
    """Query to documents mined as hard negatives; may be empty."""

    @classmethod
    def of(
        cls,
        dataset: EmbeddingQAFinetuneDataset,
        negatives: Mapping[str, Sequence[str]] | None = None,
    ) -> TrainingTexts:
        """Index a dataset; `negatives` maps query ids to document ids.

        Raises:
            ArgumentError: `negatives` names a query or document that the dataset has not.
        """
        for query, named in (negatives or {}).items():
            if query not in dataset.queries:
                raise ArgumentError("negatives", f"{query!r} is not a query of the dataset")
            for document in named:
                if document not in dataset.corpus:
                    raise ArgumentError(
                        "negatives", f"{document!r}, of {query!r}, is not a document of the dataset"
                    )
        queries: dict[str, int] = {}
        documents: dict[str, int] = {}
        relevant: list[list[int]] = []
        hard: list[list[int]] = []

        def document_index(document: str) -> int:
            return documents.setdefault(dataset.corpus[document].strip(), len(documents))

        for query, text in dataset.queries.items():
            row = queries.setdefault(text.strip(), len(queries))
            if row == len(relevant):
                relevant.append([])
                hard.append([])
            relevant[row].extend(map(document_index, dataset.relevant_docs[query]))
            hard[row].extend(map(document_index, (negatives or {}).get(query, ())))
        relevant = [list(dict.fromkeys(row)) for row in relevant]
        hard = [
            [document for document in dict.fromkeys(row) if document not in known]
            for row, known in zip(hard, relevant, strict=True)
        ]
        return cls(list(queries), list(documents), relevant, hard)

    def units(self, *, seed: int, all_relevant: bool = True) -> list[dict[str, Any]]:
        """Return rows {"document": index, "queries": indices} with each relevant pair once.

        Args:
            seed: of the order of a document's queries.
            all_relevant: False takes the first relevant document of each query only.
        """
        asking: dict[int, list[int]] = {}
        for query, documents in enumerate(self.relevant):
            for document in documents if all_relevant else documents[:1]:
                asking.setdefault(document, []).append(query)
        shuffle = random.Random(seed).shuffle
        units = []
        for document, queries in asking.items():
            shuffle(queries)
            units += [
                {"document": document, "queries": queries[start : start + QUERIES_PER_UNIT]}
                for start in range(0, len(queries), QUERIES_PER_UNIT)
            ]
        return units


@dataclass
class Collator:
    """Turns units into the two columns and the matrix of labels that the losses take.

    Args:
        texts: what the units index.
        tokenize: (texts, prompt) to padded tensors; `SentenceTransformer.preprocess`.
        query_prompt: instruction before each query, or "".
        document_prompt: instruction before each document, or "".
        every_document: put the whole corpus in each batch as negatives; for small corpora
            of short texts, such as the choices of a router.
        guide: (query vectors, document vectors) of a guide model, normalised, in the order
            of `texts`. A document that the guide scores above a relevant document of the
            query is ignored instead of pushed away (GISTEmbed, Solatorio 2024,
            arXiv:2402.16829).
    """

    texts: TrainingTexts
    tokenize: Callable[..., dict[str, Any]]
    query_prompt: str = ""
    document_prompt: str = ""
    every_document: bool = False
    guide: tuple[np.ndarray, np.ndarray] | None = None
    valid_label_columns: list[str] = field(default_factory=lambda: ["label"])

    def __call__(self, units: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return `query_*` and `document_*` tensors and `label` of shape (queries, documents)."""
        queries = list(dict.fromkeys(query for unit in units for query in unit["queries"]))
        if self.every_document:
            documents = list(range(len(self.texts.documents)))
        else:
            positives = (unit["document"] for unit in units)
            mined = (document for query in queries for document in self.texts.negatives[query])
            documents = list(dict.fromkeys([*positives, *mined]))
        batch: dict[str, Any] = {"label": torch.from_numpy(self._labels(queries, documents))}
        for column, prompt, all_texts, rows in (
            ("query", self.query_prompt, self.texts.queries, queries),
            ("document", self.document_prompt, self.texts.documents, documents),
        ):
            tokens = self.tokenize([all_texts[row] for row in rows], prompt=prompt or None)
            batch.update({f"{column}_{name}": value for name, value in tokens.items()})
        return batch

    def _labels(self, queries: list[int], documents: list[int]) -> np.ndarray:
        labels = np.full((len(queries), len(documents)), Label.NEGATIVE, dtype=np.int64)
        column = {document: index for index, document in enumerate(documents)}
        for row, query in enumerate(queries):
            known = [column[doc] for doc in self.texts.relevant[query] if doc in column]
            if self.guide is not None:
                scores = self.guide[1][documents] @ self.guide[0][query]
                labels[row, scores > scores[known].max()] = Label.IGNORED
            labels[row, known] = Label.RELEVANT
        return labels


def length_buckets(
    lengths: Sequence[int], *, waste: float = 0.1, smallest: int = 8
) -> list[list[int]]:
    """Group row numbers by length so that padding stays below a share of each group.

    Args:
        lengths: tokens per row.
        waste: largest share of a group that may be padding, once it has `smallest` rows.
        smallest: groups below this size cost more in calls than they save in padding.

    Returns:
        Groups that together hold each row once, longest rows first.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    groups: list[list[int]] = []
    tokens = 0
    for row in order:
        if groups:
            width, size = lengths[groups[-1][0]], len(groups[-1]) + 1
            if size <= smallest or tokens + lengths[row] >= (1 - waste) * width * size:
                groups[-1].append(row)
                tokens += lengths[row]
                continue
        groups.append([row])
        tokens = lengths[row]
    if len(groups) > 1 and len(groups[-1]) < smallest // 2:
        groups[-2].extend(groups.pop())
    return groups
