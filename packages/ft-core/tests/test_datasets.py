"""The embedding QA dataset: what it reads, refuses, and survives."""

import asyncio
import importlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_index.core import VectorStoreIndex
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.evaluation import RetrieverEvaluator
from llama_index.core.schema import TextNode

from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.errors import DatasetError, FTError

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "finance-qa"
OWN_CLASSES = (
    "llama_index.core.evaluation",
    "llama_index.core.llama_dataset.legacy.embedding",
    "llama_index.finetuning",
)


@pytest.fixture
def content():
    """What the predecessor writes."""
    return {
        "queries": {"q1": "What grew?", "q2": "Qui a signé ?"},
        "corpus": {"d1": "Revenue grew.", "d2": "The auditor signed. \u2028 日本"},
        "relevant_docs": {"q1": ["d1"], "q2": ["d2", "d1"]},
        "mode": "text",
    }


@pytest.fixture
def dataset(content):
    return EmbeddingQAFinetuneDataset(**content)


def test_the_predecessors_file_is_read_and_written_unchanged(content, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(content, indent=4))
    dataset = EmbeddingQAFinetuneDataset.from_json(path)
    dataset.save_json(tmp_path / "new" / "copy.json")
    assert json.loads((tmp_path / "new" / "copy.json").read_text()) == content
    assert EmbeddingQAFinetuneDataset.load(tmp_path / "new" / "copy.json") == dataset


@pytest.mark.parametrize("name", ["train.json", "val.json"])
def test_real_files_are_read(name):
    if not DATA.is_dir():
        pytest.skip(f"needs {name} of finance-qa in ../shared/data, which this machine lacks")
    dataset = EmbeddingQAFinetuneDataset.load(DATA / name)
    stats = dataset.stats()
    assert stats["queries"] == len(json.loads((DATA / name).read_text())["queries"])
    assert stats["pairs"] == stats["queries"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": {}}, "queries: has no query"),
        ({"queries": {}, "corpus": {}, "relevant_docs": {}}, "queries: has no query"),
        ({"queries": {"q1": " \n"}}, "queries['q1']: the text is empty"),
        ({"corpus": {"d1": "", "d2": "x"}}, "corpus['d1']: the text is empty"),
        ({"relevant_docs": {"q1": ["d1"]}}, "relevant_docs['q2']: the query has no relevant"),
        ({"relevant_docs": {"q1": ["d1"], "q2": []}}, "relevant_docs['q2']: the query has no"),
        ({"relevant_docs": {"q1": ["d1"], "q2": ["d3"]}}, "['q2']: there is no document 'd3'"),
        ({"relevant_docs": {"q1": ["d1"], "q2": ["d1"], "q3": ["d1"]}}, "there is no query 'q3'"),
        ({"relevant_docs": {"q1": ["d1", "d1"], "q2": ["d1"]}}, "names a document twice"),
        (
            {"relevant_docs": {"q1": "d1", "q2": ["d1"]}},
            "relevant_docs.q1: Input should be a valid",
        ),
        ({"relevant_docs": None}, "relevant_docs: Input should be a valid dictionary"),
        ({"queries": {"q1": None, "q2": "x"}}, "queries.q1: Input should be a valid string"),
        ({"queries": ["What grew?"]}, "queries: Input should be a valid dictionary"),
        (
            {"queries": {"q1": "a\ud800b", "q2": "x"}},
            "queries['q1']: holds half of a surrogate pair",
        ),
        ({"corpus": {"d1": "x", "d2": "x", "\udc00": "x"}}, "holds half of a surrogate pair"),
        ({"answers": {}}, "answers: Extra inputs are not permitted"),
        ({"grades": {"q1": {"d2": 1}}}, "grades['q1']['d2']: grades a document not in"),
        ({"grades": {"q3": {"d2": 1}}}, "grades['q3']['d2']: grades a document not in"),
        ({"grades": {"q1": {"d1": 0}}}, "grades['q1']['d1']: a grade is at least 1"),
        ({"grades": {"q1": {"d1": 1.5}}}, "grades.q1.d1: Input should be a valid integer"),
    ],
)
def test_bad_content_gives_one_error_with_file_and_place(content, tmp_path, change, message):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**content, **change}))
    with pytest.raises(DatasetError) as caught:
        EmbeddingQAFinetuneDataset.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("  \n", "is empty"),
        ("[]", "Input should be a valid dictionary"),
        ("{'queries': {}}", "not JSON: Expecting property name"),
        ('{"queries": {"q1": "x", "q1": "y"}}', "the key 'q1' stands twice in one object"),
        ('{"queries": {}, "corpus": {}, "queries": {}}', "the key 'queries' stands twice"),
        ('{"queries": NaN}', "queries: Input should be a valid dictionary"),
        ("[" * 100_000, "not usable JSON"),
        ("1" * 5000, "not usable JSON"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(DatasetError) as caught:
        EmbeddingQAFinetuneDataset.load(path)
    assert f"{path}: " in str(caught.value)
    assert message in str(caught.value)


def test_every_truncation_of_a_file_is_an_error_with_the_place(dataset, tmp_path):
    dataset.save(tmp_path / "whole.json")
    whole = (tmp_path / "whole.json").read_bytes()
    path = tmp_path / "cut.json"
    for end in range(len(whole.rstrip())):
        path.write_bytes(whole[:end])
        with pytest.raises(DatasetError, match=r"truncated|is empty|not UTF-8") as caught:
            EmbeddingQAFinetuneDataset.load(path)
        assert str(path) in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "latin.json").write_bytes('{"queries": "é"}'.encode("latin-1"))
    for name, message in [
        ("nowhere.json", "no such file"),
        (".", "is a folder"),
        ("latin.json", "byte 13 is not UTF-8"),
        ("latin.json/x", "cannot be read: Not a directory"),
    ]:
        with pytest.raises(DatasetError, match=message):
            EmbeddingQAFinetuneDataset.load(tmp_path / name)


