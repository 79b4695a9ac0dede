"""The recording handler on real LlamaIndex apps, and on OpenAI's classes over a real socket."""

import asyncio
import copy
import errno
import gc
import json
import logging
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import Any

import pytest
from llama_index.core import Document, Settings, SummaryIndex, VectorStoreIndex
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.callbacks import CallbackManager
from llama_index.core.callbacks.schema import CBEventType
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.llms import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    CustomLLM,
    LLMMetadata,
    MockLLM,
    TextBlock,
)
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import RouterQueryEngine, SubQuestionQueryEngine
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.selectors import LLMSingleSelector
from llama_index.core.tools import FunctionTool, QueryEngineTool
from llama_index.core.types import PydanticProgramMode
from llama_index.llms.openai import OpenAI
from openai import InternalServerError
from openai_platform import OpenAIPlatform
from pydantic import BaseModel

from ft_core.datasets import ChatDataset, ChatExample
from ft_core.errors import ArgumentError, ArtifactError, DatasetError
from ft_openai_distill.handler import OpenAIFineTuningHandler

QUESTION = [ChatMessage(role="system", content="Be brief."), ChatMessage(content="What is a fee?")]
TEXT = "The late fee is 3 % of the amount. It is due after 30 days."


class Fee(BaseModel):
    """A fee of a contract."""

    name: str
    percent: int


class Plain(CustomLLM):
    """Answers "yes: " and the prompt; completes natively, chats by completing."""

    error: Any = None

    @property
    def metadata(self):
        return LLMMetadata(model_name="plain-1")

    def _answer(self, prompt):
        if self.error:
            raise self.error
        return f"yes: {prompt}"

    @llm_completion_callback()
    def complete(self, prompt, formatted=False, **kwargs):
        return CompletionResponse(text=self._answer(prompt))

    @llm_completion_callback()
    def stream_complete(self, prompt, formatted=False, **kwargs):
        def pieces():
            text = ""
            for piece in ("yes: ", prompt):
                text += piece
                yield CompletionResponse(text=text, delta=piece)
            self._answer(prompt)  # fails in the end, where it is to fail

        return pieces()


class Chatty(Plain):
    """Chats natively; completes by chatting, as most of the hosted ones do."""

    @llm_chat_callback()
    def chat(self, messages, **kwargs):
        text = self._answer(messages[-1].content)
        return ChatResponse(message=ChatMessage(role="assistant", content=text))

    @llm_completion_callback()
    def complete(self, prompt, formatted=False, **kwargs):
        return CompletionResponse(text=self.chat([ChatMessage(content=prompt)]).message.content)


@pytest.fixture(scope="module")
def platform():
    with OpenAIPlatform() as server:
        yield server
    assert server.violations == []


def openai(platform, model="gpt-4o-mini", **settings):
    settings = {"max_retries": 0, "timeout": 20, **settings}
    return OpenAI(model=model, api_base=platform.base_url, api_key=platform.api_key, **settings)


def index_of(text=TEXT, kind=VectorStoreIndex):
    return kind.from_documents([Document(text=text)], embed_model=MockEmbedding(embed_dim=4))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def roles(line):
    return [message["role"] for message in line["messages"]]


@contextmanager
def attached(handler, llm):
    with handler.attach(llm):
        yield


@contextmanager
def in_manager(handler, llm):
    llm.callback_manager = CallbackManager([handler])
    yield


@contextmanager
def instrumented(handler, llm):
    dispatcher = get_dispatcher()
    dispatcher.add_event_handler(handler.event_handler())
    try:
        yield
    finally:
        dispatcher.event_handlers.remove(handler.event_handler())


@contextmanager
def every_way(handler, llm):
    with attached(handler, llm), in_manager(handler, llm), instrumented(handler, llm):
        yield


@contextmanager
def both_reports(handler, llm):
    with in_manager(handler, llm), instrumented(handler, llm):
        yield


WAYS = [attached, in_manager, instrumented, both_reports, every_way]


def chat(llm, text):
    return llm.chat([ChatMessage(content=text)]).message.content


def complete(llm, text):
    return llm.complete(text).text


def stream_chat(llm, text):
    return [item.message.content for item in llm.stream_chat([ChatMessage(content=text)])][-1]


def stream_complete(llm, text):
    return [item.text for item in llm.stream_complete(text)][-1]


def achat(llm, text):
    return asyncio.run(llm.achat([ChatMessage(content=text)])).message.content


def acomplete(llm, text):
    return asyncio.run(llm.acomplete(text)).text


def astream_chat(llm, text):
    async def read():
        stream = await llm.astream_chat([ChatMessage(content=text)])
        return [item.message.content async for item in stream][-1]

    return asyncio.run(read())


def astream_complete(llm, text):
    async def read():
        return [item.text async for item in await llm.astream_complete(text)][-1]

    return asyncio.run(read())


KINDS = [
    chat,
    complete,
    stream_chat,
    stream_complete,
    achat,
    acomplete,
    astream_chat,
    astream_complete,
]


