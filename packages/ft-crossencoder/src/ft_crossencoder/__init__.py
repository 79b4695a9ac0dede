"""Fine-tune the reranker of a LlamaIndex app on its own data."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ft_core.datasets import RerankDataset
    from ft_core.rerank_hook import RerankHandler
    from ft_crossencoder.engine import CrossEncoderFinetuneEngine
    from ft_crossencoder.generation import (
        CrossEncoderFinetuningDatasetSample,
        generate_ce_fine_tuning_dataset,
        generate_synthetic_queries_over_documents,
    )
    from ft_crossencoder.reranker import FinetunedReranker, calibrate_threshold
    from ft_crossencoder.selector import CrossEncoderSelector

_MODULES = {
    "CrossEncoderFinetuneEngine": "ft_crossencoder.engine",
    "CrossEncoderFinetuningDatasetSample": "ft_crossencoder.generation",
    "CrossEncoderSelector": "ft_crossencoder.selector",
    "FinetunedReranker": "ft_crossencoder.reranker",
    "RerankDataset": "ft_core.datasets",
    "RerankHandler": "ft_core.rerank_hook",
    "calibrate_threshold": "ft_crossencoder.reranker",
    "generate_ce_fine_tuning_dataset": "ft_crossencoder.generation",
    "generate_synthetic_queries_over_documents": "ft_crossencoder.generation",
}

__all__ = [
    "CrossEncoderFinetuneEngine",
    "CrossEncoderFinetuningDatasetSample",
    "CrossEncoderSelector",
    "FinetunedReranker",
    "RerankDataset",
    "RerankHandler",
    "calibrate_threshold",
    "generate_ce_fine_tuning_dataset",
    "generate_synthetic_queries_over_documents",
]


def __getattr__(name: str) -> Any:
    # A pack is imported for one of these; the others' dependencies stay unloaded.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)
