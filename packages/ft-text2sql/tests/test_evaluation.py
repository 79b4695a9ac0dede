"""Writers that are right, nearly right, hostile or broken, and what the report says of them."""

import asyncio
import io
import json
import sqlite3
import threading
import time
from contextlib import closing
from decimal import Decimal

import pytest
import rich.console
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.indices.struct_store.sql_query import NLSQLTableQueryEngine
from llama_index.core.llms import MockLLM
from llama_index.core.prompts import PromptTemplate
from llama_index.core.utilities.sql_wrapper import SQLDatabase
from sqlalchemy import create_engine, text

from ft_core.datasets import Text2SQLDataset, Text2SQLExample
from ft_core.errors import ArgumentError, ArtifactError, DatasetError
from ft_text2sql.database import ReadOnlyDatabase
from ft_text2sql.errors import DatabaseError
from ft_text2sql.evaluation import evaluate_text2sql
from ft_text2sql.results import Limits
from ft_text2sql.retriever import Text2SQLRetriever

PAIRS = {
    "Who lives in Oslo?": "SELECT name FROM customers WHERE city = 'Oslo'",
    "Which cities are there?": "SELECT DISTINCT city FROM customers ORDER BY city",
    "How many orders are open?": "SELECT count(*) FROM orders WHERE status = 'open'",
    "Who spent most?": "SELECT c.name FROM customers AS c JOIN orders AS o ON c.id = "
    "o.customer_id GROUP BY c.id, c.name ORDER BY sum(o.amount) DESC LIMIT 1",
    "Who has more credit than average?": "SELECT name, credit FROM customers WHERE credit > "
    "(SELECT avg(credit) FROM customers)",
}


def dataset(pairs=PAIRS, **more):
    return Text2SQLDataset(
        examples=[
            Text2SQLExample(question=q, sql=sql, database="shop", **more)
            for q, sql in pairs.items()
        ]
    )


def right(question):
    return PAIRS[question]


def shown(report, width=200):
    console = rich.console.Console(file=io.StringIO(), width=width)
    console.print(report)
    return " ".join(console.file.getvalue().split())


def one(gold, written, database, **settings):
    """Return the run of one answer to one question."""
    report = evaluate_text2sql(
        lambda question: written, dataset({"Which?": gold}), database, **settings
    )
    return report.runs[0]


@pytest.fixture
def url(shop):
    return f"sqlite:///{shop}"


def test_a_right_writer_and_others(url):
    def spelled(question):
        return PAIRS[question].lower().replace("oslo", "Oslo") + " ;"

    def broken(question):
        if question == "Who spent most?":
            raise RuntimeError("no answer, api_key=sk-abcdefgh123")
        return {
            "Who lives in Oslo?": "SELECT name FROM customers WHERE id IN (3, 1)",
            "Which cities are there?": "SELECT DISTINCT city FROM customers ORDER BY city DESC",
            "How many orders are open?": "DELETE FROM orders",
        }.get(question, "SELECT FROM WHERE")

    report = evaluate_text2sql(
        {"right": right, "spelled": spelled, "broken": broken}, dataset(), url, num_workers=2
    )
    by_name = {run.name: run for run in report.runs}
    for metric in ("execution_accuracy", "valid_sql", "exact_match"):
        assert by_name["right"].mean(metric) == by_name["spelled"].mean(metric) == 1
    broken = by_name["broken"]
    assert list(broken.scores["execution_accuracy"].values()) == [1, 0, 0, 0, 0]
    assert list(broken.scores["valid_sql"].values()) == [1, 1, 0, 0, 0]
    assert set(broken.scores["exact_match"].values()) == {0}
    assert broken.scores["latency"].keys() == {"1", "2", "3", "5"}
    assert broken.invalid["3"].startswith("refused: the statement ")
    assert broken.invalid["5"].startswith(("not SQL: ", "refused: "))
    assert broken.failures == {"4": "RuntimeError: no answer, api_key=***"}
    out = shown(report)
    assert "broken: 2 of 5 answers do not run" in out
    assert "1 of 5 calls failed and count as wrong answers" in out
    assert "execution accuracy" in out
    assert "valid SQL" in out
    rows = dict(report.statistic_rows())
    assert list(rows) == ["easy (n = 3)", "extra (n = 2)"]
    assert rows["easy (n = 3)"][2].startswith("0.333 (")
    assert all(cells[0].startswith("1.000") for cells in rows.values())


