"""Several answers at a time, by tiny models of random weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_index.core.base.llms.types import ChatMessage
from transformers import MistralConfig, MistralForCausalLM

from ft_core.errors import ArgumentError
from ft_core.sft import LocalLLM, sampling

ASK = [ChatMessage(role="system", content="Tell."), ChatMessage(role="user", content="A color?")]
TEXTS = ["Tell me a color: red, blue, green or black?", "system user assistant A color is red"]


@pytest.fixture(scope="module")
def folder(eager_lm: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return eager_lm(tmp_path_factory.mktemp("lm"), TEXTS * 5, vocabulary=300, window=128)


@pytest.fixture
def llm(folder: str) -> LocalLLM:
    return LocalLLM.from_pretrained(folder, device="cpu", max_new_tokens=12)


def logprobs_of(llm: LocalLLM, answer: list[int]) -> list[float]:
    """Return the log-probability of each token of an answer, by one pass over all of it."""
    prompt = llm._tokenizer(llm._chat_prompt(ASK, {})[0], add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*prompt, *answer]])
    with torch.inference_mode():
        found = torch.log_softmax(llm._model(input_ids=ids).logits[0].float(), dim=-1)
    places = range(len(prompt) - 1, ids.shape[1] - 1)
    return [float(found[at, token]) for at, token in zip(places, answer, strict=True)]


def test_the_first_is_the_greedy_one(llm: LocalLLM) -> None:
    samples = llm.sample(ASK, 4, temperature=2.0, seed=1, greedy_first=True)
    assert samples[0].text == llm.chat(ASK).message.content
    assert len({one.text for one in samples}) == 4
    assert llm.sample(ASK, 1, greedy_first=True)[0].text == samples[0].text
    almost_greedy = llm.sample(ASK, 3, temperature=1e-5)
    assert {one.text for one in almost_greedy} == {samples[0].text}


def test_a_seed_gives_the_same_answers_and_leaves_the_process_random_numbers_alone(
    llm: LocalLLM,
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = llm.sample(ASK, 3, seed=7)
    assert torch.equal(torch.rand(3), expected)
    assert llm.sample(ASK, 3, seed=7) == first
    assert llm.sample(ASK, 3, seed=8) != first
    # The model's own settings of sampling have no part in it.
    llm.temperature = 0.9
    assert llm.sample(ASK, 3, seed=7) == first


def test_log_probabilities_are_the_models_own(
    llm: LocalLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[sampling.Written] = []

    def written(*args: Any, **kwargs: Any) -> list[sampling.Written]:
        seen.extend(sampling.written(*args, **kwargs))
        return seen

    monkeypatch.setattr("ft_core.sft.llm.written", written)
    # Half of all tokens end an answer, so that rows end at different places.
    half = list(range(0, 300, 2))
    llm.generate_kwargs = {"eos_token_id": half}
    samples = llm.sample(ASK, 8, temperature=1.5, seed=3)
    lengths = [len(one.ids) for one in seen]
    assert len(set(lengths)) > 2
    assert max(lengths) <= 12
    for sample, one in zip(samples, seen, strict=True):
        ids = one.ids.tolist()
        assert not set(half) & set(ids[:-1])
        expected = logprobs_of(llm, ids)
        assert sample.mean_logprob == pytest.approx(sum(expected) / len(expected), abs=1e-4)


def test_answers_are_drawn_as_probable_as_they_are(llm: LocalLLM) -> None:
    """Pearson's chi-squared test of the first token, for temperatures 1 and 2."""
    from scipy.stats import chisquare

    for temperature in (1.0, 2.0):
        count = 3_000
        samples = llm.sample(ASK, count, temperature=temperature, seed=11, max_tokens=1)
        found = Counter(round(one.mean_logprob, 4) for one in samples)
        prompt = llm._tokenizer(llm._chat_prompt(ASK, {})[0], add_special_tokens=False)
        with torch.inference_mode():
            ids = torch.tensor([prompt["input_ids"]])
            logits = llm._model(input_ids=ids).logits[0, -1].double()
        own = torch.log_softmax(logits, -1)
        chances = torch.softmax(logits / temperature, -1)
        frequent = torch.topk(chances, 8).indices.tolist()
        observed = [
            sum(n for value, n in found.items() if abs(value - float(own[i])) < 2e-4)
            for i in frequent
        ]
        expected = [float(chances[i]) * count for i in frequent]
        observed.append(count - sum(observed))
        expected.append(count - sum(expected))
        assert chisquare(observed, expected).pvalue > 0.001, (temperature, observed, expected)


def test_the_prompt_is_read_once(llm: LocalLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, ...]] = []
    llm._model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    samples = llm.sample(ASK, 5, seed=2)
    prompt = len(llm._tokenizer(llm._chat_prompt(ASK, {})[0])["input_ids"])
    assert sizes[:3] == [(1, prompt - 1), (5, 1), (5, 1)]
    monkeypatch.setattr(llm._model, "_supports_default_dynamic_cache", lambda: False)
    sizes.clear()
    again = llm.sample(ASK, 5, seed=2)
    assert sizes[:2] == [(5, prompt), (5, 1)]
    assert [one.text for one in again] == [one.text for one in samples]


def test_models_that_see_only_a_part_of_the_prompt(folder: str, tmp_path: Path) -> None:
    base = LocalLLM.from_pretrained(folder, device="cpu")
    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=len(base._tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        sliding_window=8,
        initializer_range=0.2,
        eos_token_id=base._tokenizer.eos_token_id,
        pad_token_id=base._tokenizer.pad_token_id,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    base._tokenizer.save_pretrained(tmp_path)
    llm = LocalLLM.from_pretrained(tmp_path, device="cpu", max_new_tokens=12)
    samples = llm.sample(ASK, 3, greedy_first=True)
    assert samples[0].text == llm.chat(ASK).message.content


def test_models_with_lora(folder: str) -> None:
    from peft import LoraConfig, get_peft_model

    base = LocalLLM.from_pretrained(folder, device="cpu")
    torch.manual_seed(2)
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    tuned = get_peft_model(base._model, config).eval()
    llm = LocalLLM(tuned, base._tokenizer, max_new_tokens=12)
    samples = llm.sample(ASK, 3, greedy_first=True)
    assert samples[0].text == llm.chat(ASK).message.content


def test_answers_end_at_a_stop_text(llm: LocalLLM) -> None:
    samples = llm.sample(ASK, 4, temperature=2.0, seed=1)
    letters = Counter("".join(one.text for one in samples))
    stop = letters.most_common(1)[0][0]
    ended = llm.sample(ASK, 4, temperature=2.0, seed=1, stop=stop)
    assert [one.text for one in ended] == [one.text.split(stop)[0] for one in samples]


def test_what_cannot_be_is_said(llm: LocalLLM) -> None:
    with pytest.raises(ArgumentError, match="n: is a whole number from 1, not 0"):
        llm.sample(ASK, 0)
    for temperature in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ArgumentError, match="temperature: is a number above 0"):
            llm.sample(ASK, 2, temperature=temperature)
    with pytest.raises(ArgumentError, match="window of 128"):
        llm.sample([ChatMessage(role="user", content="A color? " * 200)], 2)