# --- Each kind of call, by each way ----------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "make", [Plain, Chatty, lambda: MockLLM()], ids=["plain", "chatty", "mock"]
)
def test_each_kind_of_call_is_recorded_once_by_each_way(kind, way, make):
    expected = kind(make(), "how much?")
    llm, handler = make(), OpenAIFineTuningHandler(deduplicate=False)
    with way(handler, llm):
        assert kind(llm, "how much?") == expected
    ((_, event),) = handler.get_finetuning_events().items()
    assert [(message.role.value, message.content) for message in event["messages"]] == [
        ("user", "how much?")
    ]
    assert event["response"].content == expected
    assert handler.failures == {}
    assert len(handler._callbacks) == len(handler._spans) == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_fails_is_the_hosts_alone(kind, way):
    error = ConnectionError("no route")
    error.__cause__ = cause = OSError("cable")
    llm, handler = Plain(error=error), OpenAIFineTuningHandler()
    with way(handler, llm):
        with pytest.raises(ConnectionError) as caught:
            kind(llm, "how much?")
        assert caught.value is error
        assert error.__cause__ is cause
        llm.error = None
        assert kind(llm, "and now?") == "yes: and now?" or kind.__name__.endswith("chat")
    (event,) = handler.get_finetuning_events().values()
    assert "and now?" in event["messages"][0].content
    assert handler.failures == {}
    assert len(handler._callbacks) == len(handler._spans) == 0


@pytest.mark.parametrize("way", WAYS)
def test_a_stream_that_the_app_leaves_is_not_recorded(way):
    async def leave():
        stream = await llm.astream_complete("how much?")
        await anext(stream)
        await stream.aclose()

    llm, handler = Plain(), OpenAIFineTuningHandler()
    with way(handler, llm):
        stream = llm.stream_complete("how much?")
        next(stream)
        stream.close()
        stream = llm.stream_chat(QUESTION)
        next(stream)
        del stream
        gc.collect()
        asyncio.run(leave())
    assert handler.get_finetuning_events() == {}
    assert handler.failures == {}
    assert len(handler._callbacks) == len(handler._spans) == 0


def test_streams_that_nobody_reads_do_not_pile_up():
    llm, handler = Plain(), OpenAIFineTuningHandler()
    handler._callbacks._limit = handler._spans._limit = 10
    for way in (in_manager, instrumented):
        with way(handler, llm):
            for number in range(50):
                llm.stream_complete(f"question {number}")
    assert len(handler._callbacks) == len(handler._spans) == 10


@pytest.mark.parametrize("way", WAYS)
def test_calls_of_one_stream_and_of_others_in_between_are_told_apart(way):
    llm, handler = Plain(), OpenAIFineTuningHandler()
    with way(handler, llm):
        stream = llm.stream_complete("outer")
        next(stream)
        other = llm.stream_complete("other")
        next(other)
        assert complete(llm, "inner") == "yes: inner"
        assert [item.text for item in other][-1] == "yes: other"
        assert [item.text for item in stream][-1] == "yes: outer"
    answers = [event["response"].content for event in handler.get_finetuning_events().values()]
    assert answers == ["yes: inner", "yes: other", "yes: outer"]


