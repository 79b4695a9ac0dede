"""Adapters that improve any embedding model of a LlamaIndex app without re-indexing."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ft_adapter.adapters import BaseAdapter, LinearLayer, LowRankLayer, ResidualNN, TwoLayerNN
    from ft_adapter.embedding import AdapterEmbeddingModel
    from ft_adapter.engine import EmbeddingAdapterFinetuneEngine
    from ft_adapter.hook import AdapterHook
    from ft_adapter.retriever import AdaptedRetriever
    from ft_core.datasets import EmbeddingQAFinetuneDataset
    from ft_core.generation import generate_qa_embedding_pairs

_MODULES = {
    "AdaptedRetriever": "ft_adapter.retriever",
    "AdapterEmbeddingModel": "ft_adapter.embedding",
    "AdapterHook": "ft_adapter.hook",
    "BaseAdapter": "ft_adapter.adapters",
    "EmbeddingAdapterFinetuneEngine": "ft_adapter.engine",
    "EmbeddingQAFinetuneDataset": "ft_core.datasets",
    "LinearLayer": "ft_adapter.adapters",
    "LowRankLayer": "ft_adapter.adapters",
    "ResidualNN": "ft_adapter.adapters",
    "TwoLayerNN": "ft_adapter.adapters",
    "generate_qa_embedding_pairs": "ft_core.generation",
}

__all__ = [
    "AdaptedRetriever",
    "AdapterEmbeddingModel",
    "AdapterHook",
    "BaseAdapter",
    "EmbeddingAdapterFinetuneEngine",
    "EmbeddingQAFinetuneDataset",
    "LinearLayer",
    "LowRankLayer",
    "ResidualNN",
    "TwoLayerNN",
    "generate_qa_embedding_pairs",
]


def __getattr__(name: str) -> Any:
    # A pack is imported for one of these; the others' dependencies stay unloaded.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)
