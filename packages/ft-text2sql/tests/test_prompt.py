"""What a model is shown: the words, the tables, and which of many."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import SQLDatabase
from sqlalchemy import create_engine

from ft_core.errors import ArgumentError
from ft_text2sql import GuardedSQLDatabase, ReadOnlyDatabase, Schema, SQLPrompt
from ft_text2sql.errors import DatabaseError
from ft_text2sql.linking import SchemaLinker, estimated_tokens, values_of, words
from ft_text2sql.prompt import TEXT_TO_SQL_PROMPT, SchemaStyle, prompt_of, repair_messages
from ft_text2sql.schema import Column, ForeignKey, Table

SHOP = Schema.from_sql(
    """
    CREATE TABLE customers (
      id INTEGER PRIMARY KEY, name VARCHAR(20), joined TIMESTAMP, due INTERVAL);
    CREATE TABLE "Order Items" ("order" INT, "größe" DOUBLE PRECISION, paid BOOLEAN, day DATE,
      customer BIGINT REFERENCES customers (id), PRIMARY KEY ("order", customer),
      FOREIGN KEY ("order", customer) REFERENCES bills (number, customer));
    CREATE TABLE bills (number SMALLINT, customer BIGINT, pdf BLOB, note);
    """
)
TYPED = """\
customers(id integer, name text, joined time, due interval, primary key (id))
"Order Items"("order" integer, "größe" number, paid boolean, day date, customer integer, \
primary key ("order", customer), customer -> customers.id, \
("order", customer) -> bills("number", customer))
bills("number" integer, customer integer, pdf blob, note)"""


def chat(prompt: SQLPrompt, question: str, schema: Schema, **others: Any) -> str:
    messages = prompt.messages(question, schema.dialect, prompt.linker(schema), **others)
    assert [message["role"] for message in messages] == ["system", "user"]
    return str(messages[1]["content"])


def shown(prompt: SQLPrompt, question: str, schema: Schema, **others: Any) -> list[str]:
    """Return the names of the tables in the prompt."""
    text = chat(prompt, question, schema, **others).split("Schema:\n")[1].split("\nQuestion")[0]
    return [line.split("(")[0] for line in text.splitlines()]


def test_the_whole_prompt() -> None:
    prompt = SQLPrompt()
    text = chat(prompt, "How many?", SHOP)
    assert text == f"Dialect: sqlite\nSchema:\n{TYPED}\nQuestion: How many?".replace(
        '"number"', "number"
    )


def test_the_other_styles_are_the_schemas() -> None:
    assert SHOP.to_text("lines") in chat(SQLPrompt("lines"), "?", SHOP)
    assert SHOP.to_text("create") in chat(SQLPrompt("create"), "?", SHOP)


@pytest.mark.parametrize("question", ["{schema}{dialect}", "{", "}{ {query_str}", "a\nQuestion: b"])
def test_questions_are_taken_as_they_are(question: str) -> None:
    assert chat(SQLPrompt(), question, SHOP).endswith(f"\nQuestion: {question}")


def test_names_in_braces_are_no_variables() -> None:
    schema = Schema((Table("{query_str}", (Column("{dialect}"),)),))
    text = chat(SQLPrompt(), "Who?", schema)
    assert '"{query_str}"("{dialect}")' in text


def test_both_names_of_a_dialect_are_one() -> None:
    prompt = SQLPrompt()
    linker = prompt.linker(SHOP)
    messages = [prompt.messages("?", name, linker) for name in ("postgres", "postgresql")]
    assert messages[0] == messages[1]


def test_the_template_and_training_say_the_same(shop: Path) -> None:
    engine = create_engine(f"sqlite:///{shop}")
    guarded = GuardedSQLDatabase.around(SQLDatabase(engine, view_support=True))
    schema = Schema.from_database(guarded)
    described = "\n\n".join(
        guarded.get_single_table_info(name) for name in reversed(guarded.get_usable_table_names())
    )
    styles: tuple[SchemaStyle, ...] = ("typed", "lines", "create")
    for style in styles:
        for tokens in (60, 100, 1_000):
            prompt = SQLPrompt(style, tokens)
            for question in ("How many customers?", "The price of items?", "größe?", ""):
                filled = prompt.template(schema).format_messages(
                    query_str=question, schema=described, dialect="sqlite"
                )
                trained = prompt.messages(question, "sqlite", prompt.linker(schema))
                assert [{"role": m.role.value, "content": m.content} for m in filled] == trained
    engine.dispose()


def test_a_copy_of_the_template_works(shop: Path) -> None:
    database = ReadOnlyDatabase(f"sqlite:///{shop}")
    prompt = SQLPrompt(max_schema_tokens=20)
    schema = Schema.from_database(database._engine)
    template = prompt.template(schema, values_of(database, schema))
    partial = template.partial_format(dialect="sqlite")
    text = "Table 'customers' has columns: ..., ."
    given = {"schema": text, "query_str": "Who?"}
    assert partial.format_messages(**given) == template.format_messages(**given, dialect="sqlite")
    assert template.template_vars == TEXT_TO_SQL_PROMPT.template_vars
    assert set(template.template_vars) == {"dialect", "schema", "query_str"}


def test_a_description_that_is_not_llama_indexs_stays() -> None:
    template = SQLPrompt().template(SHOP)
    for described in ("my own words", "", "Table 'unknown' has columns: x (INT), ."):
        messages = template.format_messages(schema=described, query_str="?", dialect="sqlite")
        assert messages[1].content == f"Dialect: sqlite\nSchema:\n{described}\nQuestion: ?"


def test_notes_of_the_app_stay_behind_their_table() -> None:
    described = (
        "Table 'bills' has columns: number (SMALLINT), . The table description is: it's Ann's\n"
        "Here are some relevant values of text columns:\nnote: paid, late\n\n\n"
        "Table 'customers' has columns: id (INTEGER), .\n"
        "Here are some relevant example rows (values in the same order as columns above)\n1, Ann\n"
    )
    template = SQLPrompt("lines").template(SHOP)
    messages = template.format_messages(schema=described, query_str="?", dialect="sqlite")
    assert messages[1].content == (
        "Dialect: sqlite\nSchema:\n"
        "customers(id, name, joined, due) -- Here are some relevant example rows (values in the "
        "same order as columns above)\n1, Ann\n"
        "bills(number, customer, pdf, note) -- it's Ann's\n"
        "Here are some relevant values of text columns:\nnote: paid, late\n"
        "Question: ?"
    )


def test_the_repair_turn_shows_the_sql_and_the_reason() -> None:
    before = TEXT_TO_SQL_PROMPT.format_messages(schema="s", query_str="q", dialect="d")
    messages = repair_messages(before, "SELECT {x}" * 1_000, "the {name} is gone " * 100)
    assert messages[:2] == before
    assert [message.role.value for message in messages[2:]] == ["assistant", "user"]
    assert messages[2].content.startswith("SELECT {x}SELECT")
    assert "the {name} is gone" in messages[3].content
    assert sum(len(message.content) for message in messages[2:]) < 2_100


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ArgumentError, match="schema_style: is one of typed, lines, create"):
        SQLPrompt("xml")  # type: ignore[arg-type]
    for tokens in (0, -1, 1.5, True):
        with pytest.raises(ArgumentError, match="max_schema_tokens"):
            SQLPrompt(max_schema_tokens=tokens)  # type: ignore[arg-type]
    recorded = SQLPrompt("lines", 7).to_dict()
    assert prompt_of(recorded | {"dialects": ["sqlite"]}) == SQLPrompt("lines", 7)
    with pytest.raises(ArgumentError, match="trained with version 2 of the prompt"):
        prompt_of(recorded | {"version": 2})


# --- Linking -----------------------------------------------------------------------------------

MANY = Schema(
    (
        *(
            Table(f"{prefix}_{i}", tuple(Column(f"c{i}_{j}", "TEXT") for j in range(4)))
            for prefix in ("alpha", "beta")
            for i in range(248)
        ),
        Table("city", (Column("name", "TEXT"), Column("people", "INTEGER"))),
        Table("countries", (Column("name", "TEXT"), Column("cityId", "INTEGER"))),
        Table(
            "visits",
            (Column("x", "TEXT"), Column("y", "INTEGER")),
            foreign_keys=(ForeignKey(("x",), "city", ("name",)),),
        ),
        Table("城市人口", (Column("名", "TEXT"),)),
    )
)


def test_of_500_tables_those_are_shown_that_the_question_names() -> None:
    prompt = SQLPrompt(max_schema_tokens=200)
    assert len(MANY.tables) == 500
    found = shown(prompt, "How many people live in all cities?", MANY)
    assert {"city", "countries", "visits"} <= set(found)  # visits: for joins
    assert estimated_tokens(prompt.write(MANY.select(found))) <= 200
    assert found == [table.name for table in MANY.tables if table.name in found]
    assert found == shown(prompt, "How many people live in all cities?", MANY)
    assert len(found) > 3  # the others fill what room there is
    assert "beta_7" in shown(prompt, "beta 7", MANY)
    assert '"城市人口"' in shown(prompt, "北京人口是多少?", MANY)


def test_in_training_the_tables_of_the_answer_are_there_and_others_too() -> None:
    prompt = SQLPrompt(max_schema_tokens=200)
    kept = shown(prompt, "How many people?", MANY, keep=["alpha_247", "Beta_0", "absent"])
    assert {"alpha_247", "beta_0", "city"} <= set(kept)
    assert len(kept) > 3
    small = SQLPrompt(max_schema_tokens=1)
    assert shown(small, "people?", MANY, keep=["beta_1", "beta_2"]) == ["beta_1", "beta_2"]
    assert shown(small, "people?", MANY) == ["city"]  # one at least


def test_a_schema_that_fits_is_shown_whole() -> None:
    assert shown(SQLPrompt(max_schema_tokens=100_000), "people?", MANY) == [
        line.split("(")[0] for line in SQLPrompt().write(MANY).splitlines()
    ]


def test_values_find_a_table(tmp_path: Path) -> None:
    file = tmp_path / "many.db"
    with closing(sqlite3.connect(file)) as connection:
        for i in range(40):
            connection.execute(f"CREATE TABLE t{i} (a TEXT, b INTEGER)")
            connection.execute(f"INSERT INTO t{i} VALUES ('value number {i}', 1)")
        connection.execute("INSERT INTO t33 VALUES ('San Francisco', 2)")
        connection.execute("INSERT INTO t34 VALUES (?, 2)", ["San Francisco " * 100])
        connection.execute("CREATE TABLE n (a INTEGER)")
        connection.commit()
    database = ReadOnlyDatabase(f"sqlite:///{file}")
    schema = Schema.from_database(database._engine)
    values = values_of(database, schema)
    assert "francisco" in values()["t33"]
    assert "francisco" not in values()["t34"]  # prose has all words
    assert not values()["n"]
    prompt = SQLPrompt()
    linker = prompt.linker(schema, values)
    found = {t.name for t in linker.link("Where is San Francisco?", 15).tables}
    assert found == {"t33", "n"}  # what room is left is for what comes first
    # Without values nothing tells the tables apart.
    assert linker.link("Where?", 15) == SchemaLinker(schema, prompt.write).link(
        "San Francisco?", 15
    )


def test_a_database_that_is_gone_has_no_values(tmp_path: Path) -> None:
    values = values_of(ReadOnlyDatabase(f"sqlite:///{tmp_path}/gone.db"), SHOP)
    with pytest.raises(DatabaseError, match="no such file"):
        values()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("city_names", {"city", "name"}),
        ("cityName", {"city", "name"}),
        ("Cities of the states", {"city", "of", "the", "state"}),
        ("branches boxes classes bus gas is", {"branch", "box", "class", "bus", "gas", "is"}),
        ("höhen_Ω2", {"höhen", "hö", "öh", "he", "en", "ω2"}),
        ("", set()),
    ],
)
def test_words(text: str, found: set[str]) -> None:
    assert words(text) == found


def test_an_estimate_is_rather_too_high() -> None:
    assert estimated_tokens("") == 0
    assert estimated_tokens("abcd") == 2
    assert estimated_tokens("名前") == 2
