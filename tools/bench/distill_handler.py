"""What `OpenAIFineTuningHandler` captures and costs, beside its predecessor's.

    uv run python tools/bench/distill_handler.py [--predecessor-python PYTHON]
        [--calls 2000] [--repeats 7] [--memory-calls 100000] [--json]

(a) A table of call kinds: captured correctly, host unharmed when the call succeeds, and when it
fails. A real `llama_index.llms.openai.OpenAI` talks to an HTTP server in the same process, which
writes down what came over the wire and what it answered. Captured correctly: the saved JSONL
holds these messages, answers, tools and functions, and nothing else. Unharmed: the app's result
(or the type and text of its exception) is the one that it has without a handler, and so is the
list of messages that the app passed in. Both sides run this script: PYTHON is that of an
environment with `llama-index-finetuning` and `llama-index-llms-openai` installed.

(b) The cost of a call of an LLM that does nothing, by each way to plug the handler in: median
microseconds without and with it, and the memory of the process after many calls. The goals are
under 200 microseconds added, and flat memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from llama_index.core import Document, Settings, VectorStoreIndex
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.base.llms.types import ImageBlock, TextBlock
from llama_index.core.callbacks import CallbackManager
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.llms import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    CustomLLM,
    LLMMetadata,
)
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import RouterQueryEngine, SubQuestionQueryEngine
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.selectors import LLMSingleSelector
from llama_index.core.tools import FunctionTool, QueryEngineTool
from llama_index.core.types import PydanticProgramMode
from pydantic import BaseModel

COLUMNS = ("captured correctly", "unharmed on success", "unharmed on failure")
GOAL_MICROSECONDS = 200
GOAL_GROWTH_MB = 5
TEXT = "The late fee is 3 % of the amount. It is due after 30 days."
FUNCTION = {
    "name": "percent_of",
    "description": "The percentage of a fee.",
    "parameters": {"type": "object", "properties": {"name": {"type": "string"}}},
}


class Fee(BaseModel):
    """A fee."""

    name: str
    percent: int


def percent_of(name: str) -> str:
    """Look up the percentage of a fee."""
    return f"{name} is 3 %"


# --- The teacher, over a socket --------------------------------------------------------------


def teacher(body: dict[str, Any]) -> dict[str, Any]:
    """Answer by rules, so that every app below goes through all its steps."""
    messages = body["messages"]
    last, text = messages[-1], str(messages[-1].get("content"))
    if last["role"] == "tool":
        return {"content": f"It is so: {text}"}
    if body.get("tools"):
        names = [tool["function"]["name"] for tool in body["tools"]]
        arguments = {"name": "late", "percent": 3} if names == ["Fee"] else {"name": "late"}
        call = {"name": names[0], "arguments": json.dumps(arguments)}
        return {"content": None, "tool_calls": [call] * (2 if "both" in text else 1)}
    if body.get("response_format") or "JSON schema" in text:
        return {"content": json.dumps({"name": "late", "percent": 3})}
    if "choices are given" in text or "choices were" in text.lower() or "choice" in text.lower():
        return {"content": '[{"choice": 1, "reason": "the only one"}]'}
    if "sub-questions" in text or "sub_question" in text:
        items = [{"sub_question": "How high is it?", "tool_name": "contract"}]
        return {"content": "```json\n" + json.dumps({"items": items}) + "\n```"}
    if "percent_of" in str(messages[0]["content"]):  # ReAct
        if "Observation" in text:
            return {"content": "Thought: I can answer.\nAnswer: 3 %"}
        return {
            "content": 'Thought: I need it.\nAction: percent_of\nAction Input: {"name": "late"}'
        }
    return {"content": f"An answer of {len(text)} to {text[-20:]!r}."}


@dataclass
class Wire:
    """What went over the wire, and whether the next calls fail."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    failing: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", **teacher(body)}
        for number, call in enumerate(message.get("tool_calls", [])):
            wanted = f"call_{len(body['messages'])}_{number}"
            message["tool_calls"][number] = {"id": wanted, "type": "function", "function": call}
        line = {"messages": [*body["messages"], message]}
        line |= {key: body[key] for key in ("tools", "functions") if body.get(key)}
        with self.lock:
            self.calls.append(line)
        return message


