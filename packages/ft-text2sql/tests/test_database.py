from __future__ import annotations

import asyncio
import hashlib
import os
import re
import socket
import sqlite3
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import NLSQLTableQueryEngine
from llama_index.core.utilities.sql_wrapper import SQLDatabase
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.pool import StaticPool

from ft_core.errors import ArgumentError
from ft_text2sql.database import Limits, ReadOnlyDatabase
from ft_text2sql.errors import (
    DatabaseError,
    QueryCancelledError,
    QueryError,
    QueryTimeoutError,
    SQLError,
    UnsafeSQLError,
)
from ft_text2sql.guarded import GuardedSQLDatabase
from ft_text2sql.results import Stop

Statements = Callable[[str], list[str]]
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT {} FROM n"
HUNG = 120.0
"""Seconds after which a statement counts as hanging; the limits below are a fraction of it."""


@pytest.fixture
def sqlite_database(shop: Path, tables: list[str]) -> ReadOnlyDatabase:
    return ReadOnlyDatabase(f"sqlite:///{shop}", tables=tables)


@pytest.fixture
def postgres_database(postgres_url: str, tables: list[str]) -> Iterator[ReadOnlyDatabase]:
    database = ReadOnlyDatabase(postgres_url, tables=tables)
    yield database
    database.close()


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest) -> ReadOnlyDatabase:
    found: ReadOnlyDatabase = request.getfixturevalue(f"{request.param}_database")
    return found


def limited(database: ReadOnlyDatabase, **limits: Any) -> ReadOnlyDatabase:
    database.limits = Limits(**limits)
    return database


def without_guard(database: ReadOnlyDatabase, sql: str) -> Any:
    """Run a statement as it is: what the protected connection alone does with it."""
    stop = Stop(database.limits.timeout)
    return database._run(sql, stop, database._access.opener())


def outcomes(run: Callable[[str], Any], statements: list[str]) -> Counter[str]:
    """Run all statements; whatever is raised must be an error that an app can show."""
    found: Counter[str] = Counter()
    for statement in statements:
        started = time.monotonic()
        try:
            run(statement)
            found["rows"] += 1
        except SQLError as error:
            found[type(error).__name__] += 1
        assert time.monotonic() - started < HUNG, statement
    return found


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- hostile statements: no layer lets one write


def test_sqlite_keeps_its_bytes(
    sqlite_database: ReadOnlyDatabase, hostile: Statements, tmp_path: Path
) -> None:
    before = contents(tmp_path)
    found = outcomes(sqlite_database.execute, hostile("sqlite"))
    assert set(found) <= {"UnsafeSQLError", "InvalidSQLError"}
    assert contents(tmp_path) == before


def test_sqlites_connection_alone_keeps_its_bytes(
    sqlite_database: ReadOnlyDatabase, hostile: Statements, tmp_path: Path
) -> None:
    before = contents(tmp_path)
    database = limited(sqlite_database, timeout=1.0)
    found = outcomes(lambda sql: without_guard(database, sql), hostile("sqlite"))
    assert found["UnsafeSQLError"] > 50  # it is the authorizer that refuses, not only the parser
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM secrets",
        "SELECT 1 FROM secrets",
        "SELECT * FROM sqlite_master",
        "SELECT load_extension('x')",
        "PRAGMA query_only = OFF",
        "ATTACH ':memory:' AS x",
        "SELECT 'x' IN secrets",
        "CREATE TEMP TABLE x (y)",
        "BEGIN",
        "WITH customers AS (SELECT * FROM secrets) SELECT * FROM customers",
        "WITH customers AS (SELECT * FROM sqlite_master) SELECT * FROM customers",
        "WITH rich AS (SELECT * FROM secrets) SELECT * FROM rich",
        "WITH rich AS (SELECT 1 FROM secrets) SELECT count(*) FROM rich",
    ],
)
def test_sqlites_authorizer_refuses_what_is_not_listed(
    sqlite_database: ReadOnlyDatabase, sql: str
) -> None:
    with pytest.raises(UnsafeSQLError, match="refused by the database"):
        without_guard(sqlite_database, sql)


def test_sqlites_file_is_opened_read_only(sqlite_database: ReadOnlyDatabase) -> None:
    with (
        closing(sqlite_database._access.opener()()) as connection,
        pytest.raises(sqlite3.OperationalError, match="readonly"),
    ):
        connection.execute("DELETE FROM customers")


