"""`ft_core.hooks` on real LlamaIndex components: retrievers and language models."""

import asyncio
import copy
import functools
import gc
import logging
import pickle
import threading
import traceback

import pytest
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.llms import LLM, MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import (
    CitationQueryEngine,
    RetrieverQueryEngine,
    RouterQueryEngine,
    SubQuestionQueryEngine,
    TransformQueryEngine,
)
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.core.selectors import LLMSingleSelector
from llama_index.core.tools import FunctionTool, QueryEngineTool, RetrieverTool

from ft_core.errors import ArgumentError
from ft_core.hooks import Hook, find_components

LLM_MOCK = MockLLM()


class FixedRetriever(BaseRetriever):
    """Returns the nodes it was given; picklable."""

    def __init__(self, name="node", error=None):
        super().__init__()
        self.nodes = [NodeWithScore(node=TextNode(id_=name, text=name), score=1.0)]
        self.error = error

    def _retrieve(self, query_bundle):
        if self.error:
            raise self.error
        return self.nodes


class Recorder(Hook):
    methods = ("retrieve", "aretrieve")

    def __init__(self):
        super().__init__()
        self.calls = []

    def components(self):
        return (BaseRetriever,)

    def observe(self, call):
        self.calls.append(call)


class Broken(Recorder):
    def observe(self, call):
        raise KeyError("inside the hook")


class ModelRecorder(Recorder):
    methods = ("chat", "achat", "complete", "stream_chat", "astream_chat")

    def components(self):
        return (LLM,)

    def started(self, call):
        call.state = len(call.args)


def engine_of(retriever):
    return RetrieverQueryEngine.from_args(retriever, llm=LLM_MOCK)


def places(retriever):
    """Every way in which an app holds a retriever, by name."""
    engine = engine_of(retriever)
    tool = QueryEngineTool.from_defaults(engine, name="tool", description="d")

    def search(text: str) -> str:
        """Search."""
        return str(engine.query(text))

    class App:
        def __init__(self):
            self.parts = {"engine": engine}

    return {
        "retriever": retriever,
        "query engine": engine,
        "list": [engine],
        "object of the app": App(),
        "chat engine": ContextChatEngine(
            retriever, LLM_MOCK, ChatMemoryBuffer.from_defaults(llm=LLM_MOCK), []
        ),
        "router": RouterQueryEngine(
            LLMSingleSelector.from_defaults(llm=LLM_MOCK), [tool], llm=LLM_MOCK
        ),
        "sub questions": SubQuestionQueryEngine.from_defaults(
            [tool], llm=LLM_MOCK, question_gen=LLMQuestionGenerator.from_defaults(llm=LLM_MOCK)
        ),
        "transform": TransformQueryEngine(engine, query_transform=None),
        "citation": CitationQueryEngine(retriever, llm=LLM_MOCK),
        "engine tool": tool,
        "retriever tool": RetrieverTool.from_defaults(retriever, description="d"),
        "function tool": FunctionTool.from_defaults(search),
        "bound method": engine.query,
        "partial": functools.partial(search, "x"),
        "fusion": QueryFusionRetriever([retriever], llm=LLM_MOCK, num_queries=1),
    }


@pytest.mark.parametrize("place", list(places(FixedRetriever())))
def test_the_retriever_is_found_wherever_the_app_holds_it(place):
    retriever = FixedRetriever()
    target = places(retriever)[place]
    hook = Recorder()
    with hook.attach(target) as attachment:
        assert retriever in attachment.components
        retriever.retrieve("q")
    assert len(hook.calls) == 1


def test_agents_are_walked():
    from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent

    retriever = FixedRetriever()
    tool = QueryEngineTool.from_defaults(engine_of(retriever), name="t", description="d")
    agent = FunctionAgent(tools=[tool], llm=LLM_MOCK, name="a", description="d")
    assert find_components(agent, (BaseRetriever,)) == [retriever]
    workflow = AgentWorkflow(agents=[agent], root_agent="a")
    assert find_components(workflow, (BaseRetriever,)) == [retriever]


def test_the_walk_survives_cycles_and_calls_no_property():
    class Odd(FixedRetriever):
        @property
        def trap(self):
            raise AssertionError("a property was called")

        def __getattr__(self, name):
            raise AssertionError(f"{name} was asked for")

    retriever = Odd.__new__(Odd)
    vars(retriever).update(me=retriever, many=[retriever], big=list(range(10_000)))
    assert find_components({"x": [retriever]}, (BaseRetriever,)) == [retriever]


