"""`JudgeHandler` on LlamaIndex's own evaluators: what it records, exports, and never harms."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from llama_index.core.evaluation import (
    BatchEvalRunner,
    CorrectnessEvaluator,
    EvaluationResult,
    FaithfulnessEvaluator,
    GuidelineEvaluator,
    PairwiseComparisonEvaluator,
    RelevancyEvaluator,
)
from llama_index.core.llms import MockLLM

from ft_core.datasets import JudgeDataset
from ft_core.errors import ArgumentError, ArtifactError, DatasetError
from ft_judge import JudgeHandler

QUERY = "When does the ferry leave?"
SHORT, LONG = "At nine.", "At nine from the east pier."


@pytest.fixture
def handler(tmp_path):
    handler = JudgeHandler(tmp_path / "verdicts.jsonl")
    yield handler
    handler.detach()


def lines(handler):
    return [json.loads(line) for line in handler.path.read_text().splitlines()]


def compare(evaluator, query=QUERY, first=LONG, second=SHORT, **more):
    return evaluator.evaluate(query=query, response=first, second_response=second, **more)


# --- Each evaluator --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "verdict", "flipped", "consistent"),
    [("longer", 1.0, 1.0, 1), ("place", 1.0, 0.0, 0), ("It is even. [[C]]", 0.5, 0.5, 1)],
)
def test_a_pair_is_recorded_in_both_orders(handler, llm_of, rule, verdict, flipped, consistent):
    evaluator = PairwiseComparisonEvaluator(llm=llm_of(rule))
    expected = compare(evaluator)
    handler.attach(evaluator)
    assert compare(evaluator, reference="Timetable: nine.") == expected
    (record,) = lines(handler)
    (example,) = handler.to_dataset()
    assert (example.verdict, example.flipped_verdict) == (verdict, flipped)
    assert (example.query, example.answer, example.second_answer) == (QUERY, LONG, SHORT)
    assert example.reference == "Timetable: nine."
    metadata = record["metadata"]
    assert metadata["model"] == "rule-1"
    assert metadata["evaluator"] == "PairwiseComparisonEvaluator"
    assert metadata["seconds"] > 0
    assert [call["answer"] for call in metadata["calls"]] == [
        example.reasoning,
        example.flipped_reasoning,
    ]
    shown = [str(call["prompt"]) for call in metadata["calls"]]
    assert shown[0].index(LONG) < shown[0].index(SHORT)
    assert shown[1].index(SHORT) < shown[1].index(LONG)
    assert "impartial judge" in shown[0]
    if consistent:
        assert len(handler.to_dataset().consistent()) == 1
    else:
        with pytest.raises(DatasetError, match="the two orders disagree: 1"):
            handler.to_dataset().consistent()
    assert not handler.failures


def test_equal_answers_are_told_apart_by_their_turn(handler, llm_of):
    evaluator = PairwiseComparisonEvaluator(llm=llm_of("place"))
    handler.attach(evaluator)
    compare(evaluator, first=SHORT, second=SHORT)
    (example,) = handler.to_dataset()
    assert (example.verdict, example.flipped_verdict) == (1.0, 0.0)


def test_two_calls_in_either_order_make_one_pair(handler, llm_of):
    evaluator = PairwiseComparisonEvaluator(llm=llm_of("longer"), enforce_consensus=False)
    handler.attach(evaluator)
    compare(evaluator)
    compare(evaluator, first=SHORT, second=LONG)
    assert [e.flipped_verdict for e in handler.to_dataset()] == [None, None]
    (example,) = handler.to_dataset().consistent()
    assert (example.answer, example.verdict, example.flipped_verdict) == (LONG, 1.0, 1.0)


def test_correctness(handler, llm_of):
    evaluator = CorrectnessEvaluator(llm=llm_of("4.5\nRight, and brief."))
    handler.attach(evaluator)
    evaluator.evaluate(query=QUERY, response=SHORT, reference=LONG, contexts=["not looked at"])
    (record,) = lines(handler)
    (example,) = handler.to_dataset()
    assert (example.task, example.score, example.reasoning) == (
        "correctness",
        4.5,
        "Right, and brief.",
    )
    assert (example.reference, example.contexts) == (LONG, None)
    assert record["metadata"]["passing"] is True


@pytest.mark.parametrize("kind", [FaithfulnessEvaluator, RelevancyEvaluator])
@pytest.mark.parametrize(("says", "score"), [("YES", 1.0), ("NO", 0.0)])
@pytest.mark.parametrize("raises", [False, True])
def test_contexts(handler, llm_of, kind, says, score, raises):
    evaluator = kind(llm=llm_of(says), raise_error=raises)
    handler.attach(evaluator)
    asked = {"query": QUERY, "response": SHORT, "contexts": ["Ferries leave at nine.", "Piers."]}
    if raises and not score:
        with pytest.raises(ValueError, match="The response is invalid"):
            evaluator.evaluate(**asked)
    else:
        evaluator.evaluate(**asked)
    (record,) = lines(handler)
    (example,) = handler.to_dataset()
    assert (example.score, example.reasoning) == (score, says)
    assert example.contexts == asked["contexts"]
    assert "Ferries leave at nine." in str(record["metadata"]["calls"][0]["prompt"])
    assert not handler.failures


def test_guideline(handler, llm_of):
    answer = '{"passing": false, "feedback": "It names no pier."}'
    evaluator = GuidelineEvaluator(llm=llm_of(answer), guidelines="Name the pier.")
    handler.attach(evaluator)
    evaluator.evaluate(query=QUERY, response=SHORT)
    (example,) = handler.to_dataset()
    assert (example.task, example.guideline) == ("guideline", "Name the pier.")
    assert (example.score, example.reasoning) == (0.0, "It names no pier.")


def test_faithfulness_needs_no_query(handler, llm_of):
    evaluator = FaithfulnessEvaluator(llm=llm_of("YES"))
    handler.attach(evaluator)
    evaluator.evaluate(response=SHORT, contexts=["Ferries leave at nine."])
    (example,) = handler.to_dataset()
    assert (example.query, example.asked()) == ("", SHORT)


# --- What is no verdict ----------------------------------------------------------------------


@pytest.mark.parametrize("consensus", [False, True])
def test_an_unreadable_verdict_is_inconclusive(handler, llm_of, consensus):
    evaluator = PairwiseComparisonEvaluator(llm=llm_of("unreadable"), enforce_consensus=consensus)
    handler.attach(evaluator)
    assert compare(evaluator).invalid_result
    (record,) = lines(handler)
    (example,) = handler.to_dataset()
    assert (example.verdict, example.flipped_verdict) == (None, None)
    assert example.reasoning == "I would rather not say."
    assert record["metadata"]["inconclusive"] == "Output cannot be parsed"


@pytest.mark.parametrize(
    ("make", "answer", "raised", "why"),
    [
        (CorrectnessEvaluator, "no line break", ValueError, "ValueError in reading the answer"),
        (CorrectnessEvaluator, "great\nnot a number", None, "the answer holds no verdict"),
        (CorrectnessEvaluator, "", None, "the answer holds no verdict"),
        (CorrectnessEvaluator, "9\nMore than there is.", None, "9 is outside 1 to 5"),
        (CorrectnessEvaluator, "nan\nStrange.", None, "nan is no number"),
        (GuidelineEvaluator, "not JSON", ValueError, "in reading the answer"),
    ],
)
def test_an_unreadable_score_is_inconclusive(handler, llm_of, make, answer, raised, why):
    evaluator = make(llm=llm_of(answer or (lambda prompt: "")))
    handler.attach(evaluator)
    if raised:
        with pytest.raises(raised):
            evaluator.evaluate(query=QUERY, response=SHORT)
    else:
        evaluator.evaluate(query=QUERY, response=SHORT)
    (record,) = lines(handler)
    assert why in record["metadata"]["inconclusive"]
    assert handler.to_dataset().examples[0].score is None
    assert not handler.failures
    with pytest.raises(DatasetError, match="no score by the teacher: 1"):
        handler.to_dataset().consistent()


def test_a_verdict_off_the_scale_of_an_own_parser(handler, llm_of):
    evaluator = PairwiseComparisonEvaluator(
        llm=llm_of("longer"), parser_function=lambda text: (True, 0.8, "x"), enforce_consensus=False
    )
    handler.attach(evaluator)
    compare(evaluator)
    assert lines(handler)[0]["metadata"]["inconclusive"] == "0.8 is none of 1, 0 and 0.5 (a tie)"


@pytest.mark.parametrize("kind", [CorrectnessEvaluator, PairwiseComparisonEvaluator])
def test_a_failed_llm_is_not_recorded_and_its_error_passes(handler, llm_of, kind):
    calls = []

    def rule(prompt):
        calls.append(prompt)
        if len(calls) == (2 if kind is PairwiseComparisonEvaluator else 1):
            raise ConnectionError("the app's own")
        return "[[A]]"

    evaluator = kind(llm=llm_of(rule))
    handler.attach(evaluator)
    with pytest.raises(ConnectionError, match="the app's own"):
        compare(evaluator)
    assert not handler.path.exists()
    assert not handler.failures
    with pytest.raises(DatasetError, match="no judgement is recorded; attach"):
        handler.to_dataset()


def test_arguments_that_are_missing_are_the_apps_business(handler, llm_of):
    evaluator = PairwiseComparisonEvaluator(llm=llm_of("longer"))
    handler.attach(evaluator)
    with pytest.raises(ValueError, match="must be provided"):
        evaluator.evaluate(query=QUERY, response=SHORT)
    with pytest.raises(TypeError):
        asyncio.run(evaluator.aevaluate("q", "a", None, "b", None, 0, "too many"))
    assert not handler.path.exists()
    assert handler.failures == {"TypeError": 1}  # arguments that nobody can read


def test_a_judgement_that_is_cancelled_is_not_recorded(handler, llm_of):
    evaluator = PairwiseComparisonEvaluator(llm=llm_of("longer"))
    handler.attach(evaluator)

    async def cancelled():
        task = asyncio.ensure_future(
            evaluator.aevaluate(QUERY, LONG, None, SHORT, sleep_time_in_seconds=60)
        )
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert not handler.path.exists()
    assert not handler.failures


# --- In an app -------------------------------------------------------------------------------


def test_inside_a_batch_runner(handler, llm_of):
    runner = BatchEvalRunner(
        {
            "pairs": PairwiseComparisonEvaluator(llm=llm_of("longer", name="one")),
            "correct": CorrectnessEvaluator(llm=llm_of("3\nIn part.", name="two")),
            "strict": CorrectnessEvaluator(llm=llm_of("1\nNo.", name="three")),
        },
        workers=4,
    )
    handler.attach(runner)
    queries = [f"question {n}" for n in range(12)]
    results = runner.evaluate_response_strs(
        queries=queries,
        response_strs=[LONG] * 12,
        second_response=[SHORT] * 12,
        reference=[None] * 12,
    )
    dataset = handler.to_dataset()
    assert len(dataset) == 36
    assert {len(line["metadata"]["calls"]) for line in lines(handler)} == {1, 2}
    by_model = {
        m: [e for e in dataset if e.metadata["model"] == m] for m in ("one", "two", "three")
    }
    assert [len(found) for found in by_model.values()] == [12, 12, 12]
    assert {e.query for e in by_model["one"]} == set(queries)
    for result in results["pairs"]:
        handler.mark(result, human=0.0)
    marked = [e for e in handler.to_dataset() if e.human is not None]
    assert [e.task for e in marked] == ["pairwise"] * 12


def test_of_an_evaluator_that_asks_another_the_outer_one_is_recorded(handler, llm_of):
    class Second(CorrectnessEvaluator):
        async def aevaluate(self, query=None, response=None, contexts=None, **kwargs):
            first = await self.first.aevaluate(query=query, response=response)
            result = await super().aevaluate(query=query, response=response)
            return result.model_copy(update={"score": min(first.score, result.score)})

    evaluator = Second(llm=llm_of("4\nGood."))
    evaluator.first = CorrectnessEvaluator(llm=llm_of("2\nPoor."))
    handler.attach(evaluator)
    evaluator.evaluate(query=QUERY, response=SHORT)
    (example,) = handler.to_dataset()
    assert example.score == 2.0
    assert [c["answer"][0] for c in example.metadata["calls"]] == ["2", "4"]


def test_arguments_that_a_subclass_passes_on_are_recorded(handler, llm_of):
    class Named(CorrectnessEvaluator):
        async def aevaluate(self, query=None, **kwargs):
            return await super().aevaluate(query, **kwargs)

    class Placed(CorrectnessEvaluator):
        async def aevaluate(self, *args, **kwargs):
            return await super().aevaluate(*args, **kwargs)

    async def judge():
        await named.aevaluate(QUERY, response=SHORT, reference=LONG)
        await placed.aevaluate(QUERY, SHORT, None, LONG)
        await placed.aevaluate(QUERY, SHORT, reference=LONG)

    named, placed = Named(llm=llm_of("4\nGood.")), Placed(llm=llm_of("4\nGood."))
    with handler.attach([named, placed]):
        asyncio.run(judge())
    found = [(e.query, e.answer, e.reference) for e in handler.to_dataset()]
    assert found == [(QUERY, SHORT, LONG)] * 3


def test_an_llm_shared_with_the_app_is_only_seen_when_it_judges(handler, llm_of):
    llm = llm_of("4\nGood.")
    evaluator = CorrectnessEvaluator(llm=llm)
    with handler.attach({"judge": evaluator}):
        llm.complete("unrelated")
        evaluator.evaluate(query=QUERY, response=SHORT)
    evaluator.evaluate(query="after detaching", response=SHORT)
    (record,) = lines(handler)
    assert len(record["metadata"]["calls"]) == 1


def test_marks(handler, llm_of, caplog):
    evaluator = PairwiseComparisonEvaluator(llm=llm_of("longer"))
    handler.attach(evaluator)
    result = compare(evaluator)
    handler.mark(result, human=1.0)
    handler.mark(handler.id_of(result), human=0.5, feedback="Both will do.")
    (example,) = handler.to_dataset()
    assert (example.human, example.user_feedback) == (0.5, "Both will do.")
    assert handler.ids(QUERY) == [handler.id_of(result)]
    handler.mark(handler.ids(QUERY)[0], human=7)
    handler.mark("unknown", human=1.0)
    handler.mark(result.model_copy(), human=1.0)
    handler.mark(result, human="first")
    handler.mark(result, feedback=["Not", "text"])
    assert handler.failures == {"ArgumentError": 3}
    assert "JudgeHandler lost a record: judgement: is neither a recorded" in caplog.text
    assert "Traceback" not in caplog.text
    assert handler.to_dataset().examples[0].human == 0.5
    key = id(result)
    del result
    assert key not in handler._results  # nothing is kept alive or remembered for ever


def test_targets_without_an_evaluator_are_refused(handler):
    with pytest.raises(ArgumentError, match="target: found none of PairwiseComparisonEvaluator"):
        handler.attach(MockLLM())


def test_a_failing_hook_harms_nothing(tmp_path, llm_of):
    def redact(text):
        raise KeyError("no redaction today")

    evaluator = PairwiseComparisonEvaluator(llm=llm_of("longer"))
    expected = compare(evaluator)
    handler = JudgeHandler(tmp_path / "v.jsonl", redact=redact)
    with handler.attach(evaluator):
        result = compare(evaluator)
        assert result == expected
        handler.mark(result, feedback="x")
    assert handler.failures == {"KeyError": 1, "ArgumentError": 1}
    assert not handler.path.exists()
    unwritable = JudgeHandler(tmp_path / "file" / "v.jsonl")
    (tmp_path / "file").write_text("in the way of the folder")
    with unwritable.attach(evaluator):
        assert compare(evaluator) == expected
    assert sum(unwritable.failures.values()) == 1


def test_every_text_is_redacted(tmp_path, llm_of):
    secret = "K9-KEY"
    handler = JudgeHandler(tmp_path / "v.jsonl", redact=lambda text: text.replace(secret, "***"))
    pairs = PairwiseComparisonEvaluator(llm=llm_of(f"{secret} [[A]]"))
    guided = GuidelineEvaluator(
        llm=llm_of(f'{{"passing": true, "feedback": "{secret}"}}'), guidelines=f"No {secret}."
    )
    faithful = FaithfulnessEvaluator(llm=llm_of(f"YES {secret}"))

    class Mute(CorrectnessEvaluator):
        async def aevaluate(self, query=None, response=None, contexts=None, **kwargs):
            return EvaluationResult(invalid_result=True, invalid_reason=f"cannot read {secret}")

    mute = Mute(llm=MockLLM())
    with handler.attach([pairs, guided, faithful, mute]):
        mute.evaluate(query=QUERY, response=SHORT)
        result = compare(pairs, f"q {secret}", f"a {secret}", f"b {secret}", reference=secret)
        handler.mark(result, feedback=secret)
        guided.evaluate(query=QUERY, response=SHORT)
        faithful.evaluate(response=SHORT, contexts=[f"c {secret}"])
    text = handler.path.read_text()
    assert secret not in text
    assert "cannot read ***" in text
    assert len(handler.to_dataset()) == 4
    assert handler.ids(f"q {secret}") == handler.ids("q ***") != []
    assert not handler.failures


def test_without_prompts_and_with_broken_characters(tmp_path, llm_of):
    handler = JudgeHandler(tmp_path / "v.jsonl", prompts=False)
    evaluator = CorrectnessEvaluator(llm=llm_of("2\nÜnclear."))
    with handler.attach(evaluator):
        evaluator.evaluate(query="half a \ud83d pair", response="é")
    (record,) = lines(handler)
    assert "calls" not in record["metadata"]
    (example,) = handler.to_dataset()
    assert (example.query, example.reasoning) == ("half a ? pair", "Ünclear.")


def test_foreign_and_own_journals(tmp_path, handler, llm_of):
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text('{"type": "rerank", "id": "x", "query": "q", "nodes": []}\n')
    with pytest.raises(ArtifactError, match="holds a line that no JudgeHandler wrote"):
        JudgeHandler(foreign)
    with pytest.raises(ArgumentError, match="is a folder"):
        JudgeHandler(tmp_path)
    with pytest.raises(ArtifactError, match="no such journal"):
        JudgeHandler.read(tmp_path / "missing.jsonl")
    evaluator = CorrectnessEvaluator(llm=llm_of("2\nNo."))
    with handler.attach(evaluator):
        evaluator.evaluate(query=QUERY, response=SHORT)
    assert JudgeHandler.read(handler.path).to_dataset() == handler.to_dataset()
    assert JudgeDataset.coerce(handler.path) == handler.to_dataset()


def test_threads_and_tasks(handler, llm_of):
    evaluator = PairwiseComparisonEvaluator(llm=llm_of("longer"))
    handler.attach(evaluator)

    def many(thread):
        async def all_of_them():
            await asyncio.gather(
                *(
                    evaluator.aevaluate(f"q{thread}.{n}", SHORT * n, second_response=SHORT * 3)
                    for n in range(1, 9)
                )
            )

        asyncio.run(all_of_them())

    threads = [threading.Thread(target=many, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    dataset = handler.to_dataset()
    assert len(dataset) == 32
    assert not handler.failures
    for example in dataset:
        times = len(example.answer) // len(SHORT)
        expected = 1.0 if times > 3 else 0.0 if times < 3 else 0.5
        assert example.verdict == example.flipped_verdict == expected
        assert len(example.metadata["calls"]) == 2
        assert all(example.answer in str(c["prompt"]) for c in example.metadata["calls"])


PROCESS = """
import sys
from llama_index.core.evaluation import CorrectnessEvaluator
from llama_index.core.llms import MockLLM
from ft_judge import JudgeHandler

