"""The retriever's steps, with an LLM that writes what a test says, on a real SQLite database."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import SQLDatabase
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    LLMMetadata,
)
from llama_index.core.indices.struct_store.sql_retriever import SQLRetriever
from llama_index.core.llms import CustomLLM
from llama_index.core.prompts import PromptTemplate
from pydantic import PrivateAttr
from sqlalchemy import create_engine

from ft_core.errors import ArgumentError
from ft_text2sql import GuardedSQLDatabase, Limits, Text2SQLRetriever
from ft_text2sql.errors import DatabaseError, QueryCancelledError, SchemaError
from ft_text2sql.handler import Text2SQLHandler

OSLO = "SELECT name FROM customers WHERE city = 'Oslo'"
NORWAY = "SELECT name FROM customers WHERE country = 'Norway'"
SWEDEN = "SELECT name FROM customers WHERE country = 'Sweden'"
BAD = "SELECT nme FROM customers"


class Writer(CustomLLM):  # type: ignore[misc]
    """Writes the given texts, one after the other."""

    window: int = 4096
    _texts: list[str] = PrivateAttr()
    _asked: list[Sequence[ChatMessage]] = PrivateAttr(default_factory=list)
    _temperatures: list[Any] = PrivateAttr(default_factory=list)

    def __init__(self, *texts: str) -> None:
        super().__init__()
        self._texts = list(texts)

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(is_chat_model=True)

    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        self._asked.append(messages)
        self._temperatures.append(kwargs.get("temperature"))
        return ChatResponse(message=ChatMessage(role="assistant", content=self._texts.pop(0)))

    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return self.chat(messages, **kwargs)

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        raise NotImplementedError

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        raise NotImplementedError


@pytest.fixture
def database(shop: Path) -> GuardedSQLDatabase:
    engine = create_engine(f"sqlite:///{shop}")
    found = SQLDatabase(engine, include_tables=["customers", "orders", "Order Items", "straße"])
    return GuardedSQLDatabase.around(found)


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Any:
    def asking(retriever: Text2SQLRetriever, question: str = "Who?") -> tuple[str, dict[str, Any]]:
        if request.param == "sync":
            nodes, metadata = retriever.retrieve_with_metadata(question)
        else:
            nodes, metadata = asyncio.run(retriever.aretrieve_with_metadata(question))
        return nodes[0].text, metadata

    return asking


def test_nodes_and_metadata_are_llama_indexs(database: GuardedSQLDatabase) -> None:
    for raw in (True, False):
        theirs = SQLRetriever(database, return_raw=raw).retrieve_with_metadata(OSLO)
        ours = Text2SQLRetriever(database, Writer(OSLO), return_raw=raw).retrieve_with_metadata("?")
        assert [n.node.model_dump(exclude={"id_"}) for n in ours[0]] == [
            n.node.model_dump(exclude={"id_"}) for n in theirs[0]
        ]
        assert theirs[1].items() <= ours[1].items()


def test_long_cells_are_shortened_as_by_llama_index(shop: Path, database: Any) -> None:
    words = (
        "SELECT group_concat(name || ' is a customer', ' and ') FROM customers, orders, orders b"
    )
    theirs = SQLRetriever(database).retrieve_with_metadata(words)
    ours = Text2SQLRetriever(database, Writer(words)).retrieve_with_metadata("?")
    assert ours[0][0].text == theirs[0][0].text
    assert len(ours[1]["result"][0][0]) <= 300


def test_any_llm_is_asked_n_times(database: GuardedSQLDatabase, ask: Any) -> None:
    llm = Writer(SWEDEN, f"```sql\n{OSLO}\n```", NORWAY)
    text, metadata = ask(Text2SQLRetriever(database, llm, n=3, temperature=0.9))
    assert text == "[('Ada',), ('Cyd',)]"
    assert metadata["sql_query"] == OSLO
    assert (metadata["votes"], metadata["repaired"]) == (2, False)
    assert [one["rows"] for one in metadata["candidates"]] == [2, 2, 2]
    assert sorted(llm._temperatures, key=str) == [0.9, 0.9, None]
    assert llm._asked[0] == llm._asked[1] == llm._asked[2]


def test_where_nothing_runs_the_model_sees_why(database: GuardedSQLDatabase, ask: Any) -> None:
    llm = Writer(BAD, OSLO)
    text, metadata = ask(Text2SQLRetriever(database, llm))
    assert text == "[('Ada',), ('Cyd',)]"
    assert (metadata["sql_query"], metadata["votes"], metadata["repaired"]) == (OSLO, 1, True)
    assert [one["sql"] for one in metadata["candidates"]] == [BAD, OSLO]
    *before, wrote, told = llm._asked[1]
    assert before == llm._asked[0]
    assert (wrote.role.value, wrote.content) == ("assistant", BAD)
    assert told.role.value == "user"
    assert "there is no column 'nme'" in told.content
    assert "did you mean 'name'" in told.content


def test_an_empty_result_is_no_reason_for_repair(database: GuardedSQLDatabase, ask: Any) -> None:
    nobody = "SELECT name FROM customers WHERE city = 'Rome'"
    text, metadata = ask(Text2SQLRetriever(database, Writer(nobody)))
    assert (text, metadata["result"], metadata["repaired"]) == ("[]", [], False)


def test_there_is_one_repair_turn_and_then_an_answer(
    database: GuardedSQLDatabase, ask: Any
) -> None:
    llm = Writer(BAD, "DELETE FROM customers", OSLO)
    text, metadata = ask(Text2SQLRetriever(database, llm))
    assert text.startswith("Error: there is no column 'nme'")
    assert "result" not in metadata
    assert (metadata["sql_query"], metadata["votes"], metadata["repaired"]) == (BAD, 0, False)
    assert len(metadata["candidates"]) == 2
    assert llm._texts == [OSLO]


def test_repair_can_be_left_out(database: GuardedSQLDatabase, ask: Any) -> None:
    text, _ = ask(Text2SQLRetriever(database, Writer(BAD, OSLO), repair=False))
    assert text.startswith("Error: ")
    strict = Text2SQLRetriever(database, Writer(BAD), repair=False, handle_sql_errors=False)
    with pytest.raises(SchemaError, match="no column 'nme'"):
        ask(strict)


@pytest.mark.parametrize("text", ["", "I do not know.", "SELECT", "'" * 50, "a\0b", "🜁" * 500])
def test_no_answer_breaks_the_app(database: GuardedSQLDatabase, ask: Any, text: str) -> None:
    answer, metadata = ask(Text2SQLRetriever(database, Writer(*[text] * 6), n=5))
    assert answer.startswith("Error: the statement ")
    assert metadata["votes"] == 0


def test_a_query_without_end_is_stopped(shop: Path, ask: Any) -> None:
    engine = create_engine(f"sqlite:///{shop}")
    guarded = GuardedSQLDatabase.around(SQLDatabase(engine), limits=Limits(timeout=0.2))
    endless = (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    )
    text, metadata = ask(Text2SQLRetriever(guarded, Writer(endless, OSLO, OSLO), n=2))
    assert text == "[('Ada',), ('Cyd',)]"
    assert "ran longer than 0.2 seconds" in metadata["candidates"][0]["error"]


def test_a_cancelled_question_asks_for_no_repair(
    database: GuardedSQLDatabase, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_only = database.read_only
    run = read_only._access.run

    def cancelled(sql: str, limits: Any, stop: Any, opener: Any) -> Any:
        if "Oslo" in sql:
            read_only.cancel()
            stop.check()
        return run(sql, limits, stop, opener)

    llm = Writer(OSLO, NORWAY)
    retriever = Text2SQLRetriever(database, llm)
    monkeypatch.setattr(read_only._access, "run", cancelled)
    with pytest.raises(QueryCancelledError):
        ask(retriever)
    assert len(llm._asked) == 1


def test_a_database_that_is_gone_is_an_error_of_its_own(
    shop: Path, database: GuardedSQLDatabase, ask: Any
) -> None:
    retriever = Text2SQLRetriever(database, Writer(OSLO, OSLO))
    database.engine.dispose()
    database.read_only.close()
    shop.rename(shop.with_name("elsewhere.db"))
    with pytest.raises(DatabaseError, match="no such file"):
        ask(retriever)
    assert not shop.exists()


def test_a_locked_database_is_an_error_of_its_own(
    shop: Path, database: GuardedSQLDatabase, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ft_text2sql.sqlite_access._LOCK_SECONDS", 0.05)
    retriever = Text2SQLRetriever(database, Writer(OSLO, OSLO))
    database.engine.dispose()
    database.read_only.close()
    with closing(sqlite3.connect(shop, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(DatabaseError, match="locked"):
            ask(retriever)


def test_what_the_app_says_of_its_tables_stays(database: GuardedSQLDatabase) -> None:
    llm = Writer(OSLO)
    about = {"orders": "each 'paid' order\nhas its invoice"}
    Text2SQLRetriever(database, llm, context_query_kwargs=about).retrieve("Who?")
    lines = llm._asked[0][1].content.splitlines()
    assert lines[2].startswith('"Order Items"(order_id integer, "product name" text, "select"')
    assert lines[3].startswith("customers(id integer, name text, city text, country text, credit n")
    assert lines[4].endswith("note text, primary key (id)) -- each 'paid' order")
    assert lines[5] == "has its invoice"
    assert lines[6] == '"straße"("größe" integer, "名前" text)'


def test_a_prompt_of_the_apps_own(database: GuardedSQLDatabase) -> None:
    llm = Writer(OSLO)
    prompt = PromptTemplate("{dialect}? {schema} {query_str}")
    retriever = Text2SQLRetriever(database, llm, text_to_sql_prompt=prompt, tables=["straße"])
    retriever.retrieve("Who?")
    assert llm._asked[0][0].content.startswith("sqlite? Table 'straße' has columns: ")
    retriever.update_prompts({"text_to_sql_prompt": PromptTemplate("Now {query_str}")})
    llm._texts.append(OSLO)
    retriever.retrieve("Who?")
    assert llm._asked[1][0].content == "Now Who?"


def test_a_handler_records_what_was_asked(database: GuardedSQLDatabase, tmp_path: Path) -> None:
    retriever = Text2SQLRetriever(database, Writer(OSLO, SWEDEN, NORWAY, BAD, BAD, BAD, BAD), n=3)
    handler = Text2SQLHandler(tmp_path / "asked.jsonl")
    with handler.attach(retriever):
        retriever.retrieve("Who is from Norway?")
        retriever.retrieve("Who are you?")
    (example,) = handler.to_dataset().examples
    assert (example.question, example.sql) == ("Who is from Norway?", OSLO)
    assert "CREATE TABLE customers" in example.context
    records = [json.loads(line) for line in handler.path.read_text().splitlines()]
    assert [record["success"] for record in records] == [True, False]
    assert "no column 'nme'" in records[1]["error"]


def test_unknown_arguments_are_named(database: GuardedSQLDatabase) -> None:
    with pytest.raises(ArgumentError, match="table: is no argument"):
        Text2SQLRetriever(database, Writer(), table=["customers"])


def test_on_postgres(postgres_url: str) -> None:
    engine = create_engine(postgres_url)
    database = SQLDatabase(engine, include_tables=["customers", "straße", "events"])
    with_json = "SELECT payload ->> 'kind' FROM events WHERE payload ? 'size'"
    llm = Writer('SELECT "größe" FROM strasse', 'SELECT max("größe") FROM "straße"', with_json)
    retriever = Text2SQLRetriever(database, llm)
    nodes, metadata = retriever.retrieve_with_metadata("How large?")
    assert (nodes[0].text, metadata["repaired"]) == ("[(12,)]", True)
    lines = llm._asked[0][1].content.splitlines()
    assert lines[0] == "Dialect: postgres"
    assert lines[2].startswith("customers(id integer, name text, city text, country text, credit n")
    assert lines[4] == '"straße"("größe" integer, "名前" text)'
    assert "did you mean 'straße'?" in llm._asked[1][-1].content
    assert retriever.retrieve("Which kinds?")[0].text == "[('x',)]"
    engine.dispose()
