"""Texts that say the same: exact duplicates, and near-duplicates by shared character shingles.

Both work on any mapping of ids to texts, in any script: nothing is split at spaces.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ft_core.errors import ArgumentError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Key = TypeVar("Key", bound=Hashable)

DEFAULT_THRESHOLD = 0.8
"""Jaccard similarity of shingles from which two texts count as near-duplicates: "What is ...?"
against "What are ...?" in a sentence of a dozen words, a corrected typo, one more comma."""

_SHINGLE = 3
_CODE_POINT_BITS = 21  # three of them fit 64 bits: a shingle is its own, collision-free number
_TOKENS_PER_MATCH = 16  # see `_prefix_lengths`
_MEANINGFUL = frozenset("#%&@")  # punctuation by Unicode, but C# is not C, nor 5 % five


class _Folding(dict[int, int | None]):
    """A table for `str.translate`, filled as characters turn up."""

    def __missing__(self, code: int) -> int | None:
        character = chr(code)
        category = unicodedata.category(character)
        folded: int | None = code
        if category.startswith("P") and character not in _MEANINGFUL:
            folded = ord(" ")
        elif category == "Cf":  # zero-width spaces, soft hyphens, byte order marks
            folded = None
        self[code] = folded
        return folded


_FOLDING = _Folding()


def fold(text: str) -> str:
    """Return `text` without differences of case, width (NFKC), punctuation and white space.

    A text of nothing but punctuation keeps it.
    """
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(plain.translate(_FOLDING).split()) or " ".join(plain.split())


def exact_duplicates(texts: Mapping[str, str]) -> list[list[str]]:
    """Return the groups of ids, two or more each, whose texts are equal once folded.

    Ids stand in the order of `texts`, groups in the order of their first id.
    """
    groups: dict[str, list[str]] = {}
    for key, text in texts.items():
        groups.setdefault(fold(text), []).append(key)
    return [group for group in groups.values() if len(group) > 1]


def near_duplicates(
    texts: Mapping[str, str], *, threshold: float = DEFAULT_THRESHOLD
) -> list[list[str]]:
    """Return the groups of ids, two or more each, that `near_duplicate_pairs` connects.

    Exact duplicates are near-duplicates too. Two texts of one group may be less alike than
    `threshold` when others between them make the link. The order is that of `texts`.
    """
    pairs = ((a, b) for a, b, _ in near_duplicate_pairs(texts, threshold=threshold))
    return [group for group in connected_groups(texts, pairs) if len(group) > 1]


def near_duplicate_pairs(
    texts: Mapping[str, str], *, threshold: float = DEFAULT_THRESHOLD
) -> Iterator[tuple[str, str, float]]:
    """Yield every pair of ids whose `similarity` is at least `threshold`, and no other.

    Exact, without comparing all pairs: texts are indexed by their rarest shingles only
    (prefix filtering: Chaudhuri et al. 2006, and AllPairs, Bayardo et al. 2007; the shorter
    prefix of the index is that of PPJoin, Xiao et al. 2008; more than one match per
    candidate that of AdaptJoin, Wang et al. 2012). 20,000 questions take a few seconds.

    Raises:
        ArgumentError: `threshold` is not above 0 and at most 1.
    """
    if not 0 < threshold <= 1:
        raise ArgumentError("threshold", f"is above 0 and at most 1, not {threshold}")
    if len(texts) < 2:
        return
    keys = list(texts)
    order, sets = _shingle_sets(list(texts.values()))
    for larger, smaller, jaccard in _self_join(sets, threshold):
        yield keys[order[smaller]], keys[order[larger]], jaccard


def similarity(a: str, b: str) -> float:
    """Return the Jaccard similarity of two texts' character shingles, from 0 to 1.

    The texts are folded and framed with a space each; a shingle is three characters.
    """
    return jaccard(shingles(a), shingles(b))


def jaccard(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> float:
    """Return the Jaccard similarity of two texts given by their `shingles`."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def shingles(text: str) -> NDArray[np.uint64]:
    """Return the distinct shingles of a text as sorted numbers; see `similarity`."""
    framed = f" {fold(text)} ".ljust(_SHINGLE)
    codes = np.frombuffer(framed.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    windows = np.lib.stride_tricks.sliding_window_view(codes.astype(np.uint64), _SHINGLE)
    packed = windows[:, 0]
    for column in range(1, _SHINGLE):
        packed = (packed << np.uint64(_CODE_POINT_BITS)) | windows[:, column]
    return np.unique(packed)


def connected_groups(keys: Iterable[Key], links: Iterable[tuple[Key, Key]]) -> list[list[Key]]:
    """Return the connected components of a graph, in the order of `keys`, single ones too."""
    parent = {key: key for key in keys}

    def root(key: Key) -> Key:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for a, b in links:
        parent[root(b)] = root(a)
    groups: dict[Key, list[Key]] = {}
    for key in parent:
        groups.setdefault(root(key), []).append(key)
    return list(groups.values())


class _Sets:
    """Sets of tokens in one array, smallest set first, the rarest token of each set first."""

    def __init__(self, tokens: NDArray[np.int32], starts: NDArray[np.int64], vocabulary: int):
        self.tokens = tokens
        self.starts = starts  # of set i; one more entry closes the last set
        self.vocabulary = vocabulary
        self.sizes: NDArray[np.int64] = np.diff(starts)

    def __len__(self) -> int:
        return len(self.sizes)

    def of(self, row: int) -> NDArray[np.int32]:
        return self.tokens[self.starts[row] : self.starts[row + 1]]

    def prefixes(self, lengths: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the first `lengths[i]` tokens of every set i, and the row of each."""
        rows = np.repeat(np.arange(len(self)), lengths)
        return self.tokens[_ranges(self.starts[:-1], lengths)], rows


def _shingle_sets(texts: list[str]) -> tuple[NDArray[np.int64], _Sets]:
    """Return the texts' shingle sets, and which text each of them is."""
    found = [shingles(text) for text in texts]
    sizes = np.array([len(tokens) for tokens in found], dtype=np.int64)
    order = np.argsort(sizes, kind="stable")
    every = np.concatenate([found[index] for index in order])
    del found
    _, inverse, counts = np.unique(every, return_inverse=True, return_counts=True)
    del every
    rarity = np.empty(len(counts), dtype=np.int32)
    rarity[np.argsort(counts, kind="stable")] = np.arange(len(counts), dtype=np.int32)
    tokens = rarity[inverse.reshape(-1)]
    starts = np.concatenate([[0], np.cumsum(sizes[order])])
    for start, end in itertools.pairwise(starts):
        tokens[start:end].sort()
    return order, _Sets(tokens, starts, len(counts))


def _self_join(sets: _Sets, threshold: float) -> Iterator[tuple[int, int, float]]:
    """Yield (row, smaller or equal row, Jaccard) of the pairs that reach `threshold`."""
    probe_lengths, index_lengths, required = _prefix_lengths(sets.sizes, threshold)
    tokens, rows = sets.prefixes(index_lengths)
    # One sorted array is the inverted index: the rows of a token are a stretch of it.
    postings = np.sort(tokens.astype(np.int64) * len(sets) + rows)
    first_rows = np.searchsorted(sets.sizes, _ceil(threshold * sets.sizes))
    member = np.zeros(sets.vocabulary, dtype=bool)
    for row in range(1, len(sets)):
        own = sets.of(row)
        base = own[: probe_lengths[row]].astype(np.int64) * len(sets)
        low = np.searchsorted(postings, base + first_rows[row])
        high = np.searchsorted(postings, base + row)
        met = postings[_ranges(low, high - low)] % len(sets)
        candidates, times = np.unique(met, return_counts=True)
        candidates = candidates[times >= required[row]]
        if not len(candidates):
            continue
        sizes = sets.sizes[candidates]
        member[own] = True
        theirs = member[sets.tokens[_ranges(sets.starts[candidates], sizes)]]
        member[own] = False
        shared = np.add.reduceat(theirs, np.cumsum(sizes) - sizes, dtype=np.int64)
        jaccard = shared / (len(own) + sizes - shared)
        for index in np.flatnonzero(jaccard >= threshold):
            yield row, int(candidates[index]), float(jaccard[index])


def _prefix_lengths(
    sizes: NDArray[np.int64], threshold: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return how many of its rarest tokens each set looks up, how many it is indexed by, and
    how many of them a candidate has to share.

    Take a pair that reaches the threshold t, b the smaller set. Then |b| >= t |a|, and the
    overlap is at least t |a| and at least 2t / (1 + t) |b|. If all but n - 1 tokens of the
    overlap were outside of one of the prefixes |a| - t |a| + n and |b| - 2t / (1 + t) |b| + n,
    the overlap would be too small: so the prefixes share n, or all of it. With n = 1 long
    texts have too many candidates; n in proportion to the size was the fastest by trial.
    """
    overlap = _ceil(threshold * sizes)
    common = 1 + sizes // _TOKENS_PER_MATCH
    # The larger set of a pair has up to |b| / t tokens, and asks for its own n.
    largest_common = 1 + _ceil(sizes / threshold) // _TOKENS_PER_MATCH
    probe = sizes - overlap + common
    index = sizes - _ceil(2 * threshold / (1 + threshold) * sizes) + largest_common
    return np.minimum(probe, sizes), np.minimum(index, sizes), np.minimum(common, overlap)


def _ceil(values: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    # 0.56 * 25 is 14.000000000000002: without the slack a prefix would be one too short.
    ceilings: NDArray[np.int64] = np.ceil(values - 1e-9).astype(np.int64)
    return ceilings


def _ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the positions start, start + 1, ... of every range, one after the other."""
    offsets = np.cumsum(lengths) - lengths
    positions: NDArray[np.int64] = np.repeat(starts - offsets, lengths)
    return positions + np.arange(len(positions))
