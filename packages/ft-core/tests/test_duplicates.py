"""Near-duplicates against comparing every pair."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_core.datasets.duplicates import (
    connected_groups,
    exact_duplicates,
    fold,
    near_duplicate_pairs,
    near_duplicates,
    shingles,
    similarity,
)
from ft_core.errors import ArgumentError

# Few letters and much repetition, so that many pairs stand close to the threshold.
words = st.sampled_from(["ab", "abc", "abd", "bcd", "ß", "日本", "日", "¿?", "42", "e\u0301"])
sentences = st.lists(words, max_size=40).map(" ".join)
corpora = st.lists(sentences | st.text(max_size=12), max_size=14)
thresholds = st.sampled_from([0.05, 0.3, 0.5, 0.55, 2 / 3, 0.75, 0.8, 0.9, 1.0])


def set_of_shingles(text):
    framed = f" {fold(text)} ".ljust(3)
    return {framed[i : i + 3] for i in range(len(framed) - 2)}


def jaccard(a, b):
    a, b = set_of_shingles(a), set_of_shingles(b)
    return len(a & b) / len(a | b)


@settings(max_examples=300, deadline=None)
@given(corpora, thresholds)
def test_the_pairs_are_exactly_those_that_reach_the_threshold(texts, threshold):
    texts = {f"t{i}": text for i, text in enumerate(texts)}
    found = {
        frozenset((a, b)): score for a, b, score in near_duplicate_pairs(texts, threshold=threshold)
    }
    expected = {
        frozenset((a, b)): jaccard(texts[a], texts[b])
        for a, b in itertools.combinations(texts, 2)
        if jaccard(texts[a], texts[b]) >= threshold
    }
    assert found == expected


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_long_texts_of_different_lengths_lose_no_pair(threshold):
    # Texts of several hundred shingles need several matches before they are compared.
    rng = np.random.default_rng(7)
    vocabulary = ["".join(rng.choice(list("abcdefgh"), rng.integers(2, 9))) for _ in range(400)]
    texts = {}
    for family in range(12):
        base = list(rng.choice(vocabulary, rng.integers(5, 200)))
        for copy in range(6):
            kept = [word for word in base if rng.random() > 0.08 * copy]
            texts[f"{family}-{copy}"] = " ".join(kept + list(rng.choice(vocabulary, copy)))
    found = {frozenset(pair[:2]) for pair in near_duplicate_pairs(texts, threshold=threshold)}
    expected = {
        frozenset(pair)
        for pair in itertools.combinations(texts, 2)
        if jaccard(texts[pair[0]], texts[pair[1]]) >= threshold
    }
    assert expected
    assert found == expected


def test_a_pair_that_just_reaches_the_threshold_is_found():
    # 14 of 25 shingles: 0.56 * 25 is a little above 14 in floating point.
    texts = {"long": "abcdefghijklmn opqrstuvwx", "start": "abcdefghijklmn"}
    assert list(near_duplicate_pairs(texts, threshold=0.56)) == [("start", "long", 0.56)]


@given(st.text(), st.text())
def test_similarity_is_the_jaccard_of_the_shingles(a, b):
    assert similarity(a, b) == similarity(b, a) == jaccard(a, b)
    assert similarity(a, a) == 1
    assert len(shingles(a)) == len(set_of_shingles(a))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("What is  it?", "what is it"),
        ("\uff21\uff22\uff23\u3000\uff11\uff12", "abc 12"),
        ("Straße", "STRASSE"),
        ("caf\u00e9", "cafe\u0301"),
        ("zero\u200bwidth", "zerowidth"),
        ("\u201cquoted\u201d \u2013 text\u2026", '"quoted" - text...'),
        ("日本語。", "日本語"),
    ],
)
def test_what_folding_evens_out(a, b):
    assert exact_duplicates({"a": a, "b": b, "c": "other"}) == [["a", "b"]]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("C#", "C"),
        ("5 %", "5"),
        ("3.5", "35"),
        ("?", "!"),
        ("कि", "का"),
        ("not", "now"),
        ("$5", "€5"),
    ],
)
def test_what_folding_keeps_apart(a, b):
    assert exact_duplicates({"a": a, "b": b}) == []


def test_near_duplicates_are_groups_in_the_order_of_the_texts():
    texts = {
        "z": "What was the total revenue of Lyft in the year 2021?",
        "other": "Who audits the accounts?",
        "a": "What was the total revenue of Lyft in the year 2020?",
        "m": "what was the TOTAL revenue, of Lyft, in the year 2021",
    }
    assert near_duplicates(texts) == [["z", "a", "m"]]
    assert near_duplicates(texts, threshold=1.0) == [["z", "m"]]
    assert near_duplicates({}) == near_duplicates({"one": "text"}) == []


def test_near_duplicates_need_no_spaces():
    texts = {
        "a": "この四半期の売上高はいくらでしたか、教えてください",
        "b": "この四半期の売上高はいくらですか、教えてください",
        "c": "昨年の従業員数は何人でしたか",
    }
    assert near_duplicates(texts, threshold=0.7) == [["a", "b"]]


def test_half_a_surrogate_pair_is_no_crash():
    assert similarity("a\ud800b", "a\ud800b") == 1


@pytest.mark.parametrize("threshold", [0, -1, 1.01, float("nan")])
def test_a_bad_threshold_is_named(threshold):
    with pytest.raises(ArgumentError, match="threshold: is above 0"):
        near_duplicates({"a": "x", "b": "y"}, threshold=threshold)


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=20))
def test_connected_groups_are_the_components(links):
    groups = connected_groups(range(13), links)
    assert sorted(key for group in groups for key in group) == list(range(13))
    of = {key: number for number, group in enumerate(groups) for key in group}
    assert all(of[a] == of[b] for a, b in links)
    # Each group hangs together: from its first member all are reached.
    for group in groups:
        reached, before = {group[0]}, 0
        while len(reached) > before:
            before = len(reached)
            reached |= {x for link in links if reached & set(link) for x in link}
        assert reached >= set(group)
