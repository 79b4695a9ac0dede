"""Ask for SQL whatever writes it, and keep what it wrote and how long it took."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llama_index.core.indices.struct_store.sql_retriever import DefaultSQLParser, NLSQLRetriever
from llama_index.core.llms import LLM
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.prompts.default_prompts import DEFAULT_TEXT_TO_SQL_PROMPT
from llama_index.core.schema import QueryBundle

from ft_core.errors import ArgumentError
from ft_core.generation import runner
from ft_core.generation.failures import describe
from ft_text2sql.errors import DatabaseError
from ft_text2sql.guarded import GuardedSQLDatabase

WriterFunction = Callable[[str], Any]
"""A writer of your own: takes a question, returns SQL, or an awaitable of it."""


@dataclass(frozen=True)
class Asked:
    """One question, and what a prompt needs besides."""

    question: str
    schema: str
    """As text; what an LLM without a retriever is shown."""
    dialect: str


@dataclass(frozen=True)
class Written:
    """What a writer answered."""

    sql: str
    """"" where it wrote none."""
    seconds: float = 0.0
    error: str | None = None
    """Why it could not be asked."""


class Writer:
    """A query engine, retriever, LLM or function that writes SQL, under a name.

    A retriever that LlamaIndex itself would let run the SQL on the app's connection is asked
    for the SQL alone. One that votes on what its candidates return runs them, as long as its
    database is guarded.

    Args:
        name: for errors and reports.
        target: what writes.
        prompt: of an LLM, with `{query_str}`, `{schema}` and `{dialect}`; LlamaIndex's default.

    Raises:
        ArgumentError: the target is none of these.
    """

    def __init__(self, name: str, target: Any, prompt: BasePromptTemplate | None = None) -> None:
        self.name = name
        self._prompt = prompt or DEFAULT_TEXT_TO_SQL_PROMPT
        retriever = getattr(target, "sql_retriever", target)
        self._kind = getattr(target, "__name__", type(target).__name__)
        self._llm: Any = None
        if isinstance(retriever, NLSQLRetriever):
            self._write: Callable[[Asked], Any] = _of_retriever(retriever)
            self._llm = retriever._llm
        elif isinstance(target, LLM):
            self._write = self._completed
            self._llm = target
        elif callable(target) and not isinstance(target, type):
            self._write = lambda asked: target(asked.question)
        else:
            raise ArgumentError(
                name,
                f"{type(target).__name__} is none of a text-to-SQL query engine or retriever of "
                "LlamaIndex, an LLM, or a function from a question to SQL",
            )

    @property
    def is_in_process(self) -> bool:
        """Whether a model in this process writes, which is asked one question at a time."""
        return self._llm is not None and runner.is_in_process(self._llm)

    @property
    def identity(self) -> list[str]:
        """What tells this writer from another in a journal."""
        model = "" if self._llm is None else str(self._llm.metadata.model_name)
        return [self.name, self._kind, model]

    def ask(self, asked: Asked) -> Written:
        """Return what is written for a question, or the error of a call that failed.

        Raises:
            DatabaseError: the writer's database cannot be read: no fault of the writer's.
        """
        start = time.perf_counter()
        sql, error = "", None
        try:
            answer = self._write(asked)
            answer = runner.run(_awaited(answer)) if inspect.isawaitable(answer) else answer
            if not isinstance(answer, str | None):
                raise ArgumentError(self.name, f"wrote a {type(answer).__name__}, not a string")
            sql = (answer or "").strip()
        except (DatabaseError, ArgumentError):
            raise
        except Exception as raised:
            error = describe(raised, getattr(self._llm, "api_key", None))
        return Written(sql, time.perf_counter() - start, error)

    def _completed(self, asked: Asked) -> str:
        said = self._llm.predict(
            self._prompt, query_str=asked.question, schema=asked.schema, dialect=asked.dialect
        )
        sql: str = DefaultSQLParser().parse_response_to_sql(said, QueryBundle(asked.question))
        return sql


def _of_retriever(retriever: NLSQLRetriever) -> Callable[[Asked], str]:
    runs_guarded = isinstance(retriever._sql_database, GuardedSQLDatabase)
    own = type(retriever).retrieve_with_metadata is not NLSQLRetriever.retrieve_with_metadata
    retriever = copy.copy(retriever)
    retriever._handle_sql_errors = True  # an error would take the SQL with it
    if not (own and runs_guarded):
        retriever._sql_only = True

    def write(asked: Asked) -> str:
        _, metadata = retriever.retrieve_with_metadata(asked.question)
        sql: str = metadata["sql_query"]
        return sql

    return write


async def _awaited(answer: Any) -> Any:
    return await answer
