"""`RetrievalHandler` on real LlamaIndex apps: what is recorded, exported, and never harmed."""

import asyncio
import errno
import hashlib
import json
import logging
import multiprocessing
import os
import resource
import threading
import tracemalloc

import numpy as np
import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.chat_engine.types import ChatMode
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RouterQueryEngine, SubQuestionQueryEngine
from llama_index.core.question_gen.types import BaseQuestionGenerator, SubQuestion
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.core.selectors import EmbeddingSingleSelector
from llama_index.core.tools import QueryEngineTool

from ft_core.errors import ArgumentError, ArtifactError, DatasetError
from ft_embeddings.retrieval_handler import RetrievalHandler

LLM = MockLLM()
TEXTS = {
    "fee": "The late fee is five euros per week",
    "hours": "The library opens at nine and closes at six",
    "card": "A lost card costs ten euros to replace",
    "wifi": "Wireless access needs the number of your card",
}


class HashingEmbedding(BaseEmbedding):
    """Bag of hashed words: deterministic, and similar for texts that share words."""

    def _vector(self, text):
        vector = np.zeros(64)
        for word in text.lower().split():
            vector[int(hashlib.md5(word.encode()).hexdigest(), 16) % 64] += 1
        return vector.tolist()

    def _get_query_embedding(self, query):
        return self._vector(query)

    async def _aget_query_embedding(self, query):
        return self._vector(query)

    def _get_text_embedding(self, text):
        return self._vector(text)


class FixedRetriever(BaseRetriever):
    def __init__(self, nodes=(), error=None):
        super().__init__()
        self.nodes, self.error = list(nodes), error

    def _retrieve(self, query_bundle):
        if self.error:
            raise self.error
        return self.nodes


@pytest.fixture
def index():
    nodes = [TextNode(id_=key, text=text) for key, text in TEXTS.items()]
    return VectorStoreIndex(nodes, embed_model=HashingEmbedding())


@pytest.fixture
def handler(tmp_path):
    handler = RetrievalHandler(tmp_path / "traffic.jsonl")
    yield handler
    handler.detach()


def lines(handler):
    return [json.loads(line) for line in handler.path.read_text().splitlines()]


def queries(handler):
    return [record["query"] for record in lines(handler) if record["type"] == "retrieval"]


def test_query_mark_export(index, handler):
    engine = index.as_query_engine(llm=LLM, similarity_top_k=2)
    handler.attach(engine)
    response = engine.query("what is the late fee")
    handler.mark(handler.last_query_id, response.source_nodes[0].node_id)
    handler.mark(handler.last_query_id, response.source_nodes[1].node_id, relevant=False)
    engine.query("nobody marks this")

    dataset = handler.to_dataset()
    (query_id,) = handler.query_ids("what is the late fee")
    assert dataset.queries == {query_id: "what is the late fee"}
    assert dataset.relevant_docs == {query_id: ["fee"]}
    assert dataset.corpus.items() <= TEXTS.items()
    assert handler.negatives() == {query_id: [response.source_nodes[1].node_id]}
    record = lines(handler)[0]
    assert [node for node, _, _ in record["nodes"]] == [n.node_id for n in response.source_nodes]
    assert [s for _, _, s in record["nodes"]] == [n.score for n in response.source_nodes]
    assert record["seconds"] > 0


