"""Queries with the documents that a retriever found for them, to train and test rerankers on."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import statistics
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from typing_extensions import Self

from ft_core.datasets.base import check_text
from ft_core.datasets.duplicates import fold
from ft_core.datasets.embedding_qa import EmbeddingQAFinetuneDataset
from ft_core.datasets.examples import Example, ExampleDataset, median_words, placed
from ft_core.errors import ArgumentError, DatasetError

Target = Literal["label", "teacher_score", "retrieval_score"]
"""Which number of a document a reranker learns."""

MAX_GRADE = 100
"""The highest label: beyond, a score or an id stands in the wrong column."""

_TARGETS = {
    "label": "judge documents, or pass negatives= to RerankDataset.from_embedding_qa",
    "teacher_score": "score the documents with a teacher first",
    "retrieval_score": "make the dataset from a retriever that returns scores",
}
_INVISIBLE = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})


class RerankPair(NamedTuple):
    """A query, a document, and the number to learn for the two."""

    query: str
    document: str
    score: float


class RerankTriplet(NamedTuple):
    """A query with a better and a worse document."""

    query: str
    positive: str
    negative: str
    margin: float | None
    """By how much the positive scores above the negative; None where a score is missing."""


class RerankDocument(BaseModel):
    """A candidate for one query, and what is known of the two.

    Raises:
        DatasetError: the text is empty or not Unicode, a number is not finite, or the label is
            out of range; it names the field.
    """

    model_config = ConfigDict(extra="forbid")

    id: str | None = None
    """The node's id in the application."""
    text: str
    """What the reranker reads."""
    label: float | None = None
    """Relevance, from 0 to 1 or a whole grade up to 100; None where nobody judged."""
    retrieval_score: float | None = None
    """What the retriever gave, higher is better, on any scale."""
    teacher_score: float | None = None
    """What a better reranker gave, higher is better, on any scale."""
    retrieved: bool = True
    """Whether the retriever found it. Training learns from the others too; evaluation counts
    them as missed."""

    @field_validator("label", "retrieval_score", "teacher_score", mode="before")
    @classmethod
    def _check_number(cls, value: Any, info: Any) -> float | None:
        return None if value is None else _number(value, info.field_name)

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_text({"id": self.id, "text": self.text})
        _check_visible(self.text, "text")
        if self.label is not None and not (0 <= self.label <= 1 or _is_grade(self.label)):
            raise DatasetError(
                f"is {self.label:g}; a label is from 0 (not relevant) to 1, or a whole grade up "
                f"to {MAX_GRADE}",
                place="label",
            )
        return self

    @property
    def grade(self) -> int:
        """Return the relevance as metrics take it: the grade, or 1 for a label of 0.5 to 1.

        An unjudged document has 0.
        """
        return 0 if self.label is None else math.floor(self.label + 0.5)


