"""What OpenAI's chat format asks of messages and tools, checked one by one.

Every function raises `DatasetError` with the place, such as `messages[3].tool_calls[0]`, and
returns nothing. What passes also satisfies `ChatCompletionRequestMessage` and
`ChatCompletionTool` of OpenAI's published description.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ft_core.errors import DatasetError

Message = dict[str, Any]

_FIELDS = {  # beside role and content
    "system": ("name",),
    "developer": ("name",),
    "user": ("name",),
    "assistant": ("name", "refusal", "audio", "tool_calls", "function_call", "weight"),
    "tool": ("name", "tool_call_id"),
    "function": ("name",),
}
_PARTS = {  # the types of content parts
    "system": ("text",),
    "developer": ("text",),
    "user": ("text", "image_url", "input_audio", "file"),
    "assistant": ("text", "refusal"),
    "tool": ("text",),
    "function": (),
}
_EMPTY_MEANS_ABSENT = ("annotations", "tool_calls")
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:\S+")


def without_absent(message: Message) -> Message:
    """Return the message without the nulls and empty lists that SDKs put where nothing is."""
    return {
        key: value
        for key, value in message.items()
        if key == "content" or not (value is None or (value == [] and key in _EMPTY_MEANS_ABSENT))
    }


def text_of(message: Message) -> str:
    """Return the text of a message's content; other parts are left out."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def check_messages(messages: Sequence[Message], place: str = "messages") -> None:
    """Check an example's messages: each one, the tool calls between them, and the last."""
    if not messages:
        _refuse(place, "there is no message")
    for index, message in enumerate(messages):
        check_message(message, f"{place}[{index}]")
    check_tool_calls(messages, place)
    last = f"{place}[{len(messages) - 1}]"
    if messages[-1]["role"] != "assistant":
        _refuse(
            f"{last}.role",
            f"is {messages[-1]['role']!r}, but an example ends with the assistant's answer",
        )
    if all(message.get("weight") == 0 for message in messages if message["role"] == "assistant"):
        _refuse(place, "every assistant message has weight 0: nothing is left to learn")


def check_message(message: Message, place: str) -> None:
    """Check one message without those around it."""
    role = message.get("role")
    if not isinstance(role, str) or role not in _FIELDS:
        _refuse(f"{place}.role", f"is one of {', '.join(_FIELDS)}, not {role!r}")
    _check_fields(message, ("role", "content", *_FIELDS[role]), place)
    if "name" in message or role == "function":
        _check_string(message, "name", place)
    if role == "tool":
        _check_string(message, "tool_call_id", place)
    if role == "assistant":
        _check_assistant(message, place)
    if message.get("content") is not None:
        _check_content(message["content"], role, f"{place}.content")
    elif role != "assistant" and not (role == "function" and "content" in message):
        _refuse(f"{place}.content", "is missing or null; give a string, which may be empty")
    if role == "assistant" and not _says_something(message):
        _refuse(place, "the answer is empty; give it text, drop the example or set weight 0")


def check_tool_calls(messages: Sequence[Message], place: str = "messages") -> None:
    """Check that tool messages answer calls, and each call but the last turn's has its answer."""
    waiting: dict[str, str] = {}  # the id of each call that has no answer yet, and its place
    for index, message in enumerate(messages):
        here = f"{place}[{index}]"
        if message["role"] == "assistant":
            for call, where in waiting.items():
                _refuse(where, f"no tool message answers {call!r} before the assistant's next turn")
            for number, call in enumerate(message.get("tool_calls", ())):
                where = f"{here}.tool_calls[{number}]"
                if call["id"] in waiting:
                    _refuse(where, f"the id {call['id']!r} stands twice in one message")
                waiting[call["id"]] = where
        elif message["role"] == "tool" and waiting.pop(message["tool_call_id"], None) is None:
            _refuse(
                f"{here}.tool_call_id",
                f"no call before it has the id {message['tool_call_id']!r}, or it has its answer",
            )


def check_tools(tools: Sequence[dict[str, Any]], place: str = "tools") -> None:
    """Check tool definitions: functions with unique names and parameters in JSON schema."""
    for index, tool in enumerate(tools):
        here = f"{place}[{index}]"
        _check_fields(tool, ("type", "function"), here)
        if tool.get("type") != "function":
            _refuse(f"{here}.type", f'is "function", not {tool.get("type")!r}')
        if not isinstance(tool.get("function"), dict):
            _refuse(f"{here}.function", "is an object with name, description and parameters")
        _check_function(tool["function"], ("strict",), f"{here}.function")
    _check_unique([tool["function"]["name"] for tool in tools], place)


def check_functions(functions: Sequence[dict[str, Any]], place: str = "functions") -> None:
    """Check function definitions as they were before there were tools."""
    for index, function in enumerate(functions):
        _check_function(function, (), f"{place}[{index}]")
    _check_unique([function["name"] for function in functions], place)


def _check_content(content: Any, role: str, place: str) -> None:
    if isinstance(content, str):
        return
    types = _PARTS[role]
    if not isinstance(content, list) or not content or not types:
        _refuse(place, "is a string" + (", or a list of one or more parts" if types else ""))
    for index, part in enumerate(content):
        here = f"{place}[{index}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in types:
            _refuse(here, f"a part of the {role}'s has a type of {', '.join(types)}, not {kind!r}")
        _check_fields(part, ("type", kind), here)
        _PART_CHECKS[kind](part, here)


