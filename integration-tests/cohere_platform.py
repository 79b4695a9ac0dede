"""Cohere's datasets, fine-tuning and rerank APIs on 127.0.0.1, over a real socket.

    with CoherePlatform(score=cosines(minilm()), state_seconds=0.01) as server:
        client = cohere.ClientV2(api_key=server.api_key, base_url=server.base_url)
        server.fail(429, on="POST /v2/rerank", times=2, retry_after=1)

Requests and answers are validated as `contract_server` says; without the description file,
the types of Cohere's own client take its place. A fine-tuned model really learns word weights
from its dataset, and reranks as "<id>-ft" once it is ready.

What is published (Cohere's documentation, sources in github.com/cohere-ai/
cohere-developer-experience, fern/pages):

- get-started/datasets.mdx: at least 256 training and 64 evaluation examples, a relevant
  passage in each, none that is a hard negative too; `jsonl`; 1.5 GB a dataset, 10 GB an
  organization, 30 days; names under 50 characters; the messages of errors.
- fine-tuning/rerank-fine-tuning/rerank-preparing-the-data.mdx: 256 *unique* queries in total,
  UTF-8, the three fields; without evaluation data, a part of the training data is held out.
- .../rerank-starting-the-training.mdx: the base models "english" and "multilingual", the
  suffix "-ft"; empty and repeated hard negatives are dropped.
- .../rerank-understanding-the-results.mdx: the metrics. troubleshooting-a-fine-tuned-model.mdx:
  ten jobs a day, 15 in all; trainings run one after the other.
- errors-reference and rate-limits on docs.cohere.com: messages; 10 (trial) and 1,000
  (production) rerank calls a minute. reranking-best-practices: 10,000 documents, queries of
  2,048 tokens; a search unit is a query with up to 100 documents. That a document of more than
  500 tokens, the query's included, counts once for each 500 is from memory.
- A client's report of the real thing (HKUDS/LightRAG issue 1813): 422 for an unknown field.

Not published, so made up here: how a closed platform words its refusal, the status for a
limit of jobs, for a model that is not ready, for a dataset that is not validated, the words
that this server counts as tokens, and `Retry-After` (the description of 429 has no header;
Cohere's client reads it).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import random
import re
import secrets
import threading
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any, Literal

from contract_server import (
    Call,
    Contract,
    ContractError,
    ContractServer,
    DescriptionContract,
    Reply,
    Request,
    ServiceError,
    UnknownNameError,
    parse_form,
)

API_DESCRIPTION = Path(__file__).resolve().parents[2] / "shared" / "specs" / "cohere.json"
RERANK_TYPE = "reranker-finetune-input"

Score = Callable[[str, list[str]], Sequence[float]]
"""From a query and documents to a score between 0 and 1 for each document."""


class CohereError(ServiceError):
    """An answer with a status of 400 or more, and Cohere's error body."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        body = {"id": str(uuid.uuid4()), "message": message}
        super().__init__(status, message, body, headers)


# --------------------------------------------------------------------------------------
# Scores and training


def words(text: str) -> list[str]:
    """Return the words and marks of a text; this server's tokens."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def word_overlap(query: str, documents: list[str]) -> list[float]:
    """Return the share of the query's words that each document has."""
    asked = set(words(query))
    return [len(asked & set(words(document))) / max(1, len(asked)) for document in documents]


def cosines(model_folder: str) -> Score:
    """Return what scores by the cosines of a sentence-transformers model, moved to 0 to 1."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(model_folder, device="cpu")
    one_at_a_time = threading.Lock()  # a tokenizer is not for two threads

    def score(query: str, documents: list[str]) -> list[float]:
        with one_at_a_time:
            vectors = model.encode([query, *documents], normalize_embeddings=True)
        near: list[float] = (vectors[1:] @ vectors[0]).tolist()
        return [min(1.0, max(0.0, (1 + cosine) / 2)) for cosine in near]

    return score


@dataclass(frozen=True)
class Row:
    """A line of a dataset."""

    query: str
    relevant_passages: list[str]
    hard_negatives: list[str]


@dataclass(frozen=True)
class Step:
    """What a trainer reports: the metrics of the evaluation rows, and the model so far."""

    number: int
    metrics: dict[str, float]
    score: Score


Trainer = Callable[[list[Row], list[Row], int], Iterator[Step]]
"""From training rows, evaluation rows and a number of epochs."""


def word_weights(rows: list[Row], evaluation: list[Row], epochs: int) -> Iterator[Step]:
    """Learn by a perceptron how much each word that query and document share says."""
    weights: defaultdict[str, float] = defaultdict(float)

    def score(query: str, documents: list[str]) -> list[float]:
        asked = set(words(query))
        sums = [
            sum(1 + weights[word] for word in asked & set(words(document)))
            for document in documents
        ]
        return [1 / (1 + math.exp(-max(-30.0, min(30.0, total - 3)))) for total in sums]

    yield Step(0, ranking_metrics(evaluation, score), score)
    for epoch in range(1, epochs + 1):
        for row in rows:
            asked = set(words(row.query))
            for good, bad in itertools.product(row.relevant_passages, row.hard_negatives):
                if sum(score(row.query, [good])) <= sum(score(row.query, [bad])):
                    for word in asked & set(words(good)):
                        weights[word] += 0.1
                    for word in asked & set(words(bad)):
                        weights[word] -= 0.1
        yield Step(epoch, ranking_metrics(evaluation, score), score)


def ranking_metrics(rows: list[Row], score: Score) -> dict[str, float]:
    """Return the metrics that Cohere reports, over each row's own passages."""
    totals: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        passages = row.hard_negatives + row.relevant_passages  # a tie ranks the negative first
        scores = score(row.query, passages)
        order = sorted(range(len(passages)), key=lambda place: -scores[place])
        gains = [place >= len(row.hard_negatives) for place in order][:10]
        first = gains.index(True) + 1 if True in gains else math.inf
        best = sum(1 / math.log2(rank + 2) for rank in range(min(10, sum(gains))))
        found = sum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains))
        totals["accuracy@1"] += first == 1
        totals["accuracy@3"] += first <= 3
        totals["mrr@10"] += 1 / first
        totals["ndcg@10"] += found / best if best else 0.0
    return {name: total / max(1, len(rows)) for name, total in totals.items()}


