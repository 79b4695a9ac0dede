"""From a teacher's verdicts to what a student learns: the recipe of LlamaIndex's guide.

Only pairs that were judged alike in both orders are kept, and both orders are learned. What a
saved judge has to remember of it, `JudgeRecord`, stands in its `ft.json`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ft_core.artifacts import Manifest
from ft_core.datasets import ChatDataset, JudgeDataset
from ft_core.datasets.duplicates import fold
from ft_core.errors import ArgumentError, ArtifactError, DatasetError
from ft_judge.prompts import (
    VERDICTS,
    answer_for,
    chat_dataset,
    parse_correctness,
    parse_pairwise,
    template_for,
)

if TYPE_CHECKING:
    from llama_index.core.evaluation import BaseEvaluator
    from llama_index.core.prompts import ChatPromptTemplate

logger = logging.getLogger(__name__)

RecordT = TypeVar("RecordT", bound=BaseModel)

RECORD = "judge"
"""Where, among the settings in `ft.json`, a `JudgeRecord` stands."""

Verdicts = Path | str | JudgeDataset

LLMTask = Literal["pairwise", "correctness"]

GRADES = tuple(f"{half / 2:.1f}" for half in range(2, 11))
"""What a judge of correctness may answer where no training says otherwise: 1.0, 1.5 to 5.0."""


class JudgeRecord(BaseModel):
    """What a trained LLM judges, and how it is asked: enough to make its evaluator."""

    model_config = ConfigDict(extra="forbid")

    task: LLMTask
    reasoning: bool
    """Whether it gives its reasoning besides the verdict."""
    messages: list[dict[str, str]]
    """The prompt's template as it was trained, each message with role and content: it stays the
    same when a later release, or LlamaIndex, words it otherwise."""
    answers: list[str]
    """What a judge that gives its verdict alone may answer; empty with reasoning."""
    dropped: dict[str, int] = {}
    """Why judgements were not learned from, with the number of them."""

    @classmethod
    def of(cls, task: str, *, reasoning: bool, data: JudgeDataset | None = None) -> JudgeRecord:
        """Return the record of a judge that is trained on `data`, or on nothing yet.

        Raises:
            ArgumentError: an LLM cannot be trained for the task here.
        """
        template = template_for(task, reasoning=reasoning)
        messages = [
            {"role": message.role.value, "content": message.content or ""}
            for message in template.message_templates
        ]
        answers = [] if reasoning else _answers(task, data)
        return cls.model_validate(
            {"task": task, "reasoning": reasoning, "messages": messages, "answers": answers}
        )

    @property
    def template(self) -> ChatPromptTemplate:
        """The prompt for LlamaIndex's evaluators."""
        from llama_index.core.llms import ChatMessage
        from llama_index.core.prompts import ChatPromptTemplate

        return ChatPromptTemplate(
            message_templates=[
                ChatMessage(role=message["role"], content=message["content"])
                for message in self.messages
            ]
        )

    def evaluator(self, llm: Any, **options: Any) -> BaseEvaluator:
        """Return LlamaIndex's evaluator with a trained LLM, its prompt, and a strict parser.

        Args:
            llm: an LLM of LlamaIndex.
            options: of the evaluator: `enforce_consensus` for pairs, `score_threshold` for
                correctness.
        """
        from llama_index.core.evaluation import CorrectnessEvaluator, PairwiseComparisonEvaluator

        pairs = self.task == "pairwise"
        kind = PairwiseComparisonEvaluator if pairs else CorrectnessEvaluator
        return kind(
            llm=llm,
            eval_template=self.template,
            parser_function=parse_pairwise if pairs else parse_correctness,
            **options,
        )


def record_in(manifest: Manifest, folder: Path | str) -> JudgeRecord:
    """Return the record of an LLM in a saved folder's `ft.json`.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    return saved_record(manifest, folder, JudgeRecord)


def saved_record(manifest: Manifest, folder: Path | str, kind: type[RecordT]) -> RecordT:
    """Return the record in a saved folder's `ft.json` as the class that it was made of.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    found = manifest.settings.get(RECORD)
    if not isinstance(found, Mapping):
        raise ArtifactError(
            f"{folder}: holds a {manifest.kind} that was not trained to judge here; train a judge, "
            "or check the path"
        )
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, (RECORD, *first["loc"])))
        raise ArtifactError(
            f"{folder}: {place} in ft.json: {first['msg']}; the folder is damaged, or from a newer "
            "release"
        ) from None


