"""What a live LlamaIndex SQL retriever knows of its tables, without a word to the database."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import PurePath
from typing import Any

from ft_text2sql.identifiers import dialect_name
from ft_text2sql.schema import Column, ForeignKey, Schema, Table


def schema_of(sql_database: Any, tables: Collection[str]) -> Schema | None:
    """Return the tables as LlamaIndex's SQLDatabase read them when it was made.

    Nothing is asked of the database: inside a call of the app, another query could wait for
    a connection that this very call holds.

    Args:
        sql_database: LlamaIndex's SQLDatabase.
        tables: names of those wanted; others, such as views that were not read, are left out.

    Returns:
        None where it has none of them.
    """
    dialect = sql_database.engine.dialect
    found = tuple(
        _table(table, dialect)
        for table in sql_database.metadata_obj.tables.values()
        if table.name in tables or table.fullname in tables
    )
    return Schema(found, dialect_name(dialect.name)) if found else None


def named_in(text: str, names: Collection[str]) -> list[str]:
    """Return the names that stand in a text as words of their own."""
    return [name for name in names if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)]


def database_name(url: Any) -> str | None:
    """Return a short name of the database behind a SQLAlchemy URL: no path, host or user."""
    name = PurePath((url.database or "").partition("?")[0]).stem.strip(": ")
    return name if name and name != "memory" else None


def _table(table: Any, dialect: Any) -> Table:
    return Table(
        name=str(table.name),
        columns=tuple(Column(str(c.name), _type(c.type, dialect)) for c in table.columns),
        primary_key=tuple(str(column.name) for column in table.primary_key),
        foreign_keys=tuple(_foreign_keys(table)),
        namespace=table.schema,
    )


def _foreign_keys(table: Any) -> Iterator[ForeignKey]:
    from sqlalchemy import exc

    for key in sorted(table.foreign_key_constraints, key=lambda key: list(key.column_keys)):
        try:
            referred = tuple(str(element.column.name) for element in key.elements)
            target = key.referred_table
        except exc.NoReferenceError:  # to a table that is not there, as SQLite allows
            continue
        columns = tuple(str(column.name) for column in key.columns)
        yield ForeignKey(columns, str(target.name), referred, target.schema)


def _type(kind: Any, dialect: Any) -> str:
    from sqlalchemy import exc

    try:
        written = kind.compile(dialect=dialect)
    except exc.SQLAlchemyError:  # a type without a name, as SQLite allows
        return ""
    return "" if written == "NULL" else str(written)
