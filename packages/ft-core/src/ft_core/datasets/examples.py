"""Datasets of independent examples: one a line of a JSON Lines file, split by question."""

from __future__ import annotations

import json
import logging
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, field_validator, model_validator
from typing_extensions import Self

from ft_core import files
from ft_core.datasets.base import FinetuneDataset, Model, validated
from ft_core.datasets.duplicates import DEFAULT_THRESHOLD
from ft_core.datasets.grouping import split_texts
from ft_core.errors import DatasetError

logger = logging.getLogger(__name__)


class Example(BaseModel):
    """What all kinds of example share."""

    model_config = ConfigDict(extra="forbid")

    def asked(self) -> str:
        """Return the text that decides on which side of a split the example goes."""
        raise NotImplementedError

    def content(self) -> dict[str, Any]:
        """Return the fields that are set, as they are saved."""
        return self.model_dump(mode="json", exclude_defaults=True)


ExampleT = TypeVar("ExampleT", bound=Example)


class ExampleDataset(FinetuneDataset, Generic[ExampleT]):
    """Examples in a JSON Lines file, one a line."""

    examples: list[ExampleT]
    """At least one."""

    _example: ClassVar[type[Example]]
    _names: ClassVar[frozenset[str]] = frozenset({"metadata"})
    """Fields that teach nothing: examples that differ in no other are the same."""

    @field_validator("examples", mode="before")
    @classmethod
    def _check_each(cls, examples: Any) -> Any:
        if isinstance(examples, str | Mapping) or not isinstance(examples, Iterable):
            return examples  # for pydantic to refuse
        return [
            placed(cls._example, example, f"examples[{index}]")
            for index, example in enumerate(examples)
        ]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.examples:
            raise DatasetError("has no example")
        return self

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[ExampleT]:  # type: ignore[override]
        return iter(self.examples)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read and check a JSON Lines file.

        In a journal, where every line has `metadata`, a line that a killed process left
        unfinished is passed over with a warning.

        Raises:
            DatasetError: names the file, the line, the place in it and the reason.
        """
        try:
            examples = [
                placed(cls._example, value, f"line {number}", ", ")
                for number, value in cls._rows(path)
            ]
        except DatasetError as error:
            raise (error if error.source else error.at(path)) from None
        return cls._checked({"examples": examples}, path)

    @classmethod
    def _rows(cls, path: Path | str) -> Rows:
        """Return the lines of a file by number, for a subclass to put in order."""
        return rows_of(path)

    @classmethod
    def coerce(cls, dataset: Any) -> Self:
        """Return `dataset` as this class: itself, a path, or examples (objects or dicts).

        Raises:
            DatasetError: it is none of these, or its content is bad.
        """
        if isinstance(dataset, cls):
            return dataset
        if isinstance(dataset, str | Path):
            return cls.load(dataset)
        return cls._checked({"examples": dataset})

    def save(self, path: Path | str) -> None:
        """Write one example a line; the file is written whole or not at all."""
        write_lines(path, (example.content() for example in self.examples))

    def split(
        self,
        fractions: Mapping[str, float] | None = None,
        seed: int = 0,
        key: Callable[[ExampleT], str] | None = None,
        *,
        threshold: float = DEFAULT_THRESHOLD,
    ) -> dict[str, Self]:
        """Split by question: one that is asked in one part is in no other, in other words either.

        Args:
            fractions: part name to its share of the examples, any positive numbers;
                `{"train": 0.8, "validation": 0.2}` by default.
            seed: the same seed gives the same parts.
            key: what the question of an example is; its `asked()` by default.
            threshold: similarity from which two questions count as the same (see
                `ft_core.datasets.duplicates.similarity`).

        Returns:
            The parts by name, none empty, each in the order of this dataset.

        Raises:
            ArgumentError: fractions that are not positive numbers, or a bad threshold.
            DatasetError: there are fewer different questions than parts.
        """
        parts = split_texts(
            {
                str(index): key(example) if key else example.asked()
                for index, example in enumerate(self.examples)
            },
            {"train": 0.8, "validation": 0.2} if fractions is None else fractions,
            seed=seed,
            threshold=threshold,
            what="its questions, near-duplicates counted as one, are",
        )
        return {
            name: type(self)(examples=[self.examples[i] for i in sorted(map(int, indices))])
            for name, indices in parts.items()
        }

    def deduplicated(self) -> Self:
        """Return the dataset with the first of each set of examples that teach the same."""
        first: dict[str, ExampleT] = {}
        for example in self.examples:
            content = {k: v for k, v in example.content().items() if k not in self._names}
            first.setdefault(files.content_hash(content), example)
        return type(self)(examples=list(first.values()))

    def _content(self) -> dict[str, Any]:
        return {"examples": [example.content() for example in self.examples]}


def placed(model: type[Model], value: Any, place: str, joint: str = ".") -> Model:
    """Return the value as a model; an error tells `place`, and, behind the joint, where in it."""
    try:
        return validated(model, value)
    except DatasetError as error:
        inner = f"{place}{joint}{error.place}" if error.place else place
        raise DatasetError(error.reason, place=inner) from None


Rows = Iterable[tuple[int, Any]]
"""Line number, from 1, and value of each line."""


def rows_of(path: Path | str) -> Rows:
    """Return the lines of a JSON Lines file; of a journal, without those that were cut short.

    Raises:
        DatasetError: names the first line that is not JSON.
    """
    try:
        return list(files.read_jsonl(path))
    except DatasetError:
        if not Path(path).is_file():
            raise
        rows = _journal_lines(Path(path))
        if rows is None:
            raise
        return rows


def _journal_lines(path: Path) -> list[tuple[int, Any]] | None:
    """Return the whole lines of a journal, None if it is none or more is wrong than torn lines."""
    rows: list[tuple[int, Any]] = []
    torn: list[int] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if _is_torn(line):
            torn.append(number)
        elif line.strip():
            try:
                rows.append((number, files.parse_json(line.decode(), source=path, line=number)))
            except (DatasetError, UnicodeDecodeError):
                return None
    if not rows or not all(isinstance(row, dict) and row.get("metadata") for _, row in rows):
        return None
    for number in torn:
        logger.warning("%s: line %d was cut short in writing and is passed over", path, number)
    return rows


def _is_torn(line: bytes) -> bool:
    """Whether a line is the beginning of a JSON object and not all of it."""
    text = line.decode(errors="ignore")  # a character may be cut, too
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        # Within an escape, a word or a number, Python reports where that began.
        rest = text[error.pos :]
        ends_there = error.msg.startswith("Unterminated") or re.fullmatch(r"[-+.\w]*", rest)
        return text.startswith("{") and bool(ends_there)
    except (ValueError, RecursionError):
        return False
    return False


def write_lines(path: Path | str, lines: Iterable[dict[str, Any]]) -> None:
    """Write JSON Lines, whole or not at all."""
    with files.atomic_write(path) as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def median_words(texts: Iterable[str]) -> int:
    """Return the median length of one or more texts."""
    return round(statistics.median(len(text.split()) for text in texts))
