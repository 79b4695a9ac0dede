"""Hard negatives from vectors that are already there: nothing is embedded again."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr

from ft_adapter.vectors import Vectors
from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.errors import ArgumentError
from ft_core.mining import mine_hard_negatives


class _StoredEmbedding(BaseEmbedding):
    """Looks the vectors of a dataset's texts up."""

    _queries: dict[str, Any] = PrivateAttr()
    _documents: dict[str, Any] = PrivateAttr()

    def __init__(self, dataset: EmbeddingQAFinetuneDataset, vectors: Vectors) -> None:
        super().__init__(embed_batch_size=2048)
        self._queries = dict(zip(dataset.queries.values(), vectors.queries, strict=True))
        self._documents = {
            text: vectors.documents[vectors.rows[document]]
            for document, text in dataset.corpus.items()
        }

    def _get_query_embedding(self, query: str) -> Any:
        return self._queries[query].tolist()

    async def _aget_query_embedding(self, query: str) -> Any:
        return self._get_query_embedding(query)

    def _get_text_embedding(self, text: str) -> Any:
        return self._documents[text].tolist()


def mined(
    dataset: EmbeddingQAFinetuneDataset, vectors: Vectors, count: int, seed: int
) -> dict[str, list[str]]:
    """Return query id to the ids of up to `count` hard negatives (`mine_hard_negatives`).

    Of an index, only nodes whose texts the dataset has are looked at: without a text nobody
    can tell a negative from a near-copy of the answer.
    """
    known = {
        document: text for document, text in dataset.corpus.items() if document in vectors.rows
    }
    relevant = {
        query: [document for document in documents if document in known]
        for query, documents in dataset.relevant_docs.items()
    }
    if not any(relevant.values()):
        raise ArgumentError(
            "negatives",
            "cannot be mined: the dataset's ids are those of documents, and the index holds "
            "parts of them; make the dataset from the nodes of the index, or give negatives",
        )
    usable = EmbeddingQAFinetuneDataset(
        queries={query: dataset.queries[query] for query in dataset.queries if relevant[query]},
        corpus=known,
        relevant_docs={query: documents for query, documents in relevant.items() if documents},
    )
    rows = [row for row, query in enumerate(vectors.query_ids) if relevant[query]]
    stored = _StoredEmbedding(usable, vectors.select(rows))
    return mine_hard_negatives(
        usable,
        stored,
        num_negatives=count,
        range_max=max(100, count),
        seed=seed,
        show_progress=False,
    )
