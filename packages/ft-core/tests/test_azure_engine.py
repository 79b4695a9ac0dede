"""`AzureOpenAIFinetuneEngine` against Azure's two APIs on a real socket.

The OpenAI API behind Azure's addresses and `api-key` is `openai_platform`, through a proxy that
speaks Azure; the management API is written here, as Microsoft describes it.
"""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from openai_platform import OpenAIPlatform

from ft_core.errors import ArgumentError, TrainingError
from ft_core.jobs import JobStatus
from ft_core.openai_jobs.azure import AzureOpenAIFinetuneEngine

MODEL = "gpt-4o-mini-2024-07-18"
KEY, TOKEN = "azure-key-0123456789", "entra-token-0123456789"
PLACE = ("sub", "my group", "my-resource")


class Azure(ThreadingHTTPServer):
    """One resource: its OpenAI API and the management API of its deployments."""

    daemon_threads = True

    def __init__(self, platform: OpenAIPlatform) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.platform = platform
        self.deployments: dict[str, dict[str, Any]] = {}
        self.states = ["Accepted", "Creating", "Succeeded"]
        """What the looks at a deployment see, one after the other."""
        self.errors: list[tuple[int, dict[str, Any], dict[str, str]]] = []
        """Status, body and headers of the next answers of the management API."""
        self.versions: set[str] = set()
        self.jobs: list[dict[str, Any]] = []
        self.management: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Azure

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(length)
        url = urlsplit(self.path)
        version = parse_qs(url.query).get("api-version", [""])[0]
        path = unquote(url.path)
        if path.startswith("/subscriptions/"):
            self._manage(path, version, body)
        else:
            self.server.versions.add(version)
            self._forward(path, url.query, body)

    do_GET = do_POST = do_PUT = _answer  # noqa: N815

    def _forward(self, path: str, query: str, body: bytes) -> None:
        if self.headers.get("api-key") != KEY:
            error = {"error": {"code": "401", "message": f"wrong key {KEY}"}}
            return self._send(401, json.dumps(error).encode())
        path = path.removeprefix("/openai")
        if path.startswith("/deployments/"):
            _, _, name, path = path.split("/", 3)
            if name not in self.server.deployments:
                error = {"error": {"code": "DeploymentNotFound", "message": "no deployment"}}
                return self._send(404, json.dumps(error).encode())
            model = self.server.deployments[name]["properties"]["model"]["name"]
            body = json.dumps(json.loads(body) | {"model": model}).encode()
            path = f"/{path}"
        if path == "/fine_tuning/jobs" and self.command == "POST":
            self.server.jobs.append(json.loads(body))
        rest = "&".join(part for part in query.split("&") if not part.startswith("api-version"))
        request = urllib.request.Request(
            f"{self.server.platform.base_url}{path}{'?' if rest else ''}{rest}",
            data=body or None,
            method=self.command,
            headers={
                "Authorization": f"Bearer {self.server.platform.api_key}",
                "Content-Type": self.headers.get("content-type", "application/json"),
            },
        )
        try:
            with urllib.request.urlopen(request) as reply:
                return self._send(reply.status, reply.read())
        except HTTPError as error:
            return self._send(error.code, error.read())

    def _manage(self, path: str, version: str, body: bytes) -> None:
        self.server.management.append(f"{self.command} {path}")
        if self.server.errors:
            status, content, headers = self.server.errors.pop(0)
            return self._send(status, json.dumps(content).encode(), headers)
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            message = f"The access token is invalid: {self.headers.get('authorization')}"
            error = {"error": {"code": "InvalidAuthenticationToken", "message": message}}
            return self._send(401, json.dumps(error).encode())
        parts = path.split("/")
        expected = ["", "subscriptions", "sub", "resourceGroups", "my group", "providers"]
        expected += ["Microsoft.CognitiveServices", "accounts", "my-resource", "deployments"]
        assert parts[:-1] == expected, parts
        assert version == "2024-10-01"
        name = parts[-1]
        if self.command == "PUT":
            sent = json.loads(body)
            assert set(sent) == {"sku", "properties"}
            self.server.deployments[name] = {"name": name, **sent}
        deployment = self.server.deployments[name]
        state = self.server.states.pop(0) if len(self.server.states) > 1 else self.server.states[0]
        deployment["properties"]["provisioningState"] = state
        created = 201 if self.command == "PUT" else 200
        return self._send(created, json.dumps(deployment).encode())

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"content-type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def azure() -> Iterator[Azure]:
    with OpenAIPlatform() as platform, Azure(platform) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
    assert platform.violations == []


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "teacher.jsonl"
    lines = (
        {
            "messages": [
                {"role": "user", "content": f"What is harbour number {n}?"},
                {"role": "assistant", "content": f"The harbour number {n} is deep."},
            ]
        }
        for n in range(12)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def naps() -> list[float]:
    return []


@pytest.fixture
def engine(azure: Azure, data: Path, naps: list[float]) -> AzureOpenAIFinetuneEngine:
    return make(azure, data, sleep=naps.append, hyperparameters={"n_epochs": 2})


def make(azure: Azure, data: Any, **settings: Any) -> AzureOpenAIFinetuneEngine:
    defaults = {
        "azure_endpoint": azure.url,
        "api_key": KEY,
        "api_version": "2024-10-21",
        "poll_seconds": (0.01, 0.02),
        "show_progress": False,
    }
    return AzureOpenAIFinetuneEngine(MODEL, data, **(defaults | settings))


def trained(engine: AzureOpenAIFinetuneEngine) -> AzureOpenAIFinetuneEngine:
    import time

    fake, engine._sleep = engine._sleep, lambda _: time.sleep(0.02)
    engine.finetune()
    engine._sleep = fake
    return engine


def test_train_deploy_ask(azure: Azure, engine: AzureOpenAIFinetuneEngine) -> None:
    job = trained(engine).get_current_job()
    assert job.status is JobStatus.SUCCEEDED
    assert azure.versions == {"2024-10-21"}
    # Azure's older API versions have no `method`.
    assert azure.jobs[0]["hyperparameters"] == {"n_epochs": 2}
    assert "method" not in azure.jobs[0]
    assert azure.management == []  # nothing is deployed, and billed, unasked

    deployment = engine.deploy_finetuned_model(TOKEN, *PLACE, "student", management_url=azure.url)
    assert deployment["properties"]["provisioningState"] == "Succeeded"
    assert deployment["sku"] == {"name": "Standard", "capacity": 1}
    assert deployment["properties"]["model"] == {
        "format": "OpenAI",
        "name": job.model,
        "version": "1",
    }
    llm = engine.get_finetuned_model("student", temperature=0.25)
    assert llm.class_name() == "azure_openai_llm"
    assert (llm.engine, llm.temperature) == ("student", 0.25)
    assert llm.metadata.context_window == 128_000
    assert "number" in str(llm.complete("Which number?"))


def test_a_second_engine_finds_the_job(azure: Azure, data: Path) -> None:
    first = trained(make(azure, data))
    assert trained(make(azure, data)).job_id == first.job_id
    assert len(azure.platform.jobs) == 1
    again = AzureOpenAIFinetuneEngine.from_job_id(
        str(first.job_id), azure_endpoint=azure.url, api_key=KEY, api_version="2024-10-21"
    )
    assert again.wait().model == first.get_current_job().model


def test_settings_of_the_environment(
    azure: Azure, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", azure.url)
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_VERSION", "2025-03-01-preview")
    student = AzureOpenAIFinetuneEngine(MODEL, data, show_progress=False)
    assert trained(student).get_current_job().model
    assert azure.versions == {"2025-03-01-preview"}
    llm = student.get_finetuned_model("student")
    assert (llm.azure_endpoint, llm.api_version) == (azure.url, "2025-03-01-preview")


def test_an_injected_client(azure: Azure, data: Path) -> None:
    import openai

    client = openai.AzureOpenAI(azure_endpoint=azure.url, api_key=KEY, api_version="2024-10-21")
    student = trained(AzureOpenAIFinetuneEngine(MODEL, data, client=client, show_progress=False))
    student.deploy_finetuned_model(TOKEN, *PLACE, "student", management_url=azure.url, wait=False)
    assert "number" in str(student.get_finetuned_model("student").complete("Which number?"))


@pytest.mark.parametrize(
    ("missing", "name"),
    [("AZURE_OPENAI_ENDPOINT", "azure_endpoint"), ("AZURE_OPENAI_API_KEY", "api_key")],
)
def test_missing_settings(
    data: Path, monkeypatch: pytest.MonkeyPatch, missing: str, name: str
) -> None:
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", KEY)
    monkeypatch.delenv(missing)
    with pytest.raises(ArgumentError, match=f"{name}.*{missing}"):
        AzureOpenAIFinetuneEngine(MODEL, data).finetune()


def test_base_url_is_called_otherwise(data: Path) -> None:
    with pytest.raises(ArgumentError, match="azure_endpoint"):
        AzureOpenAIFinetuneEngine(MODEL, data, base_url="http://127.0.0.1:9")


def test_a_key_that_the_server_repeats_is_hidden(azure: Azure, data: Path) -> None:
    with pytest.raises(TrainingError, match=r"401.*wrong key \*\*\*") as caught:
        make(azure, data, client=None, api_key=KEY[:-1]).finetune()
    assert KEY[:-1] not in f"{caught.value!r} {caught.value.__cause__!r}"


def test_nothing_is_deployed_before_the_job_is_done(
    azure: Azure, engine: AzureOpenAIFinetuneEngine
) -> None:
    azure.platform.behaviour.step_seconds = 0.5
    engine.finetune(wait=False)
    for call in (
        lambda: engine.deploy_finetuned_model(TOKEN, *PLACE, management_url=azure.url),
        lambda: engine.get_finetuned_model("student"),
    ):
        with pytest.raises(TrainingError, match="is not done: its status is"):
            call()
    assert azure.management == []
    engine.cancel()


def test_the_deployments_default_name_is_the_models(
    azure: Azure, engine: AzureOpenAIFinetuneEngine
) -> None:
    trained(engine)
    deployment = engine.deploy_finetuned_model(
        TOKEN, *PLACE, management_url=azure.url, sku="GlobalStandard", capacity=50, wait=False
    )
    assert deployment["name"] == engine.get_current_job().model
    assert deployment["sku"] == {"name": "GlobalStandard", "capacity": 50}
    assert deployment["properties"]["provisioningState"] == "Accepted"
    assert engine.get_finetuned_model().engine == deployment["name"]


def test_a_deployment_that_fails(azure: Azure, engine: AzureOpenAIFinetuneEngine) -> None:
    azure.states = ["Creating", "Failed"]
    with pytest.raises(TrainingError, match="deployment student has the state Failed"):
        trained(engine).deploy_finetuned_model(TOKEN, *PLACE, "student", management_url=azure.url)


def test_a_deployment_that_takes_too_long(azure: Azure, engine: AzureOpenAIFinetuneEngine) -> None:
    azure.states = ["Creating"]
    with pytest.raises(TrainingError, match=r"not ready after 0 s \(state Creating\)"):
        trained(engine).deploy_finetuned_model(
            TOKEN, *PLACE, "student", management_url=azure.url, timeout=0
        )


def test_a_busy_management_api_is_asked_again(
    azure: Azure, engine: AzureOpenAIFinetuneEngine, naps: list[float]
) -> None:
    trained(engine)
    busy = {"error": {"code": "TooManyRequests", "message": "slow down"}}
    azure.errors = [(429, busy, {"retry-after": "9"}), (503, {}, {}), (409, busy, {})]
    engine.deploy_finetuned_model(TOKEN, *PLACE, "student", management_url=azure.url)
    assert naps[:3] == [9.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("status", "code", "hint"),
    [
        (400, "InsufficientQuota", ""),
        (401, "ExpiredAuthenticationToken", "az account get-access-token"),
        (403, "AuthorizationFailed", "Cognitive Services Contributor"),
        (404, "ResourceNotFound", ""),
    ],
)
def test_what_azure_refuses(
    azure: Azure, engine: AzureOpenAIFinetuneEngine, status: int, code: str, hint: str
) -> None:
    trained(engine)
    azure.errors = [(status, {"error": {"code": code, "message": "This cannot be."}}, {})]
    with pytest.raises(TrainingError, match=rf"\({status}\): This cannot be. \({code}\)") as e:
        engine.deploy_finetuned_model(TOKEN, *PLACE, "student", management_url=azure.url)
    assert hint in str(e.value)
    assert len(azure.management) == 1


def test_a_token_is_never_shown(azure: Azure, engine: AzureOpenAIFinetuneEngine) -> None:
    token = "secret-token-abc"
    with pytest.raises(TrainingError, match=r"invalid: Bearer \*\*\*") as caught:
        trained(engine).deploy_finetuned_model(token, *PLACE, "s", management_url=azure.url)
    assert token not in f"{caught.value!r} {caught.value.__cause__!r}"


def test_no_management_api(engine: AzureOpenAIFinetuneEngine, naps: list[float]) -> None:
    with pytest.raises(TrainingError, match=r"no answer by 127\.0\.0\.1"):
        trained(engine).deploy_finetuned_model(
            TOKEN, *PLACE, "s", management_url="http://127.0.0.1:9"
        )
    assert len(naps) == 5
