"""Pairs that an LLM writes for real databases: what is kept, what is dropped, and what is asked."""

import asyncio
import json
import logging
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing

import pytest
from llama_index.core.utilities.sql_wrapper import SQLDatabase
from sqlalchemy import create_engine

from ft_core.datasets import Text2SQLDataset
from ft_core.errors import ArgumentError, GenerationError
from ft_text2sql.database import ReadOnlyDatabase
from ft_text2sql.generation import (
    GenerationSettings,
    generate,
    generate_text2sql_dataset,
)
from ft_text2sql.pair_prompts import choose_kind, choose_tables, read_pairs
from ft_text2sql.results import Limits
from ft_text2sql.schema import Column, ForeignKey, Schema, Table

WORDS = [
    *("amber", "basalt", "copper", "dahlia", "ember", "fjord", "granite", "hazel", "indigo"),
    *("juniper", "krypton", "lichen", "marble", "nectar", "onyx", "pepper", "quartz", "russet"),
]


def answer(*pairs):
    return json.dumps([{"question": q, "sql": s} for q, s in pairs])


def inventive(prompt, state={"calls": 0}):  # noqa: B006 - counts over all calls
    """Write as many new questions as are asked for, about the table that is asked about."""
    table = re.search(r"about the table (.+?), or it", prompt)[1]
    count = int(re.search(r"Write (\d+) questions", prompt)[1])
    pairs = []
    for _ in range(count):
        state["calls"] += 1
        number = state["calls"]
        words = f"{WORDS[number % 18]} {WORDS[number // 18 % 18]} {WORDS[number // 324 % 18]}"
        pairs.append((f"{number}: {words}?", f'SELECT {number} + count(*) FROM "{table}"'))
    return answer(*pairs)


@pytest.fixture
def url(shop):
    return f"sqlite:///{shop}"


@pytest.fixture
def output(tmp_path):
    return tmp_path / "pairs.jsonl"


def run(database, llm, output, tables=None, limits=None, **settings):
    return asyncio.run(
        generate(
            database, llm, output, GenerationSettings(**settings), tables=tables, limits=limits
        )
    )


def test_pairs_are_kept_with_what_they_were_written_for(url, output, llm_of):
    pairs = [
        ("Who lives in Oslo?", "SELECT name FROM customers WHERE city = 'Oslo';"),
        ("What was ordered most?", "```sql\nSELECT max(amount) FROM orders\n```"),
    ]
    dataset = generate_text2sql_dataset(
        url,
        llm_of(answer(*pairs)),
        num_questions=2,
        tables=["customers", "orders"],
        output_path=output,
    )
    assert [(e.question, e.sql) for e in dataset] == [
        (pairs[0][0], "SELECT name FROM customers WHERE city = 'Oslo'"),
        (pairs[1][0], "SELECT max(amount) FROM orders"),
    ]
    example = dataset.examples[0]
    assert list(Schema.from_sql(example.context).as_mapping()) == ["customers", "orders"]
    assert (example.database, example.dialect, example.difficulty) == ("shop", "sqlite", "easy")
    assert example.metadata == {"model": "rule-1"}
    assert Text2SQLDataset.load(output) == dataset


def test_the_prompt_shows_the_schema_and_no_data(url, output, llm_of):
    prompts = []
    llm = llm_of(lambda prompt: prompts.append(prompt) or inventive(prompt))
    run(url, llm, output, tables=["customers", "straße"], num_questions=40, max_per_query=99)
    assert len(prompts) == 8
    assert all("CREATE TABLE customers (id INTEGER, name TEXT" in prompt for prompt in prompts)
    assert not any("Ada" in prompt or "Oslo" in prompt or "secrets" in prompt for prompt in prompts)
    assert "You do not see the data" in prompts[0]
    assert {p.count("the table customers,") for p in prompts} == {0, 1}
    kinds = {re.search(r"belong to it. (.+)\n", prompt)[1] for prompt in prompts}
    assert len(kinds) == 8
    assert '[{"question": "...", "sql": "..."}]' in prompts[0]
    assert not re.search(r"\{(schema|dialect|kind|topic|values|earlier)\}", prompts[0])


