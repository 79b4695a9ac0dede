"""Readers of published data: values filled in, SQL that runs, and errors that name the place."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ft_core.errors import ArgumentError, DatasetError
from ft_core.metrics import results_match
from ft_text2sql.comparison import asks_for_order, normalise_sql
from ft_text2sql.readers import read_spider, read_sql_create_context, read_text2sql_data
from ft_text2sql.schema import Schema
from ft_text2sql.statements import without_quantifiers

GEOQUERY = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "text2sql"


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def context_row(**fields: Any) -> dict[str, Any]:
    context = "CREATE TABLE ship (name VARCHAR, flag VARCHAR)"
    return {"question": "Which?", "context": context, "answer": "SELECT name FROM ship", **fields}


class TestSQLCreateContext:
    def test_values_come_into_single_quotes_and_names_do_not(self, tmp_path: Path) -> None:
        answers = {
            'SELECT name FROM ship WHERE flag = "King\'s" AND name <> "a ""b"""': (
                "SELECT name FROM ship WHERE flag = 'King''s' AND name <> 'a \"b\"'"
            ),
            'SELECT "name" AS "the name" FROM "ship" ORDER BY "the name"': None,
            'SELECT name FROM ship WHERE "Flag" = \'"x"\'': None,
            'SELECT flag "My Flag" FROM ship "s" WHERE "s"."name" > 1 ORDER BY "My Flag"': None,
            'SELECT 1 FROM (SELECT name AS n FROM ship) AS "sub" WHERE "sub"."n" = 2': None,
            'SELECT "n" FROM (SELECT name n FROM ship)': None,
            # An alias of a table is no column.
            'SELECT s.name FROM ship AS s WHERE s.flag = "S"': (
                "SELECT s.name FROM ship AS s WHERE s.flag = 'S'"
            ),
            # A name of a table that the query does not read is a value.
            'SELECT name FROM ship WHERE flag = "town"': (
                "SELECT name FROM ship WHERE flag = 'town'"
            ),
        }
        context = context_row()["context"] + "; CREATE TABLE port (town VARCHAR)"
        rows = [context_row(answer=answer, context=context) for answer in answers]
        dataset = read_sql_create_context(write(tmp_path / "data.json", rows))
        assert [e.sql for e in dataset] == [fixed or as_is for as_is, fixed in answers.items()]
        assert dataset.examples[1].id == "1"
        assert {e.context for e in dataset} == {context}

    def test_a_context_that_is_no_sql_does_not_matter(self, tmp_path: Path) -> None:
        rows = [context_row(context="ship: name, flag", answer='SELECT name WHERE flag = "x"')]
        (example,) = read_sql_create_context(write(tmp_path / "data.json", rows))
        assert (example.sql, example.context) == (
            "SELECT name WHERE flag = 'x'",
            "ship: name, flag",
        )

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"question": "Which?"}, ": is not a list of entries"),
            ([], ": has no entry"),
            ([context_row(), 3], ": [1]: is not an object"),
            ([context_row(answer=None)], ": [0].answer: is missing"),
            ([context_row(context=" ")], ": [0].context: is ' ', not a text with words"),
            ([context_row(question=7)], ": [0].question: is 7, not a text with words"),
            ([context_row(question="\ud800")], ": [0].question: holds half of a surrogate pair"),
        ],
    )
    def test_bad_entries_are_named(self, tmp_path: Path, content: Any, message: str) -> None:
        path = tmp_path / "data.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(DatasetError) as error:
            read_sql_create_context(path)
        assert str(error.value).startswith(f"{path}{message}")


def spider_tables(**fields: Any) -> dict[str, Any]:
    return {
        "db_id": "fleet",
        "table_names_original": ["Ship", "Port"],
        "column_names_original": [
            [-1, "*"],
            [0, "Ship_ID"],
            [0, "Home Port"],
            [1, "Port_ID"],
            [1, "Order"],
        ],
        "column_types": ["text", "number", "number", "number", "others"],
        "primary_keys": [1, [3, 4]],
        "foreign_keys": [[2, 3]],
        **fields,
    }


def spider_row(**fields: Any) -> dict[str, Any]:
    query = 'SELECT Ship_ID FROM Ship WHERE Ship_ID = "Fram"'
    return {"db_id": "fleet", "question": "Which? ", "query": query, "sql": {}, **fields}


