import json
from typing import Any

import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.output_parsers import PydanticOutputParser
from llama_index.core.program import LLMTextCompletionProgram
from model_assets import CHAT_TEMPLATE, tiny_causal_lm
from pydantic import BaseModel
from transformers import AutoTokenizer, ByT5Tokenizer

from ft_core.datasets.chat import ChatDataset, ChatExample
from ft_core.errors import ArgumentError, DatasetError
from ft_core.sft.chat_format import ChatFormat, ToolCall, tools_of
from ft_core.sft.rows import rows_of

LLAMA = (
    "{{ '<|endoftext|>' }}{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}<|im_start|>\n\n{{ message['content'] | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_start|>\n\n{% endif %}"
)
ALTERNATING = (  # as Mistral's and Gemma's: no system, user and assistant in turn
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] }}<|im_end|>{% endif %}{% endfor %}"
)
TOOLS = (  # as Hermes' and Qwen's
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}"
    "{% if message.role == 'tool' %} ({{ message.name }}, {{ message.tool_call_id }}){% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REASONING = (  # as Qwen 3's: reasoning stands in the turns since the last question only
    "{% set ns = namespace(last=0) %}{% for message in messages %}"
    "{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% set text = message['content'] %}"
    "{% if message.role == 'assistant' and loop.index0 < ns.last %}"
    "{% set text = text.split('</think>')[-1] %}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDLESS = (
    "{% for message in messages %}{{ message['role'] | upper }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather in a city - today's.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": True,
    },
}


def call(city: str, call_id: str = "call_b7Rk2hQ9") -> dict[str, Any]:
    arguments = json.dumps({"city": city}, ensure_ascii=False)
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": "weather", "arguments": arguments},
    }


QUESTION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who wrote Emma?"},
]
TALK = [
    *QUESTION,
    {"role": "assistant", "content": "Jane Austen, in 1815."},
    {"role": "user", "content": "And Middlemarch?"},
    {"role": "assistant", "content": "George Eliot - née Evans."},
]
AGENT = [
    {"role": "user", "content": "Is it warmer in Oslo or in Zürich?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [call("Oslo", "call_1xyz"), call("Zürich", "call_2xyz")],
    },
    {"role": "tool", "tool_call_id": "call_1xyz", "content": "4 degrees"},
    {"role": "tool", "tool_call_id": "call_2xyz", "content": "9 degrees"},
    {"role": "assistant", "content": "In Zürich."},
]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    texts = [message["content"] or "" for message in [*TALK, *AGENT]]
    return tiny_causal_lm(tmp_path_factory.mktemp("tokenizer"), texts, dim=8, layers=1)


@pytest.fixture
def chat(tokenizer_folder: str) -> Any:
    def make(template: str) -> ChatFormat:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        tokenizer.chat_template = template
        return ChatFormat(tokenizer)

    return make


def learned(chat: ChatFormat, *given: Any) -> list[list[str]]:
    """Of each sequence, the texts that are learned, run by run."""
    found = []
    for tokens in chat.tokens(*given):
        runs: list[list[int]] = []
        before = False
        for token, is_answer in zip(tokens.input_ids, tokens.is_answer, strict=True):
            if is_answer and not before:
                runs.append([])
            if is_answer:
                runs[-1].append(token)
            before = is_answer
        found.append([chat._tokenizer.decode(run) for run in runs])
    return found


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, LLAMA, TOOLS])
def test_each_answer_is_learned_with_its_end_and_nothing_else(chat: Any, template: str) -> None:
    assert learned(chat(template), TALK) == [
        ["Jane Austen, in 1815.<|im_end|>", "George Eliot - née Evans.<|im_end|>"]
    ]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, LLAMA, TOOLS, ALTERNATING, REASONING, ENDLESS])
def test_what_is_not_learned_is_the_prompt_that_the_student_will_get(
    chat: Any, template: str
) -> None:
    format_ = chat(template)
    [tokens] = format_.tokens(TALK[:3])
    border = tokens.is_answer.index(True)
    prompt = format_.encode(format_.prompt(QUESTION))
    # A last blank may have joined the answer's first word.
    assert format_._tokenizer.decode(tokens.input_ids[:border]) == format_.prompt(QUESTION).rstrip(
        " "
    ) or (tokens.input_ids[:border] == prompt)
    assert all(tokens.is_answer[border:])


def test_a_message_of_weight_0_is_not_learned(chat: Any) -> None:
    talk = [dict(message) for message in TALK]
    talk[2]["weight"] = 0
    assert learned(chat(CHAT_TEMPLATE), talk) == [["George Eliot - née Evans.<|im_end|>"]]
    [tokens] = chat(CHAT_TEMPLATE).tokens(talk)
    assert "Jane Austen" in chat(CHAT_TEMPLATE)._tokenizer.decode(tokens.input_ids)


