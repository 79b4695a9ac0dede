"""The scripts of `examples/` do what they say, on a tiny model and without a GPU or Modal."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import model_assets
import pytest

from ft_core.datasets import Text2SQLDataset
from ft_text2sql import Text2SQLFinetuneEngine
from ft_text2sql.prompt import SQLPrompt
from ft_text2sql.training import ChatMaker

EXAMPLES = Path(__file__).parents[1] / "examples"
BOATS = "CREATE TABLE boats (name TEXT, length REAL, harbour TEXT)"
PAIRS = {
    "How many boats are there?": "SELECT count(*) FROM boats",
    "Which boats lie in Bergen?": "SELECT name FROM boats WHERE harbour = 'Bergen'",
    "How long is the Tern?": "SELECT length FROM boats WHERE name = 'Tern'",
    "What is the longest boat?": "SELECT name FROM boats ORDER BY length DESC LIMIT 1",
    "Where does the Gull lie?": "SELECT harbour FROM boats WHERE name = 'Gull'",
    "Name the harbours.": "SELECT DISTINCT harbour FROM boats",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `train.jsonl`, `validation.jsonl` and the tiny model `base`."""
    folder = tmp_path_factory.mktemp("examples")
    data = Text2SQLDataset.coerce(
        [{"question": q, "sql": sql, "context": BOATS} for q, sql in PAIRS.items()]
    )
    data.save(folder / "train.jsonl")
    data.save(folder / "validation.jsonl")
    chats = ChatMaker(SQLPrompt()).dataset(data, "train")
    texts = [message["content"] for chat in chats for message in chat.messages] * 3
    model_assets.tiny_causal_lm(folder / "base", texts, vocabulary=400)
    return folder


def visible(folder: Path) -> set[str]:
    """Return what lies in a folder, but for the lock of the run."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def answers(folder: Path, database: Path) -> dict[str, Any]:
    """Return what the query engine of a trained folder says of an answer."""
    with closing(sqlite3.connect(database)) as connection:
        connection.executescript(BOATS)
    engine = Text2SQLFinetuneEngine.load(folder, device="cpu")
    query_engine = engine.get_query_engine(
        f"sqlite:///{database}", llm=engine.get_finetuned_model(max_new_tokens=8)
    )
    metadata: dict[str, Any] = query_engine.query("How many boats are there?").metadata
    return metadata


@pytest.mark.slow
def test_two_processes_train_one_model(folder: Path, tmp_path: Path) -> None:
    # As `accelerate launch` does for GPUs; on CPUs, that starts one process or asks for MPI.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(EXAMPLES / "accelerate_train.py")]
    command += [str(folder / "train.jsonl"), "--base-model", str(folder / "base")]
    command += ["--validation", str(folder / "validation.jsonl"), "--device", "cpu"]
    command += ["--output", str(tmp_path / "sql"), "--epochs", "1", "--batch-size", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [f"succeeded: {tmp_path / 'sql'}"]
    assert visible(tmp_path) == {"sql"}
    events = (tmp_path / "sql" / "training.jsonl").read_text().splitlines()
    steps = {json.loads(line)["data"].get("step") for line in events}
    # Six examples by two: --batch-size counts those of both processes together.
    assert max(step for step in steps if step is not None) == 3
    assert answers(tmp_path / "sql", tmp_path / "boats.db")["candidates"]


@pytest.fixture
def modal_train(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The Modal app as a module; Modal itself where it is installed."""
    if importlib.util.find_spec("modal") is None:
        monkeypatch.setitem(sys.modules, "modal", MagicMock())
    spec = importlib.util.spec_from_file_location("modal_train", EXAMPLES / "modal_train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_modal_runs_trains_and_goes_on(
    modal_train: ModuleType, folder: Path, tmp_path: Path
) -> None:
    for name in ("train.jsonl", "validation.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    settings = {"epochs": 1, "device": "cpu", "show_progress": False}
    given = (tmp_path, str(folder / "base"), settings)

    metrics = modal_train.train(*given)

    assert metrics["validation_loss"] > 0
    assert visible(tmp_path) == {"train.jsonl", "validation.jsonl", "sql"}
    written = (tmp_path / "sql" / "ft.json").stat().st_mtime_ns
    assert modal_train.train(*given) == metrics  # as Modal does after a lost container
    assert (tmp_path / "sql" / "ft.json").stat().st_mtime_ns == written
    assert answers(tmp_path / "sql", tmp_path / "boats.db")["candidates"]


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_the_scripts_say_how_they_are_run(name: str) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    compile(text, name, "exec")
    launcher = {"accelerate_train.py": "accelerate launch", "modal_train.py": "modal run"}[name]
    assert f"{launcher} " in text
    assert f" {name} " in text
