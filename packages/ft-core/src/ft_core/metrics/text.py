"""Metrics of one text against another.

ROUGE-L (Lin, "ROUGE: A package for automatic evaluation of summaries", 2004) is the
F-measure of the longest common subsequence of words: in order, with gaps. Words are what the
`rouge-score` package takes them for without a stemmer: runs of ASCII letters and digits, in
lower case. So it measures texts in Latin script, and calls two others 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORD = re.compile(r"[a-z0-9]+")


def rouge_l(prediction: str, reference: str) -> float:
    """Return the F-measure of ROUGE-L, from 0 to 1; 0 where a text has no word.

    Symmetric: precision and recall weigh the same.
    """
    predicted, expected = (_WORD.findall(text.lower()) for text in (prediction, reference))
    common = _longest_common_subsequence(predicted, expected)
    # 2 P R / (P + R) with P = common / predicted and R = common / expected.
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Return its length, by one row of bits instead of a table (Hyyrö 2004).

    Bit i of the row is 0 where the length for the words of `a` up to i is one more than for
    those before it; each word of `b` updates the row with a few operations on one integer.
    """
    positions: dict[str, int] = {}
    for index, word in enumerate(a):
        positions[word] = positions.get(word, 0) | 1 << index
    every = (1 << len(a)) - 1
    row = every
    for word in b:
        matches = row & positions.get(word, 0)
        row = ((row + matches) | (row - matches)) & every
    return len(a) - row.bit_count()
