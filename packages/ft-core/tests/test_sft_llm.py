import asyncio
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_index.core import Document, Settings, SummaryIndex
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, ToolCallBlock
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers.base import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent, LLMChatStartEvent
from llama_index.core.output_parsers.pydantic import PYDANTIC_FORMAT_TMPL
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from model_assets import HashingEmbedding
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

from ft_core.datasets.chat import ChatDataset, ChatExample
from ft_core.errors import ArgumentError, DatasetError
from ft_core.sft import LocalFinetuneEngine, LocalLLM
from ft_core.sft.chat_format import _TOOLS
from ft_core.sft.llm import _Decoder


class City(BaseModel):
    """A city."""

    name: str
    size: int


def measure(name: str, size: int) -> str:
    """Measure a city."""
    return f"{name} measures {size}."


MEASURE = FunctionTool.from_defaults(measure)
CITY = FunctionTool.from_defaults(City, name="City", description="A city.")
TEXT = "Red, blue and green: één kleur - 色.\n\n  It ends."
ASKED = "Measure Oslo."
CALL = {"id": "c1", "type": "function", "function": {"name": "measure"}}
CALL["function"] = {"name": "measure", "arguments": '{"name": "Oslo", "size": 7}'}


def example(answer: Any, **fields: Any) -> ChatExample:
    question = fields.pop("question", "Tell me.")
    messages = fields.pop("messages", [{"role": "user", "content": question}])
    if isinstance(answer, str):
        answer = {"role": "assistant", "content": answer}
    return ChatExample(messages=[*messages, answer], **fields)


def student(base: str, examples: list[ChatExample]) -> LocalFinetuneEngine:
    """Train until the answers are known by heart."""
    engine = LocalFinetuneEngine(
        base,
        ChatDataset(examples=examples),
        output_dir=f"{base}-student",
        lora_rank=None,
        learning_rate=5e-3,
        epochs=50,
        batch_size=len(examples),
        device="cpu",
        precision="fp32",
        show_progress=False,
    )
    engine.finetune()
    return engine


@pytest.fixture(scope="session")
def make_student(
    eager_lm: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., LocalLLM]:
    def make(examples: list[ChatExample], **settings: Any) -> LocalLLM:
        given = [[one.messages, one.tools, one.response_format] for one in examples]
        # Words of the prompts that are made of them, too.
        texts = [json.dumps(given, ensure_ascii=False), PYDANTIC_FORMAT_TMPL, _TOOLS] * 3
        base = eager_lm(tmp_path_factory.mktemp("lm") / "base", texts, vocabulary=700, window=768)
        return student(base, examples).get_finetuned_model(**settings)

    return make


@pytest.fixture(scope="session")
def talker(make_student: Callable[..., LocalLLM]) -> LocalLLM:
    """It says TEXT, whatever it is asked."""
    return make_student([example(TEXT)], max_new_tokens=100)


@pytest.fixture(scope="session")
def writer(make_student: Callable[..., LocalLLM]) -> LocalLLM:
    """It answers in JSON, as a teacher did in its JSON mode."""
    asked = {"type": "json_schema", "json_schema": {"schema": City.model_json_schema()}}
    answer = '{"name": "Oslo", "size": 7}'
    one = example(answer, question="Describe Oslo.", response_format=asked)
    return make_student([one], max_new_tokens=60)


@pytest.fixture(scope="session")
def caller(make_student: Callable[..., LocalLLM]) -> LocalLLM:
    """It calls a tool, and tells what the tool said."""
    tools = [MEASURE.metadata.to_openai_tool()]
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    asked = {"role": "user", "content": ASKED}
    result = {"role": "tool", "tool_call_id": "c1", "content": "Oslo measures 7."}
    filled = {**CALL, "function": {**CALL["function"], "name": "City"}}
    examples = [
        example("It is 7.", messages=[asked, called, result], tools=tools),
        example(
            {"role": "assistant", "content": None, "tool_calls": [filled]},
            question="Describe Oslo.",
            tools=[CITY.metadata.to_openai_tool()],
        ),
    ]
    return make_student(examples, max_new_tokens=60)


@pytest.fixture
def fresh(talker: LocalLLM) -> Callable[..., LocalLLM]:
    def make(**settings: Any) -> LocalLLM:
        return LocalLLM(talker._model, talker._tokenizer, **{"max_new_tokens": 100} | settings)

    return make


ASK = [ChatMessage(role="user", content="Tell me.")]


