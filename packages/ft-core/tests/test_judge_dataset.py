"""`JudgeDataset`: what it refuses, how orders are put together, what it drops and says so."""

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_core.datasets import JudgeDataset, JudgeExample
from ft_core.datasets.judge import TASKS, refusal
from ft_core.errors import DatasetError


def pair(query="Which tide is higher?", a="The spring tide.", b="The neap tide.", **fields):
    return JudgeExample(task="pairwise", query=query, answer=a, second_answer=b, **fields)


def scored(task="correctness", **fields):
    needs = {"contexts": ["The pier is open."]} if task in ("faithfulness", "relevancy") else {}
    if task == "guideline":
        needs = {"guideline": "Be brief."}
    return JudgeExample(task=task, query="Is the pier open?", answer="Yes.", **needs, **fields)


def dataset(*examples):
    return JudgeDataset(examples=list(examples))


# --- What is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"task": "pairwise", "query": "q", "answer": "a"}, "second_answer: is missing"),
        ({"task": "pairwise", "answer": "a", "second_answer": "b"}, "query: is missing"),
        ({"task": "correctness", "query": "q"}, "answer: Field required"),
        ({"task": "correctness", "query": " ", "answer": "a"}, "query: is missing"),
        ({"task": "correctness", "query": "q", "answer": "a", "score": 0}, "0 is outside 1 to 5"),
        ({"task": "correctness", "query": "q", "answer": "a", "score": 5.5}, "5.5 is outside 1 to"),
        ({"task": "correctness", "query": "q", "answer": "a", "score": "4"}, "score: .*number"),
        ({"task": "correctness", "query": "q", "answer": "a", "human": 7}, "human: 7 is outside"),
        ({"task": "correctness", "query": "q", "answer": "a", "verdict": 1}, "knows no such field"),
        ({"task": "pairwise", "query": "q", "answer": "a", "second_answer": "b", "score": 1},
         "score: is given, but pairwise knows no such field"),
        ({"task": "pairwise", "query": "q", "answer": "a", "second_answer": "b", "verdict": 2},
         "verdict: 2 is none of 1, 0 and 0.5"),
        ({"task": "faithfulness", "answer": "a", "score": 1}, "contexts: is missing"),
        ({"task": "guideline", "query": "q", "answer": "a", "score": 1}, "guideline: is missing"),
        ({"task": "relevancy", "query": "q", "answer": "a", "contexts": ["c"], "score": 3},
         "3 is neither 1"),
        ({"task": "style", "query": "q", "answer": "a"}, "task: Input should be"),
        ({"task": "correctness", "query": "q", "answer": "a", "grade": 4}, "grade: Extra inputs"),
    ],
)  # fmt: skip
def test_bad_lines_name_file_line_and_reason(tmp_path, line, reason):
    path = tmp_path / "verdicts.jsonl"
    good = json.dumps(scored(score=4.0).content())
    path.write_text(good + "\n\n" + json.dumps(line) + "\n")
    with pytest.raises(DatasetError, match=reason) as caught:
        JudgeDataset.load(path)
    assert str(caught.value).startswith(f"{path}: line 3")


def test_nan_is_no_score(tmp_path):
    path = tmp_path / "v.jsonl"
    path.write_text('{"task": "correctness", "query": "q", "answer": "a", "score": NaN}\n')
    with pytest.raises(DatasetError, match="nan is outside 1 to 5"):
        JudgeDataset.load(path)


def test_a_pass_may_be_a_boolean_and_an_answer_empty(tmp_path):
    path = tmp_path / "v.jsonl"
    row = {"task": "relevancy", "query": "q", "answer": "", "contexts": [], "score": True}
    path.write_text(json.dumps(row | {"human": False}) + "\n")
    (example,) = JudgeDataset.load(path)
    assert (example.score, example.human, example.label, example.answer) == (1.0, 0.0, 1.0, "")


@pytest.mark.parametrize("task", TASKS)
def test_scales(task):
    accepted = {v for v in (0, 0.5, 1, 2, 3.5, 5, 6, -1) if refusal(task, v) is None}
    binary = {0, 1}
    assert accepted == {"pairwise": {0, 0.5, 1}, "correctness": {1, 2, 3.5, 5}}.get(task, binary)
    assert refusal(task, 10**400).startswith("so large a number is")  # no float holds it


# --- Orders ----------------------------------------------------------------------------------

verdicts = st.sampled_from([None, 0.0, 0.5, 1.0])
pairs = st.builds(
    pair,
    query=st.sampled_from(["one", "two", "three"]),
    a=st.sampled_from(["x", "y"]),
    b=st.sampled_from(["x", "z"]),
    verdict=verdicts,
    flipped_verdict=verdicts,
    human=verdicts,
    reasoning=st.none() | st.text("ab", min_size=1),
)


