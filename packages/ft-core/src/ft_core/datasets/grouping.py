"""Deal texts out to the parts of a split, so that near-duplicates stay on one side.

What must stay together forms groups; the groups, largest first, go to the part that is
farthest from its share.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

from ft_core.datasets.duplicates import (
    DEFAULT_THRESHOLD,
    connected_groups,
    exact_duplicates,
    near_duplicate_pairs,
)
from ft_core.errors import ArgumentError, DatasetError

logger = logging.getLogger(__name__)

Groups = Sequence[Sequence[str]]

_TOLERANCE = 0.1  # a share that misses what was asked for by more is worth a warning


def split_texts(
    texts: Mapping[str, str],
    fractions: Mapping[str, float],
    *,
    seed: int = 0,
    threshold: float = DEFAULT_THRESHOLD,
    what: str = "its queries, near-duplicates counted as one, are",
) -> dict[str, list[str]]:
    """Return part name to the keys of its texts; near-duplicates are in one part.

    Args:
        texts: key to text, as many keys to a text as there are.
        fractions: part name to its share of the keys, any positive numbers.
        seed: the same seed gives the same parts.
        threshold: similarity from which two texts count as near-duplicates.
        what: the subject of the error, for "... 3 group(s) that must stay together".

    Raises:
        ArgumentError: a bad fraction or threshold.
        DatasetError: there are fewer groups than parts.
    """
    check_fractions(fractions)
    groups = connected_groups(texts, _links(texts, threshold))
    check_enough(groups, fractions, what)
    parts = deal_out(groups, len, fractions, random.Random(seed))
    warn_if_off(parts, fractions)
    return parts


def _links(texts: Mapping[str, str], threshold: float) -> Iterator[tuple[str, str]]:
    """Yield pairs of keys that connect all near-duplicates."""
    distinct = dict(texts)
    # One question may be asked a thousand times: of equal texts only the first is compared.
    for first, *others in exact_duplicates(texts):
        for other in others:
            del distinct[other]
            yield first, other
    for a, b, _ in near_duplicate_pairs(distinct, threshold=threshold):
        yield a, b


def deal_out(
    groups: Groups,
    size: Callable[[Sequence[str]], int],
    fractions: Mapping[str, float],
    rng: random.Random,
) -> dict[str, list[str]]:
    """Return part name to the members of its groups; no part is empty if there are enough."""
    shuffled = list(groups)
    rng.shuffle(shuffled)
    shuffled.sort(key=size, reverse=True)  # stable: equal sizes stay shuffled
    total, whole = sum(map(size, shuffled)), math.fsum(fractions.values())
    missing = {name: total * fraction / whole for name, fraction in fractions.items()}
    empty = set(fractions)
    parts: dict[str, list[str]] = {name: [] for name in fractions}
    for index, group in enumerate(shuffled):
        # The last groups go to parts that have none yet: a small share is still a part.
        open_parts = empty if len(shuffled) - index <= len(empty) else set(fractions)
        name = max((part for part in fractions if part in open_parts), key=missing.__getitem__)
        parts[name] += group
        missing[name] -= size(group)
        empty.discard(name)
    return parts


def check_fractions(fractions: Mapping[str, float]) -> None:
    """Raise `ArgumentError` unless `fractions` maps part names to positive numbers."""
    if not isinstance(fractions, Mapping) or not fractions:
        raise ArgumentError(
            "fractions", 'maps each part to its share, as in {"train": 0.8, "validation": 0.2}'
        )
    for name, fraction in fractions.items():
        if not isinstance(fraction, float | int) or not 0 < fraction < math.inf:
            raise ArgumentError("fractions", f"{name!r} needs a share above 0, not {fraction!r}")


def check_enough(groups: Groups, fractions: Mapping[str, float], what: str) -> None:
    """Raise `DatasetError` if there are fewer groups than parts."""
    if len(groups) < len(fractions):
        raise DatasetError(
            f"no split into {len(fractions)} parts without a leak: {what} {len(groups)} group(s) "
            "that must stay together; ask for fewer parts, bring more data, or raise the threshold"
        )


def warn_if_off(parts: Mapping[str, Sequence[str]], fractions: Mapping[str, float]) -> None:
    """Log each part whose share of the queries is far from what was asked for."""
    total, whole = sum(map(len, parts.values())), math.fsum(fractions.values())
    for name, queries in parts.items():
        got, asked = len(queries) / total, fractions[name] / whole
        if abs(got - asked) > _TOLERANCE:
            logger.warning(
                "part %r has %.0f %% of the queries instead of %.0f %%: larger groups of them "
                "must stay together",
                name,
                100 * got,
                100 * asked,
            )