class Slow(LogitsProcessor):  # type: ignore[misc]
    """Slows the model down, or breaks it; counts its tokens."""

    def __init__(self, seconds: float = 0.0, breaks_at: int | None = None) -> None:
        self.seconds, self.breaks_at, self.tokens = seconds, breaks_at, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        self.tokens += 1
        if self.tokens == self.breaks_at:
            raise RuntimeError("the model broke")
        return scores


def slowed(monkeypatch: pytest.MonkeyPatch, llm: LocalLLM, slow: Slow) -> None:
    generate = llm._model.generate

    def with_slow(*args: Any, **kwargs: Any) -> Any:
        return generate(*args, logits_processor=[slow], **kwargs)

    monkeypatch.setattr(llm._model, "generate", with_slow)


def answering() -> int:
    return sum(thread.name == "LocalLLM" for thread in threading.enumerate())


# --- Answers --------------------------------------------------------------------------------


def test_all_ways_to_ask_give_the_same_answer(fresh: Any) -> None:
    llm = fresh()
    assert llm.chat(ASK).message.content == TEXT
    assert llm.complete("Tell me.").text == TEXT

    async def ask() -> tuple[Any, ...]:
        chat, complete = await asyncio.gather(llm.achat(ASK), llm.acomplete("Tell me."))
        streamed = [item async for item in await llm.astream_chat(ASK)]
        completed = [item async for item in await llm.astream_complete("Tell me.")]
        return chat, complete, streamed, completed

    chat, complete, streamed, completed = asyncio.run(ask())
    assert chat.message.content == complete.text == TEXT
    for items in (streamed, list(llm.stream_chat(ASK))):
        assert "".join(item.delta for item in items) == items[-1].message.content == TEXT
        assert len(items) > 5
        for before, after in pairwise(items):
            assert after.message.content == before.message.content + after.delta
            assert "\ufffd" not in after.delta
        assert items[-1].raw["usage"] == chat.raw["usage"]
    for items in (completed, list(llm.stream_complete("Tell me."))):
        assert "".join(item.delta for item in items) == items[-1].text == TEXT


def test_token_counts(fresh: Any) -> None:
    llm = fresh()
    prompt = llm._format.prompt([{"role": "user", "content": "Tell me."}])
    response = llm.chat(ASK)
    usage = response.raw["usage"]
    assert usage["prompt_tokens"] == len(llm._format.encode(prompt))
    # The end of the turn is a token of the answer.
    assert usage["completion_tokens"] == len(llm._format.encode(TEXT)) + 1
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert response.additional_kwargs == usage
    assert llm.complete("Tell me.").raw["usage"] == usage


def test_stop_texts_are_no_part_of_the_answer(fresh: Any) -> None:
    llm = fresh(stop=["kleur"])
    expected = TEXT.partition("kleur")[0]
    assert llm.chat(ASK).message.content == expected
    items = list(llm.stream_chat(ASK))
    # Not even their beginning is shown.
    assert "".join(item.delta for item in items) == items[-1].message.content == expected
    assert llm.chat(ASK, stop="blue").message.content == "Red, "
    assert llm.complete("Tell me.", stop=["green", "blue", ""]).text == "Red, "
    assert llm.chat(ASK).raw["usage"]["completion_tokens"] < len(llm._format.encode(TEXT))


def test_the_length_is_limited(fresh: Any) -> None:
    llm = fresh()
    for name in ("max_tokens", "max_new_tokens"):
        assert llm.chat(ASK, **{name: 3}).raw["usage"]["completion_tokens"] == 3
    assert fresh(max_new_tokens=2).complete("Tell me.").raw["usage"]["completion_tokens"] == 2
    prompt = llm.chat(ASK).raw["usage"]["prompt_tokens"]
    small = fresh(context_window=prompt + 4)
    assert small.chat(ASK).raw["usage"]["completion_tokens"] == 4
    assert small.chat(ASK, max_tokens=50).raw["usage"]["completion_tokens"] == 4
    full = fresh(context_window=prompt)
    with pytest.raises(ArgumentError, match=f"messages: take {prompt} tokens, and .* a window of"):
        full.chat(ASK)
    with pytest.raises(ArgumentError, match="messages: take"):
        list(full.stream_chat(ASK))


