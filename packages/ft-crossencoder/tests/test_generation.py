"""Questions and labels from an LLM: journalled, resumed, and read whatever their layout."""

import json
import threading
from typing import Any

import pytest
from llama_index.core.llms import CompletionResponse, CustomLLM, LLMMetadata
from llama_index.core.schema import Document
from model_assets import HashingEmbedding
from pydantic import PrivateAttr

from ft_core.datasets import RerankDataset
from ft_core.errors import ArgumentError, DatasetError, GenerationError
from ft_crossencoder import (
    CrossEncoderFinetuningDatasetSample,
    generate_ce_fine_tuning_dataset,
    generate_synthetic_queries_over_documents,
)
from ft_crossencoder.generation import (
    chunks,
    dataset_to_samples,
    parse_grade,
    parse_yes_no,
    samples_to_dataset,
)

DOCUMENTS = [
    Document(text="the late fee is four euros a week"),
    Document(text="the library opens at dawn and closes at dusk"),
    Document(text="a lost card costs four coins"),
]
QUESTIONS = ["what is the late fee", "when does the library open"]


class ScriptedLLM(CustomLLM):
    """Answers with what a function of the prompt returns, or raises what it raises."""

    answer: Any = None
    _prompts: list[str] = PrivateAttr(default_factory=list)
    _lock: Any = PrivateAttr(default_factory=threading.Lock)

    @property
    def metadata(self):
        return LLMMetadata(model_name="scripted")

    @property
    def prompts(self):
        return self._prompts

    def complete(self, prompt, formatted=False, **kwargs):
        with self._lock:
            self._prompts.append(prompt)
        return CompletionResponse(text=self.answer(prompt))

    def stream_complete(self, prompt, formatted=False, **kwargs):
        raise NotImplementedError


class Refused(Exception):
    status_code = 401


def last(prompt, name):
    """Return what the prompt says behind the last `name: `."""
    return prompt.rsplit(f"{name}: ", 1)[1].splitlines()[0]


def judge(prompt):
    pair = (last(prompt, "Query"), last(prompt, "Document"))
    right = {(QUESTIONS[0], DOCUMENTS[0].text), (QUESTIONS[1], DOCUMENTS[1].text)}
    return "**Yes**, it does." if pair in right else "No."


def label(output, answer=judge, **settings):
    llm = ScriptedLLM(answer=answer)
    settings = {"embed_model": HashingEmbedding(), "verbose": False, "top_k": 2} | settings
    samples = generate_ce_fine_tuning_dataset(
        DOCUMENTS, QUESTIONS, llm=llm, output_path=output, **settings
    )
    return samples, llm


@pytest.fixture
def output(tmp_path):
    return tmp_path / "labels.jsonl"


# --- Labels ----------------------------------------------------------------------------------


def test_every_candidate_is_labelled_once_and_saved(output):
    samples, llm = label(output)
    assert len(samples) == len(llm.prompts) == 4
    positives = {(s.query, s.context) for s in samples if s.score == 1}
    assert positives == {(QUESTIONS[0], DOCUMENTS[0].text), (QUESTIONS[1], DOCUMENTS[1].text)}
    assert {s.score for s in samples} == {0, 1}
    dataset = RerankDataset.load(output)
    assert dataset_to_samples(dataset) == samples
    for example in dataset:
        scores = [document.retrieval_score for document in example.documents]
        assert scores == sorted(scores, reverse=True)


def test_nothing_is_asked_twice(output):
    first, _ = label(output)
    again, llm = label(output)
    assert again == first
    assert llm.prompts == []
    # Another way of asking is another answer.
    _, graded = label(output, answer=lambda prompt: "1", max_grade=2)
    assert len(graded.prompts) == 4


def test_a_run_that_dies_is_taken_up(output):
    answered = threading.Semaphore(2)

    def dying(prompt):
        if not answered.acquire(blocking=False):
            raise Refused
        return judge(prompt)

    with pytest.raises(GenerationError, match="refuses every call"):
        label(output, dying, workers=1)
    assert not output.exists()
    journal = output.with_name(output.name + ".journal.jsonl")
    assert len(journal.read_text().splitlines()) == 2
    samples, llm = label(output)
    assert len(llm.prompts) == 2
    assert len(samples) == 4


