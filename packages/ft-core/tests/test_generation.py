"""Generation with real LlamaIndex LLMs that compute their answers in this process."""

import asyncio
import contextlib
import email.utils
import json
import os
import re
import threading
import time
from typing import Any

import pytest
from llama_index.core.llms import CompletionResponse, CustomLLM, LLMMetadata, MockLLM
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.schema import TextNode
from pydantic import PrivateAttr

from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.errors import ArgumentError, ArtifactError, GenerationError
from ft_core.generation import agenerate_qa_embedding_pairs, failures, generate_qa_embedding_pairs
from ft_core.generation.prompts import EXAMPLES, SmallStyle, usable


class ScriptedLLM(CustomLLM):
    """Answers by a function of the passage; counts its calls."""

    name: str = "scripted"
    api_key: str = "sk-verysecretkey"
    temperature: float = 0.0
    _answer: Any = PrivateAttr()
    _lock: Any = PrivateAttr(default_factory=threading.Lock)
    _passages: list = PrivateAttr(default_factory=list)
    _busy: int = PrivateAttr(default=0)
    _most_busy: int = PrivateAttr(default=0)

    def __init__(self, answer, **kwargs):
        super().__init__(**kwargs)
        self._answer = answer

    @property
    def metadata(self):
        return LLMMetadata(model_name=self.name)

    @llm_completion_callback()
    def complete(self, prompt, formatted=False, **kwargs):
        found = re.search(r"<passage>\n(.*)\n</passage>", prompt, re.S)
        passage = found.group(1) if found else prompt
        with self._lock:
            self._passages.append(passage)
            self._busy += 1
            self._most_busy = max(self._busy, self._most_busy)
        try:
            return CompletionResponse(text=self._answer(passage))
        finally:
            with self._lock:
                self._busy -= 1

    @llm_completion_callback()
    def stream_complete(self, prompt, formatted=False, **kwargs):
        raise NotImplementedError

    @property
    def passages(self):
        return self._passages


class AsyncLLM(ScriptedLLM):
    """The same with an asynchronous completion of its own."""

    @llm_completion_callback()
    async def acomplete(self, prompt, formatted=False, **kwargs):
        await asyncio.sleep(0)
        return self.complete(prompt, **kwargs)


class SyncOnlyLLM(ScriptedLLM):
    @llm_completion_callback()
    async def acomplete(self, prompt, formatted=False, **kwargs):
        raise NotImplementedError("no async here")


def two_questions(passage):
    return f"1. What does {passage} do?\n2. How is {passage} kept?"


def make_nodes(count, prefix="pump"):
    return [TextNode(text=f"{prefix} {i}", id_=f"{prefix}-{i}") for i in range(count)]


class StatusError(Exception):
    """What API clients raise: a status, and the response with its headers."""

    def __init__(self, status_code, message="refused", headers=None, code=None):
        super().__init__(message)
        self.status_code = status_code
        self.code = code
        self.response = type("Response", (), {"headers": headers or {}})()


