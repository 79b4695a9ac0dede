"""Compare saved adapters with the embedding model alone, on vectors that are cached."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_adapter.training import Rankings, ids_of, retrieved
from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.errors import ArgumentError
from ft_core.evaluation import DEFAULT_METRICS, Evaluation
from ft_core.metrics import Qrels, score_rankings
from ft_core.report import Report
from ft_core.training import device_named

if TYPE_CHECKING:
    from llama_index.core import VectorStoreIndex
    from llama_index.core.base.embeddings.base import BaseEmbedding

    from ft_adapter.vectors import Vectors

IDENTITY = "identity"
"""The name of the embedding model alone in every report."""


def evaluate_adapters(
    dataset: Any,
    embed_model: BaseEmbedding,
    adapters: Sequence[Path | str] | Mapping[str, Path | str],
    *,
    index: VectorStoreIndex | None = None,
    cache_dir: Path | str | None = None,
    device: Any = None,
    show_progress: bool = True,
) -> Report:
    """Return the comparison of saved adapters with the embedding model alone.

    Args:
        dataset: an `EmbeddingQAFinetuneDataset`, LlamaIndex's own, or the path of its JSON.
        embed_model: the model that the adapters were trained for.
        adapters: their folders, which name them in the report; or name to folder.
        index: take the documents' vectors from it, as `from_index` of the engine does.
        cache_dir, device, show_progress: as for the engine.

    Raises:
        ArtifactError: a folder holds no adapter, or one of another embedding model.
        DatasetError: the data is bad, or the index has not its documents.
        ArgumentError: the embedding model fails.
    """
    from ft_adapter.index_vectors import index_vectors
    from ft_adapter.saved import check_base, load_adapter
    from ft_adapter.vector_cache import VectorCache
    from ft_adapter.vectors import embedded, from_index

    data = EmbeddingQAFinetuneDataset.coerce(dataset)
    named = adapters if isinstance(adapters, Mapping) else {str(path): path for path in adapters}
    if not named:
        raise ArgumentError("adapters", "name at least one saved folder")
    loaded = {name: load_adapter(folder) for name, folder in named.items()}
    for saved in loaded.values():
        check_base(saved, embed_model)
    cache = VectorCache(cache_dir, embed_model, batch_queries=index is None)
    vectors = (
        embedded(data, cache, show_progress)
        if index is None
        else from_index(data, index_vectors(index), cache, show_progress)
    )
    evaluations = [evaluation(IDENTITY, data, vectors, None, "query")]
    for name, saved in loaded.items():
        module = saved.adapter.to(device_named(device))
        evaluations.append(evaluation(name, data, vectors, module, saved.sides))
    return Report(evaluations, data, title="Adapters and the embedding model alone")


def evaluation(
    name: str, data: EmbeddingQAFinetuneDataset, vectors: Vectors, adapter: Any, sides: str
) -> Evaluation:
    """Score an adapter (None: the identity) on vectors of `data`."""
    start = time.perf_counter()
    rankings = ids_of(vectors, retrieved(adapter, vectors, sides))
    seconds = time.perf_counter() - start
    return scored(name, data, vectors.qrels, rankings, seconds=seconds)


def scored(
    name: str,
    data: EmbeddingQAFinetuneDataset,
    qrels: Qrels,
    rankings: Rankings,
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    seconds: float = 0.0,
) -> Evaluation:
    """Score rankings that are there already."""
    return Evaluation(
        name=name,
        dataset_hash=data.content_hash,
        scores=score_rankings(qrels, rankings, metrics),
        rankings=rankings,
        seconds=seconds,
    )