def test_what_has_no_label_is_named_and_left_out(output):
    def vague(prompt):
        return "perhaps" if last(prompt, "Document") == DOCUMENTS[2].text else judge(prompt)

    with pytest.warns(UserWarning, match=r"pairs got no label:\n .*the answer is no label: 'perh"):
        samples, _ = label(output, vague, top_k=3)
    assert len(samples) == 4
    unjudged = [d for e in RerankDataset.load(output) for d in e.documents if d.label is None]
    assert [d.text for d in unjudged] == [DOCUMENTS[2].text] * 2
    with pytest.raises(GenerationError, match="pair 'what is the late fee / chunk-"):
        label(output, vague, top_k=3, on_failure="fail")


def test_no_label_at_all_is_an_error(output):
    with pytest.raises(GenerationError, match="no label came of 2 questions: the answer is no"):
        label(output, lambda prompt: "perhaps")
    assert not output.exists()


def test_grades(output):
    grades = {DOCUMENTS[0].text: "Grade: 3", DOCUMENTS[1].text: "1/3", DOCUMENTS[2].text: "**0**"}
    samples, llm = label(output, lambda p: grades[last(p, "Document")], top_k=3, max_grade=3)
    assert {s.context: s.score for s in samples} == {
        DOCUMENTS[0].text: 3,
        DOCUMENTS[1].text: 1,
        DOCUMENTS[2].text: 0,
    }
    assert all("from 0 to 3" in prompt for prompt in llm.prompts)


def test_the_apps_own_retriever(output):
    from llama_index.core import VectorStoreIndex

    index = VectorStoreIndex(chunks(DOCUMENTS, 100), embed_model=HashingEmbedding())
    llm = ScriptedLLM(answer=judge)
    samples = generate_ce_fine_tuning_dataset(
        [],
        QUESTIONS,
        llm=llm,
        retriever=index.as_retriever(similarity_top_k=1),
        output_path=output,
    )
    assert len(samples) == 2


def test_a_file_of_somebody_else_is_not_replaced(output):
    output.write_text(json.dumps({"query": "q", "documents": [{"text": "t", "label": 1}]}) + "\n")
    before = output.read_text()
    with pytest.raises(GenerationError, match=r"exists, and .* the journal of its generation"):
        label(output)
    assert output.read_text() == before


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"top_k": 0}, "top_k: must be at least 1"),
        ({"max_grade": 0}, "max_grade: is from 1 to 100"),
        ({"on_failure": "stop"}, "on_failure: is"),
        ({"qa_doc_relevance_prompt": "{query}?"}, "qa_doc_relevance_prompt: has no {document}"),
        ({"qa_doc_relevance_prompt": "{x}"}, "qa_doc_relevance_prompt: cannot be filled"),
        ({"max_chunk_length": 0}, "max_chunk_length: must be at least 1"),
    ],
)
def test_bad_arguments(output, settings, match):
    with pytest.raises(ArgumentError, match=match):
        label(output, **settings)


def test_questions_are_needed(output):
    with pytest.raises(ArgumentError, match="questions_list: holds no question"):
        generate_ce_fine_tuning_dataset(DOCUMENTS, ["", " "], llm=ScriptedLLM(answer=judge))


# --- Questions -------------------------------------------------------------------------------


def test_questions_over_documents(tmp_path):
    llm = ScriptedLLM(
        answer=lambda p: (
            "1. What is this text about?"
            if "late" in p
            else "Here you are:\n- When does it open?\n- Who opens the library?"
        )
    )
    output = tmp_path / "questions.json"
    questions = generate_synthetic_queries_over_documents(
        DOCUMENTS[:2], 2, qa_topic="libraries", llm=llm, output_path=output, verbose=False
    )
    assert questions == [
        "What is this text about?",
        "When does it open?",
        "Who opens the library?",
    ]
    assert all("You know libraries well" in prompt for prompt in llm.prompts)
    again = ScriptedLLM(answer=None)
    assert questions == generate_synthetic_queries_over_documents(
        DOCUMENTS[:2], 2, qa_topic="libraries", llm=again, output_path=output, verbose=False
    )
    assert again.prompts == []


def test_bad_question_prompts_are_named(tmp_path):
    llm = ScriptedLLM(answer=lambda prompt: "Why?")
    for name, text in (("qa_generate_user_msg", "{text}"), ("qa_generate_system_msg", "{")):
        with pytest.raises(ArgumentError, match=f"{name}: cannot be filled"):
            generate_synthetic_queries_over_documents(
                DOCUMENTS, llm=llm, output_path=tmp_path / "q.json", **{name: text}
            )
    with pytest.raises(ArgumentError, match=r"qa_generate_user_msg: has no \{context\}"):
        generate_synthetic_queries_over_documents(
            DOCUMENTS, llm=llm, output_path=tmp_path / "q.json", qa_generate_user_msg="ask"
        )


