"""`split_passages`: long texts in overlapping pieces, of which none is too long or lost."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ft_core.errors import ArgumentError
from ft_crossencoder import passages
from ft_crossencoder.passages import _spans, split_passages, token_counts


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_a_text_that_fits_is_its_own_passage_to_the_letter(tokenizer):
    text = "  Harbour\tgates \u200b opens  "
    assert split_passages(tokenizer, [text], 3) == [[text]]
    assert split_passages(tokenizer, ["harbour gates opens late"], 3)[0] != [text]


def test_passages_are_equally_long_and_what_stands_on_a_border_stands_whole_in_one(tokenizer):
    words = ["harbour", "gates", "bell", "dusk", "fee"]
    words = [f"{words[number % 5]} {number}" for number in range(37)]
    (parts,) = split_passages(tokenizer, [" ".join(words)], 40)
    counts = token_counts(tokenizer, parts)
    assert len(parts) > 2
    assert max(counts) == min(counts) == 40
    assert parts[0].startswith("harbour 0 ")
    assert parts[-1].endswith("36")
    # Half of a quarter: every run of so many tokens is in some passage.
    runs = [" ".join(words[start : start + 2]) for start in range(len(words) - 1)]
    assert all(any(run in part for part in parts) for run in runs)


@settings(deadline=None, max_examples=50)
@given(st.integers(4, 60), st.integers(1, 500))
def test_every_token_is_in_a_passage_and_a_quarter_is_repeated(tokens, more):
    length = tokens + more
    spans = _spans([(place, place + 1) for place in range(length)], tokens)
    assert spans[0][0] == 0
    assert spans[-1][1] == length
    assert {end - start for start, end in spans} == {tokens}
    for (start, end), (following, _) in pairwise(spans):
        assert start < following <= end
        assert end - following >= tokens / 4 - 1  # the starts are rounded


def test_unicode_and_control_characters_are_cut_between_characters(tokenizer):
    text = "\x00\x1b[31m Straße 東京 \U0001f389\U0001f3fd e\u0301 \u202e harbour " * 20
    (parts,) = split_passages(tokenizer, [text], 10)
    assert len(parts) > 10
    assert all(part and part in text for part in parts)
    assert {character for part in parts for character in part} >= set("Straße東京\U0001f389")


def test_texts_are_tokenized_in_blocks_and_stay_in_order(tokenizer, monkeypatch):
    texts = [f"{number} " + "harbour gates " * (number % 7) for number in range(50)]
    expected = split_passages(tokenizer, texts, 5), token_counts(tokenizer, texts)
    sizes = []

    def encoded(tokenizer, block, **settings):
        sizes.append(len(block))
        return real(tokenizer, block, **settings)

    real = passages._encoded
    monkeypatch.setattr(passages, "_encoded", encoded)
    monkeypatch.setattr(passages, "_BLOCK", 8)
    assert (split_passages(tokenizer, texts, 5), token_counts(tokenizer, texts)) == expected
    assert max(sizes) == 8
    assert sum(sizes) == 100


def test_no_texts_have_no_passages(tokenizer):
    assert split_passages(tokenizer, [], 5) == []


def test_a_slow_tokenizer_is_refused_with_what_to_type(tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(ArgumentError, match=r"passage_tokens: needs .* fast tokenizer; .* takes 0"):
        split_passages(Slow(), ["a"], 5)
