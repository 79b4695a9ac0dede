from __future__ import annotations

from pathlib import Path

import pytest
from llama_index.core import SummaryIndex
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RouterQueryEngine
from llama_index.core.schema import TextNode
from llama_index.core.tools import QueryEngineTool, ToolMetadata

from ft_core.errors import ArgumentError, ArtifactError
from ft_embeddings import RouterFinetuneEngine, SentenceTransformersFinetuneEngine

CHOICES = [
    ToolMetadata(name="opens", description="gates unlocked by the keeper at dawn"),
    ToolMetadata(name="costs", description="ticket price in coins for adults"),
    ToolMetadata(name="closes", description="doors barred when the bell rings"),
]
PLACES = ["harbour", "tower", "garden", "station", "market", "library"]
EXAMPLES = {
    name: [f"when the {p} {name}" for p in PLACES[:4]] for name in ("opens", "costs", "closes")
}
HELDOUT = {
    name: [f"the {p} {name} when" for p in PLACES[4:]] for name in ("opens", "costs", "closes")
}
QUICK = {"epochs": 30, "learning_rate": 5e-3, "batch_size": 2}


def test_a_trained_router_sends_questions_to_the_right_tool(
    tiny_model: str, tmp_path: Path
) -> None:
    engine = RouterFinetuneEngine(
        CHOICES, EXAMPLES, tiny_model, str(tmp_path / "router"), val_examples=HELDOUT, **QUICK
    )
    report = engine.finetune()
    assert report is not None
    assert report.primary == "hit_rate@1"
    assert report.runs[1].mean("hit_rate@1") == 1.0

    selector = RouterFinetuneEngine.load(tmp_path / "router").get_finetuned_model()
    tools = [
        QueryEngineTool(
            SummaryIndex([TextNode(text=f"answer of {choice.name}")]).as_query_engine(
                llm=MockLLM()
            ),
            metadata=choice,
        )
        for choice in CHOICES
    ]
    router = RouterQueryEngine(selector=selector, query_engine_tools=tools, llm=MockLLM())
    for name, questions in HELDOUT.items():
        for question in questions:
            answer = router.query(question)
            assert answer.source_nodes[0].text == f"answer of {name}"


def test_tools_themselves_are_choices_too(tiny_model: str, tmp_path: Path) -> None:
    tools = [
        QueryEngineTool(SummaryIndex([]).as_query_engine(llm=MockLLM()), metadata=choice)
        for choice in CHOICES
    ]
    engine = RouterFinetuneEngine(
        tools, EXAMPLES, tiny_model, str(tmp_path / "router"), epochs=1, batch_size=2
    )
    engine.finetune()
    assert engine.get_finetuned_model().select(CHOICES, "when").ind in range(3)


def test_a_router_folder_is_no_embedding_folder(tiny_model: str, tmp_path: Path) -> None:
    RouterFinetuneEngine(
        CHOICES, EXAMPLES, tiny_model, str(tmp_path / "router"), epochs=1, batch_size=2
    ).finetune()
    with pytest.raises(ArtifactError, match="holds a router, not a sentence-transformer"):
        SentenceTransformersFinetuneEngine.load(tmp_path / "router")


def test_bad_input_is_named() -> None:
    with pytest.raises(ArgumentError, match="examples: 'shuts' is not the name of a choice"):
        RouterFinetuneEngine(CHOICES, {"shuts": ["when"]})
    with pytest.raises(ArgumentError, match="two choices read 'same'"):
        RouterFinetuneEngine(["same", "same"], {"same": ["q"]})
    with pytest.raises(ArgumentError, match="neither a description nor a name"):
        RouterFinetuneEngine(["", "b"], {"b": ["q"]})
    with pytest.raises(Exception, match="examples: queries: has no query"):
        RouterFinetuneEngine(CHOICES, {})
