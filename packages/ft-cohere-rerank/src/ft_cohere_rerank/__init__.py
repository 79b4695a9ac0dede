"""Fine-tune, teach from and record Cohere's reranker in a LlamaIndex app.

Here so far: the datasets. The hosted engine and the teacher are being built.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ft_cohere_rerank.dataset import (
        CohereRerankerFile,
        CohereRerankerFinetuneDataset,
        generate_cohere_reranker_finetuning_dataset,
    )

__all__ = [
    "CohereRerankerFile",
    "CohereRerankerFinetuneDataset",
    "generate_cohere_reranker_finetuning_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ft_cohere_rerank import dataset

    return getattr(dataset, name)