def test_postgresql_keeps_its_state(
    postgres_database: ReadOnlyDatabase,
    postgres_state: Callable[[], Any],
    hostile: Statements,
    canary: Path,
) -> None:
    before = postgres_state()
    found = outcomes(postgres_database.execute, hostile("postgres"))
    assert set(found) <= {"UnsafeSQLError", "InvalidSQLError"}
    assert postgres_state() == before
    assert contents(canary) == {}


@pytest.mark.slow
def test_postgresqls_transaction_alone_keeps_its_state(
    postgres_database: ReadOnlyDatabase,
    postgres_state: Callable[[], Any],
    hostile: Statements,
    canary: Path,
) -> None:
    before = postgres_state()
    database = limited(postgres_database, timeout=0.5)
    # libpq takes texts without NUL and halves of surrogate pairs only; the guard refuses both.
    statements = [sql for sql in hostile("postgres") if "\0" not in sql and "\ud800" not in sql]
    found = outcomes(lambda sql: without_guard(database, sql), statements)
    assert found["QueryError"] > 200
    assert found["QueryTimeoutError"] > 10  # those that sleep
    assert postgres_state() == before
    assert contents(canary) == {}


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1; DELETE FROM customers",
        "COMMIT; DELETE FROM customers",
        "COMMIT",
        "SELECT 1; COMMIT",
        "SELECT 1; COMMIT; DELETE FROM customers",
        "SET TRANSACTION READ WRITE",
        "COPY customers TO STDOUT",
        "DELETE FROM customers RETURNING *",
        "SELECT set_config('transaction_read_only', 'off', true)",
        "SELECT nextval('numbers')",
        "SELECT refill()",
        "SELECT pg_read_file('/etc/hostname')",
        "SELECT lo_export(4711, '/x')",
    ],
)
def test_postgresqls_cursor_refuses_all_but_one_query(
    postgres_database: ReadOnlyDatabase, postgres_state: Callable[[], Any], sql: str
) -> None:
    before = postgres_state()
    with pytest.raises(QueryError):
        without_guard(postgres_database, sql)
    assert postgres_state() == before


# --- benign statements: the same rows as without a guard


def comparable(rows: list[Any]) -> Counter[str]:
    """Count rows; sqlglot writes date_part as EXTRACT, whose numbers are of another type."""
    return Counter(
        repr([float(cell) if isinstance(cell, Decimal) else cell for cell in row]) for row in rows
    )


def test_benign_statements_give_the_same_rows_on_sqlite(
    sqlite_database: ReadOnlyDatabase, benign: Statements, shop: Path
) -> None:
    with closing(sqlite3.connect(shop)) as connection:
        for sql in benign("sqlite"):
            try:
                expected = connection.execute(sql).fetchall()
            except sqlite3.Error as error:  # an older SQLite without the function or syntax
                with pytest.raises(QueryError, match=re.escape(str(error))):
                    sqlite_database.execute(sql)
                continue
            assert comparable(sqlite_database.execute(sql).rows) == comparable(expected), sql


def test_benign_statements_give_the_same_rows_on_postgresql(
    postgres_database: ReadOnlyDatabase, benign: Statements, postgres_url: str
) -> None:
    engine = create_engine(postgres_url)
    with engine.connect().execution_options(no_parameters=True) as connection:
        for sql in benign("postgres"):
            try:
                expected = connection.exec_driver_sql(sql).fetchall()
            except Exception as error:
                connection.rollback()
                if "does not exist" not in str(error) and "operator" not in str(error):
                    raise
                with pytest.raises(QueryError):
                    postgres_database.execute(sql)
                continue
            assert comparable(postgres_database.execute(sql).rows) == comparable(expected), sql
    engine.dispose()


# --- limits


def test_rows_are_limited_and_said_to_be(database: ReadOnlyDatabase) -> None:
    result = limited(database, rows=3).execute("SELECT name FROM customers ORDER BY id")
    assert (result.columns, len(result.rows), result.truncated) == (["name"], 3, True)
    result = limited(database, rows=4).execute("SELECT name FROM customers ORDER BY id")
    assert (result.rows[0], len(result.rows), result.truncated) == (("Ada",), 4, False)


