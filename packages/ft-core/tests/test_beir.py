"""BEIR folders in and out."""

import json
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.errors import ArgumentError, DatasetError


@pytest.fixture
def folder(tmp_path):
    """What the BEIR archives hold: titles, metadata, all splits' queries, a header."""
    corpus = [
        {"_id": "d1", "title": "Revenue", "text": "It grew.", "metadata": {"url": "x"}},
        {"_id": "d2", "title": "", "text": "No title"},
        {"_id": "d3", "title": "Only a title", "text": ""},
        {"_id": "d4", "title": "", "text": " "},
    ]
    queries = [{"_id": key, "text": f"question {key}"} for key in ("q3", "q1", "q2", "train")]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td3\t1\nq1\td2\t0\nq3\td2\t1\nq2\td1\t-1\n"
    )
    return tmp_path


def test_a_folder_becomes_a_dataset(folder, caplog):
    with caplog.at_level(logging.WARNING):
        dataset = EmbeddingQAFinetuneDataset.from_beir(folder)
    assert dataset.queries == {"q3": "question q3", "q1": "question q1"}
    assert dataset.corpus == {"d1": "Revenue\nIt grew.", "d2": "No title", "d3": "Only a title"}
    assert dataset.qrels == {"q1": {"d1": 2, "d3": 1}, "q3": {"d2": 1}}
    assert "1 documents have no text" in caplog.text


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("qrels/test.tsv", "q1\td1\t2", "q1\td9\t2", "test.tsv: line 2: there is no document 'd9'"),
        ("qrels/test.tsv", "q3\td2", "q9\td2", "test.tsv: line 5: there is no query 'q9'"),
        ("qrels/test.tsv", "q1\td3\t1", "q1\td4\t1", "line 3: the text of document 'd4' is empty"),
        ("qrels/test.tsv", "q1\td3\t1", "q1\td3\tyes", "line 3: the score 'yes' is not an integer"),
        ("qrels/test.tsv", "q1\td3\t1", "q1\td1\t1", "line 3: query 'q1' and document 'd1' have"),
        ("qrels/test.tsv", "q1\td3\t1", "q1 0 d3 1", "line 3: needs three columns"),
        ("qrels/test.tsv", "q1\td3\t1", "q1\t0\td3\t1", "with tabs between (query-id, corpus-id"),
        ("qrels/test.tsv", "q1\td3", 'q1\t"d3', "test.tsv: line 6: unexpected end of data"),
        ("qrels/test.tsv", "q1\td1\t2\nq1\td3\t1\nq1\td2\t0\nq3\td2\t1\n", "", "no relevant doc"),
        ("corpus.jsonl", '"_id": "d2"', '"_id": "d1"', "corpus.jsonl: line 2: the id 'd1' stands"),
        ("corpus.jsonl", '"_id": "d2"', '"_id": 2', "corpus.jsonl: line 2: needs a string '_id'"),
        ("corpus.jsonl", '"text": "No title"', '"text": null', "line 2: needs a string 'text'"),
        ("corpus.jsonl", '{"_id": "d2"', '[{"_id": "d2"', "corpus.jsonl: line 2"),
        ("corpus.jsonl", '"_id": "d2"', '"_id": "d2", "_id": "d5"', "line 2: the key '_id' stands"),
        ("queries.jsonl", '"text": "question q1"}', '"text": "ques', "jsonl: line 2, column"),
        ("queries.jsonl", '{"_id": "q1", "text": "question q1"}', "7", "2: is not a JSON object"),
        ("queries.jsonl", '"text": "question q1"', '"text": " "', "text of query 'q1' is empty"),
    ],
)  # fmt: skip
def test_a_bad_file_gives_one_error_with_the_line(folder, file, old, new, message):
    replace(folder / file, old, new)
    with pytest.raises(DatasetError) as caught:
        EmbeddingQAFinetuneDataset.from_beir(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_split_lists_those_there(folder):
    with pytest.raises(DatasetError, match=r"dev\.tsv: no such file; the splits there are: test"):
        EmbeddingQAFinetuneDataset.from_beir(folder, split="dev")
    with pytest.raises(DatasetError, match="splits there are: none"):
        EmbeddingQAFinetuneDataset.from_beir(folder / "nowhere")
    with pytest.raises(ArgumentError, match="split: is the name of a file"):
        EmbeddingQAFinetuneDataset.from_beir(folder, split="../test")
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(DatasetError, match=r"corpus\.jsonl: no such file"):
        EmbeddingQAFinetuneDataset.from_beir(folder)


def test_a_qrels_file_without_header_loses_no_line(folder):
    replace(folder / "qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "")
    assert set(EmbeddingQAFinetuneDataset.from_beir(folder).queries) == {"q1", "q3"}


ids = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=6)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@st.composite
def datasets(draw):
    corpus = draw(st.dictionaries(ids | st.just('"q"\t'), texts, min_size=1, max_size=4))
    queries = draw(st.dictionaries(ids, texts, min_size=1, max_size=4))
    documents = st.lists(st.sampled_from(list(corpus)), min_size=1, unique=True)
    relevant = {query: draw(documents) for query in queries}
    return EmbeddingQAFinetuneDataset(
        queries=queries,
        corpus=corpus,
        relevant_docs=relevant,
        grades={q: {found[0]: draw(st.integers(2, 3))} for q, found in relevant.items()},
    )


@settings(max_examples=60, deadline=None)
@given(datasets())
def test_what_is_written_is_read_back(tmp_path_factory, dataset):
    folder = tmp_path_factory.mktemp("beir")
    dataset.to_beir(folder, "dev")
    assert EmbeddingQAFinetuneDataset.from_beir(folder, "dev") == dataset


def test_splits_of_one_corpus_share_a_folder(tmp_path):
    dataset = EmbeddingQAFinetuneDataset(
        queries={"q1": "one", "q2": "two"},
        corpus={"a": "alpha", "b": "beta"},
        relevant_docs={"q1": ["a"], "q2": ["b"]},
    )
    train, test = dataset.select(["q1"]), dataset.select(["q2"])
    train.to_beir(tmp_path, "train")
    test.to_beir(tmp_path, "test")
    assert EmbeddingQAFinetuneDataset.from_beir(tmp_path, "train") == train
    assert EmbeddingQAFinetuneDataset.from_beir(tmp_path, "test") == test


def test_nothing_there_is_overwritten_with_something_else(tmp_path):
    dataset = EmbeddingQAFinetuneDataset(
        queries={"q": "one"}, corpus={"a": "alpha"}, relevant_docs={"q": ["a"]}
    )
    dataset.to_beir(tmp_path, "train")
    other = dataset.model_copy(update={"corpus": {"a": "another"}})
    with pytest.raises(DatasetError, match=r"corpus\.jsonl: holds another corpus"):
        other.to_beir(tmp_path, "test")
    other = dataset.model_copy(update={"queries": {"q": "another"}})
    with pytest.raises(DatasetError, match=r"queries\.jsonl: the query 'q' has another text"):
        other.to_beir(tmp_path, "test")
    assert EmbeddingQAFinetuneDataset.from_beir(tmp_path, "train") == dataset
    assert [path.name for path in (tmp_path / "qrels").iterdir()] == ["train.tsv"]


def test_an_id_that_a_table_cannot_hold_is_refused(tmp_path):
    dataset = EmbeddingQAFinetuneDataset(
        queries={"q": "one"}, corpus={"a\rb": "alpha"}, relevant_docs={"q": ["a\rb"]}
    )
    with pytest.raises(DatasetError, match=r"cannot hold the id 'a\\rb'"):
        dataset.to_beir(tmp_path)
    assert list(tmp_path.iterdir()) == []
