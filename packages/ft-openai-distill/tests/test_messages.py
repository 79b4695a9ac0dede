"""LlamaIndex's messages and tools against OpenAI's format, with LlamaIndex's own objects."""

import base64
import io
import json
from types import SimpleNamespace

import pytest
from llama_index.core.base.llms.types import (
    AudioBlock,
    CachePoint,
    ChatMessage,
    CitableBlock,
    DocumentBlock,
    ImageBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
    VideoBlock,
)
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai.utils import from_openai_message, to_openai_message_dicts
from openai.types.chat import ChatCompletionMessage, ChatCompletionMessageToolCall
from openai.types.responses import ResponseFunctionToolCall
from pydantic import BaseModel

from ft_core.datasets import ChatExample
from ft_core.errors import DatasetError
from ft_openai_distill.messages import (
    map_texts,
    plain,
    to_chat_message,
    to_openai_answer,
    to_openai_messages,
    to_openai_settings,
    to_openai_tools,
)

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
WAV = b"RIFF$\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0@\x1f\0\0\x80>\0\0"
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "search", "arguments": '{"q": "fee"}'},
}


def user(*blocks):
    return ChatMessage(role="user", blocks=list(blocks))


def assistant(*blocks, **extra):
    return ChatMessage(role="assistant", blocks=list(blocks), additional_kwargs=extra)


def tool_result(text="3 %", **extra):
    return ChatMessage(role="tool", content=text, additional_kwargs=extra)


def sdk_call(id_="call_1", arguments='{"q": "fee"}'):
    return ChatCompletionMessageToolCall(
        id=id_, type="function", function={"name": "search", "arguments": arguments}
    )


def test_where_openais_own_converter_is_right_the_two_agree():
    messages = [
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content="One?"),
        user(TextBlock(text="one"), TextBlock(text="two")),
        user(TextBlock(text="look"), ImageBlock(url="https://example.org/a.png", detail="low")),
        user(ImageBlock(image=PNG)),
        user(DocumentBlock(data=b"%PDF-1.4", title="a.pdf", document_mimetype="application/pdf")),
        user(AudioBlock(audio=WAV, format="wav")),
        assistant(
            TextBlock(text="I look."),
            ToolCallBlock(tool_call_id="call_1", tool_name="search", tool_kwargs={"q": "fee"}),
            ToolCallBlock(tool_call_id="call_2", tool_name="search", tool_kwargs='{"q": "a"}'),
        ),
        tool_result("3 %", tool_call_id="call_1"),
        tool_result("4 %", tool_call_id="call_2"),
        assistant(TextBlock(text="It is 3 %.")),
    ]
    assert to_openai_messages(messages) == to_openai_message_dicts(messages, drop_none=True)


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        sdk_call(),
        ResponseFunctionToolCall(
            id="fc_9",
            call_id="call_1",
            name="search",
            arguments='{"q": "fee"}',
            type="function_call",
        ),
        {"type": "tool_use", "id": "call_1", "name": "search", "input": {"q": "fee"}},
        ToolSelection(tool_id="call_1", tool_name="search", tool_kwargs={"q": "fee"}),
        {"id": "call_1", "function": {"name": "search", "arguments": {"q": "fee"}}},  # Ollama
    ],
    ids=["chat", "SDK", "responses", "anthropic", "selection", "ollama"],
)
def test_tool_calls_of_every_provider(call):
    (message,) = to_openai_messages([assistant(tool_calls=[call])])
    assert message == {"role": "assistant", "tool_calls": [CALL]}
    json.dumps(message)


def test_calls_that_stand_in_blocks_and_beside_them_are_taken_once():
    answer = from_openai_message(
        ChatCompletionMessage(role="assistant", content=None, tool_calls=[sdk_call()]), ["text"]
    )
    assert answer.additional_kwargs["tool_calls"]
    assert to_openai_answer(answer) == {"role": "assistant", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    "function_call",
    [
        {"name": "search", "arguments": '{"q": "fee"}'},
        SimpleNamespace(name="search", arguments='{"q": "fee"}'),
    ],
)
def test_the_old_function_call(function_call):
    messages = [
        ChatMessage(content="?"),
        assistant(function_call=function_call),
        ChatMessage(role="function", content="3 %", additional_kwargs={"name": "search"}),
    ]
    _, asked, result = to_openai_messages(messages)
    assert asked == {"role": "assistant", "function_call": CALL["function"]}
    assert result == {"role": "function", "name": "search", "content": "3 %"}