def test_nothing_found_is_an_error_that_says_what_to_attach_to():
    with pytest.raises(ArgumentError, match="found no BaseRetriever inside a MockLLM; attach to"):
        Recorder().attach(LLM_MOCK)


def test_the_result_is_the_same_object_and_the_call_is_complete():
    retriever, hook = FixedRetriever(), Recorder()
    expected = retriever.retrieve("q")
    with hook.attach(retriever):
        result = retriever.retrieve(str_or_query_bundle="q")
    assert result[0] is expected[0]
    (call,) = hook.calls
    assert call.result is result
    assert (call.target, call.method, call.kwargs) == (
        retriever,
        "retrieve",
        {"str_or_query_bundle": "q"},
    )
    assert call.error is None
    assert call.seconds > 0


def test_detaching_puts_everything_back():
    retriever = FixedRetriever()
    before = dict(vars(FixedRetriever)), dict(vars(retriever)), dict(vars(BaseRetriever))
    hook, other = Recorder(), Recorder()
    hook.attach(retriever)
    attachment = other.attach(retriever)
    assert vars(retriever) == before[1]  # the object is never touched
    hook.detach()
    attachment.detach()
    attachment.detach()
    after = dict(vars(FixedRetriever)), dict(vars(retriever)), dict(vars(BaseRetriever))
    assert after == before
    retriever.retrieve("q")
    assert hook.calls == other.calls == []


def test_a_method_of_the_class_itself_is_put_back():
    class Own(FixedRetriever):
        def retrieve(self, str_or_query_bundle):
            return ["own", *super().retrieve(str_or_query_bundle)]

    before = vars(Own)["retrieve"]
    hook, own, plain = Recorder(), Own(), FixedRetriever()
    with hook.attach([own, plain]):
        assert own.retrieve("q")[0] == "own"
        plain.retrieve("q")
    assert [call.target for call in hook.calls] == [own, plain]  # own: once, not per class
    assert vars(Own)["retrieve"] is before


def test_attach_twice_records_once_and_the_outer_attachment_stays():
    retriever, hook = FixedRetriever(), Recorder()
    hook.attach(retriever)
    with hook.attach(engine_of(retriever)) as inner:
        assert inner.components == []
        retriever.retrieve("q")
    retriever.retrieve("q")
    assert len(hook.calls) == 2
    hook.detach(retriever)
    retriever.retrieve("q")
    assert len(hook.calls) == 2


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_hooks_of_one_retriever_detach_in_any_order(order):
    retriever = FixedRetriever()
    hooks = [Recorder(), Recorder(), Recorder()]
    attachments = [hook.attach(retriever) for hook in hooks]
    left = set(range(3))
    for number in order:
        attachments[number].detach()
        left.discard(number)
        counts = [len(hook.calls) for hook in hooks]
        retriever.retrieve("q")
        grown = {i for i, hook in enumerate(hooks) if len(hook.calls) > counts[i]}
        assert grown == left
    assert "retrieve" not in vars(FixedRetriever)


def test_other_objects_of_the_class_are_not_recorded():
    watched, other, hook = FixedRetriever(), FixedRetriever(), Recorder()
    with hook.attach(watched):
        other.retrieve("q")
        assert hook.calls == []


@pytest.mark.parametrize(
    "clone", [copy.copy, copy.deepcopy, lambda item: pickle.loads(pickle.dumps(item))]
)
def test_a_copy_of_a_watched_component_is_clean_and_works(clone):
    retriever, hook = FixedRetriever("original"), Recorder()
    with hook.attach(retriever):
        twin = clone(retriever)
        twin.nodes = [NodeWithScore(node=TextNode(text="twin"))]
        assert twin.retrieve("q")[0].text == "twin"
        assert hook.calls == []
    assert twin.retrieve("q")[0].text == "twin"


def test_a_copy_of_a_watched_pydantic_model_is_clean():
    model, hook = MockLLM(max_tokens=2), ModelRecorder()
    with hook.attach(model):
        twin = model.model_copy(update={"max_tokens": 1})
        assert len(twin.complete("a b c").text.split()) == 1
        assert hook.calls == []
        assert model.model_dump() == MockLLM(max_tokens=2).model_dump()
        model.complete("a b c")
    assert len(hook.calls) == 1


