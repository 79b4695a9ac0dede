"""Record a judge and evaluate; `test_packaging.py` runs this with ft-judge and no extra.

Without torch and an API's client no student is trained here: the engines come as far as they can,
and then say what is missing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_index.core.base.llms.types import CompletionResponse, LLMMetadata
from llama_index.core.evaluation import PairwiseComparisonEvaluator
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_completion_callback

from ft_core.errors import FTError, MissingExtraError
from ft_judge import (
    CorrectnessJudgeFinetuneEngine,
    JudgeHandler,
    PairwiseJudgeFinetuneEngine,
    by_length,
    evaluate_judges,
    longer_answer,
    read_verdicts,
)

TREES = ["ash", "birch", "cedar", "elm", "fir", "hazel"]


class Forester(CustomLLM):
    """The teacher: prefers the answer that tells a height."""

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(model_name="forester")

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        first, second = (prompt.find(text) for text in ("metres", "It is tall"))
        return CompletionResponse(text=f"A height. [[{'A' if first < second else 'B'}]]")

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        raise NotImplementedError


def main() -> None:
    verdicts = record()
    evaluate(verdicts)
    train(verdicts)
    commands(verdicts)


def record() -> Path:
    """Write a journal of a teacher's verdicts, and read verdicts of another form."""
    handler = JudgeHandler("verdicts.jsonl")
    evaluator = PairwiseComparisonEvaluator(llm=Forester())
    with handler.attach(evaluator):
        for number, tree in enumerate(TREES):
            answers = [f"The {tree} has {number + 9} metres.", "It is tall."]
            first, second = answers if number % 2 else answers[::-1]
            query = f"How tall is the {tree}?"
            result = evaluator.evaluate(query=query, response=first, second_response=second)
            assert result.score == number % 2, result
        handler.mark(result, human=1.0)
    assert not handler.failures, handler.failures
    dataset = handler.to_dataset()
    assert len(dataset.consistent()) == len(TREES), dataset.stats()

    rows = [{"q": e.query, "a": e.answer, "b": e.second_answer, "better": "a"} for e in dataset]
    Path("rows.json").write_text(json.dumps(rows), encoding="utf-8")
    columns = {"query": "q", "answer": "a", "second_answer": "b", "verdict": "better"}
    assert len(read_verdicts("rows.json", columns, values={"a": 1, "b": 0})) == len(TREES)
    return handler.path


def evaluate(verdicts: Path) -> None:
    """Compare the teacher itself with rules by length."""
    dataset = JudgeHandler.read(verdicts).to_dataset()
    judges = {
        "longer": longer_answer,
        "length": by_length(dataset),
        "teacher again": PairwiseComparisonEvaluator(llm=Forester()),
    }
    report = evaluate_judges(dataset, judges, show_progress=False)
    for run in report.runs:
        if run.name != "teacher":
            assert run.mean("agreement_teacher") == 1.0, report.to_dict()
    assert report.statistics["teacher again"]["flips"].value == 0.0, report.to_dict()
    report.save_json("report.json")


def train(verdicts: Path) -> None:
    """Each kind of student names the extra that is missing, and leaves nothing behind."""
    for engine, extra in (
        (PairwiseJudgeFinetuneEngine(verdicts, "some/model", "judge"), "local"),
        (PairwiseJudgeFinetuneEngine(verdicts, "some/model", "judge", kind="local"), "local"),
        (PairwiseJudgeFinetuneEngine(verdicts, "some/model", "judge", kind="encoder"), "local"),
        (PairwiseJudgeFinetuneEngine(verdicts, "gpt-4.1", "hosted", api_key="none"), "openai"),
    ):
        message = error_of(MissingExtraError, engine.finetune)
        assert f"[{extra}]'" in message, message
        assert "pip install" in message, message
        assert not Path("judge").exists()
    message = error_of(FTError, CorrectnessJudgeFinetuneEngine(verdicts, "gpt-4.1").finetune)
    assert "correctness" in message, message


def error_of(kind: type[FTError], action: Callable[[], object]) -> str:
    """Return the message of the error that the action must end in."""
    try:
        action()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def commands(verdicts: Path) -> None:
    ft = Path(sys.executable).with_name("ft")
    help_page = subprocess.run([ft, "--help"], check=True, capture_output=True, text=True).stdout
    assert "judge" in help_page, help_page
    assert "cannot be loaded" not in help_page, help_page
    check = [ft, "dataset", "check", verdicts, "--json"]
    found = json.loads(subprocess.run(check, check=True, capture_output=True).stdout)
    assert found["examples"] == len(TREES), found
    train = [ft, "judge", "train", verdicts, "--student", "some/model", "--output", "judge"]
    result = subprocess.run(train, capture_output=True, text=True)
    assert result.returncode == 1, result
    assert "[local]'" in result.stderr, result


if __name__ == "__main__":
    main()
