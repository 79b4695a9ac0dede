"""A language model that you own, trained on this machine to judge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from ft_core.artifacts import Manifest, read_manifest
from ft_core.datasets import ChatDataset
from ft_core.errors import ArgumentError, ArtifactError
from ft_core.sft.engine import LocalFinetuneEngine
from ft_core.sft.models import KIND
from ft_judge.recipe import RECORD, JudgeRecord, Recipe, record_in

if TYPE_CHECKING:
    from llama_index.core.evaluation import BaseEvaluator

_LONGEST = {False: 24, True: 512}  # answer in tokens, without and with reasoning


class LocalJudgeStudent(LocalFinetuneEngine):
    """Trains an open model (LoRA) on the judgements of a recipe.

    Args:
        recipe: what is to be learned.
        student: hub name or folder of a causal language model with a chat template.
        output_dir: folder of the result.
        settings: of `LocalFinetuneEngine`, fields of `SFTSettings` among them.
    """

    def __init__(
        self, recipe: Recipe, student: str, output_dir: Path | str, **settings: Any
    ) -> None:
        if "extra" in settings:
            raise ArgumentError("extra", "is what the engine records itself")
        super().__init__(student, None, output_dir=output_dir, **settings)
        self.recipe = recipe

    @classmethod
    def opened(cls, folder: Path | str, manifest: Manifest, **settings: Any) -> Self:
        """Return the student in a saved folder.

        Raises:
            ArtifactError: it was not trained to judge.
        """
        record = record_in(manifest, folder)
        recipe = Recipe(record.task, record.reasoning, None)
        student = cls(recipe, manifest.base_model, folder, **settings)
        student.job_id = str(student.output_dir)
        return student

    def get_evaluator(
        self, options: Mapping[str, Any], *, scored: bool | None = None, **settings: Any
    ) -> BaseEvaluator:
        """Return the trained model as an evaluator.

        Args:
            options: of the evaluator.
            scored: compare the probabilities of all verdicts in place of writing one, see
                `ft_judge.scored`. The default where no reasoning is asked for.
            settings: of `LocalLLM`, and `device`.

        Raises:
            ArtifactError: nothing is trained yet, or what is was not trained to judge, or judges
                something else.
            ArgumentError: `scored`, of a judge that gives its reasoning.
        """
        record = record_in(read_manifest(self.output_dir, KIND), self.output_dir)
        if record.task != self.recipe.task:  # of a job that was named by its id
            raise ArtifactError(
                f"{self.output_dir}: judges {record.task}, not {self.recipe.task}; take the engine "
                "of that task"
            )
        settings = {"device": self.device, **settings}
        return local_evaluator(record, self.output_dir, options, scored=scored, **settings)

    def _data(self) -> tuple[ChatDataset, ChatDataset | None]:
        """Return the conversations to learn from; what the engine of `ft_core` trains on."""
        lessons = self.recipe.lessons()
        self.extra = {RECORD: lessons.record.model_dump()}
        return lessons.train, lessons.validation


def local_evaluator(
    record: JudgeRecord,
    model: Path | str,
    options: Mapping[str, Any],
    *,
    scored: bool | None = None,
    device: str | None = None,
    **settings: Any,
) -> BaseEvaluator:
    """Return a model on this machine as an evaluator, trained or not; see `get_evaluator`."""
    from ft_core.sft.llm import LocalLLM
    from ft_core.sft.models import load_model

    if scored is None:
        scored = not record.reasoning
    if scored and record.reasoning:
        raise ArgumentError("scored", "is for a verdict alone; this judge gives its reasoning")
    loaded, tokenizer = load_model(model, device)
    defaults = {"model_name": str(model), "max_new_tokens": _LONGEST[record.reasoning]}
    llm = LocalLLM(loaded, tokenizer, **defaults | settings)
    if not scored:
        return record.evaluator(llm, **options)
    from ft_judge.scored import scored_evaluator

    return scored_evaluator(record, llm, loaded, tokenizer, **options)
