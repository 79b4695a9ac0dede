"""LlamaIndex's SQL query engines around a tuned model and a guarded database."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from llama_index.core.indices.struct_store.sql_query import (
    BaseSQLTableQueryEngine,
    NLSQLTableQueryEngine,
    SQLTableRetrieverQueryEngine,
)

from ft_core.errors import ArgumentError
from ft_text2sql.database import ReadOnlyDatabase
from ft_text2sql.guarded import GuardedSQLDatabase
from ft_text2sql.results import Limits
from ft_text2sql.retriever import Text2SQLRetriever

if TYPE_CHECKING:
    from llama_index.core.llms import LLM
    from llama_index.core.utilities.sql_wrapper import SQLDatabase
    from sqlalchemy.engine import URL, Engine


OPTIONS = frozenset(
    {"markdown_response", "response_synthesis_prompt", "refine_synthesis_prompt", "streaming"}
)
"""What LlamaIndex's query engines take besides a retriever."""


class Text2SQLQueryEngine(NLSQLTableQueryEngine):
    """An `NLSQLTableQueryEngine` whose SQL comes from a `Text2SQLRetriever`.

    Without an LLM that words the answer, the response is the rows; a small model that was
    trained to write SQL writes no prose.

    Args:
        retriever: writes and runs the SQL.
        synthesis_llm: words the answer from the rows.
        settings: of LlamaIndex's engine, such as `markdown_response`.
    """

    def __init__(
        self, retriever: Text2SQLRetriever, synthesis_llm: LLM | None = None, **settings: Any
    ) -> None:
        _initialise(self, retriever, synthesis_llm, settings)


class Text2SQLTableRetrieverQueryEngine(SQLTableRetrieverQueryEngine):
    """A `SQLTableRetrieverQueryEngine` whose SQL comes from a `Text2SQLRetriever`.

    Args:
        retriever: writes and runs the SQL; it has the table retriever.
        synthesis_llm: words the answer from the rows.
        settings: of LlamaIndex's engine, such as `markdown_response`.
    """

    def __init__(
        self, retriever: Text2SQLRetriever, synthesis_llm: LLM | None = None, **settings: Any
    ) -> None:
        _initialise(self, retriever, synthesis_llm, settings)


def _initialise(
    engine: Any, retriever: Text2SQLRetriever, llm: LLM | None, settings: dict[str, Any]
) -> None:
    # LlamaIndex's own constructors would make a retriever of their own, and load OpenAI's
    # embedding model for it.
    engine._sql_retriever = retriever
    BaseSQLTableQueryEngine.__init__(
        engine, llm=llm or retriever._llm, synthesize_response=llm is not None, **settings
    )


def guarded(
    source: SQLDatabase | Engine | URL | str,
    tables: Collection[Any] | None = None,
    limits: Limits | None = None,
) -> GuardedSQLDatabase:
    """Return a read-only SQLDatabase of what LlamaIndex or SQLAlchemy calls a database.

    Args:
        source: LlamaIndex's SQLDatabase, a SQLAlchemy engine or a URL. A guarded SQLDatabase is
            returned as it is.
        tables: what may be read, names or SQLAlchemy's tables; all by default.
        limits: of each query.

    Raises:
        ArgumentError: the source is none of these, or limits for what has its own.
        DatabaseError: the database cannot be read or protected.
    """
    if isinstance(source, GuardedSQLDatabase):
        if limits is not None:
            raise ArgumentError("limits", "are those of the guarded database; give them to it")
        return source
    names = None if tables is None else [getattr(table, "name", table) for table in tables]
    return ReadOnlyDatabase(source, tables=names, limits=limits).as_sql_database()
