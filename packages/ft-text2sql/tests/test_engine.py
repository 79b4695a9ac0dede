"""Training and the query engines, on a real SQLite file and a tiny model that learns by heart."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import model_assets
import pytest
from llama_index.core import SQLDatabase, VectorStoreIndex
from llama_index.core.embeddings.mock_embed_model import MockEmbedding
from llama_index.core.indices.struct_store.sql_query import (
    NLSQLTableQueryEngine,
    SQLTableRetrieverQueryEngine,
)
from llama_index.core.indices.struct_store.sql_retriever import NLSQLRetriever
from llama_index.core.llms import MockLLM
from llama_index.core.objects import ObjectIndex, SQLTableNodeMapping, SQLTableSchema
from llama_index.core.schema import QueryBundle
from llama_index.core.settings import Settings
from sqlalchemy import create_engine, make_url

from ft_core.cli import main
from ft_core.errors import ArgumentError, ArtifactError, DatasetError
from ft_core.jobs import JobStatus
from ft_core.sft import LocalFinetuneEngine, LocalLLM
from ft_core.sft.chat_format import ChatFormat
from ft_core.sft.rows import rows_of
from ft_text2sql import Text2SQLDataset, Text2SQLFinetuneEngine, Text2SQLRetriever
from ft_text2sql.candidates import Candidate
from ft_text2sql.errors import DatabaseError, UnsafeSQLError
from ft_text2sql.prompt import SQLPrompt
from ft_text2sql.training import ChatMaker

GEO = """
CREATE TABLE state (name TEXT PRIMARY KEY, area REAL);
CREATE TABLE city (name TEXT PRIMARY KEY, people INTEGER, state TEXT REFERENCES state (name));
CREATE TABLE lake (name TEXT, area REAL, state TEXT);
INSERT INTO state VALUES ('north', 10.5), ('south', 7);
INSERT INTO city VALUES ('arl', 10, 'north'), ('bex', 20, 'south'), ('cob', 30, 'south');
"""
SQL = {
    "How many cities are there?": "SELECT count(*) FROM city",
    "Which city is largest?": "SELECT name FROM city ORDER BY people DESC LIMIT 1",
    "What is the area of north?": "SELECT area FROM state WHERE name = 'north'",
    "Use {schema} and {dialect}!": "SELECT name FROM state",
    "Throw it all away.": "DROP TABLE city",
}
ROWS = {"How many cities are there?": [(3,)], "Which city is largest?": [("cob",)]}
FULL: dict[str, Any] = {"lora_rank": None, "learning_rate": 5e-3, "show_progress": False}
FULL |= {"device": "cpu", "precision": "fp32", "batch_size": 5, "epochs": 40}


@pytest.fixture(scope="module")
def geo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("geo") / "geo.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(GEO)
    return file


@pytest.fixture(scope="module")
def url(geo: Path) -> str:
    return f"sqlite:///{geo}"


@pytest.fixture
def sql_database(url: str) -> Iterator[SQLDatabase]:
    engine = create_engine(url)
    yield SQLDatabase(engine)
    engine.dispose()


def questions(**fields: Any) -> Text2SQLDataset:
    fields = fields or {"database": "geo"}
    return Text2SQLDataset.coerce(
        [{"question": question, "sql": sql, **fields} for question, sql in SQL.items()]
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, url: str) -> Iterator[str]:
    """A tiny model of random weights, whose words are those of the data."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with closing(ChatMaker(SQLPrompt(), url)) as maker:
        chats = maker.dataset(questions(), "train")
    texts = [message["content"] for chat in chats for message in chat.messages] * 3
    yield model_assets.tiny_causal_lm(
        tmp_path_factory.mktemp("base"), texts, dim=64, spread=0.12, vocabulary=500
    )
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(
    base: str, url: str, tmp_path_factory: pytest.TempPathFactory
) -> Text2SQLFinetuneEngine:
    folder = tmp_path_factory.mktemp("trained") / "sql"
    engine = Text2SQLFinetuneEngine(questions(), base, folder, database=url, **FULL)
    assert engine.finetune().status is JobStatus.SUCCEEDED
    return engine


