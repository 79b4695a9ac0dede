from __future__ import annotations

import json
from pathlib import Path

import pytest

from ft_core.cli import main
from ft_core.datasets import EmbeddingQAFinetuneDataset


def ft(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_train_and_eval(
    dataset: EmbeddingQAFinetuneDataset,
    heldout: EmbeddingQAFinetuneDataset,
    tiny_model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dataset.save(tmp_path / "train.json")
    heldout.save(tmp_path / "val.json")
    output, page = tmp_path / "out", tmp_path / "report.html"
    code = ft(
        "embeddings", "train", tmp_path / "train.json", "--model", tiny_model, "--output", output,
        "--validation", tmp_path / "val.json", "--epochs", "8", "--batch-size", "8",
        "--learning-rate", "0.005", "--html", page, "--json",
    )  # fmt: skip
    assert code == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["model"] == str(output)
    assert "base" in page.read_text()

    code = ft(
        "embeddings", "eval", tmp_path / "val.json", "--model", tiny_model, "--model", output,
        "--json",
    )  # fmt: skip
    assert code == 0
    compared = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in compared["runs"]] == [tiny_model, str(output)]


def test_bad_input_is_one_line_on_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = ft(
        "embeddings", "train", tmp_path / "no.json", "--model", "x", "--output", tmp_path / "o"
    )
    assert code == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == f"Error: {tmp_path / 'no.json'}: no such file\n"
    code = ft(
        "embeddings", "train", tmp_path / "no.json", "--model", "x", "--output", tmp_path / "o",
        "--html", tmp_path / "r.html",
    )  # fmt: skip
    assert code == 1
    assert "--html: needs --validation" in capsys.readouterr().err
