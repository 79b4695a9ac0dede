"""Metrics of rankings, texts, judges and SQL results, and how sure they are."""

from ft_core.metrics.agreement import (
    LengthBias,
    PositionBias,
    agreement,
    bootstrap_statistic,
    cohen_kappa,
    expected_calibration_error,
    inconclusive_rate,
    jaccard,
    length_bias,
    pearson,
    position_bias,
    spearman,
)
from ft_core.metrics.execution import results_match
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
    "LengthBias",
    "Metric",
    "PairedTest",
    "PositionBias",
    "Qrels",
    "Run",
    "agreement",
    "bootstrap_interval",
    "bootstrap_statistic",
    "cohen_kappa",
    "expected_calibration_error",
    "inconclusive_rate",
    "jaccard",
    "length_bias",
    "paired_max_test",
    "paired_randomisation_test",
    "parse_metric",
    "pearson",
    "position_bias",
    "rank_documents",
    "results_match",
    "rouge_l",
    "score_rankings",
    "score_run",
    "spearman",
]
