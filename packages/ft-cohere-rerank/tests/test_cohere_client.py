from __future__ import annotations

from typing import Any

import cohere
import httpx
import pytest
from cohere.core.api_error import ApiError

from ft_cohere_rerank.client import (
    check_url,
    find_key,
    is_foreign,
    is_temporary,
    reason,
    server_of,
    token_of,
)
from ft_core.errors import ArgumentError

MONTH = "You are using a Trial key, which is limited to 1000 API calls / month."


@pytest.mark.parametrize(
    ("error", "temporary"),
    [
        (ApiError(status_code=429, body={"message": "too many API calls."}), True),
        (ApiError(status_code=429, body={"message": MONTH}), False),
        (ApiError(status_code=408), True),
        (ApiError(status_code=502, body="bad gateway"), True),
        (ApiError(status_code=400, body={"message": "no"}), False),
        (ApiError(status_code=200, body="<html>"), False),
        (httpx.ReadTimeout("slow"), True),
        (httpx.ConnectError("refused"), True),
        (httpx.TooManyRedirects("round and round"), False),
        (ApiError(body="no status"), False),
    ],
)
def test_what_may_pass(error: Exception, temporary: bool) -> None:
    assert is_temporary(error) is temporary


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"id": "1", "message": "invalid request"}, "invalid request"),
        ({"error": {"message": "no such model", "code": 404}}, "no such model"),
        ({"error": "overloaded"}, "overloaded"),
        ({"detail": "Not Found"}, "Not Found"),
        ({"code": 7}, "{'code': 7}"),
        ("404 page not found", "404 page not found"),
        (" <!DOCTYPE html>...", "a page of HTML"),
        ({"message": "it is not available."}, "it is not available"),
        (None, "it gives no reason"),
    ],
)
def test_the_servers_words(body: Any, words: str) -> None:
    error = ApiError(status_code=400, headers={"set-cookie": "x"}, body=body)
    assert reason(error) == words


def test_an_error_without_an_answer() -> None:
    assert reason(httpx.ConnectError("refused")) == "refused"
    assert reason(httpx.ReadTimeout("")) == "ReadTimeout"


def test_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COHERE_API_KEY", raising=False)
    monkeypatch.delenv("CO_API_KEY", raising=False)
    with pytest.raises(ArgumentError, match=r"set COHERE_API_KEY or CO_API_KEY$"):
        find_key(None, None)
    assert find_key(None, "http://127.0.0.1:8000") == "none"
    monkeypatch.setenv("CO_API_KEY", "second")
    assert find_key(None, None) == "second"
    monkeypatch.setenv("COHERE_API_KEY", "first")
    assert find_key(None, None) == "first"
    assert find_key("given", None) == "given"


@pytest.mark.parametrize(
    ("error", "foreign"),
    [
        (ApiError(status_code=404, body="<html>"), True),
        (ApiError(status_code=200, body="<html>"), True),
        (ApiError(status_code=404, body={"detail": "Not Found"}), False),
        (ApiError(status_code=413, body="<html>"), False),
        (ApiError(status_code=401, body="<html>"), False),
        (TypeError("a list"), True),
        (httpx.ConnectError("refused"), False),
    ],
)
def test_what_is_no_server_of_coheres_api(error: Exception, foreign: bool) -> None:
    assert is_foreign(error) is foreign


@pytest.mark.parametrize(
    "url", ["nonsense", "", "127.0.0.1:8000", "ftp://host", "http://", "http://a:secret@b:port"]
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ArgumentError, match=r"^base_url: is no address such as") as caught:
        check_url(url)
    assert "secret" not in str(caught.value)


def test_an_address_has_no_version() -> None:
    for url in ("http://host/v2", "https://host/api/v2/"):
        with pytest.raises(ArgumentError, match="without /v2"):
            check_url(url)
    for usable in (None, "http://host", "https://host:8000/api/v2x"):
        check_url(usable)


def test_where_a_client_talks_to() -> None:
    client = cohere.ClientV2(api_key="k", base_url="http://me:secret@127.0.0.1:8000/api/?x=1")
    assert server_of(client) == "http://127.0.0.1:8000/api"
    assert token_of(client) == "k"
    assert token_of(object()) is None
