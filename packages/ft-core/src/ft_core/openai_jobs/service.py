"""OpenAI's fine-tuning API as the engines need it: retried, idempotent, one kind of error.

Every request is repeated after 408, 409, 429, 5xx, timeouts and lost connections, as late as
the server's Retry-After says; what it rejects is raised at once, in its own words. Files and
jobs carry names of ours, so that what an earlier process sent is found and not sent again.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from ft_core.errors import TrainingError
from ft_core.jobs import Job, JobEvent, JobStatus
from ft_core.retries import (
    TEMPORARY_STATUS,
    RetryingService,
    ServiceUnavailableError,
    says_closed,
)

if TYPE_CHECKING:
    import openai

logger = logging.getLogger(__name__)

JOB_KEY = "ft_job"
"""Name of the job's metadata entry that holds our `<fingerprint>.<attempt>`."""

FILE_SECONDS = 600.0
"""How long a file may be processed before a job is tried with it as it is."""

_STATUSES = {
    # As OpenAI does not say, and Azure and others do.
    "canceled": JobStatus.CANCELLED,
    "pending": JobStatus.QUEUED,
    "notRunning": JobStatus.QUEUED,
}
_PERMISSION = re.compile(r"permission|not allowed|access|not authori[sz]ed")


@dataclass(frozen=True)
class Checkpoint:
    """A model as it was at some step of the training, ready to use."""

    model: str
    """Its name at the service, for `get_finetuned_model(model=...)`."""
    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    """`train_loss`, `valid_loss` and others, those that the service measured."""


class OpenAIService(RetryingService):
    """The files and fine-tuning jobs of one account.

    Args:
        client: an `openai.OpenAI` or `openai.AzureOpenAI`.
        max_retries: tries after the first.
        sleep: how to pause, in seconds.
        local_hint: what to say where fine-tuning is closed to the account.
    """

    def __init__(
        self,
        client: openai.OpenAI,
        *,
        max_retries: int,
        sleep: Callable[[float], None] = time.sleep,
        local_hint: str = "",
    ) -> None:
        super().__init__(max_retries=max_retries, sleep=sleep)
        # Retried here: the client would repeat a job's creation, and calls without quota.
        self._client = client.with_options(max_retries=0)
        self._local_hint = local_hint
        self._events: dict[str, dict[str, JobEvent]] = {}

    @property
    def server(self) -> str:
        """The server's address, without a user or password in it."""
        url = self._client.base_url
        return str(url.copy_with(username=None, password=None, query=None))

    @property
    def account(self) -> list[str | None]:
        """Organization and project, where they were given."""
        return [self._client.organization, self._client.project]

    # Files

    def file_status(self, file_id: str) -> str | None:
        """Return the file's status; None where the server does not know the file.

        Raises:
            TrainingError: the file cannot be used; with the server's reason.
        """
        import openai

        try:
            file = self._retried(
                f"look at the file {file_id}", self._client.files.retrieve, file_id
            )
        except TrainingError as error:
            if isinstance(error.__cause__, openai.NotFoundError):
                return None
            raise
        status = getattr(file, "status", None) or "processed"
        if status in ("error", "failed"):
            details = getattr(file, "status_details", None) or "it gives no reason"
            raise TrainingError(f"{self.server} refuses the file {file_id}: {details}")
        return str(status)

    def find_file(self, name: str, size: int) -> str | None:
        """Return the id of the usable training file of that name and size, if there is one."""

        def find() -> str | None:
            for file in self._client.files.list(purpose="fine-tune"):
                usable = getattr(file, "status", None) not in ("error", "failed", "deleted")
                if file.filename == name and file.bytes == size and usable:
                    return str(file.id)
            return None

        try:
            return self._retried("list the files", find)
        except ServiceUnavailableError:
            raise
        except TrainingError:  # not every compatible server lists files
            logger.debug("files cannot be listed at %s", self.server, exc_info=True)
            return None

    def upload(self, name: str, content: bytes) -> str:
        """Send a training file and return its id."""
        file = self._retried(
            f"upload {name}",
            lambda: self._client.files.create(file=(name, content), purpose="fine-tune"),
        )
        return str(file.id)

    def wait_for_file(self, file_id: str, seconds: float = FILE_SECONDS) -> None:
        """Return once the file is processed, or is taking longer than `seconds`."""
        waited, pause = 0.0, 0.5
        while (status := self.file_status(file_id)) not in ("processed", None):
            if waited >= seconds:
                logger.warning("file %s is %s after %.0f s; trying it", file_id, status, waited)
                return
            self._sleep(pause)
            waited += pause
            pause = min(pause * 1.5, 15.0)
        if status is None:
            raise TrainingError(f"{self.server} does not know the file {file_id} any more")

    # Jobs

    def job(self, job_id: str) -> Job:
        """Return the job as it stands."""
        import openai

        try:
            return as_job(
                self._retried(
                    f"look at the job {job_id}", self._client.fine_tuning.jobs.retrieve, job_id
                )
            )
        except TrainingError as error:
            if isinstance(error.__cause__, openai.NotFoundError):
                raise TrainingError(
                    f"{error} (a job of another account or server, or deleted)"
                ) from error.__cause__
            raise

    def jobs(self) -> list[Job]:
        """Return all jobs of the account, as the server orders them.

        Raises:
            TrainingError: the server does not list jobs.
        """
        listed = self._retried("list the jobs", lambda: [*self._client.fine_tuning.jobs.list()])
        return [as_job(job) for job in listed]

    def create(self, request: Mapping[str, Any], find: Callable[[], list[Job]]) -> Job:
        """Create a job, exactly one.

        Args:
            request: the arguments of `fine_tuning.jobs.create`.
            find: looks for the jobs that this very request has made; asked where no answer
                came, because the job may be there all the same.
        """
        return self._made_once(
            "create the job",
            lambda: as_job(self._client.fine_tuning.jobs.create(**request)),
            find,
            self._oldest,
        )

    def cancel(self, job_id: str) -> Job:
        """Cancel the job."""
        return as_job(
            self._retried(f"cancel the job {job_id}", self._client.fine_tuning.jobs.cancel, job_id)
        )

    def events(self, job_id: str) -> list[JobEvent]:
        """Return the job's events, oldest first; those seen before are not asked for again."""
        known = self._events.setdefault(job_id, {})

        def newer() -> dict[str, JobEvent]:
            found: dict[str, JobEvent] = {}
            for event in self._client.fine_tuning.jobs.list_events(job_id, limit=100):
                if event.id in known:  # the newest come first
                    break
                found[event.id] = _as_event(event)
            return found

        found = self._retried(f"list the events of {job_id}", newer)
        known.update(reversed(found.items()))
        return list(known.values())

    def checkpoints(self, job_id: str) -> list[Checkpoint]:
        """Return the job's checkpoints by their steps."""
        listed = self._retried(
            f"list the checkpoints of {job_id}",
            lambda: [*self._client.fine_tuning.jobs.checkpoints.list(job_id)],
        )
        return sorted((_as_checkpoint(item) for item in listed), key=lambda item: item.step)

    def _oldest(self, jobs: list[Job]) -> Job:
        """Keep the oldest of the jobs that one request has made over a bad line."""
        first, *others = sorted(jobs, key=lambda job: (job.created is None, job.created, job.id))
        for extra in others:
            if not extra.status.ended:
                logger.warning("job %s was made twice; cancelling %s", first.id, extra.id)
                self.cancel(extra.id)
        return first

    # What `RetryingService` asks

    def _errors(self) -> tuple[type[Exception], ...]:
        import openai

        return (openai.OpenAIError,)

    def _is_temporary(self, error: Exception) -> bool:
        return is_temporary(error)

    def _secret(self) -> object:
        return self._client.api_key

    def _translated(self, action: str, error: Exception) -> TrainingError:
        import openai

        if not isinstance(error, openai.APIStatusError):
            kind = ServiceUnavailableError if is_temporary(error) else TrainingError
            return kind(f"cannot {action}: no answer by {self.server} ({self._redacted(error)})")
        reason = self._redacted(_reason(error))
        if is_temporary(error):
            return ServiceUnavailableError(
                f"cannot {action}: {self.server} answers {error.status_code}: {reason}"
            )
        if is_closed(error):
            return TrainingError(
                f"fine-tuning is closed to this account at {self.server}: {reason}. "
                f"{self._local_hint}".rstrip()
            )
        return TrainingError(
            f"cannot {action}: {self.server} rejects it ({error.status_code}): {reason}"
        )