class TestSpider:
    def test_questions_sql_and_schemas(self, tmp_path: Path) -> None:
        write(tmp_path / "tables.json", [spider_tables()])
        write(tmp_path / "train_spider.json", [spider_row(), spider_row(question="And?")])
        write(tmp_path / "dev.json", [spider_row()])
        parts = read_spider(tmp_path)
        assert {name: len(part) for name, part in parts.items()} == {"train": 2, "dev": 1}
        first = parts["train"].examples[0]
        assert first.content() == {
            "id": "train_spider-0",
            "question": "Which?",
            "sql": "SELECT Ship_ID FROM Ship WHERE Ship_ID = 'Fram'",
            "context": 'CREATE TABLE Ship (Ship_ID NUMBER, "Home Port" NUMBER, PRIMARY KEY '
            '(Ship_ID), FOREIGN KEY ("Home Port") REFERENCES Port (Port_ID));\n'
            'CREATE TABLE Port (Port_ID NUMBER, "Order", PRIMARY KEY (Port_ID, "Order"));',
            "database": "fleet",
            "dialect": "sqlite",
        }

    def test_a_database_that_tables_json_lacks_is_read_and_not_touched(
        self, tmp_path: Path
    ) -> None:
        file = tmp_path / "database" / "fleet" / "fleet.sqlite"
        file.parent.mkdir(parents=True)
        with sqlite3.connect(file) as connection:
            connection.execute('CREATE TABLE ship ("home port" TEXT)')
        connection.close()
        before = file.stat().st_mtime_ns, file.read_bytes()
        write(tmp_path / "dev.json", [spider_row()])
        (example,) = read_spider(tmp_path)["dev"]
        assert example.context == 'CREATE TABLE ship ("home port" TEXT);'
        assert (file.stat().st_mtime_ns, file.read_bytes()) == before
        assert [path.name for path in file.parent.iterdir()] == ["fleet.sqlite"]

    @pytest.mark.parametrize(
        ("tables", "row", "message"),
        [
            ({}, {"db_id": "sea"}, "dev.json: [0].db_id: the database 'sea' is neither in tables"),
            ({}, {"db_id": "../fleet"}, "dev.json: [0].db_id: '../fleet' is no name of a folder"),
            ({}, {"db_id": None}, "dev.json: [0].db_id: is missing"),
            ({}, {"query": ""}, "dev.json: [0].query: is ''"),
            (
                {"primary_keys": [9]},
                {},
                "tables.json: [0] (fleet).primary_keys: there is no column 9",
            ),
            (
                {"foreign_keys": [3]},
                {},
                "tables.json: [0] (fleet).foreign_keys: is a list of pairs",
            ),
            (
                {"column_names_original": ["a"]},
                {},
                "tables.json: [0] (fleet).column_names_original[0]: is a table's number and a name",
            ),
            (
                {"column_names_original": [[-1, "*"], [2, "a"]]},
                {},
                "tables.json: [0] (fleet).column_names_original[1]: there is no table 2",
            ),
            (
                {"column_names_original": [[-1, "*"], [-1, "a"]]},
                {},
                "tables.json: [0] (fleet).column_names_original[1]: there is no table -1",
            ),
            (
                {"column_types": {"a": 1}},
                {},
                "tables.json: [0] (fleet).column_types: is not a list",
            ),
            ({"primary_keys": 1}, {}, "tables.json: [0] (fleet).primary_keys: is not a list"),
            ({"primary_keys": [True]}, {}, "tables.json: [0] (fleet).primary_keys: there is no"),
            ({"foreign_keys": 3}, {}, "tables.json: [0] (fleet).foreign_keys: is not a list"),
            (
                {"table_names_original": ["a", "a"]},
                {},
                "tables.json: [0] (fleet): tables: 'a' stands twice",
            ),
        ],
    )
    def test_bad_entries_are_named(
        self, tmp_path: Path, tables: Any, row: Any, message: str
    ) -> None:
        write(tmp_path / "tables.json", [spider_tables(**tables)])
        write(tmp_path / "dev.json", [spider_row(**row)])
        with pytest.raises(DatasetError) as error:
            read_spider(tmp_path)
        assert str(error.value).startswith(f"{tmp_path}/{message}")

    def test_errors_of_the_other_tables_name_their_file(self, tmp_path: Path) -> None:
        write(tmp_path / "tables.json", [spider_tables(db_id="other")])
        path = write(tmp_path / "test_tables.json", [spider_tables(primary_keys=[9])])
        write(tmp_path / "test.json", [spider_row()])
        with pytest.raises(DatasetError, match="no column 9") as error:
            read_spider(tmp_path)
        assert error.value.source == str(path)

    def test_another_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(
            DatasetError, match=r"has none of train_spider.json, .* Spider's folder"
        ):
            read_spider(tmp_path)


