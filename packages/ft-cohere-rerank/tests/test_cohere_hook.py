"""`CohereRerankHandler` against a real server; what all rerankers share is tested in ft-core."""

from __future__ import annotations

from pathlib import Path

import pytest
from cohere_platform import CoherePlatform
from llama_index.core import VectorStoreIndex
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor import LLMRerank
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.cohere_rerank import CohereRerank

from ft_cohere_rerank.hook import CohereRerankHandler
from ft_cohere_rerank.teacher import CohereRerankTeacher
from ft_core.errors import ArgumentError, DatasetError

TEXTS = ["The harbour is in the north.", "The valley is deep.", "A harbour", "Nothing"]


def reranker(server: CoherePlatform, top_n: int = 2) -> CohereRerank:
    return CohereRerank(
        top_n=top_n, model="rerank-v3.5", api_key=server.api_key, base_url=server.base_url
    )


def nodes() -> list[NodeWithScore]:
    return [
        NodeWithScore(
            node=TextNode(id_=f"n{n}", text=text, metadata={"page": n}), score=0.9 - n / 9
        )
        for n, text in enumerate(TEXTS)
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
        engine.query("Nobody marks this")
    engine.query("This is not seen")

    example, unmarked = CohereRerankHandler.read(path).to_dataset().examples
    assert (example.query, unmarked.query) == ("Where is the harbour?", "Nobody marks this")
    assert example.metadata["reranker"] == "CohereRerank"
    assert example.metadata["model"] == "rerank-v3.5"
    assert example.metadata["seconds"] > 0
    assert sorted(d.id or "" for d in example.documents) == ["n0", "n1", "n2", "n3"]
    kept = {item.node_id: item.score for item in response.source_nodes}
    assert len(kept) == 2
    for document in example.documents:
        assert document.teacher_score == kept.get(document.id or "")
        assert document.retrieval_score is not None
        assert "page: " in document.text  # as the reranker read it
    labels = {d.id: d.label for d in example.documents if d.label is not None}
    assert labels == {response.source_nodes[0].node_id: 1, "n1": 0}
    (judged,) = handler.to_dataset(unmarked=False, reranker_scores=False)
    assert all(d.teacher_score is None for d in judged.documents)
    assert handler.failures == {}


def test_other_rerankers_are_not_watched_unless_they_are_named(
    server: CoherePlatform, path: Path
) -> None:
    handler, other = CohereRerankHandler(path), LLMRerank(llm=MockLLM())
    with pytest.raises(ArgumentError, match="target: found no CohereRerank inside a list"):
        handler.attach([other])
    with handler.attach([other, reranker(server)]) as attachment:
        assert [type(component) for component in attachment.components] == [CohereRerank]
    named = CohereRerankHandler(path, rerankers=(LLMRerank,))
    with named.attach([other]) as attachment:
        assert attachment.components == [other]


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


def test_what_cohere_refuses_is_not_recorded(server: CoherePlatform, path: Path) -> None:
    handler, rerank = CohereRerankHandler(path), reranker(server)
    rerank.max_retries = 1
    server.fail(400, on="POST /v2/rerank")
    with handler.attach(rerank):
        assert rerank.postprocess_nodes([], query_str="harbour?") == []
        with pytest.raises(Exception, match="status_code: 400"):
            rerank.postprocess_nodes(nodes(), query_str="harbour?")
    assert handler.last_query_id is None
    assert handler.failures == {}
    with pytest.raises(DatasetError, match="no reranking is recorded"):
        handler.to_dataset()
