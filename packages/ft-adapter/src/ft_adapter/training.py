"""Train adapters on vectors, and decide on held-out queries whether one is worth keeping."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ft_adapter.losses import Pairs, loss_of
from ft_adapter.settings import DEPTH, TrainingSettings
from ft_adapter.vectors import Vectors, as_tensors
from ft_core.errors import ArgumentError, TrainingError
from ft_core.metrics import paired_max_test, score_rankings
from ft_core.progress import progress
from ft_core.search import exact_top_k

logger = logging.getLogger(__name__)

_SMALL_STEP = 64 * 512**2  # multiplications in a step, beside those of the documents

Rankings = dict[str, list[str]]
Negatives = Mapping[str, Sequence[str]]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """One training run and the queries that judge it."""

    train: Vectors
    test: Vectors


@dataclass(frozen=True)
class Selection:
    """What the held-out queries say."""

    epochs: int
    """The best number of epochs."""
    kept: bool
    """Whether that is better than the identity, by the paired test."""
    gain: float
    """Its mean gain in the metric over the identity."""
    p_value: float
    """Two-sided, and adjusted for the choice among the epochs (`paired_max_test`)."""
    curve: list[float] = field(repr=False)
    """The mean gain after each epoch."""
    identity: Rankings = field(repr=False)
    """What the identity retrieves for the held-out queries."""
    adapted: Rankings = field(repr=False)
    """What the best number of epochs retrieves for them."""


def unit(vectors: Tensor) -> Tensor:
    """Return the rows divided by their length."""
    return nn.functional.normalize(vectors, dim=-1)


def trained(
    adapter: nn.Module,
    vectors: Vectors,
    settings: TrainingSettings,
    *,
    negatives: Negatives | None = None,
    after_step: Callable[[int], None] | None = None,
) -> Iterator[int]:
    """Train `adapter` in place, and yield the number of epochs done after each.

    Raises:
        TrainingError: the loss is no number any more.
    """
    device = next(adapter.parameters()).device
    pairs = Pairs.of(vectors, negatives, device)
    queries, documents = as_tensors(vectors, "cpu")
    queries, documents = queries.to(device), documents[pairs.judged.cpu()].to(device)
    parameters = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in parameters]
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=0.0, fused=fused
    )
    # A generator of our own: the app's random state is not ours to set.
    generator = torch.Generator().manual_seed(settings.seed)
    warmup = -(-len(pairs) // settings.batch_size)
    step = 0
    for epoch in range(1, settings.epochs + 1):
        adapter.train()
        for chosen in torch.randperm(len(pairs), generator=generator).split(settings.batch_size):
            batch = chosen.to(device)
            step += 1
            rate = settings.learning_rate * min(1.0, step / warmup)
            optimizer.param_groups[0]["lr"] = rate
            loss = _step_loss(adapter, queries, documents, pairs, batch, settings)
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss.item()} in epoch {epoch}; nothing was saved. A smaller "
                    f"learning_rate than {settings.learning_rate} helps"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if settings.weight_decay:
                _decay(parameters, start, rate * settings.weight_decay)
            if after_step is not None:
                after_step(step)
        adapter.eval()
        yield epoch


def _step_loss(
    adapter: nn.Module,
    queries: Tensor,
    documents: Tensor,
    pairs: Pairs,
    batch: Tensor,
    settings: TrainingSettings,
) -> Tensor:
    original = queries[pairs.query[batch]]
    adapted = unit(adapter(original))
    if settings.sides == "both":
        documents = unit(adapter(documents))
    loss = loss_of(adapted, documents, pairs, batch, settings)
    if settings.identity_pull and adapted.shape == original.shape:
        loss = loss + settings.identity_pull * ((adapted - original) ** 2).sum(dim=1).mean()
    return loss


@torch.no_grad()
def _decay(parameters: Sequence[Tensor], start: Sequence[Tensor], share: float) -> None:
    # Decay to zero, as AdamW has it, would pull a matrix away from the identity.
    for parameter, origin in zip(parameters, start, strict=True):
        parameter.lerp_(origin, min(1.0, share))


@torch.inference_mode()
def retrieved(adapter: nn.Module | None, vectors: Vectors, sides: str) -> NDArray[np.int64]:
    """Return the rows of the best documents of each query, shape (queries, at most `DEPTH`)."""
    queries, documents = vectors.queries, vectors.documents
    if adapter is not None:
        queries = adapt(adapter, queries)
        if sides == "both":
            documents = adapt(adapter, documents)
    return exact_top_k(queries, documents, DEPTH, cosine=True)[0]


@torch.inference_mode()
def adapt(adapter: nn.Module, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return what the adapter makes of the rows, shape (rows, out_features)."""
    device = next(adapter.parameters()).device
    rows: NDArray[np.float32] = adapter(torch.from_numpy(vectors).to(device)).float().cpu().numpy()
    return rows


