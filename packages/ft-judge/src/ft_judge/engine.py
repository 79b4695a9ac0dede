"""Fine-tune the judge of a LlamaIndex app on a teacher's verdicts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, cast

from ft_core.artifacts import Manifest
from ft_core.errors import ArgumentError, ArtifactError
from ft_core.jobs import Job, JobEvent
from ft_judge.recipe import RECORD, JudgeRecord, LLMTask, Recipe, Verdicts
from ft_judge.students import JudgeStudent, Kind, checked_kind, kind_of, saved, student_class

if TYPE_CHECKING:
    from llama_index.core.evaluation import BaseEvaluator

EngineT = TypeVar("EngineT", bound="JudgeFinetuneEngine")


class JudgeFinetuneEngine:
    """What the engines of both tasks share; `JudgeFinetuneEngine.load` opens either's folder."""

    task: ClassVar[LLMTask]

    def __init__(
        self,
        verdicts: Verdicts | None,
        student: str | Path,
        output_dir: Path | str = "judge",
        *,
        kind: Literal["auto", "hosted", "local", "encoder"] = "auto",
        reasoning: bool = False,
        val_data: Verdicts | None = None,
        **settings: Any,
    ) -> None:
        self.student = str(student)
        self.output_dir = Path(output_dir)
        self.kind = checked_kind(kind)
        if reasoning and kind == "encoder":
            raise ArgumentError("reasoning", "is for students that write; an encoder scores")
        self.recipe = Recipe(self.task, reasoning, verdicts, val_data)
        self.settings = settings
        self._opened: JudgeStudent | None = None

    @classmethod
    def load(cls: type[EngineT], folder: Path | str, **settings: Any) -> EngineT:
        """Bring back an engine from its saved folder, without the training data.

        Args:
            folder: what an engine saved.
            settings: of the kind of student, for example `device`, or the `api_key` of a service.

        Raises:
            ArtifactError: the folder is missing, damaged, or of another kind or task.
        """
        kind, manifest = saved(folder)
        task = _task_in(manifest, folder)
        found = ENGINES[task]
        if not issubclass(found, cls):
            raise ArtifactError(f"{folder}: judges {task}; load it with {found.__name__}")
        student = student_class(kind).opened(folder, manifest, **settings)
        return found._of(student, manifest.base_model, folder, kind, settings)

    @classmethod
    def from_job_id(
        cls: type[EngineT],
        job_id: str,
        *,
        reasoning: bool = False,
        kind: Literal["auto", "hosted", "local"] = "auto",
        **settings: Any,
    ) -> EngineT:
        """Return an engine for a job that was started before; its data is not needed.

        Args:
            job_id: the id at the service, or the output folder of a local student.
            reasoning: of a hosted job, how it was trained; a local one knows.
            kind: by default `local` where there is such a folder, else `hosted`.
            settings: where the service is: `base_url`, `api_key`, `client` and the like.

        Raises:
            ArtifactError: there is no such job on this machine.
        """
        if checked_kind(kind) == "encoder":
            raise ArgumentError("kind", "is hosted or local: an encoder is trained while you wait")
        recipe = Recipe(cls.task, reasoning, None)
        if kind == "local" or (kind == "auto" and _is_folder(job_id)):
            from ft_core.sft.engine import LocalFinetuneEngine

            job = LocalFinetuneEngine.from_job_id(job_id)
            local = student_class("local")(recipe, job.base_model, job.output_dir, **settings)
            local.job_id = job.job_id
            return cls._of(local, job.base_model, job.output_dir, "local", settings)
        output_dir = settings.pop("output_dir", "judge")
        model = settings.pop("base_model", "")
        hosted = student_class("hosted")(recipe, model, output_dir, start_job_id=job_id, **settings)
        return cls._of(hosted, model, output_dir, "hosted", settings)

    @classmethod
    def _of(
        cls: type[EngineT],
        student: Any,
        model: str,
        folder: Path | str,
        kind: Kind,
        settings: dict[str, Any],
    ) -> EngineT:
        engine = cls(None, model, folder, kind=kind, **settings)
        engine.recipe, engine._opened = student.recipe, student
        return engine

    @property
    def job(self) -> JudgeStudent:
        """The student behind this engine, a job; made when it is first asked for.

        Raises:
            ArgumentError: with `kind="auto"`, the kind of the student cannot be told.
        """
        if self._opened is None:
            kind = kind_of(self.student, self.settings) if self.kind == "auto" else self.kind
            if kind == "encoder" and self.recipe.reasoning:
                raise ArgumentError("reasoning", "is for students that write; an encoder scores")
            made = student_class(kind)(self.recipe, self.student, self.output_dir, **self.settings)
            self._opened = cast(JudgeStudent, made)
        return self._opened

    @property
    def job_id(self) -> str | None:
        """The job's id: at the service, or the output folder; None before there is a job."""
        return None if self._opened is None else self._opened.job_id

    def finetune(self, wait: bool = True, timeout: float | None = None) -> Job:
        """Train the student, and save it to `output_dir`.

        With the same verdicts and settings as before, a run that was killed goes on, one that is
        under way is waited for, and one that has succeeded is returned.

        Args:
            wait: False returns once the job is there.
            timeout: seconds to wait at most; the job goes on.

        Raises:
            DatasetError: a file is bad, or nothing in it can teach; says why.
            ArgumentError: the student cannot be loaded, or a setting does not fit it.
            ArtifactError: the output folder holds something that is not ours.
            TrainingError: training was refused, failed or was cancelled; says why.
        """
        return self.job.finetune(wait, timeout)

    def wait(self, timeout: float | None = None) -> Job:
        """Return the job once it has succeeded.

        Raises:
            TrainingError: it failed or was cancelled, or there is none.
            WaitTimeoutError: the time is over; the job goes on.
        """
        return self.job.wait(timeout)

    def get_current_job(self) -> Job:
        """Return the job as it stands now."""
        return self.job.get_current_job()

    def events(self) -> list[JobEvent]:
        """Return what the job has reported so far, oldest first."""
        return self.job.events()

    def cancel(self) -> Job:
        """Stop the job; one that has ended stays as it is."""
        return self.job.cancel()


