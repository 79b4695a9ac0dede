"""Ask a judge for a verdict, and keep what it took: time, tokens, errors."""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from llama_index.core.evaluation import (
    BaseEvaluator,
    GuidelineEvaluator,
    PairwiseComparisonEvaluator,
)

from ft_core.datasets import JudgeExample
from ft_core.datasets.judge import refusal
from ft_core.errors import ArgumentError
from ft_core.generation.failures import describe
from ft_core.hooks import Call, Hook
from ft_judge.evaluators import (
    LLM_METHODS,
    answer_of,
    label_of,
    model_of,
    raised_label,
    task_of,
    tokens_of,
)


@dataclass(frozen=True)
class Judgement:
    """What a judge says of one example, as it was shown."""

    verdict: float | None
    """The verdict or score on the task's scale; None: no verdict."""
    probability: float | None = None
    """Where the judge gives one: of the verdict 1, so that the first answer is better, or that
    the answer passes. Of correctness, that the score is right."""
    feedback: str = ""
    """Its words."""
    tie: float = 0.0
    """Of a pair, how probable a tie is; half of it is in `probability`."""


JudgeFunction = Callable[[JudgeExample], Judgement | float | None]
"""A judge of your own: takes an example without verdicts, returns one for it as it stands."""


@dataclass(frozen=True)
class Answer:
    """A judgement, and what it took."""

    verdict: float | None
    probability: float | None = None
    feedback: str = ""
    seconds: float = 0.0
    tokens: tuple[int, int] | None = None
    """Into and out of every LLM that was asked; None where none told."""
    error: str | None = None
    """Why the judge could not be asked; its verdict is None then."""
    tie: float = 0.0

    def flipped(self) -> Answer:
        """Return a verdict on a pair, expressed for the answers in the other order."""
        turn = (None if v is None else 1 - v for v in (self.verdict, self.probability))
        verdict, probability = turn
        return replace(self, verdict=verdict, probability=probability)


