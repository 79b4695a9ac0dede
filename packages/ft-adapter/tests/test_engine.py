"""The engine from end to end, on real vectors of a bag of words."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from model_assets import HashingEmbedding
from safetensors.torch import load_file
from torch import nn

from ft_adapter import EmbeddingAdapterFinetuneEngine
from ft_adapter.adapters import BaseAdapter, LinearLayer, ResidualNN, TwoLayerNN
from ft_adapter.evaluation import evaluate_adapters
from ft_adapter.saved import PROBE_TEXT, load_adapter, save_adapter
from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.errors import ArgumentError, ArtifactError, DatasetError, TrainingError

Dataset = EmbeddingQAFinetuneDataset
MakeDataset = Callable[..., Dataset]
Engine = Callable[..., EmbeddingAdapterFinetuneEngine]

QUICK: dict[str, Any] = {
    "epochs": 6, "batch_size": 16, "learning_rate": 1e-2, "identity_pull": 0.0,
    "show_progress": False,
}  # fmt: skip
DIM = 32


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """Make an engine that learns quickly; its folders are `out` and `cache`."""

    def make(dataset: Any, model: Any = None, **arguments: Any) -> EmbeddingAdapterFinetuneEngine:
        folders = {"model_output_path": tmp_path / "out", "cache_dir": tmp_path / "cache"}
        return EmbeddingAdapterFinetuneEngine(
            dataset, model or HashingEmbedding(), **{**QUICK, **folders, **arguments}
        )

    return make


class Faulty(HashingEmbedding):
    """Fails, in the given way, on texts that hold a word."""

    word: str = ""
    how: str = "raises"

    _healed: bool = PrivateAttr(default=False)

    def vector(self, text: str) -> Any:
        vector = super().vector(text)
        if self._healed or self.word not in text:
            return vector
        match self.how:
            case "raises":
                raise ConnectionError("the line is dead")
            case "nan":
                return [*vector[:-1], float("nan")]
            case "longer":
                return [*vector, 0.0]
            case "none":
                return None
            case _:
                return []


class Doubled(HashingEmbedding):
    """Gives half precision."""

    def vector(self, text: str) -> Any:
        return np.asarray(super().vector(text), dtype=np.float16)


def index_of(dataset: Dataset, model: HashingEmbedding, **given: Any) -> VectorStoreIndex:
    nodes = [
        TextNode(id_=key, text=text, **given.get("node", {}))
        for key, text in dataset.corpus.items()
    ]
    return VectorStoreIndex(nodes, embed_model=model)


def ndcg(report: Any) -> list[float]:
    return [run.mean("ndcg@10") for run in report.runs]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter.safetensors")


# --- Training and what comes of it ------------------------------------------------------------


def test_training_improves_on_held_out_questions_and_the_adapter_works_in_an_index(
    engine: Engine, dataset: Dataset, heldout: Dataset, tmp_path: Path
) -> None:
    tuned = engine(dataset, val_dataset=heldout)
    report = tuned.finetune()
    base, after = ndcg(report)
    assert after > base + 0.4
    assert report.title.endswith("the adapter is kept")
    assert [run.name for run in report.runs] == ["identity", "adapter"]
    assert tuned.report is report

    index = index_of(dataset, HashingEmbedding())
    retriever = tuned.get_finetuned_retriever(index, similarity_top_k=1)
    hits = [
        retriever.retrieve(text)[0].node.node_id in heldout.relevant_docs[query]
        for query, text in heldout.queries.items()
    ]
    # What the report says is what the app gets.
    assert np.mean(hits) == pytest.approx(report.runs[1].mean("hit_rate@1"))
    again = evaluate_adapters(
        heldout, HashingEmbedding(), [tmp_path / "out"], cache_dir=tmp_path / "cache"
    )
    assert ndcg(again) == pytest.approx([base, after])


def test_without_validation_data_each_question_is_judged_by_a_fold_that_has_not_seen_it(
    engine: Engine, dataset: Dataset
) -> None:
    tuned = engine(dataset, folds=3)
    report = tuned.finetune()
    assert tuned.selection is not None
    assert tuned.selection.kept
    assert set(report.runs[0].rankings) == set(dataset.queries)
    assert set(report.runs[1].rankings) == set(dataset.queries)
    base, after = ndcg(report)
    assert after - base == pytest.approx(tuned.selection.gain)
    # The final training saw them all; it is better on them than folds can be.
    whole = evaluate_adapters(
        dataset, HashingEmbedding(), [tuned.model_output_path], cache_dir=tuned.cache_dir
    )
    assert ndcg(whole)[1] > after


def test_ft_json_says_what_was_trained_and_holds_no_secret(
    engine: Engine, dataset: Dataset, heldout: Dataset, tmp_path: Path
) -> None:
    class Keyed(HashingEmbedding):
        api_key: str = "sk-very-secret"

    tuned = engine(dataset, Keyed(), val_dataset=heldout, seed=7, bias=True)
    tuned.finetune()
    assert tuned.selection is not None
    manifest = json.loads((tmp_path / "out" / "ft.json").read_text())
    assert manifest["kind"] == "embedding-adapter"
    assert manifest["base_model"] == "hashing"
    assert manifest["data"] == {
        "train": dataset.content_hash, "validation": heldout.content_hash,
    }  # fmt: skip
    assert manifest["metrics"]["kept"] == "adapter"
    assert manifest["metrics"]["gain"] == pytest.approx(tuned.selection.gain)
    assert manifest["metrics"]["p_value"] == pytest.approx(tuned.selection.p_value)
    assert manifest["metrics"]["epochs"] == tuned.selection.epochs
    assert manifest["settings"]["seed"] == 7
    assert manifest["settings"]["bias"] is True
    assert manifest["settings"]["adapter_model"] == "linear"
    assert manifest["settings"]["documents"] == "dataset"
    assert {"python", "torch", "ft-adapter"} <= set(manifest["versions"])
    header = json.loads((tmp_path / "out" / "adapter.json").read_text())
    assert header["base"]["dimension"] == DIM
    assert header["identity"] is False
    text = "".join(
        path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()
    )
    assert "sk-very-secret" not in text
    assert next(iter(dataset.queries.values())) not in text  # nor any text
    assert str(tmp_path) not in (tmp_path / "out" / "ft.json").read_text()


@pytest.mark.parametrize("with_validation", [False, True])
def test_the_identity_is_kept_where_nothing_can_be_learned_and_said(
    engine: Engine, perfect: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    with_validation: bool,
) -> None:  # fmt: skip
    model = HashingEmbedding()
    tuned = engine(perfect, model, val_dataset=perfect if with_validation else None)
    with caplog.at_level(logging.WARNING, logger="ft_adapter"):
        report = tuned.finetune()
    assert tuned.selection is not None
    assert not tuned.selection.kept
    assert report.title.endswith("the identity is kept")
    assert ndcg(report)[0] == pytest.approx(1)
    assert "the identity is kept" in caplog.text
    assert json.loads((tmp_path / "out" / "ft.json").read_text())["metrics"]["kept"] == "identity"
    assert load_adapter(tmp_path / "out").identity

    adapted = tuned.get_finetuned_model()
    for text in perfect.queries.values():
        assert adapted.get_query_embedding(text) == model.get_query_embedding(text)
        assert adapted.get_text_embedding(text) == model.get_text_embedding(text)


def test_the_identity_is_kept_where_answers_are_random_too(
    engine: Engine, make_dataset: MakeDataset
) -> None:
    data = make_dataset(0, 60)
    answers = list(data.relevant_docs.values())
    moved = np.random.default_rng(0).permutation(len(answers))
    random = Dataset(
        queries={
            query: f"w{number * 7919 % 1009} w{number * 104729 % 997}"
            for number, query in enumerate(data.queries)
        },
        corpus=data.corpus,
        relevant_docs={query: answers[row] for query, row in zip(data.queries, moved, strict=True)},
    )
    tuned = engine(random)
    tuned.finetune()
    assert tuned.selection is not None
    assert not tuned.selection.kept


@pytest.mark.parametrize("adapter", ["linear", "low_rank", "residual", "two_layer"])
def test_each_adapter_by_name_trains_saves_and_comes_back(
    engine: Engine, dataset: Dataset, heldout: Dataset, adapter: str
) -> None:
    tuned = engine(
        dataset, adapter_model=adapter, val_dataset=heldout, epochs=20, learning_rate=2e-2
    )
    base, after = ndcg(tuned.finetune())
    assert after > base + 0.1
    text = next(iter(heldout.queries.values()))
    vector = tuned.get_finetuned_model().get_query_embedding(text)
    loaded = EmbeddingAdapterFinetuneEngine.load(tuned.model_output_path, HashingEmbedding())
    assert loaded.get_finetuned_model().get_query_embedding(text) == vector
    assert vector != HashingEmbedding().vector(text)


@pytest.mark.parametrize(
    ("loss", "negatives"),
    [("full_corpus", 0), ("in_batch", 0), ("hard_negatives", 0), ("hard_negatives", 8),
     ("margin", 0), ("margin", 8)],
)  # fmt: skip
def test_each_loss_trains(
    engine: Engine, dataset: Dataset, heldout: Dataset, loss: str, negatives: int
) -> None:
    tuned = engine(dataset, val_dataset=heldout, loss=loss, negatives=negatives, epochs=15)
    base, after = ndcg(tuned.finetune())
    assert after > base + 0.1


def test_given_negatives_are_used_and_unknown_ids_named(engine: Engine, dataset: Dataset) -> None:
    documents = list(dataset.corpus)
    given = dict.fromkeys(dataset.queries, documents[-10:])
    tuned = engine(dataset, loss="hard_negatives", negatives=given, epochs=1)
    tuned.finetune()
    others = engine(
        dataset, loss="hard_negatives", epochs=1,
        negatives=dict.fromkeys(dataset.queries, documents[-30:-20]),
    )  # fmt: skip
    others.finetune()
    assert tuned.selection is not None
    assert others.selection is not None
    assert tuned.selection.curve != others.selection.curve
    for negatives, message in (
        ({"nobody": documents[:1]}, "there is no query 'nobody'"),
        ({next(iter(dataset.queries)): ["nothing"]}, "there is no document 'nothing'"),
        ({next(iter(dataset.queries)): []}, "none was found for any question"),
    ):
        with pytest.raises(ArgumentError, match=f"negatives: {message}"):
            engine(dataset, loss="hard_negatives", negatives=negatives).finetune()


def test_both_sides_train_and_the_model_adapts_documents(
    engine: Engine, dataset: Dataset, heldout: Dataset, tmp_path: Path
) -> None:
    tuned = engine(
        dataset, adapter_model=LinearLayer(DIM, 24), sides="both", val_dataset=heldout,
        epochs=20, learning_rate=2e-2,
    )  # fmt: skip
    report = tuned.finetune()
    assert report.title.endswith("the adapter is kept")
    model = tuned.get_finetuned_model()
    assert model.transform_text
    index = VectorStoreIndex(
        [TextNode(id_=key, text=text) for key, text in heldout.corpus.items()], embed_model=model
    )
    retriever = index.as_retriever(similarity_top_k=1)
    hits = [
        retriever.retrieve(text)[0].node.node_id in heldout.relevant_docs[query]
        for query, text in heldout.queries.items()
    ]
    assert np.mean(hits) == pytest.approx(report.runs[1].mean("hit_rate@1"))
    assert len(model.get_text_embedding("anchor")) == 24
    with pytest.raises(ArgumentError):
        tuned.get_finetuned_retriever(index_of(dataset, HashingEmbedding()))


def test_seeds_decide_the_weights_and_the_apps_random_state_stays(
    engine: Engine, dataset: Dataset, heldout: Dataset, tmp_path: Path
) -> None:
    torch.manual_seed(123)
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        engine(
            dataset, adapter_model="residual", val_dataset=heldout, seed=seed, epochs=8,
            learning_rate=2e-2, significance=1.0, model_output_path=tmp_path / name,
        ).finetune()  # fmt: skip
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.manual_seed(123)
    assert np.random.get_state()[1].tolist() == numpy_before
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_patience_ends_training_early(engine: Engine, perfect: Dataset) -> None:
    tuned = engine(perfect, epochs=50, early_stopping_patience=3)
    tuned.finetune()
    assert tuned.selection is not None
    assert len(tuned.selection.curve) == 4  # nothing is ever better than the first


def test_checkpoints_are_adapters_of_their_step(
    engine: Engine, dataset: Dataset, heldout: Dataset, tmp_path: Path
) -> None:
    tuned = engine(
        dataset, val_dataset=heldout, model_checkpoint_path=tmp_path / "steps",
        checkpoint_save_steps=5,
    )  # fmt: skip
    tuned.finetune()
    assert tuned.selection is not None
    steps = 4 * tuned.selection.epochs  # 60 pairs by 16
    expected = {f"step_{step}" for step in range(5, steps + 1, 5)}
    assert {path.name for path in (tmp_path / "steps").iterdir()} == expected
    drift = [
        float((weights(tmp_path / "steps" / name)["linear.weight"] - torch.eye(DIM)).norm())
        for name in sorted(expected, key=lambda name: int(name[5:]))
    ]
    assert drift == sorted(drift)
    assert drift[0] < drift[-1]


def test_verbose_logs_each_epoch(
    engine: Engine, perfect: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="ft_adapter.engine"):
        engine(perfect, epochs=2, verbose=True).finetune()
    assert "epoch 1: held-out ndcg@10 +0.0000" in caplog.text
    assert "epoch 2:" in caplog.text


# --- Embedding once ---------------------------------------------------------------------------


class Asymmetric(HashingEmbedding):
    """Puts an instruction before each query, as many models do."""

    def _get_query_embedding(self, query: str) -> Any:
        super()._get_query_embedding(query)
        return self.vector(f"find what answers {query}")


@pytest.mark.parametrize("kind", [HashingEmbedding, Asymmetric])
@pytest.mark.parametrize("epochs", [1, 12])
def test_each_distinct_text_is_embedded_once_whatever_the_epochs(
    engine: Engine,
    make_dataset: MakeDataset,
    heldout: Dataset,
    epochs: int,
    kind: type[HashingEmbedding],
) -> None:
    data = make_dataset()
    corpus = {**data.corpus, "copy": next(iter(data.corpus.values()))}
    queries = {**data.queries, "copy": next(iter(data.queries.values()))}
    relevant = {**data.relevant_docs, "copy": next(iter(data.relevant_docs.values()))}
    data = Dataset(queries=queries, corpus=corpus, relevant_docs=relevant)
    model = kind(embed_batch_size=8)
    engine(data, model, val_dataset=heldout, epochs=epochs).finetune()
    questions = {*data.queries.values(), *heldout.queries.values()}
    texts, asked = {*data.corpus.values(), PROBE_TEXT}, {PROBE_TEXT}
    # Only a model that treats queries as texts gets them in batches.
    (asked if kind is Asymmetric else texts).update(questions)
    assert sorted(model.texts) == sorted(texts)
    assert sorted(model.queries) == sorted(asked)
    assert max(model.batches) == 8

    again = kind(embed_batch_size=8)
    engine(data, again, val_dataset=heldout, epochs=epochs, seed=3).finetune()
    assert (again.text_calls, again.query_calls) == (0, 0)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "the line is dead"),
        ("nan", "a NaN or an infinity"),
        ("longer", "a vector of length 33, not 32"),
        ("none", ""),
        ("empty", ""),
    ],
)
@pytest.mark.parametrize("side", ["corpus", "queries"])
def test_a_model_that_fails_midway_is_named_and_what_was_embedded_is_kept(
    engine: Engine, dataset: Dataset, tmp_path: Path, how: str, message: str, side: str
) -> None:
    texts = getattr(dataset, side).values()
    last = sorted(texts, key=len, reverse=True)[-1]  # embedded longest first
    faulty = Faulty(word=last, how=how, embed_batch_size=4)
    with pytest.raises(ArgumentError, match=rf"embed_model: .*{side}\[") as raised:
        engine(dataset, faulty).finetune()
    assert message in str(raised.value)
    assert "kept in the cache" in str(raised.value)
    assert not (tmp_path / "out").exists()
    if how == "raises":
        assert isinstance(raised.value.__cause__, ConnectionError)

    healed = Faulty(word=last, how=how, embed_batch_size=4)
    healed._healed = True
    engine(dataset, healed).finetune()
    assert 1 <= len(set(healed.texts) & set(texts)) <= 4
    if side == "queries":
        assert not set(healed.texts) & set(dataset.corpus.values())


WORKER = """
import sys, time
from pathlib import Path
from model_assets import HashingEmbedding
from ft_adapter import EmbeddingAdapterFinetuneEngine