def test_chunks_have_lasting_ids_and_no_repetition():
    texts = [Document(text="word " * 50), Document(text="word " * 50), Document(text="other")]
    first, second = chunks(texts, 20), chunks(texts, 20)
    assert [node.node_id for node in first] == [node.node_id for node in second]
    assert len({node.node_id for node in first}) == len(first)
    assert first[-1].text == "other"
    with pytest.raises(ArgumentError, match="documents: hold no text"):
        chunks([Document(text=" ")], 20)


# --- Samples ---------------------------------------------------------------------------------


def test_samples_are_a_dataset_and_back():
    rows = [("a", "x", 1), ("b", "x", 0), ("a", "y", 0.5), ("a", "x", 0)]
    samples = [CrossEncoderFinetuningDatasetSample(*row) for row in rows]
    dataset = samples_to_dataset(samples)
    assert [example.query for example in dataset] == ["a", "b"]
    assert [(s.query, s.context, s.score) for s in dataset_to_samples(dataset)] == [
        ("a", "x", 1.0),
        ("a", "y", 0.5),
        ("b", "x", 0.0),
    ]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (("", "x", 1), r"samples\[1\]\.query: the text is empty"),
        (("q", " ", 1), r"samples\[1\]\.context: the text is empty"),
        (("q", "x", -1), r"samples\[1\]\.score: is -1"),
        (("q", "x", 1000), r"samples\[1\]\.score: is 1000"),
        (("q", "x", float("nan")), r"samples\[1\]\.score: is nan"),
    ],
)
def test_bad_samples_are_named(row, match):
    good = CrossEncoderFinetuningDatasetSample("q", "t", 1)
    with pytest.raises(DatasetError, match=match):
        samples_to_dataset([good, CrossEncoderFinetuningDatasetSample(*row)])
    with pytest.raises(DatasetError, match="there is no sample"):
        samples_to_dataset([])


# --- Reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        *(
            "Yes",
            "yes.",
            "**Yes**",
            "\u201cYes\u201d",
            "Helpful: Yes",
            "Relevant: yes",
            "True",
            "1",
        ),
        *(
            "It is relevant.",
            '{"relevant": true}',
            '```json\n{"helpful": "yes"}\n```',
            "Answer: Yes",
        ),
        *("<think>No? Hm.</think>\nYes", "Yes, no other document says it.", "Ja", "Oui."),
        "The document names the fee.\nYes",
    ],
)
def test_yes(answer):
    assert parse_yes_no(answer) == 1


@pytest.mark.parametrize(
    "answer",
    [
        *("No", "no.", "**No**", "Helpful: No", "Relevant: **No**", "false", "0", "Nein"),
        *(
            "It is not relevant.",
            "Irrelevant",
            "This isn't relevant.",
            "No, it is about relevance.",
        ),
        *('{"relevant": false, "why": "yes"}', "It does not help.", "not very helpful"),
    ],
)
def test_no(answer):
    assert parse_yes_no(answer) == 0


@pytest.mark.parametrize(
    "answer", ["", " ", "Yes or No", "Yes/No", "perhaps", "I cannot say", "I don't know", "2", "{}"]
)
def test_neither(answer):
    assert parse_yes_no(answer) is None


@pytest.mark.parametrize(
    ("answer", "grade"),
    [
        *(("2", 2), ("Grade: 2", 2), ("2/3", 2), ("2 out of 3", 2), ("**2** - 1 reason", 2)),
        *(('{"grade": 2}', 2), ('{"why": 1.5, "score": "2"}', 2), ("On a scale of 0-3: 2", 2)),
        *(("0.", 0), ("2.0", 2), ("Score = 3", 3), ("3\n\nThe document of 2019", 3)),
        *(("I give it a 2.", 2), ("<think>3?</think>1", 1), ("Grade: 3\nIt has 2 parts", 3)),
        *(("4", None), ("Score: 7", None), ("2.5", None), ("-1", None), ("two", None)),
        *(("", None), ("1 or 2 or 3?", 1), ("between 1 and 2", None)),
    ],
)
def test_grade(answer, grade):
    assert parse_grade(answer, 3) == grade
