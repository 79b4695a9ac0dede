from __future__ import annotations

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from safetensors.numpy import load_file

from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.errors import ArgumentError, ArtifactError, DatasetError, TrainingError
from ft_embeddings import SentenceTransformersFinetuneEngine
from ft_embeddings.instructions import instructions_for
from ft_embeddings.settings import PRESETS, TrainingSettings

QUICK: dict[str, Any] = {"epochs": 8, "batch_size": 8, "learning_rate": 5e-3, "base_weight": 0.0}


def engine(
    dataset: Any, model: str, output: Path, **arguments: Any
) -> SentenceTransformersFinetuneEngine:
    return SentenceTransformersFinetuneEngine(
        dataset, model_id=model, model_output_path=str(output), **{**QUICK, **arguments}
    )


def weights(folder: Path) -> dict[str, np.ndarray]:
    loaded: dict[str, np.ndarray] = load_file(folder / "model.safetensors")
    return loaded


def test_training_improves_on_heldout_questions_and_the_model_works_in_an_index(
    dataset: EmbeddingQAFinetuneDataset,
    heldout: EmbeddingQAFinetuneDataset,
    tiny_model: str,
    tmp_path: Path,
) -> None:
    output = tmp_path / "out"
    tuned = engine(dataset, tiny_model, output, val_dataset=heldout)
    report = tuned.finetune()
    assert report is not None
    base, after = (run.mean("ndcg@10") for run in report.runs)
    assert after > base + 0.2
    assert report.outcome("tuned") == "better"

    model = tuned.get_finetuned_model()
    nodes = [TextNode(id_=key, text=text) for key, text in dataset.corpus.items()]
    retriever = VectorStoreIndex(nodes, embed_model=model).as_retriever(similarity_top_k=1)
    hits = [
        retriever.retrieve(text)[0].node.node_id in heldout.relevant_docs[query]
        for query, text in heldout.queries.items()
    ]
    assert sum(hits) / len(hits) == pytest.approx(report.runs[1].mean("hit_rate@1"))

    manifest = json.loads((output / "ft.json").read_text())
    assert manifest["kind"] == "sentence-transformer"
    assert manifest["base_model"] == tiny_model
    assert manifest["data"] == {
        "train": dataset.content_hash,
        "validation": heldout.content_hash,
    }
    assert manifest["metrics"]["tuned"]["ndcg@10"] == pytest.approx(after)
    assert "torch" in manifest["versions"]
    assert (output / "README.md").exists()
    assert not list(output.rglob("*.bin"))
    assert not output.with_name("out.checkpoints").exists()


def test_a_loaded_engine_gives_the_same_model_without_the_data(
    dataset: EmbeddingQAFinetuneDataset, tiny_model: str, tmp_path: Path
) -> None:
    trained = engine(dataset, tiny_model, tmp_path / "out", epochs=1)
    assert trained.finetune() is None  # there is no validation set to report on
    loaded = SentenceTransformersFinetuneEngine.load(tmp_path / "out")
    texts = ["the tower opens"]
    assert loaded.get_finetuned_model().get_text_embedding_batch(
        texts
    ) == trained.get_finetuned_model().get_text_embedding_batch(texts)
    with pytest.raises(ArgumentError, match="a loaded engine cannot train again"):
        loaded.finetune()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    dataset: EmbeddingQAFinetuneDataset, tiny_model: str, tmp_path: Path
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        engine(dataset, tiny_model, tmp_path / name, epochs=1, seed=seed).finetune()
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(np.array_equal(a[key], b[key]) for key in a)
    assert not all(np.array_equal(a[key], c[key]) for key in a)


def test_the_lowest_layers_stay_frozen_and_the_base_weight_keeps_part_of_the_base(
    dataset: EmbeddingQAFinetuneDataset, tiny_model: str, tmp_path: Path
) -> None:
    engine(dataset, tiny_model, tmp_path / "all", epochs=1, frozen_share=0.5).finetune()
    engine(
        dataset, tiny_model, tmp_path / "half", epochs=1, frozen_share=0.5, base_weight=0.5
    ).finetune()
    base, tuned, half = (
        weights(Path(tiny_model)),
        weights(tmp_path / "all"),
        weights(tmp_path / "half"),
    )
    for key in base:
        frozen = key.startswith(("embeddings.", "encoder.layer.0."))
        if frozen:
            assert np.array_equal(base[key], tuned[key]), key
        np.testing.assert_allclose(half[key], (base[key] + tuned[key]) / 2, atol=1e-6)
    moved = "encoder.layer.1.output.dense.weight"
    assert not np.array_equal(base[moved], tuned[moved])