def test_every_way_of_asking_is_recorded_once(index, handler):
    engine = index.as_query_engine(llm=LLM, similarity_top_k=2)
    streaming = index.as_query_engine(llm=LLM, streaming=True)
    chat = index.as_chat_engine(chat_mode=ChatMode.CONTEXT, llm=LLM)
    condense = index.as_chat_engine(chat_mode=ChatMode.CONDENSE_PLUS_CONTEXT, llm=LLM)
    fusion = QueryFusionRetriever(
        [index.as_retriever(similarity_top_k=k) for k in (1, 2)], llm=LLM, num_queries=1
    )
    tools = [
        QueryEngineTool.from_defaults(engine, name="a", description="late fee"),
        QueryEngineTool.from_defaults(streaming, name="b", description="opening hours"),
    ]
    router = RouterQueryEngine(EmbeddingSingleSelector(HashingEmbedding()), tools, llm=LLM)
    asked = []

    def ask(call, text):
        asked.append(text)
        result = call(text)
        assert handler.last_query_id == handler.query_ids(text)[-1]
        return result

    async def ask_async(call, text):
        asked.append(text)
        result = await call(text)
        assert handler.last_query_id == handler.query_ids(text)[-1]
        return result

    async def main():
        await ask_async(engine.aquery, "async query")
        await ask_async(chat.achat, "async chat")
        await ask_async(fusion.aretrieve, "async fusion")
        await ask_async(router.aquery, "async late fee")
        stream = await ask_async(chat.astream_chat, "async stream chat")
        assert [token async for token in stream.async_response_gen()]

    with handler.attach([router, chat, condense, fusion]):
        ask(engine.query, "query")
        assert "".join(ask(streaming.query, "streaming").response_gen)
        ask(chat.chat, "chat")
        assert "".join(ask(chat.stream_chat, "stream chat").response_gen)
        ask(condense.chat, "condense")
        ask(fusion.retrieve, "fusion")
        ask(router.query, "late fee")
        asyncio.run(main())
    engine.query("after detaching")
    assert queries(handler) == asked
    assert not handler.failures


def test_query_bundles_are_recorded_by_their_text(index, handler):
    retriever = index.as_retriever()
    with handler.attach(retriever):
        retriever.retrieve(str_or_query_bundle=QueryBundle("bundle"))
    assert queries(handler) == ["bundle"]


def test_concurrent_tasks_each_see_their_own_id(index, handler):
    engine = index.as_query_engine(llm=LLM)

    async def ask(number):
        await engine.aquery(f"task {number}")
        await asyncio.sleep(0)
        return handler.last_query_id

    async def main():
        return await asyncio.gather(*(ask(number) for number in range(50)))

    with handler.attach(engine):
        ids = asyncio.run(main())
        assert handler.last_query_id is None
    assert [handler.query_ids(f"task {number}") for number in range(50)] == [[i] for i in ids]
    assert not handler.failures


def test_concurrent_threads_each_see_their_own_id(index, handler):
    engine, ids = index.as_query_engine(llm=LLM), {}

    def ask(number):
        for turn in range(5):
            engine.query(f"thread {number} {turn}")
            ids[f"thread {number} {turn}"] = handler.last_query_id

    with handler.attach(engine):
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {r["query"]: r["id"] for r in lines(handler)} == ids
    written = [text for r in lines(handler) for text in r.get("texts", {}).values()]
    assert len(written) == len(set(written))


def test_collect_sees_the_retrievals_of_the_apps_own_tasks(index, handler):
    class TwoQuestions(BaseQuestionGenerator):
        def _get_prompts(self):
            return {}

        def _update_prompts(self, prompts): ...

        def generate(self, tools, query):
            return [SubQuestion(sub_question=text, tool_name="t") for text in ("one", "two")]

        async def agenerate(self, tools, query):
            return self.generate(tools, query)

    tool = QueryEngineTool.from_defaults(index.as_query_engine(llm=LLM), name="t", description="d")
    engine = SubQuestionQueryEngine.from_defaults(
        [tool],
        llm=LLM,
        question_gen=TwoQuestions(),
        use_async=True,
        verbose=False,
        response_synthesizer=index.as_query_engine(llm=LLM)._response_synthesizer,
    )
    with handler.attach(engine):
        with handler.collect() as ids:
            engine.query("both")
        engine.query("outside")
    assert [r["id"] for r in lines(handler)][:2] == ids
    assert queries(handler)[:2] == ["one", "two"]


