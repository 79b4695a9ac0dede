"""What the API servers of this folder share: a published description, HTTP, faults, a diary.

A service is a `ContractServer` with a table of routes and one method for each. Requests and
answers, every chunk of a stream included, are validated against the description. What the
client gets wrong is answered with the service's own kind of error, what the server gets wrong
with 500, and both are kept in `violations`.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import socket
import string
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol
from urllib.parse import parse_qsl, unquote, urlsplit

from typing_extensions import Self

# --------------------------------------------------------------------------------------
# Errors and values


class ServiceError(Exception):
    """An answer with a status of 400 or more, and the service's error body."""

    def __init__(
        self,
        status: int,
        message: str,
        body: dict[str, Any],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = body
        self.headers = dict(headers or {})


class ContractError(Exception):
    """A request or an answer that the API description does not allow."""


class UnknownNameError(ContractError):
    """A field or a query parameter that the API description does not know."""


@dataclass(frozen=True)
class Call:
    """One HTTP request as it arrived, in the shape that openapi-core reads."""

    method: str
    """In lower case."""
    path: str
    """The whole of it, with the service's prefix."""
    query: Sequence[tuple[str, str]]
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "")

    @property
    def is_form(self) -> bool:
        return self.content_type.startswith("multipart/form-data")

    @property
    def json(self) -> dict[str, Any]:
        value = json.loads(self.body)
        assert isinstance(value, dict)
        return value

    def parameter(self, name: str, default: str | None = None) -> str | None:
        return dict(self.query).get(name, default)


@dataclass
class Reply:
    """What goes back: one JSON body, the chunks of a stream, or a file's bytes."""

    body: dict[str, Any] | None = None
    chunks: list[dict[str, Any]] | None = None
    content: bytes | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/octet-stream"
    """Of `content`."""


@dataclass
class Request:
    """One request in the server's diary. Headers lack the API key."""

    method: str
    path: str
    """Without the service's prefix and query."""
    query: dict[str, str]
    headers: dict[str, str]
    body: Any
    """Parsed JSON, a form's fields (a file as its name and size), or None."""
    template: str | None = None
    """The path as the description writes it, or None where it has none such."""
    status: int | None = None
    """None while in flight, and where the connection was dropped."""
    done: bool = False
    """The work was done, whatever was answered."""

    def matches(self, on: str) -> bool:
        """Whether this is "METHOD /path" or "/path"; the path real, or as described."""
        method, _, place = on.rpartition(" ")
        return method in ("", self.method) and place in (self.path, self.template)

    @property
    def retry(self) -> int:
        """How often OpenAI's SDK says that it has tried before."""
        return int(self.headers.get("x-stainless-retry-count", 0))


def parse_form(content_type: str, body: bytes) -> dict[str, tuple[str | None, bytes]]:
    """Return the fields of a multipart body: name to (file name or None, content)."""
    head = f"Content-Type: {content_type}\r\n\r\n".encode()
    message = BytesParser(policy=HTTP).parsebytes(head + body)
    if not message.is_multipart():
        raise ContractError("the body is not multipart/form-data with a boundary")
    fields: dict[str, tuple[str | None, bytes]] = {}
    for part in message.iter_parts():
        name = part.get_param("name", header="content-disposition")
        content = part.get_payload(decode=True)
        assert isinstance(content, bytes)
        fields[str(name)] = (part.get_filename(), content)
    return fields


def fold_form(fields: Mapping[str, tuple[str | None, bytes]]) -> dict[str, bytes]:
    """Fold `name[key]` fields into one JSON field `name`, as the client unfolded them."""
    folded: dict[str, bytes] = {}
    nested: dict[str, dict[str, Any]] = {}
    for name, (_, content) in fields.items():
        match = re.fullmatch(r"(\w+)\[(\w+)\]", name)
        if match is None:
            folded[name] = content
        else:
            text = content.decode()
            nested.setdefault(match[1], {})[match[2]] = int(text) if text.isdigit() else text
    return folded | {name: json.dumps(value).encode() for name, value in nested.items()}


# --------------------------------------------------------------------------------------
# The contract


class Contract(Protocol):
    def check_request(self, call: Call, template: str) -> None: ...
    def check_reply(self, call: Call, template: str, status: int, body: Any) -> None: ...
    def check_chunk(self, call: Call, chunk: dict[str, Any]) -> None: ...


