"""What the services that train have in common: requests tried again, one kind of error.

A request is repeated after an error that passes by itself, as late as the server's Retry-After
says; what the server rejects is raised at once, in its own words.
"""

from __future__ import annotations

import logging
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from ft_core.errors import TrainingError

logger = logging.getLogger(__name__)

T = TypeVar("T")

TEMPORARY_STATUS = frozenset({408, 409, 429})
"""Statuses below 500 after which the same request may succeed."""

_LONGEST_RETRY = 120.0  # seconds; whatever the server asks for
_CLOSED = re.compile(
    r"not (?:currently )?(?:available|enabled|allowed|permitted|supported|open)|unavailable|"
    r"no longer|closed|permission|access|deprecated|discontinued|wound down|winding down|disabled"
)


class ServiceUnavailableError(TrainingError):
    """The service does not answer, or not now: the same request may succeed later."""


class RetryingService(ABC):
    """Base of what talks to a fine-tuning API through its own client.

    A subclass says which errors the client raises, which of them pass by themselves, and what
    they mean.

    Args:
        max_retries: tries after the first.
        sleep: how to pause, in seconds.
    """

    def __init__(self, *, max_retries: int, sleep: Callable[[float], None] = time.sleep) -> None:
        self._max_retries = max_retries
        self._sleep = sleep

    @abstractmethod
    def _errors(self) -> tuple[type[Exception], ...]:
        """Return what the client raises (here, so that it is imported late)."""

    @abstractmethod
    def _is_temporary(self, error: Exception) -> bool:
        """Whether the same request may succeed a little later."""

    @abstractmethod
    def _translated(self, action: str, error: Exception) -> TrainingError:
        """Return the client's error as one for a user to read."""

    @abstractmethod
    def _secret(self) -> object:
        """Return the key that no message may hold."""

    def _retried(self, action: str, call: Callable[..., T], *arguments: Any) -> T:
        """Return what the call returns; for a call that may be made twice.

        Args:
            action: what the call does, for messages: "cannot {action}".
            call: what talks to the service.
            arguments: of the call.

        Raises:
            ServiceUnavailableError: no try is left.
            TrainingError: the service rejects the request.
        """
        for attempt in range(self._max_retries + 1):
            try:
                return call(*arguments)
            except self._errors() as error:
                if attempt == self._max_retries or not self._is_temporary(error):
                    raise self._translated(action, error) from self._cause(error)
                pause = pause_after(error, attempt)
                logger.debug("could not %s; again in %.1f s", action, pause)
                self._sleep(pause)
        raise AssertionError("unreachable")

    def _made_once(
        self,
        action: str,
        make: Callable[[], T],
        find: Callable[[], list[T]],
        keep: Callable[[list[T]], T],
    ) -> T:
        """Make something at the service, exactly one.

        Args:
            action: what `make` does, for messages.
            make: makes it, and may have made it where no answer comes.
            find: looks for what this very request has made; asked where no answer came.
            keep: returns the one to use of those that one request has made.
        """
        unclear = False
        for attempt in range(self._max_retries + 1):
            try:
                made = make()
                break
            except self._errors() as error:
                last = attempt == self._max_retries
                if not self._is_temporary(error):
                    raise self._translated(action, error) from self._cause(error)
                if not last:
                    self._sleep(pause_after(error, attempt))
                if getattr(error, "status_code", None) != 429:
                    unclear = True
                    if found := find():
                        return found[0]
                if last:
                    raise self._translated(action, error) from self._cause(error)
        return keep(find() or [made]) if unclear else made

    def _redacted(self, text: object) -> str:
        secret = self._secret()
        return str(text).replace(secret, "***") if isinstance(secret, str) and secret else str(text)

    def _cause(self, error: Exception) -> Exception | None:
        # A server that repeats the key would put it into the traceback.
        return error if self._redacted(error) == str(error) else None


def says_closed(text: str) -> bool:
    """Whether a server's words say that there is no fine-tuning, or none for this account."""
    text = text.lower().replace("_", " ").replace("-", " ").replace("finetun", "fine tun")
    return "fine tun" in text and _CLOSED.search(text) is not None


def pause_before(headers: Mapping[str, str] | None, attempt: int) -> float:
    """Return the seconds until the next try: the server's Retry-After, else 0.5, 1, 2, ...

    Args:
        headers: of the answer; None where there was none.
        attempt: how many tries there were before the last one.
    """
    asked = None if headers is None else _retry_after(headers)
    pause = 0.5 * 2**attempt if asked is None else asked
    return float(min(max(pause, 0.0), _LONGEST_RETRY))


def pause_after(error: Exception, attempt: int) -> float:
    """Return the seconds until the next try after a client's error; see `pause_before`."""
    response = getattr(error, "response", None)
    headers = getattr(error, "headers", None) if response is None else response.headers
    return pause_before(headers, attempt)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    lower = {name.lower(): value for name, value in headers.items()}
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = lower.get(name)
        if value is None:
            continue
        try:
            return float(value) * unit
        except ValueError:
            pass
        try:
            return parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            continue
    return None