def test_a_template_without_system_gets_it_with_the_question(chat: Any) -> None:
    format_ = chat(ALTERNATING)
    assert not format_.takes_system
    assert format_.prompt(QUESTION) == "[INST] Be brief.\n\nWho wrote Emma? [/INST]"
    assert learned(format_, TALK) == [
        [" Jane Austen, in 1815.<|im_end|>", " George Eliot - née Evans.<|im_end|>"]
    ]


def test_a_template_that_drops_the_system_silently_gets_it_with_the_question(chat: Any) -> None:
    deaf = "{% for m in messages if m.role != 'system' %}{{ m.content }}|{% endfor %}"
    assert chat(deaf).prompt(QUESTION) == "Be brief.\n\nWho wrote Emma?|"


def test_developers_are_systems(chat: Any) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, QUESTION[1]]
    assert chat(CHAT_TEMPLATE).prompt(messages) == chat(CHAT_TEMPLATE).prompt(QUESTION)


def test_a_template_that_drops_earlier_reasoning_gives_a_sequence_for_each_answer(
    chat: Any,
) -> None:
    talk = [dict(message) for message in TALK]
    talk[2]["content"] = "<think>An English novel.</think>Jane Austen."
    talk[4]["content"] = "<think>Another one.</think>George Eliot."
    format_ = chat(REASONING)
    assert learned(format_, talk) == [
        ["<think>An English novel.</think>Jane Austen.<|im_end|>"],
        ["<think>Another one.</think>George Eliot.<|im_end|>"],
    ]
    second = format_.tokens(talk)[1]
    assert "An English novel" not in format_._tokenizer.decode(second.input_ids)


def test_a_template_without_an_end_gets_the_end_of_text(chat: Any) -> None:
    format_ = chat(ENDLESS)
    assert format_.end == ""
    assert learned(format_, TALK[:3])[0][0].endswith("Jane Austen, in 1815.<|im_end|>")


def test_an_end_of_turn_that_is_not_the_end_of_text_is_known(chat: Any) -> None:
    format_ = chat(CHAT_TEMPLATE)
    format_._tokenizer.eos_token = "<|endoftext|>"
    assert format_.end == "<|im_end|>"
    ids = format_._tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert format_.end_ids == ids
    assert learned(format_, TALK[:3]) == [["Jane Austen, in 1815.<|im_end|>"]]


def test_tools_go_into_a_template_that_takes_them(chat: Any) -> None:
    format_ = chat(TOOLS)
    assert format_.takes_tools
    [tokens] = format_.tokens(AGENT, [WEATHER])
    text = format_._tokenizer.decode(tokens.input_ids)
    assert '"name": "weather"' in text.partition("<|im_start|>user")[0]
    assert "strict" not in text  # a server's own: LlamaIndex does not describe tools with it
    # Results carry their function's name; ids are the same whatever the server rolled.
    assert "4 degrees (weather, call00000)" in text
    assert "9 degrees (weather, call00001)" in text
    assert learned(format_, AGENT, [WEATHER]) == [
        [
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
            "<|im_end|>",
            "In Zürich.<|im_end|>",
        ]
    ]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, ALTERNATING])
def test_tools_are_text_for_other_templates(chat: Any, template: str) -> None:
    format_ = chat(template)
    assert not format_.takes_tools
    prompt = format_.prompt(AGENT[:1], [WEATHER])
    assert "Tells the weather in a city - today's." in prompt
    assert "Is it warmer in Oslo" in prompt
    [[first, second]] = learned(format_, AGENT, [WEATHER])
    assert first.strip() == (
        '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>\n'
        '<tool_call>{"name": "weather", "arguments": {"city": "Zürich"}}</tool_call><|im_end|>'
    )
    assert second.strip() == "In Zürich.<|im_end|>"
    text, calls = format_.parsed(first.strip().removesuffix("<|im_end|>"))
    assert text == ""
    assert calls == [ToolCall("weather", {"city": "Oslo"}), ToolCall("weather", {"city": "Zürich"})]
    # Both results are one message of the user's: many templates want turns.
    whole = format_.prompt(AGENT[:-1], [WEATHER])
    results = "<tool_response>4 degrees</tool_response>\n<tool_response>9 degrees</tool_response>"
    assert results in whole


def test_old_functions_are_tools(chat: Any) -> None:
    example = ChatExample(
        messages=[
            AGENT[0],
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "weather", "arguments": '{"city": "Oslo"}'},
            },
            {"role": "function", "name": "weather", "content": "4 degrees"},
            {"role": "assistant", "content": "No idea."},
        ],
        functions=[{key: WEATHER["function"][key] for key in ("name", "parameters")}],
    )
    format_ = chat(TOOLS)
    tools = tools_of(example)
    assert tools is not None
    assert [tool["function"]["name"] for tool in tools] == ["weather"]
    [[first, second]] = learned(format_, example.messages, tools)
    assert '"arguments": {"city": "Oslo"}' in first
    assert second == "No idea.<|im_end|>"
    [tokens] = format_.tokens(example.messages, tools)
    assert "<|im_start|>tool\n4 degrees (weather, " in format_._tokenizer.decode(tokens.input_ids)


