"""OpenAI's files, fine-tuning, chat and models APIs on 127.0.0.1, over a real socket.

    with OpenAIPlatform(teacher=my_rules, state_seconds=0.01) as server:
        client = OpenAI(base_url=server.base_url, api_key=server.api_key)
        server.fail(429, on="POST /fine_tuning/jobs", times=2)

Each request and each answer, every chunk of a stream included, is validated against the
published API description by openapi-core. What the client gets wrong is answered with 400,
what this server gets wrong with 500, and both are kept in `violations`. Without the
description file, the types of OpenAI's own client take its place.

A fine-tuning job really trains: see `platform_trainer`. As a process of its own it prints its
URL and its key on the first line:

    python integration-tests/openai_platform.py --model gpt-4o-mini-2024-07-18=FOLDER
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import hashlib
import io
import json
import random
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from contract_server import (
    Call,
    Contract,
    ContractError,
    ContractServer,
    DescriptionContract,
    Fault,
    Reply,
    ServiceError,
    fold_form,
    parse_form,
)
from platform_trainer import (
    Answer,
    LocalTrainer,
    Message,
    Refused,
    Step,
    Trainer,
    TrainingRequest,
    count_words,
)
from typing_extensions import Self

API_DESCRIPTION = Path(__file__).resolve().parents[2] / "shared" / "specs" / "openai.json"
ORGANIZATION = "org-platform"

# --------------------------------------------------------------------------------------
# Errors and values


class APIError(ServiceError):
    """An answer with a status of 400 or more, and OpenAI's error body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        error = {"message": message, "type": kind, "param": param, "code": code}
        super().__init__(status, message, {"error": error}, headers)


# --------------------------------------------------------------------------------------
# The contract


class MessageContract(Contract, Protocol):
    def check_message(self, message: Any) -> None: ...


class PlatformContract(DescriptionContract):
    """The published description of OpenAI's API.

    Besides, what a training file's message is (jsonschema). The content of a file is described
    as a JSON string, which it is not, there as here: only that the call exists is checked.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, error_schema="ErrorResponse")

    def check_message(self, message: Any) -> None:
        self.check_schema("ChatCompletionRequestMessage", message)


class SDKContract:
    """The types of OpenAI's client, for where the description file is not."""

    def __init__(self) -> None:
        from openai.types import (
            CreateEmbeddingResponse,
            FileDeleted,
            FileObject,
            FilePurpose,
            Model,
            ModelDeleted,
            embedding_create_params,
        )
        from openai.types.chat import (
            ChatCompletion,
            ChatCompletionChunk,
            ChatCompletionMessageParam,
            completion_create_params,
        )
        from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent, job_create_params
        from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
        from pydantic import TypeAdapter

        self._purpose = TypeAdapter(FilePurpose)
        self._message = TypeAdapter(ChatCompletionMessageParam)
        self._chunk = ChatCompletionChunk
        self._requests: dict[str, TypeAdapter[Any]] = {
            "/chat/completions": TypeAdapter(completion_create_params.CompletionCreateParams),
            "/embeddings": TypeAdapter(embedding_create_params.EmbeddingCreateParams),
            "/fine_tuning/jobs": TypeAdapter(job_create_params.JobCreateParams),
        }
        self._answers: dict[str, Any] = {
            "chat.completion": ChatCompletion,
            "file": FileObject,
            "fine_tuning.job": FineTuningJob,
            "fine_tuning.job.event": FineTuningJobEvent,
            "fine_tuning.job.checkpoint": FineTuningJobCheckpoint,
            "model": Model,
        }
        self._deleted: dict[str, Any] = {"file": FileDeleted, "model": ModelDeleted}
        self._embeddings = CreateEmbeddingResponse

    def check_request(self, call: Call, template: str) -> None:
        if call.method != "post":
            return
        if template == "/files":
            fields = fold_form(parse_form(call.content_type, call.body))
            if "file" not in fields:
                raise ContractError("$.file: Field required")
            self._validate(self._purpose.validate_python, fields.get("purpose", b"").decode())
        elif template in self._requests:
            self._validate(self._requests[template].validate_python, call.json)

    def check_reply(self, call: Call, template: str, status: int, body: Any) -> None:
        if status >= 400:
            if set(body) != {"error"} or set(body["error"]) != {"message", "type", "param", "code"}:
                raise ContractError("$.error: not OpenAI's error body")
        elif template == "/embeddings":
            self._validate(self._embeddings.model_validate, body)
        elif body.get("object") == "list":
            for item in body["data"]:
                self._check_object(item, self._answers)
        else:
            self._check_object(body, self._deleted if "deleted" in body else self._answers)

    def check_chunk(self, call: Call, chunk: dict[str, Any]) -> None:
        self._validate(self._chunk.model_validate, chunk)

    def check_message(self, message: Any) -> None:
        self._validate(self._message.validate_python, message)

    def _check_object(self, value: dict[str, Any], types: Mapping[str, Any]) -> None:
        kind = str(value.get("object"))
        if kind not in types:
            raise ContractError(f"$.object: {kind!r} is none of {sorted(types)}")
        self._validate(types[kind].model_validate, value)

    @staticmethod
    def _validate(validate: Callable[[Any], Any], value: Any) -> None:
        from pydantic import ValidationError

        try:
            _read(validate(value))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise ContractError(f"$.{place}: {first['msg']}") from None


def _read(value: Any) -> None:
    """Go through a validated value: lists in a TypedDict are validated only when read."""
    if isinstance(value, dict):
        value = value.values()
    elif isinstance(value, str | bytes) or not isinstance(value, Iterable):
        return
    for item in value:
        _read(item)


@cache
def load_contract(path: Path) -> MessageContract:
    """Return the contract, loaded once for each path."""
    return PlatformContract(path) if path.exists() else SDKContract()


# --------------------------------------------------------------------------------------
# Behaviour