def test_a_byte_order_mark_and_carriage_returns_are_no_error(content, tmp_path):
    path = tmp_path / "windows.json"
    text = json.dumps(content, indent=1).replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert EmbeddingQAFinetuneDataset.load(path) == EmbeddingQAFinetuneDataset(**content)


texts = st.text(min_size=1).filter(str.strip)


@given(
    queries=st.dictionaries(st.text(), texts, min_size=1, max_size=3),
    corpus=st.dictionaries(st.text(), texts, min_size=1, max_size=3),
    data=st.data(),
)
def test_any_dataset_survives_the_disk(tmp_path_factory, queries, corpus, data):
    documents = st.lists(st.sampled_from(list(corpus)), min_size=1, unique=True)
    dataset = EmbeddingQAFinetuneDataset(
        queries=queries,
        corpus=corpus,
        relevant_docs={query: data.draw(documents) for query in queries},
    )
    path = tmp_path_factory.mktemp("data") / "data.json"
    dataset.save(path)
    again = EmbeddingQAFinetuneDataset.load(path)
    assert again == dataset
    assert list(again.corpus) == list(corpus)
    assert again.content_hash == dataset.content_hash


def test_the_hash_is_of_the_content(dataset, content):
    turned = {key: dict(reversed(content[key].items())) for key in ("queries", "corpus")}
    assert EmbeddingQAFinetuneDataset(**{**content, **turned}).content_hash == dataset.content_hash
    graded = EmbeddingQAFinetuneDataset(**content, grades={"q1": {"d1": 2}})
    assert graded.content_hash != dataset.content_hash
    content["corpus"]["d1"] += " "
    assert EmbeddingQAFinetuneDataset(**content).content_hash != dataset.content_hash


DISK_FULL = """
    import resource, sys
    from ft_core.datasets import EmbeddingQAFinetuneDataset as Dataset
    path = sys.argv[1]
    large = Dataset(queries={"q": "new"}, corpus={"d": "x" * 200_000}, relevant_docs={"q": ["d"]})
    # The kernel refuses the write as a full disk does, in the middle of the file.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        large.save(path)
    except OSError:
        sys.exit(7)
"""

KILLED = """
    import os, signal, sys
    from ft_core.datasets import EmbeddingQAFinetuneDataset as Dataset
    # The moment before the new file takes the place of the old.
    os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
    Dataset(queries={"q": "new"}, corpus={"d": "x"}, relevant_docs={"q": ["d"]}).save(sys.argv[1])
"""