def _check_text_part(part: dict[str, Any], place: str) -> None:
    if not isinstance(part.get(part["type"]), str):
        _refuse(f"{place}.{part['type']}", "is a string")


def _check_image(part: dict[str, Any], place: str) -> None:
    image = _object(part, "image_url", ("url", "detail"), place)
    if not isinstance(image.get("url"), str) or not _URL.fullmatch(image["url"]):
        _refuse(f"{place}.image_url.url", "is the address of an image, or a data: URL")
    if image.get("detail", "auto") not in ("auto", "low", "high"):
        _refuse(f"{place}.image_url.detail", f"is auto, low or high, not {image['detail']!r}")


def _check_audio(part: dict[str, Any], place: str) -> None:
    audio = _object(part, "input_audio", ("data", "format"), place)
    _check_string(audio, "data", f"{place}.input_audio")
    if audio.get("format") not in ("wav", "mp3"):
        _refuse(f"{place}.input_audio.format", f"is wav or mp3, not {audio.get('format')!r}")


def _check_file(part: dict[str, Any], place: str) -> None:
    file = _object(part, "file", ("filename", "file_data", "file_id"), place)
    for key in file:
        _check_string(file, key, f"{place}.file")
    if not {"file_data", "file_id"} & file.keys():
        _refuse(f"{place}.file", "has file_data or file_id")


_PART_CHECKS: dict[str, Callable[[dict[str, Any], str], None]] = {
    "text": _check_text_part,
    "refusal": _check_text_part,
    "image_url": _check_image,
    "input_audio": _check_audio,
    "file": _check_file,
}


def _check_assistant(message: Message, place: str) -> None:
    if "refusal" in message:
        _check_string(message, "refusal", place)
    if "audio" in message:
        _check_string(_object(message, "audio", ("id",), place), "id", f"{place}.audio")
    if "function_call" in message:
        _check_call(message, "function_call", place)
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list):
        _refuse(f"{place}.tool_calls", "is a list of calls")
    for index, call in enumerate(calls):
        here = f"{place}.tool_calls[{index}]"
        if not isinstance(call, dict):
            _refuse(here, "is an object with id, type and function")
        _check_fields(call, ("id", "type", "function"), here)
        _check_string(call, "id", here)
        if call.get("type") != "function":
            _refuse(f"{here}.type", f'is "function", not {call.get("type")!r}')
        _check_call(call, "function", here)
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        _refuse(f"{place}.weight", f"is 0 or 1, not {weight!r}")


def _check_call(holder: dict[str, Any], key: str, place: str) -> None:
    call = _object(holder, key, ("name", "arguments"), place)
    _check_name(call, f"{place}.{key}")
    arguments = call.get("arguments")
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else None
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        _refuse(
            f"{place}.{key}.arguments",
            'is the text of a JSON object, "{}" where there are no arguments',
        )


def _says_something(message: Message) -> bool:
    if {"tool_calls", "function_call", "audio"} & message.keys() or message.get("weight") == 0:
        return True
    content = message.get("content") or ""
    refusals = [message.get("refusal", "")]
    if isinstance(content, list):
        refusals += [part["refusal"] for part in content if part["type"] == "refusal"]
    return bool(text_of(message).strip() or "".join(refusals).strip())


def _check_function(function: Any, extra: Sequence[str], place: str) -> None:
    if not isinstance(function, dict):
        _refuse(place, "is an object with name, description and parameters")
    _check_fields(function, ("name", "description", "parameters", *extra), place)
    _check_name(function, place)
    if not isinstance(function.get("description", ""), str):
        _refuse(f"{place}.description", "is a string")
    if not isinstance(function.get("strict"), bool | None):
        _refuse(f"{place}.strict", "is true or false")
    schema = function.get("parameters", {})
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        _refuse(f"{place}.parameters", 'is a JSON schema of type "object"')
    if not isinstance(schema.get("properties", {}), dict):
        _refuse(f"{place}.parameters.properties", "maps each parameter to its JSON schema")


def _check_unique(names: list[str], place: str) -> None:
    for index, name in enumerate(names):
        if name in names[:index]:
            _refuse(f"{place}[{index}]", f"the name {name!r} stands twice")


def _check_name(holder: dict[str, Any], place: str) -> None:
    name = holder.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        _refuse(f"{place}.name", f"is 1 to 64 of a-z, A-Z, 0-9, _ and -, not {name!r}")


def _check_string(holder: dict[str, Any], key: str, place: str) -> None:
    if not isinstance(holder.get(key), str):
        _refuse(f"{place}.{key}", f"is a string, not {holder.get(key)!r}")


def _object(holder: dict[str, Any], key: str, fields: Sequence[str], place: str) -> dict[str, Any]:
    value = holder.get(key)
    if not isinstance(value, dict):
        _refuse(f"{place}.{key}", f"is an object with {', '.join(fields)}")
    _check_fields(value, fields, f"{place}.{key}")
    return value


def _check_fields(holder: dict[str, Any], known: Sequence[str], place: str) -> None:
    for key in holder:
        if key not in known:
            _refuse(f"{place}.{key}", f"is no field of the format ({', '.join(known)}); drop it")


def _refuse(place: str, reason: str) -> NoReturn:
    raise DatasetError(reason, place=place)
