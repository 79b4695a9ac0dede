"""What tests of several distributions share: runs of `ft`, and training in one thread."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Ran:
    """One run of `ft ...`: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """What a run with `--json` printed; it must have succeeded."""
        assert self.code == 0, self.err
        document: dict[str, Any] = json.loads(self.out)
        return document

    @property
    def error(self) -> str:
        """The message that a run with `--json` ended in; it must have failed."""
        assert self.code, self.out
        return str(json.loads(self.out)["error"]["message"])


def ft(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Ran:
    """Run `ft` with these arguments, in this process."""
    from ft_core.cli import main

    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return Ran(int(ended.value.code or 0), shown.out, shown.err)


@contextmanager
def one_thread() -> Iterator[None]:
    """Train tiny models in one thread, in other processes too: more only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)
