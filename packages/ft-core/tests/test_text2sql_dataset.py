"""Text-to-SQL data: what is refused and where, queries without their literals, the two splits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_core.datasets import Text2SQLDataset, Text2SQLExample
from ft_core.datasets.text2sql import anonymous_sql
from ft_core.errors import ArgumentError, DatasetError

SCHEMA = 'CREATE TABLE ship (name TEXT, length INT, "home port" TEXT)'


def row(question: str = "Which ships are long?", **fields: Any) -> dict[str, Any]:
    given = {"sql": "SELECT name FROM ship WHERE length > 90", "context": SCHEMA}
    return {"question": question, **given, **fields}


def fleet() -> Text2SQLDataset:
    """Twelve queries, each asked about three values; one question has two queries."""
    columns = ["name", "length", "home_port", "flag", "owner", "crew"]
    queries = [f"SELECT {c} FROM ship WHERE {d} = '%s'" for c in columns for d in ("yard", "sea")]
    rows = [
        row(f"Tell me item {n} of {value}, please", sql=query % value)
        for n, query in enumerate(queries)
        for value in ("Oslo", "Kiel", "Brest")
    ]
    return Text2SQLDataset.coerce([*rows, row("Tell me item 0 of Oslo please!", sql="SELECT 1")])


class TestExample:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"question": " \u200b"}, "line 1, question: the text is empty; write one or drop it"),
            ({"sql": "\n"}, "line 1, sql: the text is empty"),
            ({"sql": None}, "line 1, sql: Input should be a valid string"),
            ({"context": ""}, "line 1, context: is empty, and no database is named; write the"),
            ({"context": " ", "database": " "}, "line 1, context: is empty, and no database"),
            ({"query": "SELECT 1"}, "line 1, query: Extra inputs are not permitted"),
            ({"metadata": {"a": "\ud800"}}, "line 1, metadata.a: holds half of a surrogate pair"),
        ],
    )
    def test_bad_lines_are_named(self, tmp_path: Path, fields: Any, message: str) -> None:
        path = tmp_path / "pairs.jsonl"
        path.write_text(json.dumps(row(**fields)) + "\n", encoding="utf-8")
        with pytest.raises(DatasetError) as error:
            Text2SQLDataset.load(path)
        assert str(error.value).startswith(f"{path}: {message}")

    @pytest.mark.parametrize(
        "database",
        [
            "postgresql://reader:hunter2@db.example/shop",
            "mysql+pymysql://reader:hunter2@db/shop",
            "host=db user=reader password=hunter2",
            "Server=db;Pwd = hunter2;",
        ],
    )
    def test_a_database_is_a_name_and_its_password_is_not_repeated(self, database: str) -> None:
        with pytest.raises(DatasetError, match=r"^database: is a URL .* write a name") as error:
            Text2SQLExample(**row(database=database))
        assert "hunter2" not in str(error.value)

    def test_a_named_database_needs_no_schema(self) -> None:
        example = Text2SQLExample(question="How many?", sql="SELECT 1", database="data/shop.sqlite")
        assert example.content() == {
            "question": "How many?",
            "sql": "SELECT 1",
            "database": "data/shop.sqlite",
        }

    def test_importing_it_warns_of_nothing(self) -> None:
        code = "import ft_core.datasets, sys; assert 'sqlglot' not in sys.modules"
        subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True)


class TestAnonymousSQL:
    @pytest.mark.parametrize(
        ("sql", "anonymous"),
        [
            ("SELECT name FROM ship WHERE length > 90;", "select name from ship where length > ?"),
            (
                "select NAME\nfrom `Ship` where length>1.5e3",
                "select name from ship where length > ?",
            ),
            ("SELECT a -- it's\n, b /* 'x */ FROM t", "select a , b from t"),
            ("SELECT a FROM t WHERE b = 'it''s; -- 1'", "select a from t where b = ?"),
            ("SELECT a FROM t WHERE b IN (1, -2 ,'c')", "select a from t where b in ( ? )"),
            ("SELECT a FROM t WHERE b != -5", "select a from t where b <> ?"),
            ("SELECT a - 5, -5 FROM t1", "select a - ? , ? from t1"),
            ('SELECT a FROM t WHERE b = "home port"', "select a from t where b = home port"),
            ('SELECT a FROM t WHERE b = "Oslo"', "select a from t where b = ?"),
            ('SELECT t."x" AS "y z" FROM t', "select t . x as y z from t"),
            ("SELECT ARRAY[1, 2]", "select array [ ? , ? ]"),
            ("SELECT 'no end", "select ?"),
            ("", ""),
        ],
    )
    def test_literals_go_and_the_rest_is_spelt_one_way(self, sql: str, anonymous: str) -> None:
        assert anonymous_sql(sql, SCHEMA) == anonymous

    @settings(deadline=None)
    @given(st.text(max_size=20), st.floats(0, 1e9), st.text(alphabet="'\"`[]-*/;,(\n", max_size=9))
    def test_no_value_and_no_broken_text_shows(self, text: str, number: float, odd: str) -> None:
        value = text.replace("'", "''")
        sql = f"SELECT a FROM t WHERE b = '{value}' AND c > {number} OR d = '"
        assert anonymous_sql(sql + odd.replace("'", "")) == (
            "select a from t where b = ? and c > ? or d = ?"
        )

    def test_work_grows_with_the_text_and_not_with_its_square(self) -> None:
        for piece in ("'", "/*", "[a", "[ ", "1.", "a'", '"', "`", "--"):
            assert isinstance(anonymous_sql(piece * 20_000), str)


class TestDataset:
    def test_what_is_saved_is_loaded(self, tmp_path: Path) -> None:
        dataset = Text2SQLDataset.coerce(
            [
                row(
                    id="7",
                    database="harbour",
                    dialect="sqlite",
                    difficulty="easy",
                    metadata={"n": 1},
                )
            ]
        )
        dataset.save(tmp_path / "pairs.jsonl")
        assert Text2SQLDataset.load(tmp_path / "pairs.jsonl") == dataset

    def test_what_teaches_the_same_is_kept_once(self) -> None:
        same = [row(id=str(n), difficulty=f"level {n}", metadata={"n": n}) for n in range(3)]
        other = [row(database="north"), row(sql="SELECT 1")]
        assert len(Text2SQLDataset.coerce([*same, *other]).deduplicated()) == 3

    def test_stats_count_questions_queries_and_schemas(self) -> None:
        stats = Text2SQLDataset.coerce(
            [
                row("How long?", sql="SELECT length FROM ship WHERE name = 'Fram'"),
                row("how long", sql="SELECT length FROM ship WHERE name = 'Gjøa' ", database="a"),
                row("Who?", sql="SELECT name FROM crew", context="", database="b"),
            ]
        ).stats()
        assert stats["examples"] == 3
        assert stats["distinct questions"] == 2
        assert stats["distinct SQL queries"] == 3
        assert stats["distinct SQL queries, literals apart"] == 2
        assert stats["distinct schemas"] == 1
        assert stats["named databases"] == 2
        assert stats["without a schema"] == 1
        assert stats["median words per SQL query"] == 8

    def test_the_split_by_question_keeps_its_wordings_together(self) -> None:
        parts = fleet().split({"train": 0.5, "test": 0.5}, seed=3)
        asked = {
            name: {e.question.rstrip("!").replace(",", "") for e in part}
            for name, part in parts.items()
        }
        assert not asked["train"] & asked["test"]
        queries = {name: {e.anonymous_sql() for e in part} for name, part in parts.items()}
        assert queries["train"] & queries["test"]  # that is what the other split is for

    def test_the_split_by_query_keeps_its_literals_together(self) -> None:
        dataset = fleet()
        for seed in range(5):
            parts = dataset.split_by_query({"train": 3, "dev": 1, "test": 1}, seed=seed)
            queries = [{e.anonymous_sql() for e in part} for part in parts.values()]
            assert sum(map(len, queries)) == 13 == len(set().union(*queries))
            assert sorted(e.sql for part in parts.values() for e in part) == sorted(
                e.sql for e in dataset
            )
            # One question with two queries: both are on one side.
            homes = {n for n, part in parts.items() for e in part if "item 0 of Oslo" in e.question}
            assert len(homes) == 1
            assert 0.45 < len(parts["train"]) / len(dataset) < 0.75
        again = dataset.split_by_query({"train": 3, "dev": 1, "test": 1}, seed=4)
        assert again == parts
        assert dataset.split_by_query({"train": 3, "dev": 1, "test": 1}, seed=0) != parts

    def test_too_few_queries_and_bad_shares_are_refused(self) -> None:
        one = Text2SQLDataset.coerce([row("a?", sql="SELECT 1"), row("b?", sql="SELECT 2")])
        with pytest.raises(DatasetError, match=r"its SQL queries, literals apart, form 1 group"):
            one.split_by_query()
        with pytest.raises(ArgumentError, match="fractions"):
            one.split_by_query({"train": 0})