class DescriptionContract:
    """A published description, through openapi-core.

    Descriptions say 3.1 and in places mean 3.0 or JSON that only a machine with every file of
    the original can resolve, so four things are rewritten on loading: `nullable: true`, which
    3.1 does not know, becomes a type "null" beside the others; `exclusiveMinimum: true`, which
    would be read as the number 1, becomes its `minimum`; `format: binary` on a string, which
    no validator holds bytes against, becomes anything; discriminators, whose implicit mapping
    names schemas that do not exist (role "user"), go: the `oneOf` beside each says the same.

    Two checks are not openapi-core's: fields and query parameters that the description does
    not know (the real services refuse these, the descriptions tolerate them), and bodies of
    errors with a status that the operation does not describe (jsonschema).

    Args:
        path: the description, JSON.
        error_schema: what the body of an undescribed error has to be, by its schema's name.
    """

    def __init__(self, path: Path, *, error_schema: str) -> None:
        from jsonschema_path import SchemaPath
        from openapi_core import Config, OpenAPI

        self._description = _to_3_1(json.loads(path.read_text(encoding="utf-8")))
        self._error_schema = error_schema
        url = urlsplit(self._description["servers"][0]["url"])
        self._host = f"{url.scheme}://{url.netloc}"
        config = Config(
            spec_validator_cls=None,
            extra_media_type_deserializers={
                "multipart/form-data": _form_fields,
                "text/event-stream": lambda value, **_: json.loads(value.removeprefix(b"data: ")),
            },
        )
        self._api = OpenAPI(SchemaPath.from_dict(self._description), config=config)
        self._lock = threading.Lock()
        self._schemas: dict[str, Any] = {}

    def check_request(self, call: Call, template: str) -> None:
        self._check(self._api.validate_request, _CoreRequest(call, self._host))
        operation = self._description["paths"][template][call.method]
        self._check_names(
            "query parameter",
            {name.split("[")[0] for name, _ in call.query},
            {self._resolved(parameter)["name"] for parameter in operation.get("parameters", [])},
        )
        for media in operation.get("requestBody", {}).get("content", {}).values():
            given = _form_fields(call.body, call.content_type) if call.is_form else call.json
            self._check_names("request argument", set(given), self._properties(media["schema"]))

    def check_reply(self, call: Call, template: str, status: int, body: Any) -> None:
        operation = self._description["paths"].get(template, {}).get(call.method, {})
        if status >= 400 and str(status) not in operation.get("responses", {}):
            return self.check_schema(self._error_schema, body)
        response = _CoreResponse(json.dumps(body).encode(), "application/json", status)
        request = _CoreRequest(call, self._host)
        return self._check(self._api.validate_response, request, response)

    def check_chunk(self, call: Call, chunk: dict[str, Any]) -> None:
        data = b"data: " + json.dumps(chunk).encode()
        response = _CoreResponse(data, "text/event-stream", 200)
        self._check(self._api.validate_response, _CoreRequest(call, self._host), response)

    def check_schema(self, name: str, value: Any) -> None:
        """Check a value against a schema of the description's components."""
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import best_match

        if name not in self._schemas:
            components = self._description["components"]
            schema = {"$ref": f"#/components/schemas/{name}", "components": components}
            self._schemas[name] = Draft202012Validator(schema)
        error = best_match(self._schemas[name].iter_errors(value))
        if error is not None:
            raise ContractError(f"{error.json_path}: {error.message}")

    def _check(self, validate: Callable[..., None], *arguments: Any) -> None:
        from openapi_core.exceptions import OpenAPIError

        try:
            with self._lock:
                validate(*arguments)
        except OpenAPIError as error:
            raise ContractError(_reason(error)) from None

    @staticmethod
    def _check_names(what: str, given: set[str], known: set[str]) -> None:
        if unknown := sorted(given - known):
            raise UnknownNameError(f"Unrecognized {what} supplied: {', '.join(unknown)}")

    def _resolved(self, node: dict[str, Any]) -> dict[str, Any]:
        """What a reference of the description points to; the node itself where it is none."""
        while "$ref" in node:
            place = self._description
            for part in node["$ref"].removeprefix("#/").split("/"):
                place = place[part]
            node = place
        return node

    def _properties(self, schema: dict[str, Any]) -> set[str]:
        """The names of the fields that a schema knows, those of its parts included."""
        schema = self._resolved(schema)
        names = set(schema.get("properties", {}))
        for part in schema.get("allOf", []):
            names |= self._properties(part)
        return names


