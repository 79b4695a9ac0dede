"""Questions with SQL for a live database, by an LLM; each SQL is run before it is kept."""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ft_core.datasets import Text2SQLDataset
from ft_core.datasets.duplicates import DEFAULT_THRESHOLD
from ft_core.errors import ArgumentError
from ft_core.generation import runner
from ft_core.generation.calls import check_llm
from ft_text2sql.database import ReadOnlyDatabase
from ft_text2sql.pair_prompts import PAIRS_PROMPT, check_prompt
from ft_text2sql.pair_run import GenerationRun
from ft_text2sql.results import Limits
from ft_text2sql.schema import Schema
from ft_text2sql.shown_schema import database_name

if TYPE_CHECKING:
    from llama_index.core.llms import LLM

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationResult:
    """What a run gave."""

    dataset: Text2SQLDataset
    dropped: dict[str, int] = field(default_factory=dict)
    """Why pairs were not kept, to how many; the most frequent first."""
    failures: dict[str, str] = field(default_factory=dict)
    """Call to why it failed, or what its answer lacks."""
    calls: int = 0
    """Answers that were asked for in this run."""
    resumed: int = 0
    """Answers that an earlier run had journalled."""


@dataclass(frozen=True)
class GenerationSettings:
    """The settings of `generate_text2sql_dataset`, checked.

    Raises:
        ArgumentError: names the setting and what it may be.
    """

    num_questions: int = 100
    sample_values: bool = False
    keep_empty: bool = False
    questions_per_call: int = 5
    max_per_query: int = 3
    max_tables: int = 8
    threshold: float = DEFAULT_THRESHOLD
    prompt: str = PAIRS_PROMPT
    workers: int = 8
    max_retries: int = 8
    retry_limit: int = 3
    on_failure: str = "continue"
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"num_questions": 1, "questions_per_call": 1, "max_per_query": 1, "max_tables": 1}
        least |= {"workers": 1, "retry_limit": 1, "max_retries": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if type(value) is not int or value < lowest:
                raise ArgumentError(name, f"must be a whole number from {lowest}, not {value!r}")
        if not 0 < self.threshold <= 1:
            raise ArgumentError("threshold", f"is above 0 and at most 1, not {self.threshold}")
        if self.on_failure not in ("continue", "fail"):
            raise ArgumentError(
                "on_failure", f"must be one of continue, fail, not {self.on_failure!r}"
            )
        check_prompt(self.prompt)


def generate_text2sql_dataset(
    database: Any,
    llm: LLM,
    *,
    num_questions: int = 100,
    tables: Collection[str] | None = None,
    output_path: str | Path = "text2sql_dataset.jsonl",
    sample_values: bool = False,
    keep_empty: bool = False,
    questions_per_call: int = 5,
    max_per_query: int = 3,
    max_tables: int = 8,
    threshold: float = DEFAULT_THRESHOLD,
    prompt: str = PAIRS_PROMPT,
    limits: Limits | None = None,
    workers: int = 8,
    max_retries: int = 8,
    retry_limit: int = 3,
    on_failure: Literal["continue", "fail"] = "continue",
    seed: int = 0,
    verbose: bool = True,
) -> Text2SQLDataset:
    """Ask an LLM for questions with SQL about a live database, and keep the pairs that hold.

    Of the database the LLM sees the schema, and no row unless `sample_values` says so. A pair
    is kept where its SQL passes the guard, reads only tables that the LLM was shown, runs
    read-only within the limits, and returns something; where no question much like it is there
    already; and where there are not yet `max_per_query` pairs with the same SQL, literals apart.
    A log message (level INFO) says how many were dropped and why; `generate` returns it.

    Every answer goes into `<output_path>.journal.jsonl` as it arrives. A run that was
    killed is taken up by running it again; nothing that was answered is asked for again, and
    with unchanged data the dataset is the one that an undisturbed run gives. Asking for more
    questions later begins with the same ones. Other tables, values, prompt, model or seed ask
    anew.

    It works in a notebook too, where an event loop is running; async code awaits `generate`.

    Args:
        database: a `ReadOnlyDatabase`, LlamaIndex's SQLDatabase, a SQLAlchemy engine or a URL.
        llm: any LlamaIndex LLM (`ft_core.llms.load_llm` makes one from a short name).
        num_questions: how many pairs to make. There may be fewer, with a warning.
        tables: the tables to ask about, which alone are shown and read; all by default.
        output_path: the dataset's JSON Lines file. An earlier state of the same dataset is
            replaced; any other file is refused.
        sample_values: show the LLM up to three values of each column. They leave your machine,
            if the LLM is a service, and its SQL may quote them.
        keep_empty: keep SQL that returns no row, or nothing but NULL.
        questions_per_call: questions to ask for at once.
        max_per_query: pairs whose SQL differs in literals only.
        max_tables: of a database with more, a call shows so many, which belong together.
        threshold: similarity from which two questions count as the same (see
            `ft_core.datasets.duplicates.similarity`).
        prompt: what to ask, with `{dialect}`, `{schema}` and `{num_questions}`; see
            `PAIRS_PROMPT` for the other places that are filled.
        limits: of each query; those of a `ReadOnlyDatabase` are its own.
        workers: calls in flight, and queries running, at most. A model in this process is
            called once at a time.
        max_retries: further calls after a rate limit, a server error, a timeout or a lost
            connection, with exponential back-off, respecting `Retry-After`.
        retry_limit: calls in all where the LLM raises an error of unknown nature.
        on_failure: "continue" passes over a call that failed or whose answer cannot be read;
            "fail" stops at the first.
        seed: decides which tables stand together, and their turn; another seed asks anew.
        verbose: show progress, where stderr is a terminal.

    Raises:
        ArgumentError: an argument cannot be used, or a table is not there.
        DatabaseError: the database cannot be read or protected. The journal is kept.
        GenerationError: no pair at all came of it, the server rejects every call (a wrong
            key, say), `output_path` holds something else, or a call failed and `on_failure`
            is "fail". The journal is kept.
    """
    settings = GenerationSettings(
        num_questions=num_questions,
        sample_values=sample_values,
        keep_empty=keep_empty,
        questions_per_call=questions_per_call,
        max_per_query=max_per_query,
        max_tables=max_tables,
        threshold=threshold,
        prompt=prompt,
        workers=workers,
        max_retries=max_retries,
        retry_limit=retry_limit,
        on_failure=on_failure,
        seed=seed,
    )
    result = runner.run(
        generate(
            database, llm, output_path, settings, tables=tables, limits=limits, verbose=verbose
        )
    )
    logger.info("kept %d pairs; dropped: %s", len(result.dataset), result.dropped)
    _warn(result, num_questions)
    return result.dataset


async def generate(
    database: Any,
    llm: LLM,
    output_path: str | Path,
    settings: GenerationSettings,
    *,
    tables: Collection[str] | None = None,
    limits: Limits | None = None,
    verbose: bool = True,
) -> GenerationResult:
    """Generate, and return the dataset together with what was dropped; warns of nothing.

    Raises:
        ArgumentError, DatabaseError, GenerationError: see `generate_text2sql_dataset`.
    """
    check_llm(llm)
    read_only, schema, name = await asyncio.to_thread(_opened, database, tables, limits)
    try:
        run = GenerationRun(llm, read_only, schema, name, settings, Path(output_path))
        run.journal.check_output([name or ""])
        await run.ask_all(verbose=verbose)
        dataset = run.dataset()
        run.journal.save(dataset)
    finally:
        if read_only is not database:
            read_only.close()
    calls = run.calls
    return GenerationResult(
        dataset, dict(run.dropped.most_common()), calls.failed, calls.made, calls.resumed
    )


def _opened(
    database: Any, tables: Collection[str] | None, limits: Limits | None
) -> tuple[ReadOnlyDatabase, Schema, str | None]:
    """Return what runs the SQL, the tables, and a name for the database."""
    from ft_text2sql.retriever import schema_of

    if isinstance(tables, str):
        raise ArgumentError("tables", f"is a list of names; write [{tables!r}]")
    if isinstance(database, ReadOnlyDatabase):
        if limits is not None:
            raise ArgumentError("limits", "the ReadOnlyDatabase has its own; leave them out")
        read_only = database
    else:
        read_only = ReadOnlyDatabase(database, limits=limits)
    guarded = read_only.as_sql_database()
    schema = schema_of(guarded)
    if tables is not None:
        schema = schema.select(tables)
        if not schema.tables:
            raise ArgumentError("tables", "is empty; name at least one, or leave it out")
    return read_only, schema, database_name(guarded.engine.url)


def _warn(result: GenerationResult, wanted: int) -> None:
    lines = [f"{call}: {reason}" for call, reason in result.failures.items()]
    if len(result.dataset) < wanted:
        dropped = ", ".join(f"{why} ({count})" for why, count in result.dropped.items())
        lines.insert(0, f"{len(result.dataset)} of {wanted} pairs; dropped: {dropped or 'none'}")
    if lines:
        warnings.warn("generation gave less than asked for:\n  " + "\n  ".join(lines), stacklevel=3)
