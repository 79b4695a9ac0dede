"""Cohere's datasets and fine-tuning APIs as the engine needs them: retried, idempotent.

Cohere's API keeps no key of ours with a model, so a dataset's name carries it: a hash of the
data and of the settings. A model that was trained on that dataset is the job of these.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from ft_cohere_rerank.client import (
    NO_SUCH_CALL,
    ONCE,
    client_errors,
    has_coheres_shape,
    is_foreign,
    is_temporary,
    reason,
    server_of,
    token_of,
)
from ft_core.errors import TrainingError
from ft_core.jobs import Job, JobEvent, JobStatus
from ft_core.retries import RetryingService, ServiceUnavailableError, says_closed

if TYPE_CHECKING:
    import cohere

logger = logging.getLogger(__name__)

DATASET_TYPE: Any = "reranker-finetune-input"

DATASET_SECONDS = 1_800.0
"""How long a dataset may be validated before that counts as a failure."""

_PAGE = 50  # datasets or models in one answer
_STATUSES = {
    "STATUS_QUEUED": JobStatus.QUEUED,
    "STATUS_READY": JobStatus.SUCCEEDED,
    # Trained, and asleep: Cohere's words for a model that nobody asked for a while.
    "STATUS_PAUSED": JobStatus.SUCCEEDED,
    "STATUS_TEMPORARILY_OFFLINE": JobStatus.SUCCEEDED,
    "STATUS_FAILED": JobStatus.FAILED,
    "STATUS_DELETED": JobStatus.CANCELLED,
}
_GONE = ("list the models", "create the model")


class CohereService(RetryingService):
    """The datasets and fine-tuned rerank models of one account.

    Args:
        client: a `cohere.Client` or `cohere.ClientV2`.
        max_retries: tries after the first.
        sleep: how to pause, in seconds.
        hint: what to say where there is no fine-tuning any more.
    """

    def __init__(
        self,
        client: cohere.Client,
        *,
        max_retries: int,
        sleep: Callable[[float], None] = time.sleep,
        hint: str = "",
    ) -> None:
        super().__init__(max_retries=max_retries, sleep=sleep)
        self._client = client
        self._hint = hint

    @property
    def server(self) -> str:
        """The server's address, without a user or password in it."""
        return server_of(self._client)

    # Datasets

    def find_dataset(self, name: str) -> str | None:
        """Return the id of the dataset of that name, unless it failed to validate."""
        found = self._retried("list the datasets", self._datasets, name)
        return found[0] if found else None

    def upload(self, name: str, data: bytes, validation: bytes | None) -> str:
        """Send a dataset, once, and return its id."""
        given: dict[str, Any] = {"name": name, "type": DATASET_TYPE, "request_options": ONCE}
        given["data"] = ("train.jsonl", data, "application/jsonl")
        if validation is not None:
            given["eval_data"] = ("validation.jsonl", validation, "application/jsonl")
        return self._made_once(
            "upload the dataset",
            lambda: str(self._client.datasets.create(**given).id),
            lambda: self._retried("list the datasets", self._datasets, name),
            lambda ids: ids[0],
        )

    def dataset(self, dataset_id: str) -> Any:
        """Return the dataset as it stands; None where the server does not know it."""
        try:
            return self._retried(
                f"look at the dataset {dataset_id}",
                lambda: self._client.datasets.get(dataset_id, request_options=ONCE).dataset,
            )
        except TrainingError as error:
            if getattr(error.__cause__, "status_code", None) == 404:
                return None
            raise

    def is_usable(self, dataset_id: str) -> bool:
        """Whether the dataset is still there, as Cohere keeps it for 30 days, and not refused."""
        dataset = self.dataset(dataset_id)
        return dataset is not None and dataset.validation_status != "failed"

    def wait_for_dataset(self, dataset_id: str, seconds: float = DATASET_SECONDS) -> None:
        """Return once the dataset is validated; its warnings go to the log.

        Raises:
            TrainingError: it cannot be used, with the server's reason, or it takes longer.
        """
        waited, pause = 0.0, 0.5
        while True:
            dataset = self.dataset(dataset_id)
            if dataset is None:
                raise TrainingError(
                    f"{self.server} does not know the dataset {dataset_id} any more"
                )
            status = dataset.validation_status
            if status == "failed":
                said = dataset.validation_error or "it gives no reason"
                raise TrainingError(f"{self.server} refuses the dataset {dataset_id}: {said}")
            if status in ("validated", "skipped"):
                for warning in dataset.validation_warnings or ():
                    logger.warning("dataset %s: %s", dataset_id, warning)
                return
            if waited >= seconds:
                raise TrainingError(
                    f"the dataset {dataset_id} is {status} after {waited:.0f} s; call finetune() "
                    "again to wait on"
                )
            self._sleep(pause)
            waited += pause
            pause = min(pause * 1.5, 15.0)

    def _datasets(self, name: str) -> list[str]:
        """Return the ids of the usable datasets of that name, as the server orders them."""
        found: list[str] = []
        offset = 0
        while True:
            page = self._client.datasets.list(
                dataset_type=DATASET_TYPE, limit=_PAGE, offset=offset, request_options=ONCE
            )
            listed = page.datasets or []
            found += [
                str(each.id)
                for each in listed
                if each.name == name and each.validation_status != "failed"
            ]
            if len(listed) < _PAGE:
                return found
            offset += len(listed)

    # Models

    def job(self, job_id: str) -> Job | None:
        """Return the model as it stands; None where the server does not know it."""

        def look() -> Job:
            answer = self._client.finetuning.get_finetuned_model(job_id, request_options=ONCE)
            return as_job(answer.finetuned_model)

        try:
            return self._retried(f"look at the model {job_id}", look)
        except TrainingError as error:
            cause = error.__cause__
            # Where there is no such API at all, a 404 says nothing about the model.
            if getattr(cause, "status_code", None) == 404 and isinstance(
                getattr(cause, "body", None), Mapping
            ):
                return None
            raise

    def jobs(self) -> list[Job]:
        """Return the account's fine-tuned models."""
        return self._retried("list the models", self._models)

    def create(self, model: Any, find: Callable[[], list[Job]]) -> Job:
        """Create a model, exactly one.

        Args:
            model: the SDK's `FinetunedModel`.
            find: looks for the models that this very request has made.
        """

        def make() -> Job:
            answer = self._client.finetuning.create_finetuned_model(
                request=model, request_options=ONCE
            )
            return as_job(answer.finetuned_model)

        return self._made_once("create the model", make, find, self._oldest)

    def delete(self, job_id: str) -> None:
        """Delete the model; while it trains, that is how it is stopped."""
        self._retried(
            f"delete the model {job_id}",
            lambda: self._client.finetuning.delete_finetuned_model(job_id, request_options=ONCE),
        )

    def events(self, job_id: str) -> list[JobEvent]:
        """Return the model's changes of status and measurements, oldest first."""
        tuning = self._client.finetuning
        changes = self._retried(
            f"list the events of {job_id}",
            lambda: _all(tuning.list_events, "events", job_id),
        )
        measured = self._retried(
            f"list the metrics of {job_id}",
            lambda: _all(tuning.list_training_step_metrics, "step_metrics", job_id),
        )
        events = [_as_event(change) for change in changes]
        events += [_as_metric(step) for step in measured]
        return sorted(events, key=lambda event: event.time)

    def _models(self) -> list[Job]:
        listed = _all(self._client.finetuning.list_finetuned_models, "finetuned_models")
        return [as_job(model) for model in listed]

    def _oldest(self, jobs: list[Job]) -> Job:
        """Keep the oldest of the models that one request has made over a bad line."""
        first, *others = sorted(jobs, key=lambda job: (job.created is None, job.created, job.id))
        for extra in others:
            if not extra.status.ended:
                logger.warning("model %s was made twice; deleting %s", first.id, extra.id)
                self.delete(extra.id)
        return first

    # What `RetryingService` asks

    def _errors(self) -> tuple[type[Exception], ...]:
        return client_errors()

    def _is_temporary(self, error: Exception) -> bool:
        return is_temporary(error)

    def _secret(self) -> object:
        return token_of(self._client)

    def _translated(self, action: str, error: Exception) -> TrainingError:
        status, said = getattr(error, "status_code", None), self._redacted(reason(error))
        if isinstance(error, TypeError | AttributeError):
            return TrainingError(
                f"cannot {action}: {self.server} does not speak Cohere's API ({said}); check "
                "base_url"
            )
        if status is None:
            kind = ServiceUnavailableError if is_temporary(error) else TrainingError
            return kind(f"cannot {action}: no answer by {self.server} ({said})")
        if is_temporary(error):
            return ServiceUnavailableError(
                f"cannot {action}: {self.server} answers {status}: {said}"
            )
        gone = action in _GONE and status in NO_SUCH_CALL
        if _is_closed(status, said) or (gone and has_coheres_shape(error)):
            return TrainingError(
                f"fine-tuning is closed to this account at {self.server}: {said}. "
                f"{self._hint}".rstrip()
            )
        if gone or is_foreign(error):
            return TrainingError(
                f"cannot {action}: {self.server} does not speak Cohere's fine-tuning API "
                f"({status}: {said}); check base_url. If that is right, fine-tuning is closed "
                f"there. {self._hint}".rstrip()
            )
        return TrainingError(f"cannot {action}: {self.server} rejects it ({status}): {said}")