# --------------------------------------------------------------------------------------
# Datasets


class InvalidDataset(Exception):
    """What `validation_error` says."""


@dataclass
class _Checked:
    """A file of a dataset, validated."""

    rows: list[Row]
    warnings: list[str]


def check_rows(content: bytes, *, skip_malformed: bool = False) -> _Checked:
    """Validate a JSON Lines file as the service does.

    Raises:
        InvalidDataset: with the line number of the first line that does not fit.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidDataset(f"the file is not encoded in UTF-8: {error}") from None
    rows, warnings = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row, dropped = _row(line, number)
        except InvalidDataset as error:
            if not skip_malformed:
                raise
            warnings.append(f"skipped: {error}")
            continue
        rows.append(row)
        if dropped:
            warnings.append(f"removed {dropped} empty or repeated hard_negatives (line: {number})")
    return _Checked(rows, warnings)


def _row(line: str, number: int) -> tuple[Row, int]:
    """Return the row, and how many of its negatives were dropped."""
    try:
        value = json.loads(line)
    except ValueError:
        raise InvalidDataset(f"the line is not JSON (line: {number})") from None
    if not isinstance(value, dict):
        raise InvalidDataset(f"the line is not a JSON object (line: {number})")
    for name in ("query", "relevant_passages", "hard_negatives"):
        if name not in value:
            message = f"the required field {name} was not found in the dataset (line: {number})"
            raise InvalidDataset(message)
    if not isinstance(value["query"], str) or not value["query"].strip():
        raise InvalidDataset(f"query must be a text that is not empty (line: {number})")
    for name in ("relevant_passages", "hard_negatives"):
        passages = value[name]
        if not isinstance(passages, list) or not all(isinstance(text, str) for text in passages):
            raise InvalidDataset(f"{name} must be a list of texts (line: {number})")
    relevant = value["relevant_passages"]
    if not relevant or not all(text.strip() for text in relevant):
        raise InvalidDataset(f"there must be at least one relevant passage (line: {number})")
    negatives = list(dict.fromkeys(text for text in value["hard_negatives"] if text.strip()))
    if set(relevant) & set(negatives):
        message = "a passage is both in relevant_passages and in hard_negatives"
        raise InvalidDataset(f"{message} (line: {number})")
    row = Row(value["query"], relevant, negatives)
    return row, len(value["hard_negatives"]) - len(negatives)


@dataclass
class _Dataset:
    id: str
    name: str
    kind: str
    files: dict[str, tuple[str, bytes]]
    """"data" and "eval_data" to file name and content."""
    skip_malformed: bool
    created: datetime
    began: float
    """By `time.monotonic`."""
    forced: str | None = None
    """A status that a test set."""
    checked: dict[str, _Checked] | None = None
    error: str | None = None

    @property
    def size(self) -> int:
        return sum(len(content) for _, content in self.files.values())

    def validate(self, minimum: Mapping[str, int]) -> None:
        """Set `checked` or `error`, once."""
        if self.checked is not None or self.error is not None:
            return
        try:
            if self.kind == RERANK_TYPE:
                self.checked = {part: self._check(part, minimum[part]) for part in self.files}
            else:  # its rules are none of this server's business
                self.checked = {part: _Checked([], []) for part in self.files}
        except InvalidDataset as error:
            self.error = str(error)

    def _check(self, part: str, minimum: int) -> _Checked:
        name, content = self.files[part]
        if not name.endswith(".jsonl"):
            raise InvalidDataset(f"{name}: only jsonl files are supported for {self.kind}")
        checked = check_rows(content, skip_malformed=self.skip_malformed)
        if len({row.query for row in checked.rows}) < minimum:
            what = "train" if part == "data" else "evaluation"
            found = len({row.query for row in checked.rows})
            message = f"there must be at least {minimum} valid {what} examples with unique queries"
            raise InvalidDataset(f"{message}, but there are {found}")
        return checked

    def split(self) -> tuple[list[Row], list[Row]]:
        """Return the rows to train on and those to evaluate on."""
        assert self.checked is not None
        rows = list(self.checked["data"].rows)
        if "eval_data" in self.checked:
            return rows, list(self.checked["eval_data"].rows)
        random.Random(0).shuffle(rows)
        return rows[len(rows) // 5 :], rows[: len(rows) // 5]

    def metrics(self) -> dict[str, Any]:
        train, evaluation = self.split()
        counts: dict[str, int] = {}
        for part, rows in (("train", train), ("eval", evaluation)):
            counts[f"num_{part}_queries"] = len(rows)
            counts[f"num_{part}_relevant_passages"] = sum(len(r.relevant_passages) for r in rows)
            counts[f"num_{part}_hard_negatives"] = sum(len(r.hard_negatives) for r in rows)
        total = {"total_examples": len(train) + len(evaluation)}
        return total | {
            "train_examples": len(train),
            "eval_examples": len(evaluation),
            "reranker_data_metrics": counts,
        }

    def answer(self, status: str) -> dict[str, Any]:
        body: dict[str, Any] = {
            "id": self.id,
            "name": self.name,
            "created_at": _written(self.created),
            "updated_at": _written(datetime.now(timezone.utc)),
            "dataset_type": self.kind,
            "validation_status": status,
            "required_fields": ["query", "relevant_passages", "hard_negatives"],
            "dataset_parts": [
                {"id": f"{self.id}-{part}", "name": name, "index": index, "size_bytes": len(data)}
                for index, (part, (name, data)) in enumerate(self.files.items())
            ],
        }
        if status == "failed":
            body["validation_error"] = self.error or "the dataset could not be validated"
        if status == "validated" and self.checked is not None:
            warnings = [text for checked in self.checked.values() for text in checked.warnings]
            body["validation_warnings"] = warnings
            if self.kind == RERANK_TYPE:
                body["metrics"] = {"finetune_dataset_metrics": self.metrics()}
        return body


def _written(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


# --------------------------------------------------------------------------------------
# Fine-tuned models


@dataclass
class _Model:
    id: str
    name: str
    settings: dict[str, Any]
    created: datetime
    updated: datetime
    status: str = "STATUS_UNSPECIFIED"
    completed: datetime | None = None
    score: Score | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    """Oldest first."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """Oldest first."""
    cancelled: threading.Event = field(default_factory=threading.Event)

    def move(self, status: str, *, user: str | None = None) -> None:
        self.status = status
        self.updated = datetime.now(timezone.utc)
        event = {"status": status, "created_at": _written(self.updated)}
        self.events.append(event if user is None else event | {"user_id": user})

    def answer(self) -> dict[str, Any]:
        body = {
            "id": self.id,
            "name": self.name,
            "creator_id": USER,
            "organization_id": ORGANIZATION,
            "settings": self.settings,
            "status": self.status,
            "created_at": _written(self.created),
            "updated_at": _written(self.updated),
        }
        return body if self.completed is None else body | {"completed_at": _written(self.completed)}


USER = "7a3c0d1e-0000-4000-8000-000000000001"
ORGANIZATION = "7a3c0d1e-0000-4000-8000-000000000002"
DEFAULTS = {
    "early_stopping_patience": 6,
    "early_stopping_threshold": 0.01,
    "train_batch_size": 16,
    "train_epochs": 1,
    "learning_rate": 0.01,
}
"""Hyperparameters as in the description's example."""


