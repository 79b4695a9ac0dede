"""Verdicts that exist already, read into a `JudgeDataset`.

dataset = read_verdicts(
    "arena.jsonl",
    {"query": "question", "answer": "answers.0.text", "second_answer": "answers.1.text",
     "verdict": "winner", "flipped_verdict": "winner_swapped", "reasoning": "comment"},
    values={"model_a": 1, "model_b": 0, "tie": 0.5},
)
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ft_core import files
from ft_core.datasets import JudgeDataset, JudgeExample
from ft_core.datasets.examples import placed
from ft_core.datasets.judge import CONTRADICTORY, MERGED, TASKS, Task, refusal, repeats_merged
from ft_core.errors import ArgumentError, DatasetError

logger = logging.getLogger(__name__)

LABELS = ("verdict", "flipped_verdict", "score", "human")
"""The fields whose values are translated."""

LLMBAR_COLUMNS = {
    "query": "instruction",
    "answer": "output_1",
    "second_answer": "output_2",
    "verdict": "gpt4.forward.winner",
    "flipped_verdict": "gpt4.swapped.winner",  # "1" is output_1 there, too
    "reasoning": "gpt4.forward.completion.0",
    "flipped_reasoning": "gpt4.swapped.completion.0",
    "human": "human_label",
}
"""The columns of LLMBar's pairs with GPT-4's verdict in both orders."""

HUMAN_PAIR_COLUMNS = {
    "query": "instruction",
    "answer": "output_1",
    "second_answer": "output_2",
    "verdict": "gpt4_winner",
    "human": "human_label",
}
"""The columns of LLMBar's copies of FairEval, LLMEval2 and MT-Bench: one verdict a pair."""

_WINNERS = {"1": 1.0, "2": 0.0}


def read_verdicts(
    path: Path | str,
    columns: Mapping[str, str] | None = None,
    *,
    task: Task = "pairwise",
    values: Mapping[Any, float | None] | None = None,
    flipped_as_shown: bool = False,
    keep: Sequence[str] = (),
) -> JudgeDataset:
    """Read a JSON Lines file, or a JSON file that holds a list, of judged answers.

    Every row becomes an example. A row without a verdict stays, unjudged, and a tie is the
    verdict 0.5; both are counted in a log message, as are rows that judge the same answers
    again: `JudgeDataset.merged` and `consistent` unite them, and leave out what contradicts.

    Args:
        path: the file.
        columns: field of `JudgeExample` to the column that holds it; a dotted path leads into
            objects and lists, as in `answers.0.text`. Without it, the file is one that a
            `JudgeDataset` or a `JudgeHandler` wrote.
        task: what was judged.
        values: what stands in the columns of verdicts, scores and human labels, to its number
            on the task's scale: `{"A": 1, "B": 0, "tie": 0.5}`, with None for what is no
            verdict. Keys are compared as text. Without it they are numbers already.
        flipped_as_shown: the flipped verdict counts the answers as they were shown then, so
            that 1 is the answer that is second here.
        keep: columns that go into the examples' `metadata`.

    Raises:
        ArgumentError: a field or task that there is not, or no mapping where one is needed.
        DatasetError: names file, line and column: a column that a row lacks, a value that
            `values` does not know, a number off the scale, or see `JudgeExample`.
    """
    if columns is None:
        if values or keep or flipped_as_shown:
            raise ArgumentError("columns", "are missing; without them the file is read as it is")
        return JudgeDataset.load(path)
    _check_arguments(columns, task, values)
    known = None if values is None else {_text(key): value for key, value in values.items()}
    examples = [
        _example(path, place, row, columns, task, known, flipped_as_shown, keep)
        for place, row in _rows(path)
    ]
    if not examples:
        raise DatasetError("has no row", source=path)
    _tell(path, examples, columns)
    return JudgeDataset(examples=examples)


def read_llmbar(path: Path | str) -> JudgeDataset:
    """Read pairs as LLMBar publishes them, with human labels and GPT-4's verdicts.

    Zeng et al., "Evaluating large language models at evaluating instruction following", 2023.
    Of both kinds of file: with GPT-4's verdict and words in both orders, or with one verdict.

    Raises:
        DatasetError: as for `read_verdicts`.
    """
    _, first = next(iter(_rows(path)), ("", {}))
    both = "gpt4" in first
    return read_verdicts(
        path,
        LLMBAR_COLUMNS if both else HUMAN_PAIR_COLUMNS,
        values=_WINNERS,
        keep=["subset"] if both else [],
    )


