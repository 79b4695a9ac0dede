"""A database that whatever a model writes can read, and never change.

Two layers, each enough on its own to keep the data: the guard (`ft_text2sql.guard`) lets only
single SELECT statements through, and the connection they run on cannot write
(`ft_text2sql.sqlite_access`, `ft_text2sql.postgres_access`).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ft_core.errors import ArgumentError
from ft_text2sql.errors import DatabaseError, QueryError
from ft_text2sql.results import Limits, QueryResult, Rows, Stop

if TYPE_CHECKING:
    from llama_index.core.utilities.sql_wrapper import SQLDatabase
    from sqlalchemy.engine import URL, Engine

    from ft_text2sql.guarded import GuardedSQLDatabase

__all__ = ["Limits", "QueryResult", "ReadOnlyDatabase"]

# How sqlglot calls the dialects that SQLAlchemy calls otherwise.
_DIALECTS = {
    "postgresql": "postgres",
    "cockroachdb": "postgres",
    "mariadb": "mysql",
    "mssql": "tsql",
    "awsathena": "athena",
}


class _Access(Protocol):
    dialect: str

    def opener(self) -> Any: ...

    def run(self, sql: str, limits: Limits, stop: Stop, opener: Any, /) -> QueryResult: ...


class ReadOnlyDatabase:
    """Runs what a model wrote: single SELECT statements, read-only, within limits.

    ```python
    database = ReadOnlyDatabase(sql_database)
    result = database.execute("SELECT city, count(*) FROM customers GROUP BY city")
    ```

    A SQLite file is opened read-only; one in memory is copied for each query, so that the app's
    connection is left alone. PostgreSQL gets connections of its own. Functions that the app has
    added to its SQLite connections are not there. Any number of threads may use one object.

    Args:
        source: LlamaIndex's SQLDatabase, a SQLAlchemy engine (async ones too), a URL, or the path
            of a SQLite file.
        tables: the tables and views that may be read, "schema.table" where a schema is written;
            by default those that the SQLDatabase lists, and for an engine or a URL all that are
            not the system's.
        functions: names of functions that may be called besides the common ones.
        limits: time, rows and sizes; 10 seconds and 1,000 rows by default.
        allow_unprotected: run on another database than SQLite and PostgreSQL, where the guard
            is the only protection and no time limit holds: use a login that can only read.

    Raises:
        ArgumentError: the source is none of these, or a table is not a name.
        DatabaseError: the database cannot be protected (see `allow_unprotected`).
    """

    def __init__(
        self,
        source: SQLDatabase | Engine | URL | Path | str,
        *,
        tables: Collection[str] | None = None,
        functions: Collection[str] = (),
        limits: Limits | None = None,
        allow_unprotected: bool = False,
    ) -> None:
        engine, listed, schema, self._owns_engine = _parts(source)
        self._original = None if listed is None else source
        self.tables = _names("tables", listed if tables is None else tables)
        """The tables that may be read, sorted; None: all but the system's."""
        self.limits = limits or Limits()
        """The limits of each query."""
        self._functions = _names("functions", functions) or []
        self._engine = engine
        self._schema = schema
        name = engine.dialect.name
        self.dialect = _DIALECTS.get(name, name)
        """The database's dialect, as sqlglot names it."""
        self._access = self._protected(allow_unprotected)
        self._running: set[Stop] = set()
        self._lock = threading.Lock()

    def execute(self, sql: str) -> QueryResult:
        """Check a statement, run it and return its rows.

        Raises:
            UnsafeSQLError: it is not a single SELECT of what may be read; nothing ran.
            QueryError: the database refused it, or it ran too long, or was cancelled.
            DatabaseError: the database cannot be read.
        """
        return self._run(self.check(sql), Stop(self.limits.timeout), self._access.opener())

    async def aexecute(self, sql: str) -> QueryResult:
        """Do what `execute` does in a thread; a task that is cancelled stops its statement."""
        checked = await asyncio.to_thread(self.check, sql)
        stop, opener = Stop(self.limits.timeout), self._access.opener()
        try:
            return await asyncio.to_thread(self._run, checked, stop, opener)
        except asyncio.CancelledError:
            stop.cancel()
            raise

    def check(self, sql: str) -> str:
        """Return the SQL that `execute` would run for a statement.

        Raises:
            UnsafeSQLError: it may not run.
        """
        from ft_text2sql.guard import check_select

        tables = self.tables
        if tables is not None and self._schema is not None:
            tables = [*tables, *(f"{self._schema}.{table}" for table in tables)]
        return check_select(sql, dialect=self.dialect, tables=tables, functions=self._functions)

    def cancel(self) -> None:
        """Stop all statements that run now; each raises QueryCancelledError in its thread."""
        with self._lock:
            running = list(self._running)
        for stop in running:
            stop.cancel()

    def close(self) -> None:
        """Close the connections that are kept for later statements; they open anew if needed.

        Those of an engine that the caller gave are left alone; of a URL or a file, those that
        describe the tables of `as_sql_database` are closed, too.
        """
        close = getattr(self._access, "close", None)
        if close is not None:
            close()
        if self._owns_engine:
            self._engine.dispose()

    def as_sql_database(self) -> GuardedSQLDatabase:
        """Return LlamaIndex's SQLDatabase, for a query engine, that runs statements through this.

        Raises:
            DatabaseError: the tables cannot be read.
        """
        from ft_text2sql.guarded import GuardedSQLDatabase

        # Of a SQLite file that is not there, SQLAlchemy would make an empty one.
        self.execute("SELECT 1")
        return GuardedSQLDatabase(self, self._described())

    def _described(self) -> SQLDatabase:
        """Return a SQLDatabase that describes the tables of the allow-list."""
        from llama_index.core.utilities.sql_wrapper import SQLDatabase
        from sqlalchemy import MetaData

        if self._original is not None:
            return self._original
        metadata = MetaData()
        try:
            # Each table by itself: from one to those that it refers to, and on, SQLAlchemy goes by
            # recursion, which ends at a chain of a hundred or two.
            metadata.reflect(
                self._engine, self._schema, views=True, only=self.tables or None, resolve_fks=False
            )
            return SQLDatabase(
                self._engine,
                schema=self._schema,
                metadata=metadata,
                include_tables=self.tables,
                view_support=True,
            )
        except Exception as error:
            raise DatabaseError(f"the tables cannot be read: {type(error).__name__}") from None

    def __repr__(self) -> str:
        tables = "all tables" if self.tables is None else f"{len(self.tables)} tables"
        return f"ReadOnlyDatabase({self.dialect}, {self._engine.url.database!r}, {tables})"

    def _run(self, sql: str, stop: Stop, opener: Any) -> QueryResult:
        with self._lock:
            self._running.add(stop)
        try:
            stop.check()
            return self._access.run(sql, self.limits, stop, opener)
        finally:
            with self._lock:
                self._running.discard(stop)

    def _protected(self, allow_unprotected: bool) -> _Access:
        if self.dialect == "sqlite":
            return _sqlite(self._engine, self.tables, self._functions)
        if self._engine.dialect.name == "postgresql":
            from ft_text2sql.postgres_access import PostgresAccess, own_pool

            password = self._engine.url.password
            secrets = (str(password),) if password else ()
            return PostgresAccess(own_pool(self._engine), self._schema, secrets)
        if not allow_unprotected:
            raise DatabaseError(
                f"{self._engine.dialect.name}: statements can be kept from writing by the "
                "connection on SQLite and PostgreSQL only; give the engine a login that can only "
                "read, and say allow_unprotected=True"
            )
        return _UnprotectedAccess(self._engine, self.dialect)