class _Cancelled(Exception):
    """The model was deleted, or the server stops."""


# --------------------------------------------------------------------------------------
# The contract


class SDKContract:
    """The types of Cohere's client, for where the description file is not.

    The client has no types of requests: what a call may send is what its method takes.
    """

    def __init__(self) -> None:
        import cohere
        from cohere.datasets.client import DatasetsClient
        from cohere.datasets.types import (
            DatasetsCreateResponse,
            DatasetsGetResponse,
            DatasetsGetUsageResponse,
            DatasetsListResponse,
        )
        from cohere.finetuning.finetuning import types as tuning

        self._answers: dict[str, Any] = {
            "post /v1/rerank": cohere.RerankResponse,
            "post /v2/rerank": cohere.V2RerankResponse,
            "post /v1/datasets": DatasetsCreateResponse,
            "get /v1/datasets": DatasetsListResponse,
            "get /v1/datasets/usage": DatasetsGetUsageResponse,
            "get /v1/datasets/{id}": DatasetsGetResponse,
            "get /v1/models": cohere.ListModelsResponse,
            "get /v1/models/{model}": cohere.GetModelResponse,
            "post /v1/check-api-key": cohere.CheckApiKeyResponse,
            f"post {TUNED}": tuning.CreateFinetunedModelResponse,
            f"get {TUNED}": tuning.ListFinetunedModelsResponse,
            f"get {TUNED}/{{id}}": tuning.GetFinetunedModelResponse,
            f"get {TUNED}/{{finetuned_model_id}}/events": tuning.ListEventsResponse,
            f"get {TUNED}/{{finetuned_model_id}}/training-step-metrics": (
                tuning.ListTrainingStepMetricsResponse
            ),
        }
        self._methods: dict[str, Any] = {
            "post /v1/rerank": cohere.Client.rerank,
            "post /v2/rerank": cohere.ClientV2.rerank,
            "post /v1/datasets": DatasetsClient.create,
        }
        self._model = tuning.FinetunedModel

    def check_request(self, call: Call, template: str) -> None:
        import inspect

        name = f"{call.method} {template}"
        if name == f"post {TUNED}":
            self._validate(self._model, call.json)
            self._known(set(call.json), set(self._model.model_fields))
        elif name in self._methods:
            known = inspect.signature(self._methods[name]).parameters
            given = set(dict(call.query))
            given |= set(parse_form(call.content_type, call.body) if call.is_form else call.json)
            self._known(given, set(known))
            for parameter in known.values():
                wanted = parameter.default is inspect.Parameter.empty and parameter.name != "self"
                if wanted and parameter.name not in given and parameter.name != "request_options":
                    raise ContractError(f"$: '{parameter.name}' is a required property")

    def check_reply(self, call: Call, template: str, status: int, body: Any) -> None:
        if status >= 400:
            if not isinstance(body.get("message"), str):
                raise ContractError("$.message: not Cohere's error body")
        elif (kind := self._answers.get(f"{call.method} {template}")) is not None:
            self._validate(kind, body)

    def check_chunk(self, call: Call, chunk: dict[str, Any]) -> None:
        raise ContractError("nothing is streamed here")

    @staticmethod
    def _known(given: set[str], known: set[str]) -> None:
        if unknown := sorted(given - known):
            raise UnknownNameError(f"Unrecognized request argument supplied: {', '.join(unknown)}")

    @staticmethod
    def _validate(kind: Any, value: Any) -> None:
        from pydantic import ValidationError

        try:
            kind.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise ContractError(f"$.{place}: {first['msg']}") from None


