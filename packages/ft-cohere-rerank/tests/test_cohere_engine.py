"""`CohereRerankerFinetuneEngine` against a server that validates the contract and trains.

The server is `integration-tests/cohere_platform.py`; what is killed here are real processes.
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
from pathlib import Path
from typing import Any

import cohere
import pytest
from cohere_platform import TUNED, CoherePlatform
from contract_server import Reply
from llama_index.core.schema import NodeWithScore, TextNode

from ft_cohere_rerank.dataset import CohereRerankerFile
from ft_cohere_rerank.engine import CohereRerankerFinetuneEngine
from ft_core.errors import ArgumentError, DatasetError, TrainingError
from ft_core.jobs import JobStatus, WaitTimeoutError

CREATE = f"POST {TUNED}"
UPLOAD = "POST /v1/datasets"


def rows(count: int = 256, word: str = "harbour") -> CohereRerankerFile:
    return CohereRerankerFile(
        examples=[
            {
                "query": f"Where is {word} number {n}?",
                "relevant_passages": [f"The {word} number {n} is in the north."],
                "hard_negatives": [f"Where {word} number {n + 1} is nobody knows."],
            }
            for n in range(count)
        ]
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    rows().save(path)
    return path


def engine(server: CoherePlatform, data: Any, **given: Any) -> CohereRerankerFinetuneEngine:
    defaults: dict[str, Any] = {
        "base_url": server.base_url,
        "api_key": server.api_key,
        "poll_seconds": (0.01, 0.05),
        "sleep": lambda seconds: time.sleep(min(seconds, 0.02)),
        "show_progress": False,
    }
    return CohereRerankerFinetuneEngine(data, **(defaults | given))


def candidates() -> list[NodeWithScore]:
    texts = ["Nobody knows.", "The harbour number 3 is in the north.", "A valley."]
    return [NodeWithScore(node=TextNode(text=text), score=0.5) for text in texts]


def test_from_a_file_to_a_reranker(
    server: CoherePlatform, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hosted = engine(server, str(data))
    with caplog.at_level(logging.INFO):
        job = hosted.finetune()
    assert job.status is JobStatus.SUCCEEDED
    assert job.model == f"{job.id}-ft"
    assert job.finished is not None
    events = hosted.events()
    assert [e.time for e in events] == sorted(e.time for e in events)
    assert [e.data["step"] for e in events if e.data] == [0, 1]
    assert "ndcg@10" in next(e.data for e in events if e.data)
    for event in events:
        assert [r.message for r in caplog.records].count(event.message) == 1

    reranker = hosted.get_finetuned_model(top_n=1)
    (best,) = reranker.postprocess_nodes(candidates(), query_str="Where is harbour number 3?")
    assert best.node.text == "The harbour number 3 is in the north."
    assert server.count(CREATE) == server.count(UPLOAD) == 1


def test_everything_that_a_job_can_be_given(server: CoherePlatform, data: Path) -> None:
    hosted = engine(
        server,
        data,
        val_file_name=rows(64, "valley"),
        model_name="My reranker",
        base_model="multilingual",
        hyperparameters={"train_epochs": 2, "learning_rate": 0.02},
    )
    job = hosted.finetune()
    model = server.models[job.id]
    assert model["name"] == "My reranker"
    assert model["settings"]["base_model"]["name"] == "multilingual"
    assert model["settings"]["hyperparameters"]["train_epochs"] == 2
    (files,) = server.datasets.values()
    assert files["data"].decode() == "".join(row.to_jsonl() for row in rows())
    assert files["eval_data"].decode() == "".join(row.to_jsonl() for row in rows(64, "valley"))


def test_a_rerank_dataset_is_taken_as_it_is(server: CoherePlatform, tmp_path: Path) -> None:
    job = engine(server, rows().to_rerank(), job_file=tmp_path / "jobs.json").finetune()
    assert job.status is JobStatus.SUCCEEDED


def test_odd_texts_arrive_as_they_are(server: CoherePlatform, tmp_path: Path) -> None:
    odd = 'a\u2028b \x00\x07\x85\u202e "港" \U0001f6a2\r\n'
    file = rows()
    file.examples[7] = file.examples[7].model_copy(
        update={"query": odd, "relevant_passages": [odd + "yes"], "hard_negatives": [odd + "no"]}
    )
    file.save(tmp_path / "odd.jsonl")
    engine(server, tmp_path / "odd.jsonl").finetune()
    (files,) = server.datasets.values()
    sent = [json.loads(line) for line in files["data"].decode().split("\n") if line]
    assert sent == [entry.content() for entry in file]


def test_an_injected_client_also_reranks(server: CoherePlatform, data: Path) -> None:
    client = cohere.ClientV2(api_key=server.api_key, base_url=server.base_url)
    hosted = engine(server, data, client=client, base_url=None, api_key=None)
    hosted.finetune()
    nodes = hosted.get_finetuned_model().postprocess_nodes(candidates(), query_str="harbour 3?")
    assert len(nodes) == 3


# --------------------------------------------------------------------------------------
# One job


@pytest.mark.parametrize("forget", [False, True])
def test_the_same_data_and_settings_are_one_job(
    server: CoherePlatform, data: Path, forget: bool
) -> None:
    first = engine(server, data).finetune()
    if forget:  # another machine
        (data.parent / "train.jsonl.jobs.json").unlink()
    assert engine(server, data).finetune().id == first.id
    assert server.count(CREATE) == server.count(UPLOAD) == 1
    other = engine(server, data, hyperparameters={"train_epochs": 2}).finetune()
    assert other.id != first.id
    assert engine(server, data, model_name="another").finetune().id not in (first.id, other.id)


@pytest.mark.parametrize("on", [CREATE, UPLOAD])
@pytest.mark.parametrize("done", [False, True])
def test_a_lost_answer_makes_no_second_one(
    server: CoherePlatform, data: Path, on: str, done: bool
) -> None:
    server.fail("drop", on=on, done=done)
    assert engine(server, data).finetune().status is JobStatus.SUCCEEDED
    assert len(server.models) == len(server.datasets) == 1


def test_a_killed_process_finds_its_job(server: CoherePlatform, data: Path) -> None:
    server.behaviour.state_seconds = 3.0
    script = (
        "import sys; from ft_cohere_rerank import CohereRerankerFinetuneEngine as E;"
        "E(sys.argv[1], base_url=sys.argv[2], show_progress=False).finetune()"
    )
    environment = {**os.environ, "COHERE_API_KEY": server.api_key}
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(data), server.base_url], env=environment
    )
    deadline = time.monotonic() + 60
    while not server.count(CREATE, done=True) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    job = engine(server, data).finetune()
    assert job.status is JobStatus.SUCCEEDED
    assert server.count(CREATE) == server.count(UPLOAD) == 1


def test_two_at_once_are_one_job(server: CoherePlatform, data: Path) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(engine(server, data).finetune().id))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 2
    assert len(set(found)) == 1
    assert server.count(CREATE) == 1


def test_a_failed_job_is_started_anew(server: CoherePlatform, data: Path) -> None:
    server.behaviour.failing = True
    with pytest.raises(TrainingError, match="failed: Cohere gives no reason"):
        engine(server, data).finetune()
    server.behaviour.failing = False
    assert engine(server, data).finetune().status is JobStatus.SUCCEEDED
    assert server.count(CREATE) == 2
    assert server.count(UPLOAD) == 1


def test_cancel_and_start_again(server: CoherePlatform, data: Path) -> None:
    server.behaviour.state_seconds = 5.0
    hosted = engine(server, data)
    job = hosted.finetune(wait=False)
    with pytest.raises(WaitTimeoutError):
        hosted.wait(timeout=0.05)
    assert hosted.cancel().status is JobStatus.CANCELLED
    assert server.models == {}
    assert hosted.get_current_job().status is JobStatus.CANCELLED
    with pytest.raises(TrainingError, match="was cancelled: it was deleted"):
        hosted.wait()
    server.behaviour.state_seconds = 0.01
    assert engine(server, data).finetune().id != job.id


def test_a_job_by_its_id(server: CoherePlatform, data: Path) -> None:
    job = engine(server, data).finetune()
    settings = {"base_url": server.base_url, "api_key": server.api_key}
    for name in (job.id, job.model):
        found = CohereRerankerFinetuneEngine.from_job_id(name or "", **settings)
        assert found.get_finetuned_model().model == job.model
    unknown = CohereRerankerFinetuneEngine.from_job_id("nobody", **settings)
    with pytest.raises(TrainingError, match="does not know the model nobody"):
        unknown.get_current_job()


@pytest.mark.parametrize("status", ["STATUS_PAUSED", "STATUS_TEMPORARILY_OFFLINE"])
def test_a_model_that_sleeps_is_trained(server: CoherePlatform, data: Path, status: str) -> None:
    job = engine(server, data).finetune()
    server.set_status(job.id, status)
    assert engine(server, data).finetune().model == job.model


# --------------------------------------------------------------------------------------
# What goes wrong


@pytest.mark.parametrize("what", [429, 500, 503, "drop"])
@pytest.mark.parametrize("on", [CREATE, UPLOAD, f"GET {TUNED}", "GET /v1/datasets"])
def test_what_passes_is_tried_again(server: CoherePlatform, data: Path, what: Any, on: str) -> None:
    server.fail(what, times=2, on=on)
    assert engine(server, data).finetune().status is JobStatus.SUCCEEDED
    assert len(server.models) == len(server.datasets) == 1


def test_retry_after_is_heeded(server: CoherePlatform, data: Path) -> None:
    naps: list[float] = []
    server.fail(429, on=CREATE, retry_after=7)
    engine(server, data, sleep=lambda seconds: naps.append(seconds)).finetune()
    assert 7.0 in naps


def test_retries_end(server: CoherePlatform, data: Path) -> None:
    server.fail(503, times=9, on=UPLOAD)
    with pytest.raises(TrainingError, match=r"cannot upload the dataset: .* answers 503"):
        engine(server, data, max_retries=2).finetune()
    assert server.count(UPLOAD) == 3


def test_a_hanging_server_is_asked_again(server: CoherePlatform, data: Path) -> None:
    server.fail("hang", on=f"GET {TUNED}", seconds=3.0)
    assert engine(server, data, timeout=0.5).finetune().status is JobStatus.SUCCEEDED


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_fails_at_once(server: CoherePlatform, data: Path, status: int) -> None:
    server.fail(status, on=UPLOAD)
    with pytest.raises(TrainingError, match=rf"rejects it \({status}\)|closed"):
        engine(server, data).finetune()
    assert server.count(UPLOAD) == 1


def test_a_wrong_key_is_not_repeated(server: CoherePlatform, data: Path) -> None:
    with pytest.raises(TrainingError, match="invalid api token") as caught:
        engine(server, data, api_key="secret-key").finetune()
    assert "secret-key" not in str(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize("how", ["closed", "removed"])
def test_closed_fine_tuning_names_the_next_way(
    server: CoherePlatform, data: Path, how: Any
) -> None:
    server.behaviour.fine_tuning = how
    with pytest.raises(TrainingError) as caught:
        engine(server, str(data)).finetune()
    message = str(caught.value)
    if how == "closed":
        assert message.startswith("fine-tuning is closed to this account")
    else:  # it may as well be another server's word for it
        assert "does not speak Cohere's fine-tuning API (404: 404 page not found)" in message
        assert "check base_url. If that is right, fine-tuning is closed there. Train" in message
    assert ".." not in message
    assert f"`ft cohere score {data} --output scored.jsonl`, then (pip" in message
    assert "`ft crossencoder train scored.jsonl --output reranker`" in message


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"<html>no such page</html>", "text/html"), (b'{"detail": "Not Found"}', "application/json")],
)
def test_a_proxy_is_not_taken_for_cohere(
    server: CoherePlatform, data: Path, content: bytes, kind: str
) -> None:
    server.behaviour.foreign = Reply(content=content, status=404, content_type=kind)
    with pytest.raises(TrainingError) as caught:
        engine(server, data).finetune()
    assert "does not speak Cohere's fine-tuning API (404: " in str(caught.value)
    assert "closed to this account" not in str(caught.value)
    assert "<html>" not in str(caught.value)


@pytest.mark.parametrize("content", [b"[]", b"{}", b"null", b'{"finetuned_model": {}}', b"<html>"])
def test_an_answer_that_names_no_model(server: CoherePlatform, content: bytes) -> None:
    kind = "text/html" if content == b"<html>" else "application/json"
    server.behaviour.foreign = Reply(content=content, content_type=kind)
    settings = {"base_url": server.base_url, "api_key": server.api_key}
    found = CohereRerankerFinetuneEngine.from_job_id("some-id", **settings)
    with pytest.raises(TrainingError, match=r"cannot look at the model .* does not speak Cohere's"):
        found.get_current_job()
    assert len(server.requests) == 1


def test_the_servers_reason_for_a_dataset(server: CoherePlatform, tmp_path: Path) -> None:
    server.behaviour.minimum_train = 300
    hosted = engine(server, rows(), job_file=tmp_path / "jobs.json")
    with pytest.raises(TrainingError, match="at least 300 valid train examples"):
        hosted.finetune()
    server.behaviour.minimum_train = 256
    assert hosted.finetune().status is JobStatus.SUCCEEDED


def test_limits_are_checked_before_anything_is_sent(server: CoherePlatform, tmp_path: Path) -> None:
    few = engine(server, rows(255), job_file=tmp_path / "jobs.json")
    with pytest.raises(DatasetError, match="add 1"):
        few.finetune()
    short = engine(server, rows(), val_file_name=rows(3), job_file=tmp_path / "jobs.json")
    with pytest.raises(DatasetError, match="validation"):
        short.finetune()
    assert server.count(UPLOAD) == 0
    server.behaviour.minimum_train = 10  # a deployment of one's own
    job = engine(server, rows(20), check_limits=False, job_file=tmp_path / "jobs.json").finetune()
    assert job.status is JobStatus.SUCCEEDED


def test_a_broken_line_is_named(server: CoherePlatform, data: Path) -> None:
    with data.open("a", encoding="utf-8") as file:
        file.write('{"query": "x"}\n')
    with pytest.raises(DatasetError, match=r"train\.jsonl: line 257"):
        engine(server, data).finetune()
    assert server.requests == []


@pytest.mark.parametrize(
    ("given", "argument"),
    [
        ({"model_type": "CLASSIFY"}, "model_type"),
        ({"base_model": "french"}, "base_model"),
        ({"hyperparameters": {"epochs": 2}}, "hyperparameters"),
        ({"hyperparameters": {"train_epochs": 0}}, "hyperparameters"),
        ({"max_retries": -1}, "max_retries"),
        ({"timeout": 0}, "timeout"),
        ({"model_name": ""}, "model_name"),
        ({"base_url": "nonsense"}, "base_url"),
    ],
)
def test_bad_arguments(given: dict[str, Any], argument: str) -> None:
    with pytest.raises(ArgumentError, match=argument):
        CohereRerankerFinetuneEngine(**given)


def test_a_missing_key(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COHERE_API_KEY", "CO_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ArgumentError, match="set COHERE_API_KEY"):
        CohereRerankerFinetuneEngine(str(data)).finetune()


def test_no_file_holds_the_key(server: CoherePlatform, data: Path) -> None:
    engine(server, data).finetune()
    for path in data.parent.iterdir():
        assert server.api_key not in path.read_text(encoding="utf-8")