@pytest.mark.parametrize("way", WAYS)
def test_threads_and_tasks(way):
    llm, handler = Plain(), OpenAIFineTuningHandler()

    async def many():
        await asyncio.gather(*(llm.acomplete(f"task {n}") for n in range(40)))
        await asyncio.gather(*(llm.achat([ChatMessage(content=f"chat {n}")]) for n in range(40)))

    with way(handler, llm):
        asyncio.run(many())
        threads = [threading.Thread(target=complete, args=(llm, f"thread {n}")) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    events = handler.get_finetuning_events().values()
    asked = sorted(event["messages"][0].content for event in events)
    wanted = [f"{kind} {n}" for kind, count in (("task", 40), ("chat", 40), ("thread", 16))
              for n in range(count)]  # fmt: skip
    assert asked == sorted(wanted)
    assert all(event["messages"][0].content in event["response"].content for event in events)


def test_a_callback_manager_that_came_after_the_llm():
    llm = Plain()
    engine = index_of().as_query_engine(llm=llm)
    handler = OpenAIFineTuningHandler()
    Settings.callback_manager = CallbackManager([handler])
    try:
        engine.query("What is the late fee?")
        assert handler.get_finetuning_events() == {}  # the complaint about the predecessor
        with handler.attach(engine):
            engine.query("What is the late fee?")
    finally:
        Settings._callback_manager = None
    assert len(handler.get_finetuning_events()) == 1


def test_settings_and_what_holds_no_llm():
    Settings.llm = llm = Plain()
    try:
        with OpenAIFineTuningHandler().attach(Settings) as attachment:
            assert llm in attachment.components
    finally:
        Settings._llm = None
    with pytest.raises(ArgumentError, match=r"found no LLM inside a Document; attach to"):
        OpenAIFineTuningHandler().attach(Document(text="x"))


def test_detaching_puts_the_classes_back():
    llm = Plain()
    engine = index_of().as_query_engine(llm=llm)
    before = [
        dict(vars(kind)) for kind in (Plain, type(engine), type(engine._response_synthesizer))
    ]
    handler = OpenAIFineTuningHandler()
    handler.attach(engine)
    handler.attach(llm)
    handler.detach()
    after = [dict(vars(kind)) for kind in (Plain, type(engine), type(engine._response_synthesizer))]
    assert after == before
    engine.query("What is the late fee?")
    assert handler.get_finetuning_events() == {}


# --- OpenAI's own class, over a socket -------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_openai(kind, way, platform, tmp_path):
    llm = openai(platform)
    path = tmp_path / "teacher.jsonl"
    handler = OpenAIFineTuningHandler(path)
    text = "-----\nThe fee is 3 %. Snow is white.\n-----\nQuery: What is the fee?"
    with way(handler, llm):
        answer = kind(llm, text)
    (line,) = lines(path)
    assert line["messages"] == [
        {"role": "user", "content": text},
        {"role": "assistant", "content": answer},
    ]
    assert answer == "The fee is 3 %."
    metadata = line["metadata"]
    assert (metadata["model"], metadata["component"]) == ("gpt-4o-mini", "OpenAI")
    assert metadata["kind"] == ("chat" if "chat" in kind.__name__ else "completion")
    assert metadata["seconds"] > 0
    if "stream" not in kind.__name__:
        assert metadata["usage"]["completion_tokens"] > 0
        assert metadata["finish_reason"] == "stop"
    assert ChatDataset.load(path).examples[0].answer() == answer
    assert platform.api_key not in path.read_text()


@pytest.mark.parametrize("way", WAYS)
def test_openai_that_fails(way, platform):
    handler = OpenAIFineTuningHandler()
    for kind in KINDS:
        llm = openai(platform)  # its client belongs to one event loop
        with way(handler, llm):
            platform.fail(500, on="POST /chat/completions")
            with pytest.raises(InternalServerError, match="500"):
                kind(llm, "What is the fee?")
    assert handler.get_finetuning_events() == {}
    assert handler.failures == {}
    assert len(handler._callbacks) == len(handler._spans) == 0


def percent_of(name: str) -> str:
    """Look up the percentage of a fee."""
    return f"{name} is 3 %"


TOOL = FunctionTool.from_defaults(percent_of)


@pytest.mark.parametrize("stream", [False, True])
def test_tools_of_openai(platform, stream):
    llm, handler = openai(platform), OpenAIFineTuningHandler()
    with handler.attach(llm):
        if stream:
            *_, response = llm.stream_chat_with_tools([TOOL], user_msg="Call percent_of now")
        else:
            response = llm.chat_with_tools([TOOL], user_msg="Call percent_of now")
    (example,) = handler.to_dataset()
    (called,) = llm.get_tool_calls_from_response(response)
    (call,) = example.messages[-1]["tool_calls"]
    assert call["id"] == called.tool_id
    assert json.loads(call["function"]["arguments"]) == called.tool_kwargs
    assert example.tools[0]["function"]["name"] == "percent_of"
    assert example.tools[0]["function"]["parameters"]["required"] == ["name"]
    assert example.parallel_tool_calls is False


def test_several_calls_at_once_of_which_llama_index_keeps_one():
    def teacher(messages, body):
        call = {"function": {"name": "percent_of", "arguments": {"name": "late"}}}
        return {"content": "I look.", "tool_calls": [call, call]}

    with OpenAIPlatform(teacher=teacher) as server:
        llm, handler = openai(server), OpenAIFineTuningHandler()
        with handler.attach(llm):
            response = llm.chat_with_tools([TOOL], user_msg="Late?")
    assert len(llm.get_tool_calls_from_response(response)) == 1
    (example,) = handler.to_dataset()
    assert example.answer() == "I look."
    assert len(example.messages[-1]["tool_calls"]) == 2  # what the teacher said


@pytest.mark.parametrize("way", WAYS)
def test_a_schema_that_the_api_enforces(platform, way):
    llm, handler = openai(platform, model="gpt-4o-mini"), OpenAIFineTuningHandler()
    prompt = PromptTemplate("Extract the fee: {text}")
    with way(handler, llm):
        fee = llm.structured_predict(Fee, prompt, text="late, 3")
        structured = llm.as_structured_llm(Fee).chat([ChatMessage(content="the late one: 4")])
        *_, partial = llm.stream_structured_predict(Fee, prompt, text="early, 5")
        fee2 = asyncio.run(llm.astructured_predict(Fee, prompt, text="other, 6"))
    examples = handler.to_dataset().examples
    assert [json.loads(example.answer()) for example in examples] == [
        fee.model_dump(),
        structured.raw.model_dump(),
        partial.model_dump(),
        fee2.model_dump(),
    ]
    for example in examples:
        schema = example.response_format["json_schema"]
        assert (schema["name"], set(schema["schema"]["properties"])) == ("Fee", {"name", "percent"})
        assert example.metadata["component"] == "OpenAI"


@pytest.mark.parametrize("way", WAYS)
def test_a_schema_as_a_tool(platform, way):
    llm = openai(platform, pydantic_program_mode=PydanticProgramMode.FUNCTION)
    handler = OpenAIFineTuningHandler()
    prompt = PromptTemplate("Extract the fee: {text}")
    with way(handler, llm):
        fee = llm.structured_predict(Fee, prompt, text="late, 3")
    (example,) = handler.to_dataset()
    (call,) = example.messages[-1]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == fee.model_dump()
    assert example.tools[0]["function"]["name"] == "Fee"
    assert example.metadata["tool_choice"]


def test_a_schema_in_the_prompt():
    class Json(Plain):
        def _answer(self, prompt):
            assert '"percent"' in prompt
            return '{"name": "late", "percent": 3}'

    llm, handler = Json(), OpenAIFineTuningHandler()
    prompt = PromptTemplate("Extract the fee: {text}")
    with handler.attach(llm):
        assert llm.structured_predict(Fee, prompt, text="x") == Fee(name="late", percent=3)
        assert llm.as_structured_llm(Fee).complete("y").raw == Fee(name="late", percent=3)
    examples = handler.to_dataset().examples
    assert [example.answer() for example in examples] == ['{"name": "late", "percent": 3}'] * 2


def test_a_structured_llm_that_the_app_holds(platform):
    llm = openai(platform)
    handler = OpenAIFineTuningHandler()
    engine = index_of().as_query_engine(llm=llm.as_structured_llm(Fee))
    with handler.attach(engine):
        engine.query("What is the late fee?")
    (example,) = handler.to_dataset()
    assert example.response_format["json_schema"]["name"] == "Fee"
    assert example.asked() == "What is the late fee?"


def test_settings_of_the_llm_itself(platform):
    llm = openai(platform, additional_kwargs={"response_format": {"type": "json_object"}})
    handler = OpenAIFineTuningHandler()
    with handler.attach(llm):
        llm.chat([ChatMessage(content="Answer in JSON")])
    (example,) = handler.to_dataset()
    assert example.response_format == {"type": "json_object"}


def test_the_old_functions(platform):
    function = {"name": "fee", "parameters": {"type": "object", "properties": {}}}
    llm, handler = Plain(), OpenAIFineTuningHandler()
    llm.callback_manager = CallbackManager([handler])
    llm.chat(QUESTION, functions=[function])
    (example,) = handler.to_dataset()
    assert example.functions == [function]


# --- Apps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["compact", "refine", "tree_summarize", "simple_summarize"])
@pytest.mark.parametrize("streaming", [False, True])
def test_query_engines(platform, mode, streaming):
    llm, handler = openai(platform), OpenAIFineTuningHandler()
    engine = index_of().as_query_engine(llm=llm, response_mode=mode, streaming=streaming)
    with handler.attach(engine):
        response = engine.query("What is the late fee?")
        text = "".join(response.response_gen) if streaming else response.response
        aresponse = asyncio.run(engine.aquery("When is it due?")) if not streaming else None
    examples = handler.to_dataset().examples
    assert examples[0].answer() == text
    assert TEXT in examples[0].messages[-2]["content"]
    assert examples[0].asked() == "What is the late fee?"
    if not streaming:  # then the engine has returned, perhaps, before the LLM is asked
        assert "RetrieverQueryEngine" in examples[0].metadata["inside"]
    if aresponse:
        assert [examples[1].answer(), examples[1].asked()] == [
            aresponse.response,
            "When is it due?",
        ]
    assert handler.failures == {}


def test_the_calls_of_a_refining_engine_share_the_question():
    documents = [Document(text=f"Passage {number}. " + "word " * 400) for number in range(3)]
    index = SummaryIndex.from_documents(documents)
    handler = OpenAIFineTuningHandler()
    engine = index.as_query_engine(llm=MockLLM(max_tokens=5), response_mode="refine")
    with handler.attach(engine):
        engine.query("What is said?")
    examples = handler.to_dataset().examples
    assert len(examples) == 3
    assert {example.asked() for example in examples} == {"What is said?"}


@pytest.mark.parametrize(
    "mode", ["context", "condense_question", "condense_plus_context", "simple"]
)
def test_chat_engines(platform, mode):
    llm, handler = openai(platform), OpenAIFineTuningHandler(deduplicate=False)
    engine = index_of().as_chat_engine(
        chat_mode=mode, llm=llm, memory=ChatMemoryBuffer.from_defaults(llm=llm)
    )
    with handler.attach(engine):
        first = engine.chat("What is the late fee?").response
        second = "".join(engine.stream_chat("And when is it due?").response_gen)
        third = asyncio.run(engine.achat("Who says so?")).response
    answers = [example.answer() for example in handler.to_dataset()]
    assert {first, second, third} <= set(answers)
    assert len(answers) == {"context": 3, "simple": 3}.get(mode, 5)
    assert handler.failures == {}


def test_sub_questions_and_routers(platform):
    def teacher(messages, body):
        text = messages[-1]["content"]
        if "sub-questions" in text or "sub questions" in text.lower():
            item = {"sub_question": "How high is the fee?", "tool_name": "contract"}
            return {"content": "```json\n" + json.dumps({"items": [item]}) + "\n```"}
        if "choices" in text:
            return {"content": '[{"choice": 1, "reason": "it is the only one"}]'}
        return {"content": "3 %"}

    with OpenAIPlatform(teacher=teacher) as server:
        llm, handler = openai(server), OpenAIFineTuningHandler()
        tool = QueryEngineTool.from_defaults(
            index_of().as_query_engine(llm=llm), name="contract", description="the contract"
        )
        sub = SubQuestionQueryEngine.from_defaults(
            [tool], llm=llm, question_gen=LLMQuestionGenerator.from_defaults(llm=llm),
            use_async=True, verbose=False,
        )  # fmt: skip
        router = RouterQueryEngine(LLMSingleSelector.from_defaults(llm=llm), [tool], llm=llm)
        with handler.attach([sub, router]):
            sub.query("Compare the fees.")
            router.query("What is the fee?")
    examples = handler.to_dataset().examples
    assert len(examples) == 5
    inside = [example.metadata["inside"] for example in examples]
    assert inside[0][0] == "SubQuestionQueryEngine"
    assert "LLMQuestionGenerator" in inside[0]
    assert examples[1].asked() == "How high is the fee?"
    assert inside[3] == ["RouterQueryEngine", "LLMSingleSelector"]
    assert examples[4].asked() == "What is the fee?"


def teacher_of_tools(messages, body):
    """Calls the tool once, then answers."""
    if messages[-1]["role"] == "tool":
        return {"content": f"Answer: {messages[-1]['content']}"}
    call = {"function": {"name": "percent_of", "arguments": {"name": "late"}}}
    return {"content": None, "tool_calls": [call]}


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("inside_workflow", [True, False])
def test_function_agents(inside_workflow, streaming):
    async def run():
        return str(await app.run(user_msg="How high is the late fee?"))

    with OpenAIPlatform(teacher=teacher_of_tools) as server:
        llm, handler = openai(server), OpenAIFineTuningHandler()
        app = FunctionAgent(
            name="clerk", description="d", tools=[TOOL], llm=llm, streaming=streaming,
            system_prompt="Be brief.",
        )  # fmt: skip
        if inside_workflow:
            app = AgentWorkflow(agents=[app], root_agent="clerk")
        with handler.attach(app):
            answer = asyncio.run(run())
    assert answer == "Answer: late is 3 %"
    first, second = handler.to_dataset().examples
    assert roles(first.content()) == ["system", "user", "assistant"]
    assert first.messages[-1]["tool_calls"][0]["function"]["name"] == "percent_of"
    assert roles(second.content()) == ["system", "user", "assistant", "tool", "assistant"]
    assert second.answer() == answer
    assert second.tools[0]["function"]["name"] == "percent_of"
    assert second.metadata["inside"] == ["FunctionAgent"]
    assert handler.failures == {}


@pytest.mark.parametrize("streaming", [True, False])
def test_react_agents(streaming):
    def teacher(messages, body):
        if "Observation" in messages[-1]["content"]:
            return {"content": "Thought: I can answer.\nAnswer: 3 %"}
        action = 'Action: percent_of\nAction Input: {"name": "late"}'
        return {"content": f"Thought: I need the tool.\n{action}"}

    async def run():
        return str(await agent.run(user_msg="How high is the late fee?"))

    with OpenAIPlatform(teacher=teacher) as server:
        llm, handler = openai(server), OpenAIFineTuningHandler()
        agent = ReActAgent(tools=[TOOL], llm=llm, streaming=streaming)
        with handler.attach(agent):
            assert asyncio.run(run()) == "3 %"
    first, second = handler.to_dataset().examples
    assert "percent_of" in first.answer()
    assert second.answer().endswith("Answer: 3 %")
    assert "Observation: late is 3 %" in second.messages[-2]["content"]


def test_an_llm_that_answers_with_tools_but_has_no_ids():
    async def run():
        await FunctionAgent(tools=[TOOL], llm=llm).run(user_msg="Late?")

    llm, handler = MockFunctionCallingLLM(), OpenAIFineTuningHandler()
    with handler.attach(llm):
        asyncio.run(run())
    assert handler.failures == {}
    assert "tool_calls" in handler.to_dataset().examples[0].messages[-1]


# --- Never harm the host ---------------------------------------------------------------------


class Broken(OpenAIFineTuningHandler):
    def _chosen(self, started):
        raise KeyError("inside the handler")


class BrokenWriter(OpenAIFineTuningHandler):
    def _write(self, line):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [Broken, BrokenWriter])