def _check_arguments(columns: Any, task: str, values: Any) -> None:
    for name, given in (("columns", columns), ("values", {} if values is None else values)):
        if not isinstance(given, Mapping):
            raise ArgumentError(name, f"is a mapping, {{...: ...}}, not {given!r}")
    if task not in TASKS:
        raise ArgumentError("task", f"{task!r} is none of {', '.join(TASKS)}")
    fields = set(JudgeExample.model_fields) - {"task", "metadata"}
    for field, column in columns.items():
        if field not in fields:
            raise ArgumentError("columns", f"{field!r} is no field; there is {sorted(fields)}")
        if not isinstance(column, str):
            raise ArgumentError("columns", f"{field!r} stands in a column, a text, not {column!r}")
    if "answer" not in columns:
        raise ArgumentError("columns", "name the column of the answer, {'answer': ...}")


def _rows(path: Path | str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row with its place in the file."""
    rows: Iterator[tuple[str, Any]]
    if files.read_text(path).lstrip().startswith("["):
        content = files.read_json(path)
        rows = ((f"row {number}", row) for number, row in enumerate(content, start=1))
    else:
        rows = ((f"line {number}", row) for number, row in files.read_jsonl(path))
    for place, row in rows:
        if not isinstance(row, dict):
            raise DatasetError("is not an object", source=path, place=place)
        yield place, row


def _example(
    path: Path | str,
    place: str,
    row: dict[str, Any],
    columns: Mapping[str, str],
    task: Task,
    values: Mapping[str, float | None] | None,
    flipped_as_shown: bool,
    keep: Sequence[str],
) -> JudgeExample:
    content: dict[str, Any] = {"task": task}
    column = ""
    try:
        for field, column in columns.items():
            value = _value(row, column)
            if field in LABELS:
                value = _label(task, value, values)
            elif field == "contexts" and isinstance(value, str):
                value = [value]
            content[field] = value
        kept = {}
        for column in keep:
            kept[column] = _value(row, column)
    except DatasetError as error:
        inside = f"{place}, column {column!r}"
        raise DatasetError(error.reason, source=path, place=inside) from None
    if flipped_as_shown and content.get("flipped_verdict") is not None:
        content["flipped_verdict"] = 1 - content["flipped_verdict"]
    given = {field: value for field, value in content.items() if value is not None}
    try:
        return placed(JudgeExample, given | {"metadata": kept}, place, ", ")
    except DatasetError as error:
        raise error.at(path) from None


def _value(row: Any, column: str) -> Any:
    """Return what stands at a column, or at a dotted path into objects and lists."""
    if isinstance(row, dict) and column in row:
        return row[column]
    value = row
    for part in column.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            there = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise DatasetError(f"is missing: there is no {part!r} in {there}")
    return value


def _label(task: Task, value: Any, values: Mapping[str, float | None] | None) -> float | None:
    """Return a verdict or score as a number on the task's scale, None where there is none."""
    if values is not None and _text(value) in values:
        value = values[_text(value)]
    elif value is not None and values is not None:
        raise DatasetError(
            f"{value!r} is none of {', '.join(values)}; add it to `values`, with its number or "
            "None for no verdict"
        )
    if value is None:
        return None
    if isinstance(value, bool) and task not in ("pairwise", "correctness"):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DatasetError(f"{value!r} is no number; say what it means with `values`")
    if reason := refusal(task, value):
        raise DatasetError(reason)
    return float(value)


def _text(value: Any) -> str:
    """Return a value as the key of `values`: 1, 1.0 and "1" are the same."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _tell(path: Path | str, examples: Sequence[JudgeExample], columns: Mapping[str, str]) -> None:
    """Log what a reader of the file may not expect."""
    counts: Counter[str] = Counter()
    for field in LABELS:
        if field in columns:
            missing = sum(getattr(example, field) is None for example in examples)
            ties = sum(getattr(example, field) == 0.5 for example in examples)
            counts[f"without {field}"] = missing
            counts[f"tied by {field}"] = ties if examples[0].task == "pairwise" else 0
    _, repeated = repeats_merged(examples)
    counts["that judge the same answers as another"] = repeated[MERGED]
    counts["that contradict each other on the same answers"] = repeated[CONTRADICTORY]
    for what, count in counts.items():
        if count:
            logger.warning("%s: %d of %d rows %s", path, count, len(examples), what)
