"""Fine-tune at OpenAI, at Azure, or at any server with OpenAI's fine-tuning API.

`pip install 'ft-core[openai]'` brings the client.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ft_core.openai_jobs.azure import AzureOpenAIFinetuneEngine
    from ft_core.openai_jobs.engine import OpenAIFinetuneEngine

_MODULES = {
    "AzureOpenAIFinetuneEngine": "ft_core.openai_jobs.azure",
    "OpenAIFinetuneEngine": "ft_core.openai_jobs.engine",
}

__all__ = ["AzureOpenAIFinetuneEngine", "OpenAIFinetuneEngine"]


def __getattr__(name: str) -> Any:
    # The engines are made without the client; only jobs load it.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)