@pytest.fixture(scope="module")
def llm(trained: Text2SQLFinetuneEngine) -> LocalLLM:
    return trained.get_finetuned_model(max_new_tokens=60)


@contextmanager
def prompts_sent(llm: LocalLLM) -> Iterator[list[list[int]]]:
    """Collect the token ids of every prompt that reaches the model."""
    sent: list[list[int]] = []
    generate = llm._model.generate

    def listening(*args: Any, **kwargs: Any) -> Any:
        sent.append(kwargs["input_ids"][0].tolist())
        return generate(*args, **kwargs)

    llm._model.generate = listening
    try:
        yield sent
    finally:
        del llm._model.generate


def trained_prompts(engine: Text2SQLFinetuneEngine, llm: LocalLLM) -> list[list[int]]:
    """Return the token ids before the answer of each training sequence."""
    rows = rows_of(engine._data()[0].examples, ChatFormat(llm._tokenizer), 512, "train")
    assert len(rows) == len(SQL)
    return [row.input_ids[: row.is_answer.index(True)] for row in rows]


def test_the_loss_is_on_the_sql_only(trained: Text2SQLFinetuneEngine, llm: LocalLLM) -> None:
    rows = rows_of(trained._data()[0].examples, ChatFormat(llm._tokenizer), 512, "train")
    for row, sql in zip(rows, SQL.values(), strict=True):
        learned = [
            i for i, is_answer in zip(row.input_ids, row.is_answer, strict=True) if is_answer
        ]
        assert llm._tokenizer.decode(learned).rstrip() == f"{sql}<|im_end|>"


def test_the_query_engine_sends_the_tokens_of_training(
    trained: Text2SQLFinetuneEngine, llm: LocalLLM, sql_database: SQLDatabase
) -> None:
    query_engine = trained.get_query_engine(sql_database, llm=llm, repair=False)
    with prompts_sent(llm) as sent:
        for question in SQL:
            query_engine.query(question)
    assert sent == trained_prompts(trained, llm)


@pytest.mark.parametrize("n", [1, 3])
def test_so_does_the_engine_with_a_table_retriever(
    trained: Text2SQLFinetuneEngine, llm: LocalLLM, sql_database: SQLDatabase, n: int
) -> None:
    retriever = table_retriever(sql_database, ["lake", "state", "city"])
    query_engine = trained.get_query_engine(
        sql_database, table_retriever=retriever, llm=llm, repair=False, n=n
    )
    assert isinstance(query_engine, SQLTableRetrieverQueryEngine)
    with prompts_sent(llm) as sent:
        responses = [query_engine.query(question) for question in SQL]
    assert sent == trained_prompts(trained, llm)
    assert responses[0].metadata["result"] == [(3,)]


def test_so_do_llama_indexs_own_classes_with_the_trained_prompt(
    trained: Text2SQLFinetuneEngine,
    llm: LocalLLM,
    sql_database: SQLDatabase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Settings, "_embed_model", MockEmbedding(embed_dim=2))
    prompt = trained.get_prompt(sql_database)
    given: dict[str, Any] = {"llm": llm, "text_to_sql_prompt": prompt}
    tables = table_retriever(sql_database, ["city", "state", "lake"])
    engines = [
        NLSQLTableQueryEngine(sql_database, synthesize_response=False, **given),
        SQLTableRetrieverQueryEngine(sql_database, tables, synthesize_response=False, **given),
        NLSQLRetriever(sql_database, **given),
    ]
    asked = list(SQL)[:4]  # without a guard, the last would be done
    for engine in engines:
        with prompts_sent(llm) as sent:
            for question in asked:
                ask = engine.retrieve if isinstance(engine, NLSQLRetriever) else engine.query
                ask(question)
        assert sent == trained_prompts(trained, llm)[:4], type(engine).__name__


