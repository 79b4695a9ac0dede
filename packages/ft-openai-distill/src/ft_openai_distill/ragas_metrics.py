"""Judge RAG answers by ragas, with an LLM and an embedding model of LlamaIndex.

report = evaluate_ragas(
    questions, query_engine={"base": base, "student": student}, references=references,
    llm=judge, embed_model=embedding,
)

ragas comes with `pip install 'ft-openai-distill[ragas]'`. It sends what it is used for to its
makers unless `RAGAS_DO_NOT_TRACK` is `true`; here it is set to that, unless it is set already.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ft_core import files
from ft_core.errors import ArgumentError
from ft_core.evaluation import AnswerEvaluation, in_order
from ft_core.extras import import_extra
from ft_core.generation.failures import describe
from ft_core.progress import progress
from ft_core.report import AnswerReport
from ft_openai_distill.answering import response_text

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.llms import LLM

EXTRA = "ft-openai-distill[ragas]"

DEFAULT_METRICS = ("faithfulness", "answer_relevancy", "context_precision", "context_recall")

_TRIES = 3  # for an answer of the judge that is not the JSON that was asked for


class RagasSample(BaseModel):
    """One question with what was retrieved and answered; the names are ragas's."""

    model_config = ConfigDict(extra="ignore")  # ragas's own samples have more

    user_input: str
    """The question."""
    response: str = ""
    """The answer to judge."""
    retrieved_contexts: list[str] = []
    """The texts that the answer rests on, the best first."""
    reference: str | None = None
    """The right answer."""


@dataclass(frozen=True)
class _Metric:
    kind: str
    """Its class in `ragas.metrics.collections`."""
    needs: tuple[str, ...]
    """Fields of a sample, which are its arguments."""
    embeds: bool = False


_METRICS = {
    "faithfulness": _Metric("Faithfulness", ("user_input", "response", "retrieved_contexts")),
    "answer_relevancy": _Metric("AnswerRelevancy", ("user_input", "response"), embeds=True),
    "context_precision": _Metric(
        "ContextPrecision", ("user_input", "reference", "retrieved_contexts")
    ),
    "context_recall": _Metric("ContextRecall", ("user_input", "retrieved_contexts", "reference")),
}


def evaluate_ragas(
    samples: Sequence[Any],
    llm: LLM,
    embed_model: BaseEmbedding | None = None,
    *,
    query_engine: Any = None,
    references: Sequence[str | None] | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    name: str = "answers",
    num_workers: int = 4,
    show_progress: bool = True,
    seed: int = 0,
) -> AnswerReport:
    """Return what ragas's metrics say of RAG answers, each from 0 to 1.

    `faithfulness`: the share of an answer's claims that the contexts support.
    `answer_relevancy`: how near the questions that the answer would answer are to the one
    that was asked. `context_precision`: how high the useful contexts stand among those
    retrieved. `context_recall`: the share of the reference that the contexts support.

    A query that fails, or comes back empty where a metric needs something, scores 0. Where
    the judge fails or has nothing to say there is no score; the report names both.

    Args:
        samples: `RagasSample`s, dicts or ragas's own samples; with a `query_engine`, the
            questions as texts.
        llm: the judge.
        embed_model: for `answer_relevancy`.
        query_engine: asks the questions; or name to several of them, the first being the
            baseline that the others are tested against.
        references: the right answers, one a question, None where there is none; for the
            metrics of the contexts.
        metrics: which of the four.
        name: of the run in the report, where there is no mapping of query engines.
        num_workers: how many questions are asked or judged at the same time.
        show_progress: show bars on stderr where that is a terminal.
        seed: of the intervals and the tests.

    Raises:
        MissingExtraError: ragas is not installed.
        ArgumentError: an argument that cannot be used, or a sample without what a metric needs.
    """
    _check_metrics(metrics, embed_model)
    if num_workers < 1:
        raise ArgumentError("num_workers", f"must be at least 1, not {num_workers}")
    judges = _judges(metrics, llm, embed_model)
    given = _samples(samples, references, asks=query_engine is not None)
    _check_needs(given, metrics, answered=query_engine is None)
    runs: list[AnswerEvaluation] = []
    for run, engine in _engines(query_engine, name).items():
        start = time.perf_counter()
        answered: list[RagasSample | str] = list(given)
        if engine is not None:
            replies = in_order(partial(_asked, engine), given, num_workers)
            answered = list(progress(replies, f"{run}: answers", len(given), show_progress))
        judged = in_order(partial(_judged, judges), answered, num_workers)
        verdicts = list(progress(judged, f"{run}: ragas", len(given), show_progress))
        runs.append(_evaluation(run, given, answered, verdicts, time.perf_counter() - start))
    return AnswerReport(
        runs,
        {str(number): sample.user_input for number, sample in enumerate(given, 1)},
        {str(n): sample.reference for n, sample in enumerate(given, 1) if sample.reference},
        title="Answers judged by ragas",
        seed=seed,
    )


