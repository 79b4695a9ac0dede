from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from cohere_platform import CoherePlatform
from llama_index.core import VectorStoreIndex
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.llms import MockLLM
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.postprocessor.cohere_rerank import CohereRerank

from ft_cohere_rerank.hook import CohereRerankHandler
from ft_cohere_rerank.teacher import CohereRerankTeacher
from ft_core.datasets.rerank import RerankDataset
from ft_core.errors import ArtifactError, DatasetError

TEXTS = ["The harbour is in the north.", "The valley is deep.", "A harbour", "Nothing"]


def reranker(server: CoherePlatform, top_n: int = 2) -> CohereRerank:
    return CohereRerank(
        top_n=top_n, model="rerank-v3.5", api_key=server.api_key, base_url=server.base_url
    )


def nodes(texts: list[str] = TEXTS) -> list[NodeWithScore]:
    return [
        NodeWithScore(
            node=TextNode(id_=f"n{n}", text=text, metadata={"page": n}), score=0.9 - n / 9
        )
        for n, text in enumerate(texts)
    ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "reranks.jsonl"


def test_a_query_engine_is_recorded(server: CoherePlatform, path: Path) -> None:
    index = VectorStoreIndex(
        [item.node for item in nodes()], embed_model=MockEmbedding(embed_dim=3)
    )
    engine = index.as_query_engine(
        llm=MockLLM(), similarity_top_k=4, node_postprocessors=[reranker(server)]
    )
    handler = CohereRerankHandler(path)
    with handler.attach(engine):
        response = engine.query("Where is the harbour?")
        handler.mark(handler.last_query_id, response.source_nodes[0].node_id)
        handler.mark(handler.last_query_id, "n1", relevant=False)
    engine.query("This is not seen")

    (example,) = handler.to_dataset().examples
    assert example.query == "Where is the harbour?"
    assert example.metadata["model"] == "rerank-v3.5"
    assert sorted(d.id or "" for d in example.documents) == ["n0", "n1", "n2", "n3"]
    kept = {item.node_id: item.score for item in response.source_nodes}
    assert len(kept) == 2
    for document in example.documents:
        assert document.teacher_score == kept.get(document.id or "")
        assert document.retrieval_score is not None
        assert "page: " in document.text  # as the reranker read it
    labels = {d.id: d.label for d in example.documents if d.label is not None}
    assert labels == {response.source_nodes[0].node_id: 1, "n1": 0}
    assert handler.failures == {}


def test_the_same_query_is_one_example(server: CoherePlatform, path: Path) -> None:
    handler, rerank = CohereRerankHandler(path, metadata_mode="none"), reranker(server)
    handler.attach(rerank)
    rerank.postprocess_nodes(nodes(), query_str="harbour?")
    handler.mark(handler.last_query_id, "n3", relevant=False)
    rerank.postprocess_nodes(nodes(TEXTS[:2]), QueryBundle("harbour?"))
    rerank.postprocess_nodes(nodes(), query_bundle=QueryBundle("valley?"))
    handler.detach()
    harbour, valley = handler.to_dataset().examples
    assert [(d.id, d.retrieved, d.label) for d in harbour.documents] == [
        ("n0", True, None),
        ("n1", True, None),
        ("n3", False, 0),
    ]
    assert [d.text for d in valley.documents] == TEXTS
    assert [d.retrieval_score for d in valley.documents] == [item.score for item in nodes()]


def test_async_calls_and_another_process_later(server: CoherePlatform, path: Path) -> None:
    rerank = reranker(server)
    handler = CohereRerankHandler(path)
    with handler.attach(rerank), handler.collect() as ids:
        asyncio.run(rerank.apostprocess_nodes(nodes(), query_str="harbour?"))
    assert len(ids) == 1  # the synchronous call inside is none of its own
    dataset = CohereRerankHandler.read(path).to_dataset()
    assert [example.id for example in dataset.examples] == ids


def test_the_teacher_fills_the_scores_in(server: CoherePlatform, path: Path) -> None:
    handler, rerank = CohereRerankHandler(path), reranker(server)
    with handler.attach(rerank):
        found = rerank.postprocess_nodes(nodes(), query_str="Where is the harbour?")
    teacher = CohereRerankTeacher(
        api_key=server.api_key, base_url=server.base_url, show_progress=False
    )
    (example,) = teacher.score(handler.to_dataset(), path.with_name("scored.jsonl")).examples
    scores = {d.id: d.teacher_score for d in example.documents}
    assert None not in scores.values()
    for item in found:
        assert scores[item.node_id] == item.score


def test_nothing_to_record(server: CoherePlatform, path: Path) -> None:
    handler, rerank = CohereRerankHandler(path), reranker(server)
    with handler.attach(rerank):
        assert rerank.postprocess_nodes([], query_str="harbour?") == []
        with pytest.raises(ValueError, match="query bundle"):
            rerank.postprocess_nodes(nodes())
        rerank.max_retries = 1
        server.fail(400, on="POST /v2/rerank")
        with pytest.raises(Exception, match="status_code: 400"):
            rerank.postprocess_nodes(nodes(), query_str="harbour?")
    assert handler.last_query_id is None
    assert handler.failures == {}
    with pytest.raises(DatasetError, match="nothing is recorded"):
        handler.to_dataset()


def test_odd_nodes(server: CoherePlatform, path: Path) -> None:
    texts = ["same text", "same text", " ", "\ud800 half", "last", "\u200b"]
    handler, rerank = CohereRerankHandler(path, metadata_mode="none"), reranker(server, 5)
    items = nodes(texts)
    items[4].score = float("nan")
    with handler.attach(rerank):
        rerank._client = _Fixed()  # Cohere's client cannot send half a surrogate pair
        rerank.postprocess_nodes(items, query_str="text?")
        rerank.postprocess_nodes(items, query_str="\u200b")
    (example,) = handler.to_dataset().examples
    assert [d.id for d in example.documents] == ["n0", "n3", "n4"]
    assert example.documents[1].text == "? half"
    assert example.documents[2].retrieval_score is None


class _Fixed:
    def rerank(self, **given: Any) -> Any:
        class Answer:
            results: tuple[Any, ...] = ()

        return Answer()


def test_a_redaction_that_raises_writes_nothing(server: CoherePlatform, path: Path) -> None:
    def redact(text: str) -> str:
        raise KeyError("secret")

    handler, rerank = CohereRerankHandler(path, redact=redact), reranker(server)
    with handler.attach(rerank):
        assert len(rerank.postprocess_nodes(nodes(), query_str="harbour?")) == 2
    assert not path.exists()
    assert handler.failures["KeyError"] == 1


def test_redaction(server: CoherePlatform, path: Path) -> None:
    rerank = reranker(server)
    handler = CohereRerankHandler(path, redact=lambda text: text.replace("harbour", "***"))
    with handler.attach(rerank):
        rerank.postprocess_nodes(nodes(), query_str="harbour?")
    assert "harbour" not in path.read_text(encoding="utf-8")


def test_a_file_of_somebody_else(path: Path) -> None:
    RerankDataset(examples=[{"query": "q", "documents": [{"text": "t"}]}]).save(path)
    with pytest.raises(ArtifactError, match="no CohereRerankHandler wrote"):
        CohereRerankHandler(path)
