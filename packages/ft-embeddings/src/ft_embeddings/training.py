"""The training itself: the one place of this pack that imports torch and its friends."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from transformers import EarlyStoppingCallback, PrinterCallback, set_seed

from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.errors import ArgumentError, first_line
from ft_core.evaluation import Evaluation, evaluate_vectors
from ft_core.training import (
    prepare_checkpoints,
    quiet_unless_terminal,
    trainer_arguments,
    writing,
)
from ft_core.weights import add_lora, check_finite, freeze_lowest, merge_lora, set_dropout
from ft_embeddings.batches import Collator, TrainingTexts
from ft_embeddings.instructions import Instructions
from ft_embeddings.losses import CachedMultiPositiveRankingLoss, MultiPositiveRankingLoss
from ft_embeddings.settings import TrainingSettings

logger = logging.getLogger(__name__)

_GO_ON = "go on with resume_from_checkpoint=True"


@dataclass
class Run:
    """One training run: what `train` needs besides the model and the texts."""

    settings: TrainingSettings
    instructions: Instructions
    checkpoints: Path
    """Folder of the checkpoints; also says what they belong to, for `resume`."""
    fingerprint: str
    """Hash of data and settings: checkpoints of another run are not resumed."""
    loss: str | Callable[..., Any] | Any = "multiple_negatives_ranking"
    matryoshka_dims: Sequence[int] | None = None
    guide: Any = None
    every_document: bool = False
    all_relevant: bool = True
    lora: Mapping[str, Any] | None = None
    validation: EmbeddingQAFinetuneDataset | None = None
    metric: str = "ndcg@10"
    patience: int | None = None
    evaluation_steps: int | None = None
    resume: bool = False
    save_steps: int | None = None
    save_limit: int | None = None
    report_to: str | list[str] = "none"
    show_progress: bool = True


def load_model(model_id: str, *, trust_remote_code: bool = False, device: Any = None) -> Any:
    """Load a SentenceTransformer from the hub or a folder, on the best device there is.

    Raises:
        ArgumentError: there is no such model, or it cannot be loaded.
    """
    try:
        with quiet_unless_terminal():
            return SentenceTransformer(model_id, trust_remote_code=trust_remote_code, device=device)
    except Exception as error:
        raise ArgumentError(
            "model_id", f"{model_id!r} cannot be loaded: {first_line(error)}"
        ) from error


def load_embedding(model: str, **kwargs: Any) -> Any:
    """Load a model from the hub or a folder as LlamaIndex's `HuggingFaceEmbedding`."""
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    with quiet_unless_terminal():
        return HuggingFaceEmbedding(model_name=model, **kwargs)


def evaluate(
    model: Any, dataset: EmbeddingQAFinetuneDataset, instructions: Instructions, *, name: str
) -> Evaluation:
    """Score a SentenceTransformer on a dataset, queries and documents encoded in batches."""
    started = time.perf_counter()
    queries = encode(model, list(dataset.queries.values()), instructions.query)
    corpus = encode(model, list(dataset.corpus.values()), instructions.text)
    evaluation = evaluate_vectors(queries, corpus, dataset, name=name)
    return evaluation.model_copy(update={"seconds": time.perf_counter() - started})


def encode(model: Any, texts: Sequence[str], prompt: str) -> np.ndarray:
    """Return normalised vectors of shape (texts, d), float32."""
    vectors: np.ndarray = model.encode(
        list(texts),
        prompt=prompt or None,
        normalize_embeddings=True,
        convert_to_numpy=True,
        show_progress_bar=False,
    )
    return vectors


def train(model: Any, texts: TrainingTexts, run: Run) -> None:
    """Train `model` in place; afterwards it holds the weights to keep.

    Raises:
        TrainingError: the weights became NaN, a checkpoint cannot be written, or the
            checkpoints are another run's.
        ArgumentError: a setting does not fit the model.
    """
    settings = run.settings
    set_seed(settings.seed)
    before = copy.deepcopy(model.state_dict()) if settings.base_weight else None
    if settings.max_length is not None:
        own_length, model.max_seq_length = model.max_seq_length, settings.max_length
    encoder = getattr(model[0], "auto_model", None)
    set_dropout(model, settings.dropout)
    if run.lora is None:
        freeze_lowest(model, encoder, settings.frozen_share)
    else:
        add_lora(model, run.lora, task_type="FEATURE_EXTRACTION", extra="ft-embeddings[lora]")

    checkpoint = prepare_checkpoints(run.checkpoints, run.fingerprint, resume=run.resume)
    with quiet_unless_terminal(), writing("a checkpoint", run.checkpoints, _GO_ON):
        _trainer(model, texts, run).train(resume_from_checkpoint=checkpoint)
    check_finite(model, "learning_rate", settings.learning_rate)

    if run.lora is not None:
        merge_lora(model, encoder)
    if before is not None:
        _blend(model, before, settings.base_weight)
    if settings.max_length is not None:
        model.max_seq_length = own_length
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.eval()


