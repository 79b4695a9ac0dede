"""Linear layers by oneDNN: as exact as PyTorch's own, and nowhere but in this thread."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from ft_core import onednn
from ft_core.onednn import quick_products

CPU = torch.device("cpu")


@pytest.fixture
def layer() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(384, 96)


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randn(2, 30, 384, generator=torch.Generator().manual_seed(1))


def uses_onednn(compute: Callable[[], object]) -> bool:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        compute()
    return any("mkldnn::_linear_pointwise" in event.key for event in profile.key_averages())


def available() -> bool:
    return onednn._is_exact()


def test_the_result_is_that_of_the_layer(layer: torch.nn.Linear, rows: torch.Tensor) -> None:
    for bias in (layer.bias, None):
        with torch.inference_mode():
            exact = torch.nn.functional.linear(rows, layer.weight, bias)
            with quick_products(CPU):
                found = torch.nn.functional.linear(rows, layer.weight, bias)
        torch.testing.assert_close(found, exact, atol=1e-5, rtol=0)


@pytest.mark.skipif(not available(), reason="PyTorch has no exact oneDNN on this machine")
def test_inference_in_float32_takes_onednn(layer: torch.nn.Linear, rows: torch.Tensor) -> None:
    def compute() -> None:
        with torch.inference_mode(), quick_products(CPU):
            layer(rows)

    assert uses_onednn(compute)


@pytest.mark.parametrize("case", ["gradient", "bf16", "autocast", "empty"])
def test_the_rest_is_computed_as_ever(
    layer: torch.nn.Linear, rows: torch.Tensor, case: str
) -> None:
    def compute() -> torch.Tensor:
        with quick_products(CPU), torch.set_grad_enabled(case == "gradient"):
            if case == "bf16":
                found: torch.Tensor = layer.bfloat16()(rows.bfloat16())
            elif case == "autocast":
                with torch.autocast("cpu", torch.bfloat16):
                    found = layer(rows)
            else:
                found = layer(rows[:, :0] if case == "empty" else rows)
            if case == "gradient":
                found.sum().backward()
        return found

    assert not uses_onednn(compute)
    if case == "gradient":
        assert layer.weight.grad is not None
        assert layer.weight.grad.abs().sum() > 0


def test_other_threads_compute_as_ever(layer: torch.nn.Linear, rows: torch.Tensor) -> None:
    used: list[bool] = []

    def compute() -> None:
        with torch.inference_mode():
            layer(rows)

    with torch.inference_mode(), quick_products(CPU):
        thread = threading.Thread(target=lambda: used.append(uses_onednn(compute)))
        thread.start()
        thread.join()
    assert used == [False]


def test_without_onednn_it_does_nothing(
    layer: torch.nn.Linear, rows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise AttributeError("no such operator")

    monkeypatch.setattr(onednn, "_linear", missing)
    onednn._is_exact.cache_clear()
    try:
        with torch.inference_mode(), quick_products(CPU):
            assert layer(rows).shape == (2, 30, 96)
    finally:
        onednn._is_exact.cache_clear()
