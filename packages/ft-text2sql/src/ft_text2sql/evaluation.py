"""Have several models write SQL for the same questions, and compare what it returns.

report = evaluate_text2sql({"base": base, "tuned": query_engine}, test, sql_database)
rich.print(report)
report.save_html("sql.html")
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_core.answer_log import AnswerLog
from ft_core.datasets import Text2SQLDataset, Text2SQLExample
from ft_core.errors import ArgumentError, DatasetError
from ft_core.evaluation import AnswerEvaluation, in_order
from ft_core.metrics import bootstrap_interval, results_match
from ft_core.progress import progress
from ft_core.report import Statistic, Text2SQLReport
from ft_text2sql.comparison import asks_for_order, hardness, normalise_sql
from ft_text2sql.database import ReadOnlyDatabase
from ft_text2sql.errors import InvalidSQLError, QueryTimeoutError, SQLError, UnsafeSQLError
from ft_text2sql.guarded import GuardedSQLDatabase
from ft_text2sql.results import Limits, QueryResult
from ft_text2sql.retriever import schema_of
from ft_text2sql.writers import Asked, Writer, Written

if TYPE_CHECKING:
    from llama_index.core.prompts import BasePromptTemplate

    from ft_text2sql.schema import Schema

logger = logging.getLogger(__name__)

__all__ = ["EVALUATION_LIMITS", "Text2SQLReport", "evaluate_text2sql"]

EVALUATION_LIMITS = Limits(timeout=30, rows=100_000, cell=1_000_000, result=100_000_000)
"""Of each query where the database is not a `ReadOnlyDatabase`, which has limits of its own."""

_LEVELS = ("easy", "medium", "hard", "extra")


def evaluate_text2sql(
    writers: Any,
    dataset: Text2SQLDataset | Path | str,
    database: Any,
    *,
    prompt: BasePromptTemplate | None = None,
    limits: Limits | None = None,
    baseline: str | None = None,
    journal: Path | str | None = None,
    num_workers: int = 4,
    show_progress: bool = True,
    seed: int = 0,
) -> Text2SQLReport:
    """Return how often the SQL of each writer returns what the right SQL returns.

    Metrics, a value for each question:

    - `execution_accuracy`: 1 where the results match (`ft_core.metrics.results_match`, the
      definition of Spider's test-suite evaluation): rows as often, columns in any order, rows in
      order where the outermost query of the right SQL has ORDER BY.
    - `valid_sql`: 1 where the SQL parses, passes the guard and runs within the limits.
    - `exact_match`: 1 where it is the right SQL in other spelling (see `normalise_sql`).
    - `latency`: seconds until the SQL was there; of a writer that votes on results, with the
      runs of its candidates.

    A call that failed counts as a wrong answer; the report names it. All SQL runs through a
    `ReadOnlyDatabase`, whatever connection the writers have.

    Results are compared whole. A question whose own SQL does not run, is refused by the guard,
    or returns more than the limits allow, cannot be scored: it is left out for all writers, and
    the report says how many there are and why. A prediction that returns more than the
    limits allow, and so more rows than the right SQL, is wrong; where only its size in
    characters hid how many rows it has, it gets no execution accuracy, and the report says so.

    Beside the metrics, execution accuracy at each level of difficulty, with its interval: that
    of the dataset where every example has one, and Spider's hardness of the right SQL otherwise.

    Args:
        writers: a query engine or retriever of LlamaIndex, an LLM, or a function from a question
            to SQL; or name to several. They do not see the right SQL.
        dataset: questions with the right SQL.
        database: what the SQL runs on: a `ReadOnlyDatabase`, LlamaIndex's SQLDatabase, a
            SQLAlchemy engine or a URL; or a mapping of those, by the examples' `database`.
        prompt: how an LLM is asked, with `{query_str}`, `{schema}` and `{dialect}`;
            LlamaIndex's default. It is shown the example's own schema, or the database's.
        limits: of each query; `EVALUATION_LIMITS` by default.
        baseline: the writer that the others are compared with; the first by default.
        journal: a file that keeps the answers, so that a run that was cut short goes on where
            it was; it must not outlive a change of the writers under the same names.
        num_workers: how many questions are asked, and queries run, at the same time. A model
            in this process is asked one at a time. For latencies that do not depend on each
            other take 1.
        show_progress: show bars on stderr where that is a terminal.
        seed: of the intervals and the tests.

    Raises:
        ArgumentError: an argument that cannot be used, or a database that the examples name
            and `database` lacks.
        ArtifactError: the journal is another file.
        DatasetError: the file is bad, or no example's SQL runs.
        DatabaseError: a database cannot be read or protected. Answers are in the journal.
    """
    dataset = Text2SQLDataset.coerce(dataset)
    targets = writers if isinstance(writers, Mapping) else {"writer": writers}
    if not targets:
        raise ArgumentError("writers", "is empty; name at least one")
    if num_workers < 1:
        raise ArgumentError("num_workers", f"must be at least 1, not {num_workers}")
    if seed < 0:
        raise ArgumentError("seed", f"must be 0 or more, not {seed}")
    ready = [Writer(name, target, prompt) for name, target in targets.items()]
    if baseline is not None and baseline not in targets:
        raise ArgumentError("baseline", f"{baseline!r} is no writer; there is {list(targets)}")
    log = AnswerLog(journal, Written)
    with _opened(database, dataset, limits) as databases:
        items = [
            _Item(str(number), example, databases[_name(example, database)])
            for number, example in enumerate(dataset, 1)
        ]
        checked = in_order(_refusal, items, num_workers)
        reasons = list(progress(checked, "Right SQL", len(items), show_progress))
        excluded = {i.key: why for i, why in zip(items, reasons, strict=True) if why}
        items = [item for item in items if item.key not in excluded]
        if not items:
            first = next(iter(excluded.values()))
            raise DatasetError(
                f"none of its {len(dataset)} SQL queries gives a result to compare with; the "
                f"first: {first}"
            )
        if excluded:
            number, why = next(iter(excluded.items()))
            logger.warning(
                "%d of %d questions are left out: their own SQL gives nothing to compare with; "
                "question %s: %s",
                len(excluded),
                len(dataset),
                number,
                why,
            )
        answers, seconds = {}, {}
        for writer in ready:
            start = time.perf_counter()
            workers = 1 if writer.is_in_process else num_workers
            asked = in_order(partial(_ask, log, writer), items, workers)
            answers[writer.name] = list(progress(asked, writer.name, len(items), show_progress))
            seconds[writer.name] = time.perf_counter() - start
        rounds = list(zip(items, zip(*answers.values(), strict=True), strict=True))
        scored = in_order(_scored, rounds, num_workers)
        scores = list(progress(scored, "Results", len(items), show_progress))
    evaluations = [
        _evaluation(
            writer.name,
            items,
            answers[writer.name],
            [row[place] for row in scores],
            seconds[writer.name],
            dataset.content_hash,
        )
        for place, writer in enumerate(ready)
    ]
    return Text2SQLReport(
        evaluations,
        {item.key: item.shown for item in items},
        {item.key: item.example.sql for item in items},
        statistics=_by_difficulty(items, evaluations, seed),
        excluded=excluded,
        title="Text-to-SQL",
        baseline=baseline,
        primary="execution_accuracy",
        seed=seed,
    )


# --- What the questions are about ------------------------------------------------------------


@dataclass(frozen=True)
class _Database:
    """What SQL runs on, and what it is written for."""

    read_only: ReadOnlyDatabase
    schema: Schema

    @property
    def dialect(self) -> str:
        dialect: str = self.read_only.dialect
        return dialect


@dataclass(frozen=True)
class _Item:
    """A question with its right SQL."""

    key: str
    """Its number in the dataset, from 1."""
    example: Text2SQLExample
    database: _Database

    @property
    def shown(self) -> str:
        """What a report shows of it."""
        name = self.example.database
        return f"{self.example.question} [{name}]" if name else self.example.question

    @property
    def level(self) -> str:
        """Spider's hardness of the right SQL."""
        return hardness(self.example.sql, self.database.dialect)


@contextmanager
def _opened(
    database: Any, dataset: Text2SQLDataset, limits: Limits | None
) -> Iterator[dict[str, _Database]]:
    """Yield the databases of the examples by name, "" for the only one; close those made here."""
    given = {"": database}
    if isinstance(database, Mapping):
        needed = dict.fromkeys(example.database or "" for example in dataset)
        missing = [name for name in needed if name not in database]
        if missing:
            what = f"has no {missing[0]!r}" if missing[0] else "is one, and examples name none"
            raise ArgumentError("database", f"{what}; there is {', '.join(map(str, database))}")
        given = {name: database[name] for name in needed}
    made = []
    try:
        opened = {}
        for name, source in given.items():
            read_only, is_new = _read_only(source, limits)
            if is_new:
                made.append(read_only)
            opened[name] = _Database(read_only, schema_of(read_only.as_sql_database()))
        yield opened
    finally:
        for read_only in made:
            read_only.close()


def _read_only(source: Any, limits: Limits | None) -> tuple[ReadOnlyDatabase, bool]:
    if isinstance(source, GuardedSQLDatabase):
        source = source.read_only
    if not isinstance(source, ReadOnlyDatabase):
        return ReadOnlyDatabase(source, limits=limits or EVALUATION_LIMITS), True
    if limits is not None:
        raise ArgumentError(
            "limits", "the database has its own; give them to ReadOnlyDatabase, or leave them out"
        )
    return source, False


def _name(example: Text2SQLExample, database: Any) -> str:
    return (example.database or "") if isinstance(database, Mapping) else ""


# --- Asking and scoring ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Score:
    """What one answer is worth."""

    correct: bool | None
    """None: its result cannot be compared, for the reason in `problem`."""
    valid: bool = False
    exact: bool = False
    problem: str | None = None
    """What is wrong with SQL that does not run."""


def _refusal(item: _Item) -> str | None:
    """Return why the right SQL gives nothing to compare with, or None."""
    try:
        result = item.database.read_only.execute(item.example.sql)
    except SQLError as error:
        return error.reason
    if result.truncated:
        limits = item.database.read_only.limits
        return (
            f"it returns more than the limits allow ({limits.rows:,} rows, {limits.cell:,} "
            f"characters a cell, {limits.result:,} in all); raise them to have it compared"
        )
    return None


def _ask(log: AnswerLog[Written], writer: Writer, item: _Item) -> Written:
    schema = item.example.context or item.database.schema.to_text("create")
    asked = Asked(item.example.question, schema, item.database.dialect)
    return log.ask([writer.identity, asdict(asked)], lambda: writer.ask(asked))


def _scored(round_: tuple[_Item, Sequence[Written]]) -> list[_Score]:
    """Score the answers of all writers to one question, in their order."""
    item, answers = round_
    try:
        gold = item.database.read_only.execute(item.example.sql)
    except SQLError as error:  # it ran before: too slow this time
        return [_Score(None, problem=f"the right SQL did not run again: {error}")] * len(answers)
    known: dict[str, _Score] = {}  # writers often agree
    for written in answers:
        if written.sql not in known:
            known[written.sql] = _score(item, gold, written.sql)
    return [known[written.sql] for written in answers]


def _score(item: _Item, gold: QueryResult, sql: str) -> _Score:
    if not sql:
        return _Score(False, problem="wrote nothing")
    dialect, schema = item.database.dialect, item.database.schema
    right = normalise_sql(item.example.sql, dialect, schema)
    exact = normalise_sql(sql, dialect, schema) == right
    try:
        result = item.database.read_only.execute(sql)
    except SQLError as error:
        return _Score(False, exact=exact, problem=f"{_kind(error)}: {error.reason}")
    if not result.truncated:
        ordered = asks_for_order(item.example.sql, dialect)
        return _Score(results_match(gold.rows, result.rows, ordered=ordered), True, exact)
    # The right result is whole. One with a row more, or a longer cell, is another; but one cut
    # off for its size may be the same rows in another order.
    if len(result.rows) >= len(gold.rows):
        return _Score(False, True, exact)
    limit = item.database.read_only.limits.result
    return _Score(None, True, exact, f"its result has more than {limit:,} characters")


def _kind(error: SQLError) -> str:
    """Return what went wrong in a word or two, for the report to count."""
    kinds = ((InvalidSQLError, "not SQL"), (UnsafeSQLError, "refused"))
    if isinstance(error, QueryTimeoutError):
        return "too slow"
    return next((kind for type_, kind in kinds if isinstance(error, type_)), "failed")


def _evaluation(
    name: str,
    items: Sequence[_Item],
    answers: Sequence[Written],
    scores: Sequence[_Score],
    seconds: float,
    digest: str,
) -> AnswerEvaluation:
    rows = [(i.key, a, s) for i, a, s in zip(items, answers, scores, strict=True)]
    metrics = {
        "execution_accuracy": {k: float(s.correct) for k, _, s in rows if s.correct is not None},
        "valid_sql": {k: float(s.valid) for k, _, s in rows if s.valid or s.correct is not None},
        "exact_match": {k: float(s.exact) for k, _, s in rows if s.valid or s.correct is not None},
        "latency": {k: a.seconds for k, a, _ in rows if a.error is None},
    }
    unscored = {key: s.problem for key, _, s in rows if s.correct is None and s.problem}
    return AnswerEvaluation(
        name=name,
        dataset_hash=digest,
        scores={metric: values for metric, values in metrics.items() if values},
        seconds=seconds,
        answers={key: a.sql for key, a, _ in rows},
        failures={key: a.error for key, a, _ in rows if a.error is not None},
        invalid={
            key: s.problem
            for key, a, s in rows
            if s.problem and s.correct is not None and a.error is None
        },
        unscored={"execution_accuracy": unscored} if unscored else {},
    )


def _by_difficulty(
    items: Sequence[_Item], evaluations: Sequence[AnswerEvaluation], seed: int
) -> dict[str, dict[str, Statistic]]:
    """Return run to level to execution accuracy, the easiest first."""
    own = all(item.example.difficulty for item in items)
    levels: dict[str, list[str]] = {level: [] for level in _LEVELS}
    for item in items:
        level = str(item.example.difficulty) if own else item.level
        levels.setdefault(level, []).append(item.key)
    statistics: dict[str, dict[str, Statistic]] = {run.name: {} for run in evaluations}
    for level, keys in levels.items():
        for run in evaluations:
            values = run.scores.get("execution_accuracy", {})
            found = [values[key] for key in keys if key in values]
            if found:
                interval = bootstrap_interval(found, seed=seed)
                label = f"{level} (n = {len(keys)})"
                mean = sum(found) / len(found)
                statistics[run.name][label] = Statistic(mean, *interval, len(found))
    return statistics
