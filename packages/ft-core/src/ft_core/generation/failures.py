"""Which errors of a language model's API pass by themselves, and how to report the others.

No API client is imported for it: errors are known by their HTTP status and by the names of
their classes, which serves OpenAI's client, httpx, requests, aiohttp and what wraps them.
"""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Iterator
from typing import Any

from ft_core.errors import MissingExtraError

_TRANSIENT_STATUS = frozenset({408, 409, 425, 429})
_FATAL_STATUS = frozenset({401, 402, 403, 404, 405, 407, 410})
_TRANSIENT_CLASSES = frozenset(
    {
        *("APIConnectionError", "APITimeoutError", "ClientConnectionError", "ConnectError"),
        *("ConnectionError", "InternalServerError", "RateLimitError", "ReadTimeout"),
        *("ResourceExhausted", "ServiceUnavailable", "ServiceUnavailableError"),
        "TimeoutError",  # asyncio has its own before Python 3.11
        *("ThrottlingException", "Timeout", "TooManyRequests", "TransportError"),
    }
)
_SECRET = re.compile(r"\b(?:sk|pk|rk|key|gsk|xai)-[\w\-*]{6,}|(?<=Bearer )\S+", re.I)
_MAX_WAIT = 300.0  # seconds; a server that asks for more is not waited for


def is_transient(error: BaseException) -> bool:
    """Say whether the same call may well succeed later: rate limits, server errors, network."""
    if is_fatal(error):
        return False
    for cause in _chain(error):
        status = _status(cause)
        if status is not None:
            return status in _TRANSIENT_STATUS or status >= 500
        if isinstance(cause, TimeoutError | ConnectionError):
            return True
        if any(kind.__name__ in _TRANSIENT_CLASSES for kind in type(cause).__mro__):
            return True
    return False


def is_fatal(error: BaseException) -> bool:
    """Say whether every other call must fail too: a wrong key, URL or model, no credit left."""
    for cause in _chain(error):
        if isinstance(cause, MissingExtraError) or _code(cause) == "insufficient_quota":
            return True
        if _status(cause) in _FATAL_STATUS:
            return True
        wait = retry_after(cause)
        if wait is not None and wait > _MAX_WAIT:
            return True
    return False


def is_rejected(error: BaseException) -> bool:
    """Say whether the server understood this request and refuses it: trying again is no use."""
    status = next((s for s in map(_status, _chain(error)) if s is not None), None)
    return status is not None and 400 <= status < 500 and not is_transient(error)


def retry_after(error: BaseException) -> float | None:
    """Return the seconds that the server asked to wait (RFC 9110, section 10.2.3), or None."""
    for cause in _chain(error):
        headers = getattr(getattr(cause, "response", None), "headers", None)
        if headers is None:
            continue
        milliseconds = _number(headers.get("retry-after-ms"))
        if milliseconds is not None:
            return milliseconds / 1000
        value = headers.get("retry-after") or headers.get("Retry-After")
        seconds = _number(value)
        if seconds is not None:
            return seconds
        if value:
            try:
                date = email.utils.parsedate_to_datetime(value)
            except (TypeError, ValueError):
                return None
            return max(0.0, date.timestamp() - time.time())
    return None


def describe(error: BaseException, secret: str | None = None) -> str:
    """Return one line that says what went wrong and what lay behind it, without any key in it."""
    *_, root = _chain(error)
    text = _one_line(error) + (f" ({_one_line(root)})" if root is not error else "")
    if secret:
        text = text.replace(secret, "***")
    text = _SECRET.sub("***", text)
    return text if len(text) <= 300 else text[:300] + "..."


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and those that it was raised from."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    for value in (
        getattr(error, "status_code", None),
        getattr(error, "status", None),
        getattr(response, "status_code", None),
        getattr(error, "code", None),
    ):
        if isinstance(value, int) and 100 <= value < 600:
            return int(value)
    return None


def _code(error: BaseException) -> Any:
    return getattr(error, "code", None)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if 0 <= number < float("inf") else None
