"""`ft crossencoder`: where the candidates of an embedding QA dataset come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from testkit import ft

from ft_crossencoder import data
from ft_crossencoder.encoder import EncoderEmbedding


@pytest.fixture
def crossencoder(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run `ft crossencoder ...`; return its document, or the error that it must end in."""

    def run(*arguments: str | Path, error: bool = False) -> Any:
        ran = ft(capsys, "crossencoder", *arguments, "--json")
        return ran.error if error else ran.document

    return run


@pytest.fixture
def qa(task: Any, tmp_path: Path) -> Path:
    """Return the dataset's file; beside it is the index of the half of its documents."""
    nodes = [TextNode(id_=key, text=text) for key, text in list(task.qa.corpus.items())[:12]]
    index = VectorStoreIndex(nodes, embed_model=EncoderEmbedding(task.encoder, device="cpu"))
    index.storage_context.persist(tmp_path / "index")
    task.qa.save(tmp_path / "qa.json")
    return tmp_path / "qa.json"


@pytest.fixture
def retrieved(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Ids of what was retrieved, a set for each dataset."""
    found: list[set[str]] = []
    as_it_is = data.as_rerank_dataset

    def watched(*arguments: Any, **named: Any) -> Any:
        dataset = as_it_is(*arguments, **named)
        found.append({d.id for example in dataset for d in example.candidates})
        return dataset

    monkeypatch.setattr(data, "as_rerank_dataset", watched)
    monkeypatch.setattr("ft_crossencoder.engine.as_rerank_dataset", watched)
    return found


def test_candidates_come_from_bm25_a_model_or_an_index(
    crossencoder: Callable[..., Any], task: Any, qa: Path, retrieved: list[set[str]]
) -> None:
    indexed = set(list(task.qa.corpus)[:12])  # one document less than are asked for
    command = ("eval", qa, "--model", task.scorer, "--top-k", "13")
    for source in ((), ("--retriever", "bm25"), ("--retriever", task.encoder)):
        runs = crossencoder(*command, *source)["runs"]
        assert [run["name"] for run in runs] == ["retrieval", task.scorer]
        assert not retrieved.pop() <= indexed

    index = ("--retriever", task.encoder, "--index", qa.with_name("index"))
    crossencoder(*command, *index)
    assert retrieved.pop() == indexed


@pytest.mark.usefixtures("one_thread")
def test_training_takes_an_index_too(
    crossencoder: Callable[..., Any], task: Any, qa: Path, retrieved: list[set[str]]
) -> None:
    output = qa.with_name("out")
    document = crossencoder(
        "train", qa, "--output", output, "--model", task.scorer, "--retriever", task.encoder,
        "--index", qa.with_name("index"), "--top-k", "13",
    )  # fmt: skip
    assert document == {"model": str(output), "report": None}
    assert retrieved == [set(list(task.qa.corpus)[:12])]


def test_bad_sources_name_the_option(
    crossencoder: Callable[..., Any], task: Any, qa: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    index, nowhere = qa.with_name("index"), qa.with_name("nowhere")
    for source, message in (
        (("--index", index), "--index: needs the embedding model that it was built with, as --ret"),
        (("--index", index, "--retriever", "bm25"), "--index: needs the embedding model"),
        (("--index", nowhere, "--retriever", task.encoder), f"--index: {nowhere} is no folder"),
        (("--retriever", nowhere), f"--retriever: '{nowhere}' cannot be loaded"),
        (("--retriever", "openai-like:bge"), "--retriever: openai-like:bge has no URL"),
    ):
        found = crossencoder("eval", qa, "--model", task.scorer, *source, error=True)
        assert found.startswith(message)
