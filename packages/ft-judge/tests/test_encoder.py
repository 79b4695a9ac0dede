"""Encoders that judge: tiny ones that really train, in LlamaIndex's evaluators."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import model_assets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llama_index.core import Settings
from llama_index.core.evaluation import (
    BatchEvalRunner,
    CorrectnessEvaluator,
    PairwiseComparisonEvaluator,
)
from transformers import AutoModel, AutoTokenizer, RobertaConfig, RobertaForSequenceClassification

from ft_core.artifacts import Manifest
from ft_core.datasets import JudgeDataset, JudgeExample
from ft_core.errors import ArgumentError, ArtifactError, DatasetError, FTError, TrainingError
from ft_core.jobs import JobStatus
from ft_judge import (
    CorrectnessJudgeFinetuneEngine,
    PairwiseJudgeFinetuneEngine,
    evaluate_judges,
    load_judge,
)
from ft_judge import calibration as cal
from ft_judge.cli import judge as command
from ft_judge.encoder import EncoderJudgeStudent
from ft_judge.encoder_lessons import Lessons
from ft_judge.encoder_model import Reader, load_encoder, window
from ft_judge.encoder_rows import texts_of
from ft_judge.encoder_settings import EncoderSettings
from ft_judge.engine import JudgeFinetuneEngine
from ft_judge.recipe import Recipe
from ft_judge.students import encoder_student, saved

WORD_TEXT = """
    harbour tower garden station market library bridge museum castle theatre school bakery river
    lantern copper velvet thunder meadow pepper ladder basket mirror candle feather saddle barrel
    needle pillow hammer turnip walnut glacier desert island valley canyon forest prairie lagoon
"""
WORDS = WORD_TEXT.split()
GOOD, BAD, SAME = "bowline", "glue", "rope"
TRAIN: dict[str, Any] = {"learning_rate": 2e-3, "batch_size": 8, "epochs": 6, "precision": "fp32"}
TRAIN |= {"device": "cpu", "show_progress": False, "dropout": 0.0, "validation_share": 0.2}


def answer(rng: random.Random, word: str) -> str:
    """Some words, of one to a dozen, with the one that counts among them."""
    words = rng.choices(WORDS, k=rng.randint(1, 12))
    words.insert(rng.randrange(len(words) + 1), word)
    return " ".join(words)


def pairs(count: int, seed: int, ties: bool = False) -> JudgeDataset:
    """Pairs of which the answer with GOOD is better, whichever is longer or stands first."""
    rng = random.Random(seed)
    examples = []
    for number in range(count):
        tied = ties and number % 3 == 0
        verdict = 0.5 if tied else float(rng.random() < 0.5)
        words = [SAME, SAME] if tied else [GOOD, BAD][:: 1 if verdict else -1]
        examples.append(
            JudgeExample(
                task="pairwise",
                query="what of " + " ".join(rng.sample(WORDS, 5)),
                answer=answer(rng, words[0]),
                second_answer=answer(rng, words[1]),
                verdict=verdict,
                flipped_verdict=verdict,
                reference="the good one" if number % 4 == 0 else None,
            )
        )
    return JudgeDataset(examples=examples)


def graded(count: int, seed: int) -> JudgeDataset:
    rng = random.Random(seed)
    scores = {BAD: 1.0, SAME: 3.5, GOOD: 5.0}
    examples = []
    for _ in range(count):
        word = rng.choice(list(scores))
        query = "what of " + " ".join(rng.sample(WORDS, 5))
        fields: dict[str, Any] = {
            "query": query,
            "answer": answer(rng, word),
            "score": scores[word],
        }
        examples.append(JudgeExample(task="correctness", **fields))
    return JudgeDataset(examples=examples)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> str:
    """A tiny cross-encoder of random weights that knows the words."""
    texts = [" ".join([*WORDS, GOOD, BAD, SAME, "what of the good one reference :"])]
    folder = tmp_path_factory.mktemp("base")
    return str(model_assets.tiny_cross_encoder(folder, texts, window=64, spread=0.1))


@pytest.fixture(scope="module")
def plain(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same without a head."""
    folder = tmp_path_factory.mktemp("plain")
    for part in (AutoModel, AutoTokenizer):
        part.from_pretrained(base).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pairwise(base: str, tmp_path_factory: pytest.TempPathFactory) -> PairwiseJudgeFinetuneEngine:
    folder = tmp_path_factory.mktemp("pairs") / "judge"
    engine = PairwiseJudgeFinetuneEngine(pairs(64, 0), base, folder, **TRAIN)
    assert engine.finetune().status is JobStatus.SUCCEEDED
    return engine