CSV = """Table Name, Field Name, Is Primary Key, Is Foreign Key, Type
SHIP, NAME, y, n, varchar(255)
SHIP, ORDER, n, n, int(11)
-, -, -, -, -
PORT, TOWN, y, n, varchar(255)
"""


def entry(*sentences: dict[str, Any], **fields: Any) -> dict[str, Any]:
    given = sentences or (sentence("how long is name0", name0="fram"),)
    return {
        "query-split": "train",
        "sentences": list(given),
        "sql": [
            'SELECT SHIPalias0.LENGTH FROM SHIP AS SHIPalias0 WHERE SHIPalias0.NAME = "name0" ;'
        ],
        "variables": [],
        **fields,
    }


def sentence(text: str, split: str = "train", **variables: str) -> dict[str, Any]:
    return {"question-split": split, "text": text, "variables": variables}


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., Path]:
    return lambda *entries: write(tmp_path / "fleet.json", list(entries))


class TestText2SQLData:
    def test_values_stand_for_variables(self, data: Callable[..., Path]) -> None:
        path = data(
            entry(
                sentence("from port1 to port10", port1='o\'hara "x"', port10="port1"),
                sql='SELECT "port1", "port10", "size0" ;',
                variables=[{"name": "size0", "example": "9", "location": "sql-only"}],
            )
        )
        (example,) = read_text2sql_data(path)["train"]
        assert example.question == 'from o\'hara "x" to port1'
        assert example.sql == "SELECT 'o''hara \"x\"', 'port1', '9'"
        assert (example.id, example.database, example.context) == ("fleet[0][0]", "fleet", "")

    def test_the_two_splits(self, data: Callable[..., Path]) -> None:
        path = data(
            entry(sentence("a", "train"), sentence("b", "test"), sentence("c", "dev")),
            entry(sentence("d", "test"), **{"query-split": "test"}),
        )
        asked = {
            split: {
                part: [example.question for example in dataset]
                for part, dataset in read_text2sql_data(path, split=split).items()
            }
            for split in ("question", "query")
        }
        assert asked["question"] == {"train": ["a"], "test": ["b", "d"], "dev": ["c"]}
        assert asked["query"] == {"train": ["a", "b", "c"], "test": ["d"]}
        with pytest.raises(ArgumentError, match='split: is "question" or "query", not \'word\''):
            read_text2sql_data(path, split="word")  # type: ignore[arg-type]

    def test_the_schema_beside_the_file_or_any_other(self, data: Callable[..., Path]) -> None:
        path = data(entry())
        path.with_name("fleet-schema.csv").write_text(CSV, encoding="utf-8")
        (example,) = read_text2sql_data(path)["train"]
        assert example.context == (
            'CREATE TABLE SHIP (NAME varchar(255), "ORDER" int(11), PRIMARY KEY (NAME));\n'
            "CREATE TABLE PORT (TOWN varchar(255), PRIMARY KEY (TOWN));"
        )
        other = Schema.from_sql("CREATE TABLE ship (name TEXT, length INT)")
        (example,) = read_text2sql_data(path, schema=other, plain=True)["train"]
        assert example.context == "CREATE TABLE ship (name TEXT, length INT);"
        assert example.sql == "SELECT length FROM ship WHERE name = 'fram'"

    def test_of_several_queries_the_first_sound_one_or_the_shortest(
        self, data: Callable[..., Path]
    ) -> None:
        queries = [
            "SELECT b.x FROM ship AS a",  # there is no b
            "SELECT a.x FROM ship AS a WHERE a.y = 1 AND a.z = 2",
            "SELECT a.x FROM ship AS a",
        ]
        path = data(entry(sql=queries))
        assert [e.sql for e in read_text2sql_data(path)["train"]] == [queries[1]]
        assert [e.sql for e in read_text2sql_data(path, variant="shortest")["train"]] == [
            queries[2]
        ]
        path = data(entry(sql=queries[:1]))
        assert [e.sql for e in read_text2sql_data(path)["train"]] == [queries[0]]

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            (entry(sql=[]), "[1].sql: is one SQL query or a list of them"),
            (entry(sentences=None), "[1].sentences: is missing"),
            (entry({"text": "a"}), "[1].sentences[0].question-split: is missing"),
            (entry(sentence("")), "[1].sentences[0].text: is ''"),
            (entry(sentence("a", x0="")), "[1].sentences[0].variables: 'x0' has no value, here or"),
            (entry({**sentence("a"), "variables": [1]}), "[1].sentences[0].variables: maps names"),
            (entry(variables=5), "[1].sentences[0].variables: of the entry are not a list"),
            (
                entry({**sentence("a"), "variables": {"": "x"}}),
                "[1].sentences[0].variables: one has no name",
            ),
            (
                entry(variables=[{"name": "", "example": "x"}]),
                "[1].sentences[0].variables: one has no name",
            ),
        ],
    )
    def test_bad_entries_are_named(self, data: Callable[..., Path], bad: Any, message: str) -> None:
        path = data(entry(), bad)
        with pytest.raises(DatasetError) as error:
            read_text2sql_data(path)
        assert str(error.value).startswith(f"{path}: {message}")

    @pytest.mark.parametrize(
        ("csv", "message"),
        [
            ("", "line 1: has no column 'Table Name'"),
            ("Table Name, Field Name\n", "line 1: has no column 'Is Primary Key'"),
            (CSV.splitlines()[0], "lists no table"),
            (CSV + "PORT\n", "line 6: names no field"),
        ],
    )
    def test_a_bad_schema_is_named(self, data: Callable[..., Path], csv: str, message: str) -> None:
        path = data(entry())
        schema = path.with_name("columns.csv")
        schema.write_text(csv, encoding="utf-8")
        with pytest.raises(DatasetError) as error:
            read_text2sql_data(path, schema)
        assert str(error.value).startswith(f"{schema}: {message}")


