"""Run a query on a SQLite database that it cannot change, whatever the query says.

Each query gets a connection of its own: nothing is shared between threads, and nothing that a
query leaves behind meets the next one. Opening one takes a fraction of a millisecond.

A file is opened with `mode=ro`. A database in memory cannot be opened a second time, and an
authorizer on the app's connection would refuse the app's own writes while a query runs: so the
query gets a private copy (`backup`, or `serialize` inside a transaction), made anew for each
query because no counter of SQLite tells of every change, rollbacks included.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Collection
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from ft_text2sql.errors import DatabaseError, QueryError, SQLError, UnsafeSQLError
from ft_text2sql.functions import allowed_functions, fold_ascii
from ft_text2sql.identifiers import quote_name
from ft_text2sql.results import Limits, QueryResult, Rows, Stop

# Not all have names in Python's module; the numbers are those of sqlite3.h.
_SELECT, _READ, _FUNCTION, _RECURSIVE = 21, 20, 31, 33
_OPERATORS = {"->", "->>", "match", "regexp"}
_TABLE_FUNCTIONS = {"json_each", "json_tree"}
_SYSTEM = re.compile(r"sqlite_|pragma_|(dbstat|bytecode|tables_used|completion)$")
_STEP = 200
"""Instructions of SQLite's machine between two looks at the clock."""
_LOCK_SECONDS = 5.0

Opener = Callable[[], sqlite3.Connection]
Read = tuple[str, str, str | None]
"""A view, and a table and its column that it reads; no column where it only counts rows."""


class SQLiteAccess:
    """Runs queries on a SQLite file, or on copies of a database in memory.

    Args:
        path: the file; None for a database in memory.
        copy: returns a private copy of a database in memory; called in the app's thread.
        tables: what may be read, folded to lower case; None: all but the system's.
        functions: what may be called besides the common ones, in lower case.
    """

    dialect = "sqlite"

    def __init__(
        self,
        path: Path | None,
        copy: Opener | None,
        tables: Collection[str] | None,
        functions: Collection[str],
    ) -> None:
        self._path, self._copy = path, copy
        self._tables = None if tables is None else frozenset(tables)
        self._functions = allowed_functions("sqlite") | _OPERATORS | frozenset(functions)

    def opener(self) -> Opener:
        """Return what opens a connection, to be called in any thread; copies are made here."""
        if self._copy is not None:
            copied = self._copy()
            return lambda: copied
        return self._open_file

    def run(self, sql: str, limits: Limits, stop: Stop, opener: Opener) -> QueryResult:
        """Run one query within its limits.

        Raises:
            SQLError: the query failed, was stopped, or was refused by the authorizer.
            DatabaseError: the file cannot be read.
        """
        with closing(opener()) as connection:
            try:
                self._protect(connection, limits, stop)
                stop.interrupts_with(connection.interrupt)
                with closing(connection.cursor()) as cursor:
                    cursor.execute(sql)
                    if cursor.description is None:
                        raise QueryError("gives no rows; write a SELECT")
                    rows = Rows(limits)
                    while not rows.full and (batch := cursor.fetchmany(100)):
                        rows.add(batch)
                        stop.check()
                    columns = [each[0] for each in cursor.description]
            except (sqlite3.Error, sqlite3.Warning, OverflowError, ValueError) as error:
                raise self._explained(error, limits, stop) from None
            finally:
                stop.interrupts_with(None)
        return QueryResult(columns, rows.rows, rows.truncated, stop.seconds)

    def _open_file(self) -> sqlite3.Connection:
        assert self._path is not None
        # Without a look, SQLite would say of all these that it is "unable to open database file".
        if self._path.is_dir():
            raise DatabaseError(f"{self._path}: is a folder, not a SQLite file")
        if not self._path.exists():
            raise DatabaseError(f"{self._path}: no such file")
        try:
            return sqlite3.connect(
                f"{self._path.resolve().as_uri()}?mode=ro",
                uri=True,
                timeout=_LOCK_SECONDS,
                isolation_level=None,
                check_same_thread=False,
            )
        except sqlite3.Error as error:
            raise DatabaseError(f"{self._path}: cannot be opened: {error}") from None

    def _protect(self, connection: sqlite3.Connection, limits: Limits, stop: Stop) -> None:
        # A name in a database may be in any encoding: a byte that is no UTF-8 must not stop it.
        connection.text_factory = lambda data: data.decode("utf-8", "replace")
        # One wait for a lock within the time limit, not one for each statement below: the first
        # that reads the file shows every lock and damage.
        connection.execute(f"PRAGMA busy_timeout = {1000 * min(_LOCK_SECONDS, limits.timeout):.0f}")
        kinds = dict(connection.execute("SELECT name, type FROM sqlite_master"))
        connection.execute("PRAGMA query_only = ON")
        # Functions that hide in views, indexes and default values stay within the list too.
        connection.execute("PRAGMA trusted_schema = OFF")
        if hasattr(connection, "enable_load_extension"):  # not in every build of Python
            connection.enable_load_extension(False)
        if hasattr(connection, "setlimit"):  # from Python 3.11
            # No value and no work between two looks at the clock without a bound: `instr` of two
            # texts of a megabyte would take minutes, and nothing can interrupt it.
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, max(int(limits.cell), 1_000))
            connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 1_000)
            connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        connection.set_progress_handler(lambda: stop.due, _STEP)
        for name in _TABLE_FUNCTIONS:
            # The first use declares a table, which the authorizer would take for a write.
            with suppress(sqlite3.Error):  # not in every build of SQLite
                connection.execute(f"SELECT 1 FROM {name}('[]') LIMIT 0").close()
        views = [name for name, kind in kinds.items() if kind == "view" and self._may_read(name)]
        read = _read_by(connection, views)
        connection.set_authorizer(self._authorizer({_lower(name) for name in kinds}, read))

    def _authorizer(self, real: Collection[str], read: Collection[Read]) -> Callable[..., int]:
        """Return what SQLite asks before it compiles each part of a statement.

        Args:
            real: the names of all tables and views.
            read: what the views that may be read read themselves. A CTE that has a view's name
                looks like the view here.
        """

        def authorize(
            action: int, first: str | None, second: str | None, _: object, view: str | None
        ) -> int:
            if action == _READ:
                allowed = self._may_read(first) or (_lower(view), _lower(first), second) in read
                if not allowed and second == "":
                    # Of a CTE, SQLite asks too where no column of it is read, as in count(*).
                    name = _lower(first)
                    allowed = name not in real and not _SYSTEM.match(name)
            elif action == _FUNCTION:
                allowed = _lower(second) in self._functions
            else:
                allowed = action in (_SELECT, _RECURSIVE)
            return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

        return authorize

    def _may_read(self, table: str | None) -> bool:
        name = _lower(table)
        if self._tables is None:
            return not _SYSTEM.match(name)
        return name in self._tables or name in _TABLE_FUNCTIONS

    def _explained(self, error: Exception, limits: Limits, stop: Stop) -> SQLError | DatabaseError:
        text = " ".join(str(error).split())
        where = self._path or "the database in memory"
        if text == "interrupted":
            return stop.error()
        if "prohibited" in text or "not authorized" in text:
            return UnsafeSQLError(f"was refused by the database: {text}")
        if "too big" in text:
            return QueryError(
                f"makes or reads a value of more than {limits.cell:,} bytes; select less of it"
            )
        if "locked" in text or "busy" in text:
            return DatabaseError(f"{where}: is locked by another program; try again later")
        if "not a database" in text or "malformed" in text:
            return DatabaseError(f"{where}: is no SQLite database, or is damaged: {text}")
        if "unable to open" in text or "readonly" in text or "disk I/O" in text:
            return DatabaseError(
                f"{where}: cannot be read without writing beside it ({text}); a crashed writer "
                "left a journal, or its folder is read-only: open it once with the app"
            )
        return QueryError(f"failed in the database: {text}")