@contextmanager
def server() -> Iterator[tuple[Wire, str]]:
    wire = Wire()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if wire.failing:
                self.reply(400, json.dumps({"error": {"message": "refused", "code": "no"}}))
            elif body.get("stream"):
                chunks = [json.dumps(part) for part in stream(wire.answer(body))]
                text = "".join(f"data: {chunk}\n\n" for chunk in [*chunks, "[DONE]"])
                self.reply(200, text, "text/event-stream")
            else:
                choice = {"index": 0, "message": wire.answer(body), "finish_reason": "stop"}
                usage = {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
                self.reply(200, json.dumps({**HEAD, "choices": [choice], "usage": usage}))

        def reply(self, status: int, text: str, kind: str = "application/json") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield wire, f"http://127.0.0.1:{http.server_address[1]}/v1"
    finally:
        http.shutdown()
        http.server_close()


HEAD = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "gpt-4o-mini"}


def stream(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": word} for word in (message["content"] or "").split(" ")[:1]]
    rest = (message["content"] or "").partition(" ")
    deltas += [{"content": rest[1] + rest[2]}] if rest[1] else []
    for index, call in enumerate(message.get("tool_calls", [])):
        arguments = call["function"]["arguments"]
        head = {**call, "index": index, "function": {**call["function"], "arguments": ""}}
        deltas.append({"tool_calls": [head]})
        for piece in (arguments[:3], arguments[3:]):
            deltas.append({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
    for delta in deltas:
        choice = {"index": 0, "delta": delta, "finish_reason": None}
        yield {**HEAD, "object": "chat.completion.chunk", "choices": [choice]}


# --- The kinds of calls ----------------------------------------------------------------------


@dataclass
class Kind:
    """One way to use an LLM: makes the app out of the LLM, and runs it."""

    run: Callable[[Any], Any]
    build: Callable[[Any], Any] = lambda llm: llm
    settings: dict[str, Any] = field(default_factory=dict)
    late: bool = False
    """Whether the callback manager is set after the LLM was built."""
    recorded: bool = True
    """Whether the call is one to record."""
    fails: bool = False
    """Whether to run it failing only."""


def question(text: str = "What is the late fee?") -> list[ChatMessage]:
    return [ChatMessage(role="system", content="Be brief."), ChatMessage(content=text)]


def chat(llm: Any) -> Any:
    messages = question()
    return [llm.chat(messages).message.content, len(messages)]


def stream_chat(llm: Any) -> Any:
    messages = question()
    return [[item.delta for item in llm.stream_chat(messages)], len(messages)]


def achat(llm: Any) -> Any:
    messages = question()
    return [asyncio.run(llm.achat(messages)).message.content, len(messages)]


def astream_chat(llm: Any) -> Any:
    async def read() -> Any:
        return [item.delta async for item in await llm.astream_chat(question())]

    return asyncio.run(read())


def astream_complete(llm: Any) -> Any:
    async def read() -> Any:
        return [item.delta async for item in await llm.astream_complete("What is it?")]

    return asyncio.run(read())


def tasks(llm: Any) -> Any:
    async def many() -> Any:
        calls = [llm.achat(question(f"Question {n}?")) for n in range(8)]
        return [item.message.content for item in await asyncio.gather(*calls)]

    return asyncio.run(many())


def threads(llm: Any) -> Any:
    with ThreadPoolExecutor(8) as pool:
        return list(
            pool.map(lambda n: llm.chat(question(f"Question {n}?")).message.content, "abcdefgh")
        )


def tool_call(llm: Any) -> Any:
    response = llm.chat_with_tools([TOOL], user_msg="How high is the late fee?")
    return [call.model_dump() for call in llm.get_tool_calls_from_response(response)]


def two_tool_calls(llm: Any) -> Any:
    response = llm.chat_with_tools([TOOL], user_msg="both fees?", allow_parallel_tool_calls=True)
    return [call.model_dump() for call in llm.get_tool_calls_from_response(response)]


def streamed_tool_call(llm: Any) -> Any:
    *_, response = llm.stream_chat_with_tools([TOOL], user_msg="How high is it?")
    return [call.model_dump() for call in llm.get_tool_calls_from_response(response)]


def tool_result(llm: Any) -> Any:
    messages = question()
    response = llm.chat_with_tools([TOOL], chat_history=messages)
    (call,) = llm.get_tool_calls_from_response(response)
    result = ChatMessage(
        role="tool", content="3 %", additional_kwargs={"tool_call_id": call.tool_id}
    )
    history = [*question(), response.message, result]
    return llm.chat_with_tools([TOOL], chat_history=history).message.content


def functions(llm: Any) -> Any:
    return llm.chat(question(), functions=[FUNCTION]).message.content


def picture(llm: Any) -> Any:
    blocks = [TextBlock(text="What is this?"), ImageBlock(url="https://example.org/a.png")]
    return llm.chat([ChatMessage(role="user", blocks=blocks)]).message.content


def predict(llm: Any) -> Any:
    return llm.structured_predict(Fee, PromptTemplate("Extract: {text}"), text="3 %").model_dump()


def stream_predict(llm: Any) -> Any:
    prompt = PromptTemplate("Extract: {text}")
    *_, last = llm.stream_structured_predict(Fee, prompt, text="3 %")
    return last.model_dump()


def structured_llm(llm: Any) -> Any:
    return llm.as_structured_llm(Fee).chat(question()).message.content


def query(engine: Any) -> Any:
    return str(engine.query("How high is the late fee?"))


def aquery(engine: Any) -> Any:
    return str(asyncio.run(engine.aquery("How high is the late fee?")))


def streamed_query(engine: Any) -> Any:
    return "".join(engine.query("How high is the late fee?").response_gen)


def conversation(engine: Any) -> Any:
    first = engine.chat("How high is the late fee?").response
    return [first, "".join(engine.stream_chat("When is it due?").response_gen)]


def run_agent(agent: Any) -> Any:
    async def run() -> str:
        return str(await agent.run(user_msg="How high is the late fee?"))

    return asyncio.run(run())


def abandoned(llm: Any) -> Any:
    stream = llm.stream_chat(question())
    first = [next(stream).delta, next(stream).delta]
    stream.close()
    return first


def query_engine(llm: Any, **settings: Any) -> Any:
    return index().as_query_engine(llm=llm, **settings)


def index() -> VectorStoreIndex:
    return VectorStoreIndex.from_documents(
        [Document(text=TEXT)], embed_model=MockEmbedding(embed_dim=4)
    )


def chat_engine(mode: str) -> Callable[[Any], Any]:
    def build(llm: Any) -> Any:
        memory = ChatMemoryBuffer.from_defaults(llm=llm)
        return index().as_chat_engine(chat_mode=mode, llm=llm, memory=memory)

    return build


def engine_tool(llm: Any) -> QueryEngineTool:
    return QueryEngineTool.from_defaults(
        query_engine(llm), name="contract", description="the contract"
    )


def sub_questions(llm: Any) -> Any:
    generator = LLMQuestionGenerator.from_defaults(llm=llm)
    return SubQuestionQueryEngine.from_defaults(
        [engine_tool(llm)], llm=llm, question_gen=generator, use_async=True, verbose=False
    )


def router(llm: Any) -> Any:
    selector = LLMSingleSelector.from_defaults(llm=llm)
    return RouterQueryEngine(selector, [engine_tool(llm)], llm=llm)


def agent(kind: Any, **settings: Any) -> Callable[[Any], Any]:
    return lambda llm: kind(name="clerk", description="d", tools=[TOOL], llm=llm, **settings)


def workflow(llm: Any) -> Any:
    return AgentWorkflow(agents=[agent(FunctionAgent)(llm)], root_agent="clerk")


TOOL = FunctionTool.from_defaults(percent_of)
AS_TOOL = {"pydantic_program_mode": PydanticProgramMode.FUNCTION}
AS_TEXT = {"pydantic_program_mode": PydanticProgramMode.LLM}
KINDS: dict[str, Kind] = {
    "chat": Kind(chat),
    "completion": Kind(lambda llm: llm.complete("What is it?").text),
    "chat, streamed": Kind(stream_chat),
    "completion, streamed": Kind(lambda llm: [x.delta for x in llm.stream_complete("What?")]),
    "chat, async": Kind(achat),
    "completion, async": Kind(lambda llm: asyncio.run(llm.acomplete("What is it?")).text),
    "chat, async streamed": Kind(astream_chat),
    "completion, async streamed": Kind(astream_complete),
    "8 tasks at once": Kind(tasks),
    "8 threads at once": Kind(threads),
    "tool call": Kind(tool_call),
    "two tool calls in one turn": Kind(two_tool_calls),
    "tool call, streamed": Kind(streamed_tool_call),
    "tool result": Kind(tool_result),
    "functions (old)": Kind(functions),
    "picture": Kind(picture),
    "structured_predict, JSON schema": Kind(predict),
    "structured_predict, as a tool": Kind(predict, settings=AS_TOOL),
    "structured_predict, as text": Kind(predict, settings=AS_TEXT),
    "stream_structured_predict": Kind(stream_predict),
    "as_structured_llm": Kind(structured_llm),
    "query engine": Kind(query, query_engine),
    "query engine, async": Kind(aquery, query_engine),
    "query engine, streamed": Kind(streamed_query, lambda llm: query_engine(llm, streaming=True)),
    "chat engine, context": Kind(conversation, chat_engine("context")),
    "chat engine, condense question": Kind(conversation, chat_engine("condense_question")),
    "sub-question engine": Kind(query, sub_questions),
    "router engine": Kind(query, router),
    "FunctionAgent": Kind(run_agent, agent(FunctionAgent)),
    "FunctionAgent, not streamed": Kind(run_agent, agent(FunctionAgent, streaming=False)),
    "ReActAgent": Kind(run_agent, agent(ReActAgent)),
    "AgentWorkflow": Kind(run_agent, workflow),
    "manager set after the LLM": Kind(query, query_engine, late=True),
    "stream that the app leaves": Kind(abandoned, recorded=False),
    "call that fails": Kind(chat, recorded=False, fails=True),
}


# --- One side of the table -------------------------------------------------------------------


def measure_side(side: str) -> dict[str, list[bool]]:
    with server() as (wire, url):
        return {name: measure_kind(kind, side, wire, url) for name, kind in KINDS.items()}


def measure_kind(kind: Kind, side: str, wire: Wire, url: str) -> list[bool]:
    """Return whether the calls are in the file, and the app did as it does by itself."""
    wire.failing = True
    failure = new_handler(side)
    unharmed_failing = same_outcome(kind, failure, wire, url, "error")
    wire.failing = False
    if kind.fails:
        return [saved(failure) == set(), unharmed_failing, unharmed_failing]
    handler = new_handler(side)
    unharmed = same_outcome(kind, handler, wire, url, "result")
    assert wire.calls
    wanted = {canonical(line) for line in wire.calls} if kind.recorded else set()
    return [saved(handler) == wanted, unharmed, unharmed_failing]


def same_outcome(kind: Kind, handler: Any, wire: Wire, url: str, wanted: str) -> bool:
    expected = outcome(kind, None, wire, url)
    assert expected[0] == wanted, expected
    return bool(outcome(kind, handler, wire, url) == expected)


def outcome(kind: Kind, handler: Any, wire: Wire, url: str) -> Any:
    """Return what the app gave, or the exception that it raised."""
    from llama_index.llms.openai import OpenAI

    wire.calls.clear()
    settings = {"model": "gpt-4o-mini", "api_base": url, "api_key": "x", "max_retries": 0}
    Settings._callback_manager = None
    is_ours = handler is not None and hasattr(handler, "attach")
    if handler is not None and not is_ours and not kind.late:
        Settings.callback_manager = CallbackManager([handler])
        settings["callback_manager"] = Settings.callback_manager
    llm = OpenAI(**settings, **kind.settings)
    app = kind.build(llm)
    if handler is not None and not is_ours and kind.late:
        Settings.callback_manager = CallbackManager([handler])
    attachment = handler.attach([app, llm]) if is_ours else None
    try:
        return ["result", kind.run(app)]
    except Exception as error:
        return ["error", type(error).__name__, str(error)]
    finally:
        if attachment:
            attachment.detach()
        Settings._callback_manager = None


def new_handler(side: str) -> Any:
    if side == "predecessor":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from llama_index.finetuning.callbacks import OpenAIFineTuningHandler
        return OpenAIFineTuningHandler()
    from ft_openai_distill.handler import OpenAIFineTuningHandler as Ours

    return Ours()


def saved(handler: Any) -> set[str] | None:
    """Return the lines that the handler saves, or None if it cannot."""
    if not handler.get_finetuning_events():
        return set()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.jsonl"
        try:
            handler.save_finetuning_events(str(path))
        except Exception:
            return None
        return {canonical(json.loads(line)) for line in path.read_text().splitlines()}


def canonical(line: dict[str, Any]) -> str:
    """Return a line as text, without what says nothing."""
    messages = [
        {key: value for key, value in message.items() if value not in (None, "")}
        for message in line["messages"]
    ]
    kept = {key: line[key] for key in ("tools", "functions") if line.get(key)}
    return json.dumps({"messages": messages, **kept}, sort_keys=True)


# --- The cost --------------------------------------------------------------------------------


class NoOp(CustomLLM):
    """Answers at once, so that nothing hides the cost."""

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(model_name="no-op")

    @llm_chat_callback()
    def chat(self, messages: Any, **kwargs: Any) -> ChatResponse:
        return ChatResponse(message=ChatMessage(role="assistant", content="An answer. " * 20))

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return CompletionResponse(text="An answer. " * 20)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        raise NotImplementedError


@contextmanager
def plugged(way: str, folder: Path) -> Iterator[NoOp]:
    """Yield an LLM with a handler that is plugged in this way."""
    from ft_openai_distill.handler import OpenAIFineTuningHandler

    llm = NoOp()
    if way == "without":
        yield llm
        return
    handler = OpenAIFineTuningHandler(folder / "teacher.jsonl")
    if way == "attached":
        with handler.attach(llm):
            yield llm
    elif way == "callback manager":
        llm.callback_manager = CallbackManager([handler])
        yield llm
    else:
        get_dispatcher().add_event_handler(handler.event_handler())
        try:
            yield llm
        finally:
            get_dispatcher().event_handlers.remove(handler.event_handler())
    assert not handler.failures, handler.failures


WAYS = ("without", "attached", "callback manager", "instrumentation")


def median_call(llm: NoOp, calls: int) -> float:
    """Return the median microseconds of one `chat` of a RAG prompt of 3 kB."""
    seconds = []
    for number in range(calls):
        messages = question(f"{TEXT * 50}\nQuery: {number}\nAnswer: ")
        start = time.perf_counter()
        llm.chat(messages)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e6


def measure_cost(calls: int, repeats: int) -> dict[str, float]:
    runs: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way in WAYS:
            with tempfile.TemporaryDirectory() as folder, plugged(way, Path(folder)) as llm:
                runs[way].append(median_call(llm, calls))
    return {way: statistics.median(values) for way, values in runs.items()}


def measure_memory(calls: int) -> dict[str, float]:
    """Return the growth of the process in MB over the calls, after a tenth of them."""
    growth = {}
    for way in WAYS:
        with tempfile.TemporaryDirectory() as folder, plugged(way, Path(folder)) as llm:
            for number in range(calls + calls // 10):
                if number == calls // 10:
                    before = resident_mb()
                llm.chat(question(f"Question {number}?"))
            growth[way] = resident_mb() - before
    return growth


def resident_mb() -> float:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096 / 2**20


# --- The report ------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--predecessor-python", type=Path)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory-calls", type=int, default=100_000)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--side", choices=["ours", "predecessor"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        logging.disable(logging.CRITICAL)
        print(json.dumps(measure_side(options.side)))
        return
    tables = {"ours": run_side("ours", Path(sys.executable))}
    if options.predecessor_python:
        tables["predecessor"] = run_side("predecessor", options.predecessor_python)
    cost = measure_cost(options.calls, options.repeats)
    growth = measure_memory(options.memory_calls) if options.memory_calls else {}
    if options.json:
        print(json.dumps({"table": tables, "median_us": cost, "growth_mb": growth}, indent=2))
    else:
        print_table(tables)
        print_cost(cost, growth, options.memory_calls)


def run_side(side: str, python: Path) -> dict[str, list[bool]]:
    command = [str(python), "-W", "ignore", __file__, "--side", side]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{python}: {done.stderr.strip().splitlines()[-1]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def print_table(tables: dict[str, dict[str, list[bool]]]) -> None:
    print(f"{'':34}" + "".join(f"{side:^33}" for side in tables))
    print(f"{'':34}" + "".join(f"{'captured':>11}{'success':>11}{'failure':>11}" for _ in tables))
    for kind in KINDS:
        cells = [cell for table in tables.values() for cell in table[kind]]
        print(f"{kind:34}" + "".join(f"{'yes' if cell else 'NO':>11}" for cell in cells))
    for side, table in tables.items():
        counts = [sum(row[i] for row in table.values()) for i in range(len(COLUMNS))]
        named = zip(COLUMNS, counts, strict=True)
        text = ", ".join(f"{name} {count}/{len(table)}" for name, count in named)
        print(f"{side}: {text}")


def print_cost(cost: dict[str, float], growth: dict[str, float], memory_calls: int) -> None:
    print(f"\n{'':24}{'median':>10}{'added':>10}{'memory':>12}   (us per call; MB per "
          f"{memory_calls} calls)")  # fmt: skip
    for way, value in cost.items():
        memory = f"{growth[way]:12.1f}" if growth else ""
        print(f"{way:24}{value:10.1f}{value - cost['without']:10.1f}{memory}")
    added = max(cost.values()) - cost["without"]
    print(f"under {GOAL_MICROSECONDS} us added: {'met' if added < GOAL_MICROSECONDS else 'MISSED'}")
    if growth:
        flat = max(growth.values()) < GOAL_GROWTH_MB
        print(f"memory flat (under {GOAL_GROWTH_MB} MB): {'met' if flat else 'MISSED'}")


if __name__ == "__main__":
    main()
