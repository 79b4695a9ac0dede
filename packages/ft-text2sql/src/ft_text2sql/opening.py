"""Open the database that an app or a training run names, and read its tables."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_core.errors import ArgumentError, DatasetError
from ft_text2sql.database import ReadOnlyDatabase
from ft_text2sql.errors import DatabaseError
from ft_text2sql.guarded import GuardedSQLDatabase
from ft_text2sql.results import Limits
from ft_text2sql.schema import Schema

if TYPE_CHECKING:
    from llama_index.core.utilities.sql_wrapper import SQLDatabase
    from sqlalchemy.engine import URL, Engine


def guarded(
    source: SQLDatabase | Engine | URL | Path | str,
    tables: Collection[Any] | None = None,
    limits: Limits | None = None,
) -> GuardedSQLDatabase:
    """Return a read-only SQLDatabase of what LlamaIndex or SQLAlchemy calls a database.

    Args:
        source: LlamaIndex's SQLDatabase, a SQLAlchemy engine, a URL or a SQLite file. A guarded
            SQLDatabase is returned as it is.
        tables: what may be read, names or SQLAlchemy's tables; all by default.
        limits: of each query.

    Raises:
        ArgumentError: the source is none of these, or limits for what has its own.
        DatabaseError: the database cannot be read or protected.
    """
    if isinstance(source, GuardedSQLDatabase):
        if limits is not None:
            raise ArgumentError("limits", "are those of the guarded database; give them to it")
        return source
    names = None if tables is None else [getattr(table, "name", table) for table in tables]
    return ReadOnlyDatabase(source, tables=names, limits=limits).as_sql_database()


def check_alive(database: ReadOnlyDatabase) -> None:
    """Make sure that the database is there before SQLAlchemy describes its tables.

    Of a SQLite file that is gone, SQLAlchemy would make an empty one.

    Raises:
        DatabaseError: it is gone, locked or damaged.
    """
    database.execute("SELECT 1")


def schema_of(database: GuardedSQLDatabase) -> Schema:
    """Return the tables that may be read.

    Raises:
        DatabaseError: they cannot be read, or there are none.
    """
    check_alive(database.read_only)
    try:
        schema = Schema.from_database(database)
    except DatasetError as error:
        raise DatabaseError(str(error)) from None
    if database.read_only.tables is None:
        return schema
    known = [name for name in database.read_only.tables if schema.table(name) is not None]
    if not known:
        raise DatabaseError("the database has none of the tables that may be read")
    return schema.select(known)
