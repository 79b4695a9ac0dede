"""Every form of data becomes a rerank dataset, or one clear error."""

import json
import logging

import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from model_assets import HashingEmbedding

from ft_core.datasets import RerankDataset
from ft_core.errors import ArgumentError, DatasetError
from ft_crossencoder import CrossEncoderFinetuningDatasetSample as Sample
from ft_crossencoder.data import as_rerank_dataset


def coerce(data, source="bm25", *, top_k=6, judge_all=False):
    return as_rerank_dataset(
        data,
        source,
        top_k=top_k,
        argument="val_dataset",
        show_progress=False,
        judge_all=judge_all,
    )


def test_a_rerank_dataset_its_file_and_its_examples_are_the_same(task, tmp_path):
    path = tmp_path / "train.jsonl"
    task.train.save(path)
    assert coerce(task.train) is task.train
    for data in (path, str(path), list(task.train), [e.model_dump() for e in task.train]):
        assert coerce(data).content_hash == task.train.content_hash


def test_samples_of_a_query_become_its_candidates():
    found = coerce([Sample("q", "a", 1), Sample("p", "c", 0), Sample("q", "b", 0)])
    assert [(e.query, [d.text for d in e.documents]) for e in found] == [
        ("q", ["a", "b"]),
        ("p", ["c"]),
    ]


def test_questions_and_documents_alone_get_candidates_with_scores(task, tmp_path):
    path = tmp_path / "qa.json"
    task.qa.save(path)
    for data in (task.qa, path, str(path)):
        found = coerce(data)
        assert [e.query for e in found] == list(task.qa.queries.values())
        assert all(len(e.candidates) == 6 for e in found)
        first = found.examples[0]
        assert first.documents[0].text == "harbour opens the gates are unlocked at dawn"
        assert first.documents[0].label == 1
        assert all(d.retrieval_score for d in first.candidates)


def test_training_leaves_likely_answers_unjudged_and_evaluation_does_not(task):
    corpus = {**task.qa.corpus, "copy": task.qa.corpus["harbour-opens"] + " so"}
    qa = task.qa.model_copy(update={"corpus": corpus})
    training, evaluation = coerce(qa), coerce(qa, judge_all=True)
    labels = {d.id: d.label for d in training.examples[0].documents}
    assert labels["copy"] is None
    assert labels["harbour-costs"] == 0
    assert {d.id: d.label for d in evaluation.examples[0].documents} == {**labels, "copy": 0}


@pytest.mark.parametrize("kind", ["embedding", "retriever"])
def test_candidates_are_those_of_the_given_source(task, kind):
    source = embedding = HashingEmbedding()
    if kind == "retriever":
        nodes = [TextNode(id_=key, text=text) for key, text in task.qa.corpus.items()]
        source = VectorStoreIndex(nodes, embed_model=embedding).as_retriever(similarity_top_k=2)
    found = coerce(task.qa, source, top_k=4)
    assert all(len(e.candidates) == 4 for e in found)
    assert embedding.query_calls == len(task.qa.queries)
    assert [d.id for d in found.examples[0].documents] != [
        d.id for d in coerce(task.qa, top_k=4).examples[0].documents
    ]


def test_when_every_candidate_may_be_relevant_it_says_so(task):
    corpus = {"a": "harbour opens", "b": "opens harbour"}
    qa = type(task.qa)(queries={"q": "harbour opens"}, corpus=corpus, relevant_docs={"q": ["a"]})
    with pytest.raises(DatasetError, match=r"every candidate is relevant, .* another retriever"):
        coerce(qa)
    assert len(coerce(qa, judge_all=True)) == 1


@pytest.mark.parametrize("data", [42, {1, 2}, {}, object(), (pair for pair in [])])
def test_what_is_no_dataset_is_named_with_its_argument(data):
    with pytest.raises(ArgumentError, match=r"val_dataset: \w+ is no dataset: pass a RerankData"):
        coerce(data)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([Sample("q", "", 1)], r"samples\[0\]\.context: the text is empty"),
        ([Sample("q", "a", 1), Sample(" \u200b", "b", 0)], r"samples\[1\]\.query: the text is emp"),
        ([Sample("q", "\x00\t", 1)], r"samples\[0\]\.context: the text is empty"),
        ([Sample("q", "a", -0.5)], r"samples\[0\]\.score: is -0\.5; a label is from 0"),
        ([Sample("q", "a", 1.5)], r"samples\[0\]\.score: is 1\.5; a label is from 0"),
        ([Sample("q", "a", float("nan"))], r"samples\[0\]\.score: is nan, not a finite number"),
        ([Sample("q", "a", 0.5), Sample("q", "b", 3)], "mixes labels from 0 to 1 with grades"),
        ([], "has no example"),
    ],
)
def test_bad_samples_are_named(samples, message):
    with pytest.raises(DatasetError, match=message):
        coerce(samples)


GOOD = json.dumps({"query": "q", "documents": [{"text": "a", "label": 1}]})


def test_one_broken_line_in_ten_thousand_is_named(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([*[GOOD] * 5000, GOOD[:-3], *[GOOD] * 5000]))
    with pytest.raises(DatasetError, match=r"train\.jsonl: line 5001, column \d+: not JSON"):
        coerce(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "q", "documents": []}', "documents: the query has no document"),
        (GOOD.replace("1", "101"), r"documents\[0\]\.label: is 101"),
        (GOOD.replace('"a"', '"\\u0007"'), r"documents\[0\]\.text: the text is empty"),
        (GOOD.replace('"q"', '" "'), "query: the text is empty"),
        (GOOD.replace("label", "lable"), r"documents\[0\]\.lable: Extra inputs"),
    ],
)
def test_a_bad_line_is_named_with_the_place_in_it(tmp_path, line, message):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([GOOD, line, GOOD]))
    with pytest.raises(DatasetError, match=rf"train\.jsonl: line 2, {message}"):
        coerce(path)


def test_unicode_and_control_characters_pass_as_they_are(tmp_path, caplog):
    odd = "\x00\x1b[31m Straße 東京 \U0001f389 e\u0301 \u202e"
    data = RerankDataset.coerce([{"query": odd, "documents": [{"text": odd, "label": 1}]}])
    data.save(tmp_path / "odd.jsonl")
    with caplog.at_level(logging.WARNING):
        (found,) = coerce(tmp_path / "odd.jsonl")
    assert found.query == found.documents[0].text == odd
    assert not caplog.records


def test_a_missing_file_and_a_broken_one_are_named(tmp_path):
    with pytest.raises(DatasetError, match=r"nowhere\.jsonl: no such file"):
        coerce(tmp_path / "nowhere.jsonl")
    with pytest.raises(DatasetError, match=r"nowhere\.json: no such file"):
        coerce(tmp_path / "nowhere.json")
