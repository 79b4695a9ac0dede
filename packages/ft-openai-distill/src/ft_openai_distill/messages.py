"""LlamaIndex's messages, tools and call settings in the form of OpenAI's chat API.

`llama_index.llms.openai` has a converter too, for messages that OpenAI's own class sends. It
stops at blocks and roles that only other providers have, carries objects that no JSON can
hold, and downloads documents; a recorder meets all of them, so the conversion here is our own
(the tests hold the two side by side).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from io import IOBase
from typing import Any

from ft_core.errors import DatasetError

Message = dict[str, Any]

_ROLES = {"chatbot": "assistant", "model": "assistant"}
_AUDIO_FORMATS = {"mpeg": "mp3", "x-wav": "wav", "wave": "wav"}


# --- LlamaIndex to OpenAI --------------------------------------------------------------------


def to_openai_messages(messages: Iterable[Any]) -> list[Message]:
    """Return chat messages as dictionaries of JSON values.

    Every tool call gets an id, unique in its message, and every tool result the id of the call
    that it answers, also where the provider gave none. Reasoning is left out.

    Raises:
        DatasetError: a message or a block that OpenAI's format has no place for.
    """
    pairing = _Pairing()
    return [
        pairing.paired(_asked(message), place=f"messages[{number}]")
        for number, message in enumerate(messages)
    ]


def to_openai_answer(message: Any) -> Message | None:
    """Return an LLM's answer as an assistant message, or None if it has neither text nor calls."""
    answer = _message(message)
    answer["role"] = "assistant"
    answer.pop("tool_call_id", None)
    text = answer.get("content") or ""
    if not text.strip() and "tool_calls" not in answer and "function_call" not in answer:
        return None
    return answer


def answer_after(messages: Sequence[Message], answer: Message) -> Message:
    """Return the answer with ids for those of its tool calls that the provider gave none."""
    return _Pairing(turn=len(messages)).paired(answer, place="the answer")


def _asked(message: Any) -> Message:
    """Return a message of the conversation before the answer."""
    result = _message(message)
    if result["role"] == "assistant" and not (result.get("content", "-") or "").strip():
        result["weight"] = 0  # it said nothing, so there is nothing in it to learn
    return result


def _message(message: Any) -> Message:
    role = _role(message)
    extra = message.additional_kwargs or {}
    parts = [part for block in message.blocks for part in _parts(block)]
    result: Message = {"role": role}
    if role == "assistant" and extra.get("reference_audio_id"):
        result["audio"] = {"id": extra["reference_audio_id"]}
    if role == "user" and any(part["type"] != "text" for part in parts):
        result["content"] = parts
    else:
        # Of the other roles the API takes text only; several blocks are one text, unseparated,
        # as OpenAI's own class sends them.
        result["content"] = "".join(part["text"] for part in parts if part["type"] == "text")
    if role == "assistant":
        _add_calls(result, message.blocks, extra)
        has_more = any(key in result for key in ("tool_calls", "function_call", "audio"))
        if has_more and not result["content"]:
            del result["content"]
    elif role == "tool":
        result["tool_call_id"] = extra.get("tool_call_id") or extra.get("call_id")
        if result["tool_call_id"] is None and extra.get("name"):
            result["name"] = extra["name"]  # to find the call by; `_Pairing` removes it
    elif role == "function":
        result["name"] = extra.get("name") or ""
    return result


def _role(message: Any) -> str:
    role = message.role.value if isinstance(message.role, Enum) else str(message.role)
    return _ROLES.get(role, role)


def _add_calls(result: Message, blocks: Sequence[Any], extra: Mapping[str, Any]) -> None:
    """Put the tool calls into the message, from the blocks or else from where they once stood."""
    in_blocks = [block for block in blocks if getattr(block, "block_type", "") == "tool_call"]
    calls = in_blocks or extra.get("tool_calls") or ()
    if calls:
        result["tool_calls"] = [_tool_call(plain(call)) for call in calls]
    elif extra.get("function_call"):
        call = plain(extra["function_call"])
        result["function_call"] = {
            "name": call["name"],
            "arguments": _arguments(call.get("arguments")),
        }


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return one tool call of OpenAI's chat or Responses API, Anthropic, Ollama or LlamaIndex."""
    inner = call["function"] if isinstance(call.get("function"), Mapping) else call
    name = inner.get("name") or inner.get("tool_name")
    if not isinstance(name, str):
        raise DatasetError(f"a tool call without a name (its keys are {sorted(call)})")
    arguments = next(
        (inner[key] for key in ("arguments", "tool_kwargs", "input", "args") if key in inner), None
    )
    # The Responses API has an id for the item, and another for the call, which the result names.
    call_id = next(
        (call[key] for key in ("call_id", "tool_call_id", "tool_id", "id") if call.get(key)), None
    )
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": _arguments(arguments)},
    }


