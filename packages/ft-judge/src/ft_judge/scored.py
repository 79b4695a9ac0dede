"""Judges that weigh all verdicts in place of writing one: never unreadable, with probabilities.

A model that gives its verdict alone has few answers to choose from. It is asked how probable each
of them is behind the prompt; the most probable is the verdict.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.evaluation import (
    BaseEvaluator,
    CorrectnessEvaluator,
    EvaluationResult,
    PairwiseComparisonEvaluator,
)
from llama_index.core.evaluation.pairwise import EvaluationSource
from llama_index.core.llms import LLM

from ft_core.errors import ArgumentError
from ft_core.onednn import quick_products
from ft_core.sft.chat_format import ChatFormat
from ft_core.sft.models import context_window, keeps_positions
from ft_judge.judging import most_probable
from ft_judge.prompts import NO_REFERENCE, VERDICTS
from ft_judge.recipe import JudgeRecord


class ScoredResult(EvaluationResult):
    """An `EvaluationResult` with how sure the judge is."""

    probability: float
    """Of pairs, that the first answer is better, half a tie included; of correctness, that the
    score is right."""
    probabilities: dict[str, float]
    """Every answer that the judge could give to its probability; their sum is 1."""

    @property
    def tie(self) -> float:
        """Of pairs, the probability of a tie."""
        return self.probabilities.get(_TIE, 0.0)


def compared(
    query: str, score: float, probability: float, probabilities: dict[str, float]
) -> ScoredResult:
    """Return the result of a comparison: 1 where the first answer is better, 0, or 0.5, a tie."""
    mark = VERDICTS[score]
    return ScoredResult(
        query=query,
        response=mark,
        passing={1.0: True, 0.0: False}.get(score),
        score=score,
        feedback=mark,
        pairwise_source=EvaluationSource.ORIGINAL,
        probability=probability,
        probabilities=probabilities,
    )


class GradingEvaluator(CorrectnessEvaluator):
    """Grades an answer by the probabilities that `_grades` finds for the grades."""

    async def aevaluate(
        self,
        query: str | None = None,
        response: str | None = None,
        contexts: Sequence[str] | None = None,
        reference: str | None = None,
        sleep_time_in_seconds: int = 0,
        **kwargs: Any,
    ) -> ScoredResult:
        """Grade an answer; `contexts` and further arguments are not looked at.

        Raises:
            ValueError: `query` or `response` is missing.
        """
        if query is None or response is None:
            raise ValueError("query and response must be provided")
        await asyncio.sleep(sleep_time_in_seconds)
        grades = await asyncio.to_thread(self._grades, query, response, reference)
        grade = max(grades, key=lambda answer: grades[answer])
        return ScoredResult(
            query=query,
            response=response,
            passing=float(grade) >= self._score_threshold,
            score=float(grade),
            feedback=grade,
            probability=grades[grade],
            probabilities=grades,
        )

    def _grades(self, query: str, response: str, reference: str | None) -> dict[str, float]:
        """Return each grade with its probability; their sum is 1."""
        raise NotImplementedError


class AnswerScorer:
    """Says how probable each of some answers of a model is.

    The prompt is read once. The answers are tokenized as in training, with the token that ends
    them.

    Args:
        model: a causal language model of transformers or peft.
        tokenizer: with a chat template.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model = model
        self._format = ChatFormat(tokenizer)
        self._window = context_window(model)
        self._last_only = {"logits_to_keep": 1} if keeps_positions(model) else {}
        self._lock = threading.Lock()

    def probabilities(
        self, messages: Sequence[Mapping[str, Any]], answers: Sequence[str]
    ) -> dict[str, float]:
        """Return each answer's probability among them, given a conversation.

        Args:
            messages: with role and content, the last one the user's.
            answers: at least two, all different.

        Raises:
            ArgumentError: the conversation is longer than the model's window.
        """
        import torch

        rows = [
            self._format.tokens([*messages, {"role": "assistant", "content": answer}])[-1].input_ids
            for answer in answers
        ]
        longest = max(map(len, rows))
        if longest > self._window:
            raise ArgumentError(
                "messages", f"take {longest} tokens, and the model has a window of {self._window}"
            )
        shared = _shared(rows)
        with self._lock, torch.inference_mode(), quick_products(self._model.device):
            logprobs = self._logprobs(rows, shared)
        return dict(zip(answers, torch.softmax(logprobs, dim=0).tolist(), strict=True))

    def _logprobs(self, rows: list[list[int]], shared: int) -> Any:
        """Return the log-probability of what follows the shared beginning, [answers]."""
        import torch

        device = self._model.device
        start = torch.tensor([rows[0][:shared]], device=device)
        read = self._model(input_ids=start, use_cache=True, **self._last_only)
        first = torch.log_softmax(read.logits[0, -1].double(), dim=-1)
        total = first[torch.tensor([row[shared] for row in rows], device=device)]
        rests = [row[shared:] for row in rows]
        length = max(map(len, rests))
        if length == 1:
            return total
        padded = torch.tensor([row + [0] * (length - len(row)) for row in rests], device=device)
        logits = self._continued(read.past_key_values, start, padded[:, :-1])
        chosen = torch.log_softmax(logits.double(), dim=-1)
        chosen = chosen.gather(2, padded[:, 1:, None])[:, :, 0]
        # What pads a row stands behind it, where no token of it can see it.
        real = torch.tensor([[at < len(row) for at in range(1, length)] for row in rests])
        return total + (chosen * real.to(device)).sum(dim=1)

    def _continued(self, cache: Any, start: Any, rest: Any) -> Any:
        """Return the logits at the tokens of `rest`, [answers, tokens, vocabulary]."""
        import torch

        count = len(rest)
        if hasattr(cache, "batch_repeat_interleave"):
            try:
                cache.batch_repeat_interleave(count)
            except (AttributeError, NotImplementedError):  # layers that keep another state
                pass
            else:
                return self._model(input_ids=rest, past_key_values=cache, use_cache=True).logits
        whole = torch.cat([start.expand(count, -1), rest], dim=1)
        return self._model(input_ids=whole).logits[:, start.shape[1] :]


