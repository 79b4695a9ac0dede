"""Fine-tuning jobs: one interface, whether a service trains or this machine does.

`JobEngine` is what the engines share: start a job or find the one started before, wait for it,
watch it, cancel it. `JobRecord` is the file that lets a process find its job again.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

from tqdm import tqdm
from typing_extensions import Self

from ft_core.errors import ArtifactError, DatasetError, TrainingError
from ft_core.files import atomic_write, read_json

try:  # POSIX only: without it, only threads of one process wait for each other
    import fcntl
except ImportError:  # pragma: no cover
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

POLL_SECONDS = (1.0, 30.0)
"""The first and the longest pause between two looks at a job."""

_GROWTH = 1.5  # of the pauses
_TEMPORARY_STATUS = (408, 409, 425, 429)


class JobStatus(str, Enum):
    """Where a job stands; the words are those of OpenAI's API."""

    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether the job will not change any more."""
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


@dataclass(frozen=True)
class JobEvent:
    """Something that a job reported."""

    time: datetime
    level: str
    """`info`, `warn` or `error`."""
    message: str
    data: dict[str, Any] = field(default_factory=dict)
    """Numbers of a metric: `step`, `train_loss`, `valid_loss` and others; empty else."""


@dataclass(frozen=True)
class Job:
    """One look at a job; ask the engine again for a newer one."""

    id: str
    status: JobStatus
    model: str | None = None
    """The trained model: its name at the service, or its folder. None until there is one."""
    error: str | None = None
    """Why it failed, in the service's words."""
    created: datetime | None = None
    finished: datetime | None = None
    trained_tokens: int | None = None
    raw: Any = field(default=None, repr=False, compare=False)
    """What the service's own client returned."""


class WaitTimeoutError(TrainingError, TimeoutError):
    """`wait` gave up waiting; the job itself goes on."""