@pytest.mark.parametrize(("program", "code"), [(DISK_FULL, 7), (KILLED, -signal.SIGKILL)])
def test_the_last_good_file_survives(dataset, tmp_path, program, code):
    path = tmp_path / "data.json"
    dataset.save(path)
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(path)], check=False)
    assert done.returncode == code
    assert path.read_bytes() == before
    if program is DISK_FULL:
        assert os.listdir(tmp_path) == ["data.json"]


def test_coerce_takes_what_looks_like_one(dataset, content, tmp_path):
    dataset.save(tmp_path / "data.json")
    assert EmbeddingQAFinetuneDataset.coerce(dataset) is dataset
    assert EmbeddingQAFinetuneDataset.coerce(tmp_path / "data.json") == dataset
    assert EmbeddingQAFinetuneDataset.coerce(str(tmp_path / "data.json")) == dataset
    assert EmbeddingQAFinetuneDataset.coerce(SimpleNamespace(**content)) == dataset
    del content["mode"]  # predecessors of the predecessor had none
    assert EmbeddingQAFinetuneDataset.coerce(SimpleNamespace(**content)) == dataset
    for bad in (None, [], content):
        with pytest.raises(DatasetError, match="is not an embedding QA dataset: it needs queries"):
            EmbeddingQAFinetuneDataset.coerce(bad)
    with pytest.raises(DatasetError, match="no query"):
        EmbeddingQAFinetuneDataset.coerce(SimpleNamespace(**{**content, "queries": {}}))


def own_class():
    for module in OWN_CLASSES:
        try:
            return importlib.import_module(module).EmbeddingQAFinetuneDataset
        except (ImportError, AttributeError):
            continue
    return None


@pytest.mark.skipif(own_class() is None, reason="this release of LlamaIndex has no such class")
def test_llama_indexs_own_class_goes_there_and_back(dataset, tmp_path):
    native = dataset.to_llama_index()
    assert type(native) is own_class()
    assert EmbeddingQAFinetuneDataset.coerce(native) == dataset
    native.save_json(str(tmp_path / "native.json"))
    assert EmbeddingQAFinetuneDataset.load(tmp_path / "native.json") == dataset
    dataset.save(tmp_path / "ours.json")
    assert own_class().from_json(str(tmp_path / "ours.json")) == native


@pytest.mark.skipif(own_class() is not None, reason="this release of LlamaIndex has the class")
def test_without_llama_indexs_class_the_error_says_what_to_do(dataset):
    with pytest.raises(FTError, match=r"RetrieverEvaluator\.evaluate"):
        dataset.to_llama_index()


def test_llama_indexs_evaluator_takes_the_pairs(dataset):
    nodes = [TextNode(id_=key, text=text) for key, text in dataset.corpus.items()]
    index = VectorStoreIndex(nodes, embed_model=MockEmbedding(embed_dim=4))
    evaluator = RetrieverEvaluator.from_metric_names(
        ["hit_rate"], retriever=index.as_retriever(similarity_top_k=2)
    )
    for query, documents in dataset.query_docid_pairs:
        result = asyncio.run(evaluator.aevaluate(query, documents))
        assert result.metric_vals_dict == {"hit_rate": 1.0}


def test_select_keeps_order_texts_and_grades(content):
    dataset = EmbeddingQAFinetuneDataset(**content, grades={"q1": {"d1": 2}, "q2": {"d1": 3}})
    one = dataset.select(["q1"], corpus=["d1"])
    assert one.queries == {"q1": "What grew?"}
    assert one.corpus == {"d1": "Revenue grew."}
    assert one.grades == {"q1": {"d1": 2}}
    assert dataset.select(["q2", "q1"]) == dataset
    assert list(dataset.select(["q2", "q1"]).queries) == ["q1", "q2"]
    with pytest.raises(DatasetError, match="there is no document 'd1' in corpus"):
        dataset.select(["q1"], corpus=["d2"])
    with pytest.raises(DatasetError, match="queries: has no query"):
        dataset.select([])


def test_stats_and_qrels(content):
    dataset = EmbeddingQAFinetuneDataset(**content, grades={"q2": {"d1": 3}})
    assert dataset.qrels == {"q1": {"d1": 1}, "q2": {"d2": 1, "d1": 3}}
    assert dataset.stats() == {
        "queries": 2,
        "documents": 2,
        "documents with a query": 2,
        "pairs": 3,
        "distinct query texts": 2,
        "distinct document texts": 2,
        "median words per query": 3,
        "median words per document": 3,
    }
