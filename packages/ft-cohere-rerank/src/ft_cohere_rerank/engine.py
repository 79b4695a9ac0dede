"""Fine-tune Cohere's reranker at Cohere, or at a private deployment of it."""

from __future__ import annotations

import re
import shlex
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from ft_cohere_rerank.client import (
    check_timeout,
    check_url,
    find_key,
    token_of,
    url_argument,
)
from ft_cohere_rerank.dataset import CohereRerankerFile
from ft_core.datasets.rerank import RerankDataset
from ft_core.errors import ArgumentError, TrainingError
from ft_core.files import content_hash
from ft_core.jobs import POLL_SECONDS, Job, JobEngine, JobEvent, JobRecord, JobStatus, job_file_of
from ft_core.retries import ServiceUnavailableError

if TYPE_CHECKING:
    import cohere
    from llama_index.postprocessor.cohere_rerank import CohereRerank

    from ft_cohere_rerank.cohere_service import CohereService

BASE_MODELS = ("english", "multilingual")
HYPERPARAMETERS = (
    "train_epochs",
    "learning_rate",
    "train_batch_size",
    "early_stopping_patience",
    "early_stopping_threshold",
)
"""What Cohere lets one set for a reranker."""

_JOB_ID = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)  # what can stand in a path, as it is


