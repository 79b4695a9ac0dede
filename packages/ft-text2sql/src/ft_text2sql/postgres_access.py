"""Run a query on PostgreSQL inside a transaction that cannot write and is always rolled back.

The query does not reach the server as a statement. It is handed over as a value, and a fixed
block of PL/pgSQL opens a cursor for it, which PostgreSQL does for one statement that gives rows
and for nothing else. Several statements in one text, `COMMIT`, `SET` and `COPY` fail there, also
where the driver would run them. The rows come in small batches, fewer at a time the larger they
are, so that a large result stays in the server.

All settings are of the transaction: behind a pooler such as PgBouncer, a setting of the session
would reach the app's own statements.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

from ft_text2sql.errors import DatabaseError, QueryError, SQLError
from ft_text2sql.results import Limits, QueryResult, Rows, Stop

_BATCH = 50
"""Rows that are fetched at a time, if they are small."""
_GRACE = 1.0
"""Seconds after which this side stops a query that the server has not stopped."""

_SETTINGS = """
SELECT set_config('statement_timeout', %s, true),
       set_config('lock_timeout', %s, true),
       set_config('idle_in_transaction_session_timeout', %s, true),
       set_config('default_transaction_read_only', 'on', true),
       set_config('standard_conforming_strings', 'on', true),
       set_config('ft_text2sql.query', %s, true)
"""
_PATH = "SELECT set_config('search_path', quote_ident(%s), true)"
# What a model writes must not run with the rights of a superuser, for whom no file is closed.
_ROLE = """
SELECT 1 FROM pg_catalog.pg_roles
WHERE rolname = current_user AND rolsuper
  AND EXISTS (SELECT 1 FROM pg_catalog.pg_roles WHERE rolname = 'pg_read_all_data')
"""
_OPEN = """
DO $ft$
DECLARE rows refcursor := 'ft_text2sql_rows';
BEGIN OPEN rows NO SCROLL FOR EXECUTE current_setting('ft_text2sql.query'); END
$ft$
"""


class PostgresAccess:
    """Runs queries on PostgreSQL.

    Args:
        pool: a SQLAlchemy pool of its own, whose connections are psycopg's or psycopg2's.
        schema: where tables without a schema are looked for; None: the user's search path.
        secrets: texts that no message may hold.
    """

    dialect = "postgres"

    def __init__(self, pool: Any, schema: str | None, secrets: tuple[str, ...]) -> None:
        self._pool, self._schema, self._secrets = pool, schema, secrets

    def opener(self) -> None:
        """Return nothing: the pool may be used in any thread."""

    def run(self, sql: str, limits: Limits, stop: Stop, _: None) -> QueryResult:
        """Run one query within its limits.

        Raises:
            SQLError: the query failed, or was stopped.
            DatabaseError: there is no connection.
        """
        try:
            borrowed = self._pool.connect()
        except Exception as error:
            raise DatabaseError(f"cannot connect to PostgreSQL: {self._line(error)}") from None
        raw = borrowed.dbapi_connection
        watchdog = threading.Timer(limits.timeout + _GRACE, stop.interrupt)
        watchdog.daemon = True
        watchdog.start()
        clean = False
        try:
            stop.interrupts_with(raw.cancel)
            result = self._read(raw, sql, limits, stop)
            clean = True
            return result
        except SQLError:
            raise
        except Exception as error:
            raise self._explained(error, raw, stop) from None
        finally:
            stop.interrupts_with(None)
            watchdog.cancel()
            with suppress(Exception):
                raw.rollback()
            # A connection on which something failed is not used again.
            if clean:
                borrowed.close()
            else:
                borrowed.invalidate()

    def close(self) -> None:
        """Close the connections that no query uses."""
        self._pool.dispose()

    def _read(self, raw: Any, sql: str, limits: Limits, stop: Stop) -> QueryResult:
        rows = Rows(limits)
        if raw.autocommit:  # of the app's engine: each statement is a transaction of its own
            raw.autocommit = False
        with raw.cursor() as cursor:
            cursor.execute("SET TRANSACTION READ ONLY")
            left = str(max(1, int(stop.seconds_left * 1000)))
            idle = str(int(limits.timeout * 1000) + 60_000)
            cursor.execute(_SETTINGS, (left, left, idle, sql))
            if self._schema is not None:
                cursor.execute(_PATH, (self._schema,))
            cursor.execute(_ROLE)
            if cursor.fetchone():
                cursor.execute("SET LOCAL ROLE pg_read_all_data")
            cursor.execute(_OPEN)
            while not rows.full:
                stop.check()
                wanted = rows.next_batch(_BATCH)
                cursor.execute(f"FETCH {wanted} FROM ft_text2sql_rows")
                columns = [each[0] for each in cursor.description]
                rows.add(cursor.fetchall())
                if cursor.rowcount < wanted:
                    break
            cursor.execute("SELECT pg_advisory_unlock_all()")  # a rollback leaves them
        return QueryResult(columns, rows.rows, rows.truncated, stop.seconds)

    def _explained(self, error: Exception, raw: Any, stop: Stop) -> SQLError | DatabaseError:
        state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
        if stop.due or state == "57014":  # query_canceled: the server's timer is a little early
            return stop.error()
        # libpq's errors have no state, but a class that says so; a driver's own have neither.
        broken = state is None and isinstance(error, (raw.OperationalError, raw.InterfaceError))
        if raw.closed or broken or (state or "")[:2] in ("08", "57"):
            return DatabaseError(f"lost the connection to PostgreSQL: {self._line(error)}")
        if state is None:  # the driver's own error: a year before 1, an endless timestamp
            return QueryError(
                f"gives a value that Python cannot hold ({self._line(error)}); cast it to text"
            )
        diagnosis = getattr(error, "diag", None)
        said = getattr(diagnosis, "message_primary", None) or self._line(error)
        hint = getattr(diagnosis, "message_hint", None)
        return QueryError(
            self._clean(f"failed in the database: {said}" + (f" ({hint})" if hint else ""))
        )

    def _line(self, error: Exception) -> str:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return self._clean(lines[0])

    def _clean(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return " ".join(text.split())


def own_pool(engine: Any) -> Any:
    """Return a pool of connections like those of the app's engine, but none of them.

    Raises:
        DatabaseError: no driver for PostgreSQL that waits for answers is installed.
    """
    if engine.dialect.driver in ("psycopg2", "psycopg") and not engine.dialect.is_async:
        # With the app's own arguments (certificates, a creator), which the URL does not hold.
        return engine.pool.recreate()
    return pool_of_url(engine.url)


def pool_of_url(url: Any) -> Any:
    """Return a pool for a URL of any PostgreSQL driver.

    Raises:
        MissingExtraError: neither psycopg nor psycopg2 is installed.
    """
    from importlib.util import find_spec

    from sqlalchemy import create_engine

    from ft_core.extras import import_extra

    wanted = url.get_driver_name() if "+" in url.drivername else "psycopg2"
    drivers = [wanted] if wanted in ("psycopg", "psycopg2") else []
    drivers += ["psycopg", "psycopg2"]
    driver = next((each for each in drivers if find_spec(each)), None)
    if driver is None:
        import_extra("psycopg", "ft-text2sql[postgres]")
    query = dict(url.query)
    if "ssl" in query:  # asyncpg's word for it
        query["sslmode"] = query.pop("ssl")
    return create_engine(url.set(drivername=f"postgresql+{driver}", query=query), pool_size=2).pool
