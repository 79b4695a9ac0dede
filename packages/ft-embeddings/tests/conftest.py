from __future__ import annotations

from pathlib import Path

import model_assets
import pytest

from ft_core.datasets import EmbeddingQAFinetuneDataset

PLACES = ["harbour", "tower", "garden", "station", "market", "library", "bridge", "museum"]
THINGS = {
    "opens": "gates are unlocked by the keeper at dawn",
    "costs": "ticket price is four coins for adults",
    "closes": "doors are barred when the bell rings at dusk",
}


def small_dataset(*, question: str = "when does the {place} {thing}") -> EmbeddingQAFinetuneDataset:
    """24 documents, one question each; the question shares one word with its document."""
    corpus, queries, relevant = {}, {}, {}
    for place in PLACES:
        for thing, fact in THINGS.items():
            key = f"{place}-{thing}"
            corpus[key] = f"at the {place} the {fact}"
            queries[f"q-{key}"] = question.format(place=place, thing=thing)
            relevant[f"q-{key}"] = [key]
    return EmbeddingQAFinetuneDataset(queries=queries, corpus=corpus, relevant_docs=relevant)


@pytest.fixture(scope="session")
def dataset() -> EmbeddingQAFinetuneDataset:
    return small_dataset()


@pytest.fixture(scope="session")
def heldout() -> EmbeddingQAFinetuneDataset:
    return small_dataset(question="the {place} {thing} when")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of an untrained two-layer encoder that knows the words of `small_dataset`."""
    data = small_dataset()
    texts = [*data.corpus.values(), *data.queries.values()]
    return model_assets.tiny_sentence_transformer(Path(tmp_path_factory.mktemp("tiny")), texts)
