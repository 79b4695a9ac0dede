"""The report of judges: how far they agree with a teacher and with people, and what sways them."""

from __future__ import annotations

from typing import ClassVar

from ft_core.report.statistics import StatisticsReport


class JudgeReport(StatisticsReport):
    """A comparison of any number of judges of the same answers with one of them, the baseline.

    Means, intervals, tests and their correction are those of every report (`BaseReport`).
    `questions` are what was judged, `references` the teacher's verdicts, or people's where
    there is no teacher's; for the arguments see `StatisticsReport`.
    """

    nouns: ClassVar[tuple[str, str]] = ("judgement", "judgements")
    statistics_title: ClassVar[str] = "Agreement, bias and calibration"
