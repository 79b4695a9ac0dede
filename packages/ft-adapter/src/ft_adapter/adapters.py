"""The adapters: small modules that map an embedding to a better one of the same space.

Each starts as the identity, or close to it, and takes tensors of shape (..., in_features).
A module of your own works too: subclass `BaseAdapter`, or pass any `torch.nn.Module`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ft_core.errors import ArgumentError

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "leaky_relu": nn.functional.leaky_relu,
    "gelu": nn.functional.gelu,
}


class BaseAdapter(nn.Module):
    """What an adapter of your own derives from.

    `get_config_dict` returns the arguments that make the same module again; they must be
    JSON values. With it, a saved folder brings the adapter back without further arguments.
    """

    @abstractmethod
    def get_config_dict(self) -> dict[str, Any]:
        """Return the constructor's arguments."""

    @abstractmethod
    def forward(self, embed: Tensor) -> Tensor:
        """Map embeddings of shape (..., in_features) to (..., out_features)."""

    def save(self, output_path: str | Path) -> None:
        """Write the adapter alone to a folder: `adapter.safetensors` and `adapter.json`.

        Raises:
            ArtifactError: the folder holds something else.
        """
        from ft_adapter.saved import save_adapter

        save_adapter(output_path, self)

    @classmethod
    def load(cls, input_path: str | Path) -> Self:
        """Read a folder that `save`, an engine or the predecessor wrote.

        Raises:
            ArtifactError: the folder is missing, damaged, foreign, or holds another class.
        """
        from ft_adapter.saved import load_adapter

        adapter: Self = load_adapter(input_path, None if cls is BaseAdapter else cls).adapter
        return adapter


class LinearLayer(BaseAdapter):
    """A matrix, and with `bias` an offset; starts as the identity.

    Args:
        in_features: dimension of the embedding.
        out_features: dimension of the result; the same, unless documents are adapted too.
        bias: add a learned offset.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bias = bias
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        nn.init.eye_(self.linear.weight)
        if bias:
            nn.init.zeros_(self.linear.bias)

    def forward(self, embed: Tensor) -> Tensor:
        """Return the product with the matrix."""
        return self.linear(embed)

    def get_config_dict(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias,
        }


class LowRankLayer(BaseAdapter):
    """The identity plus a product of two thin matrices, as in LoRA; starts as the identity.

    It has `2 * in_features * rank` weights, where a matrix has `in_features ** 2`: less to
    learn, and less to overfit, from few questions.

    Args:
        in_features: dimension of the embedding, and of the result.
        rank: of the change.
        bias: add a learned offset.
    """

    def __init__(self, in_features: int, rank: int = 32, bias: bool = False) -> None:
        super().__init__()
        if not 1 <= rank <= in_features:
            raise ArgumentError("rank", f"lies between 1 and {in_features}, not {rank}")
        self.in_features = in_features
        self.rank = rank
        self.bias = bias
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, in_features, bias=bias)
        nn.init.normal_(self.down.weight, std=in_features**-0.5)
        nn.init.zeros_(self.up.weight)
        if bias:
            nn.init.zeros_(self.up.bias)

    def forward(self, embed: Tensor) -> Tensor:
        """Return the embedding plus its low-rank change."""
        return embed + self.up(self.down(embed))

    def get_config_dict(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"in_features": self.in_features, "rank": self.rank, "bias": self.bias}


class ResidualNN(BaseAdapter):
    """The identity plus a network with one hidden layer; starts as the identity.

    Args:
        in_features: dimension of the embedding, and of the result.
        hidden_features: width of the hidden layer.
        activation_fn_str: `relu`, `sigmoid`, `tanh`, `leaky_relu` or `gelu`.
        dropout: share of hidden units left out in each step of training.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int = 128,
        activation_fn_str: str = "gelu",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.activation_fn_str = activation_fn_str
        self.dropout = dropout
        self._activation = _activation(activation_fn_str)
        self.linear1 = nn.Linear(in_features, hidden_features)
        self.linear2 = nn.Linear(hidden_features, in_features)
        nn.init.zeros_(self.linear2.weight)
        nn.init.zeros_(self.linear2.bias)

    def forward(self, embed: Tensor) -> Tensor:
        """Return the embedding plus the network's change."""
        hidden = self._activation(self.linear1(embed))
        return embed + self.linear2(nn.functional.dropout(hidden, self.dropout, self.training))

    def get_config_dict(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "in_features": self.in_features,
            "hidden_features": self.hidden_features,
            "activation_fn_str": self.activation_fn_str,
            "dropout": self.dropout,
        }


class TwoLayerNN(BaseAdapter):
    """The predecessor's network with one hidden layer.

    With `add_residual` it adds the network's output, times a weight that starts at 0, to the
    embedding, and so starts as the identity. Without, it starts from noise and has to learn
    the embedding's space anew: it needs many more questions. `ResidualNN` is the better start.

    Args:
        in_features: dimension of the embedding.
        hidden_features: width of the hidden layer.
        out_features: dimension of the result.
        bias: kept for the predecessor's folders; both layers always have one.
        activation_fn_str: `relu`, `sigmoid`, `tanh`, `leaky_relu` or `gelu`.
        add_residual: see above; needs `out_features` equal to `in_features`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        bias: bool = False,
        activation_fn_str: str = "relu",
        add_residual: bool = False,
    ) -> None:
        super().__init__()
        if add_residual and in_features != out_features:
            raise ArgumentError("add_residual", "needs out_features equal to in_features")
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.out_features = out_features
        self.bias = bias
        self.activation_fn_str = activation_fn_str
        self.add_residual = add_residual
        self._activation = _activation(activation_fn_str)
        self.linear1 = nn.Linear(in_features, hidden_features)
        self.linear2 = nn.Linear(hidden_features, out_features)
        self.residual_weight = nn.Parameter(torch.zeros(1))

    def forward(self, embed: Tensor) -> Tensor:
        """Return the network's output, or the embedding plus a share of it."""
        output = self.linear2(self._activation(self.linear1(embed)))
        return self.residual_weight * output + embed if self.add_residual else output

    def get_config_dict(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "in_features": self.in_features,
            "hidden_features": self.hidden_features,
            "out_features": self.out_features,
            "bias": self.bias,
            "activation_fn_str": self.activation_fn_str,
            "add_residual": self.add_residual,
        }


BUILT_IN: dict[str, type[BaseAdapter]] = {
    adapter.__name__: adapter for adapter in (LinearLayer, LowRankLayer, ResidualNN, TwoLayerNN)
}
"""Class name to class: what a saved folder can bring back by itself."""


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in _ACTIVATIONS:
        raise ArgumentError(
            "activation_fn_str", f"is one of {', '.join(_ACTIVATIONS)}, not {name!r}"
        )
    return _ACTIVATIONS[name]