Verdict = float | str
"""A score, or why there is none."""


def _judged(
    judges: Mapping[str, Callable[[RagasSample], Verdict]], answered: RagasSample | str
) -> dict[str, Verdict]:
    """Return metric to verdict on one answer, or 0 everywhere for a query that failed."""
    if isinstance(answered, str):
        return dict.fromkeys(judges, 0.0)
    return {metric: judge(answered) for metric, judge in judges.items()}


def _judges(
    metrics: Sequence[str], llm: LLM, embed_model: BaseEmbedding | None
) -> dict[str, Callable[[RagasSample], Verdict]]:
    ragas_llm, ragas_embedding = _adapters()
    collections = _import_ragas("ragas.metrics.collections")
    judges: dict[str, Callable[[RagasSample], Verdict]] = {}
    for metric in metrics:
        spec = _METRICS[metric]
        parts = {"llm": ragas_llm(llm)}
        if spec.embeds:
            parts["embeddings"] = ragas_embedding(embed_model)
        scorer = getattr(collections, spec.kind)(**parts)
        judges[metric] = partial(_score, scorer, spec.needs)
    return judges


def _score(scorer: Any, needs: Sequence[str], sample: RagasSample) -> Verdict:
    values = {field: getattr(sample, field) for field in needs}
    if not all(values.values()):
        return 0.0  # an empty answer, or nothing retrieved: ragas would refuse it
    try:
        # A coroutine wants a loop of its own, and this thread may run one already: a notebook's.
        with ThreadPoolExecutor(1) as thread:
            result = thread.submit(asyncio.run, scorer.ascore(**values)).result()
        value = float(result.value)
    except Exception as error:
        return describe(error)
    return value if math.isfinite(value) else "ragas found nothing to judge"


def _asked(engine: Any, sample: RagasSample) -> RagasSample | str:
    """Return the sample with the engine's answer, or the error of a query that failed."""
    try:
        response = engine.query(sample.user_input)
        text = response_text(response)
        contexts = [node.get_content() for node in getattr(response, "source_nodes", ())]
    except Exception as error:
        return describe(error)
    return sample.model_copy(update={"response": text, "retrieved_contexts": contexts})


def _evaluation(
    name: str,
    given: Sequence[RagasSample],
    answered: Sequence[RagasSample | str],
    verdicts: Sequence[Mapping[str, Verdict]],
    seconds: float,
) -> AnswerEvaluation:
    scores: dict[str, dict[str, float]] = {}
    unscored: dict[str, dict[str, str]] = {}
    for number, verdict in enumerate(verdicts, 1):
        for metric, value in verdict.items():
            if isinstance(value, str):
                unscored.setdefault(metric, {})[str(number)] = value
            else:
                scores.setdefault(metric, {})[str(number)] = value
    if not scores:
        reason = next(iter(next(iter(unscored.values())).values()))
        raise ArgumentError("llm", f"gave no verdict on any answer of {name}: {reason}")
    replies = dict(enumerate(answered, 1))
    return AnswerEvaluation(
        name=name,
        dataset_hash=files.content_hash([[s.user_input, s.reference] for s in given]),
        scores=scores,
        seconds=seconds,
        answers={str(n): "" if isinstance(s, str) else s.response for n, s in replies.items()},
        failures={str(n): s for n, s in replies.items() if isinstance(s, str)},
        unscored=unscored,
    )


def _samples(
    samples: Sequence[Any], references: Sequence[str | None] | None, *, asks: bool
) -> list[RagasSample]:
    if isinstance(samples, str):
        raise ArgumentError("samples", "is one text; give a list")
    result = []
    for number, sample in enumerate(samples, 1):
        if isinstance(sample, str) and asks:
            sample = {"user_input": sample}
        content = sample.model_dump() if isinstance(sample, BaseModel) else sample
        if isinstance(content, Mapping):  # ragas's own have None where there is nothing
            content = {key: value for key, value in content.items() if value is not None}
        try:
            result.append(RagasSample.model_validate(content))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "it"
            hint = "" if asks else "; texts alone need a query_engine"
            raise ArgumentError(
                "samples", f"number {number}: {place}: {first['msg']}{hint}"
            ) from None
    if not result:
        raise ArgumentError("samples", "is empty; give at least one")
    if references is None:
        return result
    if isinstance(references, str) or len(references) != len(result):
        raise ArgumentError(
            "references", f"has {len(references)} for {len(result)} samples; give one each"
        )
    return [
        sample.model_copy(update={"reference": text})
        for sample, text in zip(result, references, strict=True)
    ]


