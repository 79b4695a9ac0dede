"""Fine-tune, teach from and record Cohere's reranker in a LlamaIndex app."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ft_cohere_rerank.dataset import (
        CohereRerankerFile,
        CohereRerankerFinetuneDataset,
        generate_cohere_reranker_finetuning_dataset,
    )
    from ft_cohere_rerank.engine import CohereRerankerFinetuneEngine
    from ft_cohere_rerank.hook import CohereRerankHandler
    from ft_cohere_rerank.teacher import CohereRerankTeacher, TeacherCost
    from ft_core.datasets.rerank import RerankDataset, RerankDocument, RerankExample

_MODULES = {
    "CohereRerankHandler": "ft_cohere_rerank.hook",
    "CohereRerankTeacher": "ft_cohere_rerank.teacher",
    "CohereRerankerFile": "ft_cohere_rerank.dataset",
    "CohereRerankerFinetuneDataset": "ft_cohere_rerank.dataset",
    "CohereRerankerFinetuneEngine": "ft_cohere_rerank.engine",
    "RerankDataset": "ft_core.datasets.rerank",
    "RerankDocument": "ft_core.datasets.rerank",
    "RerankExample": "ft_core.datasets.rerank",
    "TeacherCost": "ft_cohere_rerank.teacher",
    "generate_cohere_reranker_finetuning_dataset": "ft_cohere_rerank.dataset",
}

__all__ = [
    "CohereRerankHandler",
    "CohereRerankTeacher",
    "CohereRerankerFile",
    "CohereRerankerFinetuneDataset",
    "CohereRerankerFinetuneEngine",
    "RerankDataset",
    "RerankDocument",
    "RerankExample",
    "TeacherCost",
    "generate_cohere_reranker_finetuning_dataset",
]


def __getattr__(name: str) -> Any:
    # A pack is imported for one of these; the others' dependencies stay unloaded.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)
