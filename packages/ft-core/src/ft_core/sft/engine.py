"""Fine-tune a causal language model on this machine, as a job like those of hosted services."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from ft_core.artifacts import Manifest, check_output_folder, library_versions, read_manifest, saving
from ft_core.datasets.chat import ChatDataset
from ft_core.errors import ArgumentError, ArtifactError, TrainingError
from ft_core.files import Journal, content_hash
from ft_core.jobs import Job, JobEngine, JobEvent, JobStatus
from ft_core.sft.job_folder import EVENTS, JobFolder
from ft_core.sft.models import KIND
from ft_core.sft.settings import SFTSettings

if TYPE_CHECKING:
    from ft_core.sft.llm import LocalLLM

logger = logging.getLogger(__name__)

LIBRARIES = ("ft-core", "torch", "transformers", "trl", "peft")

_POLL_SECONDS = (0.2, 5.0)


class LocalFinetuneEngine(JobEngine):
    """Trains a student that is yours: an open model, on this machine.

    ```python
    engine = LocalFinetuneEngine("HuggingFaceTB/SmolLM2-1.7B-Instruct", "teacher.jsonl",
                                 output_dir="student")
    engine.finetune()
    Settings.llm = engine.get_finetuned_model()
    ```

    Low-rank updates (LoRA) by default, with the loss on the assistant's turns only. A job's id
    is its output folder. While it trains, `<output_dir>.training` beside it holds the
    checkpoints and what the job reports; a run that was killed goes on from there when
    `finetune` is called again with the same data and settings. On several devices, start the
    script with `accelerate launch`.

    Args:
        base_model: hub name or folder of a causal language model with a chat template.
        data_path: chat examples: a JSON Lines file in OpenAI's form, the journal of an
            `OpenAIFineTuningHandler`, or a `ChatDataset`.
        output_dir: folder of the result.
        val_data: examples for the validation loss; the checkpoint with the lowest one is
            kept. Without them the last weights are.
        settings: numbers of the training, or give them by name: `epochs=5`.
        device: `cpu`, `cuda`, `mps`; the best there is by default.
        lora: further arguments of peft's `LoraConfig`, such as `target_modules`.
        callbacks: `TrainerCallback` objects of transformers.
        report_to: trackers of transformers' `Trainer`, such as `tensorboard`.
        show_progress: a progress bar; only ever shown on a terminal.
        changes: fields of `SFTSettings`.
    """

    def __init__(
        self,
        base_model: str,
        data_path: Path | str | ChatDataset | None,
        *,
        output_dir: Path | str,
        val_data: Path | str | ChatDataset | None = None,
        settings: SFTSettings | None = None,
        device: str | None = None,
        lora: Mapping[str, Any] | None = None,
        callbacks: Sequence[Any] = (),
        report_to: str | list[str] = "none",
        show_progress: bool = True,
        **changes: Any,
    ) -> None:
        super().__init__(show_progress=show_progress, poll_seconds=_POLL_SECONDS)
        self.base_model = base_model
        self.data_path = data_path
        self.val_data = val_data
        self.output_dir = Path(output_dir)
        self.settings = _changed(settings or SFTSettings(), changes)
        self.device = device
        self.lora = dict(lora or {})
        self.callbacks = list(callbacks)
        self.report_to = report_to
        self._folder = JobFolder(self.output_dir)

    @classmethod
    def load(cls, folder: Path | str, **kwargs: Any) -> Self:
        """Bring back an engine from its saved folder, without the training data.

        Raises:
            ArtifactError: the folder is missing, damaged, or of another kind.
        """
        manifest = read_manifest(folder, KIND)
        engine = cls(manifest.base_model, None, output_dir=folder, **kwargs)
        engine.job_id = str(folder)
        return engine

    @classmethod
    def from_job_id(cls, job_id: str, **settings: Any) -> Self:
        """Return an engine for a job that was started before: its id is its output folder.

        Raises:
            ArtifactError: there is no such job.
        """
        folder = JobFolder(Path(job_id))
        if folder.path.exists():
            base = folder.state()["base_model"]
        else:
            base = read_manifest(job_id, KIND).base_model
        engine = cls(base, None, output_dir=job_id, **settings)
        engine.job_id = str(job_id)
        return engine

    def finetune(self, wait: bool = True, timeout: float | None = None) -> Job:
        """Train, and save the model to `output_dir`.

        With the same data and settings as before, a run that was killed goes on, one that is
        under way in another process is waited for, and one that has succeeded is returned.

        Args:
            wait: False trains in a process of its own, which outlives this one, and returns at
                once.
            timeout: seconds to wait at most; with one, too, the training has its own process.

        Raises:
            DatasetError: the data is bad; names file, place and reason.
            ArtifactError: the output folder holds something that is not ours.
            ArgumentError: the model cannot be loaded, or a setting does not fit it.
            TrainingError: training failed or was cancelled; checkpoints are kept.
        """
        apart = not wait or timeout is not None
        if apart and self.callbacks:
            raise ArgumentError("callbacks", "cannot go to another process; wait without a timeout")
        job = self._start_apart() if apart else self._start()
        return self.wait(timeout) if wait else job

    def get_finetuned_model(self, **kwargs: Any) -> LocalLLM:
        """Return the trained student for LlamaIndex.

        Args:
            kwargs: of `LocalLLM`, for example `max_new_tokens`, or `device`.

        Raises:
            ArtifactError: nothing has been trained into `output_dir` yet.
        """
        manifest = read_manifest(self.output_dir, KIND)
        from ft_core.sft.llm import LocalLLM

        defaults = {
            "device": self.device,
            "is_function_calling_model": manifest.settings.get("tools", False),
        }
        return LocalLLM.from_pretrained(self.output_dir, **defaults | kwargs)

    def merge(self, folder: Path | str) -> Path:
        """Write the student as one ordinary model that needs no peft, and return its folder.

        Servers (vLLM, `transformers serve`) and converters (llama.cpp) take it as it is.

        Raises:
            ArtifactError: nothing is trained yet, or `folder` holds something that is not ours.
        """
        manifest = read_manifest(self.output_dir, KIND)
        from ft_core.sft.models import load_model
        from ft_core.training import quiet_unless_terminal

        # On the CPU: there is always room, and nothing is computed but sums.
        model, tokenizer = load_model(self.output_dir, "cpu")
        if hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload(safe_merge=True)
        with saving(folder, manifest) as partial, quiet_unless_terminal():
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        return Path(folder)

    # --- The job -------------------------------------------------------------------------------

    def _submit(self) -> Job:
        """Train in this process."""
        data, validation = self._data()
        fingerprint = self._fingerprint_of(data, validation)
        main = _is_main_process()
        if main:
            check_output_folder(self.output_dir, KIND)
        with self._folder.held(main) as free:
            if not free:
                logger.info("%s: another process is training this; waiting for it", self.output_dir)
                return self._retrieve(str(self.output_dir))
            with _main_process_first():
                checkpoint = self._folder.opened(fingerprint, self.base_model, main)
            try:
                self._train(data, validation, fingerprint, checkpoint)
            except BaseException as error:
                if main:
                    self._folder.ended(error)
                raise
        return self._retrieve(str(self.output_dir))

    def _train(
        self,
        data: ChatDataset,
        validation: ChatDataset | None,
        fingerprint: str,
        checkpoint: str | None,
    ) -> None:
        from ft_core.sft import training
        from ft_core.training import quiet_unless_terminal

        run = training.Run(
            base_model=self.base_model,
            settings=self.settings,
            checkpoints=self._folder.path,
            checkpoint=checkpoint,
            train=data,
            validation=validation,
            device=self.device,
            lora=self.lora,
            callbacks=self.callbacks,
            cancelled=self._folder.is_cancelled,
            log=self._reported,
            report_to=self.report_to,
            show_progress=self.show_progress,
        )
        trained = training.train(run)
        if not trained.is_main:
            return
        hashes = {"train": data.content_hash}
        if validation is not None:
            hashes["validation"] = validation.content_hash
        manifest = Manifest(
            kind=KIND,
            base_model=self.base_model,
            data=hashes,
            settings={
                **self.settings.to_dict(),
                "lora": self.lora,
                "tools": any(example.tools or example.functions for example in data.examples),
                "fingerprint": fingerprint,
            },
            metrics=trained.metrics,
            versions=library_versions(LIBRARIES),
        )
        _say_whether_better(trained.metrics)
        with saving(self.output_dir, manifest) as folder, quiet_unless_terminal():
            trained.model.save_pretrained(folder)
            trained.tokenizer.save_pretrained(folder)
            # peft writes a card of its own; `saving` writes ours.
            (folder / "README.md").unlink(missing_ok=True)
            shutil.copy(self._folder.events, folder / EVENTS)
        shutil.rmtree(self._folder.path, ignore_errors=True)

    def _reported(self, metrics: dict[str, float]) -> None:
        self._log(_event(self._folder.log(metrics)))

    def _start(self) -> Job:
        job = self._known_job()
        if job is None:
            job = self._submit()
        self.job_id = job.id
        return job

    def _start_apart(self) -> Job:
        job = self._known_job()
        if job is not None:
            self.job_id = job.id
            return job
        data, validation = self._data()
        check_output_folder(self.output_dir, KIND)
        fingerprint = self._fingerprint_of(data, validation)
        with self._folder.held(True) as free:
            if free:
                self._folder.opened(fingerprint, self.base_model, True, status="queued")
                self._folder.write_request(self._request(data, validation))
        if free:
            self._folder.spawn()
        self.job_id = str(self.output_dir)
        return self._retrieve(self.job_id)

    def _known_job(self) -> Job | None:
        """Return the job with this data and these settings where it runs or has succeeded."""
        data, validation = self._data()
        fingerprint = self._fingerprint_of(data, validation)
        if self._saved_fingerprint() == fingerprint:
            logger.info("%s: is trained already; delete it to train again", self.output_dir)
            return self._retrieve(str(self.output_dir))
        if self._folder.is_training():
            if self._folder.state()["fingerprint"] == fingerprint:
                return self._retrieve(str(self.output_dir))
            raise TrainingError(
                f"{self.output_dir}: another process is training other data or settings into this "
                "folder; wait for it, cancel it, or name another folder"
            )
        return None

    def _saved_fingerprint(self) -> Any:
        try:
            return read_manifest(self.output_dir, KIND).settings.get("fingerprint")
        except ArtifactError:
            return None

    def _retrieve(self, job_id: str) -> Job:
        state = self._folder.state()
        if not state:
            manifest = read_manifest(self.output_dir, KIND)
            return Job(
                id=job_id,
                status=JobStatus.SUCCEEDED,
                model=str(self.output_dir),
                finished=datetime.fromisoformat(manifest.created),
                trained_tokens=round(manifest.metrics.get("tokens", 0)),
                raw=manifest,
            )
        status, error = JobStatus(state["status"]), state.get("error")
        if not status.ended and not self._folder.is_training() and not self._folder.is_starting():
            status = JobStatus.FAILED
            error = f"the process has died; finetune() goes on. {self._folder.last_words()}"
        return Job(
            id=job_id,
            status=status,
            error=error,
            created=datetime.fromisoformat(state["created"]),
            raw=state,
        )

    def _list_events(self, job_id: str) -> list[JobEvent]:
        here = self._folder.events
        journal = Journal(here if here.exists() else self.output_dir / EVENTS)
        return [_event(record) for record in journal.records()]

    def _cancel(self, job_id: str) -> Job:
        self._folder.cancel()
        return self._retrieve(job_id)

    def _fingerprint(self) -> str:
        return self._fingerprint_of(*self._data())

    def _fingerprint_of(self, data: ChatDataset, validation: ChatDataset | None) -> str:
        return content_hash(
            [
                self.base_model,
                data.content_hash,
                validation.content_hash if validation is not None else None,
                self.settings.to_dict(),
                json.loads(json.dumps(self.lora, default=str)),
            ]
        )

    def _data(self) -> tuple[ChatDataset, ChatDataset | None]:
        if self.data_path is None:
            raise ArgumentError("data_path", "is not there: a loaded engine cannot train again")
        validation = None if self.val_data is None else ChatDataset.coerce(self.val_data)
        return ChatDataset.coerce(self.data_path), validation

    def _request(self, data: ChatDataset, validation: ChatDataset | None) -> dict[str, Any]:
        data.save(self._folder.path / "train.jsonl")
        if validation is not None:
            validation.save(self._folder.path / "val.jsonl")
        return {
            "base_model": self.base_model,
            "data_path": str(self._folder.path / "train.jsonl"),
            "val_data": None if validation is None else str(self._folder.path / "val.jsonl"),
            "output_dir": str(self.output_dir),
            "device": self.device,
            "lora": self.lora,
            "report_to": self.report_to,
            **self.settings.to_dict(),
        }


def _changed(settings: SFTSettings, changes: Mapping[str, Any]) -> SFTSettings:
    known = [field.name for field in fields(SFTSettings)]
    for name in changes:
        if name not in known:
            raise ArgumentError(name, f"is no argument; settings are {', '.join(known)}")
    return SFTSettings(**{**settings.to_dict(), **changes})


def _say_whether_better(metrics: Mapping[str, float]) -> None:
    base, tuned = metrics.get("base_loss"), metrics.get("validation_loss")
    if tuned is None or base is None:
        return
    if tuned < base:
        logger.info("validation loss %.4f, base model %.4f", tuned, base)
    else:
        logger.warning(
            "training did not help on validation (loss %.4f, base model %.4f): keep the base "
            "model, or train on more or cleaner data",
            tuned,
            base,
        )


def _event(record: Mapping[str, Any]) -> JobEvent:
    metrics = record["data"]
    return JobEvent(datetime.fromisoformat(record["time"]), "info", _message(metrics), metrics)


def _message(metrics: Mapping[str, float]) -> str:
    parts = [f"{name} {value:.4f}" for name, value in metrics.items() if "loss" in name]
    return f"step {metrics['step']:.0f} of {metrics['steps']:.0f}: {', '.join(parts)}"


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def _main_process_first() -> Iterator[None]:
    """Under `accelerate launch`, let the other processes in once the main one is out."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    from accelerate import PartialState

    with PartialState().main_process_first():
        yield
