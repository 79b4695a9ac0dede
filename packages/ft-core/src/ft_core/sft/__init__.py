"""Fine-tune a causal language model on this machine; `pip install 'ft-core[local]'` brings it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ft_core.sft.engine import LocalFinetuneEngine
    from ft_core.sft.llm import LocalLLM
    from ft_core.sft.settings import SFTSettings

_MODULES = {
    "LocalFinetuneEngine": "ft_core.sft.engine",
    "LocalLLM": "ft_core.sft.llm",
    "SFTSettings": "ft_core.sft.settings",
}

__all__ = ["LocalFinetuneEngine", "LocalLLM", "SFTSettings"]


def __getattr__(name: str) -> Any:
    # The engine is made without torch; only training and answering load it.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)
