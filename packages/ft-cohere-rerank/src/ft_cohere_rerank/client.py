"""Cohere's own client: made, asked where it talks to, and its errors put into words."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from ft_core.errors import ArgumentError
from ft_core.retries import TEMPORARY_STATUS

KEYS = ("COHERE_API_KEY", "CO_API_KEY")
"""The environment's variables: LlamaIndex's, and that of Cohere's client."""

ONCE: Any = {"max_retries": 0}
"""Options of a request that the client does not repeat by itself: it would send a file again
without its name and type, and make a model twice."""

NO_SUCH_CALL = (404, 405, 410, 501)
"""Statuses of a server that does not have the call, or not any more."""


def find_key(api_key: str | None, base_url: str | None) -> str:
    """Return the key to use; a server of one's own may need none.

    Raises:
        ArgumentError: there is none, and the server is Cohere's.
    """
    key = api_key or next((os.environ[name] for name in KEYS if os.environ.get(name)), None)
    if not key and base_url is None:
        raise ArgumentError("the API key", f"is missing; set {' or '.join(KEYS)}")
    return key or "none"


def check_url(base_url: str | None) -> None:
    """Check the address of another server, before anything is sent.

    Raises:
        ArgumentError: it is none, or it names a version, which Cohere's client adds itself.
    """
    if base_url is None:
        return
    try:
        url = urlsplit(base_url)
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # such as a port that is no number
        usable = False
    if not usable:  # it is not repeated, as it may hold a password
        raise ArgumentError("base_url", "is no address such as http://127.0.0.1:8000")
    version = url.path.rstrip("/").rpartition("/")[2]
    if version in ("v1", "v2"):
        raise ArgumentError("base_url", f"is to be given without /{version}")


def check_timeout(timeout: float) -> None:
    """Check the seconds that an answer may take.

    Raises:
        ArgumentError: they are not above 0.
    """
    if not timeout > 0:
        raise ArgumentError("timeout", f"must be above 0, not {timeout}")


def url_argument(base_url: str | None) -> dict[str, Any]:
    """Return the client's argument for another server; its default looks at the environment."""
    return {} if base_url is None else {"base_url": base_url}


def token_of(client: Any) -> str | None:
    """Return the key that a client was made with, where it can be had."""
    wrapper = getattr(client, "_client_wrapper", None)  # the client has no public way
    return None if wrapper is None else str(wrapper._get_token())


def server_of(client: Any) -> str:
    """Return the address that a client talks to, without a user or password in it."""
    import httpx

    wrapper = getattr(client, "_client_wrapper", None)
    if wrapper is None:
        return type(client).__name__
    url = httpx.URL(wrapper.get_base_url())
    return str(url.copy_with(username=None, password=None, query=None)).rstrip("/")


def client_errors() -> tuple[type[Exception], ...]:
    """Return what a call by the client raises where the service or the line is to blame.

    `TypeError` and `AttributeError` are what it ends in where an answer's JSON is a list, or
    lacks what is read of it.
    """
    import httpx
    from cohere.core.api_error import ApiError

    return (ApiError, httpx.HTTPError, TypeError, AttributeError)


def is_foreign(error: Exception) -> bool:
    """Whether the address answers, and not as a server that speaks Cohere's API would.

    That is an answer of another shape, or that there is no such call in something else than
    a JSON object: the page of a proxy, say.
    """
    status = getattr(error, "status_code", None)
    if status is None:
        return isinstance(error, TypeError | AttributeError)
    expected = status >= 400 and status not in NO_SUCH_CALL
    return not expected and not isinstance(getattr(error, "body", None), Mapping)


def has_coheres_shape(error: Exception) -> bool:
    """Whether a refusal is written as Cohere's are; those of other servers need not be."""
    body = getattr(error, "body", None)
    return isinstance(body, Mapping) and isinstance(body.get("message"), str)


def is_temporary(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    import httpx

    status = getattr(error, "status_code", None)
    if status == 429:
        # A trial key's calls of the month are used up: no pause helps.
        return "/ month" not in reason(error)
    if isinstance(status, int):
        return status in TEMPORARY_STATUS or status >= 500
    return isinstance(error, httpx.TransportError)


def reason(error: Exception) -> str:
    """Return what the server says, without the headers that the client's error prints."""
    return _said(error).rstrip().rstrip(".")


def _said(error: Exception) -> str:
    if isinstance(error, TypeError | AttributeError):
        return "its answer is JSON of another shape"
    if not hasattr(error, "status_code"):
        return str(error) or type(error).__name__
    body = getattr(error, "body", None)
    if isinstance(body, Mapping):
        # vLLM and others answer as OpenAI does.
        inner = body.get("error")
        said = body.get("message") or body.get("detail") or inner
        if isinstance(inner, Mapping):
            said = inner.get("message") or said
        return str(said or dict(body))
    if isinstance(body, str) and body.lstrip().startswith("<"):
        return "a page of HTML"
    return str(body or "it gives no reason")[:300]