class CohereRerankerFinetuneEngine(JobEngine):
    """Train a hosted reranker on queries with relevant passages and hard negatives.

    The first six arguments are those of `llama_index.finetuning`. The constructor only keeps
    them: `finetune` reads and checks the data, uploads it, creates the model and waits.

    One set of data and settings is one job. `finetune` finds the job that an earlier call made,
    in this process, in one that was killed, or on another machine with the same account: it
    attaches to a running one and returns a finished one. To train again all the same, change
    the `model_name`.

    Cohere closed fine-tuning to most accounts in September 2025; the error where it refuses
    names the way that is left: a teacher's scores and a reranker of your own.

    Args:
        train_file_name: Cohere's training file, as `generate_cohere_reranker_finetuning_dataset`
            writes it; or the `CohereRerankerFile` itself, or a `RerankDataset` with labels.
        val_file_name: held-out data in the same forms; without it Cohere holds a part out.
        model_name: the name of the trained model in Cohere's lists.
        model_type: "RERANK", the only type that this engine trains.
        base_model: "english" or "multilingual".
        api_key: `COHERE_API_KEY` or `CO_API_KEY` by default. It is never written anywhere.
        hyperparameters: see `HYPERPARAMETERS`; Cohere chooses the others.
        check_limits: check the data against Cohere's limits before anything is sent.
        base_url: the API of another server; the client's default is Cohere's.
        client: a `cohere.Client` or `cohere.ClientV2` to use instead of the two above.
        job_file: where jobs are remembered; beside the data by default, with the ending
            `.jobs.json`. It belongs to the data: keep both, and a job is found again.
        max_retries: tries after the first of a request that the service could not take.
        timeout: seconds until a request without an answer is repeated.
        show_progress: a line while waiting; only ever shown on a terminal.
        poll_seconds: the first and the longest pause between two looks at the job.
        sleep: how to pause, in seconds.
    """

    def __init__(
        self,
        train_file_name: str | Path | CohereRerankerFile | RerankDataset | None = "train.jsonl",
        val_file_name: str | Path | CohereRerankerFile | RerankDataset | None = None,
        model_name: str = "exp_finetune",
        model_type: str = "RERANK",
        base_model: str = "english",
        api_key: str | None = None,
        *,
        hyperparameters: Mapping[str, float] | None = None,
        check_limits: bool = True,
        base_url: str | None = None,
        client: cohere.Client | None = None,
        job_file: str | Path | None = None,
        max_retries: int = 5,
        timeout: float = 120.0,
        show_progress: bool = True,
        poll_seconds: tuple[float, float] = POLL_SECONDS,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(show_progress=show_progress, poll_seconds=poll_seconds, sleep=sleep)
        _check_settings(model_type, base_model, hyperparameters or {}, max_retries)
        check_url(base_url)
        check_timeout(timeout)
        if not model_name.strip():
            raise ArgumentError("model_name", "is empty")
        self.train_file_name = train_file_name
        self.val_file_name = val_file_name
        self.model_name = model_name
        self.base_model = base_model
        self.hyperparameters = dict(hyperparameters or {})
        self.check_limits = check_limits
        self.base_url = base_url
        self.job_file = job_file
        self.max_retries = max_retries
        self.timeout = timeout
        self._api_key = api_key
        self._client = client
        self._connected: CohereService | None = None
        self._files: list[CohereRerankerFile] = []

    @classmethod
    def from_job_id(cls, job_id: str, **settings: Any) -> Self:
        """Return an engine for a job that exists; its data is not needed.

        Args:
            job_id: Cohere's id of the model, without "-ft".
            settings: where it is: `base_url`, `api_key`, `client` and the like.

        Raises:
            ArgumentError: that is no id.
        """
        if not _JOB_ID.fullmatch(job_id):
            raise ArgumentError(
                "job_id", f"is the id that `train` shows: letters, digits and -, not {job_id!r:.80}"
            )
        engine = cls(settings.pop("train_file_name", None), **settings)
        engine.job_id = job_id.removesuffix("-ft")
        return engine

    def get_finetuned_model(self, top_n: int = 5, **kwargs: Any) -> CohereRerank:
        """Return LlamaIndex's `CohereRerank` on the trained model.

        Args:
            top_n: how many nodes it keeps.
            kwargs: further arguments of the class; they win.

        Raises:
            TrainingError: the job has not succeeded; names its status.
        """
        from llama_index.postprocessor.cohere_rerank import CohereRerank

        settings: dict[str, Any] = {"model": self._finished_job().model, "top_n": top_n}
        if self._client is not None:
            settings["api_key"] = token_of(self._client) or "none"
        else:
            settings |= {"api_key": self._key(), "base_url": self.base_url}
        reranker = CohereRerank(**(settings | kwargs))
        if self._client is not None and not {"api_key", "base_url"} & kwargs.keys():
            reranker._client = self._client.v2
        return reranker

    # The primitives of a job

    def _submit(self) -> Job:
        record, fingerprint = self._job_record(), self._fingerprint_of(self._files)
        service, name = self._service, self._dataset_name(fingerprint)
        listed = service.jobs()
        dataset_id = record.read(fingerprint).get("dataset_id") or service.find_dataset(name)
        if dataset_id is not None and (job := _live(_on(listed, dataset_id))) is not None:
            self._tell(f"job {job.id} of the same data and settings is {job.status.value}")
            return job
        if dataset_id is None or not service.is_usable(dataset_id):
            dataset_id = self._upload(name)
        record.update(fingerprint, job_id=None, dataset_id=dataset_id, model=self.model_name)
        service.wait_for_dataset(dataset_id)
        earlier = {job.id for job in listed}
        job = service.create(
            self._request(dataset_id),
            lambda: [j for j in _on(service.jobs(), dataset_id) if j.id not in earlier],
        )
        self._tell(f"job {job.id} trains {self.base_model} on {dataset_id}")
        return job

    def _retrieve(self, job_id: str) -> Job:
        job = self._service.job(job_id)
        if job is not None:
            return job
        if job_id == self.job_id and self._started_for is None:  # the caller named it
            raise TrainingError(
                f"{self._service.server} does not know the model {job_id} (of another account or "
                "server, or deleted)"
            )
        return Job(job_id, JobStatus.CANCELLED, error="it was deleted")

    def _list_events(self, job_id: str) -> list[JobEvent]:
        if self._service.job(job_id) is None:  # deleted: its events went with it
            return []
        return self._service.events(job_id)

    def _cancel(self, job_id: str) -> Job:
        # Cohere knows no other way to stop a training.
        job = self._retrieve(job_id)
        self._service.delete(job_id)
        return replace(job, status=JobStatus.CANCELLED, model=None)

    def _is_temporary(self, error: Exception) -> bool:
        return isinstance(error, ServiceUnavailableError) or super()._is_temporary(error)

    def _fingerprint(self) -> str:
        self._files = [_loaded("train_file_name", self.train_file_name)]
        if self.val_file_name is not None:
            self._files.append(_loaded("val_file_name", self.val_file_name))
        return self._fingerprint_of(self._files)

    def _job_record(self) -> JobRecord:
        if self._record is None:
            self._record = JobRecord(
                self.job_file or job_file_of(self.train_file_name, "ft-cohere-rerank")
            )
        return self._record

    # The data and the request

    def _upload(self, name: str) -> str:
        for index, file in enumerate(self._files):
            source = self.val_file_name if index else self.train_file_name
            if self.check_limits:
                path = source if isinstance(source, str | Path) else None
                file.check_limits(validation=bool(index), path=path)
        contents = [
            "".join(entry.to_jsonl() for entry in file.examples).encode() for file in self._files
        ]
        size = sum(map(len, contents))
        self._tell(f"uploading {len(self._files[0])} queries ({size:,} bytes)")
        return self._service.upload(name, contents[0], contents[1] if contents[1:] else None)

    def _request(self, dataset_id: str) -> Any:
        from cohere.finetuning.finetuning.types import (
            BaseModel,
            FinetunedModel,
            Hyperparameters,
            Settings,
        )

        numbers: dict[str, Any] = self.hyperparameters
        settings: dict[str, Any] = {
            "base_model": BaseModel(name=self.base_model, base_type="BASE_TYPE_RERANK"),
            "dataset_id": dataset_id,
        }
        if numbers:
            settings["hyperparameters"] = Hyperparameters(**numbers)
        return FinetunedModel(name=self.model_name, settings=Settings(**settings))

    def _fingerprint_of(self, files: list[CohereRerankerFile]) -> str:
        return content_hash(
            {
                "server": self._service.server,
                "files": [file.content_hash for file in files],
                "model_name": self.model_name,
                "base_model": self.base_model,
                "hyperparameters": self.hyperparameters,
            }
        )

    def _dataset_name(self, fingerprint: str) -> str:
        stem = re.sub(r"[^a-z0-9]+", "-", self.model_name.lower()).strip("-")[:20] or "rerank"
        return f"{stem}-{fingerprint[:20]}"  # Cohere takes fewer than 50 characters

    # The service

    @property
    def _service(self) -> CohereService:
        if self._connected is None:
            from ft_cohere_rerank.cohere_service import CohereService

            self._connected = CohereService(
                self._client or self._make_client(),
                max_retries=self.max_retries,
                sleep=self._sleep,
                hint=self._hint(),
            )
        return self._connected

    def _make_client(self) -> cohere.Client:
        import cohere

        url = url_argument(self.base_url)
        client = cohere.Client(api_key=self._key(), timeout=self.timeout, **url)
        # It has no other way to close its connections.
        weakref.finalize(self, client.__exit__, None, None, None)
        return client

    def _key(self) -> str:
        return find_key(self._api_key, self.base_url)

    def _hint(self) -> str:
        is_path = isinstance(self.train_file_name, str | Path)
        data = shlex.quote(str(self.train_file_name)) if is_path else "train.jsonl"
        return (
            "Train a reranker of your own on the same data, with Cohere's model as its teacher: "
            f"`ft cohere score {data} --output scored.jsonl`, then (pip install ft-crossencoder) "
            "`ft crossencoder train scored.jsonl --output reranker`; in Python, "
            "CohereRerankTeacher and CrossEncoderFinetuneEngine"
        )


def _check_settings(
    model_type: str, base_model: str, hyperparameters: Mapping[str, float], max_retries: int
) -> None:
    if model_type != "RERANK":
        raise ArgumentError("model_type", f"is 'RERANK', not {model_type!r}")
    if base_model not in BASE_MODELS:
        raise ArgumentError("base_model", f"is one of {', '.join(BASE_MODELS)}, not {base_model!r}")
    for name, value in hyperparameters.items():
        if name not in HYPERPARAMETERS:
            raise ArgumentError(
                "hyperparameters", f"are {', '.join(HYPERPARAMETERS)}, but not {name!r}"
            )
        if not value > 0:
            raise ArgumentError("hyperparameters", f"{name} must be above 0, not {value!r}")
    if max_retries < 0:
        raise ArgumentError("max_retries", "is not negative")


def _loaded(argument: str, data: Any) -> CohereRerankerFile:
    if data is None:
        raise ArgumentError(argument, "is needed to train")
    if isinstance(data, RerankDataset):
        return CohereRerankerFile.from_rerank(data)
    return CohereRerankerFile.coerce(data)


def _on(jobs: list[Job], dataset_id: str) -> list[Job]:
    return [job for job in jobs if job.raw.settings.dataset_id == dataset_id]


def _live(jobs: list[Job]) -> Job | None:
    """Return the job that has succeeded or runs, if there is one."""
    live = [job for job in jobs if job.status not in (JobStatus.FAILED, JobStatus.CANCELLED)]
    succeeded = [job for job in live if job.status is JobStatus.SUCCEEDED]
    return next(iter(succeeded or live), None)
