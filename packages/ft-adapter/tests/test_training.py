"""The losses against plain NumPy, and what training and selection promise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ft_adapter.adapters import LinearLayer, ResidualNN
from ft_adapter.losses import Pairs, loss_of
from ft_adapter.settings import TrainingSettings
from ft_adapter.training import HeldOut, check_adapter, retrieved, select_epoch, trained
from ft_adapter.vectors import Vectors
from ft_core.embedding import unit
from ft_core.errors import ArgumentError, TrainingError

CPU = torch.device("cpu")
DIM = 5


def unit_rows(rows: int, dim: int = DIM, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32))


def tiny() -> Vectors:
    """Three questions, seven documents.

    q0 has two answers, d0 and d1; d4 is a copy of d1; d5 answers nothing.
    """
    documents = unit_rows(7, seed=1)
    documents[4] = documents[1]
    return Vectors(
        query_ids=["q0", "q1", "q2"],
        document_ids=[f"d{row}" for row in range(7)],
        queries=unit_rows(3, seed=2),
        documents=documents,
        qrels={"q0": {"d0": 1, "d1": 1}, "q1": {"d2": 1, "d4": 1}, "q2": {"d3": 2}},
    )


COPIES = [{"d0"}, {"d1", "d4"}, {"d2"}, {"d3"}, {"d5"}, {"d6"}]
NEGATIVES = {"q0": ["d3", "d4", "d5"], "q1": ["d6"]}  # d4 is a copy of an answer; q2 has none


def same(a: str, b: str) -> bool:
    return any({a, b} <= group for group in COPIES)


def candidates(vectors: Vectors, query: str, batch: list[tuple[str, str]], loss: str) -> list[str]:
    """Name what a query's document is told apart from, each as often as it counts."""
    answers = vectors.qrels[query]
    judged = sorted({document for grades in vectors.qrels.values() for document in grades})
    pool = {
        "full_corpus": judged,
        "in_batch": sorted({document for _, document in batch}),
        "hard_negatives": NEGATIVES.get(query, []),
        "margin": NEGATIVES.get(query, []),
    }[loss]
    return [other for other in pool if not any(same(other, answer) for answer in answers)]


def reference(vectors: Vectors, batch: list[tuple[str, str]], settings: TrainingSettings) -> float:
    query_of = dict(zip(vectors.query_ids, vectors.queries.astype(float), strict=True))
    document_of = dict(zip(vectors.document_ids, vectors.documents.astype(float), strict=True))
    losses, violations = [], []
    for query, document in batch:
        positive = float(query_of[query] @ document_of[document])
        others = [
            float(query_of[query] @ document_of[other])
            for other in candidates(vectors, query, batch, settings.loss)
        ]
        total = sum(math.exp(settings.scale * cosine) for cosine in [positive, *others])
        losses.append(math.log(total) - settings.scale * positive)
        violations += [cosine - positive + settings.margin for cosine in others]
    if settings.loss == "margin":
        violated = [violation for violation in violations if violation > 0]
        return sum(violated) / max(len(violated), 1)
    return sum(losses) / len(losses)


PAIRS = [("q0", "d0"), ("q0", "d1"), ("q1", "d2"), ("q1", "d4"), ("q2", "d3")]


@pytest.mark.parametrize("loss", ["full_corpus", "in_batch", "hard_negatives", "margin"])
@pytest.mark.parametrize("numbers", [[0, 1, 2, 3, 4], [0, 2], [4], [1, 4], [0, 3, 4]])
def test_losses_are_what_numpy_says(loss: Any, numbers: list[int]) -> None:
    vectors = tiny()
    mined = NEGATIVES if loss in ("hard_negatives", "margin") else None
    settings = TrainingSettings(loss=loss, scale=7.0, margin=0.4)
    pairs = Pairs.of(vectors, mined, CPU)
    batch = torch.tensor(numbers)
    adapted = torch.from_numpy(vectors.queries)[pairs.query[batch]]
    found = loss_of(
        adapted, torch.from_numpy(vectors.documents)[pairs.judged], pairs, batch, settings
    )
    expected = reference(vectors, [PAIRS[number] for number in numbers], settings)
    assert found.item() == pytest.approx(expected, abs=1e-5)
    assert found.item() != pytest.approx(expected + 0.01, abs=1e-5)


