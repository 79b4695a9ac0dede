"""Progress bars: on standard error, and only where that is a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], label: str, total: int, show: bool) -> Iterator[T]:
    """Yield `items`, with a bar where `show` is true and standard error is a terminal."""
    # `disable=None` is tqdm's "silent when not a terminal".
    bar = tqdm(items, desc=label, total=total, disable=None if show else True, leave=False)
    return iter(bar)
