"""`CrossEncoderSelector`: the choice with the best score, alone and in a router."""

import asyncio

import numpy as np
import pytest
from llama_index.core.base.response.schema import Response
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import CustomQueryEngine, RouterQueryEngine
from llama_index.core.tools import QueryEngineTool, ToolMetadata

from ft_core.errors import ArgumentError
from ft_crossencoder import CrossEncoderSelector, FinetunedReranker

CHOICES = [
    ToolMetadata(description="harbour opens at dawn", name="hours"),
    ToolMetadata(description="late fee for a book a week", name="fees"),
    ToolMetadata(description="", name="lost card"),
    ToolMetadata(description="museum ticket price", name="price"),
]
TEXTS = ["harbour opens at dawn", "late fee for a book a week", "lost card", "museum ticket price"]
QUERIES = ["lost card", "museum", "when does the harbour open", "fee fee fee"]


@pytest.mark.parametrize("query", QUERIES)
def test_the_best_score_is_selected(cross_encoder, query):
    scores = cross_encoder.predict([(query, text) for text in TEXTS])
    selector = CrossEncoderSelector(cross_encoder)
    result = selector.select(CHOICES, query)
    assert result.ind == int(np.argmax(scores))
    assert result.reason.endswith(f"the score {scores.max():.3f}")
    assert repr(CHOICES[result.ind].name) in result.reason
    assert asyncio.run(selector.aselect(CHOICES, query)) == result


def test_several_are_selected_best_first(cross_encoder):
    scores = cross_encoder.predict([("museum", text) for text in TEXTS])
    order = np.argsort(-scores).tolist()
    assert CrossEncoderSelector(cross_encoder, top_k=3).select(CHOICES, "museum").inds == order[:3]
    assert CrossEncoderSelector(cross_encoder, top_k=9).select(CHOICES, "museum").inds == order
    middle = float(scores[order[1]] + scores[order[2]]) / 2
    selector = CrossEncoderSelector(cross_encoder, top_k=3, threshold=middle)
    assert selector.select(CHOICES, "museum").inds == order[:2]
    # A router needs one, however low its score.
    strict = CrossEncoderSelector(cross_encoder, top_k=3, threshold=2.0)
    assert strict.select(CHOICES, "museum").inds == order[:1]


def test_of_several_examples_the_best_counts(cross_encoder):
    examples = {"a": ["harbour"], "b": ["gates at dawn", "lost card", "bell"], "c": ["river", "x"]}
    flat = [(name, text) for name, texts in examples.items() for text in texts]
    scores = cross_encoder.predict([("lost", text) for _, text in flat])
    best = flat[int(np.argmax(scores))][0]
    selector = CrossEncoderSelector(cross_encoder, choice_text=lambda choice: examples[choice.name])
    choices = [ToolMetadata(description="-", name=name) for name in examples]
    assert choices[selector.select(choices, "lost").ind].name == best


def test_in_a_router(cross_encoder):
    class Named(CustomQueryEngine):
        name: str

        def custom_query(self, query_str):
            return Response(response=self.name)

    tools = [
        QueryEngineTool.from_defaults(Named(name=text), name=f"tool{i}", description=text)
        for i, text in enumerate(TEXTS)
    ]
    selector = CrossEncoderSelector(FinetunedReranker(cross_encoder).scorer)
    router = RouterQueryEngine(selector, tools, llm=MockLLM())
    for query in QUERIES:
        scores = cross_encoder.predict([(query, text) for text in TEXTS])
        assert str(router.query(query)) == TEXTS[int(np.argmax(scores))]
        assert str(asyncio.run(router.aquery(query))) == TEXTS[int(np.argmax(scores))]


def test_bad_arguments(cross_encoder):
    with pytest.raises(ArgumentError, match="top_k: is at least 1"):
        CrossEncoderSelector(cross_encoder, top_k=0)
    with pytest.raises(ArgumentError, match="max_tokens: is a setting of the PairScorer"):
        CrossEncoderSelector(CrossEncoderSelector(cross_encoder).scorer, max_tokens=3)
    selector = CrossEncoderSelector(cross_encoder)
    with pytest.raises(ArgumentError, match="choices: there is none"):
        selector.select([], "q")
    with pytest.raises(ArgumentError, match="has neither a description nor a name"):
        selector.select([ToolMetadata(description="", name=None)], "q")