def test_values_are_shown_on_request(url, output, llm_of):
    prompts = []
    llm = llm_of(lambda prompt: prompts.append(prompt) or inventive(prompt))
    tables = ["customers", "orders", "Order Items", "straße", "events"]
    run(url, llm, output, tables, num_questions=5, max_per_query=9, sample_values=True)
    (prompt,) = prompts
    assert "-- customers.name: 'Ada', 'Bob', 'Cyd', ...\n" in prompt
    assert "-- customers.credit: 20.0, 90.0, 250.5, ...\n" in prompt
    assert "'x; DROP TABLE orders'" in prompt
    assert """-- "Order Items"."select": 'a', 'b', ...""" in prompt
    assert "-- \"straße\".\"名前\": 'Ås', '東京', ..." in prompt
    assert "abracadabra" not in prompt
    assert "some of each column are given above" in prompt


def test_what_does_not_hold_is_dropped_and_counted(url, output, llm_of):
    before = sqlite3.connect(url.removeprefix("sqlite:///")).execute("SELECT * FROM orders")
    before = before.fetchall()
    pairs = [
        ("Who lives in Oslo?", "SELECT name FROM customers WHERE city = 'Oslo'"),
        ("Who lives in Oslo", "SELECT id FROM customers WHERE city = 'Oslo'"),
        ("Who dwells at Lund town?", "SELECT name FROM customers WHERE city = 'Lund'"),
        ("Which people are from Malmö?", "SELECT name FROM customers WHERE city = 'Malmö'"),
        ("Whom do we know in Paris?", "SELECT name FROM customers WHERE city = 'Paris'"),
        ("What is the largest of nothing?", "SELECT max(id) FROM orders WHERE id > 99"),
        ("Remove all of it", "DELETE FROM orders"),
        ("Two at a time", "SELECT 1; DROP TABLE orders"),
        ("What makes no sense?", "SELECT FROM WHERE )"),
        ("How much is unknown?", "SELECT unheard FROM orders"),
        ("What is the word?", "SELECT word FROM secrets"),
        ("Who earns most here?", "SELECT name FROM employees ORDER BY salary DESC LIMIT 1"),
        (
            "How long is for ever?",
            "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 "
            "FROM n) SELECT count(*) FROM n",
        ),
        ("...", "SELECT id FROM customers"),
        ("How many orders are there?", "SELECT count(*) FROM orders"),
    ]
    answers = iter([answer(*pairs)])
    llm = llm_of(lambda prompt: next(answers, "[]"))
    database = ReadOnlyDatabase(url, limits=Limits(timeout=1))
    result = run(
        database,
        llm,
        output,
        tables=["customers", "orders"],
        num_questions=99,
        max_per_query=2,
        questions_per_call=99,
    )
    assert [e.question for e in result.dataset] == [
        *("Who lives in Oslo?", "Who dwells at Lund town?", "How many orders are there?"),
    ]
    unread = result.dropped.pop("answer that cannot be read")
    assert unread == len(result.failures) == result.calls - 1
    assert result.dropped == {
        "question that is there already": 1,
        "SQL that is there already, literals apart": 1,
        "empty result": 2,
        "refused by the guard": 2,
        "not SQL": 1,
        "failed in the database": 1,
        "reads a table that was not shown": 2,
        "too slow": 1,
        "question without a word": 1,
    }
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        assert connection.execute("SELECT * FROM orders").fetchall() == before


def test_empty_results_are_kept_by_choice(url, output, llm_of):
    llm = llm_of(answer(("Who is in Paris?", "SELECT name FROM customers WHERE city = 'Paris'")))
    result = run(url, llm, output, num_questions=1, keep_empty=True)
    assert len(result.dataset) == 1
    with pytest.raises(GenerationError, match=r"no question with SQL .* empty result \(24\)"):
        run(url, llm, output.with_name("other.jsonl"), num_questions=1)


def test_it_warns_of_less_than_was_asked_for_and_logs_the_counts(url, output, llm_of, caplog):
    pair = ("Who lives in Oslo?", "SELECT name FROM customers WHERE city = 'Oslo'")
    with (
        caplog.at_level(logging.INFO, "ft_text2sql"),
        pytest.warns(UserWarning, match=r"1 of 9 pairs; dropped: question that is there already"),
    ):
        generate_text2sql_dataset(url, llm_of(answer(pair)), num_questions=9, output_path=output)
    assert "kept 1 pairs; dropped: {'question that is there already': " in caplog.text


