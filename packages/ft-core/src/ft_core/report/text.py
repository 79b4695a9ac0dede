"""How a report writes numbers, metric names and texts that others wrote."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

_LABELS = {
    "hit_rate": "hit rate",
    "mrr": "MRR",
    "ndcg": "nDCG",
    "map": "MAP",
    "rouge_l": "ROUGE-L",
    "similarity": "semantic similarity",
    "schema_valid": "valid by schema",
    "agreement_teacher": "agreement with teacher",
    "agreement_human": "agreement with human",
    "joint_agreement_teacher": "joint agreement with teacher",
    "joint_agreement_human": "joint agreement with human",
    "closeness_teacher": "closeness to teacher",
    "closeness_human": "closeness to human",
    "consistent": "same in both orders",
    "conclusive": "verdict given",
    "execution_accuracy": "execution accuracy",
    "valid_sql": "valid SQL",
    "exact_match": "exact match",
    "latency": "latency (s)",
    "input_tokens": "input tokens",
    "output_tokens": "output tokens",
}
_QUANTITIES = frozenset({"latency", "cost", "input_tokens", "output_tokens"})
_MINUS = "\N{MINUS SIGN}"


def metric_label(metric: str) -> str:
    """Return a metric's usual spelling: `ndcg@10` is written nDCG@10."""
    name, at, cutoff = metric.partition("@")
    return f"{_LABELS.get(name, name)}{at}{cutoff}"


def is_quantity(metric: str) -> bool:
    """Say whether a metric is a number of seconds, tokens or money: less of it is better.

    All others are scores near 0 to 1, and more is better.
    """
    return metric in _QUANTITIES


def metric_value(metric: str, value: float, *, sign: bool = False) -> str:
    """Return a metric's value as `number` writes a score and `quantity` writes the others."""
    return (quantity if is_quantity(metric) else number)(value, sign=sign)


def quantity(value: float, *, sign: bool = False) -> str:
    """Return four significant digits, never in powers of ten: 0.0001234, 1.235 or 123,457."""
    if not math.isfinite(value):
        return "n/a"
    if value == 0:
        return "+0" if sign else "0"
    decimals = max(0, 3 - math.floor(math.log10(abs(value))))
    digits = f"{value:{'+' if sign else ''},.{decimals}f}"
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits).replace("-", _MINUS)


def number(value: float, *, sign: bool = False) -> str:
    """Return three decimals with a true minus sign; `sign` writes the plus too."""
    if not math.isfinite(value):
        return "n/a"
    rounded = round(value, 3) + 0.0  # never "-0.000"
    return f"{rounded:{'+' if sign else ''}.3f}".replace("-", _MINUS)


def p_value(value: float) -> str:
    """Return `p < 0.001`, or p with three decimals."""
    if not math.isfinite(value):
        return "p n/a"
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def listed(items: Sequence[str]) -> str:
    """Return `a, b and c`."""
    return " and ".join(part for part in (", ".join(items[:-1]), *items[-1:]) if part)


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """Return `1 query` or `1,234 queries`."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def printable(text: str) -> str:
    """Return the text with what no page or terminal may hold made harmless.

    White space becomes a plain space; other control characters, halves of surrogate pairs
    and the codes that turn the direction of text become U+FFFD.
    """
    return "".join(map(_printable, text))


def _printable(char: str) -> str:
    if char.isspace():
        return " "
    if unicodedata.category(char) in ("Cc", "Cs") or char in "\u202a\u202b\u202c\u202d\u202e":
        return "\N{REPLACEMENT CHARACTER}"
    return char


def excerpt(text: str, length: int = 360) -> str:
    """Return the printable beginning of a text, cut between words where it is longer."""
    words = " ".join(printable(text).split())
    if len(words) <= length:
        return words
    cut = words[: length + 1]
    start = cut.rfind(" ")
    # A text without spaces, as in Chinese, is cut anywhere.
    return (cut[:start] if start > length // 2 else cut[:length]).rstrip() + " …"
