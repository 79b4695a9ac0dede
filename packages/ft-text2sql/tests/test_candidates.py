"""Running, grouping and choosing candidates, on a real SQLite database."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from ft_core.errors import ArgumentError
from ft_text2sql.candidates import Candidate, CandidateRunner, Election, elect
from ft_text2sql.database import Limits, ReadOnlyDatabase
from ft_text2sql.errors import (
    DatabaseError,
    QueryCancelledError,
    QueryError,
    SchemaError,
    UnsafeSQLError,
)
from ft_text2sql.results import Stop
from ft_text2sql.schema import Schema

NORWAY = "SELECT name FROM customers WHERE country = 'Norway'"
OSLO = "SELECT name FROM customers WHERE city = 'Oslo'"
SWEDEN = "SELECT name FROM customers WHERE country = 'Sweden'"
NOWHERE = "SELECT name FROM customers WHERE country = 'Atlantis'"
NULLS = "SELECT max(credit), min(id) FROM customers WHERE country = 'Atlantis'"
BAD = "SELECT nme FROM customers"
UP = "SELECT name FROM customers ORDER BY name"
DOWN = "SELECT name FROM customers ORDER BY name DESC"
ANY = "SELECT name FROM customers"


@pytest.fixture
def runner(shop: Path) -> CandidateRunner:
    database = ReadOnlyDatabase(f"sqlite:///{shop}", tables=["customers", "orders", "secrets"])
    schema = Schema.from_database(database._engine, ["customers", "orders"])
    return CandidateRunner(database, schema)


def chosen(runner: CandidateRunner, *sqls: str, logprobs: list[float] | None = None) -> Election:
    known: Sequence[float | None] = logprobs or [None] * len(sqls)
    written = [Candidate(sql, logprob) for sql, logprob in zip(sqls, known, strict=True)]
    return elect(runner.run(written))


@pytest.mark.parametrize(
    ("sqls", "winner", "votes"),
    [
        ([OSLO], OSLO, 1),
        ([SWEDEN, NORWAY, OSLO], NORWAY, 2),  # different SQL, one result
        ([SWEDEN, NORWAY], SWEDEN, 1),  # the first of equals
        ([NOWHERE, NOWHERE, NULLS, OSLO], OSLO, 1),  # empty results lose
        ([NULLS, NULLS, OSLO], OSLO, 1),  # and so do NULLs alone
        ([BAD, BAD, BAD, NOWHERE], NOWHERE, 1),  # and errors, to empty ones
        ([NOWHERE, NULLS, NULLS], NULLS, 2),
        ([UP, DOWN, DOWN], DOWN, 2),  # order counts where both ask for one
        ([SWEDEN, DOWN, ANY], DOWN, 2),  # and not where one does not
        ([ANY, UP, DOWN], ANY, 2),  # and one without brings no two orders together
        ([BAD, "DROP TABLE customers"], BAD, 0),
    ],
)
def test_elect(runner: CandidateRunner, sqls: list[str], winner: str, votes: int) -> None:
    election = chosen(runner, *sqls)
    assert (election.winner.sql, election.votes) == (winner, votes)
    assert [one.sql for one in election.candidates] == sqls


def test_ties_go_to_the_most_probable(runner: CandidateRunner) -> None:
    assert chosen(runner, SWEDEN, NORWAY, logprobs=[-0.5, -0.1]).winner.sql == NORWAY
    assert chosen(runner, SWEDEN, NORWAY, logprobs=[-0.1, -0.5]).winner.sql == SWEDEN
    # Of one result, the most probable query; but more votes win over probability.
    election = chosen(runner, NORWAY, SWEDEN, OSLO, logprobs=[-3, -0.1, -2])
    assert election.winner.sql == OSLO
    half = [Candidate(SWEDEN, None), Candidate(NORWAY, -0.1)]
    assert elect(runner.run(half)).winner.sql == SWEDEN


def test_duplicate_rows_count(runner: CandidateRunner) -> None:
    twice = "SELECT country FROM customers"
    once = "SELECT DISTINCT country FROM customers"
    assert chosen(runner, once, twice, twice).winner.sql == twice
    assert chosen(runner, once, twice, twice).votes == 2


def test_what_was_cut_off_may_differ(runner: CandidateRunner) -> None:
    runner._database.limits = Limits(rows=1)
    same = [ANY, "select name from customers;", "SELECT c.name FROM customers AS c"]
    assert chosen(runner, *same).votes == 3
    other = "SELECT name FROM customers WHERE id < 3"
    found = chosen(runner, ANY, other, "SELECT 'Ada' AS name")
    assert {one.result.rows[0] for one in found.candidates if one.result} == {("Ada",)}
    assert found.votes == 1


@pytest.mark.parametrize("sync", [True, False])
def test_a_cancelled_query_ends_them_all(
    runner: CandidateRunner, monkeypatch: pytest.MonkeyPatch, sync: bool
) -> None:
    ran: list[str] = []

    def cancelled(sql: str, limits: Limits, stop: Stop, _: object) -> None:
        ran.append(sql)
        runner._database.cancel()
        stop.check()

    monkeypatch.setattr(runner._database._access, "run", cancelled)
    written = [Candidate(NORWAY), Candidate(OSLO)]
    with pytest.raises(QueryCancelledError):
        runner.run(written) if sync else asyncio.run(runner.arun(written))
    assert ran == [NORWAY]


def test_each_error_says_why(runner: CandidateRunner) -> None:
    written = [BAD, "DELETE FROM orders", "SELECT id FROM orders WHERE sum(amount) > 1", ""]
    written += ["SELECT word FROM secrets", "SELECT 1; SELECT 2"]
    found = runner.run([Candidate(sql) for sql in written])
    kinds = [type(one.error) for one in found]
    assert kinds[:3] == [SchemaError, UnsafeSQLError, QueryError]
    assert "did you mean 'name'" in str(found[0].error)
    assert all(one.result is None and one.error is not None for one in found)
    assert found[0].to_dict() == {
        "sql": BAD,
        "rows": None,
        "error": found[0].error.reason,  # type: ignore[union-attr]
        "mean_logprob": None,
    }
    assert asyncio.run(runner.arun([Candidate(BAD)]))[0].error.reason == found[0].error.reason  # type: ignore[union-attr]


def test_one_text_runs_once(runner: CandidateRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    execute = ReadOnlyDatabase.execute

    def counted(self: ReadOnlyDatabase, sql: str) -> object:
        ran.append(sql)
        return execute(self, sql)

    monkeypatch.setattr(ReadOnlyDatabase, "execute", counted)
    election = chosen(runner, OSLO, OSLO, SWEDEN, OSLO, logprobs=[-1, -2, -3, -4])
    assert ran == [OSLO, SWEDEN]
    assert election.votes == 3
    assert [one.mean_logprob for one in election.candidates] == [-1, -2, -3, -4]


def test_a_database_that_is_gone_is_no_error_of_the_sql(
    runner: CandidateRunner, shop: Path
) -> None:
    runner._database.close()
    shop.unlink()
    with pytest.raises(DatabaseError, match="no such file"):
        runner.run([Candidate(OSLO)])
    with pytest.raises(DatabaseError, match="no such file"):
        asyncio.run(runner.arun([Candidate(OSLO)]))


def test_there_must_be_a_candidate() -> None:
    with pytest.raises(ArgumentError, match="candidates"):
        elect([])