def test_earlier_questions_are_told_to_later_calls(url, output, llm_of):
    prompts = []
    llm = llm_of(lambda prompt: prompts.append(prompt) or inventive(prompt))
    result = run(url, llm, output, tables=["customers"], num_questions=45, max_per_query=99)
    assert not any("something else than these" in prompt for prompt in prompts[:8])
    told = prompts[8].partition("something else than these:\n")[2].partition("\n\nAnswer")[0]
    assert told.split("\n  ") == [
        "  " + result.dataset.examples[30].question,
        *(e.question for e in result.dataset.examples[31:40]),
    ]


def test_resume(url, output, llm_of):
    asked = []

    def stops(prompt):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(prompt)
        return fixed(prompt)

    def fixed(prompt):
        """Answer by the prompt alone, as a model at temperature 0."""
        return inventive(prompt, {"calls": sum(map(ord, prompt)) % 999 * 100})

    settings = {"num_questions": 40, "max_per_query": 99, "workers": 1}
    tables = ["customers", "orders"]
    whole = run(url, llm_of(fixed), output.with_name("whole.jsonl"), tables, **settings)
    assert (whole.calls, whole.resumed) == (8, 0)
    with pytest.raises(KeyboardInterrupt):
        run(url, llm_of(stops), output, tables, **settings)
    assert not output.exists()
    result = run(url, llm_of(fixed), output, tables, **settings)
    assert (result.calls, result.resumed) == (5, 3)
    assert result.dataset == whole.dataset
    # Nothing is asked again; more questions begin with the same.
    silent = llm_of(lambda prompt: pytest.fail("asked again"))
    assert run(url, silent, output, tables, **settings).dataset == whole.dataset
    more = run(url, llm_of(fixed), output, tables, **settings | {"num_questions": 45})
    assert more.resumed == 8
    assert more.dataset.examples[:40] == whole.dataset.examples
    fewer = run(url, silent, output, tables, **settings | {"num_questions": 12})
    assert fewer.dataset.examples == whole.dataset.examples[:12]
    assert fewer.dropped == {"more than asked for": 3}
    # Another model is asked anew.
    other = run(url, llm_of(fixed, name="rule-2"), output, tables, **settings)
    assert other.resumed == 0


def test_foreign_outputs_are_not_replaced(url, output, llm_of, tmp_path):
    llm = llm_of(inventive)
    output.write_text("mine\n")
    with pytest.raises(GenerationError, match="exists and is no dataset"):
        run(url, llm, output, num_questions=1)
    assert output.read_text() == "mine\n"
    output.unlink()
    run(url, llm, output, num_questions=1)
    edited = Text2SQLDataset.load(output)
    edited.examples[0].sql = "SELECT 2"
    edited.save(output)
    with pytest.raises(GenerationError, match="was changed after it was generated"):
        run(url, llm, output, num_questions=1)
    other = tmp_path / "depot.db"
    with closing(sqlite3.connect(other)) as connection, connection:
        connection.executescript("CREATE TABLE t (a); INSERT INTO t VALUES (1)")
    third = output.with_name("third.jsonl")
    run(url, llm, third, num_questions=1)
    with pytest.raises(GenerationError, match="other texts or databases"):
        run(f"sqlite:///{other}", llm, third, num_questions=1)


def test_large_schemas_are_shown_in_parts(tmp_path, output, llm_of):
    file = tmp_path / "large.db"
    with closing(sqlite3.connect(file)) as connection, connection:
        for number in range(60):
            connection.execute(
                f"CREATE TABLE part{number} (id INTEGER PRIMARY KEY, next INTEGER "
                f"REFERENCES part{number // 10 * 10 + (number + 1) % 10} (id), other INTEGER)"
            )
    prompts = []
    llm = llm_of(lambda prompt: prompts.append(prompt) or inventive(prompt))
    result = run(
        f"sqlite:///{file}", llm, output, num_questions=20, questions_per_call=1, max_tables=4
    )
    assert {prompt.count("CREATE TABLE") for prompt in prompts} == {4}
    focuses = [re.search(r"the table (\w+),", prompt)[1] for prompt in prompts]
    assert len(set(focuses)) == len(focuses) == 20
    for example in result.dataset:
        (table,) = re.findall(r"part\d+", example.sql)
        assert len(Schema.from_sql(example.context).tables) == 4
        assert Schema.from_sql(example.context).table(table)