@given(pairs)
def test_flipping_twice_is_nothing(example):
    assert example.flipped().flipped() == example
    assert example.flipped().judged_content() == example.judged_content()
    assert (example.flipped().consistent_label is None) == (example.consistent_label is None)


@given(st.lists(pairs, min_size=1))
def test_merging_undoes_both_orders_and_changes_nothing_twice(examples):
    distinct = list(
        {e.judged_content(): e for e in examples if e.answer != e.second_answer}.values()
    )
    if distinct:
        given = dataset(*distinct)
        both = given.both_orders()
        assert len(both) == 2 * len(given)
        assert both.merged() == given
        assert given.merged() == given


def test_a_flipped_verdict_is_expressed_for_the_first_order():
    example = pair(
        verdict=1.0, flipped_verdict=0.0, human=1.0, reasoning="A.", flipped_reasoning="B."
    )
    flipped = example.flipped()
    # Shown as (neap, spring), the teacher took the neap tide, the first one there.
    assert (flipped.answer, flipped.verdict, flipped.reasoning) == ("The neap tide.", 1.0, "B.")
    assert (flipped.flipped_verdict, flipped.human) == (0.0, 0.0)
    assert example.consistent_label is None
    assert pair(verdict=0.5, flipped_verdict=0.5).consistent_label == 0.5
    assert scored(score=3.0).consistent_label == 3.0
    assert scored(score=3.0).flipped() == scored(score=3.0)


def test_two_records_of_one_pair_in_either_order_become_one():
    shown = pair(verdict=1.0, reasoning="The first.", metadata={"id": "1"})
    other = JudgeExample(
        task="pairwise", query=shown.query, answer=shown.second_answer,
        second_answer=shown.answer, verdict=0.0, reasoning="The second.", human=0.0,
    )  # fmt: skip
    (merged,) = dataset(shown, other).merged()
    assert (merged.verdict, merged.flipped_verdict, merged.human) == (1.0, 1.0, 1.0)
    assert (merged.reasoning, merged.flipped_reasoning) == ("The first.", "The second.")
    assert merged.metadata == {"id": "1"}
    (kept,) = dataset(shown, other).consistent()
    assert kept == merged


def test_words_that_could_not_be_read_are_no_reason_for_another_verdict():
    unread = pair(reasoning="B, or A?", flipped_reasoning="Who knows?")
    judged = pair(verdict=1.0, flipped_verdict=1.0, flipped_reasoning="The first.")
    (merged,) = dataset(unread, judged).merged()
    assert (merged.reasoning, merged.flipped_reasoning) == (None, "The first.")
    (merged,) = dataset(unread, pair(verdict=1.0, reasoning="It is.")).merged()
    assert (merged.reasoning, merged.flipped_reasoning) == ("It is.", "Who knows?")
    (merged,) = dataset(scored(reasoning="Two? Four?"), scored(score=4.0, reasoning="4")).merged()
    assert merged.reasoning == "4"


def test_consistent_says_what_it_drops(caplog):
    examples = dataset(
        pair("q1", verdict=1.0, flipped_verdict=1.0),
        pair("q2", verdict=0.5, flipped_verdict=0.5),
        pair("q3", verdict=1.0, flipped_verdict=0.0),
        pair("q4", verdict=1.0, flipped_verdict=0.5),
        pair("q5", verdict=1.0),
        pair("q6", human=1.0),
        scored(score=4.5),
        scored("guideline"),
        pair("q7", verdict=1.0, flipped_verdict=1.0),
        pair("q7", verdict=0.0, flipped_verdict=0.0),
        pair("q1", verdict=1.0, flipped_verdict=1.0),
    )
    with caplog.at_level(logging.INFO):
        kept, dropped = examples.consistency()
    assert [e.query for e in kept] == ["q1", "q2", "Is the pier open?"]
    assert dropped == {
        "contradictory repeats of the same answers": 2,
        "repeats merged into one": 1,
        "the two orders disagree": 2,
        "a verdict in one order only": 1,
        "no verdict by the teacher": 1,
        "no score by the teacher": 1,
    }
    assert len(examples) == len(kept) + sum(dropped.values())
    assert "the two orders disagree: 2" in caplog.text
    assert examples.consistent() == kept
    with pytest.raises(DatasetError, match=r"no example is left .*one order only: 1"):
        dataset(pair(verdict=1.0)).consistent()


def test_contradictions_of_scores_and_people():
    assert len(dataset(scored(score=4.0), scored(score=4.0), pair()).merged()) == 2
    with pytest.raises(DatasetError, match="contradictory repeats of the same answers: 2"):
        dataset(scored(score=4.0), scored(score=2.0)).merged()
    with pytest.raises(DatasetError, match="contradictory"):
        dataset(
            pair(human=1.0), pair(human=1.0).flipped().model_copy(update={"human": 1.0})
        ).merged()
    other = scored(score=2.0).model_copy(update={"reference": "No."})
    assert len(dataset(scored(score=4.0), other).merged()) == 2  # another question to the judge