def test_endless_rows_are_left_in_the_database(database: ReadOnlyDatabase) -> None:
    result = database.execute(ENDLESS.format("i"))
    assert len(result.rows) == 1_000
    assert result.truncated


@pytest.mark.parametrize("what", ["count(*)", "max(i)"])
def test_a_query_that_runs_for_ever_is_stopped(database: ReadOnlyDatabase, what: str) -> None:
    with pytest.raises(QueryTimeoutError, match=r"longer than 0\.3 seconds"):
        limited(database, timeout=0.3).execute(ENDLESS.format(what))
    assert limited(database).execute("SELECT 1").rows == [(1,)]


def test_long_cells_are_cut_or_refused(
    sqlite_database: ReadOnlyDatabase, postgres_database: ReadOnlyDatabase
) -> None:
    sql = "SELECT replace(replace('aaaaaaaaaaaaaaaaaaaa', 'a', '~'), '~', '~') AS x"
    sql = sql.replace("'~')", f"'{'b' * 60}')", 1).replace("'~', '~'", f"'b', '{'c' * 10}'")
    result = limited(postgres_database, cell=5_000).execute(sql)
    assert (len(result.rows[0][0]), result.truncated) == (5_000, True)
    if hasattr(sqlite3.Connection, "setlimit"):
        with pytest.raises(QueryError, match="more than 5,000 bytes"):
            limited(sqlite_database, cell=5_000).execute(sql)


def test_the_whole_result_is_limited(database: ReadOnlyDatabase) -> None:
    result = limited(database, result=20).execute("SELECT id, name FROM customers")
    assert result.truncated
    assert len(result.rows) < 4


def test_large_rows_are_fetched_one_by_one(postgres_database: ReadOnlyDatabase) -> None:
    size = 3_000_000
    small = "SELECT 'x' AS text UNION ALL "  # the first row says nothing of the others
    sql = f"SELECT repeat('x', {size}) FROM generate_series(1, 20)"
    tracemalloc.start()
    try:
        result = without_guard(limited(postgres_database, cell=10, result=1_000), small + sql)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (len(result.rows), result.truncated) == (21, True)
    assert peak < 7 * size


def test_arrays_and_json_count_with_what_they_hold(postgres_database: ReadOnlyDatabase) -> None:
    for value in (
        "array_agg(repeat('x', 9))",
        "json_build_object('a', json_agg('xxxxxxxxx'::text))",
    ):
        sql = f"SELECT {value} FROM generate_series(1, 9), generate_series(1, 9) g GROUP BY g"
        result = without_guard(limited(postgres_database, result=100), sql)
        assert result.truncated
        assert len(result.rows) < 9


@pytest.mark.parametrize("limit", ["timeout", "rows", "cell", "result"])
@pytest.mark.parametrize("value", [0, float("nan"), float("inf"), 10**10])
def test_limits_are_such_that_databases_take_them(limit: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=limit):
        Limits(**{limit: value})


def test_the_longest_time_is_taken(database: ReadOnlyDatabase) -> None:
    assert limited(database, timeout=1_000_000).execute("SELECT 1").rows == [(1,)]


# --- stopping, threads


def test_cancel_stops_what_runs(database: ReadOnlyDatabase) -> None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            limited(database, timeout=60).execute(ENDLESS.format("count(*)"))
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while thread.is_alive():
        database.cancel()
        thread.join(0.05)
    assert isinstance(caught[0], QueryCancelledError)


def test_a_cancelled_task_stops_its_statement(database: ReadOnlyDatabase) -> None:
    async def story() -> list[Any]:
        limited(database, timeout=60)
        task = asyncio.create_task(database.aexecute(ENDLESS.format("count(*)")))
        while not database._running:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while database._running:
            await asyncio.sleep(0.01)
        return (await database.aexecute("SELECT id FROM customers WHERE id = 2")).rows

    assert asyncio.run(story()) == [(2,)]


def test_threads_share_one_database(database: ReadOnlyDatabase) -> None:
    results: list[Any] = []

    def run(number: int) -> None:
        results.append(database.execute(f"SELECT {number}, count(*) FROM customers").rows[0])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [(number, 4) for number in range(12)]


# --- SQLite files


