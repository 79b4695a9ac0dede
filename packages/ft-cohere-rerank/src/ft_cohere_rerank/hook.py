"""Record what Cohere's reranker sees and answers in a live app."""

from __future__ import annotations

from ft_core.datasets.rerank import RerankDataset
from ft_core.rerank_hook import RerankHandler


class CohereRerankHandler(RerankHandler):
    """Records each call of the `CohereRerank` postprocessors of a live app.

    ```python
    handler = CohereRerankHandler("reranks.jsonl")
    handler.attach(query_engine)  # or `with handler.attach(query_engine): ...`
    response = query_engine.query("What is the late fee?")
    handler.mark(handler.last_query_id, response.source_nodes[0].node_id, relevant=True)
    dataset = handler.to_dataset()
    ```

    Cohere answers scores of the `top_n` best only; `CohereRerankTeacher` scores all of what
    is recorded. For the arguments see `ft_core.rerank_hook.RerankHandler`; `rerankers` is
    `(CohereRerank,)` by default.
    """

    def components(self) -> tuple[type, ...]:
        """Watch every `CohereRerank`, unless other classes are named."""
        if self._rerankers is None:
            from llama_index.postprocessor.cohere_rerank import CohereRerank

            self._rerankers = (CohereRerank,)
        return self._rerankers

    def to_dataset(self, *, unmarked: bool = True, reranker_scores: bool = True) -> RerankDataset:
        """Return the traffic as a dataset: Cohere's scores are a teacher's, marked or not.

        See `RerankHandler.to_dataset`.
        """
        return super().to_dataset(unmarked=unmarked, reranker_scores=reranker_scores)
