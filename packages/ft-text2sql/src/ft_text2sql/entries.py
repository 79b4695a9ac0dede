"""Entries of a JSON file that others wrote: what is wrong is told with the file and the place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ft_core import files
from ft_core.errors import ArgumentError, DatasetError


@contextmanager
def placed_in(source: Path | str, place: str) -> Iterator[None]:
    """Add the file and the place to an error that names no file yet."""
    try:
        yield
    except ArgumentError as error:
        raise DatasetError(str(error), source=source, place=place) from None
    except DatasetError as error:
        if error.source is not None:
            raise
        inner = f"{place}.{error.place}" if error.place else place
        raise DatasetError(error.reason, source=source, place=inner) from None


def entries_of(path: Path | str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the number, from 0, and the object of each entry of a list of one or more."""
    content = files.read_json(path)
    if not isinstance(content, list):
        raise DatasetError("is not a list of entries", source=path)
    if not content:
        raise DatasetError("has no entry", source=path)
    for index, entry in enumerate(content):
        if not isinstance(entry, Mapping):
            raise DatasetError("is not an object", source=path, place=f"[{index}]")
        yield index, entry


def text_of(entry: Any, key: str) -> str:
    """Return a text of an entry that is not blank."""
    value = entry.get(key) if isinstance(entry, Mapping) else None
    if not isinstance(value, str) or not value.strip():
        what = "is missing" if value is None else f"is {value!r:.40}, not a text with words"
        raise DatasetError(what, place=key)
    return value


def list_of(entry: Mapping[str, Any], key: str) -> list[Any]:
    """Return a list of an entry, of one or more."""
    value = entry.get(key)
    if not isinstance(value, list) or not value:
        raise DatasetError(
            "is missing" if value is None else "is not a list of one or more", place=key
        )
    return value
