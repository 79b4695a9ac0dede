"""LlamaIndex's SQL query engines around a tuned model and a guarded database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llama_index.core.indices.struct_store.sql_query import (
    BaseSQLTableQueryEngine,
    NLSQLTableQueryEngine,
    SQLTableRetrieverQueryEngine,
)

from ft_text2sql.retriever import Text2SQLRetriever

if TYPE_CHECKING:
    from llama_index.core.llms import LLM


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