def test_margin_without_negatives_takes_all_judged_documents() -> None:
    vectors = tiny()
    settings = TrainingSettings(loss="margin", margin=0.6)
    pairs = Pairs.of(vectors, None, CPU)
    batch = torch.arange(len(pairs))
    adapted = torch.from_numpy(vectors.queries)[pairs.query]
    documents = torch.from_numpy(vectors.documents)[pairs.judged]
    violations = []
    for query, document in PAIRS:
        row = vectors.query_ids.index(query)
        positive = vectors.queries[row] @ vectors.documents[vectors.rows[document]]
        for other in candidates(vectors, query, PAIRS, "full_corpus"):
            cosine = vectors.queries[row] @ vectors.documents[vectors.rows[other]]
            violations.append(max(0.0, cosine - positive + 0.6))
    found = loss_of(adapted, documents, pairs, batch, settings).item()
    positives = [violation for violation in violations if violation > 0]
    assert len(positives) < len(violations)  # or the mean over violations were the mean
    assert found == pytest.approx(np.mean(positives), abs=1e-5)


def test_a_margin_that_nothing_violates_costs_nothing() -> None:
    vectors = tiny()
    vectors.queries[2] = vectors.documents[3]
    pairs = Pairs.of(vectors, None, CPU)
    batch = torch.tensor([4])
    documents = torch.from_numpy(vectors.documents)[pairs.judged]
    adapted = torch.from_numpy(vectors.queries)[pairs.query[batch]]
    settings = TrainingSettings(loss="margin", margin=0.0)
    assert loss_of(adapted, documents, pairs, batch, settings).item() == 0.0


def test_only_documents_that_answer_or_are_given_are_judged() -> None:
    vectors = tiny()
    assert Pairs.of(vectors, None, CPU).judged.tolist() == [0, 1, 2, 3, 4]
    assert Pairs.of(vectors, NEGATIVES, CPU).judged.tolist() == [0, 1, 2, 3, 4, 5, 6]


# --- Training ---------------------------------------------------------------------------------


