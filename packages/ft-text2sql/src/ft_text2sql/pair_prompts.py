"""How an LLM is asked for questions with their SQL, and how its answer is read."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from ft_core.errors import ArgumentError
from ft_text2sql.schema import Schema, Table

PAIRS_PROMPT = """\
You write questions that people ask of a database, each with the SQL query that answers it.

These are tables of a {dialect} database:
{schema}

Write {num_questions} questions about {topic}. {kind}
- A question is in the words of somebody who knows what the data is about and has never seen the
  tables; it names no column, and says everything that the query needs.
- A query is one SELECT statement of {dialect} over these tables alone. It returns what the
  question asks for and nothing else, and sorts only where the question wants an order.
- {values}
- No two questions ask for the same thing.{earlier}

Answer with a JSON list and nothing else:
[{"question": "...", "sql": "..."}]"""
"""The default instruction; a replacement needs `{dialect}`, `{schema}` and `{num_questions}`."""

_NEEDED = ("{dialect}", "{schema}", "{num_questions}")

_KINDS = (
    "They pick out rows by one or two conditions.",
    "They count, add up or average.",
    "They ask for the largest, smallest, first or last of something.",
    "They need what stands in several tables, where there are several.",
    "They ask for a number of each of several groups.",
    "They compare with a value that must be found first, by a query within the query.",
    "They ask what is missing: what has none of something, or is in one set and not in another.",
    "They mix several of the above: join, condition, grouping, order.",
)
"""What the questions of a call are like, from easy to hard."""

_WITH_VALUES = "Filter by values that really occur; some of each column are given above."
_WITHOUT_VALUES = (
    "You do not see the data: filter by numbers, dates and orders of magnitude, and by a text "
    "only where the tables themselves tell that it occurs."
)
_EARLIER = "\n- They ask for something else than these:"
_THINKING = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.S | re.I)
_QUESTION_LINE = re.compile(
    r"\W*(?:\d+\W+)?(?:question|q)\s*\d*[\s*_]*[:.)][\s*_]*(?P<rest>.*)", re.I
)
_SQL_LINE = re.compile(r"\W*(?:sql|query|answer|a)(?:\s+query)?[\s*_]*:[\s*_]*(?P<rest>.*)", re.I)
_OBJECT = re.compile(r'\{\s*"')
_LONGEST = 100_000  # characters of an answer; what is longer is a model that ran away
_MOST_FAILURES = 200
_FENCE = re.compile(r"```\w*")


def check_prompt(prompt: str) -> None:
    """Refuse a prompt without the places that it needs.

    Raises:
        ArgumentError: names the first that is missing.
    """
    for place in _NEEDED:
        if not isinstance(prompt, str) or place not in prompt:
            raise ArgumentError("prompt", f"has no place {place} for what is asked")


def write_prompt(
    prompt: str,
    schema: Schema,
    focus: Table,
    kind: str,
    *,
    count: int,
    values: Sequence[str],
    earlier: Sequence[str],
) -> str:
    """Return the prompt of one call.

    Args:
        prompt: with places in braces, such as `PAIRS_PROMPT`.
        schema: the tables that are shown.
        focus: the one that the questions are about.
        kind: a sentence that says what the questions are like; see `choose_kind`.
        count: how many questions.
        values: lines that say which values occur; none where they are not to be seen.
        earlier: questions that are there already.
    """
    # Only these names in braces are places; the others belong to JSON.
    filled = {
        "dialect": schema.dialect,
        "schema": "\n".join([schema.to_text("create"), *values]),
        "num_questions": str(count),
        "topic": f"the table {focus.full_name}, or it and tables that belong to it",
        "kind": kind,
        "values": _WITH_VALUES if values else _WITHOUT_VALUES,
        "earlier": "\n  ".join([_EARLIER, *earlier]) if earlier else "",
    }
    return re.sub(r"\{(\w+)\}", lambda m: filled.get(m[1], m[0]), prompt)


def choose_kind(number: int, *, seed: int) -> str:
    """Return what the questions of a call are like: each kind once in as many calls as there are.

    The order changes each time, so that a table does not get the same kind whenever it is its
    turn.
    """
    turn, place = divmod(number, len(_KINDS))
    return random.Random(f"{seed} {turn}").sample(_KINDS, len(_KINDS))[place]


def choose_tables(
    schema: Schema, number: int, *, seed: int, most: int
) -> tuple[Table, list[Table]]:
    """Return the table that a call is about, and those that it shows: it and its relations.

    Every table has its turn before one comes again.
    """
    order = list(schema.tables)
    random.Random(seed).shuffle(order)
    focus = order[number % len(order)]
    if len(order) <= most:
        return focus, list(schema.tables)
    rest = random.Random(f"{seed} {number}")
    shown, waiting = [focus], [focus]
    while waiting and len(shown) < most:
        related = [t for t in _related(schema, waiting.pop(0)) if t not in shown]
        rest.shuffle(related)
        shown += related[: most - len(shown)]
        waiting += related
    return focus, shown


def _related(schema: Schema, table: Table) -> Iterator[Table]:
    for key in table.foreign_keys:
        found = schema.table(f"{key.namespace}.{key.table}" if key.namespace else key.table)
        if found is not None:
            yield found
    for other in schema.tables:
        if any(schema.table(key.table) is table for key in other.foreign_keys):
            yield other


def read_pairs(answer: str) -> list[tuple[str, str]]:
    """Return the questions with their SQL in an LLM's answer, in its order.

    Takes JSON objects with `question` and `sql` wherever they stand: in a list, one a line,
    in a fence, in a list that was cut short; and else lines `Question: ...` and `SQL: ...`.
    """
    answer = _THINKING.sub("", answer)[:_LONGEST]
    found = [pair for value in _objects(answer) if (pair := _pair(value))]
    if not found:
        found = list(_labelled(_FENCE.sub("", answer)))
    pairs = [(_text(question).strip(" *\n\t"), _statement(_text(sql))) for question, sql in found]
    return [(question, sql) for question, sql in pairs if question and sql]


def _objects(text: str) -> Iterator[Any]:
    """Yield the JSON objects in a text that hold a pair."""
    decoder = json.JSONDecoder(strict=False)  # a line feed in SQL is often not escaped
    start, failures = _OBJECT.search(text), 0
    while start is not None and failures < _MOST_FAILURES:
        end = start.end()  # a pair may be inside
        try:
            value, after = decoder.raw_decode(text, start.start())
        except (json.JSONDecodeError, RecursionError):
            failures += 1
        else:
            if _pair(value):
                yield value
                end = after
        start = _OBJECT.search(text, end)


def _labelled(text: str) -> Iterator[tuple[str, str]]:
    """Yield the pairs of lines that say what they are; SQL goes on to a blank line."""
    question, sql = "", ""
    state = "between"
    for line in [*text.splitlines(), ""]:
        if begins := _QUESTION_LINE.match(line):
            if sql:
                yield question, sql
            question, sql, state = begins["rest"], "", "question"
        elif state == "question" and (begins := _SQL_LINE.match(line)):
            sql, state = begins["rest"], "sql"
        elif state == "sql" and (line.strip() or not sql):
            sql = f"{sql}\n{line}".strip()
        elif state == "sql":
            yield question, sql
            sql, state = "", "between"


def _pair(value: Any) -> tuple[str, str] | None:
    lower = {str(k).lower(): v for k, v in value.items()} if isinstance(value, dict) else {}
    question, sql = lower.get("question"), lower.get("sql", lower.get("query"))
    return (question, sql) if isinstance(question, str) and isinstance(sql, str) else None


def _text(text: str) -> str:
    # An escape in JSON may stand for half a surrogate pair, which no file takes.
    return text.encode("utf-8", "replace").decode("utf-8")


def _statement(sql: str) -> str:
    return _FENCE.sub("", sql).strip().rstrip(";").strip()