def is_temporary(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    import openai

    if isinstance(error, openai.APIStatusError):
        if "insufficient_quota" in (error.code, error.type):
            return False
        return error.status_code in TEMPORARY_STATUS or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError | ServiceUnavailableError)


def is_closed(error: openai.APIStatusError) -> bool:
    """Whether the server says that this account may not fine-tune at all."""
    if error.status_code not in (400, 403, 404):
        return False
    text = f"{error.code or ''} {_reason(error)}".lower().replace("_", " ").replace("-", " ")
    about_model = "model" in (error.code or "") or error.param == "model"
    if "fine tun" in text.replace("finetun", "fine tun"):
        return not about_model and says_closed(text)
    return error.status_code == 403 and _PERMISSION.search(text) is not None


def as_job(job: Any) -> Job:
    """Return the SDK's job as ours; compatible servers leave fields out."""
    error = getattr(job, "error", None)
    message = getattr(error, "message", None)
    code = getattr(error, "code", None)
    return Job(
        id=job.id,
        status=_as_status(job.status),
        model=getattr(job, "fine_tuned_model", None),
        error=f"{message} ({code})" if message and code else message or code,
        created=_as_time(getattr(job, "created_at", None)),
        finished=_as_time(getattr(job, "finished_at", None)),
        trained_tokens=getattr(job, "trained_tokens", None),
        raw=job,
    )


def _as_status(status: str) -> JobStatus:
    try:
        return _STATUSES.get(status) or JobStatus(status)
    except ValueError:  # `paused` and whatever else comes: it has not ended
        return JobStatus.RUNNING


def _as_event(event: Any) -> JobEvent:
    data = getattr(event, "data", None)
    return JobEvent(
        time=_as_time(event.created_at) or datetime.now(timezone.utc),
        level=event.level,
        message=event.message,
        data=dict(data) if isinstance(data, Mapping) else {},
    )


def _as_checkpoint(item: Any) -> Checkpoint:
    metrics = item.metrics.model_dump(exclude_none=True) if item.metrics else {}
    return Checkpoint(item.fine_tuned_model_checkpoint, item.step_number, metrics)


def _as_time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, timezone.utc)


def _reason(error: openai.APIStatusError) -> str:
    body = error.body if isinstance(error.body, Mapping) else {}
    message = body.get("message")
    return str(message) if message else error.message
