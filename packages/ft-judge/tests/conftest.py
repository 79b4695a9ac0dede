"""LLMs that judge by a rule: they read the prompt that LlamaIndex really sends."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from rule_llm import RuleLLM

SHOWN = re.compile(r"Assistant [AB].s Answer\]\n(.*?)\n\[The End of Assistant", re.DOTALL)


def by_longer(prompt: str) -> str:
    """Prefers the longer answer, whichever stands first."""
    first, second = SHOWN.findall(prompt)
    if len(first) == len(second):
        return "They say the same. [[C]]"
    return f"It says more. [[{'A' if len(first) > len(second) else 'B'}]]"


def by_place(prompt: str) -> str:
    """Prefers what stands first."""
    return "The first is better. [[A]]"


def unreadable(prompt: str) -> str:
    """Says nothing that can be read."""
    return "I would rather not say."


RULES = {"longer": by_longer, "place": by_place, "unreadable": unreadable}


@pytest.fixture(scope="session")
def llm_of() -> Any:
    """Return an LLM by the name of its rule, or by the rule, or by a fixed answer."""

    def make(rule: Any, **settings: Any) -> RuleLLM:
        if isinstance(rule, str):
            answer = rule
            rule = RULES.get(rule, lambda prompt: answer)
        return RuleLLM(rule=rule, **settings)

    return make


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Train tiny models in one thread: more only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