@pytest.mark.parametrize("kind", KINDS)
def test_what_fails_in_the_handler_stays_there(make, way, kind, caplog):
    expected = kind(Plain(), "how much?")
    llm, handler = Plain(), make()
    with way(handler, llm), caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert kind(llm, "how much?") == expected
    assert sum("lost a record" in record.message for record in caplog.records) == 1
    assert sum(handler.failures.values()) >= 3


def test_a_disk_that_is_full(caplog, tmp_path):
    path = tmp_path / "teacher.jsonl"
    llm, handler = Plain(), OpenAIFineTuningHandler(path)
    with handler.attach(llm), caplog.at_level(logging.WARNING):
        complete(llm, "before")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
        try:
            for _ in range(3):
                assert complete(llm, "how much?") == "yes: how much?"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert handler.failures == {f"OSError {errno.EFBIG}": 3}
        complete(llm, "how much?")  # it was never written, so it is no duplicate
    assert len(caplog.records) == 1
    assert [line["messages"][1]["content"] for line in lines(path)] == [
        "yes: before",
        "yes: how much?",
    ]


def test_messages_that_no_file_takes(caplog, tmp_path):
    class Deaf(Plain):
        @llm_chat_callback()
        def chat(self, messages, **kwargs):
            return ChatResponse(message=ChatMessage(role="assistant", content="ok"))

    llm, handler = Deaf(), OpenAIFineTuningHandler(tmp_path / "teacher.jsonl")
    orphan = ChatMessage(role="tool", content="x", additional_kwargs={"tool_call_id": "call_1"})
    strange = ChatMessage(role="assistant", additional_kwargs={"tool_calls": [object()]})
    with handler.attach(llm), caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert llm.chat([orphan]).message.content == "ok"
            assert llm.chat([strange]).message.content == "ok"
        llm.chat([ChatMessage(content="half a pair \ud83d")])
    assert handler.failures == {"DatasetError": 2, "TypeError": 2}
    assert [record.exc_info[0].__name__ for record in caplog.records] == [
        "DatasetError",
        "TypeError",
    ]
    (example,) = ChatDataset.load(tmp_path / "teacher.jsonl")
    assert example.messages[0]["content"] == "half a pair ?"


