"""Datasets on disk: pydantic models that check themselves and say what is wrong, and where."""

from ft_core.datasets.base import FinetuneDataset
from ft_core.datasets.chat import ChatDataset, ChatExample, PreferenceDataset, PreferenceExample
from ft_core.datasets.embedding_qa import EmbeddingQAFinetuneDataset
from ft_core.datasets.judge import JudgeDataset, JudgeExample
from ft_core.datasets.rerank import RerankDataset, RerankDocument, RerankExample
from ft_core.datasets.text2sql import Text2SQLDataset, Text2SQLExample

__all__ = [
    "ChatDataset",
    "ChatExample",
    "EmbeddingQAFinetuneDataset",
    "FinetuneDataset",
    "JudgeDataset",
    "JudgeExample",
    "PreferenceDataset",
    "PreferenceExample",
    "RerankDataset",
    "RerankDocument",
    "RerankExample",
    "Text2SQLDataset",
    "Text2SQLExample",
]