class _UnprotectedAccess:
    """Runs guarded queries on any engine, and rolls back; the guard alone keeps the data."""

    def __init__(self, engine: Any, dialect: str) -> None:
        self._engine, self.dialect = engine, dialect

    def opener(self) -> None:
        """Return nothing: the engine may be used in any thread."""

    def run(self, sql: str, limits: Limits, stop: Stop, _: None, /) -> QueryResult:
        from sqlalchemy.exc import SQLAlchemyError

        rows = Rows(limits)
        try:
            with self._engine.connect() as connection:
                # Neither ":name" nor "%" is a place for a parameter.
                connection = connection.execution_options(stream_results=True, no_parameters=True)
                result = connection.exec_driver_sql(sql)
                while not rows.full and (batch := result.fetchmany(100)):
                    rows.add(batch)
                    stop.check()
                columns = list(result.keys())
                result.close()
                connection.rollback()
        except SQLAlchemyError as error:
            said = " ".join(str(getattr(error, "orig", None) or type(error).__name__).split())
            password = self._engine.url.password
            said = said.replace(str(password), "***") if password else said
            raise QueryError(f"failed in the database: {said}") from None
        return QueryResult(columns, rows.rows, rows.truncated, stop.seconds)


def _parts(source: Any) -> tuple[Any, Collection[str] | None, str | None, bool]:
    """Return a source's engine, the tables that it lists, its schema, and if it was made here."""
    from sqlalchemy import create_engine
    from sqlalchemy.engine import URL, Engine

    if isinstance(source, Path) or (isinstance(source, str) and "://" not in source):
        path = Path(source).expanduser().resolve()
        if not path.is_file():
            # What may be a connection string is not quoted: it may hold a password.
            shown = "" if {"=", "@"} & set(str(source)) else f"{source}: "
            raise ArgumentError("database", f"{shown}is no file; name a SQLite file or a URL")
        source = URL.create("sqlite", database=str(path))
    if isinstance(source, str | URL):
        try:
            return create_engine(source), None, None, True
        except ModuleNotFoundError as error:
            raise ArgumentError(
                "database",
                f"needs a driver that is not installed: {error.name}; of PostgreSQL: "
                'pip install "ft-text2sql[postgres]"',
            ) from None
        except Exception as error:
            # The cause is left out: it may quote the URL, and that holds the password.
            raise ArgumentError(
                "database",
                f"is no URL that SQLAlchemy can use ({type(error).__name__}); write it like "
                "sqlite:///shop.db or postgresql+psycopg://user@host/shop",
            ) from None
    if isinstance(source, Engine):
        return source, None, None, False
    inner = getattr(source, "sync_engine", None)  # of an AsyncEngine
    if isinstance(inner, Engine):
        return inner, None, None, False
    from llama_index.core.utilities.sql_wrapper import SQLDatabase

    if isinstance(source, SQLDatabase):
        return source.engine, list(source.get_usable_table_names()), source._schema, False
    raise ArgumentError(
        "database", f"is a SQLDatabase, an engine, a URL or a file, not a {type(source).__name__}"
    )


