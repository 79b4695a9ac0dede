"""Cohere's training file for rerankers: JSON Lines of a query, passages that answer it, others.

Cohere's limits, from its documentation (sources in github.com/cohere-ai/
cohere-developer-experience, fern/pages): get-started/datasets.mdx for the 256 training and 64
evaluation queries, the passages and the file's 1.5 GB; fine-tuning/rerank-fine-tuning/
rerank-preparing-the-data.mdx for *unique* queries, rerank-improving-the-results.mdx for the
510 tokens, rerank-starting-the-training.mdx for what becomes of odd negatives.
"""

from __future__ import annotations

import json
import logging
import math
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.datasets.base import check_text
from ft_core.datasets.examples import Example, ExampleDataset
from ft_core.datasets.rerank import RerankDataset, RerankDocument, RerankExample
from ft_core.errors import ArgumentError, DatasetError
from ft_core.files import parse_json, read_text
from ft_core.mining import mine_hard_negatives
from ft_core.report.text import plural

if TYPE_CHECKING:
    from llama_index.core.base.base_retriever import BaseRetriever
    from llama_index.core.base.embeddings.base import BaseEmbedding

logger = logging.getLogger(__name__)

MIN_TRAIN_QUERIES = 256
"""Unique ones, in the training file."""
MIN_VALIDATION_QUERIES = 64
"""Unique ones, where a validation file is given."""
MAX_PAIR_TOKENS = 510
"""Of query and passage together; Cohere cuts the passage."""
MAX_FILE_BYTES = 1_500_000_000

# Scripts of which a tokenizer takes about one token a character: Thai, Lao, Tibetan, Burmese,
# Khmer, Hangul, kana, Han.
_DENSE = (
    "\u0e00-\u0fff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3040-\u318f\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uffdc\U00020000-\U0003ffff"
)
_PIECES = re.compile(rf"[{_DENSE}]|[^\W{_DENSE}]+|[^\w\s]")

Method = Literal["random", "cosine_similarity", "bm25", "retriever"]


