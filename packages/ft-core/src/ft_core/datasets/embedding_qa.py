"""Questions, the documents that answer them, and which answers which."""

from __future__ import annotations

import importlib
import statistics
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from typing_extensions import Self

from ft_core.datasets import beir, huggingface
from ft_core.datasets.base import FinetuneDataset
from ft_core.errors import DatasetError, FTError

# Where releases of LlamaIndex have had the class, newest first; the last is the predecessor.
_LLAMA_INDEX_MODULES = (
    "llama_index.core.evaluation",
    "llama_index.core.llama_dataset.legacy.embedding",
    "llama_index.finetuning",
)


class EmbeddingQAFinetuneDataset(FinetuneDataset):
    """A retrieval dataset: queries, a corpus, and the relevant documents of each query.

    The JSON is the one that `llama_index.finetuning` reads and writes, and the object has what
    older releases of LlamaIndex expect of their own class (`RetrieverEvaluator.aevaluate_dataset`
    reads `query_docid_pairs` and `mode`).

    Raises:
        DatasetError: there is no query, a text is blank or not Unicode, a query has no relevant
            document or names one twice, or an id is unknown. It names the place.
    """

    queries: dict[str, str]
    """Query id to text."""
    corpus: dict[str, str]
    """Document id to text."""
    relevant_docs: dict[str, list[str]]
    """Query id to the ids of the documents that answer it, at least one."""
    mode: str = "text"
    """Kept for LlamaIndex: the evaluator reads it."""
    grades: dict[str, dict[str, int]] = Field(default_factory=dict)
    """Query id to document id to a grade of relevance above 0; a relevant document without
    a grade has 1."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.queries:
            raise DatasetError("has no query", place="queries")
        for name, texts in (("queries", self.queries), ("corpus", self.corpus)):
            for key, text in texts.items():
                if not text.strip():
                    raise DatasetError("the text is empty", place=f"{name}[{key!r}]")
                if not _is_unicode(key) or not _is_unicode(text):
                    raise DatasetError(
                        "holds half of a surrogate pair, which no file can; drop the character",
                        place=f"{name}[{key!r}]",
                    )
        for query in self.queries:
            if not self.relevant_docs.get(query):
                raise DatasetError(
                    "the query has no relevant document; name one or drop the query",
                    place=f"relevant_docs[{query!r}]",
                )
        for query, documents in self.relevant_docs.items():
            place = f"relevant_docs[{query!r}]"
            if query not in self.queries:
                raise DatasetError(f"there is no query {query!r}", place=place)
            for document in documents:
                if document not in self.corpus:
                    raise DatasetError(f"there is no document {document!r} in corpus", place=place)
            if len(set(documents)) < len(documents):
                raise DatasetError("names a document twice", place=place)
        for query, graded in self.grades.items():
            for document, grade in graded.items():
                place = f"grades[{query!r}][{document!r}]"
                if document not in self.relevant_docs.get(query, []):
                    raise DatasetError("grades a document not in relevant_docs", place=place)
                if grade < 1:
                    raise DatasetError(f"a grade is at least 1, this one is {grade}", place=place)
        return self

    @classmethod
    def from_json(cls, path: Path | str) -> Self:
        """Read a JSON file; the predecessor's name for `load`."""
        return cls.load(path)

    def save_json(self, path: Path | str) -> None:
        """Write a JSON file; the predecessor's name for `save`."""
        self.save(path)

    @classmethod
    def coerce(cls, dataset: Any) -> Self:
        """Return `dataset` as this class: itself, a path, or LlamaIndex's or the predecessor's.

        Any object with `queries`, `corpus` and `relevant_docs` will do.

        Raises:
            DatasetError: it is none of these, or its content is bad.
        """
        if isinstance(dataset, cls):
            return dataset
        if isinstance(dataset, str | Path):
            return cls.load(dataset)
        fields = ("queries", "corpus", "relevant_docs")
        if not all(hasattr(dataset, field) for field in fields):
            raise DatasetError(
                f"a {type(dataset).__name__} is not an embedding QA dataset: "
                f"it needs {', '.join(fields)}"
            )
        present = [field for field in cls.model_fields if hasattr(dataset, field)]
        return cls._checked({field: getattr(dataset, field) for field in present})

    def to_llama_index(self) -> Any:
        """Return LlamaIndex's own object, where an installed release has the class.

        It has no grades: each relevant document counts the same there.

        Raises:
            FTError: there is no such class, as in today's llama-index-core. None is needed:
                `RetrieverEvaluator.evaluate` takes what `query_docid_pairs` holds.
        """
        for module in _LLAMA_INDEX_MODULES:
            try:
                native = importlib.import_module(module).EmbeddingQAFinetuneDataset
            except (ImportError, AttributeError):
                continue
            return native(
                queries=dict(self.queries),
                corpus=dict(self.corpus),
                relevant_docs={query: list(ids) for query, ids in self.relevant_docs.items()},
                mode=self.mode,
            )
        raise FTError(
            "this release of LlamaIndex has no EmbeddingQAFinetuneDataset of its own, and needs "
            "none: pass each query and its ids in query_docid_pairs to "
            "RetrieverEvaluator.evaluate, or the dataset to ft_core.evaluation.evaluate_retriever"
        )

    @classmethod
    def from_beir(cls, folder: Path | str, split: str = "test") -> Self:
        """Read one split of a BEIR folder: `corpus.jsonl`, `queries.jsonl`, `qrels/SPLIT.tsv`.

        A document's text is its title, if any, and its text, a line each. A score above 0
        means relevant and is the grade; a pair with a score of 0 or less was judged not
        relevant and is left out. So are queries without a relevant document in this split,
        and documents without any text.

        Raises:
            DatasetError: names the file, the line and the reason.
        """
        return cls._checked(beir.read_beir(folder, split), folder)

    def to_beir(self, folder: Path | str, split: str = "test") -> None:
        """Write a BEIR folder, or add a split of the same corpus to one.

        Raises:
            DatasetError: the folder holds another corpus, or a query of the same id with
                another text.
        """
        beir.write_beir(folder, split, self.queries, self.corpus, self.qrels)

    @classmethod
    def from_huggingface(cls, source: Any) -> Self:
        """Take Hugging Face `datasets`: what `to_huggingface` returns, or a table of pairs.

        Args:
            source: a `DatasetDict`, or any mapping, with the tables "queries" and "corpus"
                (columns id or _id, text, and perhaps title) and "qrels" (query_id or
                query-id, corpus_id or corpus-id, score), read as `from_beir` does; or a
                `Dataset` of pairs with a column anchor, query or question, one of positive,
                context, document or answer, and perhaps negative, negative_1 and so on, in
                which equal texts become one query or document, and negatives come into the
                corpus; or a folder that `save_to_disk` wrote.

        Raises:
            DatasetError: names the table, the row and the reason.
            MissingExtraError: a folder is given and `datasets` is not installed.
        """
        return cls._checked(huggingface.from_tables(source))

    def to_huggingface(self) -> Any:
        """Return a `datasets.DatasetDict` with the tables queries, corpus and qrels.

        Their columns differ: to push them to a hub, push each as a configuration of its own.

        Raises:
            MissingExtraError: `datasets` is not installed.
        """
        return huggingface.to_tables(self.queries, self.corpus, self.qrels)

    @property
    def query_docid_pairs(self) -> list[tuple[str, list[str]]]:
        """Each query's text with the ids of its relevant documents; LlamaIndex's name."""
        return [(text, self.relevant_docs[query]) for query, text in self.queries.items()]

    @property
    def qrels(self) -> dict[str, dict[str, int]]:
        """Query id to document id to grade, as `ft_core.metrics` takes them."""
        return {
            query: {document: self.grades.get(query, {}).get(document, 1) for document in documents}
            for query, documents in self.relevant_docs.items()
        }

    def select(self, queries: Any, *, corpus: Any = None) -> Self:
        """Return the dataset of these query ids, with the whole corpus or the given documents.

        Args:
            queries: ids to keep, in any order; the dataset's order stays.
            corpus: document ids to keep; all by default.
        """
        queries = set(queries)
        documents = self.corpus if corpus is None else set(corpus)
        return type(self)(
            queries={key: text for key, text in self.queries.items() if key in queries},
            corpus={key: text for key, text in self.corpus.items() if key in documents},
            relevant_docs={k: v for k, v in self.relevant_docs.items() if k in queries},
            grades={k: v for k, v in self.grades.items() if k in queries},
            mode=self.mode,
        )

    def stats(self) -> dict[str, Any]:
        """Return counts, and lengths in words."""
        judged = {document for documents in self.relevant_docs.values() for document in documents}
        return {
            "queries": len(self.queries),
            "documents": len(self.corpus),
            "documents with a query": len(judged),
            "pairs": sum(map(len, self.relevant_docs.values())),
            "distinct query texts": len({text.strip() for text in self.queries.values()}),
            "distinct document texts": len({text.strip() for text in self.corpus.values()}),
            "median words per query": _median_words(self.queries),
            "median words per document": _median_words(self.corpus),
        }

    def _content(self) -> dict[str, Any]:
        content = super()._content()
        if not self.grades:
            del content["grades"]  # what the predecessor wrote has none
        return content


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _median_words(texts: dict[str, str]) -> int:
    return round(statistics.median(len(text.split()) for text in texts.values())) if texts else 0