class Slow(HashingEmbedding):
    def vector(self, text):
        time.sleep(float(sys.argv[2]))
        with open(sys.argv[3], "a") as log:
            print("text", file=log, flush=True)
        return super().vector(text)

root = Path(sys.argv[1])
EmbeddingAdapterFinetuneEngine(
    root / "data.json", Slow(embed_batch_size=4), epochs=3, model_output_path=root / "out",
    cache_dir=root / "cache", show_progress=False,
).finetune()
print("done")
"""


def start(root: Path, seconds: float, log: str) -> subprocess.Popen[str]:
    tools = str(Path(sys.modules["model_assets"].__file__ or "").parent)
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(root), str(seconds), str(root / log)],
        env={**os.environ, "PYTHONPATH": tools},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def calls(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_run_goes_on_where_it_was(dataset: Dataset, tmp_path: Path) -> None:
    dataset.save(tmp_path / "data.json")
    total = len(set(dataset.corpus.values())) + len(set(dataset.queries.values())) + 2
    worker = start(tmp_path, 0.01, "first")
    deadline = time.monotonic() + 60
    while calls(tmp_path / "first") < 100 and worker.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    worker.kill()
    worker.communicate()
    assert worker.returncode == -signal.SIGKILL
    before = calls(tmp_path / "first")
    assert 100 <= before < total
    assert not (tmp_path / "out").exists()

    worker = start(tmp_path, 0, "second")
    output, errors = worker.communicate(timeout=120)
    assert output == "done\n", errors
    assert total - before <= calls(tmp_path / "second") <= total - before + 4
    assert (tmp_path / "out" / "ft.json").exists()


# --- From an index ----------------------------------------------------------------------------


def test_from_an_index_no_document_is_embedded(
    related: Dataset, related_heldout: Dataset, tmp_path: Path
) -> None:
    index = index_of(related, HashingEmbedding())
    model = HashingEmbedding()
    tuned = EmbeddingAdapterFinetuneEngine.from_index(
        index, related, model, **QUICK, val_dataset=related_heldout,
        model_output_path=tmp_path / "out", cache_dir=tmp_path / "cache",
    )  # fmt: skip
    report = tuned.finetune()
    assert model.text_calls == 0
    asked = {*related.queries.values(), *related_heldout.queries.values(), PROBE_TEXT}
    assert sorted(model.queries) == sorted(asked)
    base, after = ndcg(report)
    assert after > base + 0.2
    retriever = tuned.get_finetuned_retriever(index, similarity_top_k=10)
    text = next(iter(related_heldout.queries.values()))
    assert len(retriever.retrieve(text)) == 10
    assert model.text_calls == 0
    manifest = json.loads((tmp_path / "out" / "ft.json").read_text())
    assert manifest["settings"]["documents"] == "index"


def test_an_index_gives_the_weights_that_the_dataset_gives(
    engine: Engine, related: Dataset, related_heldout: Dataset, tmp_path: Path
) -> None:
    engine(related, val_dataset=related_heldout).finetune()
    EmbeddingAdapterFinetuneEngine.from_index(
        index_of(related, HashingEmbedding()), related, **QUICK, val_dataset=related_heldout,
        model_output_path=tmp_path / "index", cache_dir=tmp_path / "cache",
    ).finetune()  # fmt: skip
    torch.testing.assert_close(
        weights(tmp_path / "index")["linear.weight"], weights(tmp_path / "out")["linear.weight"],
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def from_index(index: VectorStoreIndex, data: Dataset, tmp_path: Path, **given: Any) -> Any:
    folders = {"model_output_path": tmp_path / "out", "cache_dir": tmp_path / "cache"}
    return EmbeddingAdapterFinetuneEngine.from_index(index, data, **{**QUICK, **folders, **given})


def cut(dataset: Dataset, model: HashingEmbedding) -> VectorStoreIndex:
    """An index of two nodes per document, under ids that the related does not know."""
    nodes = [
        TextNode(
            id_=f"{key}#{part}",
            text=text,
            relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=key)},
        )
        for key, words in ((key, text.split()) for key, text in dataset.corpus.items())
        for part, text in enumerate((" ".join(words[:2]), " ".join(words[1:])))
    ]
    return VectorStoreIndex(nodes, embed_model=model)


def test_a_datasets_ids_may_be_those_of_documents(
    related: Dataset, related_heldout: Dataset, tmp_path: Path
) -> None:
    index = cut(related, HashingEmbedding())
    tuned = from_index(index, related, tmp_path, val_dataset=related_heldout, epochs=12)
    report = tuned.finetune()
    base, after = ndcg(report)
    assert after > base + 0.2
    found = report.runs[1].rankings[next(iter(related_heldout.queries))]
    assert all("#" in document for document in found)
    retriever = tuned.get_finetuned_retriever(index, similarity_top_k=5)
    text = next(iter(related_heldout.queries.values()))
    nodes = index.docstore.docs  # by text: some parts are cut from several documents
    retrieved = [node.node.get_content() for node in retriever.retrieve(text)]
    assert retrieved == [nodes[node].get_content() for node in found[:5]]


def test_from_an_index_negatives_are_not_mined_for_document_ids(
    related: Dataset, tmp_path: Path
) -> None:
    index = cut(related, HashingEmbedding())
    with pytest.raises(ArgumentError, match="negatives: cannot be mined"):
        from_index(index, related, tmp_path, loss="hard_negatives").finetune()


def test_a_document_that_the_index_lacks_is_named(related: Dataset, tmp_path: Path) -> None:
    kept = dict(list(related.corpus.items())[1:])
    index = VectorStoreIndex(
        [TextNode(id_=key, text=text) for key, text in kept.items()],
        embed_model=HashingEmbedding(),
    )
    query, (document,) = next(iter(related.relevant_docs.items()))
    with pytest.raises(DatasetError) as raised:
        from_index(index, related, tmp_path).finetune()
    assert f"relevant_docs[{query!r}]" in str(raised.value)
    assert repr(document) in str(raised.value)


class OtherHashing(HashingEmbedding):
    """Another model of the same dimension."""

    def vector(self, text: str) -> Any:
        return super().vector(" ".join(word + "x" for word in text.split()))


def test_an_index_of_another_model_is_refused(perfect: Dataset, tmp_path: Path) -> None:
    index = index_of(perfect, OtherHashing())
    with pytest.raises(ArgumentError, match=r"index: .*do not seem to be of this embedding model"):
        from_index(index, perfect, tmp_path, embed_model=HashingEmbedding()).finetune()
    # With its own model, there is nothing to say against it; and the user has the last word.
    from_index(index, perfect, tmp_path).finetune()
    given = {"embed_model": HashingEmbedding(), "check_index": False}
    assert from_index(index, perfect, tmp_path, **given).finetune().title


def test_vectors_are_taken_from_the_user_where_a_store_cannot_list_them(
    perfect: Dataset, tmp_path: Path
) -> None:
    model = HashingEmbedding()
    index = index_of(perfect, model)
    given = {key: model.vector(text) for key, text in perfect.corpus.items()}
    from_index(index, perfect, tmp_path / "read").finetune()
    index.vector_store.data.embedding_dict.clear()  # nothing to read any more
    calls = model.text_calls
    from_index(index, perfect, tmp_path / "given", document_vectors=given).finetune()
    assert model.text_calls == calls
    read, same = (weights(tmp_path / name / "out") for name in ("read", "given"))
    assert all(torch.equal(read[name], same[name]) for name in read)

    node = next(iter(given))
    given[node] = [float("nan")] * 32
    with pytest.raises(ArgumentError, match=f"document_vectors: .*{node}"):
        from_index(index, perfect, tmp_path / "bad", document_vectors=given).finetune()


@pytest.mark.parametrize(
    ("argument", "value"),
    [("metric", "ndgc@10"), ("metric", "ndcg@500"), ("epochs", 2.5), ("batch_size", 0)],
)
def test_a_setting_out_of_range_is_refused_at_once(argument: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=r"metric|epochs|batch_size"):
        EmbeddingAdapterFinetuneEngine("no-such.json", HashingEmbedding(), **{argument: value})


def test_an_index_of_another_dimension_is_refused(perfect: Dataset, tmp_path: Path) -> None:
    index = index_of(perfect, HashingEmbedding(dim=16))
    with pytest.raises(ArgumentError, match="queries of dimension 32, and the documents have 16"):
        from_index(index, perfect, tmp_path, embed_model=HashingEmbedding()).finetune()


def test_an_empty_index_and_both_sides_are_refused(perfect: Dataset, tmp_path: Path) -> None:
    empty = VectorStoreIndex([], embed_model=HashingEmbedding())
    with pytest.raises(ArgumentError, match="index: its SimpleVectorStore is empty"):
        from_index(empty, perfect, tmp_path).finetune()
    with pytest.raises(ArgumentError, match='sides: "both" needs a new index'):
        from_index(index_of(perfect, HashingEmbedding()), perfect, tmp_path, sides="both")


def test_a_persisted_index_brings_its_vectors(
    related: Dataset, related_heldout: Dataset, tmp_path: Path
) -> None:
    from llama_index.core import load_index_from_storage

    index_of(related, HashingEmbedding()).storage_context.persist(tmp_path / "index")
    model = HashingEmbedding()
    storage = StorageContext.from_defaults(persist_dir=str(tmp_path / "index"))
    index = load_index_from_storage(storage, embed_model=model)
    base, after = ndcg(from_index(index, related, tmp_path, val_dataset=related_heldout).finetune())
    assert after > base + 0.2
    assert model.text_calls == 0


def test_half_precision_vectors_are_taken(
    engine: Engine, dataset: Dataset, heldout: Dataset
) -> None:
    tuned = engine(dataset, Doubled(), val_dataset=heldout)
    base, after = ndcg(tuned.finetune())
    assert after > base + 0.2
    text = next(iter(heldout.queries.values()))
    found = tuned.get_finetuned_model().get_query_embedding(text)
    assert all(type(number) is float for number in found)


def test_an_index_of_half_precision_vectors_is_taken(
    related: Dataset, related_heldout: Dataset, tmp_path: Path
) -> None:
    nodes = [
        TextNode(id_=key, text=text, embedding=list(map(float, Doubled().vector(text))))
        for key, text in related.corpus.items()
    ]
    index = VectorStoreIndex(nodes, embed_model=HashingEmbedding())
    for key, vector in index.vector_store.data.embedding_dict.items():
        index.vector_store.data.embedding_dict[key] = np.asarray(vector, dtype=np.float16)
    base, after = ndcg(from_index(index, related, tmp_path, val_dataset=related_heldout).finetune())
    assert after > base + 0.2


# --- Adapters of one's own, and saved ones ----------------------------------------------------


class Diagonal(BaseAdapter):
    """Scales each number, and rotates by a learned matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.matrix = nn.Parameter(torch.eye(width))

    def forward(self, embed: torch.Tensor) -> torch.Tensor:
        return embed @ self.matrix

    def get_config_dict(self) -> dict[str, Any]:
        return {"width": self.width}