def test_what_the_app_changes_later_is_not_recorded():
    class Rude(Plain):
        @llm_chat_callback()
        def chat(self, messages, **kwargs):
            messages.append(ChatMessage(content="added"))
            messages[0].blocks[0].text = "changed"
            kwargs["tools"][0]["function"]["name"] = "changed"
            return ChatResponse(message=ChatMessage(role="assistant", content="ok"))

    tools = [{"type": "function", "function": {"name": "fee"}}]
    for way in WAYS:
        llm, handler = Rude(), OpenAIFineTuningHandler()
        with way(handler, llm):
            llm.chat([ChatMessage(content="asked")], tools=copy.deepcopy(tools))
        (example,) = handler.to_dataset()
        assert example.messages[0] == {"role": "user", "content": "asked"}
        assert (len(example.messages), example.tools) == (2, tools)


def test_an_llm_that_is_copied_or_pickled_with_the_handler_in_its_manager():
    handler = OpenAIFineTuningHandler()
    llm = Plain(callback_manager=CallbackManager([handler]))
    for twin in (copy.deepcopy(llm), llm.model_copy(), copy.copy(llm)):
        complete(twin, f"twin {id(twin)}")
    assert len(handler.get_finetuning_events()) == 3
    model = MockLLM(callback_manager=CallbackManager([handler]))
    assert pickle.loads(pickle.dumps(model)).complete("x").text == "x"


