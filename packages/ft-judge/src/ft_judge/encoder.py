"""A student that judges without writing: an encoder, trained on this machine to score answers."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import Self

from ft_core.artifacts import Manifest, library_versions, read_manifest, saving
from ft_core.errors import ArgumentError, DatasetError
from ft_core.extras import import_extra
from ft_core.files import content_hash
from ft_core.jobs import Job
from ft_core.sft.folder_engine import FolderJobEngine
from ft_core.sft.job_folder import EVENTS
from ft_core.weights import plain_lora
from ft_judge.encoder_lessons import Lessons
from ft_judge.encoder_scoring import EncoderRecord, encoder_evaluator
from ft_judge.encoder_settings import EncoderSettings
from ft_judge.recipe import RECORD, Recipe, saved_record
from ft_judge.students import ENCODER_KIND, EXTRA

if TYPE_CHECKING:
    from llama_index.core.evaluation import BaseEvaluator

    from ft_judge.encoder_training import Trained

logger = logging.getLogger(__name__)

LIBRARIES = ("ft-core", "ft-judge", "torch", "transformers")


class EncoderJudgeStudent(FolderJobEngine):
    """Trains an encoder on the judgements of a recipe: no prompt, and quick on a CPU.

    Each answer gets a score of its own, read together with its question. Of pairs, the difference
    of two scores is the log-odds that one answer is better (Bradley and Terry 1952), so that the
    order of the answers cannot matter; ties are learned as even odds. Grades are cut out of the
    same score (McCullagh's cumulative logits). Probabilities are then calibrated on judgements
    that were not learned.

    A model that is no cross-encoder gets a fresh head.

    The model is trained in this process, while you wait. A run that was killed goes on from its
    last epoch when `finetune` is called again with the same data and settings.

    Args:
        recipe: what is to be learned.
        student: hub name or folder: a cross-encoder with one score, or any plain encoder.
        output_dir: folder of the result.
        device: `cpu`, `cuda`, `mps`; the best there is by default.
        lora: True, or arguments of `peft.LoraConfig`, to train low-rank updates. They are merged
            into the saved model.
        show_progress: a progress bar; only ever shown on a terminal.
        settings: fields of `EncoderSettings`.

    Raises:
        ArgumentError: there is no such setting, or its value is out of range.
    """

    kind: ClassVar[str] = ENCODER_KIND

    def __init__(
        self,
        recipe: Recipe,
        student: str,
        output_dir: Path | str,
        *,
        device: str | None = None,
        lora: bool | Mapping[str, Any] = False,
        show_progress: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(student, output_dir, show_progress)
        self.recipe = recipe
        self.device = device
        self.lora = {} if lora is True else plain_lora(lora) if lora else None
        self.settings = EncoderSettings.of(settings)

    @classmethod
    def opened(cls, folder: Path | str, manifest: Manifest, **settings: Any) -> Self:
        """Return the student in a saved folder.

        Raises:
            ArtifactError: it was not trained to judge.
        """
        record = saved_record(manifest, folder, EncoderRecord)
        recipe = Recipe(record.task, False, None)
        student = cls(recipe, manifest.base_model, folder, **settings)
        student.job_id = str(student.output_dir)
        # The job is the one that was saved, whatever another has begun there since.
        student._started_for = manifest.settings.get("fingerprint")
        return student

    @classmethod
    def from_job_id(cls, job_id: str, **settings: Any) -> Self:
        """Return the student in an output folder, which is its job's id.

        Raises:
            ArtifactError: nothing is trained there yet.
        """
        return cls.opened(job_id, read_manifest(job_id, ENCODER_KIND), **settings)

    def finetune(self, wait: bool = True, timeout: float | None = None) -> Job:
        """Train, and save the judge to `output_dir`.

        With the same data and settings as before, a run that was killed goes on, one that is
        under way in another process is waited for, and one that has succeeded is returned.

        Args:
            wait: whether to wait for another process that trains this; what is trained here is
                trained while you wait.
            timeout: seconds to wait for that process at most.

        Raises:
            DatasetError: a file is bad, or nothing in it can teach; says why.
            ArtifactError: the output folder holds something that is not ours.
            ArgumentError: the model cannot be loaded, or a setting does not fit it.
            TrainingError: training failed or was cancelled; checkpoints are kept.
        """
        return super().finetune(wait, timeout)

    def get_finetuned_model(self, **kwargs: Any) -> BaseEvaluator:
        """Return the trained judge; see `get_evaluator`."""
        return self.get_evaluator({}, **kwargs)

    def get_evaluator(self, options: Mapping[str, Any], **settings: Any) -> BaseEvaluator:
        """Return the trained model as an evaluator of LlamaIndex; it has no LLM.

        Args:
            options: of the evaluator.
            settings: `device`.

        Raises:
            ArtifactError: nothing is trained yet, or the folder is damaged.
            ArgumentError: there is no such setting.
        """
        device = settings.pop("device", self.device)
        for name in settings:
            raise ArgumentError(name, "is no argument of an encoder's judge, which takes device")
        record = saved_record(self._manifest(), self.output_dir, EncoderRecord)
        return encoder_evaluator(record, self.output_dir, device, **options)

    # --- The job -------------------------------------------------------------------------------

    def _start(self) -> Job:
        lessons = self._lessons()
        self._started_for = fingerprint = self._fingerprint_of(lessons)
        job = self._known_job(fingerprint)
        if job is None:
            job = self._trained(lessons, fingerprint)
        self.job_id = job.id
        return job

    def _submit(self) -> Job:
        lessons = self._lessons()
        return self._trained(lessons, self._fingerprint_of(lessons))

    def _trained(self, lessons: Lessons, fingerprint: str) -> Job:
        return self._train_here(
            fingerprint, lambda checkpoint: self._train(lessons, fingerprint, checkpoint)
        )

    def _fingerprint(self) -> str:
        return self._fingerprint_of(self._lessons())

    def _fingerprint_of(self, lessons: Lessons) -> str:
        return content_hash(
            [ENCODER_KIND, self.recipe.task, self.base_model, lessons.hashes, self._asked()]
        )

    def _asked(self) -> dict[str, Any]:
        return {**self.settings.to_dict(), "lora": self.lora}

    # --- Training ------------------------------------------------------------------------------

    def _lessons(self) -> Lessons:
        train, validation, dropped = self.recipe.examples()
        try:
            return Lessons(self.recipe.task, train, validation, dropped, self.settings)
        except DatasetError as error:
            source = self.recipe.verdicts
            raise error.at(source) if isinstance(source, str | Path) else error from None

    def _train(self, lessons: Lessons, fingerprint: str, checkpoint: str | None) -> None:
        for module in ("torch", "transformers", "datasets", "peft", "trl"):
            import_extra(module, EXTRA)
        from ft_core.training import quiet_unless_terminal, writing
        from ft_judge import encoder_training

        trained = encoder_training.train(
            encoder_training.Run(
                base_model=self.base_model,
                settings=self.settings,
                checkpoints=self._folder.path,
                rows=lessons.rows,
                watched=lessons.watched,
                cuts=lessons.cuts or None,
                loss_of=lessons.best_loss,
                checkpoint=checkpoint,
                device=self.device,
                lora=self.lora,
                cancelled=self._folder.is_cancelled,
                log=self._reported,
                show_progress=self.show_progress,
            )
        )
        manifest = self._manifest_of(lessons, trained, fingerprint)
        with (
            writing("the judge", self.output_dir, "run it again"),
            saving(self.output_dir, manifest) as folder,
            quiet_unless_terminal(),
        ):
            trained.encoder.save_pretrained(folder)
            trained.tokenizer.save_pretrained(folder)
            shutil.copy(self._folder.events, folder / EVENTS)
        self._folder.remove()

    def _manifest_of(self, lessons: Lessons, trained: Trained, fingerprint: str) -> Manifest:
        record = lessons.record(trained.scores, trained.max_length)
        metrics = {**trained.metrics, **lessons.metrics(trained.scores, record)}
        return Manifest(
            kind=ENCODER_KIND,
            base_model=self.base_model,
            data=lessons.hashes,
            settings={RECORD: record.model_dump(), **self._asked(), "fingerprint": fingerprint},
            metrics=metrics,
            versions=library_versions(LIBRARIES),
        )