def open_lock(path: Path, *, wait: bool = True) -> int | None:
    """Lock a file against other processes and threads, by a lock file beside it.

    The operating system frees the lock when the process dies.

    Args:
        path: the file, which need not exist; its folder is made.
        wait: until nobody else holds the lock.

    Returns:
        The descriptor, to be closed where the lock is to end; None where another one holds it.

    Raises:
        OSError: the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:  # Ctrl-C while it waits
        os.close(descriptor)
        raise
    return descriptor


class JobRecord:
    """A small JSON file that remembers which jobs were started, through any crash.

    An engine writes what it is about to pay for before it does, and the id right after: a
    process that finds an intent without an id asks the service before it starts another job.
    Keys and values are the engine's; no secret belongs in them.

    Args:
        path: the file; made at the first `update`. A lock file stands beside it.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._thread_lock = threading.RLock()
        self._depth = 0

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes and threads out of this record; may be nested.

        The operating system frees the lock when the process dies.

        Raises:
            ArtifactError: the folder cannot be written to.
        """
        with self._thread_lock:
            descriptor = None if self._depth else self._acquire()
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if descriptor is not None:
                    os.close(descriptor)

    def read(self, key: str) -> dict[str, Any]:
        """Return what is known of `key`; empty when nothing is.

        Raises:
            ArtifactError: the file is damaged or not a record.
        """
        return dict(self._entries().get(key, {}))

    def update(self, key: str, **values: Any) -> None:
        """Add to what is known of `key`, on disk before this returns.

        Raises:
            ArtifactError: the file cannot be written, or is damaged.
        """
        with self.locked():
            entries = self._entries()
            entries[key] = {**entries.get(key, {}), **values}
            try:
                with atomic_write(self.path) as file:
                    file.write(_record_text(entries))
            except OSError as error:
                raise self._unwritable(error) from error

    def _entries(self) -> dict[str, dict[str, Any]]:
        if not self.path.exists():
            return {}
        try:
            content = read_json(self.path)
        except DatasetError as error:
            # Never taken for an empty one: that could pay for a job twice.
            raise ArtifactError(f"{error}; move the file away to start without it") from None
        entries = content.get("entries") if isinstance(content, dict) else None
        if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
            raise ArtifactError(
                f"{self.path}: is not a record of jobs; name another file as job_file"
            )
        return entries

    def _acquire(self) -> int:
        try:
            descriptor = open_lock(self.path)
        except OSError as error:
            raise self._unwritable(error) from error
        assert descriptor is not None  # it waited
        return descriptor

    def _unwritable(self, error: OSError) -> ArtifactError:
        return ArtifactError(
            f"{self.path}: cannot be written ({error.strerror}); without it a job could be "
            "started twice. Make room, or name another file as job_file"
        )


def _record_text(entries: dict[str, dict[str, Any]]) -> str:
    return json.dumps({"format": 1, "entries": entries}, ensure_ascii=False, indent=2) + "\n"


def job_file_of(data: Any, name: str) -> Path:
    """Return where jobs on some data are remembered: beside its file, ending in `.jobs.json`.

    Args:
        data: a path; of anything else, the file is in LlamaIndex's cache folder.
        name: of the folder there.
    """
    if isinstance(data, str | Path):
        path = Path(data)
        return path.with_name(f"{path.name}.jobs.json")
    from llama_index.core.utils import get_cache_dir

    return Path(get_cache_dir()) / name / "jobs.json"


class JobEngine(ABC):
    """Base of the engines whose training is a job that can be left and found again.

    A subclass gives the primitives at the end of this class. `finetune` starts a job, or
    attaches to the one that an earlier call or process started with the same data and
    settings: while it runs and once it has succeeded; a failed or cancelled one is started
    anew.

    Args:
        job_id: a job that exists already.
        record: where jobs are remembered; None remembers them in this object only.
        show_progress: a line while waiting; only ever shown on a terminal.
        poll_seconds: the first and the longest pause between two looks at the job.
        sleep: how to pause, in seconds.
    """

    def __init__(
        self,
        *,
        job_id: str | None = None,
        record: JobRecord | None = None,
        show_progress: bool = True,
        poll_seconds: tuple[float, float] = POLL_SECONDS,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.job_id = job_id
        self.show_progress = show_progress
        self._record = record
        self._poll_seconds = poll_seconds
        self._sleep = sleep
        self._started_for: str | None = None  # fingerprint of what `job_id` was started for
        self._logged: set[tuple[Any, ...]] = set()
        self._silent = False  # whether the service has stopped answering

    def finetune(self, wait: bool = True, timeout: float | None = None) -> Job:
        """Start the job, or find the one that was started before, and wait for its end.

        Args:
            wait: False returns as soon as the job is there.
            timeout: seconds to wait at most; see `wait`.

        Raises:
            DatasetError, ArgumentError: the data or a setting cannot be used; nothing was
                started.
            TrainingError: the job was refused, failed or was cancelled; says why.
        """
        job = self._start()
        return self.wait(timeout) if wait else job

    def get_current_job(self) -> Job:
        """Return the job as it stands now.

        Raises:
            TrainingError: no job was started.
        """
        return self._retrieve(self._known_job_id())

    def events(self) -> list[JobEvent]:
        """Return what the job has reported so far, oldest first."""
        return self._list_events(self._known_job_id())

    def cancel(self) -> Job:
        """Stop the job; one that has ended stays as it is."""
        job = self.get_current_job()
        return job if job.status.ended else self._cancel(job.id)

    def wait(self, timeout: float | None = None) -> Job:
        """Return the job once it has succeeded; its events are logged at INFO, each once.

        A service that does not answer for a while is asked again: only `timeout` ends the
        waiting.

        Args:
            timeout: seconds to wait at most; None waits for as long as it takes.

        Raises:
            TrainingError: the job failed or was cancelled; with the service's reason.
            WaitTimeoutError: the time is over. The job goes on; call `wait` again.
        """
        job_id = self._known_job_id()
        with tqdm(
            desc=f"job {job_id}",
            bar_format="{desc} [{elapsed}]",
            disable=None if self.show_progress else True,
            leave=False,
        ) as line:
            try:
                job = self._until_ended(job_id, timeout, line)
            except KeyboardInterrupt:
                logger.warning("%s", self._goes_on(job_id))
                raise
        return self._succeeded(job)

    @classmethod
    @abstractmethod
    def from_job_id(cls, job_id: str, **settings: Any) -> Self:
        """Return an engine for a job that exists; its data is not needed."""

    @abstractmethod
    def get_finetuned_model(self, **kwargs: Any) -> Any:
        """Return the trained model as the LlamaIndex object that an app takes.

        Raises:
            TrainingError: the job has not succeeded; names its status.
        """

    # What a subclass gives.

    @abstractmethod
    def _submit(self) -> Job:
        """Start a new job; one process at a time where there is a record."""

    @abstractmethod
    def _retrieve(self, job_id: str) -> Job: ...

    @abstractmethod
    def _list_events(self, job_id: str) -> list[JobEvent]:
        """Return the job's events, oldest first."""

    @abstractmethod
    def _cancel(self, job_id: str) -> Job: ...

    @abstractmethod
    def _fingerprint(self) -> str:
        """Return a hash of the data, the model, the settings and the server; no secrets."""

    def _job_record(self) -> JobRecord | None:
        return self._record

    def _tell(self, message: str) -> None:
        """Report what happens to the job."""
        logger.info("%s", message)

    def _is_temporary(self, error: Exception) -> bool:
        """Whether the same request may succeed a little later."""
        if isinstance(error, ConnectionError | TimeoutError):
            return True
        status = getattr(error, "status_code", None)
        return isinstance(status, int) and (status >= 500 or status in _TEMPORARY_STATUS)

    # What it can use.

    def _finished_job(self) -> Job:
        """Return the current job, whose model is there.

        Raises:
            TrainingError: the job has not succeeded; names its status.
        """
        job = self._succeeded(self.get_current_job())
        if job.model is None:
            raise TrainingError(f"job {job.id} has succeeded but names no model")
        return job

    def _start(self) -> Job:
        if self.job_id is not None and self._started_for is None:  # the caller named it
            job = self._retrieve(self.job_id)
            if self._may_attach(job):
                return job
        record, fingerprint = self._job_record(), self._fingerprint()
        with nullcontext() if record is None else record.locked():
            job = self._earlier_job(record, fingerprint) or self._submit()
            self.job_id, self._started_for = job.id, fingerprint
            try:
                if record is not None:
                    record.update(fingerprint, job_id=job.id)
            except ArtifactError as error:  # the job is paid for: keep it
                logger.warning("job %s was started but not recorded: %s", job.id, error)
        return job

    def _earlier_job(self, record: JobRecord | None, fingerprint: str) -> Job | None:
        """Return the job of the same data and settings, unless it failed or was cancelled."""
        job_id = self.job_id if self._started_for == fingerprint else None
        if job_id is None and record is not None:
            job_id = record.read(fingerprint).get("job_id")
        if job_id is None:
            return None
        try:
            job = self._retrieve(job_id)
        except TrainingError as error:
            if record is None or self._is_temporary(error):
                raise
            raise TrainingError(f"{error}. To start another, remove {record.path}") from error
        return job if self._may_attach(job) else None

    def _may_attach(self, job: Job) -> bool:
        if job.status in (JobStatus.FAILED, JobStatus.CANCELLED):
            self._tell(f"job {job.id} has the status {job.status.value}; starting another")
            return False
        self._tell(f"job {job.id} was started before and has the status {job.status.value}")
        return True

    def _known_job_id(self) -> str:
        if self.job_id is None:
            raise TrainingError("no job yet: call finetune(), or from_job_id() for an earlier one")
        return self.job_id

    def _until_ended(self, job_id: str, timeout: float | None, line: Any) -> Job:
        deadline = None if timeout is None else time.monotonic() + timeout
        pause, longest = self._poll_seconds
        while True:
            job = self._look(job_id, line)
            if job is not None and job.status.ended:
                return job
            if deadline is not None and (left := deadline - time.monotonic()) < pause:
                if left > 0:
                    self._sleep(left)
                    job = self._look(job_id, line)
                if job is not None and job.status.ended:
                    return job
                status = "unknown" if job is None else job.status.value
                raise WaitTimeoutError(
                    f"job {job_id} has not ended after {timeout:g} s (status {status}). "
                    + self._goes_on(job_id)
                )
            self._sleep(pause)
            pause = min(pause * _GROWTH, longest)

    def _look(self, job_id: str, line: Any) -> Job | None:
        """Return the job and log its new events; None when the service does not answer."""
        try:
            job = self._retrieve(job_id)
            events = self._list_events(job_id)
        except Exception as error:
            if not self._is_temporary(error):
                raise
            if not self._silent:
                logger.warning("no answer about job %s, asking on: %s", job_id, error)
            self._silent = True
            line.set_description_str(f"job {job_id}: no answer")
            return None
        self._silent = False
        for event in events:
            self._log(event)
        line.set_description_str(_progress_text(job, events))
        return job

    def _log(self, event: JobEvent) -> None:
        if (key := _key(event)) not in self._logged:
            self._logged.add(key)
            self._tell(event.message)

    def _take_as_told(self, job_id: str) -> None:
        """Log nothing of what the job has reported so far, to an earlier process."""
        self._logged.update(map(_key, self._list_events(job_id)))

    def _succeeded(self, job: Job) -> Job:
        if job.status is JobStatus.SUCCEEDED:
            return job
        if not job.status.ended:
            raise TrainingError(
                f"job {job.id} is not done: its status is {job.status.value}; call wait()"
            )
        reason = f": {job.error}" if job.error else ""
        verb = "failed" if job.status is JobStatus.FAILED else "was cancelled"
        raise TrainingError(f"job {job.id} {verb}{reason}")

    def _goes_on(self, job_id: str) -> str:
        return (
            f"The job goes on; wait() again, or later "
            f"{type(self).__name__}.from_job_id({job_id!r}).wait()"
        )


def _key(event: JobEvent) -> tuple[Any, ...]:
    return event.time, event.level, event.message, repr(sorted(event.data.items()))


def _progress_text(job: Job, events: list[JobEvent]) -> str:
    text = f"job {job.id}: {job.status.value}"
    metric = next((event.data for event in reversed(events) if "train_loss" in event.data), None)
    if metric is None:
        return text
    step = f", step {metric['step']}" if "step" in metric else ""
    return f"{text}{step}, loss {float(metric['train_loss']):.4f}"
