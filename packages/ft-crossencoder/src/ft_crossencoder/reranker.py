"""Rerank the nodes of a query with a cross-encoder, and choose the score under which to drop."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

from ft_core.artifacts import read_manifest
from ft_core.datasets import RerankDataset
from ft_core.errors import ArgumentError, DatasetError
from ft_crossencoder.scoring import MAX_TOKENS, Backend, PairScorer, Precision, fused

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

KIND = "cross-encoder"
"""What `ft.json` calls the folders of `CrossEncoderFinetuneEngine`."""
RETRIEVAL_SCORE = "retrieval_score"
"""The key in a node's metadata of the score that it came with."""
RERANK_SCORE = "rerank_score"
"""The key of the cross-encoder's own score, where a node's score is a fusion of two."""

_NOISE = 1e-5  # of a score, from batch to batch


class FinetunedReranker(BaseNodePostprocessor):
    """Reranks with a cross-encoder: `SentenceTransformerRerank`'s scores, sooner.

    Candidates are sorted by length into batches, so that short ones wait for no padding, and
    memory is bounded. Asynchronous calls run in a thread. The caller's nodes stay as they are:
    what is returned are copies, with the retriever's score in their metadata, where neither
    the LLM nor an embedding model reads it.

    Args:
        model: hub name or folder of a cross-encoder, or a `CrossEncoder`.
        top_n: how many nodes to return, best first; None returns all.
        threshold: drop nodes that the cross-encoder scores below this (see
            `calibrate_threshold`), so that fewer than `top_n` or none may be left.
        retrieval_weight: from 0 to 1, how much the retriever's own score counts: both kinds are
            standardised over the query's nodes and summed by weight. A node's score is then
            that sum; the cross-encoder's is in its metadata as `rerank_score`, and `threshold`
            is compared to it.
        keep_retrieval_score: write `retrieval_score` into the metadata of the nodes' copies.
        metadata_mode: which text of a node is read; `embed` has the metadata that its index
            embeds.
        device, max_length, passage_tokens, max_tokens, precision, quantize, backend,
            trust_remote_code: see `ft_crossencoder.scoring.PairScorer`.

    Raises:
        ArgumentError: an argument cannot be used, or the model is no cross-encoder; when
            called, there is no query.
        MissingExtraError: the backend is "onnx" and its packages are not installed.
        FTError: when called, the model gives a score that is not finite.
    """

    model: str = Field(description="Name of the cross-encoder.")
    top_n: int | None = Field(default=None, description="How many nodes to return.")
    threshold: float | None = Field(default=None, description="Nodes below it are dropped.")
    retrieval_weight: float = Field(default=0.0, description="How much the retriever counts.")
    keep_retrieval_score: bool = Field(default=True, description="Keep it in the metadata.")
    metadata_mode: MetadataMode = Field(default=MetadataMode.EMBED, description="What is read.")

    _scorer: PairScorer = PrivateAttr()

    def __init__(
        self,
        model: str | CrossEncoder,
        top_n: int | None = None,
        *,
        threshold: float | None = None,
        retrieval_weight: float = 0.0,
        keep_retrieval_score: bool = True,
        metadata_mode: MetadataMode | str = MetadataMode.EMBED,
        device: str | None = None,
        max_length: int | None = None,
        passage_tokens: int | None = None,
        max_tokens: int = MAX_TOKENS,
        precision: Precision = "fp32",
        quantize: bool = False,
        backend: Backend = "torch",
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> None:
        if top_n is not None and top_n < 1:
            raise ArgumentError("top_n", f"is at least 1, or None for all, not {top_n}")
        if not 0 <= retrieval_weight <= 1:
            raise ArgumentError("retrieval_weight", f"is from 0 to 1, not {retrieval_weight}")
        scorer = PairScorer(
            model,
            device=device,
            max_length=max_length,
            passage_tokens=passage_tokens,
            max_tokens=max_tokens,
            precision=precision,
            quantize=quantize,
            backend=backend,
            trust_remote_code=trust_remote_code,
        )
        super().__init__(
            model=_name(model),
            top_n=top_n,
            threshold=threshold,
            retrieval_weight=retrieval_weight,
            keep_retrieval_score=keep_retrieval_score,
            metadata_mode=MetadataMode(metadata_mode),
            **kwargs,
        )
        self._scorer = scorer

    @classmethod
    def load(
        cls, folder: Path | str, top_n: int | None = None, **settings: Any
    ) -> FinetunedReranker:
        """Return the reranker that `CrossEncoderFinetuneEngine` trained into a folder.

        Args:
            folder: what was its `model_output_path`.
            top_n: how many nodes to return; None returns all.
            settings: arguments of the class in place of those that were saved.

        Raises:
            ArtifactError: the folder is missing, damaged, or of another kind.
        """
        saved = read_manifest(folder, KIND).settings
        known = {
            "retrieval_weight": saved.get("retrieval_weight", 0.0),
            "passage_tokens": saved.get("passage_tokens") or None,
            "max_length": saved.get("max_length"),
        }
        return cls(str(folder), top_n, **{**known, **settings})

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex knows the class by."""
        return "FinetunedReranker"

    @property
    def scorer(self) -> PairScorer:
        """What computes the scores."""
        return self._scorer

    def score(self, query: str, texts: list[str]) -> list[float]:
        """Return the cross-encoder's score of each text, in their order."""
        return self._scorer.score([(query, text) for text in texts]).scores

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        """Return copies of the best nodes; asynchronous calls come here too, in a thread."""
        if query_bundle is None:
            raise ArgumentError("query_bundle", "is missing; a reranker needs the query")
        if not nodes:
            return []
        payload = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: self.model,
            EventPayload.QUERY_STR: query_bundle.query_str,
            EventPayload.TOP_K: self.top_n,
        }
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            ranked = self._ranked(query_bundle.query_str, nodes)
            event.on_end(payload={EventPayload.NODES: ranked})
        return ranked

    def _ranked(self, query: str, nodes: list[NodeWithScore]) -> list[NodeWithScore]:
        texts = [item.node.get_content(metadata_mode=self.metadata_mode) for item in nodes]
        scores, logits = self._scorer.score([(query, text) for text in texts])
        final = scores
        keys = list(zip(scores, logits, strict=True))
        if self.retrieval_weight:
            retrieval = [item.score for item in nodes]
            final = fused(logits, retrieval, self.retrieval_weight).tolist()
            keys = list(zip(final, logits, strict=True))
        # Sorting is stable: of equal nodes, the retriever's order stays.
        order = sorted(range(len(nodes)), key=keys.__getitem__, reverse=True)
        if self.threshold is not None:
            order = [index for index in order if scores[index] >= self.threshold]
        return [
            self._copy(nodes[index], final[index], scores[index]) for index in order[: self.top_n]
        ]

    def _copy(self, item: NodeWithScore, final: float, score: float) -> NodeWithScore:
        """Return the node with its new score; of the node itself, a copy of what is changed."""
        new: dict[str, float] = {}
        if self.keep_retrieval_score and item.score is not None:
            new[RETRIEVAL_SCORE] = item.score
        if self.retrieval_weight:
            new[RERANK_SCORE] = score
        node = item.node
        if new:
            # Numbers for the app: neither an LLM nor an embedding model is to read them.
            hidden = {
                name: list(dict.fromkeys([*getattr(node, name), *new]))
                for name in ("excluded_llm_metadata_keys", "excluded_embed_metadata_keys")
            }
            node = node.model_copy(update={"metadata": {**node.metadata, **new}, **hidden})
        return NodeWithScore(node=node, score=final)


