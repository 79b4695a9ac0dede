from __future__ import annotations

import string
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_core.errors import ArgumentError
from ft_text2sql.errors import InvalidSQLError, SchemaError, UnsafeSQLError
from ft_text2sql.guard import check_schema, check_select, table_names

Statements = Callable[[str], list[str]]
DIALECTS = ["sqlite", "postgres"]
PARTS = [
    *("SELECT", "WITH", "AS", "(", ")", ",", ";", "*", "FROM", "secrets", "customers", "DELETE"),
    *("UPDATE", "DROP", "TABLE", "INTO", "1", "'x'", '"', "--", "/*", "*/", "$$", "IN", "UNION"),
    *("x", "AND", "CASE", "WHEN", "END", "[", "]", "::", "pg_sleep", "load_extension"),
]
SCHEMA = {
    "customers": ["id", "name", "city", "credit"],
    "orders": ["id", "customer_id", "amount"],
    "Order Items": ["order_id", "product name", "select"],
}


def reason(sql: str, dialect: str = "sqlite", **options: list[str]) -> str:
    with pytest.raises(UnsafeSQLError) as caught:
        check_select(sql, dialect=dialect, **options)
    return caught.value.reason


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_hostile_statement_is_refused_in_one_sentence(
    dialect: str, hostile: Statements, tables: list[str]
) -> None:
    statements = hostile(dialect)
    assert len(statements) >= 250
    passed, reasons = [], []
    for statement in statements:
        try:
            passed.append(check_select(statement, dialect=dialect, tables=tables))
        except UnsafeSQLError as error:
            reasons.append(error.reason)
    odd = [each for each in reasons if "\n" in each or len(each) > 400]
    assert odd == [each for each in reasons if not each.startswith("the statement ")] == []
    assert passed == []


@pytest.mark.parametrize("dialect", DIALECTS)
def test_benign_statements_pass_and_are_a_fixed_point(
    dialect: str, benign: Statements, tables: list[str]
) -> None:
    statements = benign(dialect)
    assert len(statements) >= 100
    for statement in statements:
        checked = check_select(statement, dialect=dialect, tables=tables)
        assert check_select(checked, dialect=dialect, tables=tables) == checked


def test_comments_odd_blanks_and_dollar_quotes_do_not_reach_the_database() -> None:
    sql = 'SELECT/*!50000 1 */\u00a0$$a\'b$$ -- c\nAS "x"'
    assert check_select(sql, dialect="postgres") == "SELECT 'a''b' AS \"x\""


def test_a_comma_stays_a_join_that_sqlite_may_reorder() -> None:
    checked = check_select("SELECT * FROM a, b WHERE a.x = b.x", dialect="sqlite")
    assert "CROSS" not in checked


def test_without_a_list_all_but_the_systems_tables_may_be_read() -> None:
    assert check_select("SELECT * FROM anything", dialect="sqlite")
    assert "system" in reason("SELECT * FROM sqlite_master")
    assert "system" in reason("SELECT * FROM pg_user", "postgres")
    assert "of a schema" in reason("SELECT * FROM main.customers")


def test_listed_schemas_functions_and_system_tables_are_the_users_choice() -> None:
    tables = ["sales.orders", "pg_stat_statements"]
    for name in tables:
        assert check_select(f"SELECT * FROM {name}", dialect="postgres", tables=tables)
    assert "not among" in reason("SELECT * FROM orders", "postgres", tables=tables)
    assert "score" in reason("SELECT score(1)")
    assert check_select("SELECT Score(1)", dialect="sqlite", functions=["score"])
    assert "qualified" in reason("SELECT s.score(1)", "postgres", functions=["score"])


def test_names_are_compared_as_the_database_compares_them() -> None:
    assert check_select('SELECT * FROM "CUSTOMERS"', dialect="sqlite", tables=["customers"])
    assert check_select("SELECT * FROM CUSTOMERS", dialect="postgres", tables=["customers"])
    assert reason('SELECT * FROM "CUSTOMERS"', "postgres", tables=["customers"])
    assert reason("SELECT * FROM Customers", "postgres", tables=["Customers"])
    # The Kelvin sign is no k, though str.lower says so.
    assert reason("SELECT * FROM \u212aeys", tables=["keys"])
    assert reason("WITH \u212aeys AS (SELECT 1) SELECT * FROM keys", tables=["x"])


def test_the_reason_names_what_is_near() -> None:
    said = reason("SELECT * FROM custmers", tables=["customers", "orders"])
    assert said == (
        "the statement reads 'custmers', which is not among the tables that may be read; "
        "did you mean 'customers'?"
    )


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("SELECT 1; SELECT 2", "several statements"),
        ("DELETE FROM t", "begins with 'DELETE'"),
        ("WITH a AS (DELETE FROM t RETURNING *) SELECT * FROM a", "a DELETE"),
        ("SELECT * INTO x FROM t", "INTO"),
        ("SELECT * FROM t FOR UPDATE", "FOR UPDATE"),
        ("SELECT lo_import('x')", "calls the function lo_import"),
        ("SELECT $1", "parameter"),
        ("SELECT '\0'", "U+0000"),
        ("", "no statement"),
        ("SELECT 'x", "no end"),
        ("SELECT ((((1", "not valid postgres SQL"),
        ("SELECT " + "(" * 60 + "1" + ")" * 60, "nested too deeply"),
        ("SELECT " + "ARRAY[" * 20 + "1" + "]" * 20, "too hard to read"),
        ("SELECT 1" + "+1" * 4000, "nested too deeply"),
        ("SELECT '" + "x" * 100_000 + "'", "100,009 characters"),
        ("SELECT lpad('x', 1000000000)", "pads"),
    ],
)
def test_the_reason_says_what_is_wrong(sql: str, words: str) -> None:
    assert words in reason(sql, "postgres")


