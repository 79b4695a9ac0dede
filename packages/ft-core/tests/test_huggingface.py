"""Hugging Face `datasets` in and out, with the real library."""

import sys

import pytest

from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.errors import DatasetError, MissingExtraError

datasets = pytest.importorskip("datasets", reason="ft-core[hf] is not installed")


@pytest.fixture
def dataset():
    return EmbeddingQAFinetuneDataset(
        queries={"q2": "two", "q1": "one"},
        corpus={"a": "alpha", "b": "beta", "c": "unasked"},
        relevant_docs={"q2": ["b", "a"], "q1": ["a"]},
        grades={"q2": {"b": 3}},
    )


def tables(**changes):
    columns = {
        "queries": {"id": ["q"], "text": ["one"]},
        "corpus": {"id": ["a"], "text": ["alpha"]},
        "qrels": {"query_id": ["q"], "corpus_id": ["a"], "score": [1]},
    }
    for name, table in changes.items():
        columns[name].update(table)
    return {name: datasets.Dataset.from_dict(table) for name, table in columns.items()}


def test_the_three_tables_go_there_and_back(dataset, tmp_path):
    native = dataset.to_huggingface()
    assert isinstance(native, datasets.DatasetDict)
    assert EmbeddingQAFinetuneDataset.from_huggingface(native) == dataset
    native.save_to_disk(str(tmp_path / "saved"))
    assert EmbeddingQAFinetuneDataset.from_huggingface(tmp_path / "saved") == dataset
    assert EmbeddingQAFinetuneDataset.from_huggingface(str(tmp_path / "saved")) == dataset


def test_the_column_names_of_beir_on_the_hub():
    native = {
        "queries": datasets.Dataset.from_dict({"_id": ["1", "2"], "text": ["one", "unjudged"]}),
        "corpus": datasets.Dataset.from_dict(
            {"_id": ["7", "8"], "title": ["T", ""], "text": ["alpha", "beta"]}
        ),
        # On the hub ids that look like numbers are numbers here.
        "qrels": datasets.Dataset.from_dict(
            {"query-id": [1, 1], "corpus-id": [7, 8], "score": [1, 0]}
        ),
    }
    dataset = EmbeddingQAFinetuneDataset.from_huggingface(native)
    assert dataset.queries == {"1": "one"}
    assert dataset.corpus == {"7": "T\nalpha", "8": "beta"}
    assert dataset.relevant_docs == {"1": ["7"]}


@pytest.mark.parametrize("question", ["anchor", "query", "question"])
@pytest.mark.parametrize("document", ["positive", "context", "document", "answer"])
def test_pairs_become_a_dataset_in_which_equal_texts_are_one(question, document):
    pairs = datasets.Dataset.from_dict(
        {
            question: ["one", "two", "one", "one"],
            document: ["alpha", "beta", "beta", "alpha"],
            "negative_1": ["gamma", "alpha", "gamma", "delta"],
        }
    )
    dataset = EmbeddingQAFinetuneDataset.from_huggingface(pairs)
    assert dataset.queries == {"q0": "one", "q1": "two"}
    assert sorted(dataset.corpus.values()) == ["alpha", "beta", "delta", "gamma"]
    texts = {
        dataset.queries[query]: [dataset.corpus[document] for document in documents]
        for query, documents in dataset.relevant_docs.items()
    }
    assert texts == {"one": ["alpha", "beta"], "two": ["beta"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qrels": {"corpus_id": ["z"]}}, "qrels, row 0: there is no document 'z'"),
        ({"qrels": {"query_id": ["z"]}}, "qrels, row 0: there is no query 'z'"),
        ({"qrels": {"score": [0.5]}}, "qrels, row 0: the score 0.5 is not an integer"),
        ({"qrels": {"score": [float("nan")]}}, "qrels, row 0: the score nan is not an integer"),
        ({"qrels": {"score": ["1"]}}, "qrels, row 0: the score '1' is not an integer"),
        ({"qrels": {"score": [None]}}, "qrels, row 0: the score None is not an integer"),
        ({"qrels": {"score": [0]}}, "has no relevant document"),
        ({"corpus": {"id": ["a", "a"], "text": ["x", "y"]}}, "corpus, row 1: the id 'a' stands"),
        ({"corpus": {"text": [None]}}, "corpus, row 0: needs a text, not None"),
        ({"corpus": {"text": [" "]}}, "qrels, row 0: the text of document 'a' is empty"),
        ({"corpus": {"id": [None]}}, "corpus, row 0: needs an id"),
    ],
)
def test_bad_tables_are_named_with_the_row(changes, message):
    with pytest.raises(DatasetError) as caught:
        EmbeddingQAFinetuneDataset.from_huggingface(tables(**changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"anchor": ["x"], "label": [1]}, "none called positive or context or document or answer"),
        ({"text": ["x"]}, "the table: has the columns text, but none called anchor or query"),
        ({"anchor": ["x", None], "positive": ["y", "y"]}, "row 1, column anchor: needs a text"),
        ({"anchor": ["x"], "positive": [" "]}, "row 0, column positive: the text is empty"),
        ({"anchor": [], "positive": []}, "queries: has no query"),
    ],
)
def test_bad_pairs_are_named_with_the_row(columns, message):
    with pytest.raises(DatasetError) as caught:
        EmbeddingQAFinetuneDataset.from_huggingface(datasets.Dataset.from_dict(columns))
    assert message in str(caught.value)


def test_what_is_no_dataset_is_named(tmp_path):
    pairs = datasets.Dataset.from_dict({"anchor": ["x"], "positive": ["y"]})
    with pytest.raises(DatasetError, match=r"has train, test but no queries.*source\['train'\]"):
        EmbeddingQAFinetuneDataset.from_huggingface(
            datasets.DatasetDict({"train": pairs, "test": pairs})
        )
    with pytest.raises(DatasetError, match="a list is not a Dataset"):
        EmbeddingQAFinetuneDataset.from_huggingface([])
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DatasetError, match="no dataset that save_to_disk wrote"):
            EmbeddingQAFinetuneDataset.from_huggingface(path)


def test_without_the_library_the_pip_command_is_named(dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ft-core\[hf\]'"):
        dataset.to_huggingface()