def test_difficulty_comes_from_the_dataset_or_from_spiders_hardness(url):
    report = evaluate_text2sql(right, dataset(), url)
    assert [name for name, _ in report.statistic_rows()] == ["easy (n = 3)", "extra (n = 2)"]
    report = evaluate_text2sql(right, dataset(difficulty="odd"), url)
    assert report.statistic_rows() == [("odd (n = 5)", ["1.000 (1.000 to 1.000)"])]


@pytest.mark.parametrize(
    ("gold", "written", "correct"),
    [
        # Rows count as often as they come, columns in any order.
        ("SELECT country FROM customers", "SELECT DISTINCT country FROM customers", 0),
        ("SELECT name, city FROM customers", "SELECT city, name FROM customers", 1),
        ("SELECT name FROM customers", "SELECT name, id FROM customers", 0),
        # The order counts where the right SQL asks for it, not where the answer does.
        ("SELECT id FROM customers ORDER BY id DESC", "SELECT id FROM customers ORDER BY id", 0),
        ("SELECT id FROM customers", "SELECT id FROM customers ORDER BY id DESC", 1),
        # NULL is no 0 and no empty text.
        ("SELECT credit FROM customers", "SELECT coalesce(credit, 0) FROM customers", 0),
        ("SELECT NULL", "SELECT ''", 0),
        # Two empty results match, as Spider has it.
        ("SELECT id FROM orders WHERE id > 9", "SELECT name, id FROM customers WHERE id > 9", 1),
        ("SELECT 1", "SELECT 1.0", 1),
    ],
)
def test_execution_accuracy(url, gold, written, correct):
    run = one(gold, written, url)
    assert run.scores["execution_accuracy"]["1"] == correct
    assert run.scores["valid_sql"]["1"] == 1


def test_right_sql_that_gives_nothing_to_compare_with_is_told_and_left_out(url, caplog):
    asked = []

    def writer(question):
        asked.append(question)
        return PAIRS.get(question, "SELECT 1")

    pairs = {
        **PAIRS,
        "What is broken?": "SELECT nonsense FROM customers",
        "What is written?": "UPDATE customers SET credit = 0",
    }
    report = evaluate_text2sql(writer, dataset(pairs), url)
    assert "2 of 7 questions are left out" in caplog.text
    assert report.excluded.keys() == {"6", "7"}
    assert "no such column: nonsense" in report.excluded["6"]
    assert report.size == 5
    assert sorted(asked) == sorted(PAIRS)  # nothing is paid for that cannot be scored
    assert report.runs[0].mean("execution_accuracy") == 1
    assert "2 of 7 questions are left out, because their own SQL gives nothing" in shown(report)
    assert report.to_dict()["dataset"]["excluded"] == report.excluded
    with pytest.raises(DatasetError, match="none of its 1 SQL queries gives a result"):
        one("SELECT nonsense FROM customers", "SELECT 1", url)


def many_rows(shop, count=40):
    with closing(sqlite3.connect(shop)) as connection, connection:
        connection.executemany(
            "INSERT INTO employees (name, salary) VALUES (?, ?)",
            [(f"n{number}", number) for number in range(count)],
        )


def test_a_row_limit_makes_no_wrong_result_right(shop, url):
    many_rows(shop)
    database = ReadOnlyDatabase(url, limits=Limits(rows=40))
    full, most = "SELECT id FROM employees", "SELECT id FROM employees ORDER BY id LIMIT 40"
    # 43 rows, cut to 40, are not the 40 rows that are asked for.
    run = one(most, full, database)
    assert run.scores["execution_accuracy"] == {"1": 0}
    assert run.scores["valid_sql"] == {"1": 1}
    assert one(most, most, database).scores["execution_accuracy"] == {"1": 1}
    with pytest.raises(DatasetError, match=r"more than the limits allow \(40 rows"):
        one(full, full, database)