class RerankExample(Example):
    """A query and its candidates.

    Raises:
        DatasetError: the query is empty, there is no document, two documents have one text or
            one id, or see `RerankDocument`; it names the place.
    """

    id: str | None = None
    """The query's id, as in the dataset that the example was made from."""
    query: str
    """What was asked."""
    documents: list[RerankDocument]
    """At least one; those that were retrieved in that order, the others behind them."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """What a journal knows of the call, such as its time and model."""

    @field_validator("documents", mode="before")
    @classmethod
    def _check_each(cls, documents: Any) -> Any:
        if isinstance(documents, str | Mapping) or not isinstance(documents, Iterable):
            return documents  # for pydantic to refuse
        return [
            placed(RerankDocument, document, f"documents[{index}]")
            for index, document in enumerate(documents)
        ]

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_text({"id": self.id, "query": self.query, "metadata": self.metadata})
        _check_visible(self.query, "query")
        if not self.documents:
            raise DatasetError(
                "the query has no document; name one or drop the query", place="documents"
            )
        _check_unique([document.text.strip() for document in self.documents], "text")
        _check_unique([document.id for document in self.documents], "id")
        return self

    def asked(self) -> str:
        """Return the query."""
        return self.query

    @property
    def candidates(self) -> list[RerankDocument]:
        """Return the documents that were retrieved, in that order."""
        return [document for document in self.documents if document.retrieved]


def merge_repeats(documents: Iterable[RerankDocument]) -> list[RerankDocument]:
    """Return the documents without those that repeat a text or an id before them.

    The first keeps its place and, where it has none, takes the label or score of the others;
    of several labels the highest counts. A live index may well return a text twice; a
    `RerankExample` may not hold it twice.
    """
    merged: list[RerankDocument] = []
    place: dict[tuple[str, str], int] = {}
    for document in documents:
        names = [("text", document.text.strip())]
        if document.id is not None:
            names.append(("id", document.id))
        at = next((place[name] for name in names if name in place), len(merged))
        for name in names:
            place.setdefault(name, at)
        if at == len(merged):
            merged.append(document)
        else:
            merged[at] = _merged(merged[at], document)
    return merged


def _merged(first: RerankDocument, other: RerankDocument) -> RerankDocument:
    labels = [label for label in (first.label, other.label) if label is not None]
    update: dict[str, Any] = {
        "label": max(labels, default=None),
        "retrieved": first.retrieved or other.retrieved,
    }
    for field in ("retrieval_score", "teacher_score"):
        if getattr(first, field) is None:
            update[field] = getattr(other, field)
    return first.model_copy(update=update)


class RerankDataset(ExampleDataset[RerankExample]):
    """Queries with candidates, labels and scores; a JSON Lines file on disk, a query a line.

    Raises:
        DatasetError: there is no query, labels between 0 and 1 stand beside grades above 1, or
            see `RerankExample`; it names the place.
    """

    _example = RerankExample
    _names = frozenset({"id", "metadata"})

    @model_validator(mode="after")
    def _check_scale(self) -> Self:
        fraction, grade = "", ""
        for number, index, document in self._numbered():
            label = document.label
            place = f"examples[{number}].documents[{index}].label"
            if label is not None and not label.is_integer():
                fraction = fraction or f"{place} is {label:g}"
            elif label is not None and label > 1:
                grade = grade or f"{place} is {label:g}"
            if fraction and grade:
                raise DatasetError(
                    f"mixes labels from 0 to 1 with grades ({fraction}, {grade}); bring them to "
                    "one scale"
                )
        return self

    def _numbered(self) -> Iterator[tuple[int, int, RerankDocument]]:
        for number, example in enumerate(self.examples):
            for index, document in enumerate(example.documents):
                yield number, index, document

    @classmethod
    def from_embedding_qa(
        cls,
        dataset: Any,
        candidates: Mapping[str, Sequence[tuple[str, float | None]]],
        *,
        negatives: Mapping[str, Collection[str]] | Literal["all"] | None = None,
    ) -> Self:
        """Join what is relevant with what a retriever found.

        A relevant document is labelled 1, or with its grade. One that the retriever missed
        stands behind the candidates, marked as not `retrieved`.

        Args:
            dataset: an `EmbeddingQAFinetuneDataset`, or what its `coerce` takes.
            candidates: query id to (document id, score) of its candidates, best first, for
                every query: what `ft_core.mining.retrieve_candidates` returns.
            negatives: which documents that are not marked relevant are labelled 0. None: no
                one, their label stays None. "all": every candidate. Query id to document ids,
                as `Candidates.negatives` or `mine_hard_negatives` returns: these, whether
                they are candidates or not.

        Raises:
            ArgumentError: a query without an entry, an unknown id, a score that is not finite,
                a relevant document among the negatives.
            DatasetError: the dataset is bad.
        """
        dataset = EmbeddingQAFinetuneDataset.coerce(dataset)
        if isinstance(negatives, str) and negatives != "all":
            raise ArgumentError("negatives", f'is a mapping, "all" or None, not {negatives!r}')
        for argument, given in (("candidates", candidates), ("negatives", negatives)):
            _check_ids(argument, given, dataset)
        qrels = dataset.qrels
        return cls(
            examples=[
                RerankExample(
                    id=query,
                    query=text,
                    documents=merge_repeats(
                        _joined(dataset.corpus, qrels[query], candidates[query], query, negatives)
                    ),
                )
                for query, text in dataset.queries.items()
            ]
        )

    def to_embedding_qa(self) -> EmbeddingQAFinetuneDataset:
        """Return the queries, all documents as the corpus, and the relevant ones of each query.

        A query without a relevant document is left out, and with it what only scores or
        negatives tell. Ids are those of the examples and documents where they have one that
        stands for one text.

        Raises:
            DatasetError: no query has a relevant document.
        """
        qrels = self.qrels
        if not qrels:
            raise DatasetError(
                "no query has a document with a label of 0.5 or more; judge some documents"
            )
        queries, corpus = {}, {}
        for query, example, documents in self.with_ids():
            corpus.update({key: document.text for key, document in documents.items()})
            if query in qrels:
                queries[query] = example.query
        return EmbeddingQAFinetuneDataset(
            queries=queries,
            corpus=corpus,
            relevant_docs={query: list(grades) for query, grades in qrels.items()},
            grades=_above_one(qrels),
        )

    @property
    def qrels(self) -> dict[str, dict[str, int]]:
        """Query id to document id to grade, of the queries with a relevant document."""
        qrels = {
            query: {key: document.grade for key, document in documents.items() if document.grade}
            for query, _, documents in self.with_ids()
        }
        return {query: grades for query, grades in qrels.items() if grades}

    def with_ids(self) -> Iterator[tuple[str, RerankExample, dict[str, RerankDocument]]]:
        """Yield each example with its id, and its documents by theirs, in their order.

        An example without an id has its number, from 1; a document without one has a hash of
        its text. An id that stood for something else before gets a suffix.
        """
        queries: set[str] = set()
        texts: dict[str, str] = {}
        for number, example in enumerate(self.examples, start=1):
            query = str(number) if example.id is None else example.id
            while query in queries:
                query = f"{query} ({number})"
            queries.add(query)
            documents = {}
            for document in example.documents:
                key = _hash(document.text) if document.id is None else document.id
                if texts.setdefault(key, document.text) != document.text:
                    key = f"{key} ({_hash(document.text)})"
                    texts[key] = document.text
                documents[key] = document
            yield query, example, documents

    def to_pairs(
        self, target: Target = "label", *, max_label: float | None = None
    ) -> list[RerankPair]:
        """Return every pair of query and document that has the number to learn.

        Args:
            target: which number; labels are brought to 0 to 1, scores stay as they are.
            max_label: what a label of 1 stands for; by default 1, or this dataset's highest
                grade. Of the parts of a split pass the same.

        Raises:
            ArgumentError: an unknown target, or a label is above `max_label`.
        """
        _check_target("target", target)
        scale = self._scale(max_label) if target == "label" else 1.0
        return [
            RerankPair(example.query, document.text, value / scale)
            for example in self.examples
            for document in example.documents
            if (value := _value(document, target)) is not None
        ]

    def to_triplets(
        self,
        order: Target = "label",
        *,
        margin: Target = "teacher_score",
        max_per_query: int | None = None,
        seed: int = 0,
    ) -> list[RerankTriplet]:
        """Return every two documents of a query of which one is better.

        Args:
            order: which number tells the better one; documents without it are passed over.
            margin: the number whose difference is the triplet's margin.
            max_per_query: take at most so many of a query, at random; all by default, which
                for `n` scored documents may be n (n - 1) / 2.
            seed: the same seed takes the same ones.

        Raises:
            ArgumentError: an unknown number, or `max_per_query` below 1.
        """
        _check_target("order", order)
        _check_target("margin", margin)
        if max_per_query is not None and max_per_query < 1:
            raise ArgumentError("max_per_query", f"must be at least 1, not {max_per_query}")
        triplets: list[RerankTriplet] = []
        rng = random.Random(seed)
        for example in self.examples:
            found = list(_ordered(example, order))
            if max_per_query is not None and len(found) > max_per_query:
                found = [found[i] for i in sorted(rng.sample(range(len(found)), max_per_query))]
            triplets += [
                RerankTriplet(example.query, a.text, b.text, _margin(a, b, margin))
                for a, b in found
            ]
        return triplets

    def check_trainable(self, target: Target = "label", *, within_query: bool = True) -> None:
        """Check that there is something to learn from the numbers of a kind.

        Args:
            target: labels or scores.
            within_query: for losses that compare the documents of one query: at least one
                query has two different numbers. Off, two in the whole dataset do.

        Raises:
            ArgumentError: an unknown target.
            DatasetError: no document has the number, all have the same, or each query's have;
                it says what to do.
        """
        _check_target("target", target)
        by_query = [
            {value for d in example.documents if (value := _value(d, target)) is not None}
            for example in self.examples
        ]
        name, advice = target.replace("_", " "), _TARGETS[target]
        found: set[float] = set().union(*by_query)
        if not found:
            raise DatasetError(f"no document has a {name}; {advice}")
        if len(found) == 1:
            raise DatasetError(f"every {name} is {found.pop():g}: {_ONE_CLASS[target]}")
        if within_query and all(len(values) < 2 for values in by_query):
            raise DatasetError(
                f"no query has two documents of different {name}, so there is nothing to "
                f"compare; {advice}"
            )

    def stats(self) -> dict[str, Any]:
        """Return counts, and lengths in words."""
        documents = [document for _, _, document in self._numbered()]
        grades = [[document.grade for document in example.documents] for example in self.examples]
        return {
            "queries": len(self.examples),
            "distinct queries": len({fold(example.query) for example in self.examples}),
            "queries without a relevant document": sum(not any(each) for each in grades),
            "pairs": len(documents),
            "relevant": sum(map(bool, itertools.chain(*grades))),
            "not relevant": sum(d.label is not None and not d.grade for d in documents),
            "unjudged": sum(d.label is None for d in documents),
            "missed by the retriever": sum(not d.retrieved for d in documents),
            "with a retrieval score": sum(d.retrieval_score is not None for d in documents),
            "with a teacher score": sum(d.teacher_score is not None for d in documents),
            "distinct document texts": len({document.text for document in documents}),
            "median documents per query": round(statistics.median(map(len, grades))),
            "median words per query": median_words(e.query for e in self.examples),
            "median words per document": median_words(d.text for d in documents),
        }

    def _scale(self, max_label: float | None) -> float:
        labels = [d.label for _, _, d in self._numbered() if d.label is not None]
        highest = max([1.0, *labels])
        if max_label is None:
            return highest
        if not 0 < max_label < math.inf or max(labels, default=0.0) > max_label:
            raise ArgumentError(
                "max_label", f"is {max_label:g}; the highest label here is {highest:g}"
            )
        return max_label


_ONE_CLASS = {
    "label": "a model learns from relevant and other documents; pass negatives= to "
    "RerankDataset.from_embedding_qa, or judge more",
    "teacher_score": "the teacher tells no document from another; use another teacher",
    "retrieval_score": "the retriever tells no document from another; use another retriever",
}


def _number(value: Any, place: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, str | bytes) or not math.isfinite(number):
        raise DatasetError(
            f"is {value!r:.40}, not a finite number; write a number, or leave the field out",
            place=place,
        )
    return number


def _is_grade(label: float) -> bool:
    return label.is_integer() and 0 <= label <= MAX_GRADE


def is_visible(text: str) -> bool:
    """Say whether a text holds more than white space, control and zero-width characters.

    Of those a tokenizer makes nothing, and no example may have them alone.
    """
    return any(unicodedata.category(character) not in _INVISIBLE for character in text)


def _check_visible(text: str, place: str) -> None:
    if not is_visible(text):
        raise DatasetError("the text is empty; write one or drop it", place=place)


def _check_unique(values: Sequence[str | None], what: str) -> None:
    first: dict[str, int] = {}
    for index, value in enumerate(values):
        if value is not None and first.setdefault(value, index) != index:
            raise DatasetError(
                f"repeats the {what} of documents[{first[value]}]; keep one of them, as "
                "ft_core.datasets.rerank.merge_repeats does",
                place=f"documents[{index}]",
            )


def _check_target(argument: str, target: str) -> None:
    if target not in _TARGETS:
        raise ArgumentError(argument, f"{target!r} is none of {', '.join(_TARGETS)}")


def _check_ids(argument: str, given: Any, dataset: EmbeddingQAFinetuneDataset) -> None:
    """Check the query ids of an argument, and of "candidates" that none is missing."""
    if given is None or isinstance(given, str):
        return
    if not isinstance(given, Mapping):
        raise ArgumentError(argument, f"maps each query id to its documents, unlike {given!r:.40}")
    if unknown := next((query for query in given if query not in dataset.queries), None):
        raise ArgumentError(argument, f"there is no query {unknown!r} in the dataset")
    missing = next((query for query in dataset.queries if query not in given), None)
    if missing is not None and argument == "candidates":
        raise ArgumentError(
            argument,
            f"has no entry for queries[{missing!r}]; retrieve for every query, or leave some out "
            "with dataset.select",
        )


def _joined(
    corpus: Mapping[str, str],
    grades: Mapping[str, int],
    found: Sequence[tuple[str, float | None]],
    query: str,
    negatives: Mapping[str, Collection[str]] | str | None,
) -> Iterator[RerankDocument]:
    """Yield the candidates, what the retriever missed, and further negatives."""
    wrong = negatives.get(query, ()) if isinstance(negatives, Mapping) else ()
    if both := next((document for document in wrong if document in grades), None):
        raise ArgumentError(
            "negatives", f"{both!r} is a relevant document of queries[{query!r}]; leave it out"
        )
    is_wrong = set(wrong) if negatives != "all" else {document for document, _ in found}
    labels = {**dict.fromkeys(is_wrong, 0), **grades}
    for document, score in found:
        if score is not None:
            try:
                _number(score, "")
            except DatasetError as error:
                place = f"the score of {document!r} for queries[{query!r}]"
                raise ArgumentError("candidates", f"{place} {error.reason}") from None
        yield RerankDocument(
            id=document,
            text=_text(corpus, document, query, "candidates"),
            label=labels.get(document),
            retrieval_score=score,
        )
    candidates = {document for document, _ in found}
    for document in [*grades, *wrong]:
        if document not in candidates:
            yield RerankDocument(
                id=document,
                text=_text(corpus, document, query, "negatives"),
                label=labels[document],
                retrieved=False,
            )


def _text(corpus: Mapping[str, str], document: str, query: str, argument: str) -> str:
    if document not in corpus:
        raise ArgumentError(
            argument,
            f"{document!r} of queries[{query!r}] is no document of the dataset's corpus; build "
            "the index from nodes with its ids",
        )
    return corpus[document]


def _above_one(qrels: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """Return the grades that say more than that a document is relevant."""
    graded = {
        query: {document: grade for document, grade in grades.items() if grade > 1}
        for query, grades in qrels.items()
    }
    return {query: grades for query, grades in graded.items() if grades}


def _value(document: RerankDocument, target: Target) -> float | None:
    value: float | None = getattr(document, target)
    return value


def _ordered(
    example: RerankExample, order: Target
) -> Iterator[tuple[RerankDocument, RerankDocument]]:
    """Yield (better, worse) of every two documents that differ."""
    known = [(v, d) for d in example.documents if (v := _value(d, order)) is not None]
    for (first, a), (second, b) in itertools.combinations(known, 2):
        if first != second:
            yield (a, b) if first > second else (b, a)


def _margin(a: RerankDocument, b: RerankDocument, target: Target) -> float | None:
    first, second = _value(a, target), _value(b, target)
    return None if first is None or second is None else first - second


def _hash(text: str) -> str:
    return f"text-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