def test_calls_without_ids_and_with_one_id_twice_are_paired_with_their_results():
    def call(id_, name="search"):
        return ToolCallBlock(tool_call_id=id_, tool_name=name, tool_kwargs={})

    messages = [
        ChatMessage(content="?"),
        assistant(call(None, "a"), call(None, "b")),
        tool_result("B", name="b"),
        tool_result("A"),
        assistant(call("search"), call("search")),
        tool_result("1", tool_call_id="search"),
        tool_result("2", tool_call_id="search"),
        assistant(TextBlock(text="done")),
    ]
    result = to_openai_messages(messages)
    ChatExample(messages=result)
    first, second = (call["id"] for call in result[1]["tool_calls"])
    assert [result[2]["tool_call_id"], result[3]["tool_call_id"]] == [second, first]
    assert [message["tool_call_id"] for message in result[5:7]] == ["search", "search_1"]


def test_a_result_without_a_call_is_refused_with_its_place():
    with pytest.raises(DatasetError, match=r"messages\[1\].*'call_7'.*no message before it makes"):
        to_openai_messages([ChatMessage(content="?"), tool_result(tool_call_id="call_7")])


def test_roles_of_other_providers():
    roles = [MessageRole.DEVELOPER, MessageRole.MODEL, MessageRole.CHATBOT]
    messages = to_openai_messages(ChatMessage(role=role, content="x") for role in roles)
    assert [message["role"] for message in messages] == ["developer", "assistant", "assistant"]
    assert to_openai_answer(ChatMessage(role="model", content="x"))["role"] == "assistant"


def test_blocks_that_only_other_providers_have():
    content = [
        ThinkingBlock(content="hm"),
        TextBlock(text="Read. "),
        CitableBlock(title="t", source="s", content=[TextBlock(text="Passage.")]),
        CachePoint(cache_control={"type": "ephemeral"}),
    ]
    assert to_openai_messages([user(*content)]) == [{"role": "user", "content": "Read. Passage."}]
    with pytest.raises(DatasetError, match="no place for a block of type 'video'"):
        to_openai_messages([user(VideoBlock(video=b"x"))])


def test_files_are_read_and_left_where_they_were(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    stream = io.BytesIO(PNG)
    stream.seek(5)
    blocks = [
        ImageBlock(path=tmp_path / "a.png"),
        ImageBlock(image=stream),
        ImageBlock(url="data:image/png;base64,AAAA"),
        DocumentBlock(data=io.BytesIO(b"%PDF-1.4"), title="a.pdf"),
    ]
    image, streamed, inline, document = to_openai_messages([user(*blocks)])[0]["content"]
    encoded = "data:image/png;base64," + base64.b64encode(PNG).decode()
    assert image["image_url"]["url"] == streamed["image_url"]["url"] == encoded
    assert inline["image_url"]["url"] == "data:image/png;base64,AAAA"
    assert document["file"]["filename"] == "a.pdf"
    assert document["file"]["file_data"].endswith(base64.b64encode(b"%PDF-1.4").decode())
    assert stream.tell() == 5


def test_nothing_is_downloaded_or_used_up():
    with pytest.raises(DatasetError, match="by URL: it is not downloaded"):
        to_openai_messages([user(DocumentBlock(url="http://127.0.0.1:9/a.pdf"))])

    class Pipe(io.RawIOBase):
        def seekable(self):
            return False

        def read(self, size=-1):
            raise AssertionError("the app's only copy was read")

    with pytest.raises(DatasetError, match="read only once"):
        to_openai_messages([user(ImageBlock(image=Pipe()))])


def test_an_answer_without_words_or_calls_is_none():
    assert to_openai_answer(assistant()) is None
    assert to_openai_answer(assistant(TextBlock(text=" \n"))) is None
    assert to_openai_answer(assistant(ThinkingBlock(content="hm"))) is None


def test_an_empty_turn_of_the_past_is_nothing_to_learn():
    messages = to_openai_messages([ChatMessage(content="?"), assistant(TextBlock(text=""))])
    assert messages[1] == {"role": "assistant", "content": "", "weight": 0}
    ChatExample(messages=[*messages, {"role": "assistant", "content": "x"}])


def search(q: str) -> str:
    """Search the filing."""
    return q


SCHEMA = {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]}
SEARCH = {"name": "search", "description": "Search the filing.", "parameters": SCHEMA}


@pytest.mark.parametrize(
    "tools",
    [
        [{"type": "function", "function": SEARCH}],
        [{"type": "function", **SEARCH}, {"type": "web_search_preview"}],
        [
            {
                "name": "search",
                "description": "Search the filing.",
                "input_schema": SCHEMA,
                "cache_control": {"type": "ephemeral"},
            }
        ],
        {
            "tools": [
                {
                    "toolSpec": {
                        "name": "search",
                        "description": "Search the filing.",
                        "inputSchema": {"json": SCHEMA},
                    }
                }
            ],
            "toolChoice": {"auto": {}},
        },
        [
            SimpleNamespace(
                function_declarations=[
                    SimpleNamespace(
                        name="search",
                        description="Search the filing.",
                        parameters={
                            "type": "OBJECT",
                            "properties": {"q": {"type": "STRING"}},
                            "required": ["q"],
                        },
                    )
                ]
            )
        ],
    ],
    ids=["chat", "responses", "anthropic", "bedrock", "gemini"],
)
def test_tools_of_every_provider(tools):
    assert to_openai_tools(tools) == [{"type": "function", "function": SEARCH}]


