"""The folder of an adapter: its weights, what made it, and the base model that it was trained for.

Beside `ft.json` and the model card of every pack it holds `adapter.safetensors` (the state
dict) and `adapter.json` (class, configuration, sides, base model). Nothing in a folder is ever
run: a class that is not of this pack has to be passed in.
"""

from __future__ import annotations

import copy
import json
import logging
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ft_adapter.adapters import BUILT_IN, LinearLayer, TwoLayerNN
from ft_adapter.vector_cache import PROBE_TEXT
from ft_core.artifacts import (
    MANIFEST,
    Manifest,
    library_versions,
    read_manifest,
    read_saved,
    saving,
)
from ft_core.errors import ArgumentError, ArtifactError, DatasetError
from ft_core.files import read_json, restore_folder

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

KIND = "embedding-adapter"
SAME = 0.999
"""Cosine from which two vectors of one text count as equal: half precision passes."""

LIBRARIES = ("ft-adapter", "torch", "safetensors", "llama-index-core")

_WEIGHTS = "adapter.safetensors"
_HEADER = "adapter.json"
_LEGACY_WEIGHTS = "pytorch_model.bin"
_LEGACY_CONFIG = "config.json"

Sides = Literal["query", "both"]


@dataclass(frozen=True)
class Base:
    """The embedding model that an adapter was trained for."""

    name: str
    dimension: int
    probe: list[float]
    """Its vector of `probe_text`, embedded as a query."""
    probe_text: str = PROBE_TEXT


@dataclass(frozen=True)
class SavedAdapter:
    """What `load_adapter` found in a folder."""

    adapter: nn.Module
    """On the CPU, in evaluation mode."""
    sides: Sides
    """What it transforms: queries alone, or queries and documents."""
    base: Base | None
    """None when it was not recorded, as in the predecessor's folders."""
    identity: bool
    """Training found nothing better than the unchanged embedding."""
    legacy: bool
    """The predecessor wrote the folder."""
    folder: Path


class _BaseEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: str
    dimension: int
    probe_text: str
    probe_vector: list[float]


class _Header(BaseModel):
    """What `adapter.json` holds."""

    model_config = ConfigDict(extra="forbid", strict=True)

    class_name: str = Field(alias="class")
    config: dict[str, Any] | None
    sides: Sides
    base: _BaseEntry | None
    identity: bool


def save_adapter(
    folder: Path | str,
    adapter: nn.Module,
    *,
    sides: Sides = "query",
    base: Base | None = None,
    manifest: Manifest | None = None,
    identity: bool = False,
) -> None:
    """Write an adapter to `folder`, which is replaced only by a whole new one.

    Args:
        folder: new, empty, or saved by this function before.
        adapter: on any device; a module without `get_config_dict` is saved without its
            configuration, and `load_adapter` then asks for an instance.
        sides: `query` or `both`.
        base: the model that it was trained for (`base_of`).
        manifest: what an engine records; one without data and settings by default.
        identity: training found nothing better than the unchanged embedding.

    Raises:
        ArgumentError: the adapter cannot be saved: weights that are not finite or not
            tensors, a configuration that is not JSON, another dimension than the base's.
        ArtifactError: the folder holds something else, or cannot be written.
    """
    if sides not in ("query", "both"):
        raise ArgumentError("sides", f"is 'query' or 'both', not {sides!r}")
    if manifest is None:
        manifest = Manifest(
            kind=KIND,
            base_model="unknown" if base is None else base.name,
            settings={"class": _class_name(type(adapter)), "sides": sides},
            versions=library_versions(LIBRARIES),
        )
    elif manifest.kind != KIND:
        raise ArgumentError("manifest", f"is of the kind {KIND}, not {manifest.kind}")
    _check_dimension(adapter, base)
    weights = _state(adapter)
    header = _header(adapter, sides, base, identity)
    with saving(folder, manifest) as partial:
        try:
            # As bytes: `save_file` makes a file that only its owner may read.
            (partial / _WEIGHTS).write_bytes(save(weights))
            (partial / _HEADER).write_text(header + "\n", encoding="utf-8")
        except OSError as error:
            raise ArtifactError(
                f"{folder}: cannot be written: {error.strerror}; what was there is kept"
            ) from error


