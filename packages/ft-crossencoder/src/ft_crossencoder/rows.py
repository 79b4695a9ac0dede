"""Turn a rerank dataset into the rows that sentence-transformers' losses train on."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ft_core.datasets import RerankDataset, RerankDocument, RerankExample
from ft_core.datasets.rerank import Target
from ft_core.errors import DatasetError

Row = dict[str, Any]

_LIST_SCALE = 10.0  # a softmax of labels from 0 to 1 would hardly tell them apart


def training_rows(dataset: RerankDataset, loss: str, *, negatives: int, seed: int) -> list[Row]:
    """Return the rows of a loss, of each query its relevant documents and some of the others.

    Args:
        dataset: with the numbers that the loss learns from.
        loss: one of `LOSSES`.
        negatives: documents that are not relevant, for each relevant one: at random among
            those that are labelled so and, where these are fewer, among the documents of other
            queries. Of a teacher's scores all are learned, in groups of so many and one; by a
            loss of single pairs, all that is known.
        seed: the same seed takes the same ones.

    Returns:
        Rows with the columns that the loss wants, in its order; `label` is what it learns.

    Raises:
        DatasetError: nothing can be learned from the numbers; says what to do.
    """
    form = LOSSES[loss]
    dataset.check_trainable(form.target, within_query=form.within_query)
    shift, scale = _scale(_numbers(dataset, form.target), form.target)
    strangers = _Strangers(dataset)
    rows: list[Row] = []
    for number, example in enumerate(dataset):
        rng = random.Random(f"{seed} {number}")  # of the query's own: others change nothing
        for documents in _groups(example, form, negatives, strangers, rng):
            scores = [(_value(document, form.target) - shift) / scale for document in documents]
            rows += form.rows(example.query, [document.text for document in documents], scores)
    if not rows:
        raise DatasetError(
            "no query has a document with a label of 0.5 or more beside another; "
            "judge more documents"
        )
    return _of_one_width(rows) if form.columns else rows


def _numbers(dataset: RerankDataset, target: Target) -> list[float]:
    return [
        _value(document, target)
        for example in dataset
        for document in example.documents
        if getattr(document, target) is not None
    ]


def _scale(numbers: list[float], target: Target) -> tuple[float, float]:
    """Return what to subtract and to divide by.

    Labels are brought to 0 to 1. A teacher's scores get mean 0 and deviation 1, so that no
    learning rate is too high for one teacher and too low for another.
    """
    if target == "label":
        return 0.0, max(1.0, *numbers)
    return statistics.fmean(numbers), statistics.pstdev(numbers)


def _value(document: RerankDocument, target: Target) -> float:
    return float(getattr(document, target))


class _Strangers:
    """The documents of other queries, which stand in where too few are known to be wrong."""

    def __init__(self, dataset: RerankDataset) -> None:
        documents = [d for example in dataset for d in example.documents]
        self._documents = list({document.text: document for document in documents}.values())

    def sample(
        self, example: RerankExample, count: int, rng: random.Random
    ) -> list[RerankDocument]:
        """Return up to `count` documents that are none of the query's own, labelled 0."""
        texts = {document.text for document in example.documents}
        # Of a long document, each query may read another passage: it is the same one all the same.
        names = {document.id for document in example.documents if document.id is not None}
        # A few more than wanted, for those of its own; a small dataset may not have as many.
        drawn = rng.sample(self._documents, min(len(self._documents), count + 2 * len(texts)))
        others = [d for d in drawn if d.text not in texts and d.id not in names]
        return [RerankDocument(text=document.text, label=0) for document in others[:count]]


