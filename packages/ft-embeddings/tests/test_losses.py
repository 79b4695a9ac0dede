from __future__ import annotations

import math

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)

from ft_embeddings.losses import CachedMultiPositiveRankingLoss, MultiPositiveRankingLoss


def vectors(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def test_one_relevant_document_each_is_the_symmetric_loss_of_sentence_transformers() -> None:
    queries, documents = vectors(6, 8), vectors(6, 8) + 0.5
    oracle = MultipleNegativesRankingLoss(
        None, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    ).compute_loss_from_embeddings([queries, documents], None)
    ours = MultiPositiveRankingLoss(None).loss(queries, documents, torch.eye(6, dtype=torch.long))
    assert ours.item() == pytest.approx(oracle.item(), rel=1e-5)


def test_other_relevant_and_ignored_documents_are_not_negatives() -> None:
    queries = torch.tensor([[1.0, 0.0]])
    documents = torch.tensor([[0.6, 0.8], [0.8, 0.6], [1.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([[1, 1, -1, 0]])
    # By hand, scale 20: the pairs score 12 and 16, the one negative 0; the other direction
    # has no negative query and adds nothing.
    by_query = (math.log1p(math.exp(-12)) + math.log1p(math.exp(-16))) / 2
    loss = MultiPositiveRankingLoss(None).loss(queries, documents, labels)
    assert loss.item() == pytest.approx(by_query / 2, rel=1e-2)


def test_a_batch_without_negatives_has_no_loss_and_no_nan_gradient() -> None:
    queries = vectors(2, 4).requires_grad_()
    loss = MultiPositiveRankingLoss(None).loss(queries, vectors(2, 4), torch.ones(2, 2).long())
    loss.backward()
    assert loss.item() == 0
    assert queries.grad is not None
    assert queries.grad.isfinite().all()


def features(model: SentenceTransformer) -> list[dict[str, torch.Tensor]]:
    queries = ["when does the tower open", "harbour price", "bell"]
    documents = [
        "at the tower the gates are unlocked by the keeper at dawn",
        "price",
        "at the harbour the ticket price is four coins for adults and this is a long one",
    ]
    return [
        {k: v for k, v in model.preprocess(texts).items() if isinstance(v, torch.Tensor)}
        for texts in (queries, documents)
    ]


LABELS = torch.tensor([[1, 0, 0], [0, 1, 1], [-1, 0, 1]])


def gradients(model: SentenceTransformer, loss: torch.nn.Module) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    value = loss(features(model), LABELS)
    value.backward()
    flat = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return value.item(), torch.cat(flat)


def test_cached_loss_has_the_gradients_of_the_plain_one(tiny_model: str) -> None:
    model = SentenceTransformer(tiny_model, device="cpu").eval()
    plain = gradients(model, MultiPositiveRankingLoss(model))
    cached = gradients(model, CachedMultiPositiveRankingLoss(model, mini_batch_size=2))
    assert cached[0] == pytest.approx(plain[0], rel=1e-5)
    torch.testing.assert_close(cached[1], plain[1], rtol=1e-4, atol=1e-6)


def test_length_buckets_do_not_change_the_embeddings(tiny_model: str) -> None:
    model = SentenceTransformer(tiny_model, device="cpu").eval()
    texts = ["bell", *["the tower opens at dawn " * (1 + i % 4) for i in range(30)], "price"]
    tokens = {k: v for k, v in model.preprocess(texts).items() if isinstance(v, torch.Tensor)}
    ours = MultiPositiveRankingLoss(model)._embed(tokens)
    together = torch.from_numpy(model.encode(texts))
    torch.testing.assert_close(ours, together, rtol=1e-4, atol=1e-5)


def test_matryoshka_trains_every_prefix(tiny_model: str) -> None:
    model = SentenceTransformer(tiny_model, device="cpu").eval()
    plain = MultiPositiveRankingLoss(model)
    queries, documents = (plain._embed(column) for column in features(model))
    by_hand = sum(plain.loss(queries[:, :d], documents[:, :d], LABELS).item() for d in (32, 16))
    combined = MatryoshkaLoss(model, plain, [32, 16])(features(model), LABELS)
    assert combined.item() == pytest.approx(by_hand, rel=1e-4)
