from collections.abc import Callable, Iterator
from functools import partial

import pytest
import testkit


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    with testkit.one_thread():
        yield


@pytest.fixture(scope="session")
def eager_lm(one_thread: None) -> Callable[..., str]:
    """Save a tiny language model, as `tiny_causal_lm` does, that learns by heart in seconds."""

    from model_assets import tiny_causal_lm

    return partial(tiny_causal_lm, dim=64, spread=0.12)