@cache
def load_contract(path: Path) -> Contract:
    """Return the contract, loaded once for each path."""
    return DescriptionContract(path, error_schema="Error") if path.exists() else SDKContract()


# --------------------------------------------------------------------------------------
# Behaviour


@dataclass
class Behaviour:
    """How the service behaves; may be changed while it runs."""

    dataset_seconds: float = 0.02
    """How long a dataset stays `queued`, and then `processing`."""
    state_seconds: float = 0.02
    """How long a model stays queued, and being deployed."""
    step_seconds: float = 0.0
    """Waited after each training step."""
    minimum_train: int = 256
    minimum_eval: int = 64
    """Of evaluation data, where it is given."""
    fine_tuning: Literal["open", "closed", "removed"] = "open"
    """Closed: no new model, by the status and the message below; models can still be asked
    for, used and deleted. Removed: no such endpoint, and no dataset for it."""
    closed_status: int = 403
    closed_message: str = "Fine-tuning was deprecated on September 15, 2025 and is not available."
    failing: bool = False
    """Training ends in STATUS_FAILED."""
    jobs_per_day: int = 10
    dataset_bytes: int = 1_500_000_000
    capacity_bytes: int = 10_000_000_000
    models: tuple[str, ...] = (
        "rerank-v4.0-pro",
        "rerank-v4.0-fast",
        "rerank-v3.5",
        "rerank-english-v3.0",
        "rerank-multilingual-v3.0",
    )
    """Rerank models that are not fine-tuned."""
    rerank_seconds: float = 0.0
    """Latency of rerank."""
    rerank_per_minute: int | None = None
    """More calls get 429 with Retry-After."""
    minute_seconds: float = 60.0
    """How long such a minute is."""
    max_documents: int = 10_000
    refuses_empty_documents: bool = False
    foreign: Reply | None = None
    """Answers every call, as a proxy or a server that speaks another API would."""
    spoil: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """Changes a rerank answer after it was validated, as a server that only says that it is
    compatible might."""


# --------------------------------------------------------------------------------------
# The service

TUNED = "/v1/finetuning/finetuned-models"
ROUTES: tuple[tuple[str, str, str], ...] = (
    ("post", "/v1/rerank", "rerank_v1"),
    ("post", "/v2/rerank", "rerank_v2"),
    ("post", "/v1/datasets", "create_dataset"),
    ("get", "/v1/datasets", "list_datasets"),
    ("get", "/v1/datasets/usage", "dataset_usage"),
    ("get", "/v1/datasets/{id}", "get_dataset"),
    ("delete", "/v1/datasets/{id}", "delete_dataset"),
    ("get", "/v1/models", "list_models"),
    ("get", "/v1/models/{model}", "get_model"),
    ("post", "/v1/check-api-key", "check_api_key"),
    ("post", TUNED, "create_model"),
    ("get", TUNED, "list_tuned"),
    ("get", TUNED + "/{id}", "get_tuned"),
    ("delete", TUNED + "/{id}", "delete_tuned"),
    ("get", TUNED + "/{finetuned_model_id}/events", "list_events"),
    ("get", TUNED + "/{finetuned_model_id}/training-step-metrics", "list_metrics"),
)
"""Method, path and the method of `CoherePlatform` that answers."""