@pytest.fixture(scope="module")
def correctness(
    base: str, tmp_path_factory: pytest.TempPathFactory
) -> CorrectnessJudgeFinetuneEngine:
    folder = tmp_path_factory.mktemp("grades") / "judge"
    settings = TRAIN | {"epochs": 16}
    engine = CorrectnessJudgeFinetuneEngine(graded(96, 0), base, folder, **settings)
    engine.finetune()
    return engine


def student_of(data: JudgeDataset, base: str, folder: Path, **settings: Any) -> EncoderJudgeStudent:
    pairs_in_it = data.examples[0].task == "pairwise"
    recipe = Recipe("pairwise" if pairs_in_it else "correctness", False, data)
    return EncoderJudgeStudent(recipe, base, folder, **(TRAIN | settings))


def judged(evaluator: Any, example: JudgeExample) -> Any:
    given = {"query": example.query, "response": example.answer, "reference": example.reference}
    if example.second_answer is not None:
        given["second_response"] = example.second_answer
    return asyncio.run(evaluator.aevaluate(**given))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model, _, has_head = load_encoder(str(folder), "cpu")
    assert has_head
    return dict(model.state_dict())


def edited(folder: Path, **record: Any) -> None:
    """Change the record in a folder's `ft.json`."""
    file = folder / "ft.json"
    manifest = json.loads(file.read_text())
    manifest["settings"]["judge"] |= record
    file.write_text(json.dumps(manifest))


# --- Pairs ---------------------------------------------------------------------------------------


def test_it_learns_the_rule_and_flips_nothing(pairwise: PairwiseJudgeFinetuneEngine) -> None:
    judge = pairwise.get_finetuned_model()
    assert isinstance(judge, PairwiseComparisonEvaluator)
    unseen = pairs(40, 1)
    report = evaluate_judges(unseen, judge, show_progress=False)
    found = report.statistics["judge"]
    assert found["kappa_teacher"].value > 0.85
    assert found["flips"].value == 0.0
    assert found["calibration_error_teacher"].value < 0.2


def test_the_order_does_not_matter_to_the_last_bit(pairwise: PairwiseJudgeFinetuneEngine) -> None:
    judge = pairwise.get_finetuned_model()
    odd = [
        {"answer": "", "second_answer": "bowline"},
        {"answer": "", "second_answer": ""},
        {"answer": "glue", "second_answer": "glue"},
        {"answer": "walnut " * 200, "second_answer": "bowline"},
        {"answer": "日本語 \U0001f600", "second_answer": "\n\t"},
    ]
    examples = pairs(30, 2, ties=True).examples
    examples += [examples[0].model_copy(update=changes) for changes in odd]
    for example in examples:
        one, other = judged(judge, example), judged(judge, example.flipped())
        assert one.probability == 1 - other.probability
        assert other.probability == 1 - one.probability
        assert one.score == 1 - other.score
        assert list(one.probabilities.values()) == list(other.probabilities.values())[::-1]
    assert judged(judge, examples[-3]).score == 0.5  # the same answer twice
    scorer = judge._scorer
    alone = scorer.score("what of walnut", None, "bowline")
    scorer.score("what of walnut", None, "walnut " * 50)
    assert scorer.score("what of walnut", None, "bowline") == alone


def test_what_a_result_holds(pairwise: PairwiseJudgeFinetuneEngine) -> None:
    judge = pairwise.get_finetuned_model()
    example = next(e for e in pairs(20, 3) if e.verdict == 1.0)
    result = judged(judge, example)
    assert (result.score, result.passing, result.feedback) == (1.0, True, "[[A]]")
    assert result.query == example.query
    assert result.probabilities == {
        "[[A]]": result.probability,
        "[[B]]": 1 - result.probability,
    }
    flipped = judged(judge, example.flipped())
    assert (flipped.score, flipped.passing, flipped.feedback) == (0.0, False, "[[B]]")
    asked = judge.evaluate(
        query=example.query, response=example.answer, second_response=example.second_answer
    )
    assert asked.score == 1.0
    with pytest.raises(ValueError, match="second_response must be provided"):
        judge.evaluate(query="q", response="a")
    assert judge.get_prompts() == {}


def test_in_a_batch_runner_without_any_llm(
    pairwise: PairwiseJudgeFinetuneEngine,
    correctness: CorrectnessJudgeFinetuneEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Settings, "_llm", None)
    monkeypatch.setattr(
        type(Settings), "llm", property(lambda self: pytest.fail("Settings.llm was touched"))
    )
    examples = pairs(12, 4).examples
    judges = {"pairs": pairwise.get_finetuned_model(enforce_consensus=False)}
    results = BatchEvalRunner(judges, workers=4).evaluate_response_strs(
        queries=[e.query for e in examples],
        response_strs=[e.answer for e in examples],
        second_response=[e.second_answer for e in examples],
    )
    one_by_one = [
        judged(judges["pairs"], e.model_copy(update={"reference": None})) for e in examples
    ]
    assert [r.probability for r in results["pairs"]] == [r.probability for r in one_by_one]
    grades = BatchEvalRunner({"grades": correctness.get_finetuned_model()}, workers=2)
    found = grades.evaluate_response_strs(queries=["what"] * 2, response_strs=[GOOD, BAD])
    assert [r.score for r in found["grades"]] == [5.0, 1.0]