def test_schemas_from_statements_and_from_the_database_are_one_prompt(url: str) -> None:
    with closing(ChatMaker(SQLPrompt(), url)) as maker:
        live = maker.dataset(questions(), "train")
    # A database lists its tables by name.
    tables = sorted(part.strip() for part in GEO.split(";")[:3])
    written = ChatMaker(SQLPrompt()).dataset(questions(context=";".join(tables) + ";"), "train")
    assert [chat.messages for chat in written] == [chat.messages for chat in live]


def table_retriever(sql_database: SQLDatabase, tables: list[str]) -> Any:
    """Return LlamaIndex's retriever of tables; it finds all of them, in some order."""
    schemas = [SQLTableSchema(table_name=table) for table in tables]
    index = ObjectIndex.from_objects(
        schemas,
        SQLTableNodeMapping(sql_database),
        VectorStoreIndex,
        embed_model=model_assets.HashingEmbedding(),
    )
    return index.as_retriever(
        similarity_top_k=len(tables), embed_model=model_assets.HashingEmbedding()
    )


def test_the_answer_is_the_rows_and_the_metadata_is_llama_indexs(
    trained: Text2SQLFinetuneEngine, llm: LocalLLM, sql_database: SQLDatabase
) -> None:
    query_engine = trained.get_query_engine(sql_database, llm=llm)
    assert isinstance(query_engine, NLSQLTableQueryEngine)
    for question, rows in ROWS.items():
        for response in (query_engine.query(question), asyncio.run(query_engine.aquery(question))):
            assert response.response == str(rows)
            metadata = response.metadata
            assert metadata["sql_query"] == SQL[question]
            assert metadata["result"] == rows
            assert metadata["votes"] == 1
            assert metadata["repaired"] is False
            assert [one["sql"] for one in metadata["candidates"]] == [SQL[question]]
    assert metadata["col_keys"] == ["name"]


def test_several_candidates_begin_with_the_greedy_one(
    trained: Text2SQLFinetuneEngine, llm: LocalLLM, url: str
) -> None:
    query_engine = trained.get_query_engine(url, llm=llm, n=4, temperature=5.0)
    first, second = (query_engine.query("How many cities are there?") for _ in range(2))
    assert first.metadata == second.metadata
    candidates = first.metadata["candidates"]
    assert len(candidates) == 4
    assert candidates[0]["sql"] == SQL["How many cities are there?"]
    assert all(-20 < one["mean_logprob"] < 0 for one in candidates)
    assert first.metadata["result"] == [(3,)]
    assert first.metadata["votes"] >= 1
    again = asyncio.run(query_engine.aquery("How many cities are there?"))
    assert again.metadata == first.metadata


def test_what_the_model_has_learned_to_destroy_is_not_run(
    trained: Text2SQLFinetuneEngine, llm: LocalLLM, sql_database: SQLDatabase, geo: Path
) -> None:
    before = geo.read_bytes()
    response = trained.get_query_engine(sql_database, llm=llm).query("Throw it all away.")
    assert response.metadata["candidates"][0]["sql"] == "DROP TABLE city"
    assert response.response.startswith("Error: the statement")
    assert "result" not in response.metadata
    assert geo.read_bytes() == before


def test_an_llm_may_word_the_answer(
    trained: Text2SQLFinetuneEngine, llm: LocalLLM, sql_database: SQLDatabase
) -> None:
    query_engine = trained.get_query_engine(sql_database, llm=llm, synthesis_llm=MockLLM())
    response = query_engine.query("How many cities are there?")
    assert "[(3,)]" in response.response  # MockLLM repeats its prompt
    assert "SELECT count(*) FROM city" in response.response
    assert response.metadata["result"] == [(3,)]


def test_tables_are_the_allow_list(
    trained: Text2SQLFinetuneEngine, llm: LocalLLM, sql_database: SQLDatabase
) -> None:
    allowed = ["state", "lake"]
    query_engine = trained.get_query_engine(sql_database, llm=llm, tables=allowed, repair=False)
    retriever = query_engine.sql_retriever
    refused = retriever._runner.run([Candidate("SELECT count(*) FROM city")])[0]
    assert isinstance(refused.error, UnsafeSQLError)
    assert "'city', which is not among the tables that may be read" in refused.error.reason
    prompt = retriever._messages(retriever._given(QueryBundle("What?")))
    assert "city(" not in prompt[-1].content
    assert "state(" in prompt[-1].content


