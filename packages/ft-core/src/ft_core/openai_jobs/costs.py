"""What a training file will cost and whether the service takes it, before anything is sent.

Tokens are counted as OpenAI's cookbook does ("How to count tokens with tiktoken"): the text of
each message by the model's encoding, plus a few tokens around each message, name and tool. It
calls that an estimate, and so is this; the service's own count is in `Job.trained_tokens`.

tiktoken fetches an encoding from the network when it is first used. Where that fails, a token is
taken to be four bytes of UTF-8: about right for English and a little high for other languages.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ft_core.errors import ArgumentError, DatasetError

if TYPE_CHECKING:
    import tiktoken

logger = logging.getLogger(__name__)

MIN_EXAMPLES = 10
"""Fewer than these OpenAI refuses."""

MAX_FILE_BYTES = 512 * 1024 * 1024
"""Of one uploaded file."""

# The framing that the cookbook measured: around each message, after a name, before the answer.
_PER_MESSAGE, _PER_NAME, _PER_ANSWER = 3, 1, 3
# Around each tool; the first of models with cl100k_base, the second of later ones.
_PER_TOOL = {"cl100k_base": 10, "o200k_base": 7}
_PER_TOOL_END, _PER_PROPERTIES, _PER_PROPERTY = 12, 3, 3
_PER_ENUM, _PER_ENUM_VALUE = -3, 3
# A picture of 1024 x 1024 pixels; its size is not known here, and often not even its bytes.
_PER_IMAGE = {"low": 85, "high": 765}

_BYTES_PER_TOKEN = 4
_NEWEST_ENCODING = "o200k_base"

# Longest training example by the model's beginning; the longest beginning counts.
_LONGEST_EXAMPLE = {
    "gpt-4.1": 65_536,
    "gpt-4o": 65_536,
    "gpt-4-0613": 8_192,
    "gpt-3.5-turbo": 16_385,
    "gpt-3.5-turbo-0613": 4_096,
    "babbage-002": 16_384,
    "davinci-002": 16_384,
}

# The epochs that OpenAI chooses: three, unless the data is very small or very large.
_EPOCHS, _MOST_EPOCHS = 3, 25
_FEW_EXAMPLES, _MANY_EXAMPLES = 100, 25_000


@dataclass(frozen=True)
class Estimate:
    """What training on a file will take."""

    examples: int
    tokens: int
    """Of one pass over the data."""
    longest: int
    """Tokens of the longest example."""
    longest_example: int
    """Its number in the file, from 1."""
    epochs: int
    exact: bool
    """Whether the model's own encoding was there to count with."""
    price_per_million: float | None = None

    @property
    def billed_tokens(self) -> int:
        """Tokens of all epochs."""
        return self.tokens * self.epochs

    @property
    def cost(self) -> float | None:
        """In the currency of `price_per_million`; None where no price was given."""
        if self.price_per_million is None:
            return None
        return self.billed_tokens * self.price_per_million / 1_000_000

    def __str__(self) -> str:
        about = "" if self.exact else "about "
        text = (
            f"{self.examples:,} examples, {about}{self.tokens:,} tokens, {self.epochs} epochs: "
            f"{about}{self.billed_tokens:,} tokens to train on"
        )
        return text if self.cost is None else f"{text}, {about}{self.cost:,.2f} in all"