def test_texts_are_written_once_across_restarts_and_changes(index, tmp_path):
    path = tmp_path / "traffic.jsonl"

    def texts(handler):
        return [text for r in lines(handler) for text in r.get("texts", {}).values()]

    retriever = index.as_retriever(similarity_top_k=4)
    for _ in range(2):
        handler = RetrievalHandler(path)
        with handler.attach(retriever):
            for number in range(3):
                retriever.retrieve(f"query {number}")
    assert sorted(texts(handler)) == sorted(TEXTS.values())

    changed = FixedRetriever([NodeWithScore(node=TextNode(id_="fee", text="new fee"), score=1)])
    with handler.attach(changed):
        changed.retrieve("query 0")
    assert sorted(texts(handler)) == sorted([*TEXTS.values(), "new fee"])

    path.rename(tmp_path / "rotated.jsonl")
    with handler.attach(retriever):
        retriever.retrieve("after the rotation")
        retriever.retrieve("again")
    assert sorted(texts(handler)) == sorted(TEXTS.values())


def _ask_and_mark(path, name):
    handler, retriever = RetrievalHandler(path), FixedRetriever()
    with handler.attach(retriever):
        for number in range(25):
            node = TextNode(id_=str(number), text=f"text {number} " * 500)
            retriever.nodes = [NodeWithScore(node=node, score=1.0)]
            retriever.retrieve(f"{name} {number}")
            handler.mark(handler.last_query_id, str(number))


def test_several_processes_write_one_journal(handler):
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_ask_and_mark, args=(handler.path, name)) for name in "abcd"
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    dataset = handler.to_dataset()
    assert len(dataset.queries) == 100
    assert all(
        dataset.relevant_docs[query] == [text.split()[1]] for query, text in dataset.queries.items()
    )


def test_a_mark_means_the_text_that_the_query_saw(handler):
    old = FixedRetriever([NodeWithScore(node=TextNode(id_="n", text="old text"), score=1)])
    new = FixedRetriever([NodeWithScore(node=TextNode(id_="n", text="new text"), score=1)])
    with handler.attach([old, new]):
        old.retrieve("before")
        handler.mark(handler.last_query_id, "n")
        new.retrieve("after")
        handler.mark(handler.last_query_id, "n")
    dataset = handler.to_dataset()
    by_text = {
        dataset.queries[query]: [dataset.corpus[document] for document in documents]
        for query, documents in dataset.relevant_docs.items()
    }
    assert by_text == {"before": ["old text"], "after": ["new text"]}
    assert dataset.corpus["n"] == "new text"


def test_equal_queries_merge_and_the_last_mark_counts(index, handler):
    retriever = index.as_retriever(similarity_top_k=4)
    with handler.attach(retriever):
        for _ in range(3):
            retriever.retrieve("late fee")
    first, second, third = handler.query_ids("late fee")
    handler.mark(first, "fee")
    handler.mark(first, "card")
    handler.mark(second, "card", relevant=False)
    handler.mark(third, "wifi")
    dataset = handler.to_dataset()
    assert dataset.queries == {first: "late fee"}
    assert set(dataset.relevant_docs[first]) == {"fee", "wifi"}
    assert handler.negatives() == {first: ["card"]}


def test_a_node_that_another_query_retrieved_can_be_marked(index, handler, caplog):
    retriever = index.as_retriever(similarity_top_k=1)
    with handler.attach(retriever):
        retriever.retrieve(TEXTS["hours"])
        retriever.retrieve(TEXTS["fee"])
    (query_id,) = handler.query_ids(TEXTS["fee"])
    handler.mark(query_id, "hours")
    handler.mark(query_id, "nowhere")
    handler.mark("unknown", "fee")
    with caplog.at_level(logging.WARNING):
        assert handler.to_dataset().relevant_docs == {query_id: ["hours"]}
    assert "'the node was never retrieved': 1" in caplog.text
    assert "'unknown query id': 1" in caplog.text


