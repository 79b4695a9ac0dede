"""Split text into sentences without NLTK.

LlamaIndex's `SentenceSplitter` reads NLTK's sentence model from inside its own package, and
today's NLTK refuses to open a file with several hard links, which is what uv installs.
"""

from __future__ import annotations

import re

# Up to the end mark and the space behind it; in scripts without spaces, the mark is enough.
_SENTENCE = re.compile(
    r".+?(?:[.!?\u061f\u0964][\"'\u201d\u2019)\]]*\s+|[\u3002\uff01\uff1f]\s*|\n\s*\n\s*|\Z)", re.S
)


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text with the space behind each: joined, they are the text."""
    return _SENTENCE.findall(text)
