"""Queries as texts: one spelling that means the same, ORDER BY, Spider's levels, absurd input."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ft_core.errors import ArgumentError
from ft_text2sql.comparison import asks_for_order, hardness, normalise_sql
from ft_text2sql.schema import Schema

TABLES = """CREATE TABLE ship (id INT, name TEXT, port INT, crew INT);
CREATE TABLE port (id INT, town TEXT, size INT)"""
SCHEMA = Schema.from_sql(TABLES)


class TestNormalise:
    @pytest.mark.parametrize(
        ("sql", "normal"),
        [
            ("select NAME from Ship ;", "SELECT name FROM ship"),
            ('SELECT "name" FROM [Ship] -- all\n;', "SELECT name FROM ship"),
            ("SELECT s.name AS n FROM ship AS s", "SELECT name FROM ship"),
            ("SELECT s.* FROM ship s", "SELECT * FROM ship"),
            (
                "SELECT s.name AS n FROM ship s ORDER BY n ASC",
                "SELECT name AS n FROM ship ORDER BY n",
            ),
            (
                "SELECT max(s.id) AS id FROM ship s ORDER BY s.id",
                "SELECT MAX(id) FROM ship ORDER BY id",
            ),
            (
                "SELECT max(s.id) AS id FROM ship s ORDER BY s.id, id",
                "SELECT MAX(id) AS id FROM ship ORDER BY ship.id, id",
            ),
            (
                "SELECT T1.name FROM ship AS T1 INNER JOIN port AS T2 ON T1.port = T2.id",
                "SELECT ship.name FROM ship JOIN port ON ship.port = port.id",
            ),
            (
                "SELECT name FROM ship JOIN port ON port = port.id WHERE town != 'Oslo'",
                "SELECT ship.name FROM ship JOIN port ON ship.port = port.id "
                "WHERE port.town <> 'Oslo'",
            ),
            (
                "SELECT a.name, b.name FROM ship a, ship b WHERE a.port = b.port",
                "SELECT t1.name, t2.name FROM ship AS t1, ship AS t2 WHERE t1.port = t2.port",
            ),
            (
                "SELECT a.name FROM ship a LEFT OUTER JOIN port p ON p.id = a.port CROSS JOIN ship",
                "SELECT t1.name FROM ship AS t1 LEFT JOIN port ON port.id = t1.port "
                "CROSS JOIN ship AS t2",
            ),
            ("SELECT 1 FROM ship CROSS JOIN port", "SELECT 1 FROM ship, port"),
            (
                "SELECT a.name FROM ship a WHERE a.crew = (SELECT MAX(b.crew) FROM ship b)",
                "SELECT name FROM ship WHERE crew = (SELECT MAX(crew) FROM ship)",
            ),
            (
                "SELECT a.name FROM ship a WHERE a.crew = "
                "(SELECT MAX(b.crew) FROM ship b WHERE b.port = a.port)",
                "SELECT name FROM ship AS t1 WHERE crew = "
                "(SELECT MAX(crew) FROM ship WHERE port = t1.port)",
            ),
            (
                "SELECT x.n FROM (SELECT s.crew AS n FROM ship s) AS x WHERE x.n > 3",
                "SELECT n FROM (SELECT crew AS n FROM ship) AS t1 WHERE n > 3",
            ),
            (
                "WITH q AS (SELECT s.id AS z FROM ship s) SELECT w.z FROM q w",
                "WITH q AS (SELECT id AS z FROM ship) SELECT z FROM q",
            ),
            (
                "SELECT s.id FROM ship s UNION SELECT p.id AS q FROM port p",
                "SELECT id FROM ship UNION SELECT id AS q FROM port",
            ),
            (
                "SELECT name FROM ship WHERE (id) = 1 AND (crew > 2) AND NOT name IN ('a') "
                "AND name IS NOT NULL AND NOT name LIKE 'b%' AND NOT (id = 3 OR id = 4)",
                "SELECT name FROM ship WHERE id = 1 AND crew > 2 AND name NOT IN ('a') "
                "AND name IS NOT NULL AND name NOT LIKE 'b%' AND NOT (id = 3 OR id = 4)",
            ),
            ('SELECT "order", foo(id) FROM t', 'SELECT "order", FOO(id) FROM t'),
            ("SELECT 'It''s  A' FROM ship", "SELECT 'It''s  A' FROM ship"),
        ],
    )
    def test_what_differs_in_nothing_is_spelt_one_way(self, sql: str, normal: str) -> None:
        assert normalise_sql(sql, "sqlite", SCHEMA) == normal
        assert normalise_sql(normal, "sqlite", SCHEMA) == normal

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("SELECT 'a' FROM ship", "SELECT 'A' FROM ship"),
            ("SELECT name FROM ship WHERE id = 1", "SELECT name FROM ship WHERE id = 2"),
            ("SELECT DISTINCT name FROM ship", "SELECT name FROM ship"),
            ("SELECT a.id FROM ship a, port b", "SELECT b.id FROM ship a, port b"),
            ("SELECT id FROM ship ORDER BY id", "SELECT id FROM ship ORDER BY id DESC"),
            ("SELECT id FROM a LEFT JOIN b ON 1", "SELECT id FROM a JOIN b ON 1"),
            ("SELECT id FROM a UNION SELECT 1", "SELECT id FROM a UNION ALL SELECT 1"),
            ("SELECT (1 + 2) * 3", "SELECT 1 + 2 * 3"),
        ],
    )
    def test_what_differs_stays_different(self, one: str, other: str) -> None:
        assert normalise_sql(one) != normalise_sql(other)

    def test_quoted_capitals_count_where_the_dialect_says_so(self) -> None:
        sql = 'SELECT "Name", "flag" FROM Ship'
        assert normalise_sql(sql, "postgres") == 'SELECT "Name", flag FROM ship'
        assert normalise_sql(sql, "postgresql") == normalise_sql(sql, "postgres")
        assert normalise_sql('SELECT `Name` FROM Ship WHERE a = "B"', "mysql") == (
            "SELECT name FROM ship WHERE a = 'B'"
        )

    def test_an_empty_text_in_double_quotes_is_kept(self) -> None:
        """SQLite takes it for a value, sqlglot for a name."""
        sql = 'SELECT name FROM ship WHERE flag <> ""'
        assert normalise_sql(sql) == sql
        assert normalise_sql(sql, "postgres") == sql

    def test_what_is_no_query_is_compared_as_text(self) -> None:
        assert normalise_sql(" SELEC  name\nFROM ship; ") == "SELEC name FROM ship"
        assert normalise_sql("DROP TABLE ship;") == "DROP TABLE ship"
        assert normalise_sql("SELECT 1; SELECT 2") == "SELECT 1; SELECT 2"
        with pytest.raises(ArgumentError, match="dialect: 'klingon' is unknown to sqlglot"):
            normalise_sql("SELECT 1", "klingon")


CONDITIONS = st.recursive(
    st.sampled_from(
        [
            "a.crew > 2",
            "a.name LIKE 'f%'",
            "a.port IS NULL",
            "a.id IN (1, 3)",
            "a.id = a.port",
            "EXISTS (SELECT 1 FROM port p WHERE p.id = a.port AND p.size > a.crew)",
            "a.crew = (SELECT MAX(b.crew) FROM ship b WHERE b.port = a.port)",
        ]
    ),
    lambda inner: st.one_of(
        inner.map(lambda one: f"NOT ({one})"),
        inner.map(lambda one: f"({one})"),
        st.tuples(inner, st.sampled_from(["AND", "OR"]), inner).map(" ".join),
    ),
    max_leaves=6,
)
SHAPES = st.sampled_from(
    [
        "SELECT a.id AS x, a.name FROM ship AS a WHERE {}",
        "SELECT a.name FROM ship a, port b WHERE a.port = b.id AND ({}) ORDER BY a.id",
        "SELECT b.town, COUNT(*) AS n FROM ship a LEFT OUTER JOIN port b ON b.id = a.port WHERE {} "
        "GROUP BY b.town HAVING COUNT(*) > 0 ORDER BY n DESC, b.town",
        "SELECT y.i FROM (SELECT a.id AS i, a.crew AS c FROM ship a WHERE {}) AS y WHERE y.c > 1",
        "SELECT a.id FROM ship a JOIN ship c ON a.port = c.port WHERE {}",
    ]
)


@pytest.fixture(scope="module")
def harbour() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:")
    connection.executescript(TABLES)
    ships: list[Any] = [
        (1, "fram", 1, 4),
        (2, "gjøa", 2, 2),
        (3, "Fjord", 1, 9),
        (4, None, None, 2),
    ]
    connection.executemany("INSERT INTO ship VALUES (?, ?, ?, ?)", ships)
    connection.executemany("INSERT INTO port VALUES (?, ?, ?)", [(1, "Oslo", 5), (2, "Kiel", 1)])
    yield connection
    connection.close()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=SHAPES, condition=CONDITIONS)
def test_the_normal_form_returns_the_same_rows(
    harbour: sqlite3.Connection, shape: str, condition: str
) -> None:
    sql = shape.format(condition)
    normal = normalise_sql(sql, "sqlite", SCHEMA)
    assert " AS a" not in normal  # it was read
    given, found = harbour.execute(sql).fetchall(), harbour.execute(normal).fetchall()
    assert Counter(found) == Counter(given)
    assert normalise_sql(normal, "sqlite", SCHEMA) == normal


@pytest.mark.parametrize(
    ("sql", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t\norder  by a limit 1;", True),
        ("SELECT a FROM t UNION SELECT b FROM u ORDER BY 1", True),
        ("(SELECT a FROM t ORDER BY a)", True),
        ("WITH q AS (SELECT 1) SELECT * FROM q ORDER BY 1", True),
        ("SELECT a FROM t", False),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", False),
        ("SELECT a FROM t WHERE b = (SELECT c FROM u ORDER BY d LIMIT 1)", False),
        ("SELECT RANK() OVER (ORDER BY a) FROM t", False),
        ("SELECT a FROM t WHERE b = 'order by a'", False),
        ("WITH q AS (SELECT 1 ORDER BY 1) SELECT * FROM q", False),
        ("SELEC a FROM t ORDER\nBY a", True),  # not read: Spider's rule
        ("", False),
    ],
)
def test_an_order_is_asked_for_at_the_outermost_level(sql: str, ordered: bool) -> None:
    assert asks_for_order(sql) is ordered


@pytest.mark.parametrize(
    ("sql", "level"),
    [
        # Labels that Spider's own script gave (company_1, and the examples of its README).
        ("SELECT dname FROM department ORDER BY mgr_start_date", "easy"),
        ("SELECT count(*) FROM dependent WHERE sex  =  'F'", "easy"),
        (
            "SELECT t1.dname FROM department AS t1 JOIN dept_locations AS t2 "
            "ON t1.dnumber  =  t2.dnumber WHERE t2.dlocation  =  'Houston'",
            "medium",
        ),
        ("SELECT fname ,  lname FROM employee WHERE salary  >  30000", "medium"),
        ("SELECT fname ,  lname ,  address FROM employee ORDER BY Bdate", "medium"),
        # By the rules of the script.
        ("SELECT a FROM t WHERE b = 1 AND c = 2", "medium"),
        ("SELECT a FROM t WHERE b = 1 OR c = 2", "medium"),
        ("SELECT a, b FROM t WHERE c = 1 OR c = 2", "extra"),
        ("SELECT a, COUNT(*) FROM t JOIN u ON t.x = u.y GROUP BY a", "medium"),
        ("SELECT a FROM t WHERE b = 1 ORDER BY c LIMIT 1", "hard"),
        ("SELECT a FROM t WHERE b LIKE 'x' GROUP BY c ORDER BY d LIMIT 1", "extra"),
        ("SELECT a FROM t UNION SELECT b FROM u", "hard"),
        ("SELECT a FROM t UNION SELECT b FROM u WHERE c = 1 ORDER BY d LIMIT 2", "hard"),
        ("SELECT a FROM t WHERE b = (SELECT MAX(b) FROM t)", "hard"),
        ("SELECT a FROM t WHERE b IN (SELECT b FROM u WHERE c IN (SELECT c FROM v))", "hard"),
        ("SELECT a FROM t WHERE b IN (SELECT b FROM u) AND c IN (SELECT c FROM v)", "extra"),
        ("SELECT a FROM t WHERE b IN (SELECT b FROM u) INTERSECT SELECT a FROM w", "extra"),
        ("SELECT a FROM (SELECT a FROM t WHERE b = 1 AND c = 2 ORDER BY d LIMIT 3) AS x", "easy"),
        ("SELECT a, b FROM t WHERE c NOT IN (1) AND d NOT LIKE 'x' GROUP BY a, b", "extra"),
        ("SELECT a, MAX(b), MIN(c) FROM t WHERE d = 1 AND e = 2", "hard"),
        ("SELECT a FROM t GROUP BY a HAVING COUNT(*) > 1 AND MAX(b) > 2 AND MIN(c) > 3", "medium"),
        ("SELECT (SELECT 1) FROM t", "hard"),
        ("WITH q AS (SELECT 1) SELECT a FROM q", "hard"),
        ("SELECT a FROM t, u, v WHERE t.b = u.b", "hard"),
        ("this is no SQL", "extra"),
    ],
)
def test_hardness_is_spiders(sql: str, level: str) -> None:
    assert hardness(sql) == level


@pytest.mark.parametrize(
    "absurd",
    [
        "(" * 20_000 + ")" * 20_000,
        "SELECT a FROM t WHERE " + " AND ".join(["a = 1"] * 1_000),
        "SELECT " + " UNION SELECT ".join(["1"] * 500),
        "SELECT " + "ARRAY[" * 30 + "1" + "]" * 30,
        "SELECT " + "f(" * 5_000 + "1" + ")" * 5_000,
        "SELECT 1 " + "FROM (SELECT 1 " * 400 + ")" * 400,
        "SELECT " + "CASE WHEN a THEN " * 500 + "1" + " END" * 500,
        "SELECT " + "NOT " * 5_000 + "1",
        "SELECT " + "x" * 1_000_000,
        "SELECT 'no end",
        "SELECT \x00 FROM t",
        "\ud800",
    ],
    ids=lambda sql: sql[:24].encode("ascii", "backslashreplace").decode(),
)
def test_absurd_statements_have_an_answer(absurd: str) -> None:
    for dialect in ("sqlite", "postgres"):
        assert isinstance(normalise_sql(absurd, dialect), str)
        assert asks_for_order(absurd, dialect) is False
        assert hardness(absurd, dialect) in ("easy", "medium", "hard", "extra")
