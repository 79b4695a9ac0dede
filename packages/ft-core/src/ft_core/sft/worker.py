"""Trains what `LocalFinetuneEngine` asks for, in a process of its own."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from ft_core.errors import FTError
from ft_core.files import read_json
from ft_core.sft.engine import LocalFinetuneEngine


def main(request: Path, lock: int | None = None) -> int:
    """Train; the outcome is in the job's folder.

    Args:
        request: file with the engine's arguments.
        lock: descriptor of the job's lock, which this process inherited.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    engine = LocalFinetuneEngine(show_progress=False, **read_json(request))
    try:
        engine.train_queued(lock)
    except FTError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))