class Judge:
    """An evaluator of LlamaIndex or a function, under a name.

    A `PairwiseComparisonEvaluator` is asked without its `enforce_consensus`: whoever evaluates
    it asks in both orders.

    Args:
        name: for errors and reports.
        target: the evaluator or function.
        loop: where evaluators run; one loop for all calls, as their clients expect.

    Raises:
        ArgumentError: the target is neither; a class or an async function is none, either.
    """

    def __init__(self, name: str, target: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.name = name
        self._loop = loop
        self._watch = _Watch()
        self._is_evaluator = isinstance(target, BaseEvaluator)
        if isinstance(target, type):
            raise ArgumentError(name, f"is the class {target.__name__}; pass an object of it")
        if not self._is_evaluator and _is_async(target):
            raise ArgumentError(name, "is an async function; pass one that returns its verdict")
        if not self._is_evaluator and not callable(target):
            raise ArgumentError(
                name, f"{type(target).__name__} is neither a LlamaIndex evaluator nor a function"
            )
        if isinstance(target, PairwiseComparisonEvaluator):
            target = copy.copy(target)
            target._enforce_consensus = False
        self._target = target

    def check_task(self, task: str) -> None:
        """Refuse an evaluator that judges something else.

        Raises:
            ArgumentError: it is one of LlamaIndex's, of another task.
        """
        own = task_of(self._target)
        if own is not None and own != task:
            raise ArgumentError(
                self.name, f"{type(self._target).__name__} judges {own}, the dataset is {task}"
            )

    @property
    def identity(self) -> list[str]:
        """What tells this judge from another in a journal."""
        kind = getattr(self._target, "__name__", type(self._target).__name__)
        model = model_of(self._target) if self._is_evaluator else ""
        return [self.name, kind, model]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """See the LLM calls inside the evaluator, for their tokens, while the block runs."""
        attachment: AbstractContextManager[Any]
        try:
            attachment = self._watch.attach(self._target)
        except ArgumentError:  # there is no LLM inside
            attachment = nullcontext()
        with attachment:
            yield

    def ask(self, example: JudgeExample) -> Answer:
        """Return the judgement of an example, or the error of a call that failed.

        What cannot be read is no verdict; nothing is raised.
        """
        calls: list[tuple[str, tuple[int, int] | None]] = []
        start = time.perf_counter()
        error = None
        try:
            said = self._said(example, calls)
        except Exception as raised:
            if not calls:
                error = describe(raised)
                said = Judgement(None)
            else:  # the model did answer; what it said could not be read
                said = Judgement(raised_label(self._target, raised), feedback=calls[-1][0])
        seconds = time.perf_counter() - start
        told = [tokens for _, tokens in calls if tokens is not None]
        tokens = (sum(t[0] for t in told), sum(t[1] for t in told)) if told else None
        return Answer(
            said.verdict, said.probability, said.feedback, seconds, tokens, error, said.tie
        )

    def _said(self, example: JudgeExample, calls: list[Any]) -> Judgement:
        if self._is_evaluator:
            asked = asyncio.run_coroutine_threadsafe(self._evaluated(example, calls), self._loop)
            result = asked.result()
        else:
            result = self._target(example)
        return _judgement(example, result)

    async def _evaluated(self, example: JudgeExample, calls: list[Any]) -> Any:
        _calls.set(calls)  # of this task alone
        evaluator = self._target
        if isinstance(evaluator, GuidelineEvaluator):
            evaluator = copy.copy(evaluator)
            evaluator._guidelines = example.guideline
        given = {
            "query": example.query or None,
            "response": example.answer,
            "contexts": example.contexts,
            "second_response": example.second_answer,
            "reference": example.reference,
        }
        return await evaluator.aevaluate(**{k: v for k, v in given.items() if v is not None})


def _is_async(target: Any) -> bool:
    called = getattr(target, "__call__", None)  # noqa: B004  # of an object that is called
    return inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(called)


def _judgement(example: JudgeExample, result: Any) -> Judgement:
    if hasattr(result, "invalid_result"):  # an EvaluationResult
        verdict, _ = label_of(example.task, result)
        probability = getattr(result, "probability", None)
        tie = getattr(result, "tie", 0.0)
        return _on_scale(example, Judgement(verdict, probability, result.feedback or "", tie))
    if isinstance(result, Judgement):
        return _on_scale(example, result)
    return _on_scale(example, Judgement(None if result is None else float(result)))


def _on_scale(example: JudgeExample, said: Judgement) -> Judgement:
    """Take what is off the scale as no verdict, and a probability that is none as none."""
    verdict, probability = said.verdict, said.probability
    if verdict is not None and (not math.isfinite(verdict) or refusal(example.task, verdict)):
        verdict = None
    for value in (probability, said.tie):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"gave the probability {value}")
    return Judgement(
        None if verdict is None else float(verdict),
        None if probability is None else float(probability),
        said.feedback,
        float(said.tie),
    )


def most_probable(first: float, second: float, tie: float) -> float:
    """Return the verdict on a pair that is the most probable: 1, 0 or 0.5, a tie."""
    if tie > max(first, second) or first == second:
        return 0.5
    return float(first > second)


_calls: ContextVar[list[Any] | None] = ContextVar("ft_judge_calls", default=None)
"""Answer and tokens of each LLM call on the way to the judgement that this task works on."""


class _Watch(Hook):
    """Notes every LLM call under the judgement that it belongs to."""

    methods: ClassVar[tuple[str, ...]] = LLM_METHODS

    def components(self) -> tuple[type, ...]:
        from llama_index.core.base.llms.base import BaseLLM

        return (BaseLLM,)

    def observe(self, call: Call) -> None:
        calls = _calls.get()
        if calls is None:
            return
        if call.error is not None:
            calls.clear()  # what failed is the call, not the reading of an answer
        else:
            calls.append((answer_of(call.result), tokens_of(call.result)))


@contextmanager
def event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Run an event loop in a thread of its own: the caller's may run one already."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=_run, args=(loop,), name="judges", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(_stop, loop)
        thread.join()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


def _stop(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.call_soon(loop.stop)