class CohereRerankerFinetuneDataset(Example):
    """One line of the file: a query, the passages that answer it and some that seem to.

    Repeated hard negatives are kept once, as Cohere would.

    Raises:
        DatasetError: a text is empty or not Unicode, no passage is relevant, or one is both
            relevant and a hard negative; it names the place.
    """

    query: str
    relevant_passages: list[str]
    """At least one."""
    hard_negatives: list[str] = Field(default_factory=list)
    """Cohere advises about five."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_text(self.model_dump())
        if not self.query.strip():
            raise DatasetError("is empty", place="query")
        if not self.relevant_passages:
            raise DatasetError(
                "is empty; name a passage or drop the query", place="relevant_passages"
            )
        for name in ("relevant_passages", "hard_negatives"):
            for index, text in enumerate(getattr(self, name)):
                if not text.strip():
                    raise DatasetError("is empty", place=f"{name}[{index}]")
        for index, text in enumerate(self.hard_negatives):
            if text in self.relevant_passages:
                place = f"hard_negatives[{index}]"
                raise DatasetError("is one of the relevant_passages, too", place=place)
        self.hard_negatives = list(dict.fromkeys(self.hard_negatives))
        return self

    def asked(self) -> str:
        """Return the query."""
        return self.query

    @property
    def documents(self) -> list[RerankDocument]:
        """The passages, labelled 1, and the hard negatives, labelled 0."""
        return [
            RerankDocument(text=text, label=label)
            for label, texts in ((1, self.relevant_passages), (0, self.hard_negatives))
            for text in dict.fromkeys(texts)
        ]

    def content(self) -> dict[str, Any]:
        """Return all three fields: Cohere wants each, if only as an empty list."""
        return self.model_dump(mode="json")

    def to_jsonl(self) -> str:
        """Return the line of the file, its end included."""
        return json.dumps(self.content(), ensure_ascii=False) + "\n"


class CohereRerankerFile(ExampleDataset[CohereRerankerFinetuneDataset]):
    """A training or validation file for Cohere.

    `load` names the file and the line that does not fit; `split` keeps rewordings of a query
    on one side.
    """

    _example = CohereRerankerFinetuneDataset

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read and check a file; see `ExampleDataset.load`.

        Raises:
            DatasetError: also says so where it is another dataset, of which this can be made.
        """
        try:
            return super().load(path)
        except DatasetError:
            if kind := _other_dataset(path):
                raise DatasetError(
                    f"is {kind}, not Cohere's training file; `ft cohere export` makes one of it",
                    source=path,
                ) from None
            raise

    @classmethod
    def from_rerank(cls, dataset: Any, *, max_negatives: int | None = None) -> Self:
        """Return the judged documents of a `RerankDataset`, in its order.

        What has no label is left out, and so is a query of which no document is relevant (a
        label of 0.5 or more). Examples of one query are joined; a document that is relevant
        in one of them is no negative of the others.

        Args:
            dataset: a `RerankDataset`, or what its `coerce` takes.
            max_negatives: take at most so many for a query, in the order of its documents.

        Raises:
            ArgumentError: `max_negatives` below 0.
            DatasetError: no query has a relevant document.
        """
        if max_negatives is not None and max_negatives < 0:
            raise ArgumentError("max_negatives", f"must be at least 0, not {max_negatives}")
        judged: dict[str, dict[str, int]] = {}
        for example in RerankDataset.coerce(dataset):
            grades = judged.setdefault(example.query, {})
            for document in example.documents:
                if document.label is not None:
                    grade = max(document.grade, grades.get(document.text, 0))
                    grades[document.text] = grade
        entries = [
            CohereRerankerFinetuneDataset(
                query=query,
                relevant_passages=[text for text, grade in grades.items() if grade],
                hard_negatives=[text for text, grade in grades.items() if not grade][
                    :max_negatives
                ],
            )
            for query, grades in judged.items()
            if any(grades.values())
        ]
        if not entries:
            raise DatasetError("no query has a document with a label of 0.5 or more")
        if left_out := len(judged) - len(entries):
            logger.warning(
                "left out %s without a relevant document", plural(left_out, "query", "queries")
            )
        return cls(examples=entries)

    def to_rerank(self) -> RerankDataset:
        """Return the queries with their passages labelled 1 and their hard negatives 0."""
        return RerankDataset(
            examples=[
                RerankExample(query=entry.query, documents=entry.documents)
                for entry in self.examples
            ]
        )

    def check_limits(
        self,
        *,
        validation: bool = False,
        path: Path | str | None = None,
        count_tokens: Callable[[str], int] | None = None,
    ) -> list[int]:
        """Check the file against Cohere's limits, before anything is uploaded.

        Args:
            validation: it is the validation file.
            path: the file, for the message.
            count_tokens: what counts as Cohere does; by default an estimate.

        Returns:
            The numbers, from 1, of the queries with a passage that Cohere will cut; there is a
            warning of these in the log.

        Raises:
            DatasetError: too few queries or too large a file; it says how many are missing.
        """
        queries = len({entry.query for entry in self.examples})
        least = MIN_VALIDATION_QUERIES if validation else MIN_TRAIN_QUERIES
        if queries < least:
            raise DatasetError(
                f"has {queries} different queries; Cohere takes no "
                f"{'validation' if validation else 'training'} file with fewer than {least}: "
                f"add {least - queries}" + (" or give none" if validation else ""),
                source=path,
            )
        size = sum(len(entry.to_jsonl().encode()) for entry in self.examples)
        if size > MAX_FILE_BYTES:
            raise DatasetError(f"has {size} bytes; Cohere takes {MAX_FILE_BYTES}", source=path)
        count = count_tokens or estimate_tokens
        cut = [number for number, entry in enumerate(self.examples, 1) if _too_long(entry, count)]
        if cut:
            logger.warning(
                "Cohere cuts a passage of %s of %d: with the query it has more than %d tokens; "
                "the first is number %d",
                plural(len(cut), "query", "queries"),
                len(self),
                MAX_PAIR_TOKENS,
                cut[0],
            )
        return cut


def estimate_tokens(text: str) -> int:
    """Return about how many tokens a text has: words and marks, long words in pieces.

    In scripts without spaces between words, and in Hangul, each character counts as one.
    """
    return sum(math.ceil(len(piece) / 6) for piece in _PIECES.findall(text))


def _other_dataset(path: Path | str) -> str | None:
    """Say what a file that is no training file is, where `ft cohere export` can read it."""
    try:
        text = read_text(path)
    except DatasetError:
        return None
    for part in (text, text.split("\n", 1)[0]):
        try:
            fields = parse_json(part)
        except DatasetError:
            continue
        if isinstance(fields, dict) and {"queries", "corpus"} <= fields.keys():
            return "an embedding QA dataset"
        if isinstance(fields, dict) and {"query", "documents"} <= fields.keys():
            return "a rerank dataset"
    return None


def _too_long(entry: CohereRerankerFinetuneDataset, count: Callable[[str], int]) -> bool:
    longest = max(map(count, entry.relevant_passages + entry.hard_negatives))
    return count(entry.query) + longest > MAX_PAIR_TOKENS


