"""The demo's corpus as datasets; `README.md` beside this file says what it is."""

from __future__ import annotations

from pathlib import Path

from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.files import read_jsonl

_FOLDER = Path(__file__).parent


def passages() -> dict[str, str]:
    """Return passage id to text, title first."""
    rows = (row for _, row in read_jsonl(_FOLDER / "passages.jsonl"))
    return {row["id"]: f"{row['title']}\n{row['text']}" for row in rows}


def training() -> EmbeddingQAFinetuneDataset:
    """Return the training questions over the whole corpus."""
    return _dataset("training_questions.jsonl")


def heldout() -> EmbeddingQAFinetuneDataset:
    """Return the held-out questions over the whole corpus."""
    return _dataset("heldout_questions.jsonl")


def _dataset(name: str) -> EmbeddingQAFinetuneDataset:
    rows = {f"{name[:5]}-{number:03}": row for number, row in read_jsonl(_FOLDER / name)}
    return EmbeddingQAFinetuneDataset(
        queries={key: row["question"] for key, row in rows.items()},
        corpus=passages(),
        relevant_docs={key: [row["passage_id"]] for key, row in rows.items()},
    )
