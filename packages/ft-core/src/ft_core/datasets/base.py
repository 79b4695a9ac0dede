"""What every dataset can do: load, save, hash and describe itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import Self

from ft_core import files
from ft_core.errors import DatasetError

Model = TypeVar("Model", bound=BaseModel)


class FinetuneDataset(BaseModel):
    """Base of the datasets: one JSON document on disk, checked whenever it is made.

    Subclasses check their references in a `model_validator(mode="after")` that raises
    `DatasetError` with the place; `load` adds the file.
    """

    model_config = ConfigDict(extra="forbid")

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read and check a file.

        Raises:
            DatasetError: names the file, the place in it and the reason.
        """
        return cls._checked(files.read_json(path), path)

    def save(self, path: Path | str) -> None:
        """Write the file whole or not at all; missing folders are made."""
        with files.atomic_write(path) as file:
            json.dump(self._content(), file, indent=4, ensure_ascii=False)
            file.write("\n")

    @property
    def content_hash(self) -> str:
        """SHA-256 of the content; the order of keys does not change it."""
        return files.content_hash(self._content())

    def stats(self) -> dict[str, Any]:
        """Return counts and lengths that show at a glance whether the data is what was meant."""
        raise NotImplementedError

    @classmethod
    def _checked(cls, content: Any, source: Path | str | None = None) -> Self:
        return validated(cls, content, source)

    def _content(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def validated(model: type[Model], content: Any, source: Path | str | None = None) -> Model:
    """Return `content` as a pydantic model; what is wrong with it is a `DatasetError`."""
    try:
        return model.model_validate(content)
    except DatasetError as error:
        raise (error if source is None else error.at(source)) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(
            f".{part}" if isinstance(part, str) and part.isidentifier() else f"[{part!r}]"
            for part in first["loc"]
        ).lstrip(".")
        raise DatasetError(first["msg"], source=source, place=place) from None


def check_text(value: Any, place: str = "") -> None:
    """Check that any JSON value can be written: no half of a surrogate pair, no NaN."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        raise DatasetError("is nested too deeply", place=place) from None
    except (TypeError, ValueError) as error:
        if isinstance(value, dict):
            for key, inner in value.items():
                check_text(inner, f"{place}.{key}".lstrip("."))
        elif isinstance(value, list):
            for index, inner in enumerate(value):
                check_text(inner, f"{place}[{index}]")
        reason = (
            "holds half of a surrogate pair, which no file can; drop the character"
            if isinstance(error, UnicodeEncodeError)
            else f"cannot be written as JSON: {error}"
        )
        raise DatasetError(reason, place=place) from None