def test_the_reference_is_read(pairwise: PairwiseJudgeFinetuneEngine) -> None:
    scorer = pairwise.get_finetuned_model()._scorer
    assert scorer.score("what", "the good one", "glue") != scorer.score("what", None, "glue")
    assert texts_of("q", None, "a") == texts_of("q", "", "a") == ("q", "a")


def test_ties_are_learned(base: str, tmp_path: Path, pairwise: Any) -> None:
    engine = PairwiseJudgeFinetuneEngine(
        pairs(96, 5, ties=True), base, tmp_path / "judge", **TRAIN | {"epochs": 8}
    )
    engine.finetune()
    record = saved(engine.output_dir)[1].settings["judge"]
    assert 0 < record["tie_threshold"] < 0.5
    judge = engine.get_finetuned_model()
    unseen = pairs(45, 6, ties=True)
    results = [judged(judge, example) for example in unseen]
    agree = np.mean([r.score == e.verdict for r, e in zip(results, unseen, strict=True)])
    assert agree > 0.75  # by chance a third
    tie = next(r for r in results if r.score == 0.5)
    assert (tie.passing, tie.feedback) == (None, "[[C]]")
    assert saved(pairwise.output_dir)[1].settings["judge"]["tie_threshold"] == 0.0


# --- Grades --------------------------------------------------------------------------------------


def test_grades(correctness: CorrectnessJudgeFinetuneEngine) -> None:
    judge = correctness.get_finetuned_model(score_threshold=4.5)
    assert isinstance(judge, CorrectnessEvaluator)
    unseen = graded(40, 1)
    results = [judged(judge, example) for example in unseen]
    right = [r.score == e.score for r, e in zip(results, unseen, strict=True)]
    assert np.mean(right) > 0.8
    for result, example in zip(results, unseen, strict=True):
        assert set(result.probabilities) == {"1.0", "3.5", "5.0"}
        assert sum(result.probabilities.values()) == pytest.approx(1)
        assert result.probability == max(result.probabilities.values())
        assert result.passing == (result.score >= 4.5)
        assert result.feedback == str(result.score)
        assert (result.query, result.response) == (example.query, example.answer)
    assert abs(np.mean([r.probability for r in results]) - np.mean(right)) < 0.2
    report = evaluate_judges(unseen, judge, show_progress=False)
    assert report.statistics["judge"]["spearman_teacher"].value > 0.8
    with pytest.raises(ValueError, match="query and response must be provided"):
        judge.evaluate(query="q")


def test_many_scores_are_rounded_to_halves(base: str, tmp_path: Path) -> None:
    examples = [
        example.model_copy(update={"score": 1 + 4 * number / 23})
        for number, example in enumerate(graded(24, 2))
    ]
    student = student_of(JudgeDataset(examples=examples), base, tmp_path / "judge", epochs=1)
    record = student.finetune().raw.settings["judge"]
    assert record["grades"] == [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0]
    assert sorted(record["cuts"]) == record["cuts"]
    assert len(record["cuts"]) == 8


# --- The head ------------------------------------------------------------------------------------


def test_a_plain_encoder_gets_a_head(plain: str, tmp_path: Path) -> None:
    data, unseen = pairs(64, 0), pairs(40, 1)
    student = student_of(data, plain, tmp_path / "judge")
    job = student.finetune()
    assert "base_loss" not in job.raw.metrics  # what a fresh head says is chance
    judge = student.get_evaluator({})
    agree = np.mean([judged(judge, e).score == e.verdict for e in unseen])
    assert agree > 0.9


def test_lora_and_frozen_layers(base: str, plain: str, tmp_path: Path) -> None:
    data = pairs(16, 8)
    short = {"epochs": 1}
    student_of(data, base, tmp_path / "frozen", frozen_share=0.5, **short).finetune()
    before, after = weights(Path(base)), weights(tmp_path / "frozen")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in moved if "layer.1" in name or "classifier" in name}
    assert not {name for name in moved if "layer.0" in name or "embeddings" in name}
    pytest.importorskip("peft")
    lora = student_of(data, plain, tmp_path / "lora", lora={"r": 2}, **short)
    assert lora.finetune().raw.settings["lora"] == {"r": 2}
    after = weights(tmp_path / "lora")
    assert set(after) == set(before)  # merged: nothing of peft is left
    model = AutoModel.from_pretrained(plain)
    start = {f"bert.{name}": value for name, value in model.state_dict().items()}
    changed = {name for name in start if not torch.equal(start[name], after[name])}
    assert "bert.encoder.layer.0.attention.self.query.weight" in changed
    assert "bert.embeddings.word_embeddings.weight" not in changed