def test_tools_as_llama_index_has_them():
    tool = FunctionTool.from_defaults(search)
    assert to_openai_tools([tool]) == [tool.metadata.to_openai_tool()]
    with pytest.raises(DatasetError, match="a form that is not known"):
        to_openai_tools([{"what": "is this"}])


class Invoice(BaseModel):
    total: float


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object"),
        ({"response_format": Invoice}, "json_schema"),
        ({"format": Invoice.model_json_schema()}, "json_schema"),
        ({"format": "json"}, "json_object"),
        (
            {
                "text": {
                    "format": {
                        "type": "json_schema",
                        "name": "Invoice",
                        "schema": Invoice.model_json_schema(),
                    }
                }
            },
            "json_schema",
        ),
    ],
)
def test_the_response_format_of_every_provider(settings, kind):
    response_format = to_openai_settings(settings)["response_format"]
    assert response_format["type"] == kind
    if kind == "json_schema":
        assert response_format["json_schema"] == {
            "name": "Invoice",
            "schema": Invoice.model_json_schema(),
        }


def test_settings_that_say_nothing_are_left_out():
    none = {"tools": None, "tool_choice": None, "temperature": 0.1, "parallel_tool_calls": True}
    assert to_openai_settings(none) == {}
    assert to_openai_settings({"functions": [SEARCH], "function_call": "auto"}) == {
        "functions": [SEARCH],
        "tool_choice": "auto",
    }


def test_settings_are_copies():
    tools = [{"type": "function", "function": dict(SEARCH)}]
    settings = to_openai_settings({"tools": tools, "parallel_tool_calls": False})
    tools[0]["function"]["name"] = "changed"
    assert settings["tools"][0]["function"]["name"] == "search"
    assert settings["parallel_tool_calls"] is False


def test_plain_refuses_what_is_no_value():
    with pytest.raises(TypeError, match="a object is no JSON value"):
        plain(object())


def test_back_to_llama_index_and_forth():
    messages = to_openai_messages(
        [
            ChatMessage(role="system", content="Be brief."),
            user(TextBlock(text="look"), ImageBlock(image=PNG), ImageBlock(url="https://e.org/a")),
            user(TextBlock(text="hear"), AudioBlock(audio=WAV, format="wav")),
            user(DocumentBlock(data=b"%PDF-1.4", title="a", document_mimetype="application/pdf")),
            assistant(ToolCallBlock(tool_call_id="c", tool_name="search", tool_kwargs={"q": "x"})),
            tool_result("3 %", tool_call_id="c"),
            assistant(reference_audio_id="audio_1"),
            assistant(TextBlock(text="3 %")),
        ]
    )
    back = [to_chat_message(message) for message in messages]
    assert all(isinstance(message, ChatMessage) for message in back)
    assert to_openai_messages(back) == messages


def test_redaction_reaches_each_text_and_leaves_json_whole():
    def redact(text):
        return text.replace("Ada", 'A"')

    message = {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "Ada"},
            {"type": "image_url", "image_url": {"url": "https://e.org/Ada.png"}},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,Ada="}},
            {"type": "file", "file": {"filename": "Ada.pdf", "file_data": "Ada"}},
        ],
        "tool_calls": [
            {
                "id": "Ada",
                "type": "function",
                "function": {"name": "Ada", "arguments": '{"Ada": ["Ada", {"n": 1, "q": "Ada"}]}'},
            }
        ],
    }
    before = json.dumps(message)
    result = map_texts(message, redact)
    assert json.dumps(message) == before
    text, url, data, file = result["content"]
    assert text["text"] == 'A"'
    assert url["image_url"]["url"] == 'https://e.org/A".png'
    assert data["image_url"]["url"] == "data:image/png;base64,Ada="
    assert file["file"] == {"filename": 'A".pdf', "file_data": "Ada"}
    function = result["tool_calls"][0]["function"]
    assert json.loads(function["arguments"]) == {"Ada": ['A"', {"n": 1, "q": 'A"'}]}
    assert function["name"] == result["tool_calls"][0]["id"] == "Ada"


def test_what_redaction_does_not_change_stays_as_the_model_wrote_it():
    message = {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f"}}]}
    message["tool_calls"][0]["function"]["arguments"] = '{ "q":"x",  "n":1.0 }'
    assert map_texts(message, lambda text: text) == message
