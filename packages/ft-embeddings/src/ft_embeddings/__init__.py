"""Fine-tune the embedding model of a LlamaIndex app on its own data."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ft_core.datasets import EmbeddingQAFinetuneDataset
    from ft_core.generation import generate_qa_embedding_pairs
    from ft_embeddings.engine import SentenceTransformersFinetuneEngine
    from ft_embeddings.reindexing import reindex
    from ft_embeddings.retrieval_handler import RetrievalHandler
    from ft_embeddings.router import RouterFinetuneEngine
    from ft_embeddings.selector import EmbeddingSelector

_MODULES = {
    "EmbeddingQAFinetuneDataset": "ft_core.datasets",
    "EmbeddingSelector": "ft_embeddings.selector",
    "RetrievalHandler": "ft_embeddings.retrieval_handler",
    "RouterFinetuneEngine": "ft_embeddings.router",
    "SentenceTransformersFinetuneEngine": "ft_embeddings.engine",
    "generate_qa_embedding_pairs": "ft_core.generation",
    "reindex": "ft_embeddings.reindexing",
}

__all__ = [
    "EmbeddingQAFinetuneDataset",
    "EmbeddingSelector",
    "RetrievalHandler",
    "RouterFinetuneEngine",
    "SentenceTransformersFinetuneEngine",
    "generate_qa_embedding_pairs",
    "reindex",
]


def __getattr__(name: str) -> Any:
    # A pack is imported for one of these; the others' dependencies stay unloaded.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)
