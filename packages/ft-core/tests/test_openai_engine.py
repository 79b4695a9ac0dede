"""`OpenAIFinetuneEngine` against a server that validates the contract and really trains.

The server is `integration-tests/openai_platform.py`; what is killed here are real processes.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai_platform import OpenAIPlatform

from ft_core.datasets.chat import ChatDataset, PreferenceDataset
from ft_core.errors import ArgumentError, ArtifactError, DatasetError, TrainingError
from ft_core.jobs import JobStatus, WaitTimeoutError
from ft_core.openai_jobs.engine import OpenAIFinetuneEngine

MODEL = "gpt-4o-mini-2024-07-18"
CREATE = "POST /fine_tuning/jobs"
UPLOAD = "POST /files"


def chat(count: int = 12, word: str = "harbour") -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "system", "content": "Answer in a few words."},
                {"role": "user", "content": f"What is {word} number {n}?"},
                {"role": "assistant", "content": f"The {word} number {n} is deep and blue."},
            ]
        }
        for n in range(count)
    ]


def preferences(count: int = 12) -> list[dict[str, Any]]:
    return [
        {
            "input": {"messages": [{"role": "user", "content": f"What is {n}?"}]},
            "preferred_output": [{"role": "assistant", "content": f"{n} is a number."}],
            "non_preferred_output": [{"role": "assistant", "content": f"No idea about {n}."}],
        }
        for n in range(count)
    ]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "teacher.jsonl", chat())


@pytest.fixture
def server() -> Iterator[OpenAIPlatform]:
    with OpenAIPlatform() as platform:
        yield platform
    assert platform.violations == []


def engine(
    server: OpenAIPlatform, data: Any, model: str = MODEL, **kwargs: Any
) -> OpenAIFinetuneEngine:
    defaults = {
        "base_url": server.base_url,
        "api_key": server.api_key,
        "poll_seconds": (0.01, 0.05),
        "sleep": lambda seconds: time.sleep(min(seconds, 0.05)),
        "show_progress": False,
    }
    return OpenAIFinetuneEngine(model, data, **(defaults | kwargs))


def created(server: OpenAIPlatform) -> dict[str, Any]:
    """The body of the one request that created a job."""
    (request,) = [r for r in server.requests if f"{r.method} {r.path}" == CREATE and r.done]
    body: dict[str, Any] = request.body
    return body


# --------------------------------------------------------------------------------------
# The story


def test_from_a_file_to_a_model_that_answers(server: OpenAIPlatform, data: Path) -> None:
    student = engine(server, data)
    job = student.finetune()
    assert job.status is JobStatus.SUCCEEDED
    assert job.model is not None
    assert job.model.startswith(f"ft:{MODEL}:")
    assert job.trained_tokens
    assert job.finished is not None
    assert job.created is not None
    assert job.finished >= job.created
    llm = student.get_finetuned_model(temperature=0.3, api_key=server.api_key)
    assert (llm.model, llm.temperature) == (job.model, 0.3)
    assert llm.metadata.context_window == 128_000
    assert "number" in str(llm.complete("Which number is the harbour?"))
    assert server.count(CREATE) == server.count(UPLOAD) == 1


def test_events_and_checkpoints(
    server: OpenAIPlatform, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = engine(server, data, hyperparameters={"n_epochs": 3, "batch_size": 4})
    with caplog.at_level(logging.INFO):
        job = student.finetune()
        student.wait()
    events = student.events()
    assert [e.time for e in events] == sorted(e.time for e in events)
    steps = [event.data["step"] for event in events if "train_loss" in event.data]
    assert steps == list(range(1, 10))
    logged = [r.message for r in caplog.records if r.name == "ft_core.jobs"]
    for event in events:
        assert logged.count(event.message) == 1
    checkpoints = student.checkpoints()
    assert [c.step for c in checkpoints] == sorted(c.step for c in checkpoints)
    assert checkpoints
    assert checkpoints[-1].metrics["train_loss"] >= 0
    llm = student.get_finetuned_model(model=checkpoints[0].model)
    assert llm.model == checkpoints[0].model != job.model


def test_everything_that_a_job_can_be_given(server: OpenAIPlatform, tmp_path: Path) -> None:
    student = engine(
        server,
        write(tmp_path / "train.jsonl", chat()),
        val_path=write(tmp_path / "val.jsonl", chat(10, "valley")),
        hyperparameters={"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5},
        suffix="mine",
        seed=7,
        metadata={"team": "search"},
        integrations=[{"type": "wandb", "wandb": {"project": "p"}}],
    )
    job = student.finetune()
    body = created(server)
    assert body["method"] == {
        "type": "supervised",
        "supervised": {
            "hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5}
        },
    }
    assert (body["suffix"], body["seed"], body["metadata"]["team"]) == ("mine", 7, "search")
    assert body["integrations"][0]["wandb"]["project"] == "p"
    assert b"valley" in server.files[body["validation_file"]]
    assert b"harbour" in server.files[body["training_file"]]
    assert "mine" in str(job.model)
    assert any("valid_loss" in event.data for event in student.events())


def test_preferences(server: OpenAIPlatform, tmp_path: Path) -> None:
    data = write(tmp_path / "preferences.jsonl", preferences())
    job = engine(server, data, method="dpo", hyperparameters={"beta": 0.2}).finetune()
    assert job.status is JobStatus.SUCCEEDED
    assert created(server)["method"] == {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}}


def test_the_journal_is_cleaned_before_it_goes_up(server: OpenAIPlatform, tmp_path: Path) -> None:
    lines = [
        line
        | {
            "metadata": {"id": str(n), "model": "gpt-4", "query": f"harbour {n}?"},
            "response_format": {"type": "json_object"},
        }
        for n, line in enumerate(chat())
    ]
    path = write(tmp_path / "teacher.jsonl", lines)
    with path.open("a") as file:
        file.write('{"messages": [{"role": "us')  # where the app was killed
    engine(server, path).finetune()
    (content,) = [
        file for id_, file in server.files.items() if id_ == created(server)["training_file"]
    ]
    assert [json.loads(line) for line in content.splitlines()] == chat()


@pytest.mark.parametrize("kind", [ChatDataset, PreferenceDataset])
def test_datasets_in_memory(
    server: OpenAIPlatform, tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_INDEX_CACHE_DIR", str(tmp_path / "cache"))
    supervised = kind is ChatDataset
    dataset = kind(examples=chat() if supervised else preferences())
    method = "supervised" if supervised else "dpo"
    first = engine(server, dataset, method=method).finetune()
    again = engine(server, dataset, method=method).finetune()
    assert first.id == again.id
    assert (tmp_path / "cache" / "ft-openai-distill" / "jobs.json").is_file()


def test_the_predecessors_way(
    server: OpenAIPlatform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Handler:
        def save_finetuning_events(self, path: str) -> None:
            write(Path(path), chat())

    monkeypatch.setenv("OPENAI_API_KEY", server.api_key)
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    monkeypatch.setenv("OPENAI_API_BASE", server.base_url)
    path = str(tmp_path / "events.jsonl")
    student = OpenAIFinetuneEngine.from_finetuning_handler(Handler(), MODEL, path)
    job = student.finetune()
    later = OpenAIFinetuneEngine(MODEL, path, False, job.id)
    assert later.get_current_job().model == job.model
    assert "number" in str(later.get_finetuned_model().complete("Which number?"))
    assert OpenAIFinetuneEngine.from_job_id(job.id).wait().model == job.model


def test_verbose_prints(
    server: OpenAIPlatform, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine(server, data, verbose=True, price_per_million=3.0).finetune()
    printed = capsys.readouterr().out
    assert "12 examples" in printed
    assert "8 epochs" in printed
    assert "in all" in printed
    assert "trains gpt-4o-mini" in printed


def test_the_estimate_sends_nothing(server: OpenAIPlatform, data: Path) -> None:
    figures = engine(server, data, hyperparameters={"n_epochs": 4}).estimate()
    assert (figures.examples, figures.epochs) == (12, 4)
    assert figures.tokens > 12 * 20
    assert server.requests == []


def test_the_constructor_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    missing = tmp_path / "nowhere" / "teacher.jsonl"
    student = OpenAIFinetuneEngine(MODEL, missing, start_job_id="ftjob-1")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ArgumentError, match="OPENAI_API_KEY"):
        student.get_current_job()


# --------------------------------------------------------------------------------------
# What is refused, before and by the service


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"method": "reinforcement"}, "method"),
        ({"hyperparameters": {"epochs": 3}}, "hyperparameters"),
        ({"hyperparameters": {"beta": 0.1}}, "hyperparameters"),
        ({"max_retries": -1}, "max_retries"),
        ({"metadata": {str(n): "x" for n in range(16)}}, "metadata"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ArgumentError, match=name):
        OpenAIFinetuneEngine(MODEL, "teacher.jsonl", **arguments)


def test_bad_data_is_refused_before_anything_is_sent(
    server: OpenAIPlatform, tmp_path: Path
) -> None:
    lines = chat()
    lines[6]["messages"][1]["role"] = "robot"
    path = write(tmp_path / "teacher.jsonl", lines)
    with pytest.raises(DatasetError, match=r"teacher\.jsonl: line 7, messages\[1\]"):
        engine(server, path).finetune()
    few = write(tmp_path / "few.jsonl", chat(9))
    with pytest.raises(DatasetError, match="9 examples; fine-tuning takes at least 10"):
        engine(server, few).finetune()
    with pytest.raises(DatasetError, match="no such file"):
        engine(server, tmp_path / "none.jsonl").finetune()
    assert server.count(UPLOAD) == server.count(CREATE) == 0


def test_unchecked_data_goes_up_as_it_stands(server: OpenAIPlatform, tmp_path: Path) -> None:
    path = write(tmp_path / "teacher.jsonl", chat(3))
    with pytest.raises(TrainingError, match=r"failed: .*10"):
        engine(server, path, validate_json=False).finetune()
    assert next(iter(server.files.values())) == path.read_bytes()


def test_a_rejected_job_fails_at_once_with_the_servers_reason(
    server: OpenAIPlatform, data: Path
) -> None:
    naps: list[float] = []
    student = engine(server, data, "gpt-9", sleep=naps.append)
    with pytest.raises(TrainingError, match="Model gpt-9 is not available for fine-tuning") as e:
        student.finetune()
    assert isinstance(e.value.__cause__, openai.BadRequestError)
    assert "LocalFinetuneEngine" not in str(e.value)
    assert server.count(CREATE) == 1


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("fine_tuning_unavailable", "Fine-tuning is not available to your organization."),
        ("permission_denied", "You have insufficient permissions for this operation."),
        ("unsupported", "Creating new finetuning jobs is no longer supported."),
    ],
)
def test_where_fine_tuning_is_closed_the_local_engine_is_named(
    server: OpenAIPlatform, data: Path, code: str, message: str
) -> None:
    server.behaviour.fine_tuning_closed = True
    server.behaviour.closed_code, server.behaviour.closed_message = code, message
    with pytest.raises(TrainingError, match="closed to this account") as caught:
        engine(server, data).finetune()
    text = str(caught.value)
    assert message in text
    assert f'LocalFinetuneEngine("<open model>", {str(data)!r}, output_dir=' in text
    assert server.count(CREATE) == 1


def test_no_quota_is_not_tried_again(server: OpenAIPlatform, data: Path) -> None:
    server.behaviour.quota_exceeded = True
    with pytest.raises(TrainingError, match="exceeded your current quota"):
        engine(server, data).finetune()
    assert server.count(CREATE) == 1


def test_a_job_that_fails_says_why(server: OpenAIPlatform, data: Path) -> None:
    server.behaviour.unsafe_files = True
    student = engine(server, data)
    with pytest.raises(TrainingError, match=r"job ftjob-\w+ failed: ") as caught:
        student.finetune()
    assert str(student.get_current_job().error) in str(caught.value)
    with pytest.raises(TrainingError, match="failed"):
        student.get_finetuned_model()


def test_a_wrong_key_is_neither_shown_nor_saved(
    server: OpenAIPlatform, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = "sk-wrong-0123456789abcdef"
    with caplog.at_level(logging.DEBUG), pytest.raises(TrainingError, match="401") as caught:
        engine(server, data, api_key=key).finetune()
    assert key not in f"{caught.value!r} {caught.value.__cause__!r}"
    engine(server, data).finetune()
    record = data.with_name("teacher.jsonl.jobs.json").read_text()
    for secret in (key, server.api_key):
        assert secret not in record
        assert secret not in caplog.text


# --------------------------------------------------------------------------------------
# A bad line


@pytest.mark.parametrize("fault", [429, 500, 503, "drop"])
@pytest.mark.parametrize(
    "on",
    [UPLOAD, "GET /files", CREATE, "GET /fine_tuning/jobs", "/fine_tuning/jobs"],
)
def test_one_job_whatever_fails_for_a_while(
    server: OpenAIPlatform, data: Path, on: str, fault: Any
) -> None:
    server.fail(fault, on=on, times=2)
    assert engine(server, data).finetune().status is JobStatus.SUCCEEDED
    assert len(server.jobs) == 1


@pytest.mark.parametrize("fault", [500, 503, "drop"])
@pytest.mark.parametrize("on", [UPLOAD, CREATE])
def test_what_was_done_though_no_answer_came_is_not_done_twice(
    server: OpenAIPlatform, data: Path, on: str, fault: Any
) -> None:
    server.fail(fault, on=on, done=True)
    assert engine(server, data).finetune().status is JobStatus.SUCCEEDED
    assert len(server.jobs) == 1
    assert server.count(CREATE, done=True) == 1


def test_a_create_that_times_out_is_looked_for(server: OpenAIPlatform, data: Path) -> None:
    server.fail("hang", on=CREATE, done=True, seconds=3)
    student = engine(server, data, timeout=0.5)
    assert student.finetune().status is JobStatus.SUCCEEDED
    assert len(server.jobs) == 1


def test_a_job_made_twice_is_kept_once(server: OpenAIPlatform, data: Path) -> None:
    # The first request times out and is carried out when the second has arrived.
    server.behaviour.step_seconds = 0.1
    real = server.create_job
    calls: list[Any] = []
    second_came, first_done = threading.Event(), threading.Event()

    def late(call: Any) -> Any:
        calls.append(call)
        if len(calls) > 1:
            second_came.set()
            first_done.wait(30)
            return real(call)
        second_came.wait(30)
        reply = real(call)
        first_done.set()
        return reply

    server.create_job = late  # type: ignore[method-assign]
    job = engine(server, data, timeout=1).finetune(wait=False)
    states = {key: value["status"] for key, value in server.jobs.items()}
    assert len(calls) == len(states) == 2
    assert list(states.values()).count("cancelled") == 1
    assert states[job.id] != "cancelled"


def test_the_server_says_when_to_come_back(server: OpenAIPlatform, data: Path) -> None:
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        time.sleep(0.01)

    server.fail(429, on=CREATE, times=2, retry_after=7)
    engine(server, data, sleep=sleep).finetune()
    assert naps.count(7.0) == 2


def test_a_service_that_stays_away(server: OpenAIPlatform, data: Path) -> None:
    server.fail(503, on=CREATE, times=3)
    with pytest.raises(TrainingError, match="503"):
        engine(server, data, max_retries=2).finetune()
    assert server.count(CREATE) == 3
    assert engine(server, data).finetune().status is JobStatus.SUCCEEDED
    assert len(server.jobs) == 1
    assert server.count(UPLOAD) == 1


def test_waiting_outlives_the_service_being_away(server: OpenAIPlatform, data: Path) -> None:
    server.behaviour.step_seconds = 0.02
    student = engine(server, data, max_retries=0)
    job = student.finetune(wait=False)
    server.fail(503, on=f"GET /fine_tuning/jobs/{job.id}", times=4)
    server.fail("drop", on=f"GET /fine_tuning/jobs/{job.id}/events", times=2)
    assert student.wait().status is JobStatus.SUCCEEDED


def test_a_file_is_waited_for(server: OpenAIPlatform, data: Path) -> None:
    server.behaviour.file_seconds = 0.3
    server.behaviour.accepts_unprocessed_files = False
    assert engine(server, data).finetune().status is JobStatus.SUCCEEDED
    assert server.count(CREATE) == 1


# --------------------------------------------------------------------------------------
# One job for the same data and settings


@pytest.mark.parametrize("state", ["running", "succeeded", "failed", "cancelled"])
def test_a_second_engine_finds_the_job(server: OpenAIPlatform, data: Path, state: str) -> None:
    server.behaviour.step_seconds = 0.01 if state == "succeeded" else 0.05
    server.behaviour.unsafe_files = state == "failed"
    first = engine(server, data)
    job = first.finetune(wait=False)
    if state == "cancelled":
        assert first.cancel().status is JobStatus.CANCELLED
    else:
        server.wait_for(job.id, state)
    server.behaviour.unsafe_files = False
    again = engine(server, data).finetune()
    assert again.status is JobStatus.SUCCEEDED
    found = state in ("running", "succeeded")
    assert (again.id == job.id) is found
    assert len(server.jobs) == (1 if found else 2)
    assert server.count(UPLOAD) == 1  # one upload serves both


def test_a_job_is_found_without_its_record(server: OpenAIPlatform, data: Path) -> None:
    job = engine(server, data).finetune()
    data.with_name("teacher.jsonl.jobs.json").unlink()
    assert engine(server, data).finetune().id == job.id
    assert server.count(CREATE) == server.count(UPLOAD) == 1


def test_other_data_or_settings_are_another_job(server: OpenAIPlatform, data: Path) -> None:
    first = engine(server, data).finetune()
    other = engine(server, data, suffix="again").finetune()
    assert other.id != first.id
    assert server.count(UPLOAD) == 1
    write(data, chat(13))
    assert engine(server, data).finetune().id not in (first.id, other.id)
    assert server.count(UPLOAD) == 2


def test_an_upload_deleted_meanwhile_is_sent_again(server: OpenAIPlatform, data: Path) -> None:
    engine(server, data).finetune()
    client = openai.OpenAI(base_url=server.base_url, api_key=server.api_key)
    client.files.delete(created(server)["training_file"])
    assert engine(server, data, suffix="two").finetune().status is JobStatus.SUCCEEDED
    assert server.count(UPLOAD) == 2


def test_a_job_of_another_account_is_not_replaced(server: OpenAIPlatform, data: Path) -> None:
    engine(server, data).finetune()
    server._jobs.clear()
    with pytest.raises(TrainingError, match=r"another account.*teacher\.jsonl\.jobs\.json"):
        engine(server, data).finetune()
    assert server.count(CREATE) == 1


def test_a_damaged_record_starts_nothing(server: OpenAIPlatform, data: Path) -> None:
    data.with_name("teacher.jsonl.jobs.json").write_text("{")
    with pytest.raises(ArtifactError, match="move the file away"):
        engine(server, data).finetune()
    assert server.count(CREATE) == 0


def test_cancel_and_timeout(server: OpenAIPlatform, data: Path) -> None:
    server.behaviour.step_seconds = 0.2
    student = engine(server, data)
    with pytest.raises(WaitTimeoutError, match="from_job_id"):
        student.finetune(timeout=0.1)
    with pytest.raises(TrainingError, match="is not done: its status is"):
        student.get_finetuned_model()
    assert student.cancel().status is JobStatus.CANCELLED
    with pytest.raises(TrainingError, match="was cancelled"):
        student.wait()


# --------------------------------------------------------------------------------------
# Killed

CHILD = """
import os, signal, sys
import httpx, openai
from ft_core.openai_jobs.engine import OpenAIFinetuneEngine

