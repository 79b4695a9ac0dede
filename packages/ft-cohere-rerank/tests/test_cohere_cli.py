"""`ft cohere`, as far as it asks no server; the rest is in integration-tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_assets
import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from testkit import ft

from ft_cohere_rerank import cli
from ft_cohere_rerank.dataset import CohereRerankerFile
from ft_core.datasets import EmbeddingQAFinetuneDataset, RerankDataset

TOWNS = [f"town{number}" for number in range(300)]


@pytest.fixture
def cohere(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Any]:
    """Run `ft cohere ...`; return its document, or the error that it must end in."""

    def run(*arguments: str | Path, error: bool = False) -> Any:
        ran = ft(capsys, "cohere", *arguments, "--json")
        return ran.error if error else ran.document

    return run


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "train.json"
    EmbeddingQAFinetuneDataset(
        queries={f"q-{town}": f"where is {town}?" for town in TOWNS},
        corpus={town: f"{town} is in the north" for town in TOWNS},
        relevant_docs={f"q-{town}": [town] for town in TOWNS},
    ).save(path)
    return path


@pytest.mark.parametrize("method", [None, "random", "bm25"])
def test_export_questions(
    cohere: Callable[..., Any], questions: Path, tmp_path: Path, method: str | None
) -> None:
    output = tmp_path / "train.jsonl"
    given = [] if method is None else ["--negatives", method, "--num-negatives", "2"]
    document = cohere("export", questions, "--output", output, *given)
    file = CohereRerankerFile.load(output)
    assert document["output"] == str(output)
    assert (document["queries"], document["relevant passages"]) == (300, 300)
    assert document["hard negatives"] == sum(len(entry.hard_negatives) for entry in file)
    assert max(len(entry.hard_negatives) for entry in file) == (5 if method is None else 2)
    assert file.examples[0].relevant_passages == ["town0 is in the north"]


def test_export_with_an_embedding_model_and_an_index(
    cohere: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, questions: Path
) -> None:
    model = model_assets.HashingEmbedding()
    monkeypatch.setattr(cli, "load_embed_model", lambda spec: model)
    index = VectorStoreIndex(
        [TextNode(id_=t, text=f"{t} is here") for t in TOWNS[:20]], embed_model=model
    )
    index.storage_context.persist(str(tmp_path / "index"))
    output, given = (
        tmp_path / "train.jsonl",
        ("--embed-model", "some/model", "--num-negatives", "1"),
    )
    cosine = ("--negatives", "cosine_similarity")
    assert cohere("export", questions, "--output", output, *given, *cosine)["queries"] == 300

    found = ("--negatives", "retriever", "--index", tmp_path / "index")
    cohere("export", questions, "--output", output, *given, *found)
    indexed = {f"{town} is in the north" for town in TOWNS[:20]}
    for entry in CohereRerankerFile.load(output):
        assert set(entry.hard_negatives) <= indexed

    message = cohere("export", questions, "--output", output, *found, error=True)
    assert message == (
        "--index: needs the embedding model that it was built with, as --embed-model"
    )
    bad = ("--negatives", "retriever", "--index", tmp_path / "nowhere")
    message = cohere("export", questions, "--output", output, *given, *bad, error=True)
    assert "is no folder that one index was persisted to" in message


def test_export_what_is_judged(cohere: Callable[..., Any], tmp_path: Path) -> None:
    source, output = tmp_path / "rerank.jsonl", tmp_path / "val.jsonl"
    RerankDataset(
        examples=[
            {
                "query": f"where is {town}?",
                "documents": [
                    {"text": f"{town} is in the north", "label": 1},
                    {"text": f"{town} was in the south", "label": 0},
                    {"text": f"nobody judged {town}"},
                ],
            }
            for town in TOWNS[:64]
        ]
    ).save(source)
    document = cohere("export", source, "--output", output, "--validation")
    assert (document["queries"], document["hard negatives"]) == (64, 64)
    none = cohere("export", source, "--output", output, "--validation", "--num-negatives", "0")
    assert none["hard negatives"] == 0
    written = output.read_text()
    message = cohere("export", source, "--output", output, error=True)
    assert message == f"{source}: has 64 different queries; Cohere takes no training file with " + (
        "fewer than 256: add 192"
    )
    assert output.read_text() == written  # checked before anything is written
    assert cohere("export", source, "--output", output, "--no-check-limits")["queries"] == 64
    message = cohere("export", source, "--output", output, "--negatives", "bm25", error=True)
    assert "says itself what is not relevant" in message


def test_what_is_cut_is_told(cohere: Callable[..., Any], tmp_path: Path) -> None:
    source, output = tmp_path / "long.jsonl", tmp_path / "train.jsonl"
    CohereRerankerFile(
        examples=[
            {"query": town, "relevant_passages": ["word " * (600 if town == "town3" else 1)]}
            for town in TOWNS
        ]
    ).save(source)
    document = cohere("export", source, "--output", output)
    assert document["queries with a passage that is cut"] == [4]


def test_what_is_cut_is_counted_on_a_terminal(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = tmp_path / "long.jsonl"
    CohereRerankerFile(
        examples=[{"query": town, "relevant_passages": ["word " * 600]} for town in TOWNS]
    ).save(source)
    ran = ft(capsys, "cohere", "export", source, "--output", tmp_path / "train.jsonl")
    assert "300 (number 1, 2, 3, 4, 5, ...)" in " ".join(ran.out.split())
    assert len(ran.out.splitlines()) < 10


@pytest.mark.parametrize("name", ["train.json", "judged.jsonl"])
def test_export_never_writes_over_what_it_reads(
    cohere: Callable[..., Any], questions: Path, tmp_path: Path, name: str
) -> None:
    source, link = tmp_path / name, tmp_path / "link.jsonl"
    if source != questions:
        entries = [{"query": town, "relevant_passages": ["b"]} for town in TOWNS]
        CohereRerankerFile(examples=entries).to_rerank().save(source)
    link.symlink_to(source)
    before = source.read_bytes()
    for output in (source, tmp_path / ".." / tmp_path.name / name, link):
        message = cohere("export", source, "--output", output, error=True)
        assert message == f"--output: {output} is the file that is read; name another"
    assert source.read_bytes() == before


def test_export_replaces_what_it_wrote_and_nothing_else(
    cohere: Callable[..., Any], questions: Path, tmp_path: Path
) -> None:
    output, files = tmp_path / "train.jsonl", []
    given = ("export", questions, "--output", output)
    for seed in ("0", "1"):
        cohere(*given, "--seed", seed)
        files.append(CohereRerankerFile.load(output))
    assert files[0] != files[1]

    edited = output.read_text().replace("where is town0?", "where was town0?")
    output.write_text(edited)
    assert "was changed after it was generated" in cohere(*given, error=True)
    assert output.read_text() == edited

    other = tmp_path / "mine.jsonl"
    for dataset in (files[0], files[0].to_rerank()):
        dataset.save(other)
        before = other.read_bytes()
        message = cohere("export", questions, "--output", other, error=True)
        assert f"{other}: exists" in message
        assert other.read_bytes() == before


def test_export_without_negatives_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = tmp_path / "judged.jsonl"
    RerankDataset(
        examples=[
            {"query": town, "documents": [{"text": "a", "label": 1}, {"text": "b"}]}
            for town in TOWNS
        ]
    ).save(source)
    ran = ft(capsys, "cohere", "export", source, "--output", tmp_path / "train.jsonl")
    assert ran.code == 0
    assert "no candidate is labelled 0, so there are no hard negatives" in ran.err
    asked = ("--output", tmp_path / "none.jsonl", "--num-negatives", "0")
    assert ft(capsys, "cohere", "export", source, *asked).err == ""


def test_export_has_the_options_that_mining_advises(
    cohere: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, towns = tmp_path / "train.json", TOWNS[:4]
    EmbeddingQAFinetuneDataset(
        queries={f"q-{town}": f"is {town} in the north?" for town in towns},
        # The answer comes three times: what is most like it is no negative.
        corpus={f"{town}{end}": f"{town} is in the north{end}" for town in towns for end in ".!;"},
        relevant_docs={f"q-{town}": [f"{town}."] for town in towns},
    ).save(source)

    def found(*options: str) -> int:
        output = tmp_path / f"{'-'.join(options)}.jsonl"
        given = ("--negatives", "bm25", "--num-negatives", "1", "--no-check-limits")
        count = cohere("export", source, "--output", output, *given, *options)["hard negatives"]
        return int(count)

    assert found("--margin", "1") == 0
    assert "a smaller margin or a larger range_max finds more" in caplog.text
    assert found("--margin", "0", "--range-max", "2") == 0
    assert found("--margin", "0") == 4


@pytest.mark.parametrize("command", ["export", "score"])
def test_bad_files_name_the_place(
    cohere: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COHERE_API_KEY", "key")
    source = tmp_path / "bad.jsonl"
    good = {"query": "a", "relevant_passages": ["b"]}
    lines = [json.dumps(good | {"query": f"q{number}"}) for number in range(10_000)]
    lines[7_775] = '{"query": "a", '
    source.write_text("\n".join(lines), encoding="utf-8")
    message = cohere(command, source, "--output", tmp_path / "out.jsonl", error=True)
    assert f"{source}" in message
    assert "line 7776" in message
    missing = cohere(command, tmp_path / "no.jsonl", "--output", tmp_path / "o", error=True)
    assert "no.jsonl" in missing
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "arguments", [("score", "train.jsonl", "--output", "o.jsonl"), ("train", "train.jsonl")]
)
def test_a_missing_key_is_told_first(
    cohere: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    entries = [{"query": town, "relevant_passages": ["b"]} for town in TOWNS]
    CohereRerankerFile(examples=entries).save("train.jsonl")
    for name in ("COHERE_API_KEY", "CO_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    message = cohere(*arguments, error=True)
    assert message == "the API key: is missing; set COHERE_API_KEY or CO_API_KEY"
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("score", "x.jsonl", "--output", "o", "--price", "-1"), "price_per_thousand: must be"),
        (("score", "x.jsonl", "--output", "o", "--price", "nan"), "price_per_thousand: must be"),
        (("score", "x.jsonl", "--output", "o", "--base-url", "nonsense"), "base_url: is no"),
        (("score", "x.jsonl", "--output", "o", "--base-url", "http://h/v2"), "without /v2"),
        (("train", "x.jsonl", "--name", " "), "model_name: is empty"),
        (("train", "x.jsonl", "--base-url", "nonsense"), "base_url: is no address"),
        (("job", "../../datasets"), "job_id: is the id"),
        (("job", ""), "job_id: is the id"),
        (("job", "."), "job_id: is the id"),
        (("job", "some-id", "--base-url", "http://h/v1/"), "without /v1"),
    ],
)
def test_bad_arguments_end_it_at_once(
    cohere: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setenv("COHERE_API_KEY", "key")
    assert message in cohere(*arguments, error=True)


def test_train_with_another_dataset_names_export(
    cohere: Callable[..., Any], questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COHERE_API_KEY", "key")
    message = cohere("train", questions, error=True)
    assert message.startswith(f"{questions}: is an embedding QA dataset, not Cohere's training")
    assert "`ft cohere export` makes one of it" in message
