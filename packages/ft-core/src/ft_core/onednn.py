"""Compute a network's large float32 products with oneDNN, where PyTorch would use MKL.

PyTorch's CPU wheels hand `torch.nn.functional.linear` in float32 to MKL, which on CPUs that are
not Intel's computes at about half of their speed: on an AMD EPYC with AVX-512, 210 GFLOP/s where
oneDNN, in the same wheel, reaches 480. torch is imported when a function is called, not before.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

_SIZE = 256  # of the products that are compared with exact ones
_EXACT = 1e-5  # float32 errs by some 1e-6 of such a product's spread; bfloat16 by 3e-3


def quick_products(device: Any) -> AbstractContextManager[Any]:
    """Return a context in which the linear layers of this thread may be computed by oneDNN.

    For inference: what needs a gradient, is not float32 or is not on the CPU is computed as ever,
    and so is everything where oneDNN is missing or would round. Other threads are not touched.

    Args:
        device: where the model is, a `torch.device`.
    """
    if device.type != "cpu" or not _is_exact():
        return nullcontext()
    import torch
    from torch.overrides import TorchFunctionMode

    linear = torch.nn.functional.linear

    class Quick(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if function is linear and _fits(*args, **kwargs):
                return _linear(*args, **kwargs)
            return function(*args, **kwargs)

    return Quick()


def _fits(input: Any, weight: Any, bias: Any = None) -> bool:
    import torch

    given = [tensor for tensor in (input, weight, bias) if tensor is not None]
    return (
        all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in given)
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in given)
        and input.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given))
    )


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    import torch

    # What torch.compile calls for a linear layer on a CPU.
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


@functools.lru_cache
def _is_exact() -> bool:
    """Say whether oneDNN is there and multiplies float32 as float32."""
    import torch

    if not torch.backends.mkldnn.is_available():
        return False
    random = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(_SIZE, _SIZE, generator=random) for _ in range(2))
    bias = torch.randn(_SIZE, generator=random)
    exact = torch.nn.functional.linear(rows.double(), weight.double(), bias.double())
    try:
        with torch.inference_mode():
            found = _linear(rows, weight, bias)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False  # another release of PyTorch, or a build without it
    return bool((found - exact).abs().max() < _EXACT * exact.std())
