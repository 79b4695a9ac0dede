"""Import an optional dependency, or say which pip command brings it."""

from __future__ import annotations

import importlib
from typing import Any

from ft_core.errors import MissingExtraError


def import_extra(module: str, requirement: str) -> Any:
    """Import `module`, which `pip install "<requirement>"` brings.

    Raises:
        MissingExtraError: it is not installed; the message holds the pip command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        # Only what this extra brings: a broken dependency of it must show its own error.
        if missing.split(".")[0] != module.split(".")[0] and not module.startswith(missing):
            raise
        raise MissingExtraError(
            f"{module} is not installed; run: pip install '{requirement}'"
        ) from error
