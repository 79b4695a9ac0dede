"""What LlamaIndex's evaluators are given, what they answer, and what either means."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.evaluation import (
    BaseEvaluator,
    CorrectnessEvaluator,
    FaithfulnessEvaluator,
    GuidelineEvaluator,
    PairwiseComparisonEvaluator,
    RelevancyEvaluator,
)

from ft_core.datasets.judge import Task, refusal

EVALUATORS: Mapping[type[BaseEvaluator], Task] = {
    PairwiseComparisonEvaluator: "pairwise",
    CorrectnessEvaluator: "correctness",
    FaithfulnessEvaluator: "faithfulness",
    RelevancyEvaluator: "relevancy",
    GuidelineEvaluator: "guideline",
}

LLM_METHODS = (
    *("chat", "achat", "stream_chat", "astream_chat"),
    *("complete", "acomplete", "stream_complete", "astream_complete"),
)

_INPUTS = {  # argument of aevaluate to field of JudgeExample
    "query": "query",
    "response": "answer",
    "second_response": "second_answer",
    "reference": "reference",
    "contexts": "contexts",
}
_TAKES: Mapping[Task, tuple[str, ...]] = {
    "pairwise": ("query", "response", "second_response", "reference"),
    "correctness": ("query", "response", "reference"),
    "faithfulness": ("query", "response", "contexts"),
    "relevancy": ("query", "response", "contexts"),
    "guideline": ("query", "response"),
}


def task_of(evaluator: BaseEvaluator) -> Task | None:
    """Return what an evaluator judges, None for a class that is not one of the five."""
    for kind, task in EVALUATORS.items():
        if isinstance(evaluator, kind):
            return task
    return None


def inputs_of(evaluator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a call of `aevaluate` judges, as fields of a `JudgeExample`.

    Arguments that the evaluator does not look at are left out, as it leaves them out.
    """
    task = task_of(evaluator)
    assert task is not None
    named = _named(evaluator, args, kwargs)
    given = {name: named.get(name) for name in _TAKES[task]}
    content = {_INPUTS[name]: value for name, value in given.items() if value is not None}
    if "contexts" in content:
        content["contexts"] = list(content["contexts"])
    if task == "guideline":
        content["guideline"] = evaluator._guidelines
    return {"task": task, **content}


def _named(evaluator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of `aevaluate` by name, also those that it passes on."""
    signature = inspect.signature(type(evaluator).aevaluate)
    kinds = {parameter.kind: name for name, parameter in signature.parameters.items()}
    named = signature.bind(evaluator, *args, **kwargs).arguments
    if named.get(kinds.get(inspect.Parameter.VAR_POSITIONAL, "")):
        # Of a subclass that takes *args: they are in the order of LlamaIndex's own method.
        own = next(kind for kind in EVALUATORS if isinstance(evaluator, kind))
        named = inspect.signature(own.aevaluate).bind(evaluator, *args, **kwargs).arguments
    return {**kwargs, **named}


def label_of(task: Task, result: Any) -> tuple[float | None, str | None]:
    """Return the verdict or score in an `EvaluationResult`, or None and why there is none."""
    if getattr(result, "invalid_result", False):
        return None, result.invalid_reason or "invalid"
    score = result.score
    if score is None and task not in ("pairwise", "correctness") and result.passing is not None:
        score = float(result.passing)
    if score is None:
        return None, "the answer holds no verdict"
    if not isinstance(score, int | float) or not math.isfinite(score):
        return None, f"{score!r} is no number"
    reason = refusal(task, score)
    return (None, reason) if reason else (float(score), None)


def raised_label(evaluator: Any, error: Exception) -> float | None:
    """Return the score that an error stands for: a failure, where the evaluator raises on one."""
    asked_to = getattr(evaluator, "_raise_error", False) and isinstance(error, ValueError)
    return 0.0 if asked_to else None


def tokens_of(response: Any) -> tuple[int, int] | None:
    """Return the tokens (in, out) that an LLM's response tells, or None."""
    from llama_index.core.callbacks.token_counting import get_tokens_from_response

    try:
        into, out = get_tokens_from_response(response)
    except Exception:  # a raw response of a shape that it does not know
        into = out = 0
    told = getattr(response, "additional_kwargs", None) or {}
    if not into:
        into, out = told.get("prompt_tokens"), told.get("completion_tokens")
    return (into, out) if isinstance(into, int) and isinstance(out, int) and into else None


def model_of(evaluator: Any) -> str:
    """Return the name of the model behind an evaluator, or of its class where it tells none."""
    llm = getattr(evaluator, "_llm", None)
    metadata = getattr(llm, "metadata", None)
    for holder, name in ((llm, "model"), (llm, "model_name"), (metadata, "model_name")):
        value = getattr(holder, name, None)
        if isinstance(value, str) and value:
            return value
    return type(evaluator if llm is None else llm).__name__


def prompt_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[dict[str, str]] | str:
    """Return what an LLM was asked: a prompt, or messages with role and content."""
    asked = args[0] if args else kwargs.get("messages", kwargs.get("prompt", ""))
    if isinstance(asked, str):
        return asked
    return [
        {
            "role": str(getattr(message.role, "value", message.role)),
            "content": message.content or "",
        }
        for message in asked
    ]


def answer_of(response: Any) -> str:
    """Return the text of an LLM's response; "" where it has none."""
    message = getattr(response, "message", None)
    text = getattr(response, "text", None) if message is None else message.content
    return text if isinstance(text, str) else ""


def is_evaluator(target: Any) -> bool:
    """Say whether an object is one of the evaluators that are understood here."""
    return isinstance(target, tuple(EVALUATORS))


def is_llm(target: Any) -> bool:
    """Say whether an object is an LLM of LlamaIndex."""
    return isinstance(target, BaseLLM)