def test_assume_top_takes_only_queries_without_any_mark(index, handler):
    retriever = index.as_retriever(similarity_top_k=2)
    with handler.attach(retriever):
        retriever.retrieve(TEXTS["fee"])
        retriever.retrieve(TEXTS["card"])
        handler.mark(handler.last_query_id, "card", relevant=False)
        retriever.retrieve("nothing like it")
    (query_id,) = handler.query_ids(TEXTS["fee"])
    assert handler.to_dataset(assume_top=0.9).relevant_docs == {query_id: ["fee"]}
    with pytest.raises(DatasetError, match=r"scores 1\.5 or more; lower assume_top"):
        handler.to_dataset(assume_top=1.5)


def test_the_file_alone_is_enough(index, handler):
    retriever = index.as_retriever()
    with handler.attach(retriever):
        retriever.retrieve("late fee")
        handler.mark(handler.last_query_id, "fee")
    again = RetrievalHandler.read(handler.path)
    assert again.to_dataset() == handler.to_dataset()
    assert again.query_ids("late fee") == [handler.last_query_id]


def test_nothing_to_export_says_what_to_do(index, handler):
    with pytest.raises(DatasetError, match=r"traffic\.jsonl: no retrieval is recorded; attach"):
        handler.to_dataset()
    with handler.attach(index.as_retriever()) as attachment:
        attachment.components[0].retrieve("q")
    with pytest.raises(DatasetError, match="of 1 queries none has a node marked relevant; mark"):
        handler.to_dataset()
    assert handler.negatives() == {}


def test_blank_queries_and_nodes_are_not_exported(handler, caplog):
    nodes = [TextNode(id_="empty", text=" "), TextNode(id_="full", text="full")]
    retriever = FixedRetriever([NodeWithScore(node=node, score=None) for node in nodes])
    with handler.attach(retriever):
        retriever.retrieve("  ")
        retriever.retrieve("query")
    handler.mark(handler.last_query_id, "empty")
    handler.mark(handler.last_query_id, "full")
    dataset = handler.to_dataset()
    assert dataset.corpus == {"full": "full"}
    assert "'the node has no text': 1" in caplog.text


def test_redaction_comes_before_anything_is_written(tmp_path, index):
    def redact(text):
        return text.replace("euros", "***").replace("alice", "***")

    handler = RetrievalHandler(tmp_path / "t.jsonl", redact=redact)
    retriever = index.as_retriever(similarity_top_k=4)
    with handler.attach(retriever):
        retriever.retrieve("fee of alice")
        handler.mark(handler.last_query_id, "fee")
    content = handler.path.read_text()
    assert "euros" not in content
    assert "alice" not in content
    assert handler.query_ids("fee of alice") == [handler.last_query_id]
    assert handler.to_dataset().corpus["fee"] == "The late fee is five *** per week"


def test_a_redaction_that_fails_writes_nothing(tmp_path, index, caplog):
    handler = RetrievalHandler(tmp_path / "t.jsonl", redact=lambda text: 1 / 0)
    retriever = index.as_retriever()
    with handler.attach(retriever), caplog.at_level(logging.WARNING):
        assert len(retriever.retrieve("a")) == len(retriever.retrieve("b")) == 2
        assert handler.last_query_id is None
    assert not handler.path.exists()
    assert handler.failures == {"ZeroDivisionError": 2}
    assert len(caplog.records) == 1


def test_the_metadata_that_the_index_embeds_can_be_written(tmp_path):
    node = TextNode(id_="n", text="text", metadata={"title": "Fees"})
    retriever = FixedRetriever([NodeWithScore(node=node, score=1)])
    handler = RetrievalHandler(tmp_path / "t.jsonl", metadata_mode="embed")
    with handler.attach(retriever):
        retriever.retrieve("q")
    assert list(lines(handler)[0]["texts"].values()) == ["title: Fees\n\ntext"]
    with pytest.raises(ArgumentError, match="metadata_mode: 'all of it' is none of all, embed"):
        RetrievalHandler(tmp_path / "t.jsonl", metadata_mode="all of it")