class Fixed(MockLLM):
    def complete(self, prompt, formatted=False, **kwargs):
        from llama_index.core.llms import CompletionResponse
        return CompletionResponse(text="3\\nSo, so.")

evaluator = CorrectnessEvaluator(llm=Fixed())
JudgeHandler(sys.argv[1]).attach(evaluator)
number = 0
while number < int(sys.argv[2]):
    evaluator.evaluate(query=f"{sys.argv[3]} {number}", response="x" * 3000)
    number += 1
    print(number, flush=True)
"""


def start(path, count, name):
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(path), str(count), name],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )


def test_processes_share_a_journal_and_one_is_killed(tmp_path):
    path = tmp_path / "v.jsonl"
    steady = start(path, 40, "steady")
    killed = start(path, 10**6, "killed")
    for _ in range(5):
        killed.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    out, _ = steady.communicate(timeout=120)
    assert out.splitlines()[-1] == "40"
    with open(path, "a") as file:  # as a kill within a write leaves it
        file.write('{"task": "correctness", "query": "torn')
    dataset = JudgeHandler.read(path).to_dataset()
    queries = [e.query for e in dataset]
    assert {f"steady {n}" for n in range(40)} <= set(queries)
    assert {f"killed {n}" for n in range(5)} <= set(queries)
    assert all(e.score == 3.0 for e in dataset)
