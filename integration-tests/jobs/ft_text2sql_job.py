"""Ask a database, record, evaluate; `test_packaging.py` runs this with ft-text2sql and no extra.

Without torch no model is trained here: the engine comes as far as it can, and then says what is
missing.
"""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from llama_index.core import SQLDatabase
from llama_index.core.base.llms.types import CompletionResponse, LLMMetadata
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_completion_callback
from sqlalchemy import create_engine

from ft_core.errors import FTError, MissingExtraError
from ft_text2sql import (
    Limits,
    ReadOnlyDatabase,
    Text2SQLFinetuneEngine,
    Text2SQLHandler,
    Text2SQLRetriever,
    evaluate_text2sql,
    read_sql_create_context,
)
from ft_text2sql.errors import QueryTimeoutError, UnsafeSQLError
from ft_text2sql.query_engine import Text2SQLQueryEngine

TREES = "CREATE TABLE trees (name TEXT, height REAL, park TEXT)"
SQL = {
    "How many trees are there?": "SELECT count(*) FROM trees",
    "Which trees stand in the Elm Park?": "SELECT name FROM trees WHERE park = 'Elm Park'",
    "What is the tallest tree?": "SELECT name FROM trees ORDER BY height DESC LIMIT 1",
    "Cut them all down.": "DELETE FROM trees",
}


class Gardener(CustomLLM):
    """Knows the SQL of four questions."""

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(model_name="gardener")

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return CompletionResponse(text=next(sql for asked, sql in SQL.items() if asked in prompt))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        raise NotImplementedError


def main() -> None:
    file = Path("trees.db")
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(
            f"{TREES}; INSERT INTO trees VALUES ('oak', 21.5, 'Elm Park'), ('ash', 17, 'Common')"
        )
    before = file.read_bytes()
    guard(f"sqlite:///{file}")
    journal = ask(f"sqlite:///{file}")
    assert file.read_bytes() == before
    train(journal)
    commands(file, journal)


def guard(url: str) -> None:
    """A query runs, what is none does not, and one that never ends is stopped."""
    database = ReadOnlyDatabase(url, limits=Limits(timeout=0.5))
    assert database.execute("SELECT name FROM trees WHERE height > 20").rows == [("oak",)]
    for sql in ("DROP TABLE trees", "SELECT 1; DELETE FROM trees"):
        assert error_of(UnsafeSQLError, lambda sql=sql: database.execute(sql))
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
    message = error_of(
        QueryTimeoutError, lambda: database.execute(f"{endless} SELECT count(*) FROM n")
    )
    assert "was stopped" in message, message
    database.close()


def ask(url: str) -> Path:
    """Ask LlamaIndex's query engine, record what it writes, and score it."""
    engine = create_engine(url)
    retriever = Text2SQLRetriever(SQLDatabase(engine), Gardener(), repair=False)
    query_engine = Text2SQLQueryEngine(retriever)
    handler = Text2SQLHandler("asked.jsonl")
    with handler.attach(query_engine):
        answers = {question: str(query_engine.query(question)) for question in SQL}
    assert answers["How many trees are there?"] == "[(2,)]", answers
    assert answers["Cut them all down."].startswith("Error: "), answers
    dataset = handler.to_dataset()
    assert {example.sql for example in dataset} == set(list(SQL.values())[:3]), dataset
    dataset.save("train.jsonl")

    report = evaluate_text2sql(query_engine, dataset, url, show_progress=False)
    (run,) = report.runs
    assert run.mean("execution_accuracy") == 1.0, report.to_dict()
    engine.dispose()
    return Path("train.jsonl")


def train(journal: Path) -> None:
    """Others' data is read; training names the extra that is missing."""
    pairs = [{"question": q, "context": TREES, "answer": sql} for q, sql in SQL.items()]
    Path("pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    assert len(read_sql_create_context("pairs.json")) == len(SQL)

    engine = Text2SQLFinetuneEngine(journal, "some/model", "sql")
    message = error_of(MissingExtraError, engine.finetune)
    assert "pip install" in message, message
    assert "[local]'" in message, message
    assert not Path("sql").exists()


def error_of(kind: type[FTError], action: Callable[[], object]) -> str:
    """Return the message of the error that the action must end in."""
    try:
        action()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def commands(file: Path, journal: Path) -> None:
    ft = Path(sys.executable).with_name("ft")
    help_page = subprocess.run([ft, "--help"], check=True, capture_output=True, text=True).stdout
    assert "text2sql" in help_page, help_page
    assert "cannot be loaded" not in help_page, help_page
    train = [ft, "text2sql", "train", journal, "--base-model", "some/model", "--output", "sql"]
    result = subprocess.run([*train, "--database", file], capture_output=True, text=True)
    assert result.returncode == 1, result
    assert "[local]'" in result.stderr, result


if __name__ == "__main__":
    main()
