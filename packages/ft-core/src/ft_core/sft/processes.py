"""Several processes that train one model together, as `accelerate launch` starts them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from ft_core.errors import TrainingError

T = TypeVar("T")


def processes() -> int:
    """Return how many processes train together; 1 outside of `accelerate launch`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the process that decides and saves."""
    return int(os.environ.get("RANK", "0")) == 0


def from_main_process(ask: Callable[[], T]) -> T:
    """Return what `ask` returns in the main process, in each of them.

    They so agree on what to do, whatever the others would find a moment later.

    Raises:
        TrainingError: `ask` raised one in the main process, which raises its own.
    """
    if processes() == 1:
        return ask()
    from accelerate import PartialState
    from torch.distributed import broadcast_object_list

    device = PartialState().device  # joins the processes
    answer: list[Any] = [None, None]
    failure: BaseException | None = None
    if is_main_process():
        try:
            answer[0] = ask()
        except Exception as error:
            failure, answer[1] = error, str(error)
    broadcast_object_list(answer, src=0, device=device)
    if failure is not None:
        raise failure
    if answer[1] is not None:
        raise TrainingError(answer[1])
    found: T = answer[0]
    return found
