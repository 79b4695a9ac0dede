"""Chat and preference datasets: what they take, refuse, unwrap and split."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llama_index.core import SummaryIndex
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.llms import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    LLMMetadata,
    MockLLM,
)
from llama_index.core.prompts import chat_prompts, default_prompts
from llama_index.core.schema import TextNode

from ft_core.datasets import ChatDataset, ChatExample, PreferenceDataset, PreferenceExample
from ft_core.datasets.duplicates import similarity
from ft_core.errors import ArgumentError, DatasetError
from ft_core.files import Journal

SHARED = Path(__file__).resolve().parents[3].parent / "shared"

USER = {"role": "user", "content": "How warm is Rome?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "31 degrees"}
ANSWER = {"role": "assistant", "content": "31 degrees."}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
TALK = [USER, CALLING, RESULT, ANSWER]


def changed(value: Any, path: str, to: Any) -> Any:
    """Return a deep copy with the value at `a.0.b` replaced; `...` removes it."""
    value = copy.deepcopy(value)
    *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    inner = value
    for key in way:
        inner = inner[key]
    if to is ...:
        del inner[last]
    else:
        inner[last] = to
    return value


def about(question: str, answer: str = "Yes.") -> dict[str, Any]:
    """Return a conversation of one question."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def write_lines(path: Path, *lines: Any) -> Path:
    text = "".join(
        (line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n"
        for line in lines
    )
    path.write_text(text, encoding="utf-8")
    return path


class TestMessages:
    @pytest.mark.parametrize(
        "messages",
        [
            [USER, ANSWER],
            [{"role": "system", "content": ""}, USER, ANSWER],
            [{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}, ANSWER],
            TALK,
            [USER, CALLING],  # the last turn may leave its calls open
            [USER, CALLING, RESULT, CALLING, RESULT, ANSWER],  # an id may come again
            [USER, changed(CALLING, "content", ...)],
            [USER, {"role": "assistant", "refusal": "No."}],
            [USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}],
            [USER, {"role": "assistant", "audio": {"id": "audio_1"}}],
            [USER, {"role": "assistant", "content": "", "weight": 0}, USER, ANSWER],
            [USER, {**ANSWER, "weight": 1}],
            [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "function_call": {"name": "f", "arguments": "{}"},
                },
                {"role": "function", "name": "f", "content": None},
                ANSWER,
            ],
            [
                {
                    "role": "user",
                    "name": "Ada",
                    "content": [
                        {"type": "text", "text": "What is this?"},
                        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
                        {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
                        {"type": "file", "file": {"file_id": "file-1"}},
                    ],
                },
                ANSWER,
            ],
        ],
    )
    def test_accepted_and_kept(self, messages: list[dict[str, Any]]) -> None:
        assert ChatExample(messages=messages).messages == messages

    def test_nulls_of_the_sdks_are_dropped(self) -> None:
        dumped = {**ANSWER, "refusal": None, "annotations": [], "tool_calls": None, "audio": None}
        assert ChatExample(messages=[USER, dumped]).messages == [USER, ANSWER]
        assert ChatExample(messages=[USER, {**ANSWER, "tool_calls": []}]).messages[1] == ANSWER

    @pytest.mark.parametrize(
        ("messages", "place", "reason"),
        [
            ([], "messages", "no message"),
            ([USER], "messages[0].role", "ends with the assistant's answer"),
            ([USER, CALLING, RESULT], "messages[2].role", "'tool'"),
            (changed(TALK, "0.role", "human"), "messages[0].role", "not 'human'"),
            (changed(TALK, "0.role", ["user"]), "messages[0].role", "is one of"),
            (changed(TALK, "0.role", ...), "messages[0].role", "not None"),
            (changed(TALK, "0.content", None), "messages[0].content", "missing or null"),
            (changed(TALK, "0.content", ...), "messages[0].content", "missing or null"),
            (changed(TALK, "0.content", []), "messages[0].content", "one or more parts"),
            (changed(TALK, "0.content", {}), "messages[0].content", "is a string"),
            (changed(TALK, "0.content", ["x"]), "messages[0].content[0]", "has a type of text"),
            (
                changed(TALK, "0.content", [{"type": "text"}]),
                "messages[0].content[0].text",
                "is a string",
            ),
            (
                changed(TALK, "0.content", [{"type": "refusal", "refusal": "No."}]),
                "messages[0].content[0]",
                "not 'refusal'",
            ),
            (
                changed(TALK, "0.content", [{"type": "image_url", "image_url": {"url": "a b"}}]),
                "messages[0].content[0].image_url.url",
                "address of an image",
            ),
            (
                changed(TALK, "0.content", [{"type": "image_url", "image_url": "https://a/b"}]),
                "messages[0].content[0].image_url",
                "is an object with url",
            ),
            (
                changed(TALK, "0.content", [{"type": "file", "file": {"filename": "a"}}]),
                "messages[0].content[0].file",
                "file_data or file_id",
            ),
            (
                changed(TALK, "0.content", [{"type": "file", "file": {"file_id": 3}}]),
                "messages[0].content[0].file.file_id",
                "is a string",
            ),
            (changed(TALK, "0.weight", 1), "messages[0].weight", "is no field"),
            (changed(TALK, "0.name", 3), "messages[0].name", "is a string"),
            (changed(TALK, "2.tool_call_id", ...), "messages[2].tool_call_id", "is a string"),
            (changed(TALK, "2.tool_call_id", "c2"), "messages[2].tool_call_id", "'c2'"),
            ([USER, CALLING, RESULT, RESULT, ANSWER], "messages[3].tool_call_id", "or it has its"),
            ([USER, CALLING, ANSWER], "messages[1].tool_calls[0]", "no tool message answers 'c1'"),
            (changed(TALK, "1.tool_calls", {"id": 1}), "messages[1].tool_calls", "is a list"),
            (changed(TALK, "1.tool_calls.0", "c"), "messages[1].tool_calls[0]", "is an object"),
            (changed(TALK, "1.tool_calls.0.id", ...), "messages[1].tool_calls[0].id", "string"),
            (changed(TALK, "1.tool_calls.0.type", "x"), "messages[1].tool_calls[0].type", "'x'"),
            (changed(TALK, "1.tool_calls.0.index", 0), "messages[1].tool_calls[0].index", "drop"),
            (
                changed(TALK, "1.tool_calls", [CALL, CALL]),
                "messages[1].tool_calls[1]",
                "stands twice",
            ),
            (
                changed(TALK, "1.tool_calls.0.function.name", "a b"),
                "messages[1].tool_calls[0].function.name",
                "not 'a b'",
            ),
            *(
                (
                    changed(TALK, "1.tool_calls.0.function.arguments", bad),
                    "messages[1].tool_calls[0].function.arguments",
                    "the text of a JSON object",
                )
                for bad in ("", "{", "[]", {}, None, "[" * 100_000)
            ),
            (changed(TALK, "3.content", " \n"), "messages[3]", "the answer is empty"),
            (changed(TALK, "3.content", None), "messages[3]", "the answer is empty"),
            (changed(TALK, "3.content", [{"type": "text", "text": ""}]), "messages[3]", "empty"),
            (changed(TALK, "3.refusal", {}), "messages[3].refusal", "is a string"),
            (changed(TALK, "3.audio", "x"), "messages[3].audio", "is an object with id"),
            *(
                (changed(TALK, "3.weight", bad), "messages[3].weight", "is 0 or 1")
                for bad in (2, 0.5, "1", True)
            ),
            ([USER, {**ANSWER, "weight": 0}], "messages", "nothing is left to learn"),
            (changed(TALK, "3.content", "\ud83d"), "messages[3].content", "surrogate"),
        ],
    )
    def test_refused(self, messages: list[dict[str, Any]], place: str, reason: str) -> None:
        with pytest.raises(DatasetError, match=re.escape(reason)) as caught:
            ChatExample(messages=messages)
        assert caught.value.place == place

    @pytest.mark.parametrize(
        ("tools", "place"),
        [
            ([TOOL, TOOL], "tools[1]"),
            ([changed(TOOL, "type", "retrieval")], "tools[0].type"),
            ([changed(TOOL, "function", None)], "tools[0].function"),
            ([changed(TOOL, "function.name", "x" * 65)], "tools[0].function.name"),
            ([changed(TOOL, "function.name", "weather\n")], "tools[0].function.name"),
            ([changed(TOOL, "function.description", None)], "tools[0].function.description"),
            ([changed(TOOL, "function.parameters", [])], "tools[0].function.parameters"),
            ([changed(TOOL, "function.parameters.type", "array")], "tools[0].function.parameters"),
            (
                [changed(TOOL, "function.parameters.properties", ["city"])],
                "tools[0].function.parameters.properties",
            ),
            ([changed(TOOL, "function.strict", "yes")], "tools[0].function.strict"),
            ([changed(TOOL, "function.returns", "str")], "tools[0].function.returns"),
        ],
    )
    def test_tools_refused(self, tools: list[dict[str, Any]], place: str) -> None:
        assert ChatExample(messages=TALK, tools=[TOOL]).tools == [TOOL]
        with pytest.raises(DatasetError) as caught:
            ChatExample(messages=TALK, tools=tools)
        assert caught.value.place == place

    def test_functions(self) -> None:
        function = {"name": "f", "parameters": {"type": "object", "properties": {}}}
        assert ChatExample(messages=TALK, functions=[function]).to_openai() == {
            "messages": TALK,
            "functions": [function],
        }
        for bad, place in (
            ([function, function], "functions[1]"),
            ([{"name": ""}], "functions[0].name"),
            ([{**function, "strict": True}], "functions[0].strict"),
        ):
            with pytest.raises(DatasetError) as caught:
                ChatExample(messages=TALK, functions=bad)
            assert caught.value.place == place

    @pytest.mark.parametrize("bad", [float("nan"), {1}, {"a": ["\udc00"]}])
    def test_what_json_cannot_hold(self, bad: Any) -> None:
        with pytest.raises(DatasetError) as caught:
            ChatExample(messages=TALK, metadata={"a": {"b": bad}})
        assert caught.value.place.startswith("metadata.a.b")

    def test_for_openai(self) -> None:
        asked = ChatExample(
            messages=TALK,
            tools=[TOOL],
            parallel_tool_calls=False,
            response_format={"type": "text"},
            metadata={"id": "1"},
        )
        line = {"messages": TALK, "tools": [TOOL], "parallel_tool_calls": False}
        assert asked.to_openai() == line
        # The server refuses the switch where there is no tool to call.
        without = ChatExample(messages=TALK, tools=[], parallel_tool_calls=False)
        assert without.to_openai() == {"messages": TALK}

    def test_answer(self) -> None:
        parts = [{"type": "text", "text": "31 "}, {"type": "text", "text": "degrees"}]
        assert ChatExample(messages=TALK).answer() == "31 degrees."
        assert ChatExample(messages=[USER, CALLING]).answer() == ""
        assert ChatExample(messages=[USER, changed(ANSWER, "content", parts)]).answer() == (
            "31 degrees"
        )


