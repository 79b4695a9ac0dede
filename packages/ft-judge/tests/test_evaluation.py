"""Judges that are known to be right, lazy, mute or broken, and what the report says of them."""

import asyncio
import json
import random
import threading
from typing import ClassVar

import pytest
import rich.console
from llama_index.core.evaluation import (
    BaseEvaluator,
    CorrectnessEvaluator,
    EvaluationResult,
    GuidelineEvaluator,
    PairwiseComparisonEvaluator,
    RelevancyEvaluator,
)
from llama_index.core.llms import CompletionResponse, MockLLM

from ft_core.errors import ArgumentError, ArtifactError
from ft_core.metrics import cohen_kappa
from ft_judge import (
    JudgeDataset,
    JudgeExample,
    Judgement,
    by_length,
    evaluate_judges,
    longer_answer,
    majority,
)
from ft_judge.judging import Answer, _on_scale
from ft_judge.statistics import Judged

WORDS = ["tide", "pier", "rope", "ferry", "chart", "light", "anchor", "harbour", "mooring", "buoy"]


def pairs(count=40, seed=0):
    """Pairs in which the answer with the word `mooring` is better; half of them are longer."""
    rng = random.Random(seed)
    examples = []
    for number in range(count):
        good = " ".join(["mooring", *rng.choices(WORDS[:5], k=rng.randint(1, 9))])
        bad = " ".join(rng.choices(WORDS[:5], k=rng.randint(2, 10)))
        verdict = float(rng.random() < 0.5)
        first, second = (good, bad) if verdict else (bad, good)
        examples.append(
            JudgeExample(
                task="pairwise",
                query=f"How do I make the boat fast, case {number}?",
                answer=first,
                second_answer=second,
                verdict=verdict,
                flipped_verdict=verdict,
                human=verdict if number % 4 else 1 - verdict,
                reasoning="It names the mooring.",
            )
        )
    return JudgeDataset(examples=examples)


def right(example):
    return float("mooring" in example.answer)


def first(example):
    return 1.0


def evaluate(dataset, judges, **settings):
    return evaluate_judges(dataset, judges, show_progress=False, **settings)


def means(report, run):
    return {metric: measure.mean for metric, measure in report.measures[run].items()}


# --- Pairs -----------------------------------------------------------------------------------


def test_right_lazy_and_mute_judges():
    dataset = pairs()
    report = evaluate(
        dataset,
        {"length": longer_answer, "right": right, "first": first, "mute": lambda example: None},
    )
    assert means(report, "right")["agreement_teacher"] == 1
    assert means(report, "right")["agreement_human"] == 0.75
    assert means(report, "first")["agreement_teacher"] == 0.5
    assert means(report, "mute")["agreement_teacher"] == 0
    assert means(report, "mute")["conclusive"] == 0
    assert "consistent" not in means(report, "mute")
    length = sum(longer_answer(e) == e.verdict for e in dataset) / len(dataset)
    assert means(report, "length")["agreement_teacher"] == pytest.approx(length)
    statistics = report.statistics
    assert statistics["right"]["flips"].value == 0
    assert (statistics["first"]["flips"].value, statistics["first"]["always_first"].value) == (1, 1)
    assert statistics["mute"]["inconclusive"].value == 1
    assert statistics["mute"]["flips"] == (0, None, None, 0)
    assert statistics["right"]["kappa_teacher"][:3] == (1, 1, 1)
    assert statistics["first"]["kappa_teacher"].value == pytest.approx(0)
    assert statistics["first"]["consensus_inconclusive_teacher"].value == 1
    assert "consensus_agreement_teacher" not in statistics["first"]
    assert statistics["right"]["consensus_jaccard_teacher"].value == 1
    assert statistics["length"]["prefers_longer"].value == 1
    assert statistics["length"]["prefers_longer_in_excess"].value > 0.2
    assert statistics["right"]["prefers_longer_in_excess"].value == 0
    low, high = statistics["right"]["kappa_human"][1:3]
    assert low < statistics["right"]["kappa_human"].value < high
    assert statistics["right"]["kappa_human"].value == pytest.approx(0.5)
    assert (report.baseline.name, report.primary) == ("length", "agreement_teacher")
    assert [report.outcome(name) for name in ("right", "mute")] == ["better", "worse"]
    assert means(report, "teacher") == pytest.approx(
        {
            "agreement_human": 0.75,
            "joint_agreement_human": 0.75,
            "conclusive": 1,
            "consistent": 1,
        }
    )
    assert [run.name for run in report.compared] == ["right", "first", "mute"]