def save(model: Any, folder: Path, instructions: Instructions) -> None:
    """Write a model as sentence-transformers does, with the instructions as its prompts."""
    # LlamaIndex looks for `query` and `text`; sentence-transformers for `document`.
    model.prompts = {
        "query": instructions.query,
        "document": instructions.text,
        "text": instructions.text,
    }
    with quiet_unless_terminal(), writing("the trained model", folder, _GO_ON):
        model.save_pretrained(str(folder), create_model_card=False)


def _trainer(model: Any, texts: TrainingTexts, run: Run) -> Any:
    settings = run.settings
    custom = not isinstance(run.loss, str)
    if custom:
        rows, collator = _pairs(texts, run.all_relevant), None
    else:
        rows = datasets.Dataset.from_list(
            texts.units(seed=settings.seed, all_relevant=run.all_relevant)
        )
        collator = Collator(
            texts,
            model.preprocess,
            query_prompt=run.instructions.query,
            document_prompt=run.instructions.text,
            every_document=run.every_document,
            guide=_guide_vectors(model, texts, run) if run.loss == "gist" else None,
        )
    evaluating = run.validation is not None
    arguments = SentenceTransformerTrainingArguments(
        **trainer_arguments(
            settings,
            model.device,
            steps=max(1, -(-len(rows) // settings.batch_size) * settings.epochs),
            output=run.checkpoints,
            batch_size=settings.batch_size,
            metric=run.metric if evaluating else None,
            evaluation_steps=run.evaluation_steps,
            save_steps=run.save_steps,
            save_limit=run.save_limit,
            report_to=run.report_to,
            show_progress=run.show_progress,
        ),
        prompts=_column_prompts(run.instructions) if custom else None,
        batch_sampler=BatchSamplers.NO_DUPLICATES if custom else BatchSamplers.BATCH_SAMPLER,
    )
    evaluator = None
    callbacks = []
    if run.validation is not None:
        evaluator = _ValidationEvaluator(run.validation, run.instructions)
        if run.patience is not None:
            callbacks.append(EarlyStoppingCallback(run.patience))
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        loss=_loss(model, run),
        evaluator=evaluator,
        data_collator=collator,
        callbacks=callbacks,
    )
    # It prints each log line to standard output, which belongs to the caller.
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Trainer(SentenceTransformerTrainer):
    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Collect nothing for a model card: `ft_core.artifacts` writes its own."""


class _ValidationEvaluator(BaseEvaluator):
    """Scores the model under training on the validation set, as `evaluate` does."""

    def __init__(self, dataset: EmbeddingQAFinetuneDataset, instructions: Instructions) -> None:
        super().__init__()
        self._dataset, self._instructions = dataset, instructions

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Return metric name to mean."""
        evaluation = evaluate(model, self._dataset, self._instructions, name=f"step {steps}")
        return evaluation.means()


def _loss(model: Any, run: Run) -> Any:
    scale = run.settings.scale
    if not isinstance(run.loss, str):
        return run.loss
    if run.loss == "cached_multiple_negatives_ranking":
        return CachedMultiPositiveRankingLoss(model, scale=scale)
    plain = MultiPositiveRankingLoss(model, scale=scale)
    if run.loss == "matryoshka":
        full = model.get_embedding_dimension()
        dims = run.matryoshka_dims or [full // part for part in (1, 2, 4, 8) if full // part >= 8]
        too_large = [dim for dim in dims if not 0 < dim <= full]
        if too_large:
            raise ArgumentError("matryoshka_dims", f"are from 1 to {full}, not {too_large[0]}")
        return MatryoshkaLoss(model, plain, list(dims))
    return plain


def _guide_vectors(model: Any, texts: TrainingTexts, run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Encode every training text once with the guide; the untrained model is a fair one."""
    guide = model
    if run.guide is not None:
        guide = (
            load_model(run.guide, device=model.device) if isinstance(run.guide, str) else run.guide
        )
    return (
        encode(guide, texts.queries, run.instructions.query),
        encode(guide, texts.documents, run.instructions.text),
    )


def _pairs(texts: TrainingTexts, all_relevant: bool) -> Any:
    """Return (anchor, positive[, negative]) rows, as sentence-transformers' losses take them."""
    rows = [
        {"anchor": texts.queries[query], "positive": texts.documents[document]}
        | {f"negative_{i}": texts.documents[n] for i, n in enumerate(texts.negatives[query], 1)}
        for query, documents in enumerate(texts.relevant)
        for document in (documents if all_relevant else documents[:1])
    ]
    # Rows need the same columns: keep as many negatives as every query has.
    columns = set.intersection(*(set(row) for row in rows))
    return datasets.Dataset.from_list(
        [{name: row[name] for name in row if name in columns} for row in rows]
    )


def _column_prompts(instructions: Instructions) -> dict[str, str] | None:
    prompts = {"anchor": instructions.query, "positive": instructions.text}
    return {column: prompt for column, prompt in prompts.items() if prompt} or None


def _blend(model: Any, before: Mapping[str, Any], share: float) -> None:
    """Move the weights back towards what they were, by a share of the way."""
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if weight.is_floating_point():
                weight.lerp_(before[name].to(weight.device), share)
