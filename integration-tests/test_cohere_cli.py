"""`ft cohere` against a server that speaks Cohere's real API."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cohere_platform import TUNED, CoherePlatform, word_overlap
from contract_server import Reply
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.cohere_rerank import CohereRerank
from testkit import Ran, ft

from ft_cohere_rerank import CohereRerankerFile, CohereRerankHandler, teacher
from ft_core.datasets import EmbeddingQAFinetuneDataset, RerankDataset

RERANK = "POST /v2/rerank"
CREATE = f"POST {TUNED}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[CoherePlatform]:
    monkeypatch.delenv("COHERE_API_KEY", raising=False)
    with CoherePlatform(state_seconds=0.01, dataset_seconds=0.01) as platform:
        monkeypatch.setenv("CO_API_KEY", platform.api_key)
        yield platform
    assert platform.violations == []


@pytest.fixture
def cohere(capsys: pytest.CaptureFixture[str], server: CoherePlatform) -> Callable[..., Ran]:
    def run(*arguments: str | Path) -> Ran:
        ran = ft(capsys, "cohere", *arguments, "--base-url", server.base_url)
        assert server.api_key not in ran.out + ran.err
        return ran

    return run


def rows(count: int = 256, town: str = "harbour") -> CohereRerankerFile:
    return CohereRerankerFile(
        examples=[
            {
                "query": f"Where is {town} number {n}?",
                "relevant_passages": [f"The {town} number {n} is in the north."],
                "hard_negatives": [f"The {town} number {n + 1} was sold."],
            }
            for n in range(count)
        ]
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    rows().save(path)
    return path


def check_scores(path: Path) -> RerankDataset:
    scored = RerankDataset.load(path)
    for example in scored:
        texts = [document.text for document in example.documents]
        found = [document.teacher_score for document in example.documents]
        assert found == word_overlap(example.query, texts)
    return scored


# --------------------------------------------------------------------------------------
# score


def test_score_says_the_cost_asks_and_goes_on(
    cohere: Callable[..., Ran],
    server: CoherePlatform,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, output = tmp_path / "candidates.jsonl", tmp_path / "scored.jsonl"
    rows(8).to_rerank().save(source)
    command = ("score", source, "--output", output, "--price", "2", "--workers", "1", "--json")
    cost = "rerank-v3.5 scores 8 queries, 16 documents: 8 calls, about 8 search units, 0.02 in"

    nobody = cohere(*command)
    assert (nobody.code, server.requests) == (1, [])
    assert cost in nobody.err
    assert "--yes: is needed where nobody can be asked" in nobody.err

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    answers = iter([False, True])
    monkeypatch.setattr("typer.confirm", lambda text, err: next(answers))
    no = cohere(*command)
    assert (no.code, server.requests) == (1, [])
    assert json.loads(no.out)["error"]["message"] == "nothing was sent"

    server.fail(400, on=RERANK)  # one of the eight calls
    refused = cohere(*command)
    assert refused.code == 1
    assert "1 of 8 calls failed" in refused.err
    assert not output.exists()
    asked = server.count(RERANK)
    document = cohere(*command, "--yes").document
    assert server.count(RERANK) == asked + 1
    assert document["output"] == str(output)
    assert (document["calls"], document["with a teacher score"]) == (1, 16)
    check_scores(output)

    again = cohere(*command)  # nothing to pay for, nothing to ask
    assert again.document["calls"] == 0
    assert server.count(RERANK) == asked + 1


def test_score_passes_every_option_on(
    cohere: Callable[..., Ran],
    server: CoherePlatform,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(teacher, "_MINUTE", 0.3)
    source, output = tmp_path / "train.jsonl", tmp_path / "scored.jsonl"
    rows(7).save(source)
    options = ("--model", "rerank-v4.0-pro", "--max-tokens-per-doc", "99", "--yes")
    start = time.monotonic()
    ran = cohere("score", source, "--output", output, *options, "--requests-per-minute", "2")
    assert time.monotonic() - start >= 3 * 0.3
    assert ran.code == 0
    assert "7 calls, about 7 search units, at least 3 min" in ran.err
    body = server.requests[0].body
    assert (body["model"], body["max_tokens_per_doc"]) == ("rerank-v4.0-pro", 99)
    assert "scored.jsonl" in ran.out.replace("\n", "").replace(" ", "")
    output.unlink()
    unlimited = ("--requests-per-minute", "0", "--model", "rerank-v3.5", "--yes")
    assert "at least" not in cohere("score", source, "--output", output, *unlimited).err


def test_score_stops_before_too_dear_a_run(
    cohere: Callable[..., Ran], server: CoherePlatform, data: Path, tmp_path: Path
) -> None:
    ran = cohere("score", data, "--output", tmp_path / "o", "--yes", "--max-search-units", "255")
    assert ran.code == 1
    assert "Error: max_search_units: is 255, and this takes 256 queries" in ran.err
    assert server.requests == []


def test_score_takes_questions_and_retrieves_candidates(
    cohere: Callable[..., Ran], tmp_path: Path
) -> None:
    source, output = tmp_path / "train.json", tmp_path / "scored.jsonl"
    towns = [f"town{number}" for number in range(9)]
    EmbeddingQAFinetuneDataset(
        queries={f"q-{town}": f"where is {town}" for town in towns},
        corpus={town: f"{town} is in the north" for town in towns},
        relevant_docs={f"q-{town}": [town] for town in towns},
    ).save(source)
    ran = cohere("score", source, "--output", output, "--top-k", "4", "--yes", "--json")
    assert ran.document["pairs"] == 9 * 4
    scored = check_scores(output)
    scored.check_trainable("teacher_score")
    assert [d.label for d in scored.examples[0].documents if d.label] == [1]


def test_score_takes_the_journal_of_an_app(
    cohere: Callable[..., Ran], server: CoherePlatform, tmp_path: Path
) -> None:
    journal, output = tmp_path / "reranks.jsonl", tmp_path / "scored.jsonl"
    reranker = CohereRerank(
        top_n=1, model="rerank-v3.5", api_key=server.api_key, base_url=server.base_url
    )
    nodes = [
        NodeWithScore(node=TextNode(text=text), score=0.5)
        for text in ("The harbour is in the north.", "A valley.")
    ]
    with CohereRerankHandler(journal).attach(reranker):
        reranker.postprocess_nodes(nodes, query_str="Where is the harbour?")
    assert cohere("score", journal, "--output", output, "--yes").code == 0
    assert len(check_scores(output).examples[0].documents) == 2


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "refuses (401)"), (403, "refuses (403)"), (404, "refuses (404)")],
)
def test_what_the_server_refuses_is_one_line(
    cohere: Callable[..., Ran], server: CoherePlatform, data: Path, status: int, said: str
) -> None:
    server.fail(status, times=999, on=RERANK)
    ran = cohere("score", data, "--output", data.with_name("o"), "--yes", "--workers", "1")
    assert ran.code == 1
    assert said in ran.err.splitlines()[-1]
    assert "check the API key (COHERE_API_KEY or CO_API_KEY), base_url and model=" in ran.err
    assert ".;" not in ran.err


def test_ctrl_c_says_what_is_kept_and_the_same_command_goes_on(
    cohere: Callable[..., Ran], server: CoherePlatform, data: Path
) -> None:
    server.behaviour.rerank_seconds = 0.2
    output = data.with_name("scored.jsonl")
    words = ["cohere", "score", str(data), "--output", str(output), "--yes", "--workers", "1"]
    words += ["--base-url", server.base_url]
    process = subprocess.Popen(
        [sys.executable, "-c", "from ft_core.cli import main; main()", *words],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CO_API_KEY": server.api_key},
    )
    deadline = time.monotonic() + 240
    while server.count(RERANK, done=True) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    kept = re.search(r"stopped; (\d+) answers are kept in (\S+); the same command", err)
    assert kept is not None, err
    assert int(kept[1]) >= 2
    assert Path(kept[2]) == Path(f"{output}.journal.jsonl")
    assert "Traceback" not in err
    # The stop may have cut a request short.
    server.violations[:] = [v for v in server.violations if "Expecting value" not in v]
    server.behaviour.rerank_seconds = 0.0
    assert cohere(*words[1:-2], "--json").document["calls"] <= 256 - int(kept[1])


@pytest.mark.parametrize("command", ["score", "train", "job"])
def test_an_answer_of_another_shape_is_one_line(
    cohere: Callable[..., Ran], server: CoherePlatform, data: Path, command: str
) -> None:
    content = b'[{"index": 0, "score": 0.5}]'  # Text Embeddings Inference
    server.behaviour.foreign = Reply(content=content, content_type="application/json")
    given: dict[str, list[str | Path]] = {
        "score": [data, "--output", data.with_name("o"), "--yes"],
        "train": [data],
        "job": ["some-id"],
    }
    ran = cohere(command, *given[command])
    assert ran.code == 1
    assert "JSON of another shape" in ran.err.splitlines()[-1]
    assert "check base_url" in ran.err.splitlines()[-1]


# --------------------------------------------------------------------------------------
# train


def test_train_and_look_at_the_job(
    cohere: Callable[..., Ran], server: CoherePlatform, data: Path, tmp_path: Path
) -> None:
    held_out, output = tmp_path / "val.jsonl", tmp_path / "job"
    rows(64, "valley").save(held_out)
    command = (
        "train", data, "--validation", held_out, "--output", output, "--name", "mine",
        "--base-model", "multilingual", "--epochs", "2", "--learning-rate", "0.02",
        "--batch-size", "32", "--json",
    )  # fmt: skip
    ran = cohere(*command)
    job = ran.document
    assert job == {"job": job["job"], "status": "succeeded", "model": f"{job['job']}-ft"}
    assert job["job"] in ran.err
    [model] = server.models.values()
    assert (model["name"], model["settings"]["base_model"]["name"]) == ("mine", "multilingual")
    numbers = model["settings"]["hyperparameters"]
    assert (numbers["train_epochs"], numbers["learning_rate"]) == (2, 0.02)
    assert numbers["train_batch_size"] == 32
    assert [path.name for path in output.iterdir() if path.suffix == ".json"] == ["jobs.json"]

    assert cohere(*command).document == job
    assert server.count(CREATE) == 1
    shown = cohere("job", job["job"], "--events", "--json").document
    assert "ndcg@10" in " ".join(event["message"] for event in shown.pop("events"))
    assert shown == job
    assert job["model"] in cohere("job", job["job"]).out.replace("\n", "").replace(" ", "")


def test_train_without_waiting_and_cancel(
    cohere: Callable[..., Ran], server: CoherePlatform, data: Path
) -> None:
    server.behaviour.state_seconds = 30.0
    started = cohere("train", data, "--no-wait", "--json").document
    assert started["status"] in ("queued", "running")
    stopped = cohere("job", started["job"], "--cancel", "--json").document
    assert stopped == {"job": started["job"], "status": "cancelled"}
    assert server.models == {}


@pytest.mark.parametrize("how", ["closed", "removed"])
def test_where_training_is_closed_the_next_way_works_as_it_is_told(
    cohere: Callable[..., Ran], server: CoherePlatform, data: Path, how: Any
) -> None:
    server.behaviour.fine_tuning = how
    ran = cohere("train", data)
    assert ran.code == 1
    last = ran.err.splitlines()[-1]
    assert "fine-tuning is closed" in last
    assert ".." not in last
    told = f"`ft cohere score {data} --output scored.jsonl`"
    assert told in last
    assert "(pip install ft-crossencoder) `ft crossencoder train scored.jsonl" in last

    words = told.strip("`").split()[2:-1]
    scored = data.with_name("scored.jsonl")
    assert cohere(*words, scored, "--yes").code == 0
    check_scores(scored).check_trainable("teacher_score")


def test_train_checks_before_anything_is_sent(
    cohere: Callable[..., Ran], server: CoherePlatform, tmp_path: Path
) -> None:
    few = tmp_path / "few.jsonl"
    rows(20).save(few)
    ran = cohere("train", few)
    assert f"Error: {few}: has 20 different queries" in ran.err
    assert server.count("POST /v1/datasets") == 0
    server.behaviour.minimum_train = 10
    assert cohere("train", few, "--no-check-limits").code == 0
