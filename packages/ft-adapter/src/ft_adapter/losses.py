"""What a query's document is told apart from, and how the difference becomes a loss.

A loss is a choice of candidate documents and an objective over their cosines. Other documents
that answer the same query, and copies of them, are never candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ft_adapter.settings import TrainingSettings
from ft_adapter.vectors import Vectors


@dataclass(frozen=True, eq=False)
class Pairs:
    """Training pairs and their candidates, in rows of the *judged* documents.

    Judged are those that answer a training question, and given negatives. The others would
    only ever be pushed away, which harms the questions that they do answer.
    """

    query: Tensor
    """Row of the query of each pair, shape (pairs,)."""
    document: Tensor
    """Row of its document among the judged, shape (pairs,)."""
    judged: Tensor
    """Row of each judged document among all documents, shape (judged,)."""
    forbidden: Tensor
    """Shape (queries, judged), true where a document answers the query."""
    negatives: Tensor | None
    """Rows of mined negatives of each query, shape (queries, n); -1 where there are fewer."""

    @classmethod
    def of(
        cls,
        vectors: Vectors,
        negatives: Mapping[str, Sequence[str]] | None,
        device: torch.device,
    ) -> Pairs:
        """Lay out the pairs of a dataset and its mined negatives (query id to document ids)."""
        relevant = [row for rows in vectors.relevant for row in rows]
        mined = [
            [vectors.rows[document] for document in (negatives or {}).get(query, ())]
            for query in vectors.query_ids
        ]
        judged = np.unique([*relevant, *(row for rows in mined for row in rows)])
        # Copies of a document have the same vector, and answer the same questions.
        _, copy_of = np.unique(vectors.documents[judged], axis=0, return_inverse=True)
        copy_of = copy_of.reshape(-1)
        place = {int(row): number for number, row in enumerate(judged)}
        forbidden = np.zeros((len(vectors.query_ids), len(judged)), dtype=bool)
        for query, rows in enumerate(vectors.relevant):
            forbidden[query] = np.isin(copy_of, copy_of[[place[row] for row in rows]])
        pairs = [(query, place[row]) for query, rows in enumerate(vectors.relevant) for row in rows]
        width = max(map(len, mined), default=0)
        padded = [[place[row] for row in rows] + [-1] * (width - len(rows)) for rows in mined]
        return cls(
            query=torch.tensor([query for query, _ in pairs], device=device),
            document=torch.tensor([document for _, document in pairs], device=device),
            judged=torch.from_numpy(judged).to(device),
            forbidden=torch.from_numpy(forbidden).to(device),
            negatives=torch.tensor(padded, device=device) if width else None,
        )

    def __len__(self) -> int:
        return len(self.query)


def loss_of(
    adapted: Tensor, documents: Tensor, pairs: Pairs, batch: Tensor, settings: TrainingSettings
) -> Tensor:
    """Return the mean loss of a batch.

    Args:
        adapted: unit vectors of the batch's queries, shape (b, d).
        documents: unit vectors of the judged documents, shape (judged, d).
        pairs: of the whole dataset.
        batch: numbers of the pairs in the batch, shape (b,).
        settings: which loss, its scale and margin.
    """
    query, target = pairs.query[batch], pairs.document[batch]
    if settings.loss in ("hard_negatives", "margin") and pairs.negatives is not None:
        others = pairs.negatives[query]
        cosines = torch.einsum("bd,bnd->bn", adapted, documents[others.clamp(min=0)])
        absent = (others < 0) | pairs.forbidden[query].gather(1, others.clamp(min=0))
    elif settings.loss == "in_batch":
        others = target.unique()
        cosines = adapted @ documents[others].T
        absent = pairs.forbidden[query][:, others]
    else:
        cosines = adapted @ documents.T
        absent = pairs.forbidden[query]
    positive = (adapted * documents[target]).sum(dim=1, keepdim=True)
    if settings.loss == "margin":
        violation = functional.relu(cosines - positive + settings.margin).masked_fill(absent, 0)
        # The mean over violations only: with a large corpus almost all others are far away.
        return violation.sum() / (violation > 0).sum().clamp(min=1)
    scores = torch.cat([positive, cosines.masked_fill(absent, -torch.inf)], dim=1)
    first = torch.zeros(len(batch), dtype=torch.long, device=scores.device)
    return functional.cross_entropy(scores * settings.scale, first)