@pytest.mark.parametrize(
    "arguments",
    [
        {"loss": "cached_multiple_negatives_ranking"},
        {"loss": "gist"},
        {"loss": "matryoshka", "matryoshka_dims": [32, 16]},
        {"negatives": 2},
        {"precision": "bf16"},
        {"max_length": 16},
    ],
    ids=lambda arguments: "-".join(map(str, arguments.values())),
)
def test_every_way_of_training_learns(
    dataset: EmbeddingQAFinetuneDataset,
    heldout: EmbeddingQAFinetuneDataset,
    tiny_model: str,
    tmp_path: Path,
    arguments: dict[str, Any],
) -> None:
    report = engine(
        dataset, tiny_model, tmp_path / "out", val_dataset=heldout, **arguments
    ).finetune()
    assert report is not None
    base, tuned = report.runs
    assert tuned.mean("ndcg@10") > base.mean("ndcg@10") + 0.1


def test_matryoshka_model_can_be_truncated(
    dataset: EmbeddingQAFinetuneDataset, tiny_model: str, tmp_path: Path
) -> None:
    trained = engine(dataset, tiny_model, tmp_path / "out", epochs=1, loss="matryoshka")
    trained.finetune()
    model = trained.get_finetuned_model(truncate_dim=16)
    assert len(model.get_query_embedding("tower")) == 16


def test_lora_is_merged_into_an_ordinary_model(
    dataset: EmbeddingQAFinetuneDataset,
    heldout: EmbeddingQAFinetuneDataset,
    tiny_model: str,
    tmp_path: Path,
) -> None:
    trained = engine(
        dataset, tiny_model, tmp_path / "out", val_dataset=heldout, lora={"r": 8}, epochs=12
    )
    report = trained.finetune()
    assert report is not None
    base, tuned = report.runs
    assert tuned.mean("ndcg@10") > base.mean("ndcg@10") + 0.1
    assert weights(tmp_path / "out").keys() == weights(Path(tiny_model)).keys()
    # What was scored in memory is what was saved.
    again = SentenceTransformersFinetuneEngine.load(tmp_path / "out").get_finetuned_model()
    from ft_core.evaluation import evaluate_embedding

    saved = evaluate_embedding(again, heldout, show_progress=False)
    assert saved.mean("ndcg@10") == pytest.approx(tuned.mean("ndcg@10"), abs=0.02)


def test_a_loss_of_sentence_transformers_works_too(
    dataset: EmbeddingQAFinetuneDataset,
    heldout: EmbeddingQAFinetuneDataset,
    tiny_model: str,
    tmp_path: Path,
) -> None:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    report = engine(
        dataset,
        tiny_model,
        tmp_path / "out",
        val_dataset=heldout,
        loss=MultipleNegativesRankingLoss,
    ).finetune()
    assert report is not None
    assert report.runs[1].mean("ndcg@10") > report.runs[0].mean("ndcg@10") + 0.1