def test_temperature_makes_it_vary(fresh: Any) -> None:
    llm = fresh(max_new_tokens=12)
    hot = {"temperature": 20.0, "top_p": 0.99}
    assert len({llm.chat(ASK, **hot).message.content for _ in range(4)}) > 1
    assert len({llm.chat(ASK, temperature=0.0).message.content for _ in range(2)}) == 1
    assert llm.chat(ASK, temperature=None).message.content == llm.chat(ASK).message.content
    hot_llm = fresh(temperature=20.0, max_new_tokens=12, generate_kwargs={"top_k": 300})
    assert len({hot_llm.complete("Tell me.").text for _ in range(4)}) > 1


def test_an_end_of_turn_that_the_configuration_does_not_know_ends_the_answer(
    fresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = fresh()
    monkeypatch.setattr(llm._model.generation_config, "eos_token_id", 0)
    llm._tokenizer.eos_token = "<|endoftext|>"
    try:
        assert LocalLLM(llm._model, llm._tokenizer).chat(ASK).message.content == TEXT
    finally:
        llm._tokenizer.eos_token = "<|im_end|>"


def test_a_setting_that_there_is_not(talker: Any) -> None:
    with pytest.raises(ArgumentError, match="max_tokens: is no setting of a LocalLLM"):
        LocalLLM(talker._model, talker._tokenizer, max_tokens=5)


def test_streams_decode_as_the_whole_does(talker: LocalLLM) -> None:
    ids = talker._tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    decoder = _Decoder(talker._tokenizer)
    texts = [decoder.add(token) for token in ids]
    assert texts[-1] == TEXT
    assert all(TEXT.startswith(text) for text in texts)


# --- Threads, tasks and streams that nobody reads -------------------------------------------------


def test_threads_and_tasks_share_a_model(fresh: Any) -> None:
    llm = fresh()
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: llm.chat(ASK).message.content, range(6)))
    assert answers == [TEXT] * 6

    async def together() -> list[Any]:
        return await asyncio.gather(*(llm.achat(ASK) for _ in range(4)))

    assert [one.message.content for one in asyncio.run(together())] == [TEXT] * 4


def test_a_stream_that_is_left_stops_the_model(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, slow = fresh(), Slow(seconds=0.03)
    slowed(monkeypatch, llm, slow)
    stream = llm.stream_chat(ASK)
    next(stream)
    assert answering() == 1
    stream.close()
    _until(lambda: answering() == 0)
    assert slow.tokens < 15
    assert llm.chat(ASK, max_tokens=2).raw["usage"]["completion_tokens"] == 2  # the lock is free

    async def leave() -> None:
        stream = await llm.astream_chat(ASK)
        async for _ in stream:
            break

    slow.tokens = 0
    asyncio.run(leave())
    _until(lambda: answering() == 0)
    assert slow.tokens < 15


def test_a_task_that_is_cancelled_in_a_stream_stops_the_model(
    fresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, slow = fresh(), Slow(seconds=0.1)
    slowed(monkeypatch, llm, slow)
    unhandled: list[Any] = []

    async def read() -> None:
        async for _ in await llm.astream_complete("Tell me."):
            pass

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, about: unhandled.append(about))
        task = asyncio.create_task(read())
        await asyncio.sleep(0.35)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.5)

    asyncio.run(main())
    _until(lambda: answering() == 0)
    assert slow.tokens < 15
    assert unhandled == []


