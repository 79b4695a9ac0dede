from __future__ import annotations

import time
from email.utils import formatdate
from typing import Any

import pytest

from ft_core.errors import TrainingError
from ft_core.retries import (
    RetryingService,
    ServiceUnavailableError,
    pause_after,
    pause_before,
    says_closed,
)


class ClientError(Exception):
    def __init__(self, status_code: int | None, text: str = "", **headers: str) -> None:
        super().__init__(text)
        self.status_code = status_code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Service(RetryingService):
    """Answers what it was given, in that order."""

    def __init__(self, *answers: Any, max_retries: int = 2) -> None:
        self.naps: list[float] = []
        self.answers = list(answers)
        super().__init__(max_retries=max_retries, sleep=self.naps.append)

    def call(self) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _errors(self) -> tuple[type[Exception], ...]:
        return (ClientError,)

    def _is_temporary(self, error: Exception) -> bool:
        status = error.status_code  # type: ignore[attr-defined]
        return status is None or status == 429 or status >= 500

    def _translated(self, action: str, error: Exception) -> TrainingError:
        kind = ServiceUnavailableError if self._is_temporary(error) else TrainingError
        return kind(f"cannot {action}: {self._redacted(error)}")

    def _secret(self) -> object:
        return "my-key"


def test_what_passes_is_repeated() -> None:
    service = Service(ClientError(500), ClientError(429, Retry_After="3"), "done")
    assert service._retried("do it", service.call) == "done"
    assert service.naps == [0.5, 3.0]


def test_the_last_error_is_raised() -> None:
    service = Service(ClientError(500), ClientError(500), ClientError(503, "later"), "done")
    with pytest.raises(ServiceUnavailableError, match="cannot do it: later"):
        service._retried("do it", service.call)
    assert service.answers == ["done"]


def test_a_refusal_is_raised_at_once_and_without_the_key() -> None:
    service = Service(ClientError(401, "my-key is wrong"), "done")
    with pytest.raises(TrainingError, match=r"cannot do it: \*\*\* is wrong") as caught:
        service._retried("do it", service.call)
    assert caught.value.__cause__ is None
    assert service.naps == []


def made_once(service: Service, there: list[list[str]]) -> str:
    return service._made_once("make it", service.call, lambda: there.pop(0), min)


def test_what_was_made_without_an_answer_is_found() -> None:
    assert made_once(Service(ClientError(None), "second"), [["first"]]) == "first"


def test_of_two_that_were_made_one_is_kept() -> None:
    # Not there yet when it was looked for.
    assert made_once(Service(ClientError(500), "2"), [[], ["2", "1"]]) == "1"


def test_where_none_is_listed_the_answer_counts() -> None:
    assert made_once(Service(ClientError(500), "2"), [[], []]) == "2"


def test_a_rate_limit_makes_nothing() -> None:
    assert made_once(Service(ClientError(429), "only"), []) == "only"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        (None, 2.0),
        ({}, 2.0),
        ({"retry-after": "7"}, 7.0),
        ({"Retry-After": "0"}, 0.0),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after": "-5"}, 0.0),
        ({"retry-after": "86400"}, 120.0),
        ({"retry-after": "soon"}, 2.0),
    ],
)
def test_pauses(headers: dict[str, str] | None, seconds: float) -> None:
    assert pause_before(headers, attempt=2) == seconds


def test_a_pause_until_a_date() -> None:
    date = formatdate(time.time() + 30, usegmt=True)
    assert pause_after(ClientError(429, retry_after=date), 0) == pytest.approx(30, abs=2)


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        ("Fine-tuning was deprecated on September 15, 2025 and is not available.", True),
        ("Finetuning is disabled for your organization", True),
        ("fine_tuning is no longer offered", True),
        ("The fine-tuning file has 3 lines", False),
        ("This endpoint is not available", False),
    ],
)
def test_words_that_say_closed(text: str, closed: bool) -> None:
    assert says_closed(text) is closed
