"""`backend="onnx"`: PyTorch's scores from ONNX Runtime, exported here, and 8-bit ones near them."""

import copy
import json
import logging
import pickle
import random
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import model_assets
import numpy as np
import pytest
import torch
import transformers
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from sentence_transformers import CrossEncoder

from ft_core.errors import ArgumentError, FTError, MissingExtraError
from ft_crossencoder import FinetunedReranker
from ft_crossencoder.scoring import PairScorer

WORDS = ["harbour", "tower", "garden", "station", "market", "library", "opens", "closes"]
SIZES = {
    "vocab_size": 800,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_labels": 1,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def scorer(folder):
    pytest.importorskip("onnxruntime", reason="needs ft-crossencoder[onnx]")
    return PairScorer(folder, backend="onnx")


def test_the_scores_are_those_of_torch(scorer, cross_encoder, pairs):
    expected = cross_encoder.predict(pairs)
    assert np.ptp(expected) > 0.05  # else equality says nothing
    scores, logits = scorer.score(pairs)
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    np.testing.assert_allclose(logits, PairScorer(cross_encoder).score(pairs).logits, atol=1e-4)
    for pair, score in zip(pairs[:5], expected, strict=False):  # one alone, in batches of one
        assert abs(scorer.score([pair]).scores[0] - score) < 1e-4


def test_a_model_given_as_an_object_stays_and_half_a_precision_is_computed_in_whole(
    cross_encoder, pairs
):
    pytest.importorskip("onnxruntime", reason="needs ft-crossencoder[onnx]")
    half = copy.deepcopy(cross_encoder).bfloat16()
    before = half.predict(pairs)
    scorer = PairScorer(half, backend="onnx")
    expected = copy.deepcopy(half).float().predict(pairs)
    np.testing.assert_allclose(scorer.score(pairs).scores, expected, atol=1e-4)
    assert not list(scorer.model.parameters())  # the weights are ONNX Runtime's alone
    assert next(half.parameters()).dtype == torch.bfloat16
    np.testing.assert_array_equal(half.predict(pairs), before)


def test_8_bit_scores_are_close_and_not_the_same(folder, scorer, pairs):
    expected = np.array(scorer.score(pairs).logits)
    logits = np.array(PairScorer(folder, backend="onnx", quantize=True).score(pairs).logits)
    assert np.corrcoef(logits, expected)[0, 1] > 0.9
    assert np.abs(logits - expected).max() > 1e-4


def test_cutting_passages_and_threads_are_as_with_torch(scorer, cross_encoder, pairs):
    settings = {"max_length": 40, "passage_tokens": 20, "max_tokens": 300}
    # What is inside a model no longer matters: that of the scorer is a `CrossEncoder` too.
    got = PairScorer(scorer.model, **settings).score(pairs).scores
    np.testing.assert_allclose(
        got, PairScorer(cross_encoder, **settings).score(pairs).scores, atol=1e-4
    )
    wanted = scorer.score(pairs).scores
    with ThreadPoolExecutor(8) as threads:
        parts = list(threads.map(lambda pair: scorer.score([pair]).scores[0], pairs))
    np.testing.assert_allclose(parts, wanted, atol=1e-4)


def test_a_copy_scores_and_a_pickle_says_what_to_do(scorer, pairs):
    copied = copy.deepcopy(scorer)
    assert copied.score(pairs[:3]) == scorer.score(pairs[:3])
    with pytest.raises(FTError, match=r"make the reranker with backend=.onnx. in the process"):
        pickle.dumps(scorer)


def test_the_reranker_sorts_as_with_torch(folder, scorer, pairs):
    nodes = [NodeWithScore(node=TextNode(text=text), score=0.5) for _, text in pairs]
    query = QueryBundle(pairs[0][0])
    ranked = [
        [item.node_id for item in reranker.postprocess_nodes(nodes, query)]
        for reranker in (FinetunedReranker(folder, 5), FinetunedReranker(folder, 5, backend="onnx"))
    ]
    assert ranked[0] == ranked[1]


def test_nothing_is_said_nor_left_behind(folder, tmp_path, monkeypatch, capfd, caplog):
    pytest.importorskip("onnxruntime", reason="needs ft-crossencoder[onnx]")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted(path.name for path in Path(folder).rglob("*"))
    model = CrossEncoder(folder, device="cpu")  # has its own bar for the weights
    capfd.readouterr()
    handlers, level = list(logging.getLogger().handlers), logging.getLogger("torch.onnx").level
    PairScorer(model, backend="onnx", quantize=True)
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.INFO] == []
    assert logging.getLogger().handlers == handlers
    assert logging.getLogger("torch.onnx").level == level
    assert list(tmp_path.iterdir()) == []
    assert sorted(path.name for path in Path(folder).rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["XLMRoberta", "DistilBert", "ModernBert", "DebertaV2", "Bert"])