url, key, data, moment, method, path = sys.argv[1:]
prefix = "/v1" + path

def matches(request):
    wanted = request.url.path == prefix or (
        path.endswith("*") and request.url.path.startswith(prefix[:-1])
    )
    return request.method == method and wanted

def die(request_or_response):
    request = getattr(request_or_response, "request", request_or_response)
    if matches(request):
        os.kill(os.getpid(), signal.SIGKILL)

hooks = {moment: [die]} if moment != "never" else {}
client = openai.OpenAI(
    base_url=url, api_key=key, http_client=httpx.Client(event_hooks=hooks)
)
engine = OpenAIFinetuneEngine(
    "gpt-4o-mini-2024-07-18", data, client=client, poll_seconds=(0.01, 0.05), show_progress=False
)
print(engine.finetune().id)
"""


def child(server: OpenAIPlatform, data: Path, moment: str, method: str, path: str) -> Any:
    arguments = [server.base_url, server.api_key, str(data), moment, method, path]
    return subprocess.run(
        [sys.executable, "-c", CHILD, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
@pytest.mark.parametrize(
    ("moment", "method", "path"),
    [
        ("request", "GET", "/fine_tuning/jobs"),
        ("request", "POST", "/files"),
        ("response", "POST", "/files"),
        ("response", "GET", "/files/*"),
        ("request", "POST", "/fine_tuning/jobs"),
        ("response", "POST", "/fine_tuning/jobs"),
        ("response", "GET", "/fine_tuning/jobs/*"),
    ],
)
def test_killed_at_any_point_it_makes_one_job(
    server: OpenAIPlatform, data: Path, moment: str, method: str, path: str
) -> None:
    killed = child(server, data, moment, method, path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    second = child(server, data, "never", "-", "-")
    assert second.returncode == 0, second.stderr
    assert list(server.jobs) == [second.stdout.strip()]
    assert server.count(CREATE, done=True) == 1
    assert server.count(UPLOAD, done=True) == 1


def test_two_processes_at_once_make_one_job(server: OpenAIPlatform, data: Path) -> None:
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda: results.append(child(server, data, "never", "-", "-")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.returncode for result in results] == [0, 0], results
    assert {result.stdout.strip() for result in results} == set(server.jobs)
    assert len(server.jobs) == 1


# --------------------------------------------------------------------------------------
# Other servers


def test_a_server_without_metadata(server: OpenAIPlatform, data: Path) -> None:
    """Jobs without metadata are told apart by the file they train on."""
    real = server.create_job
    refused = []

    def create(call: Any) -> Any:
        from openai_platform import APIError

        if "metadata" in call.json:
            refused.append(call)
            raise APIError(400, "Unknown parameter: 'metadata'.", param="metadata")
        return real(call)

    server.create_job = create  # type: ignore[method-assign]
    first = engine(server, data)
    job = first.finetune()
    assert len(refused) == 1
    # As if the process had died between the job and its record: only the intent is there.
    record, key = first._job_record(), first._fingerprint()
    record.update(key, job_id=None)
    assert engine(server, data).finetune().id == job.id
    assert len(server.jobs) == 1


def test_a_server_that_does_not_list(server: OpenAIPlatform, data: Path) -> None:
    from openai_platform import APIError

    def refuse(call: Any) -> Any:
        raise APIError(404, "Not Found")

    server.list_jobs = server.list_files = refuse  # type: ignore[method-assign]
    first = engine(server, data)
    job = first.finetune()
    assert engine(server, data).finetune().id == job.id
    record, key = first._job_record(), first._fingerprint()
    record.update(key, job_id=None)  # an intent, and no way to find out what became of it
    with pytest.raises(TrainingError, match="start_job_id"):
        engine(server, data).finetune()
    assert len(server.jobs) == 1


def test_a_model_that_llama_index_does_not_know(server: OpenAIPlatform, data: Path) -> None:
    server.behaviour.base_models["smol"] = "smol"
    student = engine(server, data, "smol")
    job = student.finetune()
    llm = student.get_finetuned_model()
    assert llm.class_name() == "OpenAILike"
    assert llm.metadata.context_window == 32_768
    assert llm.metadata.is_chat_model
    assert llm.metadata.is_function_calling_model
    assert llm.model == job.model
    assert "number" in str(llm.complete("Which number?"))
    assert student.get_finetuned_model(context_window=2048).metadata.context_window == 2048


def test_import_loads_no_client() -> None:
    code = (
        "import sys, ft_core.openai_jobs.engine, ft_core.openai_jobs.azure\n"
        "import ft_core.openai_jobs.costs\n"
        "heavy = {'openai', 'tiktoken', 'torch', 'transformers', 'httpx'}\n"
        "found = heavy & {name.split('.')[0] for name in sys.modules}\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
