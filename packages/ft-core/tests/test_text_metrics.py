"""ROUGE-L against the `rouge-score` package, and how long it takes."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from ft_core.metrics import rouge_l

SCORER = RougeScorer(["rougeL"], use_stemmer=False)
# Few words, so that texts share some; what is no word; and letters whose lower case is ASCII.
PIECES = ["the", "cat", "Sat", "on", "mat2", " ", "\n", ", ", "-", "é", "数", "K", "İ", "_"]
texts = st.lists(st.sampled_from(PIECES), max_size=30).map("".join) | st.text()


@given(texts, texts)
def test_the_value_is_rouge_scores(prediction: str, reference: str) -> None:
    expected = SCORER.score(reference, prediction)["rougeL"].fmeasure
    assert rouge_l(prediction, reference) == pytest.approx(expected, abs=1e-12)


def test_long_texts_as_rouge_score_has_them() -> None:
    rng = random.Random(1)
    a, b = (" ".join(rng.choices("abcdefghij", k=300)) for _ in range(2))
    assert rouge_l(a, b) == pytest.approx(SCORER.score(b, a)["rougeL"].fmeasure, abs=1e-12)


def test_by_hand() -> None:
    # Lin 2004, section 3.1: "police ... the gunman" keeps the order of three words of four.
    assert rouge_l("police kill the gunman", "police killed the gunman") == 0.75
    assert rouge_l("the gunman kill police", "police killed the gunman") == 0.5
    assert rouge_l("The cat.", "the CAT!") == 1
    assert rouge_l("", "a") == rouge_l("a", "") == rouge_l("", "") == rouge_l("数", "数") == 0


def test_two_thousand_words_take_no_time() -> None:
    rng = random.Random(0)
    a, b = (" ".join(str(rng.randrange(500)) for _ in range(2000)) for _ in range(2))
    start = time.perf_counter()
    for _ in range(10):
        rouge_l(a, b)
    # About 2 ms a pair; a table in Python takes a thousand times as long.
    assert time.perf_counter() - start < 1