@contextmanager
def few_threads(dimension: int, settings: TrainingSettings) -> Iterator[None]:
    """Train small adapters in one thread: two take twice as long, since they mostly wait."""
    before = torch.get_num_threads()
    if settings.batch_size * dimension**2 <= _SMALL_STEP:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_adapter(adapter: nn.Module, vectors: Vectors, settings: TrainingSettings) -> None:
    """Run the adapter on a few queries, so that one that does not fit fails before training.

    Raises:
        ArgumentError: it has nothing to train, does not take the vectors, or its result has
            another shape than they have, or is not finite.
    """
    if not any(parameter.requires_grad for parameter in adapter.parameters()):
        raise ArgumentError("adapter_model", "has no weights that can be trained")
    try:
        result = adapt(adapter.eval(), vectors.queries[:2])
    except Exception as error:
        raise ArgumentError(
            "adapter_model",
            f"does not take vectors of dimension {vectors.dimension}: {error}",
        ) from error
    rows = len(vectors.queries[:2])
    if result.ndim != 2 or len(result) != rows:
        raise ArgumentError(
            "adapter_model", f"gives shape {result.shape} for {rows} vectors; keep the first axis"
        )
    if settings.sides == "query" and result.shape[1] != vectors.dimension:
        raise ArgumentError(
            "adapter_model",
            f"maps {vectors.dimension} dimensions to {result.shape[1]}, but the documents keep "
            f'theirs; make both equal, or adapt documents too with sides="both"',
        )
    if not np.isfinite(result).all():
        raise ArgumentError("adapter_model", "gives a NaN or an infinity before any training")


def select_epoch(
    adapter: nn.Module,
    runs: Sequence[HeldOut],
    settings: TrainingSettings,
    *,
    negatives: Negatives | None = None,
    show_progress: bool = False,
) -> Selection:
    """Train a copy of the adapter in each run, side by side, and find the best epoch.

    After each epoch the held-out queries of all runs together give one mean. Of the epochs
    that the paired test finds better than the identity, the one with the highest mean is
    the best; where there is none, the epoch with the highest mean is reported, and not kept.
    """
    copies = [copy.deepcopy(adapter) for _ in runs]
    trainings = [
        trained(one, run.train, settings, negatives=negatives)
        for one, run in zip(copies, runs, strict=True)
    ]
    identity = _identity(runs, settings)
    base = _values(runs, identity, settings.metric)
    rankings: list[list[NDArray[np.int64]]] = []
    values: list[NDArray[np.float64]] = []
    for _ in progress(range(settings.epochs), "Epochs", settings.epochs, show_progress):
        for training in trainings:
            next(training)
        found = _retrieved_by_all(copies, runs, settings.sides)
        rankings.append(found)
        values.append(_values(runs, found, settings.metric))
        if _exhausted([float(each.mean()) for each in values], settings.early_stopping_patience):
            break
    matrix = np.stack(values)
    gains = (matrix - base).mean(axis=1)
    p_values = paired_max_test(base, matrix, seed=settings.seed)
    better = (p_values <= settings.significance) & (gains > 0)
    best = int(np.where(better, gains, -np.inf).argmax() if better.any() else gains.argmax())
    return Selection(
        epochs=best + 1,
        kept=bool(better.any()),
        gain=float(gains[best]),
        p_value=float(p_values[best]),
        curve=[float(gain) for gain in gains],
        identity=_named(runs, identity),
        adapted=_named(runs, rankings[best]),
    )


def _retrieved_by_all(
    adapters: Sequence[nn.Module], runs: Sequence[HeldOut], sides: str
) -> list[NDArray[np.int64]]:
    """Return what each adapter retrieves for its own held-out queries."""
    if sides == "both":
        return [retrieved(one, run.test, sides) for one, run in zip(adapters, runs, strict=True)]
    # The documents are the same for all: one search for all queries is several times faster.
    queries = [adapt(one, run.test.queries) for one, run in zip(adapters, runs, strict=True)]
    documents = runs[0].test.documents
    rows = exact_top_k(np.concatenate(queries), documents, DEPTH, cosine=True)[0]
    return np.split(rows, np.cumsum([len(part) for part in queries])[:-1])


def _identity(runs: Sequence[HeldOut], settings: TrainingSettings) -> list[NDArray[np.int64]]:
    return [retrieved(None, run.test, settings.sides) for run in runs]


def _values(
    runs: Sequence[HeldOut], found: Sequence[NDArray[np.int64]], metric: str
) -> NDArray[np.float64]:
    values: list[float] = []
    for run, rows in zip(runs, found, strict=True):
        scores = score_rankings(run.test.qrels, ids_of(run.test, rows), [metric])[metric]
        values += [scores[query] for query in run.test.query_ids]
    return np.array(values)


def ids_of(vectors: Vectors, rows: NDArray[np.int64]) -> Rankings:
    """Return query id to document ids, best first, from rows of documents."""
    ids = vectors.document_ids
    return {
        query: [ids[row] for row in ranking]
        for query, ranking in zip(vectors.query_ids, rows.tolist(), strict=True)
    }


def _named(runs: Sequence[HeldOut], found: Sequence[NDArray[np.int64]]) -> Rankings:
    named: Rankings = {}
    for run, rows in zip(runs, found, strict=True):
        named.update(ids_of(run.test, rows))
    return named


def _exhausted(means: Sequence[float], patience: int) -> bool:
    return patience > 0 and len(means) - 1 - int(np.argmax(means)) >= patience
