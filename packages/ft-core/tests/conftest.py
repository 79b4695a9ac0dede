from collections.abc import Callable, Iterator
from functools import partial

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

    from model_assets import tiny_causal_lm

    return partial(tiny_causal_lm, dim=64, spread=0.12)
