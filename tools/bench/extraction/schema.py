"""What the extraction benchmark extracts: the order that a repair shop would file from a note.

The classes are the schema. A program shows `RepairOrder.model_json_schema()` in each prompt, so
it is kept short: no titles, no descriptions. As in strict structured outputs every field is
required, and what a note does not say is null.
"""

from __future__ import annotations

from datetime import date
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


def _drop_titles(schema: dict[str, Any]) -> None:
    """Drop the titles that pydantic makes up from the names of classes and fields."""
    for part in (schema, *schema["properties"].values()):
        part.pop("title", None)


class _Record(BaseModel):
    # Strict: a number in quotes would pass otherwise, which the schema does not allow.
    model_config = ConfigDict(strict=True, json_schema_extra=_drop_titles)


class Customer(_Record):
    name: str
    """Without a title, as in "Mr"."""
    phone: str | None


class Device(_Record):
    kind: Literal["bicycle", "laptop", "camera", "guitar", "coffee machine", "sewing machine"]
    model: str
    """Maker and model, as the note writes them."""
    serial: str | None


class Part(_Record):
    name: str
    """As the note writes it, in the plural where it does."""
    quantity: int


class RepairOrder(_Record):
    order: str
    received: date
    due: date | None
    """The day for which the repair is promised."""
    status: Literal["received", "repairing", "waiting", "ready"]
    """Taken in and not begun; on the bench; held for parts or for an answer; done."""
    urgent: bool
    """Whether the note says so; an early day alone is no rush."""
    customer: Customer
    device: Device
    parts: list[Part]
    """What is fitted, in the order of the note; not what was looked at and stays."""
    price: int
    """The total that the customer was told, in whole units; neither a deposit nor a rate."""
    currency: Literal["EUR", "GBP", "USD"]
