"""`Text2SQLHandler` on LlamaIndex's own SQL engines: what it records, exports, and never harms."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.indices.struct_store.sql_query import (
    NLSQLTableQueryEngine,
    SQLTableRetrieverQueryEngine,
)
from llama_index.core.indices.struct_store.sql_retriever import NLSQLRetriever, SQLRetriever
from llama_index.core.objects import ObjectIndex, SQLTableNodeMapping, SQLTableSchema
from llama_index.core.schema import TextNode
from llama_index.core.tools import QueryEngineTool
from llama_index.core.utilities.sql_wrapper import SQLDatabase
from sqlalchemy import Column, ForeignKey, Integer, MetaData, Table, create_engine

from ft_core.datasets import Text2SQLDataset
from ft_core.errors import ArgumentError, ArtifactError, DatasetError
from ft_text2sql.errors import SQLError
from ft_text2sql.guarded import GuardedSQLDatabase
from ft_text2sql.handler import Text2SQLHandler
from ft_text2sql.retriever import Text2SQLRetriever
from ft_text2sql.schema import Schema
from ft_text2sql.shown_schema import schema_of

OSLO = "Who lives in Oslo?"
OSLO_SQL = "SELECT name FROM customers WHERE city = 'Oslo'"
EMBED = MockEmbedding(embed_dim=2)


@pytest.fixture
def handler(tmp_path):
    handler = Text2SQLHandler(tmp_path / "asked.jsonl")
    yield handler
    handler.detach()


@pytest.fixture
def database(shop):
    engine = create_engine(f"sqlite:///{shop}")
    yield SQLDatabase(engine, include_tables=["customers", "orders"])
    engine.dispose()


@pytest.fixture
def engine_of(database, llm_of):
    def make(llm=None, **settings):
        given = {"synthesize_response": False, "embed_model": EMBED, **settings}
        return NLSQLTableQueryEngine(database, llm=llm or llm_of(), **given)

    return make


def lines(handler):
    return [json.loads(line) for line in handler.path.read_text().splitlines()]


def test_a_question_is_recorded_without_its_rows(handler, engine_of):
    engine = engine_of()
    expected = str(engine.query(OSLO))
    handler.attach(engine)
    assert str(engine.query(OSLO)) == expected == "[('Ada',), ('Cyd',)]"
    (record,) = lines(handler)
    texts = record.pop("texts")
    assert record.pop("id") == handler.last_query_id
    assert record.pop("seconds") > 0
    assert record.pop("time")
    schema, context = texts[record.pop("schema")], texts[record.pop("context")]
    assert record == {
        "type": "text2sql",
        "query": OSLO,
        "sql": OSLO_SQL,
        "dialect": "sqlite",
        "model": "rule-1",
        "success": True,
        "database": "shop",
        "rows": 2,
    }
    assert schema.startswith("Table 'customers' has columns: id (INTEGER), name (TEXT), ")
    assert "Ada" not in handler.path.read_text()
    tables = Schema.from_sql(context)
    assert tables.as_mapping()["orders"] == [
        *("id", "customer_id", "amount", "placed", "status", "note")
    ]
    assert tables.table("customers").primary_key == ("id",)
    (example,) = handler.to_dataset()
    assert (example.question, example.sql, example.context) == (OSLO, OSLO_SQL, context)
    assert (example.dialect, example.database) == ("sqlite", "shop")
    assert example.metadata.keys() == {"time", "seconds", "model"}


def test_async_and_synthesised_answers(handler, engine_of, llm_of):
    prompts = []

    def rule(prompt):
        prompts.append(prompt)
        return OSLO_SQL if "SQLQuery" in prompt and "SQL Response" not in prompt else "Two do."

    engine = engine_of(llm_of(rule), synthesize_response=True)
    handler.attach(engine)

    async def ask():
        with handler.collect() as ids:
            response = await engine.aquery(OSLO)
        assert ids == [handler.last_query_id]
        return response

    assert str(asyncio.run(ask())) == "Two do."
    assert len(prompts) == 2
    (record,) = lines(handler)
    assert (record["sql"], record["rows"]) == (OSLO_SQL, 2)


def test_the_schema_is_that_of_the_tables_that_were_retrieved(
    handler, database, llm_of, monkeypatch
):
    mapping = SQLTableNodeMapping(database)
    tables = ObjectIndex.from_objects(
        [SQLTableSchema(table_name="customers", context_str="People who buy.")],
        mapping,
        VectorStoreIndex,
        embed_model=EMBED,
    )
    retriever = tables.as_retriever(similarity_top_k=1)
    monkeypatch.setattr(Settings, "_embed_model", EMBED)  # the engine takes none as an argument
    engine = SQLTableRetrieverQueryEngine(
        database, retriever, llm=llm_of(), synthesize_response=False
    )
    handler.attach([engine])
    engine.query(OSLO)
    (record,) = lines(handler)
    assert "People who buy." in record["texts"][record["schema"]]
    assert list(Schema.from_sql(record["texts"][record["context"]]).as_mapping()) == ["customers"]


def test_rows_and_values_that_the_prompt_shows_are_not_written(handler, engine_of):
    rows = VectorStoreIndex([TextNode(text="(1, 'Ada', 'Oslo')")], embed_model=EMBED)
    values = VectorStoreIndex([TextNode(text="Lund")], embed_model=EMBED)
    retriever = rows.as_retriever()
    seen = []
    engine = engine_of(
        tables=["customers"],
        rows_retrievers={"customers": retriever},
        cols_retrievers={"customers": {"city": values.as_retriever()}},
    )
    inner = engine.sql_retriever._llm
    engine.sql_retriever._llm = type(inner)(rule=lambda p: seen.append(p) or inner.rule(p))
    handler.attach(engine)
    engine.query(OSLO)
    assert "Ada" in seen[0]
    assert "Lund" in seen[0]
    text = handler.path.read_text()
    assert "Ada" not in text
    assert "Lund" not in text
    (record,) = lines(handler)
    assert record["texts"][record["schema"]].startswith("Table 'customers' has columns: ")


def test_sql_that_fails_is_recorded_with_what_the_database_said(handler, engine_of):
    engine = engine_of()
    handler.attach(engine)
    assert "no such table" in str(engine.query("What is nowhere?"))
    (record,) = lines(handler)
    assert record["success"] is False
    assert record["error"] == "OperationalError: no such table: nowhere"
    assert "rows" not in record
    with pytest.raises(DatasetError, match=r"asked.jsonl: no SQL to learn from .*1 failed"):
        handler.to_dataset()


@pytest.mark.parametrize("handles", [True, False])
def test_the_apps_exceptions_pass_untouched(handler, database, llm_of, handles):
    guarded = GuardedSQLDatabase.around(database)
    retriever = NLSQLRetriever(guarded, llm=llm_of(), embed_model=EMBED, handle_sql_errors=handles)
    handler.attach(retriever)
    if handles:
        assert retriever.retrieve("Delete them")[0].text.startswith("Error: the statement begins")
    else:
        with pytest.raises(Exception, match="begins with 'DELETE'") as raised:
            retriever.retrieve("Delete them")
        assert type(raised.value).__name__ == "UnsafeSQLError"
    (record,) = lines(handler)
    assert (record["sql"], record["success"]) == ("DELETE FROM customers", False)
    assert record["error"].startswith("UnsafeSQLError: the statement begins with 'DELETE'")


def test_a_failed_llm_is_not_recorded_and_its_error_passes(handler, engine_of, llm_of):
    error = RuntimeError("out of tokens")

    def rule(prompt):
        raise error

    engine = engine_of(llm_of(rule))
    handler.attach(engine)
    with pytest.raises(RuntimeError) as raised:
        engine.query(OSLO)
    assert raised.value is error
    assert handler.last_query_id is None
    assert not handler.path.exists()
    assert not handler.failures


@pytest.mark.parametrize("sync", [True, False])
def test_sql_that_nobody_ran_counts_once_it_is_confirmed(handler, engine_of, sync):
    engine = engine_of(sql_only=True)
    handler.attach(engine)
    str(engine.query(OSLO)) if sync else asyncio.run(engine.aquery(OSLO))
    (record,) = lines(handler)
    assert record["success"] is None
    assert "rows" not in record
    with pytest.raises(DatasetError, match="1 never run"):
        handler.to_dataset()
    handler.mark(record["id"], correct=True)
    assert [example.sql for example in handler.to_dataset()] == [OSLO_SQL]


def test_marks(handler, engine_of):
    engine = engine_of()
    handler.attach(engine)
    ids = {}
    for number, question in enumerate(
        ["Who lives in Oslo?", "Who lives in Lund?", "How many orders are there", "What is it?"]
    ):
        engine.query(question)
        ids[number] = handler.last_query_id
    engine.query("Who lives in Lund?")  # once more: a mark holds for both
    handler.mark(ids[0], correct=False)
    handler.mark(ids[0], correct=True)  # the later one counts
    handler.mark(ids[1], correct=False)
    handler.mark(ids[3], sql="SELECT 42")
    assert not handler.failures
    dataset = handler.to_dataset()
    assert [(e.question, e.sql) for e in dataset] == [
        ("Who lives in Oslo?", OSLO_SQL),
        ("How many orders are there", "SELECT count(*) FROM orders"),
        ("What is it?", "SELECT 42"),
    ]
    assert dataset.examples[0].metadata["confirmed"] is True
    assert dataset.examples[2].metadata["corrected_from"] == "SELECT unheard FROM nowhere"
    assert handler.query_ids("Who lives in Lund?") == [ids[1], lines(handler)[4]["id"]]


def test_what_people_said_outweighs_what_nobody_looked_at(handler, engine_of, llm_of, caplog):
    answers = iter(["SELECT 1", "SELECT 2", "SELECT 2"])
    engine = engine_of(llm_of(lambda prompt: next(answers)))
    handler.attach(engine)
    for _ in range(3):
        engine.query("Which?")
    assert [e.sql for e in handler.to_dataset()] == ["SELECT 1", "SELECT 2"]
    handler.mark(handler.last_query_id, correct=True)
    with caplog.at_level("INFO"):
        assert [e.sql for e in handler.to_dataset()] == ["SELECT 2"]
    assert "{'superseded by what people said': 1}" in caplog.text
    handler.mark(handler.last_query_id, correct=False, sql="SELECT 3")
    assert [e.sql for e in handler.to_dataset()] == ["SELECT 3"]


@pytest.mark.parametrize(
    ("query_id", "said"),
    [(None, {"correct": True}), ("x", {}), ("x", {"correct": "yes"}), ("x", {"sql": " "})],
)
def test_a_bad_mark_is_counted_and_not_written(handler, query_id, said):
    handler.mark(query_id, **said)
    assert handler.failures == {"ArgumentError": 1}
    assert not handler.path.exists()


def test_marks_of_no_record_are_told(handler, engine_of, caplog):
    engine = engine_of()
    with handler.attach(engine):
        engine.query(OSLO)
    handler.mark("nobody", correct=False)
    with caplog.at_level("INFO"):
        assert len(handler.to_dataset()) == 1
    assert "marks of no record" in caplog.text
    engine.query(OSLO)  # detached
    assert len(lines(handler)) == 2


def test_passwords_are_never_written(tmp_path, postgres_url, llm_of):
    secret = "hunter2@x"
    engine = create_engine(postgres_url)
    database = SQLDatabase(engine, include_tables=["customers"])
    # The server trusts local connections and asks for no password; the URL may have one.
    database._engine = create_engine(engine.url.set(password=secret, username="postgres"))
    retriever = NLSQLRetriever(database, llm=llm_of(), embed_model=EMBED)
    handler = Text2SQLHandler(tmp_path / "asked.jsonl")
    with handler.attach(retriever):
        retriever.retrieve(f"Run SELECT '{secret}' FROM nowhere")
        handler_id = handler.last_query_id
        retriever.retrieve(f"Is postgresql://ada:{secret}@db/shop or password='{secret}' right?")
    handler.mark(handler_id, sql=f"SELECT 'mysql+x://u:{secret}@h' -- pwd={secret}")
    database._engine.dispose()
    engine.dispose()
    first, second, mark = lines(handler)
    assert first["dialect"] == "postgres"
    assert first["database"] == "postgres"
    assert second["query"] == "Is postgresql://ada:***@db/shop or password=*** right?"
    assert mark["sql"] == f"SELECT 'mysql+x://u:***@h' -- pwd={secret}"
    assert mark["sql_changed"] is True
    # A question that quotes the password as a mere word is the user's own; errors are ours.
    assert secret not in first["error"]
    assert not handler.failures


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("PGPASSWORD=hunter2 psql", "PGPASSWORD=*** psql"),
        ("x:///?odbc_connect=PWD%3Dhunter2%3BUID%3Da", "x:///?odbc_connect=PWD%3D***%3BUID%3Da"),
        ("UID%3Da%3BPWD%3D%7Bhun%3Bter2%7D%3B", "UID%3Da%3BPWD%3D***%3B"),
        ("PWD={hun;t}}er2};UID=a", "PWD=***;UID=a"),
        (r"password='hun\'t er2' user=a", "password=*** user=a"),
        (r"password=hun\ ter2 user=a", "password=*** user=a"),
        ("password='' user='a'", "password=*** user='a'"),
        ("password=hun%3Bter2&user=a", "password=***&user=a"),
    ],
)
def test_passwords_in_every_spelling(handler, text, hidden):
    assert handler.clean(text) == hidden


def test_sql_that_compares_passwords_is_an_example_and_sql_with_a_password_hidden_is_none(
    handler, engine_of, llm_of, caplog
):
    compared = "WITH u AS (SELECT 1 AS password) SELECT o.password FROM u JOIN u o "
    compared += "ON u.password = o.password WHERE u.password = '1' OR o.password=1"
    secret = "SELECT 'pg://ada:hunter2@db'"
    answers = iter([compared, secret])
    engine = engine_of(llm_of(lambda prompt: next(answers)))
    handler.attach(engine)
    engine.query("Whose?")
    engine.query("Where?")
    handler.mark(handler.last_query_id, correct=True)
    first, second, _ = lines(handler)
    assert (first["sql"], "sql_changed" in first) == (compared, False)
    assert (second["sql"], second["sql_changed"]) == ("SELECT 'pg://ada:***@db'", True)
    with caplog.at_level("INFO"):
        assert [example.sql for example in handler.to_dataset()] == [compared]
    assert "{'with a password hidden in the SQL': 1}" in caplog.text
    handler.mark(handler.query_ids("Whose?")[0], sql=secret)
    with pytest.raises(DatasetError, match="2 with a password hidden"):
        handler.to_dataset()


def test_every_text_is_redacted(tmp_path, engine_of):
    path = tmp_path / "asked.jsonl"
    hide = lambda text: text.replace("Ada", "[name]").replace("credit", "[column]")  # noqa: E731
    handler = Text2SQLHandler(path, redact=hide, keep_rows=1)
    engine = engine_of()
    with handler.attach(engine):
        engine.query("Who lives in Oslo? Ada?")
        engine.query("Run SELECT Ada FROM customers")
        engine.query("Run SELECT name FROM customers -- Ada")
    handler.mark(handler.last_query_id, sql="SELECT 'Ada'")
    text = path.read_text()
    assert "Ada" not in text
    assert "credit" not in text
    first, second, third, mark = lines(handler)
    assert first["query"] == "Who lives in Oslo? [name]?"
    assert "[name]" in second["sql"]
    assert "[name]" in second["error"]
    assert third["kept_rows"] == [["[name]"]]
    assert mark["sql"] == "SELECT '[name]'"
    assert all("[column]" in text for text in first["texts"].values())


def test_rows_are_kept_on_request(tmp_path, engine_of):
    handler = Text2SQLHandler(tmp_path / "asked.jsonl", keep_rows=1)
    engine = engine_of()
    with handler.attach(engine):
        engine.query("Run SELECT id, name, credit, x'00ff' FROM customers ORDER BY id DESC")
    (record,) = lines(handler)
    assert (record["rows"], record["kept_rows"]) == (4, [[4, "Dag O'Brien", 90.0, "b'\\x00\\xff'"]])
    with pytest.raises(ArgumentError, match="keep_rows"):
        Text2SQLHandler(tmp_path / "asked.jsonl", keep_rows=-1)


def test_a_failing_hook_harms_nothing(tmp_path, engine_of):
    def broken(text):
        raise KeyError("broken")

    handler = Text2SQLHandler(tmp_path / "asked.jsonl", redact=broken)
    engine = engine_of()
    with handler.attach(engine):
        assert str(engine.query(OSLO)) == "[('Ada',), ('Cyd',)]"
    assert handler.failures == {"KeyError": 1}
    assert not handler.path.exists()


def test_inside_a_tool_and_what_holds_none(handler, engine_of, database):
    tool = QueryEngineTool.from_defaults(engine_of(), description="Customers.")
    with handler.attach([tool]):
        tool.call(OSLO)
    assert len(lines(handler)) == 1
    for target in (object(), SQLRetriever(database), database):
        with pytest.raises(ArgumentError, match="found no NLSQLRetriever"):
            handler.attach(target)


def test_of_a_retriever_that_asks_another_the_outer_one_is_recorded(handler, engine_of):
    class Careful(NLSQLRetriever):
        """Asks another retriever, and once more where that fails."""

        def __init__(self, inner):
            self.__dict__.update(inner.__dict__)
            self.inner = inner

        def retrieve_with_metadata(self, str_or_query_bundle):
            self.inner.retrieve_with_metadata("What is nowhere?")
            return self.inner.retrieve_with_metadata(str_or_query_bundle)

    retriever = Careful(engine_of().sql_retriever)
    handler.attach(retriever)
    retriever.retrieve(OSLO)
    (record,) = lines(handler)
    assert (record["query"], record["success"]) == (OSLO, True)


def test_a_tuned_retriever_that_raises_is_recorded_with_its_sql(handler, database, llm_of):
    retriever = Text2SQLRetriever(database, llm_of(), handle_sql_errors=False, repair=False)
    handler.attach(retriever)
    retriever.retrieve(OSLO)
    with pytest.raises(SQLError):
        retriever.retrieve("Run SELECT x FROM orders")
    good, bad = lines(handler)
    assert (good["success"], good["sql"]) == (True, OSLO_SQL)
    assert (bad["success"], bad["sql"]) == (False, "SELECT x FROM orders")
    assert "x" in bad["error"]


def test_foreign_and_own_journals(tmp_path, handler, engine_of):
    (tmp_path / "other.jsonl").write_text('{"type": "rerank", "id": "1", "query": "q"}\n')
    with pytest.raises(ArtifactError, match="no Text2SQLHandler wrote"):
        Text2SQLHandler(tmp_path / "other.jsonl")
    with pytest.raises(ArtifactError, match="no such journal"):
        Text2SQLHandler.read(tmp_path / "none.jsonl")
    with pytest.raises(ArgumentError, match="is a folder"):
        Text2SQLHandler(tmp_path)
    engine = engine_of()
    with handler.attach(engine):
        engine.query(OSLO)
    again = Text2SQLHandler.read(handler.path)
    with again.attach(engine):
        engine.query("Who lives in Lund?")
    assert "texts" not in lines(handler)[1]  # the schema is there already
    path = tmp_path / "data.jsonl"
    again.to_dataset().save(path)
    assert Text2SQLDataset.load(path) == handler.to_dataset()
    assert len(handler.to_dataset()) == 2


def test_views_and_odd_names(tmp_path, shop, llm_of):
    engine = create_engine(f"sqlite:///{shop}")
    tables = ["Order Items", "straße", "rich"]
    database = SQLDatabase(engine, include_tables=tables, view_support=True)
    retriever = NLSQLRetriever(database, llm=llm_of(), embed_model=EMBED)
    handler = Text2SQLHandler(tmp_path / "asked.jsonl")
    with handler.attach(retriever):
        retriever.retrieve('Run SELECT "größe" FROM "straße"')
    engine.dispose()
    assert not handler.failures
    (example,) = handler.to_dataset()
    assert sorted(Schema.from_sql(example.context).as_mapping()) == sorted(tables)


def test_a_foreign_key_to_a_table_that_was_not_read_is_left_out(database):
    metadata = MetaData()
    Table("a", metadata, Column("id", Integer, primary_key=True), Column("b", ForeignKey("b.id")))
    Table("c", metadata, Column("x"), Column("a", ForeignKey("a.id")))
    database._metadata = metadata
    assert schema_of(database, ["a", "c", "d"]).to_text("create").splitlines() == [
        "CREATE TABLE a (id INTEGER, b, PRIMARY KEY (id));",
        "CREATE TABLE c (x, a INTEGER, FOREIGN KEY (a) REFERENCES a (id));",
    ]
    assert schema_of(database, ["d"]) is None


def test_threads_and_tasks(handler, engine_of, llm_of):
    engine = engine_of()
    handler.attach(engine)
    ids = {}

    def many(thread):
        async def one(n):
            with handler.collect() as found:
                await engine.aquery(f"Who lives in {thread}.{n}?")
            ids[f"{thread}.{n}"] = found

        async def all_of_them():
            await asyncio.gather(*(one(n) for n in range(8)))

        asyncio.run(all_of_them())

    threads = [threading.Thread(target=many, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not handler.failures
    records = {record["id"]: record for record in handler.records()}
    assert len(records) == 32
    for place, (found,) in ids.items():
        assert f"'{place}'" in records[found]["sql"]
        assert place in records[found]["query"]


PROCESS = """
import sys
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.indices.struct_store.sql_retriever import NLSQLRetriever
from llama_index.core.llms import CompletionResponse, MockLLM
from llama_index.core.utilities.sql_wrapper import SQLDatabase
from sqlalchemy import Column, ForeignKey, Integer, MetaData, Table, create_engine
from ft_text2sql.handler import Text2SQLHandler

