"""One generation of questions with SQL: asks in turns, runs what comes, and keeps what holds."""

from __future__ import annotations

import asyncio
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_core.datasets import Text2SQLDataset, Text2SQLExample
from ft_core.datasets.duplicates import jaccard, shingles
from ft_core.errors import GenerationError
from ft_core.generation.calls import JournalledCalls
from ft_core.generation.journal import AnswerJournal
from ft_text2sql.comparison import hardness
from ft_text2sql.database import ReadOnlyDatabase
from ft_text2sql.errors import InvalidSQLError, QueryTimeoutError, SQLError, UnsafeSQLError
from ft_text2sql.guard import table_names
from ft_text2sql.identifiers import quote_name
from ft_text2sql.pair_prompts import choose_kind, choose_tables, read_pairs, write_prompt
from ft_text2sql.results import QueryResult
from ft_text2sql.schema import Schema, Table

if TYPE_CHECKING:
    from llama_index.core.llms import LLM

    from ft_text2sql.generation import GenerationSettings

_WINDOW = 8
"""Calls that do not know of each other's questions. It must not depend on how many questions
are wanted: a later run for more then asks the same first calls, and finds them in the journal."""
_BARREN = 3
"""So many windows in a row without a new pair, and it gives up."""
_EARLIER = 10
_VALUES = 3
_MAX_VALUE = 40


@dataclass(frozen=True)
class _Asked:
    """One call: what it shows, and what it asks."""

    number: int
    focus: Table
    schema: Schema
    prompt: str

    @property
    def name(self) -> str:
        return f"call {self.number + 1}"