def test_what_does_not_parse_has_its_own_error() -> None:
    with pytest.raises(InvalidSQLError, match="line 1, column"):
        check_select("SELECT FROM WHERE", dialect="postgres")


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match="dialect"):
        check_select("SELECT 1", dialect="nosuch")
    with pytest.raises(ArgumentError, match="tables"):
        check_select("SELECT 1", dialect="sqlite", tables="customers")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(PARTS) | st.text(string.printable, max_size=3),
        max_size=14,
    ),
    st.sampled_from(DIALECTS),
)
def test_whatever_passes_is_one_select_of_listed_tables(parts: list[str], dialect: str) -> None:
    sql = "SELECT " + " ".join(parts)
    try:
        checked = check_select(sql, dialect=dialect, tables=["customers"])
    except UnsafeSQLError:
        return
    assert checked.lstrip("(").startswith(("SELECT", "WITH"))
    assert {name.lower() for name in table_names(checked, dialect=dialect)} <= {"customers"}


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT name, c.city FROM customers c JOIN orders o ON o.customer_id = c.id",
        "SELECT CUSTOMERS.Name FROM Customers",
        "SELECT t.total FROM (SELECT sum(amount) AS total FROM orders) t WHERE total > 1",
        "SELECT x.name FROM (SELECT * FROM customers) x",
        "WITH a(n) AS (SELECT name FROM customers) SELECT n FROM a",
        "SELECT name FROM customers c WHERE EXISTS (SELECT 1 FROM orders WHERE customer_id = c.id)",
        "SELECT credit AS k FROM customers GROUP BY k HAVING k > 1 ORDER BY k",
        'SELECT "product name" FROM "Order Items" WHERE "select" = \'a\'',
        'SELECT rowid FROM customers WHERE city = "Oslo"',
        "SELECT j.value FROM customers, json_each(customers.name) AS j",
        "SELECT id FROM customers UNION SELECT customer_id FROM orders ORDER BY id",
    ],
)
def test_a_schema_check_passes_what_exists(sql: str) -> None:
    check_schema(sql, SCHEMA, "sqlite")


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("SELECT nam FROM customers", "no column 'nam'; did you mean 'name'?"),
        ("SELECT c.amount FROM customers c", "no column 'amount' in 'c'"),
        ("SELECT * FROM custmers", "no table 'custmers'; did you mean 'customers'?"),
        ("SELECT o.id FROM customers c", "names 'o', which is neither"),
        ("SELECT t.nope FROM (SELECT id FROM orders) t", "no column 'nope' in 't'"),
        ("WITH a AS (SELECT id FROM orders) SELECT amount FROM a", "no column 'amount'"),
        ("SELECT id FROM customers WHERE id IN (SELECT custmer_id FROM orders)", "customer_id"),
    ],
)
def test_a_schema_check_names_what_is_missing_and_what_is_near(sql: str, words: str) -> None:
    with pytest.raises(SchemaError) as caught:
        check_schema(sql, SCHEMA, "sqlite")
    assert words in caught.value.reason


@pytest.mark.parametrize(
    "sql",
    [
        'SELECT max("grosse") FROM t',
        'SELECT "grosse" FROM t',
        'SELECT name, ("grosse") AS g FROM t',
        'SELECT name FROM t ORDER BY "grosse"',
        'SELECT count(*) FROM t GROUP BY "grosse"',
        'SELECT count(DISTINCT "grosse") FROM t',
        'SELECT name FROM t WHERE "grosse" > 5',
        "SELECT name FROM t WHERE \"grosse\" IN ('a', 'b')",
        'SELECT name FROM t WHERE ("grosse") BETWEEN 1 AND 2',
    ],
)
def test_text_in_double_quotes_is_no_column_where_text_makes_no_sense(sql: str) -> None:
    with pytest.raises(SchemaError, match="there is no column 'grosse'"):
        check_schema(sql, {"t": ["name", "größe"]}, "sqlite")


@pytest.mark.parametrize(
    "condition",
    [
        'name = "Oslo"',
        '"Oslo" = name',
        'name LIKE "O%"',
        'name IN ("Oslo", "Lund")',
        'name BETWEEN "A" AND "M"',
        'lower(name) = lower("Oslo")',
        'name || "x" = (SELECT max(name) FROM t)',
        'coalesce(name, "none") = "Oslo"',
    ],
)
def test_text_in_double_quotes_is_text_to_sqlite(condition: str) -> None:
    check_schema(f"SELECT name FROM t WHERE {condition}", {"t": ["name", "größe"]}, "sqlite")


def test_a_column_in_double_quotes_must_exist_in_postgresql() -> None:
    with pytest.raises(SchemaError, match="Oslo"):
        check_schema('SELECT id FROM customers WHERE city = "Oslo"', SCHEMA, "postgres")


def test_reading_the_names_of_a_statement_that_is_too_deep() -> None:
    terms = "SELECT id FROM customers WHERE " + " OR ".join(f"id = {n}" for n in range(2000))
    with pytest.raises(UnsafeSQLError, match="nested too deeply"):
        check_schema(terms, SCHEMA, "sqlite")
    with pytest.raises(UnsafeSQLError, match="nested too deeply"):
        list(table_names(terms, dialect="sqlite"))