class Bare(nn.Module):
    """Any module: nothing says how it was made."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(width))

    def forward(self, embed: torch.Tensor) -> torch.Tensor:
        return embed @ self.matrix


@pytest.mark.parametrize("make", [Diagonal, Bare])
def test_custom_adapters_train_save_and_come_back(
    engine: Engine, dataset: Dataset, heldout: Dataset, make: Any, tmp_path: Path
) -> None:
    module = make(DIM)
    tuned = engine(dataset, adapter_model=module, val_dataset=heldout)
    base, after = ndcg(tuned.finetune())
    assert after > base + 0.4
    torch.testing.assert_close(module.matrix.detach(), torch.eye(DIM))  # a copy was trained
    text = next(iter(heldout.queries.values()))
    vector = tuned.get_finetuned_model().get_query_embedding(text)
    expected = (
        np.array(HashingEmbedding().vector(text)) @ weights(tmp_path / "out")["matrix"].numpy()
    )
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(vector, expected, atol=1e-5)
    assert tuned.get_finetuned_retriever(index_of(dataset, HashingEmbedding())).retrieve(text)

    loaded = EmbeddingAdapterFinetuneEngine.load(
        tmp_path / "out", HashingEmbedding(), adapter_model=make(DIM)
    )
    assert loaded.get_finetuned_model().get_query_embedding(text) == vector
    manifest = json.loads((tmp_path / "out" / "ft.json").read_text())
    assert manifest["settings"]["adapter_model"] == make.__name__


@pytest.mark.parametrize("make", [Diagonal, Bare])
def test_a_custom_adapter_that_does_not_help_gives_the_bases_vectors(
    engine: Engine, perfect: Dataset, make: Any
) -> None:
    tuned = engine(perfect, adapter_model=make(DIM))
    tuned.finetune()
    text = next(iter(perfect.queries.values()))
    found = tuned.get_finetuned_model().get_query_embedding(text)
    assert found == HashingEmbedding().vector(text)


def test_a_custom_adapter_named_like_a_built_in_one_comes_back_as_itself(
    engine: Engine, dataset: Dataset, heldout: Dataset
) -> None:
    impostor = type("LinearLayer", (Diagonal,), {})
    tuned = engine(dataset, adapter_model=impostor(DIM), val_dataset=heldout)
    tuned.finetune()
    text = next(iter(heldout.queries.values()))
    assert tuned.get_finetuned_model().get_query_embedding(text) != HashingEmbedding().vector(text)


def test_training_goes_on_from_a_saved_adapter(
    engine: Engine, dataset: Dataset, heldout: Dataset, tmp_path: Path
) -> None:
    first = engine(dataset, val_dataset=heldout, model_output_path=tmp_path / "first", epochs=3)
    _, before = ndcg(first.finetune())
    second = EmbeddingAdapterFinetuneEngine.from_model_path(
        dataset, HashingEmbedding(), tmp_path / "first", **{**QUICK, "epochs": 1},
        val_dataset=heldout, model_output_path=tmp_path / "second", cache_dir=tmp_path / "cache",
    )  # fmt: skip
    _, after = ndcg(second.finetune())
    # One epoch alone gives a tenth of it: the start was not the identity.
    assert after > before
    scratch = engine(dataset, val_dataset=heldout, epochs=1)
    assert ndcg(scratch.finetune())[1] < 0.5 * after
    assert second.report is not None
    assert ndcg(second.report)[0] == pytest.approx(ndcg(first.report)[0])  # against the base


def test_a_saved_custom_adapter_needs_its_class_to_go_on(
    engine: Engine, dataset: Dataset, heldout: Dataset, tmp_path: Path
) -> None:
    engine(dataset, adapter_model=Diagonal(DIM), val_dataset=heldout).finetune()
    arguments = (dataset, HashingEmbedding(), tmp_path / "out")
    with pytest.raises(ArtifactError, match="Diagonal"):
        EmbeddingAdapterFinetuneEngine.from_model_path(*arguments)
    resumed = EmbeddingAdapterFinetuneEngine.from_model_path(*arguments, Diagonal)
    torch.testing.assert_close(
        resumed.adapter_model.matrix.detach(), weights(tmp_path / "out")["matrix"]
    )


def test_the_predecessors_folder_can_be_gone_on_from(
    dataset: Dataset, heldout: Dataset, tmp_path: Path
) -> None:
    folder = tmp_path / "legacy"
    folder.mkdir()
    start_weight = torch.eye(DIM) + 0.3 * torch.eye(DIM).roll(1, 0)
    torch.save(
        {"linear.weight": start_weight, "linear.bias": torch.zeros(DIM)},
        folder / "pytorch_model.bin",
    )
    config = {"in_features": DIM, "out_features": DIM, "bias": True}
    (folder / "config.json").write_text(json.dumps(config))
    tuned = EmbeddingAdapterFinetuneEngine.from_model_path(
        dataset, HashingEmbedding(), str(folder), LinearLayer, **QUICK, val_dataset=heldout,
        model_output_path=tmp_path / "out", cache_dir=tmp_path / "cache",
    )  # fmt: skip
    assert torch.equal(tuned.adapter_model.linear.weight, start_weight)
    base, after = ndcg(tuned.finetune())
    assert after > base + 0.4
    assert set(weights(tmp_path / "out")) == {"linear.weight", "linear.bias"}
    two = TwoLayerNN(DIM, 4, DIM, add_residual=True)
    (tmp_path / "two").mkdir()
    torch.save(two.state_dict(), tmp_path / "two" / "pytorch_model.bin")
    (tmp_path / "two" / "config.json").write_text(json.dumps(two.get_config_dict()))
    again = EmbeddingAdapterFinetuneEngine.from_model_path(
        dataset, HashingEmbedding(), tmp_path / "two", model_cls=TwoLayerNN
    )
    assert torch.equal(again.adapter_model.linear1.weight, two.linear1.weight)


def test_load_refuses_what_is_missing_foreign_or_of_another_model(
    engine: Engine, dataset: Dataset, heldout: Dataset, tmp_path: Path
) -> None:
    tuned = engine(dataset, val_dataset=heldout)
    tuned.finetune()
    out = tmp_path / "out"
    with pytest.raises(ArtifactError, match="model behind the name 'hashing' has changed"):
        EmbeddingAdapterFinetuneEngine.load(out, OtherHashing())
    with pytest.raises(ArtifactError, match="trained for 'hashing', and 'other' is another model"):
        EmbeddingAdapterFinetuneEngine.load(out, OtherHashing(model_name="other"))
    with pytest.raises(ArtifactError, match="dimension 32 by 'hashing', and 'hashing' gives 16"):
        EmbeddingAdapterFinetuneEngine.load(out, HashingEmbedding(dim=16))
    for folder in ("nowhere", "foreign"):
        (tmp_path / "foreign").mkdir(exist_ok=True)
        (tmp_path / "foreign" / "notes.txt").write_text("mine")
        with pytest.raises(ArtifactError, match=folder):
            EmbeddingAdapterFinetuneEngine.load(tmp_path / folder, HashingEmbedding())
    tuned.embed_model = OtherHashing()
    with pytest.raises(ArtifactError, match="has changed"):
        tuned.get_finetuned_model()


def test_a_loaded_engine_cannot_train(
    engine: Engine, dataset: Dataset, heldout: Dataset, tmp_path: Path
) -> None:
    engine(dataset, val_dataset=heldout, epochs=2).finetune()
    loaded = EmbeddingAdapterFinetuneEngine.load(tmp_path / "out", HashingEmbedding())
    with pytest.raises(ArgumentError, match="a loaded engine cannot train again"):
        loaded.finetune()


def test_before_training_there_is_no_model(engine: Engine, dataset: Dataset) -> None:
    with pytest.raises(ArtifactError, match="out"):
        engine(dataset).get_finetuned_model()


# --- Bad input --------------------------------------------------------------------------------


def test_the_constructor_does_no_work(tmp_path: Path) -> None:
    model = HashingEmbedding()
    EmbeddingAdapterFinetuneEngine(
        "nowhere.json", model, model_output_path=tmp_path / "out", cache_dir=tmp_path / "cache"
    )
    assert list(tmp_path.iterdir()) == []
    assert (model.text_calls, model.query_calls) == (0, 0)


def test_the_predecessors_positional_arguments_are_taken(dataset: Dataset, tmp_path: Path) -> None:
    model, adapter = HashingEmbedding(), LinearLayer(DIM, DIM)
    tuned = EmbeddingAdapterFinetuneEngine(
        dataset, model, 12, 3, adapter, DIM, "cpu", str(tmp_path / "out"), str(tmp_path / "steps"),
        50, True, True,
    )  # fmt: skip
    assert (tuned.settings.batch_size, tuned.settings.epochs) == (12, 3)
    assert (tuned.adapter_model, tuned.dim, tuned.device) == (adapter, DIM, "cpu")
    assert tuned.model_output_path == tmp_path / "out"
    assert (tuned.model_checkpoint_path, tuned.checkpoint_save_steps) == (
        str(tmp_path / "steps"), 50,
    )  # fmt: skip
    assert (tuned.verbose, tuned.bias) == (True, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapter_model": "quadratic"}, "adapter_model: is one of linear, low_rank"),
        ({"checkpoint_save_steps": 0}, "checkpoint_save_steps: is at least 1"),
        ({"epochs": 0}, "epochs: is a whole number from 1"),
        ({"loss": "mse"}, "loss: is one of"),
        ({"sides": "text"}, "sides: is query or both"),
    ],
)
def test_bad_arguments_are_named_at_once(
    engine: Engine, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        engine(None, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 64}, "dim: is 64, but embed_model gives dimension 32"),
        ({"adapter_model": LinearLayer(8, 8)}, "adapter_model: does not take vectors"),
        ({"adapter_model": LinearLayer(DIM, 8)}, "adapter_model: maps 32 dimensions to 8"),
        ({"adapter_model": nn.Identity()}, "adapter_model: has no weights"),
        ({"metric": "bleu"}, "metric"),
        ({"device": "quantum"}, "device: 'quantum' cannot be used"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_saved(
    engine: Engine, dataset: Dataset, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        engine(dataset, **arguments).finetune()
    assert not (tmp_path / "out").exists()


def test_unknown_arguments_of_finetune_raise(engine: Engine, dataset: Dataset) -> None:
    with pytest.raises(ArgumentError, match="warmup_steps: finetune takes no arguments"):
        engine(dataset).finetune(warmup_steps=3)
    with pytest.raises(TypeError, match="colour"):
        engine(dataset, colour="red")


def test_too_little_data_is_refused_before_anything_is_embedded(engine: Engine) -> None:
    model = HashingEmbedding()
    one = Dataset(queries={"q": "why"}, corpus={"d": "so"}, relevant_docs={"q": ["d"]})
    with pytest.raises(DatasetError, match=r"1 question\(s\) about 1 document\(s\)"):
        engine(one, model).finetune()
    same = Dataset(
        queries={"q": "why", "r": "how"}, corpus={"d": "so", "e": "so"},
        relevant_docs={"q": ["d"], "r": ["e"]},
    )  # fmt: skip
    with pytest.raises(DatasetError, match="at least two questions with different answers"):
        engine(same, model).finetune()
    assert (model.text_calls, model.query_calls) == (0, 0)


def test_two_pairs_are_enough_to_run(engine: Engine) -> None:
    two = Dataset(
        queries={"q": "why", "r": "how"}, corpus={"d": "so", "e": "thus"},
        relevant_docs={"q": ["d"], "r": ["e"]},
    )  # fmt: skip
    tuned = engine(two)
    report = tuned.finetune()
    assert tuned.selection is not None
    assert not tuned.selection.kept  # two questions prove nothing
    assert len(report.runs[0].rankings) == 2


def test_questions_that_are_all_alike_need_validation_data(
    engine: Engine, heldout: Dataset
) -> None:
    numbers = range(12)
    alike = Dataset(
        queries={f"q{n}": f"what does the long and very well known rule {n} say" for n in numbers},
        corpus={f"d{n}": f"rule {n} is word{n}" for n in numbers},
        relevant_docs={f"q{n}": [f"d{n}"] for n in numbers},
    )
    with pytest.raises(DatasetError, match=r"too much alike for 5 folds.*val_dataset"):
        engine(alike).finetune()
    assert engine(alike, val_dataset=heldout, epochs=1).finetune() is not None


@pytest.mark.parametrize("relevant", [{"q": ["d"]}, {"q": ["d"], "r": []}])
def test_a_query_without_a_relevant_document_is_named(
    engine: Engine, tmp_path: Path, relevant: dict[str, list[str]]
) -> None:
    path = tmp_path / "data.json"
    path.write_text(
        json.dumps(
            {"queries": {"q": "why", "r": "how"}, "corpus": {"d": "so", "e": "thus"},
             "relevant_docs": relevant, "mode": "text"}
        )
    )  # fmt: skip
    model = HashingEmbedding()
    with pytest.raises(DatasetError, match=r"data\.json.*'r'"):
        engine(path, model).finetune()
    assert model.query_calls == 0


def test_bad_files_are_named(engine: Engine, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nowhere\.json: no such file"):
        engine(tmp_path / "nowhere.json").finetune()
    with pytest.raises(DatasetError, match=r"nowhere\.json: no such file"):
        engine(dataset, val_dataset=tmp_path / "nowhere.json").finetune()


def test_a_folder_that_is_not_ours_is_left_alone(
    engine: Engine, dataset: Dataset, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    model = HashingEmbedding()
    with pytest.raises(ArtifactError, match="holds files that no fine-tuning pack saved"):
        engine(dataset, model).finetune()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    assert model.text_calls == 0  # refused before any work


def test_a_training_that_fails_leaves_the_last_adapter(
    engine: Engine, dataset: Dataset, heldout: Dataset, tmp_path: Path
) -> None:
    engine(dataset, val_dataset=heldout).finetune()
    before = (tmp_path / "out" / "adapter.safetensors").read_bytes()
    with pytest.raises(TrainingError, match="the loss is nan"):
        engine(dataset, val_dataset=heldout, learning_rate=1e38).finetune()
    assert (tmp_path / "out" / "adapter.safetensors").read_bytes() == before
    engine(dataset, val_dataset=heldout, seed=5).finetune()
    assert (tmp_path / "out" / "adapter.safetensors").read_bytes() != before


def test_questions_shared_with_the_validation_data_are_warned_of(
    engine: Engine, dataset: Dataset, heldout: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    engine(dataset, val_dataset=heldout, epochs=1).finetune()
    assert "are in the training data too" not in caplog.text
    engine(dataset, val_dataset=dataset, epochs=1).finetune()
    assert "60 questions of val_dataset are in the training data too" in caplog.text


# --- Evaluation of saved adapters -------------------------------------------------------------


def test_evaluation_compares_saved_adapters_on_an_index_without_embedding_documents(
    engine: Engine, related: Dataset, related_heldout: Dataset, tmp_path: Path
) -> None:
    engine(related, val_dataset=related_heldout).finetune()
    save_adapter(tmp_path / "same", ResidualNN(DIM))
    model = HashingEmbedding()
    report = evaluate_adapters(
        related_heldout, model, {"trained": tmp_path / "out", "untrained": tmp_path / "same"},
        index=index_of(related, HashingEmbedding()), cache_dir=tmp_path / "new",
    )  # fmt: skip
    assert [run.name for run in report.runs] == ["identity", "trained", "untrained"]
    base, after, same = ndcg(report)
    assert after > base + 0.2
    assert same == pytest.approx(base)
    assert model.text_calls == 0
    with pytest.raises(ArtifactError, match="has changed"):
        evaluate_adapters(
            related_heldout, OtherHashing(), [tmp_path / "out"], cache_dir=tmp_path / "new"
        )
    with pytest.raises(ArgumentError, match="adapters: name at least one saved folder"):
        evaluate_adapters(related_heldout, model, [], cache_dir=tmp_path / "new")


def test_the_wrapped_index_is_untouched(engine: Engine, dataset: Dataset, heldout: Dataset) -> None:
    index = VectorStoreIndex.from_documents(
        [Document(id_=key, text=text) for key, text in dataset.corpus.items()],
        embed_model=HashingEmbedding(),
    )
    before = {key: list(value) for key, value in index.vector_store.data.embedding_dict.items()}
    tuned = engine(dataset, val_dataset=heldout, epochs=2)
    tuned.finetune()
    tuned.get_finetuned_retriever(index).retrieve("rohcnau")
    assert index.vector_store.data.embedding_dict == before
    assert isinstance(index._embed_model, HashingEmbedding)