class PairwiseJudgeFinetuneEngine(JudgeFinetuneEngine):
    """Trains a student to compare two answers as the teacher does.

    ```python
    engine = PairwiseJudgeFinetuneEngine("verdicts.jsonl", "HuggingFaceTB/SmolLM2-1.7B-Instruct")
    engine.finetune()
    judge = engine.get_finetuned_model()
    result = await judge.aevaluate(query=..., response=..., second_response=...)
    ```

    It learns the pairs that the teacher judged alike in both orders, each in both orders: the
    recipe of LlamaIndex's guide. What is dropped is logged, and recorded in `ft.json`.

    Args:
        verdicts: the journal of a `JudgeHandler`, a file of judgements, or a `JudgeDataset`.
        student: the hub name or folder of an open model, or the name of a hosted one.
        output_dir: folder of the result.
        kind: `local`, an open language model on this machine; `hosted`, one that OpenAI or another
            server with its API trains; `encoder`, one that scores without writing. By default the
            name tells, or the model's configuration; with `base_url`, `api_key` or `client` it is
            hosted.
        reasoning: learn the teacher's words, too, and answer with them: slower, and a student can
            be asked why. By default the verdict alone is learned, under a shorter prompt.
        val_data: judgements for the validation loss, in any form that `verdicts` takes.
        settings: of the kind: `ft_core.sft.LocalFinetuneEngine` with the fields of
            `SFTSettings`, `ft_core.openai_jobs.OpenAIFinetuneEngine`, or
            `ft_judge.encoder.EncoderJudgeStudent` with the fields of `EncoderSettings`.
    """

    task: ClassVar[LLMTask] = "pairwise"

    def get_finetuned_model(
        self, *, enforce_consensus: bool = True, **settings: Any
    ) -> BaseEvaluator:
        """Return the trained judge, LlamaIndex's `PairwiseComparisonEvaluator`.

        A local student that gives its verdict alone weighs all verdicts in place of writing one:
        its result has a `probability`, see `ft_judge.scored`; `scored=False` has it write. What a
        student writes that is no verdict gives an invalid result, never a verdict. An encoder's
        result has a `probability`, too, and the order of the answers cannot matter to it.

        Args:
            enforce_consensus: ask in both orders; where they disagree there is a tie, and a
                student that weighs verdicts averages their probabilities.
            settings: of the LLM, for example `max_tokens` or `device`.

        Raises:
            ArtifactError, TrainingError: nothing is trained yet.
        """
        return self.job.get_evaluator({"enforce_consensus": enforce_consensus}, **settings)


