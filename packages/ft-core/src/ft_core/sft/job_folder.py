"""Where a local job keeps its state while it trains, for every process to read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ft_core.errors import FTError
from ft_core.files import Journal, atomic_write, read_json

try:  # POSIX only: without it, a second process does not see that the first one trains
    import fcntl
except ImportError:  # pragma: no cover
    fcntl = None  # type: ignore[assignment]

EVENTS = "training.jsonl"
"""The journal of losses, in the folder of a job and in that of its model."""

_START_SECONDS = 60.0

_WORKERS: list[subprocess.Popen[bytes]] = []
"""Kept, since Python complains of a process that is forgotten while it runs."""


class JobFolder:
    """`<output_dir>.training`: the state of a job, readable by every process.

    The process that trains holds a lock on a file beside it, which the system frees whatever
    happens to the process.
    """

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(f"{output.name}.training")
        self.events = self.path / EVENTS
        self._lock = output.with_name(f".{output.name}.training.lock")
        self._state = self.path / "job.json"
        self._journal = Journal(self.events)
        self._worker: subprocess.Popen[bytes] | None = None

    def opened(
        self, fingerprint: str, base_model: str, main: bool, status: str = "running"
    ) -> str | None:
        """Make the folder, or find the one of the same run; return its newest checkpoint."""
        from ft_core.training import belongs_to, newest_checkpoint, prepare_checkpoints

        if not main:  # the main process was here first
            newest = newest_checkpoint(self.path)
            return None if newest is None else str(newest)
        same = belongs_to(self.path, fingerprint)
        checkpoint = prepare_checkpoints(self.path, fingerprint, resume=same)
        (self.path / "cancel").unlink(missing_ok=True)
        self._write(fingerprint=fingerprint, base_model=base_model, status=status, since=_now())
        return checkpoint

    @contextmanager
    def held(self, main: bool) -> Iterator[bool]:
        """Hold the lock of the training process; yield False where another one does."""
        if not main or fcntl is None:
            yield True
            return
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(descriptor)

    def is_training(self) -> bool:
        """Whether a process holds the lock."""
        if fcntl is None or not self._lock.exists():
            return False
        descriptor = os.open(self._lock, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def is_starting(self) -> bool:
        """Whether a worker was started and may not have come to take the lock yet."""
        if self._worker is not None:
            return self._worker.poll() is None
        state = self.state()
        if state.get("status") != "queued":
            return False
        age = datetime.now(timezone.utc) - datetime.fromisoformat(state["since"])
        return age.total_seconds() < _START_SECONDS

    def state(self) -> dict[str, Any]:
        """Return what `job.json` says; empty where there is none."""
        return dict(read_json(self._state)) if self._state.exists() else {}

    def ended(self, error: BaseException) -> None:
        """Record how the training ended."""
        from ft_core.sft.training import Cancelled

        if isinstance(error, Cancelled):
            self._write(status="cancelled", error=None)
        else:
            words = str(error) if isinstance(error, FTError) else repr(error)
            self._write(status="failed", error=words or type(error).__name__)

    def log(self, metrics: dict[str, float]) -> dict[str, Any]:
        """Append one logged step, and return its record."""
        record = {"time": _now(), "data": metrics}
        self._journal.append(record)
        return record

    def cancel(self) -> None:
        """Ask the training process to stop; where there is none, the job is cancelled at once."""
        (self.path / "cancel").touch()
        if not self.is_training() and not self.is_starting():
            self._write(status="cancelled", error=None)

    def is_cancelled(self) -> bool:
        """Whether somebody has asked the training process to stop."""
        return (self.path / "cancel").exists()

    def write_request(self, request: dict[str, Any]) -> None:
        """Write what the worker is to do."""
        with atomic_write(self.path / "request.json") as file:
            json.dump(request, file, indent=2)

    def spawn(self) -> None:
        """Start a worker that outlives this process."""
        with open(self.path / "log.txt", "ab") as log:
            self._worker = subprocess.Popen(
                [sys.executable, "-m", "ft_core.sft.worker", str(self.path / "request.json")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        _WORKERS.append(self._worker)

    def last_words(self) -> str:
        """Return the end of the worker's log."""
        log = self.path / "log.txt"
        if not log.exists():
            return ""
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"Its last words: {lines[-1]}" if lines else ""

    def _write(self, **changes: Any) -> None:
        state = {"created": _now(), "error": None, **self.state(), **changes}
        with atomic_write(self._state) as file:
            json.dump(state, file, indent=2)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat()
