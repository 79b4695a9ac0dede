"""Cohere's own client: made, asked where it talks to, and its errors put into words."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ft_core.errors import ArgumentError
from ft_core.retries import TEMPORARY_STATUS

KEYS = ("COHERE_API_KEY", "CO_API_KEY")
"""The environment's variables: LlamaIndex's, and that of Cohere's client."""

ONCE: Any = {"max_retries": 0}
"""Options of a request that the client does not repeat by itself: it would send a file again
without its name and type, and make a model twice."""


def find_key(api_key: str | None, base_url: str | None) -> str:
    """Return the key to use; a server of one's own may need none.

    Raises:
        ArgumentError: there is none, and the server is Cohere's.
    """
    key = api_key or next((os.environ[name] for name in KEYS if os.environ.get(name)), None)
    if not key and base_url is None:
        raise ArgumentError("api_key", f"is missing: set {KEYS[0]}, or pass it")
    return key or "none"


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
    """Return what a call by the client raises where the service or the line is to blame."""
    import httpx
    from cohere.core.api_error import ApiError

    return (ApiError, httpx.HTTPError)


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
    return str(body or "it gives no reason")[:300]
