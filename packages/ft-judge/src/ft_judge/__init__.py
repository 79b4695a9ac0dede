"""Fine-tune the judge that evaluates a LlamaIndex app."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ft_core.datasets import JudgeDataset, JudgeExample
    from ft_judge.baselines import by_length, longer_answer, majority
    from ft_judge.engine import (
        CorrectnessJudgeFinetuneEngine,
        PairwiseJudgeFinetuneEngine,
        load_judge,
        untrained_judge,
    )
    from ft_judge.evaluation import Judgement, JudgeReport, evaluate_judges
    from ft_judge.handler import JudgeHandler
    from ft_judge.readers import read_llmbar, read_verdicts

_MODULES = {
    "CorrectnessJudgeFinetuneEngine": "ft_judge.engine",
    "JudgeDataset": "ft_core.datasets",
    "JudgeExample": "ft_core.datasets",
    "JudgeHandler": "ft_judge.handler",
    "JudgeReport": "ft_judge.evaluation",
    "Judgement": "ft_judge.evaluation",
    "PairwiseJudgeFinetuneEngine": "ft_judge.engine",
    "by_length": "ft_judge.baselines",
    "evaluate_judges": "ft_judge.evaluation",
    "load_judge": "ft_judge.engine",
    "longer_answer": "ft_judge.baselines",
    "majority": "ft_judge.baselines",
    "read_llmbar": "ft_judge.readers",
    "read_verdicts": "ft_judge.readers",
    "untrained_judge": "ft_judge.engine",
}

__all__ = [
    "CorrectnessJudgeFinetuneEngine",
    "JudgeDataset",
    "JudgeExample",
    "JudgeHandler",
    "JudgeReport",
    "Judgement",
    "PairwiseJudgeFinetuneEngine",
    "by_length",
    "evaluate_judges",
    "load_judge",
    "longer_answer",
    "majority",
    "read_llmbar",
    "read_verdicts",
    "untrained_judge",
]


def __getattr__(name: str) -> Any:
    # A pack is imported for one of these; the others' dependencies stay unloaded.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)
