"""Engines that train on this machine: the job is the output folder, and is found by it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from ft_core.artifacts import Manifest, check_output_folder, read_manifest
from ft_core.errors import ArtifactError, TrainingError
from ft_core.files import Journal
from ft_core.jobs import Job, JobEngine, JobEvent, JobStatus
from ft_core.sft.job_folder import EVENTS, JobFolder
from ft_core.sft.processes import from_main_process, is_main_process

logger = logging.getLogger(__name__)

_POLL_SECONDS = (0.2, 5.0)


class FolderJobEngine(JobEngine):
    """Base of engines whose job is a folder on this machine.

    A job's id is its output folder. While it trains, `<output_dir>.training` beside it holds the
    checkpoints and what the job reports. What is saved records, in `ft.json`, the `fingerprint`
    of the data and settings that it was trained for.

    Args:
        base_model: what is trained, hub name or folder.
        output_dir: folder of the result.
        show_progress: a progress bar; only ever shown on a terminal.
    """

    kind: ClassVar[str]
    """What `ft.json` calls such a folder."""

    def __init__(self, base_model: Path | str, output_dir: Path | str, show_progress: bool) -> None:
        super().__init__(show_progress=show_progress, poll_seconds=_POLL_SECONDS)
        self.base_model = str(base_model)
        # A job is found from any current folder.
        self.output_dir = Path(os.path.abspath(Path(output_dir).expanduser()))
        self._folder = JobFolder(self.output_dir)

    def _train_here(self, fingerprint: str, train: Callable[[str | None], None]) -> Job:
        """Train in this process, which may be one of several; unless another one does.

        Args:
            fingerprint: of the data and the settings.
            train: trains and saves, from a checkpoint or from the beginning.
        """
        with ExitStack() as stack:

            def opened() -> tuple[bool, str | None]:
                check_output_folder(self.output_dir, self.kind)
                if not stack.enter_context(self._folder.held()):
                    return False, None
                saved = self._saved_fingerprint()
                if saved == fingerprint:  # by a process that has just ended
                    return False, None
                if saved is not None:
                    logger.warning(
                        "%s: was trained with other data or settings; it is replaced when this "
                        "training ends",
                        self.output_dir,
                    )
                checkpoint = self._folder.opened(fingerprint, self.base_model)
                if checkpoint is not None:
                    logger.info("%s: going on from %s", self.output_dir, Path(checkpoint).name)
                self._take_as_told(str(self.output_dir))
                return True, checkpoint

            free, checkpoint = from_main_process(opened)
            if not free:
                logger.info("%s: another process trains this; waiting for it", self.output_dir)
                return self._retrieve(str(self.output_dir))
            try:
                train(checkpoint)
            except BaseException as error:
                if is_main_process():
                    self._folder.ended(error)
                raise
        return self._retrieve(str(self.output_dir))

    def _reported(self, metrics: dict[str, float]) -> None:
        """Keep and log what training reports."""
        self._log(_event(self._folder.log(metrics)))

    def _known_job(self, fingerprint: str) -> Job | None:
        """Return the job with this data and these settings where it runs or has succeeded."""
        if self._saved_fingerprint() == fingerprint:
            logger.info("%s: is trained already; delete it to train again", self.output_dir)
            self._take_as_told(str(self.output_dir))
            return self._retrieve(str(self.output_dir))
        self._folder.await_end()
        state = self._folder.state()
        if state and self._folder.is_training():
            if state["fingerprint"] == fingerprint:
                return self._retrieve(str(self.output_dir))
            raise TrainingError(
                f"{self.output_dir}: another process is training other data or settings into this "
                "folder; wait for it, cancel it, or name another folder"
            )
        return None

    def _saved_fingerprint(self) -> Any:
        try:
            return self._manifest().settings.get("fingerprint")
        except ArtifactError:
            return None

    def _manifest(self) -> Manifest:
        """Return the `ft.json` of what is saved.

        Raises:
            ArtifactError: nothing is, or it is damaged or of another kind.
        """
        return read_manifest(self.output_dir, self.kind)

    def _retrieve(self, job_id: str) -> Job:
        alive = self._folder.is_alive()  # looked at first: what ends after this has written why
        state = self._folder.state()
        saved = self._saved_fingerprint()
        # What is saved counts where it is this very job's, whatever another left behind.
        if not state or (saved and saved in (self._started_for, state["fingerprint"])):
            return self._saved_job(job_id)
        status, error = JobStatus(state["status"]), state.get("error")
        if not status.ended and not alive:
            status = JobStatus.FAILED
            error = f"the process has died; finetune() goes on. {self._folder.last_words()}"
        return Job(
            id=job_id,
            status=status,
            error=error,
            created=datetime.fromisoformat(state["created"]),
            raw=state,
        )

    def _saved_job(self, job_id: str) -> Job:
        manifest = self._manifest()
        return Job(
            id=job_id,
            status=JobStatus.SUCCEEDED,
            model=str(self.output_dir),
            finished=datetime.fromisoformat(manifest.created),
            trained_tokens=round(manifest.metrics.get("tokens", 0)) or None,
            raw=manifest,
        )

    def _list_events(self, job_id: str) -> list[JobEvent]:
        saved = self._is_saved(job_id)
        journal = Journal(self.output_dir / EVENTS if saved else self._folder.events)
        try:
            return [_event(record) for record in journal.records()]
        except FileNotFoundError:
            just_moved = not saved and self._is_saved(job_id)
            return self._list_events(job_id) if just_moved else []

    def _is_saved(self, job_id: str) -> bool:
        return self._retrieve(job_id).status is JobStatus.SUCCEEDED

    def _cancel(self, job_id: str) -> Job:
        self._folder.cancel()
        return self._retrieve(job_id)


def _event(record: Mapping[str, Any]) -> JobEvent:
    metrics = record["data"]
    return JobEvent(datetime.fromisoformat(record["time"]), "info", _message(metrics), metrics)


def _message(metrics: Mapping[str, float]) -> str:
    parts = [f"{name} {value:.4f}" for name, value in metrics.items() if "loss" in name]
    return f"step {metrics['step']:.0f} of {metrics['steps']:.0f}: {', '.join(parts)}"