def test_only_the_outermost_of_nested_retrievers_is_reported():
    inner = [FixedRetriever("a"), FixedRetriever("b")]
    for use_async in (True, False):
        fusion = QueryFusionRetriever(inner, llm=LLM_MOCK, num_queries=1, use_async=use_async)
        hook = Recorder()
        with hook.attach(fusion) as attachment:
            assert len(attachment.components) == 3
            assert len(fusion.retrieve("q")) == 2
            asyncio.run(fusion.aretrieve("q"))

            async def sync_inside_a_loop(fusion=fusion):
                return fusion.retrieve("q")

            asyncio.run(sync_inside_a_loop())
            assert [call.target for call in hook.calls] == [fusion] * 3
            inner[0].retrieve("q")  # asked directly, it is the outermost
            assert hook.calls[-1].target is inner[0]


def test_a_task_that_outlives_the_call_is_not_inside_it():
    class Spawning(FixedRetriever):
        async def _aretrieve(self, query_bundle):
            self.task = asyncio.create_task(self.later())
            return self.nodes

        async def later(self):
            await asyncio.sleep(0.01)
            return await self.other.aretrieve("later")

    async def main():
        await retriever.aretrieve("now")
        await retriever.task

    retriever, hook = Spawning(), Recorder()
    retriever.other = FixedRetriever()
    with hook.attach([retriever, retriever.other]):
        asyncio.run(main())
    assert [call.args for call in hook.calls] == [("now",), ("later",)]


@pytest.mark.parametrize("hook_type", [Recorder, Broken])
def test_the_error_of_the_host_passes_untouched(hook_type):
    cause = OSError("disk")
    error = ValueError("host")
    error.__cause__ = cause
    retriever, hook = FixedRetriever(error=error), hook_type()
    with hook.attach(retriever):
        for call in (
            lambda: retriever.retrieve("q"),
            lambda: asyncio.run(retriever.aretrieve("q")),
        ):
            with pytest.raises(ValueError) as caught:
                call()
            assert caught.value is error
            assert error.__cause__ is cause
            assert error.__context__ is None
            names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
            assert names[-1] == "_retrieve"
            error.__traceback__ = None
    if hook_type is Recorder:
        assert [call.error for call in hook.calls] == [error, error]


def test_a_failing_hook_is_logged_once_per_kind_and_counted(caplog):
    class Failing(Recorder):
        errors = (KeyError("a"), KeyError("b"), OSError(28, "full"), OSError(13, "denied"))

        def observe(self, call):
            self.calls.append(call)
            raise self.errors[len(self.calls) - 1]

    retriever, hook, good = FixedRetriever(), Failing(), Recorder()
    with hook.attach(retriever), good.attach(retriever), caplog.at_level(logging.WARNING):
        for _ in range(4):
            assert retriever.retrieve("q")[0].text == "node"
    assert len(caplog.records) == 3
    assert all(record.name == "ft_core.hooks" and record.exc_info for record in caplog.records)
    assert hook.failures == {"KeyError": 2, "PermissionError 13": 1, "OSError 28": 1}
    assert len(good.calls) == 4


def test_an_interrupt_during_the_hook_is_the_hosts():
    class Interrupted(Recorder):
        def observe(self, call):
            raise KeyboardInterrupt

    retriever = FixedRetriever()
    with Interrupted().attach(retriever), pytest.raises(KeyboardInterrupt):
        retriever.retrieve("q")


def test_cancelling_the_host_passes_through():
    class Slow(FixedRetriever):
        async def _aretrieve(self, query_bundle):
            await asyncio.sleep(60)

    async def main():
        task = asyncio.create_task(retriever.aretrieve("q"))
        await asyncio.sleep(0.01)
        task.cancel()
        await task

    retriever, hook = Slow(), Recorder()
    with hook.attach(retriever), pytest.raises(asyncio.CancelledError):
        asyncio.run(main())
    assert isinstance(hook.calls[0].error, asyncio.CancelledError)