@dataclass(frozen=True)
class Calibration:
    """A threshold, and what it does to the dataset that it was chosen on."""

    threshold: float
    """For `FinetunedReranker(threshold=...)`."""
    recall: float
    """Share of a query's relevant candidates that it keeps, in the mean of the queries."""
    dropped: float
    """Share of the other candidates that it drops, over all queries."""
    queries: int
    """How many queries have a relevant candidate, and so had a say."""


def calibrate_threshold(
    dataset: RerankDataset, reranker: FinetunedReranker, *, recall: float = 0.95
) -> Calibration:
    """Find the highest threshold that keeps the wanted share of what is relevant.

    Choose it on questions that the model was not trained on: it scores those higher.

    Args:
        dataset: a `RerankDataset`, or what its `coerce` takes, with labels. Unjudged candidates
            count as not relevant; relevant documents that the retriever missed do not count.
        reranker: whose cross-encoder to calibrate; its own `threshold` and `top_n` are ignored.
        recall: the share to keep at least, above 0 up to 1, in the mean of the queries.

    Raises:
        ArgumentError: `recall` is out of range.
        DatasetError: the dataset is bad, or no query has a relevant candidate.
    """
    if not 0 < recall <= 1:
        raise ArgumentError("recall", f"is above 0 and up to 1, not {recall}")
    dataset = RerankDataset.coerce(dataset)
    pairs, shares = [], []
    queries = 0
    for example in dataset:
        relevant = sum(document.grade > 0 for document in example.candidates)
        queries += relevant > 0
        for document in example.candidates:
            pairs.append((example.query, document.text))
            shares.append(1 / relevant if document.grade else 0.0)
    if not queries:
        raise DatasetError(
            "no query has a candidate with a label of 0.5 or more; judge some documents"
        )
    scores = reranker.scorer.score(pairs).scores
    threshold = _threshold(scores, shares, recall * queries)
    kept = [score >= threshold for score in scores]
    others = [keep for keep, share in zip(kept, shares, strict=True) if not share]
    return Calibration(
        threshold=threshold,
        recall=sum(itertools.compress(shares, kept)) / queries,
        dropped=others.count(False) / len(others) if others else 0.0,
        queries=queries,
    )


def _threshold(scores: list[float], shares: list[float], wanted: float) -> float:
    """Return a number between the lowest score to keep and the next below it.

    Between, because a score differs in its last digits with what else is in its batch; where
    the next one is nearer than that, it is kept too.
    """
    ranked = sorted(zip(scores, shares, strict=True), reverse=True)
    total, lowest = 0.0, ranked[0][0]
    for score, share in ranked:
        if total >= wanted - 1e-9:
            break
        total += share
        lowest = score if share else lowest
    below = [score for score in scores if score < lowest]
    middle = (lowest + max(below)) / 2 if below else lowest
    return min(middle, lowest - _NOISE * max(1.0, abs(lowest)))


def _name(model: Any) -> str:
    if isinstance(model, str):
        return model
    config = getattr(model, "config", None)
    return str(getattr(config, "_name_or_path", None) or type(model).__name__)