@pytest.mark.parametrize(
    ("shown", "turned", "joint"),
    [
        ((1.0, None, 0.0), (1.0, None, 0.0), 1.0),
        ((1.0, None, 0.0), (0.0, None, 0.0), None),
        ((1.0, None, 0.0), (0.5, None, 0.0), 1.0),
        ((0.0, None, 0.0), (0.5, None, 0.0), 0.0),
        ((None, None, 0.0), (1.0, None, 0.0), None),
        ((1.0, 0.9, 0.0), (0.0, 0.3, 0.0), 1.0),
        ((1.0, 0.6, 0.0), (0.0, 0.3, 0.0), 0.0),
        ((1.0, 0.7, 0.4), (0.0, 0.3, 0.4), 0.5),
        ((1.0, 0.9, 0.0), (0.0, None, 0.0), None),
    ],
)
def test_the_joint_verdict_of_both_orders(shown, turned, joint):
    answers = tuple(Answer(v, p, tie=tie) for v, p, tie in (shown, turned))
    assert Judged(pairs(1).examples[0], answers, None, None).consensus == joint


def test_the_joint_verdict_is_scored_and_nobody_agrees_with_none():
    def torn(example):  # it falls for the first place, but less where that is wrong
        return Judgement(1.0, 0.9 if right(example) else 0.6)

    report = evaluate(pairs(), {"torn": torn, "first": first})
    assert means(report, "torn")["agreement_teacher"] == 0.5
    assert means(report, "torn")["joint_agreement_teacher"] == 1
    assert means(report, "torn")["joint_agreement_human"] == 0.75
    assert means(report, "first")["joint_agreement_teacher"] == 0
    assert "joint_agreement_teacher" not in means(
        evaluate(pairs(), {"torn": torn}, both_orders=False), "torn"
    )
    with pytest.raises(ValueError, match=r"gave the probability 1\.5"):
        _on_scale(pairs(1).examples[0], Judgement(0.5, 0.5, tie=1.5))


def test_both_orders_are_judged_without_a_glance_at_the_verdicts():
    seen = []

    def judge(example):
        seen.append(example)
        return 1.0

    dataset = pairs(3)
    evaluate(dataset, judge, num_workers=1)
    expected = [e.unjudged() for e in dataset.both_orders()]
    assert seen == expected
    assert all(e.human is e.verdict is e.reasoning is None for e in seen)
    seen.clear()
    report = evaluate(dataset, judge, both_orders=False)
    assert len(seen) == 3
    assert "flips" not in report.statistics["judge"]


def test_llama_index_evaluators_are_asked_once_an_order(llm_of):
    prompts = []

    def rule(prompt):
        prompts.append(prompt)
        a = prompt.index("Assistant A’s Answer]\n")  # noqa: RUF001
        b = prompt.index("Assistant B’s Answer]\n")  # noqa: RUF001
        return "[[A]]" if "mooring" in prompt[a:b] else "[[B]]"

    evaluator = PairwiseComparisonEvaluator(llm=llm_of(rule))
    report = evaluate(
        pairs(10), {"judge": evaluator, "place": PairwiseComparisonEvaluator(llm=llm_of("place"))}
    )
    assert len(prompts) == 20
    assert means(report, "judge")["agreement_teacher"] == 1
    assert report.statistics["place"]["flips"].value == 1
    assert report.runs[0].answers["1"].startswith("As shown: [")
    assert evaluator._enforce_consensus  # the app's own is left as it was
    assert means(report, "judge")["latency"] > 0
    assert report.statistics["judge"]["ms_per_verdict"].value > 0


def test_unreadable_answers_are_no_verdicts_and_failed_calls_are_named(llm_of):
    def unreachable(prompt):
        raise ConnectionError("no route, key sk-123456789abc")

    judges = {
        "mute": PairwiseComparisonEvaluator(llm=llm_of("unreadable")),
        "raises": lambda example: 1 / 0,
        "off": lambda example: 3.0,
        "unreachable": PairwiseComparisonEvaluator(llm=llm_of(unreachable)),
    }
    report = evaluate(pairs(8), judges)
    for name in judges:
        assert means(report, name)["agreement_teacher"] == 0, name
        assert means(report, name)["conclusive"] == 0, name
        assert report.statistics[name]["inconclusive"].value == 1
        assert report.statistics[name]["kappa_teacher"].value <= 0
    assert [bool(run.failures) for run in report.runs[:4]] == [False, True, False, True]
    notes = " ".join(report.notes())
    assert "raises: 8 of 8 calls failed" in notes
    assert "ZeroDivisionError" in notes
    assert "sk-123456789abc" not in notes
    assert "[no verdict] I would rather not say." in report.runs[0].answers["1"]


