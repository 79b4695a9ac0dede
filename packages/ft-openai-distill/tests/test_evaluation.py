"""The evaluation: what each metric says, and that nothing that failed is hidden."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from io import StringIO
from typing import Any

import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    LLMMetadata,
    MessageRole,
    ToolCallBlock,
)
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.embeddings import BaseEmbedding, MockEmbedding
from llama_index.core.llms import MockLLM
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM
from llama_index.core.query_engine import CustomQueryEngine
from llama_index.core.schema import TextNode
from pydantic import BaseModel, PrivateAttr
from rich.console import Console

from ft_core.datasets.chat import ChatDataset
from ft_core.errors import ArgumentError, DatasetError
from ft_core.evaluation import AnswerEvaluation
from ft_openai_distill.evaluation import evaluate_distillation

CITIES = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "Peru": "Lima",
    "Kenya": "Nairobi",
    "Norway": "Oslo",
    "Cuba": "Havana",
    "Ghana": "Accra",
    "Chile": "Santiago",
    "Egypt": "Cairo",
    "Greece": "Athens",
}
QUESTIONS = [f"What is the capital of {country}?" for country in CITIES]


def capital(prompt: str) -> str:
    country = re.findall(r"capital of (\w+)\?", prompt)[-1]
    return f"The capital of {country} is {CITIES[country]}."


class Scripted(CustomLLM):
    """Completes by a function of the prompt."""

    reply: Any
    usage: bool = False
    chat_model: bool = False

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(model_name="scripted", is_chat_model=self.chat_model)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        text = self.reply(prompt)
        raw = {"usage": {"prompt_tokens": 1000, "completion_tokens": 10}} if self.usage else None
        return CompletionResponse(text=text, raw=raw)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        yield CompletionResponse(text=self.reply(prompt), delta=self.reply(prompt))


class Chatting(Scripted):
    """Sees messages and settings, and may call tools."""

    chat_model: bool = True
    _seen: list[Any] = PrivateAttr(default_factory=list)

    @llm_chat_callback()
    def chat(self, messages: Any, **kwargs: Any) -> ChatResponse:
        self._seen.append((list(messages), kwargs))
        message = self.reply(messages)
        if isinstance(message, str):
            message = ChatMessage(role=MessageRole.ASSISTANT, content=message)
        return ChatResponse(message=message)


class WordVectors(BaseEmbedding):
    """Counts a few words; texts without any of them get a vector of their own."""

    def _get_text_embedding(self, text: str) -> list[float]:
        words = re.findall(r"\w+", text.lower())
        return [float(words.count(city.lower())) for city in CITIES.values()] + [0.01]

    _get_query_embedding = _get_text_embedding

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


def unsure(prompt: str) -> str:
    return "I do not know that city at all"


def shown(report: Any, width: int = 100) -> str:
    stream = StringIO()
    Console(file=stream, width=width).print(report)
    return stream.getvalue()


def chat_file(tmp_path: Any, lines: list[dict[str, Any]]) -> Any:
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def example(question: str, answer: Any, **fields: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
    return {"messages": [{"role": "user", "content": question}, message], **fields}


class TestAgreement:
    def test_student_is_shown_to_be_better(self) -> None:
        report = evaluate_distillation(
            QUESTIONS,
            base=Scripted(reply=unsure),
            student=Scripted(reply=capital),
            teacher=Scripted(reply=capital),
            embed_model=WordVectors(),
        )

        assert [run.name for run in report.runs] == ["base", "student", "teacher"]
        base, student, teacher = report.runs
        assert student.mean("rouge_l") == 1.0
        assert base.mean("rouge_l") < 0.3
        assert student.mean("similarity") == pytest.approx(1.0)
        assert base.mean("similarity") < 0.1
        assert "rouge_l" not in teacher.scores
        assert report.primary == "rouge_l"
        difference = report.measures["student"]["rouge_l"].difference
        assert difference is not None
        assert difference.outcome == "better"
        assert difference.queries == 12
        # Exact sign flips of 12 pairs, times the comparisons that are left for Holm.
        assert difference.p_value == 2 / 2**12
        assert 2 / 2**12 <= difference.p_adjusted <= report.comparisons * 2 / 2**12
        verdict = report.verdict("student")
        assert verdict.startswith("student is better than base in ROUGE-L: +1.000")
        assert "n = 12" in verdict
        assert report.measures["teacher"]["latency"].difference is None

    def test_references_instead_of_a_teacher(self) -> None:
        report = evaluate_distillation(
            QUESTIONS[:2],
            student=Scripted(reply=capital),
            references=["The capital of France is Paris.", None],
        )

        assert report.runs[0].scores["rouge_l"] == {"1": 1.0}
        assert report.measures["student"]["rouge_l"].n == 1
        assert any("1 question of 2 without a reference" in note for note in report.notes())
        assert "n = 1" in shown(report)

    def test_what_a_failed_teacher_did_not_say_is_not_asked_of_others(self) -> None:
        def fails_for_italy(prompt: str) -> str:
            if "Italy" in prompt:
                raise RuntimeError("overloaded")
            return capital(prompt)

        report = evaluate_distillation(
            QUESTIONS, student=Scripted(reply=capital), teacher=Scripted(reply=fails_for_italy)
        )

        student, teacher = report.runs
        assert student.scores["rouge_l"].keys() == {str(i) for i in range(1, 13)} - {"2"}
        assert teacher.failures == {"2": "RuntimeError: overloaded"}

    def test_several_students_by_name(self) -> None:
        report = evaluate_distillation(
            QUESTIONS,
            base=Scripted(reply=unsure),
            student={"one epoch": Scripted(reply=unsure), "three": Scripted(reply=capital)},
            references=[capital(question) for question in QUESTIONS],
        )

        assert [run.name for run in report.runs] == ["base", "one epoch", "three"]
        assert report.outcome("one epoch") == "undecided"
        assert report.outcome("three") == "better"

    def test_few_questions_prove_nothing_and_the_report_says_so(self) -> None:
        report = evaluate_distillation(
            QUESTIONS[:5],
            base=Scripted(reply=unsure),
            student=Scripted(reply=capital),
            references=[capital(question) for question in QUESTIONS[:5]],
        )

        assert report.outcome("student") == "undecided"
        assert "5 questions could show" in report.verdict("student")
        needed = report.questions_needed
        assert (
            report.comparisons * 2 / 2**needed < 0.05 <= report.comparisons * 2 / 2 ** (needed - 1)
        )
        assert f"at least {needed} are needed" in shown(report, 200)

    def test_same_seed_same_report(self) -> None:
        def intervals(seed: int) -> Any:
            report = evaluate_distillation(
                QUESTIONS,
                base=Scripted(
                    reply=lambda p: f"{capital(p)} {'and so on ' * (sum(map(ord, p)) % 23)}"
                ),
                student=Scripted(reply=capital),
                references=[capital(question) for question in QUESTIONS],
                seed=seed,
            )
            return report.measures["base"]["rouge_l"]

        assert intervals(1) == intervals(1)
        assert intervals(1) != intervals(2)


class TestEffort:
    def test_tokens_told_and_cost(self) -> None:
        report = evaluate_distillation(
            QUESTIONS,
            base=Scripted(reply=capital, usage=True),
            student=Scripted(reply=capital, usage=True, chat_model=True),
            prices={"base": (10.0, 30.0), "student": (1.0, 2.0)},
        )

        base, student = report.runs
        assert base.mean("input_tokens") == student.mean("input_tokens") == 1000
        assert base.mean("output_tokens") == 10
        assert base.mean("cost") == pytest.approx(0.0103)
        assert student.mean("cost") == pytest.approx(0.00102)
        assert base.estimated == student.estimated == []
        difference = report.measures["student"]["cost"].difference
        assert difference is not None
        assert difference.value < 0
        assert difference.outcome == "better"
        assert "0.00102" in shown(report)

    def test_tokens_estimated(self) -> None:
        report = evaluate_distillation(
            QUESTIONS[:3], student=Scripted(reply=lambda _: "one two three"), tokenizer=str.split
        )

        student = report.runs[0]
        assert set(student.scores["output_tokens"].values()) == {3.0}
        assert set(student.scores["input_tokens"].values()) == {6.0}
        assert student.estimated == ["1", "2", "3"]
        assert "tokens of 3 of 3 answers are estimated" in shown(report, 200)

    def test_tokens_by_the_default_tokenizer(self) -> None:
        report = evaluate_distillation(QUESTIONS[:1], student=MockLLM())

        assert report.runs[0].scores["output_tokens"]["1"] > 3

    def test_latency(self) -> None:
        def slow(prompt: str) -> str:
            time.sleep(0.05)
            return "x"

        report = evaluate_distillation(
            QUESTIONS,
            base=Scripted(reply=slow),
            student=Scripted(reply=lambda _: "x"),
            references=["x"] * 12,
        )

        assert report.runs[0].mean("latency") > 0.05 > report.runs[1].mean("latency")
        difference = report.measures["student"]["latency"].difference
        assert difference is not None
        assert difference.outcome == "better"

    def test_workers_work_at_the_same_time(self) -> None:
        barrier = threading.Barrier(3, timeout=20)

        def together(prompt: str) -> str:
            barrier.wait()
            return prompt

        report = evaluate_distillation(
            QUESTIONS[:6], student=Scripted(reply=together), num_workers=3
        )

        run = report.runs[0]
        assert not run.failures
        assert [run.answers[str(i + 1)] for i in range(6)] == QUESTIONS[:6]


class TestFailures:
    def test_counts_as_zero_and_is_named(self) -> None:
        def fails_for_italy(prompt: str) -> str:
            if "Italy" in prompt:
                raise ValueError("bad key sk-abcdef1234567890")
            return capital(prompt)

        report = evaluate_distillation(
            QUESTIONS,
            base=Scripted(reply=capital, usage=True),
            student=Scripted(reply=fails_for_italy, usage=True),
            references=[capital(question) for question in QUESTIONS],
            embed_model=WordVectors(),
            prices={"student": (1, 1)},
        )

        student = report.runs[1]
        assert student.failures.keys() == {"2"}
        assert student.scores["rouge_l"]["2"] == student.scores["similarity"]["2"] == 0.0
        assert student.mean("rouge_l") == pytest.approx(11 / 12)
        assert student.mean("answered") == pytest.approx(11 / 12)
        assert report.runs[0].mean("answered") == 1.0
        for metric in ("latency", "input_tokens", "output_tokens", "cost"):
            assert "2" not in student.scores[metric]
        latency = report.measures["student"]["latency"].difference
        assert latency is not None
        assert latency.queries == 11
        text = shown(report, 200)
        assert "student: 1 of 12 calls failed and count as wrong answers" in text
        for content in (text, json.dumps(report.to_dict()), report.to_html()):
            assert "ValueError: bad key" in content
            assert "abcdef1234567890" not in content

    def test_all_fail(self) -> None:
        def fails(prompt: str) -> str:
            raise ConnectionError("nobody there")

        report = evaluate_distillation(
            QUESTIONS, base=Scripted(reply=fails), student=Scripted(reply=capital)
        )

        base = report.runs[0]
        assert len(base.failures) == 12
        assert base.scores.keys() == {"answered"}
        assert base.mean("answered") == 0
        assert "12 of 12 calls failed" in shown(report, 200)
        report.to_html()

    def test_interrupt_passes(self) -> None:
        def interrupted(prompt: str) -> str:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            evaluate_distillation(QUESTIONS, student=Scripted(reply=interrupted))


class TestQueryEngines:
    @staticmethod
    def engine(llm: Any, **settings: Any) -> Any:
        nodes = [TextNode(text=capital(question)) for question in QUESTIONS]
        index = VectorStoreIndex(nodes, embed_model=WordVectors())
        return index.as_query_engine(llm=llm, similarity_top_k=2, **settings)

    @pytest.mark.parametrize("settings", [{}, {"streaming": True}, {"use_async": True}])
    def test_answers_and_tokens_of_every_call(self, settings: dict[str, Any]) -> None:
        mode = "tree_summarize" if "use_async" in settings else "compact"
        report = evaluate_distillation(
            QUESTIONS[:4],
            base=self.engine(Scripted(reply=unsure), response_mode=mode, **settings),
            student=self.engine(Scripted(reply=capital), response_mode="refine"),
            references=[capital(question) for question in QUESTIONS[:4]],
            tokenizer=str.split,
        )

        base, student = report.runs
        assert student.mean("rouge_l") == 1.0
        assert not base.failures
        # The prompts of two calls, with the context: far more than the question's 6 words.
        assert student.mean("input_tokens") > base.mean("input_tokens") > 30
        assert student.mean("output_tokens") == 12
        assert base.mean("output_tokens") == 8

    def test_an_engine_without_an_llm_has_no_tokens(self) -> None:
        class Fixed(CustomQueryEngine):
            def custom_query(self, query_str: str) -> str:
                return "Paris"

        report = evaluate_distillation(QUESTIONS[:2], student=Fixed())

        assert report.runs[0].scores.keys() == {"answered", "latency"}

    def test_the_engine_is_left_as_it_was(self) -> None:
        llm = Scripted(reply=capital)
        before = dict(vars(Scripted))
        evaluate_distillation(QUESTIONS[:2], student=self.engine(llm))
        assert dict(vars(Scripted)) == before


class City(BaseModel):
    """A city."""

    name: str
    letters: int


class TestStructured:
    @staticmethod
    def as_json(prompt: str) -> str:
        name = capital(prompt)[:-1].split()[-1]
        return json.dumps({"name": name, "letters": len(name)})

    def test_programs(self) -> None:
        def sometimes(prompt: str) -> str:
            return self.as_json(prompt) if "Italy" in prompt or "Peru" in prompt else "Paris!"

        report = evaluate_distillation(
            [*QUESTIONS, "{braces} and {{more}}: the capital of Peru?"],
            base=Scripted(reply=sometimes),
            student=Scripted(reply=self.as_json, usage=True),
            teacher=Scripted(reply=self.as_json),
            output_cls=City,
        )

        base, student, teacher = report.runs
        assert report.primary == "schema_valid"
        assert student.mean("schema_valid") == teacher.mean("schema_valid") == 1.0
        assert base.mean("schema_valid") == pytest.approx(3 / 13)
        assert not base.failures
        assert base.answers["1"] == "Paris!"
        assert base.invalid.keys() == {str(i) for i in range(1, 13)} - {"2", "5"}
        assert json.loads(student.answers["2"]) == {"name": "Rome", "letters": 4}
        assert student.mean("input_tokens") == 1000
        assert student.mean("rouge_l") == 1.0
        assert report.outcome("student") == "better"
        assert "not valid" in report.to_html()

    def test_a_failed_call_is_no_invalid_answer(self) -> None:
        def fails(prompt: str) -> str:
            raise TimeoutError("too slow")

        report = evaluate_distillation(
            QUESTIONS[:2], student=Scripted(reply=fails), output_cls=City
        )

        run = report.runs[0]
        assert run.failures == {"1": "TimeoutError: too slow", "2": "TimeoutError: too slow"}
        assert run.invalid == {}
        assert run.mean("schema_valid") == 0

    def test_query_engines(self) -> None:
        student = TestQueryEngines.engine(Scripted(reply=self.as_json))
        base = TestQueryEngines.engine(Scripted(reply=unsure))

        report = evaluate_distillation(QUESTIONS[:3], base=base, student=student, output_cls=City)

        assert [run.mean("schema_valid") for run in report.runs] == [0, 1]

    def test_response_format_of_the_examples(self, tmp_path: Any) -> None:
        schema = City.model_json_schema()
        wanted = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
        path = chat_file(
            tmp_path,
            [
                example(QUESTIONS[0], self.as_json(QUESTIONS[0]), response_format=wanted),
                example(QUESTIONS[1], self.as_json(QUESTIONS[1]), response_format=wanted),
                example(QUESTIONS[2], "{}", response_format={"type": "json_object"}),
                example(QUESTIONS[3], "Tokyo"),
            ],
        )
        answers = ['{"name": "Paris", "letters": "5"}', "```json\n{}\n```", '{"a": NaN}', "Tokyo"]
        replies = dict(zip(QUESTIONS, answers, strict=False))
        llm = Chatting(reply=lambda messages: replies[messages[-1].content])

        report = evaluate_distillation(path, student=llm, num_workers=1)

        run = report.runs[0]
        assert run.scores["schema_valid"] == {"1": 0.0, "2": 0.0, "3": 0.0}
        assert run.invalid["1"] == "letters: '5' is not of type 'integer'"
        assert run.invalid["2"].startswith("no JSON")
        assert "NaN" in run.invalid["3"]
        assert run.scores["rouge_l"]["4"] == 1.0
        assert [kwargs for _, kwargs in llm._seen] == [
            {"response_format": wanted},
            {"response_format": wanted},
            {"response_format": {"type": "json_object"}},
            {},
        ]

    def test_tool_calls_of_the_examples(self, tmp_path: Any) -> None:
        tool = {
            "type": "function",
            "function": {"name": "look_up", "parameters": City.model_json_schema()},
        }

        def call(name: str, arguments: str) -> dict[str, Any]:
            function = {"name": name, "arguments": arguments}
            calls = [{"id": "c1", "type": "function", "function": function}]
            return {"role": "assistant", "content": None, "tool_calls": calls}

        right = '{"letters": 5, "name": "Paris"}'
        path = chat_file(
            tmp_path,
            [example(f"{n}: France?", call("look_up", right), tools=[tool]) for n in range(5)]
            + [example("5: hello?", "Hello!", tools=[tool])],
        )

        def block(name: str, arguments: Any) -> ChatMessage:
            calls = [ToolCallBlock(tool_call_id="x", tool_name=name, tool_kwargs=arguments)]
            return ChatMessage(role=MessageRole.ASSISTANT, blocks=calls)

        answers: list[Any] = [
            block("look_up", {"name": "Paris", "letters": 5}),
            block("look_up", '{"name": "Paris"'),
            block("look_up", {"name": "Paris"}),
            block("find", {"name": "Paris", "letters": 5}),
            "Paris has five letters.",
            "Hello!",
        ]
        llm = Chatting(reply=lambda messages: answers[int(messages[-1].content[0])])

        report = evaluate_distillation(path, student=llm)

        run = report.runs[0]
        assert run.scores["schema_valid"] == {"1": 1.0, "2": 0.0, "3": 0.0, "4": 0.0, "5": 0.0}
        assert run.invalid == {
            "2": run.invalid["2"],
            "3": "look_up: 'letters' is a required property",
            "4": "no tool is called 'find'",
            "5": "no tool is called",
        }
        assert run.scores["rouge_l"]["1"] == 1.0  # the order of the arguments does not matter
        assert run.scores["rouge_l"]["6"] == 1.0
        assert llm._seen[0][1]["tools"] == [tool]

    @pytest.mark.parametrize(
        ("schema", "message"),
        [
            ({"type": "strange"}, "example 1, .*: is no JSON schema"),
            ({"$ref": "https://example.invalid/a.json"}, "schemas are not fetched"),
            ({"properties": {"a": {"$ref": "#/$defs/missing"}}}, "'#/\\$defs/missing'"),
        ],
    )
    def test_bad_schema_before_any_call(
        self, tmp_path: Any, schema: dict[str, Any], message: str
    ) -> None:
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        path = chat_file(tmp_path, [example("a?", "{}", response_format=wanted)])
        llm = Chatting(reply=lambda _: "{}")

        with pytest.raises(DatasetError, match=message):
            evaluate_distillation(path, student=llm)
        assert llm._seen == []

    def test_recursive_schema(self, tmp_path: Any) -> None:
        schema = {
            "$ref": "#/$defs/tree",
            "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
        }
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        path = chat_file(tmp_path, [example("a?", "[]", response_format=wanted)] * 2)
        replies = iter(["[[], [[]]]", "[[1]]"])

        report = evaluate_distillation(
            path, student=Chatting(reply=lambda _: next(replies)), num_workers=1
        )

        assert report.runs[0].scores["schema_valid"] == {"1": 1.0, "2": 0.0}


class TestDatasets:
    def test_prompts_are_sent_whole(self, tmp_path: Any) -> None:
        line = {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello", "weight": 0},
                {"role": "user", "content": "Bye"},
                {"role": "assistant", "content": "Goodbye"},
            ]
        }
        llm = Chatting(reply=lambda _: "Goodbye")

        report = evaluate_distillation(ChatDataset.load(chat_file(tmp_path, [line])), student=llm)

        messages, kwargs = llm._seen[0]
        assert [(m.role.value, m.content) for m in messages] == [
            ("system", "Be brief."),
            ("user", "Hi"),
            ("assistant", "Hello"),
            ("user", "Bye"),
        ]
        assert "weight" not in messages[2].additional_kwargs
        assert kwargs == {}
        assert report.runs[0].mean("rouge_l") == 1.0

    def test_a_teacher_comes_before_recorded_answers(self, tmp_path: Any) -> None:
        path = chat_file(tmp_path, [example("a?", "recorded")])

        report = evaluate_distillation(
            str(path),
            student=Chatting(reply=lambda _: "live"),
            teacher=Chatting(reply=lambda _: "live"),
        )

        assert report.runs[0].mean("rouge_l") == 1.0
        assert report.references == {"1": "live"}

    def test_another_order_is_another_dataset(self) -> None:
        first, second = (
            evaluate_distillation(questions, student=Scripted(reply=capital)).runs[0].dataset_hash
            for questions in (QUESTIONS, QUESTIONS[::-1])
        )
        assert first != second


class TestReport:
    def test_saved(self, tmp_path: Any) -> None:
        report = evaluate_distillation(
            QUESTIONS,
            base=Scripted(reply=unsure),
            student=Scripted(reply=capital),
            teacher=Scripted(reply=capital),
            prices=dict.fromkeys(("base", "student", "teacher"), (1, 1)),
        )
        report.save_json(tmp_path / "report.json")
        report.save_html(tmp_path / "report.html")
        report.runs[0].save(tmp_path / "base.json")

        content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
        assert content == json.loads(json.dumps(report.to_dict()))
        assert content["runs"][1]["gained"][0]["before"] == unsure("")
        assert "outcome" not in content["runs"][2]
        assert math.isfinite(content["runs"][2]["metrics"]["cost"]["mean"])
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert "What is the capital of" in page
        assert "less is better" in page
        assert page.count("<svg") == 6  # scores, differences, and one for each quantity
        assert AnswerEvaluation.load(tmp_path / "base.json") == report.runs[0]

    def test_no_progress_where_stderr_is_no_terminal(self, capfd: Any) -> None:
        evaluate_distillation(QUESTIONS[:2], student=Scripted(reply=capital))
        assert capfd.readouterr() == ("", "")


class TestArguments:
    def test_nobody(self) -> None:
        with pytest.raises(ArgumentError, match="give a base, a student or both"):
            evaluate_distillation(QUESTIONS, teacher=MockLLM())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"student": object()}, "student: object is neither an LLM nor a query engine"),
            (
                {"student": SimpleChatEngine.from_defaults(llm=MockLLM())},
                "pass the query engine or LLM inside it",
            ),
            ({"student": {"base": MockLLM()}, "base": MockLLM()}, "has a name twice"),
            ({"prices": {"teacher": (1, 1)}}, "'teacher' is not evaluated"),
            ({"prices": {"student": (1,)}}, "needs two numbers"),
            ({"prices": {"student": (1, -1)}}, "needs two numbers"),
            ({"prices": {"student": 3}}, "needs two numbers"),
            ({"num_workers": 0}, "num_workers: must be at least 1"),
            ({"seed": -1}, "seed: must be 0 or more"),
            ({"references": ["a"]}, "has 1 for 2 questions"),
            ({"embed_model": object()}, "embed_model: object is not a LlamaIndex embedding"),
        ],
    )
    def test_refused_before_any_call(self, arguments: dict[str, Any], message: str) -> None:
        def never(prompt: str) -> str:
            pytest.fail("was called")

        with pytest.raises(ArgumentError, match=message):
            evaluate_distillation(QUESTIONS[:2], **{"student": Scripted(reply=never), **arguments})

    def test_an_embedding_that_cannot_work_fails_first(self) -> None:
        class Broken(MockEmbedding):
            def _get_text_embedding(self, text: str) -> list[float]:
                raise ConnectionError("no route")

        def never(prompt: str) -> str:
            pytest.fail("was called")

        with pytest.raises(ArgumentError, match="embed_model: failed: ConnectionError: no route"):
            evaluate_distillation(
                QUESTIONS, student=Scripted(reply=never), embed_model=Broken(embed_dim=3)
            )

    @pytest.mark.parametrize(
        ("questions", "message"),
        [([], "is empty"), (["a", " "], "number 2 is no text"), ([1], "number 1 is no text")],
    )
    def test_bad_questions(self, questions: list[Any], message: str) -> None:
        with pytest.raises(ArgumentError, match=message):
            evaluate_distillation(questions, student=MockLLM())

    def test_a_dataset_that_asks_nothing(self, tmp_path: Any) -> None:
        path = chat_file(tmp_path, [{"messages": [{"role": "assistant", "content": "a"}]}])
        with pytest.raises(ArgumentError, match="example 1 asks nothing"):
            evaluate_distillation(path, student=MockLLM())