class CoherePlatform(ContractServer):
    """The service, in threads of this process; a context manager.

    Args:
        score: what reranks with every model but the fine-tuned ones.
        trainer: trains the fine-tuned models.
        api_key: what clients have to show; made up by default.
        description: the API description; where it is not, the client's own types are used.
        port: a free one if 0.
        behaviour: the fields of `Behaviour`.
    """

    routes = ROUTES
    name = "cohere-platform"

    def __init__(
        self,
        *,
        score: Score = word_overlap,
        trainer: Trainer = word_weights,
        api_key: str | None = None,
        description: Path = API_DESCRIPTION,
        port: int = 0,
        **behaviour: Any,
    ) -> None:
        key = api_key or f"test-{secrets.token_hex(18)}"
        super().__init__(load_contract(description), api_key=key, port=port)
        self.score = score
        self.trainer = trainer
        self.behaviour = Behaviour(**behaviour)
        self._datasets: dict[str, _Dataset] = {}
        self._models: dict[str, _Model] = {}
        self._created: list[float] = []
        self._calls: deque[float] = deque()

    # ---- life and errors

    def cancel_work(self) -> None:
        for model in self._models.values():
            model.cancelled.set()

    def refusal(self, status: int, message: str) -> CohereError:
        return CohereError(status, message)

    def contract_refusal(self, error: Exception, call: Call, template: str) -> CohereError:
        # The fine-tuning endpoints know no 422; a missing field is 400 everywhere.
        status = (
            400 if template.startswith(TUNED) or "is a required property" in str(error) else 422
        )
        if isinstance(error, UnknownNameError):
            names = str(error).rpartition(": ")[2]
            return CohereError(status, f"unknown field: parameter '{names}' is not a valid field.")
        if isinstance(error, json.JSONDecodeError) or "deserialize" in str(error):
            return CohereError(400, f"invalid json syntax: {error}")
        return CohereError(status, f"invalid request: {error}")

    def rate_limited(self, seconds: float) -> CohereError:
        headers = {"retry-after": str(math.ceil(seconds))}
        return CohereError(429, "Please wait and try again later: too many API calls.", headers)

    def authenticate(self, call: Call) -> None:
        scheme, _, key = call.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise CohereError(401, "no api key supplied")
        if not secrets.compare_digest(key, self.api_key):
            raise CohereError(401, "invalid api token")

    def respond(self, call: Call, record: Request) -> Reply:
        if self.behaviour.fine_tuning == "removed" and call.path.startswith(TUNED):
            return Reply(content=b"404 page not found", status=404, content_type="text/plain")
        if self.behaviour.foreign is not None:
            return self.behaviour.foreign
        reply = super().respond(call, record)
        spoil = self.behaviour.spoil
        if spoil and call.path.endswith("/rerank") and reply.status == 200 and reply.body:
            reply.body = spoil(reply.body)
        return reply

    # ---- what tests ask and set

    @property
    def datasets(self) -> dict[str, dict[str, bytes]]:
        """Dataset id to the content of "data" and "eval_data"."""
        with self._change:
            return {
                dataset.id: {part: content for part, (_, content) in dataset.files.items()}
                for dataset in self._datasets.values()
            }

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """Fine-tuned model id to the model as clients see it; oldest first."""
        with self._change:
            return {model.id: model.answer() for model in self._models.values()}

    def set_status(self, identifier: str, status: str) -> None:
        """Put a fine-tuned model or a dataset in a state that it does not get in by itself."""
        with self._change:
            if identifier in self._models:
                self._models[identifier].move(status)
            else:
                self._datasets[identifier].forced = status
            self._change.notify_all()

    def wait_for(self, model_id: str, *statuses: str, timeout: float = 60) -> dict[str, Any]:
        """Wait for a fine-tuned model to reach one of the states; return it."""
        with self._change:
            model = self._models[model_id]
            if not self._change.wait_for(lambda: model.status in statuses, timeout):
                raise TimeoutError(f"{model_id} is {model.status} after {timeout} s")
            return model.answer()

    # ---- rerank

    def rerank_v1(self, call: Call) -> Reply:
        body = call.json
        fields = body.get("rank_fields") or ["text"]
        texts = [
            document if isinstance(document, str) else _joined(document, fields)
            for document in body["documents"]
        ]
        if len(texts) * body.get("max_chunks_per_doc", 10) > 10_000:
            message = "invalid request: len(documents) * max_chunks_per_doc must be at most 10000"
            raise CohereError(400, message)
        reply = self._rerank(body, texts, version="1")
        if body.get("return_documents"):
            assert reply.body is not None
            for result in reply.body["results"]:
                given = body["documents"][result["index"]]
                result["document"] = {"text": given} if isinstance(given, str) else given
        return reply

    def rerank_v2(self, call: Call) -> Reply:
        body = call.json
        most = body.get("max_tokens_per_doc", 4096)
        return self._rerank(body, [_shortened(text, most) for text in body["documents"]], "2")

    def _rerank(self, body: dict[str, Any], texts: list[str], version: str) -> Reply:
        self._limit()
        if not texts:
            raise CohereError(400, "invalid request: list of documents must not be empty")
        if not body["query"].strip():
            message = "invalid request: query must not be empty or be only whitespace"
            raise CohereError(400, message)
        if len(texts) > self.behaviour.max_documents:
            message = f"too many documents: at most {self.behaviour.max_documents}"
            raise CohereError(400, f"invalid request: {message} - received {len(texts)}")
        if self.behaviour.refuses_empty_documents and not all(text.strip() for text in texts):
            raise CohereError(400, "invalid request: a document must not be empty")
        self._stopping.wait(self.behaviour.rerank_seconds)
        scores = self._scorer(body.get("model", "rerank-v3.5"))(body["query"], texts)
        if len(scores) != len(texts) or not all(0 <= score <= 1 for score in scores):
            raise RuntimeError("the score function gave no score between 0 and 1 for each document")
        order = sorted(range(len(texts)), key=lambda index: -scores[index])
        results = [{"index": index, "relevance_score": float(scores[index])} for index in order]
        meta = {
            "api_version": {"version": version},
            "billed_units": {"search_units": search_units(body["query"], texts)},
        }
        top = results[: body.get("top_n", len(results))]
        return Reply({"id": str(uuid.uuid4()), "results": top, "meta": meta})

    def _limit(self) -> None:
        most, window = self.behaviour.rerank_per_minute, self.behaviour.minute_seconds
        if most is None:
            return
        with self._change:
            now = time.monotonic()
            while self._calls and self._calls[0] <= now - window:
                self._calls.popleft()
            if len(self._calls) >= most:
                raise self.rate_limited(self._calls[0] + window - now)
            self._calls.append(now)

    def _scorer(self, name: str) -> Score:
        if name in self.behaviour.models:
            return self.score
        with self._change:
            model = self._models.get(name.removesuffix("-ft")) if name.endswith("-ft") else None
            if model is None:
                message = "make sure the correct model ID was used and that you have access to it"
                raise CohereError(404, f"model '{name}' not found, {message}.")
            if model.status != "STATUS_READY" or model.score is None:
                raise CohereError(400, f"model '{name}' is not ready: {model.status}.")
            return model.score

    # ---- datasets

    def create_dataset(self, call: Call) -> Reply:
        name, kind = call.parameter("name", ""), call.parameter("type", "")
        assert name is not None
        assert kind is not None
        if len(name) >= 50:
            raise CohereError(400, "the name must be less than 50 characters long")
        if self.behaviour.fine_tuning == "removed" and kind.endswith("finetune-input"):
            raise CohereError(400, f"the dataset type is invalid: {kind}")
        files: dict[str, tuple[str, bytes]] = {}
        for part, (filename, content) in parse_form(call.content_type, call.body).items():
            if filename is None:
                raise CohereError(400, f"invalid parameter for part: {part} use file")
            files[part] = (filename, content)
        dataset = _Dataset(
            id=f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{self._token('', 6).lower()}",
            name=name,
            kind=kind,
            files=files,
            skip_malformed=call.parameter("skip_malformed_input") == "true",
            created=datetime.now(timezone.utc),
            began=time.monotonic(),
        )
        with self._change:
            used = sum(other.size for other in self._datasets.values())
            if dataset.size > self.behaviour.dataset_bytes:
                raise CohereError(400, "the dataset is larger than allowed")
            if used + dataset.size > self.behaviour.capacity_bytes:
                raise CohereError(400, "you have exceeded capacity")
            self._datasets[dataset.id] = dataset
        return Reply({"id": dataset.id})

    def get_dataset(self, call: Call, dataset_id: str) -> Reply:
        with self._change:
            dataset = self._dataset(dataset_id)
            return Reply({"dataset": dataset.answer(self._dataset_status(dataset))})

    def list_datasets(self, call: Call) -> Reply:
        with self._change:
            answers = [
                dataset.answer(self._dataset_status(dataset))
                for dataset in reversed(self._datasets.values())
            ]
        for name, key in (
            ("datasetType", "dataset_type"),
            ("validationStatus", "validation_status"),
        ):
            if (wanted := call.parameter(name)) is not None:
                answers = [answer for answer in answers if answer[key] == wanted]
        after, before = call.parameter("after"), call.parameter("before")
        answers = [
            answer
            for answer in answers
            if (after is None or _moment(answer["created_at"]) > _moment(after))
            and (before is None or _moment(answer["created_at"]) < _moment(before))
        ]
        start = int(float(call.parameter("offset") or 0))
        limit = call.parameter("limit")
        end = None if limit is None else start + int(float(limit))
        return Reply({"datasets": answers[start:end]})

    def delete_dataset(self, call: Call, dataset_id: str) -> Reply:
        with self._change:
            del self._datasets[self._dataset(dataset_id).id]
        return Reply({})

    def dataset_usage(self, call: Call) -> Reply:
        with self._change:
            used = sum(dataset.size for dataset in self._datasets.values())
        return Reply({"organization_usage": used})

    def _dataset(self, dataset_id: str) -> _Dataset:
        if dataset_id not in self._datasets:
            raise CohereError(404, f"the dataset with id '{dataset_id}' was not found.")
        return self._datasets[dataset_id]

    def _dataset_status(self, dataset: _Dataset) -> str:
        if dataset.forced is not None:
            return dataset.forced
        age, stay = time.monotonic() - dataset.began, self.behaviour.dataset_seconds
        if age < 2 * stay:
            return "queued" if age < stay else "processing"
        minimum = {"data": self.behaviour.minimum_train, "eval_data": self.behaviour.minimum_eval}
        dataset.validate(minimum)
        return "failed" if dataset.error else "validated"

    # ---- models and keys

    def list_models(self, call: Call) -> Reply:
        with self._change:
            tuned = [m.id + "-ft" for m in self._models.values() if m.status == "STATUS_READY"]
        models = [self._model_card(name) for name in [*self.behaviour.models, *tuned]]
        wanted = call.parameter("endpoint")
        if wanted is not None:
            models = [model for model in models if wanted in model["endpoints"]]
        return Reply({"models": models})

    def get_model(self, call: Call, model: str) -> Reply:
        self._scorer(model)
        return Reply(self._model_card(model))

    def _model_card(self, name: str) -> dict[str, Any]:
        tuned = name not in self.behaviour.models
        return {
            "name": name,
            "endpoints": ["rerank"],
            "finetuned": tuned,
            "context_length": 510 if tuned else 4096,
        }

    def check_api_key(self, call: Call) -> Reply:
        return Reply({"valid": True, "organization_id": ORGANIZATION, "owner_id": USER})

    # ---- fine-tuning

    def create_model(self, call: Call) -> Reply:
        body = call.json
        if self.behaviour.fine_tuning == "closed":
            raise CohereError(self.behaviour.closed_status, self.behaviour.closed_message)
        settings = self._settings(body["settings"])
        now = datetime.now(timezone.utc)
        model = _Model(str(uuid.uuid4()), body["name"], settings, created=now, updated=now)
        with self._change:
            dataset = self._validated(settings["dataset_id"])
            self._refuse_many()
            thread = threading.Thread(
                target=self._run, args=(model, *dataset.split()), name=f"finetune-{model.id}"
            )
            self._models[model.id] = model
            self._workers.append(thread)
            model.move("STATUS_QUEUED", user=USER)
            answer = model.answer()
            thread.start()
        return Reply({"finetuned_model": answer})

    def _settings(self, given: dict[str, Any]) -> dict[str, Any]:
        base = given["base_model"]
        if base["base_type"] != "BASE_TYPE_RERANK":
            raise CohereError(400, f"base_type {base['base_type']} cannot be fine-tuned here")
        name = base.get("name") or "english"
        if name not in ("english", "multilingual"):
            raise CohereError(400, f"base model '{name}' does not exist: english or multilingual")
        numbers = DEFAULTS | (given.get("hyperparameters") or {})
        if bad := [key for key, value in numbers.items() if key in DEFAULTS and value <= 0]:
            raise CohereError(400, f"hyperparameter {bad[0]} must be greater than 0")
        return {
            "base_model": base | {"name": name, "version": "3.0.0"},
            "dataset_id": given["dataset_id"],
            "hyperparameters": numbers,
        }

    def _refuse_many(self) -> None:
        now = time.time()
        self._created = [moment for moment in self._created if moment > now - 86_400]
        if len(self._created) >= self.behaviour.jobs_per_day:
            most = self.behaviour.jobs_per_day
            raise CohereError(400, f"at most {most} fine-tuning jobs can be started in a day")
        self._created.append(now)

    def _validated(self, dataset_id: str) -> _Dataset:
        dataset = self._dataset(dataset_id)
        status = self._dataset_status(dataset)
        if status != "validated":
            raise CohereError(400, f"dataset '{dataset_id}' is not validated: it is {status}")
        if dataset.kind != RERANK_TYPE:
            raise CohereError(400, f"dataset '{dataset_id}' has type {dataset.kind}")
        return dataset

    def list_tuned(self, call: Call) -> Reply:
        with self._change:
            models = [model.answer() for model in self._models.values()]
        page, token = _page(models, call)
        total = {"total_size": len(models), "next_page_token": token}
        return Reply({"finetuned_models": page} | total)

    def get_tuned(self, call: Call, model_id: str) -> Reply:
        with self._change:
            return Reply({"finetuned_model": self._tuned(model_id).answer()})

    def delete_tuned(self, call: Call, model_id: str) -> Reply:
        with self._change:
            model = self._tuned(model_id)
            model.cancelled.set()
            model.move("STATUS_DELETED", user=USER)
            del self._models[model_id]
            self._change.notify_all()
        return Reply({})

    def list_events(self, call: Call, model_id: str) -> Reply:
        with self._change:
            events = list(self._tuned(model_id).events)
        page, token = _page(events, call)
        return Reply({"events": page, "next_page_token": token, "total_size": len(events)})

    def list_metrics(self, call: Call, model_id: str) -> Reply:
        with self._change:
            metrics = list(self._tuned(model_id).metrics)
        page, token = _page(metrics, call)
        return Reply({"step_metrics": page, "next_page_token": token})

    def _tuned(self, model_id: str) -> _Model:
        if model_id not in self._models:
            raise CohereError(404, f"finetuned model with id '{model_id}' not found")
        return self._models[model_id]

    # ---- a training, in its own thread

    def _run(self, model: _Model, rows: list[Row], evaluation: list[Row]) -> None:
        try:
            self._sleep(model, self.behaviour.state_seconds)
            self._start(model)
            self._train(model, rows, evaluation)
            self._move(model, "STATUS_DEPLOYING_API")
            self._sleep(model, self.behaviour.state_seconds)
            self._move(model, "STATUS_READY")
        except _Cancelled:
            pass
        except Exception as error:
            with self._change:
                if not self.behaviour.failing:
                    self.violations.append(f"crash in a training: {type(error).__name__}: {error}")
            with contextlib.suppress(_Cancelled):
                self._move(model, "STATUS_FAILED")

    def _start(self, model: _Model) -> None:
        """Wait until no other model trains."""

        def free() -> bool:
            others = [other for other in self._models.values() if other is not model]
            return all(other.status != "STATUS_FINETUNING" for other in others)

        with self._change:
            self._change.wait_for(lambda: model.cancelled.is_set() or free())
            self._move(model, "STATUS_FINETUNING")

    def _train(self, model: _Model, rows: list[Row], evaluation: list[Row]) -> None:
        for step in self.trainer(
            rows, evaluation, model.settings["hyperparameters"]["train_epochs"]
        ):
            line = {
                "created_at": _written(datetime.now(timezone.utc)),
                "step_number": step.number,
                "metrics": step.metrics,
            }
            with self._change:
                model.metrics.append(line)
                model.score = step.score
            self._sleep(model, self.behaviour.step_seconds)
        if self.behaviour.failing:
            raise RuntimeError("told to fail")

    def _sleep(self, model: _Model, seconds: float) -> None:
        if model.cancelled.wait(seconds):
            raise _Cancelled

    def _move(self, model: _Model, status: str) -> None:
        with self._change:
            if model.cancelled.is_set():
                raise _Cancelled
            if status == "STATUS_READY":
                model.completed = datetime.now(timezone.utc)
            model.move(status)
            self._change.notify_all()