def test_a_call_that_fails_behind_one_that_came_is_no_unreadable_answer(llm_of):
    calls = []

    def rule(prompt):
        calls.append(prompt)
        if len(calls) > 1:
            raise ConnectionError("gone")
        return "1\nNo."

    class Twice(CorrectnessEvaluator):
        async def aevaluate(self, query=None, response=None, contexts=None, **kwargs):
            await super().aevaluate(query=query, response=response)
            return await super().aevaluate(query=query, response=response)

    report = evaluate(scored([1.0]), {"judge": Twice(llm=llm_of(rule))})
    assert len(calls) == 2
    assert "ConnectionError: gone" in report.runs[0].failures["1"]


def test_calibration_is_measured_where_a_judge_tells_a_probability():
    def sure(example):
        good = right(example)
        return Judgement(good, probability=0.9 if good else 0.1)

    class Sure(BaseEvaluator):
        def _get_prompts(self):
            return {}

        def _update_prompts(self, prompts):
            pass

        async def aevaluate(self, query=None, response=None, contexts=None, **kwargs):
            result = EvaluationResult(query=query, score=float("mooring" in response))
            object.__setattr__(result, "probability", 1.0 if result.score else 0.0)
            return result

    report = evaluate(pairs(), {"sure": sure, "too sure": Sure(), "silent": right})
    assert report.statistics["sure"]["calibration_error_teacher"].value == pytest.approx(0.1)
    assert report.statistics["sure"]["calibration_error_human"].value == pytest.approx(0.15)
    assert report.statistics["too sure"]["calibration_error_human"].value == pytest.approx(0.25)
    assert report.statistics["too sure"]["calibration_error_human"].n == 80
    assert "calibration_error_teacher" not in report.statistics["silent"]


def test_calibration_knows_of_ties():
    examples = [e.model_copy(update={"human": None}) for e in pairs(8)]

    def error(judge, examples):
        report = evaluate(JudgeDataset(examples=examples), judge)
        return report.statistics["judge"]["calibration_error_teacher"].value

    def three_way(example):  # 0.6 for its verdict, 0.3 for a tie
        return Judgement(right(example), 0.75 if right(example) else 0.25, tie=0.3)

    def two_way(example):
        return Judgement(right(example), 0.5)

    assert error(three_way, examples) == pytest.approx(0.4)
    tied = [e.model_copy(update={"verdict": 0.5, "flipped_verdict": 0.5}) for e in examples]
    assert error(two_way, tied) == pytest.approx(0)
    assert error(three_way, tied) == pytest.approx(0.6)


def test_a_teacher_that_contradicts_itself_is_left_out_of_agreement():
    examples = pairs(12).examples
    torn = [e.model_copy(update={"flipped_verdict": 1 - e.verdict}) for e in examples[:5]]
    dataset = JudgeDataset(examples=[*torn, *examples[5:]])
    report = evaluate(dataset, {"right": right})
    assert report.measures["right"]["agreement_teacher"].n == 7
    assert report.measures["right"]["agreement_human"].n == 12
    assert report.measures["teacher"]["consistent"].mean == pytest.approx(7 / 12)
    assert report.statistics["teacher"]["flips"].value == pytest.approx(5 / 12)
    assert "contradicts itself on 5 of 12 pairs" in report.notes()[0]
    assert not any("gave no verdict" in note for note in report.notes())


def test_examples_without_a_verdict_are_counted():
    examples = pairs(12).examples
    mute = [e.model_copy(update={"verdict": None, "flipped_verdict": None}) for e in examples[:2]]
    report = evaluate(JudgeDataset(examples=[*mute, *examples[2:]]), {"right": right})
    assert "The teacher gave no verdict on 2 of 12 examples." in report.notes()
    assert not any(note.startswith("People gave") for note in report.notes())


