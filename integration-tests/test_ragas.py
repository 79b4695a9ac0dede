"""ft-openai-distill[ragas], from its built wheel, in an environment of its own.

ragas 0.4.3 holds other packages back, so it is not in the development environment.
"""

from __future__ import annotations

import importlib.util

import pytest
from test_packaging import (  # the fixtures, by their names
    JOBS,
    Environment,
    constraints,  # noqa: F401
    environment,  # noqa: F401
    wheels,  # noqa: F401
)

from ft_core.errors import MissingExtraError
from ft_openai_distill.ragas_metrics import evaluate_ragas


@pytest.mark.slow
def test_ragas_judges_by_the_models_of_llama_index(request: pytest.FixtureRequest) -> None:
    make = request.getfixturevalue("environment")
    alone: Environment = make("ft-openai-distill[ragas]")

    assert {"ragas", "ft-openai-distill"} <= alone.distributions()
    alone.run(JOBS / "ragas_job.py")


@pytest.mark.skipif(importlib.util.find_spec("ragas") is not None, reason="ragas is installed")
def test_without_it_the_command_is_named() -> None:
    sample = {"user_input": "a", "response": "b", "retrieved_contexts": ["c"]}

    with pytest.raises(MissingExtraError, match=r"pip install 'ft-openai-distill\[ragas\]'"):
        evaluate_ragas([sample], llm=None, metrics=["faithfulness"])
