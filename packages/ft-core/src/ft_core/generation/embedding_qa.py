"""Questions about nodes, by an LLM: `generate_qa_embedding_pairs`."""

from __future__ import annotations

import uuid
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.errors import ArgumentError, GenerationError
from ft_core.generation import runner
from ft_core.generation.calls import JournalledCalls, check_llm, shorten
from ft_core.generation.journal import AnswerJournal
from ft_core.generation.parsing import question_key
from ft_core.generation.prompts import (
    DEFAULT_QA_GENERATE_PROMPT_TMPL,
    InstructStyle,
    SmallStyle,
    Style,
)

if TYPE_CHECKING:
    from llama_index.core.llms import LLM
    from llama_index.core.schema import BaseNode

StyleName = Literal["auto", "instruct", "small"]

_NAMESPACE = uuid.UUID("5b0c6a3e-63f5-4d0e-9d0b-0f6a4e1c7d52")  # of question ids; never change


@dataclass(frozen=True)
class GenerationResult:
    """What a run gave."""

    dataset: EmbeddingQAFinetuneDataset
    """Every node with a text is in its corpus, also one without a question."""
    failures: dict[str, str] = field(default_factory=dict)
    """Node id to why it has no question."""
    calls: int = 0
    """Answers that were asked for in this run."""
    resumed: int = 0
    """Answers that an earlier run had journalled."""


