"""From questions with SQL to the conversations that a model learns from."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

from ft_core.datasets import ChatDataset
from ft_core.datasets.chat import ChatExample
from ft_core.datasets.text2sql import Text2SQLDataset, Text2SQLExample
from ft_core.errors import DatasetError
from ft_text2sql.errors import SQLError
from ft_text2sql.guard import table_names
from ft_text2sql.identifiers import dialect_name
from ft_text2sql.linking import SchemaLinker, values_of
from ft_text2sql.names import check_schema
from ft_text2sql.opening import guarded, schema_of
from ft_text2sql.prompt import SQLPrompt
from ft_text2sql.schema import Schema

logger = logging.getLogger(__name__)


class ChatMaker:
    """Makes training conversations, each under the prompt that a query engine will send.

    Args:
        prompt: the prompt.
        database: a live database that all examples are about, or a mapping of their `database`
            to one each: the schema is read there, as an app does. None takes each example's
            `context`.
        dialect: of examples that name none; the database's, or else "sqlite", by default.
    """

    def __init__(self, prompt: SQLPrompt, database: Any = None, dialect: str | None = None) -> None:
        self._prompt = prompt
        self._database = database
        self._dialect = None if dialect is None else dialect_name(dialect)
        self._live: dict[str | None, tuple[SchemaLinker, str]] = {}
        self._opened: list[Callable[[], None]] = []
        self._read = functools.cache(self._from_context)
        self.dialects: set[str] = set()
        """Of the examples so far."""
        self.tables: set[str] = set()
        """Of the one live database that all examples are about."""
        self._doubtful: list[str] = []

    def dataset(self, data: Text2SQLDataset, name: str) -> ChatDataset:
        """Return the conversations: a system's and a user's message, and the SQL as the answer.

        Tables that the SQL reads are always in the prompt.

        Args:
            data: questions with SQL.
            name: of the data, for errors.

        Raises:
            DatasetError: an example has no schema, or one that cannot be read; names it.
            DatabaseError: the database cannot be read.
        """
        examples = []
        for number, example in enumerate(data.examples):
            try:
                examples.append(self._conversation(example))
            except DatasetError as error:
                place = f"{name}[{number}]"
                place = f"{place}.{error.place}" if error.place else place
                raise DatasetError(error.reason, place=place) from error
        self._warn_of_doubtful(name, len(examples))
        return ChatDataset(examples=examples)

    def close(self) -> None:
        """Close the connections to the databases."""
        while self._opened:
            self._opened.pop()()

    def _conversation(self, example: Text2SQLExample) -> ChatExample:
        linker, dialect = self._schema_of(example)
        self.dialects.add(dialect)
        sql = example.sql.strip().rstrip(";").rstrip()
        messages = self._prompt.messages(
            example.question, dialect, linker, keep=_tables_of(sql, dialect)
        )
        try:
            check_schema(sql, linker.schema.as_mapping(), dialect)
        except SQLError as error:
            self._doubtful.append(f"{example.question!r:.80}: {error.reason}")
        answer = {"role": "assistant", "content": sql}
        return ChatExample(messages=[*messages, answer], metadata={"query": example.question})

    def _warn_of_doubtful(self, name: str, total: int) -> None:
        if self._doubtful:
            logger.warning(
                "%s: the SQL of %d of %d examples would not run on its schema; it is learned as it "
                "is. The first: %s",
                name,
                len(self._doubtful),
                total,
                self._doubtful[0],
            )
        self._doubtful = []

    def _schema_of(self, example: Text2SQLExample) -> tuple[SchemaLinker, str]:
        if self._database is not None:
            key = example.database if isinstance(self._database, Mapping) else None
            if key not in self._live:
                self._open(key)
            return self._live[key]
        dialect = dialect_name(example.dialect or self._dialect or "sqlite")
        if not example.context.strip():
            raise DatasetError(
                "has no schema, only the name of a database; pass the database itself as "
                "database=, or write its CREATE TABLE statements",
                place="context",
            )
        return self._read(example.context, dialect), dialect

    def _open(self, key: str | None) -> None:
        source = self._database
        if isinstance(source, Mapping):
            if key not in source:
                raise DatasetError(
                    f"{key!r} is not among the databases that were passed", place="database"
                )
            source = source[key]
        database = guarded(source)
        schema = schema_of(database)
        self._opened.append(database.read_only.close)
        if database.engine not in (source, getattr(source, "engine", None)):
            self._opened.append(database.engine.dispose)  # ours, of a URL
        if key is None:
            self.tables = {table.name for table in schema.tables}
        linker = self._prompt.linker(schema, values_of(database.read_only, schema))
        self._live[key] = linker, schema.dialect

    def _from_context(self, context: str, dialect: str) -> SchemaLinker:
        try:
            return self._prompt.linker(Schema.from_sql(context, dialect))
        except DatasetError as error:
            raise DatasetError(error.reason, place="context") from error


def _tables_of(sql: str, dialect: str) -> list[str]:
    """Return the tables of a query; none of what cannot be parsed."""
    try:
        return list(table_names(sql, dialect=dialect))
    except SQLError:
        return []
