"""`CrossEncoderFinetuneEngine`, from data of every form to the reranker in an app."""

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.postprocessor import SentenceTransformerRerank
from llama_index.core.schema import NodeWithScore, TextNode
from model_assets import HashingEmbedding
from safetensors.numpy import load_file
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import losses

from ft_core.datasets import RerankDataset
from ft_core.errors import ArgumentError, ArtifactError, DatasetError, TrainingError
from ft_core.evaluation import evaluate_reranker
from ft_crossencoder import CrossEncoderFinetuneEngine, FinetunedReranker, training
from ft_crossencoder.generation import dataset_to_samples
from ft_crossencoder.rows import LOSSES

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = {
    "epochs": 1,
    "batch_size": 16,
    "learning_rate": 4e-3,
    "precision": "fp32",
    "show_progress_bar": False,
    "device": "cpu",
}
LONG = {"epochs": 20, "learning_rate": 6e-3, "negatives": 2, "evaluation_steps": 100_000}
"""Long enough to learn the task, and evaluated at the end alone."""


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Compute alike on every machine, also on one that multiplies in bfloat16."""
    in_fp32(monkeypatch)


def in_fp32(patch):
    # In this order: a module that is first imported here must not keep what is put in.
    for module in ("ft_crossencoder.encoder", "ft_core.training"):
        patch.setattr(f"{module}.has_fast_bf16", lambda device: False)


@pytest.fixture
def engine(task, tmp_path):
    def made(dataset=None, model=None, output="out", **arguments):
        return CrossEncoderFinetuneEngine(
            task.train if dataset is None else dataset,
            model or task.scorer,
            tmp_path / output,
            **{**QUICK, **arguments},
        )

    return made


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def moved(before, after):
    return [name for name in before if not np.array_equal(before[name], after[name])]


def ndcg(reranker, dataset):
    return evaluate_reranker(reranker, dataset, show_progress=False).mean("ndcg@10")


def manifest(folder):
    return json.loads((Path(folder) / "ft.json").read_text())


# --- Learning ----------------------------------------------------------------------------------


def test_the_default_learns_to_rerank_and_works_in_a_query_engine(task, engine, tmp_path):
    tuned = engine(val_dataset=task.heldout, retrieval_weight=0.0, **LONG)
    report = tuned.finetune()
    means = {run.name: run.mean("ndcg@10") for run in report.runs}
    assert list(means) == ["retrieval", "base", "tuned"]
    assert means["tuned"] > 0.95 > 0.8 > max(means["base"], means["retrieval"])
    assert report is tuned.report

    # What was reported is what the app gets.
    assert ndcg(tuned.get_reranker(top_n=None), task.heldout) == pytest.approx(means["tuned"])
    nodes = [TextNode(id_=d.text, text=d.text) for e in task.heldout for d in e.documents[:1]]
    nodes += [TextNode(text="the library is closed")]
    index = VectorStoreIndex(nodes, embed_model=HashingEmbedding())
    query_engine = index.as_retriever(similarity_top_k=4)
    ranked = tuned.get_reranker(2).postprocess_nodes(
        query_engine.retrieve("castle opens"), query_str="castle opens"
    )
    assert len(ranked) == 2

    saved = manifest(tmp_path / "out")
    assert saved["kind"] == "cross-encoder"
    assert saved["base_model"] == task.scorer
    assert saved["data"] == {
        "train": task.train.content_hash,
        "validation": task.heldout.content_hash,
    }
    assert saved["metrics"]["tuned"]["ndcg@10"] == pytest.approx(means["tuned"])
    assert saved["settings"]["retrieval_weight"] == 0.0
    assert {"torch", "sentence-transformers", "ft-crossencoder"} <= saved["versions"].keys()
    assert (tmp_path / "out" / "README.md").exists()
    assert not list((tmp_path / "out").rglob("*.bin"))
    assert not (tmp_path / "out.checkpoints").exists()


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns(task, easy, engine, tmp_path, loss):
    train, heldout = easy
    engine(train, loss=loss, negatives=2, epochs=5).finetune()
    assert moved(weights(task.scorer), weights(tmp_path / "out"))
    base = ndcg(FinetunedReranker(task.scorer, device="cpu"), heldout)
    tuned = ndcg(FinetunedReranker.load(tmp_path / "out", device="cpu"), heldout)
    assert base < 0.8 < 0.95 < tuned


@pytest.mark.parametrize(
    "loss",
    [losses.LambdaLoss, lambda model: losses.MultipleNegativesRankingLoss(model, scale=5.0)],
    ids=["class", "function"],
)
def test_a_loss_of_sentence_transformers_learns_too(easy, engine, tmp_path, loss):
    train, heldout = easy
    engine(train, loss=loss, negatives=2, epochs=5).finetune()
    assert ndcg(FinetunedReranker.load(tmp_path / "out", device="cpu"), heldout) > 0.95
    assert manifest(tmp_path / "out")["settings"]["loss"] in ("LambdaLoss", "<lambda>")


def test_a_teachers_scores_are_learned_by_default_where_they_are_all_there_is(
    scored, engine, monkeypatch
):
    used = []
    real = training.train
    monkeypatch.setattr(
        training, "train", lambda model, rows, run: (used.append(run.loss), real(model, rows, run))
    )
    engine(scored).finetune()
    engine().finetune()
    assert used == ["margin_mse", "listnet"]


# --- Data --------------------------------------------------------------------------------------


def test_the_predecessors_samples_train_to_the_same_weights(task, engine, tmp_path):
    plain = task.without(task.train, "retrieval_score")
    for name, data in (("samples", dataset_to_samples(plain)), ("dataset", plain)):
        engine(data, output=name).finetune()
    assert manifest(tmp_path / "samples")["data"] == manifest(tmp_path / "dataset")["data"]
    assert not moved(weights(tmp_path / "samples"), weights(tmp_path / "dataset"))


def test_a_path_trains_to_the_same_weights(task, engine, tmp_path):
    task.train.save(tmp_path / "train.jsonl")
    for name, data in (("path", tmp_path / "train.jsonl"), ("dataset", task.train)):
        engine(data, output=name).finetune()
    assert not moved(weights(tmp_path / "path"), weights(tmp_path / "dataset"))


@pytest.fixture
def sources(monkeypatch):
    """What candidates were retrieved with, and for how many queries."""
    from ft_core import mining

    asked = []
    real = mining.retrieve_candidates

    def spy(dataset, source, **settings):
        asked.append((source, settings["top_k"]))
        return real(dataset, source, **settings)

    monkeypatch.setattr(mining, "retrieve_candidates", spy)
    return asked


def test_questions_and_documents_alone_are_enough(task, engine, sources, tmp_path):
    embedding, app = HashingEmbedding(), HashingEmbedding()
    nodes = [TextNode(id_=key, text=text) for key, text in task.qa.corpus.items()]
    retriever = VectorStoreIndex(nodes, embed_model=app).as_retriever()
    for given in ({}, {"embed_model": embedding}, {"retriever": retriever}):
        report = engine(task.qa, val_dataset=task.qa, top_k=5, **given).finetune()
        assert [run.name for run in report.runs] == ["retrieval", "base", "tuned"]
    both = {"retriever": retriever, "embed_model": embedding}
    engine(task.qa, top_k=7, **both).finetune()
    names = ["bm25", "bm25", embedding, embedding, retriever, retriever, retriever]
    assert [source for source, _ in sources] == names
    assert [top_k for _, top_k in sources] == [5] * 6 + [7]


def test_a_plain_encoder_finds_its_own_candidates(task, engine, sources):
    engine(task.qa, task.encoder, head_pairs=0).finetune()
    ((source, _),) = sources
    assert source.model_name == task.encoder


def test_one_class_is_refused_before_anything_is_trained(task, engine, monkeypatch):
    monkeypatch.setattr(training, "train", None)
    data = RerankDataset.coerce([{"query": "q", "documents": [{"text": "a", "label": 1}]}])
    for loss in (None, "binary_cross_entropy", losses.LambdaLoss):
        with pytest.raises(DatasetError, match="every label is 1: a model learns from relevant"):
            engine(data, task.encoder, loss=loss).finetune()
    with pytest.raises(DatasetError, match="no document has a teacher score; score the documents"):
        engine(loss="margin_mse").finetune()


def test_unicode_and_control_characters_train(engine, tmp_path):
    odd = ["\x00 harbour \x1b[31m", "Straße 東京 \U0001f389", "e\u0301 \u202e gates", "a\u200bb"]
    data = RerankDataset.coerce(
        [{"query": odd[0], "documents": [{"text": t, "label": n == 1} for n, t in enumerate(odd)]}]
    )
    engine(data, val_dataset=data, passage_tokens=3).finetune()
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_an_embedding_model_that_gives_nan_is_named_with_the_text(task, engine):
    class Broken(HashingEmbedding):
        def vector(self, text):
            return [float("nan")] * 32 if "dusk" in text else super().vector(text)

    for data in (task.qa, task.train):
        with pytest.raises(ArgumentError, match=r"a vector with a NaN or an infinity for corpus\["):
            engine(data, task.encoder, embed_model=Broken()).finetune()


def test_queries_without_a_relevant_document_are_left_out_of_validation_and_said_once(
    task, engine, caplog
):
    none = {"query": "school rains", "documents": [{"text": "it is dry", "label": 0}]}
    some = RerankDataset(examples=[*task.heldout, *RerankDataset.coerce([none])])
    with caplog.at_level(logging.WARNING):
        report = engine(val_dataset=some).finetune()
    said = [r.message for r in caplog.records if "no relevant document" in r.message]
    assert said == ["1 of 13 validation queries have no relevant document and are not evaluated"]
    assert len(report.runs[-1].values("ndcg@10")) == 12
    with pytest.raises(ArgumentError, match=r"val_dataset: no query has a document with a label"):
        engine(val_dataset=RerankDataset.coerce([none])).finetune()


# --- Long documents ----------------------------------------------------------------------------


@pytest.fixture
def long_documents(task):
    """The answer stands behind more words than a passage has."""
    filler = "museum library station market " * 8
    return RerankDataset(
        examples=[
            example.model_copy(
                update={
                    "documents": [
                        d.model_copy(update={"text": f"{filler}{d.text} {filler}"})
                        for d in example.documents
                    ]
                }
            )
            for example in task.train
        ]
    )


def test_long_documents_are_trained_on_by_the_passage_that_the_question_is_about(
    task, engine, long_documents, monkeypatch
):
    seen = []
    monkeypatch.setattr(training, "train", lambda model, rows, run: seen.append(rows))
    embedding = HashingEmbedding(dim=256)
    engine(long_documents, passage_tokens=20, negatives=2, embed_model=embedding).finetune()
    engine(long_documents, passage_tokens=0, negatives=2).finetune()
    passages, whole = seen
    assert len(passages) == len(whole) == 24
    assert all(len(text.split()) <= 20 for row in passages for text in row["documents"])
    best = [(row["query"].split()[0], row["documents"][0]) for row in passages]
    assert sum(place in passage for place, passage in best) == 24
    assert all(len(text.split()) > 60 for row in whole for text in row["documents"])


def test_it_says_what_is_cut(task, engine, long_documents, caplog):
    with caplog.at_level(logging.WARNING, logger="ft_crossencoder"):
        engine(long_documents, passage_tokens=20, embed_model=HashingEmbedding()).finetune()
        assert not caplog.records
        engine(long_documents, passage_tokens=0, max_length=40).finetune()
    (record,) = caplog.records
    assert record.message == (
        "24 of 24 documents are longer than the 40 tokens that the model reads of a query and a "
        "document, and their ends are cut; passage_tokens=20 reads them in passages"
    )


def test_passages_and_length_come_back_with_the_saved_model(engine, tmp_path):
    trained = engine(passage_tokens=7, max_length=30, retrieval_weight=0.25)
    trained.finetune()
    for reranker in (
        trained.get_reranker(),
        CrossEncoderFinetuneEngine.load(tmp_path / "out").get_reranker(),
        FinetunedReranker.load(tmp_path / "out", 3),
    ):
        assert reranker.scorer.passage_tokens == 7
        assert reranker.scorer.max_length == 30
        assert reranker.retrieval_weight == 0.25
        assert reranker.top_n == 3
    changed = trained.get_reranker(None, passage_tokens=None, retrieval_weight=0.0, max_length=50)
    assert changed.scorer.passage_tokens is None
    assert (changed.top_n, changed.retrieval_weight, changed.scorer.max_length) == (None, 0.0, 50)


# --- A fresh head ------------------------------------------------------------------------------


def stages(monkeypatch):
    """Note each training run as (is it the head's, rows), and run it."""
    runs = []
    real = training.train

    def train(model, rows, run):
        runs.append((run.head, len(rows)))
        real(model, rows, run)

    monkeypatch.setattr(training, "train", train)
    return runs


def test_a_plain_encoder_learns_a_head_first_and_counts_the_retriever(
    task, engine, tmp_path, monkeypatch
):
    runs = stages(monkeypatch)
    report = engine(model=task.encoder, val_dataset=task.heldout, head_pairs=48).finetune()
    assert runs == [(True, 48), (False, 24)]
    assert [run.name for run in report.runs] == ["retrieval", "tuned"]  # a fresh head is chance
    engine(model=task.encoder, head_pairs=48).finetune()
    assert manifest(tmp_path / "out")["settings"]["retrieval_weight"] > 0
    engine(model=task.scorer).finetune()
    assert manifest(tmp_path / "out")["settings"]["retrieval_weight"] == 0.0
    assert runs[2:] == [(True, 48), (False, 24), (False, 24)]


def test_no_head_pairs_are_no_head_stage_and_nothing_is_embedded(task, engine, monkeypatch):
    runs, embedding = stages(monkeypatch), HashingEmbedding()
    engine(model=task.encoder, head_pairs=0, embed_model=embedding).finetune()
    engine(embed_model=embedding).finetune()
    assert [head for head, _ in runs] == [False, False]
    assert embedding.text_calls == 0


@pytest.mark.parametrize("base", ["scorer", "plain"])
def test_lora_is_merged_into_an_ordinary_model(task, easy, engine, tmp_path, base):
    train, heldout = easy
    report = engine(
        train,
        getattr(task, base),
        lora={"r": 8},
        val_dataset=heldout,
        retrieval_weight=0.0,
        head_pairs=48,
        **{**LONG, "epochs": 5},
    ).finetune()
    tuned = report.runs[-1].mean("ndcg@10")
    assert tuned > 0.95
    folder = tmp_path / "out"
    assert weights(folder).keys() == weights(task.scorer).keys()
    assert not list(folder.glob("adapter*"))
    assert ndcg(FinetunedReranker.load(folder, device="cpu"), heldout) == pytest.approx(tuned)


def test_lora_builds_on_the_head_that_was_learned(task, engine, tmp_path, monkeypatch, caplog):
    learned = {}
    real = training.train

    def train(model, rows, run):
        real(model, rows, run)
        if run.head:
            learned.update({k: v.clone().numpy() for k, v in model.model.state_dict().items()})

    monkeypatch.setattr(training, "train", train)
    # So small a step that the weights stay, and a checkpoint that is loaded at the end.
    engine(
        model=task.plain, lora=True, learning_rate=1e-9, head_pairs=48, epochs=2,
        head_learning_rate=4e-3, val_dataset=task.heldout,
    ).finetune()  # fmt: skip
    found = weights(tmp_path / "out")
    for name in found:
        np.testing.assert_allclose(found[name], learned[name], atol=1e-5)


# --- Validation --------------------------------------------------------------------------------


def states(folder):
    paths = Path(folder).glob("checkpoint-*/trainer_state.json")
    return max((json.loads(p.read_text()) for p in paths), key=lambda state: state["global_step"])


@pytest.mark.parametrize("lora", [False, True])
def test_the_best_checkpoint_is_kept_and_training_stops(task, engine, tmp_path, monkeypatch, lora):
    marks = iter([0.2, 0.7, 0.5, 0.4, 0.9, 0.9])
    monkeypatch.setattr(CrossEncoderFinetuneEngine, "_means", lambda *_: {"ndcg@10": next(marks)})
    kept = {}
    real = training._Trainer._save_checkpoint

    def save(self, model, trial):
        real(self, model, trial)
        kept[self.state.global_step] = {
            name: value.detach().clone().numpy() for name, value in self.model.state_dict().items()
        }

    monkeypatch.setattr(training._Trainer, "_save_checkpoint", save)
    engine(
        val_dataset=task.heldout,
        epochs=10,
        early_stopping_patience=2,
        save_checkpoints=True,
        lora=lora,
    ).finetune()
    state = states(tmp_path / "out.checkpoints" / "labels")
    assert [entry["eval_ndcg@10"] for entry in state["log_history"]] == [0.2, 0.7, 0.5, 0.4]
    best = list(kept.values())[1]
    name = next(name for name in best if name.endswith("classifier.weight") or "to_save" in name)
    saved = weights(tmp_path / "out")["classifier.weight"]
    np.testing.assert_array_equal(saved, best[name])
    assert not np.array_equal(saved, list(kept.values())[-1][name])


def test_the_retrievers_weight_is_fitted_on_validation(task, engine, tmp_path):
    right_first = RerankDataset(
        examples=[
            e.model_copy(
                update={
                    "documents": [
                        d.model_copy(update={"retrieval_score": 0.1 + d.label})
                        for d in sorted(e.documents, key=lambda d: -d.label)
                    ]
                }
            )
            for e in task.heldout
        ]
    )
    report = engine(val_dataset=right_first).finetune()
    weight = manifest(tmp_path / "out")["settings"]["retrieval_weight"]
    assert weight > 0
    assert report.runs[-1].mean("ndcg@10") == 1.0
    reranker = FinetunedReranker.load(tmp_path / "out", device="cpu")
    assert reranker.retrieval_weight == weight
    assert ndcg(reranker, right_first) == 1.0
    alone = FinetunedReranker.load(tmp_path / "out", device="cpu", retrieval_weight=0.0)
    assert ndcg(alone, right_first) < 1.0


def test_it_says_plainly_when_reranking_did_not_help(task, engine, caplog):
    with caplog.at_level(logging.WARNING, logger="ft_crossencoder"):
        engine(val_dataset=task.heldout, learning_rate=1e-9).finetune()
    assert (
        "validation does not show that reranking helps: keep the retriever's order" in caplog.text
    )


# --- Going on ----------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
import ft_core.training
ft_core.training.has_fast_bf16 = lambda device: False
from ft_crossencoder import CrossEncoderFinetuneEngine, training

train, model, output, stage, step = sys.argv[1:]
real = training._Trainer.training_step

def training_step(self, *args, **kwargs):
    if self.args.output_dir.endswith(stage) and self.state.global_step == int(step):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *args, **kwargs)