@dataclass(frozen=True)
class GenerationSettings:
    """The settings of `generate_qa_embedding_pairs`, checked.

    Raises:
        ArgumentError: names the setting and what it may be.
    """

    qa_generate_prompt_tmpl: Any = DEFAULT_QA_GENERATE_PROMPT_TMPL
    num_questions_per_chunk: int = 2
    retry_limit: int = 3
    on_failure: str = "continue"
    workers: int = 8
    seed: int = 0
    max_retries: int = 8
    style: str = "auto"

    def __post_init__(self) -> None:
        least = {"num_questions_per_chunk": 1, "retry_limit": 1, "workers": 1, "max_retries": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < lowest:
                raise ArgumentError(name, f"must be a whole number from {lowest}, not {value!r}")
        choices = {"on_failure": ("continue", "fail"), "style": ("auto", "instruct", "small")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ArgumentError(
                    name, f"must be one of {', '.join(allowed)}, not {getattr(self, name)!r}"
                )
        if self.style == "small" and self._has_own_prompt:
            raise ArgumentError(
                "qa_generate_prompt_tmpl", 'the style "small" has prompts of its own; leave it out'
            )

    @property
    def _has_own_prompt(self) -> bool:
        return bool(self.qa_generate_prompt_tmpl != DEFAULT_QA_GENERATE_PROMPT_TMPL)

    def style_for(self, llm: LLM) -> Style:
        """Return the style to use: "auto" is "small" for a model in this process."""
        automatic = runner.is_in_process(llm) and not self._has_own_prompt
        if self.style == "small" or (self.style == "auto" and automatic):
            return SmallStyle(self.seed)
        return InstructStyle(self.qa_generate_prompt_tmpl)


def generate_qa_embedding_pairs(
    nodes: Sequence[BaseNode],
    llm: LLM,
    qa_generate_prompt_tmpl: Any = DEFAULT_QA_GENERATE_PROMPT_TMPL,
    num_questions_per_chunk: int = 2,
    retry_limit: int = 3,
    on_failure: Literal["continue", "fail"] = "continue",
    save_every: int = 500,
    output_path: str | Path = "qa_finetune_dataset.json",
    verbose: bool = True,
    *,
    workers: int = 8,
    seed: int = 0,
    max_retries: int = 8,
    style: StyleName = "auto",
) -> EmbeddingQAFinetuneDataset:
    """Ask an LLM for questions that each node answers, and save them as a dataset.

    Every answer goes into `<output_path>.journal.jsonl` as it arrives. A run that is
    killed, or that ends with failed nodes, is taken up by running it again: nothing that was
    answered is asked for again, and the dataset is the one that an undisturbed run gives. A
    changed text, prompt, number of questions, model, style or seed is asked anew.

    It works in a notebook too, where an event loop is running; async code awaits
    `agenerate_qa_embedding_pairs`.

    Nodes with the same text are asked about once. A question that several nodes gave is one
    query with all of these nodes as relevant documents: whichever of them is retrieved, it
    was right. Question ids derive from the questions, so they are the same in every run.

    Args:
        nodes: what to ask about; their ids become document ids.
        llm: any LlamaIndex LLM (`ft_core.llms.load_llm` makes one from a short name).
        qa_generate_prompt_tmpl: a prompt with the placeholders `{context_str}` and
            `{num_questions_per_chunk}`.
        num_questions_per_chunk: questions to ask for; further ones are dropped.
        retry_limit: calls in all where the LLM raises an error of unknown nature.
        on_failure: "continue" leaves out and reports the nodes that gave no question;
            "fail" stops at the first.
        save_every: kept for compatibility and ignored: every answer is journalled.
        output_path: the dataset's JSON file. An earlier state of the same dataset is
            replaced; any other file is refused.
        verbose: show progress, where stderr is a terminal.
        workers: calls in flight at most. Raise it as far as the rate limit allows. A model
            in this process is called once at a time.
        seed: decides what is random in the prompts; another seed asks anew.
        max_retries: further calls after a rate limit, a server error, a timeout or a lost
            connection, with exponential back-off, respecting `Retry-After`.
        style: "instruct" asks for all questions of a node at once, "small" is for models
            that cannot follow that (examples, one question a call, a filter), "auto" takes
            "small" for a model in this process unless a prompt is given.

    Returns:
        The dataset. All nodes that have a text are in its corpus.

    Raises:
        ArgumentError: an argument cannot be used, or a node id stands twice.
        GenerationError: no question at all came of it, the server rejects every call (a
            wrong key, say), `output_path` holds something else, or a node failed and
            `on_failure` is "fail". The journal is kept.
    """
    settings = GenerationSettings(
        qa_generate_prompt_tmpl=qa_generate_prompt_tmpl,
        num_questions_per_chunk=num_questions_per_chunk,
        retry_limit=retry_limit,
        on_failure=on_failure,
        workers=workers,
        seed=seed,
        max_retries=max_retries,
        style=style,
    )
    result = runner.run(generate(nodes, llm, output_path, settings, verbose=verbose))
    _warn(result)
    return result.dataset


async def agenerate_qa_embedding_pairs(
    nodes: Sequence[BaseNode],
    llm: LLM,
    qa_generate_prompt_tmpl: Any = DEFAULT_QA_GENERATE_PROMPT_TMPL,
    num_questions_per_chunk: int = 2,
    retry_limit: int = 3,
    on_failure: Literal["continue", "fail"] = "continue",
    save_every: int = 500,
    output_path: str | Path = "qa_finetune_dataset.json",
    verbose: bool = True,
    *,
    workers: int = 8,
    seed: int = 0,
    max_retries: int = 8,
    style: StyleName = "auto",
) -> EmbeddingQAFinetuneDataset:
    """Do what `generate_qa_embedding_pairs` does, in the running event loop."""
    settings = GenerationSettings(
        qa_generate_prompt_tmpl=qa_generate_prompt_tmpl,
        num_questions_per_chunk=num_questions_per_chunk,
        retry_limit=retry_limit,
        on_failure=on_failure,
        workers=workers,
        seed=seed,
        max_retries=max_retries,
        style=style,
    )
    result = await generate(nodes, llm, output_path, settings, verbose=verbose)
    _warn(result)
    return result.dataset


async def generate(
    nodes: Sequence[BaseNode],
    llm: LLM,
    output_path: str | Path,
    settings: GenerationSettings,
    *,
    verbose: bool = True,
) -> GenerationResult:
    """Generate, and return the dataset together with what failed; warns of nothing.

    Raises:
        ArgumentError, GenerationError: see `generate_qa_embedding_pairs`.
    """
    check_llm(llm)
    nodes = list(nodes)
    texts, failed = _read_nodes(nodes)
    run = _Run(llm, settings, Path(output_path), failed)
    run.journal.check_output(texts.values())
    await run.ask_all(_by_text(texts), verbose=verbose)
    dataset = run.dataset(texts)
    run.journal.save(dataset)
    in_order = {node.node_id: failed[node.node_id] for node in nodes if node.node_id in failed}
    return GenerationResult(dataset, in_order, run.calls.made, run.calls.resumed)


class _Run:
    """One generation: asks about each text, and gathers questions and failures."""

    def __init__(
        self, llm: LLM, settings: GenerationSettings, output: Path, failed: dict[str, str]
    ) -> None:
        self.journal = AnswerJournal(output)
        self._settings = settings
        self._style = settings.style_for(llm)
        self.calls = JournalledCalls(
            llm,
            self.journal,
            [self._style.name, settings.seed],
            workers=settings.workers,
            max_retries=settings.max_retries,
            retry_limit=settings.retry_limit,
            on_failure=settings.on_failure,
        )
        self.calls.failed = failed
        self._questions: dict[str, list[str]] = {}

    async def ask_all(self, nodes_by_text: Mapping[str, list[str]], *, verbose: bool) -> None:
        await self.calls.for_each(
            nodes_by_text.items(),
            self._ask,
            title="generating questions",
            unit="text",
            verbose=verbose,
        )

    async def _ask(self, item: tuple[str, list[str]]) -> None:
        """Get the questions about one text, from the journal or from the LLM."""
        text, nodes = item
        count = self._settings.num_questions_per_chunk
        found: dict[str, str] = {}
        answer: str | None = ""
        for prompt in self._style.prompts(text, count):
            answer = await self.calls.answer(prompt, nodes, count)
            if answer is None:
                return
            for question in self._style.read(answer, text):
                found.setdefault(question_key(question), question)
            if len(found) >= count:
                break
        self._questions[text] = list(found.values())[:count]
        if not found:
            self.calls.report(
                nodes, f"the answer holds no usable question: {shorten(answer or '')}"
            )

    def dataset(self, texts: Mapping[str, str]) -> EmbeddingQAFinetuneDataset:
        """Make the dataset in the order of the nodes, whatever order the answers came in."""
        queries: dict[str, str] = {}
        relevant: dict[str, list[str]] = {}
        for node, text in texts.items():
            for question in self._questions.get(text, []):
                query = str(uuid.uuid5(_NAMESPACE, question_key(question)))
                queries.setdefault(query, question)
                relevant.setdefault(query, []).append(node)
        if not queries:
            raise GenerationError(
                f"no question came of {_nodes(len(texts))}: {_why(self.calls.failed)}"
            )
        return EmbeddingQAFinetuneDataset(
            queries=queries, corpus=dict(texts), relevant_docs=relevant
        )


def _read_nodes(nodes: Sequence[BaseNode]) -> tuple[dict[str, str], dict[str, str]]:
    """Return node id to text, and node id to reason for those that nothing can be asked about."""
    from llama_index.core.schema import MetadataMode

    texts: dict[str, str] = {}
    failed: dict[str, str] = {}
    for place, node in enumerate(nodes):
        if not hasattr(node, "node_id") or not hasattr(node, "get_content"):
            raise ArgumentError(
                f"nodes[{place}]", f"is a {type(node).__name__} and no LlamaIndex node"
            )
        if node.node_id in texts or node.node_id in failed:
            raise ArgumentError(
                f"nodes[{place}]", f"the node id {node.node_id!r} stands twice; make ids unique"
            )
        text = node.get_content(metadata_mode=MetadataMode.NONE)
        if not text.strip():
            failed[node.node_id] = "the node has no text"
        elif not _encodable(text):
            failed[node.node_id] = "the text holds half a surrogate pair and is not valid Unicode"
        else:
            texts[node.node_id] = text
    if not texts and not failed:
        raise ArgumentError("nodes", "is empty; there is nothing to ask about")
    if not texts:
        raise GenerationError(f"no node can be asked about: {_why(failed)}")
    return texts, failed


def _by_text(texts: Mapping[str, str]) -> dict[str, list[str]]:
    nodes_by_text: dict[str, list[str]] = {}
    for node, text in texts.items():
        nodes_by_text.setdefault(text, []).append(node)
    return nodes_by_text


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _why(failed: Mapping[str, str]) -> str:
    """Return the most frequent reasons, with how many nodes each concerns."""
    reasons = Counter(failed.values()).most_common(3)
    return "; ".join(f"{reason} ({_nodes(count)})" for reason, count in reasons)


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"


def _warn(result: GenerationResult) -> None:
    if not result.failures:
        return
    lines = [f"{node}: {reason}" for node, reason in result.failures.items()]
    total = len(result.dataset.corpus) + sum(
        node not in result.dataset.corpus for node in result.failures
    )
    warnings.warn(
        f"{len(lines)} of {_nodes(total)} gave no question:\n  " + "\n  ".join(lines),
        stacklevel=3,
    )
