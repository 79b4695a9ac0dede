"""Choose among several SQL queries by what they return: execution-guided self-consistency.

The idea is that of Wang et al. 2022, "Self-Consistency Improves Chain of Thought Reasoning in
Language Models" (arXiv:2203.11171), with results in the place of answers, as Shi et al. 2022 have
it, "Natural Language to Code Translation with Execution" (arXiv:2204.11454).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ft_core.errors import ArgumentError
from ft_core.metrics import results_match
from ft_text2sql.comparison import asks_for_order, normalise_sql
from ft_text2sql.database import ReadOnlyDatabase
from ft_text2sql.errors import QueryCancelledError, SQLError
from ft_text2sql.names import check_schema
from ft_text2sql.results import QueryResult
from ft_text2sql.schema import Schema


@dataclass(frozen=True)
class Candidate:
    """A query that a model wrote, and what became of it."""

    sql: str
    mean_logprob: float | None = None
    """Of its tokens, where the model tells."""
    result: QueryResult | None = None
    error: SQLError | None = None
    """Why there is no result."""

    @property
    def rank(self) -> int:
        """2: rows that say something; 1: none, or NULLs alone; 0: no result."""
        if self.result is None:
            return 0
        return 2 if any(cell is not None for row in self.result.rows for cell in row) else 1

    def to_dict(self) -> dict[str, Any]:
        """Return what a response's metadata says of it."""
        return {
            "sql": self.sql,
            "rows": None if self.result is None else len(self.result.rows),
            "error": None if self.error is None else self.error.reason,
            "mean_logprob": self.mean_logprob,
        }


@dataclass(frozen=True)
class Election:
    """What the candidates chose."""

    winner: Candidate
    """The one to answer with; it has no result where none has."""
    votes: int
    """How many candidates have the winner's result; 0 where none has one."""
    candidates: list[Candidate] = field(default_factory=list)
    """All, in the order in which they were written."""


class CandidateRunner:
    """Checks and runs queries on one database, each text once.

    Args:
        database: where they run, read-only.
        schema: the tables; what they do not have is told with what comes near it.
    """

    def __init__(self, database: ReadOnlyDatabase, schema: Schema) -> None:
        self._database = database
        self._columns = schema.as_mapping()

    def run(self, written: Sequence[Candidate]) -> list[Candidate]:
        """Return the candidates with their results or errors.

        Raises:
            QueryCancelledError: the app cancelled one; the rest does not run.
            DatabaseError: the database cannot be read.
        """
        done: dict[str, Candidate] = {}
        for one in written:
            if one.sql not in done:
                try:
                    self._check(one.sql)
                    done[one.sql] = Candidate(one.sql, result=self._database.execute(one.sql))
                except QueryCancelledError:
                    raise
                except SQLError as error:
                    done[one.sql] = Candidate(one.sql, error=error)
        return _with_results(written, done)

    async def arun(self, written: Sequence[Candidate]) -> list[Candidate]:
        """Do what `run` does; a task that is cancelled stops its statement."""
        done: dict[str, Candidate] = {}
        for one in written:
            if one.sql not in done:
                try:
                    self._check(one.sql)
                    result = await self._database.aexecute(one.sql)
                    done[one.sql] = Candidate(one.sql, result=result)
                except QueryCancelledError:
                    raise
                except SQLError as error:
                    done[one.sql] = Candidate(one.sql, error=error)
        return _with_results(written, done)

    def _check(self, sql: str) -> None:
        # The guard first: a table that may not be read is not helped by a better spelling.
        self._database.check(sql)
        check_schema(sql, self._columns, self._database.dialect)


def _with_results(written: Sequence[Candidate], done: dict[str, Candidate]) -> list[Candidate]:
    return [
        Candidate(one.sql, one.mean_logprob, done[one.sql].result, done[one.sql].error)
        for one in written
    ]


def elect(candidates: Sequence[Candidate], dialect: str = "sqlite") -> Election:
    """Choose the result that most candidates have, and the most probable query that gives it.

    Results that say something win over empty ones and those of NULLs alone, and these over
    errors, whatever their number. Results are the same as `ft_core.metrics.results_match` has it;
    their order counts where both queries ask for one. What was cut off by a limit may differ, so
    a truncated result is the same as another only where the SQL is, too, as `normalise_sql` has
    it. Queries vote together where each agrees with each: one without an order joins the first
    group that it agrees with, and brings no two orders together. Of results with as many votes
    that wins whose best query has the higher mean log-probability, where all are known; else the
    one that was written first. So one candidate alone, and the first of equals, is plain greedy.

    Args:
        candidates: in the order in which they were written, the greedy one first.
        dialect: of their SQL.

    Raises:
        ArgumentError: there is no candidate.
    """
    if not candidates:
        raise ArgumentError("candidates", "are none; give one at least")
    best = max(candidate.rank for candidate in candidates)
    if best == 0:
        return Election(candidates[0], 0, list(candidates))
    groups: list[list[Candidate]] = []
    for candidate in candidates:
        if candidate.rank == best:
            _join(groups, candidate, dialect)
    most = max(map(len, groups))
    tied = [_most_probable(group) for group in groups if len(group) == most]
    return Election(_most_probable(tied), most, list(candidates))


def _join(groups: list[list[Candidate]], candidate: Candidate, dialect: str) -> None:
    """Add a candidate to the first group that has its result, or make a new one."""
    for group in groups:
        if all(_agree(member, candidate, dialect) for member in group):
            group.append(candidate)
            return
    groups.append([candidate])


def _agree(one: Candidate, other: Candidate, dialect: str) -> bool:
    if one.sql == other.sql:
        return True
    assert one.result is not None
    assert other.result is not None
    if one.result.truncated or other.result.truncated:
        return normalise_sql(one.sql, dialect) == normalise_sql(other.sql, dialect)
    ordered = asks_for_order(one.sql, dialect) and asks_for_order(other.sql, dialect)
    return results_match(one.result.rows, other.result.rows, ordered=ordered)


def _most_probable(candidates: Sequence[Candidate]) -> Candidate:
    known = [one.mean_logprob for one in candidates if one.mean_logprob is not None]
    if len(known) < len(candidates):
        return candidates[0]
    return candidates[known.index(max(known))]