def test_choices_are_fair_and_repeatable():
    tables = tuple(
        Table(f"t{n}", (Column("a"),), (), (ForeignKey(("a",), f"t{(n + 1) % 9}", ("a",)),))
        for n in range(9)
    )
    schema = Schema(tables)
    for number in range(20):
        focus, shown = choose_tables(schema, number, seed=3, most=3)
        assert (focus, shown) == choose_tables(schema, number, seed=3, most=3)
        place = int(focus.name[1:])
        assert {t.name for t in shown} == {f"t{(place + d) % 9}" for d in (-1, 0, 1)}
    turns = [choose_tables(schema, n, seed=3, most=3)[0].name for n in range(9)]
    assert sorted(turns) == [f"t{n}" for n in range(9)]
    kinds = [choose_kind(n, seed=0) for n in range(16)]
    assert len(set(kinds[:8])) == len(set(kinds[8:])) == 8
    assert kinds[:8] != kinds[8:]


PAIR = ("Who?", "SELECT 1")


@pytest.mark.parametrize(
    "text",
    [
        answer(PAIR),
        f"Sure! Here it is:\n```json\n{answer(PAIR)}\n```\nShall I go on?",
        json.dumps({"pairs": [{"Question": "Who?", "SQL": "SELECT 1;"}]}),
        '{"question": "Who?", "sql": "```sql\nSELECT 1\n```"}',
        '[{"question": "Who?", "query": "SELECT 1"}, {"question": "What',
        '<think>{"question": "No?", "sql": "no"}</think>' + answer(PAIR),
        "1. Question: Who?\n   SQL: SELECT 1;\n",
        "**Q1:** Who?\n**SQL:**\n```sql\nSELECT 1\n```",
        '{"note": {"x": 1}} {"question": "Who?", "sql": "SELECT 1"} {"question": 3, "sql": "x"}',
    ],
)
def test_answers_of_many_layouts_are_read(text):
    assert read_pairs(text) == [PAIR]


def test_answers_with_several_pairs_and_none():
    labelled = "Question: Who?\nSQL: SELECT 1\n\nQuestion: What?\nSQL: SELECT a\nFROM b;\n\nBye."
    assert read_pairs(labelled) == [PAIR, ("What?", "SELECT a\nFROM b")]
    assert read_pairs("I would rather not.") == []
    assert read_pairs('[{"question": "", "sql": "SELECT 1"}]') == []
    assert read_pairs('[{"question": "Who\\ud800?", "sql": "SELECT 1"}]') == [("Who??", "SELECT 1")]
    assert read_pairs("{" * 100_000) == []


def test_failures_are_told_and_a_refusal_stops(url, output, llm_of):
    calls = []

    def flaky(prompt):
        calls.append(prompt)
        if len(calls) == 1:
            raise ValueError("odd, key sk-abcdefgh123")
        return inventive(prompt)

    settings = {"num_questions": 10, "max_per_query": 99, "workers": 1, "retry_limit": 1}
    result = run(url, llm_of(flaky), output, tables=["orders"], **settings)
    assert len(result.dataset) == 10
    assert result.failures == {"call 1": "ValueError: odd, key ***"}
    calls.clear()
    other = output.with_name("other.jsonl")
    with pytest.raises(GenerationError, match="call 'call 1': ValueError"):
        run(url, llm_of(flaky), other, tables=["orders"], on_failure="fail", **settings)


def test_calls_are_concurrent_and_bounded(url, output, llm_of):
    barrier = threading.Barrier(4)
    running, most, lock = 0, 0, threading.Lock()

    def waits(prompt):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        barrier.wait(timeout=30)  # as many as are allowed must come together
        with lock:
            running -= 1
            return inventive(prompt)

    run(url, llm_of(waits), output, num_questions=8, questions_per_call=1, workers=4)
    assert most == 4


def test_queries_are_bounded_too(url, output, llm_of):
    class Counted(ReadOnlyDatabase):
        running = most = 0

        async def aexecute(self, sql):
            self.running += 1
            self.most = max(self.most, self.running)
            result = await super().aexecute(sql)
            self.running -= 1
            return result

    database = Counted(url)
    result = run(database, llm_of(inventive), output, num_questions=5, workers=2, max_per_query=9)
    assert len(result.dataset) == 5
    assert database.most == 2


