"""Hostile SQL as the question, to a model that writes down whatever it is asked to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.llms import ChatMessage, ChatResponse, LLMMetadata, MockLLM

from ft_text2sql import Limits, ReadOnlyDatabase, Text2SQLRetriever
from ft_text2sql.query_engine import Text2SQLQueryEngine

Statements = Callable[[str], list[str]]


class Parrot(MockLLM):
    """Answers with the question."""

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(model_name="parrot", is_chat_model=True)

    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        asked = str(messages[1].content).partition("\nQuestion: ")[2]
        return ChatResponse(message=ChatMessage(role="assistant", content=asked))


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def ask_all(database: ReadOnlyDatabase, questions: list[str]) -> int:
    """Ask a query engine each; return how many of the statements came as far as the guard.

    Each must end in an error as the answer, and none may run.
    """
    sql_database = database.as_sql_database()
    query_engine = Text2SQLQueryEngine(Text2SQLRetriever(sql_database, Parrot()))
    written = 0
    for question in questions:
        response = query_engine.query(question)
        first = response.metadata["candidates"][0]
        assert first["rows"] is None, question
        assert str(response).startswith("Error: the statement"), question
        written += first["sql"].strip("; \n") == question.strip("; \n")
    return written


def test_questions_leave_sqlite_as_it_is(
    shop: Path, tables: list[str], hostile: Statements, tmp_path: Path
) -> None:
    before = digests(tmp_path)
    database = ReadOnlyDatabase(f"sqlite:///{shop}", tables=tables, limits=Limits(timeout=1))
    assert ask_all(database, hostile("sqlite")) > 200
    assert digests(tmp_path) == before
    database.close()


@pytest.mark.slow
def test_questions_leave_postgresql_as_it_is(
    postgres_url: str,
    postgres_state: Callable[[], Any],
    tables: list[str],
    hostile: Statements,
    canary: Path,
) -> None:
    before = postgres_state()
    database = ReadOnlyDatabase(postgres_url, tables=tables, limits=Limits(timeout=1))
    assert ask_all(database, hostile("postgres")) > 200
    assert postgres_state() == before
    assert digests(canary) == {}
    database.close()
