"""Schemas: odd names read and written, live databases, prompts, 500 tables."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llama_index.core import SQLDatabase
from sqlalchemy import Engine, create_engine

from ft_core.errors import ArgumentError, DatasetError
from ft_text2sql.identifiers import quote_name
from ft_text2sql.schema import Column, ForeignKey, Schema, Table

ODD = '''-- a comment with (brackets; and a semicolon
CREATE TABLE IF NOT EXISTS "home port" (
  "pier no" text NOT NULL DEFAULT '(x', [c d] CHARACTER VARYING(20) UNIQUE,
  order int PRIMARY KEY, group VARCHAR, `q``z` double precision CHECK (q > 0),
  länge DECIMAL(10, 2) DEFAULT (1+2), key TEXT, index VARCHAR(9), "say ""hi""" BLOB,
  primary INT, unique VARCHAR, check text, city
) WITHOUT ROWID;
INSERT INTO x VALUES ('CREATE TABLE no (a INT)');
CREATE INDEX i ON t (a);
CREATE TEMP TABLE harbour.ship (
  a INT REFERENCES "home port" (order) ON DELETE CASCADE, b INTEGER, c TEXT,
  PRIMARY KEY (a, b), CONSTRAINT fk FOREIGN KEY (b, c) REFERENCES harbour.crew, UNIQUE (a),
  CHECK (a > 1), KEY by_a (a)
)
CREATE TABLE crew (x int)'''


class TestFromSQL:
    def test_odd_names_types_and_keys_are_read(self) -> None:
        port, ship, crew = Schema.from_sql(ODD).tables
        assert port.name == "home port"
        assert [(column.name, column.type) for column in port.columns] == [
            ("pier no", "text"),
            ("c d", "CHARACTER VARYING(20)"),
            ("order", "int"),
            ("group", "VARCHAR"),
            ("q`z", "double precision"),
            ("länge", "DECIMAL(10, 2)"),
            ("key", "TEXT"),
            ("index", "VARCHAR(9)"),
            ('say "hi"', "BLOB"),
            ("primary", "INT"),
            ("unique", "VARCHAR"),
            ("check", "text"),
            ("city", ""),
        ]
        assert port.primary_key == ("order",)
        assert (ship.name, ship.namespace, ship.primary_key) == ("ship", "harbour", ("a", "b"))
        assert ship.foreign_keys == (
            ForeignKey(("a",), "home port", ("order",)),
            ForeignKey(("b", "c"), "crew", (), "harbour"),
        )
        assert [column.name for column in ship.columns] == ["a", "b", "c"]
        assert crew == Table("crew", (Column("x", "int"),))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "there is no CREATE TABLE statement; write one"),
            ("SELECT 1; CREATE VIEW v AS SELECT 2", "there is no CREATE TABLE statement"),
            ("CREATE TABLE ship", "CREATE TABLE ship: has no columns in brackets"),
            ("CREATE TABLE ship AS SELECT 1", "CREATE TABLE ship: has no columns in brackets"),
            ("CREATE TABLE ship (a INT", "CREATE TABLE ship: does not end"),
            ("CREATE TABLE ship (PRIMARY KEY (a))", "CREATE TABLE ship: has no columns"),
            ("CREATE TABLE ship (a TEXT DEFAULT 'x)", "a quote or a comment does not end"),
        ],
    )
    def test_what_is_no_table_is_named(self, text: str, message: str) -> None:
        with pytest.raises(DatasetError) as error:
            Schema.from_sql(text)
        assert str(error.value).startswith(message)

    def test_a_table_twice_and_an_unknown_dialect_are_refused(self) -> None:
        with pytest.raises(ArgumentError, match="tables: 'a' stands twice; keep one"):
            Schema.from_sql("CREATE TABLE a (x INT); CREATE TABLE a (y INT)")
        with pytest.raises(ArgumentError, match="dialect: 'klingon' is unknown to sqlglot; write"):
            Schema.from_sql("CREATE TABLE a (x INT)", "klingon")


class TestToText:
    def test_lines_are_short_and_quote_what_needs_it(self) -> None:
        assert Schema.from_sql(ODD).to_text().splitlines() == [
            '"home port"("pier no", "c d", "order", "group", "q`z", "länge", "key", "index", '
            '"say ""hi""", "primary", "unique", "check", city)',
            "harbour.ship(a, b, c)",
            "crew(x)",
        ]

    def test_capitals_need_quotes_where_case_counts(self) -> None:
        tables = (Table("Ship", (Column("Name"), Column("Order"), Column("flag"))),)
        assert Schema(tables, "sqlite").to_text() == 'Ship(Name, "Order", flag)'
        assert Schema(tables, "mysql").to_text() == "Ship(Name, `Order`, flag)"
        assert Schema(tables, "postgresql").to_text() == '"Ship"("Name", "Order", flag)'

    def test_statements_hold_everything(self) -> None:
        schema = Schema.from_sql(ODD)
        assert Schema.from_sql(schema.to_text("create")) == schema
        assert schema.to_text("create", ["SHIP"]) == (
            "CREATE TABLE harbour.ship (a INT, b INTEGER, c TEXT, PRIMARY KEY (a, b), FOREIGN KEY "
            '(a) REFERENCES "home port" ("order"), FOREIGN KEY (b, c) REFERENCES harbour.crew);'
        )

    @settings(deadline=None)
    @example(["a\n"])  # SQLAlchemy takes it for a name that needs no quotes
    @given(
        st.lists(
            st.text(
                st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1
            ),
            min_size=1,
            unique_by=lambda name: name.casefold(),
        )
    )
    def test_any_name_is_one_that_sqlite_takes_and_gives_back(self, names: list[str]) -> None:
        columns = tuple(Column(name, "TEXT") for name in names)
        schema = Schema((Table("t " + names[0], columns, (names[-1],)),))
        text = schema.to_text("create")
        assert Schema.from_sql(text) == schema
        with sqlite3.connect(":memory:") as connection:
            connection.execute(text)
            table = quote_name("t " + names[0], "sqlite")
            found = connection.execute(f"SELECT * FROM {table}")
            assert [column[0] for column in found.description] == names
        connection.close()

    def test_some_tables_stand_in_the_schemas_order(self) -> None:
        schema = Schema.from_sql("CREATE TABLE a (x INT); CREATE TABLE b (x INT)")
        assert schema.to_text(tables=["B", "a"]) == "a(x)\nb(x)"
        with pytest.raises(ArgumentError, match="tables: there is no table 'c'; there are a, b"):
            schema.to_text(tables=["a", "c"])
        with pytest.raises(ArgumentError, match='style: is "lines" or "create", not \'json\''):
            schema.to_text("json")  # type: ignore[arg-type]

    def test_names_are_found_in_any_case_and_exact_ones_first(self) -> None:
        schema = Schema((Table("Ship", (Column("A"),)), Table("ship", (Column("b"),))), "postgres")
        assert schema.has_column("Ship", "a")
        assert schema.has_column("ship", "B")
        assert not schema.has_column("ship", "a")
        assert schema.table("boat") is None
        assert schema.as_mapping() == {"Ship": ["A"], "ship": ["b"]}

    def test_500_tables_are_written_read_and_cut_down(self) -> None:
        columns = tuple(Column(f"col {n}" if n else "order", "TEXT") for n in range(20))
        schema = Schema(tuple(Table(f"Tabelle {n}ß", columns) for n in range(500)))
        assert Schema.from_sql(schema.to_text("create")) == schema
        assert schema.to_text().count("\n") == 499
        assert len(schema.select(f"tabelle {n}ß" for n in range(0, 500, 2)).tables) == 250


@pytest.fixture
def harbour(tmp_path: Path) -> Iterator[Engine]:
    engine = create_engine(f"sqlite:///{tmp_path / 'harbour.sqlite'}")
    with engine.begin() as connection:
        for statement in (
            'CREATE TABLE "Home Port" ("Pier No" INTEGER PRIMARY KEY, länge NUMERIC(8, 2), any)',
            'CREATE TABLE ship (name TEXT, pier INT REFERENCES "Home Port" ("Pier No"))',
            'CREATE TABLE secret ("order" TEXT)',
            "CREATE VIEW long_ship AS SELECT name FROM ship",
        ):
            connection.exec_driver_sql(statement)
    yield engine
    engine.dispose()


class TestFromDatabase:
    def test_sqlite_tables_and_views_with_types_and_keys(self, harbour: Engine) -> None:
        schema = Schema.from_database(harbour)
        assert schema.dialect == "sqlite"
        assert schema.to_text("create").splitlines() == [
            'CREATE TABLE "Home Port" ("Pier No" INTEGER, "länge" NUMERIC(8, 2), any, '
            'PRIMARY KEY ("Pier No"));',
            "CREATE TABLE long_ship (name TEXT);",
            'CREATE TABLE secret ("order" TEXT);',
            'CREATE TABLE ship (name TEXT, pier INTEGER, FOREIGN KEY (pier) REFERENCES "Home Port" '
            '("Pier No"));',
        ]
        names = [table.name for table in Schema.from_database(harbour, views=False).tables]
        assert names == ["Home Port", "secret", "ship"]
        assert Schema.from_database(harbour, ["ship"]).to_text() == "ship(name, pier)"

    def test_of_llama_indexs_database_only_the_usable_tables(self, harbour: Engine) -> None:
        database = SQLDatabase(harbour, ignore_tables=["secret"])
        names = {table.name for table in Schema.from_database(database).tables}
        assert names == {"Home Port", "ship"}
        with pytest.raises(ArgumentError, match="tables: there is no table 'secret'"):
            Schema.from_database(database, ["secret"])

    def test_500_tables_of_a_live_database(self, tmp_path: Path) -> None:
        engine = create_engine(f"sqlite:///{tmp_path / 'large.sqlite'}")
        with engine.begin() as connection:
            for n in range(500):
                connection.exec_driver_sql(f'CREATE TABLE "t {n}" (a INT, "order" TEXT)')
        schema = Schema.from_database(engine)
        engine.dispose()
        assert len(schema.tables) == 500
        assert schema.to_text(tables=["t 499"]) == '"t 499"(a, "order")'

    def test_what_cannot_be_read_is_told_without_the_password(self, tmp_path: Path) -> None:
        gone = create_engine(f"sqlite:///{tmp_path / 'no' / 'such.sqlite'}")
        with pytest.raises(DatasetError, match="the database cannot be read: unable to open"):
            Schema.from_database(gone)
        empty = create_engine("sqlite://")
        with pytest.raises(DatasetError, match="the database has no table that can be read"):
            Schema.from_database(empty)
        closed = create_engine("postgresql+psycopg2://reader:hunter2@127.0.0.1:1/shop")
        with pytest.raises(DatasetError, match="the database cannot be read") as error:
            Schema.from_database(closed)
        assert "hunter2" not in str(error.value)
        for wrong in ("sqlite://", None):
            with pytest.raises(ArgumentError, match="database: is a SQLAlchemy engine or Llama"):
                Schema.from_database(wrong)

    def test_what_is_no_database_file_is_told(self, tmp_path: Path) -> None:
        path = tmp_path / "text.sqlite"
        path.write_text("this is no database\n" * 100)
        engine = create_engine(f"sqlite:///{path}")
        with pytest.raises(DatasetError, match="cannot be read: file is not a database"):
            Schema.from_database(engine)
        engine.dispose()


@pytest.fixture
def postgres(postgres_url: str) -> Iterator[Engine]:
    """A database of its own on the server of the other tests."""
    server = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.exec_driver_sql("CREATE DATABASE harbour")
    engine = create_engine(server.url.set(database="harbour"))
    yield engine
    engine.dispose()
    with server.connect() as connection:
        connection.exec_driver_sql("DROP DATABASE harbour")
    server.dispose()


def test_postgresql_names_types_keys_and_namespaces(postgres: Engine) -> None:
    with postgres.begin() as connection:
        for statement in (
            'CREATE TABLE "Port" (id SERIAL PRIMARY KEY, "Größe" double precision, "user" text)',
            "CREATE SCHEMA sales",
            'CREATE TABLE sales.bill (port INT REFERENCES public."Port" (id), at timestamptz)',
            'CREATE MATERIALIZED VIEW ports AS SELECT id FROM "Port"',
        ):
            connection.exec_driver_sql(statement)
    schema = Schema.from_database(postgres)
    assert schema.dialect == "postgres"
    assert schema.to_text() == '"Port"(id, "Größe", "user")\nports(id)'
    sales: Any = SQLDatabase(postgres, schema="sales")
    assert Schema.from_database(sales).to_text("create") == (
        "CREATE TABLE sales.bill (port INTEGER, at TIMESTAMP WITH TIME ZONE, "
        'FOREIGN KEY (port) REFERENCES "Port" (id));'
    )
