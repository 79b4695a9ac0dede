"""Record, check and estimate; `test_packaging.py` runs this with ft-openai-distill and no extra.

Without torch no student is trained here: the engines come as far as they can, and then say what
is missing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_index.core import SummaryIndex
from llama_index.core.base.llms.types import ChatMessage, CompletionResponse, LLMMetadata
from llama_index.core.llms import CustomLLM, MockLLM
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.schema import TextNode

from ft_core.errors import ArgumentError, FTError, MissingExtraError
from ft_openai_distill import (
    LocalFinetuneEngine,
    OpenAIFinetuneEngine,
    OpenAIFineTuningHandler,
    evaluate_distillation,
)

TOWNS = ["Arlow", "Brennick", "Cawdry", "Dunmere", "Esk", "Farleigh", "Gorse", "Hexwood", "Inch"]


class Clerk(CustomLLM):
    """The teacher: knows when the ferry leaves."""

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(model_name="clerk")

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return CompletionResponse(text=next(f"{t}: at dawn." for t in TOWNS if f"{t}?" in prompt))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        raise NotImplementedError


def main() -> None:
    journal = record()
    handler = OpenAIFineTuningHandler(journal)
    parts = handler.to_dataset(split={"train": 0.8, "validation": 0.2})
    assert sum(map(len, parts.values())) == len(TOWNS) + 1, parts

    hosted = OpenAIFinetuneEngine("gpt-4.1-mini-2025-04-14", journal, price_per_million=5.0)
    figures = hosted.estimate()
    assert figures.examples == len(TOWNS) + 1, figures
    assert figures.cost is not None, figures
    assert 0 < figures.cost < 1, figures
    message = error_of(ArgumentError, hosted.finetune)
    assert "OPENAI_API_KEY" in message, message

    own = LocalFinetuneEngine("some/model", journal, output_dir="student")
    message = error_of(MissingExtraError, own.finetune)
    assert "[local]'" in message, message
    assert "pip install" in message, message
    assert not Path("student").exists()

    report = evaluate_distillation(
        handler.to_dataset(), student=Clerk(), base=MockLLM(max_tokens=3), show_progress=False
    )
    runs = {run["name"]: run["metrics"]["rouge_l"]["mean"] for run in report.to_dict()["runs"]}
    assert runs["student"] > runs["base"], runs

    ft = Path(sys.executable).with_name("ft")
    check = [ft, "distill", "check", journal, "--price", "5", "--json"]
    found = json.loads(subprocess.run(check, check=True, capture_output=True).stdout)
    assert found["examples"] == len(TOWNS) + 1, found
    help_page = subprocess.run([ft, "--help"], check=True, capture_output=True, text=True).stdout
    assert "distill" in help_page, help_page
    assert "cannot be loaded" not in help_page, help_page


def record() -> Path:
    """Write a journal of a query engine's calls, and of one to an LLM by itself."""
    journal = Path("teacher.jsonl")
    handler = OpenAIFineTuningHandler(journal)
    index = SummaryIndex([TextNode(text="Boats sail from every pier at dawn.")])
    engine = index.as_query_engine(llm=Clerk())
    with handler.attach(engine):
        for town in TOWNS:
            assert str(engine.query(f"When is the ferry from {town}?")) == f"{town}: at dawn."
    echo = MockLLM()
    with handler.attach(echo):
        echo.chat([ChatMessage(role="user", content="Is anybody there?")])
    return journal


def error_of(kind: type[FTError], action: Callable[[], object]) -> str:
    """Return the message of the error that the action must end in."""
    try:
        action()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


if __name__ == "__main__":
    main()