def _is_closed(status: int, said: str) -> bool:
    """Whether the server says that this account may not fine-tune at all."""
    if status not in (400, 403, *NO_SUCH_CALL):
        return False
    return "dataset type is invalid" in said or says_closed(said)


def _all(call: Callable[..., Any], field: str, *arguments: str) -> list[Any]:
    """Return what all pages of a list hold."""
    items: list[Any] = []
    token: str | None = None
    while True:
        page = call(*arguments, page_size=_PAGE, page_token=token, request_options=ONCE)
        items += getattr(page, field) or []
        token = page.next_page_token
        if not token:
            return items


def as_job(model: Any) -> Job:
    """Return the SDK's fine-tuned model as a job; rerank knows it as "<id>-ft".

    Raises:
        AttributeError: it is no model, or has no id.
    """
    if not model.id:
        raise AttributeError("id")
    status = _STATUSES.get(str(model.status), JobStatus.RUNNING)
    ready = status is JobStatus.SUCCEEDED
    return Job(
        id=str(model.id),
        status=status,
        model=f"{model.id}-ft" if ready else None,
        error="Cohere gives no reason" if status is JobStatus.FAILED else None,
        created=_as_time(model.created_at),
        finished=_as_time(model.completed_at),
        raw=model,
    )


def _as_event(event: Any) -> JobEvent:
    status = str(event.status)
    level = "error" if status == "STATUS_FAILED" else "info"
    message = status.removeprefix("STATUS_").replace("_", " ").lower()
    return JobEvent(_as_time(event.created_at) or _now(), level, f"the model is {message}")


def _as_metric(step: Any) -> JobEvent:
    values = dict(step.metrics or {})
    shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    return JobEvent(
        _as_time(step.created_at) or _now(),
        "info",
        f"step {step.step_number}: {shown}",
        {"step": step.step_number, **values},
    )


def _as_time(moment: datetime | None) -> datetime | None:
    if moment is None or moment.tzinfo is not None:
        return moment
    return moment.replace(tzinfo=timezone.utc)


def _now() -> datetime:
    return datetime.now(timezone.utc)