def test_events_that_are_none_of_ours_and_payloads_of_others():
    handler = OpenAIFineTuningHandler()
    assert handler.on_event_start(CBEventType.LLM, None, event_id="a") == "a"
    assert handler.on_event_start(CBEventType.QUERY, {"query_str": "x"}, event_id="b") == "b"
    handler.on_event_end(CBEventType.LLM, None, event_id="a")
    handler.on_event_end(CBEventType.LLM, {}, event_id="unknown")
    handler.start_trace("x")
    handler.end_trace("x", {})
    assert handler.get_finetuning_events() == {}
    assert handler.failures == {}


# --- The journal -----------------------------------------------------------------------------


def test_with_a_path_nothing_is_kept_in_memory(tmp_path):
    path = tmp_path / "new" / "teacher.jsonl"
    handler = OpenAIFineTuningHandler(path)
    assert not path.exists()  # no work before the first call
    llm = Plain()
    with handler.attach(llm):
        complete(llm, "a")
        assert len(lines(path)) == 1
        complete(llm, "b")
    assert handler._events == []
    again = OpenAIFineTuningHandler(path)
    assert [event["response"].content for event in again.get_finetuning_events().values()] == [
        "yes: a",
        "yes: b",
    ]
    with again.attach(llm):
        complete(llm, "c")
    assert len(again.to_dataset()) == 3


