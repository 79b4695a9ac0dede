"""What an LLM that judges is shown and answers: the same in training and in use.

A student that gives its reasoning gets LlamaIndex's own prompts, so that it can stand in for the
teacher everywhere. One that gives its verdict alone gets shorter ones: on a small model, reading
the prompt is what takes the time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from llama_index.core.evaluation.correctness import (
    DEFAULT_EVAL_TEMPLATE as CORRECTNESS_WITH_REASONING,
)
from llama_index.core.evaluation.pairwise import DEFAULT_EVAL_TEMPLATE as PAIRWISE_WITH_REASONING
from llama_index.core.llms import ChatMessage, MessageRole
from llama_index.core.prompts import BasePromptTemplate, ChatPromptTemplate

from ft_core.datasets import ChatDataset, ChatExample, JudgeDataset, JudgeExample
from ft_core.errors import ArgumentError, DatasetError

VERDICTS = {1.0: "[[A]]", 0.0: "[[B]]", 0.5: "[[C]]"}
"""How LlamaIndex's `PairwiseComparisonEvaluator` wants a verdict written."""

NO_REFERENCE = "(NO REFERENCE ANSWER SUPPLIED)"
"""What LlamaIndex's `CorrectnessEvaluator` shows where there is no reference."""

_SCORE = re.compile(r"(?<![\d.-])([1-5](?:\.\d+)?)(?![\d.]*\d)")


def _template(system: str, user: str) -> ChatPromptTemplate:
    return ChatPromptTemplate(
        message_templates=[
            ChatMessage(role=MessageRole.SYSTEM, content=system),
            ChatMessage(role=MessageRole.USER, content=user),
        ]
    )


PAIRWISE_VERDICT = _template(
    "Two answers to a question are compared. Write [[A]] if the first one is better, [[B]] if "
    "the second one is, and [[C]] if neither is.",
    "Question:\n{query}\n\nReference:\n{reference}\n\nFirst answer:\n{answer_1}\n\n"
    "Second answer:\n{answer_2}\n\nVerdict:",
)
CORRECTNESS_VERDICT = _template(
    "An answer to a question is graded from 1 (wrong or beside the point) to 5 (relevant and "
    "fully correct). Write the grade.",
    "Question:\n{query}\n\nReference answer:\n{reference_answer}\n\nAnswer:\n{generated_answer}"
    "\n\nGrade:",
)


def template_for(task: str, *, reasoning: bool) -> BasePromptTemplate:
    """Return the prompt of a task's judge.

    Raises:
        ArgumentError: an LLM cannot be trained for the task here.
    """
    templates: dict[tuple[str, bool], BasePromptTemplate] = {
        ("pairwise", False): PAIRWISE_VERDICT,
        ("pairwise", True): PAIRWISE_WITH_REASONING,
        ("correctness", False): CORRECTNESS_VERDICT,
        ("correctness", True): CORRECTNESS_WITH_REASONING,
    }
    if (task, reasoning) not in templates:
        raise ArgumentError("task", f"is pairwise or correctness, not {task!r}")
    return templates[task, reasoning]


def variables_of(example: JudgeExample) -> dict[str, str]:
    """Return the template's variables as LlamaIndex's evaluators fill them in."""
    if example.task == "pairwise":
        return {
            "query": example.query,
            "reference": example.reference or "",
            "answer_1": example.answer,
            "answer_2": example.second_answer or "",
        }
    return {
        "query": example.query,
        "reference_answer": example.reference or NO_REFERENCE,
        "generated_answer": example.answer,
    }


def chat_dataset(dataset: JudgeDataset, *, reasoning: bool) -> ChatDataset:
    """Return what an LLM is trained on: each judgement as a conversation.

    Args:
        dataset: of one task; every example has a label.
        reasoning: the teacher's words are learned too, in the order in which the evaluator's
            parser wants them. Examples without words are left out.

    Raises:
        DatasetError: with `reasoning`, no example has any words.
    """
    examples = list(_chats(dataset, reasoning))
    if not examples:
        raise DatasetError("no judgement comes with the teacher's words; pass reasoning=False")
    return ChatDataset(examples=examples)


def _chats(dataset: JudgeDataset, reasoning: bool) -> Iterator[ChatExample]:
    for example in dataset:
        if reasoning and not (example.reasoning or "").strip():
            continue
        template = template_for(example.task, reasoning=reasoning)
        messages: list[dict[str, Any]] = [
            {"role": message.role.value, "content": message.content or ""}
            for message in template.format_messages(**variables_of(example))
        ]
        answer = answer_for(example, reasoning=reasoning)
        yield ChatExample.model_validate(
            {"messages": [*messages, {"role": "assistant", "content": answer}]}
        )


def answer_for(example: JudgeExample, *, reasoning: bool) -> str:
    """Return what the student is to answer."""
    label = example.label
    assert label is not None
    words = (example.reasoning or "").strip() if reasoning else ""
    if example.task == "pairwise":
        verdict = VERDICTS[label]
        # No mark but the last: an answer that names two is no verdict.
        without = re.sub(r"\s*\[\[[ABC]\]\]", "", words).strip()
        return f"{without}\n\n{verdict}" if reasoning else verdict
    grade = str(float(label))  # in full: a rounded one would be another
    return f"{grade}\n{words}" if reasoning else grade


def parse_pairwise(answer: str) -> tuple[bool | None, float | None, str | None]:
    """Return (passing, score, feedback) of a verdict, all None where there is not exactly one.

    LlamaIndex's own parser takes the first letter that it looks for where an answer names
    several; such an answer is no verdict.
    """
    found = {score for score, mark in VERDICTS.items() if mark in answer}
    if len(found) != 1:
        return None, None, None
    score = found.pop()
    return {1.0: True, 0.0: False}.get(score), score, answer


def parse_correctness(answer: str) -> tuple[float | None, str | None]:
    """Return (score, reasoning) of a grade; LlamaIndex's own parser fails on a single line.

    The grade is the only number of the first line that is one from 1 to 5.
    """
    first, _, rest = answer.strip().partition("\n")
    numbers = re.findall(r"\d+(?:\.\d+)?", first)
    match = _SCORE.search(first)
    if match is None or len(numbers) != 1 or not 1 <= float(match[1]) <= 5:
        return None, answer
    return float(match[1]), rest.strip()
