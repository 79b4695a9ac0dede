"""Judge answers by ragas; `test_ragas.py` runs this where ft-openai-distill[ragas] is installed.

The judge is no model: it reads the inputs of ragas's prompts and decides by the words in them,
so that the right scores are known.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.base.llms.types import CompletionResponse, LLMMetadata
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.llms.custom import CustomLLM
from llama_index.core.schema import TextNode

from ft_core.errors import ArgumentError
from ft_openai_distill.ragas_metrics import RagasSample, evaluate_ragas

WORDS = ["paris", "rome", "capital", "river", "seine", "tiber", "wine", "mountain"]
PARIS = "Paris is the capital of France. The river Seine flows through Paris."
WINE = "Wine is made in many places. Every mountain has its own."
QUESTION = "Which city is the capital, and which river is there?"
FAITHFUL = "Paris is the capital. The river Seine flows there."
HALF = "Paris is the capital. The river Tiber flows there."
REFERENCE = "The capital is Paris. The river is the Seine."


def words(text: str) -> set[str]:
    return {word for word in re.findall(r"\w+", text.lower()) if word in WORDS}


def sentences(text: str) -> list[str]:
    return [part.strip() for part in text.split(".") if part.strip()]


class WordVectors(BaseEmbedding):
    def _get_text_embedding(self, text: str) -> list[float]:
        return [float(word in words(text)) for word in WORDS] + [0.1]

    _get_query_embedding = _get_text_embedding

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


class Judge(CustomLLM):
    """Answers the prompts of ragas's four metrics by the words in them."""

    broken: int = 0
    """How many answers are no JSON, before they are."""
    down: bool = False

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(model_name="judge", is_chat_model=True)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        if self.down:
            raise RuntimeError("the judge is out")
        if self.broken:
            self.broken -= 1
            return CompletionResponse(text="I would rather not say.")
        schema, _, rest = prompt.partition("JSON Schema:\n")[2].partition("Do not use single")
        inputs = rest.partition("Now perform the same with the following input\ninput: ")[2]
        data = json.JSONDecoder().raw_decode(inputs.strip())[0]
        answer = self.answer(data, set(json.loads(schema)["properties"]))
        return CompletionResponse(text=f"Here it is:\n```json\n{json.dumps(answer)}\n```")

    def answer(self, data: dict[str, Any], wanted: set[str]) -> dict[str, Any]:
        reason = "by its words"
        if "response" in data:
            return {"question": data["response"], "noncommittal": 0}
        if "statements" in data:
            return {
                "statements": [
                    {"statement": s, "reason": reason, "verdict": int(words(s) <= words(context))}
                    for s in data["statements"]
                    if (context := data["context"])
                ]
            }
        if wanted == {"statements"}:
            return {"statements": sentences(data["answer"])}
        if "classifications" in wanted:
            return {
                "classifications": [
                    {
                        "statement": s,
                        "reason": reason,
                        "attributed": int(words(s) <= words(data["context"])),
                    }
                    for s in sentences(data["answer"])
                ]
            }
        useful = bool(words(data["answer"]) & words(data["context"]))
        return {"reason": reason, "verdict": int(useful)}

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        raise NotImplementedError


class Quoting(CustomLLM):
    """The app's LLM: answers the question about the context by heart."""

    says: str

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(model_name="quoting")

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        if "broken" in prompt:
            raise RuntimeError("the app is down")
        return CompletionResponse(text=self.says)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        yield CompletionResponse(text=self.says, delta=self.says)


