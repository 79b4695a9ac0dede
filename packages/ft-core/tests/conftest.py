from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Train tiny models in one thread, in other processes too: more only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def eager_lm(one_thread: None) -> Callable[..., str]:
    """Save a tiny language model, as `tiny_causal_lm` does, that learns by heart in seconds."""

    def make(folder: Path, texts: list[str], **settings: Any) -> str:
        import torch
        from model_assets import tiny_causal_lm
        from transformers import AutoModelForCausalLM

        tiny_causal_lm(folder, texts, dim=64, **settings)
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():  # so narrow a model learns slowly from weights as small as usual
            for weight in model.parameters():
                weight *= 6 if weight.dim() == 2 else 1
        model.save_pretrained(folder)
        return str(folder)

    return make