class Fixed(MockLLM):
    def complete(self, prompt, formatted=False, **kwargs):
        return CompletionResponse(text="SELECT name FROM customers -- " + "x" * 3000)

database = SQLDatabase(create_engine("sqlite:///" + sys.argv[4]), include_tables=["customers"])
retriever = NLSQLRetriever(database, llm=Fixed(), embed_model=MockEmbedding(embed_dim=1))
Text2SQLHandler(sys.argv[1]).attach(retriever)
number = 0
while number < int(sys.argv[2]):
    retriever.retrieve(f"{sys.argv[3]} {number}")
    number += 1
    print(number, flush=True)
"""


def start(path, count, name, shop):
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(path), str(count), name, str(shop)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )


def test_processes_share_a_journal_and_one_is_killed(tmp_path, shop):
    path = tmp_path / "asked.jsonl"
    steady = start(path, 40, "steady", shop)
    killed = start(path, 10**6, "killed", shop)
    for _ in range(5):
        killed.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    out, _ = steady.communicate(timeout=120)
    assert out.splitlines()[-1] == "40"
    with open(path, "a") as file:  # as a kill within a write leaves it
        file.write('{"type": "text2sql", "query": "torn')
    questions = {example.question for example in Text2SQLHandler.read(path).to_dataset()}
    assert {f"steady {n}" for n in range(40)} <= questions
    assert {f"killed {n}" for n in range(5)} <= questions
    assert all(example.context for example in Text2SQLHandler.read(path).to_dataset())