# --- against OpenAI's published description -------------------------------------------------

strings = st.sampled_from(["", "x", "https://a.b/c", "{}", "\x00é", "数"])
names = st.sampled_from(["f", "get_weather-2"])
texts = st.fixed_dictionaries({"type": st.just("text"), "text": strings})
refusals = st.fixed_dictionaries({"type": st.just("refusal"), "refusal": strings})
images = st.fixed_dictionaries(
    {
        "type": st.just("image_url"),
        "image_url": st.fixed_dictionaries(
            {"url": st.sampled_from(["https://a.b/c.png", "data:image/png;base64,AA=="])},
            optional={"detail": st.sampled_from(["auto", "low", "high"])},
        ),
    }
)
sounds = st.fixed_dictionaries(
    {
        "type": st.just("input_audio"),
        "input_audio": st.fixed_dictionaries(
            {"data": strings, "format": st.sampled_from(["wav", "mp3"])}
        ),
    }
)
documents = st.fixed_dictionaries(
    {
        "type": st.just("file"),
        "file": st.fixed_dictionaries({"file_id": strings}, optional={"filename": strings}),
    }
)
functions = st.fixed_dictionaries({"name": names, "arguments": st.sampled_from(["{}", '{"a": 1}'])})
calls = st.fixed_dictionaries(
    {"id": st.uuids().map(str), "type": st.just("function"), "function": functions}
)


