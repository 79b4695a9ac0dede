"""Ask base, student and teacher the same questions, and compare answers, time and cost.

report = evaluate_distillation(questions, base=small_llm, student=tuned_llm, teacher=large_llm)
rich.print(report)
report.save_html("report.html")
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ft_core import files
from ft_core.datasets.chat import ChatDataset, ChatExample
from ft_core.embedding import embed_corpus
from ft_core.errors import ArgumentError, DatasetError
from ft_core.evaluation import AnswerEvaluation, in_order
from ft_core.generation.failures import describe
from ft_core.metrics.text import rouge_l
from ft_core.progress import progress
from ft_core.report import AnswerReport
from ft_openai_distill.answering import Answer, Candidate, Question, Tokenizer, answer_text
from ft_openai_distill.schema_check import Check, check_for

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from pydantic import BaseModel

TEACHER = "teacher"
"""The teacher's name in the report."""


def evaluate_distillation(
    questions: Sequence[str] | ChatDataset | Path | str,
    *,
    base: Any = None,
    student: Any = None,
    teacher: Any = None,
    references: Sequence[str | None] | None = None,
    embed_model: BaseEmbedding | None = None,
    output_cls: type[BaseModel] | None = None,
    prices: Mapping[str, tuple[float, float]] | None = None,
    tokenizer: Tokenizer | None = None,
    num_workers: int = 4,
    show_progress: bool = True,
    seed: int = 0,
) -> AnswerReport:
    """Return how well base and student answer as the teacher does, and what it takes.

    Metrics, as far as the arguments allow: `rouge_l` and `similarity` (cosine) with the
    teacher's answer; `schema_valid`, the share of structured answers that are valid;
    `input_tokens` and `output_tokens`; `latency` in seconds; `cost`, per answer. A call that
    fails is named in the report, is a wrong answer to every metric of quality, and counts in
    none of time, tokens and cost; `answered` shows how many calls came back where some did not.

    The tests compare each other run with the baseline: the base, or without one the first
    student. The teacher is shown, not tested.

    Args:
        questions: texts; or a `ChatDataset` or the path of its file: then all but the last
            message is sent, with the example's tools and response format, and the last one is
            the teacher's answer where no `teacher` is given.
        base: an LLM or a query engine of LlamaIndex, or name to several of them.
        student: likewise.
        teacher: likewise one.
        references: the teacher's answers, one a question, where there are already; None
            where one is missing.
        embed_model: measures the similarity.
        output_cls: a pydantic class; LLMs answer by a program (`structured_predict`).
        prices: a run's name (`"student"`, `"teacher"`, ...) to the prices of a million tokens
            in and out, in any currency, the same for all.
        tokenizer: counts tokens where a model does not tell; LlamaIndex's by default. Such
            answers are marked as estimated.
        num_workers: how many answers are asked for at the same time. For the latency of a
            model on this machine take 1: its calls wait for each other.
        show_progress: show bars on stderr where that is a terminal.
        seed: of the intervals and the tests.

    Raises:
        ArgumentError: an argument that cannot be used, or the embedding model fails.
        DatasetError: the file is bad, or a schema in it.
    """
    targets = _targets(base, student, teacher)
    if num_workers < 1:
        raise ArgumentError("num_workers", f"must be at least 1, not {num_workers}")
    if seed < 0:
        raise ArgumentError("seed", f"must be 0 or more, not {seed}")
    priced = _checked_prices(prices or {}, targets)
    items = _items(questions, references, output_cls)
    candidates = {
        name: Candidate(name, target, output_cls, tokenizer) for name, target in targets.items()
    }
    _try(embed_model)
    answers: dict[str, list[Answer]] = {}
    seconds: dict[str, float] = {}
    for name, candidate in candidates.items():
        start = time.perf_counter()
        with candidate.watched():
            replies = in_order(candidate.ask, [item.question for item in items], num_workers)
            answers[name] = list(progress(replies, name, len(items), show_progress))
        seconds[name] = time.perf_counter() - start
    # The recorded answers of a dataset stand in for a teacher, and give way to one.
    if teacher is not None and references is None:
        items = [
            replace(item, reference=None if answer.error else answer.text)
            for item, answer in zip(items, answers[TEACHER], strict=True)
        ]
    failed = any(answer.error for replies in answers.values() for answer in replies)
    scorer = _Scorer(items, output_cls is not None, failed, priced, embed_model, show_progress)
    return AnswerReport(
        [scorer.evaluation(name, answers[name], seconds[name]) for name in candidates],
        {item.key: item.question.text for item in items},
        {item.key: item.reference for item in items if item.reference},
        title="Distillation: answers, time and cost",
        primary="schema_valid" if output_cls is not None else None,
        uncompared=[] if teacher is None else [TEACHER],
        seed=seed,
    )


