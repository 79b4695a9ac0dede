"""Load causal language models: from a hub name, a folder, or what an engine saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from ft_core.artifacts import MANIFEST, read_manifest
from ft_core.errors import ArgumentError, first_line
from ft_core.extras import import_extra
from ft_core.training import best_device, has_fast_bf16, quiet_unless_terminal

KIND = "causal-lm"
"""What `ft.json` calls a folder with a fine-tuned language model."""

EXTRA = "ft-core[local]"

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")

_WINDOW = 4_096  # where a model's configuration does not say


def load_model(name: str | Path, device: str | None = None, **kwargs: Any) -> tuple[Any, Any]:
    """Return (model, tokenizer) of transformers, in evaluation mode.

    Args:
        name: hub name or folder; a folder that an engine saved brings its base model itself.
        device: `cpu`, `cuda`, `cuda:1`, `mps`; the best there is by default.
        kwargs: passed on to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ArgumentError: there is no such model, or it cannot be loaded.
        ArtifactError: the folder is one of ours, and damaged.
        MissingExtraError: `ft-core[local]` is not installed.
    """
    folder = Path(name).expanduser()
    if str(name).startswith(("/", ".", "~")) and not folder.is_dir():
        raise ArgumentError("model", f"{name}: no such folder")
    source = str(folder) if folder.is_dir() else str(name)
    if not (folder / "adapter_config.json").is_file():
        return _load(source, source, device, kwargs)
    peft = import_extra("peft", EXTRA)
    base = peft.PeftConfig.from_pretrained(source).base_model_name_or_path
    if (folder / MANIFEST).is_file():
        base = read_manifest(folder, KIND).base_model
    model, tokenizer = _load(base, source, device, kwargs)
    with quiet_unless_terminal():
        tuned = peft.PeftModel.from_pretrained(model, source)
    return tuned.eval(), tokenizer


def context_window(model: Any) -> int:
    """Return how many tokens the model can take, prompt and answer together."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or _WINDOW)


def greedy(model: Any, **changes: Any) -> Any:
    """Return a generation configuration that always takes the most probable token.

    What the model's own says about sampling is dropped, its end-of-text tokens stay.
    """
    config = copy.deepcopy(model.generation_config)
    config.update(**{"do_sample": False, **dict.fromkeys(_SAMPLING), **changes})
    return config


def _load(
    source: str, tokenizer: str, device: str | None, kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    transformers = import_extra("transformers", EXTRA)
    torch = import_extra("torch", EXTRA)
    place = torch.device(device) if device else best_device()
    defaults = {"dtype": _dtype(torch, place)}
    try:
        with quiet_unless_terminal():
            read = transformers.AutoTokenizer.from_pretrained(tokenizer)
            model = transformers.AutoModelForCausalLM.from_pretrained(source, **defaults | kwargs)
        if "quantization_config" not in kwargs:  # that places the weights itself
            model = model.to(place)
    except (OSError, ValueError, RuntimeError) as error:
        raise ArgumentError("model", f"{source!r} cannot be loaded: {first_line(error)}") from error
    if read.pad_token is None:
        read.pad_token = read.eos_token
    return model.eval(), read


def _dtype(torch: Any, place: Any) -> Any:
    # On a CPU float32: what is saved in memory elsewhere is lost there in time.
    return torch.bfloat16 if place.type == "cuda" and has_fast_bf16(place) else torch.float32
