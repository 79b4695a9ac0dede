"""Bring whatever a caller has to a rerank dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ft_core.datasets import EmbeddingQAFinetuneDataset, RerankDataset
from ft_core.errors import ArgumentError, DatasetError


def as_rerank_dataset(
    data: Any,
    source: Any = "bm25",
    *,
    top_k: int = 20,
    judge_all: bool = True,
    argument: str = "data",
    show_progress: bool = True,
) -> RerankDataset:
    """Return a rerank dataset: `data` itself, or what a retriever finds for an embedding QA one.

    Args:
        data: a `RerankDataset`, the path of its JSON Lines, or its examples; the predecessor's
            samples; an `EmbeddingQAFinetuneDataset` or the path of its JSON.
        source: what ranks the documents of an embedding QA dataset: the embedding model or
            retriever of the app, or "bm25".
        top_k: candidates for each of its queries.
        judge_all: for evaluation: label every candidate that is not marked relevant 0; for
            training not those that read nearly like a relevant one.
        argument: the caller's name for `data`, for errors.
        show_progress: on standard error, where that is a terminal.

    Raises:
        ArgumentError: `data` is none of these.
        DatasetError: its content is bad.
    """
    if isinstance(data, RerankDataset):
        return data
    if isinstance(data, str | Path):
        if Path(data).suffix != ".json":
            return RerankDataset.load(data)
        data = EmbeddingQAFinetuneDataset.load(data)
    if hasattr(data, "relevant_docs"):
        from ft_core.mining import retrieve_candidates

        dataset = EmbeddingQAFinetuneDataset.coerce(data)
        found = retrieve_candidates(dataset, source, top_k=top_k, show_progress=show_progress)
        if judge_all:
            return RerankDataset.from_embedding_qa(dataset, found, negatives="all")
        # Not by score: what a retriever puts above a relevant document are the very mistakes
        # that a reranker is to mend.
        negatives = found.negatives(relative_margin=None)
        if not any(negatives.values()):
            raise DatasetError(
                "every candidate is relevant, or reads like one that is; retrieve with another "
                "retriever=, or a higher top_k="
            )
        return RerankDataset.from_embedding_qa(dataset, found, negatives=negatives)
    if not isinstance(data, list | tuple):
        raise ArgumentError(
            argument,
            f"{type(data).__name__} is no dataset: pass a RerankDataset, an "
            "EmbeddingQAFinetuneDataset, the path of one, or a list of "
            "CrossEncoderFinetuningDatasetSample",
        )
    from ft_crossencoder.generation import CrossEncoderFinetuningDatasetSample, samples_to_dataset

    if data and isinstance(data[0], CrossEncoderFinetuningDatasetSample):
        return samples_to_dataset(data)
    return RerankDataset.coerce(data)