@dataclass
class Behaviour:
    """How the service behaves; may be changed while it runs."""

    state_seconds: float = 0.02
    """How long a job stays in `validating_files` and in `queued`."""
    step_seconds: float = 0.0
    """Waited after each training step."""
    file_seconds: float = 0.02
    """How long an upload stays `uploaded` before it is `processed`."""
    accepts_unprocessed_files: bool = True
    """False: a job on a file that is still `uploaded` is refused with 400."""
    chat_seconds: float = 0.0
    """Latency of chat."""
    chunk_seconds: float = 0.0
    """Between the chunks of a stream."""
    running_jobs: int = 4
    """Jobs that run at a time; others wait in `queued`."""
    minimum_examples: int = 10
    fine_tuning_closed: bool = False
    """Job creation is refused with 403, by the three texts below. The real service words
    this by the kind of account: code and message are examples."""
    closed_code: str = "fine_tuning_unavailable"
    closed_kind: str = "invalid_request_error"
    closed_message: str = (
        "Fine-tuning is not available to your organization. "
        "Existing fine-tuned models can still be used for inference."
    )
    quota_exceeded: bool = False
    """Job creation and chat are refused with 429 `insufficient_quota`."""
    unsafe_files: bool = False
    """Jobs fail while their files are validated: the content is refused."""
    base_models: dict[str, str] = field(
        default_factory=lambda: {
            "gpt-4o-mini-2024-07-18": "gpt-4o-mini-2024-07-18",
            "gpt-4o-mini": "gpt-4o-mini-2024-07-18",
            "gpt-3.5-turbo": "gpt-3.5-turbo-0125",
            "gpt-3.5-turbo-0125": "gpt-3.5-turbo-0125",
        }
    )
    """Names that a job may give to the models that can be fine-tuned."""
    chat_models: set[str] | None = None
    """Models that the teacher answers for; any name that is not "ft:..." if None."""


# --------------------------------------------------------------------------------------
# Files


@dataclass
class _File:
    id: str
    filename: str
    purpose: str
    content: bytes
    created: float
    ready: float
    expires_at: int | None = None

    def answer(self) -> dict[str, Any]:
        body = {
            "id": self.id,
            "object": "file",
            "bytes": len(self.content),
            "created_at": int(self.created),
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed" if self.processed else "uploaded",
        }
        return body if self.expires_at is None else body | {"expires_at": self.expires_at}

    @property
    def processed(self) -> bool:
        return time.monotonic() >= self.ready


