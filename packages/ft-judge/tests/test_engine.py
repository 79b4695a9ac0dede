"""Local students: tiny models that learn their verdicts by heart, in LlamaIndex's evaluators."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import model_assets
import pytest
from llama_index.core.evaluation import (
    BatchEvalRunner,
    CorrectnessEvaluator,
    PairwiseComparisonEvaluator,
)

from ft_core.datasets import JudgeDataset, JudgeExample
from ft_core.errors import ArgumentError, ArtifactError, DatasetError
from ft_core.jobs import JobStatus
from ft_core.sft import LocalFinetuneEngine
from ft_core.sft.chat_format import ChatFormat
from ft_core.sft.models import load_model
from ft_judge import (
    CorrectnessJudgeFinetuneEngine,
    JudgeHandler,
    PairwiseJudgeFinetuneEngine,
    evaluate_judges,
    load_judge,
    untrained_judge,
)
from ft_judge.engine import JudgeFinetuneEngine
from ft_judge.recipe import Recipe
from ft_judge.scored import AnswerScorer
from ft_judge.students import kind_of

FULL: dict[str, Any] = {"lora_rank": None, "learning_rate": 5e-3, "show_progress": False}
FULL |= {"device": "cpu", "precision": "fp32", "batch_size": 8, "epochs": 40}

BETTER = ["bowline", "hitch", "anchor", "mooring"]
WORSE = ["glue", "hope", "tape", "string"]


def pair(number: int, **changes: Any) -> JudgeExample:
    """Return a pair whose better answer stands first in every other one."""
    first = number % 2 == 0
    answers = [BETTER[number % 4], WORSE[number // 2 % 4]]
    fields: dict[str, Any] = {
        "task": "pairwise",
        "query": f"What holds boat {number}?",
        "answer": answers[0] if first else answers[1],
        "second_answer": answers[1] if first else answers[0],
        "verdict": float(first),
        "flipped_verdict": float(first),
        "reasoning": "It holds.",
        "flipped_reasoning": "That one holds.",
    }
    return JudgeExample(**{**fields, **changes})


PAIRS = JudgeDataset(
    examples=[
        *(pair(n) for n in range(6)),
        pair(6, flipped_verdict=0.0, query="torn"),
        pair(7, flipped_verdict=None, flipped_reasoning=None, query="half"),
        JudgeExample(task="correctness", query="Where?", answer="In the harbour.", score=5.0),
        JudgeExample(task="correctness", query="Where?", answer="On the moon.", score=1.5),
        JudgeExample(task="correctness", query="When?", answer="At noon.", score=4.0),
        JudgeExample(task="correctness", query="When?", answer="Who knows.", score=None),
    ]
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> str:
    """A tiny model of random weights, whose words are those of the data."""
    recipes = [
        Recipe("pairwise", False, PAIRS),
        Recipe("pairwise", True, PAIRS),
        Recipe("correctness", False, PAIRS),
    ]
    texts = [
        message["content"]
        for recipe in recipes
        for chat in recipe.lessons().train
        for message in chat.messages
    ]
    return model_assets.tiny_causal_lm(
        tmp_path_factory.mktemp("base"), texts, dim=64, spread=0.12, vocabulary=700, window=700
    )


@pytest.fixture(scope="module")
def pairwise(base: str, tmp_path_factory: pytest.TempPathFactory) -> PairwiseJudgeFinetuneEngine:
    folder = tmp_path_factory.mktemp("pairs") / "judge"
    engine = PairwiseJudgeFinetuneEngine(PAIRS, base, folder, **FULL)
    assert engine.finetune().status is JobStatus.SUCCEEDED
    return engine


@pytest.fixture(scope="module")
def correctness(
    base: str, tmp_path_factory: pytest.TempPathFactory
) -> CorrectnessJudgeFinetuneEngine:
    folder = tmp_path_factory.mktemp("grades") / "judge"
    engine = CorrectnessJudgeFinetuneEngine(PAIRS, base, folder, **FULL)
    engine.finetune()
    return engine


def judged(evaluator: Any, example: JudgeExample) -> Any:
    given = {"query": example.query, "response": example.answer, "reference": example.reference}
    if example.second_answer is not None:
        given["second_response"] = example.second_answer
    return asyncio.run(evaluator.aevaluate(**given))


def consistent() -> list[JudgeExample]:
    return PAIRS.examples[:6]


# --- The story -----------------------------------------------------------------------------------


def test_the_guide_s_recipe_is_what_is_learned(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        lessons = Recipe("pairwise", False, PAIRS).lessons()
    said = [chat.messages[-1]["content"] for chat in lessons.train]
    assert said == ["[[A]]", "[[B]]", "[[B]]", "[[A]]"] * 3
    assert lessons.record.dropped == {
        "the two orders disagree": 1,
        "a verdict in one order only": 1,
    }
    assert "the two orders disagree: 1" in caplog.text
    assert lessons.record.answers == ["[[A]]", "[[B]]"]
    tied = JudgeDataset(examples=[pair(0, verdict=0.5, flipped_verdict=0.5)])
    assert Recipe("pairwise", False, tied).lessons().record.answers == ["[[A]]", "[[B]]", "[[C]]"]
    assert Recipe("correctness", False, PAIRS).lessons().record.answers == ["1.5", "4.0", "5.0"]


def test_a_trained_judge_in_either_order(pairwise: PairwiseJudgeFinetuneEngine) -> None:
    judge = pairwise.get_finetuned_model(enforce_consensus=False)
    assert isinstance(judge, PairwiseComparisonEvaluator)
    for example in consistent():
        for shown in (example, example.flipped()):
            result = judged(judge, shown)
            assert result.score == shown.verdict
            assert result.passing is (shown.verdict == 1.0)
            assert (result.probability > 0.5) == result.passing
            assert sum(result.probabilities.values()) == pytest.approx(1.0)


def test_consensus_averages_both_orders(pairwise: PairwiseJudgeFinetuneEngine) -> None:
    each = pairwise.get_finetuned_model(enforce_consensus=False)
    both = pairwise.get_finetuned_model()
    unseen = pair(9, query="What is unheard of?")
    one, other = judged(each, unseen), judged(each, unseen.flipped())
    mean = (one.probability + 1 - other.probability) / 2
    first, second = judged(both, unseen), judged(both, unseen.flipped())
    assert first.probability == pytest.approx(mean)
    assert first.probability == pytest.approx(1 - second.probability)
    assert first.score == 1 - second.score
    assert one.probability != pytest.approx(mean)  # or there was nothing to average
    same = pair(0, second_answer=pair(0).answer)
    assert judged(both, same).score == 0.5


def test_an_evaluation_reports_what_the_judge_says_of_both_orders(
    pairwise: PairwiseJudgeFinetuneEngine,
) -> None:
    words = [*BETTER, *WORSE]  # in pairs that it has not learned
    data = JudgeDataset(
        examples=[
            pair(n, query="Unheard of?", answer=words[n % 8], second_answer=words[(3 * n + 1) % 8])
            for n in range(24)
        ]
    )
    judge = pairwise.get_finetuned_model()
    report = evaluate_judges(data, {"judge": judge}, show_progress=False)
    said = [judged(judge, example).score for example in data]
    scores = report.runs[0].scores["joint_agreement_teacher"]
    assert list(scores.values()) == [
        float(score == example.verdict) for score, example in zip(said, data, strict=True)
    ]
    assert report.statistics["judge"]["flips"].value > 0  # or both orders are as good as one
    assert report.statistics["judge"]["consensus_inconclusive_teacher"].value == 0


def test_weighing_and_writing_agree(pairwise: PairwiseJudgeFinetuneEngine) -> None:
    writer = pairwise.get_finetuned_model(scored=False, enforce_consensus=False)
    assert type(writer) is PairwiseComparisonEvaluator
    for example in consistent():
        result = judged(writer, example)
        assert (result.score, result.feedback) == (
            example.verdict,
            "[[A]]" if example.verdict else "[[B]]",
        )


def test_a_student_that_writes_no_verdict_is_inconclusive(base: str) -> None:
    writer = untrained_judge("pairwise", base, scored=False, device="cpu")
    result = judged(writer, pair(0))
    assert result.invalid_result
    assert result.score is None
    weigher = untrained_judge("pairwise", base, device="cpu")
    assert set(judged(weigher, pair(0)).probabilities) == {"[[A]]", "[[B]]", "[[C]]"}
    grader = untrained_judge("correctness", base, device="cpu", scored=False)
    assert judged(grader, PAIRS.examples[8]).score is None


def test_grades(correctness: CorrectnessJudgeFinetuneEngine) -> None:
    judge = correctness.get_finetuned_model(score_threshold=4.5)
    assert isinstance(judge, CorrectnessEvaluator)
    for example in PAIRS.examples[8:11]:
        result = judged(judge, example)
        assert result.score == example.score
        assert result.passing == (example.score == 5.0)
        assert result.probability == max(result.probabilities.values()) > 0.5
        assert set(result.probabilities) == {"1.5", "4.0", "5.0"}
    writer = correctness.get_finetuned_model(scored=False)
    assert [judged(writer, e).score for e in PAIRS.examples[8:11]] == [5.0, 1.5, 4.0]


def test_reasoning_is_learned_and_given(base: str, tmp_path: Path) -> None:
    one = JudgeDataset(examples=[pair(0)])
    settings = FULL | {"epochs": 40}
    engine = PairwiseJudgeFinetuneEngine(
        one, base, tmp_path / "judge", reasoning=True, kind="local", **settings
    )
    engine.finetune()
    judge = engine.get_finetuned_model(enforce_consensus=False)
    assert type(judge) is PairwiseComparisonEvaluator
    result = judged(judge, pair(0))
    assert result.feedback == "It holds.\n\n[[A]]"
    assert result.score == 1.0
    assert judged(judge, pair(0).flipped()).feedback == "That one holds.\n\n[[B]]"
    with pytest.raises(ArgumentError, match="gives its reasoning"):
        engine.get_finetuned_model(scored=True)


def test_in_a_batch_runner_and_a_report(
    pairwise: PairwiseJudgeFinetuneEngine, correctness: CorrectnessJudgeFinetuneEngine, base: str
) -> None:
    examples = consistent()
    runner = BatchEvalRunner({"pairs": pairwise.get_finetuned_model()}, workers=3)
    results = runner.evaluate_response_strs(
        queries=[e.query for e in examples],
        response_strs=[e.answer for e in examples],
        second_response=[e.second_answer for e in examples],
    )
    assert [r.score for r in results["pairs"]] == [e.verdict for e in examples]

    data = JudgeDataset(examples=examples)
    judges = {
        "base": untrained_judge("pairwise", base, device="cpu"),
        "tuned": pairwise.get_finetuned_model(),
    }
    report = evaluate_judges(data, judges, show_progress=False)
    found = report.statistics["tuned"]
    assert found["kappa_teacher"].value == 1.0
    assert found["flips"].value == 0.0
    assert found["calibration_error_teacher"].value < 0.5
    assert report.statistics["base"]["kappa_teacher"].value < 1.0
    grades = evaluate_judges(
        PAIRS.of_task("correctness"), correctness.get_finetuned_model(), show_progress=False
    )
    assert grades.statistics["judge"]["pearson_teacher"].value == pytest.approx(1.0)


# --- Folders and files ---------------------------------------------------------------------------


def test_a_folder_comes_back_without_its_data(pairwise: PairwiseJudgeFinetuneEngine) -> None:
    folder = pairwise.output_dir
    manifest = json.loads((folder / "ft.json").read_text())
    record = manifest["settings"]["judge"]
    assert (record["task"], record["reasoning"]) == ("pairwise", False)
    assert record["dropped"]["the two orders disagree"] == 1
    loaded = JudgeFinetuneEngine.load(folder, device="cpu")
    assert type(loaded) is PairwiseJudgeFinetuneEngine
    assert loaded.job_id == str(folder)
    assert judged(loaded.get_finetuned_model(), pair(1)).score == 0.0
    assert judged(load_judge(folder, device="cpu"), pair(1)).score == 0.0
    assert loaded.get_current_job().status is JobStatus.SUCCEEDED
    assert loaded.events()
    with pytest.raises(ArgumentError, match="verdicts: are not there"):
        loaded.finetune()
    with pytest.raises(ArtifactError, match="load it with PairwiseJudgeFinetuneEngine"):
        CorrectnessJudgeFinetuneEngine.load(folder)


def test_the_prompt_comes_from_the_folder(
    pairwise: PairwiseJudgeFinetuneEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ft_judge.recipe.template_for", None)
    judge = PairwiseJudgeFinetuneEngine.load(pairwise.output_dir).get_finetuned_model()
    assert judged(judge, pair(2)).score == 1.0


def test_the_same_again_is_not_trained_again(
    pairwise: PairwiseJudgeFinetuneEngine, base: str, caplog: pytest.LogCaptureFixture
) -> None:
    again = PairwiseJudgeFinetuneEngine(PAIRS, base, pairwise.output_dir, **FULL)
    with caplog.at_level(logging.INFO):
        assert again.finetune().status is JobStatus.SUCCEEDED
    assert "is trained already" in caplog.text
    found = PairwiseJudgeFinetuneEngine.from_job_id(str(pairwise.output_dir))
    assert found.get_current_job().model == str(pairwise.output_dir)
    other = CorrectnessJudgeFinetuneEngine.from_job_id(str(pairwise.output_dir))
    with pytest.raises(ArtifactError, match="judges pairwise, not correctness; take the engine"):
        other.get_finetuned_model()


@pytest.mark.slow
def test_a_job_of_its_own(base: str, tmp_path: Path) -> None:
    settings = FULL | {"epochs": 1}
    engine = PairwiseJudgeFinetuneEngine(PAIRS, base, tmp_path / "judge", **settings)
    job = engine.finetune(wait=False)
    found = PairwiseJudgeFinetuneEngine.from_job_id(job.id)
    assert found.wait(timeout=300).status is JobStatus.SUCCEEDED
    assert judged(found.get_finetuned_model(device="cpu"), pair(0)).score is not None


def test_a_handler_s_journal_is_trained_on(tmp_path: Path, llm_of: Any) -> None:
    journal = tmp_path / "verdicts.jsonl"
    handler = JudgeHandler(journal)
    teacher = PairwiseComparisonEvaluator(llm=llm_of("longer"))
    with handler.attach(teacher):
        asyncio.run(teacher.aevaluate(query="q", response="long one", second_response="short"))
    lessons = Recipe("pairwise", True, journal).lessons()
    assert [chat.messages[-1]["content"] for chat in lessons.train] == [
        "It says more.\n\n[[A]]",
        "It says more.\n\n[[B]]",
    ]


def test_words_that_are_missing_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    data = JudgeDataset(examples=[pair(0), pair(1, flipped_reasoning=None)])
    lessons = Recipe("pairwise", True, data).lessons()
    assert len(lessons.train.examples) == 3
    assert lessons.record.dropped == {"one order without the teacher's words": 1}
    assert "1 of 4 judgements come without the teacher's words" in caplog.text


def test_questions_on_both_sides_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    held_out = JudgeDataset(examples=[pair(0), pair(1), pair(1, query="Another boat?")])
    Recipe("pairwise", False, PAIRS, held_out).lessons()
    assert "2 of 3 questions in val_data are in the training data too" in caplog.text


def test_bad_data_names_the_file(tmp_path: Path, base: str) -> None:
    file = tmp_path / "verdicts.jsonl"
    torn = [pair(6, flipped_verdict=0.0), pair(7, flipped_verdict=1.0)]
    JudgeDataset(examples=torn).save(file)
    engine = PairwiseJudgeFinetuneEngine(file, base, tmp_path / "judge", **FULL)
    with pytest.raises(DatasetError, match=r"verdicts\.jsonl: no example is left .*disagree: 2"):
        engine.finetune()
    grades = CorrectnessJudgeFinetuneEngine(file, base, tmp_path / "judge", **FULL)
    with pytest.raises(DatasetError, match=r"verdicts\.jsonl: .*no example of the task"):
        grades.finetune()
    JudgeDataset(examples=[pair(0, reasoning=None, flipped_reasoning=None)]).save(file)
    words = PairwiseJudgeFinetuneEngine(file, base, tmp_path / "judge", reasoning=True, **FULL)
    with pytest.raises(DatasetError, match=r"verdicts\.jsonl: .*reasoning=False"):
        words.finetune()
    assert not (tmp_path / "judge").exists()


def test_folders_that_hold_something_else(base: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no judge"):
        load_judge(tmp_path / "nowhere")
    chats = Recipe("pairwise", False, PAIRS).lessons().train
    other = LocalFinetuneEngine(base, chats, output_dir=tmp_path / "chat", **FULL | {"epochs": 1})
    other.finetune()
    with pytest.raises(ArtifactError, match="was not trained to judge"):
        load_judge(tmp_path / "chat")
    file = tmp_path / "chat" / "ft.json"
    manifest = json.loads(file.read_text())
    manifest["settings"]["judge"] = {"task": "pairwise", "reasoning": "perhaps"}
    file.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"judge\.reasoning in ft\.json"):
        load_judge(tmp_path / "chat")
    manifest["settings"]["judge"]["task"] = ["pairwise"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="was not trained to judge"):
        load_judge(tmp_path / "chat")
    manifest["kind"] = "sentence-transformer"
    file.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="sentence-transformer, which is no judge"):
        load_judge(tmp_path / "chat")
    fresh = PairwiseJudgeFinetuneEngine(PAIRS, base, tmp_path / "new", **FULL)
    with pytest.raises(ArtifactError, match="no such folder"):
        fresh.get_finetuned_model()


# --- Students ------------------------------------------------------------------------------------


def test_which_kind_a_student_is(
    base: str, pairwise: PairwiseJudgeFinetuneEngine, tmp_path: Path
) -> None:
    assert kind_of("gpt-4.1-mini", {}) == "hosted"
    assert kind_of("ft:gpt-4.1-mini:me::1", {}) == "hosted"
    assert kind_of("anything/at-all", {"base_url": "http://127.0.0.1:1"}) == "hosted"
    assert kind_of(base, {"device": "cpu"}) == "local"
    assert kind_of(str(pairwise.output_dir), {}) == "local"
    encoder = model_assets.tiny_cross_encoder(tmp_path / "encoder", ["a boat"], dim=8)
    assert kind_of(encoder, {}) == "encoder"
    with pytest.raises(ArgumentError, match=r"student: .*nowhere.*kind='hosted'"):
        kind_of(str(tmp_path / "nowhere"), {})
    for name, architecture in (("t5", "T5"), ("gemma3", "Gemma3"), ("llava", "Llava")):
        config = {"model_type": name, "architectures": [f"{architecture}ForConditionalGeneration"]}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        with pytest.raises(ArgumentError, match="'local' or 'encoder'"):
            kind_of(str(tmp_path / name), {})


def test_bad_arguments(base: str) -> None:
    with pytest.raises(ArgumentError, match="kind: is one of auto, hosted, local, encoder"):
        PairwiseJudgeFinetuneEngine(PAIRS, base, kind="remote")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="an encoder scores"):
        PairwiseJudgeFinetuneEngine(PAIRS, base, kind="encoder", reasoning=True)
    with pytest.raises(ArgumentError, match="epoch: is no argument"):
        PairwiseJudgeFinetuneEngine(PAIRS, base, epoch=3).finetune()
    with pytest.raises(ArgumentError, match="score_threshold: is of a judge of task 'correctness'"):
        untrained_judge("pairwise", base, score_threshold=3.0)
    with pytest.raises(ArgumentError, match="extra"):
        PairwiseJudgeFinetuneEngine(PAIRS, base, extra={}).finetune()


def test_the_constructor_reads_nothing(tmp_path: Path) -> None:
    engine = PairwiseJudgeFinetuneEngine(tmp_path / "no.jsonl", "no/model", tmp_path / "judge")
    assert engine.job_id is None
    assert list(tmp_path.iterdir()) == []


# --- Probabilities -------------------------------------------------------------------------------


def test_probabilities_are_those_of_the_whole_texts(
    pairwise: PairwiseJudgeFinetuneEngine,
) -> None:
    """Beside one pass over each whole text, without any cache."""
    import torch

    model, tokenizer = load_model(pairwise.output_dir, "cpu")
    messages = [{"role": "user", "content": "Which boat?"}]
    answers = ["[[A]]", "[[B]]", "4.0", "a longer answer of several tokens", "[[A]] or [[B]]"]
    found = AnswerScorer(model, tokenizer).probabilities(messages, answers)
    totals = []
    for answer in answers:
        (row,) = ChatFormat(tokenizer).tokens([*messages, {"role": "assistant", "content": answer}])
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids).logits[0].double(), dim=-1)
        begin = row.is_answer.index(True)
        totals.append(sum(logprobs[at - 1, ids[0, at]] for at in range(begin, ids.shape[1])))
    expected = torch.softmax(torch.stack(totals), dim=0).tolist()
    assert list(found.values()) == pytest.approx(expected, rel=1e-3, abs=1e-9)
    with pytest.raises(ArgumentError, match="window of 700"):
        AnswerScorer(model, tokenizer).probabilities(
            [{"role": "user", "content": "boat! " * 800}], answers
        )


def test_importing_the_engine_loads_no_heavy_library() -> None:
    code = (
        "import sys, ft_judge; from ft_judge import PairwiseJudgeFinetuneEngine;"
        "PairwiseJudgeFinetuneEngine('a', 'gpt-4.1-mini');"
        "heavy = {'torch', 'transformers', 'openai', 'peft', 'trl', 'datasets'};"
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    path = [entry for entry in sys.path if entry]
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}; {code}"], check=True
    )
