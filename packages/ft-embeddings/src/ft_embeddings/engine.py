"""Fine-tune a sentence-transformers model on an embedding QA dataset."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from ft_core.artifacts import (
    Manifest,
    check_output_folder,
    library_versions,
    read_manifest,
    saving,
)
from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.errors import ArgumentError, ArtifactError
from ft_core.files import content_hash
from ft_embeddings.instructions import Instructions, instructions_for
from ft_embeddings.settings import LOSSES, TrainingSettings

if TYPE_CHECKING:
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    from ft_core.evaluation import Evaluation
    from ft_core.report import Report

logger = logging.getLogger(__name__)

LIBRARIES = ("ft-embeddings", "sentence-transformers", "transformers", "torch", "llama-index-core")


class SentenceTransformersFinetuneEngine:
    """Fine-tune an embedding model on your questions and the passages that answer them.

    The positional arguments are those of `llama_index.finetuning`. The constructor only
    keeps them: data is read, the model loaded and everything else checked by `finetune`.

    Args:
        dataset: what to train on: an `EmbeddingQAFinetuneDataset`, LlamaIndex's own, or the
            path of its JSON.
        model_id: hub name or folder of a sentence-transformers model.
        model_output_path: folder for the trained model. It is replaced only by a whole new
            one, and only if a fine-tuning pack saved it.
        batch_size: documents per batch.
        val_dataset: held-out data, in any form that `dataset` takes. With it, the model is
            scored before, during and after training, the best checkpoint is kept, and
            `finetune` reports whether training helped.
        loss: one of `LOSSES`, or a loss of sentence-transformers (or a function from the
            model to one) for (anchor, positive) pairs.
        epochs: passes over the data.
        show_progress_bar: only ever shown on a terminal.
        evaluation_steps: steps between two evaluations on `val_dataset`; once per epoch by
            default.
        use_all_docs: train on all relevant documents of a query. False takes the first,
            as the predecessor did; the others are then still not used as negatives.
        trust_remote_code: let the model's repository run its own code.
        device: `cpu`, `cuda`, `mps`; the best there is by default.
        save_checkpoints: keep the checkpoints after training. They are always written
            while training runs, to `<model_output_path>.checkpoints`.
        resume_from_checkpoint: go on from the last complete checkpoint, if there is one.
        checkpoint_save_steps: steps between checkpoints; once per epoch by default. With
            `val_dataset` a checkpoint is written at each evaluation.
        checkpoint_save_total_limit: checkpoints kept; 0 keeps the last, and the best.
        preset: `default`, or `fast` for less than half of its time.
        learning_rate, scheduler, warmup_ratio, weight_decay, scale, dropout, frozen_share,
            base_weight, max_length, precision, seed: see `TrainingSettings`.
        lora: True, or arguments of `peft.LoraConfig`, to train low-rank updates. They are
            merged into the saved model, which needs no peft. Needs `ft-embeddings[lora]`.
        negatives: hard negatives: how many to mine per query with the untrained model, or
            query id to document ids.
        guide: model (name or SentenceTransformer) that finds false negatives for the loss
            `gist`; the untrained model by default.
        matryoshka_dims: dimensions for the loss `matryoshka`; halves of the full one by
            default.
        metric: validation metric that picks the best checkpoint.
        early_stopping_patience: evaluations without improvement after which training stops;
            never by default.
        query_instruction, text_instruction: what stands before each query and document;
            what the model is known to expect by default (`instructions_for`).
        report_to: any of transformers' trackers, such as `tensorboard` or `wandb`.
    """

    kind = "sentence-transformer"

    def __init__(
        self,
        dataset: Any,
        model_id: str = "BAAI/bge-small-en",
        model_output_path: str = "exp_finetune",
        batch_size: int | None = None,
        val_dataset: Any = None,
        loss: Any = None,
        epochs: int | None = None,
        show_progress_bar: bool = True,
        evaluation_steps: int | None = None,
        use_all_docs: bool = True,
        trust_remote_code: bool = False,
        device: Any = None,
        save_checkpoints: bool = False,
        resume_from_checkpoint: bool = False,
        checkpoint_save_steps: int | None = None,
        checkpoint_save_total_limit: int = 0,
        *,
        preset: str = "default",
        learning_rate: float | None = None,
        scheduler: str | None = None,
        warmup_ratio: float | None = None,
        weight_decay: float | None = None,
        scale: float | None = None,
        dropout: float | None = None,
        frozen_share: float | None = None,
        base_weight: float | None = None,
        max_length: int | None = None,
        precision: str | None = None,
        seed: int | None = None,
        lora: bool | Mapping[str, Any] = False,
        negatives: int | Mapping[str, Sequence[str]] = 0,
        guide: Any = None,
        matryoshka_dims: Sequence[int] | None = None,
        metric: str = "ndcg@10",
        early_stopping_patience: int | None = None,
        query_instruction: str | None = None,
        text_instruction: str | None = None,
        report_to: str | list[str] = "none",
    ) -> None:
        self.settings = TrainingSettings.preset(
            preset,
            batch_size=batch_size,
            epochs=epochs,
            learning_rate=learning_rate,
            scheduler=scheduler,
            warmup_ratio=warmup_ratio,
            weight_decay=weight_decay,
            scale=scale,
            dropout=dropout,
            frozen_share=frozen_share,
            base_weight=base_weight,
            max_length=max_length,
            precision=precision,
            seed=seed,
        )
        if isinstance(loss, str) and loss not in LOSSES:
            raise ArgumentError("loss", f"is one of {', '.join(LOSSES)}, not {loss!r}")
        if early_stopping_patience is not None and val_dataset is None:
            raise ArgumentError("early_stopping_patience", "needs a val_dataset to watch")
        self.dataset = dataset
        self.val_dataset = val_dataset
        self.model_id = model_id
        self.model_output_path = model_output_path
        self.loss = loss or LOSSES[0]
        self.show_progress_bar = show_progress_bar
        self.evaluation_steps = evaluation_steps
        self.use_all_docs = use_all_docs
        self.trust_remote_code = trust_remote_code
        self.device = device
        self.save_checkpoints = save_checkpoints
        self.resume_from_checkpoint = resume_from_checkpoint
        self.checkpoint_save_steps = checkpoint_save_steps
        self.checkpoint_save_total_limit = checkpoint_save_total_limit
        self.lora = {} if lora is True else lora or None
        self.negatives = negatives
        self.guide = guide
        self.matryoshka_dims = matryoshka_dims
        self.metric = metric
        self.early_stopping_patience = early_stopping_patience
        self.query_instruction = query_instruction
        self.text_instruction = text_instruction
        self.report_to = report_to
        self.every_document = False
        self.report: Report | None = None
        """Base against tuned on `val_dataset`, once `finetune` has run."""

    def finetune(self, **train_kwargs: Any) -> Report | None:
        """Train, and save the model to `model_output_path`.

        Args:
            train_kwargs: none is known; they raise, where the predecessor ignored them.

        Returns:
            The comparison of base and tuned on `val_dataset`, or None without one.

        Raises:
            DatasetError: the data is bad; names file, place and reason.
            ArtifactError: the output folder holds something that is not ours.
            ArgumentError: the model cannot be loaded, or a setting does not fit it.
            TrainingError: training failed; what was saved before is as it was.
        """
        if train_kwargs:
            raise ArgumentError(next(iter(train_kwargs)), "finetune takes no arguments")
        if self.dataset is None:
            raise ArgumentError("dataset", "is not there: a loaded engine cannot train again")
        check_output_folder(self.model_output_path, self.kind)
        dataset = EmbeddingQAFinetuneDataset.coerce(self.dataset)
        validation = (
            None
            if self.val_dataset is None
            else EmbeddingQAFinetuneDataset.coerce(self.val_dataset)
        )
        instructions = self._instructions()

        from ft_embeddings import training
        from ft_embeddings.batches import TrainingTexts

        model = training.load_model(
            self.model_id, trust_remote_code=self.trust_remote_code, device=self.device
        )
        evaluations: list[Evaluation] = []
        if validation is not None:
            evaluations.append(training.evaluate(model, validation, instructions, name="base"))
            if self.metric not in evaluations[0].scores:
                raise ArgumentError(
                    "metric", f"is one of {', '.join(evaluations[0].scores)}, not {self.metric!r}"
                )
        negatives = self._hard_negatives(dataset, instructions)
        hashes = {"train": dataset.content_hash}
        if validation is not None:
            hashes["validation"] = validation.content_hash
        run = training.Run(
            settings=self.settings,
            instructions=instructions,
            checkpoints=self._checkpoints,
            fingerprint=content_hash([hashes, self._settings(), self.model_id]),
            loss=self.loss,
            matryoshka_dims=self.matryoshka_dims,
            guide=self.guide,
            every_document=self.every_document,
            all_relevant=self.use_all_docs,
            lora=self.lora,
            validation=validation,
            metric=self.metric,
            patience=self.early_stopping_patience,
            evaluation_steps=self.evaluation_steps,
            resume=self.resume_from_checkpoint,
            save_steps=self.checkpoint_save_steps,
            save_limit=self.checkpoint_save_total_limit or (None if self.save_checkpoints else 1),
            report_to=self.report_to,
            show_progress=self.show_progress_bar,
        )
        texts = TrainingTexts.of(dataset, negatives)
        training.train(model, texts, run)
        if validation is not None:
            evaluations.append(training.evaluate(model, validation, instructions, name="tuned"))
            self.report = self._report(evaluations, validation)
        self._save(model, instructions, hashes)
        if not self.save_checkpoints:
            shutil.rmtree(self._checkpoints, ignore_errors=True)
        return self.report

    def get_finetuned_model(self, **model_kwargs: Any) -> HuggingFaceEmbedding:
        """Return the trained model for LlamaIndex, with the instructions it was trained with.

        Args:
            model_kwargs: passed on to `HuggingFaceEmbedding`.

        Raises:
            ArtifactError: nothing has been trained into `model_output_path` yet.
        """
        return load_embedding(self.model_output_path, self.kind, device=self.device, **model_kwargs)

    @classmethod
    def load(cls, folder: Path | str, **kwargs: Any) -> Self:
        """Bring back an engine from its saved folder, without the training data.

        Raises:
            ArtifactError: the folder is missing, damaged, or of another kind.
        """
        manifest = read_manifest(folder, cls.kind)
        return cls(None, model_id=manifest.base_model, model_output_path=str(folder), **kwargs)

    @property
    def _checkpoints(self) -> Path:
        output = Path(self.model_output_path)
        return output.with_name(f"{output.name}.checkpoints")

    def _instructions(self) -> Instructions:
        return instructions_for(self.model_id, self.query_instruction, self.text_instruction)

    def _hard_negatives(
        self, dataset: EmbeddingQAFinetuneDataset, instructions: Instructions
    ) -> Mapping[str, Sequence[str]] | None:
        if not self.negatives:
            return None
        if isinstance(self.negatives, Mapping):
            return self.negatives
        from ft_core.mining import mine_hard_negatives
        from ft_embeddings import training

        untrained = training.load_embedding(
            self.model_id,
            query_instruction=instructions.query or None,
            text_instruction=instructions.text or None,
            trust_remote_code=self.trust_remote_code,
            device=self.device,
        )
        return mine_hard_negatives(
            dataset,
            untrained,
            num_negatives=self.negatives,
            seed=self.settings.seed,
            show_progress=self.show_progress_bar,
        )

    def _report(
        self, evaluations: list[Evaluation], validation: EmbeddingQAFinetuneDataset
    ) -> Report:
        from ft_core.report import Report

        report = Report(
            evaluations, validation, title="Base and tuned on validation", primary=self.metric
        )
        if report.outcome("tuned") == "better":
            logger.info("%s", report.verdict("tuned"))
        else:
            logger.warning(
                "validation does not show that tuning helps: keep the base model, or train and "
                "validate on more or cleaner data. %s",
                report.verdict("tuned"),
            )
        return report

    def _negatives_setting(self) -> int | str:
        """Return their number, or of given ones a hash: other negatives are another run."""
        if isinstance(self.negatives, Mapping):
            return content_hash({query: list(named) for query, named in self.negatives.items()})
        return self.negatives

    def _settings(self) -> dict[str, Any]:
        """Return what was asked for, as `ft.json` records it."""
        return {
            **self.settings.to_dict(),
            "loss": self.loss if isinstance(self.loss, str) else type(self.loss).__name__,
            "matryoshka_dims": None if self.matryoshka_dims is None else list(self.matryoshka_dims),
            "lora": None if self.lora is None else dict(self.lora),
            "guide": self.guide if self.guide is None or isinstance(self.guide, str) else "given",
            "negatives": self._negatives_setting(),
            "use_all_docs": self.use_all_docs,
            "query_instruction": self._instructions().query,
            "text_instruction": self._instructions().text,
        }

    def _save(self, model: Any, instructions: Instructions, hashes: dict[str, str]) -> None:
        metrics: dict[str, Any] = {}
        if self.report is not None:
            metrics = {evaluation.name: evaluation.means() for evaluation in self.report.runs}
        from ft_embeddings import training

        manifest = Manifest(
            kind=self.kind,
            base_model=self.model_id,
            data=hashes,
            settings=self._settings(),
            metrics=metrics,
            versions=library_versions(LIBRARIES),
        )
        with saving(self.model_output_path, manifest) as folder:
            training.save(model, folder, instructions)


def load_embedding(folder: Path | str, kind: str, **kwargs: Any) -> HuggingFaceEmbedding:
    """Load a saved model as LlamaIndex's `HuggingFaceEmbedding`, instructions included.

    Raises:
        ArtifactError: the folder is missing, damaged, or of another kind.
    """
    settings = read_manifest(folder, kind).settings

    from ft_embeddings import training

    instructions = {
        name: settings[name]
        for name in ("query_instruction", "text_instruction")
        if settings.get(name)
    }
    return training.load_embedding(str(folder), **{**instructions, **kwargs})


def saved_instructions(model: str) -> Instructions:
    """Return what a model was trained with: from `ft.json`, or by its name."""
    try:
        settings = read_manifest(model, SentenceTransformersFinetuneEngine.kind).settings
    except ArtifactError:
        return instructions_for(model)
    return Instructions(settings["query_instruction"], settings["text_instruction"])