class InvalidFile(Exception):
    """What a job's error says about a training or validation file."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def check_examples(
    content: bytes, role: str, method: str, minimum: int, contract: MessageContract
) -> int:
    """Validate a JSONL file as the service does before it trains; return its token count.

    Raises:
        InvalidFile: with the line number of the first line that does not fit.
    """
    code = f"invalid_{role}"
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InvalidFile(code, f"Invalid file format. The file is not UTF-8: {error}") from None
    examples = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    for number, line in examples:
        try:
            _check_example(json.loads(line), method, contract)
        except (ValueError, ContractError) as error:
            message = f"Invalid file format. Line {number}: {error}"
            raise InvalidFile(code, message) from None
    if role == "training_file" and len(examples) < minimum:
        name = role.replace("_", " ").capitalize()
        message = f"{name} has {len(examples)} example(s), but must have at least {minimum}"
        raise InvalidFile("invalid_n_examples", f"{message} examples")
    return sum(count_tokens(line) for _, line in examples)


def _check_example(example: Any, method: str, contract: MessageContract) -> None:
    if not isinstance(example, dict):
        raise ContractError("the example is not a JSON object")
    if method == "dpo":
        _check_keys(example, {"input", "preferred_output", "non_preferred_output"}, set())
        prompt = example["input"]
        _check_keys(prompt, {"messages"}, {"tools", "parallel_tool_calls"})
        _check_messages(prompt["messages"], contract)
        for name in ("preferred_output", "non_preferred_output"):
            answer = example[name]
            if not isinstance(answer, list) or len(answer) != 1:
                raise ContractError(f'key "{name}": one assistant message is wanted')
            _check_messages(answer, contract, ends_with_assistant=True)
        return
    _check_keys(example, {"messages"}, {"tools", "parallel_tool_calls", "functions"})
    _check_messages(example["messages"], contract, ends_with_assistant=True)


def _check_keys(value: Any, wanted: set[str], allowed: set[str]) -> None:
    if not isinstance(value, dict):
        raise ContractError("a JSON object is wanted")
    if missing := sorted(wanted - set(value)):
        raise ContractError(f'missing key "{missing[0]}"')
    if extra := sorted(set(value) - wanted - allowed):
        raise ContractError(f'unexpected key "{extra[0]}"')


def _check_messages(
    messages: Any, contract: MessageContract, *, ends_with_assistant: bool = False
) -> None:
    if not isinstance(messages, list) or not messages:
        raise ContractError('key "messages": a list of messages is wanted')
    for number, message in enumerate(messages, 1):
        try:
            contract.check_message(message)
        except ContractError as error:
            raise ContractError(f"message {number}, {error}") from None
        if message.get("weight", 0) not in (0, 1):
            raise ContractError(f'message {number}, key "weight": 0 or 1 is wanted')
    if ends_with_assistant and messages[-1]["role"] != "assistant":
        raise ContractError("the last message must be from the assistant")


def count_tokens(text: str) -> int:
    """About as many tokens as the service would count: words and marks."""
    return len(re.findall(r"\w+|[^\w\s]", text))


# --------------------------------------------------------------------------------------
# Jobs


@dataclass
class _Job:
    id: str
    model: str
    training_file: str
    validation_file: str | None
    method: str
    given: dict[str, Any]
    """The hyperparameters as the client gave them."""
    suffix: str
    seed: int
    metadata: dict[str, str] | None
    integrations: list[dict[str, Any]] | None
    created: int
    status: str = "validating_files"
    fine_tuned_model: str | None = None
    finished: int | None = None
    trained_tokens: int | None = None
    error: dict[str, Any] | None = None
    result_files: list[str] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    """Oldest first."""
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    """Oldest first."""
    paused: bool = False
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def ended(self) -> bool:
        return self.status in ("succeeded", "failed", "cancelled")

    def hyperparameters(self) -> dict[str, Any]:
        """What was asked for; numbers in the place of "auto" once the job is queued."""
        auto = {"n_epochs": 3, "batch_size": 1, "learning_rate_multiplier": 1.8}
        if self.method == "dpo":
            auto["beta"] = 0.1
        settled = self.status not in ("validating_files", "failed")
        return {
            name: number
            if settled and self.given.get(name, "auto") == "auto"
            else self.given.get(name, "auto")
            for name, number in auto.items()
        }

    def answer(self) -> dict[str, Any]:
        numbers = self.hyperparameters()
        return {
            "id": self.id,
            "object": "fine_tuning.job",
            "model": self.model,
            "created_at": self.created,
            "finished_at": self.finished,
            "fine_tuned_model": self.fine_tuned_model,
            "organization_id": ORGANIZATION,
            "result_files": self.result_files,
            "status": self.status,
            "validation_file": self.validation_file,
            "training_file": self.training_file,
            "hyperparameters": numbers if self.method == "supervised" else {},
            "method": {"type": self.method, self.method: {"hyperparameters": numbers}},
            "trained_tokens": self.trained_tokens,
            "error": self.error,
            "estimated_finish": int(time.time()) + 1 if self.status == "running" else None,
            "integrations": self.integrations or [],
            "seed": self.seed,
            "metadata": self.metadata,
        }


class _Cancelled(Exception):
    """The job was cancelled, or the server stops."""


# --------------------------------------------------------------------------------------
# Chat


def extractive_teacher(messages: list[Message], body: dict[str, Any]) -> Message:
    """Answer by rules: a tool's call, JSON by the schema, or a sentence out of the context.

    A tool is called as long as no tool has answered, where the client forces one or the last
    message mentions one by name. The sentence is that of the prompt's context with the most
    words in common with the query.
    """
    text = _text(messages[-1])
    named = _tool_to_call(messages, body, text)
    if named is not None:
        arguments = instance_of(named.get("parameters", {"type": "object"}), text)
        call = {"name": named["name"], "arguments": json.dumps(arguments)}
        if "functions" in body:
            return {"content": None, "function_call": call}
        return {"content": None, "tool_calls": [{"function": call}]}
    form = body.get("response_format") or {}
    if form.get("type") == "json_schema":
        return {"content": json.dumps(instance_of(form["json_schema"].get("schema", {}), text))}
    if form.get("type") == "json_object":
        return {"content": json.dumps({"answer": _best_sentence(text)})}
    return {"content": _best_sentence(text)}


def _text(message: Message) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text", "") for part in content)


def _tool_to_call(
    messages: list[Message], body: dict[str, Any], text: str
) -> dict[str, Any] | None:
    tools: list[dict[str, Any]] = [
        tool["function"] for tool in body.get("tools") or [] if "function" in tool
    ]
    tools += body.get("functions") or []
    choice = body.get("tool_choice", body.get("function_call", "auto"))
    if not tools or choice == "none":
        return None
    if isinstance(choice, dict):
        wanted = choice.get("function", choice).get("name")
        return next(tool for tool in tools if tool["name"] == wanted)
    if choice == "required":
        return tools[0]
    if messages[-1]["role"] in ("tool", "function"):
        return None
    return next((tool for tool in tools if tool["name"] in text), None)


def instance_of(schema: dict[str, Any], text: str, root: dict[str, Any] | None = None) -> Any:
    """Return a value that fits a JSON schema of the usual kind, with words and numbers of text."""
    root = root or schema
    if "$ref" in schema:
        place: Any = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            place = place[part]
        return instance_of(place, text, root)
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return instance_of(schema[key][0], text, root)
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else schema["enum"][0]
    numbers = [int(number) for number in re.findall(r"\b\d{1,9}\b", text)]
    number = max(schema.get("minimum", 0), numbers[0] if numbers else 0)
    values: dict[str, Callable[[], Any]] = {
        "object": lambda: {
            name: instance_of(part, text, root)
            for name, part in schema.get("properties", {}).items()
        },
        "array": lambda: [
            instance_of(schema.get("items", {"type": "string"}), text, root)
            for _ in range(max(1, schema.get("minItems", 1)))
        ],
        "integer": lambda: min(number, schema.get("maximum", number)),
        "number": lambda: float(min(number, schema.get("maximum", number))),
        "boolean": lambda: bool(numbers),
        "null": lambda: None,
        "string": lambda: _best_sentence(text)[: schema.get("maxLength", 200)],
    }
    kind = schema.get("type", "object" if "properties" in schema else "string")
    return values[kind if isinstance(kind, str) else kind[0]]()


def _best_sentence(text: str) -> str:
    """The sentence of a prompt's context that shares most words with its query."""
    query = re.findall(r"(?:Query|Question):\s*(.+)", text)
    asked = set(re.findall(r"\w{3,}", (query[-1] if query else text).lower()))
    context = re.search(r"-{5,}\s*(.*?)\s*-{5,}", text, re.S)
    passage = context[1] if context else text.split("Query:")[0]
    passage = re.sub(r"^\w+: .*/.*$", "", passage, flags=re.M)  # LlamaIndex's "file_path: ..."
    sentences = [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n{2,}", passage)]
    sentences = [" ".join(part.split()) for part in sentences if part]
    if not sentences:
        return "I do not know."

    def shared(sentence: str) -> int:
        return len(asked & set(re.findall(r"\w{3,}", sentence.lower())))

    return max(sentences, key=shared)


def _message(given: Message, body: dict[str, Any], token: Callable[[str], str]) -> Message:
    """Complete the message of a teacher or a model: role, ids, arguments as text."""
    message: Message = {"role": "assistant", "content": None, "refusal": None}
    message |= {key: given[key] for key in ("content", "refusal") if key in given}
    if given.get("function_call"):
        message["function_call"] = _function(given["function_call"])
    if given.get("tool_calls"):
        message["tool_calls"] = [
            {
                "id": call.get("id") or token("call_"),
                "type": "function",
                "function": _function(call["function"]),
            }
            for call in given["tool_calls"]
        ]
    return message


def _function(function: dict[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"name": function["name"], "arguments": text}


def _finish(message: Message, body: dict[str, Any]) -> str:
    """Shorten the message to the asked length, and say why it ends."""
    if message.get("tool_calls"):
        return "tool_calls"
    if message.get("function_call"):
        return "function_call"
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    tokens = list(re.finditer(r"\w+|[^\w\s]", message["content"] or ""))
    if limit is None or len(tokens) <= limit:
        return "stop"
    message["content"] = message["content"][: tokens[limit - 1].end()]
    return "length"


def _pieces(text: str) -> list[str]:
    """Cut a text as a stream of tokens is cut: a word with the space before it."""
    return re.findall(r"\s*\S+\s*$|\s*\S+", text) or ([text] if text else [])


def _deltas(message: Message) -> Iterator[dict[str, Any]]:
    yield {"role": "assistant", "content": None if message.get("tool_calls") else ""}
    for piece in _pieces(message["content"] or ""):
        yield {"content": piece}
    for index, call in enumerate(message.get("tool_calls", ())):
        head = {"name": call["function"]["name"], "arguments": ""}
        yield {"tool_calls": [{"index": index, **call, "function": head}]}
        for piece in _pieces(call["function"]["arguments"]):
            yield {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}
    if "function_call" in message:
        yield {"function_call": {"name": message["function_call"]["name"], "arguments": ""}}
        for piece in _pieces(message["function_call"]["arguments"]):
            yield {"function_call": {"arguments": piece}}


# --------------------------------------------------------------------------------------
# The service

ROUTES: tuple[tuple[str, str, str], ...] = (
    ("post", "/files", "create_file"),
    ("get", "/files", "list_files"),
    ("get", "/files/{file_id}", "retrieve_file"),
    ("delete", "/files/{file_id}", "delete_file"),
    ("get", "/files/{file_id}/content", "file_content"),
    ("post", "/fine_tuning/jobs", "create_job"),
    ("get", "/fine_tuning/jobs", "list_jobs"),
    ("get", "/fine_tuning/jobs/{fine_tuning_job_id}", "retrieve_job"),
    ("post", "/fine_tuning/jobs/{fine_tuning_job_id}/cancel", "cancel_job"),
    ("post", "/fine_tuning/jobs/{fine_tuning_job_id}/pause", "pause_job"),
    ("post", "/fine_tuning/jobs/{fine_tuning_job_id}/resume", "resume_job"),
    ("get", "/fine_tuning/jobs/{fine_tuning_job_id}/events", "list_events"),
    ("get", "/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints", "list_checkpoints"),
    ("post", "/chat/completions", "create_chat_completion"),
    ("post", "/embeddings", "create_embedding"),
    ("get", "/models", "list_models"),
    ("get", "/models/{model}", "retrieve_model"),
    ("delete", "/models/{model}", "delete_model"),
)
"""Method, path and the method of `OpenAIPlatform` that answers."""


class OpenAIPlatform(ContractServer):
    """The service, in threads of this process; a context manager.

    Args:
        trainer: trains the jobs' models; by default a trainer of counts (milliseconds).
        teacher: answers chat with every model but the fine-tuned ones; by rules by default.
        api_key: what clients have to show; made up by default.
        description: the API description; where it is not, the client's own types are used.
        port: a free one if 0.
        behaviour: the fields of `Behaviour`.

    The service knows no idempotency keys: the API description has none, and OpenAI's client
    sends none unless it is told which header would carry it.
    """

    routes = ROUTES
    name = "openai-platform"
    prefix = "/v1"
    _contract: MessageContract

    def __init__(
        self,
        *,
        trainer: Trainer = count_words,
        teacher: Answer = extractive_teacher,
        api_key: str | None = None,
        description: Path = API_DESCRIPTION,
        port: int = 0,
        **behaviour: Any,
    ) -> None:
        key = api_key or f"sk-test-{secrets.token_hex(12)}"
        super().__init__(load_contract(description), api_key=key, port=port)
        self.trainer = trainer
        self.teacher = teacher
        self.behaviour = Behaviour(**behaviour)
        self._files: dict[str, _File] = {}
        self._jobs: dict[str, _Job] = {}
        self._models: dict[str, tuple[int, Answer]] = {}

    # ---- life and diary

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="openai-platform-")
        return super().__enter__()

    def __exit__(self, *reason: object) -> None:
        try:
            super().__exit__(*reason)
        finally:
            self._folder.cleanup()

    def cancel_work(self) -> None:
        for job in self._jobs.values():
            job.cancelled.set()

    @property
    def chunk_seconds(self) -> float:
        return self.behaviour.chunk_seconds

    @property
    def files(self) -> dict[str, bytes]:
        """File id to content."""
        with self._change:
            return {file.id: file.content for file in self._files.values()}

    @property
    def jobs(self) -> dict[str, dict[str, Any]]:
        """Job id to the job as clients see it; oldest first."""
        with self._change:
            return {job.id: job.answer() for job in self._jobs.values()}

    def wait_for(self, job_id: str, *statuses: str, timeout: float = 60) -> dict[str, Any]:
        """Wait for a job to reach one of the states; return it as clients see it."""
        with self._change:
            job = self._jobs[job_id]
            if not self._change.wait_for(lambda: job.status in statuses, timeout):
                raise TimeoutError(f"{job_id} is {job.status} after {timeout} s")
            return job.answer()

    # ---- errors

    def refusal(self, status: int, message: str) -> APIError:
        if status < 500:
            return APIError(status, message)
        return APIError(status, message, kind="server_error")

    def contract_refusal(self, error: Exception, call: Call, template: str) -> APIError:
        param = re.match(r"\$\.(\w+)", str(error))
        message = f"{call.method.upper()} {template}: {error}"
        return APIError(400, message, param=param[1] if param else None)

    def rate_limited(self, seconds: float) -> APIError:
        return APIError(
            429,
            f"Rate limit reached for requests. Please try again in {seconds:g}s.",
            kind="requests",
            code="rate_limit_exceeded",
            headers={
                "retry-after": f"{max(1, round(seconds))}",
                "retry-after-ms": f"{round(seconds * 1000)}",
                "x-ratelimit-limit-requests": "500",
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-requests": f"{seconds:g}s",
            },
        )

    def fault_error(self, status: int, fault: Fault) -> ServiceError:
        if status == 503:
            return self.refusal(503, "That model is currently overloaded.")
        return super().fault_error(status, fault)

    def authenticate(self, call: Call) -> None:
        scheme, _, key = call.headers.get("authorization", "").partition(" ")
        if scheme != "Bearer" or not key:
            message = "You didn't provide an API key. Send it as a Bearer token."
            raise APIError(401, message)
        if not secrets.compare_digest(key, self.api_key):
            hidden = f"{key[:3]}***{key[-2:]}" if len(key) > 8 else "***"
            message = f"Incorrect API key provided: {hidden}."
            raise APIError(401, message, code="invalid_api_key")

    def sign(self, reply: Reply) -> None:
        reply.headers["x-request-id"] = self._token("req_")

    # ---- files

    def create_file(self, call: Call) -> Reply:
        fields = parse_form(call.content_type, call.body)
        folded = fold_form(fields)
        filename, content = fields["file"]
        if not content:
            raise APIError(400, "File is empty.", param="file")
        expires = json.loads(folded["expires_after"]) if "expires_after" in folded else None
        file = self._keep_file(filename or "upload", folded["purpose"].decode(), content)
        if expires:
            file.expires_at = int(file.created) + expires["seconds"]
        return Reply(file.answer())

    def _keep_file(self, filename: str, purpose: str, content: bytes) -> _File:
        ready = time.monotonic() + self.behaviour.file_seconds
        identifier = self._token("file-")
        file = _File(identifier, filename, purpose, content, time.time(), ready)
        with self._change:
            self._files[file.id] = file
        return file

    def list_files(self, call: Call) -> Reply:
        with self._change:
            files = list(self._files.values())
        purpose = call.parameter("purpose")
        files = [file for file in files if purpose in (None, file.purpose)]
        if call.parameter("order", "desc") == "desc":
            files.reverse()
        page = _page([file.answer() for file in files], call, limit=10_000, most=10_000)
        # Described as text, so "" where the list is empty.
        return Reply(page | {"first_id": page["first_id"] or "", "last_id": page["last_id"] or ""})

    def retrieve_file(self, call: Call, file_id: str) -> Reply:
        return Reply(self._file(file_id).answer())

    def delete_file(self, call: Call, file_id: str) -> Reply:
        with self._change:
            file = self._file(file_id)
            del self._files[file.id]
        return Reply({"id": file.id, "object": "file", "deleted": True})

    def file_content(self, call: Call, file_id: str) -> Reply:
        return Reply(content=self._file(file_id).content)

    def _file(self, file_id: str) -> _File:
        with self._change:
            if file_id in self._files:
                return self._files[file_id]
        raise APIError(404, f"No such File object: {file_id}", param="id")

    # ---- jobs

    def create_job(self, call: Call) -> Reply:
        body = call.json
        self._refuse_closed()
        self._refuse_quota()
        method, given = _method(body)
        metadata = body.get("metadata")
        _check_metadata(metadata)
        model = self._trainable(body["model"])
        for role in ("training_file", "validation_file"):
            if body.get(role) is not None:
                self._check_file(role, body[role])
        job = _Job(
            id=self._token("ftjob-"),
            model=model,
            training_file=body["training_file"],
            validation_file=body.get("validation_file"),
            method=method,
            given=given,
            suffix=body.get("suffix") or "",
            seed=random.randrange(2**31) if body.get("seed") is None else body["seed"],
            metadata=metadata,
            integrations=body.get("integrations"),
            created=int(time.time()),
        )
        thread = threading.Thread(target=self._run_job, args=(job,), name=job.id)
        with self._change:
            self._jobs[job.id] = job
            self._event(job, f"Created fine-tuning job: {job.id}")
            self._workers.append(thread)
            answer = job.answer()
            thread.start()
        return Reply(answer)

    def _refuse_closed(self) -> None:
        behaviour = self.behaviour
        if behaviour.fine_tuning_closed:
            raise APIError(
                403,
                behaviour.closed_message,
                kind=behaviour.closed_kind,
                code=behaviour.closed_code,
            )

    def _refuse_quota(self) -> None:
        if self.behaviour.quota_exceeded:
            message = "You exceeded your current quota, please check your plan and billing details."
            raise APIError(429, message, kind="insufficient_quota", code="insufficient_quota")

    def _trainable(self, model: str) -> str:
        with self._change:
            if model in self._models:
                return model
        if model in self.behaviour.base_models:
            return self.behaviour.base_models[model]
        message = f"Model {model} is not available for fine-tuning or does not exist."
        raise APIError(400, message, param="model", code="model_not_available")

    def _check_file(self, role: str, file_id: str) -> None:
        with self._change:
            file = self._files.get(file_id)
        if file is None:
            raise APIError(400, f"invalid {role}: {file_id}", param=role)
        if file.purpose != "fine-tune":
            message = f"File '{file_id}' has purpose '{file.purpose}', not 'fine-tune'."
            raise APIError(400, message, param=role)
        if not file.processed and not self.behaviour.accepts_unprocessed_files:
            message = (
                f"File '{file_id}' is still being processed and is not ready to be used for "
                "fine-tuning. Please try again later."
            )
            raise APIError(400, message, param=role)

    def list_jobs(self, call: Call) -> Reply:
        wanted = {
            match[1]: value
            for name, value in call.query
            if (match := re.fullmatch(r"metadata\[(.+)\]", name))
        }
        without = call.parameter("metadata") == "null"
        with self._change:
            jobs = [
                job.answer()
                for job in reversed(self._jobs.values())
                if wanted.items() <= (job.metadata or {}).items() and not (without and job.metadata)
            ]
        return Reply(_page(jobs, call, limit=20, ids=False))

    def retrieve_job(self, call: Call, job_id: str) -> Reply:
        with self._change:
            return Reply(self._job(job_id).answer())

    def cancel_job(self, call: Call, job_id: str) -> Reply:
        with self._change:
            job = self._unfinished(job_id)
            job.cancelled.set()
            self._end(job, "cancelled")
            self._event(job, "The job was cancelled")
            return Reply(job.answer())

    def pause_job(self, call: Call, job_id: str) -> Reply:
        # The described states have no "paused": the job says `running` and stands still.
        return self._set_paused(job_id, True, "The job was paused")

    def resume_job(self, call: Call, job_id: str) -> Reply:
        return self._set_paused(job_id, False, "The job was resumed")

    def _set_paused(self, job_id: str, paused: bool, message: str) -> Reply:
        with self._change:
            job = self._unfinished(job_id)
            job.paused = paused
            self._event(job, message)
            return Reply(job.answer())

    def list_events(self, call: Call, job_id: str) -> Reply:
        with self._change:
            events = list(reversed(self._job(job_id).events))
        return Reply(_page(events, call, limit=20, ids=False))

    def list_checkpoints(self, call: Call, job_id: str) -> Reply:
        with self._change:
            checkpoints = list(reversed(self._job(job_id).checkpoints))
        return Reply(_page(checkpoints, call, limit=10))

    def _job(self, job_id: str) -> _Job:
        if job_id in self._jobs:
            return self._jobs[job_id]
        message = f"Could not find fine tune: {job_id}"
        raise APIError(404, message, param="fine_tune_id", code="fine_tune_not_found")

    def _unfinished(self, job_id: str) -> _Job:
        job = self._job(job_id)
        if job.ended:
            message = f"Job {job_id} has already ended: its status is {job.status}."
            raise APIError(400, message)
        return job

    def _event(
        self, job: _Job, message: str, *, level: str = "info", data: dict[str, Any] | None = None
    ) -> None:
        event = {
            "object": "fine_tuning.job.event",
            "id": self._token("ftevent-"),
            "created_at": int(time.time()),
            "level": level,
            "message": message,
            "type": "message" if data is None else "metrics",
            "data": data or {},
        }
        with self._change:
            job.events.append(event)
            self._change.notify_all()

    def _end(self, job: _Job, status: str) -> None:
        with self._change:
            job.status = status
            job.finished = int(time.time())
            self._change.notify_all()

    # ---- a job's run, in its own thread

    def _run_job(self, job: _Job) -> None:
        try:
            tokens = self._validate(job)
            self._queue(job)
            self._train(job, tokens)
        except _Cancelled:
            with self._change:  # the server stops
                if not job.ended:
                    self._end(job, "cancelled")
        except InvalidFile as error:
            param = "validation_file" if "validation" in error.code else "training_file"
            self._failed(job, error.code, str(error), param)
        except Refused as error:
            self._failed(job, error.code or "invalid_request", str(error), None)
        except Exception as error:
            message = f"The job failed due to an internal error: {type(error).__name__}: {error}"
            self._failed(job, "server_error", message, None)

    def _failed(self, job: _Job, code: str, message: str, param: str | None) -> None:
        with self._change:
            if job.ended:
                return
            job.error = {"code": code, "message": message, "param": param}
            self._end(job, "failed")
            self._event(job, message, level="error")

    def _sleep(self, job: _Job, seconds: float) -> None:
        """Wait, also as long as the job is paused; raise as soon as it is cancelled."""
        with self._change:
            self._change.wait_for(job.cancelled.is_set, seconds)
            self._change.wait_for(lambda: job.cancelled.is_set() or not job.paused)
            if job.cancelled.is_set():
                raise _Cancelled

    def _validate(self, job: _Job) -> int:
        """Check the files; return the training file's tokens."""
        files = f"training file: {job.training_file}"
        if job.validation_file:
            files += f" and validation file: {job.validation_file}"
        self._event(job, f"Validating {files}")
        self._sleep(job, self.behaviour.state_seconds)
        if self.behaviour.unsafe_files:
            raise InvalidFile(
                "unsafe_file",
                "The job failed due to an unsafe training file. This training file was blocked "
                "because too many examples were flagged by our moderation.",
            )
        tokens = self._examples(job, "training_file", job.training_file)
        if job.validation_file:
            self._examples(job, "validation_file", job.validation_file)
        return tokens

    def _examples(self, job: _Job, role: str, file_id: str) -> int:
        with self._change:
            file = self._files.get(file_id)
        if file is None:
            raise InvalidFile(f"invalid_{role}", f"The file {file_id} was deleted.")
        minimum = self.behaviour.minimum_examples
        return check_examples(file.content, role, job.method, minimum, self._contract)

    def _queue(self, job: _Job) -> None:
        with self._change:
            if job.cancelled.is_set():
                raise _Cancelled
            job.status = "queued"
            self._event(job, "Files validated, moving job to queued state")
        self._sleep(job, self.behaviour.state_seconds)
        with self._change:
            self._change.wait_for(
                lambda: job.cancelled.is_set() or self._running() < self.behaviour.running_jobs
            )
            if job.cancelled.is_set():
                raise _Cancelled
            job.status = "running"
            self._event(job, "Fine-tuning job started")

    def _running(self) -> int:
        return sum(job.status == "running" for job in self._jobs.values())

    def _train(self, job: _Job, tokens: int) -> None:
        request = self._training_request(job)
        steps: list[Step] = []
        answer = None
        for step in (iterator := self.trainer(request)):
            steps.append(step)
            self._report(job, request, step)
            answer = step.answer or answer
            try:
                self._sleep(job, self.behaviour.step_seconds)
            except _Cancelled:
                if hasattr(iterator, "close"):
                    iterator.close()  # now, not whenever it is collected
                raise
        table = base64.b64encode(_table(steps).encode())  # the real one's content is base64 too
        result = self._keep_file("step_metrics.csv", "fine-tune-results", table)
        with self._change:
            if job.cancelled.is_set():
                raise _Cancelled
            # A trainer that makes no model leaves the base model to answer.
            self._models[request.fine_tuned_model] = (int(time.time()), answer or self.teacher)
            job.fine_tuned_model = request.fine_tuned_model
            job.trained_tokens = tokens * request.n_epochs
            job.result_files = [result.id]
            self._event(job, f"New fine-tuned model created: {job.fine_tuned_model}")
            self._end(job, "succeeded")
            self._event(job, "The job has successfully completed")

    def _training_request(self, job: _Job) -> TrainingRequest:
        folder = Path(self._folder.name) / job.id
        (folder / "work").mkdir(parents=True)
        paths: dict[str, Path] = {}
        with self._change:
            given = {"training": job.training_file, "validation": job.validation_file}
            for role, file_id in given.items():
                if file_id is not None:
                    paths[role] = folder / f"{role}.jsonl"
                    paths[role].write_bytes(self._file(file_id).content)
            numbers = job.hyperparameters()
        base = job.model if not job.model.startswith("ft:") else job.model.split(":")[1]
        name = f"ft:{base}:{ORGANIZATION}:{job.suffix}:{self._token('', 8)}"
        return TrainingRequest(
            model=job.model,
            fine_tuned_model=name,
            training_file=paths["training"],
            validation_file=paths.get("validation"),
            method=job.method,
            n_epochs=numbers["n_epochs"],
            batch_size=numbers["batch_size"],
            learning_rate_multiplier=numbers["learning_rate_multiplier"],
            seed=job.seed,
            folder=folder / "work",
            cancelled=job.cancelled,
        )

    def _report(self, job: _Job, request: TrainingRequest, step: Step) -> None:
        data = {"step": step.step, "total_steps": step.total_steps} | _metrics(step)
        message = f"Step {step.step}/{step.total_steps}: training loss={step.train_loss:.2f}"
        if step.valid_loss is not None:
            message += f", validation loss={step.valid_loss:.2f}"
        with self._change:
            self._event(job, message, data=data)
            if step.answer is None:
                return
            name = f"{request.fine_tuned_model}:ckpt-step-{step.step}"
            if step.step == step.total_steps:
                name = request.fine_tuned_model
            self._models[name] = (int(time.time()), step.answer)
            checkpoint = {
                "object": "fine_tuning.job.checkpoint",
                "id": self._token("ftckpt_"),
                "created_at": int(time.time()),
                "fine_tuned_model_checkpoint": name,
                "fine_tuning_job_id": job.id,
                "metrics": {"step": step.step} | _metrics(step),
                "step_number": step.step,
            }
            job.checkpoints.append(checkpoint)
            self._event(job, f"Checkpoint created at step {step.step}")

    # ---- chat, embeddings, models

    def create_chat_completion(self, call: Call) -> Reply:
        body = call.json
        self._refuse_quota()
        self._stopping.wait(self.behaviour.chat_seconds)
        answer, trained = self._answerer(body["model"])
        messages, usage = [], {"prompt_tokens": count_tokens(json.dumps(body["messages"]))}
        given: Message = {}
        for _ in range(body.get("n") or 1):
            try:
                given = answer(body["messages"], body)
            except Refused as error:
                raise APIError(400, str(error), param="messages", code=error.code) from None
            messages.append(_message(given, body, self._token))
        if not trained:  # a trained model may well miss the schema; the real one cannot
            self._check_form(body, messages)
        reasons = [_finish(message, body) for message in messages]
        usage["completion_tokens"] = sum(count_tokens(json.dumps(m)) for m in messages)
        usage |= given.get("usage", {})
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
        completion = {
            "id": self._token("chatcmpl-"),
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.behaviour.base_models.get(body["model"], body["model"]),
            "choices": [
                {"index": index, "message": message, "logprobs": None, "finish_reason": reason}
                for index, (message, reason) in enumerate(zip(messages, reasons, strict=True))
            ],
            "usage": usage,
        }
        if body.get("stream"):
            return Reply(chunks=list(self.stream_chunks(completion, body)))
        return Reply(completion)

    def stream_chunks(
        self, completion: dict[str, Any], body: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """Cut a whole completion into the chunks of a stream."""
        wants_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        head = {key: completion[key] for key in ("id", "created", "model")}
        head["object"] = "chat.completion.chunk"
        if wants_usage:
            head["usage"] = None
        for choice in completion["choices"]:
            index, reason = choice["index"], choice["finish_reason"]
            rest: dict[str, Any] = {"logprobs": None, "finish_reason": None}
            for delta in _deltas(choice["message"]):
                yield head | {"choices": [{"index": index, "delta": delta} | rest]}
            last = {"index": index, "delta": {}, "logprobs": None, "finish_reason": reason}
            yield head | {"choices": [last]}
        if wants_usage:
            yield head | {"choices": [], "usage": completion["usage"]}

    def _answerer(self, model: str) -> tuple[Answer, bool]:
        with self._change:
            if model in self._models:
                return self._models[model][1], True
        chat_models = self.behaviour.chat_models
        if not model.startswith("ft:") and (chat_models is None or model in chat_models):
            return self.teacher, False
        raise self._no_model(model)

    @staticmethod
    def _no_model(model: str) -> APIError:
        message = f"The model `{model}` does not exist or you do not have access to it."
        return APIError(404, message, param="model", code="model_not_found")

    @staticmethod
    def _check_form(body: dict[str, Any], messages: list[Message]) -> None:
        form = body.get("response_format") or {}
        if form.get("type") != "json_schema":
            return
        from jsonschema import ValidationError, validate

        for message in messages:
            if not message.get("tool_calls") and not message["refusal"]:
                try:
                    validate(json.loads(message["content"]), form["json_schema"]["schema"])
                except (ValueError, ValidationError) as error:
                    reason = f"the teacher's answer does not fit response_format: {error}"
                    raise RuntimeError(reason) from None

    def create_embedding(self, call: Call) -> Reply:
        """Directions of hashed words. A list of floats whatever encoding is asked for: it is
        the one form that the description knows, and the client takes it."""
        body = call.json
        texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
        if not all(isinstance(text, str) for text in texts):
            raise APIError(400, "Only texts are embedded here.", param="input")
        size = body.get("dimensions") or 64
        data = [
            {"object": "embedding", "index": index, "embedding": _embedding(text, size)}
            for index, text in enumerate(texts)
        ]
        tokens = sum(count_tokens(text) for text in texts)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return Reply({"object": "list", "data": data, "model": body["model"], "usage": usage})

    def list_models(self, call: Call) -> Reply:
        with self._change:
            names = [*self.behaviour.base_models, *self._models]
            models = [self._model(name) for name in names]
        return Reply({"object": "list", "data": models})

    def retrieve_model(self, call: Call, model: str) -> Reply:
        with self._change:
            if model in self._models or model in self.behaviour.base_models:
                return Reply(self._model(model))
        raise self._no_model(model)

    def delete_model(self, call: Call, model: str) -> Reply:
        with self._change:
            if model not in self._models:
                raise self._no_model(model)
            del self._models[model]
        return Reply({"id": model, "object": "model", "deleted": True})

    def _model(self, name: str) -> dict[str, Any]:
        created, _ = self._models.get(name, (1_721_172_741, None))
        owner = ORGANIZATION if name in self._models else "system"
        return {"id": name, "object": "model", "created": created, "owned_by": owner}


def _page(
    items: list[dict[str, Any]], call: Call, *, limit: int, most: int = 100, ids: bool = True
) -> dict[str, Any]:
    """The page of a list after the item `after`, `limit` items long."""
    size = int(call.parameter("limit") or limit)
    if not 1 <= size <= most:
        raise APIError(400, f"'limit' must be between 1 and {most}.", param="limit")
    after = call.parameter("after")
    if after is not None:
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            raise APIError(400, f"No such object: {after}", param="after")
        items = items[places[0] + 1 :]
    page: dict[str, Any] = {"object": "list", "data": items[:size], "has_more": len(items) > size}
    if ids:
        page["first_id"] = items[0]["id"] if items else None
        page["last_id"] = items[:size][-1]["id"] if items else None
    return page


def _method(body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the method's name and the hyperparameters given for it."""
    method = body.get("method")
    if method is None:
        return "supervised", body.get("hyperparameters") or {}
    if body.get("hyperparameters"):
        message = "Give hyperparameters in 'method' only, not in 'hyperparameters' as well."
        raise APIError(400, message, param="hyperparameters")
    if method["type"] == "reinforcement":
        raise APIError(400, "Reinforcement is not offered for this model.", param="method")
    return method["type"], (method.get(method["type"]) or {}).get("hyperparameters") or {}


def _check_metadata(metadata: dict[str, str] | None) -> None:
    """The limits that the description says in prose only."""
    pairs = metadata or {}
    if len(pairs) > 16:
        raise APIError(400, "'metadata' may have 16 pairs at most.", param="metadata")
    for key, value in pairs.items():
        if len(key) > 64 or len(value) > 512:
            message = f"'metadata.{key[:64]}': keys have 64 characters at most, values 512."
            raise APIError(400, message, param="metadata")


def _metrics(step: Step) -> dict[str, float]:
    values = {
        "train_loss": step.train_loss,
        "valid_loss": step.valid_loss,
        "train_mean_token_accuracy": step.train_accuracy,
    }
    return {name: value for name, value in values.items() if value is not None}


def _table(steps: list[Step]) -> str:
    """The result file: metrics by step, as CSV."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["step", "train_loss", "train_accuracy", "valid_loss"])
    table.writerows(
        [step.step, step.train_loss, step.train_accuracy, step.valid_loss] for step in steps
    )
    return text.getvalue()


def _embedding(text: str, size: int) -> list[float]:
    vector = [0.0] * size
    for word in re.findall(r"\w+", text.lower()) or [text]:
        digest = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
        vector[digest % size] += 1.0 if digest >> 63 else -1.0
    length = sum(number * number for number in vector) ** 0.5 or 1.0
    return [number / length for number in vector]


# --------------------------------------------------------------------------------------
# A process of its own


def main() -> None:
    parser = argparse.ArgumentParser(description="OpenAI's files, fine-tuning and chat APIs.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--api-key")
    parser.add_argument("--state-seconds", type=float, default=1.0)
    parser.add_argument("--minimum-examples", type=int, default=10)
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME=FOLDER", help="really trained"
    )
    given = parser.parse_args()
    behaviour = {"state_seconds": given.state_seconds, "minimum_examples": given.minimum_examples}
    folders = dict(pair.split("=", 1) for pair in given.model)
    if folders:
        behaviour["base_models"] = {name: name for name in folders}
    trainer = LocalTrainer(folders) if folders else count_words
    with OpenAIPlatform(
        trainer=trainer, port=given.port, api_key=given.api_key, **behaviour
    ) as server:
        print(json.dumps({"base_url": server.base_url, "api_key": server.api_key}), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