@dataclass(frozen=True)
class Lessons:
    """What an LLM learns to judge from."""

    train: ChatDataset
    validation: ChatDataset | None
    record: JudgeRecord


@dataclass(frozen=True)
class Recipe:
    """What is to be learned; nothing is read before it is asked for."""

    task: LLMTask
    reasoning: bool
    verdicts: Verdicts | None
    """A file or a dataset; None for a judge that is trained already."""
    val_data: Verdicts | None = None

    def examples(self) -> tuple[JudgeDataset, JudgeDataset | None, dict[str, int]]:
        """Return (judgements to learn from, to validate on, number dropped by reason).

        Each pair stands there once, with the same verdict in both orders.

        Raises:
            ArgumentError: there are no verdicts, as of an engine that was loaded.
            DatasetError: a file is bad, or nothing in it can teach.
        """
        if self.verdicts is None:
            raise ArgumentError("verdicts", "are not there: a loaded engine cannot train again")
        train, dropped = _consistent(self.verdicts, self.task)
        if self.val_data is None:
            return train, None, dropped
        validation, _ = _consistent(self.val_data, self.task)
        _warn_of_overlap(train, validation)
        return train, validation, dropped

    def lessons(self) -> Lessons:
        """Return the conversations that an LLM learns: each pair in both orders.

        Raises:
            ArgumentError, DatasetError: as `examples`; or no judgement has the words that
                `reasoning` needs.
        """
        train, validation, dropped = self.examples()
        chats, wordless = self._chats(train, self.verdicts)
        if wordless:
            dropped = {**dropped, "one order without the teacher's words": wordless}
        held_out = None if validation is None else self._chats(validation, self.val_data)[0]
        record = JudgeRecord.of(self.task, reasoning=self.reasoning, data=train.both_orders())
        return Lessons(chats, held_out, record.model_copy(update={"dropped": dropped}))

    def _chats(self, data: JudgeDataset, source: Any) -> tuple[ChatDataset, int]:
        """Return the conversations, and how many judgements have no words to learn."""
        data = data.both_orders()
        try:
            chats = chat_dataset(data, reasoning=self.reasoning)
        except DatasetError as error:
            raise _at(error, source) from None
        wordless = len(data.examples) - len(chats.examples)
        if wordless:
            logger.warning(
                "%d of %d judgements come without the teacher's words and are left out; "
                "reasoning=False learns from all",
                wordless,
                len(data.examples),
            )
        return chats, wordless


def _consistent(data: Verdicts, task: LLMTask) -> tuple[JudgeDataset, dict[str, int]]:
    try:
        kept, dropped = JudgeDataset.coerce(data).of_task(task).consistency()
    except DatasetError as error:
        raise _at(error, data) from None
    return kept, dropped


def _warn_of_overlap(train: JudgeDataset, validation: JudgeDataset) -> None:
    learned, held_out = ({fold(each.asked()) for each in data} for data in (train, validation))
    if shared := len(learned & held_out):
        logger.warning(
            "%d of %d questions in val_data are in the training data too: what it says will be "
            "too good",
            shared,
            len(held_out),
        )


def _at(error: DatasetError, data: Any) -> DatasetError:
    named = error.source is not None or not isinstance(data, str | Path)
    return error if named else error.at(data)


def _answers(task: str, data: JudgeDataset | None) -> list[str]:
    """Return what may be answered: what the teacher did, and of pairs either order's verdict."""
    said = [answer_for(example, reasoning=False) for example in data or ()]
    if task == "pairwise":
        always = [VERDICTS[1.0], VERDICTS[0.0]]
        return [mark for mark in VERDICTS.values() if mark in always or not data or mark in said]
    return sorted(set(said), key=float) or list(GRADES)
