"""From chat examples to training sequences that fit the model."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ft_core.datasets.chat import ChatExample
from ft_core.errors import DatasetError
from ft_core.sft.chat_format import ChatFormat, Tokens, tools_of

logger = logging.getLogger(__name__)


def rows_of(
    examples: Sequence[ChatExample], chat: ChatFormat, length: int, name: str, first: int = 0
) -> list[Tokens]:
    """Return the sequences of `examples`, each of at most `length` tokens.

    A longer conversation of several answers becomes one sequence for each of them; of one that
    is still too long the beginning of the prompt is cut off, and how many were is logged.

    Args:
        examples: conversations.
        chat: of the model.
        length: the most tokens of a sequence.
        name: of the dataset, for errors.
        first: number of the first example in it.

    Raises:
        DatasetError: the chat template refuses an example, or its answers alone are too long.
    """
    rows: list[Tokens] = []
    cut = 0
    for number, example in enumerate(examples, start=first):
        place = f"{name}[{number}]"
        try:
            given = (example.messages, tools_of(example), example.response_format)
            found = chat.tokens(*given)
            if len(found) == 1 and len(found[0]) > length:
                found = chat.tokens(*given, apart=True)
        except DatasetError as error:
            place = f"{place}.{error.place}" if error.place else place
            raise DatasetError(error.reason, place=place) from error
        for tokens in found:
            cut += len(tokens) > length
            rows.append(_shortened(tokens, length, place))
    if cut:
        logger.warning(
            "%d of %d sequences of %s are longer than %d tokens: the beginning of their prompts "
            "was cut off",
            cut,
            len(rows),
            name,
            length,
        )
    return rows


def _shortened(tokens: Tokens, length: int, place: str) -> Tokens:
    """Drop tokens from the beginning of the prompt until the sequence fits."""
    over = len(tokens) - length
    if over <= 0:
        return tokens
    if over >= tokens.is_answer.index(True):
        raise DatasetError(
            f"an answer takes more than the {length} tokens of a sequence; raise max_length, or "
            "leave the example out",
            place=place,
        )
    return Tokens(tokens.input_ids[over:], tokens.is_answer[over:])
