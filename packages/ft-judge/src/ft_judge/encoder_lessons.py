"""What an encoder is trained on, and what its scores of the held-out rest say of the result."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from ft_core.datasets import JudgeDataset
from ft_core.errors import DatasetError
from ft_judge import calibration
from ft_judge.calibration import Numbers
from ft_judge.encoder_rows import Row, grade_rows, grades_in, only_ties, pair_rows
from ft_judge.encoder_scoring import EncoderRecord
from ft_judge.encoder_settings import EncoderSettings

logger = logging.getLogger(__name__)


class Lessons:
    """What is learned, what the result is calibrated on, and what they say of each other.

    Raises:
        DatasetError: nothing can be learned from `data`; never of `validation`.
    """

    def __init__(
        self,
        task: str,
        data: JudgeDataset,
        validation: JudgeDataset | None,
        dropped: dict[str, int],
        settings: EncoderSettings,
    ) -> None:
        self.hashes = {"train": data.content_hash}
        if validation is not None:
            self.hashes["validation"] = validation.content_hash
        self._pairs = task == "pairwise"
        self._dropped = dropped
        self._settings = settings
        self._grades = [] if self._pairs else grades_in(data)
        self._given: list[float] = []
        if only_ties(data):
            raise DatasetError(
                "every pair is a tie, and of ties nothing can be learned; have pairs judged of "
                "which one answer is better"
            )
        if validation is None:
            data, validation = _held_out(data, settings)
        self.rows = self._rows_of(data)
        self.watched = [] if validation is None else self._rows_of(validation)
        if not self._pairs:
            self._given = [self._grades[int(row.target)] for row in self.rows]

    @property
    def cuts(self) -> list[float]:
        """Of grades, the scores where one ends and the next begins; of pairs none."""
        return [] if self._pairs else calibration.grade_cuts(self._grades, self._given)

    def best_loss(self, scores: Numbers) -> float:
        """Return the validation loss at the temperature that fits best."""
        return self._loss(scores, self._temperature(scores))

    def record(self, scores: Numbers, max_length: int) -> EncoderRecord:
        """Return how scores are read, fitted to those of the validation."""
        fields: dict[str, Any] = {"max_length": max_length, "dropped": self._dropped}
        if len(scores):
            temperature = self._temperature(scores)
            fields |= {"temperature": temperature, "calibrated_on": len(scores)}
            if self._pairs:
                found = calibration.sigmoid(scores / temperature)
                fields["tie_threshold"] = calibration.fit_tie_threshold(found, self._targets)
        if self._pairs:
            return EncoderRecord(task="pairwise", **fields)
        return EncoderRecord.of_grades(self._grades, self._given, **fields)

    def metrics(self, scores: Numbers, record: EncoderRecord) -> dict[str, float]:
        """Return what the validation says; on what was fitted there, a little too well."""
        counts: dict[str, float] = {"examples": len(self.rows), "validation_examples": len(scores)}
        if not len(scores):
            logger.warning(
                "nothing is held out to calibrate the judge: its probabilities are as they were "
                "trained, and it never says tie"
            )
            return counts
        loss, chance = self._loss(scores, record.temperature), self._chance()
        agreement = float(np.mean(self._verdicts(scores, record) == self._targets))
        if loss < chance:
            logger.info("validation loss %.4f, by chance %.4f", loss, chance)
        else:
            logger.warning(
                "training did not help on validation (loss %.4f, by chance %.4f): have more "
                "answers judged, or train another base model",
                loss,
                chance,
            )
        return {
            **counts,
            "validation_loss": loss,
            "chance_loss": chance,
            "validation_agreement": agreement,
        }

    def _rows_of(self, data: JudgeDataset) -> list[Row]:
        return pair_rows(data) if self._pairs else grade_rows(data, self._grades)

    @property
    def _targets(self) -> Numbers:
        return np.array([row.target for row in self.watched])

    def _loss(self, scores: Numbers, temperature: float) -> float:
        if self._pairs:
            return calibration.pair_loss(scores, self._targets, temperature)
        return calibration.grade_loss(scores, self._targets, self.cuts, temperature)

    def _temperature(self, scores: Numbers) -> float:
        losses = [self._loss(scores, each) for each in calibration.temperatures()]
        return calibration.fit_temperature(losses, len(scores))

    def _chance(self) -> float:
        """Return the loss of one who knows how often each grade is given, and no more."""
        if self._pairs:
            return float(np.log(2))
        learned = [int(row.target) for row in self.rows]
        counts = np.bincount(learned, minlength=len(self._grades)) + 1.0
        return float(-np.mean(np.log(counts / counts.sum())[self._targets.astype(int)]))

    def _verdicts(self, scores: Numbers, record: EncoderRecord) -> Numbers:
        if self._pairs:
            found = calibration.sigmoid(scores / record.temperature)
            said = [calibration.pair_verdict(float(p), record.tie_threshold) for p in found]
            return np.array(said)
        found = calibration.grade_probabilities(scores, record.cuts, record.temperature)
        places: Numbers = found.argmax(axis=1).astype(float)
        return places


def _held_out(
    data: JudgeDataset, settings: EncoderSettings
) -> tuple[JudgeDataset, JudgeDataset | None]:
    share = settings.validation_share
    if not share:
        return data, None
    try:
        parts = data.split({"train": 1 - share, "validation": share}, seed=settings.seed)
        if only_ties(parts["train"]):
            raise DatasetError("only ties would be left to learn from")
    except DatasetError as error:
        logger.warning(
            "too few questions to hold some out, which would calibrate the judge: %s", error
        )
        return data, None
    return parts["train"], parts["validation"]