def test_files_that_are_no_journal(tmp_path):
    with pytest.raises(ArgumentError, match="is a folder"):
        OpenAIFineTuningHandler(tmp_path)
    (tmp_path / "a").write_text('{"messages": []}\n')
    with pytest.raises(ArtifactError, match="no OpenAIFineTuningHandler wrote"):
        OpenAIFineTuningHandler(tmp_path / "a")
    (tmp_path / "b").write_text("hello\n")
    with pytest.raises(ArtifactError, match="not a journal"):
        OpenAIFineTuningHandler(tmp_path / "b")


TRAFFIC = """
import sys
from llama_index.core.llms import MockLLM
from ft_openai_distill.handler import OpenAIFineTuningHandler

path, name = sys.argv[1:]
llm, handler = MockLLM(), OpenAIFineTuningHandler(path)
handler.attach(llm)
for number in range(int(1e6)):
    llm.complete(f"{name} {number} " + "word " * 2000)
    print(number, flush=True)
"""


def test_two_processes_write_one_file_and_are_killed(tmp_path):
    path = tmp_path / "teacher.jsonl"
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-c", TRAFFIC, str(path), name], stdout=subprocess.PIPE, text=True
        )
        for name in ("one", "two")
    }
    told = {}
    for process in processes.values():
        for _ in range(100):
            process.stdout.readline()
    for name, process in processes.items():
        os.kill(process.pid, signal.SIGKILL)
        told[name] = 100 + len(process.stdout.read().splitlines())
        process.wait()
        process.stdout.close()
    examples = ChatDataset.load(path).examples
    for name in processes:
        numbers = [
            int(example.answer().split()[1])
            for example in examples
            if example.answer().startswith(name)
        ]
        assert numbers == list(range(len(numbers)))
        assert told[name] - 1 <= len(numbers) <= told[name] + 1
    llm, handler = Plain(), OpenAIFineTuningHandler(path)
    with handler.attach(llm):
        complete(llm, "after")
    assert handler.to_dataset().examples[-1].answer() == "yes: after"


def _traffic(path, name):
    llm, handler = Plain(), OpenAIFineTuningHandler(path)
    with handler.attach(llm):
        for number in range(200):
            complete(llm, f"{name} {number}")


def test_forked_processes(tmp_path):
    path = tmp_path / "teacher.jsonl"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_traffic, args=(path, name)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(ChatDataset.load(path)) == 400


# --- Filters, redaction, exports -------------------------------------------------------------


def test_filters_by_model_component_and_predicate():
    def asked(**filters):
        handler = OpenAIFineTuningHandler(**filters)
        plain, mock = Plain(), MockLLM(max_tokens=2)
        engine = index_of().as_query_engine(llm=plain)
        for way in (attached, in_manager, instrumented):
            for llm in (plain, mock):
                with way(handler, llm):
                    llm.complete(f"{type(llm).__name__} {way.__name__}")
                llm.callback_manager = CallbackManager()
        with handler.attach(engine):
            engine.query("engine")
        assert handler.failures == {}
        events = handler.get_finetuning_events().values()
        return {event["messages"][-1].content.split()[0] for event in events}, len(events)

    assert asked() == ({"Plain", "MockLLM", "Context"}, 7)
    assert asked(models="plain-*") == ({"Plain", "Context"}, 4)
    assert asked(models=["other", "unknown"]) == ({"MockLLM"}, 3)
    assert asked(components="MockLLM") == ({"MockLLM"}, 3)
    assert asked(components=["Retriever*"]) == ({"Context"}, 1)
    assert asked(predicate=lambda example: "instrumented" in example.asked()) == (
        {"Plain", "MockLLM"},
        2,
    )


def test_the_predicate_sees_what_would_be_written_and_may_fail():
    seen = []

    def predicate(example):
        seen.append(example)
        return example.asked() / 0

    llm, handler = Plain(), OpenAIFineTuningHandler(redact=str.upper, predicate=predicate)
    with handler.attach(llm):
        complete(llm, "secret")
    assert isinstance(seen[0], ChatExample)
    assert seen[0].answer() == "YES: SECRET"
    assert handler.failures == {"TypeError": 1}
    assert handler.get_finetuning_events() == {}


def test_a_sample_is_a_share_and_the_same_for_one_seed():
    def kept(**settings):
        llm, handler = Plain(), OpenAIFineTuningHandler(**settings)
        with handler.attach(llm):
            for number in range(400):
                complete(llm, f"question {number}")
        events = handler.get_finetuning_events().values()
        return {event["messages"][0].content for event in events}

    some = kept(sample=0.25)
    assert 60 <= len(some) <= 140
    assert kept(sample=0.25) == some
    assert kept(sample=0.25, seed=1) != some
    assert some < kept(sample=0.5)
    with pytest.raises(ArgumentError, match="sample: is a share above 0"):
        OpenAIFineTuningHandler(sample=0)