def test_parts_of_text_are_joined(chat: Any) -> None:
    parts = [{"type": "text", "text": "Who wrote "}, {"type": "text", "text": "Emma?"}]
    messages = [QUESTION[0], {"role": "user", "content": parts}]
    assert chat(CHAT_TEMPLATE).prompt(messages) == chat(CHAT_TEMPLATE).prompt(QUESTION)


def test_a_refusal_is_learned_as_text(chat: Any) -> None:
    talk = [QUESTION[1], {"role": "assistant", "content": None, "refusal": "I cannot say."}]
    assert learned(chat(CHAT_TEMPLATE), talk) == [["I cannot say.<|im_end|>"]]


def test_an_image_is_refused_with_its_place(chat: Any) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    data = ChatDataset(
        examples=[
            ChatExample(messages=TALK),
            ChatExample(messages=[{"role": "user", "content": [image]}, TALK[2]]),
        ]
    )
    with pytest.raises(DatasetError, match=r"^train\[1\]\.messages\[0\]: has a part .*'image_url'"):
        rows_of(data.examples, chat(CHAT_TEMPLATE), 512, "train")


def test_an_answer_in_sound_is_refused(chat: Any) -> None:
    example = ChatExample(
        messages=[QUESTION[1], {"role": "assistant", "content": None, "audio": {"id": "a1"}}]
    )
    with pytest.raises(DatasetError, match=r"messages\[1\]: is an answer without text"):
        rows_of([example], chat(CHAT_TEMPLATE), 512, "train")


def test_an_answer_to_nothing_is_refused(chat: Any) -> None:
    with pytest.raises(DatasetError, match=r"messages\[0\]: begins the conversation"):
        chat(CHAT_TEMPLATE).tokens([TALK[2]])


def test_what_the_template_says_reaches_the_user(chat: Any) -> None:
    with pytest.raises(DatasetError, match="must alternate user/assistant"):
        chat(ALTERNATING).tokens([QUESTION[1], QUESTION[1], TALK[2]])


def test_a_tokenizer_without_a_template_is_refused(tokenizer_folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = None
    with pytest.raises(ArgumentError, match=r"base_model: has no chat template; take its instruct"):
        ChatFormat(tokenizer)


def test_a_slow_tokenizer_gives_the_same_mask() -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>", "</s>")
    assert learned(ChatFormat(tokenizer), TALK) == [
        ["Jane Austen, in 1815.</s>", "George Eliot - née Evans.</s>"]
    ]


def test_a_token_across_the_border_is_learned(chat: Any) -> None:
    """The blank that a prompt ends with and the answer's first word are one token."""
    format_ = chat(ENDLESS)
    runs = learned(format_, TALK[:3])[0]
    assert runs[0].lstrip() == "Jane Austen, in 1815.<|im_end|>"


CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'
OSLO = [ToolCall("weather", {"city": "Oslo"})]


@pytest.mark.parametrize(
    ("written", "text", "calls"),
    [
        (f"<tool_call>{CALL}</tool_call>", "", OSLO),
        (f"<tool_call>\n{CALL}\n</tool_call>", "", OSLO),
        (f"Let me see. <tool_call>{CALL}</tool_call>", "Let me see.", OSLO),
        (f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "", OSLO * 2),
        (f"<tool_call>{CALL}", "", OSLO),  # the end fell to a stop text
        (CALL, "", OSLO),
        ('{"name": "weather", "parameters": {"city": "Oslo"}}', "", OSLO),
        (f"[{CALL}, {CALL}]", "", OSLO * 2),
        (f"[TOOL_CALLS] [{CALL}]", "", OSLO),
        (f"Wait.[TOOL_CALLS][{CALL}]", "Wait.", OSLO),
        ('{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}', "", OSLO),
        ("<tool_call>{name: weather}</tool_call>", None, []),
        ('<tool_call>{"name": "weather"}</tool_call>', None, []),
        ('{"name": "Ann", "age": 3}', None, []),
        ("[1, 2]", None, []),
        ("[TOOL_CALLS] none", None, []),
        ("It is 4 degrees. ", None, []),
        ("", None, []),
    ],
)
def test_calls_are_read_in_every_form(
    chat: Any, written: str, text: str | None, calls: list[ToolCall]
) -> None:
    assert chat(TOOLS).parsed(written) == (written if text is None else text, calls)


@pytest.mark.parametrize("written", [f"Wait. <tool_call>{CALL}</tool_call>", CALL, "A < b [T] c"])
def test_text_that_is_shown_early_stays_text(chat: Any, written: str) -> None:
    format_ = chat(TOOLS)
    text, _ = format_.parsed(written)
    for size in range(len(written)):
        assert text.startswith(format_.certain(written[:size]))
    if not text:
        assert format_.certain(written) == ""


class Person(BaseModel):
    name: str
    born: int


SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "Person", "schema": Person.model_json_schema()},
}