def _until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("at", [1, 4])
def test_what_breaks_in_the_model_reaches_the_caller(
    fresh: Any, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    llm, slow = fresh(), Slow(breaks_at=at)
    slowed(monkeypatch, llm, slow)

    async def stream() -> None:
        async for _ in await llm.astream_chat(ASK):
            pass

    calls: list[Callable[[], Any]] = [
        lambda: llm.chat(ASK),
        lambda: llm.complete("Tell me."),
        lambda: list(llm.stream_chat(ASK)),
        lambda: list(llm.stream_complete("Tell me.")),
        lambda: asyncio.run(llm.achat(ASK)),
        lambda: asyncio.run(stream()),
    ]
    for call in calls:
        slow.tokens = 0
        with pytest.raises(RuntimeError, match="the model broke"):
            call()
    _until(lambda: answering() == 0)


# --- In LlamaIndex --------------------------------------------------------------------------------


def test_events_come_once(fresh: Any) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    llm = fresh()
    llm.callback_manager = CallbackManager([debug])
    seen: list[Any] = []

    class Watch(BaseEventHandler):  # type: ignore[misc]
        def handle(self, event: Any, **kwargs: Any) -> None:
            if isinstance(event, LLMChatStartEvent | LLMChatEndEvent):
                seen.append(event)

    watch = Watch()
    get_dispatcher().add_event_handler(watch)
    try:
        llm.chat(ASK)
        list(llm.stream_chat(ASK))
        asyncio.run(llm.achat(ASK))
    finally:
        get_dispatcher().event_handlers.remove(watch)
    kinds = [type(event) for event in seen]
    assert kinds == [LLMChatStartEvent, LLMChatEndEvent] * 3
    assert [event.response.message.content for event in seen[1::2]] == [TEXT] * 3
    assert len(debug.get_event_pairs(CBEventType.LLM)) == 3


def test_an_image_is_refused(fresh: Any) -> None:
    picture = ChatMessage(role="user", blocks=[ImageBlock(url="http://127.0.0.1/a.png")])
    with pytest.raises(DatasetError, match=r"messages\[0\]: has a part of type 'image'"):
        fresh().chat([picture])


def test_a_model_without_a_chat_template_completes(talker: LocalLLM, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(talker.model_name)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(talker.model_name).save_pretrained(tmp_path)
    llm = LocalLLM.from_pretrained(tmp_path, device="cpu", max_new_tokens=100)
    assert not llm.metadata.is_chat_model
    whole = "<|im_start|>user\nTell me.<|im_end|>\n<|im_start|>assistant\n"
    assert llm.complete(whole).text == TEXT
    with pytest.raises(ArgumentError, match="has no chat template; use complete"):
        llm.chat(ASK)


def test_a_query_engine_takes_it_from_the_settings(
    fresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Settings, "_llm", fresh(max_new_tokens=8))
    monkeypatch.setattr(Settings, "_embed_model", HashingEmbedding())
    engine = SummaryIndex.from_documents([Document(text="The sky is blue.")]).as_query_engine()
    response = engine.query("What is blue?")
    assert str(response)
    assert response.source_nodes[0].text == "The sky is blue."


def test_structured_output_through_programs(writer: LocalLLM) -> None:
    template = PromptTemplate("Describe Oslo.")
    expected = City(name="Oslo", size=7)
    assert writer.structured_predict(City, template) == expected
    assert asyncio.run(writer.astructured_predict(City, template)) == expected
    assert writer.as_structured_llm(City).complete("Describe Oslo.").raw == expected


def test_an_answer_that_looks_like_a_call_is_text_without_tools(writer: LocalLLM) -> None:
    response = writer._chat_response('{"name": "a", "arguments": {}}', {}, tools=False)
    assert response.message.content == '{"name": "a", "arguments": {}}'
    assert not [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]


def test_tool_calls_are_made(caller: LocalLLM) -> None:
    assert caller.metadata.is_function_calling_model
    response = caller.chat_with_tools([MEASURE], user_msg=ASKED)
    [selection] = caller.get_tool_calls_from_response(response)
    assert (selection.tool_name, selection.tool_kwargs) == ("measure", {"name": "Oslo", "size": 7})
    assert selection.tool_id.startswith("call_")
    result = caller.predict_and_call([MEASURE], ASKED)
    assert str(result) == "Oslo measures 7."
    items = list(caller.stream_chat_with_tools([MEASURE], user_msg=ASKED))
    assert "".join(item.delta or "" for item in items) == ""  # calls are no text
    assert caller.get_tool_calls_from_response(items[-1])[0].tool_kwargs["size"] == 7
    none = caller.chat(ASK, max_tokens=1)
    assert caller.get_tool_calls_from_response(none, error_on_no_tool_call=False) == []
    with pytest.raises(ValueError, match="expected a tool call"):
        caller.get_tool_calls_from_response(none)


def test_a_function_calling_program_fills_a_model(caller: LocalLLM) -> None:
    program = FunctionCallingProgram.from_defaults(
        output_cls=City, prompt_template_str="Describe Oslo.", llm=caller
    )
    assert program() == City(name="Oslo", size=7)


def test_an_agent_calls_a_tool_and_tells_the_result(caller: LocalLLM) -> None:
    for streaming in (True, False):
        agent = FunctionAgent(tools=[MEASURE], llm=caller, streaming=streaming)

        async def run(agent: FunctionAgent = agent) -> Any:
            return await agent.run(ASKED)

        result = asyncio.run(run())
        assert str(result) == "It is 7."
        assert [str(call.tool_output.content) for call in result.tool_calls] == ["Oslo measures 7."]
