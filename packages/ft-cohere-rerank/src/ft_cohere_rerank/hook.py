"""Record what Cohere's reranker sees and answers in a live app."""

from __future__ import annotations

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
    is recorded. See `ft_core.rerank_hook.RerankHandler`.
    """

    def components(self) -> tuple[type, ...]:
        """Watch every `CohereRerank`."""
        from llama_index.postprocessor.cohere_rerank import CohereRerank

        return (CohereRerank,)
