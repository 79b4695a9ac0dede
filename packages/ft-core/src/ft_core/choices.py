"""What stands for a choice of a LlamaIndex router: the texts that a selector compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ft_core.errors import ArgumentError

if TYPE_CHECKING:
    from llama_index.core.tools.types import ToolMetadata


def choice_text(choice: str | ToolMetadata) -> str:
    """Return the text that stands for a choice: its description, or else its name.

    Raises:
        ArgumentError: it has neither.
    """
    candidates = [choice] if isinstance(choice, str) else [choice.description, choice.name]
    for text in candidates:
        if isinstance(text, str) and text.strip():
            return text
    raise ArgumentError("choices", f"{choice!r} has neither a description nor a name")


def choice_texts(
    choices: Sequence[ToolMetadata], text: Callable[[ToolMetadata], str | Sequence[str]]
) -> list[list[str]]:
    """Return the texts of each choice, at least one.

    Raises:
        ArgumentError: there are no choices, or `text` gives an empty text, or none.
    """
    if not choices:
        raise ArgumentError("choices", "there is none to select from")
    result = []
    for choice in choices:
        texts = text(choice)
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts or not all(each.strip() for each in texts):
            raise ArgumentError("choice_text", f"returns no text, or an empty one, of {choice}")
        result.append(texts)
    return result
