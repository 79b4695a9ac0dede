"""The examples of the extraction benchmark: each answer is right by its own text.

Whoever edits a note or its answer, or adds one, learns here what does not fit.
"""

from __future__ import annotations

import calendar
import json
import re
from pathlib import Path

import pytest
from bench.distill_extraction import EXAMPLES, chat_dataset, leaves, program, score
from bench.extraction.schema import Part, RepairOrder
from llama_index.core.base.llms.types import CompletionResponse, LLMMetadata
from llama_index.core.llms import CustomLLM
from pydantic import PrivateAttr, ValidationError

from ft_core import files
from ft_core.datasets.duplicates import fold, near_duplicate_pairs

ROWS = [row for _, row in files.read_jsonl(Path(EXAMPLES))]
ORDERS = [RepairOrder.model_validate_json(json.dumps(row["answer"])) for row in ROWS]
PAIRS = [
    pytest.param(row["text"], order, id=order.order)
    for row, order in zip(ROWS, ORDERS, strict=True)
]
WORDS = ["none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
OTHER_WORDS = {2: ["both", "pair"], 22: ["twenty-two"]}
CURRENCIES = {
    "EUR": ["EUR", "euro"],
    "GBP": ["£", "pound", "GBP"],
    "USD": ["$", "dollar", "USD"],
}


def test_there_are_enough_and_no_two_alike():
    assert len(ROWS) >= 120
    assert all(row.keys() == {"text", "answer"} for row in ROWS)
    texts = {order.order: row["text"] for row, order in zip(ROWS, ORDERS, strict=True)}
    assert len(texts) == len(ROWS), "two answers have the same order"
    assert len({order.model_dump_json() for order in ORDERS}) == len(ROWS)
    # Far below what counts as a near-duplicate: no note is another one with its slots refilled.
    assert list(near_duplicate_pairs(texts, threshold=0.4)) == []


@pytest.mark.parametrize("field", ["model", "serial", "name", "phone"])
def test_nothing_can_be_learned_by_heart(field):
    values = [getattr(o.device, field, None) or getattr(o.customer, field, None) for o in ORDERS]
    known = [value for value in values if value]
    assert len(set(known)) == len(known)


def test_every_value_and_every_gap_occurs():
    for path in ("due", "customer.phone", "device.serial"):
        missing = [leaves(order.model_dump())[path] is None for order in ORDERS]
        assert 20 < sum(missing) < len(missing) - 20, path
    for path, count in {"status": 4, "device.kind": 6, "currency": 3, "urgent": 2}.items():
        values = [leaves(order.model_dump())[path] for order in ORDERS]
        assert len(set(values)) == count
        assert min(values.count(value) for value in set(values)) >= 20, path
    assert {len(order.parts) for order in ORDERS} >= {0, 1, 2, 3}


@pytest.mark.parametrize(("text", "order"), PAIRS)
def test_what_the_answer_says_stands_in_the_text(text, order):
    customer, device = order.customer, order.device
    for value in (order.order, customer.name, customer.phone, device.model, device.serial):
        assert value is None or re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text), value
    assert device.kind in text.lower()
    for part in order.parts:
        assert part.name in text
        assert states_quantity(text, part.quantity), part
    for day in (order.received, order.due):
        assert day is None or states_day(text, day), day
    assert re.search(rf"(?<!\d){order.price}(?!\d)", text) or WORDS[order.price] in text
    assert any(name in text for name in CURRENCIES[order.currency])


@pytest.mark.parametrize(("text", "order"), PAIRS)
def test_parts_come_in_the_order_of_the_text(text, order):
    # Each is looked for behind the one before it, so that a word may have stood earlier, too.
    place = 0
    for part in order.parts:
        place = text.find(part.name, place)
        assert place >= 0, part.name
        place += len(part.name)


@pytest.mark.parametrize(("text", "order"), PAIRS)
def test_lengths(text, order):
    assert 40 <= len(text.split()) <= 90
    assert len(order.model_dump_json()) <= 450


def test_the_schema_is_short_and_strict():
    assert len(json.dumps(RepairOrder.model_json_schema())) < 1300
    with pytest.raises(ValidationError, match="valid integer"):
        Part.model_validate_json('{"name": "chain", "quantity": "2"}')
    whole = ORDERS[0].model_dump(mode="json")
    for field in whole:
        with pytest.raises(ValidationError, match=f"{field}\n  Field required"):
            RepairOrder.model_validate_json(json.dumps({k: whole[k] for k in whole if k != field}))


class Recorder(CustomLLM):
    """A chat model that keeps what it is asked and gives one answer."""

    answer: str
    _asked: list = PrivateAttr(default_factory=list)

    @property
    def metadata(self):
        return LLMMetadata(is_chat_model=True)

    def chat(self, messages, **kwargs):
        self._asked.append([{"role": m.role.value, "content": m.content} for m in messages])
        return super().chat(messages, **kwargs)

    def complete(self, prompt, formatted=False, **kwargs):
        return CompletionResponse(text=self.answer)

    def stream_complete(self, prompt, formatted=False, **kwargs):
        raise NotImplementedError


def test_the_student_trains_on_what_the_program_sends_and_understands():
    for example, row, order in zip(chat_dataset(EXAMPLES), ROWS, ORDERS, strict=True):
        llm = Recorder(answer=example.answer())
        assert program(llm)(text=row["text"]) == order
        assert llm._asked == [example.messages[:-1]]
        assert example.asked() == row["text"]


def test_a_split_shares_no_note():
    parts = chat_dataset(EXAMPLES).split({"train": 0.75, "test": 0.25}, seed=42)
    train, test = ({fold(e.asked()) for e in parts[name]} for name in ("train", "test"))
    assert not train & test
    assert len(test) == len(ROWS) // 4


def test_scores_of_fields():
    order = next(order for order in ORDERS if len(order.parts) == 2)
    fields = 12 + 2 * 2
    assert score(order, order) == {"valid": 1, "fields": 1, "exact": 1}
    assert score(None, order) == {"valid": 0, "fields": 0, "exact": 0}
    dearer = order.model_copy(update={"price": order.price + 1})
    assert score(dearer, order) == {"valid": 1, "fields": (fields - 1) / fields, "exact": 0}
    fewer = order.model_copy(update={"parts": order.parts[:1]})
    more = order.model_copy(update={"parts": [*order.parts, Part(name="bell", quantity=1)]})
    assert score(fewer, order)["fields"] == (fields - 2) / fields
    assert score(more, order)["fields"] == fields / (fields + 2)


def states_quantity(text, quantity):
    said = [str(quantity), *OTHER_WORDS.get(quantity, []), *WORDS[quantity : quantity + 1]]
    # One of a thing often has no number at all: "replaced motor and foot pedal".
    return quantity == 1 or any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in said)


def states_day(text, day):
    month = calendar.month_name[day.month]
    forms = [
        day.isoformat(),
        f"{day.day:02}/{day.month:02}/{day.year}",
        rf"{day.day}(st|nd|rd|th)?( of)? {month}",
        rf"{month} {day.day}\b",
        rf"the {day.day}(st|nd|rd|th)\b",  # of the month that was spoken of
    ]
    return any(re.search(form, text) for form in forms)
