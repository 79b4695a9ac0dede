"""ft-core's `RerankHandler` on this pack's reranker; its own tests are ft-core's."""

from ft_crossencoder import FinetunedReranker, RerankHandler


def test_the_finetuned_reranker_is_recorded(folder, make_nodes, tmp_path):
    reranker = FinetunedReranker(folder, 2)
    candidates = make_nodes(["the late fee", "the bridge over the river", "doors at dawn"])
    handler = RerankHandler(tmp_path / "reranked.jsonl")
    with handler.attach([reranker]):
        kept = reranker.postprocess_nodes(candidates, query_str="what is the late fee")
    (example,) = handler.to_dataset(reranker_scores=True)
    assert example.metadata["reranker"] == "FinetunedReranker"
    assert example.metadata["model"] == reranker.model
    assert [d.retrieval_score for d in example.documents] == [item.score for item in candidates]
    scores = {d.id: d.teacher_score for d in example.documents if d.teacher_score is not None}
    assert scores == {item.node.node_id: item.score for item in kept}