def search_units(query: str, documents: list[str]) -> int:
    """Return what Cohere bills: a unit for each 100 documents, or pieces of 500 tokens."""
    room = max(1, 500 - len(words(query)))
    pieces = sum(max(1, math.ceil(len(words(document)) / room)) for document in documents)
    return math.ceil(pieces / 100)


def _joined(document: dict[str, Any], fields: list[str]) -> str:
    return "\n".join(str(document[name]) for name in fields if name in document)


def _shortened(text: str, most: int) -> str:
    ends = [match.end() for match in re.finditer(r"\w+|[^\w\s]", text)]
    return text if len(ends) <= most else text[: ends[most - 1]] if most > 0 else ""


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def _page(items: list[dict[str, Any]], call: Call) -> tuple[list[dict[str, Any]], str]:
    """Return the page that the call asks for, and the token of the next one, "" at the end."""
    orders = {"created_at": False, "created_at asc": False, "created_at desc": True}
    order = call.parameter("order_by") or "created_at"
    if order not in orders:
        raise CohereError(400, f"order_by: {order!r} is not supported, only created_at is")
    if orders[order]:
        items = items[::-1]
    token, size = call.parameter("page_token") or "0", int(call.parameter("page_size") or 0) or 50
    if not token.isdigit() or size < 0:
        raise CohereError(400, "invalid page_token or page_size")
    start = int(token)
    following = start + size
    return items[start:following], str(following) if following < len(items) else ""


def main() -> None:
    parser = argparse.ArgumentParser(description="Cohere's datasets, fine-tuning and rerank APIs.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--api-key")
    parser.add_argument("--model", metavar="FOLDER", help="rerank by this model's cosines")
    given = parser.parse_args()
    score = cosines(given.model) if given.model else word_overlap
    with CoherePlatform(score=score, port=given.port, api_key=given.api_key) as server:
        print(json.dumps({"base_url": server.base_url, "api_key": server.api_key}), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
