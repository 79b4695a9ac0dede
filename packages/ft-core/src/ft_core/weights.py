"""What is done to a network before and after training, whichever library trains it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ft_core.errors import ArgumentError, TrainingError, first_line
from ft_core.extras import import_extra


def set_dropout(model: Any, probability: float) -> None:
    """Set every dropout layer; at 0, attention runs in a fused kernel, twice as fast on a CPU."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = probability


def freeze_lowest(model: Any, encoder: Any, share: float) -> None:
    """Freeze the token embeddings and the lowest share of the encoder's layers.

    Args:
        model: whose longest stack of layers counts as the encoder's.
        encoder: transformers' model in it.
        share: from 0 to 1; 0 freezes nothing.
    """
    import torch

    stacks = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    if encoder is None or not stacks or not share:
        return
    layers = max(stacks, key=len)
    encoder.get_input_embeddings().requires_grad_(False)
    getattr(encoder, "embeddings", torch.nn.Identity()).requires_grad_(False)
    for layer in layers[: int(len(layers) * share)]:
        layer.requires_grad_(False)


def add_lora(model: Any, options: Mapping[str, Any], *, task_type: str, extra: str) -> None:
    """Add low-rank updates (LoRA, Hu et al. 2021, arXiv:2106.09685) to all linear layers.

    Args:
        model: of transformers or sentence-transformers.
        options: arguments of `peft.LoraConfig` in place of the defaults.
        task_type: what PEFT calls the model's job, such as "FEATURE_EXTRACTION".
        extra: the pack's extra that brings PEFT, for the error where it is missing.

    Raises:
        ArgumentError: PEFT has no such option, or cannot use its value.
        MissingExtraError: PEFT is not installed.
    """
    peft = import_extra("peft", extra)
    defaults = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    try:
        model.add_adapter(peft.LoraConfig(task_type=task_type, **{**defaults, **options}))
    except (TypeError, ValueError) as error:
        raise ArgumentError("lora", f"{options} cannot be used: {first_line(error)}") from error


def plain_lora(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of peft that another process, and `ft.json`, can take over.

    Raises:
        ArgumentError: they are no mapping, or hold what JSON cannot.
    """
    if not isinstance(options, Mapping):
        raise ArgumentError("lora", f"is a mapping, {{'r': 16}}, not {options!r}")
    try:
        plain = json.loads(json.dumps(dict(options), default=sorted))  # sets, in one order
    except TypeError as error:
        raise ArgumentError("lora", f"holds texts, numbers and lists only: {error}") from error
    return dict(plain)


def check_finite(model: Any, setting: str, value: float) -> None:
    """Check that training has left every weight a number.

    Args:
        model: any torch module.
        setting: the name of the learning rate's setting, for the error.
        value: what it was.

    Raises:
        TrainingError: a weight is NaN or infinite.
    """
    import torch

    if not all(torch.isfinite(parameter).all() for parameter in model.parameters()):
        raise TrainingError(
            f"the weights became NaN or infinite; lower {setting} (it was {value}) or set "
            "precision='fp32'"
        )


def merge_lora(model: Any, encoder: Any) -> None:
    """Add the low-rank updates to the weights they belong to, and take the adapters out.

    The saved folder is then an ordinary model that needs no PEFT.

    Args:
        model: what the adapters are in.
        encoder: transformers' model in it, which remembers that it has some.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            setattr(model.get_submodule(parent), child, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save[module.active_adapters[0]]
            setattr(model.get_submodule(parent), child, trained)
    encoder._hf_peft_config_loaded = False
    if hasattr(encoder, "peft_config"):
        del encoder.peft_config
