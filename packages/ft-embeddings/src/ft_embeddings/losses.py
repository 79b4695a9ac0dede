"""Ranking losses in which a query may have several relevant documents in the batch.

Both take the columns `query` and `document`, each text once, and a matrix of labels that
says how every query of the batch relates to every document of it (`batches.Label`). The
losses of sentence-transformers pair row i with row i instead, so that they see a second
relevant document as a negative and encode a document anew for each query that shares it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the field's standard name)
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from torch import Tensor, nn

from ft_embeddings.batches import Label, length_buckets


class MultiPositiveRankingLoss(nn.Module):
    """Softmax over the documents of the batch, and over its queries, averaged.

    Each relevant (query, document) pair is one classification: the document against the
    query's irrelevant documents, and the query against the document's irrelevant queries.
    With one relevant document a query this is the symmetric InfoNCE of CLIP (Radford et
    al. 2021, arXiv:2103.00020); other relevant documents are left out of the sum below the
    line, not counted as negatives.

    Args:
        model: the SentenceTransformer under training.
        scale: factor on the cosine similarity, the inverse of the temperature.
    """

    def __init__(self, model: Any, *, scale: float = 20.0) -> None:
        super().__init__()
        self.model = model
        self.scale = scale

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Return the mean loss; `labels` has the shape (queries, documents)."""
        queries, documents = (self._embed(features) for features in sentence_features)
        return self.loss(queries, documents, labels)

    def loss(self, queries: Tensor, documents: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of embeddings of shape (queries, d) and (documents, d)."""
        queries, documents = queries.float(), documents.float()
        scores = F.normalize(queries, dim=-1) @ F.normalize(documents, dim=-1).T * self.scale
        relevant, negative = labels == Label.RELEVANT, labels == Label.NEGATIVE
        return (
            _softmax(scores, relevant, negative) + _softmax(scores.T, relevant.T, negative.T)
        ) / 2

    def _embed(self, features: dict[str, Tensor]) -> Tensor:
        """Encode one column in buckets of like length, so that little of it is padding."""
        mask = features["attention_mask"]
        buckets = length_buckets(mask.sum(dim=1).tolist())
        embeddings = []
        for bucket in buckets:
            rows = torch.tensor(bucket, device=mask.device)
            width = int(mask[rows].sum(dim=0).gt(0).nonzero().max()) + 1
            part = {
                name: value[rows][:, :width]
                for name, value in features.items()
                if isinstance(value, Tensor) and value.shape == mask.shape
            }
            embeddings.append(self.model(part)["sentence_embedding"])
        order = torch.tensor([row for bucket in buckets for row in bucket], device=mask.device)
        return torch.cat(embeddings)[order.argsort()]


class CachedMultiPositiveRankingLoss(CachedLossMixin, MultiPositiveRankingLoss):
    """The same loss for batches that do not fit into memory at once.

    GradCache (Gao et al. 2021, arXiv:2101.06983): encode without gradients, differentiate
    the loss down to the embeddings, then encode again in mini-batches with gradients. The
    gradients are those of the plain loss; the price is a second forward pass.

    Args:
        mini_batch_size: texts whose activations are alive at once.
    """

    def __init__(self, model: Any, *, scale: float = 20.0, mini_batch_size: int = 16) -> None:
        super().__init__(model, scale=scale)
        self.mini_batch_size = mini_batch_size

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Return the mean loss; its backward pass encodes again."""
        return self.forward_cached(sentence_features, labels)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor, *, with_backward: bool = False
    ) -> Tensor:
        """Return the loss of the mini-batches' embeddings; `CachedLossMixin` calls it."""
        queries, documents = (torch.cat(column) for column in reps)
        loss = self.loss(queries, documents, labels)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss


def _softmax(scores: Tensor, relevant: Tensor, negative: Tensor) -> Tensor:
    """Return the mean over relevant pairs of -log softmax(pair against the row's negatives)."""
    # Finite, because the gradient of a logsumexp over nothing but -inf is NaN.
    negatives = scores.masked_fill(~negative, -1e9).logsumexp(dim=1, keepdim=True)
    losses = F.softplus(negatives - scores)
    return losses[relevant].mean()
