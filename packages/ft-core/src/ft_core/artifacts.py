"""The one folder that every engine saves: weights, `ft.json` and a model card.

`ft.json` (`Manifest`) says what was trained, on which data, with which settings and library
versions. It also marks the folder as ours: a folder without it is never replaced.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ft_core.errors import ArtifactError, DatasetError
from ft_core.files import atomic_folder, read_json, restore_folder

MANIFEST = "ft.json"

ModelT = TypeVar("ModelT", bound=BaseModel)


class Manifest(BaseModel):
    """What `ft.json` holds."""

    model_config = ConfigDict(extra="forbid")

    format: int = 1
    """Version of this format; a reader refuses a higher one."""
    kind: str
    """Which engine saved the folder, for example `sentence-transformer`."""
    base_model: str
    """The hub name or path of the model that training started from."""
    data: dict[str, str] = Field(default_factory=dict)
    """Split name to content hash of the dataset (`FinetuneDataset.content_hash`)."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The engine's arguments as they were used; never a key or token."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    """Before and after on validation, where there was any."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Python and the libraries that took part."""
    created: str = Field(default_factory=lambda: datetime.now(timezone.utc).isoformat())
    """UTC time of saving, ISO 8601."""

    @field_validator("settings", "metrics", mode="before")
    @classmethod
    def _as_json(cls, values: Any) -> Any:
        # Engines pass paths, enums and NumPy numbers: a save after hours must not trip on them.
        return json.loads(json.dumps(values, default=_plain))


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def library_versions(distributions: Sequence[str]) -> dict[str, str]:
    """Return the installed version of Python and of each named distribution that is there."""
    versions = {"python": platform.python_version()}
    for name in distributions:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def check_output_folder(folder: Path | str, kind: str) -> None:
    """Refuse to write where something stands that an engine of this kind did not save.

    Engines call this before they train, so that hours of work do not end in a refusal.

    Raises:
        ArtifactError: the folder exists, is not empty, and is not one of this kind.
    """
    folder = Path(folder)
    target = folder.resolve()
    if target in (Path.cwd(), *Path.cwd().parents):
        raise ArtifactError(f"{folder}: is or holds the current folder; name one inside of it")
    # The folder is made beside its place and then moved there.
    parent = next(parent for parent in target.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ArtifactError(f"{folder}: cannot be made, since {parent} is not a writable folder")
    restore_folder(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: is a file; name a folder to save to")
    if not any(folder.iterdir()):
        return
    if not (folder / MANIFEST).exists():
        raise ArtifactError(
            f"{folder}: holds files that no fine-tuning pack saved (there is no {MANIFEST}); "
            "name an empty or new folder"
        )
    read_manifest(folder, kind)


@contextmanager
def saving(folder: Path | str, manifest: Manifest) -> Iterator[Path]:
    """Yield a folder to write weights into; it becomes `folder`, whole, when the block ends.

    Adds `ft.json` and, where the block wrote no `README.md`, a model card. On an error, the
    last good folder survives.
    """
    check_output_folder(folder, manifest.kind)
    with atomic_folder(folder) as partial:
        yield partial
        (partial / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        card = partial / "README.md"
        if not card.exists():
            card.write_text(model_card(manifest), encoding="utf-8")


def read_manifest(folder: Path | str, kind: str) -> Manifest:
    """Read `ft.json` of a saved folder and check that it is of the expected kind.

    Raises:
        ArtifactError: there is no such folder, it is not ours, damaged, of another kind,
            or written by a newer release.
    """
    folder = Path(folder)
    restore_folder(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder; train first, or check the path")
    if not path.exists():
        raise ArtifactError(f"{folder}: has no {MANIFEST}; this is not a folder that a pack saved")
    manifest = read_saved(path, Manifest)
    if manifest.format > 1:
        raise ArtifactError(f"{path}: format {manifest.format} is newer than this release reads")
    if manifest.kind != kind:
        raise ArtifactError(f"{folder}: holds a {manifest.kind}, not a {kind}")
    return manifest


def read_saved(path: Path, model: type[ModelT]) -> ModelT:
    """Read a JSON file that a pack saved, as the pydantic class that it was made of.

    Raises:
        ArtifactError: the file is missing, damaged, or from a newer release.
    """
    try:
        return model.model_validate(read_json(path))
    except DatasetError as error:
        raise ArtifactError(f"{error}; the folder is damaged, train or copy it again") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ArtifactError(
            f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; the folder is damaged, "
            "or from a newer release"
        ) from None


def model_card(manifest: Manifest) -> str:
    """Return a short Markdown model card in the form that model hubs read."""
    lines = [
        "---",
        f"base_model: {json.dumps(manifest.base_model)}",
        f"tags: [llama-index, fine-tuned, {manifest.kind}]",
        "---",
        f"# Fine-tuned {manifest.kind}",
        "",
        f"Started from `{manifest.base_model}`, trained on {manifest.created[:10]}.",
        "",
        "| data | SHA-256 of its content |",
        "| --- | --- |",
        *[f"| {split} | `{digest}` |" for split, digest in manifest.data.items()],
        "",
        "| setting | value |",
        "| --- | --- |",
        *[f"| {name} | `{json.dumps(value)}` |" for name, value in manifest.settings.items()],
        "",
    ]
    if manifest.metrics:
        lines += ["```json", json.dumps(manifest.metrics, indent=2), "```", ""]
    return "\n".join(lines)
