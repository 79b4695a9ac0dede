"""Fine-tune at OpenAI, or at any server that speaks its fine-tuning API."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from typing_extensions import Self

from ft_core.errors import ArgumentError, TrainingError
from ft_core.extras import import_extra
from ft_core.files import content_hash
from ft_core.jobs import POLL_SECONDS, Job, JobEngine, JobEvent, JobRecord, JobStatus, job_file_of
from ft_core.openai_jobs.costs import Estimate, check_limits, estimate
from ft_core.retries import ServiceUnavailableError

if TYPE_CHECKING:
    import openai
    from llama_index.core.llms import LLM

    from ft_core.datasets.chat import ChatDataset, PreferenceDataset
    from ft_core.openai_jobs.service import Checkpoint, OpenAIService

logger = logging.getLogger(__name__)

HYPERPARAMETERS = {
    "supervised": ("n_epochs", "batch_size", "learning_rate_multiplier"),
    "dpo": ("n_epochs", "batch_size", "learning_rate_multiplier", "beta"),
}
"""What each method lets one set."""

_CONTEXT_WINDOW = 32_768  # of a model that LlamaIndex does not know


@dataclass(frozen=True)
class _TrainingFile:
    """What is uploaded, and what it is made of."""

    name: str
    content: bytes
    examples: Sequence[Mapping[str, Any]] | None
    """None where the file goes up unchecked."""
    source: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


class OpenAIFinetuneEngine(JobEngine):
    """Train a hosted student on a teacher's recorded calls.

    The first five arguments are those of `llama_index.finetuning`. The constructor only keeps
    them: `finetune` reads and checks the data, logs what training will take, uploads it,
    creates the job and waits.

    One set of data and settings is one job. `finetune` finds the job that an earlier call made,
    in this process, in one that was killed, or on another machine with the same account: it
    attaches to a running one and returns a finished one. To train again all the same, change
    the `suffix` or the `seed`.

    Args:
        base_model: the model to train, by its name at the service.
        data_path: what to train on: the handler's journal, a file in OpenAI's fine-tuning
            format, or a `ChatDataset` (with `method="dpo"`, preferences).
        verbose: print what is logged, too.
        start_job_id: attach to this job.
        validate_json: check every example and the service's limits before anything is sent.
            False uploads the file as it stands.
        val_path: held-out data in any form that `data_path` takes.
        method: `supervised`, or `dpo` on preferences.
        hyperparameters: see `HYPERPARAMETERS`; the service chooses the others.
        suffix: a part of the trained model's name.
        seed: of the service's training.
        metadata: up to 15 texts by name that the job carries; one more is ours.
        integrations: as the API takes them, for example Weights & Biases.
        price_per_million: the published price of a million trained tokens, for the estimate.
        base_url: the API of another server; the client's default is OpenAI's.
        api_key: `OPENAI_API_KEY` by default. It is never written anywhere.
        client: an `openai.OpenAI` to use instead of the two above.
        job_file: where jobs are remembered; beside the data by default, with the ending
            `.jobs.json`. It belongs to the data: keep both, and a job is found again.
        max_retries: tries after the first of a request that the service could not take.
        timeout: seconds until a request without an answer is repeated.
        show_progress: a line while waiting; only ever shown on a terminal.
        poll_seconds: the first and the longest pause between two looks at the job.
        sleep: how to pause, in seconds.
    """

    _default_key: ClassVar[str] = "OPENAI_API_KEY"

    def __init__(
        self,
        base_model: str,
        data_path: str | Path | ChatDataset | PreferenceDataset | None,
        verbose: bool = False,
        start_job_id: str | None = None,
        validate_json: bool = True,
        *,
        val_path: str | Path | ChatDataset | PreferenceDataset | None = None,
        method: Literal["supervised", "dpo"] = "supervised",
        hyperparameters: Mapping[str, Any] | None = None,
        suffix: str | None = None,
        seed: int | None = None,
        metadata: Mapping[str, str] | None = None,
        integrations: Sequence[Mapping[str, Any]] | None = None,
        price_per_million: float | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        client: openai.OpenAI | None = None,
        job_file: str | Path | None = None,
        max_retries: int = 5,
        timeout: float = 120.0,
        show_progress: bool = True,
        poll_seconds: tuple[float, float] = POLL_SECONDS,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(
            job_id=start_job_id,
            show_progress=show_progress,
            poll_seconds=poll_seconds,
            sleep=sleep,
        )
        _check_method(method, hyperparameters or {})
        if max_retries < 0:
            raise ArgumentError("max_retries", "is not negative")
        if len(metadata or {}) > 15:
            raise ArgumentError("metadata", "has at most 15 entries; one of 16 is ours")
        self.base_model = base_model
        self.data_path = data_path
        self.verbose = verbose
        self.validate_json = validate_json
        self.val_path = val_path
        self.method = method
        self.hyperparameters = dict(hyperparameters or {})
        self.suffix = suffix
        self.seed = seed
        self.metadata = dict(metadata or {})
        self.integrations = [dict(item) for item in integrations or ()]
        self.price_per_million = price_per_million
        self.base_url = base_url
        self.job_file = job_file
        self.max_retries = max_retries
        self.timeout = timeout
        self._api_key = api_key
        self._client = client
        self._connected: OpenAIService | None = None
        self._files: list[_TrainingFile] = []

    @classmethod
    def from_finetuning_handler(
        cls, finetuning_handler: Any, base_model: str, data_path: str | Path, **kwargs: Any
    ) -> Self:
        """Save what a handler has recorded to `data_path` and return an engine for it."""
        finetuning_handler.save_finetuning_events(str(data_path))
        return cls(base_model, data_path, **kwargs)

    @classmethod
    def from_job_id(cls, job_id: str, **settings: Any) -> Self:
        """Return an engine for a job that exists; its data is not needed.

        Args:
            job_id: the service's id of the job.
            settings: where it is: `base_url`, `api_key`, `client` and the like.
        """
        base_model = settings.pop("base_model", "")
        return cls(base_model, settings.pop("data_path", None), start_job_id=job_id, **settings)

    def estimate(self) -> Estimate:
        """Return what training will take, before anything is sent.

        Raises:
            DatasetError: the data cannot be used; names file, line and reason.
        """
        examples = self._training_file(self.data_path).examples
        if examples is None:
            raise ArgumentError("validate_json", "is False: the examples are not looked at")
        return self._estimate(examples)

    def checkpoints(self) -> list[Checkpoint]:
        """Return the models that the job saved on its way, by their steps."""
        return self._service.checkpoints(self._known_job_id())

    def get_finetuned_model(self, **kwargs: Any) -> LLM:
        """Return the trained model as LlamaIndex's `OpenAI`.

        Where LlamaIndex does not know the model, which is most often on another server, it is
        an `OpenAILike` with a context window of 32,768 tokens.

        Args:
            kwargs: further arguments of the class, for example `temperature` or
                `context_window`; they win. `model` takes a checkpoint's name.

        Raises:
            TrainingError: the job has not succeeded; names its status.
        """
        settings = self._llm_settings() | {"model": self._finished_job().model} | kwargs
        if _is_known(settings["model"]):
            from llama_index.llms.openai import OpenAI

            return OpenAI(**settings)
        module = import_extra("llama_index.llms.openai_like", "llama-index-llms-openai-like")
        defaults = {
            "is_chat_model": True,
            "is_function_calling_model": True,
            "context_window": _CONTEXT_WINDOW,
            "api_key": os.environ.get(self._default_key) or "none",
        }
        return module.OpenAILike(**(defaults | settings))

    # The primitives of a job

    def _submit(self) -> Job:
        record, fingerprint = self._job_record(), self._fingerprint_of(self._files)
        listed = self._listed(record.read(fingerprint))
        if (job := self._find(listed, fingerprint, record)) is not None:
            self._tell(f"job {job.id} of the same data and settings is {job.status.value}")
            return job
        self._check_files()
        uploads = [self._uploaded(file, record) for file in self._files]
        attempt = f"{fingerprint}.{uuid.uuid4().hex}"
        record.update(
            fingerprint,
            attempt=attempt,
            job_id=None,
            model=self.base_model,
            training_file=uploads[0],
            others=[job.id for job in listed if _training_file_of(job) == uploads[0]],
        )
        job = self._create(self._request(uploads, attempt), record.read(fingerprint))
        self._tell(f"job {job.id} trains {self.base_model} on {uploads[0]}")
        return job

    def _retrieve(self, job_id: str) -> Job:
        return self._service.job(job_id)

    def _list_events(self, job_id: str) -> list[JobEvent]:
        return self._service.events(job_id)

    def _cancel(self, job_id: str) -> Job:
        return self._service.cancel(job_id)

    def _is_temporary(self, error: Exception) -> bool:
        return isinstance(error, ServiceUnavailableError) or super()._is_temporary(error)

    def _fingerprint(self) -> str:
        paths = [self.data_path] if self.val_path is None else [self.data_path, self.val_path]
        self._files = [self._training_file(path) for path in paths]
        return self._fingerprint_of(self._files)

    def _job_record(self) -> JobRecord:
        if self._record is None:
            self._record = JobRecord(
                self.job_file or job_file_of(self.data_path, "ft-openai-distill")
            )
        return self._record

    def _tell(self, message: str) -> None:
        super()._tell(message)
        if self.verbose:
            print(message)

    # The data

    def _training_file(self, data: Any) -> _TrainingFile:
        """Read and check the data; what is uploaded is its cleaned form."""
        from ft_core.datasets.chat import ChatDataset, PreferenceDataset

        if data is None:
            raise ArgumentError("data_path", "is needed to train")
        is_path = isinstance(data, str | Path)
        source = str(data) if is_path else "dataset"
        if is_path and not self.validate_json:
            return _named(source, _bytes_of(Path(data)), None)
        kind = ChatDataset if self.method == "supervised" else PreferenceDataset
        examples = [example.to_openai() for example in kind.coerce(data)]
        lines = (json.dumps(example, ensure_ascii=False) for example in examples)
        return _named(source, "".join(f"{line}\n" for line in lines).encode(), examples)

    def _check_files(self) -> None:
        """Log what training will take, and refuse what the service would."""
        for index, file in enumerate(self._files):
            if file.examples is None or not self.validate_json:
                continue
            figures = self._estimate(file.examples)
            if index == 0:
                self._tell(f"{file.source}: {figures}")
                check_limits(figures, self.base_model, len(file.content), source=file.source)

    def _estimate(self, examples: Sequence[Mapping[str, Any]]) -> Estimate:
        epochs = self.hyperparameters.get("n_epochs")
        return estimate(
            examples,
            self.base_model,
            epochs=epochs if isinstance(epochs, int) else None,
            price_per_million=self.price_per_million,
        )

    def _uploaded(self, file: _TrainingFile, record: JobRecord) -> str:
        """Return the id of the file at the service, where it is sent once at most."""
        service = self._service
        key = content_hash(["upload", service.server, service.account, file.digest])
        file_id = record.read(key).get("file_id")
        if file_id is not None and service.file_status(file_id) is None:
            file_id = None  # deleted there meanwhile
        if file_id is None:
            file_id = service.find_file(file.name, len(file.content))
        if file_id is None:
            self._tell(f"uploading {file.source} ({len(file.content):,} bytes)")
            file_id = service.upload(file.name, file.content)
        record.update(key, file_id=file_id, name=file.name)
        service.wait_for_file(file_id)
        return str(file_id)

    # The job

    def _request(self, uploads: Sequence[str], key: str) -> dict[str, Any]:
        from ft_core.openai_jobs.service import JOB_KEY

        request = {
            "model": self.base_model,
            "training_file": uploads[0],
            "validation_file": uploads[1] if len(uploads) > 1 else None,
            **self._method(),
            "suffix": self.suffix,
            "seed": self.seed,
            "integrations": self.integrations or None,
            "metadata": {**self.metadata, JOB_KEY: key},
        }
        return {name: value for name, value in request.items() if value is not None}

    def _method(self) -> dict[str, Any]:
        """Return the method and its settings as the API takes them."""
        if self.method == "supervised" and not self.hyperparameters:
            return {}  # what every server does by itself
        method: dict[str, Any] = {"type": self.method}
        if self.hyperparameters:
            method[self.method] = {"hyperparameters": self.hyperparameters}
        return {"method": method}

    def _create(self, request: dict[str, Any], entry: Mapping[str, Any]) -> Job:
        import openai

        def made() -> list[Job]:
            return [job for job in self._listed(entry) if _is_attempt(job, entry)]

        try:
            return self._service.create(request, made)
        except TrainingError as error:
            # A server that knows no metadata has made nothing. What it makes is found again by
            # the file that it trains on.
            rejected = error.__cause__
            if (
                self.metadata
                or not isinstance(rejected, openai.BadRequestError)
                or not (rejected.param == "metadata" or "metadata" in rejected.message)
            ):
                raise
        logger.info("%s takes no metadata; creating the job without", self._service.server)
        request = {name: value for name, value in request.items() if name != "metadata"}
        return self._service.create(request, made)

    def _find(self, listed: Sequence[Job], fingerprint: str, record: JobRecord) -> Job | None:
        """Return the job that another process made, where it runs or has succeeded."""
        entry = record.read(fingerprint)
        live = [
            job
            for job in listed
            if job.status not in (JobStatus.FAILED, JobStatus.CANCELLED)
            and (_key_of(job).split(".")[0] == fingerprint or _is_attempt(job, entry))
        ]
        succeeded = [job for job in live if job.status is JobStatus.SUCCEEDED]
        return next(iter(succeeded or live), None)

    def _listed(self, entry: Mapping[str, Any]) -> list[Job]:
        """Return the account's jobs; none where the server lists none and no job is in doubt."""
        try:
            return self._service.jobs()
        except ServiceUnavailableError:
            raise
        except TrainingError as error:
            if "attempt" not in entry or entry.get("job_id") is not None:
                return []
            raise TrainingError(
                f"a job on {entry.get('training_file')} may have been started before, and "
                f"{self._service.server} does not list jobs. Pass its id as start_job_id, or "
                f"remove {self._job_record().path} to start another"
            ) from error

    def _fingerprint_of(self, files: Sequence[_TrainingFile]) -> str:
        return content_hash(
            {
                "server": self._service.server,
                "account": self._service.account,
                "files": [file.digest for file in files],
                "base_model": self.base_model,
                "method": self.method,
                "hyperparameters": self.hyperparameters,
                "suffix": self.suffix,
                "seed": self.seed,
                "metadata": self.metadata,
                "integrations": self.integrations,
            }
        )

    # The service

    @property
    def _service(self) -> OpenAIService:
        if self._connected is None:
            from ft_core.openai_jobs.service import OpenAIService

            self._connected = OpenAIService(
                self._client or self._make_client(),
                max_retries=self.max_retries,
                sleep=self._sleep,
                local_hint=self._local_hint(),
            )
        return self._connected

    def _make_client(self) -> openai.OpenAI:
        import openai

        key = self._api_key or os.environ.get("OPENAI_API_KEY")
        if not key and self.base_url is None:
            raise ArgumentError("api_key", "is missing; set OPENAI_API_KEY, or pass it")
        return openai.OpenAI(api_key=key or "none", base_url=self.base_url, timeout=self.timeout)

    def _llm_settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        if self._client is not None:
            settings = {"api_key": self._client.api_key, "api_base": str(self._client.base_url)}
        if self._api_key is not None:
            settings["api_key"] = self._api_key
        if self.base_url is not None:
            settings["api_base"] = self.base_url
        return settings

    def _local_hint(self) -> str:
        path = isinstance(self.data_path, str | Path)
        data = repr(str(self.data_path)) if path else "the same dataset"
        return (
            "Train a student of your own on the same data: "
            f'LocalFinetuneEngine("<open model>", {data}, output_dir="student") '
            "(pip install 'ft-openai-distill[local]')"
        )