def test_odd_scores_and_texts_are_recorded(handler):
    nodes = [TextNode(id_=str(i), text=text) for i, text in enumerate(["\ud800 é", "b", "c"])]
    scores = [np.float32(0.5), float("nan"), None]
    retriever = FixedRetriever(
        [NodeWithScore.model_construct(node=n, score=s) for n, s in zip(nodes, scores, strict=True)]
    )
    with handler.attach(retriever):
        retriever.retrieve("q \ud800")
    assert [score for _, _, score in lines(handler)[0]["nodes"]] == [0.5, None, None]
    assert not handler.failures


# --- Never break the app ----------------------------------------------------------------------


def test_the_error_of_the_host_is_the_very_same_and_not_recorded(handler):
    error = RuntimeError("the store is down")
    retriever = FixedRetriever(error=error)
    with handler.attach(retriever):
        for call in (retriever.retrieve, lambda q: asyncio.run(retriever.aretrieve(q))):
            with pytest.raises(RuntimeError) as caught:
                call("q")
            assert caught.value is error
    assert not handler.path.exists()
    assert not handler.failures


def test_a_failed_retrieval_leaves_no_stale_id(index, handler):
    good, bad = index.as_retriever(), FixedRetriever(error=RuntimeError())
    with handler.attach([good, bad]):
        good.retrieve("q")
        assert handler.last_query_id
        with pytest.raises(RuntimeError):
            bad.retrieve("q")
        assert handler.last_query_id is None


def test_a_journal_that_became_a_folder(index, handler, caplog):
    retriever = index.as_retriever()
    expected = [node.node_id for node in retriever.retrieve("q")]
    with handler.attach(retriever), caplog.at_level(logging.WARNING):
        handler.path.mkdir()
        for _ in range(3):
            assert [node.node_id for node in retriever.retrieve("q")] == expected
        handler.mark("q", "n")
    assert handler.failures == {f"IsADirectoryError {errno.EISDIR}": 4}
    assert len(caplog.records) == 1
    assert "RetrievalHandler lost a record; the app goes on" in caplog.text
    handler.path.rmdir()
    with handler.attach(retriever):
        retriever.retrieve("back again")
    assert queries(handler) == ["back again"]


def test_a_full_disk(index, handler, monkeypatch, caplog):
    retriever = index.as_retriever()
    with handler.attach(retriever), caplog.at_level(logging.WARNING):
        retriever.retrieve("before")
        before = handler.path.read_bytes()

        def full(descriptor, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            assert retriever.retrieve("lost")
            assert retriever.retrieve("lost too")
        assert handler.path.read_bytes() == before
        retriever.retrieve("after")
    assert queries(handler) == ["before", "after"]
    assert len(caplog.records) == 1
    assert handler.failures == {f"OSError {errno.ENOSPC}": 2}


def _under_a_size_limit(path, results):
    # In a process of its own: the limit holds for the whole process.
    nodes = [NodeWithScore(node=TextNode(text="x" * 600), score=1.0)]
    retriever, handler = FixedRetriever(nodes), RetrievalHandler(path)
    with handler.attach(retriever):
        retriever.retrieve("fits")
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100,) * 2)
        retriever.nodes = [NodeWithScore(node=TextNode(text="y" * 600), score=1.0)]
        results.put([len(retriever.retrieve("too long")), dict(handler.failures)])


