"""TRL's trainer, with a loss that looks at no more than it learns."""

from __future__ import annotations

from typing import Any

import torch
from trl import SFTTrainer

from ft_core.sft.models import keeps_positions

_IGNORED = -100  # the label of what is not learned


class AnswerTrainer(SFTTrainer):
    """Computes the logits of the positions whose next token is learned, and of no others.

    TRL 1.x does so where Triton runs, on GPUs; elsewhere it compares every position of a prompt
    with the whole vocabulary, which takes most of the time where a short answer follows a long
    prompt. The loss is the same. Not logged are TRL's entropy and token accuracy.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._can_select = (
            self.accelerator.device.type != "cuda"
            and not self.aux_loss_enabled
            and keeps_positions(self.model)
        )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the mean cross-entropy of the learned tokens, a scalar tensor.

        Args:
            model: of transformers.
            inputs: `input_ids` with `labels` or `shift_labels`, each of shape (examples, tokens),
                and what belongs to them.
            return_outputs: whether to return (loss, outputs).
            num_items_in_batch: how many tokens the mean is over; those of `inputs` by default.
        """
        if return_outputs or not self._can_select:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # What each position is to foretell; collators of packed examples say so themselves.
        told = inputs.get("shift_labels")
        labels = inputs["labels"][:, 1:] if told is None else told
        places = (labels != _IGNORED).any(dim=0).nonzero().flatten()
        labels = labels[:, places]
        given = {name: inputs[name] for name in inputs if name not in ("labels", "shift_labels")}
        logits = model(**given, use_cache=False, logits_to_keep=places).logits
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1),
            labels.flatten(),
            ignore_index=_IGNORED,
            reduction="sum",
        )
        if num_items_in_batch is None:
            return losses / (labels != _IGNORED).sum().clamp(min=1)
        if self.args.average_tokens_across_devices:  # DDP takes the mean of the processes
            losses = losses * self.accelerator.num_processes
        return losses / torch.as_tensor(num_items_in_batch, device=losses.device).clamp(min=1)
