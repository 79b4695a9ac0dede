"""`PairScorer`: sentence-transformers' scores, in batches that pad little and fit in memory."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ft_core.errors import ArgumentError, FTError
from ft_crossencoder.passages import split_passages
from ft_crossencoder.scoring import PairScorer, batches, fused

QUERY = "when does the harbour open"


def cost(parts, lengths):
    return sum(len(part) * max(lengths[i] for i in part) for part in parts)


def test_the_scores_are_those_of_predict(cross_encoder, folder, pairs):
    expected = cross_encoder.predict(pairs)
    assert np.ptp(expected) > 0.05  # else equality says nothing
    for model in (cross_encoder, folder):
        for max_tokens in (1, 300, 100_000):
            scores, logits = PairScorer(model, max_tokens=max_tokens).score(pairs)
            np.testing.assert_allclose(scores, expected, atol=1e-5)
            np.testing.assert_allclose(1 / (1 + np.exp(-np.array(logits))), expected, atol=1e-5)


def test_in_passages_the_best_ones_score_is_the_texts(folder, all_texts):
    whole, queries = PairScorer(folder), (QUERY, "ticket price")
    pairs = [(query, text) for query in queries for text in all_texts[:30]]
    found = PairScorer(folder, passage_tokens=20, max_tokens=300).score(pairs)
    cut = dict(zip(all_texts, split_passages(whole.model.tokenizer, all_texts, 20), strict=True))
    alone = [[whole.score([(q, passage)]) for passage in cut[text]] for q, text in pairs]
    for kind in ("scores", "logits"):
        expected = [max(getattr(one, kind)[0] for one in passages) for passages in alone]
        np.testing.assert_allclose(getattr(found, kind), expected, atol=1e-5)
    assert max(map(len, alone)) > 5
    assert min(map(len, alone)) == 1
    assert PairScorer(folder, passage_tokens=20).score([]) == ([], [])


def test_bf16_scores_are_close_and_leave_no_trace(cross_encoder, pairs):
    expected = cross_encoder.predict(pairs)
    scores = PairScorer(cross_encoder, precision="bf16").score(pairs).scores
    assert 0 < np.abs(scores - expected).max() < 0.05
    assert np.corrcoef(scores, expected)[0, 1] > 0.999
    np.testing.assert_array_equal(cross_encoder.predict(pairs), expected)


def test_no_pairs_have_no_scores(folder):
    assert PairScorer(folder).score([]) == ([], [])


def test_the_batches_that_are_computed_are_bounded(cross_encoder, monkeypatch, pairs):
    seen = []
    forward = cross_encoder.model.forward

    def spy(*args, **kwargs):
        seen.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(cross_encoder.model, "forward", spy)
    PairScorer(cross_encoder, max_tokens=400).score(pairs)
    assert sum(rows for rows, _ in seen) == len(pairs)
    assert max(rows * tokens for rows, tokens in seen) <= 400
    assert max(rows for rows, _ in seen) > 1


@given(
    st.lists(st.integers(1, 512), min_size=1, max_size=80),
    st.integers(1, 4000),
)
def test_every_item_is_in_one_batch_within_the_bound(lengths, max_tokens):
    parts = batches(lengths, max_tokens)
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or len(part) * max(lengths[i] for i in part) <= max_tokens


def test_batches_pad_less_than_one_batch_and_do_not_split_equals():
    lengths = [10] * 20 + [500] * 3
    parts = batches(lengths, 100_000)
    assert cost(parts, lengths) == sum(lengths)
    assert sorted(len(part) for part in parts) == [3, 20]
    assert [max(lengths[i] for i in part) for part in parts] == [500, 10]  # the longest first


def test_a_shorter_window_cuts_and_leaves_the_model_as_it_was(folder, cross_encoder):
    long = (QUERY, "harbour " * 100)
    before = cross_encoder.predict([long])
    scorer = PairScorer(cross_encoder, max_length=20)
    assert scorer.lengths([long]) == [20]
    assert abs(scorer.score([long]).scores[0] - before[0]) > 1e-4
    np.testing.assert_array_equal(cross_encoder.predict([long]), before)
    # More than the model reads is what the model reads.
    assert PairScorer(folder, max_length=100_000).max_length == 128


def test_quantised_scores_are_close_and_the_callers_model_stays(cross_encoder, pairs):
    expected = cross_encoder.predict(pairs)
    scorer = PairScorer(cross_encoder, quantize=True)
    scores = np.array(scorer.score(pairs).scores)
    kinds = {type(module).__module__ for module in scorer.model.modules()}
    assert any("quantized" in kind for kind in kinds)
    assert np.corrcoef(scores, expected)[0, 1] > 0.8
    assert np.abs(scores - expected).max() > 0
    np.testing.assert_array_equal(cross_encoder.predict(pairs), expected)


def test_threads_get_their_own_scores(folder, pairs):
    scorer = PairScorer(folder, max_tokens=500)
    wanted = scorer.score(pairs).scores
    with ThreadPoolExecutor(8) as threads:
        parts = list(threads.map(lambda pair: scorer.score([pair]).scores[0], pairs))
    np.testing.assert_allclose(parts, wanted, atol=1e-5)


def test_a_copy_and_a_pickle_score_too(folder, pairs):
    scorer = PairScorer(folder)
    for other in (copy.deepcopy(scorer), pickle.loads(pickle.dumps(scorer))):
        np.testing.assert_allclose(
            other.score(pairs[:3]).scores, scorer.score(pairs[:3]).scores, atol=1e-6
        )


def test_fusion_standardises_both_and_a_missing_score_is_the_mean():
    result = fused([10.0, 30.0, 20.0], [0.2, 0.1, None], 0.5)
    cross = np.array([-1.0, 1.0, 0.0]) * np.sqrt(1.5)
    np.testing.assert_allclose(result, 0.5 * cross + 0.5 * np.array([1.0, -1.0, 0.0]))
    np.testing.assert_allclose(fused([1.0, 2.0], [5.0, 4.0], 1.0), [1.0, -1.0])
    np.testing.assert_allclose(fused([1.0, 2.0], [None, None], 0.5), [-0.5, 0.5])
    np.testing.assert_allclose(fused([1.0, 1.0], [3.0, 3.0], 0.5), [0.0, 0.0])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_tokens": 0}, "max_tokens: must be at least 1"),
        ({"max_length": -1}, "max_length: must be at least 1"),
        ({"passage_tokens": 0}, "passage_tokens: must be at least 1"),
        ({"precision": "fp8"}, 'precision: is "fp32" or "bf16", not'),
        ({"precision": "bf16", "quantize": True}, "precision: is for the backend"),
        ({"precision": "bf16", "backend": "onnx"}, "precision: is for the backend"),
        ({"backend": "jax"}, "backend: is"),
        ({"device": "cuda", "quantize": True}, 'quantize: is for device="cpu"'),
    ],
)
def test_bad_settings_are_named(folder, settings, match):
    with pytest.raises(ArgumentError, match=match):
        PairScorer(folder, **settings)


def test_a_model_that_is_none_is_named(tmp_path, folder):
    with pytest.raises(ArgumentError, match=r"model: .*nowhere: cannot be loaded"):
        PairScorer(str(tmp_path / "nowhere"))
    from sentence_transformers import CrossEncoder

    with pytest.raises(ArgumentError, match="model: gives 3 scores a pair"):
        PairScorer(CrossEncoder(folder, num_labels=3, model_kwargs=RESIZED))


RESIZED = {"ignore_mismatched_sizes": True}


def test_a_score_that_is_not_finite_is_an_error_that_names_the_pair(cross_encoder, pairs):
    broken = copy.deepcopy(cross_encoder)
    with torch.no_grad():
        broken.model.classifier.bias.fill_(float("nan"))
    with pytest.raises(FTError, match=r"'when does the harbour open' and '0 .* is nan"):
        PairScorer(broken).score(pairs)
