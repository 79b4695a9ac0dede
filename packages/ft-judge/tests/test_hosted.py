"""Hosted students, against a server that validates OpenAI's contract and really trains."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai_platform import OpenAIPlatform

from ft_core.datasets import JudgeDataset, JudgeExample
from ft_core.errors import ArgumentError, ArtifactError, MissingExtraError, TrainingError
from ft_core.jobs import JobStatus
from ft_judge import CorrectnessJudgeFinetuneEngine, PairwiseJudgeFinetuneEngine, load_judge
from ft_judge.prompts import NO_REFERENCE

MODEL = "gpt-4o-mini-2024-07-18"
CREATE = "POST /fine_tuning/jobs"
CHAT = "POST /chat/completions"


def pairs(count: int = 8) -> JudgeDataset:
    return JudgeDataset(
        examples=[
            JudgeExample(
                task="pairwise",
                query=f"What holds boat {number}?",
                answer="A bowline.",
                second_answer="Glue.",
                verdict=1.0,
                flipped_verdict=0.0 if number == 3 else 1.0,
                reasoning="A knot holds.",
                flipped_reasoning="A knot holds.",
            )
            for number in range(count)
        ]
    )


def grades() -> JudgeDataset:
    return JudgeDataset(
        examples=[
            JudgeExample(task="correctness", query=f"Where is {n}?", answer="Here.", score=4.0)
            for n in range(12)
        ]
    )


@pytest.fixture
def server() -> Iterator[OpenAIPlatform]:
    with OpenAIPlatform() as platform:
        yield platform
    assert platform.violations == []


def service(server: OpenAIPlatform, **changes: Any) -> dict[str, Any]:
    return {
        "base_url": server.base_url,
        "api_key": server.api_key,
        "poll_seconds": (0.01, 0.05),
        "sleep": lambda seconds: time.sleep(min(seconds, 0.05)),
        "show_progress": False,
        **changes,
    }


def asked(server: OpenAIPlatform) -> list[dict[str, Any]]:
    return [r.body for r in server.requests if f"{r.method} {r.path}" == CHAT and r.done]


def texts_in(folder: Path) -> str:
    return "\n".join(file.read_text() for file in folder.rglob("*") if file.is_file())


def manifest_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "ft.json").read_text())
    return content


def test_from_verdicts_to_a_judge_that_answers(server: OpenAIPlatform, tmp_path: Path) -> None:
    folder = tmp_path / "judge"
    engine = PairwiseJudgeFinetuneEngine(
        pairs(), MODEL, folder, val_data=pairs(2), suffix="judge", **service(server)
    )
    job = engine.finetune()
    assert job.status is JobStatus.SUCCEEDED
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert len(lines) == 14  # seven pairs, each in both orders
    assert len((folder / "val.jsonl").read_text().splitlines()) == 4
    assert {line["messages"][-1]["content"] for line in lines} == {"[[A]]", "[[B]]"}

    judge = engine.get_finetuned_model(enforce_consensus=False)
    result = asyncio.run(
        judge.aevaluate(query="What holds boat 0?", response="A bowline.", second_response="Glue.")
    )
    assert asked(server)[-1]["model"] == job.model
    assert asked(server)[-1]["temperature"] == 0.0
    sent = [(m["role"], _text(m)) for m in asked(server)[-1]["messages"]]
    assert sent == [(m["role"], m["content"]) for m in lines[0]["messages"][:-1]]
    # The server's student answers with words of its training; each is a verdict or nothing.
    assert result.invalid_result or result.score in (0.0, 1.0)

    manifest = manifest_of(folder)
    assert manifest["kind"] == "hosted-judge"
    assert manifest["settings"]["model"] == job.model
    assert manifest["settings"]["job_id"] == job.id
    assert manifest["settings"]["judge"]["dropped"] == {"the two orders disagree": 1}
    assert server.api_key not in texts_in(folder)


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def test_a_folder_comes_back_and_needs_no_job_any_more(
    server: OpenAIPlatform, tmp_path: Path
) -> None:
    folder = tmp_path / "judge"
    job = CorrectnessJudgeFinetuneEngine(grades(), MODEL, folder, **service(server)).finetune()
    before = len(server.requests)
    loaded = CorrectnessJudgeFinetuneEngine.load(folder, api_key=server.api_key)
    judge = loaded.get_finetuned_model()
    assert len(server.requests) == before
    asyncio.run(judge.aevaluate(query="Where is 1?", response="Here."))
    assert asked(server)[-1]["model"] == job.model
    assert NO_REFERENCE in _text(asked(server)[-1]["messages"][-1])
    assert loaded.get_current_job().status is JobStatus.SUCCEEDED
    with pytest.raises(ArtifactError, match="load it with CorrectnessJudgeFinetuneEngine"):
        PairwiseJudgeFinetuneEngine.load(folder)
    with pytest.raises(ArgumentError, match="scored"):
        loaded.get_finetuned_model(scored=True)


def test_one_set_of_verdicts_is_one_job(server: OpenAIPlatform, tmp_path: Path) -> None:
    first = PairwiseJudgeFinetuneEngine(pairs(), MODEL, tmp_path / "judge", **service(server))
    again = PairwiseJudgeFinetuneEngine(pairs(), MODEL, tmp_path / "judge", **service(server))
    assert first.finetune().id == again.finetune().id
    assert server.count(CREATE) == 1
    other = PairwiseJudgeFinetuneEngine(pairs(9), MODEL, tmp_path / "judge", **service(server))
    job = other.finetune()
    assert server.count(CREATE) == 2
    assert manifest_of(tmp_path / "judge")["settings"]["model"] == job.model


def test_a_job_that_runs_on_is_found_by_its_folder_and_by_its_id(
    server: OpenAIPlatform, tmp_path: Path
) -> None:
    folder = tmp_path / "judge"
    started = PairwiseJudgeFinetuneEngine(pairs(), MODEL, folder, **service(server))
    job = started.finetune(wait=False)
    found = PairwiseJudgeFinetuneEngine.load(folder, **service(server))
    assert found.job_id == job.id
    done = found.wait()
    assert manifest_of(folder)["settings"]["model"] == done.model

    named = PairwiseJudgeFinetuneEngine.from_job_id(job.id, **service(server))
    assert named.wait().model == done.model
    judge = named.get_finetuned_model(enforce_consensus=False)
    asyncio.run(judge.aevaluate(query="q", response="a", second_response="b"))
    assert asked(server)[-1]["model"] == done.model


def test_a_new_job_that_fails_leaves_the_judge_that_was_there(
    server: OpenAIPlatform, tmp_path: Path
) -> None:
    folder = tmp_path / "judge"
    good = PairwiseJudgeFinetuneEngine(pairs(), MODEL, folder, **service(server)).finetune()
    server.behaviour.unsafe_files = True
    with pytest.raises(TrainingError, match="failed"):
        PairwiseJudgeFinetuneEngine(pairs(9), MODEL, folder, **service(server)).finetune()
    judge: Any = load_judge(folder, api_key=server.api_key)
    assert judge._llm.model == good.model


def test_a_new_job_that_runs_on_is_told_beside_the_judge_that_is_there(
    server: OpenAIPlatform, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "judge"
    good = PairwiseJudgeFinetuneEngine(pairs(), MODEL, folder, **service(server)).finetune()
    engine = PairwiseJudgeFinetuneEngine(pairs(9), MODEL, folder, **service(server))
    job = engine.finetune(wait=False)
    assert f"holds the judge of an earlier job until wait() has seen {job.id}" in caplog.text
    assert PairwiseJudgeFinetuneEngine.load(folder, **service(server)).job_id == good.id
    done = engine.wait()
    assert manifest_of(folder)["settings"]["model"] == done.model != good.model


def test_before_there_is_a_job(server: OpenAIPlatform, tmp_path: Path) -> None:
    folder = tmp_path / "judge"
    engine = PairwiseJudgeFinetuneEngine(pairs(), MODEL, folder, **service(server))
    with pytest.raises(TrainingError, match="call finetune"):
        engine.get_finetuned_model()
    assert not folder.exists()
    with pytest.raises(ArgumentError, match="epochs: is no argument of a hosted student"):
        PairwiseJudgeFinetuneEngine(pairs(), MODEL, folder, epochs=3, **service(server)).finetune()
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="holds files that no fine-tuning pack saved"):
        engine.finetune()
    assert [file.name for file in folder.iterdir()] == ["notes.txt"]
    assert server.count(CREATE) == 0


def test_secrets_in_a_url_are_not_written(tmp_path: Path) -> None:
    folder = tmp_path / "judge"
    url = "http://me:hush-hush@127.0.0.1:1/v1?key=hush-hush"  # where nobody answers
    engine = PairwiseJudgeFinetuneEngine(
        pairs(), MODEL, folder, base_url=url, api_key="sk-hush-hush", max_retries=0
    )
    with pytest.raises(TrainingError) as caught:
        engine.finetune(wait=False)
    assert "hush-hush" not in texts_in(folder) + str(caught.value)
    assert manifest_of(folder)["settings"]["base_url"] == "http://127.0.0.1:1/v1"


def test_without_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = PairwiseJudgeFinetuneEngine(pairs(), MODEL, tmp_path / "judge", api_key="sk-none")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ft-judge\[openai\]'"):
        engine.finetune()


def test_with_a_client(server: OpenAIPlatform, tmp_path: Path) -> None:
    client = openai.OpenAI(api_key=server.api_key, base_url=server.base_url)
    given = {k: v for k, v in service(server).items() if k not in ("base_url", "api_key")}
    engine = PairwiseJudgeFinetuneEngine(pairs(), MODEL, tmp_path / "judge", client=client, **given)
    job = engine.finetune()
    loaded: Any = load_judge(tmp_path / "judge", api_key=server.api_key)
    assert loaded._llm.model == job.model
    assert loaded._llm.api_base.rstrip("/") == server.base_url.rstrip("/")
    assert server.api_key not in texts_in(tmp_path / "judge")
