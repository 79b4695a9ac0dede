"""How well a model foresees given answers, without writing any itself."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ft_core.datasets.chat import ChatDataset
from ft_core.progress import progress
from ft_core.sft.chat_format import ChatFormat
from ft_core.sft.models import context_window
from ft_core.sft.rows import rows_of


def answer_losses(
    model: Any,
    tokenizer: Any,
    data: ChatDataset,
    *,
    max_length: int | None = None,
    show_progress: bool = True,
) -> NDArray[np.float64]:
    """Return each example's mean negative log-likelihood of an answer token, in nats.

    Teacher-forced: each token is foreseen from the given ones before it. Examples whose
    conversation takes several sequences count all their answer tokens.

    Args:
        model: of transformers or peft, as `ft_core.sft.models.load_model` returns it.
        tokenizer: the model's.
        data: what to foresee.
        max_length: tokens per example; of longer ones the beginning of the prompt is cut off.
        show_progress: a bar; only ever shown on a terminal.

    Raises:
        DatasetError: an example cannot be used; names it.
    """
    import torch

    window = context_window(model)
    length = min(max_length or window, window)
    chat = ChatFormat(tokenizer)
    losses = np.empty(len(data), dtype=np.float64)
    for number in progress(range(len(data)), "Losses", len(data), show_progress):
        total, count = 0.0, 0
        for row in rows_of(data.examples[number : number + 1], chat, length, "data", number):
            ids = torch.tensor([row.input_ids], device=model.device)
            with torch.inference_mode():
                logits = model(input_ids=ids).logits[0, :-1].float()
            answers = torch.tensor(row.is_answer[1:], device=model.device)
            found = torch.nn.functional.cross_entropy(
                logits[answers], ids[0, 1:][answers], reduction="sum"
            )
            total += float(found)
            count += int(answers.sum())
        losses[number] = total / count
    return losses