def load_adapter(
    folder: Path | str,
    adapter_cls: type | None = None,
    *,
    adapter: nn.Module | None = None,
) -> SavedAdapter:
    """Read a folder that `save_adapter` or the predecessor wrote.

    Args:
        folder: with `ft.json`, or with the predecessor's two files.
        adapter_cls: the adapter's class, when it is not of this pack. Given, it must be the
            class that was saved, unless the folder holds the identity.
        adapter: in place of `adapter_cls`, an instance of the same shape, for a class
            without `get_config_dict`. It is copied, not changed.

    Raises:
        ArtifactError: the folder is missing, foreign or damaged, holds another class or
            shape, weights that are not finite, or a pickle with more than weights in it.
    """
    _check_class(adapter_cls, adapter)
    folder = Path(folder)
    restore_folder(folder)
    if _is_legacy(folder):
        return _load_legacy(folder, adapter_cls, adapter)
    read_manifest(folder, KIND)
    header = _read_header(folder)
    if header.identity:  # what training falls back to, whatever class was trained
        adapter_cls = adapter = None
    given = adapter_cls if adapter is None else type(adapter)
    if given is not None and _class_name(given) != header.class_name:
        raise ArtifactError(
            f"{folder}: holds a {header.class_name}, not a {_class_name(given)}; "
            f"pass {header.class_name}, or the folder of a {_class_name(given)}"
        )
    if adapter is None:
        cls = adapter_cls or BUILT_IN.get(header.class_name)
        if cls is None:
            wanted = "adapter=" if header.config is None else "adapter_cls="
            raise ArtifactError(
                f"{folder}: holds a {header.class_name}, which is no class of this pack; "
                f"pass {wanted}{_example(header)}"
            )
        adapter = _build(folder, cls, header.config)
    return SavedAdapter(
        adapter=_with_weights(folder, adapter, _read_weights(folder)),
        sides=header.sides,
        base=_base(header),
        identity=header.identity,
        legacy=False,
        folder=folder,
    )


def check_base(saved: SavedAdapter, embed_model: BaseEmbedding) -> None:
    """Check that `embed_model` is the one that an adapter was trained for.

    Embeds one short text. Where the folder does not name a base model, only the dimension is
    compared, if the adapter knows its own. Another name for the same vectors is no error: the
    same weights may lie under another path.

    Raises:
        ArtifactError: another dimension, or another vector of the probe text.
        ArgumentError: the model fails on the probe text, or gives no usable vector.
    """
    base = saved.base
    dimension = _in_features(saved.adapter) if base is None else base.dimension
    if dimension is None:
        return
    name = name_of(embed_model)
    found = _embed_probe(embed_model, PROBE_TEXT if base is None else base.probe_text)
    expected = "" if base is None else f" by {base.name!r}"
    if len(found) != dimension:
        raise ArtifactError(
            f"{saved.folder}: the adapter is for vectors of dimension {dimension}{expected}, and "
            f"{name!r} gives {len(found)}; pass the embedding model that it was trained for"
        )
    if base is None:
        return
    cosine = _cosine(np.asarray(base.probe, dtype=np.float64), found)
    if cosine >= SAME:
        if name != base.name:
            logger.info(
                "%s: trained for %r; %r gives the same vectors", saved.folder, base.name, name
            )
        return
    similarity = f"cosine {cosine:.3f} on the probe text, expected at least {SAME}"
    if name == base.name:
        raise ArtifactError(
            f"{saved.folder}: the model behind the name {name!r} has changed, or its settings, "
            f"since the adapter was trained ({similarity}); bring the old one back, or train again"
        )
    raise ArtifactError(
        f"{saved.folder}: the adapter was trained for {base.name!r}, and {name!r} is another "
        f"model ({similarity}); pass {base.name!r}, or train an adapter for {name!r}"
    )


def base_of(embed_model: BaseEmbedding, probe_vector: Sequence[float]) -> Base:
    """Describe an embedding model by its name and its vector of `PROBE_TEXT`.

    Raises:
        ArgumentError: the vector is empty or not finite.
    """
    vector = _checked_probe(embed_model, probe_vector)
    return Base(name_of(embed_model), len(vector), vector.tolist())


