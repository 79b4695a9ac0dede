"""Questions over documents, and an LLM's labels of what a retriever finds for them."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ft_core.datasets import RerankDataset, RerankDocument, RerankExample
from ft_core.datasets.rerank import is_visible, merge_repeats
from ft_core.errors import ArgumentError, DatasetError, GenerationError
from ft_core.files import content_hash
from ft_core.generation import DEFAULT_QA_GENERATE_PROMPT_TMPL, generate_qa_embedding_pairs, runner
from ft_core.generation.calls import JournalledCalls, check_llm, shorten
from ft_core.generation.journal import AnswerJournal
from ft_core.traffic import finite

if TYPE_CHECKING:
    from llama_index.core.base.base_retriever import BaseRetriever
    from llama_index.core.llms import LLM
    from llama_index.core.schema import Document, NodeWithScore, TextNode

DEFAULT_QUERY_GEN_SYSTEM_PROMPT = """\
You know {qa_topic} well and write search queries that test a document search engine. For each
passage you are shown, write {num_questions_per_chunk} questions, one a line, and nothing else."""
"""What the LLM is told first; the placeholders may be left out."""

DEFAULT_QUERY_GEN_USER_PROMPT = """\
Passage:
{context}

Write {num_questions_per_chunk} questions that this passage alone answers. Each names what it is
about, so that it makes sense to somebody who has not seen the passage."""
"""What it is told of each passage; `{context}` is the passage."""

DEFAULT_QUERY_DOC_RELEVANCE_PROMPT = """\
Decide whether a document helps to answer a query. A document about the same subject that holds
nothing of the answer does not help.

Query: what does a day ticket for the tram cost
Document: A day ticket is sold for 6.40 euros at every machine and is valid until 3 a.m.
Helpful: Yes

Query: what does a day ticket for the tram cost
Document: The tram runs every ten minutes by day and every half hour after midnight.
Helpful: No

Query: {query}
Document: {document}
Answer with one word, Yes or No.
Helpful:"""
"""Asks for yes or no; a replacement needs `{query}` and `{document}`."""

GRADED_RELEVANCE_PROMPT = """\
Grade how well a document answers a query, as a whole number from 0 to {max_grade}:
0 means that it has nothing to do with the answer, {max_grade} that it answers the query in full.

