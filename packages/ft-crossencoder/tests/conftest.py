from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import model_assets
import pytest
from llama_index.core.schema import NodeWithScore, TextNode
from sentence_transformers import CrossEncoder

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