def test_a_result_cut_off_for_its_size_is_not_called_wrong(shop, url):
    # The right rows end with the long text, and fit; in the other order they do not.
    database = ReadOnlyDatabase(url, limits=Limits(result=50))
    long = "'" + "x" * 60 + "'"
    gold = f"SELECT 'a' UNION ALL SELECT 'b' UNION ALL SELECT {long}"
    turned = f"SELECT {long} UNION ALL SELECT 'a' UNION ALL SELECT 'b'"
    run_report = evaluate_text2sql(
        {
            "right": lambda q: gold if q == "Which?" else "SELECT 1",
            "turned": lambda q: turned if q == "Which?" else "SELECT 1",
        },
        dataset({"Which?": gold, "One?": "SELECT 1"}),
        database,
    )
    run = run_report.runs[1]
    assert run.scores["execution_accuracy"] == {"2": 1}
    assert run.scores["valid_sql"] == {"1": 1, "2": 1}
    assert "more than 50 characters" in run.unscored["execution_accuracy"]["1"]
    assert "execution accuracy of 1 of 2 answers could not be judged" in shown(run_report)


def test_a_query_that_runs_for_ever_is_not_valid(url):
    database = ReadOnlyDatabase(url, limits=Limits(timeout=0.5))
    endless = (
        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n"
    )
    run = one("SELECT 1", endless, database)
    assert run.scores["valid_sql"] == {"1": 0}
    assert run.invalid["1"].startswith("too slow: ")


@pytest.mark.parametrize("answer", ["", None, "  \n"])
def test_a_writer_that_writes_nothing(url, answer):
    run = one("SELECT 1", answer, url)
    assert run.invalid == {"1": "wrote nothing"}
    assert run.scores["valid_sql"] == run.scores["execution_accuracy"] == {"1": 0}


def test_engines_are_asked_for_sql_and_nothing_is_written(shop, url, llm_of):
    """LlamaIndex's own engine would run the DELETE on the app's connection."""
    before = shop.read_bytes()
    engine = create_engine(url)
    database = SQLDatabase(engine)
    hostile = NLSQLTableQueryEngine(
        database, llm=llm_of("DELETE FROM customers"), embed_model=MockEmbedding(embed_dim=1)
    )
    clerk = NLSQLTableQueryEngine(database, llm=llm_of(), embed_model=MockEmbedding(embed_dim=1))
    voting = Text2SQLRetriever(database, llm_of(), n=3)
    single = Text2SQLRetriever(database, llm_of("SELECT x"), handle_sql_errors=False, repair=False)
    report = evaluate_text2sql(
        {
            "hostile": hostile,
            "clerk": clerk,
            "retriever": clerk.sql_retriever,
            "voting": voting,
            "single": single,
            "llm": llm_of(),
        },
        dataset({"Who lives in Oslo?": PAIRS["Who lives in Oslo?"]}),
        database,
    )
    engine.dispose()
    assert shop.read_bytes() == before
    by_name = {run.name: run.mean("execution_accuracy") for run in report.runs}
    assert by_name == {
        **{"hostile": 0, "single": 0},
        **{"clerk": 1, "retriever": 1, "voting": 1, "llm": 1},
    }
    assert not clerk.sql_retriever._sql_only
    assert next(r for r in report.runs if r.name == "single").answers == {"1": "SELECT x"}


def test_an_llm_is_shown_the_examples_schema_or_the_databases(url, llm_of):
    prompts = []
    llm = llm_of(lambda prompt: prompts.append(prompt) or "SELECT 1")
    prompt = PromptTemplate("{dialect}|{schema}|{query_str}")
    pairs = {"One?": "SELECT 1"}
    evaluate_text2sql(llm, dataset(pairs, context="CREATE TABLE t (a)"), url, prompt=prompt)
    assert prompts == ["sqlite|CREATE TABLE t (a)|One?"]
    database = ReadOnlyDatabase(url, tables=["customers"])
    evaluate_text2sql(llm, dataset(pairs), database)
    assert "CREATE TABLE customers (id INTEGER, name TEXT" in prompts[1]
    assert "secrets" not in prompts[1]


