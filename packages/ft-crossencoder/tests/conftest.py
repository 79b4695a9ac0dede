from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import model_assets
import pytest
import testkit
from llama_index.core.schema import NodeWithScore, TextNode
from sentence_transformers import CrossEncoder
from transformers import AutoModel, AutoTokenizer

from ft_core.datasets import (
    EmbeddingQAFinetuneDataset,
    RerankDataset,
    RerankDocument,
    RerankExample,
)

WORD_TEXT = """
    harbour tower garden station market library bridge museum opens closes costs gates ticket
    price four coins adults doors bell dusk dawn keeper late fee week card lost euros river
"""
WORDS = WORD_TEXT.split()


def texts_of_all_lengths(count: int = 60, longest: int = 150) -> list[str]:
    """Texts of one word up to more than the model reads."""
    rng = random.Random(0)
    return [
        f"{number} " + " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))
        for number in range(count)
    ]


def scored_nodes(texts: list[str]) -> list[NodeWithScore]:
    return [
        NodeWithScore(node=TextNode(id_=f"n{i}", text=text), score=1 - i / len(texts))
        for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="session")
def all_texts() -> list[str]:
    return texts_of_all_lengths()


@pytest.fixture(scope="session")
def make_nodes() -> Callable[[list[str]], list[NodeWithScore]]:
    return scored_nodes


@pytest.fixture(scope="session")
def pairs(all_texts: list[str]) -> list[tuple[str, str]]:
    return [("when does the harbour open", text) for text in all_texts]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of an untrained two-layer cross-encoder that knows `WORDS` and reads 128 tokens."""
    target = Path(tmp_path_factory.mktemp("tiny-cross-encoder"))
    return model_assets.tiny_cross_encoder(target, WORDS)


@pytest.fixture(scope="session")
def cross_encoder(folder: str) -> CrossEncoder:
    return CrossEncoder(folder, device="cpu")


# --- A small task to learn ----------------------------------------------------------------------

SEEN = ["harbour", "tower", "garden", "station", "market", "library", "bridge", "museum"]
UNSEEN = ["castle", "theatre", "school", "bakery"]
FACTS = {
    "opens": "the gates are unlocked at dawn",
    "costs": "the ticket price is four coins",
    "closes": "the doors are barred at dusk",
}


def questions(places: list[str]) -> RerankDataset:
    """Of each place three questions, each with the same three candidates in the same order.

    Which fact answers which word has to be learned; it holds for other places, too.
    """
    return RerankDataset(
        examples=[
            RerankExample(
                query=f"{place} {thing}",
                documents=[
                    RerankDocument(
                        text=f"{fact} by the {place}",
                        label=float(other == thing),
                        retrieval_score=0.5 - rank / 10,
                        teacher_score=3.0 if other == thing else -1.0,
                    )
                    for rank, (other, fact) in enumerate(FACTS.items())
                ],
            )
            for place in places
            for thing in FACTS
        ]
    )


def without(dataset: RerankDataset, *fields: str) -> RerankDataset:
    """Return the dataset with some numbers of its documents taken out."""
    unknown = dict.fromkeys(fields)
    return RerankDataset(
        examples=[
            example.model_copy(
                update={"documents": [d.model_copy(update=unknown) for d in example.documents]}
            )
            for example in dataset
        ]
    )


@dataclass(frozen=True)
class Task:
    """Data to train and test on, and untrained models that know its words."""

    train: RerankDataset
    heldout: RerankDataset
    """Questions of places that are not in `train`."""
    qa: EmbeddingQAFinetuneDataset
    """A question shares two words with its document, and one with others."""
    scorer: str
    """Folder of a cross-encoder that reads 512 tokens."""
    encoder: str
    """Folder of an encoder without a head, as sentence-transformers saves it."""
    plain: str
    """Folder of an encoder without a head, as transformers saves it; with wider weights."""
    without: Callable[..., RerankDataset] = field(default=without)


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    train, heldout = questions(SEEN), questions(UNSEEN)
    train, heldout = (without(part, "teacher_score") for part in (train, heldout))
    corpus = {
        f"{place}-{thing}": f"{place} {thing} {fact}"
        for place in SEEN
        for thing, fact in FACTS.items()
    }
    qa = EmbeddingQAFinetuneDataset(
        queries={f"q-{key}": f"when {key.replace('-', ' ')}" for key in corpus},
        corpus=corpus,
        relevant_docs={f"q-{key}": [key] for key in corpus},
    )
    texts = [text for e in [*train, *heldout] for text in (e.query, *(d.text for d in e.documents))]
    folder = Path(tmp_path_factory.mktemp("task"))
    scorer = model_assets.tiny_cross_encoder(folder / "scorer", texts, window=512, spread=0.1)
    for part in (AutoModel, AutoTokenizer):
        part.from_pretrained(scorer).save_pretrained(folder / "plain")
    encoder = model_assets.tiny_sentence_transformer(folder / "encoder", texts)
    return Task(train, heldout, qa, scorer, encoder, str(folder / "plain"))


@pytest.fixture(scope="session")
def scored() -> RerankDataset:
    """What `task.train` holds, with a teacher's scores in place of labels."""
    return without(questions(SEEN), "label")


def prices(places: list[str]) -> RerankDataset:
    """The price is what answers every question: a few steps learn it with any loss."""
    return RerankDataset(
        examples=[
            example.model_copy(
                update={
                    "documents": [
                        d.model_copy(
                            update={
                                "label": float("price" in d.text),
                                "teacher_score": 3.0 if "price" in d.text else -1.0,
                            }
                        )
                        for d in example.documents
                    ]
                }
            )
            for example in questions(places)
        ]
    )


@pytest.fixture(scope="session")
def easy() -> tuple[RerankDataset, RerankDataset]:
    """An easier task with labels and a teacher's scores, and its held-out part."""
    return prices(SEEN), prices(UNSEEN)


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    with testkit.one_thread():
        yield
