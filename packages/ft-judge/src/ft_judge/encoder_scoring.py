"""Judges that score answers with an encoder: no prompt, no LLM, and no order that could matter."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core.evaluation import BaseEvaluator, PairwiseComparisonEvaluator
from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

from ft_core.errors import ArgumentError, ArtifactError, FTError, first_line
from ft_core.extras import import_extra
from ft_core.onednn import quick_products
from ft_judge.calibration import grade_cuts, grade_probabilities, pair_probability, pair_verdict
from ft_judge.encoder_rows import texts_of
from ft_judge.prompts import VERDICTS
from ft_judge.recipe import LLMTask
from ft_judge.scored import GradingEvaluator, ScoredResult, compared
from ft_judge.students import EXTRA

logger = logging.getLogger(__name__)


class EncoderRecord(BaseModel):
    """What a trained encoder judges, and how its scores are read: enough to make its evaluator."""

    model_config = ConfigDict(extra="forbid")

    task: LLMTask
    max_length: int = Field(ge=1)
    """Tokens that are read of a question and an answer, as in training."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """What scores are divided by, fitted to judgements that were not learned."""
    tie_threshold: float = Field(default=0.0, ge=0, le=0.5)
    """Of pairs: how near to 0.5 the probability of a tie is."""
    grades: list[float] = []
    """Of correctness: what an answer can get, ascending."""
    cuts: list[float] = []
    """Scores where a grade ends and the next begins, see `ft_judge.calibration`."""
    calibrated_on: int = 0
    """Judgements that temperature and threshold were fitted to; 0: they were not."""
    dropped: dict[str, int] = {}
    """Why judgements were not learned from, with the number of them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        wanted = 0 if self.task == "pairwise" else 2
        if len(self.grades) < wanted or len(self.cuts) != max(0, len(self.grades) - 1):
            raise ValueError("grades and cuts do not fit together")
        return self

    @classmethod
    def of_grades(cls, grades: Sequence[float], given: Sequence[float], **fields: Any) -> Self:
        """Return the record of a judge of correctness that is trained on the scores `given`."""
        cuts = grade_cuts(grades, given)
        return cls(task="correctness", grades=list(grades), cuts=cuts, **fields)


class EncoderScorer:
    """Scores one answer at a time, alone: so an answer's score does not depend on any other.

    Args:
        folder: a trained judge.
        max_length: tokens of a question and an answer that are read.
        device: where to compute; the best there is by default.

    Raises:
        ArtifactError: the folder is damaged.
        ArgumentError: there is no such device.
        MissingExtraError: `ft-judge[local]` is not installed.
    """

    def __init__(self, folder: Path | str, max_length: int, device: str | None = None) -> None:
        import_extra("torch", EXTRA)
        import_extra("transformers", EXTRA)
        from ft_judge.encoder_model import load_encoder

        try:
            self._encoder, self._tokenizer, has_head = load_encoder(str(folder), device)
        except ArgumentError as error:
            if error.argument == "device":
                raise
            raise ArtifactError(
                f"{folder}: {first_line(error)}; the folder is damaged, train or copy it again"
            ) from error
        if not has_head:
            raise ArtifactError(
                f"{folder}: config.json names no model that scores; the folder is damaged, train "
                "or copy it again"
            )
        self.model_name = str(folder)
        """What reports call the model."""
        self._max_length = max_length
        self._lock = threading.Lock()
        self._warned = False

    def score(self, query: str, reference: str | None, answer: str) -> float:
        """Return the score of an answer; higher is better.

        Raises:
            FTError: it is not finite.
        """
        import torch

        from ft_judge.encoder_model import Reader

        device = self._encoder.device
        with self._lock, torch.inference_mode(), quick_products(device):
            reader = Reader(self._tokenizer, self._max_length)
            (inputs,) = reader.inputs([texts_of(query, reference, answer)])
            tensors = {name: torch.tensor([ids], device=device) for name, ids in inputs.items()}
            score = float(self._encoder(**tensors).logits[0, 0])
            if reader.cut and not self._warned:
                self._warned = True
                logger.warning(
                    "an answer does not fit, with its question, into the %d tokens that the judge "
                    "reads: the end of the longer of the two is cut, here and from now on",
                    self._max_length,
                )
        if not math.isfinite(score):
            raise FTError(f"{self.model_name}: the score of {answer!r:.60} is {score}")
        return score


class EncoderPairwiseEvaluator(PairwiseComparisonEvaluator):
    """Compares two answers by their scores: the same verdict in either order, to the bit.

    The result is a `ScoredResult`, whose probability is sigmoid of the scores' difference over
    the temperature (Bradley and Terry 1952). It is a tie where that is within the threshold of
    0.5; ties have no probability of their own.

    Args:
        record: how scores are read.
        scorer: the model; it stands where others have an LLM.
        enforce_consensus: changes nothing, as there is nothing that could disagree.
    """

    def __init__(
        self, record: EncoderRecord, scorer: EncoderScorer, *, enforce_consensus: bool = True
    ) -> None:
        super().__init__(llm=scorer, enforce_consensus=enforce_consensus)
        self._record = record
        self._scorer = scorer

    def _get_prompts(self) -> dict[str, Any]:
        return {}

    async def aevaluate(
        self,
        query: str | None = None,
        response: str | None = None,
        contexts: Sequence[str] | None = None,
        second_response: str | None = None,
        reference: str | None = None,
        sleep_time_in_seconds: int = 0,
        **kwargs: Any,
    ) -> ScoredResult:
        """Compare two answers; `contexts` and further arguments are not looked at.

        Raises:
            ValueError: `query`, `response` or `second_response` is missing.
        """
        if query is None or response is None or second_response is None:
            raise ValueError("query, response and second_response must be provided")
        await asyncio.sleep(sleep_time_in_seconds)
        first, second = await asyncio.to_thread(
            lambda: [
                self._scorer.score(query, reference, each) for each in (response, second_response)
            ]
        )
        probability = pair_probability(first, second, self._record.temperature)
        score = pair_verdict(probability, self._record.tie_threshold)
        probabilities = {VERDICTS[1.0]: probability, VERDICTS[0.0]: 1.0 - probability}
        return compared(query, score, probability, probabilities)


class EncoderCorrectnessEvaluator(GradingEvaluator):
    """Grades an answer by its score.

    The result is a `ScoredResult`; its score is the most probable of the grades in the training
    data, and its probability that one's.

    Args:
        record: how scores are read.
        scorer: the model; it stands where others have an LLM.
        score_threshold: from which score an answer passes.
    """

    def __init__(
        self, record: EncoderRecord, scorer: EncoderScorer, *, score_threshold: float = 4.0
    ) -> None:
        super().__init__(llm=scorer, score_threshold=score_threshold)
        self._record = record
        self._scorer = scorer

    def _get_prompts(self) -> dict[str, Any]:
        return {}

    def _grades(self, query: str, response: str, reference: str | None) -> dict[str, float]:
        score = self._scorer.score(query, reference, response)
        record = self._record
        found = grade_probabilities(np.array([score]), record.cuts, record.temperature)[0].tolist()
        return {str(grade): p for grade, p in zip(record.grades, found, strict=True)}


def encoder_evaluator(
    record: EncoderRecord, folder: Path | str, device: str | None = None, **options: Any
) -> BaseEvaluator:
    """Return the evaluator of a trained judge.

    Raises:
        ArtifactError: the folder is damaged.
    """
    pairs = record.task == "pairwise"
    kind = EncoderPairwiseEvaluator if pairs else EncoderCorrectnessEvaluator
    return kind(record, EncoderScorer(folder, record.max_length, device), **options)