def test_the_teacher_is_not_wrong_where_it_was_not_asked():
    examples = pairs(12).examples
    silent = {"verdict": None, "flipped_verdict": None}
    unasked = [e.model_copy(update=silent) for e in examples[:2]]
    unreadable = examples[2].model_copy(
        update={**silent, "human": 1.0, "metadata": {"inconclusive": "no mark"}}
    )
    dataset = JudgeDataset(examples=[*unasked, unreadable, *examples[3:]])
    report = evaluate(dataset, {"right": right})
    teacher = report.measures["teacher"]
    agreed = sum(e.human == e.verdict for e in examples[3:]) / 10
    assert (teacher["agreement_human"].mean, teacher["agreement_human"].n) == (agreed, 10)
    assert teacher["joint_agreement_human"].mean == agreed
    assert teacher["conclusive"].mean == 0.9
    assert report.statistics["teacher"]["consensus_inconclusive_human"] == (0.1, None, None, 10)
    assert report.measures["right"]["agreement_human"].n == 12
    recorded = next(run for run in report.runs if run.name == "teacher")
    assert (recorded.answers["1"], recorded.answers["4"][0]) == ("[not judged]", "A")


def test_only_people_judged():
    examples = [e.model_copy(update={"verdict": None, "flipped_verdict": None}) for e in pairs(9)]
    report = evaluate(JudgeDataset(examples=examples), {"right": right, "length": longer_answer})
    assert report.primary == "agreement_human"
    assert [run.name for run in report.runs] == ["right", "length"]
    assert report.statistics["length"]["prefers_longer"].value == 1


def test_kappa_is_that_of_verdicts_as_shown():
    dataset = pairs(30)
    rng = random.Random(1)
    noise = {e.query: rng.random() < 0.3 for e in dataset}

    def noisy(example):
        return 1 - right(example) if noise[example.query] else right(example)

    report = evaluate(dataset, {"noisy": noisy})
    shown = [*dataset, *(e.flipped() for e in dataset)]
    expected = cohen_kappa([e.verdict for e in shown], [noisy(e) for e in shown])
    assert report.statistics["noisy"]["kappa_teacher"].value == pytest.approx(expected)


# --- Scores and passes -----------------------------------------------------------------------


def scored(scores, task="correctness", **fields):
    return JudgeDataset(
        examples=[
            JudgeExample(task=task, query=f"q{n}", answer=f"a{n}", score=score, **fields)
            for n, score in enumerate(scores)
        ]
    )


def test_correctness(llm_of):
    dataset = scored([1.0, 2.0, 3.0, 4.0, 5.0, 4.5])
    given = {"a0": 1.0, "a1": 3.0, "a2": 3.0, "a3": 3.5, "a4": 5.0, "a5": None}
    report = evaluate(dataset, {"judge": lambda example: given[example.answer]})
    found = means(report, "judge")
    assert found["agreement_teacher"] == pytest.approx(4 / 6)  # 3.5 does not pass as 4 does
    assert found["closeness_teacher"] == pytest.approx((1 + 0.75 + 1 + 0.875 + 1 + 0) / 6)
    statistics = report.statistics["judge"]
    assert statistics["pearson_teacher"].n == 5
    assert 0.9 < statistics["pearson_teacher"].value < 1
    assert statistics["inconclusive"].value == pytest.approx(1 / 6)
    assert {"spearman_teacher", "weighted_kappa_teacher"} <= statistics.keys()
    evaluator = CorrectnessEvaluator(llm=llm_of("4.0\nGood."))
    broken = CorrectnessEvaluator(llm=llm_of("four, I would say"))  # LlamaIndex raises
    report = evaluate(dataset, {"judge": evaluator, "broken": broken})
    assert means(report, "judge")["agreement_teacher"] == 0.5
    assert means(report, "broken")["conclusive"] == 0
    assert not report.runs[1].failures
    assert report.runs[1].answers["1"] == "[no verdict] four, I would say"


def test_passes(llm_of):
    dataset = scored([1.0, 0.0, 1.0], "relevancy", contexts=["c"])
    strict = RelevancyEvaluator(llm=llm_of("NO"), raise_error=True)
    report = evaluate(dataset, {"judge": RelevancyEvaluator(llm=llm_of("YES")), "strict": strict})
    assert means(report, "judge")["agreement_teacher"] == pytest.approx(2 / 3)
    assert means(report, "strict")["agreement_teacher"] == pytest.approx(1 / 3)
    asked = []

    def rule(prompt):
        asked.append("Name the pier." in prompt)
        return '{"passing": true, "feedback": "ok"}'

    guided = scored([1.0, 0.0], "guideline", guideline="Name the pier.")
    report = evaluate(guided, {"judge": GuidelineEvaluator(llm=llm_of(rule))})
    assert asked == [True, True]
    assert means(report, "judge")["agreement_teacher"] == 0.5