def _arguments(arguments: Any) -> str:
    """Return the arguments of a call as JSON text."""
    if isinstance(arguments, str):
        return arguments if arguments.strip() else "{}"
    return json.dumps({} if arguments is None else arguments, ensure_ascii=False)


class _Pairing:
    """Gives each tool call an id and each tool result the id of its call."""

    def __init__(self, turn: int = 0) -> None:
        self._turn = turn
        self._open: list[tuple[Any, str, str]] = []  # id by the provider, name, id as written

    def paired(self, message: Message, *, place: str) -> Message:
        if message.get("tool_calls"):
            self._open = []
            for number, call in enumerate(message["tool_calls"]):
                self._add(call, number)
        elif message["role"] == "tool":
            message["tool_call_id"] = self._answered(message, place)
            message.pop("name", None)
        self._turn += 1
        return message

    def _add(self, call: dict[str, Any], number: int) -> None:
        given, used = call["id"], {written for _, _, written in self._open}
        written = str(given) if given else f"call_{self._turn}_{number}"
        if written in used:  # some providers take the tool's name for the id
            written = f"{written}_{number}"
        call["id"] = written
        self._open.append((given, call["function"]["name"], written))

    def _answered(self, message: Message, place: str) -> str:
        given, name = message.get("tool_call_id"), message.get("name")
        for entry in self._open:
            if entry[0] == given and (given is not None or name in (None, entry[1])):
                self._open.remove(entry)
                return entry[2]
        raise DatasetError(
            f"a tool result for the call {given or name!r}, which no message before it makes",
            place=place,
        )


# --- Content blocks --------------------------------------------------------------------------


def _parts(block: Any) -> Iterator[dict[str, Any]]:
    """Yield the content parts that stand for one block."""
    kind = getattr(block, "block_type", type(block).__name__)
    if kind == "text":
        yield {"type": "text", "text": block.text}
    elif kind in _PARTS:
        yield _PARTS[kind](block)
    elif kind == "citable":
        for inner in block.content:
            yield from _parts(inner)
    elif kind == "citation":
        yield from _parts(block.cited_content)
    elif kind not in ("thinking", "tool_call", "cache"):
        raise DatasetError(f"OpenAI's chat format has no place for a block of type {kind!r}")


def _image(block: Any) -> dict[str, Any]:
    url = str(block.url) if block.url else _data_url(block, block.image, block.image_mimetype)
    image = {"url": url}
    if block.detail:
        image["detail"] = block.detail
    return {"type": "image_url", "image_url": image}


def _audio(block: Any) -> dict[str, Any]:
    kind = (block.format or "").removeprefix("audio/")
    audio = {"data": _base64(block, block.audio), "format": _AUDIO_FORMATS.get(kind, kind)}
    return {"type": "input_audio", "input_audio": audio}


def _document(block: Any) -> dict[str, Any]:
    data = _data_url(block, block.data, block.document_mimetype)
    return {"type": "file", "file": {"filename": block.title, "file_data": data}}


_PARTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "image": _image,
    "audio": _audio,
    "document": _document,
}


def _data_url(block: Any, data: Any, mimetype: str | None) -> str:
    url = str(block.url) if block.url else ""
    if url.startswith("data:"):
        return url
    encoded = _base64(block, data)
    if not mimetype:
        import filetype  # type: ignore[import-untyped]

        guess = filetype.guess(base64.b64decode(encoded))
        mimetype = guess.mime if guess else "application/octet-stream"
    return f"data:{mimetype};base64,{encoded}"


def _base64(block: Any, data: Any) -> str:
    """Return the content of a block in base64."""
    if isinstance(data, bytes):  # LlamaIndex has encoded it already
        return data.decode("ascii")
    if isinstance(data, IOBase):
        return base64.b64encode(_peek(data)).decode("ascii")
    if block.path:
        with open(block.path, "rb") as file:
            return base64.b64encode(file.read()).decode("ascii")
    url = str(block.url or "")
    if url.startswith("data:") and ";base64," in url:
        return url.partition(";base64,")[2]
    raise DatasetError(f"a block of type {block.block_type!r} by URL: it is not downloaded")


def _peek(file: Any) -> bytes:
    """Read a file of the app and leave it where it was."""
    if not file.seekable():
        raise DatasetError("a block whose content can be read only once, by the app")
    position = file.tell()
    file.seek(0)
    try:
        data: bytes = file.read()
    finally:
        file.seek(position)
    return data


