"""What a `Text2SQLHandler` recorded, and what people said of it, as examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Key = tuple[str, str | None]
"""A question, and the digest of its tables."""


@dataclass
class _Question:
    """All records of a question about the same tables."""

    records: list[dict[str, Any]] = field(default_factory=list)
    wrong: set[str] = field(default_factory=set)
    """SQL that people said is wrong."""
    right: dict[str, dict[str, Any]] = field(default_factory=dict)
    """SQL that people confirmed or wrote, to the record that they said it of."""
    changed: set[str] = field(default_factory=set)
    """SQL in which a password was hidden: it is no longer what was written."""


def examples_of(records: Iterable[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Return the fields of each example, and how many records are left out for which reason.

    Args:
        records: records and marks, in the order of the file.
    """
    texts: dict[str, str] = {}
    questions: dict[Key, _Question] = {}
    by_id: dict[str, tuple[Key, dict[str, Any]]] = {}
    marks: dict[str, Mapping[str, Any]] = {}
    for record in records:
        if record["type"] == "mark":
            marks[record["id"]] = record  # a later one counts
            continue
        texts.update(record.get("texts", {}))
        key = record["query"], record.get("context")
        kept = {name: value for name, value in record.items() if name != "texts"}
        question = questions.setdefault(key, _Question())
        question.records.append(kept)
        if record.get("sql_changed"):
            question.changed.add(record["sql"])
        by_id[record["id"]] = key, kept
    left_out: Counter[str] = Counter()
    for query_id, mark in marks.items():
        if query_id in by_id:
            key, record = by_id[query_id]
            _take(questions[key], record, mark)
        else:
            left_out["marks of no record"] += 1
    examples = []
    for question in questions.values():
        examples += [
            _example(record, sql, texts, confirmed=sql in question.right)
            for sql, record in _chosen(question, left_out).items()
        ]
    return examples, left_out


def _take(question: _Question, record: dict[str, Any], mark: Mapping[str, Any]) -> None:
    right = mark.get("sql") or (record["sql"] if mark.get("correct") else None)
    if right is not None:
        question.right[right] = record
    if mark.get("sql_changed"):
        question.changed.add(mark["sql"])
    if right != record["sql"]:
        question.wrong.add(record["sql"])


def _chosen(question: _Question, left_out: Counter[str]) -> dict[str, dict[str, Any]]:
    """Return each SQL that answers a question to the record that it comes from."""
    chosen = dict(question.right)
    for record in question.records:
        sql = record["sql"]
        if sql in question.right:
            continue
        if sql in question.wrong:
            left_out["marked as wrong"] += 1
        elif question.right:
            left_out["superseded by what people said"] += 1
        elif record["success"] is None:
            left_out["never run"] += 1
        elif not record["success"]:
            left_out["failed"] += 1
        else:
            chosen.setdefault(sql, record)
    whole = {sql: r for sql, r in chosen.items() if sql not in question.changed}
    if len(whole) < len(chosen):
        left_out["with a password hidden in the SQL"] += len(chosen) - len(whole)
    known = {sql: r for sql, r in whole.items() if _schema(r) or r.get("database")}
    if len(known) < len(whole):
        left_out["without a schema"] += len(whole) - len(known)
    return known


def _schema(record: Mapping[str, Any]) -> str | None:
    """Return the digest of the CREATE TABLE statements, or else of the text in the prompt."""
    found: str | None = record.get("context") or record.get("schema")
    return found


def _example(
    record: Mapping[str, Any], sql: str, texts: Mapping[str, str], *, confirmed: bool
) -> dict[str, Any]:
    names = ("time", "seconds", "model")
    metadata = {name: record[name] for name in names if name in record}
    if confirmed:
        metadata["confirmed"] = True
    if sql != record["sql"]:
        metadata["corrected_from"] = record["sql"]
    return {
        "id": record["id"],
        "question": record["query"],
        "sql": sql,
        "context": texts.get(_schema(record) or "", ""),
        "database": record.get("database"),
        "dialect": record["dialect"],
        "metadata": metadata,
    }