def rotated(
    *, queries: int = 60, documents: int = 80, noise: float = 0.0, seed: int = 0, dim: int = 16
) -> Vectors:
    """Questions that are their documents under a rotation that has to be learned."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(np.random.default_rng(99).standard_normal((dim, dim)))[0]
    found = unit_rows(documents, dim, seed + 1)
    asked = rng.permutation(documents)[:queries]
    questions = found[asked] @ rotation + noise * rng.standard_normal((queries, dim))
    return Vectors(
        [f"q{number}" for number in range(queries)],
        [f"d{number}" for number in range(documents)],
        unit(questions.astype(np.float32)),
        found,
        {f"q{number}": {f"d{row}": 1} for number, row in enumerate(asked)},
    )


def scrambled(seed: int, queries: int = 60, documents: int = 80, dim: int = 16) -> Vectors:
    """Questions that have nothing to do with their answers."""
    rng = np.random.default_rng(seed)
    return Vectors(
        [f"q{number}" for number in range(queries)],
        [f"d{number}" for number in range(documents)],
        unit_rows(queries, dim, 2 * seed),
        unit_rows(documents, dim, 2 * seed + 1),
        {f"q{number}": {f"d{rng.integers(documents)}": 1} for number in range(queries)},
    )


def halves(vectors: Vectors) -> list[HeldOut]:
    rows = range(len(vectors.query_ids))
    first, second = vectors.select(rows[::2]), vectors.select(rows[1::2])
    return [HeldOut(first, second), HeldOut(second, first)]


QUICK: dict[str, Any] = {
    "epochs": 8, "batch_size": 16, "learning_rate": 2e-2, "identity_pull": 0.0,
}  # fmt: skip


def train(adapter: nn.Module, vectors: Vectors, **settings: Any) -> nn.Module:
    for _ in trained(adapter, vectors, TrainingSettings(**{**QUICK, **settings})):
        pass
    return adapter


def test_epochs_and_steps_are_counted() -> None:
    steps: list[int] = []
    vectors = rotated()
    settings = TrainingSettings(**{**QUICK, "epochs": 3})
    epochs = list(trained(LinearLayer(16, 16), vectors, settings, after_step=steps.append))
    assert epochs == [1, 2, 3]
    assert steps == list(range(1, 13))  # 60 pairs by 16 make four steps


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    weights = [
        train(LinearLayer(16, 16), rotated(), seed=seed, epochs=1).linear.weight
        for seed in (1, 1, 2)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_training_leaves_the_global_random_state_alone() -> None:
    adapter = LinearLayer(16, 16)
    before = torch.random.get_rng_state()
    train(adapter, rotated(), epochs=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_weight_decay_pulls_to_the_start() -> None:
    distances = [
        (train(LinearLayer(16, 16), rotated(), weight_decay=decay).linear.weight - torch.eye(16))
        .norm()
        .item()
        for decay in (0.0, 5.0, 50.0)
    ]
    assert distances[0] > 1.5 * distances[1] > 3 * distances[2]
    # In each step the share learning rate x decay of the way is taken back: with a share of 1,
    # which the first epochs' warmup reaches only at its end, nothing is left.
    adapter = train(LinearLayer(16, 16), rotated(), weight_decay=1e6)
    torch.testing.assert_close(adapter.linear.weight.detach(), torch.eye(16))


def test_the_pull_towards_the_identity_keeps_vectors_where_they_are() -> None:
    vectors = rotated()
    queries = torch.from_numpy(vectors.queries)
    moved = []
    for pull in (0.0, 10.0, 1000.0):
        adapter = train(LinearLayer(16, 16), vectors, identity_pull=pull)
        adapted = nn.functional.normalize(adapter(queries), dim=1)
        moved.append((adapted - queries).norm(dim=1).mean().item())
    assert moved[0] > 1.2 * moved[1] > 2.4 * moved[2]


@pytest.mark.parametrize("loss", ["full_corpus", "in_batch", "margin", "hard_negatives"])
def test_each_loss_learns_the_rotation(loss: str) -> None:
    vectors = rotated()
    negatives = None
    if loss == "hard_negatives":
        negatives = {
            query: [document for document in vectors.document_ids[:40] if document not in grades]
            for query, grades in vectors.qrels.items()
        }
    settings = TrainingSettings(**{**QUICK, "epochs": 30, "loss": loss})
    adapter = LinearLayer(16, 16)
    before = hits(None, vectors)
    for _ in trained(adapter, vectors, settings, negatives=negatives):
        pass
    assert before < 0.2
    assert hits(adapter, vectors) > 0.8


def hits(adapter: nn.Module | None, vectors: Vectors, sides: str = "query") -> float:
    best = retrieved(adapter, vectors, sides)[:, 0]
    relevant = vectors.relevant
    return float(np.mean([row in relevant[query] for query, row in enumerate(best)]))


def test_both_sides_go_through_the_adapter() -> None:
    vectors = rotated()
    adapter = LinearLayer(16, 3)  # documents have to follow, or nothing fits
    settings = TrainingSettings(**QUICK, sides="both")
    check_adapter(adapter, vectors, settings)
    train(adapter, vectors, sides="both", epochs=2)
    found = retrieved(adapter, vectors, "both")
    weight = adapter.linear.weight.detach().numpy()
    scores = unit(vectors.queries @ weight.T) @ unit(vectors.documents @ weight.T).T
    np.testing.assert_array_equal(found[:, 0], scores.argmax(axis=1))
    with pytest.raises(ArgumentError, match=r'maps 16 dimensions to 3.*sides="both"'):
        check_adapter(adapter, vectors, TrainingSettings(**QUICK))


def test_a_loss_that_is_no_number_ends_training() -> None:
    with pytest.raises(TrainingError, match=r"the loss is nan in epoch \d+; .*learning_rate"):
        train(LinearLayer(16, 16), rotated(), learning_rate=1e38)


class Broken(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, embed: torch.Tensor) -> torch.Tensor:
        match self.how:
            case "nan":
                return embed * self.weight * float("nan")
            case "flat":
                return (embed * self.weight).sum()
            case "fewer":
                return (embed * self.weight)[:1]
            case _:
                raise RuntimeError("size mismatch")


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (nn.Identity(), "has no weights that can be trained"),
        (LinearLayer(16, 16).requires_grad_(False), "has no weights that can be trained"),
        (LinearLayer(8, 8), "does not take vectors of dimension 16"),
        (Broken("raises"), "does not take vectors of dimension 16: size mismatch"),
        (Broken("nan"), "gives a NaN or an infinity before any training"),
        (Broken("flat"), r"gives shape \(\) for 2 vectors"),
        (Broken("fewer"), r"gives shape \(1, 16\) for 2 vectors"),
    ],
)
def test_an_adapter_that_does_not_fit_fails_before_training(
    adapter: nn.Module, message: str
) -> None:
    with pytest.raises(ArgumentError, match=f"adapter_model: {message}"):
        check_adapter(adapter, rotated(), TrainingSettings())


# --- Selection --------------------------------------------------------------------------------


def test_a_real_gain_is_kept_and_named() -> None:
    vectors = rotated()
    adapter = LinearLayer(16, 16)
    selection = select_epoch(adapter, halves(vectors), TrainingSettings(**QUICK))
    assert selection.kept
    assert selection.gain > 0.2
    assert selection.p_value < 0.01
    assert selection.gain == pytest.approx(selection.curve[selection.epochs - 1])
    assert selection.gain == max(selection.curve)
    assert set(selection.identity) == set(selection.adapted) == set(vectors.query_ids)
    torch.testing.assert_close(adapter.linear.weight.detach(), torch.eye(16))  # not changed


def test_the_gain_is_that_of_the_rankings() -> None:
    vectors = rotated()
    settings = TrainingSettings(**QUICK, metric="hit_rate@1")
    selection = select_epoch(LinearLayer(16, 16), halves(vectors), settings)
    hit = {
        name: np.mean([ranking[0] in vectors.qrels[query] for query, ranking in rankings.items()])
        for name, rankings in (("base", selection.identity), ("tuned", selection.adapted))
    }
    assert selection.gain == pytest.approx(hit["tuned"] - hit["base"])


def test_nothing_is_kept_where_there_is_nothing_to_learn() -> None:
    kept = [
        select_epoch(
            LinearLayer(16, 16), halves(scrambled(seed)), TrainingSettings(**{**QUICK, "epochs": 4})
        ).kept
        for seed in range(20)
    ]
    assert sum(kept) <= 3  # 1 of 20 by chance; more than 3 has a probability under 0.02


def test_what_is_worse_is_not_kept() -> None:
    # Perfect as they are; what training learns on the wrong answers can only harm.
    good, bad = rotated(), scrambled(1)
    good = Vectors(
        good.query_ids, good.document_ids,
        np.array([good.documents[rows[0]] for rows in good.relevant]), good.documents, good.qrels,
    )  # fmt: skip
    selection = select_epoch(LinearLayer(16, 16), [HeldOut(bad, good)], TrainingSettings(**QUICK))
    assert not selection.kept
    assert selection.gain < 0 or selection.p_value == 1
    assert min(selection.curve) < -0.01


def test_patience_ends_training_after_the_best_epoch() -> None:
    bad = scrambled(3)
    runs = [HeldOut(bad, bad.select([0]))]
    settings = TrainingSettings(**{**QUICK, "epochs": 40}, early_stopping_patience=2)
    curve = select_epoch(LinearLayer(16, 16), runs, settings).curve
    assert len(curve) < 40
    assert len(curve) - 1 - int(np.argmax(curve)) == 2
    endless = TrainingSettings(**{**QUICK, "epochs": 40}, early_stopping_patience=0)
    assert len(select_epoch(LinearLayer(16, 16), runs, endless).curve) == 40


def test_a_stricter_significance_keeps_less() -> None:
    runs = [HeldOut(rotated(), rotated(queries=8))]  # eight pairs give 2 / 2 ** 8 at best
    loose = select_epoch(LinearLayer(16, 16), runs, TrainingSettings(**QUICK))
    strict = select_epoch(LinearLayer(16, 16), runs, TrainingSettings(**QUICK, significance=0.001))
    assert loose.kept
    assert not strict.kept
    assert loose.p_value == strict.p_value
    assert strict.gain == loose.gain


def test_dropout_does_not_reach_selection() -> None:
    vectors = rotated()
    settings = TrainingSettings(**{**QUICK, "epochs": 2})
    adapter = ResidualNN(16, 8, dropout=0.9)
    with torch.no_grad():
        adapter.linear2.weight.normal_()
    for _ in trained(adapter, vectors, settings):
        first, second = (retrieved(adapter, vectors, "query") for _ in range(2))
        np.testing.assert_array_equal(first, second)


# --- Settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs: is a whole number from 1, not 0"),
        ({"batch_size": 0}, "batch_size: is a whole number from 1, not 0"),
        ({"learning_rate": 0.0}, "learning_rate: is above 0"),
        ({"learning_rate": float("nan")}, "learning_rate: is above 0"),
        ({"scale": -1.0}, "scale: is above 0"),
        ({"weight_decay": -1.0}, "weight_decay: is at least 0"),
        ({"identity_pull": -1.0}, "identity_pull: is at least 0"),
        ({"margin": -0.1}, "margin: is at least 0"),
        ({"seed": -1}, "seed: is at least 0"),
        ({"early_stopping_patience": -1}, "early_stopping_patience: is at least 0"),
        ({"folds": 1}, "folds: is at least 2"),
        ({"significance": 0.0}, r"significance: lies in \(0, 1\]"),
        ({"significance": 1.5}, r"significance: lies in \(0, 1\]"),
        ({"loss": "mse"}, "loss: is one of full_corpus"),
        ({"sides": "document"}, "sides: is query or both"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        TrainingSettings(**settings)


def test_settings_that_are_none_are_the_defaults() -> None:
    settings = TrainingSettings.of(epochs=None, seed=0, loss="margin")
    assert settings.epochs == TrainingSettings().epochs
    assert (settings.seed, settings.loss) == (0, "margin")
    assert TrainingSettings(**settings.to_dict()) == settings