def _to_3_1(node: Any) -> Any:
    if isinstance(node, list):
        return [_to_3_1(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("type") == "string" and node.get("format") == "binary":
        return {}
    if "in" in node and "schema" in node:
        # A parameter: null has no form in a URL, and openapi-core wants its one type.
        node = node | {"schema": {**node["schema"], "nullable": False}}
    changed = {
        key: _to_3_1(value)
        for key, value in node.items()
        if key != "nullable" and not (key == "discriminator" and "propertyName" in value)
    }
    if changed.get("exclusiveMinimum") is True:
        changed["exclusiveMinimum"] = changed.pop("minimum")
    if node.get("nullable") is True:
        return {"anyOf": [changed, {"type": "null"}]}
    return changed


def _form_fields(value: bytes, content_type: str = "", **parameters: str) -> dict[str, bytes]:
    # openapi-core hands over the parameters of the content type, not the type itself.
    if parameters:
        content_type = f'multipart/form-data; boundary="{parameters.get("boundary", "")}"'
    try:
        return fold_form(parse_form(content_type, value))
    except ContractError as error:
        raise ValueError(str(error)) from None


class _CoreRequest:
    """A `Call` by openapi-core's protocol."""

    def __init__(self, call: Call, host: str) -> None:
        from openapi_core.datatypes import RequestParameters
        from werkzeug.datastructures import Headers, ImmutableMultiDict

        self.host_url = host
        self.method = call.method
        self.path = call.path
        self.body = call.body or None
        self.content_type = call.content_type
        self.parameters = RequestParameters(
            query=ImmutableMultiDict(call.query), header=Headers(list(call.headers.items()))
        )


@dataclass
class _CoreResponse:
    data: bytes
    content_type: str
    status_code: int
    headers: dict[str, str] = field(default_factory=dict)


def _reason(error: BaseException) -> str:
    """The place and the cause of what openapi-core found, in one line."""
    from jsonschema.exceptions import best_match

    found = list(getattr(error.__cause__, "schema_errors", ()))
    best = best_match(found)
    if best is None:
        return f"{error} {error.__cause__ or ''}".strip()
    return f"{best.json_path}: {best.message}"


# --------------------------------------------------------------------------------------
# The service


@dataclass
class Fault:
    """What `ContractServer.fail` was told."""

    what: int | Literal["drop", "hang", "cut"]
    times: int
    on: str | None
    done: bool
    retry_after: float
    seconds: float

    def fits(self, request: Request) -> bool:
        return self.times > 0 and (self.on is None or request.matches(self.on))


class Drop(Exception):
    """Close the connection without (the rest of) an answer."""

    def __init__(self, after: Reply | None = None) -> None:
        super().__init__()
        self.after = after


class ContractServer:
    """A service, in threads of this process; a context manager.

    Args:
        contract: what requests and answers have to be.
        api_key: what clients have to show.
        port: a free one if 0.
    """

    routes: ClassVar[tuple[tuple[str, str, str], ...]]
    """Method, path as the description writes it, and the name of the method that answers."""
    name: ClassVar[str]
    """Of the thread that listens."""
    prefix: ClassVar[str] = ""
    """What stands before each path of the description."""

    def __init__(self, contract: Contract, *, api_key: str, port: int) -> None:
        self.api_key = api_key
        self.requests: list[Request] = []
        """Every request, oldest first."""
        self.violations: list[str] = []
        """What clients or this server did against the contract, or crashed on."""
        self._contract = contract
        self._faults: list[Fault] = []
        self._change = threading.Condition(threading.RLock())
        self._stopping = threading.Event()
        self._workers: list[threading.Thread] = []
        self._http = _HTTPServer(("127.0.0.1", port), _Handler)
        self._http.service = self
        self._thread = threading.Thread(
            target=self._http.serve_forever, args=(0.02,), name=self.name
        )

    # ---- what a service decides

    def refusal(self, status: int, message: str) -> ServiceError:
        """Return an error of the service's own shape."""
        raise NotImplementedError

    def authenticate(self, call: Call) -> None:
        """Raise what `refusal` returns for a call without the key."""
        raise NotImplementedError

    def contract_refusal(self, error: Exception, call: Call, template: str) -> ServiceError:
        """Return the answer to a request that is against the contract."""
        return self.refusal(400, f"{call.method.upper()} {template}: {error}")

    def rate_limited(self, seconds: float) -> ServiceError:
        """Return the answer to a request that comes too soon."""
        raise NotImplementedError

    def cancel_work(self) -> None:
        """Tell the threads in `_workers` to end; `_change` is held, and notified after."""

    def sign(self, reply: Reply) -> None:
        """Add the headers that every answer has."""

    @property
    def chunk_seconds(self) -> float:
        """Return how long to wait between the chunks of a stream."""
        return 0.0

    # ---- life and diary

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        with self._change:
            self.cancel_work()
            self._change.notify_all()
        self._http.shutdown()
        self._thread.join()
        self._http.close_connections()
        self._http.server_close()  # joins the threads of the connections
        for thread in self._workers:
            thread.join(timeout=120)
        if stuck := [thread.name for thread in self._workers if thread.is_alive()]:
            raise RuntimeError(f"threads that do not stop: {stuck}")

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    @property
    def base_url(self) -> str:
        return self.origin + self.prefix

    def count(self, on: str, *, done: bool | None = None) -> int:
        """How many requests came in that match "METHOD /path" or "/path".

        Args:
            on: the path without the service's prefix, real or as the description writes it.
            done: only those of which the work was, or was not, done.
        """
        with self._change:
            return sum(
                request.matches(on) and done in (None, request.done) for request in self.requests
            )

    def fail(
        self,
        what: int | Literal["drop", "hang", "cut"],
        *,
        times: int = 1,
        on: str | None = None,
        done: bool = False,
        retry_after: float = 0.01,
        seconds: float = 5.0,
    ) -> None:
        """Let the next requests fail.

        Args:
            what: a status (429 with the headers that say when to come back, 500, 503, ...),
                "drop" (the connection closes without an answer), "hang" (the same after
                `seconds`), or "cut" (a stream ends in its middle).
            times: how many requests.
            on: which: "METHOD /path" or "/path" without the service's prefix, the path real or
                as the description writes it (`/files/{file_id}`); any request if None.
            done: the work is done nevertheless: a client that tries once more does it twice.
            retry_after: seconds a 429 asks to wait.
        """
        with self._change:
            self._faults.append(Fault(what, times, on, done, retry_after, seconds))

    # ---- one request

    def respond(self, call: Call, record: Request) -> Reply:
        """Answer one request; what fails becomes a `ServiceError`'s body, or `Drop`."""
        try:
            try:
                template, name, ids = self._route(call)
                record.template = template
                self.authenticate(call)
                self._check_request(call, template)
                fault = self._fault(record)
                if fault and not fault.done and fault.what != "cut":
                    self._raise(fault, None)
                reply: Reply = getattr(self, name)(call, *ids)
                record.done = True
            except ServiceError as error:
                reply, fault = Reply(error.body, status=error.status, headers=error.headers), None
            self._check_reply(call, record.template or "", reply)
            if fault:
                self._raise(fault, reply)
        except ServiceError as error:
            reply = Reply(error.body, status=error.status, headers=error.headers)
        except Drop:
            raise
        except Exception as error:  # a bug of this server, or of what a test gave it
            trace = traceback.format_exc(limit=-4)
            with self._change:
                self.violations.append(f"crash in {call.method.upper()} {call.path}: {trace}")
            failure = self.refusal(500, f"{type(error).__name__}: {error}")
            reply = Reply(failure.body, status=500)
        self.sign(reply)
        return reply

    def _route(self, call: Call) -> tuple[str, str, tuple[str, ...]]:
        for method, template, name in self.routes:
            pattern = self.prefix + re.sub(r"\{\w+\}", "([^/]+)", template)
            match = re.fullmatch(pattern, call.path)
            if match and method == call.method:
                return template, name, tuple(unquote(part) for part in match.groups())
        message = f"Invalid URL ({call.method.upper()} {call.path})"
        with self._change:
            self.violations.append(f"request: {message}")
        raise self.refusal(404, message)

    def _check_request(self, call: Call, template: str) -> None:
        try:
            self._contract.check_request(call, template)
        except (ContractError, ValueError) as error:
            with self._change:
                self.violations.append(f"request: {call.method.upper()} {template}: {error}")
            raise self.contract_refusal(error, call, template) from None

    def _check_reply(self, call: Call, template: str, reply: Reply) -> None:
        try:
            for chunk in reply.chunks or ():
                self._contract.check_chunk(call, chunk)
            if reply.body is not None:
                self._contract.check_reply(call, template, reply.status, reply.body)
        except ContractError as error:
            text = f"{call.method.upper()} {template}: {error}"
            with self._change:
                self.violations.append(f"answer: {text}")
            raise self.refusal(500, f"wrong answer of the server: {text}") from None

    def _fault(self, request: Request) -> Fault | None:
        with self._change:
            for fault in self._faults:
                if fault.fits(request):
                    fault.times -= 1
                    return fault
        return None

    def _raise(self, fault: Fault, reply: Reply | None) -> None:
        if fault.what == "hang":
            self._stopping.wait(fault.seconds)
        if fault.what == "cut":
            raise Drop(after=reply)
        if isinstance(fault.what, str):
            raise Drop
        raise self.fault_error(fault.what, fault)

    def fault_error(self, status: int, fault: Fault) -> ServiceError:
        """Return what an injected status is answered with."""
        if status == 429:
            return self.rate_limited(fault.retry_after)
        if status >= 500:
            return self.refusal(status, "The server had an error while processing your request.")
        return self.refusal(status, "This request cannot be answered.")

    def _token(self, prefix: str, length: int = 24) -> str:
        return prefix + "".join(
            secrets.choice(string.ascii_letters + string.digits) for _ in range(length)
        )


# --------------------------------------------------------------------------------------
# HTTP


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = False  # so that closing the server joins them
    request_queue_size = 512  # connections that many clients open in the same instant
    service: ContractServer

    def __init__(self, *arguments: Any) -> None:
        self._connections: set[socket.socket] = set()
        self._connections_lock = threading.Lock()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._connections_lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._connections_lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        """Wake the threads that wait for a client: to ask more, or to read."""
        with self._connections_lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError):  # a client that went away
            with self.service._change:
                self.service.violations.append(f"crash: {traceback.format_exc(limit=-4)}")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body leave together
    server: _HTTPServer

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_DELETE = do_GET  # noqa: N815
    do_PUT = do_PATCH = do_GET  # noqa: N815

    def _answer(self) -> None:
        if "Transfer-Encoding" in self.headers:
            self.send_error(411)  # the SDKs always know the length of what they send
            self.close_connection = True
            return
        length = int(self.headers.get("Content-Length") or 0)
        url = urlsplit(self.path)
        call = Call(
            method=self.command.lower(),
            path=url.path,
            query=parse_qsl(url.query, keep_blank_values=True),
            headers={name.lower(): value for name, value in self.headers.items()},
            body=self.rfile.read(length),
        )
        service = self.server.service
        record = _record(call, service.prefix)
        with service._change:
            service.requests.append(record)
        try:
            reply = service.respond(call, record)
        except Drop as drop:
            if drop.after is not None and drop.after.chunks:
                self._send_chunks(drop.after, cut=True)
            self.close_connection = True
            return
        record.status = reply.status
        if reply.chunks is not None:
            self._send_chunks(reply)
        else:
            self._send(reply)

    def _send(self, reply: Reply) -> None:
        kind = "application/json" if reply.content is None else reply.content_type
        content = json.dumps(reply.body).encode() if reply.content is None else reply.content
        self._head(reply, kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def _send_chunks(self, reply: Reply, *, cut: bool = False) -> None:
        self._head(reply, "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        chunks = [json.dumps(chunk) for chunk in reply.chunks or ()] + ["[DONE]"]
        for text in chunks[: len(chunks) // 2] if cut else chunks:
            event = f"data: {text}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
            self.wfile.flush()
            if seconds := self.server.service.chunk_seconds:
                self.server.service._stopping.wait(seconds)
        if not cut:
            self.wfile.write(b"0\r\n\r\n")
            self.wfile.flush()

    def _head(self, reply: Reply, kind: str) -> None:
        self.send_response(reply.status)
        self.send_header("Content-Type", kind)
        for name, value in reply.headers.items():
            self.send_header(name, value)

    def log_message(self, *_: Any) -> None:
        pass


def _record(call: Call, prefix: str) -> Request:
    body: Any = None
    with contextlib.suppress(ValueError, ContractError):
        if call.is_form:
            body = {
                name: content.decode("utf-8", "replace")
                if filename is None
                else {"filename": filename, "bytes": len(content)}
                for name, (filename, content) in parse_form(call.content_type, call.body).items()
            }
        elif call.body:
            body = json.loads(call.body)
    headers = {name: value for name, value in call.headers.items() if name != "authorization"}
    path = call.path.removeprefix(prefix)
    return Request(call.method.upper(), path, dict(call.query), headers, body)