def test_a_coroutine_function_writes_too(url):
    async def writer(question):
        await asyncio.sleep(0)
        return PAIRS[question]

    assert evaluate_text2sql(writer, dataset(), url).runs[0].mean("execution_accuracy") == 1


def test_several_databases(shop, url, tmp_path):
    other = tmp_path / "other.db"
    with closing(sqlite3.connect(other)) as connection, connection:
        connection.executescript("CREATE TABLE customers (name); INSERT INTO customers VALUES (1)")
    count = "SELECT count(*) FROM customers"
    data = Text2SQLDataset(
        examples=[
            Text2SQLExample(question=f"How many in {name}?", sql=count, database=name)
            for name in ("shop", "other")
        ]
    )
    databases = {"shop": url, "other": f"sqlite:///{other}", "unused": "sqlite:////nowhere.db"}
    report = evaluate_text2sql(
        {"count": lambda q: count, "four": lambda q: "SELECT 4"}, data, databases
    )
    assert report.questions == {"1": "How many in shop? [shop]", "2": "How many in other? [other]"}
    assert report.runs[1].scores["execution_accuracy"] == {"1": 1, "2": 0}
    with pytest.raises(ArgumentError, match="database: has no 'other'; there is shop"):
        evaluate_text2sql(right, data, {"shop": url})


def test_postgres(postgres_url):
    engine = create_engine(postgres_url)
    database = SQLDatabase(engine, include_tables=["customers", "orders", "employees"])
    pairs = {
        "What is the mean?": "SELECT avg(id) FROM orders",
        "Who is it?": "SELECT name FROM customers WHERE name ILIKE 'a%'",
        "And secrets?": "SELECT word FROM secrets",
    }
    answers = {
        "What is the mean?": "SELECT sum(id) / 4.0::float FROM orders",
        "Who is it?": "SELECT 'Ada'; DROP TABLE customers",
    }
    report = evaluate_text2sql(answers.get, dataset(pairs), database)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM customers")).scalar() == 4
        assert isinstance(connection.execute(text(pairs["What is the mean?"])).scalar(), Decimal)
    engine.dispose()
    assert report.excluded.keys() == {"3"}
    assert report.runs[0].scores["execution_accuracy"] == {"1": 1, "2": 0}
    assert report.runs[0].scores["valid_sql"] == {"1": 1, "2": 0}


def test_a_database_that_is_gone_is_no_wrong_answer(shop, url, tmp_path):
    journal = tmp_path / "answers.jsonl"
    asked = []

    def writer(question):
        asked.append(question)
        if len(asked) == len(PAIRS):
            shop.rename(shop.with_name("moved.db"))
        return PAIRS[question]

    database = ReadOnlyDatabase(url)
    with pytest.raises(DatabaseError):
        evaluate_text2sql(writer, dataset(), database, journal=journal)
    shop.with_name("moved.db").rename(shop)
    report = evaluate_text2sql(writer, dataset(), database, journal=journal)
    assert report.runs[0].mean("execution_accuracy") == 1
    assert len(asked) == len(PAIRS)  # the journal has the answers


def test_a_run_goes_on_where_it_was_cut_short(url, tmp_path):
    journal = tmp_path / "answers.jsonl"
    asked = []

    def writer(question):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(question)
        return PAIRS[question]

    with pytest.raises(KeyboardInterrupt):
        evaluate_text2sql({"w": writer}, dataset(), url, journal=journal, num_workers=1)
    assert len(journal.read_text().splitlines()) == 3
    with open(journal, "a") as file:  # as a kill within a write leaves it
        file.write('{"key": "torn')
    again = []
    writer2 = lambda q: again.append(q) or PAIRS[q]  # noqa: E731
    writer2.__name__ = "writer"
    report = evaluate_text2sql({"w": writer2}, dataset(), url, journal=journal)
    assert len(again) == 2
    assert report.runs[0].mean("execution_accuracy") == 1
    (tmp_path / "foreign.jsonl").write_text('{"type": "mark"}\n')
    with pytest.raises(ArtifactError, match="is not the journal of an evaluation"):
        evaluate_text2sql(right, dataset(), url, journal=tmp_path / "foreign.jsonl")