# --- Long texts ----------------------------------------------------------------------------------


def test_what_is_too_long_is_told_once(
    base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    examples = pairs(16, 9).examples
    long = "walnut " * 100
    examples[0] = examples[0].model_copy(update={"answer": long + GOOD})
    data = JudgeDataset(examples=examples)
    student = student_of(data, base, tmp_path / "judge", epochs=1, max_length=48)
    job = student.finetune()
    assert caplog.text.count("1 of 32 answers (3%) do not fit") == 1
    assert "48 tokens" in caplog.text
    assert job.raw.metrics["cut_share"] == pytest.approx(1 / 32)
    judge = student.get_evaluator({})
    caplog.clear()
    for _ in range(2):
        judged(judge, examples[0])
    assert caplog.text.count("is cut, here and from now on") == 1
    same = examples[0].model_copy(update={"second_answer": long + BAD})
    assert judged(judge, same).score == 0.5  # they differ behind the cut alone


def test_the_longer_text_is_cut(base: str) -> None:
    _, tokenizer, _ = load_encoder(base, "cpu")
    reader = Reader(tokenizer, 16)
    (inputs,) = reader.inputs([("what of tower", "walnut " * 100)])
    assert tokenizer.decode(inputs["input_ids"]).startswith("[CLS] what of tower [SEP] walnut")
    assert len(inputs["input_ids"]) == 16
    assert (reader.count, reader.cut) == (1, 1)


def test_the_window_of_a_model(base: str) -> None:
    encoder, tokenizer, _ = load_encoder(base, "cpu")
    assert window(encoder, tokenizer) == 64
    config = RobertaConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=34,
    )
    assert window(RobertaForSequenceClassification(config), tokenizer) == 32


# --- Kills, repeats, cancelling ------------------------------------------------------------------

KILLED = """
import os, pickle, signal, sys
from ft_judge.encoder import EncoderJudgeStudent
from ft_judge.recipe import Recipe
from ft_core.datasets import JudgeDataset
data, base, folder, at, settings = pickle.load(open(sys.argv[1], "rb"))
class Killed(EncoderJudgeStudent):
    def _reported(self, metrics):
        super()._reported(metrics)
        if metrics["step"] >= at:
            os.kill(os.getpid(), signal.SIGKILL)
Killed(Recipe("pairwise", False, JudgeDataset.load(data)), base, folder, **settings).finetune()
"""