def _check_method(method: str, hyperparameters: Mapping[str, Any]) -> None:
    if method not in HYPERPARAMETERS:
        raise ArgumentError("method", f"is one of {', '.join(HYPERPARAMETERS)}, not {method!r}")
    known = HYPERPARAMETERS[method]
    for name in hyperparameters:
        if name not in known:
            raise ArgumentError(
                "hyperparameters", f"{method} has {', '.join(known)}, but not {name!r}"
            )


def _named(
    source: str, content: bytes, examples: Sequence[Mapping[str, Any]] | None
) -> _TrainingFile:
    # The name holds the content's hash: the same data is found again among the uploads.
    stem = re.sub(r"[^\w-]+", "-", Path(source).stem)[:40].strip("-") or "data"
    digest = hashlib.sha256(content).hexdigest()
    return _TrainingFile(f"{stem}-{digest[:12]}.jsonl", content, examples, source)


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArgumentError("data_path", f"{path}: cannot be read: {error.strerror}") from None


def _is_attempt(job: Job, entry: Mapping[str, Any]) -> bool:
    """Whether the job is the one that a recorded intent has made.

    On a server that keeps no metadata it is the job on that file that was not there before.
    """
    if "attempt" not in entry:
        return False
    attempt: str = entry["attempt"]
    if getattr(job.raw, "metadata", None):
        return _key_of(job) == attempt
    others: list[str] = entry["others"]
    return _training_file_of(job) == str(entry["training_file"]) and job.id not in others


def _key_of(job: Job) -> str:
    from ft_core.openai_jobs.service import JOB_KEY

    return str((getattr(job.raw, "metadata", None) or {}).get(JOB_KEY, ""))


def _training_file_of(job: Job) -> str | None:
    return getattr(job.raw, "training_file", None)


def _is_known(model: str) -> bool:
    from llama_index.llms.openai.utils import openai_modelname_to_contextsize

    try:
        openai_modelname_to_contextsize(model)
    except ValueError:
        return False
    return True
