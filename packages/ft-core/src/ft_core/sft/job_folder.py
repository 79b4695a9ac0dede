"""Where a local job keeps its state while it trains, for every process to read."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ft_core.errors import FTError, TrainingError
from ft_core.files import Journal, atomic_write, read_json

try:  # POSIX only: without it, a second process does not see that the first one trains
    import fcntl
except ImportError:  # pragma: no cover
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

EVENTS = "training.jsonl"
"""The journal of losses, in the folder of a job and in that of its model."""

_LETS_GO_CHECKS = 100  # ten a second

_WORKERS: list[subprocess.Popen[bytes]] = []
"""Kept, since Python complains of a process that is forgotten while it runs."""


class Cancelled(TrainingError):
    """The job was cancelled while it trained."""


class JobFolder:
    """`<output_dir>.training`: the state of a job, readable by every process.

    The process that trains holds a lock on a file beside it, which the system frees whatever
    happens to the process. A worker inherits the lock of the process that starts it, so that no
    other process comes between.
    """

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(f"{output.name}.training")
        self.events = self.path / EVENTS
        self._lock = output.with_name(f".{output.name}.training.lock")
        self._state = self.path / "job.json"
        self._journal = Journal(self.events)
        self._descriptor: int | None = None  # of the lock, while this object holds it

    @property
    def is_mine(self) -> bool:
        """Whether this object holds the lock: here is where the job trains."""
        return self._descriptor is not None

    def opened(self, fingerprint: str, base_model: str, status: str = "running") -> str | None:
        """Make the folder, or find the one of the same run; return its newest checkpoint.

        Only for the process that holds the lock. What a job left here that had other data or
        settings is deleted.
        """
        from ft_core.training import belongs_to, prepare_checkpoints

        same = belongs_to(self.path, fingerprint)
        if not same and any(self.path.glob("checkpoint-*")):
            logger.warning(
                "%s: dropping the checkpoints of an unfinished run with other data or settings",
                self.path,
            )
        checkpoint = prepare_checkpoints(self.path, fingerprint, resume=same)
        (self.path / "cancel").unlink(missing_ok=True)
        self._write(fingerprint=fingerprint, base_model=base_model, status=status, error=None)
        return checkpoint

    def adopt(self, descriptor: int) -> str | None:
        """Take over the job whose lock this process inherited; return its newest checkpoint."""
        from ft_core.training import newest_checkpoint

        os.set_inheritable(descriptor, False)
        self._descriptor = descriptor
        self._write(status="running")
        newest = newest_checkpoint(self.path)
        return None if newest is None else str(newest)

    def release(self) -> None:
        """Give back a lock that was taken over."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def await_end(self) -> None:
        """Wait a moment for a process that has written how its training ended to let go."""
        for _ in range(_LETS_GO_CHECKS):
            status = self.state().get("status")
            if status not in ("failed", "cancelled") or not self.is_training():
                return
            time.sleep(0.1)

    @contextmanager
    def held(self) -> Iterator[bool]:
        """Hold the lock of the training process; yield False where another one does."""
        if self.is_mine:
            yield True
            return
        try:
            self._lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise TrainingError(
                f"{self.path.parent}: cannot be written to ({error.strerror}); name another "
                "output folder"
            ) from error
        try:
            if not _locked(descriptor):
                yield False
                return
            self._descriptor = descriptor
            yield True
        finally:
            self._descriptor = None
            os.close(descriptor)

    def is_alive(self) -> bool:
        """Whether a process, this one or another, holds the lock."""
        if self.is_mine or fcntl is None:  # without locks, what `job.json` says must do
            return True
        try:
            descriptor = os.open(self._lock, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            return not _locked(descriptor)
        finally:
            os.close(descriptor)

    def is_training(self) -> bool:
        """Whether a job trains for sure: without locks, nobody knows."""
        return fcntl is not None and self.is_alive()

    def state(self) -> dict[str, Any]:
        """Return what `job.json` says; empty where there is none."""
        try:
            return dict(read_json(self._state)) if self._state.exists() else {}
        except FTError:
            if self._state.exists():
                raise
            return {}  # it went, as the job ended, between the two looks

    def ended(self, error: BaseException) -> None:
        """Record how the training ended; on a full disk, only the log has it."""
        try:
            if isinstance(error, Cancelled):
                self._write(status="cancelled", error=None)
            else:
                words = str(error) if isinstance(error, FTError) else repr(error)
                self._write(status="failed", error=words or type(error).__name__)
        except OSError as unwritable:
            logger.error("%s: cannot record that the job ended: %s", self.path, unwritable)

    def log(self, metrics: dict[str, float]) -> dict[str, Any]:
        """Append one logged step, and return its record."""
        record = {"time": _now(), "data": metrics}
        self._journal.append(record)
        return record

    def cancel(self) -> None:
        """Ask the training process to stop; where there is none, the job is cancelled at once."""
        try:
            (self.path / "cancel").touch()
        except FileNotFoundError:  # it has just ended
            return
        if not self.is_alive():
            self._write(status="cancelled", error=None)

    def is_cancelled(self) -> bool:
        """Whether somebody has asked the training process to stop."""
        return (self.path / "cancel").exists()

    def write_request(self, request: dict[str, Any]) -> None:
        """Write what the worker is to do."""
        with atomic_write(self.path / "request.json") as file:
            json.dump(request, file, indent=2)

    def spawn(self) -> None:
        """Start a worker that outlives this process, and give it the lock.

        Only for the process that holds the lock.
        """
        lock = [] if self._descriptor is None or fcntl is None else [self._descriptor]
        with open(self.path / "log.txt", "wb") as log:
            worker = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "ft_core.sft.worker",
                    str(self.path / "request.json"),
                    *map(str, lock),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=lock,
            )
        _WORKERS.append(worker)

    def last_words(self) -> str:
        """Return the end of the worker's log."""
        log = self.path / "log.txt"
        if not log.exists():
            return ""
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"Its last words: {lines[-1]}" if lines else ""

    def remove(self) -> None:
        """Delete the folder; no process sees a part of it."""
        doomed = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.partial")
        try:
            os.rename(self.path, doomed)
        except FileNotFoundError:
            return
        shutil.rmtree(doomed, ignore_errors=True)

    def _write(self, **changes: Any) -> None:
        state = {"created": _now(), "error": None, **self.state(), **changes}
        with atomic_write(self._state) as file:
            json.dump(state, file, indent=2)


def _locked(descriptor: int) -> bool:
    """Lock an open file; False where another process has."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _now() -> str:
    return datetime.now(timezone.utc).isoformat()