def _names(argument: str, names: Collection[str] | None) -> list[str] | None:
    if names is None:
        return None
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        raise ArgumentError(argument, "is a list of names")
    return sorted(set(names))


def _sqlite(engine: Any, tables: list[str] | None, functions: list[str]) -> _Access:
    from ft_text2sql.functions import fold_ascii
    from ft_text2sql.sqlite_access import SQLiteAccess, memory_copy

    if engine.dialect.driver not in ("pysqlite", "aiosqlite"):
        raise DatabaseError(
            f"sqlite+{engine.dialect.driver}: only files that Python's sqlite3 reads can be "
            "opened read-only; use a URL that begins with sqlite://"
        )
    path = _sqlite_path(engine)
    if path is None and engine.dialect.is_async:
        raise DatabaseError(
            "an async engine's database in memory cannot be copied; use a file, or a sync engine"
        )
    return SQLiteAccess(
        path,
        None if path is not None else lambda: memory_copy(engine),
        None if tables is None else {fold_ascii(table) for table in tables},
        {fold_ascii(name) for name in functions},
    )


def _sqlite_path(engine: Any) -> Path | None:
    """Return the file of a SQLite engine, or None for a database in memory."""
    name = engine.url.database or ""
    if not name or name == ":memory:" or "mode=memory" in str(engine.url) or ":memory:" in name:
        return None
    if name.startswith("file:"):
        from urllib.parse import unquote, urlsplit

        return Path(unquote(urlsplit(name).path))
    return Path(name).absolute()