def _read_by(connection: sqlite3.Connection, views: Collection[str]) -> set[Read]:
    """Return what views read, as SQLite tells it when it compiles them; nothing of them runs.

    The connection needs another authorizer afterwards.
    """
    names, found = {_lower(view) for view in views}, set[Read]()

    def note(
        action: int, first: str | None, second: str | None, _: object, view: str | None
    ) -> int:
        if action == _READ and _lower(view) in names:
            found.update((_lower(view), _lower(first), each) for each in (second, ""))
        return sqlite3.SQLITE_OK

    connection.set_authorizer(note)
    for view in views:
        with suppress(sqlite3.Error):  # of a view that is broken
            connection.execute(f"EXPLAIN SELECT * FROM {quote_name(view, 'sqlite')}").close()
    return found


def memory_copy(engine: Any) -> sqlite3.Connection:
    """Return a private copy of the in-memory database of a SQLAlchemy engine.

    Raises:
        DatabaseError: the database belongs to another thread, or cannot be copied.
    """
    from sqlalchemy.pool import StaticPool

    copy = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    try:
        if isinstance(engine.pool, StaticPool):
            # One connection that all share: to give it back to the pool would roll back what
            # the app has not committed yet. So it is used where it is.
            shared: Any = engine.pool.connection
            _copy(shared.dbapi_connection, copy)
        else:
            with engine.connect() as borrowed:
                _copy(borrowed.connection.driver_connection, copy)
    except (sqlite3.Error, AttributeError) as error:
        copy.close()
        raise DatabaseError(
            f"the database in memory cannot be copied: {error}; make the engine with "
            'poolclass=StaticPool and connect_args={"check_same_thread": False}'
        ) from None
    return copy


def _copy(source: sqlite3.Connection, target: sqlite3.Connection) -> None:
    if not source.in_transaction:
        source.backup(target)
    elif hasattr(source, "serialize"):  # from Python 3.11
        # `backup` would wait for the end of the transaction, and for ever in the same thread.
        target.deserialize(source.serialize())
    else:
        raise sqlite3.OperationalError("the app is in the middle of a transaction on it")


def _lower(name: str | None) -> str:
    return fold_ascii(name or "")