class CorrectnessJudgeFinetuneEngine(JudgeFinetuneEngine):
    """Trains a student to grade an answer from 1 to 5 as the teacher does.

    Args:
        verdicts, student, output_dir, kind, reasoning, val_data, settings: as those of
            `PairwiseJudgeFinetuneEngine`.
    """

    task: ClassVar[LLMTask] = "correctness"

    def get_finetuned_model(
        self, *, score_threshold: float = 4.0, **settings: Any
    ) -> BaseEvaluator:
        """Return the trained judge, LlamaIndex's `CorrectnessEvaluator`.

        As `PairwiseJudgeFinetuneEngine.get_finetuned_model`; what is no grade gives no score.

        Args:
            score_threshold: from which score an answer passes.
            settings: of the LLM, for example `max_tokens` or `device`.

        Raises:
            ArtifactError, TrainingError: nothing is trained yet.
        """
        return self.job.get_evaluator({"score_threshold": score_threshold}, **settings)


ENGINES: dict[str, type[JudgeFinetuneEngine]] = {
    "pairwise": PairwiseJudgeFinetuneEngine,
    "correctness": CorrectnessJudgeFinetuneEngine,
}


OPTIONS: dict[LLMTask, str] = {
    "pairwise": "enforce_consensus",
    "correctness": "score_threshold",
}
"""What the evaluator of a task can be told."""


def load_judge(folder: Path | str, **settings: Any) -> BaseEvaluator:
    """Return the evaluator in a folder that an engine saved, whatever its kind and task.

    Args:
        folder: the folder.
        settings: as those of `get_finetuned_model`.

    Raises:
        ArtifactError: the folder is missing, damaged, or holds no judge.
    """
    engine: Any = JudgeFinetuneEngine.load(folder)
    return cast("BaseEvaluator", engine.get_finetuned_model(**settings))


def untrained_judge(
    task: LLMTask, model: Path | str, *, reasoning: bool = False, **settings: Any
) -> BaseEvaluator:
    """Return an open model as it is, as a judge: what a trained one has to beat.

    It sees the prompt that its students are trained with.

    Args:
        task: what it judges.
        model: hub name or folder.
        reasoning: whether it is asked for its reasoning.
        settings: `enforce_consensus` or `score_threshold`, `scored`, `device`, and of `LocalLLM`.

    Raises:
        ArgumentError: there is no such model, or the option is of the other task.
    """
    from ft_judge.local import local_evaluator

    record = JudgeRecord.of(task, reasoning=reasoning)
    options = {}
    for judged, option in OPTIONS.items():
        if option in settings:
            if judged != task:
                raise ArgumentError(option, f"is of a judge of task {judged!r}, not of {task!r}")
            options[option] = settings.pop(option)
    return local_evaluator(record, model, options, **settings)


def _task_in(manifest: Manifest, folder: Path | str) -> str:
    record = manifest.settings.get(RECORD)
    task = record.get("task") if isinstance(record, dict) else None
    if not isinstance(task, str) or task not in ENGINES:
        raise ArtifactError(
            f"{folder}: holds a {manifest.kind} that was not trained to judge here; train a judge, "
            "or check the path"
        )
    return task


def _is_folder(job_id: str) -> bool:
    folder = Path(job_id).expanduser()
    return "/" in job_id or folder.is_dir() or folder.with_name(f"{folder.name}.training").is_dir()