def test_judges_see_no_verdicts():
    example = pair(verdict=1.0, flipped_verdict=0.0, human=1.0, reasoning="r",
                   flipped_reasoning="f", user_feedback="u", metadata={"id": "x"})  # fmt: skip
    assert example.unjudged() == pair()


# --- Files -----------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    examples = dataset(
        pair(verdict=0.0, flipped_verdict=0.5), scored(score=1.0), pair("q", human=0.5)
    )
    examples.save(tmp_path / "d.jsonl")
    assert JudgeDataset.load(tmp_path / "d.jsonl") == examples
    assert JudgeDataset.coerce(tmp_path / "d.jsonl").content_hash == examples.content_hash
    assert "null" not in (tmp_path / "d.jsonl").read_text()


def test_a_task_that_is_not_named_follows_from_the_fields():
    pair = JudgeExample(query="q", answer="a", second_answer="b", verdict=1.0)
    assert pair.task == "pairwise"
    assert JudgeExample(query="q", answer="a", score=4.0).task == "correctness"
    for field in ({"contexts": ["c"]}, {"guideline": "Be brief."}):
        with pytest.raises(DatasetError, match=r"is missing; .* one of pairwise, corr"):
            JudgeExample(query="q", answer="a", score=1.0, **field)


def test_a_broken_line_in_the_middle_of_a_journal_is_an_error(tmp_path):
    line = (
        '{"task": "correctness", "query": "q", "answer": "a", "score": 2.0, "metadata": {"n": 1}}'
    )
    path = tmp_path / "journal.jsonl"
    path.write_text(f'{line}\n{{"task": nope}}\n{line}\n')
    with pytest.raises(DatasetError, match="line 2"):
        JudgeDataset.load(path)


def test_a_journal_loads_with_its_marks_and_without_torn_lines(tmp_path, caplog):
    path = tmp_path / "journal.jsonl"
    first = pair(verdict=1.0, metadata={"id": "a"}).content()
    second = scored(score=4.0, metadata={"id": "b"}).content()
    lines = [
        json.dumps(first),
        json.dumps(second),
        json.dumps({"mark": "a", "human": 0.0, "metadata": {"time": "t"}}),
        json.dumps({"mark": "a", "human": 1.0, "user_feedback": "well", "metadata": {"time": "t"}}),
        json.dumps({"mark": "b", "human": 9, "metadata": {"time": "t"}}),
        json.dumps({"mark": "b", "human": True, "metadata": {"time": "t"}}),
        json.dumps({"mark": "gone", "human": 1, "metadata": {"time": "t"}}),
        json.dumps(second)[:40],
    ]
    path.write_text("\n".join(lines) + "\n")
    loaded = JudgeDataset.load(path)
    assert [(e.human, e.user_feedback) for e in loaded] == [(1.0, "well"), (1.0, None)]
    assert "'not a verdict of correctness': 1" in caplog.text
    assert "'its judgement is not in the file before it': 1" in caplog.text
    assert "line 8 was cut short" in caplog.text


def test_splits_keep_a_question_and_a_group_on_one_side():
    topics = ["tides", "piers", "ferries", "lights", "charts", "knots", "winds", "reefs"]
    examples = dataset(
        *(pair(f"Tell me of {t}, please", a, "no", verdict=1.0) for t in topics for a in "xyz"),
        *(
            pair(f"Sum up: {t}{n}", "x", "no", group="Sum up the text below")
            for t in topics
            for n in "12"
        ),
    )
    parts = examples.split({"train": 0.6, "test": 0.4}, seed=3)
    questions = [{e.asked() for e in part} for part in parts.values()]
    assert not questions[0] & questions[1]
    assert sum(map(len, parts.values())) == len(examples)
    assert JudgeExample(task="faithfulness", answer="a", contexts=["c"]).asked() == "a"


def test_stats():
    stats = dataset(
        pair("q1", verdict=1.0, flipped_verdict=1.0, human=0.0),
        pair("q2", verdict=1.0, flipped_verdict=0.0, human=1.0),
        pair("q3", "same", "same"),
        scored(score=4.0, human=4.0),
        scored(score=4.0),
    ).stats()
    assert stats["examples"] == 5
    assert stats["pairs judged in both orders"] == 2
    assert stats["pairs judged alike in both"] == 1
    assert stats["labels"] == {"correctness 4": 2, "pairwise 1": 2}
    assert (stats["human labels"], stats["teacher agrees with human"]) == (3, 1)
    assert (stats["repeats of the same answers"], stats["pairs of equal answers"]) == (1, 1)


def test_of_task():
    mixed = dataset(pair(), scored(score=2.0))
    assert [e.task for e in mixed.of_task("correctness")] == ["correctness"]
    with pytest.raises(DatasetError, match="no example of the task 'guideline'; there is corr"):
        mixed.of_task("guideline")