def test_calls_are_bounded(url):
    running, most, lock = 0, 0, threading.Lock()
    gate = threading.Barrier(3)

    def writer(question):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        gate.wait(timeout=30)
        with lock:
            running -= 1
        return "SELECT 1"

    pairs = {f"{n}?": "SELECT 1" for n in range(6)}
    evaluate_text2sql(writer, dataset(pairs), url, num_workers=3)
    assert most == 3


def test_a_model_in_this_process_is_asked_one_question_at_a_time(url, llm_of):
    running = []
    most = 0

    def rule(prompt):
        nonlocal most
        running.append(prompt)
        most = max(most, len(running))
        time.sleep(0.01)
        running.pop()
        return "SELECT 1"

    class LocalLLM(type(llm_of())):
        """Known by its name."""

    pairs = {f"{n}?": "SELECT 1" for n in range(8)}
    evaluate_text2sql(LocalLLM(rule=rule), dataset(pairs), url, num_workers=4)
    assert most == 1


def test_calls_that_failed_are_made_again(url, tmp_path):
    failing = [True]

    def writer(question):
        if failing[0]:
            raise ConnectionError("down")
        return PAIRS[question]

    settings = {"journal": tmp_path / "answers.jsonl"}
    report = evaluate_text2sql(writer, dataset(), url, **settings)
    assert len(report.runs[0].failures) == 5
    assert report.runs[0].mean("execution_accuracy") == 0
    failing.clear()
    failing.append(False)
    report = evaluate_text2sql(writer, dataset(), url, **settings)
    assert not report.runs[0].failures
    assert report.runs[0].mean("execution_accuracy") == 1


def test_paired_test_json_and_page(url, tmp_path):
    pairs = {f"What is {n}?": f"SELECT {n}" for n in range(30)}
    report = evaluate_text2sql(
        {"base": lambda q: "SELECT 0", "tuned": lambda q: f"SELECT {q[8:-1]} -- <b>"},
        dataset(pairs),
        url,
        seed=1,
    )
    difference = report.measures["tuned"]["execution_accuracy"].difference
    assert difference.outcome == "better"
    assert difference.p_value < 0.001
    assert "tuned is better than base in execution accuracy: +0.967" in shown(report)
    report.save_json(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    run = saved["runs"][1]
    assert run["answers"]["3"] == "SELECT 2 -- <b>"
    assert run["statistics"]["easy (n = 30)"]["value"] == 1
    assert run["metrics"]["exact_match"]["mean"] == 1
    report.save_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Execution accuracy by difficulty" in page
    assert "easy (n = 30)" in page
    assert "<b>" not in page.partition("Gained most")[2].partition("<footer")[0].replace(
        '<b class="better">', ""
    )


@pytest.mark.parametrize(
    ("writers", "settings", "message"),
    [
        ({}, {}, "writers: is empty"),
        ({"x": 3}, {}, "x: int is none of"),
        ({"x": MockLLM}, {}, "x: .* is none of"),
        ({"x": lambda q: 3}, {}, "x: wrote a int"),
        (right, {"num_workers": 0}, "num_workers"),
        (right, {"seed": -1}, "seed"),
        (right, {"baseline": "other"}, "baseline: 'other' is no writer"),
    ],
)
def test_bad_arguments(url, writers, settings, message):
    with pytest.raises(ArgumentError, match=message):
        evaluate_text2sql(writers, dataset(), url, **settings)


def test_limits_belong_to_one_place(url):
    with pytest.raises(ArgumentError, match="limits: the database has its own"):
        evaluate_text2sql(right, dataset(), ReadOnlyDatabase(url), limits=Limits())
