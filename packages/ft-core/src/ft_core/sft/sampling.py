"""Write several answers to one prompt at a time, and say how probable each is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sample:
    """An answer that a model wrote."""

    text: str
    mean_logprob: float
    """Mean natural logarithm of its tokens' probabilities, the one that ends it included; the
    model's own probabilities, whatever the temperature."""


@dataclass(frozen=True)
class Written:
    """Token ids of an answer."""

    ids: Any
    mean_logprob: float


def written(
    model: Any,
    inputs: Any,
    config: Any,
    *,
    count: int,
    temperature: float,
    seed: int,
    greedy_first: bool,
    stopping: dict[str, Any],
) -> list[Written]:
    """Return `count` answers to one prompt, written in one batch.

    Args:
        model: of transformers or peft.
        inputs: one prompt, as the tokenizer returns it.
        config: a generation configuration that takes the most probable token.
        count: how many.
        temperature: of all answers, but for the first with `greedy_first`.
        seed: the same gives the same answers, on the same device and libraries.
        greedy_first: whether the first answer always takes the most probable token.
        stopping: criteria of the generation.
    """
    import torch
    from transformers import LogitsProcessorList

    temperatures = torch.full((count, 1), temperature, device=model.device)
    if greedy_first:
        temperatures[0] = 0.0
    sampler = _Sampler(temperatures, torch.Generator(model.device).manual_seed(seed))
    prompt = inputs["input_ids"].shape[1]
    ids = model.generate(
        **_repeated(model, inputs, count),
        generation_config=config,
        logits_processor=LogitsProcessorList([sampler]),
        **stopping,
    )[:, prompt:]
    lengths = _lengths(ids, config)
    logprobs = sampler.logprobs(ids)
    return [
        Written(row[:length], float(found[:length].mean()) if length else 0.0)
        for row, found, length in zip(ids, logprobs, lengths, strict=True)
    ]


class _Sampler:
    """A logits processor that draws by itself, behind which the largest logit is taken.

    The largest of logits / T plus Gumbel noise is a draw from their softmax (Gumbel 1954; Maddison
    et al. 2014, "A* Sampling", arXiv:1411.0030). So each row may have a temperature of its own,
    0 among them, and the random numbers are not those of the process, which others use too.
    """

    def __init__(self, temperatures: Any, generator: Any) -> None:
        self._temperatures = temperatures
        self._generator = generator
        self._last: Any = None
        self._taken: list[Any] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        if self._last is not None:
            self._take(input_ids[:, -1])
        scores = scores.float()
        self._last = torch.log_softmax(scores, dim=-1)
        noise = torch.empty_like(scores).exponential_(generator=self._generator)
        return scores - self._temperatures * noise.clamp_min(1e-30).log()

    def logprobs(self, ids: Any) -> Any:
        """Return the log-probabilities of all tokens that were written, [answers, tokens]."""
        import torch

        if len(self._taken) < ids.shape[1]:
            self._take(ids[:, -1])
        return torch.stack(self._taken, dim=1)

    def _take(self, tokens: Any) -> None:
        self._taken.append(self._last.gather(1, tokens[:, None])[:, 0])


def _repeated(model: Any, inputs: Any, count: int) -> dict[str, Any]:
    """Return the prompt `count` times, read once where the model's cache can be copied."""
    import torch
    from transformers import DynamicCache

    repeated = {name: value.expand(count, -1) for name, value in inputs.items()}
    before = inputs["input_ids"][:, :-1]
    if count == 1 or not before.shape[1] or not model._supports_default_dynamic_cache():
        return repeated
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    short = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    try:
        with torch.no_grad():
            model(input_ids=before, past_key_values=cache, use_cache=True, **short)
            cache.batch_repeat_interleave(count)
    except (AttributeError, NotImplementedError):  # layers that keep another kind of state
        return repeated
    return repeated | {"past_key_values": cache}


def _lengths(ids: Any, config: Any) -> list[int]:
    """Return how many tokens of each row are its answer: up to its end, what pads it left out."""
    ends = config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    lengths = []
    for row in ids.tolist():
        length = len(row)
        for at, token in enumerate(row):
            if token in ends or token == config.pad_token_id:
                length = at + (token in ends)
                break
        lengths.append(length)
    return lengths