@pytest.mark.parametrize(
    ("sql", "found"),
    [
        ("SELECT a FROM t WHERE b > ALL (SELECT c FROM u WHERE d = 1)", [3]),
        ("SELECT a FROM t WHERE b >= ANY (SELECT c FROM u)", [1, 2, 3]),
        ("SELECT a FROM t WHERE b < ALL (SELECT c AS x FROM u)", []),
        ("SELECT a FROM t WHERE b <= ANY (SELECT c FROM u)", [1, 2]),
    ],
)
def test_quantifiers_become_extremes(sql: str, found: list[int]) -> None:
    with sqlite3.connect(":memory:") as connection:
        connection.executescript(
            "CREATE TABLE t (a, b); INSERT INTO t VALUES (1, 1), (2, 5), (3, 9);"
            "CREATE TABLE u (c, d); INSERT INTO u VALUES (1, 1), (5, 1), (6, 2), (1, 2);"
        )
        rows = connection.execute(without_quantifiers(sql)).fetchall()
    connection.close()
    assert [row[0] for row in rows] == found
    plain = "SELECT  a FROM t WHERE b IN (SELECT c FROM u)"
    assert without_quantifiers(plain) == plain


@pytest.fixture(scope="module")
def geoquery() -> sqlite3.Connection:
    path = GEOQUERY / "geography.sqlite"
    if not path.exists():
        pytest.skip("needs geography.sqlite in ../shared/data/text2sql, which this machine lacks")
    return sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)


class TestGeoQuery:
    def test_both_splits_are_the_published_ones(self, geoquery: sqlite3.Connection) -> None:
        path = GEOQUERY / "geography.json"
        sizes = {part: len(found) for part, found in read_text2sql_data(path).items()}
        assert sizes == {"train": 549, "dev": 49, "test": 279}
        sizes = {part: len(d) for part, d in read_text2sql_data(path, split="query").items()}
        assert sizes == {"train": 536, "dev": 159, "test": 182}

    @pytest.mark.parametrize("variant", ["first", "shortest"])
    def test_every_query_runs_and_means_the_same_when_plain(
        self, geoquery: sqlite3.Connection, variant: Any
    ) -> None:
        path = GEOQUERY / "geography.json"
        as_given = read_text2sql_data(path, variant=variant)
        plain = read_text2sql_data(path, variant=variant, plain=True)
        for part, dataset in as_given.items():
            for one, other in zip(dataset, plain[part], strict=True):
                ordered = asks_for_order(one.sql)
                assert asks_for_order(other.sql) is ordered
                rows = [geoquery.execute(example.sql).fetchall() for example in (one, other)]
                assert results_match(*rows, ordered=ordered), one.sql
                assert normalise_sql(other.sql) == other.sql
                assert "alias0" not in other.sql or "derived_field" in other.sql

    def test_the_schema_has_the_tables_of_the_csv(self, geoquery: sqlite3.Connection) -> None:
        example = read_text2sql_data(GEOQUERY / "geography.json")["dev"].examples[0]
        schema = Schema.from_sql(example.context)
        assert len(schema.tables) == 8
        assert schema.table("border_info").primary_key == ("STATE_NAME", "BORDER")  # type: ignore[union-attr]