def test_a_file_that_may_not_grow_keeps_its_last_whole_line(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    path = tmp_path / "t.jsonl"
    process = context.Process(target=_under_a_size_limit, args=(path, results))
    process.start()
    process.join(60)
    assert results.get(timeout=1) == [1, {f"OSError {errno.EFBIG}": 1}]
    assert [json.loads(line)["query"] for line in path.read_text().splitlines()] == ["fits"]


def test_a_broken_node_costs_one_record_and_nothing_else(index, handler):
    class BrokenNode(TextNode):
        def get_content(self, metadata_mode=None):
            raise TypeError("no content")

    broken = FixedRetriever([NodeWithScore(node=BrokenNode(text="x"), score=1.0)])
    whole = index.as_retriever()
    with handler.attach([broken, whole]):
        assert broken.retrieve("q")[0].node.text == "x"
        whole.retrieve("recorded")
    assert queries(handler) == ["recorded"]
    assert handler.failures == {"TypeError": 1}


def test_mark_never_raises(handler, caplog):
    with caplog.at_level(logging.WARNING):
        handler.mark(None, "node")
    assert "takes the ids as strings, not None" in caplog.text
    assert not handler.path.exists()


def test_two_handlers_on_one_retriever(index, tmp_path):
    one, two = (RetrievalHandler(tmp_path / name) for name in ("one", "two"))
    retriever = index.as_retriever()
    with one.attach(retriever):
        with two.attach(retriever):
            retriever.retrieve("both")
            assert one.last_query_id != two.last_query_id
        retriever.retrieve("one")
    assert (queries(one), queries(two)) == (["both", "one"], ["both"])


def test_memory_is_flat(handler):
    nodes = [NodeWithScore(node=TextNode(text="x" * 100), score=1.0)]
    retriever = FixedRetriever(nodes)
    with handler.attach(retriever):
        for _ in range(50):
            retriever.retrieve("warm up")
        tracemalloc.start()
        for number in range(500):
            retriever.retrieve(f"query {number}")
        grown, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert grown < 50_000


def test_the_known_texts_are_bounded(handler, monkeypatch):
    monkeypatch.setattr("ft_core.query_hook._MAX_TEXTS", 10)
    retriever = FixedRetriever()
    with handler.attach(retriever):
        for number in range(100):
            retriever.nodes = [NodeWithScore(node=TextNode(text=f"text {number}"), score=1.0)]
            retriever.retrieve("q")
    assert len(handler._written._digests) == 10


# --- Bad files --------------------------------------------------------------------------------


def test_a_folder_and_foreign_files_are_refused_and_left_alone(tmp_path):
    with pytest.raises(ArgumentError, match="is a folder"):
        RetrievalHandler(tmp_path)
    with pytest.raises(ArtifactError, match="no such journal"):
        RetrievalHandler.read(tmp_path / "missing.jsonl")
    foreign = tmp_path / "foreign.jsonl"
    for content in ('{"queries": {}}\n', '{\n "queries": {}\n}\n', "text\nmore\n", "[1]\n"):
        foreign.write_text(content)
        with pytest.raises(ArtifactError, match=r"foreign\.jsonl: .* name another file"):
            RetrievalHandler(foreign)
        assert foreign.read_text() == content


def test_a_torn_last_line_is_passed_over_and_healed(index, handler):
    retriever = index.as_retriever()
    with handler.attach(retriever):
        retriever.retrieve("whole")
        with open(handler.path, "a") as file:
            file.write('{"type":"retrieval","id":"x","que')
        assert handler.query_ids("whole")
        retriever.retrieve("late fee")
        handler.mark(handler.last_query_id, "fee")
    again = RetrievalHandler(handler.path)
    assert list(again.to_dataset().queries.values()) == ["late fee"]


def test_a_damaged_record_is_one_clear_error(index, handler):
    with handler.attach(index.as_retriever()) as attachment:
        attachment.components[0].retrieve("q")
    with open(handler.path, "a") as file:
        file.write('{"type":"retrieval","id":"x","query":"q","nodes":[["only an id"]]}\n')
    with pytest.raises(ArtifactError, match="holds a line that no RetrievalHandler wrote"):
        handler.to_dataset()