class TokenCounter:
    """Counts the tokens of training examples for one model.

    Args:
        model: the base model, a fine-tuned one (`ft:...`), or any other name, which is counted
            with the newest encoding.
        encoding: count with this one instead.
    """

    def __init__(self, model: str, encoding: tiktoken.Encoding | None = None) -> None:
        name = encoding_name(model)
        self._encoding = encoding or _load_encoding(name)
        self._per_tool = _PER_TOOL.get(name, _PER_TOOL[_NEWEST_ENCODING])

    @property
    def exact(self) -> bool:
        """False where the encoding could not be loaded and bytes are counted instead."""
        return self._encoding is not None

    def text(self, text: str) -> int:
        """Return the tokens of a text; the names of special tokens in it are ordinary text."""
        if self._encoding is None:
            return -(-len(text.encode("utf-8", "replace")) // _BYTES_PER_TOKEN)
        return len(self._encoding.encode_ordinary(text))

    def example(self, example: Mapping[str, Any]) -> int:
        """Return the tokens of one line of a training file, in its JSON form.

        Of a preference pair, the question counts once and both answers do.
        """
        asked = example.get("input", example)
        messages = [*asked.get("messages", ())]
        messages += example.get("preferred_output", ())
        messages += example.get("non_preferred_output", ())
        functions = [tool.get("function", {}) for tool in asked.get("tools") or ()]
        functions += asked.get("functions") or []
        return (
            _PER_ANSWER
            + sum(self._message(message) for message in messages)
            + sum(self._function(function) for function in functions)
            + (_PER_TOOL_END if functions else 0)
        )

    def _message(self, message: Mapping[str, Any]) -> int:
        total = _PER_MESSAGE + self.text(str(message.get("role", "")))
        total += self._content(message.get("content"))
        if message.get("name"):
            total += _PER_NAME + self.text(str(message["name"]))
        calls = [call.get("function", {}) for call in message.get("tool_calls") or ()]
        if message.get("function_call"):
            calls.append(message["function_call"])
        for call in calls:
            total += _PER_MESSAGE + self.text(str(call.get("name", "")))
            total += self.text(str(call.get("arguments", "")))
        return total

    def _content(self, content: Any) -> int:
        if isinstance(content, str):
            return self.text(content)
        total = 0
        for part in content or ():
            if part.get("type") == "image_url":
                detail = part.get("image_url", {}).get("detail")
                total += _PER_IMAGE.get(detail, _PER_IMAGE["high"])
            else:
                total += self.text(str(part.get("text") or part.get("refusal") or ""))
        return total

    def _function(self, function: Mapping[str, Any]) -> int:
        description = str(function.get("description") or "").removesuffix(".")
        total = self._per_tool + self.text(f"{function.get('name', '')}:{description}")
        return total + self._properties(function.get("parameters") or {})

    def _properties(self, schema: Mapping[str, Any]) -> int:
        properties = schema.get("properties") or {}
        total = _PER_PROPERTIES if properties else 0
        for name, field in properties.items():
            if not isinstance(field, Mapping):  # `true`: anything goes
                total += _PER_PROPERTY + self.text(name)
                continue
            description = str(field.get("description") or "").removesuffix(".")
            kind = field.get("type", "")
            total += _PER_PROPERTY + self.text(f"{name}:{kind}:{description}")
            if "enum" in field:
                total += _PER_ENUM
                total += sum(_PER_ENUM_VALUE + self.text(str(value)) for value in field["enum"])
            # The cookbook stops at flat schemas; nested ones are counted alike.
            total += self._properties(field) + self._properties(_items(field))
        return total + sum(self._properties(model) for model in schema.get("$defs", {}).values())


def estimate(
    examples: Sequence[Mapping[str, Any]],
    model: str,
    *,
    epochs: int | None = None,
    price_per_million: float | None = None,
    encoding: tiktoken.Encoding | None = None,
) -> Estimate:
    """Count the tokens of a training file and what its training will take.

    Args:
        examples: the lines of the file in their JSON form.
        model: see `TokenCounter`.
        epochs: None is what OpenAI chooses, see `default_epochs`.
        price_per_million: price of training on a million tokens, as the service publishes it.
        encoding: see `TokenCounter`.

    Raises:
        DatasetError: there are no examples.
        ArgumentError: the price is negative.
    """
    if not examples:
        raise DatasetError("has no examples")
    if price_per_million is not None and price_per_million < 0:
        raise ArgumentError("price_per_million", "is not negative")
    counter = TokenCounter(model, encoding)
    counts = [counter.example(example) for example in examples]
    longest = max(counts)
    return Estimate(
        examples=len(counts),
        tokens=sum(counts),
        longest=longest,
        longest_example=counts.index(longest) + 1,
        epochs=default_epochs(len(counts)) if epochs is None else epochs,
        exact=counter.exact,
        price_per_million=price_per_million,
    )


def default_epochs(examples: int) -> int:
    """Return the epochs that OpenAI trains when none are asked for, by its published rule."""
    if examples * _EPOCHS < _FEW_EXAMPLES:
        return max(1, min(_MOST_EPOCHS, _FEW_EXAMPLES // max(1, examples)))
    if examples * _EPOCHS > _MANY_EXAMPLES:
        return max(1, _MANY_EXAMPLES // examples)
    return _EPOCHS


def check_limits(
    estimate: Estimate, model: str, file_bytes: int, *, source: str | None = None
) -> None:
    """Refuse what the service would refuse, or would cut short without a word.

    Raises:
        DatasetError: too few examples, an example that is too long for the model, or a file
            that is too large.
    """
    if estimate.examples < MIN_EXAMPLES:
        raise DatasetError(
            f"has {estimate.examples} examples; fine-tuning takes at least {MIN_EXAMPLES}",
            source=source,
        )
    if file_bytes > MAX_FILE_BYTES:
        raise DatasetError(
            f"makes a file of {file_bytes / 1024**2:,.0f} MB; an upload has at most "
            f"{MAX_FILE_BYTES // 1024**2} MB. Leave examples out",
            source=source,
        )
    most = longest_example(model)
    if most is None:
        logger.warning(
            "the longest example has %s tokens; how many %s takes is not known here",
            f"{estimate.longest:,}",
            model,
        )
    elif estimate.longest > most:
        reason = (
            f"has {estimate.longest:,} tokens; {model} is trained on at most {most:,} of an "
            "example and the rest, with the answer, is cut off. Shorten it or leave it out"
        )
        place = f"example {estimate.longest_example}"
        if estimate.exact:
            raise DatasetError(reason, source=source, place=place)
        logger.warning("%s: %s (counted by its bytes)", place, reason)


def longest_example(model: str) -> int | None:
    """Return the most tokens that an example may have for a model; None if it is not known."""
    name = _base_name(model)
    known = [start for start in _LONGEST_EXAMPLE if name.startswith(start)]
    return _LONGEST_EXAMPLE[max(known, key=len)] if known else None


def encoding_name(model: str) -> str:
    """Return the name of the model's encoding; of one that tiktoken does not know, the newest."""
    import tiktoken

    try:
        return tiktoken.encoding_name_for_model(_base_name(model))
    except KeyError:
        return _NEWEST_ENCODING


def _base_name(model: str) -> str:
    name = model.split(":")[1] if model.startswith("ft:") and model.count(":") else model
    return name.replace("gpt-35-", "gpt-3.5-")  # as Azure writes it


def _items(field: Mapping[str, Any]) -> Mapping[str, Any]:
    items = field.get("items")
    return items if isinstance(items, Mapping) else {}


@lru_cache
def _load_encoding(name: str) -> tiktoken.Encoding | None:
    """Return the encoding, or None with one warning where it cannot be fetched."""
    import tiktoken

    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # whatever the network does, counting goes on
        logger.warning(
            "tiktoken's encoding %s could not be loaded (%s); tokens are counted as a quarter of "
            "the bytes. With a network it is fetched once; without one, put it in "
            "TIKTOKEN_CACHE_DIR",
            name,
            type(error).__name__,
        )
        return None
