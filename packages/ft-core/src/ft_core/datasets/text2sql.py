"""Questions with the SQL that answers them, to train and test text-to-SQL models on."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, model_validator
from typing_extensions import Self

from ft_core.datasets.base import check_text
from ft_core.datasets.duplicates import (
    connected_groups,
    exact_duplicates,
    fold,
)
from ft_core.datasets.examples import Example, ExampleDataset, median_words
from ft_core.datasets.grouping import check_enough, check_fractions, deal_out, warn_if_off
from ft_core.datasets.rerank import is_visible
from ft_core.errors import DatasetError

_TOKEN = re.compile(
    r"""
    (?P<space>   \s+ | --[^\n]* | /\*.*?(?:\*/|\Z) )
  | (?P<string>  '(?:[^']|'')*(?:'|\Z) )
  | (?P<double>  "(?:[^"]|"")*(?:"|\Z) )
  | (?P<name>    `(?:[^`]|``)*(?:`|\Z) | \[[^\W\d][^\[\]]{0,200}\] | [^\W\d]\w* )
  | (?P<number>  (?:\d+(?:\.\d*)?|\.\d+) (?:[eE][+-]?\d+)? )
  | (?P<other>   <> | != | == | <= | >= | \|\| | . )
    """,
    re.VERBOSE | re.DOTALL,
)
_SPELLINGS = {"!=": "<>", "==": "="}
# Behind these a sign belongs to the number; behind a name or a value it is arithmetic.
_BEFORE_A_SIGN = frozenset(
    {"(", ",", "=", "<", ">", "<>", "<=", ">=", "||", "+", "-", "*", "/", "%", "select"}
    | {"distinct", "where", "and", "or", "not", "on", "having", "when", "then", "else"}
    | {"between", "in", "like", "limit", "offset", "by"}
)
_URL = re.compile(r"\b[A-Za-z][\w+.-]*://|\b(?:password|passwd|pwd)\s*=", re.IGNORECASE)


class Text2SQLExample(Example):
    """A question, the database that it is about, and the SQL that answers it.

    Raises:
        DatasetError: the question or the SQL is empty, neither `context` nor `database`
            says what it is about, or `database` is a URL; it names the field.
    """

    id: str | None = None
    """What the source calls it."""
    question: str
    """What was asked, in a human language."""
    sql: str
    """One statement that answers it."""
    context: str = ""
    """The schema as CREATE TABLE statements; may be "" where `database` names one."""
    database: str | None = None
    """A name for the database that the SQL runs on, such as Spider's `db_id`."""
    dialect: str | None = None
    """Whose SQL it is, as sqlglot names it: "sqlite", "postgres", "mysql"."""
    difficulty: str | None = None
    """A level, such as Spider's "easy", "medium", "hard" and "extra"."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """What a journal knows of the call, such as its time and model."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in type(self).model_fields:
            check_text(getattr(self, name), name)
        for name in ("question", "sql"):
            if not is_visible(getattr(self, name)):
                raise DatasetError("the text is empty; write one or drop it", place=name)
        if not is_visible(self.context) and not is_visible(self.database or ""):
            raise DatasetError(
                "is empty, and no database is named; write the CREATE TABLE statements, or "
                "name the database",
                place="context",
            )
        if self.database is not None and _URL.search(self.database):
            # Not quoted: it may hold a password.
            raise DatasetError(
                "is a URL or connection string, which may hold a password; write a name, "
                "and keep the URL where the application has it",
                place="database",
            )
        return self

    def asked(self) -> str:
        """Return the question."""
        return self.question

    def anonymous_sql(self) -> str:
        """Return the SQL without its literals; see `anonymous_sql`."""
        return anonymous_sql(self.sql, self.context)


class Text2SQLDataset(ExampleDataset[Text2SQLExample]):
    """Questions with their SQL; a JSON Lines file on disk, one a line.

    `split` keeps a question in one part; the same SQL, with other literals or the same, may be
    in several, and `split_by_query` keeps that in one part, too.

    Raises:
        DatasetError: there is no example, or see `Text2SQLExample`; it names the place.
    """

    _example = Text2SQLExample
    _names = frozenset({"id", "difficulty", "metadata"})

    def split_by_query(
        self, fractions: Mapping[str, float] | None = None, seed: int = 0
    ) -> dict[str, Self]:
        """Split by SQL query, the harder test: does a model write queries that it never saw?

        Queries that differ only in literals, case, white space and comments count as one (see
        `anonymous_sql`), and a question that is asked twice stays in one part whatever its SQL.
        This is the "query split" of Finegan-Dollak et al. 2018, "Improving Text-to-SQL
        Evaluation Methodology".

        Args:
            fractions: part name to its share of the examples, any positive numbers;
                `{"train": 0.8, "validation": 0.2}` by default.
            seed: the same seed gives the same parts.

        Returns:
            The parts by name, none empty, each in the order of this dataset.

        Raises:
            ArgumentError: fractions that are not positive numbers.
            DatasetError: there are fewer different queries than parts.
        """
        fractions = {"train": 0.8, "validation": 0.2} if fractions is None else fractions
        check_fractions(fractions)
        groups = connected_groups(map(str, range(len(self))), self._links())
        check_enough(groups, fractions, "its SQL queries, literals apart, form")
        parts = deal_out(groups, len, fractions, random.Random(seed))
        warn_if_off(parts, fractions)
        return {
            name: type(self)(examples=[self.examples[i] for i in sorted(map(int, indices))])
            for name, indices in parts.items()
        }

    def _links(self) -> Iterator[tuple[str, str]]:
        """Yield pairs of indices that connect what `split_by_query` keeps together."""
        first: dict[str, str] = {}
        for index, example in enumerate(self.examples):
            yield first.setdefault(example.anonymous_sql(), str(index)), str(index)
        asked = {str(index): example.question for index, example in enumerate(self.examples)}
        for group in exact_duplicates(asked):
            for other in group[1:]:
                yield group[0], other

    def stats(self) -> dict[str, Any]:
        """Return counts, and lengths in words."""
        examples = self.examples
        return {
            "examples": len(examples),
            "distinct questions": len({fold(example.question) for example in examples}),
            "distinct SQL queries": len({example.sql.strip() for example in examples}),
            "distinct SQL queries, literals apart": len({e.anonymous_sql() for e in examples}),
            "distinct schemas": len({e.context.strip() for e in examples if e.context.strip()}),
            "named databases": len({e.database for e in examples if e.database}),
            "without a schema": sum(not example.context.strip() for example in examples),
            "with a difficulty": sum(example.difficulty is not None for example in examples),
            "median words per question": median_words(example.question for example in examples),
            "median words per SQL query": median_words(example.sql for example in examples),
            "median words per schema": median_words(example.context for example in examples),
        }


def anonymous_sql(sql: str, context: str = "") -> str:
    """Return SQL with its literals replaced by `?`, in one spelling.

    Two statements that are equal so ask the same of the database, about other values: case,
    white space, comments, a closing semicolon and the length of a list of values are gone
    too. Works on the words alone, for any dialect and for what no parser reads.

    Args:
        sql: a statement, or any text.
        context: the schema. What stands in double quotes is a literal unless the schema or
            an alias of the statement has that name, as SQLite takes it
            (https://www.sqlite.org/quirks.html, "Double-quoted String Literals Are Accepted").
    """
    names = _names(context)
    words: list[str] = []
    for kind, token in _tokens(sql):
        before = words[-1] if words else ""
        if kind == "double" and (before in (".", "as") or _bare(token).casefold() in names):
            kind = "name"
        if kind in ("string", "double", "number"):
            _append_literal(words)
        elif kind == "name":
            words.append(_bare(token).casefold())
        else:
            words.append(_SPELLINGS.get(token, token))
    while words and words[-1] == ";":
        words.pop()
    return " ".join(words)


@functools.lru_cache(maxsize=256)  # a dataset has many examples of a schema
def _names(context: str) -> frozenset[str]:
    named = (token for kind, token in _tokens(context) if kind in ("name", "double"))
    return frozenset(_bare(token).casefold() for token in named)


def _tokens(sql: str) -> Iterator[tuple[str, str]]:
    for match in _TOKEN.finditer(sql):
        if match.lastgroup and match.lastgroup != "space":
            yield match.lastgroup, match.group()


def _bare(token: str) -> str:
    return token[1:-1] if token[0] in '"`[' and len(token) > 1 else token


def _append_literal(words: list[str]) -> None:
    """Add `?`: with its sign, and once for all of a list."""
    if words and words[-1] in ("-", "+") and (len(words) == 1 or words[-2] in _BEFORE_A_SIGN):
        words.pop()
    if words[-2:] == ["?", ","] and "(" in words[-3:-2]:
        words.pop()
    else:
        words.append("?")
