"""What is trained is what LlamaIndex's evaluators send, token by token; and what is a verdict."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import model_assets
import pytest
from llama_index.core.llms import ChatMessage, ChatResponse

from ft_core.datasets import JudgeDataset, JudgeExample
from ft_core.errors import ArgumentError, DatasetError
from ft_core.sft import LocalLLM
from ft_core.sft.chat_format import ChatFormat
from ft_judge.prompts import (
    answer_for,
    chat_dataset,
    parse_correctness,
    parse_pairwise,
    template_for,
)
from ft_judge.recipe import JudgeRecord

PAIR = JudgeExample(
    task="pairwise",
    query="Which knot holds a {boat}?",
    answer="A bowline: \\boxed{1}, or {query}.",
    second_answer="Glue — “strong” glue.\n\nIt dries.",
    verdict=1.0,
    flipped_verdict=1.0,
    reasoning="The first names a knot. [[A]]",
    flipped_reasoning="Assistant B names a knot.",
)
GRADE = JudgeExample(
    task="correctness",
    query="Where do boats sleep?",
    answer="In a {harbour}.",
    score=4.5,
    reasoning="Right, if short.",
)
EXAMPLES = [
    PAIR,
    PAIR.flipped(),
    PAIR.model_copy(update={"reference": "A bowline."}),
    GRADE,
    GRADE.model_copy(update={"reference": "In the harbour, at a mooring."}),
    GRADE.model_copy(update={"score": 3.25}),
    GRADE.model_copy(update={"score": 3.96}),
    GRADE.model_copy(update={"score": 10 / 3}),
]


class Listening(LocalLLM):
    """A local model that keeps the prompt, as it went into the model."""

    def _chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        heard.append(self._chat_prompt(messages, kwargs)[0])
        return super()._chat(messages, **kwargs)


heard: list[str] = []


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> LocalLLM:
    texts = [m["content"] for e in EXAMPLES for m in _chat(e, True) + _chat(e, False)]
    base = model_assets.tiny_causal_lm(tmp_path_factory.mktemp("base"), texts * 2, window=1024)
    model: LocalLLM = Listening.from_pretrained(base, device="cpu", max_new_tokens=1)
    return model


def _chat(example: JudgeExample, reasoning: bool) -> list[dict[str, Any]]:
    (chat,) = chat_dataset(JudgeDataset(examples=[example]), reasoning=reasoning).examples
    return chat.messages


@pytest.mark.parametrize("reasoning", [False, True])
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_evaluator_sends_what_was_trained_token_by_token(
    llm: LocalLLM, number: int, reasoning: bool
) -> None:
    example = EXAMPLES[number]
    record = JudgeRecord.of(example.task, reasoning=reasoning)
    saved = JudgeRecord.model_validate_json(record.model_dump_json())
    options = {"enforce_consensus": False} if example.task == "pairwise" else {}
    evaluator = saved.evaluator(llm, **options)
    given = {"query": example.query, "response": example.answer, "reference": example.reference}
    if example.second_answer is not None:
        given["second_response"] = example.second_answer
    heard.clear()
    asyncio.run(evaluator.aevaluate(**given))

    chats = ChatFormat(llm._tokenizer)
    (trained,) = chats.tokens(_chat(example, reasoning))
    begins = trained.is_answer.index(True)
    assert trained.input_ids[:begins] == chats.encode(heard[0])
    answer = llm._tokenizer.decode(trained.input_ids[begins:])
    assert answer.removesuffix("<|im_end|>") == answer_for(example, reasoning=reasoning)
    assert len(heard) == 1


@pytest.mark.parametrize("reasoning", [False, True])
@pytest.mark.parametrize("example", EXAMPLES)
def test_what_is_learned_is_read_back_as_the_label(example: JudgeExample, reasoning: bool) -> None:
    answer = answer_for(example, reasoning=reasoning)
    if example.task == "pairwise":
        assert parse_pairwise(answer)[1] == example.label
    else:
        assert parse_correctness(answer)[0] == example.label


def test_a_teacher_that_names_both_marks_is_learned_with_its_verdict_alone() -> None:
    words = "[[B]] would be wrong; it is [[A]]."
    answer = answer_for(PAIR.model_copy(update={"reasoning": words}), reasoning=True)
    assert parse_pairwise(answer) == (True, 1.0, answer)
    assert answer.endswith("\n\n[[A]]")
    assert "would be wrong; it is" in answer


@pytest.mark.parametrize(
    ("answer", "passing", "score"),
    [
        ("[[A]]", True, 1.0),
        ("It is worse.\n\n[[B]]", False, 0.0),
        ("[[C]] they say the same", None, 0.5),
        ("[[A]], yes, [[A]]", True, 1.0),
    ],
)
def test_a_verdict(answer: str, passing: bool | None, score: float) -> None:
    assert parse_pairwise(answer) == (passing, score, answer)


@pytest.mark.parametrize(
    "answer", ["", "A", "[A]", "[[D]]", "[[A]] or [[B]]", "[[B]] [[C]]", "[[a]]"]
)
def test_no_verdict(answer: str) -> None:
    assert parse_pairwise(answer) == (None, None, None)


@pytest.mark.parametrize(
    ("answer", "score", "words"),
    [
        ("4", 4.0, ""),
        ("4.5", 4.5, ""),
        (" 4.0\nRight, of 10 words. ", 4.0, "Right, of 10 words."),
        ("Score: 3", 3.0, ""),
        ("**5**", 5.0, ""),
        ("2.\n\nNo.", 2.0, "No."),
    ],
)
def test_a_grade(answer: str, score: float, words: str) -> None:
    assert parse_correctness(answer) == (score, words)


@pytest.mark.parametrize(
    "answer",
    ["", "10", "0", "0.5", "5.5", "6", "-3", "4.5/5", "3 or 4", "good", "45", "1.2.3", "\n \nfine"],
)
def test_no_grade(answer: str) -> None:
    assert parse_correctness(answer) == (None, answer)


def test_other_tasks_have_no_prompt() -> None:
    with pytest.raises(ArgumentError, match="pairwise or correctness, not 'relevancy'"):
        template_for("relevancy", reasoning=False)


def test_reasoning_without_words() -> None:
    mute = PAIR.model_copy(update={"reasoning": " "})
    with pytest.raises(DatasetError, match="reasoning=False"):
        chat_dataset(JudgeDataset(examples=[mute]), reasoning=True)
    chats = chat_dataset(JudgeDataset(examples=[mute, mute.flipped()]), reasoning=True)
    assert len(chats.examples) == 1


def test_the_record_keeps_the_prompt_whatever_a_release_says(tmp_path: Path) -> None:
    record = JudgeRecord.of("pairwise", reasoning=False)
    changed = record.model_copy(
        update={"messages": [{"role": "user", "content": "{query}|{answer_1}|{answer_2}"}]}
    )
    (message,) = changed.template.format_messages(
        query="q", answer_1="{a}", answer_2="b", reference=""
    )
    assert message.content == "q|{a}|b"
