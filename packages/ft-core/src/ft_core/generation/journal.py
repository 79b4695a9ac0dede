"""The answers of one generation, kept as they arrive, and the dataset made of them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from ft_core.datasets import EmbeddingQAFinetuneDataset, Text2SQLDataset
from ft_core.errors import ArtifactError, DatasetError, GenerationError
from ft_core.files import Journal


class AnswerJournal:
    """`<output>.journal.jsonl` beside a dataset file.

    A line is either `{"key": ..., "nodes": [...], "answer": ...}`, where the key identifies
    the call (model, style, seed and prompt), or `{"dataset": ...}`, the content hash of a
    dataset about to be saved. By the latter a later run knows its own file from one that
    somebody else wrote or edited.

    Args:
        output: the dataset's file.
        kind: the dataset's class, which loads and saves it and has a `content_hash`.

    Raises:
        ArtifactError: the journal's file holds something else.
    """

    def __init__(self, output: Path, kind: Any = EmbeddingQAFinetuneDataset) -> None:
        self.output = output
        self._kind = kind
        self.path = output.with_name(output.name + ".journal.jsonl")
        self._journal = Journal(self.path)
        self._answers: dict[str, str] = {}
        self._saved: set[str] = set()
        for record in self._journal.records():
            if isinstance(record, dict) and isinstance(record.get("dataset"), str):
                self._saved.add(record["dataset"])
            elif isinstance(record, dict) and {"key", "answer"} <= record.keys():
                self._answers.setdefault(record["key"], record["answer"])
            else:
                raise ArtifactError(
                    f"{self.path}: is not a journal of generation; "
                    "move it away or choose another output_path"
                )

    def get(self, key: str) -> str | None:
        """Return the answer to a call, if it was made before."""
        return self._answers.get(key)

    def put(self, key: str, nodes: list[str], answer: str) -> None:
        """Keep an answer; it is on disk when this returns."""
        self._append({"key": key, "nodes": nodes, "answer": answer})
        self._answers[key] = answer

    def check_output(self, texts: Collection[str]) -> None:
        """Refuse to replace a file that is not an earlier state of this dataset.

        Args:
            texts: the texts that the dataset is to be made of, or the names of its databases.

        Raises:
            GenerationError: the output exists and was not written by this generation, was
                changed since, or holds the questions of quite other texts.
        """
        if not self.output.exists():
            return
        advice = "move it away or choose another output_path"
        if self.output.is_dir():
            raise GenerationError(f"{self.output}: is a folder; name a file as output_path")
        try:
            dataset = self._kind.load(self.output)
        except DatasetError as error:
            raise GenerationError(
                f"{self.output}: exists and is no dataset ({error.reason}); {advice}"
            ) from None
        if not self._saved:
            raise GenerationError(
                f"{self.output}: exists, and {self.path.name}, the journal of its generation, "
                f"does not; {advice}"
            )
        if dataset.content_hash not in self._saved:
            raise GenerationError(f"{self.output}: was changed after it was generated; {advice}")
        if not _texts(dataset) & set(texts):
            raise GenerationError(
                f"{self.output}: holds questions about other texts or databases, none of which is "
                f"given now; {advice}"
            )

    def save(self, dataset: Any) -> None:
        """Save the dataset whole, unless the file holds it already."""
        digest = dataset.content_hash
        if self.output.exists() and self._kind.load(self.output).content_hash == digest:
            return
        self._append({"dataset": digest})  # first, so that a kill leaves no file unknown
        self._saved.add(digest)
        try:
            dataset.save(self.output)
        except OSError as error:
            raise GenerationError(
                f"{self.output}: cannot be saved: {error}; the answers are kept in "
                f"{self.path}, so that the next run asks for none of them again"
            ) from None

    def _append(self, record: dict[str, object]) -> None:
        try:
            self._journal.append(record)
        except OSError as error:
            raise GenerationError(
                f"{self.path}: cannot be written: {error}; what was answered before is kept"
            ) from None


def _texts(dataset: Any) -> set[str]:
    """Return the document texts of a dataset, or the names of its databases."""
    if isinstance(dataset, Text2SQLDataset):
        return {example.database or "" for example in dataset}
    if isinstance(dataset, EmbeddingQAFinetuneDataset):
        return set(dataset.corpus.values())
    return {document.text for example in dataset for document in example.documents}