def test_it_says_plainly_when_training_did_not_help(
    dataset: EmbeddingQAFinetuneDataset,
    tiny_model: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    good = engine(dataset, tiny_model, tmp_path / "good", epochs=20)
    good.finetune()
    # From a model that answers everything, one tiny step cannot gain.
    with caplog.at_level(logging.WARNING, logger="ft_embeddings"):
        engine(
            dataset, str(tmp_path / "good"), tmp_path / "out", val_dataset=dataset,
            epochs=1, learning_rate=1e-9,
        ).finetune()  # fmt: skip
    assert "validation does not show that tuning helps" in caplog.text


def test_early_stopping_keeps_the_best_checkpoint(
    dataset: EmbeddingQAFinetuneDataset,
    heldout: EmbeddingQAFinetuneDataset,
    tiny_model: str,
    tmp_path: Path,
) -> None:
    trained = engine(
        dataset, tiny_model, tmp_path / "out", val_dataset=heldout, epochs=30,
        early_stopping_patience=2, save_checkpoints=True,
    )  # fmt: skip
    report = trained.finetune()
    assert report is not None
    states = (tmp_path / "out.checkpoints").glob("checkpoint-*/trainer_state.json")
    last = max((json.loads(path.read_text()) for path in states), key=lambda s: s["global_step"])
    scores = [entry["eval_ndcg@10"] for entry in last["log_history"] if "eval_ndcg@10" in entry]
    assert len(scores) < 30
    assert report.runs[1].mean("ndcg@10") == pytest.approx(max(scores))


TRAIN = """
import logging, sys
logging.basicConfig(level=logging.INFO)
from ft_embeddings import SentenceTransformersFinetuneEngine
SentenceTransformersFinetuneEngine(
    sys.argv[1], model_id=sys.argv[2], model_output_path=sys.argv[3], epochs=40, batch_size=8,
    learning_rate=5e-3, resume_from_checkpoint=True,
).finetune()
"""


@pytest.mark.slow
def test_training_killed_in_the_middle_goes_on_from_its_last_checkpoint(
    dataset: EmbeddingQAFinetuneDataset, tiny_model: str, tmp_path: Path
) -> None:
    data, output = tmp_path / "train.json", tmp_path / "out"
    dataset.save(data)
    command = [sys.executable, "-c", TRAIN, str(data), tiny_model, str(output)]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints = tmp_path / "out.checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
        assert killed.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not output.exists()
    resumed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming from {checkpoints / 'checkpoint-'}" in resumed.stderr
    assert (output / "model.safetensors").exists()
    assert not checkpoints.exists()


def test_checkpoints_of_other_data_are_not_resumed(
    dataset: EmbeddingQAFinetuneDataset,
    heldout: EmbeddingQAFinetuneDataset,
    tiny_model: str,
    tmp_path: Path,
) -> None:
    engine(dataset, tiny_model, tmp_path / "out", epochs=1, save_checkpoints=True).finetune()
    other = engine(heldout, tiny_model, tmp_path / "out", epochs=1, resume_from_checkpoint=True)
    with pytest.raises(TrainingError, match="checkpoints of other data or settings"):
        other.finetune()
    query = next(iter(dataset.queries))
    (relevant,) = dataset.relevant_docs[query]
    negative = next(document for document in dataset.corpus if document != relevant)
    other = engine(
        dataset, tiny_model, tmp_path / "out", epochs=1, resume_from_checkpoint=True,
        negatives={query: [negative]},
    )  # fmt: skip
    with pytest.raises(TrainingError, match="checkpoints of other data or settings"):
        other.finetune()


def test_a_foreign_folder_is_refused_before_any_work(
    dataset: EmbeddingQAFinetuneDataset, tmp_path: Path
) -> None:
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"thesis: holds files that no fine-tuning pack saved"):
        engine(dataset, "no/such-model", mine).finetune()
    assert (mine / "chapter.txt").read_text() == "years of work"


