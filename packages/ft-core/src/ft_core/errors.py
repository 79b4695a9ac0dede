"""The errors that the packs raise for a user to read.

Each message names the file, line or argument and what to do next. They derive from
`FTError` and not from `ValueError`, so that pydantic passes them through unwrapped.
"""

from __future__ import annotations

from pathlib import Path


class FTError(Exception):
    """Base of every error that a pack raises on purpose."""


class DatasetError(FTError):
    """A dataset that cannot be used: says where, and why."""

    def __init__(self, reason: str, *, source: Path | str | None = None, place: str = "") -> None:
        self.reason = reason
        self.source = None if source is None else str(source)
        self.place = place
        super().__init__(": ".join(part for part in (self.source, place, reason) if part))

    def at(self, source: Path | str) -> DatasetError:
        """Return the same error with the file that it was found in."""
        return type(self)(self.reason, source=source, place=self.place)


class ArgumentError(FTError):
    """An argument that cannot be used: says which, and what would be."""

    def __init__(self, argument: str, reason: str) -> None:
        self.argument = argument
        super().__init__(f"{argument}: {reason}")


class MissingExtraError(FTError, ImportError):
    """An optional dependency that is not installed: names the pip command."""


class ArtifactError(FTError):
    """A saved folder that is missing, foreign, damaged or of another kind."""


class TrainingError(FTError):
    """Training that cannot start or go on: says why and what is kept."""


class GenerationError(FTError):
    """Generation that cannot finish: says which nodes failed, and why."""


def first_line(error: BaseException) -> str:
    """Return what an error of a library says first, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