def judge_samples() -> None:
    samples = [
        RagasSample(
            user_input=QUESTION,
            response=FAITHFUL,
            retrieved_contexts=[PARIS, WINE],
            reference=REFERENCE,
        ),
        {
            "user_input": QUESTION,
            "response": HALF,
            "retrieved_contexts": [WINE, PARIS],
            "reference": "The capital is Paris. The river is the Tiber.",
        },
        {
            "user_input": QUESTION,
            "response": "Wine.",
            "retrieved_contexts": [WINE],
            "reference": REFERENCE,
        },
    ]
    report = evaluate_ragas(samples, Judge(), WordVectors())
    run = report.runs[0]
    close(run.scores["faithfulness"], [1, 0.5, 1])
    close(run.scores["context_precision"], [1, 0.5, 0])
    close(run.scores["context_recall"], [1, 0.5, 0])
    relevancy = run.scores["answer_relevancy"]
    assert relevancy["1"] > 0.7 > 0.3 > relevancy["3"], relevancy
    assert report.to_dict()["runs"][0]["metrics"]["faithfulness"]["n"] == 3

    from ragas.dataset_schema import SingleTurnSample

    theirs = SingleTurnSample(user_input=QUESTION, response=HALF, retrieved_contexts=[PARIS])
    report = evaluate_ragas([theirs], Judge(broken=2), metrics=["faithfulness"], num_workers=1)
    close(report.runs[0].scores["faithfulness"], [0.5])


def judge_engines() -> None:
    index = VectorStoreIndex([TextNode(text=PARIS), TextNode(text=WINE)], embed_model=WordVectors())
    engines = {
        name: index.as_query_engine(llm=Quoting(says=says), similarity_top_k=1)
        for name, says in (("base", HALF), ("student", FAITHFUL))
    }
    questions = [f"{QUESTION} ({number})" for number in range(12)]
    report = evaluate_ragas(
        questions,
        Judge(),
        WordVectors(),
        query_engine=engines,
        references=[REFERENCE] * 12,
    )
    assert report.baseline.name == "base"
    assert report.primary == "faithfulness"
    assert report.outcome("student") == "better", report.verdict("student")
    assert "student is better than base in faithfulness: +0.500" in report.verdict("student")

    report = evaluate_ragas(
        [QUESTION, "broken capital?"],
        Judge(),
        query_engine=engines["student"],
        metrics=["faithfulness"],
    )
    run = report.runs[0]
    assert run.failures == {"2": "RuntimeError: the app is down"}, run.failures
    close(run.scores["faithfulness"], [1, 0])


def name_what_fails() -> None:
    sample = {"user_input": QUESTION, "response": HALF, "retrieved_contexts": [PARIS]}
    refused([sample], Judge(down=True), "gave no verdict", metrics=["faithfulness"])
    refused([sample], Judge(broken=99), "gave no verdict", metrics=["faithfulness"])
    refused([sample], Judge(), "context_recall needs a reference", metrics=["context_recall"])
    refused([sample], Judge(), "embed_model: answer_relevancy needs one")
    refused([QUESTION], Judge(), "texts alone need a query_engine", metrics=["faithfulness"])

    silent = {**sample, "response": ""}
    refused([silent], Judge(), "needs a response", metrics=["faithfulness"])
    report = evaluate_ragas(
        [sample, {**sample, "response": "..."}], Judge(), metrics=["faithfulness"]
    )
    run = report.runs[0]
    close(run.scores["faithfulness"], [0.5])
    assert run.unscored == {"faithfulness": {"2": "ragas found nothing to judge"}}, run.unscored
    assert any("1 of 2 answers could not be judged" in note for note in report.notes())


def close(scores: dict[str, float], expected: list[float]) -> None:
    assert len(scores) == len(expected), scores
    for score, value in zip(scores.values(), expected, strict=True):
        assert abs(score - value) < 1e-6, scores


def refused(samples: list[Any], judge: Judge, message: str, **arguments: Any) -> None:
    said = ""
    try:
        evaluate_ragas(samples, judge, **arguments)
    except ArgumentError as error:
        said = str(error)
    assert message in said, said or "was not refused"


if __name__ == "__main__":
    os.environ.pop("RAGAS_DO_NOT_TRACK", None)
    judge_samples()
    judge_engines()
    name_what_fails()

    from ragas._analytics import do_not_track

    assert do_not_track(), "ragas reports to its makers"