@contextmanager
def full_disk() -> Iterator[None]:
    """Let the kernel refuse to write more than 20 kB to a file, as a full disk refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_full_disk_in_training_leaves_the_last_good_model(
    dataset: EmbeddingQAFinetuneDataset, tiny_model: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    engine(dataset, tiny_model, output, epochs=1, seed=1).finetune()
    before = files(output)
    again = engine(dataset, tiny_model, output, epochs=1, seed=2)
    with full_disk(), pytest.raises(TrainingError, match="a checkpoint cannot be written"):
        again.finetune()
    assert files(output) == before


def test_a_full_disk_while_saving_leaves_the_last_good_model(
    dataset: EmbeddingQAFinetuneDataset,
    tiny_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ft_embeddings import training

    output = tmp_path / "out"
    engine(dataset, tiny_model, output, epochs=1, seed=1).finetune()
    before = files(output)
    # The disk fills up after the last checkpoint, so it is the real save that fails.
    real_save = training.save

    def save_on_a_full_disk(*arguments: Any) -> None:
        with full_disk():
            real_save(*arguments)

    monkeypatch.setattr(training, "save", save_on_a_full_disk)
    with pytest.raises(TrainingError, match="the trained model cannot be written"):
        engine(dataset, tiny_model, output, epochs=1, seed=2).finetune()
    assert files(output) == before
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]

    monkeypatch.undo()  # there is room again: no epoch is trained twice
    resumed = engine(dataset, tiny_model, output, epochs=1, seed=2, resume_from_checkpoint=True)
    resumed.finetune()
    assert files(output) != before


def test_instructions_are_trained_with_and_come_back_in_the_model(
    dataset: EmbeddingQAFinetuneDataset, tiny_model: str, tmp_path: Path
) -> None:
    trained = engine(
        dataset, tiny_model, tmp_path / "out", epochs=1,
        query_instruction="when: ", text_instruction="at: ",
    )  # fmt: skip
    trained.finetune()
    model = SentenceTransformersFinetuneEngine.load(tmp_path / "out").get_finetuned_model()
    raw = model._model
    expected = raw.encode("when: tower", normalize_embeddings=True, prompt=None)
    np.testing.assert_allclose(model.get_query_embedding("tower"), expected, atol=1e-6)
    expected = raw.encode("at: tower", normalize_embeddings=True)
    np.testing.assert_allclose(model.get_text_embedding("tower"), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "query", "text"),
    [
        ("sentence-transformers/all-MiniLM-L6-v2", "", ""),
        ("intfloat/e5-base-v2", "query: ", "passage: "),
        ("intfloat/multilingual-e5-small", "query: ", "passage: "),
        ("intfloat/multilingual-e5-large-instruct", "", ""),
        ("BAAI/bge-small-en", "Represent this question for searching relevant passages: ", ""),
    ],
)
def test_known_instructions(model: str, query: str, text: str) -> None:
    assert instructions_for(model) == (query, text)
    assert instructions_for(model, "Q ", "") == ("Q ", "")


def test_the_constructor_does_no_work(tmp_path: Path) -> None:
    SentenceTransformersFinetuneEngine("nowhere.json", model_output_path=str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs: is a whole number from 1, not 0"),
        ({"batch_size": 1}, "batch_size: is a whole number from 2, not 1"),
        ({"learning_rate": -1.0}, "learning_rate: is above 0"),
        ({"learning_rate": float("nan")}, "learning_rate: is above 0"),
        ({"precision": "int8"}, "precision: is auto, fp32, bf16 or fp16"),
        ({"preset": "slow"}, "preset: is one of default, fast"),
        ({"loss": "mse"}, "loss: is one of multiple_negatives_ranking"),
        ({"early_stopping_patience": 3}, "needs a val_dataset"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        SentenceTransformersFinetuneEngine(None, **arguments)


def test_bad_data_and_models_are_named(
    dataset: EmbeddingQAFinetuneDataset, tiny_model: str, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"queries": {"q": "why"}, "corpus": {"d"')
    with pytest.raises(DatasetError, match=r"broken\.json: line 1, column"):
        engine(broken, tiny_model, tmp_path / "out").finetune()
    with pytest.raises(ArgumentError, match=r"model_id: .*/nowhere' cannot be loaded"):
        engine(dataset, str(tmp_path / "nowhere"), tmp_path / "out").finetune()
    with pytest.raises(ArgumentError, match="metric: is one of hit_rate@1"):
        engine(dataset, tiny_model, tmp_path / "o", val_dataset=dataset, metric="bleu").finetune()
    with pytest.raises(ArgumentError, match="matryoshka_dims: are from 1 to 32, not 64"):
        engine(
            dataset, tiny_model, tmp_path / "o", loss="matryoshka", matryoshka_dims=[64]
        ).finetune()
    assert not (tmp_path / "out").exists()


def test_weights_that_became_nan_are_not_saved(
    dataset: EmbeddingQAFinetuneDataset, tiny_model: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="became NaN or infinite; lower learning_rate"):
        engine(
            dataset, tiny_model, tmp_path / "out", epochs=1, learning_rate=float("inf")
        ).finetune()
    assert not (tmp_path / "out").exists()


def test_presets_are_complete_settings() -> None:
    assert all(isinstance(preset, TrainingSettings) for preset in PRESETS.values())
    changed = TrainingSettings.preset("fast", epochs=None, seed=7)
    assert changed.epochs == PRESETS["fast"].epochs
    assert changed.seed == 7
    with pytest.raises(ArgumentError, match="colour: is no setting"):
        TrainingSettings.preset("fast", colour="red")


def test_importing_the_pack_loads_nothing_heavy() -> None:
    code = (
        "import sys, ft_embeddings; "
        "print([m for m in ('torch', 'transformers', 'sentence_transformers') if m in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert shown.stdout.strip() == "[]"


def test_every_public_name_is_what_it_says_however_often_it_is_asked_for() -> None:
    import ft_embeddings

    for _ in range(2):  # a module of the same name would take its place at the second time
        for name in ft_embeddings.__all__:
            assert callable(getattr(ft_embeddings, name)), name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = ft_embeddings.Nothing  # type: ignore[attr-defined]