def test_redaction_comes_before_anything_is_written(tmp_path):
    def redact(text):
        return text.replace("Ada", "[name]")

    def teacher(messages, body):
        call = {"function": {"name": "percent_of", "arguments": {"name": "Ada's fee"}}}
        return {"content": "For Ada.", "tool_calls": [call]}

    path = tmp_path / "teacher.jsonl"
    with OpenAIPlatform(teacher=teacher) as server:
        llm, handler = openai(server), OpenAIFineTuningHandler(path, redact=redact)
        engine = index_of("Ada pays 3 %.").as_query_engine(llm=llm)
        with handler.attach(engine):
            response = llm.chat_with_tools([TOOL], user_msg="What does Ada pay?")
            engine.query("And what is Ada's fee?")
    assert "Ada" in response.message.content  # the app's own
    assert "Ada" not in path.read_text()
    first, second = ChatDataset.load(path)
    call = first.messages[-1]["tool_calls"][0]["function"]
    assert json.loads(call["arguments"]) == {"name": "[name]'s fee"}
    assert second.asked() == "And what is [name]'s fee?"


@pytest.mark.parametrize("redact", [lambda text: text.missing, lambda text: None])
def test_where_redaction_fails_nothing_is_written(tmp_path, redact):
    path = tmp_path / "teacher.jsonl"
    llm, handler = Plain(), OpenAIFineTuningHandler(path, redact=redact)
    with handler.attach(llm):
        assert complete(llm, "secret") == "yes: secret"
    assert not path.exists()
    assert sum(handler.failures.values()) == 1


def test_the_same_call_twice(tmp_path):
    llm = Plain()
    handler = OpenAIFineTuningHandler()
    handler._recent._limit = 3
    twice = OpenAIFineTuningHandler(deduplicate=False)
    with handler.attach(llm), twice.attach(llm):
        for number in (0, 0, 1, 2, 0, 3, 4, 5, 0):
            complete(llm, f"question {number}")
    assert len(handler.get_finetuning_events()) == 7  # the last one was forgotten
    assert len(handler.to_dataset()) == 6
    assert len(twice.to_dataset()) == 9


def test_a_record_that_was_lost_is_no_duplicate(tmp_path):
    handler = OpenAIFineTuningHandler(tmp_path / "folder" / "teacher.jsonl")
    (tmp_path / "folder").write_text("in the way")
    llm = Plain()
    with handler.attach(llm):
        complete(llm, "a")
        (tmp_path / "folder").unlink()
        complete(llm, "a")
    assert len(handler.to_dataset()) == 1


def test_saved_as_openai_takes_it(platform, tmp_path):
    llm, handler = openai(platform), OpenAIFineTuningHandler()
    with pytest.raises(DatasetError, match="no call is recorded; attach the handler"):
        handler.save_finetuning_events(str(tmp_path / "train.jsonl"))
    with handler.attach(llm):
        llm.chat(QUESTION)
        llm.chat_with_tools([TOOL], user_msg="Call percent_of now")
        llm.structured_predict(Fee, PromptTemplate("Extract: {t}"), t="late, 3")
    handler.save_finetuning_events(str(tmp_path / "train.jsonl"))
    saved = lines(tmp_path / "train.jsonl")
    assert len(saved) == 3
    assert saved[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert set().union(*saved) == {"messages", "tools", "parallel_tool_calls"}


def test_the_split_keeps_all_calls_about_a_question_together():
    handler = OpenAIFineTuningHandler(seed=1)
    engine = index_of().as_query_engine(llm=MockLLM())
    topics = ["late fees", "patents", "oil prices", "glaciers", "tax law", "bees", "opera", "steel"]
    with handler.attach(engine):
        for topic in topics:
            engine.query(f"What is said about {topic}?")
            engine.query(f"what is said about {topic}")
    parts = handler.to_dataset(split={"train": 0.75, "validation": 0.25})
    assert {name: len(part) for name, part in parts.items()} == {"train": 12, "validation": 4}
    questions = {
        name: {example.asked().lower().rstrip("?") for example in part}
        for name, part in parts.items()
    }
    assert not questions["train"] & questions["validation"]


def test_the_module_loads_no_client():
    code = (
        "import sys, ft_openai_distill.handler; "
        "print([m for m in ('torch', 'transformers', 'openai', 'tiktoken') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"


def test_multimodal_messages(platform):
    from llama_index.core.base.llms.types import ImageBlock

    llm, handler = openai(platform), OpenAIFineTuningHandler()
    blocks = [TextBlock(text="What is this?"), ImageBlock(url="https://example.org/a.png")]
    with handler.attach(llm):
        llm.chat([ChatMessage(role="user", blocks=blocks)])
    (example,) = handler.to_dataset()
    assert [part["type"] for part in example.messages[0]["content"]] == ["text", "image_url"]