training._Trainer.training_step = training_step
CrossEncoderFinetuneEngine(train, model, output, **%r).finetune()
"""


@pytest.fixture(scope="module")
def interrupted(task, tmp_path_factory, one_thread):
    """Arguments of an engine with two stages, and the weights that it ends with undisturbed."""
    folder = tmp_path_factory.mktemp("interrupted")
    task.train.save(folder / "train.jsonl")
    settings = {**QUICK, "epochs": 3, "head_pairs": 48, "checkpoint_save_steps": 4, "dropout": 0.1}
    settings["loss"] = "binary_cross_entropy"
    arguments = (str(folder / "train.jsonl"), task.encoder)
    with pytest.MonkeyPatch.context() as patch:
        in_fp32(patch)
        CrossEncoderFinetuneEngine(*arguments, folder / "whole", **settings).finetune()
    return arguments, settings, weights(folder / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "step"), [("head", 6), ("labels", 13)])
def test_killed_in_the_middle_it_goes_on_and_ends_as_if_nothing_had_been(
    interrupted, tmp_path, caplog, stage, step
):
    arguments, settings, expected = interrupted
    output = tmp_path / "out"
    command = [sys.executable, "-c", KILLED % settings, *arguments, str(output), stage, str(step)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not output.exists()
    with caplog.at_level(logging.INFO, logger="ft_core.training"):
        CrossEncoderFinetuneEngine(
            *arguments, output, **settings, resume_from_checkpoint=True
        ).finetune()
    checkpoint = tmp_path / "out.checkpoints" / stage / f"checkpoint-{step // 4 * 4}"
    assert f"resuming from {checkpoint}" in caplog.text
    found = weights(output)
    assert found.keys() == expected.keys()
    for name in expected:
        if not name.endswith("key.bias"):  # softmax is blind to it: rounding alone moves it
            np.testing.assert_allclose(found[name], expected[name], atol=1e-4, err_msg=name)
    assert not checkpoint.exists()


def test_a_head_that_was_learned_is_not_learned_again(task, engine, tmp_path, monkeypatch):
    settings = {"model": task.encoder, "head_pairs": 48, "save_checkpoints": True}
    engine(**settings).finetune()
    first = weights(tmp_path / "out")
    runs = stages(monkeypatch)
    engine(**settings, resume_from_checkpoint=True).finetune()
    assert runs == [(False, 24)]
    assert not moved(first, weights(tmp_path / "out"))
    engine(**settings).finetune()
    assert runs == [(False, 24), (True, 48), (False, 24)]


@pytest.mark.parametrize("base", ["scorer", "encoder"])
def test_checkpoints_of_other_data_or_settings_are_refused(task, engine, base):
    settings = {"model": getattr(task, base), "head_pairs": 48}
    engine(**settings, save_checkpoints=True).finetune()
    for change in ({"dataset": task.heldout}, {"learning_rate": 1e-3}, {"loss": "lambda"}):
        with pytest.raises(TrainingError, match="checkpoints of other data or settings"):
            engine(**{**settings, **change}, resume_from_checkpoint=True).finetune()


def test_a_head_that_was_learned_from_other_data_is_refused(task, engine, tmp_path):
    engine(model=task.encoder, head_pairs=48, save_checkpoints=True).finetune()
    shutil.rmtree(tmp_path / "out.checkpoints" / "labels")  # as if killed between the two
    other = engine(task.heldout, task.encoder, head_pairs=48, resume_from_checkpoint=True)
    with pytest.raises(TrainingError, match="head: holds checkpoints of other data or settings"):
        other.finetune()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(task, engine, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        engine(model=task.encoder, head_pairs=48, output=name, seed=seed).finetune()
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert not moved(a, b)
    assert moved(a, c)


# --- The saved model ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(task, tmp_path_factory, one_thread):
    folder = tmp_path_factory.mktemp("trained") / "out"
    CrossEncoderFinetuneEngine(task.train, task.scorer, folder, **QUICK).finetune()
    return folder


@pytest.fixture
def nodes(all_texts):
    texts = [text[:150] for text in all_texts[:20]]
    return [
        NodeWithScore(node=TextNode(id_=str(n), text=text), score=1 - n / 20)
        for n, text in enumerate(texts)
    ]


def ids(nodes):
    return [item.node.node_id for item in nodes]


def test_it_is_an_ordinary_cross_encoder(trained):
    model = CrossEncoder(str(trained), device="cpu")
    assert model.num_labels == 1
    reranker = FinetunedReranker.load(trained, device="cpu")
    pairs = [("harbour opens", "the gates are unlocked at dawn"), ("harbour", "coins")]
    expected = model.predict(pairs)
    found = [reranker.score(query, [text])[0] for query, text in pairs]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_llama_indexs_reranker_gives_the_same_order_for_short_texts(trained, nodes):
    engine = CrossEncoderFinetuneEngine.load(trained, device="cpu")
    ours = engine.get_reranker(6).postprocess_nodes(nodes, query_str="harbour opens")
    theirs = engine.get_finetuned_model(top_n=6)
    assert isinstance(theirs, SentenceTransformerRerank)
    assert ids(theirs.postprocess_nodes(nodes, query_str="harbour opens")) == ids(ours)
    assert len(ours) == 6
    kept = engine.get_finetuned_model(top_n=2, keep_retrieval_score=True)
    assert kept.keep_retrieval_score
    assert kept.top_n == 2
    assert engine.get_finetuned_model().top_n == 3


def test_another_model_can_be_asked_for(trained, task, nodes):
    engine = CrossEncoderFinetuneEngine.load(trained, device="cpu")
    base = engine.get_finetuned_model(task.scorer, top_n=20)
    assert base.model == task.scorer


def test_a_loaded_engine_has_the_model_and_no_data(trained, task):
    engine = CrossEncoderFinetuneEngine.load(trained)
    assert engine.model_id == task.scorer
    with pytest.raises(ArgumentError, match="dataset: is not there: a loaded engine cannot train"):
        engine.finetune()


def test_nothing_trained_is_an_error_that_says_so(tmp_path):
    engine = CrossEncoderFinetuneEngine([], "x", tmp_path / "out")
    for ask in (engine.get_reranker, engine.get_finetuned_model, lambda: engine.push_to_hub("a/b")):
        with pytest.raises(ArtifactError, match="out: no such folder; train first"):
            ask()
    with pytest.raises(ArtifactError, match="out: no such folder; train first"):
        CrossEncoderFinetuneEngine.load(tmp_path / "out")


def test_a_folder_of_another_kind_is_named(trained, tmp_path):
    saved = manifest(trained)
    (tmp_path / "ft.json").write_text(json.dumps({**saved, "kind": "judge"}))
    for load in (CrossEncoderFinetuneEngine.load, FinetunedReranker.load):
        with pytest.raises(ArtifactError, match="holds a judge, not a cross-encoder"):
            load(tmp_path)


def test_the_hub_refuses_with_one_clear_error(trained, monkeypatch):
    engine = CrossEncoderFinetuneEngine.load(trained)
    for missing in (None, ""):
        with pytest.raises(ArgumentError, match='repo_id: is missing; name it as "name/model"'):
            engine.push_to_hub(missing)
    sent = []

    def push(self, repo_id, **kwargs):
        if repo_id == "me/closed":
            raise OSError("401 Client Error\nmore lines")
        sent.append((repo_id, kwargs))
        return "address"

    monkeypatch.setattr(CrossEncoder, "push_to_hub", push)
    with pytest.raises(
        ArgumentError, match=r"^repo_id: 'me/closed' cannot be written: 401 Client Error; log in"
    ):
        engine.push_to_hub("me/closed")
    assert engine.push_to_hub("me/model", private=True) == "address"
    assert sent == [("me/model", {"private": True})]


# --- Bad arguments -----------------------------------------------------------------------------


def test_the_constructor_does_no_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    CrossEncoderFinetuneEngine("nowhere.jsonl", "nowhere", tmp_path / "out")
    CrossEncoderFinetuneEngine([])
    assert not list(tmp_path.iterdir())


def test_importing_the_pack_and_making_an_engine_loads_nothing_heavy():
    code = (
        "import sys, ft_crossencoder as f; f.CrossEncoderFinetuneEngine\n"
        "heavy = ('torch', 'transformers', 'sentence_transformers', 'datasets')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert shown.stdout.strip() == "[]"


def test_the_positional_arguments_are_the_predecessors():
    import inspect

    names = list(inspect.signature(CrossEncoderFinetuneEngine).parameters)
    assert names[:9] == [
        "dataset",
        "model_id",
        "model_output_path",
        "batch_size",
        "val_dataset",
        "loss",
        "epochs",
        "show_progress_bar",
        "evaluation_steps",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs: is a whole number from 1, not 0"),
        ({"epochs": 1.5}, r"epochs: is a whole number from 1, not 1\.5"),
        ({"batch_size": 1}, "batch_size: is a whole number from 2, not 1"),
        ({"negatives": 0}, "negatives: is a whole number from 1, not 0"),
        ({"passage_tokens": -1}, "passage_tokens: is a whole number from 0, not -1"),
        ({"head_pairs": -1}, "head_pairs: is a whole number from 0, not -1"),
        ({"max_length": 2}, "max_length: is a whole number from 8, not 2"),
        ({"seed": -1}, "seed: is a whole number from 0, not -1"),
        ({"learning_rate": 0}, "learning_rate: is above 0, not 0"),
        ({"learning_rate": float("nan")}, "learning_rate: is above 0, not nan"),
        ({"head_learning_rate": -1.0}, "head_learning_rate: is above 0"),
        ({"dropout": 1.0}, "dropout: is at least 0 and below 1"),
        ({"frozen_share": -0.1}, "frozen_share: is at least 0 and below 1"),
        ({"precision": "int8"}, "precision: is auto, fp32, bf16 or fp16"),
        ({"loss": "hinge"}, "loss: is one of listnet, lambda, .*, not 'hinge'"),
        ({"retriever": "bm26"}, "retriever: is a retriever, an .* or \"bm25\", not 'bm26'"),
        ({"retrieval_weight": 1.5}, "retrieval_weight: is from 0 to 1"),
        ({"retrieval_weight": float("nan")}, "retrieval_weight: is from 0 to 1"),
        ({"top_k": 0}, "top_k: is at least 1, not 0"),
        ({"evaluation_steps": 0}, "evaluation_steps: is at least 1, not 0"),
        ({"checkpoint_save_steps": -5}, "checkpoint_save_steps: is at least 1, not -5"),
        ({"early_stopping_patience": 3}, "early_stopping_patience: needs a val_dataset"),
        (
            {"early_stopping_patience": 0, "val_dataset": []},
            "early_stopping_patience: is at least 1, not 0",
        ),
    ],
)
def test_bad_settings_are_named_by_the_constructor(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        CrossEncoderFinetuneEngine(None, **arguments)


def test_bad_data_models_and_metrics_are_named(task, engine, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"query": "q", "documents": []}')
    with pytest.raises(DatasetError, match=r"bad\.jsonl: line 1, documents: the query has no doc"):
        engine(tmp_path / "bad.jsonl").finetune()
    with pytest.raises(ArgumentError, match="val_dataset: int is no dataset"):
        engine(val_dataset=3).finetune()
    with pytest.raises(ArgumentError, match=r"model_id: .*/nowhere' cannot be loaded"):
        engine(model=str(tmp_path / "nowhere")).finetune()
    with pytest.raises(ArgumentError, match=r"metric: is one of hit_rate@1.*, not 'bleu'"):
        engine(val_dataset=task.heldout, metric="bleu").finetune()
    with pytest.raises(ArgumentError, match="weight_decoy: finetune takes no arguments"):
        engine().finetune(weight_decoy=1)
    assert not (tmp_path / "out").exists()


def test_weights_that_became_nan_are_not_saved(engine, tmp_path):
    with pytest.raises(TrainingError, match="became NaN or infinite; lower learning_rate"):
        engine(learning_rate=float("inf")).finetune()
    assert not (tmp_path / "out").exists()


# --- Folders and disks -------------------------------------------------------------------------


def files(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_foreign_folder_is_refused_before_any_work(engine, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"thesis: holds files that no fine-tuning pack saved"):
        engine(model="no/such-model", output="thesis").finetune()
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_foreign_files_beside_the_checkpoints_survive(task, engine, tmp_path):
    foreign = tmp_path / "out.checkpoints" / "chapter.txt"
    foreign.parent.mkdir()
    foreign.write_text("years of work")
    engine(model=task.encoder, head_pairs=48).finetune()
    assert files(tmp_path / "out.checkpoints") == {foreign: b"years of work"}


@pytest.mark.parametrize("stage", ["head", "labels"])
def test_foreign_files_in_the_checkpoints_way_are_refused(task, engine, tmp_path, stage):
    foreign = tmp_path / "out.checkpoints" / stage / "chapter.txt"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("years of work")
    with pytest.raises(TrainingError, match=rf"{stage}: is in the way of the checkpoints; move it"):
        engine(model=task.encoder, head_pairs=48).finetune()
    assert foreign.read_text() == "years of work"


@contextmanager
def full_disk():
    """Let the kernel refuse to write more than 20 kB to a file, as a full disk refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("base", ["scorer", "encoder"])