# --- Cost, concurrency, resuming -------------------------------------------------------------


class Telling(MockLLM):
    """Tells the tokens that it took, as hosted ones do."""

    def complete(self, prompt, formatted=False, **kwargs):
        usage = {"prompt_tokens": 200, "completion_tokens": 10}
        return CompletionResponse(text="3\nSo, so.", additional_kwargs=usage)


def test_cost(llm_of):
    dataset = scored([3.0, 4.0])
    judges = {"hosted": CorrectnessEvaluator(llm=Telling()), "own": lambda example: 3.0}
    report = evaluate(dataset, judges, prices={"hosted": (1.0, 10.0), "own": 0.0001})
    assert means(report, "hosted")["cost"] == pytest.approx((200 + 100) / 1e6)
    assert means(report, "own")["cost"] == pytest.approx(0.0001)
    untold = {"judge": CorrectnessEvaluator(llm=llm_of("3\nSo."))}
    assert "cost" not in means(evaluate(dataset, untold, prices={"judge": (1.0, 1.0)}), "judge")


def test_evaluators_share_one_loop_and_run_at_the_same_time():
    class Slow(BaseEvaluator):
        running, most = 0, 0
        loops: ClassVar = set()

        def _get_prompts(self):
            return {}

        def _update_prompts(self, prompts):
            pass

        async def aevaluate(self, query=None, response=None, contexts=None, **kwargs):
            Slow.loops.add(asyncio.get_running_loop())
            Slow.running += 1
            Slow.most = max(Slow.most, Slow.running)
            await asyncio.sleep(0.005)
            Slow.running -= 1
            return EvaluationResult(
                score=right(JudgeExample(task="correctness", query="q", answer=response))
            )

    async def in_a_notebook():
        return evaluate(pairs(12), {"slow": Slow()}, num_workers=6)

    report = asyncio.run(in_a_notebook())
    assert means(report, "slow")["agreement_teacher"] == 1
    assert len(Slow.loops) == 1
    assert 1 < Slow.most <= 6
    assert not [t for t in threading.enumerate() if t.name == "judges"]


def test_a_run_that_was_cut_short_goes_on(tmp_path):
    path = tmp_path / "answers.jsonl"
    asked = []

    def judge(example):
        asked.append(example)
        if len(asked) == 8:
            raise KeyboardInterrupt
        if len(asked) == 5:
            raise ConnectionError("once")
        return Judgement(right(example), 0.75, "because")

    dataset = pairs(10)
    with pytest.raises(KeyboardInterrupt):
        evaluate(dataset, {"judge": judge}, journal=path, num_workers=1)
    with open(path, "a") as file:
        file.write('{"key": "torn')
    report = evaluate(dataset, {"judge": judge}, journal=path, num_workers=1)
    assert len(asked) == 22  # the failed and the interrupted one again
    assert means(report, "judge")["agreement_teacher"] == 1
    again = evaluate(dataset, {"judge": judge}, journal=path, num_workers=1)
    assert len(asked) == 22
    assert again.statistics["judge"] == report.statistics["judge"]
    assert means(again, "judge") == means(report, "judge")
    other = evaluate(dataset, {"other": right}, journal=path)
    assert means(other, "other")["agreement_teacher"] == 1
    dataset.save(tmp_path / "dataset.jsonl")
    with pytest.raises(ArtifactError, match="is not the journal of an evaluation"):
        evaluate(dataset, {"judge": judge}, journal=tmp_path / "dataset.jsonl")


# --- Report and arguments --------------------------------------------------------------------