@dataclass(frozen=True)
class _Item:
    """One question with what its answers are held against."""

    key: str
    question: Question
    reference: str | None
    """The teacher's answer; None or empty: agreement is not measured."""
    check: Check | None = None
    """Of a structured answer."""


class _Scorer:
    """Turns the answers of a candidate into an `AnswerEvaluation`."""

    def __init__(
        self,
        items: Sequence[_Item],
        objects: bool,
        failed: bool,
        prices: Mapping[str, tuple[float, float]],
        embed_model: BaseEmbedding | None,
        show_progress: bool,
    ) -> None:
        self._items = items
        self._objects = objects
        self._failed = failed
        self._prices = prices
        self._embed_model = embed_model
        self._show_progress = show_progress
        self._references = {item.key: item.reference for item in items if item.reference}
        self._hash = files.content_hash(
            [[item.question.messages, item.question.settings] for item in items]
        )

    def evaluation(self, name: str, replies: Sequence[Answer], seconds: float) -> AnswerEvaluation:
        answers = {item.key: reply for item, reply in zip(self._items, replies, strict=True)}
        problems = self._problems(answers)
        scores = {"schema_valid": self._validity(answers, problems)}
        if name != TEACHER:  # with itself it always agrees
            scores |= self._agreement(answers)
        if self._failed or not any(scores.values()):
            scores["answered"] = {key: float(a.error is None) for key, a in answers.items()}
        scores |= _effort(answers, self._prices.get(name))
        return AnswerEvaluation(
            name=name,
            dataset_hash=self._hash,
            scores={metric: values for metric, values in scores.items() if values},
            seconds=seconds,
            answers={key: answer.text for key, answer in answers.items()},
            failures={key: answer.error for key, answer in answers.items() if answer.error},
            invalid={key: problem for key, problem in problems.items() if problem},
            estimated=[key for key, a in answers.items() if a.tokens and a.estimated],
        )

    def _problems(self, answers: Mapping[str, Answer]) -> dict[str, str | None]:
        """Return what is wrong with each structured answer that came (None: nothing)."""
        if self._objects:
            return {key: a.problem for key, a in answers.items() if a.error is None}
        return {
            item.key: item.check(answers[item.key].message)
            for item in self._items
            if item.check is not None and answers[item.key].error is None
        }

    def _validity(
        self, answers: Mapping[str, Answer], problems: Mapping[str, str | None]
    ) -> dict[str, float]:
        checked = [item.key for item in self._items if self._objects or item.check is not None]
        return {key: float(answers[key].error is None and problems[key] is None) for key in checked}

    def _agreement(self, answers: Mapping[str, Answer]) -> dict[str, dict[str, float]]:
        if not self._references:
            return {}
        texts = {key: answers[key].text for key in self._references}
        scores = {
            "rouge_l": {key: rouge_l(text, self._references[key]) for key, text in texts.items()}
        }
        if self._embed_model is not None:
            scores["similarity"] = self._similarity(texts)
        return scores

    def _similarity(self, texts: Mapping[str, str]) -> dict[str, float]:
        """Return the cosine of each text with its reference; 0 where there is no text."""
        given = {key: text for key, text in texts.items() if text.strip()}
        vectors = dict(zip(given, self._embedded(given), strict=True)) if given else {}
        similarity = dict.fromkeys(texts, 0.0)
        for key, vector in vectors.items():
            similarity[key] = float(vector @ self._reference_vectors[key])
        return similarity

    @cached_property
    def _reference_vectors(self) -> dict[str, NDArray[np.float64]]:
        return dict(zip(self._references, self._embedded(self._references), strict=True))

    def _embedded(self, texts: Mapping[str, str]) -> NDArray[np.float64]:
        """Return unit vectors, shape (texts, d)."""
        assert self._embed_model is not None
        try:
            rows = embed_corpus(self._embed_model, texts, self._show_progress).astype(np.float64)
        except Exception as error:
            raise ArgumentError("embed_model", f"failed: {describe(error)}") from error
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        return np.asarray(rows / np.maximum(lengths, 1e-12))


