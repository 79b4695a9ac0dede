"""Answers of an evaluation outlive a kill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ft_core.answer_log import AnswerLog
from ft_core.errors import ArtifactError


@dataclass(frozen=True)
class Said:
    words: str
    tokens: tuple[int, int] | None = None
    error: str | None = None


def counting(answer: Said, asked: list[str]) -> Callable[[], Said]:
    def ask() -> Said:
        asked.append(answer.words)
        return answer

    return ask


def test_an_answer_is_asked_for_once_in_two_runs(tmp_path: Path) -> None:
    path, asked = tmp_path / "answers.jsonl", list[str]()
    answer = Said("at nine", (3, 2))
    for _ in range(2):
        log = AnswerLog(path, Said)
        assert log.ask(["a", "when?"], counting(answer, asked)) == answer
    assert asked == ["at nine"]
    assert log.ask(["b", "when?"], counting(Said("at ten"), asked)) == Said("at ten")


def test_an_error_is_asked_again(tmp_path: Path) -> None:
    path, asked = tmp_path / "answers.jsonl", list[str]()
    AnswerLog(path, Said).ask("key", counting(Said("", error="no answer"), asked))
    assert AnswerLog(path, Said).ask("key", counting(Said("at nine"), asked)).words == "at nine"
    assert len(asked) == 2


def test_nothing_is_written_without_a_path(tmp_path: Path) -> None:
    AnswerLog(None, Said).ask("key", counting(Said("at nine"), []))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", ['{"query": "q"}', '{"key": "k", "answer": {"text": 1}}', "[1]"])
def test_another_file_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ArtifactError, match=r"other\.jsonl: is not the journal of an evaluation"):
        AnswerLog(path, Said)