@pytest.fixture
def output(tmp_path):
    return tmp_path / "questions.json"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Back-off waits are tested by what is asked for, not by waiting."""
    waits = []
    real = asyncio.sleep

    async def sleep(seconds):
        waits.append(seconds)
        await real(0)

    monkeypatch.setattr("ft_core.generation.runner._sleep", sleep)
    return waits


@pytest.mark.parametrize("kind", [ScriptedLLM, AsyncLLM, SyncOnlyLLM])
def test_generates_a_dataset_with_any_llm(kind, output):
    nodes = make_nodes(20)
    dataset = generate_qa_embedding_pairs(nodes, kind(two_questions), output_path=output)
    assert dataset.corpus == {node.node_id: node.text for node in nodes}
    assert list(dataset.queries.values())[:2] == ["What does pump 0 do?", "How is pump 0 kept?"]
    assert len(dataset.queries) == 40
    assert EmbeddingQAFinetuneDataset.load(output) == dataset


def test_takes_the_predecessor_s_positional_arguments(output):
    llm = ScriptedLLM(lambda passage: f"What does {passage} do?")
    template = "Ask {num_questions_per_chunk} about <passage>\n{context_str}\n</passage>"
    dataset = generate_qa_embedding_pairs(
        make_nodes(1), llm, template, 1, 3, "continue", 500, str(output), False
    )
    assert list(dataset.queries.values()) == ["What does pump 0 do?"]


def test_at_most_workers_calls_are_in_flight(output):
    def answer(passage):
        time.sleep(0.01)
        return two_questions(passage)

    llm = ScriptedLLM(answer)
    generate_qa_embedding_pairs(make_nodes(30), llm, output_path=output, workers=4)
    assert 2 <= llm._most_busy <= 4


def test_nodes_are_taken_as_workers_become_free():
    from ft_core.generation.runner import for_each

    taken = 0

    def items():
        nonlocal taken
        for i in range(1000):
            taken += 1
            yield i

    ahead = []

    async def main():
        done = 0

        async def work(item):
            nonlocal done
            await asyncio.sleep(0)
            done += 1
            ahead.append(taken - done)

        await for_each(items(), work, workers=5)
        return done

    assert asyncio.run(main()) == 1000
    assert max(ahead) <= 5


def test_works_inside_a_running_event_loop_and_awaited(output, tmp_path):
    async def notebook():
        dataset = generate_qa_embedding_pairs(
            make_nodes(3), AsyncLLM(two_questions), output_path=output
        )
        awaited = await agenerate_qa_embedding_pairs(
            make_nodes(3), AsyncLLM(two_questions), output_path=tmp_path / "other.json"
        )
        return dataset, awaited

    dataset, awaited = asyncio.run(notebook())
    assert dataset == awaited


def test_a_second_run_asks_nothing_and_gives_the_same(output):
    llm = ScriptedLLM(two_questions)
    first = generate_qa_embedding_pairs(make_nodes(5), llm, output_path=output)
    content = output.read_bytes()
    again = generate_qa_embedding_pairs(make_nodes(5), llm, output_path=output)
    assert len(llm.passages) == 5
    assert again == first
    assert output.read_bytes() == content


def test_a_run_that_was_cut_off_ends_like_an_undisturbed_one(output, tmp_path):
    nodes = make_nodes(12)
    undisturbed = tmp_path / "undisturbed.json"
    generate_qa_embedding_pairs(nodes, ScriptedLLM(two_questions), output_path=undisturbed)

    def until_stopped(passage):
        if passage == "pump 7":
            raise StatusError(401, "Incorrect API key provided: sk-verysecretkey")
        return two_questions(passage)

    llm = ScriptedLLM(until_stopped)
    with pytest.raises(GenerationError, match=r"refuses every call.*Incorrect") as caught:
        generate_qa_embedding_pairs(nodes, llm, output_path=output, workers=2)
    assert "verysecret" not in str(caught.value)
    assert not output.exists()
    journal = output.with_name(output.name + ".journal.jsonl")
    with open(journal, "a") as file:
        file.write('{"key":"abc","nodes":["pump-9"],"ans')  # killed while it wrote
    second = ScriptedLLM(two_questions)
    generate_qa_embedding_pairs(nodes, second, output_path=output)
    assert output.read_bytes() == undisturbed.read_bytes()
    kept = {f"pump {i}" for i in range(6)}  # with two workers, only 6 may have been in flight
    assert not set(second.passages) & kept
    assert len(second.passages) == len(set(second.passages))


@pytest.mark.parametrize(
    "change",
    [
        {"num_questions_per_chunk": 1},
        {"seed": 1},
        {"qa_generate_prompt_tmpl": "Ask about <passage>\n{context_str}\n</passage>"},
        {"llm": ScriptedLLM(two_questions, name="other")},
        {"llm": ScriptedLLM(two_questions, temperature=1.0)},
        {"style": "small"},
    ],
    ids=["count", "seed", "prompt", "model", "temperature", "style"],
)
def test_whatever_changes_the_answer_asks_anew(output, change):
    llm = ScriptedLLM(two_questions)
    generate_qa_embedding_pairs(make_nodes(2), llm, output_path=output)
    before = len(llm.passages)
    changed = change.get("llm", llm)
    arguments = {"llm": llm, "output_path": output, **change}
    # The small style's filter finds these answers unusable; asked it has all the same.
    with contextlib.suppress(GenerationError):
        generate_qa_embedding_pairs(make_nodes(2), **arguments)
    assert len(changed.passages) > (before if changed is llm else 0)


def test_new_nodes_are_added_and_only_they_are_asked_about(output):
    llm = ScriptedLLM(two_questions)
    generate_qa_embedding_pairs(make_nodes(3), llm, output_path=output)
    dataset = generate_qa_embedding_pairs(make_nodes(5), llm, output_path=output)
    assert sorted(llm.passages[3:]) == ["pump 3", "pump 4"]
    assert len(dataset.corpus) == 5


@pytest.mark.parametrize(
    "error", [StatusError(429), StatusError(500), StatusError(503), TimeoutError()]
)
def test_errors_that_pass_are_tried_again(output, error):
    failed = []

    def answer(passage):
        if failed.count(passage) < 4:
            failed.append(passage)
            raise error
        return two_questions(passage)

    dataset = generate_qa_embedding_pairs(make_nodes(3), ScriptedLLM(answer), output_path=output)
    assert len(dataset.queries) == 6
    assert len(failed) == 12


def test_waits_grow_and_respect_what_the_server_asks_for(output, no_waiting):
    errors = [StatusError(429, headers={"retry-after": "7"})]
    errors += [StatusError(429, headers={"retry-after-ms": "2500"}), *[StatusError(500)] * 6]

    def answer(passage):
        if errors:
            raise errors.pop(0)
        return two_questions(passage)

    generate_qa_embedding_pairs(make_nodes(1), ScriptedLLM(answer), output_path=output)
    assert 7 <= no_waiting[0] < 8
    assert 2.5 <= no_waiting[1] < 3
    assert len(no_waiting) == 8
    assert all(0 <= wait <= 30 for wait in no_waiting)


def test_a_retry_after_date_is_understood():
    later = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert 55 < failures.retry_after(StatusError(429, headers={"retry-after": later})) <= 60
    assert failures.retry_after(StatusError(429, headers={"retry-after": "soon"})) is None


@pytest.mark.parametrize(
    "error",
    [
        StatusError(401),
        StatusError(403),
        StatusError(404, "no such model"),
        StatusError(429, "You exceeded your current quota", code="insufficient_quota"),
        StatusError(429, "come back tomorrow", headers={"retry-after": "86400"}),
    ],
    ids=str,
)
def test_errors_that_all_calls_share_stop_everything_at_once(output, error):
    def answer(passage):
        raise error

    llm = ScriptedLLM(answer)
    with pytest.raises(GenerationError, match=re.escape(str(error))):
        generate_qa_embedding_pairs(make_nodes(500), llm, output_path=output, workers=2)
    assert len(llm.passages) <= 4


def test_a_rejected_node_is_asked_once_and_reported(output):
    def answer(passage):
        if passage == "pump 3":
            raise StatusError(400, "maximum context length exceeded")
        return two_questions(passage)

    llm = ScriptedLLM(answer)
    with pytest.warns(UserWarning, match=r"1 of 6 nodes gave no question:\n  pump-3: .*context"):
        dataset = generate_qa_embedding_pairs(make_nodes(6), llm, output_path=output)
    assert llm.passages.count("pump 3") == 1
    assert "pump-3" in dataset.corpus
    assert len(dataset.queries) == 10


def test_a_failed_node_is_asked_again_by_the_next_run(output):
    down = True

    def answer(passage):
        if passage == "pump 3" and down:
            raise ConnectionError("reset")
        return two_questions(passage)

    llm = ScriptedLLM(answer)
    with pytest.warns(UserWarning, match="pump-3: ConnectionError: reset"):
        generate_qa_embedding_pairs(make_nodes(6), llm, output_path=output, max_retries=2)
    assert llm.passages.count("pump 3") == 3
    down = False
    dataset = generate_qa_embedding_pairs(make_nodes(6), llm, output_path=output)
    assert len(dataset.queries) == 12
    assert len(llm.passages) == 5 + 3 + 1


def test_unknown_errors_are_tried_retry_limit_times(output):
    def answer(passage):
        raise RuntimeError("the moon is full")

    llm = ScriptedLLM(answer)
    with pytest.raises(GenerationError, match="no question came of 1 node: RuntimeError: the moon"):
        generate_qa_embedding_pairs(make_nodes(1), llm, retry_limit=2, output_path=output)
    assert len(llm.passages) == 2


def test_an_outage_stops_the_run(output):
    def answer(passage):
        raise ConnectionError("no route to host")

    llm = ScriptedLLM(answer)
    with pytest.raises(GenerationError, match=r"last 10 nodes all failed.*no route.*run again"):
        generate_qa_embedding_pairs(make_nodes(500), llm, output_path=output, max_retries=1)
    assert len(llm.passages) < 60


def test_on_failure_fail_stops_at_the_node_and_keeps_the_journal(output):
    def answer(passage):
        return "I would rather not." if passage == "pump 2" else two_questions(passage)

    with pytest.raises(GenerationError, match=r"node 'pump-2': .*I would rather not"):
        generate_qa_embedding_pairs(
            make_nodes(5), ScriptedLLM(answer), on_failure="fail", output_path=output, workers=1
        )
    assert not output.exists()
    again = ScriptedLLM(two_questions)
    with pytest.raises(GenerationError, match="I would rather not"):
        generate_qa_embedding_pairs(make_nodes(5), again, on_failure="fail", output_path=output)
    assert not {"pump 0", "pump 1", "pump 2"} & set(again.passages)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is empty"),
        ("I'm ready to assist. What would you like to know?", "I'm ready to assist"),
        ("The pump is blue. It was bought in May.", "The pump is blue"),
    ],
)
def test_an_llm_that_answers_nothing_or_prose_is_an_error_that_says_so(output, text, reason):
    llm = ScriptedLLM(lambda passage: text)
    with pytest.raises(GenerationError, match=f"no question came of 4 nodes: .*{reason}"):
        generate_qa_embedding_pairs(make_nodes(4), llm, output_path=output)
    assert not output.exists()


def test_an_llm_that_repeats_its_instruction_gave_no_question(output):
    with pytest.raises(GenerationError, match="no usable question"):
        generate_qa_embedding_pairs(make_nodes(1), MockLLM(), output_path=output)


def test_an_llm_that_answers_in_another_language_works(output):
    llm = ScriptedLLM(lambda passage: f"1. {passage}有什么用途？\n2. 如何保养{passage}？")  # noqa: RUF001
    dataset = generate_qa_embedding_pairs(make_nodes(1), llm, output_path=output)
    assert list(dataset.queries.values()) == ["pump 0有什么用途？", "如何保养pump 0？"]  # noqa: RUF001


def test_half_a_surrogate_pair_in_an_answer_does_no_harm(output):
    llm = ScriptedLLM(lambda passage: f"1. What does {passage} \ud83d do?")
    dataset = generate_qa_embedding_pairs(make_nodes(1), llm, output_path=output)
    assert list(dataset.queries.values()) == ["What does pump 0 ? do?"]


def test_empty_and_broken_texts_are_reported_and_not_asked_about(output):
    nodes = [
        *make_nodes(2),
        TextNode(text=" \n", id_="blank"),
        TextNode(text="a\ud800", id_="half"),
    ]
    llm = ScriptedLLM(two_questions)
    with pytest.warns(UserWarning, match=r"(?s)2 of 4 nodes.*blank: .*no text.*half: .*surrogate"):
        dataset = generate_qa_embedding_pairs(nodes, llm, output_path=output)
    assert len(llm.passages) == 2
    assert set(dataset.corpus) == {"pump-0", "pump-1"}


def test_equal_texts_are_asked_about_once_and_both_are_relevant(output):
    nodes = [*make_nodes(2), TextNode(text="pump 0", id_="copy")]
    llm = ScriptedLLM(two_questions)
    dataset = generate_qa_embedding_pairs(nodes, llm, output_path=output)
    assert len(llm.passages) == 2
    assert list(dataset.relevant_docs.values())[:2] == [["pump-0", "copy"]] * 2


def test_a_question_of_several_nodes_is_one_query_with_all_of_them(output):
    llm = ScriptedLLM(lambda passage: f"1. What does the pump do?\n2. How is {passage} kept?")
    dataset = generate_qa_embedding_pairs(make_nodes(2), llm, output_path=output)
    assert list(dataset.relevant_docs.values()) == [["pump-0", "pump-1"], ["pump-0"], ["pump-1"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nodes": []}, "nodes: is empty"),
        ({"nodes": ["text"]}, r"nodes\[0\]: is a str"),
        ({"nodes": [*make_nodes(2), *make_nodes(1)]}, r"nodes\[2\]: the node id 'pump-0' stands"),
        ({"llm": "openai:gpt-4o"}, "llm: is a str"),
        ({"num_questions_per_chunk": 0}, "num_questions_per_chunk: must be"),
        ({"workers": 0}, "workers: must be"),
        ({"max_retries": -1}, "max_retries: must be"),
        ({"on_failure": "ignore"}, "on_failure: must be one of continue, fail"),
        ({"style": "tiny"}, "style: must be one of"),
        ({"qa_generate_prompt_tmpl": "Ask {num_questions_per_chunk}"}, "has no {context_str}"),
        ({"qa_generate_prompt_tmpl": "{context_str} {topic}"}, "cannot be filled.*topic"),
        ({"qa_generate_prompt_tmpl": "{context_str} {}"}, "cannot be filled"),
        ({"qa_generate_prompt_tmpl": "{context_str}", "style": "small"}, "leave it out"),
    ],
)
def test_bad_arguments_give_one_clear_error(output, arguments, message):
    given = {"nodes": make_nodes(2), "llm": ScriptedLLM(two_questions), "output_path": output}
    with pytest.raises(ArgumentError, match=message):
        generate_qa_embedding_pairs(**given | arguments)
    assert not output.exists()


def test_only_empty_nodes_are_an_error(output):
    with pytest.raises(GenerationError, match=r"no node can be asked about.*no text \(2 nodes\)"):
        generate_qa_embedding_pairs(
            [TextNode(text=""), TextNode(text=" ")], ScriptedLLM(two_questions), output_path=output
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("my notes", "exists and is no dataset"),
        ('{"queries": {"q": "Why?"}, "corpus": {"d": "text"}, "relevant_docs": {"q": ["d"]}}',
         "the journal of its generation, does not"),
    ],
)  # fmt: skip
def test_a_foreign_output_is_refused_before_anything_is_asked(output, content, message):
    output.write_text(content)
    llm = ScriptedLLM(two_questions)
    with pytest.raises(GenerationError, match=message):
        generate_qa_embedding_pairs(make_nodes(2), llm, output_path=output)
    assert output.read_text() == content
    assert llm.passages == []


def test_an_edited_output_is_refused(output):
    llm = ScriptedLLM(two_questions)
    dataset = generate_qa_embedding_pairs(make_nodes(2), llm, output_path=output)
    kept = dataset.select(list(dataset.queries)[:1])
    kept.save(output)
    with pytest.raises(GenerationError, match="was changed after"):
        generate_qa_embedding_pairs(make_nodes(2), llm, output_path=output)
    assert EmbeddingQAFinetuneDataset.load(output) == kept


def test_an_output_about_other_texts_is_refused(output):
    llm = ScriptedLLM(two_questions)
    generate_qa_embedding_pairs(make_nodes(2), llm, output_path=output)
    with pytest.raises(GenerationError, match="questions about other texts"):
        generate_qa_embedding_pairs(make_nodes(2, "valve"), llm, output_path=output)


def test_a_folder_as_output_and_a_foreign_journal_are_refused(tmp_path, output):
    llm = ScriptedLLM(two_questions)
    with pytest.raises(GenerationError, match="is a folder"):
        generate_qa_embedding_pairs(make_nodes(2), llm, output_path=tmp_path)
    output.with_name(output.name + ".journal.jsonl").write_text('{"mine": 1}\n')
    with pytest.raises(ArtifactError, match="not a journal of generation"):
        generate_qa_embedding_pairs(make_nodes(2), llm, output_path=output)


def test_a_full_disk_is_one_clear_error_and_keeps_what_was_answered(output, monkeypatch):
    written = []

    def write_all(descriptor, data):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(os.write(descriptor, data))

    monkeypatch.setattr("ft_core.files._write_all", write_all)
    llm = ScriptedLLM(two_questions)
    with pytest.raises(GenerationError, match=r"cannot be written: .*No space left.*kept"):
        generate_qa_embedding_pairs(make_nodes(9), llm, output_path=output, workers=1)
    monkeypatch.undo()
    assert len(llm.passages) == 3
    generate_qa_embedding_pairs(make_nodes(9), llm, output_path=output, workers=1)
    assert len(llm.passages) == 3 + 7


def test_a_disk_that_fills_up_at_the_save_keeps_the_old_dataset(output, monkeypatch):
    llm = ScriptedLLM(two_questions)
    generate_qa_embedding_pairs(make_nodes(2), llm, output_path=output)
    before = output.read_bytes()

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(GenerationError, match=r"No space left.*answers are kept"):
        generate_qa_embedding_pairs(make_nodes(4), llm, output_path=output)
    monkeypatch.undo()
    assert output.read_bytes() == before
    generate_qa_embedding_pairs(make_nodes(4), llm, output_path=output)
    assert len(llm.passages) == 4


def test_journal_holds_one_record_an_answer(output):
    generate_qa_embedding_pairs(make_nodes(2), ScriptedLLM(two_questions), output_path=output)
    journal = output.with_name(output.name + ".journal.jsonl")
    records = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    assert sorted(record["nodes"][0] for record in records[:2]) == ["pump-0", "pump-1"]
    assert all(record["answer"].startswith("1. What") for record in records[:2])
    assert records[2].keys() == {"dataset"}


PASSAGE = (
    "The leak-noise correlator fixes the position of a leak between two fittings. "
    "It compares the arrival time of sound at two sensors. "
    "Only technicians with module L3 may operate the correlator alone."
)


def test_the_small_style_shows_another_sentence_each_call():
    prompts = list(SmallStyle().prompts(PASSAGE, 2))
    assert len(prompts) == 8
    shown = [turns[-1][1] for turns in prompts]
    assert len(set(shown)) == 3
    assert shown[2].startswith("It compares")  # what points back to other sentences comes last
    assert len({str(turns[1:-1]) for turns in prompts}) > 1
    assert all(turns[0][0] == "system" for turns in prompts)
    assert prompts == list(SmallStyle().prompts(PASSAGE, 2))
    assert prompts != list(SmallStyle(seed=1).prompts(PASSAGE, 2))


@pytest.mark.parametrize(
    ("question", "verdict"),
    [
        ("What does the leak-noise correlator compare?", True),
        ("Who may operate the correlator alone?", True),
        ("How does the technician's correlators operate", False),
        ("What is the capital of France in summer?", False),
        ("What is the purpose of it?", False),
        (EXAMPLES[0][1], False),
        ("What correlator?", False),
        ("What is the correlator " * 20 + "?", False),
        ("It compares the arrival time of sound at two sensors?", False),
        ("What compares the arrival time of sound at two sensors?", False),
        ("Who may operate the correlator in the museum?", False),
        ("Who may operate the correlator? Where is the leak?", False),
    ],
)
def test_the_filter_of_the_small_style(question, verdict):
    assert usable(question, PASSAGE) is verdict


def test_the_small_style_asks_until_it_has_enough(output):
    talks = []

    def answer(prompt):
        talks.append(prompt)
        if len(talks) % 2:
            return "I'm ready to assist you!"
        return f"What is correlator sound {len(talks)}, that the module compares?\nMore talk?"

    node = TextNode(text=PASSAGE, id_="a")
    llm = ScriptedLLM(answer)
    dataset = generate_qa_embedding_pairs([node], llm, style="small", output_path=output)
    assert len(dataset.queries) == 2
    assert len(talks) == 4
