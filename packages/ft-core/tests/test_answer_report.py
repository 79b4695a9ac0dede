"""The report of answers: what is better when less is, values that are missing, and the page."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ft_core.errors import ArgumentError, DatasetError
from ft_core.evaluation import AnswerEvaluation, compare
from ft_core.report import AnswerReport
from ft_core.report.text import metric_label, metric_value, quantity

NASTY = "<script>alert(1)</script> & \"'> \x00\x1b[31m\u202e {{ 7 * 7 }}"
QUESTIONS = {str(i): f"question {i} {NASTY}" for i in range(20)}


def make_run(name: str, scores: dict[str, dict[str, float]], **fields: object) -> AnswerEvaluation:
    return AnswerEvaluation(
        name=name,
        dataset_hash="x",
        scores=scores,
        seconds=1.0,
        answers={key: f"{name}'s answer {key} {NASTY}" for key in QUESTIONS},
        **fields,
    )


def every(value: float) -> dict[str, float]:
    return {key: value + int(key) / 1000 for key in QUESTIONS}


@pytest.fixture
def base() -> AnswerEvaluation:
    return make_run("base", {"rouge_l": every(0.2), "latency": every(2.0), "cost": every(0.001)})


@pytest.fixture
def student() -> AnswerEvaluation:
    scores = {"rouge_l": every(0.6), "latency": every(1.0), "cost": every(0.003)}
    return make_run("student", scores)


def shown(report: AnswerReport, width: int) -> str:
    stream = StringIO()
    Console(file=stream, width=width).print(report)
    return stream.getvalue()


class TestDirection:
    def test_less_time_is_better_and_more_cost_is_worse(
        self, base: AnswerEvaluation, student: AnswerEvaluation
    ) -> None:
        report = AnswerReport([base, student], QUESTIONS)

        outcomes = {
            metric: cell.difference.outcome
            for metric, cell in report.measures["student"].items()
            if cell.difference
        }
        assert outcomes == {"rouge_l": "better", "latency": "better", "cost": "worse"}
        assert report.verdict("student").startswith("student is better than base in ROUGE-L")
        assert report.other_metrics("student") == "Better in latency (s); worse in cost."

    def test_a_verdict_on_a_quantity(
        self, base: AnswerEvaluation, student: AnswerEvaluation
    ) -> None:
        report = AnswerReport([base, student], QUESTIONS, primary="latency")

        assert report.outcome("student") == "better"
        assert "in latency (s): −1 (−1 to −1), p < 0.001, n = 20" in report.verdict("student")  # noqa: RUF001
        assert len(report.gained("student")) == 5
        assert report.lost("student") == []

    def test_gained_and_lost(self, base: AnswerEvaluation, student: AnswerEvaluation) -> None:
        student.scores["rouge_l"] |= {"3": 0.9, "4": 0.1, "5": base.scores["rouge_l"]["5"]}

        report = AnswerReport([base, student], QUESTIONS, examples=30)

        assert report.gained("student")[0].question == "3"
        assert [change.question for change in report.lost("student")] == ["4"]
        assert len(report.gained("student")) == 18


class TestMissingValues:
    def test_pairs_are_those_that_both_have(
        self, base: AnswerEvaluation, student: AnswerEvaluation
    ) -> None:
        del base.scores["latency"]["0"]
        del student.scores["latency"]["1"]

        test = compare(base, student, "latency")

        assert test.n == 18
        assert test.difference == pytest.approx(-1.0)
        report = AnswerReport([base, student], QUESTIONS)
        assert report.measures["student"]["latency"].n == 19
        for text in (shown(report, 200), report.to_html()):
            assert "n = 19" in text
            assert "n = 18" in text

    def test_no_pair(self, base: AnswerEvaluation, student: AnswerEvaluation) -> None:
        base.scores["latency"] = {"0": 1.0}
        student.scores["latency"] = {"1": 1.0}

        report = AnswerReport([base, student], QUESTIONS)

        assert report.measures["student"]["latency"].difference is None
        report.to_html()
        with pytest.raises(ArgumentError, match="different queries"):
            compare(base, student, "latency")

    def test_a_run_that_is_shown_only(
        self, base: AnswerEvaluation, student: AnswerEvaluation
    ) -> None:
        teacher = make_run("teacher", {"latency": every(9.0)})

        report = AnswerReport([base, student, teacher], QUESTIONS, uncompared=["teacher"])

        assert report.primary == "rouge_l"
        assert report.comparisons == 3
        assert [run.name for run in report.compared] == ["student"]
        with pytest.raises(ArgumentError, match="'teacher' is not compared"):
            report.verdict("teacher")
        assert "outcome" not in report.to_dict()["runs"][2]
        assert "teacher" in shown(report, 100)


class TestNotes:
    def test_what_failed_is_named(self, base: AnswerEvaluation, student: AnswerEvaluation) -> None:
        student = student.model_copy(
            update={
                "failures": {"7": f"TimeoutError: {NASTY}"},
                "estimated": ["1", "2"],
                "unscored": {"rouge_l": {"8": "no verdict"}},
            }
        )

        report = AnswerReport([base, student], QUESTIONS, {"1": "the reference"})

        notes = "\n".join(report.notes())
        assert report.verdict("student").endswith(" student failed on 1 of 20 questions.")
        assert "1 of 20 calls failed" in notes
        assert "question 7: TimeoutError" in notes
        assert "tokens of 2 of 20 answers are estimated" in notes
        assert "ROUGE-L of 1 of 20 answers could not be judged; question 8: no verdict" in notes
        assert "19 questions of 20 without a reference" in notes
        assert "calls failed" in report.to_html()
        assert report.to_dict()["notes"] == report.notes()

    def test_nothing_to_note(self, base: AnswerEvaluation, student: AnswerEvaluation) -> None:
        assert AnswerReport([base, student], QUESTIONS).notes() == []
        assert AnswerReport([base], QUESTIONS).notes() == []

    @given(st.integers(1, 12), st.integers(1, 3))
    def test_too_few_questions(self, count: int, metrics: int) -> None:
        """Whatever the note says cannot be shown, the best of all students does not show."""
        questions = {str(i): "q" for i in range(count)}
        runs = [
            AnswerEvaluation(
                name=name,
                dataset_hash="x",
                seconds=0,
                scores={f"m{i}": dict.fromkeys(questions, value) for i in range(metrics)},
                answers=questions,
            )
            for name, value in (("base", 0.0), ("student", 1.0))
        ]

        report = AnswerReport(runs, questions)

        warned = any("cannot show any difference" in note for note in report.notes())
        assert warned == (report.outcome("student") == "undecided")


class TestPage:
    def test_texts_cannot_break_it(self, base: AnswerEvaluation, student: AnswerEvaluation) -> None:
        report = AnswerReport([base, student], QUESTIONS, QUESTIONS, title=NASTY)

        page = report.to_html()

        assert "<script" not in page
        assert "{{" in page  # as text: nothing of it was evaluated
        assert "student&#39;s answer" in page
        assert not re.search("[\x00-\x08\x1b\u202e]", page)

    def test_quantities_have_plots_of_their_own(
        self, base: AnswerEvaluation, student: AnswerEvaluation
    ) -> None:
        page = AnswerReport([base, student], QUESTIONS).to_html()

        assert page.count("<svg") == 4  # the score, its difference, latency, cost
        ids = re.findall(r'\bid="([^"]+)"', page)
        assert len(set(ids)) == len(ids)

    def test_quantities_alone(self) -> None:
        runs = [make_run(name, {"latency": every(1.0)}) for name in ("a", "b")]
        assert AnswerReport(runs, QUESTIONS).to_html().count("<svg") == 1

    def test_json(self, base: AnswerEvaluation, student: AnswerEvaluation, tmp_path: Path) -> None:
        report = AnswerReport([base, student], QUESTIONS, QUESTIONS)
        report.save_json(tmp_path / "a.json")

        content = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))

        assert content == report.to_dict()
        gained = content["runs"][1]["gained"][0]
        assert gained["after"] == student.answers[gained["question"]]
        assert gained["reference"] == QUESTIONS[gained["question"]]


class TestRefused:
    def test_other_questions(self, base: AnswerEvaluation) -> None:
        with pytest.raises(ArgumentError, match="not in the dataset"):
            AnswerReport([base], {"1": "a"})
        with pytest.raises(ArgumentError, match="answered other questions"):
            AnswerReport([base], {**QUESTIONS, "new": "a"})

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"scores": {"latency": {}}}, r"scores\['latency'\]: has no value"),
            ({"scores": {"latency": {"99": 1.0}}}, r"scores\['latency'\]: '99' has no answer"),
            ({"scores": {"latency": {"1": float("nan")}}}, "not a finite number"),
            ({"scores": {}, "failures": {"99": "x"}}, "failures: '99' has no answer"),
        ],
    )
    def test_parts_that_do_not_fit(self, fields: dict[str, object], message: str) -> None:
        with pytest.raises(DatasetError, match=message):
            make_run("a", **fields)  # type: ignore[arg-type]

    def test_saved_and_loaded(self, base: AnswerEvaluation, tmp_path: Path) -> None:
        base.save(tmp_path / "run.json")
        assert AnswerEvaluation.load(tmp_path / "run.json") == base


class TestText:
    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (0.000123456, "0.0001235"),
            (1.23456, "1.235"),
            (123456.7, "123,457"),
            (100.0, "100"),
            (0.0, "0"),
            (-2.5, "−2.5"),  # noqa: RUF001
            (float("nan"), "n/a"),
        ],
    )
    def test_quantity(self, value: float, text: str) -> None:
        assert quantity(value) == text

    def test_by_metric(self) -> None:
        assert metric_value("cost", 0.00001, sign=True) == "+0.00001"
        assert metric_value("rouge_l", 0.00001, sign=True) == "+0.000"
        assert metric_label("rouge_l") == "ROUGE-L"
        assert metric_label("latency") == "latency (s)"