def test_a_saved_engine_comes_back(trained: Text2SQLFinetuneEngine, url: str) -> None:
    manifest = json.loads((trained.output_dir / "ft.json").read_text())
    assert manifest["settings"]["text2sql"] == {
        "schema_style": "typed",
        "max_schema_tokens": 1000,
        "version": 1,
        "dialects": ["sqlite"],
        "tables": ["city", "lake", "state"],
    }
    assert url not in json.dumps(manifest)
    loaded = Text2SQLFinetuneEngine.load(trained.output_dir, device="cpu")
    assert loaded.prompt == trained.prompt
    response = loaded.get_query_engine(url).query("Which city is largest?")
    assert response.metadata["result"] == [("cob",)]
    with pytest.raises(ArgumentError, match="a loaded engine cannot train again"):
        loaded.finetune()


def test_the_prompt_of_the_folder_counts(
    trained: Text2SQLFinetuneEngine, llm: LocalLLM, url: str
) -> None:
    other = Text2SQLFinetuneEngine(None, output_dir=trained.output_dir, schema_style="create")
    query_engine = other.get_query_engine(url, llm=llm)
    with prompts_sent(llm) as sent:
        query_engine.query("How many cities are there?")
    assert sent == trained_prompts(trained, llm)[:1]


def test_a_prompt_of_another_release_is_refused(
    trained: Text2SQLFinetuneEngine, tmp_path: Path
) -> None:
    folder = tmp_path / "sql"
    folder.mkdir()
    manifest = json.loads((trained.output_dir / "ft.json").read_text())
    manifest["settings"]["text2sql"]["version"] = 99
    (folder / "ft.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"sql: version: .* version 99 of the prompt"):
        Text2SQLFinetuneEngine.load(folder)
    del manifest["settings"]["text2sql"]
    (folder / "ft.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="was not trained to write SQL"):
        Text2SQLFinetuneEngine.load(folder)


def test_a_view_that_the_app_does_not_list_is_said(
    base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "viewed.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(GEO + "CREATE VIEW big AS SELECT * FROM city WHERE people > 15;")
    engine = Text2SQLFinetuneEngine(
        questions(), base, tmp_path / "sql", database=file, **FULL | {"epochs": 1}
    )
    engine.finetune()
    assert "train: the SQL of 1 of 5 examples would not run on its schema" in caplog.text
    assert "'Throw it all away.'" in caplog.text
    engine.get_query_engine(file)
    assert "does not list" not in caplog.text
    live = create_engine(f"sqlite:///{file}")
    engine.get_query_engine(SQLDatabase(live))
    live.dispose()
    assert "trained with tables that this database does not list: big" in caplog.text


def test_other_settings_replace_a_model_and_say_so(
    base: str, url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fast = FULL | {"epochs": 1}
    for seed in (1, 2):
        assert "it is replaced" not in caplog.text
        Text2SQLFinetuneEngine(
            questions(), base, tmp_path / "sql", database=url, seed=seed, **fast
        ).finetune()
    assert "sql: was trained with other data or settings; it is replaced" in caplog.text
    shown = (tmp_path / "sql" / "model.safetensors").stat().st_mode & 0o777
    assert shown == (tmp_path / "sql" / "ft.json").stat().st_mode & 0o777


def test_another_dialect_is_said(
    trained: Text2SQLFinetuneEngine,
    llm: LocalLLM,
    url: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with caplog.at_level(logging.WARNING, "ft_text2sql"):
        trained.get_query_engine(url, llm=llm)
        assert not caplog.messages
        record = {"dialects": ["postgres"]}
        monkeypatch.setattr("ft_text2sql.engine._recorded", lambda folder: (record, SQLPrompt()))
        trained.get_query_engine(url, llm=llm)
    assert "trained on SQL of postgres, and the database speaks sqlite" in caplog.text


def test_a_trained_folder_is_not_trained_again(
    trained: Text2SQLFinetuneEngine, base: str, url: str
) -> None:
    weights = trained.output_dir / "model.safetensors"
    before = weights.stat().st_mtime_ns
    Text2SQLFinetuneEngine(questions(), base, trained.output_dir, database=url, **FULL).finetune()
    assert weights.stat().st_mtime_ns == before
    job = Text2SQLFinetuneEngine.from_job_id(str(trained.output_dir)).get_current_job()
    assert job.status is JobStatus.SUCCEEDED


def test_training_by_lora_in_another_process(base: str, url: str, tmp_path: Path) -> None:
    small: dict[str, Any] = {"device": "cpu", "epochs": 1, "show_progress": False}
    data = questions()
    engine = Text2SQLFinetuneEngine(
        data, base, tmp_path / "sql", database=url, val_data=data, **small
    )
    assert engine.settings.lora_rank == 16
    assert engine.settings.learning_rate == 5e-4
    assert (engine.settings.epochs, engine.settings.batch_size) == (1, 8)
    job = engine.finetune(wait=False)
    job = engine.wait(timeout=300)
    assert job.status is JobStatus.SUCCEEDED
    manifest = job.raw
    assert manifest.settings["text2sql"]["dialects"] == ["sqlite"]
    assert manifest.metrics["validation_loss"] > 0
    response = engine.get_query_engine(url, n=3, repair=False).query("Which city is largest?")
    assert len(response.metadata["candidates"]) == 3


def test_merged_students_are_ordinary_models(
    trained: Text2SQLFinetuneEngine, tmp_path: Path
) -> None:
    merged = trained.merge(tmp_path / "merged")
    assert LocalFinetuneEngine.load(merged).base_model == trained.base_model


def test_the_constructor_does_nothing(tmp_path: Path) -> None:
    Text2SQLFinetuneEngine(
        tmp_path / "absent.jsonl", "absent", tmp_path / "sql", database="sqlite:///absent.db"
    )
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ArgumentError, match="schema_style: is one of typed, lines"):
        Text2SQLFinetuneEngine(None, schema_style="xml")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="epoch: is no argument"):
        Text2SQLFinetuneEngine(None, epoch=3)


def test_bad_data_is_named(base: str, url: str, tmp_path: Path) -> None:
    def finetune(data: Any, **fields: Any) -> None:
        Text2SQLFinetuneEngine(data, base, tmp_path / "sql", **fields).finetune()

    with pytest.raises(DatasetError, match="no such file"):
        finetune(tmp_path / "absent.jsonl")
    with pytest.raises(DatasetError, match=r"train\[0\]\.context: has no schema"):
        finetune(questions())
    with pytest.raises(DatasetError, match=r"train\[0\]\.context: "):
        finetune(questions(context="no tables here"))
    with pytest.raises(DatasetError, match=r"train\[0\]\.database: 'geo' is not among"):
        finetune(questions(), database={"other": url})
    with pytest.raises(DatabaseError, match="no such file"):
        finetune(questions(), database=f"sqlite:///{tmp_path}/gone.db")
    assert not (tmp_path / "gone.db").exists()
    assert not (tmp_path / "sql").exists()


def test_unknown_arguments_of_the_query_engine_are_named(
    trained: Text2SQLFinetuneEngine, llm: LocalLLM, url: str
) -> None:
    with pytest.raises(ArgumentError, match="sql_onyl: is no argument"):
        trained.get_query_engine(url, llm=llm, sql_onyl=True)
    with pytest.raises(ArgumentError, match="n: is a whole number from 1"):
        trained.get_query_engine(url, llm=llm, n=0)
    with pytest.raises(ArgumentError, match="temperature: is a number above 0"):
        trained.get_query_engine(url, llm=llm, n=2, temperature=0)
    query_engine = trained.get_query_engine(url, llm=llm, sql_only=True, markdown_response=True)
    response = query_engine.query("Which city is largest?")
    assert response.metadata == {"sql_query": SQL["Which city is largest?"]} | {
        "result": SQL["Which city is largest?"]
    }


def test_several_databases_by_name(tmp_path: Path, url: str) -> None:
    other = tmp_path / "shop.db"
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE goods (price REAL)")
    data = Text2SQLDataset.coerce(
        [
            {"question": "How many?", "sql": "SELECT count(*) FROM city;", "database": "geo"},
            {"question": "How dear?", "sql": "SELECT price FROM goods", "database": "shop"},
        ]
    )
    shop = create_engine(f"sqlite:///{other}")
    databases = {"geo": make_url(url), "shop": shop}
    with closing(ChatMaker(SQLPrompt(), databases)) as maker:
        chats = maker.dataset(data, "train").examples
    assert "city(name text" in chats[0].messages[1]["content"]
    assert chats[0].messages[2]["content"] == "SELECT count(*) FROM city"
    assert "goods(price number)" in chats[1].messages[1]["content"]
    shop.dispose()


def test_tables_of_the_answer_are_in_a_prompt_without_room(url: str) -> None:
    data = Text2SQLDataset.coerce(
        [
            {"question": question, "sql": sql, "database": "geo"}
            for question, sql in (
                ("Which lake?", "SELECT s.name FROM state s JOIN city ON city.state = s.name"),
                ("Which lake?", "not SQL"),
            )
        ]
    )
    with closing(ChatMaker(SQLPrompt(max_schema_tokens=1), url)) as maker:
        users = [chat.messages[1]["content"] for chat in maker.dataset(data, "train")]
    assert [line.split("(")[0] for line in users[0].splitlines()[2:-1]] == ["city", "state"]
    assert [line.split("(")[0] for line in users[1].splitlines()[2:-1]] == ["lake"]


def test_the_commands_train_and_ask(
    base: str, geo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "train.jsonl"
    questions().save(data)
    command = ["text2sql", "train", str(data), "--base-model", base, "--json"]
    command += ["--output", str(tmp_path / "sql"), "--database", str(geo), "--lora-rank", "0"]
    command += ["--learning-rate", "5e-3", "--epochs", "40", "--batch-size", "5"]
    assert run([*command, "--device", "cpu", "--validation", str(data)]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["metrics"]["validation_loss"] < document["metrics"]["base_loss"]
    ask = ["text2sql", "ask", str(tmp_path / "sql"), "--database", str(geo), "--device", "cpu"]
    assert run([*ask, "How many cities are there?", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["result"] == [[3]]
    assert document["sql_query"] == "SELECT count(*) FROM city"
    assert run([*ask, "Which city is largest?", "--n", "3"]) == 0
    printed = capfd.readouterr()
    assert printed.out == "name\ncob\n"
    assert "SELECT name FROM city ORDER BY people DESC LIMIT 1" in printed.err
    assert run([*ask, "Throw it all away."]) == 1
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "DROP TABLE city\n" in printed.err
    assert "Error: the statement begins with 'DROP'" in printed.err
    assert run([*ask, " "]) == 1
    assert "Error: QUESTION: is empty" in capfd.readouterr().err
    ask[4] = str(tmp_path / "absent.db")
    assert run([*ask, "How many?"]) == 1
    assert "absent.db: is no file" in capfd.readouterr().err


def run(arguments: list[str]) -> int:
    """Run `ft` as its entry point does."""
    try:
        main(arguments)
    except SystemExit as exit:
        return int(exit.code or 0)
    return 0


def test_importing_the_engine_loads_no_heavy_library() -> None:
    code = (
        "import sys, ft_text2sql; ft_text2sql.Text2SQLFinetuneEngine(None); "
        "heavy = {'torch', 'transformers', 'sqlglot', 'openai'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_retriever_alone(
    trained: Text2SQLFinetuneEngine, llm: LocalLLM, sql_database: SQLDatabase
) -> None:
    nodes = Text2SQLRetriever(sql_database, llm).retrieve("How many cities are there?")
    assert nodes[0].text == "[(3,)]"
    assert nodes[0].metadata["sql_query"] == "SELECT count(*) FROM city"