class _Scored:
    """What both evaluators share: a prompt, some answers, and the model that weighs them."""

    _eval_template: Any
    _llm: Any

    def _takes(self, record: JudgeRecord, scorer: AnswerScorer) -> None:
        self._answers = list(record.answers)
        self._scorer = scorer

    def _weighed(self, variables: Mapping[str, str]) -> dict[str, float]:
        messages = self._eval_template.format_messages(llm=self._llm, **variables)
        told = [{"role": m.role.value, "content": m.content or ""} for m in messages]
        return self._scorer.probabilities(told, self._answers)


class LocalJudgePairwiseEvaluator(_Scored, PairwiseComparisonEvaluator):
    """Compares two answers by how probable each verdict is to a model on this machine.

    The result is a `ScoredResult`.

    Args:
        record: the prompt, and what may be answered.
        llm: the model as LlamaIndex knows it.
        scorer: the same model, weighing.
        enforce_consensus: average the probabilities over both orders of the answers: then the
            order cannot matter.
    """

    def __init__(
        self,
        record: JudgeRecord,
        llm: LLM,
        scorer: AnswerScorer,
        *,
        enforce_consensus: bool = True,
    ) -> None:
        super().__init__(
            llm=llm, eval_template=record.template, enforce_consensus=enforce_consensus
        )
        self._takes(record, scorer)

    async def _get_eval_result(
        self, query: str, response: str, second_response: str, reference: str | None
    ) -> ScoredResult:
        variables = {
            "query": query,
            "reference": reference or "",
            "answer_1": response,
            "answer_2": second_response,
        }
        return _compared(query, await asyncio.to_thread(self._weighed, variables))

    async def _resolve_results(
        self, eval_result: ScoredResult, flipped_eval_result: ScoredResult
    ) -> ScoredResult:
        other = flipped_eval_result.probabilities
        mean = {
            mark: (probability + other[_MIRRORED[mark]]) / 2
            for mark, probability in eval_result.probabilities.items()
        }
        return _compared(eval_result.query or "", mean)


class LocalJudgeCorrectnessEvaluator(_Scored, GradingEvaluator):
    """Grades an answer by how probable each grade is to a model on this machine.

    The result is a `ScoredResult`; its score is the most probable grade.

    Args:
        record: the prompt, and what may be answered.
        llm: the model as LlamaIndex knows it.
        scorer: the same model, weighing.
        score_threshold: from which score an answer passes.
    """

    def __init__(
        self, record: JudgeRecord, llm: LLM, scorer: AnswerScorer, *, score_threshold: float = 4.0
    ) -> None:
        super().__init__(llm=llm, eval_template=record.template, score_threshold=score_threshold)
        self._takes(record, scorer)

    def _grades(self, query: str, response: str, reference: str | None) -> dict[str, float]:
        variables = {
            "query": query,
            "generated_answer": response,
            "reference_answer": reference or NO_REFERENCE,
        }
        return self._weighed(variables)


def scored_evaluator(
    record: JudgeRecord, llm: LLM, model: Any, tokenizer: Any, **options: Any
) -> BaseEvaluator:
    """Return the evaluator of a record's task, of a model that is loaded."""
    pairs = record.task == "pairwise"
    kind = LocalJudgePairwiseEvaluator if pairs else LocalJudgeCorrectnessEvaluator
    return kind(record, llm, AnswerScorer(model, tokenizer), **options)


_FIRST, _SECOND, _TIE = VERDICTS[1.0], VERDICTS[0.0], VERDICTS[0.5]
_MIRRORED = {_FIRST: _SECOND, _SECOND: _FIRST, _TIE: _TIE}


def _compared(query: str, found: dict[str, float]) -> ScoredResult:
    first, tie = found[_FIRST], found.get(_TIE, 0.0)
    verdict = most_probable(first, found[_SECOND], tie)
    return compared(query, verdict, first + tie / 2, found)


def _shared(rows: list[list[int]]) -> int:
    """Return how many tokens all rows begin with; every row has at least one more."""
    at = 0
    while all(len(row) > at + 1 for row in rows) and len({row[at] for row in rows}) == 1:
        at += 1
    return at