# --- Tools and settings ----------------------------------------------------------------------


def to_openai_tools(tools: Any) -> list[dict[str, Any]]:
    """Return the tools of a call as OpenAI's chat API takes them.

    Takes those of OpenAI's chat and Responses API, Anthropic, Bedrock, Gemini, and LlamaIndex's
    own tool objects. Tools that the service runs itself (a web search) are left out.

    Raises:
        DatasetError: a tool of another shape.
    """
    if isinstance(tools, Mapping):  # Bedrock's toolConfig
        tools = tools.get("tools") or ()
    result: list[dict[str, Any]] = []
    for tool in tools:
        metadata: Any = getattr(tool, "metadata", None)
        if hasattr(metadata, "to_openai_tool"):
            result.append(plain(metadata.to_openai_tool(skip_length_check=True)))
        else:
            result += _tools(plain(tool))
    return result


def _tools(tool: Any) -> list[dict[str, Any]]:
    if not isinstance(tool, dict):
        raise DatasetError(f"a tool in a form that is not known: {type(tool).__name__}")
    if isinstance(tool.get("function"), dict):
        return [_function(tool["function"])]
    if isinstance(tool.get("toolSpec"), dict):
        tool = tool["toolSpec"]
    declarations = tool.get("function_declarations") or tool.get("functionDeclarations")
    if isinstance(declarations, list):
        return [_function(item) for item in declarations]
    if "name" in tool and (_schema(tool) is not None or tool.get("type", "function") == "function"):
        return [_function(tool)]
    if isinstance(tool.get("type"), str):
        return []
    raise DatasetError(f"a tool in a form that is not known: its keys are {sorted(tool)}")


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool["name"]}
    if tool.get("description"):
        function["description"] = tool["description"]
    schema = _schema(tool)
    if schema is not None:
        function["parameters"] = _lower_types(schema)
    if tool.get("strict") is not None:
        function["strict"] = tool["strict"]
    return {"type": "function", "function": function}


def _schema(tool: Mapping[str, Any]) -> Any:
    """Return the JSON schema of a tool's arguments, wherever its provider puts it."""
    schema = next(
        (
            tool[key]
            for key in ("parameters", "input_schema", "inputSchema", "parameters_json_schema")
            if tool.get(key) is not None
        ),
        None,
    )
    return schema["json"] if isinstance(schema, dict) and set(schema) == {"json"} else schema