def killed(data: JudgeDataset, base: str, folder: Path, at: int, **settings: Any) -> None:
    """Train in a process that is killed at a step."""
    import pickle

    data.save(folder.with_suffix(".jsonl"))
    given = (folder.with_suffix(".jsonl"), base, folder, at, TRAIN | settings)
    folder.with_suffix(".pickle").write_bytes(pickle.dumps(given))
    asked = [sys.executable, "-c", KILLED, str(folder.with_suffix(".pickle"))]
    ended = subprocess.run(asked, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def test_a_killed_run_goes_on(plain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pairs(32, 10)
    settings: dict[str, Any] = {"epochs": 3, "dropout": 0.2}
    whole = student_of(data, plain, tmp_path / "whole", **settings)
    whole.finetune()
    steps = int(whole.events()[-1].data["step"])
    # Before there is a checkpoint, and after two.
    killed(data, plain, tmp_path / "early", 1, **settings)
    killed(data, plain, tmp_path / "late", steps - 1, **settings)
    for name, first in (("early", 1), ("late", steps * 2 // 3 + 1)):
        student = student_of(data, plain, tmp_path / name, **settings)
        logged: list[Any] = []
        monkeypatch.setattr(student, "_log", logged.append)
        dead = EncoderJudgeStudent(student.recipe, plain, tmp_path / name, **settings)
        dead.job_id = str(tmp_path / name)
        assert dead.get_current_job().status is JobStatus.FAILED
        assert student.finetune().status is JobStatus.SUCCEEDED
        assert logged[0].data["step"] == first
        assert not (tmp_path / f"{name}.training").exists()
        expected, found = weights(tmp_path / "whole"), weights(tmp_path / name)
        assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_the_same_again_is_not_trained_again(
    pairwise: PairwiseJudgeFinetuneEngine,
    base: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ft_judge.encoder_training.train", None)
    again = PairwiseJudgeFinetuneEngine(pairs(64, 0), base, pairwise.output_dir, **TRAIN)
    with caplog.at_level(logging.INFO):
        assert again.finetune().status is JobStatus.SUCCEEDED
    assert "is trained already" in caplog.text
    other = PairwiseJudgeFinetuneEngine(
        pairs(64, 0), base, pairwise.output_dir, **TRAIN | {"seed": 1}
    )
    with pytest.raises(TypeError):  # it would train
        other.finetune()
    assert pairwise.get_finetuned_model() is not None


def test_a_job_like_any_other(pairwise: PairwiseJudgeFinetuneEngine, base: str) -> None:
    assert pairwise.job_id == str(pairwise.output_dir)
    job = pairwise.get_current_job()
    assert (job.status, job.model) == (JobStatus.SUCCEEDED, str(pairwise.output_dir))
    assert pairwise.wait(timeout=1).status is JobStatus.SUCCEEDED
    assert pairwise.cancel().status is JobStatus.SUCCEEDED
    events = pairwise.events()
    assert any("valid_loss" in event.data for event in events)
    assert events[-1].data["step"] == events[-1].data["steps"]
    metrics = job.raw.metrics
    assert metrics["validation_loss"] < metrics["base_loss"]
    assert metrics["examples"] + metrics["validation_examples"] == 64
    found = EncoderJudgeStudent.from_job_id(str(pairwise.output_dir))
    assert found.get_current_job().status is JobStatus.SUCCEEDED


def test_cancelled_and_gone_on_with(base: str, tmp_path: Path) -> None:
    data = pairs(32, 11)
    student = student_of(data, base, tmp_path / "judge", epochs=3)
    log = student._log
    student._log = lambda event: (log(event), student._folder.cancel())  # type: ignore[method-assign,assignment,func-returns-value]
    with pytest.raises(TrainingError, match="cancelled"):
        student.finetune()
    student.job_id = str(tmp_path / "judge")
    assert student.get_current_job().status is JobStatus.CANCELLED
    with pytest.raises(ArtifactError):
        student.get_evaluator({})
    again = student_of(data, base, tmp_path / "judge", epochs=3)
    assert again.finetune(wait=False).status is JobStatus.SUCCEEDED


def test_early_stopping_keeps_the_best_epoch(base: str, tmp_path: Path) -> None:
    wrong = JudgeDataset(
        examples=[
            e.model_copy(update={"verdict": 1 - e.verdict, "flipped_verdict": 1 - e.verdict})
            for e in pairs(16, 12)
            if e.verdict is not None
        ]
    )
    recipe = Recipe("pairwise", False, pairs(48, 0), wrong)
    settings = TRAIN | {"early_stopping_patience": 1, "epochs": 9}
    student = EncoderJudgeStudent(recipe, base, tmp_path / "judge", **settings)
    job = student.finetune()
    losses = [e.data["valid_loss"] for e in student.events() if "valid_loss" in e.data]
    assert len(losses) < 9
    assert job.raw.metrics["validation_loss"] == pytest.approx(min(losses), abs=1e-5)
    assert job.raw.metrics["examples"] == 48
    assert set(job.raw.data) == {"train", "validation"}


def test_random_numbers_of_the_app_stay(base: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.rand(1), random.random()
    torch.manual_seed(5)
    random.seed(5)
    student_of(pairs(8, 13), base, tmp_path / "judge", epochs=1).finetune()
    load_judge(tmp_path / "judge", device="cpu")
    assert (torch.rand(1), random.random()) == expected


# --- Folders -------------------------------------------------------------------------------------

ELSEWHERE = """
import asyncio, json, sys
from ft_judge import load_judge
folder, query, first, second = sys.argv[1:]
judge = load_judge(folder, device="cpu")
result = judge.evaluate(query=query, response=first, second_response=second)
print(json.dumps([type(judge).__name__, result.score, result.probability.hex()]))
"""


def test_a_folder_comes_back_in_another_process(pairwise: PairwiseJudgeFinetuneEngine) -> None:
    example = next(e for e in pairs(4, 14) if e.reference is None)
    here = judged(load_judge(pairwise.output_dir, device="cpu"), example)
    texts = [example.query, example.answer, example.second_answer]
    asked = [sys.executable, "-c", ELSEWHERE, str(pairwise.output_dir), *map(str, texts)]
    ended = subprocess.run(asked, capture_output=True, text=True, check=True)
    name, score, probability = json.loads(ended.stdout)
    assert (name, score) == ("EncoderPairwiseEvaluator", here.score)
    assert float.fromhex(probability) == pytest.approx(here.probability, abs=1e-6)


def test_load(
    pairwise: PairwiseJudgeFinetuneEngine, correctness: CorrectnessJudgeFinetuneEngine
) -> None:
    engine = JudgeFinetuneEngine.load(pairwise.output_dir, device="cpu")
    assert type(engine) is PairwiseJudgeFinetuneEngine
    assert (engine.kind, engine.job_id) == ("encoder", str(pairwise.output_dir))
    assert type(engine.job) is encoder_student()
    with pytest.raises(ArgumentError, match="verdicts: are not there"):
        engine.finetune()
    with pytest.raises(ArtifactError, match="load it with PairwiseJudgeFinetuneEngine"):
        CorrectnessJudgeFinetuneEngine.load(pairwise.output_dir)
    assert isinstance(load_judge(correctness.output_dir), CorrectnessEvaluator)
    kind, manifest = saved(pairwise.output_dir)
    assert kind == "encoder"
    record = manifest.settings["judge"]
    assert record["task"] == "pairwise"
    assert record["temperature"] > 0
    assert record["calibrated_on"] == manifest.metrics["validation_examples"]
    assert manifest.settings["learning_rate"] == TRAIN["learning_rate"]
    assert (pairwise.output_dir / "README.md").exists()


def test_damaged_folders(pairwise: PairwiseJudgeFinetuneEngine, tmp_path: Path) -> None:
    import shutil

    def copy(name: str) -> Path:
        return Path(shutil.copytree(pairwise.output_dir, tmp_path / name))

    folder = copy("cut")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"cut: .*damaged, train or copy it again"):
        load_judge(folder)
    folder = copy("gone")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"gone: .*damaged"):
        load_judge(folder)
    folder = copy("headless")
    import safetensors.torch

    state = safetensors.torch.load_file(folder / "model.safetensors")
    state = {name: value for name, value in state.items() if "classifier" not in name}
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="no weights for classifier"):
        load_judge(folder)
    for changes, said in (
        ({"temperature": 0}, r"judge\.temperature in ft\.json"),
        ({"task": "taste"}, "not trained to judge"),
        ({"cuts": [1.0]}, "grades and cuts do not fit"),
        ({"more": 1}, r"judge\.more in ft\.json"),
    ):
        folder = copy(f"record-{next(iter(changes))}")
        edited(folder, **changes)
        with pytest.raises(ArtifactError, match=said):
            load_judge(folder)


def test_the_temperature_in_the_folder_counts(
    pairwise: PairwiseJudgeFinetuneEngine, tmp_path: Path
) -> None:
    import shutil

    folder = Path(shutil.copytree(pairwise.output_dir, tmp_path / "judge"))
    edited(folder, temperature=1.0)
    example = pairs(1, 15).examples[0]
    plain = judged(load_judge(folder), example)
    logit = np.log(plain.probability / (1 - plain.probability))
    edited(folder, temperature=4.0)
    assert judged(load_judge(folder), example).probability == pytest.approx(
        1 / (1 + np.exp(-logit / 4)), abs=1e-5
    )
    edited(folder, tie_threshold=0.5)
    assert judged(load_judge(folder), example).score == 0.5


def test_the_command(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = tmp_path / "verdicts.jsonl", tmp_path / "tuned"
    pairs(48, 0).save(file)
    given = ["--epochs", "6", "--learning-rate", "0.002", "--batch-size", "8", "--seed", "1"]
    train = ["train", str(file), "--student", base, "--output", str(folder), "--device", "cpu"]
    command([*train, *given, "--json"], standalone_mode=False)
    document = json.loads(capsys.readouterr().out)
    assert (document["kind"], document["model"]) == ("encoder", str(folder))
    assert document["metrics"]["validation_examples"] > 0
    compared = ["--judge", str(folder), "--length", "--device", "cpu", "--json"]
    command(["eval", str(file), *compared], standalone_mode=False)
    runs = {run["name"]: run for run in json.loads(capsys.readouterr().out)["runs"]}
    assert runs["tuned"]["statistics"]["kappa_teacher"]["value"] > 0.8
    assert runs["tuned"]["statistics"]["flips"]["value"] == 0.0


# --- Bad input -----------------------------------------------------------------------------------


def test_data_that_cannot_teach(base: str, tmp_path: Path) -> None:
    file = tmp_path / "verdicts.jsonl"
    tied = [e.model_copy(update={"verdict": 0.5, "flipped_verdict": 0.5}) for e in pairs(4, 0)]
    JudgeDataset(examples=tied).save(file)
    with pytest.raises(DatasetError, match=r"verdicts\.jsonl: every pair is a tie"):
        PairwiseJudgeFinetuneEngine(file, base, tmp_path / "judge").finetune()
    with pytest.raises(DatasetError, match=r"verdicts\.jsonl: .*no example of the task"):
        CorrectnessJudgeFinetuneEngine(file, base, tmp_path / "judge").finetune()
    same = [e.model_copy(update={"score": 4.0}) for e in graded(5, 0)]
    JudgeDataset(examples=same).save(file)
    with pytest.raises(DatasetError, match=r"verdicts\.jsonl: every answer has the score 4,"):
        CorrectnessJudgeFinetuneEngine(file, base, tmp_path / "judge").finetune()
    assert not (tmp_path / "judge").exists()
    assert not (tmp_path / "judge.training").exists()


def test_ties_alone_can_be_held_out_but_not_learned(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    tie = {"verdict": 0.5, "flipped_verdict": 0.5}
    better, *others = pairs(8, 0).examples
    ties = [e.model_copy(update=tie) for e in others]
    split = Lessons("pairwise", pairs(8, 1), JudgeDataset(examples=ties), {}, EncoderSettings())
    assert [row.target for row in split.watched] == [0.5] * 7
    assert 0 <= split.record(np.linspace(-1, 1, 7), 64).tie_threshold <= 0.5
    for seed in range(20):  # whichever part the only one with a better answer falls into
        settings = EncoderSettings(seed=seed, validation_share=0.5)
        data = JudgeDataset(examples=[better, *ties])
        lessons = Lessons("pairwise", data, None, {}, settings)
        assert any(row.target != 0.5 for row in lessons.rows)
        assert len(lessons.rows) + len(lessons.watched) == 8
    assert "only ties would be left to learn from" in caplog.text


def test_a_device_that_there_is_not(pairwise: PairwiseJudgeFinetuneEngine, base: str) -> None:
    for device in ("gpu", 3.5, "xpu:9"):
        with pytest.raises(ArgumentError, match=f"device: '?{device}"):
            load_judge(pairwise.output_dir, device=device)
        with pytest.raises(ArgumentError, match=f"device: '?{device}"):
            load_encoder(base, device)


def test_bad_lora(base: str, tmp_path: Path) -> None:
    for lora in ("yes", 8, [("r", 8)], {"r": object()}):
        with pytest.raises(ArgumentError, match="lora: "):
            student_of(pairs(4, 0), base, tmp_path / "judge", lora=lora)
    for options in ({"rank": 8}, {"r": -1}, {"target_modules": ["none"]}):
        with pytest.raises(ArgumentError, match=r"lora: .* cannot be used"):
            student_of(pairs(4, 0), base, tmp_path / "judge", lora=options).finetune()


def test_little_and_empty_is_learned_all_the_same(
    base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = pairs(1, 0).examples[0].model_copy(update={"answer": "", "verdict": 0.0})
    data = JudgeDataset(examples=[one.model_copy(update={"flipped_verdict": 0.0})])
    student = student_of(data, base, tmp_path / "judge", epochs=1)
    record = student.finetune().raw.settings["judge"]
    assert "nothing is held out to calibrate" in caplog.text
    assert (record["temperature"], record["calibrated_on"]) == (1.0, 0)
    assert 0 < judged(student.get_evaluator({}), one).probability < 1


def test_bad_settings(base: str, tmp_path: Path) -> None:
    def asked(**settings: Any) -> Any:
        return PairwiseJudgeFinetuneEngine(pairs(4, 0), base, tmp_path / "judge", **settings)

    with pytest.raises(ArgumentError, match="epoch: is no argument of an encoder"):
        asked(epoch=3).finetune()
    for name, value in (
        ("epochs", 0),
        ("epochs", True),
        ("batch_size", 2.5),
        ("learning_rate", float("nan")),
        ("learning_rate", -1),
        ("validation_share", 1.0),
        ("frozen_share", -0.1),
        ("max_length", 4),
        ("early_stopping_patience", 0),
        ("precision", "int4"),
        ("seed", 2**32),
        ("scheduler", "none at all"),
    ):
        with pytest.raises(ArgumentError, match=name):
            asked(**{name: value}).finetune()
    with pytest.raises(ArgumentError, match=r"student: .*nowhere.* cannot be loaded"):
        PairwiseJudgeFinetuneEngine(
            pairs(4, 0), str(tmp_path / "nowhere"), tmp_path / "judge", kind="encoder"
        ).finetune()
    fresh = asked()
    with pytest.raises(ArtifactError, match="no such folder"):
        fresh.get_finetuned_model()
    with pytest.raises(ArgumentError, match="scored: is no argument of an encoder's judge"):
        fresh.get_finetuned_model(scored=True)
    assert EncoderSettings.of({}) == EncoderSettings()


def test_a_folder_of_something_else_stays(base: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="holds files that no fine-tuning pack saved"):
        student_of(pairs(4, 0), base, tmp_path).finetune()
    manifest = Manifest(kind="encoder-judge", base_model="x", settings={})
    (tmp_path / "ft.json").write_text(manifest.model_dump_json())
    with pytest.raises(ArtifactError, match="not trained to judge"):
        load_judge(tmp_path)


def test_scores_that_are_none(pairwise: PairwiseJudgeFinetuneEngine) -> None:
    judge = pairwise.get_finetuned_model()
    with torch.no_grad():
        judge._scorer._encoder.classifier.bias.fill_(float("nan"))
    with pytest.raises(FTError, match="score of 'a' is nan"):
        judge.evaluate(query="q", response="a", second_response="b")


# --- Probabilities -------------------------------------------------------------------------------

SCORES = st.floats(-1e4, 1e4)


@given(SCORES, SCORES, st.floats(0.05, 20), st.floats(0, 0.5))
def test_pairs_are_symmetric(a: float, b: float, temperature: float, threshold: float) -> None:
    one, other = (cal.pair_probability(*pair, temperature) for pair in ((a, b), (b, a)))
    assert one == 1 - other
    assert other == 1 - one
    assert cal.pair_verdict(one, threshold) == 1 - cal.pair_verdict(other, threshold)
    assert one == pytest.approx(1 / (1 + np.exp(np.clip((b - a) / temperature, -700, 700))))


@given(
    st.lists(
        st.tuples(st.floats(0.0, 1.0), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=9
    )
)
def test_the_threshold_of_ties_is_the_best_there_is(told: list[tuple[float, float]]) -> None:
    probabilities, verdicts = (np.array(column) for column in zip(*told, strict=True))

    def right(threshold: float) -> float:
        said = [cal.pair_verdict(float(p), threshold) for p in probabilities]
        return float(np.sum(np.array(said) == verdicts))

    found = cal.fit_tie_threshold(probabilities, verdicts)
    if 0.5 not in verdicts:
        assert found == 0
    else:
        assert right(found) == max(
            map(right, [0.0, *(np.maximum(probabilities, 1 - probabilities) - 0.5)])
        )


def test_the_temperature_that_scores_were_multiplied_by() -> None:
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal(4000)
    verdicts = (rng.random(4000) < cal.sigmoid(logits)).astype(float)
    for true in (0.5, 1.0, 3.0):
        losses = [cal.pair_loss(true * logits, verdicts, t) for t in cal.temperatures()]
        assert cal.fit_temperature(losses, 4000) == pytest.approx(true, rel=0.1)
    right = np.ones(5), np.ones(5)  # a few that are all right: no reason to be certain
    losses = [cal.pair_loss(*right, t) for t in cal.temperatures()]
    assert 0.2 < cal.fit_temperature(losses, 5) < 1


def test_losses_are_those_of_training() -> None:
    from ft_judge.encoder_training import _ordinal_loss

    rng = np.random.default_rng(1)
    better, verdicts = rng.standard_normal(20) * 5, rng.choice([0.0, 0.5, 1.0], 20)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(better), torch.tensor(verdicts)
    )
    assert cal.pair_loss(better, verdicts) == pytest.approx(float(expected))

    cuts, scores = [-1.0, 0.2, 0.9], rng.standard_normal(30)
    places = rng.integers(0, 4, 30).astype(float)
    found = cal.grade_probabilities(scores, cuts, 1.0)
    assert found.sum(axis=1) == pytest.approx(1)
    assert (found > 0).all()
    watched = torch.tensor(scores, requires_grad=True)
    loss = _ordinal_loss(
        watched, torch.tensor(places).long(), torch.tensor(cuts, dtype=torch.float64)
    )
    assert cal.grade_loss(scores, places, cuts) == pytest.approx(float(loss.detach()))
    loss.backward()
    assert torch.isfinite(watched.grad).all()
    far = torch.tensor([1e4, -1e4, 1e4], requires_grad=True)
    loss = _ordinal_loss(far, torch.tensor([0, 3, 1]), torch.tensor(cuts))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(far.grad).all()


def test_the_cuts_of_grades() -> None:
    given = [1.0, 1.0, 3.0, 5.0]
    cuts = cal.grade_cuts([1.0, 3.0, 5.0], given)
    assert np.array(cuts) * np.std(given) + np.mean(given) == pytest.approx([2.0, 4.0])
    middle = (np.array([1.0, 3.0, 5.0]) - np.mean(given)) / np.std(given)
    assert cal.grade_probabilities(middle, cuts, 1.0).argmax(axis=1).tolist() == [0, 1, 2]