def name_of(embed_model: BaseEmbedding) -> str:
    """Return the name of an embedding model; of one without a name, that of its class."""
    name = getattr(embed_model, "model_name", None)
    # "unknown" is what LlamaIndex calls every model that does not name itself.
    return str(name) if name and name != "unknown" else type(embed_model).__name__


def _class_name(cls: type) -> str:
    name = cls.__name__
    if BUILT_IN.get(name, cls) is cls:
        return name
    # Another class of the same name must not come back as the one of this pack.
    return f"{cls.__module__}.{cls.__qualname__}"


def _in_features(adapter: nn.Module) -> int | None:
    value = getattr(adapter, "in_features", None)
    return value if isinstance(value, int) else None


def _check_dimension(adapter: nn.Module, base: Base | None) -> None:
    features = _in_features(adapter)
    if base is not None and features not in (None, base.dimension):
        raise ArgumentError(
            "adapter",
            f"takes vectors of dimension {features}, and {base.name!r} gives {base.dimension}",
        )


def _state(adapter: nn.Module) -> dict[str, Tensor]:
    """Return the state dict as safetensors takes it: on the CPU, no memory shared."""
    state = {}
    for name, value in adapter.state_dict().items():
        if not isinstance(value, Tensor) or nn.parameter.is_lazy(value):
            raise ArgumentError("adapter", f"its state {name!r} is no tensor and cannot be saved")
        if not torch.isfinite(value).all():
            raise ArgumentError("adapter", f"{name!r} is not finite; nothing was saved")
        state[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return state


def _header(adapter: nn.Module, sides: Sides, base: Base | None, identity: bool) -> str:
    config = adapter.get_config_dict() if hasattr(adapter, "get_config_dict") else None
    if config is not None and not isinstance(config, dict):
        raise ArgumentError("adapter", "its get_config_dict returns no dict")
    entry = {
        "class": _class_name(type(adapter)),
        "config": config,
        "sides": sides,
        "base": base
        and {
            "name": base.name,
            "dimension": base.dimension,
            "probe_text": base.probe_text,
            "probe_vector": base.probe,
        },
        "identity": identity,
    }
    try:
        return json.dumps(entry, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            "adapter", f"its get_config_dict holds more than JSON values: {error}"
        ) from None


def _check_class(adapter_cls: type | None, adapter: nn.Module | None) -> None:
    if adapter is not None:
        if adapter_cls is not None:
            raise ArgumentError("adapter", "takes the place of adapter_cls; pass one of the two")
        if not isinstance(adapter, nn.Module):
            raise ArgumentError("adapter", "is an instance of torch.nn.Module")
    elif adapter_cls is not None and not (
        isinstance(adapter_cls, type) and issubclass(adapter_cls, nn.Module)
    ):
        raise ArgumentError("adapter_cls", "is a class derived from torch.nn.Module")


def _example(header: _Header) -> str:
    name = header.class_name.rpartition(".")[2]
    return f"{name}(...), an instance of its shape" if header.config is None else name


def _read_header(folder: Path) -> _Header:
    path = folder / _HEADER
    header = read_saved(path, _Header)
    if header.base is not None and len(header.base.probe_vector) != header.base.dimension:
        raise ArtifactError(
            f"{path}: base: {len(header.base.probe_vector)} numbers in a vector of dimension "
            f"{header.base.dimension}; the folder is damaged, train or copy it again"
        )
    return header


def _base(header: _Header) -> Base | None:
    entry = header.base
    if entry is None:
        return None
    return Base(entry.name, entry.dimension, entry.probe_vector, entry.probe_text)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / _WEIGHTS
    try:
        return dict(load_file(path))
    except FileNotFoundError:
        reason = "no such file"
    except (SafetensorError, OSError) as error:
        reason = f"cannot be read: {error}"
    raise ArtifactError(f"{path}: {reason}; the folder is damaged, train or copy it again")


def _build(folder: Path, cls: type, config: Mapping[str, Any] | None) -> nn.Module:
    """Make the module that weights are then read into; its own errors name the folder."""
    try:
        adapter: nn.Module = cls(**(config or {}))
    except Exception as error:
        if config is None:
            raise ArtifactError(
                f"{folder}: a {cls.__name__} was saved without its arguments, since it has no "
                "get_config_dict; pass adapter=, an instance of the saved shape"
            ) from error
        raise ArtifactError(
            f"{folder}: the configuration does not make a {cls.__name__}: {error}; pass the class "
            "that was saved as adapter_cls=, or copy the folder again"
        ) from error
    return adapter


def _with_weights(folder: Path, adapter: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of `adapter` on the CPU that has the given weights, all of them."""
    loaded = copy.deepcopy(adapter).cpu()
    try:
        loaded.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(
            f"{folder}: the weights do not fit: {reason}; pass the class or the shape that was "
            "saved, or copy the folder again"
        ) from None
    for name, value in loaded.state_dict().items():
        if isinstance(value, Tensor) and not torch.isfinite(value).all():
            raise ArtifactError(f"{folder}: {name!r} is not finite; train again")
    return loaded.eval()


def _is_legacy(folder: Path) -> bool:
    return not (folder / MANIFEST).exists() and all(
        (folder / name).is_file() for name in (_LEGACY_CONFIG, _LEGACY_WEIGHTS)
    )


def _load_legacy(folder: Path, adapter_cls: type | None, adapter: nn.Module | None) -> SavedAdapter:
    weights = _read_legacy_weights(folder / _LEGACY_WEIGHTS)
    if adapter is None:
        try:
            config = read_json(folder / _LEGACY_CONFIG)
        except DatasetError as error:
            raise ArtifactError(f"{error}; copy the folder again") from None
        if not isinstance(config, dict):
            raise ArtifactError(
                f"{folder / _LEGACY_CONFIG}: holds no JSON object; copy the folder again"
            )
        adapter = _build(folder, adapter_cls or _legacy_class(folder, weights), config)
    return SavedAdapter(
        adapter=_with_weights(folder, adapter, weights),
        sides="query",
        base=None,
        identity=False,
        legacy=True,
        folder=folder,
    )


def _read_legacy_weights(path: Path) -> dict[str, Tensor]:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"{path}: refused, and nothing in it was run: it is damaged, or a pickle that holds "
            "code and not only weights; do not use it unless it comes from where you trained it"
        ) from error
    except Exception as error:  # of a broken file, torch raises half a dozen types
        reason = str(error).partition("\n")[0]
        raise ArtifactError(f"{path}: cannot be read: {reason}; copy the folder again") from error
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        raise ArtifactError(f"{path}: refused: holds other things than named weights")
    return weights


def _legacy_class(folder: Path, weights: Mapping[str, Tensor]) -> type[nn.Module]:
    if "linear.weight" in weights:
        return LinearLayer
    if "linear1.weight" in weights:
        return TwoLayerNN
    raise ArtifactError(
        f"{folder}: holds weights of neither LinearLayer nor TwoLayerNN; pass adapter_cls=, "
        "the class that was trained, or name the folder of an adapter"
    )


def _embed_probe(embed_model: BaseEmbedding, text: str) -> NDArray[np.float64]:
    try:
        # As a query: an engine that works on an index never asks for a document.
        vector = embed_model.get_query_embedding(text)
    except Exception as error:
        raise ArgumentError(
            "embed_model",
            f"{name_of(embed_model)!r} failed on the text that tells base models apart: {error}",
        ) from error
    return _checked_probe(embed_model, vector)


def _checked_probe(embed_model: BaseEmbedding, vector: Any) -> NDArray[np.float64]:
    try:
        array = np.asarray(vector, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ArgumentError(
            "embed_model",
            f"{name_of(embed_model)!r} gave no list of finite numbers for a query; "
            "try its get_query_embedding by hand",
        )
    return array


def _cosine(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    norms = float(np.linalg.norm(left) * np.linalg.norm(right))
    if not norms:  # a model of few words may know none of the text
        return float(np.array_equal(left, right))
    return float(left @ right) / norms
