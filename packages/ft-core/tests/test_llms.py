import sys

import pytest

from ft_core.errors import ArgumentError, GenerationError, MissingExtraError
from ft_core.llms import load_llm


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
        ("local:some/model", "llama_index.llms.huggingface", "ft-core[local]"),
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
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<end>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    wrapped.chat_template = "{% for m in messages %}{{ m.role }}>{{ m.content }}|{% endfor %}bot>"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
    )
    folder = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


def test_local_uses_the_chat_template_and_decodes_greedily(tiny_model):
    from llama_index.core.llms import ChatMessage

    llm = load_llm(f"local:{tiny_model}", max_tokens=5, stop=["\n"])
    assert llm.metadata.is_chat_model
    assert (llm.metadata.context_window, llm.metadata.num_output) == (512, 5)
    assert llm.completion_to_prompt("hi") == "user>hi|bot>"
    answer = llm.complete("hi").text
    assert answer == llm.complete("hi").text
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