def _check_metrics(metrics: Sequence[str], embed_model: Any) -> None:
    if isinstance(metrics, str) or not metrics:
        raise ArgumentError("metrics", f"name some of {', '.join(_METRICS)} in a list")
    for metric in metrics:
        if metric not in _METRICS:
            raise ArgumentError("metrics", f"{metric!r} is none of {', '.join(_METRICS)}")
        if _METRICS[metric].embeds and embed_model is None:
            raise ArgumentError("embed_model", f"{metric} needs one; give it, or leave that out")


def _check_needs(samples: Sequence[RagasSample], metrics: Sequence[str], *, answered: bool) -> None:
    """Refuse samples that lack what a metric needs before any is judged."""
    by_user = {"user_input", "reference"}
    for metric in metrics:
        for field in _METRICS[metric].needs:
            if field not in by_user and not answered:
                continue  # the query engine brings it
            for number, sample in enumerate(samples, 1):
                if not getattr(sample, field):
                    raise ArgumentError(
                        "references" if field == "reference" else "samples",
                        f"{metric} needs a {field} in each sample, and number {number} has "
                        "none; give it, or leave out the metric",
                    )


def _engines(query_engine: Any, name: str) -> dict[str, Any]:
    engines = query_engine if isinstance(query_engine, Mapping) else {name: query_engine}
    if not engines:
        raise ArgumentError("query_engine", "is an empty mapping; name at least one")
    for run, engine in engines.items():
        if engine is not None and not hasattr(engine, "query"):
            kind = type(engine).__name__
            raise ArgumentError("query_engine", f"{run}: {kind} is not a query engine")
    return dict(engines)


def _import_ragas(module: str) -> Any:
    os.environ.setdefault("RAGAS_DO_NOT_TRACK", "true")
    return import_extra(module, EXTRA)


@cache
def _adapters() -> tuple[type, type]:
    """Return the classes that make LlamaIndex's models ragas's.

    ragas has wrappers of its own for LlamaIndex, but they are deprecated and its present
    metrics refuse them: these take only what derives from the two base classes here.
    """
    llms = _import_ragas("ragas.llms.base")
    embeddings = _import_ragas("ragas.embeddings.base")

    class LlamaIndexRagasLLM(llms.InstructorBaseRagasLLM):  # type: ignore[name-defined]
        def __init__(self, llm: LLM) -> None:
            self._llm = llm

        def generate(self, prompt: str, response_model: type[BaseModel]) -> BaseModel:
            return _generate(self._llm, prompt, response_model)

        async def agenerate(self, prompt: str, response_model: type[BaseModel]) -> BaseModel:
            # Not awaited: each judgement has a thread to itself, and a client of the app's
            # own loop could not be used on another one.
            return _generate(self._llm, prompt, response_model)

    class LlamaIndexRagasEmbedding(embeddings.BaseRagasEmbedding):  # type: ignore[name-defined]
        def __init__(self, model: BaseEmbedding) -> None:
            super().__init__()
            self._model = model

        def embed_text(self, text: str, **kwargs: Any) -> list[float]:
            # What is compared are questions, the user's and those that the judge thinks of.
            vector: list[float] = self._model.get_query_embedding(text)
            return vector

        async def aembed_text(self, text: str, **kwargs: Any) -> list[float]:
            return self.embed_text(text)

    return LlamaIndexRagasLLM, LlamaIndexRagasEmbedding


def _generate(llm: LLM, prompt: str, response_model: type[BaseModel]) -> BaseModel:
    """Return the judge's answer to a prompt of ragas, which holds the JSON schema."""
    from llama_index.core.base.llms.types import ChatMessage, MessageRole
    from llama_index.core.output_parsers import PydanticOutputParser

    parser = PydanticOutputParser(response_model)
    messages = [ChatMessage(role=MessageRole.USER, content=prompt)]
    for left in reversed(range(_TRIES)):
        text = llm.chat(messages).message.content or ""
        try:
            result: BaseModel = parser.parse(text)
        except ValueError as error:
            if not left:
                raise
            messages += [
                ChatMessage(role=MessageRole.ASSISTANT, content=text),
                ChatMessage(
                    role=MessageRole.USER,
                    content=f"That is not valid: {error}\nAnswer again, in valid JSON alone.",
                ),
            ]
        else:
            return result
    raise AssertionError  # the last try returns or raises
