"""Where each adapter starts, and that its configuration makes it again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ft_adapter.adapters import (
    BUILT_IN,
    BaseAdapter,
    LinearLayer,
    LowRankLayer,
    ResidualNN,
    TwoLayerNN,
)
from ft_core.errors import ArgumentError, ArtifactError

IDENTITIES: dict[str, Callable[[], BaseAdapter]] = {
    "linear": lambda: LinearLayer(6, 6),
    "linear with bias": lambda: LinearLayer(6, 6, bias=True),
    "low rank": lambda: LowRankLayer(6, 2),
    "low rank with bias": lambda: LowRankLayer(6, 6, bias=True),
    "residual": lambda: ResidualNN(6, 4, "tanh", dropout=0.5),
    "two layers with residual": lambda: TwoLayerNN(6, 3, 6, add_residual=True),
}
OTHERS: dict[str, Callable[[], BaseAdapter]] = {
    "wider": lambda: LinearLayer(6, 9, bias=True),
    "two layers": lambda: TwoLayerNN(6, 3, 5, bias=True, activation_fn_str="gelu"),
}


def disturbed(adapter: BaseAdapter) -> BaseAdapter:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.rand_like(parameter))
    return adapter


@pytest.mark.parametrize("name", IDENTITIES)
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
@pytest.mark.parametrize("training", [False, True])
def test_it_starts_as_the_identity(name: str, shape: tuple[int, ...], training: bool) -> None:
    vectors = torch.randn(shape)
    torch.testing.assert_close(IDENTITIES[name]().train(training)(vectors), vectors)


@pytest.mark.parametrize("name", IDENTITIES)
def test_it_can_be_trained_away_from_the_identity(name: str) -> None:
    adapter, vectors = IDENTITIES[name](), torch.randn(8, 6)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(3):  # a product of two factors, one of them zero, moves one after the other
        optimizer.zero_grad()
        ((adapter(vectors) - vectors.flip(1)) ** 2).mean().backward()
        optimizer.step()
    assert not torch.allclose(adapter(vectors), vectors, atol=1e-4)
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def test_two_layers_without_residual_give_the_networks_output_alone() -> None:
    adapter, vectors = disturbed(TwoLayerNN(4, 3, 2)), torch.randn(5, 4)
    first, second = adapter.linear1, adapter.linear2
    hidden = np.maximum(vectors.numpy() @ first.weight.detach().numpy().T + first.bias.tolist(), 0)
    expected = hidden @ second.weight.detach().numpy().T + second.bias.tolist()
    np.testing.assert_allclose(adapter(vectors).detach().numpy(), expected, rtol=1e-4)


def test_a_low_rank_change_has_that_rank() -> None:
    adapter = disturbed(LowRankLayer(8, 3))
    change = adapter(torch.eye(8)) - torch.eye(8)
    assert int(torch.linalg.matrix_rank(change)) == 3


def test_dropout_is_off_outside_of_training() -> None:
    adapter, vectors = disturbed(ResidualNN(6, 64, dropout=0.5)), torch.randn(4, 6)
    adapter.eval()
    assert torch.equal(adapter(vectors), adapter(vectors))
    adapter.train()
    assert not torch.equal(adapter(vectors), adapter(vectors))


@pytest.mark.parametrize("name", [*IDENTITIES, *OTHERS])
def test_its_configuration_makes_the_same_module_again(name: str) -> None:
    adapter = disturbed({**IDENTITIES, **OTHERS}[name]()).eval()
    config = json.loads(json.dumps(adapter.get_config_dict()))
    again = type(adapter)(**config).eval()
    again.load_state_dict(adapter.state_dict())
    vectors = torch.randn(3, 6)
    assert torch.equal(again(vectors), adapter(vectors))
    assert again.get_config_dict() == adapter.get_config_dict()


@pytest.mark.parametrize("name", [*IDENTITIES, *OTHERS])
def test_save_and_load_give_the_same_vectors(name: str, tmp_path: Path) -> None:
    adapter = disturbed({**IDENTITIES, **OTHERS}[name]()).eval()
    adapter.save(tmp_path / "adapter")
    vectors = torch.randn(3, 6)
    for cls in (BaseAdapter, type(adapter)):
        loaded = cls.load(tmp_path / "adapter")
        assert type(loaded) is type(adapter)
        assert torch.equal(loaded(vectors), adapter(vectors))


def test_load_of_another_class_is_refused(tmp_path: Path) -> None:
    LinearLayer(4, 4).save(tmp_path / "adapter")
    with pytest.raises(ArtifactError, match="holds a LinearLayer, not a TwoLayerNN"):
        TwoLayerNN.load(tmp_path / "adapter")


def test_the_predecessors_weights_have_their_names() -> None:
    assert set(LinearLayer(2, 2, bias=True).state_dict()) == {"linear.weight", "linear.bias"}
    assert set(TwoLayerNN(2, 2, 2).state_dict()) == {
        "linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias", "residual_weight",
    }  # fmt: skip


def test_the_built_in_ones_are_known_by_name() -> None:
    assert set(BUILT_IN) == {"LinearLayer", "LowRankLayer", "ResidualNN", "TwoLayerNN"}
    assert all(cls.__name__ == name for name, cls in BUILT_IN.items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRankLayer(4, 0), "rank: lies between 1 and 4, not 0"),
        (lambda: LowRankLayer(4, 5), "rank: lies between 1 and 4, not 5"),
        (lambda: TwoLayerNN(4, 4, 3, add_residual=True), "add_residual: needs out_features"),
        (lambda: TwoLayerNN(4, 4, 4, activation_fn_str="sine"), "activation_fn_str: is one of"),
        (lambda: ResidualNN(4, activation_fn_str=""), "activation_fn_str: is one of relu"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()
