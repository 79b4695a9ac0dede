import sys

import pytest
from model_assets import tiny_causal_lm

from ft_core.errors import ArgumentError, GenerationError, MissingExtraError
from ft_core.llms import load_llm

TEMPLATE = "{% for m in messages %}{{ m.role }}>{{ m.content }}|{% endfor %}bot>"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpt-4o", r"llm: 'gpt-4o' is none of openai:MODEL"),
        ("azure:gpt-4o", "is none of"),
        ("", "is none of"),
        ("openai:", "names no model"),
        ("openai:gpt-4o", "set OPENAI_API_KEY"),
        ("openai-like:qwen", "has no URL; write openai-like:MODEL@URL"),
        ("openai-like:qwen@localhost:8000", "has no URL"),
        ("local:./no-such-model", "no such folder"),
    ],
)
def test_a_bad_spec_gives_one_clear_error(spec, message):
    with pytest.raises(ArgumentError, match=message):
        load_llm(spec)


def test_openai(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    llm = load_llm("openai:gpt-4o-mini", temperature=0.5, max_retries=0, stop=["\n"])
    assert (llm.model, llm.temperature, llm.max_retries) == ("gpt-4o-mini", 0.5, 0)
    assert llm.additional_kwargs == {"stop": ["\n"]}
    with pytest.raises(ArgumentError, match=r"openai-like:no-such-model@URL"):
        load_llm("openai:no-such-model")


def test_openai_like():
    llm = load_llm("openai-like:Qwen/Qwen3@0.6@http://127.0.0.1:1/v1", max_tokens=7)
    assert (llm.model, llm.api_base) == ("Qwen/Qwen3@0.6", "http://127.0.0.1:1/v1")
    assert llm.metadata.is_chat_model
    assert llm.max_tokens == 7


@pytest.mark.parametrize(
    ("spec", "module", "extra"),
    [
        ("openai:gpt-4o", "llama_index.llms.openai", "ft-core[openai]"),
        ("openai-like:m@http://x", "llama_index.llms.openai_like", "ft-core[openai]"),
        ("local:some/model", "transformers", "ft-core[local]"),
    ],
)
def test_a_missing_extra_names_the_pip_command(monkeypatch, spec, module, extra):
    # What `pip uninstall` leaves: the module is not found.
    for name in [name for name in sys.modules if name.startswith(module)]:
        monkeypatch.delitem(sys.modules, name)

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == module:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(MissingExtraError) as caught:
        load_llm(spec)
    assert f"pip install '{extra}'" in str(caught.value)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A real Llama of a few thousand random weights, with a byte tokenizer and a chat template."""
    pytest.importorskip("torch")
    return tiny_causal_lm(
        tmp_path_factory.mktemp("model"), ["hi"], window=2048, chat_template=TEMPLATE
    )


def test_local_uses_the_chat_template_and_decodes_greedily(tiny_model):
    from llama_index.core.llms import ChatMessage

    llm = load_llm(f"local:{tiny_model}", max_tokens=5, stop=["\n"])
    assert llm.metadata.is_chat_model
    assert (llm.metadata.context_window, llm.metadata.num_output) == (2048, 5)
    answer = llm.complete("hi").text
    assert answer
    assert answer == llm.complete("user>hi|bot>", formatted=True).text
    assert answer != llm.complete("hi", formatted=True).text
    assert answer == llm.chat([ChatMessage(content="hi")]).message.content


def test_local_folder_without_a_model(tmp_path):
    pytest.importorskip("torch")
    with pytest.raises(ArgumentError, match="cannot be loaded"):
        load_llm(f"local:{tmp_path}")


def test_a_local_model_is_asked_in_the_small_style_and_one_call_at_a_time(tiny_model, tmp_path):
    from llama_index.core.schema import TextNode

    from ft_core.generation import GenerationSettings, generate_qa_embedding_pairs
    from ft_core.generation.runner import is_in_process

    llm = load_llm(f"local:{tiny_model}", max_tokens=3)
    assert is_in_process(llm)
    assert GenerationSettings().style_for(llm).name == "small"
    assert GenerationSettings(qa_generate_prompt_tmpl="{context_str}").style_for(llm).name == (
        "instruct"
    )
    nodes = [TextNode(text=f"The pump {i} runs.") for i in range(2)]
    with pytest.raises(GenerationError, match="no usable question"):  # it has never learnt a word
        generate_qa_embedding_pairs(nodes, llm, output_path=tmp_path / "q.json", workers=8)