def test_the_file_may_be_in_use(sqlite_database: ReadOnlyDatabase, shop: Path) -> None:
    with closing(sqlite3.connect(shop, isolation_level=None)) as app:
        app.execute("BEGIN IMMEDIATE")
        app.execute("DELETE FROM customers")
        assert sqlite_database.execute("SELECT count(*) FROM customers").rows == [(4,)]
        app.execute("COMMIT")
    assert sqlite_database.execute("SELECT count(*) FROM customers").rows == [(0,)]


def test_a_locked_file_is_named(
    sqlite_database: ReadOnlyDatabase, shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ft_text2sql.sqlite_access._LOCK_SECONDS", 0.1)
    with closing(sqlite3.connect(shop, isolation_level=None)) as app:
        app.execute("BEGIN EXCLUSIVE")
        with pytest.raises(DatabaseError, match=r"shop\.db: is locked"):
            sqlite_database.execute("SELECT * FROM customers")
        app.execute("ROLLBACK")
    assert sqlite_database.execute("SELECT 1").rows == [(1,)]


def test_waiting_for_a_lock_keeps_to_the_time_limit(
    shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ft_text2sql.sqlite_access._LOCK_SECONDS", 3600)
    database = ReadOnlyDatabase(shop, limits=Limits(timeout=0.2))
    with closing(sqlite3.connect(shop, isolation_level=None)) as app:
        app.execute("BEGIN EXCLUSIVE")
        with pytest.raises(DatabaseError, match="is locked"):
            database.execute("SELECT * FROM customers")


def test_a_name_that_is_no_utf8_stops_nothing(shop: Path) -> None:
    with closing(sqlite3.connect(shop)) as connection:
        connection.executescript("""
            CREATE TABLE odd (a);
            PRAGMA writable_schema = ON;
            UPDATE sqlite_master SET name = CAST(x'ff' AS TEXT), tbl_name = CAST(x'ff' AS TEXT),
              sql = 'CREATE TABLE ' || CAST(x'ff' AS TEXT) || '(a)' WHERE name = 'odd';
        """)
    assert ReadOnlyDatabase(shop).execute("SELECT count(*) FROM customers").rows == [(4,)]


def test_no_file_is_made(tmp_path: Path) -> None:
    path = tmp_path / "gone.db"
    for source in (path, str(path)):
        with pytest.raises(
            ArgumentError, match=r"gone\.db: is no file; name a SQLite file or a URL"
        ):
            ReadOnlyDatabase(source)
    with pytest.raises(DatabaseError, match=r"gone\.db: no such file"):
        ReadOnlyDatabase(f"sqlite:///{path}").as_sql_database()
    assert not path.exists()


def test_a_driver_that_is_missing_is_named() -> None:
    with pytest.raises(ArgumentError, match="needs a driver that is not installed: pymssql"):
        ReadOnlyDatabase("mssql+pymssql://me:secret@host/shop")


def test_what_is_no_database_is_named(
    sqlite_database: ReadOnlyDatabase, shop: Path, tmp_path: Path
) -> None:
    shop.unlink()
    with pytest.raises(DatabaseError, match=r"shop\.db: no such file"):
        sqlite_database.execute("SELECT 1")
    assert not shop.exists()
    shop.write_text("not a database, but long enough to be looked at" * 10)
    with pytest.raises(DatabaseError, match="is no SQLite database"):
        sqlite_database.execute("SELECT * FROM customers")
    with pytest.raises(DatabaseError, match="is a folder"):
        ReadOnlyDatabase(f"sqlite:///{tmp_path}").execute("SELECT 1")


def test_a_file_that_is_read_only_on_disk_can_be_read(
    sqlite_database: ReadOnlyDatabase, shop: Path
) -> None:
    os.chmod(shop, 0o444)
    assert sqlite_database.execute("SELECT count(*) FROM orders").rows == [(4,)]


def test_a_file_in_wal_mode_can_be_read_while_the_app_writes(
    sqlite_database: ReadOnlyDatabase, shop: Path
) -> None:
    with closing(sqlite3.connect(shop, isolation_level=None)) as app:
        app.execute("PRAGMA journal_mode = WAL")
        app.execute("INSERT INTO customers (id, name) VALUES (9, 'Ivy')")
        assert sqlite_database.execute("SELECT count(*) FROM customers").rows == [(5,)]
    assert sqlite_database.execute("SELECT count(*) FROM customers").rows == [(5,)]


def test_text_that_is_not_utf8_is_read(shop: Path, sqlite_database: ReadOnlyDatabase) -> None:
    with closing(sqlite3.connect(shop)) as app, app:
        app.execute("UPDATE customers SET name = CAST(x'C3284E' AS TEXT) WHERE id = 1")
    assert sqlite_database.execute("SELECT name FROM customers WHERE id = 1").rows == [
        ("\ufffd(N",)
    ]


def test_a_view_shows_a_table_that_is_not_listed(shop: Path) -> None:
    database = ReadOnlyDatabase(f"sqlite:///{shop}", tables=["rich"])
    assert database.execute("SELECT name FROM rich").rows == [("Ada",)]
    with pytest.raises(UnsafeSQLError):
        without_guard(database, "SELECT name FROM customers")


# --- SQLite in memory


def test_a_database_in_memory_is_copied_and_left_alone() -> None:
    engine = create_engine(
        "sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}
    )
    database = ReadOnlyDatabase(engine)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE t (a)"))
    with engine.connect() as connection:  # the app's transaction is open meanwhile
        connection.execute(text("INSERT INTO t VALUES (1)"))
        if hasattr(sqlite3.Connection, "serialize"):
            assert database.execute("SELECT a FROM t").rows == [(1,)]
            assert asyncio.run(database.aexecute("SELECT a FROM t")).rows == [(1,)]
        with pytest.raises(SQLError):
            without_guard(database, "DELETE FROM t")
        connection.commit()
    with engine.connect() as connection:
        connection.execute(text("INSERT INTO t VALUES (2)"))
        connection.rollback()
    assert database.execute("SELECT a FROM t").rows == [(1,)]
    with engine.connect() as connection:
        assert connection.execute(text("SELECT a FROM t")).fetchall() == [(1,)]


def test_the_usual_pool_of_a_database_in_memory_works_too() -> None:
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE t AS SELECT 5 AS a"))
        assert ReadOnlyDatabase(engine).execute("SELECT a FROM t").rows == [(5,)]


# --- PostgreSQL


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg", ""])
def test_any_driver_of_postgresql_will_do(postgres_url: str, driver: str) -> None:
    name = f"postgresql+{driver}" if driver else "postgresql"
    database = ReadOnlyDatabase(make_url(postgres_url).set(drivername=name))
    assert database.execute("SELECT name FROM customers WHERE id = 1").rows == [("Ada",)]
    with pytest.raises(QueryError, match="does not exist"):
        database.execute("SELECT nosuch FROM customers")
    with pytest.raises(QueryTimeoutError):
        without_guard(limited(database, timeout=0.3), "SELECT pg_sleep(60)")
    assert limited(database).execute("SELECT 1").rows == [(1,)]
    database.close()


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_value_that_python_cannot_hold_is_the_querys_fault(
    postgres_url: str, driver: str
) -> None:
    database = ReadOnlyDatabase(make_url(postgres_url).set(drivername=f"postgresql+{driver}"))
    values = ["date '0044-03-15 BC'", "'10000-01-01'::date", "interval '100000000 years'"]
    values += ["timestamp 'infinity'"] if driver == "psycopg" else []
    for value in values:
        with pytest.raises(QueryError, match=r"that Python cannot hold .*; cast it to text"):
            without_guard(database, f"SELECT {value}")
        assert without_guard(database, f"SELECT ({value})::text").rows
    borrowed = database._access._pool.connect()  # type: ignore[attr-defined]
    line = borrowed.dbapi_connection.fileno()
    borrowed.close()
    with socket.socket(fileno=os.dup(line)) as opened:
        opened.shutdown(socket.SHUT_RDWR)
    with pytest.raises(DatabaseError, match="lost the connection"):
        database.execute("SELECT 1")
    assert database.execute("SELECT 1").rows == [(1,)]
    database.close()


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_an_engine_that_commits_by_itself_is_read_in_a_transaction(
    postgres_url: str, driver: str
) -> None:
    url = make_url(postgres_url).set(drivername=f"postgresql+{driver}")
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    database = ReadOnlyDatabase(engine)
    for _ in range(2):
        assert database.execute("SELECT count(*) FROM customers").rows == [(4,)]
        state = without_guard(database, "SELECT current_setting('transaction_read_only')")
        assert state.rows == [("on",)]
    with engine.connect() as connection:
        raw: Any = connection.connection.dbapi_connection
        assert raw.autocommit
    database.close()
    engine.dispose()


@pytest.mark.parametrize("given", ["url", "engine"])
def test_close_ends_its_own_connections_and_none_of_the_apps(postgres_url: str, given: str) -> None:
    url = make_url(postgres_url)
    engine = create_engine(url.update_query_dict({"application_name": f"closed {given}"}))
    database = ReadOnlyDatabase(engine.url if given == "url" else engine)
    database.as_sql_database()
    database.execute("SELECT 1")
    database.close()
    count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = :name"
    other = create_engine(url)
    until = time.monotonic() + HUNG
    wanted = 0 if given == "url" else 1
    while True:  # the server needs a moment to see that a client has gone
        with other.connect() as connection:
            found = connection.execute(text(count), {"name": f"closed {given}"}).scalar()
        if found == wanted or time.monotonic() > until:
            break
        time.sleep(0.05)
    assert found == wanted
    engine.dispose()
    other.dispose()


def test_the_apps_engine_keeps_its_connections_and_settings(postgres_url: str) -> None:
    engine = create_engine(postgres_url, connect_args={"application_name": "shop"})
    database = ReadOnlyDatabase(engine)
    with engine.connect() as connection:
        connection.execute(text("UPDATE customers SET credit = 1 WHERE id = 1"))
        # Another connection does not see what is not committed; nor does it wait for it.
        rows = database.execute("SELECT credit FROM customers WHERE id = 1").rows
        assert rows == [(250.5,)]
        assert connection.execute(text("SELECT credit FROM customers WHERE id = 1")).scalar() == 1
        connection.rollback()
        assert connection.execute(text("SHOW transaction_read_only")).scalar() == "off"
    database.close()
    engine.dispose()


def test_a_server_that_stops_a_query_late_is_stopped_from_here(
    postgres_database: ReadOnlyDatabase,
) -> None:
    sql = "SELECT set_config('statement_timeout', '0', true) FROM generate_series(1, 60)"
    sql += " UNION ALL SELECT pg_sleep(300)::text FROM generate_series(1, 9)"
    with pytest.raises(QueryTimeoutError):
        without_guard(limited(postgres_database, timeout=0.5), sql)


def test_a_server_that_is_not_there_is_said_without_the_password(tmp_path: Path) -> None:
    url = f"postgresql+psycopg2://app:hunter2@/shop?host={tmp_path}"
    database = ReadOnlyDatabase(url)
    with pytest.raises(DatabaseError, match="cannot connect to PostgreSQL") as caught:
        database.execute("SELECT 1")
    assert "hunter2" not in f"{caught.value!r} {caught.value.__cause__!r} {database!r}"
    assert caught.value.__suppress_context__


# --- other databases and sources


def test_other_databases_are_refused_unless_it_is_said(shop: Path) -> None:
    engine = create_engine(f"sqlite:///{shop}")
    engine.dialect.name = "duckdb"  # the dialect of an engine that no driver is installed for
    with pytest.raises(DatabaseError, match="allow_unprotected=True"):
        ReadOnlyDatabase(engine)
    database = ReadOnlyDatabase(engine, tables=["customers"], allow_unprotected=True)
    assert database.dialect == "duckdb"
    assert limited(database, rows=2).execute("SELECT name FROM customers").truncated
    with pytest.raises(UnsafeSQLError):
        database.execute("DELETE FROM customers")
    with pytest.raises(QueryError, match="no such column"):
        database.execute("SELECT nosuch FROM customers")


@pytest.mark.parametrize(
    "source", [3, None, "no url", "nosuch://user:hunter2@host/x", "host=db password=hunter2"]
)
def test_what_is_no_source_is_named(source: Any) -> None:
    with pytest.raises(ArgumentError, match="database") as caught:
        ReadOnlyDatabase(source)
    assert "hunter2" not in str(caught.value)


def test_tables_are_names(shop: Path) -> None:
    with pytest.raises(ArgumentError, match="tables"):
        ReadOnlyDatabase(f"sqlite:///{shop}", tables="customers")


# --- LlamaIndex


def test_a_query_engine_runs_through_the_guard(shop: Path) -> None:
    class Writer(MockLLM):
        def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
            response = super().complete(prompt, formatted, **kwargs)
            response.text = self.system_prompt
            return response

    app = SQLDatabase(create_engine(f"sqlite:///{shop}"), include_tables=["customers"])
    guarded = GuardedSQLDatabase.around(app, limits=Limits(rows=2))
    assert GuardedSQLDatabase.around(guarded) is guarded
    assert guarded.read_only.tables == ["customers"]
    assert guarded.get_single_table_info("customers") == app.get_single_table_info("customers")

    def ask(sql: str) -> Any:
        engine = NLSQLTableQueryEngine(
            guarded,
            llm=Writer(system_prompt=sql),
            tables=["customers"],
            synthesize_response=False,
            embed_model=MockEmbedding(embed_dim=2),
        )
        return engine.query("whatever the question says: DROP TABLE customers")

    answer = ask("```sql\nSELECT name FROM customers ORDER BY id\n```")
    assert answer.metadata["result"] == [("Ada",), ("Bob",)]
    assert answer.metadata["col_keys"] == ["name"]
    for sql in ("DROP TABLE customers", "SELECT * FROM secrets", "SELECT 1; DELETE FROM customers"):
        assert "the statement" in str(ask(sql))
        with pytest.raises(UnsafeSQLError):
            guarded.run_sql(sql)
    with pytest.raises(ArgumentError, match="read-only"):
        guarded.insert_into_table("customers", {"id": 7})
    assert app.run_sql("SELECT count(*) FROM customers")[1]["result"] == [(4,)]


def test_a_guarded_database_describes_its_tables(database: ReadOnlyDatabase) -> None:
    guarded = database.as_sql_database()
    assert isinstance(guarded, SQLDatabase)
    assert list(guarded.get_usable_table_names()) == database.tables
    assert "product name" in guarded.get_single_table_info("Order Items")
    assert guarded.run_sql('SELECT "select" FROM "Order Items"')[0] == "[('a',), ('b',)]"


def test_a_long_chain_of_foreign_keys_is_described(tmp_path: Path) -> None:
    """SQLAlchemy follows them by recursion, unless told otherwise; both ends of it are here."""
    last = 199
    with closing(sqlite3.connect(tmp_path / "chain.db")) as connection:
        connection.execute(f"CREATE TABLE t{last} (id INTEGER PRIMARY KEY)")
        for number in range(last):
            refers = f"next INTEGER REFERENCES t{number + 1}(id)"
            connection.execute(f"CREATE TABLE t{number} (id INTEGER PRIMARY KEY, {refers})")
        connection.execute(f"INSERT INTO t{last} VALUES (7)")
        connection.commit()
    url = f"sqlite:///{tmp_path / 'chain.db'}"
    guarded = ReadOnlyDatabase(url).as_sql_database()
    assert len(list(guarded.get_usable_table_names())) == last + 1
    assert "['next'] -> t4.['id']" in guarded.get_single_table_info("t3")
    assert guarded.run_sql(f"SELECT id FROM t{last}")[0] == "[(7,)]"
    some = ReadOnlyDatabase(url, tables=["t0", "t1"]).as_sql_database()
    assert list(some.metadata_obj.tables) == ["t0", "t1"]


def test_a_schema_of_a_sql_database_is_the_search_path(postgres_url: str) -> None:
    engine = create_engine(postgres_url)
    with engine.begin() as connection:
        connection.execute(text('CREATE SCHEMA IF NOT EXISTS "My Sales"'))
        connection.execute(text('DROP TABLE IF EXISTS "My Sales".customers'))
        connection.execute(text('CREATE TABLE "My Sales".customers AS SELECT 77 AS id'))
    database = ReadOnlyDatabase(SQLDatabase(engine, schema="My Sales"))
    for name in ("customers", '"My Sales".customers'):
        assert database.execute(f"SELECT id FROM {name}").rows == [(77,)]
    with pytest.raises(UnsafeSQLError):
        database.execute("SELECT * FROM public.customers")
    database.close()
    with engine.begin() as connection:
        connection.execute(text('DROP SCHEMA "My Sales" CASCADE'))
    engine.dispose()