def _lower_types(schema: Any) -> Any:
    """Return a schema with the names of types in lower case: Gemini writes OBJECT."""
    if isinstance(schema, list):
        return [_lower_types(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value.lower()
        if key == "type" and isinstance(value, str) and value.isupper()
        else _lower_types(value)
        for key, value in schema.items()
    }


def to_openai_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a call's settings belongs to an example.

    Returns:
        Of `tools`, `parallel_tool_calls`, `functions`, `response_format` and `tool_choice`
        those that the call had.
    """
    result: dict[str, Any] = {}
    if settings.get("tools"):
        tools = to_openai_tools(settings["tools"])
        if tools:
            result["tools"] = tools
            if isinstance(settings.get("parallel_tool_calls"), bool):
                result["parallel_tool_calls"] = settings["parallel_tool_calls"]
    if settings.get("functions"):
        result["functions"] = plain(settings["functions"])
    response_format = _response_format(settings)
    if response_format is not None:
        result["response_format"] = response_format
    choice = settings.get("tool_choice") or settings.get("function_call")
    if choice is not None:
        result["tool_choice"] = plain(choice)
    return result


def _response_format(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    given = settings.get("response_format")
    if given is None:
        given = settings.get("format")  # Ollama: "json", or a schema
    if given is None and isinstance(settings.get("text"), Mapping):
        given = settings["text"].get("format")  # the Responses API
    if isinstance(given, type) and hasattr(given, "model_json_schema"):
        return _json_schema(given.__name__, given.model_json_schema())
    given = plain(given)
    if given == "json":
        return {"type": "json_object"}
    if not isinstance(given, dict):
        return None
    if given.get("type") == "json_schema" and "schema" in given:
        flat = {key: value for key, value in given.items() if key != "type"}
        return {"type": "json_schema", "json_schema": {"name": "answer", **flat}}
    if given.get("type") in ("text", "json_object", "json_schema"):
        return given
    return _json_schema(str(given.get("title", "answer")), given)


def _json_schema(name: str, schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}


def plain(value: Any) -> Any:
    """Return a copy of the value in JSON types, with the fields of objects as dictionaries."""
    return json.loads(json.dumps(value, default=_fields))


def _fields(value: Any) -> Any:
    if isinstance(value, type) and hasattr(value, "model_json_schema"):
        return value.model_json_schema()
    for dump in ("model_dump", "to_dict", "dict"):
        if callable(getattr(value, dump, None)):
            fields = getattr(value, dump)()
            if isinstance(fields, dict):
                return {key: item for key, item in fields.items() if item is not None}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset | tuple):
        return list(value)
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "__dict__"):
        return {key: item for key, item in vars(value).items() if not key.startswith("_")}
    raise TypeError(f"a {type(value).__name__} is no JSON value")


# --- OpenAI to LlamaIndex --------------------------------------------------------------------


def to_chat_message(message: Mapping[str, Any]) -> Any:
    """Return an OpenAI message as LlamaIndex's `ChatMessage`."""
    from llama_index.core.base.llms.types import ChatMessage, TextBlock, ToolCallBlock

    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    blocks = [
        TextBlock(text=part["text"]) if part["type"] == "text" else _media_block(part)
        for part in parts
    ]
    for call in message.get("tool_calls") or ():
        function = call["function"]
        blocks.append(
            ToolCallBlock(
                tool_call_id=call["id"],
                tool_name=function["name"],
                tool_kwargs=function["arguments"],
            )
        )
    extra = {
        key: message[key] for key in ("tool_call_id", "function_call", "name") if key in message
    }
    if message.get("audio"):
        extra["reference_audio_id"] = message["audio"]["id"]
    return ChatMessage(role=message["role"], blocks=blocks, additional_kwargs=extra)


def _media_block(part: Mapping[str, Any]) -> Any:
    from llama_index.core.base.llms.types import AudioBlock, DocumentBlock, ImageBlock, TextBlock

    if part["type"] == "image_url":
        url, detail = part["image_url"]["url"], part["image_url"].get("detail")
        if not url.startswith("data:"):
            return ImageBlock(url=url, detail=detail)
        mimetype, data = _from_data_url(url)
        return ImageBlock(image=data, image_mimetype=mimetype, detail=detail)
    if part["type"] == "input_audio":
        audio = part["input_audio"]
        return AudioBlock(audio=base64.b64decode(audio["data"]), format=audio["format"])
    if part["type"] == "file" and part["file"].get("file_data"):
        mimetype, data = _from_data_url(part["file"]["file_data"])
        title = part["file"].get("filename")
        return DocumentBlock(data=data, title=title, document_mimetype=mimetype)
    return TextBlock(text=str(part.get("refusal") or part))


def _from_data_url(url: str) -> tuple[str, bytes]:
    head, _, data = url.partition(";base64,")
    return head.removeprefix("data:"), base64.b64decode(data)


# --- Redaction -------------------------------------------------------------------------------


def map_texts(message: Message, change: Callable[[str], str]) -> Message:
    """Return the message with `change` applied to each text, URL and tool argument in it.

    Roles, ids, names of tools and the bytes of images, audio and files stay as they are.
    """
    result = dict(message)
    if isinstance(message.get("content"), str):
        result["content"] = change(message["content"])
    elif message.get("content"):
        result["content"] = [_map_part(part, change) for part in message["content"]]
    if message.get("tool_calls"):
        result["tool_calls"] = [
            {**call, "function": _map_call(call["function"], change)}
            for call in message["tool_calls"]
        ]
    if message.get("function_call"):
        result["function_call"] = _map_call(message["function_call"], change)
    return result


def _map_part(part: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    if part["type"] == "text":
        return {**part, "text": change(part["text"])}
    if part["type"] == "image_url" and not part["image_url"]["url"].startswith("data:"):
        image = part["image_url"]
        return {**part, "image_url": {**image, "url": change(image["url"])}}
    if part["type"] == "file" and part["file"].get("filename"):
        return {
            **part,
            "file": {**part["file"], "filename": change(part["file"]["filename"])},
        }
    return part


def _map_call(function: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Change the strings inside the arguments, so that they stay JSON."""
    try:
        values = json.loads(function["arguments"])
    except ValueError:
        return {**function, "arguments": change(function["arguments"])}
    changed = _map_values(values, change)
    if changed == values:  # as the model wrote it, spaces included
        return function
    return {**function, "arguments": json.dumps(changed, ensure_ascii=False)}


def _map_values(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_values(item, change) for item in value]
    if isinstance(value, dict):
        return {key: _map_values(item, change) for key, item in value.items()}
    return value