Query: {query}
Document: {document}
Answer with the number alone.
Grade:"""
"""Asks for a grade, where `max_grade` is given and no prompt."""


@dataclass
class CrossEncoderFinetuningDatasetSample:
    """A query, a text, and how relevant the text is."""

    query: str
    context: str
    score: float
    """1 or 0, a fraction between, or a grade."""


def samples_to_dataset(
    samples: Iterable[CrossEncoderFinetuningDatasetSample],
) -> RerankDataset:
    """Return samples as a dataset: those of a query are its candidates, in their order.

    Of a text that a query has twice, the highest score counts.

    Raises:
        DatasetError: there is none, or one has an empty text or a score that is no label; it
            names the sample.
    """
    by_query: dict[str, list[RerankDocument]] = {}
    for place, sample in enumerate(samples):
        try:
            if not isinstance(sample.query, str) or not is_visible(sample.query):
                raise DatasetError("the text is empty; write one or drop it", place="query")
            document = RerankDocument(text=sample.context, label=sample.score)
        except DatasetError as error:
            names = {"text": "context", "label": "score"}
            inner = names.get(error.place, error.place)
            raise DatasetError(error.reason, place=f"samples[{place}].{inner}") from None
        by_query.setdefault(sample.query, []).append(document)
    if not by_query:
        raise DatasetError("there is no sample; label some documents first")
    return RerankDataset(
        examples=[
            RerankExample(query=query, documents=merge_repeats(documents))
            for query, documents in by_query.items()
        ]
    )


def dataset_to_samples(dataset: RerankDataset) -> list[CrossEncoderFinetuningDatasetSample]:
    """Return every document with a label as a sample."""
    return [
        CrossEncoderFinetuningDatasetSample(example.query, document.text, document.label)
        for example in dataset
        for document in example.documents
        if document.label is not None
    ]


# --- Questions -------------------------------------------------------------------------------


def generate_synthetic_queries_over_documents(
    documents: Sequence[Document],
    num_questions_per_chunk: int = 5,
    max_chunk_length: int = 3000,
    qa_topic: str = "everything",
    llm: LLM | None = None,
    qa_generate_system_msg: str = DEFAULT_QUERY_GEN_SYSTEM_PROMPT,
    qa_generate_user_msg: str = DEFAULT_QUERY_GEN_USER_PROMPT,
    *,
    output_path: str | Path = "ce_questions.json",
    **settings: Any,
) -> list[str]:
    """Ask an LLM for questions about documents.

    Journalled and resumable as `ft_core.generation.generate_qa_embedding_pairs`, which does
    the asking: a run that was killed goes on where it was.

    Args:
        documents: LlamaIndex documents or nodes.
        num_questions_per_chunk: how many to ask for about a chunk.
        max_chunk_length: tokens of a chunk at most.
        qa_topic: what the LLM is said to know well.
        llm: any LlamaIndex LLM; by default LlamaIndex's `Settings.llm`.
        qa_generate_system_msg: may hold `{qa_topic}` and `{num_questions_per_chunk}`.
        qa_generate_user_msg: holds `{context}`, and may hold `{num_questions_per_chunk}`.
        output_path: an embedding QA dataset of questions and chunks is saved here, with the
            journal beside it.
        settings: further arguments of `generate_qa_embedding_pairs`, such as `workers`.

    Returns:
        The questions, without repetitions, in the order of the documents.

    Raises:
        ArgumentError: an argument cannot be used.
        GenerationError: see `generate_qa_embedding_pairs`.
    """
    llm = _default_llm(llm)
    template: Any = _QuestionPrompt(qa_topic, qa_generate_system_msg, qa_generate_user_msg)
    if template.is_default and runner.is_in_process(llm):
        template = DEFAULT_QA_GENERATE_PROMPT_TMPL  # has a version for small models
    dataset = generate_qa_embedding_pairs(
        chunks(documents, max_chunk_length),
        llm,
        template,
        num_questions_per_chunk,
        output_path=output_path,
        **settings,
    )
    return list(dataset.queries.values())


class _QuestionPrompt:
    """The two messages as one prompt, filled as `generate_qa_embedding_pairs` fills its own."""

    def __init__(self, topic: str, system: str, user: str) -> None:
        self._topic, self._system, self._user = topic, system, user
        if "{context}" not in user and "{" not in user:
            raise ArgumentError("qa_generate_user_msg", "has no {context}, the passage's place")
        self.is_default = (
            topic == "everything"
            and system == DEFAULT_QUERY_GEN_SYSTEM_PROMPT
            and user == DEFAULT_QUERY_GEN_USER_PROMPT
        )

    def format(self, *, context_str: str, num_questions_per_chunk: int) -> str:
        filled = {"num_questions_per_chunk": num_questions_per_chunk, "qa_topic": self._topic}
        system = _fill("qa_generate_system_msg", self._system, filled)
        user = _fill("qa_generate_user_msg", self._user, {**filled, "context": context_str})
        return f"{system}\n\n{user}"


# --- Labels ----------------------------------------------------------------------------------


def generate_ce_fine_tuning_dataset(
    documents: Sequence[Document],
    questions_list: Sequence[str],
    max_chunk_length: int = 1000,
    llm: LLM | None = None,
    qa_doc_relevance_prompt: str | None = None,
    top_k: int = 8,
    *,
    retriever: BaseRetriever | None = None,
    embed_model: Any = None,
    max_grade: int | None = None,
    output_path: str | Path = "ce_finetune_dataset.jsonl",
    workers: int = 8,
    max_retries: int = 8,
    retry_limit: int = 3,
    on_failure: Literal["continue", "fail"] = "continue",
    verbose: bool = True,
) -> list[CrossEncoderFinetuningDatasetSample]:
    """Retrieve for each question, and let an LLM label what was found.

    Every answer goes into `<output_path>.journal.jsonl` as it arrives: a run that is killed is
    taken up by running it again, and nothing that was answered is asked for again.

    Args:
        documents: LlamaIndex documents or nodes; with a `retriever` they may be empty.
        questions_list: the questions; empty ones and repetitions are passed over.
        max_chunk_length: tokens of a chunk at most.
        llm: any LlamaIndex LLM; by default LlamaIndex's `Settings.llm`.
        qa_doc_relevance_prompt: holds `{query}` and `{document}`, and may hold `{max_grade}`;
            by default one that asks for yes or no, or for a grade where `max_grade` is given.
        top_k: how many candidates of a question to label.
        retriever: the one that the app uses, so that the reranker learns from what it will
            see; by default one over the chunks of the documents.
        embed_model: of the default retriever; by default LlamaIndex's `Settings.embed_model`.
        max_grade: ask for grades from 0 to this, up to 100, instead of yes or no.
        output_path: the labels are saved here too, as a `RerankDataset` with the retriever's
            scores, the journal beside it. An earlier state of it is replaced, no other file.
        workers: calls in flight at most; a model in this process is called once at a time.
        max_retries: further calls after a rate limit, a server error or a lost connection.
        retry_limit: calls in all where the LLM raises an error of unknown nature.
        on_failure: "continue" leaves out and warns of what got no label, "fail" stops there.
        verbose: show progress, where stderr is a terminal.

    Returns:
        The labelled pairs; a label is 0 or 1, or the grade.

    Raises:
        ArgumentError: an argument cannot be used.
        GenerationError: no label at all came of it, the server rejects every call,
            `output_path` holds something else, or a pair failed and `on_failure` is "fail".
            The journal is kept.
    """
    for name, value in (("top_k", top_k), ("workers", workers), ("retry_limit", retry_limit)):
        if value < 1:
            raise ArgumentError(name, f"must be at least 1, not {value}")
    if on_failure not in ("continue", "fail"):
        raise ArgumentError("on_failure", f'is "continue" or "fail", not {on_failure!r}')
    llm = _default_llm(llm)
    prompt = _RelevancePrompt(qa_doc_relevance_prompt, max_grade)
    questions = list(dict.fromkeys(text.strip() for text in questions_list if is_visible(text)))
    if not questions:
        raise ArgumentError("questions_list", "holds no question")
    if retriever is None:
        retriever = _retriever(documents, max_chunk_length, embed_model, top_k)
    journal = AnswerJournal(Path(output_path), RerankDataset)
    calls = JournalledCalls(
        llm,
        journal,
        ["relevance", max_grade],
        workers=workers,
        max_retries=max_retries,
        retry_limit=retry_limit,
        on_failure=on_failure,
        item="pair",
    )
    found = {question: _candidates(retriever.retrieve(question), top_k) for question in questions}
    journal.check_output([document.text for some in found.values() for document in some])
    labelled = runner.run(_label(found, prompt, calls, verbose=verbose))
    dataset = _labelled_dataset(found, labelled, calls)
    journal.save(dataset)
    return dataset_to_samples(dataset)


class _RelevancePrompt:
    """Asks about a pair, and reads the answer."""

    def __init__(self, template: str | None, max_grade: int | None) -> None:
        if max_grade is not None and not 1 <= max_grade <= 100:
            raise ArgumentError("max_grade", f"is from 1 to 100, not {max_grade}")
        default = DEFAULT_QUERY_DOC_RELEVANCE_PROMPT
        if max_grade is not None:
            default = GRADED_RELEVANCE_PROMPT
        self._template = default if template is None else template
        self.max_grade = max_grade
        probe = self.fill("\x02query\x03", "\x02document\x03")
        for name in ("query", "document"):
            if f"\x02{name}\x03" not in probe:
                raise ArgumentError("qa_doc_relevance_prompt", f"has no {{{name}}}")

    def fill(self, query: str, document: str) -> str:
        values = {"query": query, "document": document, "max_grade": self.max_grade}
        return _fill("qa_doc_relevance_prompt", self._template, values)

    def read(self, answer: str) -> int | None:
        if self.max_grade is None:
            return parse_yes_no(answer)
        return parse_grade(answer, self.max_grade)


_Pair = tuple[str, int]  # the question, and the place of the document among its candidates


async def _label(
    found: Mapping[str, list[RerankDocument]],
    prompt: _RelevancePrompt,
    calls: JournalledCalls,
    *,
    verbose: bool,
) -> dict[_Pair, float]:
    """Return the label of each pair that got one; the others are noted in `calls.failed`."""
    labels: dict[_Pair, float] = {}

    async def one(pair: _Pair) -> None:
        question, place = pair
        document = found[question][place]
        names = [f"{question[:80]} / {document.id or place}"]
        answer = await calls.answer(prompt.fill(question, document.text), names)
        if answer is None:
            return
        label = prompt.read(answer)
        if label is None:
            calls.report(names, f"the answer is no label: {shorten(answer)}")
        else:
            labels[pair] = float(label)

    pairs = [(question, place) for question, some in found.items() for place in range(len(some))]
    await calls.for_each(pairs, one, title="labelling", unit="pair", verbose=verbose)
    return labels


def _labelled_dataset(
    found: Mapping[str, list[RerankDocument]], labels: Mapping[_Pair, float], calls: JournalledCalls
) -> RerankDataset:
    """Return the candidates with their labels; what got none stays without."""
    if not labels:
        raise GenerationError(
            f"no label came of {len(found)} questions: "
            + (next(iter(calls.failed.values()), "") or "the retriever finds nothing for them")
        )
    if calls.failed:
        lines = [f"{name}: {reason}" for name, reason in list(calls.failed.items())[:20]]
        warnings.warn(
            f"{len(calls.failed)} pairs got no label:\n  " + "\n  ".join(lines), stacklevel=3
        )
    examples = []
    for question, documents in found.items():
        judged = [
            document.model_copy(update={"label": labels.get((question, place))})
            for place, document in enumerate(documents)
        ]
        if any(document.label is not None for document in judged):
            examples.append(RerankExample(query=question, documents=judged))
    return RerankDataset(examples=examples)


def _candidates(found: Sequence[NodeWithScore], top_k: int) -> list[RerankDocument]:
    from llama_index.core.schema import MetadataMode

    documents = []
    for item in found[:top_k]:
        text = item.node.get_content(metadata_mode=MetadataMode.NONE)
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair, from a PDF
        if is_visible(text):
            score = finite(item.score)
            documents.append(RerankDocument(id=item.node.node_id, text=text, retrieval_score=score))
    return merge_repeats(documents)


def _retriever(
    documents: Sequence[Document], max_chunk_length: int, embed_model: Any, top_k: int
) -> BaseRetriever:
    from llama_index.core import VectorStoreIndex

    nodes = chunks(documents, max_chunk_length)
    index = VectorStoreIndex(nodes, embed_model=embed_model, show_progress=False)
    return index.as_retriever(similarity_top_k=top_k)


def chunks(documents: Sequence[Document], max_chunk_length: int) -> list[TextNode]:
    """Split documents into nodes with ids that are the same in every run; repeated texts go.

    Raises:
        ArgumentError: there is nothing to split.
    """
    from llama_index.core.node_parser import TokenTextSplitter

    if max_chunk_length < 1:
        raise ArgumentError("max_chunk_length", f"must be at least 1, not {max_chunk_length}")
    splitter = TokenTextSplitter(
        separator=" ", chunk_size=max_chunk_length, chunk_overlap=0, backup_separators=["\n"]
    )
    nodes: dict[str, TextNode] = {}
    for node in splitter.get_nodes_from_documents(list(documents), show_progress=False):
        if node.text.strip():
            node.id_ = f"chunk-{content_hash(node.text)[:16]}"
            nodes.setdefault(node.id_, node)
    if not nodes:
        raise ArgumentError("documents", "hold no text")
    return list(nodes.values())


def _default_llm(llm: LLM | None) -> LLM:
    if llm is None:
        from llama_index.core import Settings

        try:
            llm = Settings.llm
        except (ImportError, ValueError) as error:
            raise ArgumentError(
                "llm", f"is None, and Settings.llm has none: {str(error).strip().splitlines()[0]}"
            ) from None
    check_llm(llm)
    return llm


def _fill(argument: str, template: str, values: Mapping[str, Any]) -> str:
    try:
        return template.format(**values)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ArgumentError(
            argument,
            f"cannot be filled ({type(error).__name__}: {error}); it takes "
            + ", ".join(f"{{{name}}}" for name in values)
            + ", and other braces must be doubled",
        ) from None


# --- Reading an answer -----------------------------------------------------------------------

_THINKING = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.S | re.I)
_NO = re.compile(
    r"n't\s+(?:\w+\s+)?(?:relevant|helpful)\b"
    r"|\b(?:no|false|irrelevant|unhelpful|not\s+(?:\w+\s+)?(?:relevant|helpful)"
    r"|does(?:\s+not|n't)\s+help|nein|non|nee|ne)\b",
    re.I,
)
_YES = re.compile(r"\b(?:yes|true|relevant|helpful|ja|oui|s[ií])\b", re.I)
# "Relevant:", "Helpful =" before the word
_VERDICT = re.compile(r"^\W*(?:relevant|relevance|helpful|answer|verdict|label)\W*[:=]", re.I)
_NUMBER = re.compile(r"(?<![\d.,/-])(\d{1,3})(?:\.0+)?(?![\d]|[.,]\d)")
_SCALE = re.compile(r"(\d)\s*(?:/|out\s+of|of|von)\s*\d+", re.I)
_RANGE = re.compile(r"\d+\s*(?:-|\u2013|to|bis)\s*\d+", re.I)
_LABEL = re.compile(
    r"\b(?:grade|score|rating|relevance|label|note)\b[\"'*_ ]*(?:is|=|:)?[\"'*_:= ]*", re.I
)


def parse_yes_no(answer: str) -> int | None:
    """Return 1 for yes, 0 for no, None where an answer says neither, or both.

    Marks, quotes, emphasis, a JSON object or an explanation around the word do not matter: the
    first line with a verdict counts, and of that its first word if that is yes or no.
    """
    answer = _unwrapped(answer)
    for line in answer.splitlines():
        line = _VERDICT.sub("", line)
        first = re.match(r"\W*(\w+)", line)
        if first and first[1].casefold() in ("yes", "true", "ja", "oui"):
            # "Yes or no" repeats the question.
            return None if re.match(r"\W*yes\W*(?:/|or\b)\W*no\b", line, re.I) else 1
        if first and first[1].casefold() in ("no", "false", "nein", "non"):
            return 0
        no = _NO.search(line)
        # "not relevant" holds "relevant"
        yes = _YES.search(_NO.sub(" ", line))
        if no and yes:
            return None
        if no or yes:
            return 1 if yes else 0
    return 1 if answer.strip() == "1" else 0 if answer.strip() == "0" else None


def parse_grade(answer: str, max_grade: int) -> int | None:
    """Return the whole number from 0 to `max_grade` that an answer gives, or None.

    "2", "Grade: 2", "2/3", "**2** - because ...", `{"grade": 2}`. A number behind the word
    grade, score or the like counts first; else the answer's only number, or that of its first
    line where that is all there is. What is out of range or no whole number is none.
    """
    answer = _RANGE.sub(" ", _SCALE.sub(r"\1", _unwrapped(answer)))
    for label in _LABEL.finditer(answer):
        number = re.match(r"(\d{1,3})(?:\.0+)?(?![\d]|[.,]\d)", answer[label.end() :])
        if number:
            return _in_range(number[1], max_grade)
    lines = [line for line in answer.splitlines() if line.strip()]
    for text in (lines[0] if lines else "", answer):
        numbers = set(_NUMBER.findall(text))
        if len(numbers) == 1:
            return _in_range(numbers.pop(), max_grade)
        if (start := re.match(r"\W*(\d{1,3})(?:\.0+)?(?=\s|[:;*)\-]|[.,](?!\d)|$)", text)) and (
            "-" not in text[: start.start(1)]
        ):
            return _in_range(start[1], max_grade)
    return None


def _in_range(number: str, max_grade: int) -> int | None:
    return int(number) if int(number) <= max_grade else None


def _unwrapped(answer: str) -> str:
    """Return the answer without thoughts; of a JSON object, its first plain value."""
    answer = _THINKING.sub("", answer).strip()
    body = re.search(r"\{.*\}", answer, re.S)
    if body:
        try:
            value = json.loads(body[0])
        except ValueError:
            return answer
        plain = [item for item in value.values() if isinstance(item, bool | int | str)]
        if plain:
            return "yes" if plain[0] is True else "no" if plain[0] is False else str(plain[0])
    return answer
