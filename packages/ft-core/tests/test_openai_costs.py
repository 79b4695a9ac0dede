"""Token counts, the estimate and the limits."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiktoken

from ft_core.errors import ArgumentError, DatasetError
from ft_core.openai_jobs import costs
from ft_core.openai_jobs.costs import (
    Estimate,
    TokenCounter,
    check_limits,
    default_epochs,
    encoding_name,
    estimate,
    longest_example,
)

# A real encoding, of bytes alone: a text has as many tokens as UTF-8 bytes.
BYTES = tiktoken.Encoding(
    "bytes",
    pat_str=r"[\s\S]",
    mergeable_ranks={bytes([value]): value for value in range(256)},
    special_tokens={"<|endoftext|>": 256},
)
# The same with one merge, so that "ab" is one token.
MERGING = tiktoken.Encoding(
    "merging",
    pat_str=r"[\s\S]+",
    mergeable_ranks={bytes([value]): value for value in range(256)} | {b"ab": 256},
    special_tokens={},
)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """tiktoken without its cache and with a proxy that is not there."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    costs._load_encoding.cache_clear()
    yield
    costs._load_encoding.cache_clear()


def one(content: Any, **message: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content, **message}]}


def count(example: dict[str, Any], model: str = "gpt-4o-mini") -> int:
    return TokenCounter(model, BYTES).example(example)


def test_messages_by_the_cookbook() -> None:
    # 3 before each message, its role and its text, and 3 before the answer.
    assert count(one("hello")) == 3 + len("user") + 5 + 3
    assert count(one("héllo")) == count(one("hello")) + 1
    named = count(one("hello", name="Ann"))
    assert named == count(one("hello")) + 1 + 3
    two = {"messages": one("a")["messages"] + [{"role": "assistant", "content": "b"}]}
    assert count(two) == 3 + 4 + 1 + 3 + 9 + 1 + 3


def test_the_encoding_decides() -> None:
    merged = TokenCounter("gpt-4o", MERGING)
    assert merged.exact
    assert merged.text("ababc") == 3
    assert merged.text("aabb") == 3


def test_names_of_special_tokens_are_text() -> None:
    assert TokenCounter("gpt-4o", BYTES).text("<|endoftext|>") == 13


def test_parts_of_a_message() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    text = {"type": "text", "text": "what is it?"}
    base = count(one([text]))
    assert base == count(one("what is it?"))
    assert count(one([text, image])) == base + 765
    image["image_url"]["detail"] = "low"
    assert count(one([text, image])) == base + 85
    refusal = {
        "messages": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "n"}]}]
    }
    assert count(refusal) == 3 + 9 + 1 + 3


def test_tool_calls_count_with_name_and_arguments() -> None:
    call = {"id": "x", "type": "function", "function": {"name": "look", "arguments": '{"a":1}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call, call]}
    assert count({"messages": [message]}) == 3 + 9 + 2 * (3 + 4 + 7) + 3
    old = {"role": "assistant", "content": None, "function_call": call["function"]}
    assert count({"messages": [old]}) == 3 + 9 + (3 + 4 + 7) + 3


def test_tools_by_the_cookbook() -> None:
    function = {
        "name": "get_weather",
        "description": "Weather now.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where."},
                "unit": {"type": "string", "enum": ["C", "F"]},
            },
        },
    }
    tools = (
        len("get_weather:Weather now")
        + 3
        + (3 + len("city:string:Where"))
        + (3 + len("unit:string:"))
        + (-3 + (3 + 1) + (3 + 1))
        + 12
    )
    example = one("hi") | {"tools": [{"type": "function", "function": function}]}
    assert count(example) - count(one("hi")) == 7 + tools
    assert count(one("hi") | {"functions": [function]}) == count(example)
    # cl100k_base frames a tool with three more.
    assert count(example, "gpt-3.5-turbo") == count(example) + 3


def test_nested_schemas_count() -> None:
    def size(parameters: dict[str, Any]) -> int:
        return count(one("") | {"tools": [{"function": {"name": "f", "parameters": parameters}}]})

    flat = {"properties": {"a": {"type": "object"}}}
    inner = {"properties": {"b": {"type": "string"}}}
    nested = {"properties": {"a": {"type": "object", **inner}}}
    listed = {"properties": {"a": {"type": "object", "items": inner}}}
    referred = {**flat, "$defs": {"B": inner}}
    extra = 3 + 3 + len("b:string:")
    assert [size(s) - size(flat) for s in (nested, listed, referred)] == [extra] * 3
    assert size({"properties": {"a": True}}) > size({})


def test_preferences_count_the_question_once() -> None:
    answer = [{"role": "assistant", "content": "yes"}]
    example = {"input": one("ok?"), "preferred_output": answer, "non_preferred_output": answer}
    assert count(example) == count(one("ok?")) + 2 * (3 + 9 + 3)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("gpt-4o-mini-2024-07-18", "o200k_base"),
        ("ft:gpt-4o-mini-2024-07-18:org::abc", "o200k_base"),
        ("gpt-4.1-nano-2025-04-14", "o200k_base"),
        ("gpt-3.5-turbo-0125", "cl100k_base"),
        ("gpt-35-turbo-0125", "cl100k_base"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "o200k_base"),
    ],
)
def test_encodings(model: str, name: str) -> None:
    assert encoding_name(model) == name


