from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from ft_core.datasets import EmbeddingQAFinetuneDataset

WORDS = [
    "anchor", "basket", "candle", "dragon", "engine", "falcon", "garden", "hammer", "island",
    "jacket", "kettle", "ladder", "mirror", "needle", "orchard", "pillow", "quarry", "ribbon",
]  # fmt: skip

Dataset = EmbeddingQAFinetuneDataset
MakeDataset = Callable[..., Dataset]


def foreign(word: str) -> str:
    """Return what a question calls a thing: no word of any document."""
    return word[::-1] + "u"


def translated(start: int = 0, stop: int = 60, *, documents: int = 90, shared: int = 0) -> Dataset:
    """Questions in another language than documents: chance for a bag of words, easy to learn.

    The corpus is always the same; the questions are those about its documents start to stop.
    Each has `shared` words of its document as they are.
    """
    fixed = random.Random(0)
    corpus: dict[str, str] = {}
    while len(corpus) < documents:
        words = sorted(fixed.sample(WORDS, 3))
        corpus["-".join(words)] = " ".join(words)

    def question(words: list[str]) -> str:
        return " ".join([*words[:shared], *map(foreign, words[shared:])])

    asked = list(corpus)[start:stop]
    return Dataset(
        queries={f"q-{key}": question(corpus[key].split()) for key in asked},
        corpus=corpus,
        relevant_docs={f"q-{key}": [key] for key in asked},
    )


@pytest.fixture(scope="session")
def make_dataset() -> MakeDataset:
    return translated


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    return translated()


@pytest.fixture(scope="session")
def heldout() -> Dataset:
    return translated(60, 90)


@pytest.fixture(scope="session")
def perfect() -> Dataset:
    """Questions that are their documents in other order: nothing can be better than that."""
    data = translated(0, 30)
    queries = {
        query: " ".join(reversed(data.corpus[documents[0]].split()))
        for query, documents in data.relevant_docs.items()
    }
    return Dataset(queries=queries, corpus=data.corpus, relevant_docs=data.relevant_docs)


@pytest.fixture(scope="session")
def related() -> Dataset:
    """As `dataset`, for an index: its vectors have to show that they are of the model."""
    return translated(shared=1)


@pytest.fixture(scope="session")
def related_heldout() -> Dataset:
    return translated(60, 90, shared=1)