def content(*parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return strings | st.lists(st.one_of(*parts), min_size=1, max_size=3)


def message(role: str, optional: dict[str, Any], **fields: Any) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries({"role": st.just(role), **fields}, optional=optional)


said = content(texts, refusals) | st.none()
talk = st.one_of(
    message("system", {"name": strings}, content=content(texts)),
    message("developer", {"name": strings}, content=content(texts)),
    message("user", {"name": strings}, content=content(texts, images, sounds, documents)),
    message("tool", {"name": strings}, content=content(texts), tool_call_id=st.just("c1")),
    message("function", {}, content=strings | st.none(), name=strings),
    message("assistant", {"content": said, "weight": st.just(1)}, refusal=st.just("No.")),
    message("assistant", {"content": said, "name": strings}, function_call=functions),
    message("assistant", {}, audio=st.fixed_dictionaries({"id": strings})),
    message("assistant", {"content": said}, tool_calls=st.lists(calls, min_size=1, max_size=2)),
)
replacements = st.one_of(
    st.sampled_from([None, 0, 1, True, "", "x", [], {}, [""], "tool", "custom", "refusal"]),
    st.lists(texts | refusals | images, max_size=2),
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return each (object or list, key or index) in a JSON value, and a new key for each object."""
    if not isinstance(value, dict | list):
        return []
    keys = [*value, "name"] if isinstance(value, dict) else list(range(len(value)))
    inner = value.values() if isinstance(value, dict) else value
    return [(value, key) for key in keys] + [place for item in inner for place in places(item)]


@st.composite
def damaged(draw: st.DrawFn) -> dict[str, Any]:
    """A message of which one value, at any depth, is another one or gone, or one is new."""
    whole: dict[str, Any] = copy.deepcopy(draw(talk))
    holder, key = draw(st.sampled_from(places(whole)))
    if isinstance(holder, dict) and draw(st.integers(0, 4)) == 0:
        holder.pop(key, None)
    else:
        holder[key] = draw(replacements)
    return whole


def in_context(one: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a conversation that allows for the message, if the message itself is right."""
    if one.get("role") == "assistant":
        return [USER, one]
    call = changed(CALLING, "tool_calls.0.id", one.get("tool_call_id"))
    return [*([call] if one.get("role") == "tool" else []), one, ANSWER]


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    path = SHARED / "specs" / "openai.json"
    if not path.exists():
        pytest.skip("needs ../shared/specs/openai.json, which this machine lacks")
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def validator(published: dict[str, Any], name: str) -> Any:
    return jsonschema.Draft202012Validator(
        {"$ref": f"#/components/schemas/{name}", "components": published["components"]}
    )


@settings(max_examples=300, deadline=None)
@given(one=talk)
def test_what_is_right_is_accepted(published: dict[str, Any], one: dict[str, Any]) -> None:
    schema = validator(published, "ChatCompletionRequestMessage")
    accepted = ChatExample(messages=in_context(one))
    assert one in accepted.messages
    for each in accepted.messages:
        schema.validate(each)


@settings(max_examples=2000, deadline=None)
@given(one=damaged())
def test_what_is_accepted_is_in_the_published_format(
    published: dict[str, Any], one: dict[str, Any]
) -> None:
    try:
        accepted = ChatExample(messages=in_context(one))
    except DatasetError:
        return
    schema = validator(published, "ChatCompletionRequestMessage")
    for each in accepted.messages:
        schema.validate(each)


def test_our_own_examples_are_in_the_published_format(published: dict[str, Any]) -> None:
    schema = validator(published, "ChatCompletionRequestMessage")
    for message in TALK:
        schema.validate(message)
    validator(published, "ChatCompletionTool").validate(TOOL)
    with pytest.raises(jsonschema.ValidationError):  # the test above can fail
        schema.validate({"role": "user", "content": None})


# --- files ----------------------------------------------------------------------------------


class TestFiles:
    def test_there_and_back(self, tmp_path: Path) -> None:
        data = ChatDataset(
            examples=[
                about("Where is Zürich? \u2028 数"),  # a separator that splitlines() splits at
                {
                    "messages": TALK,
                    "tools": [TOOL],
                    "parallel_tool_calls": False,
                    "response_format": {"type": "json_object"},
                    "metadata": {"query": "Rome?", "seconds": 0.5},
                },
            ]
        )
        data.save(tmp_path / "new" / "data.jsonl")
        again = ChatDataset.load(tmp_path / "new" / "data.jsonl")
        assert again == data
        assert again.content_hash == data.content_hash
        assert len(again) == 2
        assert [example.asked() for example in again] == [data.examples[0].asked(), "Rome?"]
        lines = (tmp_path / "new" / "data.jsonl").read_text(encoding="utf-8").split("\n")
        assert json.loads(lines[0]) == about("Where is Zürich? \u2028 数")  # and no empty field
        again.to_openai_jsonl(tmp_path / "openai.jsonl")
        uploaded = ChatDataset.load(tmp_path / "openai.jsonl")
        assert [example.to_openai() for example in uploaded] == [e.to_openai() for e in data]
        assert "metadata" not in (tmp_path / "openai.jsonl").read_text(encoding="utf-8")
        assert uploaded.content_hash != data.content_hash

    @pytest.mark.parametrize(
        ("line", "place", "reason"),
        [
            ({"messages": [*TALK[:1], 3]}, "line 3, messages[1]", "valid dictionary"),
            ({"prompt": "a", "completion": "b"}, "line 3, messages", "Field required"),
            ({**about("a"), "tool_choice": "auto"}, "line 3, tool_choice", "not permitted"),
            ({"messages": changed(TALK, "0.role", "x")}, "line 3, messages[0].role", "one of"),
            ([], "line 3", "valid dictionary"),
            ('{"messages": [', "line 3, column 15", "truncated"),
            ('{"messages": [], "messages": []}', "line 3", "twice"),
        ],
    )
    def test_errors_tell_the_place(
        self, tmp_path: Path, line: Any, place: str, reason: str
    ) -> None:
        path = write_lines(tmp_path / "bad.jsonl", about("fine"), "", line)
        with pytest.raises(DatasetError, match=re.escape(reason)) as caught:
            ChatDataset.load(path)
        assert (caught.value.source, caught.value.place) == (str(path), place)
        assert str(caught.value).count(str(path)) == 1

    def test_errors_of_whole_files(self, tmp_path: Path) -> None:
        (tmp_path / "empty.jsonl").write_text("\n\n")
        with pytest.raises(DatasetError, match=r"empty\.jsonl: has no example"):
            ChatDataset.load(tmp_path / "empty.jsonl")
        with pytest.raises(DatasetError, match=r"none\.jsonl: no such file"):
            ChatDataset.load(tmp_path / "none.jsonl")
        with pytest.raises(DatasetError, match="is a folder"):
            ChatDataset.load(tmp_path)
        (tmp_path / "latin.jsonl").write_bytes('{"messages": "é"}'.encode("latin-1"))
        with pytest.raises(DatasetError, match="is not UTF-8"):
            ChatDataset.load(tmp_path / "latin.jsonl")

    def test_a_byte_order_mark_and_windows_line_ends(self, tmp_path: Path) -> None:
        lines = [json.dumps(about(question)) for question in ("a", "b")]
        (tmp_path / "win.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
        assert len(ChatDataset.load(tmp_path / "win.jsonl")) == 2

    def test_in_python_the_place_is_the_index(self) -> None:
        with pytest.raises(DatasetError) as caught:
            ChatDataset(examples=[about("a"), about("b", answer="")])
        assert caught.value.place == "examples[1].messages[1]"
        with pytest.raises(DatasetError, match="no example"):
            ChatDataset(examples=[])
        with pytest.raises(DatasetError, match="valid list") as caught:
            ChatDataset.coerce(3)
        assert caught.value.place == "examples"

    def test_coerce(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "data.jsonl", about("a"))
        data = ChatDataset.load(path)
        assert ChatDataset.coerce(data) is data
        assert ChatDataset.coerce(str(path)) == ChatDataset.coerce(iter([about("a")])) == data
        assert ChatDataset.coerce(data.examples) == data

    def test_a_failed_save_keeps_the_old_file(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "data.jsonl", about("old"))
        data = ChatDataset(examples=[about("new"), about("other")])
        data.examples[1].metadata["when"] = object()  # put in behind the model's back
        with pytest.raises(Exception, match="object"):
            data.save(path)
        assert ChatDataset.load(path).examples[0].asked() == "old"
        assert os.listdir(tmp_path) == ["data.jsonl"]


class TestTornLines:
    LINE = json.dumps(
        {**about("Où? 数"), "metadata": {"id": "1", "usage": None, "stream": True, "t": -1.5}},
        ensure_ascii=False,
        separators=(",", ":"),
    ).encode()

    def test_every_way_to_cut_a_journals_last_line(self, tmp_path: Path, caplog) -> None:
        whole = self.LINE + b"\n"
        for cut in range(1, len(self.LINE)):
            (tmp_path / "journal.jsonl").write_bytes(whole + self.LINE[:cut])
            caplog.clear()
            assert len(ChatDataset.load(tmp_path / "journal.jsonl")) == 1, self.LINE[:cut]
            assert "line 2 was cut short" in caplog.text

    def test_the_process_came_back(self, tmp_path: Path) -> None:
        path = tmp_path / "journal.jsonl"
        path.write_bytes(self.LINE + b"\n" + self.LINE[:50])
        Journal(path).append(json.loads(self.LINE))
        assert len(ChatDataset.load(path)) == 2

    @pytest.mark.parametrize(
        "broken",
        [
            b'{"messages":[}, "metadata": {"id": 1}}',  # not cut but wrong
            b"messages",
            LINE[:30] + b"\xff" + LINE[30:],
        ],
    )
    def test_other_damage_is_an_error(self, tmp_path: Path, broken: bytes) -> None:
        (tmp_path / "journal.jsonl").write_bytes(self.LINE + b"\n" + broken)
        with pytest.raises(DatasetError, match=r"journal\.jsonl: "):
            ChatDataset.load(tmp_path / "journal.jsonl")

    def test_a_file_that_is_no_journal_is_not_mended(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "data.jsonl", about("a"), json.dumps(about("b"))[:-5])
        with pytest.raises(DatasetError) as caught:
            ChatDataset.load(path)
        assert caught.value.place.startswith("line 2")
        (tmp_path / "data.jsonl").write_bytes(self.LINE[:50])
        with pytest.raises(DatasetError, match="truncated"):
            ChatDataset.load(path)


# --- the question and the split -------------------------------------------------------------


class Asked(MockLLM):
    """Keeps the messages of each call, and answers each in one word."""

    chats: bool = True
    _seen: list[list[dict[str, Any]]] = PrivateAttr(default_factory=list)

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(is_chat_model=self.chats)

    def chat(self, messages: Any, **kwargs: Any) -> Any:
        self._seen.append([{"role": m.role.value, "content": m.content} for m in messages])
        return ChatResponse(message=ChatMessage(role="assistant", content="Fine."))

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        self._seen.append([{"role": "user", "content": prompt}])
        return CompletionResponse(text="Fine.")


class TestQuestion:
    @pytest.mark.parametrize("chats", [True, False])
    @pytest.mark.parametrize("mode", ["compact", "refine", "tree_summarize", "simple_summarize"])
    def test_of_a_query_engines_own_calls(self, mode: str, chats: bool) -> None:
        nodes = [TextNode(text=f"Query: {i}\nAnswer: {i}. " * 40) for i in range(3)]
        llm = Asked()
        llm.chats = chats
        engine = SummaryIndex(nodes).as_query_engine(llm=llm, response_mode=mode)
        engine.query("Is the sky blue?\nAnd why?")
        assert len(llm._seen) == (3 if mode == "refine" else 1)
        for messages in llm._seen:
            asked = ChatExample(messages=[*messages, ANSWER]).asked()
            assert asked == "Is the sky blue?\nAnd why?"

    @pytest.mark.parametrize(
        "template",
        [
            default_prompts.DEFAULT_TEXT_QA_PROMPT,
            default_prompts.DEFAULT_TREE_SUMMARIZE_PROMPT,
            default_prompts.DEFAULT_REFINE_PROMPT,
            chat_prompts.CHAT_REFINE_PROMPT,
            chat_prompts.CHAT_CONTENT_QA_PROMPT,
            chat_prompts.CHAT_CONTENT_REFINE_PROMPT,
        ],
    )
    def test_of_each_default_prompt(self, template: Any) -> None:
        prompts = template.format_messages(
            query_str="Why?",
            context_str="c",
            context_msg="c",
            context_messages=[],
            existing_answer="Query: no",
        )
        talk = [{"role": m.role.value, "content": m.content} for m in prompts]
        assert ChatExample(messages=[*talk, ANSWER]).asked() == "Why?"

    def test_of_other_messages(self) -> None:
        assert ChatExample(messages=TALK).asked() == "How warm is Rome?"
        system = {"role": "system", "content": "Say hello."}
        assert ChatExample(messages=[system, ANSWER]).asked() == "Say hello."
        journalled = ChatExample(messages=TALK, metadata={"query": "Rome?"})
        assert journalled.asked() == "Rome?"
        assert ChatExample(messages=TALK, metadata={"query": " "}).asked() == USER["content"]
        plain = "Give me an\nAnswer:"
        assert ChatExample(**about(plain)).asked() == plain

    def test_of_pictures(self) -> None:
        def show(name: str) -> ChatExample:
            image = {"type": "image_url", "image_url": {"url": f"https://a.example/{name}.png"}}
            return ChatExample(messages=[{"role": "user", "content": [image]}, ANSWER])

        assert show("a").asked() == show("a").asked()
        assert similarity(show("a").asked(), show("b").asked()) < 0.5


WORDS = ("amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "haven", "inlet", "jetty")


def distinct_question(number: int) -> str:
    return " ".join(WORDS[(number * step + step) % len(WORDS)] + str(number) for step in range(9))


class TestSplit:
    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(0, 6), min_size=12, max_size=60), st.integers(0, 5))
    @example([0] * 30 + [1, 2, 3], 0)
    def test_no_question_on_both_sides(self, questions: list[int], seed: int) -> None:
        forms = ("{}?", "  {} ", "{}!", "{}s")
        data = ChatDataset(
            examples=[
                about(forms[i % 4].format(distinct_question(q)), answer=f"a{i}")
                for i, q in enumerate(questions)
            ]
        )
        if len(set(questions)) < 2:
            with pytest.raises(DatasetError, match="its questions, near-duplicates counted as"):
                data.split(seed=seed)
            return
        parts = data.split(seed=seed)
        assert parts == data.split(seed=seed)
        where = {e.answer(): name for name, part in parts.items() for e in part}
        assert sum(map(len, parts.values())) == len(where) == len(questions)
        assert all(len(part) for part in parts.values())
        for name in set(questions):
            assert len({where[f"a{i}"] for i, q in enumerate(questions) if q == name}) == 1

    def test_order_shares_and_seed(self) -> None:
        data = ChatDataset(examples=[about(distinct_question(i), f"{i}.") for i in range(50)])
        fractions = {"train": 0.6, "validation": 0.2, "test": 0.2}
        parts = data.split(fractions)
        assert {name: len(part) for name, part in parts.items()} == {
            "train": 30,
            "validation": 10,
            "test": 10,
        }
        for part in parts.values():
            numbers = [int(example.answer()[:-1]) for example in part]
            assert numbers == sorted(numbers)
        assert data.split(fractions, seed=1) != parts
        with pytest.raises(ArgumentError, match="fractions"):
            data.split({"train": 0})

    def test_by_another_key(self) -> None:
        data = ChatDataset(
            examples=[
                {**about(distinct_question(i)), "metadata": {"user": f"{'xyz'[i % 3]}" * 8}}
                for i in range(30)
            ]
        )
        parts = data.split({"a": 2, "b": 1}, key=lambda example: example.metadata["user"])
        users = [{example.metadata["user"] for example in part} for part in parts.values()]
        assert [len(part) for part in parts.values()] == [20, 10]
        assert not users[0] & users[1]
        assert data.split(key=ChatExample.asked) == data.split()

    def test_one_question_asked_ten_thousand_times(self) -> None:
        # Compared with each other they would be fifty million pairs.
        base = ChatExample(**about("What is the weather like in Rome today?"))
        other = ChatExample(**about("Who wrote Faust?"))
        data = ChatDataset(examples=[base] * 10_000 + [other] * 2_000)
        assert sorted(len(part) for part in data.split().values()) == [2_000, 10_000]

    def test_deduplicated(self) -> None:
        data = ChatDataset(
            examples=[
                {**about("a"), "metadata": {"id": "1"}},
                about("b"),
                {**about("a"), "metadata": {"id": "2"}},
                about("a", "No."),
                {**about("a"), "tools": [TOOL]},
            ]
        )
        kept = data.deduplicated()
        assert kept.examples == [data.examples[i] for i in (0, 1, 3, 4)]

    def test_stats(self) -> None:
        data = ChatDataset(
            examples=[
                {"messages": TALK, "tools": [TOOL]},
                {"messages": [USER, CALLING], "response_format": {"type": "text"}},
            ]
        )
        assert data.stats() == {
            "examples": 2,
            "distinct questions": 1,
            "messages": 6,
            "examples with tools": 1,
            "answers that call a tool": 1,
            "answers in a response format": 1,
            "median words per question": 4,
            "median words per answer": 1,
        }


class TestPreferences:
    LINE: ClassVar[dict[str, Any]] = {
        "input": {"messages": [USER], "tools": [TOOL], "parallel_tool_calls": True},
        "preferred_output": [ANSWER],
        "non_preferred_output": [{"role": "assistant", "content": "Warm."}],
    }

    def test_there_and_back(self, tmp_path: Path) -> None:
        lines = [changed(self.LINE, "input.messages.0.content", f"{q}?") for q in "abcd"]
        data = PreferenceDataset.load(write_lines(tmp_path / "a.jsonl", *lines))
        assert [example.to_openai() for example in data] == lines
        data.save(tmp_path / "b.jsonl")
        data.to_openai_jsonl(tmp_path / "c.jsonl")
        assert PreferenceDataset.load(tmp_path / "b.jsonl") == data
        assert PreferenceDataset.load(tmp_path / "c.jsonl") == data
        parts = data.split({"train": 1, "validation": 1})
        assert [len(part) for part in parts.values()] == [2, 2]
        assert data.stats()["examples with tools"] == 4
        assert data.stats()["median words per other answer"] == 1

    def test_calls_across_input_and_output(self) -> None:
        line = changed(self.LINE, "input.messages", [USER, CALLING, RESULT])
        assert PreferenceExample.model_validate(line).asked() == "How warm is Rome?"
        calling = changed(self.LINE, "preferred_output", [CALLING])
        PreferenceExample.model_validate(calling)
        unanswered = changed(self.LINE, "input.messages", [USER, CALLING, USER])
        with pytest.raises(DatasetError, match="no tool message answers 'c1'") as caught:
            PreferenceExample.model_validate(unanswered)
        assert caught.value.place == "input.messages[1].tool_calls[0]"

    @pytest.mark.parametrize(
        ("path", "to", "place"),
        [
            ("input.messages", [], "input.messages"),
            ("input.messages", [USER, ANSWER], "input.messages"),
            ("input.messages.0.content", None, "input.messages[0].content"),
            ("input.tools", [TOOL, TOOL], "input.tools[1]"),
            ("preferred_output", [], "preferred_output"),
            ("preferred_output", [ANSWER, ANSWER], "preferred_output"),
            ("preferred_output.0.role", "user", "preferred_output[0].role"),
            ("non_preferred_output.0.content", "", "non_preferred_output[0]"),
            ("non_preferred_output", [ANSWER], "non_preferred_output"),
            ("non_preferred_output.0.content", "\ud800", "non_preferred_output[0].content"),
            ("input.functions", [], "input.functions"),
        ],
    )
    def test_refused(self, tmp_path: Path, path: str, to: Any, place: str) -> None:
        line = json.dumps(changed(self.LINE, path, to))
        file = write_lines(tmp_path / "bad.jsonl", line)
        with pytest.raises(DatasetError) as caught:
            PreferenceDataset.load(file)
        assert caught.value.place == f"line 1, {place}"


# --- the predecessor's files ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "examples", "questions"),
    [("gpt4_rag_events.jsonl", 61, 40), ("gpt4_react_events.jsonl", 184, 60)],
)
def test_the_predecessors_files(
    tmp_path: Path, name: str, examples: int, questions: int, published: dict[str, Any]
) -> None:
    path = SHARED / "data" / "distill" / name
    if not path.exists():
        pytest.skip(f"needs {name} in ../shared/data/distill, which this machine lacks")
    data = ChatDataset.load(path)
    assert (len(data), data.stats()["distinct questions"]) == (examples, questions)
    assert max(len(example.asked()) for example in data) < 300  # no context in it
    parts = data.split()
    assert abs(len(parts["validation"]) / examples - 0.2) < 0.05
    train, held_out = ({e.asked() for e in parts[part]} for part in ("train", "validation"))
    assert not train & held_out
    assert max(similarity(a, b) for a in train for b in held_out) < 0.8
    data.to_openai_jsonl(tmp_path / name)
    schema = validator(published, "ChatCompletionRequestMessage")
    for old, new in zip(data, ChatDataset.load(tmp_path / name), strict=True):
        assert old == new
        for message in new.messages:
            schema.validate(message)


def test_the_import_is_light() -> None:
    code = (
        "import sys; import ft_core.splits, ft_core.datasets\n"
        "heavy = {'torch', 'transformers', 'llama_index', 'openai', 'datasets', 'jsonschema'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


def test_a_warning_names_the_file_once(tmp_path: Path, caplog) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(TestTornLines.LINE + b"\n" + TestTornLines.LINE[:40])
    with caplog.at_level(logging.WARNING):
        ChatDataset.load(path)
    assert caplog.text.count("journal.jsonl") == 1
