"""Whether an answer has the structure that was asked for: a JSON schema, or a tool's arguments."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ft_core.datasets.chat import ChatExample
from ft_core.errors import DatasetError

Check = Callable[[Mapping[str, Any]], str | None]
"""From an assistant message in OpenAI's form to what is wrong with it, or None."""

_LONGEST = 300


def check_for(example: ChatExample) -> Check | None:
    """Return the check of an answer to an example, or None where any answer will do.

    An example whose own answer calls a tool wants a call: of an offered tool, with arguments
    that are valid by its parameters. One with a `response_format` wants that JSON.

    Raises:
        DatasetError: a schema is no JSON schema, or refers to something outside itself.
    """
    answer = example.messages[-1]
    if answer.get("tool_calls") or answer.get("function_call"):
        return _tool_check(example)
    wanted = example.response_format or {}
    if wanted.get("type") == "json_object":
        return _json_check({"type": "object"}, "response_format")
    if wanted.get("type") == "json_schema":
        schema = wanted.get("json_schema", {}).get("schema", {})
        return _json_check(schema, "response_format.json_schema.schema")
    return None


def calls_of(message: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (name, arguments as JSON text) of each tool call in an assistant message."""
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    if message.get("function_call"):
        functions.append(message["function_call"])
    return [(function["name"], function["arguments"]) for function in functions]


def parse_json(text: str) -> Any:
    """Parse JSON as the standard has it, without NaN.

    Raises:
        ValueError: it is none.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def _json_check(schema: Any, place: str) -> Check:
    problem_of = _schema_check(schema, place)

    def check(message: Mapping[str, Any]) -> str | None:
        return problem_of(str(message.get("content") or ""))

    return check


def _tool_check(example: ChatExample) -> Check:
    functions = [tool["function"] for tool in example.tools or ()] + (example.functions or [])
    checks = {
        function["name"]: _schema_check(
            function.get("parameters") or {"type": "object"}, f"tool {function['name']!r}"
        )
        for function in functions
    }

    def check(message: Mapping[str, Any]) -> str | None:
        calls = calls_of(message)
        if not calls:
            return "no tool is called"
        for name, arguments in calls:
            if name not in checks:
                return f"no tool is called {name!r}"
            if problem := checks[name](arguments):
                return f"{name}: {problem}"
        return None

    return check


def _schema_check(schema: Any, place: str) -> Callable[[str], str | None]:
    """Return what says why a JSON text is not valid by the schema (None: it is)."""
    from jsonschema.exceptions import SchemaError, best_match  # type: ignore[import-untyped]
    from jsonschema.validators import Draft202012Validator, validator_for  # type: ignore[import-untyped]
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise DatasetError(f"is no JSON schema: {error.message}", place=place) from None
    registry: Registry[Any] = Registry()  # knows nothing, and so fetches nothing
    resolver = registry.resolver_with_root(DRAFT202012.create_resource(schema))
    for reference in _references(schema):
        try:
            resolver.lookup(reference)
        except Unresolvable:
            raise DatasetError(
                f"refers to {reference!r}, which is not in it; schemas are not fetched",
                place=place,
            ) from None
    validator = kind(schema, registry=registry)

    def problem_of(text: str) -> str | None:
        try:
            value = parse_json(text)
        except ValueError as error:
            return f"no JSON: {error}"
        worst = best_match(validator.iter_errors(value))
        if worst is None:
            return None
        where = worst.json_path.removeprefix("$").lstrip(".")
        return (f"{where}: {worst.message}" if where else str(worst.message))[:_LONGEST]

    return problem_of


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping):
        reference = schema.get("$ref")
        if isinstance(reference, str):
            yield reference
        children: Iterable[Any] = schema.values()
    else:
        children = schema if isinstance(schema, list) else ()
    for child in children:
        yield from _references(child)
