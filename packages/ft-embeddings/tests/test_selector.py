"""`EmbeddingSelector`: the right choice, and how often the model is asked."""

import asyncio
import hashlib
import threading

import numpy as np
import pytest
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.base.response.schema import Response
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import CustomQueryEngine, RouterQueryEngine
from llama_index.core.selectors import EmbeddingSingleSelector
from llama_index.core.tools import QueryEngineTool, ToolMetadata
from pydantic import Field

from ft_core.choices import choice_text
from ft_core.errors import ArgumentError, FTError
from ft_embeddings.selector import EmbeddingSelector

CHOICES = [
    ToolMetadata(description="opening hours of the library", name="hours"),
    ToolMetadata(description="fees for books that are late", name="fees"),
    ToolMetadata(description="", name="lost card"),
]


class CountingEmbedding(BaseEmbedding):
    """Bag of hashed words that notes which texts and queries it was given."""

    texts: list[str] = Field(default_factory=list)
    queries: list[str] = Field(default_factory=list)

    def _vector(self, text):
        vector = np.zeros(4096)
        for word in text.lower().split():
            vector[int(hashlib.md5(word.encode()).hexdigest(), 16) % 4096] += 1
        return vector.tolist()

    def _get_query_embedding(self, query):
        self.queries.append(query)
        return self._vector(query)

    async def _aget_query_embedding(self, query):
        await asyncio.sleep(0)
        return self._get_query_embedding(query)

    def _get_text_embedding(self, text):
        self.texts.append(text)
        return self._vector(text)


@pytest.fixture
def model():
    return CountingEmbedding()


@pytest.mark.parametrize(
    ("query", "index"), [("late books", 1), ("library hours", 0), ("my card is lost", 2)]
)
def test_the_nearest_choice_is_selected(model, query, index):
    selector = EmbeddingSelector(model)
    result = selector.select(CHOICES, query)
    assert result.ind == index
    assert asyncio.run(selector.aselect(CHOICES, query)) == result
    assert f"Nearest to {CHOICES[index].name!r}: cosine similarity 0." in result.reason


def test_the_selection_equals_llama_indexes(model):
    choices = [choice.description or choice.name for choice in CHOICES]
    for query in ("late books", "library hours", "lost"):
        theirs = EmbeddingSingleSelector(model).select(choices, query)
        assert EmbeddingSelector(model).select(choices, query).inds == theirs.inds


def test_each_choice_is_embedded_once(model):
    choices = [f"choice number {number}" for number in range(150)]
    selector = EmbeddingSelector(model)
    for number in range(10):
        assert selector.select(choices, f"choice number {number}").ind == number
    assert (len(model.queries), len(model.texts)) == (10, 150)
    selector.select([*choices, "one more"], "q")
    assert model.texts[150:] == ["one more"]
    selector.clear_cache()
    selector.select(choices, "q")
    assert len(model.texts) == 301


def test_each_choice_is_embedded_once_by_many_tasks_and_threads(model):
    choices = [f"choice number {number}" for number in range(150)]
    selector = EmbeddingSelector(model)

    async def main():
        return await asyncio.gather(*(selector.aselect(choices, c) for c in choices[:50]))

    assert [result.ind for result in asyncio.run(main())] == list(range(50))
    assert (len(model.queries), len(model.texts)) == (50, 150)

    selector = EmbeddingSelector(model)
    threads = [threading.Thread(target=selector.select, args=(choices, "q")) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(model.queries), len(model.texts)) == (58, 300)


def test_the_cache_is_bounded_but_holds_the_choices_at_hand(model):
    selector = EmbeddingSelector(model, cache_size=4)
    few, many = ["a", "b"], ["c", "d", "e", "f", "g", "h"]
    selector.select(few, "q")
    for _ in range(3):
        selector.select(many, "q")
    assert model.texts == few + many
    assert set(selector._vectors) == set(many)
    selector.select(few, "q")
    assert len(selector._vectors) == 4


def test_several_are_selected_best_first(model):
    selector = EmbeddingSelector(model, top_k=2)
    assert selector.select(CHOICES, "fees for late books of the library").inds == [1, 0]
    assert selector.select(CHOICES[:1], "q").inds == [0]


def test_a_choice_may_have_several_example_texts(model):
    examples = {"hours": ["when do you open", "open on sunday"], "fees": ["what must I pay"]}
    selector = EmbeddingSelector(model, choice_text=lambda choice: examples[choice.name])
    assert selector.select(CHOICES[:2], "open on sunday").ind == 0
    assert selector.select(CHOICES[:2], "must I pay").ind == 1
    assert len(model.texts) == 3


class Named(CustomQueryEngine):
    name: str

    def custom_query(self, query_str):
        return Response(self.name)


def test_it_works_in_a_router_query_engine(model):
    tools = [QueryEngineTool(Named(name=choice.name), metadata=choice) for choice in CHOICES]
    router = RouterQueryEngine(EmbeddingSelector(model), tools, llm=MockLLM())
    assert str(router.query("late books")) == "fees"
    assert str(asyncio.run(router.aquery("lost card"))) == "lost card"
    assert router.query("hours").metadata["selector_result"].ind == 0
    assert router.get_prompts() is not None
    assert (len(model.queries), len(model.texts)) == (3, 3)


def test_the_text_of_a_choice():
    assert choice_text("text") == "text"
    assert choice_text(CHOICES[0]) == "opening hours of the library"
    assert choice_text(CHOICES[2]) == "lost card"


def test_bad_input_is_one_clear_error(model):
    selector = EmbeddingSelector(model)
    with pytest.raises(ArgumentError, match="choices: there is none to select from"):
        selector.select([], "q")
    with pytest.raises(ArgumentError, match="has neither a description nor a name"):
        selector.select(["fine", " "], "q")
    with pytest.raises(ArgumentError, match="top_k: is at least 1, not 0"):
        EmbeddingSelector(model, top_k=0)
    with pytest.raises(ArgumentError, match="choice_text: returns no text"):
        EmbeddingSelector(model, choice_text=lambda choice: []).select(CHOICES, "q")
    assert model.texts == []


def test_a_vector_that_is_not_finite_is_an_error(model):
    class Broken(CountingEmbedding):
        def _get_text_embedding(self, text):
            return [float("nan")] * 3 if "late" in text else [1.0, 0.0, 0.0]

    selector = EmbeddingSelector(Broken())
    with pytest.raises(FTError, match="of the choice 'fees for books that are late' is not fin"):
        selector.select(CHOICES, "q")
    with pytest.raises(FTError, match="query vector has 4096 dimensions, its text vectors 3"):
        selector.select(CHOICES[:1], "q")
    empty = EmbeddingSelector(model)
    assert empty.select(CHOICES, "").inds == [0]  # a zero vector ties with all: the first
