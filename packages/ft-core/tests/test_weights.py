"""Dropout, frozen layers and LoRA, in networks of transformers."""

import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, ModernBertConfig
from transformers import ModernBertForSequenceClassification as ModernBert

from ft_core.errors import MissingExtraError
from ft_core.weights import add_lora, freeze_lowest, merge_lora, set_dropout

SIZES: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_labels": 1,
}
IDS = torch.tensor([[2, 5, 7, 9, 3], [2, 8, 8, 3, 0]])


def bert() -> Any:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES, max_position_embeddings=32)).eval()


def modern_bert() -> Any:
    torch.manual_seed(0)
    config = ModernBertConfig(**SIZES, pad_token_id=0, attn_implementation="eager")
    return ModernBert(config).eval()


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def train(model: Any, steps: int = 3) -> None:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(IDS).logits - torch.tensor([[1.0], [-1.0]])).square().mean().backward()
        optimizer.step()


def test_every_dropout_layer_is_set() -> None:
    model = bert()
    assert any(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout))
    set_dropout(model, 0.0)
    model.train()
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    set_dropout(model, 0.5)
    assert not torch.equal(model(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("share", "layers"), [(0.0, []), (0.2, []), (0.25, [0]), (0.5, [0, 1]), (0.99, [0, 1, 2])]
)
def test_the_lowest_share_of_the_layers_is_frozen_with_the_embeddings(
    share: float, layers: list[int]
) -> None:
    model = bert()
    before = state(model)
    freeze_lowest(model, model.bert, share)
    train(model)
    still = before.keys() - moved(before, state(model))
    for layer in range(4):
        weight = f"bert.encoder.layer.{layer}.output.dense.weight"
        assert (weight in still) == (layer in layers)
    for embeddings in ("word", "position"):
        assert (f"bert.embeddings.{embeddings}_embeddings.weight" in still) == (share > 0)
    assert "classifier.weight" not in still


def test_what_has_no_encoder_or_layers_is_left_alone() -> None:
    model = torch.nn.Linear(2, 2)
    freeze_lowest(model, None, 0.5)
    freeze_lowest(model, model, 0.5)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("make", "heads"), [(bert, ["classifier"]), (modern_bert, ["head", "classifier"])]
)
def test_lora_trains_adapters_and_the_heads_and_is_merged_without_a_trace(
    make: Any, heads: list[str]
) -> None:
    pytest.importorskip("peft")
    model = make()
    before, first = state(model), model(IDS).logits
    options = {"r": 2, "lora_dropout": 0.0, "modules_to_save": heads}
    add_lora(model, options, task_type="SEQ_CLS", extra="some[lora]")
    assert torch.allclose(model(IDS).logits, first)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name or "modules_to_save" in name for name in trainable)
    assert all(any(name.startswith(f"{head}.") for name in trainable) for head in heads)
    train(model)
    tuned = model(IDS).logits
    assert not torch.allclose(tuned, first, atol=1e-3)

    merge_lora(model, model)
    after = state(model)
    assert after.keys() == before.keys()
    assert torch.allclose(model(IDS).logits, tuned, atol=1e-5)
    changed = moved(before, after)
    assert any("layer" in name for name in changed)
    assert all(f"{head}.{kind}" in changed for head, kind in zip_heads(heads))
    assert not hasattr(model, "peft_config")
    assert not any("lora" in name for name, _ in model.named_modules())


def zip_heads(heads: list[str]) -> list[tuple[str, str]]:
    return [(head, "dense.weight" if head == "head" else "weight") for head in heads]


def test_a_merged_model_saves_as_an_ordinary_one_and_takes_lora_again(tmp_path: Any) -> None:
    pytest.importorskip("peft")
    model = bert()
    for _ in range(2):
        options = {"modules_to_save": ["classifier"]}
        add_lora(model, options, task_type="SEQ_CLS", extra="some[lora]")
        train(model)
        merge_lora(model, model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    again = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert not moved(state(model), state(again))


def test_without_peft_it_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'some\[lora\]'"):
        add_lora(bert(), {}, task_type="SEQ_CLS", extra="some[lora]")
