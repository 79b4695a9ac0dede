"""Schema linking: of a schema too large for a prompt, the tables that a question may be about."""

from __future__ import annotations

import functools
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from ft_text2sql.database import ReadOnlyDatabase
from ft_text2sql.errors import SQLError
from ft_text2sql.identifiers import quote_name
from ft_text2sql.schema import Schema, Table

logger = logging.getLogger(__name__)

_BYTES_PER_TOKEN = 3  # of schemas, which are made of names; a tokenizer seldom takes more tokens
_SAMPLED_ROWS = 200
_LONGEST_VALUE = 60  # characters; what is longer is prose, which has all words
_TEXT_TYPE = re.compile(r"char|text|clob|string|enum|^$", re.IGNORECASE)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_WORD = re.compile(r"[^\W_]+")
_NAME_WEIGHT = 2.0

Values = Callable[[], Mapping[str, Collection[str]]]
"""Returns table name to words of the values in it."""


def estimated_tokens(text: str) -> int:
    """Return about how many tokens a schema takes, rather too many; any tokenizer's."""
    return math.ceil(len(text.encode("utf-8", "replace")) / _BYTES_PER_TOKEN)


class SchemaLinker:
    """Chooses the tables of one schema that a question may be about, up to a number of tokens.

    A table counts for each word of the question that stands in its name (twice), in a column's
    name or among its values, the more the fewer tables have the word. Those that refer to a
    chosen table, or that it refers to, come next, for joins; then the others, in the order of
    the schema. No model takes part: the same question has the same tables, in training and in
    an app.

    Args:
        schema: all tables.
        write: how a schema becomes text, a line or more for each table.
        values: words of the values; only asked for where the schema is too large.
    """

    def __init__(
        self, schema: Schema, write: Callable[[Schema], str], values: Values | None = None
    ) -> None:
        self.schema = schema
        """All tables."""
        self._values = values
        self._sizes = [
            estimated_tokens(write(Schema((table,), schema.dialect)) + "\n")
            for table in schema.tables
        ]

    def knows(self, tables: Iterable[str]) -> bool:
        """Say whether the schema has all of these tables."""
        return all(self.schema.table(name) is not None for name in tables)

    def link(
        self,
        question: str,
        tokens: int,
        *,
        keep: Collection[str] = (),
        among: Collection[str] | None = None,
    ) -> Schema:
        """Return the schema of the chosen tables, in the order of the whole.

        Args:
            question: what was asked.
            tokens: how many the text may take; one table at least is always chosen.
            keep: tables that are chosen in any case.
            among: only these; all by default.
        """
        tables = self.schema.tables
        candidates = self._indices(among) if among is not None else list(range(len(tables)))
        if sum(self._sizes[i] for i in candidates) <= tokens:
            return self._select(candidates)
        kept = [i for i in self._indices(keep) if i in set(candidates)]
        chosen, left = set(kept), tokens - sum(self._sizes[i] for i in kept)
        for index in self._ranked(question, candidates, kept):
            if index not in chosen and (self._sizes[index] <= left or not chosen):
                chosen.add(index)
                left -= self._sizes[index]
        return self._select(chosen)

    def _select(self, indices: Iterable[int]) -> Schema:
        tables = tuple(self.schema.tables[index] for index in sorted(indices))
        return Schema(tables, self.schema.dialect)

    def _indices(self, names: Collection[str]) -> list[int]:
        at = {id(table): index for index, table in enumerate(self.schema.tables)}
        found = (self.schema.table(name) for name in names)
        return sorted({at[id(table)] for table in found if table is not None})

    def _ranked(self, question: str, candidates: list[int], kept: list[int]) -> list[int]:
        """Return the candidates: by score, then their neighbours, then the others."""
        asked = words(question)
        scores = {index: self._score(index, asked) for index in candidates}
        scored = sorted((i for i in candidates if scores[i]), key=lambda i: (-scores[i], i))
        near = {j for i in {*kept, *scored} for j in self._neighbours[i]}
        neighbours = [i for i in candidates if not scores[i] and i in near]
        others = [i for i in candidates if not scores[i] and i not in near]
        return [*scored, *neighbours, *others]

    def _score(self, index: int, asked: frozenset[str]) -> float:
        weights = self._weights[index]
        return sum(weights[word] * self._rarity[word] for word in sorted(asked & weights.keys()))

    @functools.cached_property
    def _weights(self) -> list[dict[str, float]]:
        """Of each table, its words and what they count."""
        values = self._values() if self._values is not None else {}
        return [
            dict.fromkeys(words(" ".join(c.name for c in table.columns)), 1.0)
            | dict.fromkeys(values.get(table.full_name, ()), 1.0)
            | dict.fromkeys(words(table.name), _NAME_WEIGHT)
            for table in self.schema.tables
        ]

    @functools.cached_property
    def _rarity(self) -> dict[str, float]:
        count = len(self._weights)
        frequencies = Counter(word for weights in self._weights for word in weights)
        return {word: math.log(1 + count / times) for word, times in frequencies.items()}

    @functools.cached_property
    def _neighbours(self) -> list[set[int]]:
        found: list[set[int]] = [set() for _ in self.schema.tables]
        for index, table in enumerate(self.schema.tables):
            for key in table.foreign_keys:
                for other in self._indices([key.table]):
                    found[index].add(other)
                    found[other].add(index)
        return found


def words(text: str) -> frozenset[str]:
    """Return the words of a question or a name: of snake_case and camelCase, too, in singular.

    Of words in a script without spaces, which are whole sentences, each two letters are one.
    """
    found = set()
    for word in _WORD.findall(_CAMEL.sub(" ", text)):
        word = word.casefold()
        found.add(_singular(word))
        if not word.isascii():
            found.update(word[i : i + 2] for i in range(len(word) - 1))
    return frozenset(found)


def _singular(word: str) -> str:
    if len(word) <= 3 or not word.endswith("s") or word.endswith("ss"):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes", "zes")):
        return word[:-2]
    return word[:-1]


def values_of(database: ReadOnlyDatabase, schema: Schema) -> Values:
    """Return what reads, once, words of the short texts in the first rows of each table.

    A table that cannot be read has none.

    Raises:
        DatabaseError: when it reads; the database is gone.
    """

    @functools.cache
    def read() -> dict[str, frozenset[str]]:
        return {
            table.full_name: _value_words(_first_rows(database, table, schema.dialect))
            for table in schema.tables
        }

    return read


def _first_rows(
    database: ReadOnlyDatabase, table: Table, dialect: str
) -> Sequence[Sequence[object]]:
    columns = [quote_name(c.name, dialect) for c in table.columns if _TEXT_TYPE.search(c.type)]
    if not columns:
        return ()
    parts = [table.namespace, table.name] if table.namespace else [table.name]
    name = ".".join(quote_name(part, dialect) for part in parts)
    sql = f"SELECT {', '.join(columns)} FROM {name} LIMIT {_SAMPLED_ROWS}"
    try:
        return database.execute(sql).rows
    except SQLError as error:
        logger.debug("no values of the table %s: %s", table.full_name, error)
        return ()


def _value_words(rows: Iterable[Sequence[object]]) -> frozenset[str]:
    texts = {
        cell for row in rows for cell in row if isinstance(cell, str) and len(cell) < _LONGEST_VALUE
    }
    return frozenset().union(*(words(text) for text in sorted(texts)))