def _groups(
    example: RerankExample,
    form: Form,
    negatives: int,
    strangers: _Strangers,
    rng: random.Random,
) -> Iterator[list[RerankDocument]]:
    """Yield documents that are learned together, the best first."""
    known = [d for d in example.documents if getattr(d, form.target) is not None]
    known.sort(key=lambda document: -_value(document, form.target))
    if not form.within_query:
        yield known
    elif form.target != "label":
        count = -(-len(known) // (negatives + 1))
        for start in range(count):
            yield known[start::count]  # each group gets good and bad ones
    else:
        yield from _around_relevant(example, known, negatives, strangers, rng)


def _around_relevant(
    example: RerankExample,
    known: list[RerankDocument],
    negatives: int,
    strangers: _Strangers,
    rng: random.Random,
) -> Iterator[list[RerankDocument]]:
    """Yield, for each relevant document, it, those of lower grade, and others."""
    others = [document for document in known if not document.grade]
    for place, best in enumerate(known):
        if not best.grade:
            break
        lower = [d for d in known[place + 1 :] if d.grade and d.label != best.label]
        picked = rng.sample(others, min(negatives, len(others)))
        picked += strangers.sample(example, negatives - len(picked), rng)
        yield [best, *lower, *picked]


def _pairs(query: str, texts: list[str], scores: list[float]) -> Iterator[Row]:
    for text, score in zip(texts, scores, strict=True):
        yield {"query": query, "document": text, "label": score}


def _lists(query: str, texts: list[str], scores: list[float]) -> Iterator[Row]:
    if len(set(scores)) > 1:
        yield {"query": query, "documents": texts, "label": scores}


def _scaled_lists(query: str, texts: list[str], scores: list[float]) -> Iterator[Row]:
    yield from _lists(query, texts, [_LIST_SCALE * score for score in scores])


def _tuples(query: str, texts: list[str], scores: list[float]) -> Iterator[Row]:
    """Yield the best document and those below it."""
    below = [text for text, score in zip(texts, scores, strict=True) if score < scores[0]]
    if below:
        yield {"query": query, "positive": texts[0], **_negative_columns(below)}


def _margins(query: str, texts: list[str], scores: list[float]) -> Iterator[Row]:
    if len(texts) > 1:
        row = {"query": query, "positive": texts[0], **_negative_columns(texts[1:])}
        yield {**row, "label": scores}


def _negative_columns(texts: list[str]) -> Row:
    return {f"negative_{number}": text for number, text in enumerate(texts, start=1)}


def _of_one_width(rows: list[Row]) -> list[Row]:
    """Fill rows with fewer negatives than others: the same ones count again.

    A table has one number of columns. Repeating changes the weights within the row only.
    """
    width = max(sum(name.startswith("negative_") for name in row) for row in rows)
    for row in rows:
        own = [row[name] for name in row if name.startswith("negative_")]
        labels = row.pop("label", None)
        row.update(_negative_columns([own[place % len(own)] for place in range(width)]))
        if labels is not None:
            wanted = [labels[1 + place % len(own)] for place in range(width)]
            row["label"] = [labels[0], *wanted]
    return rows


@dataclass(frozen=True)
class Form:
    """What a loss learns from."""

    target: Target
    """Which number of a document."""
    rows: Callable[[str, list[str], list[float]], Iterator[Row]]
    """Makes the rows of a group of documents: a query, texts and numbers, best first."""
    within_query: bool = True
    """Whether it compares the documents of a query, or each with its number alone."""
    columns: bool = False
    """Whether each document of a row has a column, and so all rows as many."""


LOSSES: Mapping[str, Form] = MappingProxyType(
    {
        "listnet": Form("label", _scaled_lists),
        "lambda": Form("label", _lists),
        "multiple_negatives_ranking": Form("label", _tuples, columns=True),
        "binary_cross_entropy": Form("label", _pairs, within_query=False),
        "margin_mse": Form("teacher_score", _margins, columns=True),
        "mse": Form("teacher_score", _pairs, within_query=False),
    }
)
"""By name: the first four learn labels, the others what a teacher scored."""


def default_loss(dataset: RerankDataset) -> str:
    """Return the loss for what the dataset has: a teacher's scores, or else labels.

    Raises:
        DatasetError: it has neither.
    """
    scored = len(_numbers(dataset, "teacher_score"))
    labelled = len(_numbers(dataset, "label"))
    if not scored and not labelled:
        raise DatasetError(
            "no document has a label or a teacher's score; judge some, score them with a teacher, "
            "or pass an embedding QA dataset"
        )
    return "margin_mse" if scored >= labelled else "listnet"
