"""Distil the LLM of a LlamaIndex app into a cheaper student, hosted or your own."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ft_core.datasets import ChatDataset, ChatExample, PreferenceDataset, PreferenceExample
    from ft_core.openai_jobs.azure import AzureOpenAIFinetuneEngine
    from ft_core.openai_jobs.engine import OpenAIFinetuneEngine
    from ft_core.sft import LocalFinetuneEngine, LocalLLM, SFTSettings
    from ft_openai_distill.evaluation import evaluate_distillation
    from ft_openai_distill.handler import OpenAIFineTuningHandler
    from ft_openai_distill.ragas_metrics import RagasSample, evaluate_ragas

_MODULES = {
    "AzureOpenAIFinetuneEngine": "ft_core.openai_jobs.azure",
    "ChatDataset": "ft_core.datasets",
    "ChatExample": "ft_core.datasets",
    "LocalFinetuneEngine": "ft_core.sft",
    "LocalLLM": "ft_core.sft",
    "OpenAIFineTuningHandler": "ft_openai_distill.handler",
    "OpenAIFinetuneEngine": "ft_core.openai_jobs.engine",
    "PreferenceDataset": "ft_core.datasets",
    "PreferenceExample": "ft_core.datasets",
    "RagasSample": "ft_openai_distill.ragas_metrics",
    "SFTSettings": "ft_core.sft",
    "evaluate_distillation": "ft_openai_distill.evaluation",
    "evaluate_ragas": "ft_openai_distill.ragas_metrics",
}

__all__ = [
    "AzureOpenAIFinetuneEngine",
    "ChatDataset",
    "ChatExample",
    "LocalFinetuneEngine",
    "LocalLLM",
    "OpenAIFineTuningHandler",
    "OpenAIFinetuneEngine",
    "PreferenceDataset",
    "PreferenceExample",
    "RagasSample",
    "SFTSettings",
    "evaluate_distillation",
    "evaluate_ragas",
]


def __getattr__(name: str) -> Any:
    # A pack is imported for one of these; the others' dependencies stay unloaded.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)