def test_postgres(postgres_url, postgres_state, output, llm_of):
    before = postgres_state()
    engine = create_engine(postgres_url)
    database = SQLDatabase(engine, include_tables=["customers", "events", "Order Items"])
    prompts = []
    pairs = [
        ("Which names begin with A?", "SELECT name FROM customers WHERE name ILIKE 'a%'"),
        ("What are the products?", 'SELECT "product name" FROM "Order Items"'),
        ("Fill it up", "SELECT refill()"),
        ("Sleep well", "SELECT pg_sleep(60)"),
        ("Which kinds are there?", "SELECT payload ->> 'kind' FROM events"),
    ]
    llm = llm_of(lambda prompt: prompts.append(prompt) or answer(*pairs))
    result = run(database, llm, output, num_questions=3, sample_values=True)
    engine.dispose()
    assert [e.sql for e in result.dataset] == [pairs[0][1], pairs[1][1], pairs[4][1]]
    assert result.dropped["refused by the guard"] == 2
    assert "tables of a postgres database" in prompts[0]
    assert "-- customers.city: 'Lund', 'Malmö', 'Oslo', ..." in prompts[0]
    assert {e.dialect for e in result.dataset} == {"postgres"}
    assert postgres_state() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_questions": 0}, "num_questions: must be a whole number from 1"),
        ({"num_questions": True}, "num_questions"),
        ({"workers": 0}, "workers"),
        ({"max_per_query": 0}, "max_per_query"),
        ({"threshold": 0}, "threshold"),
        ({"on_failure": "stop"}, "on_failure"),
        ({"prompt": "Write {num_questions} for {schema}"}, r"prompt: has no place \{dialect\}"),
        ({"tables": "orders"}, r"tables: is a list of names; write \['orders'\]"),
        ({"tables": []}, "tables: is empty"),
        ({"tables": ["order"]}, "tables: there is no table 'order'"),
        ({"llm": "gpt"}, "llm: is a str and no LlamaIndex LLM"),
    ],
)
def test_bad_arguments(url, output, llm_of, settings, message):
    given = {"llm": llm_of(inventive), "num_questions": 1, "output_path": output} | settings
    with pytest.raises(ArgumentError, match=message):
        generate_text2sql_dataset(url, **given)
    assert not list(output.parent.glob("*.jsonl"))


def test_an_own_prompt(url, output, llm_of):
    prompts = []
    llm = llm_of(lambda prompt: prompts.append(prompt) or answer(PAIR))
    own = 'Make {num_questions} pairs in {dialect} for {schema}, as {"question": "{x}"}.'
    run(url, llm, output, tables=["straße"], num_questions=1, prompt=own)
    assert prompts == [
        'Make 5 pairs in sqlite for CREATE TABLE "straße" ("größe" INTEGER, "名前" TEXT);, '
        'as {"question": "{x}"}.'
    ]


PROCESS = """
import json, sys, time
from llama_index.core.llms import CompletionResponse, MockLLM
from ft_text2sql.generation import generate_text2sql_dataset

class Slow(MockLLM):
    def complete(self, prompt, formatted=False, **kwargs):
        time.sleep(0.05)
        number = sum(map(ord, prompt)) * 7919 % 100_003
        pairs = [{"question": f"{(number + n) ** 3 % 999_983:06d}" * 2, "sql": f"SELECT {n}"}
                 for n in range(2)]
        print("asked", flush=True)
        return CompletionResponse(text=json.dumps(pairs))

    async def acomplete(self, prompt, formatted=False, **kwargs):
        return self.complete(prompt)

generate_text2sql_dataset(
    "sqlite:///" + sys.argv[1], Slow(), num_questions=12, questions_per_call=2, workers=1,
    output_path=sys.argv[2], max_per_query=99,
)
"""


def test_a_killed_run_is_taken_up(shop, output):
    def start(file):
        return subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(shop), str(file)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )

    process = start(output)
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not output.exists()
    journal = output.with_name("pairs.jsonl.journal.jsonl")
    kept = len(journal.read_text().splitlines())
    assert kept >= 2
    resumed, undisturbed = start(output), start(output.with_name("whole.jsonl"))
    out, _ = resumed.communicate(timeout=120)
    whole, _ = undisturbed.communicate(timeout=120)
    assert out.count("asked") == whole.count("asked") - kept
    assert Text2SQLDataset.load(output) == Text2SQLDataset.load(output.with_name("whole.jsonl"))