@pytest.mark.usefixtures("no_network")
def test_without_a_network_bytes_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        counters = [TokenCounter("gpt-4o-mini") for _ in range(3)]
    assert [counter.exact for counter in counters] == [False] * 3
    assert len(caplog.records) == 1
    assert "o200k_base could not be loaded" in caplog.text
    assert counters[0].text("") == 0
    assert counters[0].text("abcde") == 2
    assert counters[0].text("港口") == 2
    assert counters[0].text("\ud800") == 1
    figures = estimate([one("hello")] * 10, "gpt-4o-mini")
    assert not figures.exact
    assert "about" in str(figures)


@pytest.mark.parametrize(
    ("examples", "epochs"),
    [(1, 25), (4, 25), (10, 10), (12, 8), (33, 3), (34, 3), (8_333, 3), (8_334, 2), (30_000, 1)],
)
def test_the_epochs_that_openai_chooses(examples: int, epochs: int) -> None:
    assert default_epochs(examples) == epochs


def test_the_estimate() -> None:
    examples = [one("a" * n) for n in range(40)]
    figures = estimate(examples, "gpt-4o", encoding=BYTES, price_per_million=2.0)
    assert figures.tokens == sum(10 + n for n in range(40))
    assert (figures.longest, figures.longest_example, figures.epochs) == (49, 40, 3)
    assert figures.billed_tokens == 3 * figures.tokens
    assert figures.cost == pytest.approx(3 * figures.tokens * 2e-6)
    assert str(figures) == (
        "40 examples, 1,180 tokens, 3 epochs: 3,540 tokens to train on, 0.01 in all"
    )
    assert estimate(examples, "gpt-4o", encoding=BYTES, epochs=1).billed_tokens == 1180
    assert estimate(examples, "gpt-4o", encoding=BYTES).cost is None


def test_bad_arguments() -> None:
    with pytest.raises(DatasetError, match="no examples"):
        estimate([], "gpt-4o")
    with pytest.raises(ArgumentError, match="price_per_million"):
        estimate([one("a")], "gpt-4o", encoding=BYTES, price_per_million=-1)


def figures(**values: Any) -> Estimate:
    defaults = {
        "examples": 10,
        "tokens": 1000,
        "longest": 100,
        "longest_example": 4,
        "epochs": 3,
        "exact": True,
    }
    return Estimate(**(defaults | values))


def test_limits() -> None:
    check_limits(figures(), "gpt-4o-mini", 1000)
    with pytest.raises(DatasetError, match=r"t\.jsonl: has 9 examples; .* at least 10"):
        check_limits(figures(examples=9), "gpt-4o-mini", 1000, source="t.jsonl")
    with pytest.raises(DatasetError, match="at most 512 MB"):
        check_limits(figures(), "gpt-4o-mini", 512 * 1024**2 + 1)
    check_limits(figures(longest=65_536), "gpt-4o-mini-2024-07-18", 512 * 1024**2)
    with pytest.raises(DatasetError, match=r"example 4: has 65,537 tokens; .* at most 65,536"):
        check_limits(figures(longest=65_537), "gpt-4o-mini-2024-07-18", 1000)


def test_a_length_that_was_only_estimated_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    check_limits(figures(longest=70_000, exact=False), "gpt-4o-mini", 1000)
    assert "example 4: has 70,000 tokens" in caplog.text


def test_an_unknown_models_length_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    check_limits(figures(), "smol", 1000)
    assert "how many smol takes is not known" in caplog.text


@pytest.mark.parametrize(
    ("model", "most"),
    [
        ("gpt-3.5-turbo-0613", 4_096),
        ("gpt-3.5-turbo-1106", 16_385),
        ("gpt-35-turbo-1106", 16_385),
        ("ft:gpt-4.1-mini-2025-04-14:org::a", 65_536),
        ("gpt-4-0613", 8_192),
        ("gpt-9", None),
        ("ft:broken", None),
    ],
)
def test_longest_examples(model: str, most: int | None) -> None:
    assert longest_example(model) == most


DISTILL = Path(__file__).resolve().parents[4] / "shared" / "data" / "distill"


@pytest.mark.skipif(not DISTILL.is_dir(), reason="needs ../shared/data/distill")
def test_real_calls_by_bytes_are_near_their_words() -> None:
    lines = (DISTILL / "gpt4_rag_events.jsonl").read_text(encoding="utf-8").splitlines()
    examples = [json.loads(line) for line in lines]
    total = estimate(examples, "gpt-4o-mini").tokens
    words = sum(len(m["content"].split()) for e in examples for m in e["messages"])
    assert 1.1 < total / words < 2.2
