"""Fine-tune a causal language model on this machine, as a job like those of hosted services."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import Self

from ft_core.artifacts import Manifest, check_output_folder, library_versions, read_manifest, saving
from ft_core.datasets.chat import ChatDataset
from ft_core.errors import ArgumentError
from ft_core.extras import import_extra
from ft_core.files import content_hash
from ft_core.jobs import Job
from ft_core.sft.folder_engine import FolderJobEngine
from ft_core.sft.job_folder import EVENTS
from ft_core.sft.models import EXTRA, KIND
from ft_core.sft.processes import from_main_process, processes
from ft_core.sft.settings import SFTSettings
from ft_core.weights import plain_lora

if TYPE_CHECKING:
    from ft_core.sft.llm import LocalLLM

logger = logging.getLogger(__name__)

LIBRARIES = ("ft-core", "torch", "transformers", "trl", "peft")


class LocalFinetuneEngine(FolderJobEngine):
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
        extra: what `ft.json` is to record among the settings besides; of JSON's types, and never
            a secret.
        changes: fields of `SFTSettings`.
    """

    kind: ClassVar[str] = KIND

    def __init__(
        self,
        base_model: Path | str,
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
        extra: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> None:
        super().__init__(base_model, output_dir, show_progress)
        self.data_path = data_path
        self.val_data = val_data
        self.settings = _changed(settings or SFTSettings(), changes)
        self.device = device
        self.lora = plain_lora(lora or {})
        if self.lora and self.settings.lora_rank is None:
            raise ArgumentError("lora", "has no effect on training all weights; give a lora_rank")
        self.callbacks = list(callbacks)
        self.report_to = report_to
        self.extra = dict(extra or {})

    @classmethod
    def load(cls, folder: Path | str, **kwargs: Any) -> Self:
        """Bring back an engine from its saved folder, without the training data.

        Raises:
            ArtifactError: the folder is missing, damaged, or of another kind.
        """
        manifest = read_manifest(folder, KIND)
        engine = cls(manifest.base_model, None, output_dir=folder, **kwargs)
        engine.job_id = str(engine.output_dir)
        return engine

    @classmethod
    def from_job_id(cls, job_id: str, **settings: Any) -> Self:
        """Return an engine for a job that was started before: its id is its output folder.

        Raises:
            ArtifactError: there is no such job.
        """
        engine = cls("", None, output_dir=job_id, **settings)
        known = engine._folder.state().get("base_model")
        engine.base_model = known or read_manifest(engine.output_dir, KIND).base_model
        engine.job_id = str(engine.output_dir)
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
        if apart and processes() > 1:
            raise ArgumentError(
                "wait", "is True, without a timeout, under accelerate launch: all processes train"
            )
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
        from ft_core.sft.models import merged
        from ft_core.training import quiet_unless_terminal, writing

        check_output_folder(folder, KIND)
        model, tokenizer = merged(self.output_dir)
        with (
            writing("the merged model", Path(folder), "merge again"),
            saving(folder, manifest) as partial,
            quiet_unless_terminal(),
        ):
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        return Path(folder)

    def train_queued(self, lock: int | None) -> None:
        """Train the job that another process has made ready; what its worker calls.

        Args:
            lock: descriptor of the job's lock, which this process inherited.
        """
        data, validation = self._data()
        fingerprint = self._fingerprint_of(data, validation)
        if lock is None:  # no locks on this system
            self._started_for = fingerprint
            self._trained(data, validation, fingerprint)
            return
        try:
            checkpoint = self._folder.adopt(lock)
            self._train(data, validation, fingerprint, checkpoint)
        except BaseException as error:
            self._folder.ended(error)
            raise
        finally:
            self._folder.release()

    # --- The job -------------------------------------------------------------------------------

    def _start(self) -> Job:
        data, validation = self._data()
        self._started_for = fingerprint = self._fingerprint_of(data, validation)
        job = from_main_process(lambda: self._known_job(fingerprint))
        if job is None:
            job = self._trained(data, validation, fingerprint)
        self.job_id = job.id
        return job

    def _submit(self) -> Job:
        data, validation = self._data()
        return self._trained(data, validation, self._fingerprint_of(data, validation))

    def _trained(self, data: ChatDataset, validation: ChatDataset | None, fingerprint: str) -> Job:
        return self._train_here(
            fingerprint,
            lambda checkpoint: self._train(data, validation, fingerprint, checkpoint),
        )

    def _train(
        self,
        data: ChatDataset,
        validation: ChatDataset | None,
        fingerprint: str,
        checkpoint: str | None,
    ) -> None:
        for module in ("torch", "transformers", "datasets", "peft", "trl"):
            import_extra(module, EXTRA)
        from ft_core.sft import training
        from ft_core.training import quiet_unless_terminal, writing

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
                **self.extra,
                **self.settings.to_dict(),
                "lora": self.lora,
                "tools": any(example.tools or example.functions for example in data.examples),
                "fingerprint": fingerprint,
            },
            metrics=trained.metrics,
            versions=library_versions(LIBRARIES),
        )
        _say_whether_better(trained.metrics)
        with (
            writing("the model", self.output_dir, "run it again"),
            saving(self.output_dir, manifest) as folder,
            quiet_unless_terminal(),
        ):
            trained.model.save_pretrained(folder)
            trained.tokenizer.save_pretrained(folder)
            # peft writes a card of its own; `saving` writes ours.
            (folder / "README.md").unlink(missing_ok=True)
            shutil.copy(self._folder.events, folder / EVENTS)
        self._folder.remove()

    def _start_apart(self) -> Job:
        data, validation = self._data()
        self._started_for = fingerprint = self._fingerprint_of(data, validation)
        self.job_id = str(self.output_dir)
        job = self._known_job(fingerprint)
        if job is not None:
            return job
        check_output_folder(self.output_dir, KIND)
        with self._folder.held() as free:
            if free and self._saved_fingerprint() != fingerprint:
                self._folder.opened(fingerprint, self.base_model, status="queued")
                self._folder.write_request(self._request(data, validation))
                self._folder.spawn()
        return self._retrieve(self.job_id)

    def _fingerprint(self) -> str:
        return self._fingerprint_of(*self._data())

    def _fingerprint_of(self, data: ChatDataset, validation: ChatDataset | None) -> str:
        return content_hash(
            [
                self.base_model,
                data.content_hash,
                validation.content_hash if validation is not None else None,
                self.settings.to_dict(),
                self.lora,
                # Jobs of engines that record nothing besides keep the hash that they had.
                *([self.extra] if self.extra else []),
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
            "extra": self.extra,
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
