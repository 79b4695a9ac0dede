"""Metrics of rankings and of texts, and how sure they are."""

from ft_core.metrics.ranking import (
    Metric,
    Qrels,
    Run,
    parse_metric,
    rank_documents,
    score_rankings,
    score_run,
)
from ft_core.metrics.significance import (
    Interval,
    PairedTest,
    bootstrap_interval,
    paired_max_test,
    paired_randomisation_test,
)
from ft_core.metrics.text import rouge_l

__all__ = [
    "Interval",
    "Metric",
    "PairedTest",
    "Qrels",
    "Run",
    "bootstrap_interval",
    "paired_max_test",
    "paired_randomisation_test",
    "parse_metric",
    "rank_documents",
    "rouge_l",
    "score_rankings",
    "score_run",
]