def test_a_strict_schema_of_openai_is_the_models_own_again(chat: Any) -> None:
    from openai.lib._parsing import type_to_response_format_param

    strict = type_to_response_format_param(Person)
    assert "additionalProperties" in str(strict)
    format_ = chat(CHAT_TEMPLATE)
    assert format_.prompt(QUESTION, None, strict) == format_.prompt(QUESTION, None, SCHEMA)


@pytest.mark.parametrize("system", [True, False])
def test_a_response_format_is_asked_for_as_programs_ask(
    chat: Any, tokenizer_folder: str, system: bool
) -> None:
    from llama_index.core.instrumentation import get_dispatcher
    from llama_index.core.instrumentation.event_handlers.base import BaseEventHandler
    from llama_index.core.instrumentation.events.llm import LLMChatStartEvent
    from llama_index.core.prompts import ChatPromptTemplate

    from ft_core.sft import LocalLLM

    sent: list[list[ChatMessage]] = []

    class Watch(BaseEventHandler):
        def handle(self, event: Any, **kwargs: Any) -> None:
            if isinstance(event, LLMChatStartEvent):
                sent.append([message.model_copy(deep=True) for message in event.messages])

    llm = LocalLLM.from_pretrained(tokenizer_folder, device="cpu", max_new_tokens=1)
    messages = QUESTION if system else QUESTION[1:]
    program = LLMTextCompletionProgram.from_defaults(
        output_parser=PydanticOutputParser(Person),
        prompt=ChatPromptTemplate([ChatMessage(**message) for message in messages]),
        llm=llm,
    )
    watch = Watch()
    get_dispatcher().add_event_handler(watch)
    try:
        with pytest.raises(ValueError):
            program()  # untrained, it writes no JSON
    finally:
        get_dispatcher().event_handlers.remove(watch)
    theirs = [{"role": m.role.value, "content": m.content} for m in sent[0]]
    format_ = chat(CHAT_TEMPLATE)
    assert "JSON schema to follow" in str(theirs)
    assert format_.prompt(messages, None, SCHEMA) == format_.prompt(theirs)
    answer = {"role": "assistant", "content": '{"name": "Ann", "born": 1815}'}
    [tokens] = format_.tokens([*messages, answer], None, SCHEMA)
    text = format_._tokenizer.decode(tokens.input_ids)
    assert text == format_.prompt(theirs) + answer["content"] + "<|im_end|>"


def test_a_response_format_without_a_schema_changes_nothing(chat: Any) -> None:
    format_ = chat(CHAT_TEMPLATE)
    for given in ({"type": "json_object"}, {"type": "text"}, {"type": "json_schema"}):
        assert format_.prompt(QUESTION, None, given) == format_.prompt(QUESTION)


def test_a_long_prompt_is_cut_on_the_left_and_said(
    chat: Any, caplog: pytest.LogCaptureFixture
) -> None:
    format_ = chat(CHAT_TEMPLATE)
    [whole] = format_.tokens(TALK[:3])
    length = len(whole) - 5
    [row] = rows_of([ChatExample(messages=TALK[:3])], format_, length, "train")
    assert row.input_ids == whole.input_ids[5:]
    assert row.is_answer == whole.is_answer[5:]
    assert "1 of 1 sequences of train are longer than" in caplog.text


def test_a_long_conversation_becomes_a_sequence_for_each_answer(chat: Any) -> None:
    format_ = chat(CHAT_TEMPLATE)
    [whole] = format_.tokens(TALK)
    rows = rows_of([ChatExample(messages=TALK)], format_, len(whole) - 20, "train")
    texts = [format_._tokenizer.decode(row.input_ids) for row in rows]
    assert len(texts) == 2
    assert texts[0].endswith("Jane Austen, in 1815.<|im_end|>")
    assert texts[1].endswith("George Eliot - née Evans.<|im_end|>")
    assert all(len(row) <= len(whole) - 20 for row in rows)
    assert "Be brief." in texts[0]  # only the second one had to be cut


def test_an_answer_longer_than_a_sequence_is_refused(chat: Any) -> None:
    with pytest.raises(DatasetError, match=r"^train\[0\]: an answer takes more than the 6 tokens"):
        rows_of([ChatExample(messages=TALK[:3])], chat(CHAT_TEMPLATE), 6, "train")