def test_terminal_json_and_page(tmp_path):
    dataset = pairs(20)
    dataset.save(tmp_path / "test.jsonl")
    report = evaluate(tmp_path / "test.jsonl", {"<b>first</b>": first, "right": right})
    console = rich.console.Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report)
    text = console.export_text()
    console.file.close()
    assert "agreement with teacher" in text
    assert "right is better than <b>first</b> in agreement with teacher" in text
    assert "kappa teacher" in text
    report.save_json(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    runs = {run["name"]: run for run in saved["runs"]}
    assert runs["right"]["statistics"]["flips"] == {"value": 0, "low": None, "high": None, "n": 20}
    assert runs["right"]["outcome"] == "better"
    report.save_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Agreement, bias and calibration" in page
    assert "<b>first</b>" not in page
    assert "&lt;b&gt;first&lt;/b&gt;" in page
    assert "It names the mooring." in page


def test_arguments(llm_of):
    async def later(example):
        return 1.0

    def asked(example):
        raise AssertionError("asked before the arguments were checked")

    dataset = pairs(4)
    mixed = JudgeDataset(examples=[*dataset, *scored([1.0])])
    cases = [
        (mixed, right, {}, r"dataset: holds correctness, pairwise; evaluate one"),
        (
            JudgeDataset(examples=[e.unjudged() for e in dataset]),
            right,
            {},
            "dataset: has no verdict",
        ),
        (dataset, {}, {}, "judges: is empty"),
        (dataset, {"teacher": right}, {}, "judges: 'teacher' is the name of the recorded"),
        (dataset, {"a": 3}, {}, "a: int is neither a LlamaIndex evaluator nor a function"),
        (
            dataset,
            {"a": CorrectnessEvaluator(llm=llm_of("1\n"))},
            {},
            "judges correctness, the dat",
        ),
        (dataset, {"a": asked, 3: asked}, {}, "judges: go by names, which are texts; 3 is none"),
        (dataset, {"a": asked, "b": later}, {}, "b: is an async function"),
        (dataset, {"a": asked, "b": PairwiseComparisonEvaluator}, {}, "b: is the class Pairwise"),
        (dataset, {"a": asked}, {"baseline": "b"}, r"baseline: 'b' is not evaluated; .*\['a'\]"),
        (dataset, {"a": asked}, {"baseline": ["a"]}, r"baseline: \['a'\] is not evaluated"),
        (dataset, {"a": asked}, {"baseline": "teacher"}, "baseline: 'teacher' is whom the judges"),
        (dataset, right, {"num_workers": 0}, "num_workers: must be at least 1"),
        (dataset, right, {"seed": -1}, "seed: must be 0 or more"),
        (dataset, right, {"prices": {"x": 1.0}}, "prices: 'x' is not evaluated"),
        (dataset, right, {"prices": {"judge": (1.0, -1.0)}}, "prices: 'judge' needs"),
        (dataset, right, {"prices": {"judge": (1.0, 1.0, 1.0)}}, "prices: 'judge' needs"),
    ]
    for given, judges, settings, message in cases:
        with pytest.raises(ArgumentError, match=message):
            evaluate(given, judges, **settings)


def test_a_teacher_that_judged_in_one_order_is_shown_in_one():
    examples = [e.model_copy(update={"flipped_verdict": None}) for e in pairs(8)]
    report = evaluate(JudgeDataset(examples=examples), {"right": right})
    assert means(report, "right")["agreement_teacher"] == 1
    assert means(report, "teacher") == {"agreement_human": 0.75, "conclusive": 1}


def test_the_best_judge_by_length():
    short = [
        JudgeExample(task="pairwise", query="q", answer="a" * n, second_answer="b" * 9, verdict=1.0)
        for n in (3, 5, 12)
    ]
    judge = by_length(JudgeDataset(examples=short))
    assert [judge(example) for example in short] == [1.0, 1.0, 0.0]
    judge = by_length(JudgeDataset(examples=[short[0], *short[2:] * 2]))
    assert [judge(example) for example in short] == [0.0, 0.0, 1.0]
    with pytest.raises(ArgumentError, match="train: has no pair with a verdict"):
        by_length(scored([1.0]))


def test_baselines():
    dataset = pairs(9)
    judge = majority(dataset)
    most = sum(e.verdict for e in dataset) > 4.5
    assert {judge(e) for e in dataset} == {float(most)}
    assert (
        longer_answer(JudgeExample(task="pairwise", query="q", answer="a", second_answer="b"))
        == 0.5
    )
    with pytest.raises(ArgumentError, match="example: correctness has one answer"):
        longer_answer(scored([1.0]).examples[0])
    with pytest.raises(ArgumentError, match="train: has no label"):
        majority(JudgeDataset(examples=[e.unjudged() for e in dataset]))
