"""Load causal language models: from a hub name, a folder, or what an engine saved."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ft_core.artifacts import MANIFEST, read_manifest
from ft_core.errors import ArgumentError, ArtifactError, first_line
from ft_core.extras import import_extra
from ft_core.sft.chat_format import ChatFormat
from ft_core.training import device_named, has_fast_bf16, quiet_unless_terminal

KIND = "causal-lm"
"""What `ft.json` calls a folder with a fine-tuned language model."""

EXTRA = "ft-core[local]"

# peft's use of a name that transformers is giving up: nothing that a user could do about it.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

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
    import_extra("torch", EXTRA)
    from safetensors import SafetensorError

    folder = Path(name).expanduser()
    if str(name).startswith(("/", ".", "~")) and not folder.is_dir():
        raise ArgumentError("model", f"{name}: no such folder")
    source = str(folder) if folder.is_dir() else str(name)
    if not (folder / "adapter_config.json").is_file():
        return _load(source, source, device, kwargs)
    peft = import_extra("peft", EXTRA)
    try:
        base = peft.PeftConfig.from_pretrained(source).base_model_name_or_path
    except (TypeError, ValueError) as error:  # not JSON, or not of an adapter
        raise _damaged(folder, error) from error
    if (folder / MANIFEST).is_file():
        base = read_manifest(folder, KIND).base_model
    own = (folder / "tokenizer_config.json").is_file()
    model, tokenizer = _load(base, source if own else base, device, kwargs)
    try:
        with quiet_unless_terminal():
            tuned = peft.PeftModel.from_pretrained(model, source)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _damaged(folder, error) from error
    return tuned.eval(), tokenizer


def merged(folder: Path) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a saved folder without peft: LoRA's updates are added up.

    The sum has the type that the base model's weights are stored in.
    """
    # On the CPU: there is always room, and nothing is computed but sums.
    model, tokenizer = load_model(folder, "cpu")
    if hasattr(model, "merge_and_unload"):
        transformers = import_extra("transformers", EXTRA)
        base = transformers.AutoConfig.from_pretrained(model.config.name_or_path)
        model = model.merge_and_unload(safe_merge=True)
        model = model.to(getattr(base, "dtype", None) or model.dtype)
    if tokenizer.chat_template:
        stop_at(model, ChatFormat(tokenizer).end_ids)
    return model, tokenizer


def stop_at(model: Any, ends: Sequence[int]) -> None:
    """Add tokens to those at which servers, by the model's configuration, end an answer."""
    config = model.generation_config
    own = config.eos_token_id
    listed = own if isinstance(own, list) else [] if own is None else [own]
    found = list(dict.fromkeys([*listed, *ends]))
    if found != listed:
        config.eos_token_id = found if len(found) > 1 else found[0]


def context_window(model: Any) -> int:
    """Return how many tokens the model can take, prompt and answer together."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or _WINDOW)


def keeps_positions(model: Any) -> bool:
    """Say whether a model computes the logits of chosen positions only, by `logits_to_keep`."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model  # of peft
    return "logits_to_keep" in inspect.signature(whole.forward).parameters


def greedy(model: Any, **changes: Any) -> Any:
    """Return a generation configuration that always takes the most probable token.

    What the model's own says about sampling is dropped, its end-of-text tokens stay.
    """
    config = copy.deepcopy(model.generation_config)
    config.update(**{"do_sample": False, **dict.fromkeys(_SAMPLING), **changes})
    return config


def _damaged(folder: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"{folder}: the adapter cannot be loaded ({first_line(error)}); train or copy it again"
    )


def _load(
    source: str, tokenizer: str, device: str | None, kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    transformers = import_extra("transformers", EXTRA)
    torch = import_extra("torch", EXTRA)
    from safetensors import SafetensorError

    place = device_named(device)
    defaults = {"dtype": _dtype(torch, place)}
    try:
        with quiet_unless_terminal():
            read = transformers.AutoTokenizer.from_pretrained(tokenizer)
            model = transformers.AutoModelForCausalLM.from_pretrained(source, **defaults | kwargs)
        if "quantization_config" not in kwargs:  # that places the weights itself
            model = model.to(place)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ArgumentError("model", f"{source!r} cannot be loaded: {first_line(error)}") from error
    if read.pad_token is None:
        read.pad_token = read.eos_token
    return model.eval(), read


def _dtype(torch: Any, place: Any) -> Any:
    # On a CPU float32: what is saved in memory elsewhere is lost there in time.
    return torch.bfloat16 if place.type == "cuda" and has_fast_bf16(place) else torch.float32
