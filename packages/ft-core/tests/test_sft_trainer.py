"""The loss on the learned positions alone is TRL's loss on all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from model_assets import tiny_causal_lm
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from ft_core.sft.trainer import AnswerTrainer

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9, 10, 11, 12], "labels": [-100] * 6 + [11, 12]},
    {"input_ids": [13, 14, 15, 16, 17], "labels": [-100, -100, 15, -100, 17]},
]
LEARNED = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_causal_lm(tmp_path_factory.mktemp("lm"), ["a lighthouse keeper's log"] * 4)


@pytest.fixture(params=[False, True], ids=["whole", "lora"])
def trainer(folder: str, tmp_path: Path, request: pytest.FixtureRequest) -> AnswerTrainer:
    return AnswerTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=SFTConfig(
            output_dir=str(tmp_path / "run"),
            use_cpu=True,
            report_to="none",
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if request.param else None,
    )


def batch(trainer: AnswerTrainer) -> dict[str, Any]:
    return dict(trainer.data_collator(ROWS))


def gradients(trainer: AnswerTrainer, loss: torch.Tensor) -> list[torch.Tensor]:
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, trained))


@pytest.mark.parametrize("tokens", [None, 9], ids=["of the batch", "of several batches"])
def test_loss_and_gradients_are_those_of_trl(trainer: AnswerTrainer, tokens: int | None) -> None:
    count = None if tokens is None else torch.tensor(tokens)
    ours = trainer.compute_loss(trainer.model, batch(trainer), num_items_in_batch=count)
    theirs = SFTTrainer.compute_loss(
        trainer, trainer.model, batch(trainer), num_items_in_batch=count
    )
    assert ours.item() > 0.5
    torch.testing.assert_close(ours, theirs)
    for found, expected in zip(gradients(trainer, ours), gradients(trainer, theirs), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_vocabulary_is_compared_with_learned_positions_only(trainer: AnswerTrainer) -> None:
    seen: list[int] = []
    head = trainer.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[-2]))
    trainer.compute_loss(trainer.model, batch(trainer))
    hook.remove()
    # The tokens before positions 2, 4, 6 and 7 of either example, not all 8.
    assert seen == [LEARNED]


def test_a_batch_that_teaches_nothing_moves_nothing(trainer: AnswerTrainer) -> None:
    given = batch(trainer)
    given["labels"] = torch.full_like(given["labels"], -100)
    loss = trainer.compute_loss(trainer.model, given, num_items_in_batch=torch.tensor(3))
    loss.backward()
    assert loss.item() == 0
