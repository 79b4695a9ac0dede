"""A small real server that speaks OpenAI's POST /v1/chat/completions on 127.0.0.1.

    with OpenAIServer(latency=0.2, failure_rate=0.2) as server:
        llm = OpenAILike(model="test", api_base=server.url, api_key="x", is_chat_model=True)

or in a process of its own, which prints its URL on the first line:

    python integration-tests/openai_server.py --latency 0.2

Every request and every answer is checked against the types of OpenAI's own client, and
against the published API description where the file and `jsonschema` are there. What does
not fit is answered with status 400 or 500 and kept in `problems`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from openai.types.chat import ChatCompletion, completion_create_params
from pydantic import TypeAdapter, ValidationError

API_DESCRIPTION = Path(__file__).resolve().parents[2] / "shared" / "specs" / "openai.json"

Answer = Callable[[list[dict[str, Any]]], str]


def two_questions(messages: list[dict[str, Any]]) -> str:
    """Answer as a capable model does: numbered questions about words of the last message."""
    text = messages[-1]["content"]
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    passage = re.search(r"<passage>\s*(.*?)\s*</passage>", text, re.S)
    words = re.findall(r"\w{4,}", passage.group(1) if passage else text)[:4] or ["nothing"]
    subject = " ".join(words)
    return (
        "Here are the questions:\n\n"
        f"1. **What does the {subject} do, case {digest}?**\n"
        f"2. How is the {subject} kept, case {digest}?"
    )


class OpenAIServer:
    """The server, in threads of this process; a context manager.

    Args:
        latency: seconds before each answer, failures included.
        failure_rate: the share of calls that fail, half with 429 and half with 500.
        seed: decides which calls fail.
        retry_after: seconds that a 429 asks to wait.
        api_key: what the client has to show; any key if None.
        answer: makes the text of an answer out of the messages.
        fail: returns the status to fail a request with, or None; it is given the messages.
        port: a free one if 0.
    """

    def __init__(
        self,
        *,
        latency: float = 0.0,
        failure_rate: float = 0.0,
        seed: int = 0,
        retry_after: float = 1.0,
        api_key: str | None = None,
        answer: Answer = two_questions,
        fail: Callable[[list[dict[str, Any]]], int | None] = lambda messages: None,
        port: int = 0,
    ) -> None:
        self.latency = latency
        self.failure_rate = failure_rate
        self.seed = seed
        self.retry_after = retry_after
        self.api_key = api_key
        self.answer = answer
        self.fail = fail
        self.statuses: Counter[int] = Counter()
        """Status to number of calls."""
        self.answered: Counter[str] = Counter()
        """Last message to how often it was answered."""
        self.problems: list[str] = []
        """Requests and answers that do not fit the API."""
        self.in_flight = self.most_in_flight = 0
        self._calls = 0
        self._lock = threading.Lock()
        self._contract = _Contract()
        self._http = _Server(("127.0.0.1", port), _handler(self))
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    @property
    def calls(self) -> int:
        """All calls, failed ones included."""
        return sum(self.statuses.values())

    def stats(self) -> dict[str, Any]:
        with self._lock:
            return {
                "calls": self.calls,
                "statuses": {str(status): count for status, count in self.statuses.items()},
                "answered": sum(self.answered.values()),
                "answered more than once": sum(count > 1 for count in self.answered.values()),
                "most in flight": self.most_in_flight,
                "problems": self.problems,
            }

    def __enter__(self) -> OpenAIServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def respond(self, path: str, key: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Return the status and the body of the answer to one call."""
        with self._lock:
            self._calls += 1
            call = self._calls
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            time.sleep(self.latency)
            status, answer = self._decide(call, path, key, body)
        finally:
            with self._lock:
                self.in_flight -= 1
        with self._lock:
            self.statuses[status] += 1
        return status, answer

    def _decide(self, call: int, path: str, key: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if path != "/v1/chat/completions":
            return 404, _error(f"Unknown request URL: POST {path}", "invalid_request_error")
        if self.api_key is not None and key != self.api_key:
            # A careless server: it repeats the whole key.
            return 401, _error(
                f"Incorrect API key provided: {key}.", "invalid_request_error", "invalid_api_key"
            )
        try:
            request = json.loads(body)
            self._contract.check_request(request)
        except (ValueError, ValidationError) as error:
            return self._problem(400, f"request: {error}")
        messages = request["messages"]
        status = self.fail(messages) or self._accident(call)
        if status is not None:
            return status, _failure(status)
        answer = _completion(request, self.answer(messages), call)
        try:
            self._contract.check_answer(answer)
        except (ValueError, ValidationError) as error:
            return self._problem(500, f"answer: {error}")
        with self._lock:
            self.answered[messages[-1]["content"]] += 1
        return 200, answer

    def _accident(self, call: int) -> int | None:
        chance = random.Random(f"{self.seed} {call}")
        if chance.random() >= self.failure_rate:
            return None
        return chance.choice([429, 500])

    def _problem(self, status: int, text: str) -> tuple[int, dict[str, Any]]:
        with self._lock:
            self.problems.append(text)
        return status, _error(text, "invalid_request_error")


class _Contract:
    """Checks requests and answers against OpenAI's types and, where possible, its description."""

    def __init__(self) -> None:
        self._request = TypeAdapter(completion_create_params.CompletionCreateParamsNonStreaming)
        self._schemas: dict[str, Any] = {}
        try:
            from jsonschema import Draft202012Validator
        except ModuleNotFoundError:
            return
        if not API_DESCRIPTION.exists():
            return
        components = json.loads(API_DESCRIPTION.read_text(encoding="utf-8"))["components"]
        for name in ("CreateChatCompletionRequest", "CreateChatCompletionResponse"):
            schema = {"$ref": f"#/components/schemas/{name}", "components": components}
            self._schemas[name] = Draft202012Validator(schema)

    @property
    def knows_description(self) -> bool:
        return bool(self._schemas)

    def check_request(self, request: Any) -> None:
        self._request.validate_python(request)
        self._by_description("CreateChatCompletionRequest", request)

    def check_answer(self, answer: Any) -> None:
        ChatCompletion.model_validate(answer, strict=False)
        self._by_description("CreateChatCompletionResponse", answer)

    def _by_description(self, name: str, value: Any) -> None:
        if name in self._schemas:
            for error in self._schemas[name].iter_errors(value):
                raise ValueError(f"{name}: {error.json_path}: {error.message}")


def _completion(request: dict[str, Any], text: str, call: int) -> dict[str, Any]:
    asked = sum(len(str(message["content"]).split()) for message in request["messages"])
    return {
        "id": f"chatcmpl-{call}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request["model"],
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": asked,
            "completion_tokens": len(text.split()),
            "total_tokens": asked + len(text.split()),
        },
    }


def _error(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _failure(status: int) -> dict[str, Any]:
    if status == 429:
        return _error("Rate limit reached for requests.", "requests", "rate_limit_exceeded")
    if status >= 500:
        return _error("The server had an error while processing your request.", "server_error")
    return _error("This request cannot be answered.", "invalid_request_error")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512  # connections that many clients open in the same instant


def _handler(server: OpenAIServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay open
        disable_nagle_algorithm = True
        wbufsize = -1  # headers and body leave together

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            key = self.headers.get("Authorization", "").removeprefix("Bearer ")
            self._send(*server.respond(self.path, key, body))

        def do_GET(self) -> None:
            found = self.path == "/stats"
            self._send(200 if found else 404, server.stats() if found else {})

        def _send(self, status: int, answer: dict[str, Any]) -> None:
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if status == 429:
                self.send_header("Retry-After", f"{server.retry_after:g}")
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--failure-rate", type=float, default=0.0)
    parser.add_argument("--retry-after", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    with OpenAIServer(**vars(parser.parse_args())) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