def test_a_full_disk_in_training_leaves_the_last_good_model(task, engine, tmp_path, base):
    engine(seed=1).finetune()
    before = files(tmp_path / "out")
    again = engine(model=getattr(task, base), head_pairs=48, seed=2)
    with full_disk(), pytest.raises(TrainingError, match="a checkpoint cannot be written"):
        again.finetune()
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("saves", [0, 1], ids=["the head", "the model"])
def test_a_full_disk_while_saving_leaves_the_last_good_model(
    task, engine, tmp_path, monkeypatch, saves
):
    settings = {"model": task.encoder, "head_pairs": 48}
    engine(**settings, seed=1).finetune()
    before = files(tmp_path / "out")
    real, done = training.save, []

    def save(*arguments):
        done.append(arguments)
        if len(done) <= saves:
            return real(*arguments)
        with full_disk():
            return real(*arguments)

    monkeypatch.setattr(training, "save", save)
    with pytest.raises(TrainingError, match="the trained model cannot be written"):
        engine(**settings, seed=2).finetune()
    assert files(tmp_path / "out") == before
    assert not list(tmp_path.rglob("*.partial"))

    monkeypatch.undo()  # there is room again
    engine(**settings, seed=2, resume_from_checkpoint=True).finetune()
    assert files(tmp_path / "out") != before
