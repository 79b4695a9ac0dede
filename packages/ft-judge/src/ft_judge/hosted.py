"""A student that a service trains to judge: OpenAI, or a server with its fine-tuning API."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from typing_extensions import Self

from ft_core.artifacts import (
    MANIFEST,
    Manifest,
    check_output_folder,
    library_versions,
    model_card,
    read_manifest,
)
from ft_core.errors import ArgumentError
from ft_core.extras import import_extra
from ft_core.files import atomic_write
from ft_core.jobs import Job, JobStatus
from ft_core.openai_jobs.engine import OpenAIFinetuneEngine
from ft_judge.recipe import RECORD, JudgeRecord, Recipe, record_in
from ft_judge.students import HOSTED_KIND

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    import openai
    from llama_index.core.evaluation import BaseEvaluator

TRAIN, VALIDATION, JOBS = "train.jsonl", "val.jsonl", "jobs.json"

EXTRA = "ft-judge[openai]"

LIBRARIES = ("ft-core", "ft-judge", "openai")

_OWN = ("self", "base_model", "data_path", "start_job_id", "val_path", "method")


class HostedJudgeStudent(OpenAIFinetuneEngine):
    """Has a service train a model on the judgements of a recipe.

    The output folder holds what is sent (`train.jsonl`, `val.jsonl`), the record of jobs
    (`jobs.json`), and `ft.json`, which names the job and, once it has succeeded, the model. No key
    is written there.

    Args:
        recipe: what is to be learned.
        student: the model to train, by its name at the service.
        output_dir: the folder.
        start_job_id: attach to this job.
        settings: of `OpenAIFinetuneEngine`, such as `base_url`, `api_key`, `hyperparameters`.
    """

    def __init__(
        self,
        recipe: Recipe,
        student: str,
        output_dir: Path | str,
        *,
        start_job_id: str | None = None,
        **settings: Any,
    ) -> None:
        _check_names(settings)
        self.output_dir = Path(os.path.abspath(Path(output_dir).expanduser()))
        self.recipe = recipe
        self._manifest: Manifest | None = None
        super().__init__(
            student,
            self.output_dir / TRAIN,
            start_job_id=start_job_id,
            **{"job_file": self.output_dir / JOBS, **settings},
        )

    @classmethod
    def opened(cls, folder: Path | str, manifest: Manifest, **settings: Any) -> Self:
        """Return the student in a saved folder.

        Args:
            folder: the folder.
            manifest: its `ft.json`.
            settings: the `api_key` where it is not in the environment, and others.

        Raises:
            ArtifactError: it was not trained to judge.
        """
        record = record_in(manifest, folder)
        if settings.get("client") is None:
            settings.setdefault("base_url", manifest.settings.get("base_url"))
        student = cls(
            Recipe(record.task, record.reasoning, None),
            manifest.base_model,
            folder,
            start_job_id=manifest.settings.get("job_id"),
            **settings,
        )
        student._manifest = manifest
        if (student.output_dir / VALIDATION).is_file():
            student.val_path = student.output_dir / VALIDATION
        return student

    def finetune(self, wait: bool = True, timeout: float | None = None) -> Job:
        """Write the training file, and start its job or find the one that was started before.

        See `OpenAIFinetuneEngine.finetune`.

        Raises:
            ArtifactError: the output folder holds something that is not ours.
            DatasetError, ArgumentError: the verdicts or a setting cannot be used.
            TrainingError: the job was refused, failed or was cancelled; says why.
        """
        if self.recipe.verdicts is not None or (self._manifest is None and self.job_id is None):
            self._prepare()
        job = super().finetune(wait=False)
        self._remember(job)
        if not wait and read_manifest(self.output_dir, HOSTED_KIND).settings["job_id"] != job.id:
            logger.warning(
                "%s: holds the judge of an earlier job until wait() has seen %s succeed; load() "
                "finds that one until then, and from_job_id(%r) the new job",
                self.output_dir,
                job.id,
                job.id,
            )
        return self.wait(timeout) if wait else job

    def wait(self, timeout: float | None = None) -> Job:
        """Return the job once it has succeeded, and note its model in `ft.json`."""
        job = super().wait(timeout)
        self._remember(job)
        return job

    def get_evaluator(self, options: Mapping[str, Any], **settings: Any) -> BaseEvaluator:
        """Return the trained model as an evaluator of LlamaIndex.

        Args:
            options: of the evaluator.
            settings: of LlamaIndex's `OpenAI`; the temperature is 0 by default.

        Raises:
            TrainingError: there is no job, or it has not succeeded.
            MissingExtraError: `ft-judge[openai]` is not installed.
        """
        if settings.pop("scored", None):
            raise ArgumentError("scored", "needs the model itself; a service only writes answers")
        import_extra("llama_index.llms.openai", EXTRA)
        llm = self.get_finetuned_model(**{"temperature": 0.0, **settings})
        if self._manifest is not None:
            record = record_in(self._manifest, self.output_dir)
        else:
            record = JudgeRecord.of(self.recipe.task, reasoning=self.recipe.reasoning)
        return record.evaluator(llm, **options)

    def _make_client(self) -> openai.OpenAI:
        import_extra("openai", EXTRA)
        return super()._make_client()

    def _finished_job(self) -> Job:
        known = {} if self._manifest is None else self._manifest.settings
        if known.get("model") and known.get("job_id") == self.job_id:
            return Job(id=known["job_id"], status=JobStatus.SUCCEEDED, model=known["model"])
        job = super()._finished_job()
        self._remember(job)
        return job

    # --- The folder ----------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Write what is to be sent; the folder is ours from the first file on."""
        lessons = self.recipe.lessons()
        check_output_folder(self.output_dir, HOSTED_KIND)
        hashes = {"train": lessons.train.content_hash}
        if lessons.validation is not None:
            hashes["validation"] = lessons.validation.content_hash
        self._manifest = Manifest(
            kind=HOSTED_KIND,
            base_model=self.base_model,
            data=hashes,
            settings={
                RECORD: lessons.record.model_dump(),
                "base_url": self._public_url(),
                "hyperparameters": self.hyperparameters,
                "suffix": self.suffix,
                "seed": self.seed,
                "job_id": None,
                "model": None,
            },
            versions=library_versions(LIBRARIES),
        )
        if not (self.output_dir / MANIFEST).exists():
            self._write(self._manifest)
        lessons.train.save(self.output_dir / TRAIN)
        self.val_path = None
        if lessons.validation is None:
            (self.output_dir / VALIDATION).unlink(missing_ok=True)
        else:
            self.val_path = self.output_dir / VALIDATION
            lessons.validation.save(self.val_path)

    def _remember(self, job: Job) -> None:
        """Note the job in `ft.json`; a model that stands there stays until there is a new one."""
        if self._manifest is None:  # of a job that was named by its id: there is no folder
            return
        settings = {**self._manifest.settings, "job_id": job.id, "model": job.model}
        metrics = {} if job.trained_tokens is None else {"trained_tokens": job.trained_tokens}
        self._manifest = self._manifest.model_copy(
            update={"settings": settings, "metrics": metrics}
        )
        saved = read_manifest(self.output_dir, HOSTED_KIND)
        if job.model is not None or saved.settings.get("model") is None:
            self._write(self._manifest)

    def _write(self, manifest: Manifest) -> None:
        with atomic_write(self.output_dir / MANIFEST) as file:
            file.write(manifest.model_dump_json(indent=2) + "\n")
        with atomic_write(self.output_dir / "README.md") as file:
            file.write(model_card(manifest))

    def _public_url(self) -> str | None:
        """Return where the service is, without any secret that stands in the URL."""
        url = self.base_url
        if url is None and self._client is not None:
            url = str(self._client.base_url)
        if url is None:
            return None
        parts = urlsplit(url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _check_names(settings: Mapping[str, Any]) -> None:
    known = [
        name
        for name in inspect.signature(OpenAIFinetuneEngine.__init__).parameters
        if name not in _OWN
    ]
    for name in settings:
        if name not in known:
            raise ArgumentError(
                name, f"is no argument of a hosted student, which takes {', '.join(known)}"
            )