def generate_cohere_reranker_finetuning_dataset(
    query_context_pairs: EmbeddingQAFinetuneDataset,
    num_negatives: int = 0,
    top_k_dissimilar: int = 100,
    hard_negatives_gen_method: Method = "random",
    finetune_dataset_file_name: Path | str | None = "train.jsonl",
    embed_model: BaseEmbedding | None = None,
    *,
    retriever: BaseRetriever | None = None,
    relative_margin: float | None = 0.05,
    seed: int = 0,
    show_progress: bool = True,
) -> CohereRerankerFile:
    """Make Cohere's training file of an embedding QA dataset, with negatives, and write it.

    Args:
        query_context_pairs: the queries and the documents that answer them: all of a query's
            are its relevant passages.
        num_negatives: how many for each query, at most; 0 for none.
        top_k_dissimilar: how deep to look for mined negatives; see `range_max` of
            `ft_core.mining.mine_hard_negatives`.
        hard_negatives_gen_method: "random" documents of the corpus; "cosine_similarity", what
            `embed_model` ranks high; "bm25"; or "retriever", what the app's own one finds.
        finetune_dataset_file_name: where to write, whole or not at all; None to write nothing.
        embed_model: for "cosine_similarity".
        retriever: for "retriever"; its node ids are the dataset's document ids.
        relative_margin: keeps probable answers out of the mined negatives; see there.
        seed: the same seed draws the same random negatives.
        show_progress: show bars on stderr where that is a terminal.

    Returns:
        The file's content.

    Raises:
        ArgumentError: a bad argument, or the model or retriever that the method needs is missing.
        DatasetError: the dataset is bad.
    """
    dataset = EmbeddingQAFinetuneDataset.coerce(query_context_pairs)
    if num_negatives < 0:
        raise ArgumentError("num_negatives", f"must be at least 0, not {num_negatives}")
    source = _source(hard_negatives_gen_method, embed_model, retriever)
    negatives: Mapping[str, list[str]] = {}
    if num_negatives and source is None:
        negatives = _random_negatives(dataset, num_negatives, seed)
    elif num_negatives and source is not None:
        negatives = mine_hard_negatives(
            dataset,
            source,
            num_negatives=num_negatives,
            range_max=max(top_k_dissimilar, num_negatives),
            relative_margin=relative_margin,
            show_progress=show_progress,
        )
    file = CohereRerankerFile(examples=_entries(dataset, negatives))
    if finetune_dataset_file_name is not None:
        file.save(finetune_dataset_file_name)
    return file


def _source(
    method: str, embed_model: BaseEmbedding | None, retriever: BaseRetriever | None
) -> BaseEmbedding | BaseRetriever | Literal["bm25"] | None:
    """Return what mines the negatives, None where chance does."""
    if method == "random":
        return None
    if method == "bm25":
        return "bm25"
    needed = {
        "cosine_similarity": ("embed_model", embed_model),
        "retriever": ("retriever", retriever),
    }
    if method not in needed:
        known = ", ".join(map(repr, ("random", "bm25", *needed)))
        raise ArgumentError("hard_negatives_gen_method", f"is {method!r}; known are {known}")
    name, given = needed[method]
    if given is None:
        raise ArgumentError(name, f"is needed where hard_negatives_gen_method is {method!r}")
    return given


def _random_negatives(
    dataset: EmbeddingQAFinetuneDataset, count: int, seed: int
) -> dict[str, list[str]]:
    """Return query id to ids of documents that are not, by id or text, among its relevant ones."""
    ids = list(dataset.corpus)
    most = max(map(len, dataset.relevant_docs.values()))
    chosen: dict[str, list[str]] = {}
    for query in dataset.queries:
        draw = random.Random(f"{seed} {query}")
        relevant = {dataset.corpus[document] for document in dataset.relevant_docs[query]}
        # Some more than are wanted: without looking at the whole corpus for each query.
        drawn = draw.sample(ids, min(len(ids), count + most))
        others = [document for document in drawn if dataset.corpus[document] not in relevant]
        if len(others) < count and len(drawn) < len(ids):  # texts that stand there many times
            drawn = draw.sample(ids, len(ids))
            others = [document for document in drawn if dataset.corpus[document] not in relevant]
        chosen[query] = others[:count]
    return chosen


def _entries(
    dataset: EmbeddingQAFinetuneDataset, negatives: Mapping[str, list[str]]
) -> list[CohereRerankerFinetuneDataset]:
    """Return an entry for each query; ids with one text make one entry."""
    passages: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for query, text in dataset.queries.items():
        relevant, others = passages.setdefault(text, ({}, {}))
        relevant.update(dict.fromkeys(dataset.corpus[d] for d in dataset.relevant_docs[query]))
        others.update(dict.fromkeys(dataset.corpus[d] for d in negatives.get(query, ())))
    return [
        CohereRerankerFinetuneDataset(
            query=text,
            relevant_passages=list(relevant),
            hard_negatives=[other for other in others if other not in relevant],
        )
        for text, (relevant, others) in passages.items()
    ]