def _effort(
    answers: Mapping[str, Answer], price: tuple[float, float] | None
) -> dict[str, dict[str, float]]:
    """Return time, tokens and cost of the answers that came."""
    came = {key: answer for key, answer in answers.items() if answer.error is None}
    tokens = {key: answer.tokens for key, answer in came.items() if answer.tokens}
    scores = {
        "latency": {key: answer.seconds for key, answer in came.items()},
        "input_tokens": {key: float(count) for key, (count, _) in tokens.items()},
        "output_tokens": {key: float(count) for key, (_, count) in tokens.items()},
    }
    if price is not None:
        scores["cost"] = {
            key: (into * price[0] + out * price[1]) / 1e6 for key, (into, out) in tokens.items()
        }
    return scores


def _items(
    questions: Any,
    references: Sequence[str | None] | None,
    output_cls: type[BaseModel] | None,
) -> list[_Item]:
    if isinstance(questions, str | Path | ChatDataset):
        examples = ChatDataset.coerce(questions).examples
        items = [
            _example_item(str(number), example, output_cls)
            for number, example in enumerate(examples, 1)
        ]
    else:
        items = []
        for number, text in enumerate(questions, 1):
            if not isinstance(text, str) or not text.strip():
                raise ArgumentError("questions", f"number {number} is no text: {text!r}")
            messages = [{"role": "user", "content": text}]
            items.append(_Item(str(number), Question(text, messages), None))
    if not items:
        raise ArgumentError("questions", "is empty; give at least one")
    if references is None:
        return items
    if isinstance(references, str) or len(references) != len(items):
        raise ArgumentError(
            "references", f"has {len(references)} for {len(items)} questions; give one each"
        )
    return [replace(item, reference=text) for item, text in zip(items, references, strict=True)]


def _example_item(key: str, example: ChatExample, output_cls: type[BaseModel] | None) -> _Item:
    *asked, answer = example.messages
    if not asked:
        raise ArgumentError("questions", f"example {key} asks nothing: it is an answer alone")
    settings: dict[str, Any] = {}
    check = None
    if output_cls is None:  # a program brings its own
        functions = [{"type": "function", "function": f} for f in example.functions or ()]
        if tools := [*(example.tools or ()), *functions]:
            settings["tools"] = tools
        if example.parallel_tool_calls is not None and tools:
            settings["parallel_tool_calls"] = example.parallel_tool_calls
        if example.response_format:
            settings["response_format"] = example.response_format
        check = _check(key, example)
    # As the app asked: weights are for training.
    messages = [{k: v for k, v in message.items() if k != "weight"} for message in asked]
    return _Item(key, Question(example.asked(), messages, settings), answer_text(answer), check)


def _check(key: str, example: ChatExample) -> Check | None:
    try:
        return check_for(example)
    except DatasetError as error:
        place = f"example {key}, {error.place}"
        raise DatasetError(error.reason, place=place) from None


def _targets(base: Any, student: Any, teacher: Any) -> dict[str, Any]:
    """Return name to LLM or query engine, the baseline first and the teacher last."""
    named = [*_named("base", base), *_named("student", student)]
    if not named:
        raise ArgumentError("student", "is missing; give a base, a student or both")
    if teacher is not None:
        named.append((TEACHER, teacher))
    targets = dict(named)
    if len(targets) < len(named):
        raise ArgumentError("student", f"has a name twice: {[name for name, _ in named]}")
    return targets


def _named(role: str, target: Any) -> list[tuple[str, Any]]:
    if target is None:
        return []
    return list(target.items()) if isinstance(target, Mapping) else [(role, target)]


def _checked_prices(
    prices: Mapping[str, tuple[float, float]], names: Mapping[str, Any]
) -> dict[str, tuple[float, float]]:
    checked = {}
    for name, price in prices.items():
        if name not in names:
            raise ArgumentError("prices", f"{name!r} is not evaluated; there is {list(names)}")
        try:
            into, out = map(float, price)
        except (TypeError, ValueError):
            into = out = math.nan
        if not (0 <= into < math.inf and 0 <= out < math.inf):
            raise ArgumentError(
                "prices",
                f"{name!r} needs two numbers, of a million tokens in and out, not {price!r}",
            )
        checked[name] = (into, out)
    return checked


def _try(embed_model: BaseEmbedding | None) -> None:
    """Let an embedding model that cannot work fail before any answer is paid for."""
    if embed_model is None:
        return
    if not hasattr(embed_model, "get_text_embedding_batch"):
        name = type(embed_model).__name__
        raise ArgumentError("embed_model", f"{name} is not a LlamaIndex embedding")
    try:
        embed_model.get_text_embedding("answer")
    except Exception as error:
        raise ArgumentError("embed_model", f"failed: {describe(error)}") from error
