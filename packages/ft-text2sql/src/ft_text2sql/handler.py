"""Journal what a live text-to-SQL app is asked, what SQL its LLM writes, and whether that runs."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_index.core.indices.struct_store.sql_retriever import (
    BaseSQLParser,
    NLSQLRetriever,
    SQLRetriever,
)
from llama_index.core.utilities.sql_wrapper import SQLDatabase

from ft_core.datasets import Text2SQLDataset, Text2SQLExample
from ft_core.datasets.rerank import is_visible
from ft_core.errors import ArgumentError, DatasetError
from ft_core.hooks import Attachment, Call, find_components
from ft_core.query_hook import QueryHandler, digest_of
from ft_text2sql.identifiers import dialect_name
from ft_text2sql.shown_schema import database_name, named_in, schema_of

logger = logging.getLogger(__name__)

_RETRIEVE = ("retrieve_with_metadata", "aretrieve_with_metadata")
_CONTEXT = "_get_table_context"
"""The method of `NLSQLRetriever` that returns the schema as the prompt shows it."""
_TABLE_INFO = "get_single_table_info"
_PARSE = "parse_response_to_sql"
_MAX_ERROR = 1_000  # characters
_MAX_CELL = 300
_URL_PASSWORD = re.compile(r"(?P<before>\b[A-Za-z][\w+.-]*://[^\s/@:]*:)\S*(?=@)")
# The key=value form of libpq, ODBC and the environment; ODBC's also as part of a URL.
_PASSWORD = re.compile(
    r"""
    (?P<key>\b\w*(?:password|passwd|pwd)\s*=\s*)
    (?:
        '(?:[^'\\]|\\.|'')*'
      | "(?:[^"\\]|\\.|"")*"
      | \{(?:[^}]|\}\})*\}
      | (?:[^\s&;,\\]|\\.)+
    )
    | (?P<encoded>\b\w*(?:password|passwd|pwd)%3D)
    (?: %7B(?:(?!%7D).|%7D%7D)*%7D | (?:(?!%3B)[^\s&;,'"])+ )
    """,
    re.IGNORECASE | re.VERBOSE,
)


@dataclass
class _Asked:
    """One question on its way, as far as it has come."""

    shown: str | None = None
    """The schema text in the prompt."""
    tables: dict[str, str] = field(default_factory=dict)
    """Each table that was described to its description."""
    sql: str | None = None
    """The last statement that was run, or the first that the LLM wrote."""
    error: BaseException | None = None
    """Why that failed."""


class Text2SQLHandler(QueryHandler):
    """Records the questions and the SQL of a live app in a journal that trains a student.

    ```python
    handler = Text2SQLHandler("asked.jsonl")
    handler.attach(query_engine)  # or `with handler.attach(query_engine): ...`
    query_engine.query("Which customers live in Oslo?")
    handler.mark(handler.last_query_id, correct=False, sql="SELECT name FROM ...")
    dataset = handler.to_dataset()
    ```

    Watches every `NLSQLRetriever` inside the app: that of an `NLSQLTableQueryEngine`, an
    `SQLTableRetrieverQueryEngine` or an engine that has them as tools. A record holds the
    question, the schema text in the prompt, the same tables as CREATE TABLE statements, the
    SQL, its dialect, whether it ran, the error if not, how many rows came, seconds (of the
    LLM and the SQL together) and the model. A question for which the LLM wrote nothing,
    because its call failed, is not recorded.

    The rows are not written, and neither are the sample rows and values that a retriever with
    `rows_retrievers` or `cols_retrievers` puts into the prompt. But a question, SQL or an error
    of the database may quote a value: `redact` sees them all. Passwords in URLs and connection
    strings are replaced by `***` in every text; in SQL those in URLs alone, as `password = 'x'`
    is a condition there. SQL in which one was replaced is no example.

    Safe with threads, asyncio and several processes on one file; a line survives the death of
    the process. Nothing that goes wrong in here reaches the app: see `ft_core.hooks.Hook`.

    Args:
        path: the journal, JSON Lines; one that exists is continued.
        redact: applied to each text before it is written: question, schema, SQL, error,
            corrected SQL, kept rows. Where it raises, nothing is written.
        keep_rows: how many rows of each result to write.

    Raises:
        ArgumentError: `path` is a folder, or `keep_rows` is below 0.
        ArtifactError: `path` is a file that no `Text2SQLHandler` wrote.
    """

    methods = (*_RETRIEVE, _CONTEXT, _TABLE_INFO, _PARSE)
    record_type = "text2sql"

    def __init__(
        self,
        path: Path | str,
        *,
        redact: Callable[[str], str] | None = None,
        keep_rows: int = 0,
    ) -> None:
        if keep_rows < 0:
            raise ArgumentError("keep_rows", f"must be 0 or more, not {keep_rows}")
        super().__init__(path, redact=redact)
        self._keep_rows = keep_rows

    def components(self) -> tuple[type, ...]:
        """Watch what answers questions, and what it does for it."""
        return (NLSQLRetriever, SQLRetriever, SQLDatabase, BaseSQLParser)

    def attach(self, target: Any) -> Attachment:
        """Record what every text-to-SQL retriever inside `target` does; see `Hook.attach`.

        Raises:
            ArgumentError: there is none inside, so nothing would be recorded.
        """
        if not find_components(target, (NLSQLRetriever,)):
            raise ArgumentError(
                "target",
                f"found no NLSQLRetriever inside a {type(target).__name__}; attach to an "
                "NLSQLTableQueryEngine, an SQLTableRetrieverQueryEngine, the retriever itself, "
                "or what holds them",
            )
        return super().attach(target)

    # --- While the app runs ------------------------------------------------------------------

    def wants(self, call: Call) -> bool:
        """Report the outermost question, and what happens inside it."""
        if _is_question(call):
            return not any(map(_is_question, call.outer))
        return any(map(_is_question, call.outer))

    def started(self, call: Call) -> None:
        """Make room for what is seen on the way."""
        if _is_question(call):
            super().started(call)
            call.state = _Asked()

    def observe(self, call: Call) -> None:
        """Take in a step of a question, or write the question that has ended."""
        if _is_question(call):
            if isinstance(call.state, _Asked):
                self._write(call, call.state)
            return
        asked = next(outer.state for outer in call.outer if _is_question(outer))
        if not isinstance(asked, _Asked):
            return
        if isinstance(call.target, SQLRetriever):
            asked.sql, asked.error = _text_of(call), call.error
        elif call.error is None and call.method == _PARSE:
            asked.sql = asked.sql or call.result
        elif call.error is None and call.method == _CONTEXT:
            asked.shown = call.result
        elif call.error is None and call.method == _TABLE_INFO:
            asked.tables[_argument(call)] = call.result

    def _write(self, call: Call, asked: _Asked) -> None:
        question = _text_of(call)
        metadata = call.result[1] if call.error is None else {}
        sql = metadata.get("sql_query", asked.sql)
        if not question or not is_visible(question) or not sql or not is_visible(sql):
            return
        retriever = call.target
        database = retriever._sql_database
        success, error = _outcome(call, asked, metadata)
        fields: dict[str, Any] = {
            **self._sql_fields(sql),
            "dialect": dialect_name(database.dialect),
            "model": _model(retriever),
            "success": success,
            "error": None if error is None else self._cleaned_error(error, database),
            "database": database_name(database.engine.url),
        }
        rows = metadata.get("result")
        if success and isinstance(rows, list):
            fields["rows"] = len(rows)
            if self._keep_rows:
                fields["kept_rows"] = [self._row(row) for row in rows[: self._keep_rows]]
        texts = self._schema_texts(retriever, asked)
        fields |= {name: digest_of(text) for name, text in texts.items()}
        fields = {name: value for name, value in fields.items() if value is not None}
        # Run or not is told also where it is not known: None says that it was not tried.
        fields["success"] = success
        self.write_query(question, call.seconds, fields, {digest_of(t): t for t in texts.values()})

    def _schema_texts(self, retriever: Any, asked: _Asked) -> dict[str, str]:
        """Return the schema as it was shown, and as CREATE TABLE statements, cleaned."""
        shown = asked.shown
        if shown and (_has(retriever, "_rows_retrievers") or _has(retriever, "_cols_retrievers")):
            shown = "\n\n".join(asked.tables.values())  # without the rows and values
        database = retriever._sql_database
        tables = list(asked.tables) or named_in(shown or "", database.get_usable_table_names())
        schema = schema_of(database, tables) if tables else None
        texts = {"schema": shown, "context": None if schema is None else schema.to_text("create")}
        return {name: self.clean(text) for name, text in texts.items() if text}

    def clean(self, text: str) -> str:
        """Return the text without passwords, redacted, and such that a file holds it."""
        return super().clean(_without_url_passwords(_PASSWORD.sub(_hidden, text)))

    def _sql_fields(self, sql: str) -> dict[str, Any]:
        """Return the SQL as a record or a mark holds it, and whether a password was hidden in it.

        There, `password = ...` is a condition. What `redact` changes is as its author wants it.
        """
        hidden = _without_url_passwords(sql)
        fields: dict[str, Any] = {"sql": super().clean(hidden)}
        return fields if hidden == sql else fields | {"sql_changed": True}

    def _cleaned_error(self, error: str, database: Any) -> str:
        password = database.engine.url.password
        if password:
            error = error.replace(str(password), "***")
        return self.clean(error)[:_MAX_ERROR]

    def _row(self, row: Any) -> list[Any]:
        """Return a row as JSON can hold it."""
        plain = (type(None), bool, int, float)
        return [v if type(v) in plain else self.clean(str(v))[:_MAX_CELL] for v in row]

    def mark(
        self, query_id: str | None, *, correct: bool | None = None, sql: str | None = None
    ) -> None:
        """Append what a person says of the SQL. Never raises, as the rest.

        A later mark of the same record takes the place of an earlier one.

        Args:
            query_id: the record's id: `last_query_id`, or see `collect` and `query_ids`.
            correct: whether the SQL answers the question.
            sql: the SQL that does, where the model's does not.
        """
        try:
            if not isinstance(query_id, str):
                raise ArgumentError("query_id", f"is the id of a record, not {query_id!r}")
            if correct is None and sql is None:
                raise ArgumentError("correct", "say whether the SQL is, or give the right one")
            if correct is not None and not isinstance(correct, bool):
                raise ArgumentError("correct", f"is True or False, not {correct!r}")
            if sql is not None and not (isinstance(sql, str) and is_visible(sql)):
                raise ArgumentError("sql", f"is a statement, not {sql!r}")
            fields: dict[str, Any] = {} if correct is None else {"correct": correct}
            if sql is not None:
                fields |= self._sql_fields(sql)
            self.write_mark(query_id, fields)
        except Exception as error:
            self._failed(error)

    # --- From the file -----------------------------------------------------------------------

    def is_record(self, record: Mapping[str, Any]) -> bool:
        """Whether this handler may have written what calls itself its record."""
        texts = ("query", "sql", "dialect")
        return all(isinstance(record.get(name), str) for name in texts) and "success" in record

    def is_mark(self, record: Mapping[str, Any]) -> bool:
        """Whether this handler may have written what calls itself a mark."""
        return isinstance(record.get("correct"), bool) or isinstance(record.get("sql"), str)

    def to_dataset(self) -> Text2SQLDataset:
        """Return what ran and was not marked as wrong; corrected SQL takes the model's place.

        What is marked as correct counts though it was never run. A mark holds for every record
        of the same question, tables and SQL; and where people confirmed or corrected the SQL
        of a question, what else was written for it is left out, unless confirmed, too. SQL in
        which a password was hidden is left out. Each
        example is there once. A log message says how many records are left out, and why.

        Raises:
            DatasetError: nothing is left; says what to do.
            ArtifactError: the file holds something that no `Text2SQLHandler` wrote.
        """
        from ft_text2sql.recorded import examples_of

        examples, left_out = examples_of(self.records())
        if left_out:
            logger.info("%s: records left out: %s", self.path, dict(left_out))
        if not examples:
            found = ", ".join(f"{count} {why}" for why, count in left_out.items())
            raise DatasetError(
                f"no SQL to learn from is recorded ({found or 'no question'}); attach the "
                "handler to the query engine and use it (and see handler.failures for what "
                "could not be recorded), or mark what is right",
                source=self.path,
            )
        return Text2SQLDataset(examples=[Text2SQLExample(**example) for example in examples])


def _is_question(call: Call) -> bool:
    return call.method in _RETRIEVE and isinstance(call.target, NLSQLRetriever)


def _argument(call: Call) -> Any:
    return call.args[0] if call.args else next(iter(call.kwargs.values()), None)


def _text_of(call: Call) -> str | None:
    """Return the question or the SQL that a retriever was given."""
    given = _argument(call)
    text = getattr(given, "query_str", given)
    return text if isinstance(text, str) else None


def _has(retriever: Any, name: str) -> bool:
    return getattr(retriever, name, None) is not None


def _model(retriever: Any) -> str | None:
    llm = getattr(retriever, "_llm", None)
    return None if llm is None else str(llm.metadata.model_name)


def _outcome(
    call: Call, asked: _Asked, metadata: Mapping[str, Any]
) -> tuple[bool | None, str | None]:
    """Return whether the SQL ran (None: nobody tried) and why not."""
    if call.error is not None:
        return False, _described(call.error)
    if getattr(call.target, "_sql_only", False):
        return None, None
    if "result" in metadata:
        return True, None
    if asked.error is not None:
        return False, _described(asked.error)
    nodes = call.result[0]  # LlamaIndex tells the error as the text of the answer
    return False, " ".join(node.node.get_content() for node in nodes).removeprefix("Error: ")


def _described(error: BaseException) -> str:
    """Return what the driver said, which LlamaIndex and SQLAlchemy wrap in their own words."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def _without_url_passwords(text: str) -> str:
    return _URL_PASSWORD.sub(r"\g<before>***", text)


def _hidden(match: re.Match[str]) -> str:
    return f"{match['key'] or match['encoded']}***"
