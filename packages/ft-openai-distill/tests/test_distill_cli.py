"""The commands, on real files, a tiny model, and a server that speaks the real API."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import model_assets
import pytest
from openai_platform import OpenAIPlatform
from platform_trainer import Step, TrainingRequest
from testkit import Ran, ft

MODEL = "gpt-4o-mini-2024-07-18"
TOWNS = ["Arlow", "Brennick", "Cawdry", "Dunmere", "Esk", "Farleigh", "Gorse", "Hexwood", "Inch",
         "Jarrow", "Keld", "Lorne", "Mossy", "Nairn", "Orton", "Penrith"]  # fmt: skip


def example(town: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"When does the boat to {town} leave?"},
            {"role": "assistant", "content": "It leaves at dawn, from the old pier."},
        ]
    }


def write(path: Path, towns: list[str]) -> Path:
    lines = [json.dumps(example(town)) + "\n" for town in towns]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "teacher.jsonl", TOWNS[:12])


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    return write(tmp_path / "held-out.jsonl", TOWNS[12:])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    texts = [message["content"] for town in TOWNS for message in example(town)["messages"]]
    return model_assets.tiny_causal_lm(tmp_path_factory.mktemp("tiny"), texts)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIPlatform]:
    with OpenAIPlatform() as server:
        monkeypatch.setenv("OPENAI_API_KEY", server.api_key)
        yield server


@pytest.fixture
def distill(capsys: pytest.CaptureFixture[str]) -> Any:
    return partial(ft, capsys, "distill")


def train(data: Path, tiny: str, output: Path, *more: str | Path) -> tuple[str | Path, ...]:
    """Return the arguments of a training run that takes a second and learns something."""
    return (
        "train", data, "--base-model", tiny, "--output", output, "--device", "cpu",
        "--epochs", "20", "--learning-rate", "0.02", "--batch-size", "4", *more,
    )  # fmt: skip


# --------------------------------------------------------------------------------------
# check


def test_check_counts_and_estimates(distill: Any, data: Path) -> None:
    found = distill("check", data, "--epochs", "2", "--price", "1000", "--json").document
    assert (found["examples"], found["distinct questions"]) == (12, 12)
    assert 12 * 20 < found["tokens"] < 12 * 50
    assert f"{2 * found['tokens']:,} tokens to train on" in found["training"]
    assert found["training"].endswith(f"{2 * found['tokens'] / 1000:,.2f} in all")
    text = distill("check", data)
    assert text.code == 0
    assert "12 examples" in text.out
    with pytest.raises(ValueError):
        json.loads(text.out)


def test_check_applies_the_limits_of_a_hosted_model_where_one_is_named(
    distill: Any, tmp_path: Path
) -> None:
    few = write(tmp_path / "few.jsonl", TOWNS[:3])
    assert distill("check", few, "--json").document["examples"] == 3
    refused = distill("check", few, "--model", MODEL)
    assert (refused.code, refused.out) == (1, "")
    assert f"Error: {few}: has 3 examples; fine-tuning takes at least 10" in refused.err


# --------------------------------------------------------------------------------------
# A student of one's own


@pytest.mark.slow
def test_train_merge_and_eval(
    distill: Any, data: Path, held_out: Path, tiny: str, tmp_path: Path
) -> None:
    student = tmp_path / "student"
    command = train(data, tiny, student, "--validation", held_out, "--lora-rank", "0",
                    "--max-length", "200", "--seed", "3", "--json")  # fmt: skip
    ran = distill(*command)
    assert ran.document["job"] == ran.document["model"] == str(student)
    assert ran.document["status"] == "succeeded"
    metrics = ran.document["metrics"]
    assert metrics["validation_loss"] < metrics["base_loss"]
    assert "step 60 of 60: " in ran.err
    assert "validation loss" in ran.err
    settings = json.loads((student / "ft.json").read_text())["settings"]
    named = ("epochs", "learning_rate", "batch_size", "lora_rank", "max_length", "seed")
    assert [settings[name] for name in named] == [20, 0.02, 4, None, 200, 3]

    written = (student / "ft.json").read_bytes()
    again = distill(*command)
    assert again.document == ran.document
    assert "is trained already" in again.err
    assert (student / "ft.json").read_bytes() == written

    shown = distill("job", student, "--events", "--json").document
    assert shown["status"] == "succeeded"
    assert shown["events"][-1]["message"].startswith("step 60 of 60: ")

    merged = distill("merge", student, tmp_path / "merged", "--json").document
    assert merged == {"model": str(tmp_path / "merged")}
    assert (tmp_path / "merged" / "model.safetensors").is_file()

    page = tmp_path / "report.html"
    evaluate = (
        "eval", held_out, "--student", f"local:{tmp_path / 'merged'}", "--base", f"local:{tiny}",
        "--max-tokens", "12",
    )  # fmt: skip
    report = distill(*evaluate, "--html", page, "--json").document
    assert [run["name"] for run in report["runs"]] == ["base", "student"]
    base, tuned = (run["metrics"]["rouge_l"]["mean"] for run in report["runs"])
    assert tuned > base + 0.5
    assert all(run["metrics"]["output_tokens"]["mean"] <= 12 for run in report["runs"])
    assert "student" in page.read_text(encoding="utf-8")
    text = distill(*evaluate)
    assert text.code == 0
    assert "ROUGE-L" in text.out


@pytest.mark.slow
def test_train_in_the_background(distill: Any, data: Path, tiny: str, tmp_path: Path) -> None:
    student = tmp_path / "student"
    command = train(data, tiny, student, "--lora-rank", "4", "--no-wait", "--json")
    started = distill(*command).document
    assert (started["job"], started["metrics"]) == (str(student), {})
    assert started["status"] in ("queued", "running")
    end = time.monotonic() + 120
    while (job := distill("job", student, "--json").document)["status"] != "succeeded":
        assert job["status"] in ("queued", "running"), job
        assert time.monotonic() < end
        time.sleep(0.2)
    assert job["model"] == str(student)
    assert json.loads((student / "ft.json").read_text())["settings"]["lora_rank"] == 4


# --------------------------------------------------------------------------------------
# A hosted student


def test_submit_waits_and_finds_its_job_again(
    distill: Any, server: OpenAIPlatform, data: Path, held_out: Path
) -> None:
    held_out = write(held_out, TOWNS[4:])  # a server wants at least ten of them, too
    command = (
        "submit", data, "--base-model", MODEL, "--base-url", server.base_url, "--validation",
        held_out, "--suffix", "boats", "--epochs", "2", "--seed", "7", "--price", "3", "--json",
    )  # fmt: skip
    ran = distill(*command)
    job = ran.document
    assert job["status"] == "succeeded"
    assert job["model"].startswith(f"ft:{MODEL}:org-platform:boats:")
    assert "12 examples" in ran.err
    assert job["job"] in ran.err
    [made] = server.jobs.values()
    assert (made["seed"], made["hyperparameters"]["n_epochs"]) == (7, 2)
    assert made["validation_file"]

    assert distill(*command).document == job
    assert list(server.jobs) == [job["job"]]

    shown = distill("job", job["job"], "--base-url", server.base_url, "--events", "--json").document
    assert shown.pop("events")[-1]["message"]
    assert shown == job
    text = distill("job", job["job"], "--base-url", server.base_url)
    assert job["model"] in text.out.replace("\n", "").replace(" ", "")
    assert server.violations == []
    secret = server.api_key
    assert not any(secret in path.read_text() for path in data.parent.iterdir())


def endless(request: TrainingRequest) -> Iterator[Step]:
    for step in range(1, 100_000):
        yield Step(step, 100_000, 1 / step)
        request.cancelled.wait(0.01)


def test_submit_without_waiting_and_cancel(
    distill: Any, server: OpenAIPlatform, data: Path
) -> None:
    server.trainer = endless
    url = ("--base-url", server.base_url)
    started = distill("submit", data, "--base-model", MODEL, *url, "--no-wait", "--json").document
    assert started["status"] in ("validating_files", "queued", "running")
    assert "model" not in started
    server.wait_for(started["job"], "running")
    assert distill("job", started["job"], *url, "--json").document["status"] == "running"
    stopped = distill("job", started["job"], *url, "--cancel", "--json").document
    assert stopped == {"job": started["job"], "status": "cancelled"}
    assert server.jobs[started["job"]]["status"] == "cancelled"


# --------------------------------------------------------------------------------------
# Errors


def one_line(ran: Ran) -> str:
    """Return the one line that a failed command prints, besides remarks."""
    assert (ran.code, ran.out) == (1, "")
    assert "Traceback" not in ran.err
    [line] = [line for line in ran.err.splitlines() if line.startswith("Error: ")]
    return line.removeprefix("Error: ")


def test_bad_input_is_one_line(
    distill: Any, data: Path, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    nowhere, foreign = tmp_path / "nowhere", tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text(json.dumps(example("Esk")) + "\n" + '{"messages": []}\n')
    submit = ("submit", data, "--base-model", MODEL)
    for arguments, *words in (
        (("check", nowhere), str(nowhere), "no such file"),
        (("check", damaged), f"{damaged}: line 2"),
        (train(nowhere, tiny, tmp_path / "out"), str(nowhere), "no such file"),
        (train(data, str(nowhere), tmp_path / "out"), "model: ", f"{nowhere}: no such folder"),
        (train(data, tiny, tmp_path / "out", "--seed", "-1"), "seed: ", "from 0"),
        (train(data, tiny, foreign), str(foreign), "name an empty or new folder"),
        (("merge", nowhere, tmp_path / "out"), str(nowhere)),
        (submit, "api_key: ", "OPENAI_API_KEY"),
        (("job", "ftjob-1"), "api_key: ", "OPENAI_API_KEY"),
        (("job", nowhere), str(nowhere)),
        (("job", nowhere, "--cancel"), str(nowhere)),
        (("eval", data, "--student", "llama"), "llm: ", "'llama'", "local:"),
        (("eval", data, "--student", f"local:{nowhere}"), str(nowhere)),
        (("eval", nowhere, "--student", f"local:{tiny}"), str(nowhere), "no such file"),
    ):
        line = one_line(distill(*arguments))
        assert all(word in line for word in words), (arguments, line)
    assert not (tmp_path / "out").exists()
    assert (foreign / "thesis.txt").read_text() == "years of work"


def test_what_a_server_refuses_is_one_line(
    distill: Any, server: OpenAIPlatform, data: Path, tmp_path: Path
) -> None:
    url = ("--base-url", server.base_url)
    assert "gpt-9" in one_line(distill("submit", data, "--base-model", "gpt-9", *url))
    assert "ftjob-none" in one_line(distill("job", "ftjob-none", *url))
    server.behaviour.fine_tuning_closed = True
    closed = one_line(distill("submit", data, "--base-model", MODEL, *url))
    assert "not available to your organization" in closed
    assert f"LocalFinetuneEngine(\"<open model>\", '{data}'" in closed
    assert server.jobs == {}


def test_an_error_is_a_document_with_json(distill: Any, tmp_path: Path) -> None:
    ran = distill("check", tmp_path / "no.jsonl", "--json")
    assert ran.code == 1
    error = json.loads(ran.out)["error"]
    assert error["type"] == "DatasetError"
    assert str(tmp_path / "no.jsonl") in error["message"]


def test_the_help_lists_the_commands(distill: Any) -> None:
    ran = distill("--help")
    assert ran.code == 0
    for command in ("check", "train", "merge", "submit", "job", "eval"):
        assert f" {command} " in ran.out
