"""`ft judge train` and `ft judge eval`, on a tiny model and a server that checks its contract."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import model_assets
import pytest
from openai_platform import OpenAIPlatform

from ft_core.datasets import JudgeDataset, JudgeExample
from ft_core.errors import ArgumentError, DatasetError
from ft_judge.baselines import longer_answer
from ft_judge.cli import judge
from ft_judge.recipe import Recipe

DATA = JudgeDataset(
    examples=[
        *(
            JudgeExample(
                task="pairwise",
                query=f"What holds boat {number}?",
                answer="A bowline holds.",
                second_answer="Glue.",
                verdict=1.0,
                flipped_verdict=1.0,
            )
            for number in range(6)
        ),
        JudgeExample(task="correctness", query="Where?", answer="Here.", score=4.0),
    ]
)


@pytest.fixture
def verdicts(tmp_path: Path) -> Path:
    DATA.save(tmp_path / "verdicts.jsonl")
    return tmp_path / "verdicts.jsonl"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> str:
    chats = Recipe("pairwise", False, DATA).lessons().train
    texts = [m["content"] for chat in chats for m in chat.messages]
    return model_assets.tiny_causal_lm(tmp_path_factory.mktemp("base"), texts, vocabulary=400)


def run(*arguments: Any) -> None:
    """Run a command as `ft` does, but for how it shows an error."""
    judge([str(argument) for argument in arguments], standalone_mode=False)


def test_train_and_compare(
    verdicts: Path, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tuned"
    given = ("--device", "cpu", "--epochs", 1, "--json")
    run("train", verdicts, "--student", base, "--output", folder, *given)
    document = json.loads(capsys.readouterr().out)
    assert (document["kind"], document["judge"]) == ("local", str(folder))
    assert document["metrics"]

    page = tmp_path / "report.html"
    compared = ("--judge", folder, "--base", base, "--length", "--device", "cpu")
    run("eval", verdicts, *compared, "--html", page, "--json")
    runs = {run["name"]: run for run in json.loads(capsys.readouterr().out)["runs"]}
    assert set(runs) == {"tuned", "base", "length"}
    assert runs["length"]["statistics"]["kappa_teacher"]["value"] == 1.0
    assert "calibration_error_teacher" in runs["tuned"]["statistics"]
    assert page.read_text().startswith("<!")
    run("eval", verdicts, *compared)
    assert "length" in capsys.readouterr().out


def test_each_judge_has_a_name_of_its_own(
    verdicts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ft_judge.cli._loaded", lambda *given: longer_answer)
    folders = ("old/judge", "judge", "length", "teacher")
    asked = [part for folder in folders for part in ("--judge", folder)]
    run("eval", verdicts, *asked, "--length", "--json")
    names = [run["name"] for run in json.loads(capsys.readouterr().out)["runs"]]
    whole = [str(tmp_path.resolve() / folder) for folder in folders]
    assert names == ["length", "judge", *whole[1:]]
    with pytest.raises(ArgumentError, match="--judge: judge is given twice"):
        run("eval", verdicts, "--judge", "judge", "--judge", "./judge/")


def test_a_hosted_student(
    verdicts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = "gpt-4o-mini-2024-07-18"
    folder = tmp_path / "hosted"
    with OpenAIPlatform() as server:
        monkeypatch.setenv("OPENAI_API_KEY", server.api_key)
        at = ("--base-url", server.base_url, "--epochs", 2, "--seed", 3)
        run("train", verdicts, "--student", model, "--output", folder, *at, "--json")
        document = json.loads(capsys.readouterr().out)
        assert document["model"].startswith(f"ft:{model}")
        (body,) = [
            r.body
            for r in server.requests
            if f"{r.method} {r.path}" == "POST /fine_tuning/jobs" and r.done
        ]
        assert body["seed"] == 3
        assert body["method"]["supervised"]["hyperparameters"] == {"n_epochs": 2}
        run("eval", verdicts, "--judge", folder, "--json")
        (found,) = json.loads(capsys.readouterr().out)["runs"]
        assert (found["name"], found["failures"]) == ("hosted", {})
    assert server.violations == []


def test_what_has_no_effect_is_refused(verdicts: Path, base: str, tmp_path: Path) -> None:
    train = ("train", verdicts, "--output", tmp_path / "judge", "--student")
    with pytest.raises(ArgumentError, match="--device: has no effect"):
        run(*train, "gpt-4.1-mini", "--device", "cpu")
    with pytest.raises(ArgumentError, match="--base-url: has no effect: the student is local"):
        run(*train, base, "--kind", "local", "--base-url", "http://127.0.0.1:1")
    with pytest.raises(ArgumentError, match="--task: is pairwise or correctness"):
        run(*train, base, "--task", "relevancy")
    with pytest.raises(ArgumentError, match="kind: is one of"):
        run(*train, base, "--kind", "remote")
    assert not (tmp_path / "judge").exists()


def test_a_file_without_the_task(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    JudgeDataset(examples=DATA.examples[:2]).save(file)
    with pytest.raises(DatasetError, match=r"pairs\.jsonl: .*no example of the task"):
        run("eval", file, "--judge", tmp_path, "--task", "correctness")
