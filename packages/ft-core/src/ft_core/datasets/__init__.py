"""Datasets on disk: pydantic models that check themselves and say what is wrong, and where."""

from ft_core.datasets.base import FinetuneDataset
from ft_core.datasets.chat import ChatDataset, ChatExample, PreferenceDataset, PreferenceExample
from ft_core.datasets.embedding_qa import EmbeddingQAFinetuneDataset
from ft_core.datasets.rerank import RerankDataset, RerankDocument, RerankExample

__all__ = [
    "ChatDataset",
    "ChatExample",
    "EmbeddingQAFinetuneDataset",
    "FinetuneDataset",
    "PreferenceDataset",
    "PreferenceExample",
    "RerankDataset",
    "RerankDocument",
    "RerankExample",
]