class GenerationRun:
    """Asks in turns, runs what comes, and gathers the pairs that hold.

    Args:
        llm: writes the pairs.
        database: runs the SQL.
        schema: the tables to ask about.
        name: of the database, in the dataset.
        settings: of the generation.
        output: the dataset's file; the journal stands beside it.

    Raises:
        ArtifactError: the journal's file holds something else.
    """

    def __init__(
        self,
        llm: LLM,
        database: ReadOnlyDatabase,
        schema: Schema,
        name: str | None,
        settings: GenerationSettings,
        output: Path,
    ) -> None:
        self.journal = AnswerJournal(output, Text2SQLDataset)
        self.dropped: Counter[str] = Counter()
        self.calls = JournalledCalls(
            llm,
            self.journal,
            ["text2sql", settings.seed],
            workers=settings.workers,
            max_retries=settings.max_retries,
            retry_limit=settings.retry_limit,
            on_failure=settings.on_failure,
            item="call",
        )
        self._model = str(llm.metadata.model_name)
        self._database, self._schema, self._name = database, schema, name
        self._settings = settings
        self._answers: dict[int, str] = {}
        self._values: dict[str, list[str]] = {}
        self._running = asyncio.Semaphore(settings.workers)
        self._kept: list[Text2SQLExample] = []
        self._shingles: list[Any] = []
        self._queries: Counter[str] = Counter()
        self._about: dict[str, list[str]] = defaultdict(list)

    async def ask_all(self, *, verbose: bool) -> None:
        """Ask until there are enough pairs, or no more come."""
        wanted, per_call = self._settings.num_questions, self._settings.questions_per_call
        number, barren = 0, 0
        while len(self._kept) < wanted and barren < _BARREN:
            end, before = number + _WINDOW, len(self._kept)
            window = [await self._asked(n) for n in range(number, end)]
            while window and len(self._kept) < wanted:
                size = math.ceil((wanted - len(self._kept)) / per_call)
                batch, window = window[:size], window[size:]
                await self.calls.for_each(
                    batch, self._ask, title="writing questions", unit="call", verbose=verbose
                )
                for asked in batch:
                    await self._take(asked)
            number = end
            barren = barren + 1 if len(self._kept) == before else 0

    async def _asked(self, number: int) -> _Asked:
        settings = self._settings
        focus, tables = choose_tables(
            self._schema, number, seed=settings.seed, most=settings.max_tables
        )
        schema = self._schema.select([table.full_name for table in tables])
        prompt = write_prompt(
            settings.prompt,
            schema,
            focus,
            choose_kind(number, seed=settings.seed),
            count=settings.questions_per_call,
            values=await self._sampled(schema) if settings.sample_values else [],
            earlier=self._about[focus.full_name][-_EARLIER:],
        )
        return _Asked(number, focus, schema, prompt)

    async def _ask(self, asked: _Asked) -> None:
        answer = await self.calls.answer(asked.prompt, [asked.name], asked.number)
        if answer is not None:
            self._answers[asked.number] = answer

    # --- The values of columns ---------------------------------------------------------------

    async def _sampled(self, schema: Schema) -> list[str]:
        """Return a comment line with values for each column that has some."""
        for table in schema.tables:
            if table.full_name not in self._values:
                found = await asyncio.gather(*(self._of(table, c.name) for c in table.columns))
                self._values[table.full_name] = [line for line in found if line]
        return [line for table in schema.tables for line in self._values[table.full_name]]

    async def _of(self, table: Table, column: str) -> str:
        parts = [table.namespace, table.name] if table.namespace else [table.name]
        place = ".".join(quote_name(part, self._schema.dialect) for part in parts)
        name = quote_name(column, self._schema.dialect)
        # Sorted, so that a later run sees the same ones and finds its answers in the journal.
        sql = (
            f"SELECT DISTINCT {name} FROM {place} WHERE NOT {name} IS NULL "
            f"ORDER BY {name} LIMIT {_VALUES}"
        )
        try:
            result = await self._run(sql)
        except SQLError:  # JSON, say, has no order
            return ""
        values = [_literal(row[0]) for row in result.rows if not isinstance(row[0], bytes)]
        return f"-- {place}.{name}: {', '.join(values)}, ..." if values else ""

    # --- The pairs ---------------------------------------------------------------------------

    async def _run(self, sql: str) -> QueryResult:
        async with self._running:
            return await self._database.aexecute(sql)

    async def _take(self, asked: _Asked) -> None:
        """Keep what holds of an answer, in its order."""
        answer = self._answers.pop(asked.number, None)
        if answer is None:
            return
        pairs = read_pairs(answer)
        if not pairs:
            self.calls.report([asked.name], "the answer holds no question with SQL")
            self.dropped["answer that cannot be read"] += 1
        problems = await asyncio.gather(*(self._problem(asked, sql) for _, sql in pairs))
        for (question, sql), problem in zip(pairs, problems, strict=True):
            if len(self._kept) == self._settings.num_questions:
                self.dropped["more than asked for"] += 1
            elif reason := problem or self._repeats(question, sql, asked):
                self.dropped[reason] += 1
            else:
                self._keep(question, sql, asked)

    async def _problem(self, asked: _Asked, sql: str) -> str | None:
        """Return why SQL is not fit to learn from, or None."""
        try:
            self._database.check(sql)
            if any(asked.schema.table(t) is None for t in self._tables(sql)):
                return "reads a table that was not shown"
            result = await self._run(sql)
        except InvalidSQLError:
            return "not SQL"
        except UnsafeSQLError:
            return "refused by the guard"
        except QueryTimeoutError:
            return "too slow"
        except SQLError:
            return "failed in the database"
        if not self._settings.keep_empty and _is_empty(result):
            return "empty result"
        return None

    def _tables(self, sql: str) -> set[str]:
        return set(table_names(sql, dialect=self._database.dialect))

    def _repeats(self, question: str, sql: str, asked: _Asked) -> str | None:
        if not any(character.isalnum() for character in question):
            return "question without a word"
        own = shingles(question)
        for other in self._shingles:
            # Sets of very different sizes cannot be that much alike.
            fit = min(len(own), len(other)) >= self._settings.threshold * max(len(own), len(other))
            if fit and jaccard(own, other) >= self._settings.threshold:
                return "question that is there already"
        example = self._example(question, sql, asked)
        if self._queries[example.anonymous_sql()] >= self._settings.max_per_query:
            return "SQL that is there already, literals apart"
        return None

    def _keep(self, question: str, sql: str, asked: _Asked) -> None:
        example = self._example(question, sql, asked)
        self._kept.append(example)
        self._shingles.append(shingles(question))
        self._queries[example.anonymous_sql()] += 1
        for name in self._tables(sql):
            if table := self._schema.table(name):
                self._about[table.full_name].append(question)

    def _example(self, question: str, sql: str, asked: _Asked) -> Text2SQLExample:
        dialect = self._database.dialect
        return Text2SQLExample(
            question=question,
            sql=sql,
            context=asked.schema.to_text("create"),
            database=self._name,
            dialect=dialect,
            difficulty=hardness(sql, dialect),
            metadata={"model": self._model},
        )

    def dataset(self) -> Text2SQLDataset:
        """Return what is kept.

        Raises:
            GenerationError: there is nothing; says why.
        """
        if not self._kept:
            reasons = [f"{why} ({count})" for why, count in self.dropped.most_common(3)]
            reasons += list(dict.fromkeys(self.calls.failed.values()))[:2]
            raise GenerationError(
                f"no question with SQL came of it: {'; '.join(reasons)}; what was answered is "
                f"kept in {self.journal.path}"
            )
        return Text2SQLDataset(examples=self._kept)


def _literal(value: Any) -> str:
    """Return a value as SQL writes it, cut where it is long."""
    text = str(value)
    text = text if len(text) <= _MAX_VALUE else text[:_MAX_VALUE] + "..."
    if isinstance(value, int | float):
        return text
    return "'" + " ".join(text.split()).replace("'", "''") + "'"


def _is_empty(result: QueryResult) -> bool:
    rows: Sequence[Sequence[Any]] = result.rows
    return all(cell is None for row in rows for cell in row)