def test_many_tasks_and_threads_are_each_reported_once():
    retriever, hook = FixedRetriever(), Recorder()

    async def gather():
        await asyncio.gather(*(retriever.aretrieve(f"task {i}") for i in range(50)))

    with hook.attach(retriever):
        asyncio.run(gather())
        threads = [
            threading.Thread(target=retriever.retrieve, args=(f"thread {i}",)) for i in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    asked = sorted(call.args[0] for call in hook.calls)
    assert asked == sorted([f"task {i}" for i in range(50)] + [f"thread {i}" for i in range(16)])


def test_attaching_and_detaching_while_others_call():
    retriever, stop = FixedRetriever(), threading.Event()
    errors = []

    def ask():
        while not stop.is_set():
            try:
                assert retriever.retrieve("q") is not None
            except BaseException as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        with Recorder().attach(retriever):
            pass
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert "retrieve" not in vars(FixedRetriever)


def test_a_dead_component_is_forgotten():
    from ft_core import hooks

    hook = Recorder()
    before = len(hooks._watched)
    for _ in range(20):
        hook.attach(engine_of(FixedRetriever()))
    gc.collect()
    assert len(hooks._watched) == before
    with hook.attach(FixedRetriever()):
        pass
    assert "retrieve" not in vars(FixedRetriever)


def test_a_class_defined_while_attached_keeps_its_span():
    with Recorder().attach(FixedRetriever()):

        class Later(FixedRetriever):
            def retrieve(self, str_or_query_bundle):
                return super().retrieve(str_or_query_bundle)

        class Plain(BaseRetriever):
            def retrieve(self, str_or_query_bundle): ...

            def _retrieve(self, query_bundle): ...

    assert type(vars(Later)["retrieve"]) is type(vars(Plain)["retrieve"])
    assert Later().retrieve("q")[0].text == "node"


def test_someone_who_patches_over_ours_is_not_undone(monkeypatch):
    retriever, hook = FixedRetriever(), Recorder()
    attachment = hook.attach(retriever)
    ours = vars(FixedRetriever)["retrieve"]

    def theirs(self, query):
        return ours(self, query)

    monkeypatch.setattr(FixedRetriever, "retrieve", theirs)
    attachment.detach()
    assert vars(FixedRetriever)["retrieve"] is theirs
    assert retriever.retrieve("q")[0].text == "node"
    with hook.attach(retriever):
        retriever.retrieve("q")
    assert len(hook.calls) == 1
    assert vars(FixedRetriever)["retrieve"] is theirs


def test_a_patch_that_threw_ours_away_does_not_blind_the_next_attach():
    class Patched(FixedRetriever):
        pass

    hook = Recorder()
    hook.attach(Patched())
    Patched.retrieve = lambda self, query: ["patched"]
    with hook.attach(Patched()) as attachment:
        assert attachment.components[0].retrieve("q") == ["patched"]
    assert len(hook.calls) == 1


def test_an_override_on_the_object_is_warned_of(caplog):
    retriever = FixedRetriever()
    retriever.retrieve = lambda query: []
    with Recorder().attach(retriever), caplog.at_level(logging.WARNING):
        pass
    assert "FixedRetriever.retrieve is overridden on the object" in caplog.text


def test_a_stream_is_reported_when_it_ends():
    model, hook = MockLLM(max_tokens=3), ModelRecorder()
    messages = [ChatMessage(content="one two three")]
    plain = [item.message.content for item in model.stream_chat(messages)]
    with hook.attach(model):
        stream = model.stream_chat(messages)
        assert hook.calls == []
        assert [item.message.content for item in stream] == plain
    (call,) = hook.calls
    assert call.method == "stream_chat"
    assert call.result.message.content == plain[-1]
    assert call.state == 1

    async def main():
        return [item async for item in await model.astream_chat(messages)]

    with hook.attach(model):
        asyncio.run(main())
    assert hook.calls[-1].method == "astream_chat"
    assert hook.calls[-1].result.message.content == plain[-1]


def test_a_stream_that_the_app_leaves_is_reported_as_far_as_it_was_read():
    model, hook = MockLLM(max_tokens=5), ModelRecorder()
    with hook.attach(model):
        stream = model.stream_chat([ChatMessage(content="one two three")])
        first = next(stream)
        stream.close()
    assert [call.result for call in hook.calls] == [first]


def test_a_stream_that_fails_passes_its_error_on():
    error = ConnectionError("cut")

    class Cut(MockLLM):
        def stream_chat(self, messages, **kwargs):
            def generate():
                yield "first"
                raise error

            return generate()

    model, hook = Cut(), ModelRecorder()
    with hook.attach(model):
        stream = model.stream_chat([])
        assert next(stream) == "first"
        with pytest.raises(ConnectionError) as caught:
            next(stream)
    assert caught.value is error
    assert [call.error for call in hook.calls] == [error]


def test_a_plain_method_that_returns_a_coroutine_is_awaited():
    class Odd(FixedRetriever):
        aretrieve = lambda self, query: self.work(query)  # noqa: E731

        async def work(self, query):
            return [query]

    retriever, hook = Odd(), Recorder()
    with hook.attach(retriever):
        assert asyncio.run(retriever.aretrieve("q")) == ["q"]
    assert [call.result for call in hook.calls] == [["q"]]


def test_a_hook_sees_the_arguments_before_the_call_changes_them():
    class Scores(Hook):
        methods = ("postprocess_nodes",)

        def components(self):
            return (BaseNodePostprocessor,)

        def started(self, call):
            call.state = [node.score for node in call.args[0]]

        def observe(self, call):
            self.seen = call.state, [node.score for node in call.args[0]]

    class Zero(SimilarityPostprocessor):
        def _postprocess_nodes(self, nodes, query_bundle=None):
            for node in nodes:
                node.score = 0.0
            return nodes

    hook = Scores()
    engine = RetrieverQueryEngine(
        FixedRetriever(),
        response_synthesizer=get_response_synthesizer(llm=LLM_MOCK),
        node_postprocessors=[Zero()],
    )
    with hook.attach(engine):
        engine.query("q")
    assert hook.seen == ([1.0], [0.0])


def test_a_stream_says_whether_it_was_read_to_its_end():
    model, hook = MockLLM(max_tokens=4), ModelRecorder()
    messages = [ChatMessage(content="one two three")]

    async def leave():
        stream = await model.astream_chat(messages)
        await anext(stream)
        await stream.aclose()

    async def read():
        async for _ in await model.astream_chat(messages):
            pass

    with hook.attach(model):
        model.chat(messages)
        for _ in model.stream_chat(messages):
            pass
        asyncio.run(read())
        assert [call.complete for call in hook.calls] == [True, True, True]
        stream = model.stream_chat(messages)
        next(stream)
        stream.close()
        asyncio.run(leave())
        forgotten = model.stream_chat(messages)
        next(forgotten)
        del forgotten
        gc.collect()
        assert [call.complete for call in hook.calls[3:]] == [False, False, False]
        model.stream_chat(messages).close()  # never begun: nothing happened
    assert len(hook.calls) == 6


def test_a_hook_decides_which_calls_to_report_and_sees_what_they_are_inside_of():
    class All(Recorder):
        def wants(self, call):
            return call.target.nodes[0].node_id != "a"

        def observe(self, call):
            self.calls.append((call.target, [outer.target for outer in call.outer]))
            assert not self.running() or self.running()[0].target is fusion

    inner = [FixedRetriever("a"), FixedRetriever("b")]
    fusion = QueryFusionRetriever(inner, llm=LLM_MOCK, num_queries=1, use_async=False)
    fusion.nodes = FixedRetriever("f").nodes
    hook = All()
    with hook.attach(fusion):
        fusion.retrieve("q")
    assert hook.calls == [(inner[1], [fusion]), (fusion, [])]
    assert hook.running() == ()


def test_a_wish_that_fails_costs_the_record_and_nothing_else():
    class Undecided(Recorder):
        def wants(self, call):
            raise KeyError("inside the hook")

    retriever, hook = FixedRetriever(), Undecided()
    with hook.attach(retriever):
        assert retriever.retrieve("q")[0].text == "node"
    assert hook.calls == []
    assert set(hook.failures) == {"KeyError"}


def test_a_call_that_passes_two_taps_is_inside_itself_no_matter_what_the_hook_wants():
    class All(Recorder):
        def wants(self, call):
            return True

    class Fresh(FixedRetriever):
        pass

    retriever, hook = Fresh(), All()
    hook.attach(retriever)
    ours = vars(Fresh)["retrieve"]
    Fresh.retrieve = lambda self, query: ours(self, query)
    with All().attach(retriever):  # taps over the patch that calls our first tap
        retriever.retrieve("q")
    assert len(hook.calls) == 1
    hook.detach()