def test_other_encoders_are_exported_too(kind, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs ft-crossencoder[onnx]")
    path = encoder_of_kind(kind, tmp_path)
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 200))) for _ in range(30)]
    pairs = [("the harbour opens", text) for text in texts]
    expected = PairScorer(path, device="cpu").score(pairs).logits
    assert np.ptp(expected) > 0.5
    scorer = PairScorer(path, backend="onnx")
    np.testing.assert_allclose(scorer.score(pairs).logits, expected, atol=1e-4)


def encoder_of_kind(kind: str, folder: Path) -> str:
    """Save an untrained cross-encoder of another architecture, which reads 160 tokens."""
    # RoBERTa's positions begin behind its padding token's.
    special: dict[str, dict[str, object]] = {
        "XLMRoberta": {"max_position_embeddings": 162},
        "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
        "ModernBert": {
            "local_attention": 16,
            "global_attn_every_n_layers": 2,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "cls_token_id": 2,
            "sep_token_id": 3,
        },
        "DebertaV2": {
            "relative_attention": True,
            "position_buckets": 32,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    }
    model_assets.tiny_cross_encoder(folder, WORDS, window=160)  # for its tokenizer
    settings = {"max_position_embeddings": 160, **SIZES, **special.get(kind, {})}
    config = getattr(transformers, f"{kind}Config")(**settings)
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForSequenceClassification")(config).save_pretrained(folder)
    if kind == "Bert":  # as hubs have it, with the types of tokens
        path = folder / "tokenizer_config.json"
        names = ["input_ids", "token_type_ids", "attention_mask"]
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_input_names": names}))
    return str(folder)


def test_a_model_that_cannot_be_exported_is_named(cross_encoder, monkeypatch):
    pytest.importorskip("onnxruntime", reason="needs ft-crossencoder[onnx]")
    stubborn = copy.deepcopy(cross_encoder)
    forward = stubborn.model.forward

    def by_content(**features):
        if (features["input_ids"] > 3).float().mean().item() > 0.5:
            return forward(**features)
        return forward(**features)

    monkeypatch.setattr(stubborn.model, "forward", by_content)
    with pytest.raises(ArgumentError, match=r"backend: BertFor.* cannot be exported to ONNX: .*"):
        PairScorer(stubborn, backend="onnx")


def test_an_export_that_scores_differently_is_refused(cross_encoder, monkeypatch):
    pytest.importorskip("onnxruntime", reason="needs ft-crossencoder[onnx]")
    fickle = copy.deepcopy(cross_encoder)
    forward = fickle.model.forward

    def by_exporter(**features):
        result = forward(**features)
        result.logits = result.logits + torch.compiler.is_exporting()
        return result

    monkeypatch.setattr(fickle.model, "forward", by_exporter)
    with pytest.raises(ArgumentError, match=r"backend: .* other scores in ONNX Runtime than"):
        PairScorer(fickle, backend="onnx")


def test_a_score_that_is_not_finite_names_the_pair(cross_encoder, pairs):
    pytest.importorskip("onnxruntime", reason="needs ft-crossencoder[onnx]")
    broken = copy.deepcopy(cross_encoder)
    with torch.no_grad():
        broken.model.classifier.bias.fill_(float("nan"))
    with pytest.raises(FTError, match=r"'when does the harbour open' and '0 .* is nan"):
        PairScorer(broken, backend="onnx").score(pairs)


def test_only_the_cpu_computes(folder):
    pytest.importorskip("onnxruntime", reason="needs ft-crossencoder[onnx]")
    with pytest.raises(ArgumentError, match='backend: "onnx" is for device="cpu", not \'cuda\''):
        PairScorer(folder, backend="onnx", device="cuda")


@pytest.mark.parametrize("package", ["onnxruntime", "onnx", "onnxscript"])
def test_a_missing_package_names_the_command(monkeypatch, package):
    for name in ("onnxruntime", "onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ft-crossencoder\[onnx\]'"):
        PairScorer("no/such-model", backend="onnx")  # before the model is looked for
