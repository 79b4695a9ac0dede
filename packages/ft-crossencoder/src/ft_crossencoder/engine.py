"""Train a cross-encoder on what a retriever finds, and hand it back as a reranker."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from ft_core.artifacts import Manifest, check_output_folder, library_versions, read_manifest, saving
from ft_core.errors import ArgumentError, first_line
from ft_core.files import atomic_folder, content_hash
from ft_crossencoder.data import as_rerank_dataset
from ft_crossencoder.reranker import KIND, FinetunedReranker
from ft_crossencoder.rows import LOSSES, default_loss, training_rows
from ft_crossencoder.settings import TrainingSettings

if TYPE_CHECKING:
    from llama_index.core.base.base_retriever import BaseRetriever
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.postprocessor import SentenceTransformerRerank
    from sentence_transformers import CrossEncoder

    from ft_core.datasets import RerankDataset
    from ft_core.evaluation import Evaluation
    from ft_core.report import Report
    from ft_crossencoder.choosing import Embedded, Passages
    from ft_crossencoder.fusion import Fusion
    from ft_crossencoder.training import Run

logger = logging.getLogger(__name__)

LIBRARIES = ("ft-crossencoder", "ft-core", "sentence-transformers", "transformers", "torch")

_FRESH_HEAD_WEIGHT = 0.4  # of the retriever, where no validation set says better


class CrossEncoderFinetuneEngine:
    """Fine-tune a cross-encoder to rerank what your retriever finds.

    The positional arguments are those of `llama_index.finetuning`. The constructor only keeps
    them: data is read, models are loaded and everything else is checked by `finetune`.

    Documents that are longer than `passage_tokens` are read in overlapping passages, and the
    best one's score counts, so that nothing of a document is cut off. A base model that is no
    cross-encoder gets a fresh head, which first learns the scores of an embedding model and
    then your labels: labels of a few hundred questions alone teach a fresh head nothing.

    Args:
        dataset: what to train on: a `RerankDataset`, the path of its JSON Lines, or its
            examples; a list of `CrossEncoderFinetuningDatasetSample`; or an embedding QA
            dataset (also the path of its `.json`), for which candidates are retrieved from
            `retriever`; those that read like a relevant one count as neither.
        model_id: hub name or folder: a cross-encoder with one score, or any plain encoder.
        model_output_path: folder for the trained model. It is replaced only by a whole new
            one, and only if this engine saved it.
        batch_size: pairs of a query and a document in a step.
        val_dataset: held-out data, in any form that `dataset` takes. It picks the best
            checkpoint, fits the retriever's weight and is reported on, computed in bf16 where
            the hardware is quick in it. What is fitted there flatters the result a little:
            `ft crossencoder eval` on other data does not.
        loss: one of `ft_crossencoder.rows.LOSSES`: labels are learned by "listnet" (the
            default), "lambda", "multiple_negatives_ranking" or "binary_cross_entropy", a
            teacher's scores by "margin_mse" (the default where there are as many as labels) or
            "mse"; or a class of sentence-transformers' `cross_encoder.losses`, or a function
            from the model to such a loss.
        epochs: passes over the data.
        show_progress_bar: only ever shown on a terminal.
        evaluation_steps: steps between two evaluations on `val_dataset`; once per epoch by
            default.
        retriever: what finds the candidates of an embedding QA dataset: the retriever of your
            app, its embedding model, or "bm25". By default `embed_model`, then the base model
            if it is a plain encoder, then "bm25".
        embed_model: the embedding model of your app, if it is cheap: it tells which passage of
            a long document a question is about, and a fresh head learns its scores. By
            default a plain base model itself, or else the cross-encoder.
        top_k: candidates that are retrieved for each query.
        retrieval_weight: from 0 to 1, how much the retriever's score counts in
            `get_reranker()`. By default what is best on `val_dataset`; without one 0.4 for a
            base model without a head, and else 0.
        learning_rate, scheduler, warmup_ratio, weight_decay, dropout, frozen_share, negatives,
        passage_tokens, head_pairs, head_learning_rate, max_length, precision, seed: see
            `TrainingSettings`. `passage_tokens=0` reads whole documents.
        lora: True, or arguments of `peft.LoraConfig`, to train low-rank updates. They are
            merged into the saved model, which needs no peft. Needs `ft-crossencoder[lora]`.
        metric: validation metric that picks the best checkpoint and weight.
        early_stopping_patience: evaluations without improvement after which training stops;
            never by default.
        device: `cpu`, `cuda`, `mps`; the best there is by default.
        trust_remote_code: let the model's repository run its own code.
        save_checkpoints: keep the checkpoints after training. They are always written while
            training runs, to `<model_output_path>.checkpoints`.
        resume_from_checkpoint: go on from the last complete checkpoint, if there is one.
        checkpoint_save_steps: steps between checkpoints; once per epoch by default.
        report_to: any of transformers' trackers, such as `tensorboard` or `wandb`.
    """

    def __init__(
        self,
        dataset: Any,
        model_id: str = "cross-encoder/ms-marco-MiniLM-L12-v2",
        model_output_path: str | Path = "exp_finetune",
        batch_size: int | None = None,
        val_dataset: Any = None,
        loss: Any = None,
        epochs: int | None = None,
        show_progress_bar: bool = True,
        evaluation_steps: int | None = None,
        *,
        retriever: BaseRetriever | BaseEmbedding | str | None = None,
        embed_model: BaseEmbedding | None = None,
        top_k: int = 20,
        retrieval_weight: float | None = None,
        learning_rate: float | None = None,
        scheduler: str | None = None,
        warmup_ratio: float | None = None,
        weight_decay: float | None = None,
        dropout: float | None = None,
        frozen_share: float | None = None,
        negatives: int | None = None,
        passage_tokens: int | None = None,
        head_pairs: int | None = None,
        head_learning_rate: float | None = None,
        max_length: int | None = None,
        precision: str | None = None,
        seed: int | None = None,
        lora: bool | Mapping[str, Any] = False,
        metric: str = "ndcg@10",
        early_stopping_patience: int | None = None,
        device: Any = None,
        trust_remote_code: bool = False,
        save_checkpoints: bool = False,
        resume_from_checkpoint: bool = False,
        checkpoint_save_steps: int | None = None,
        report_to: str | list[str] = "none",
    ) -> None:
        self.settings = TrainingSettings.of(
            batch_size=batch_size,
            epochs=epochs,
            learning_rate=learning_rate,
            scheduler=scheduler,
            warmup_ratio=warmup_ratio,
            weight_decay=weight_decay,
            dropout=dropout,
            frozen_share=frozen_share,
            negatives=negatives,
            passage_tokens=passage_tokens,
            head_pairs=head_pairs,
            head_learning_rate=head_learning_rate,
            max_length=max_length,
            precision=precision,
            seed=seed,
        )
        if isinstance(loss, str) and loss not in LOSSES:
            raise ArgumentError("loss", f"is one of {', '.join(LOSSES)}, not {loss!r}")
        if early_stopping_patience is not None and val_dataset is None:
            raise ArgumentError("early_stopping_patience", "needs a val_dataset to watch")
        if retrieval_weight is not None and not 0 <= retrieval_weight <= 1:
            raise ArgumentError("retrieval_weight", f"is from 0 to 1, not {retrieval_weight}")
        if isinstance(retriever, str) and retriever != "bm25":
            raise ArgumentError(
                "retriever", f'is a retriever, an embedding model or "bm25", not {retriever!r}'
            )
        for name, value in (
            ("top_k", top_k),
            ("evaluation_steps", evaluation_steps),
            ("early_stopping_patience", early_stopping_patience),
            ("checkpoint_save_steps", checkpoint_save_steps),
        ):
            if value is not None and value < 1:
                raise ArgumentError(name, f"is at least 1, not {value}")
        self.dataset = dataset
        self.val_dataset = val_dataset
        self.model_id = model_id
        self.model_output_path = str(model_output_path)
        self.loss = loss
        self.show_progress_bar = show_progress_bar
        self.evaluation_steps = evaluation_steps
        self.retriever = retriever
        self.embed_model = embed_model
        self.top_k = top_k
        self.retrieval_weight = retrieval_weight
        self.lora = {} if lora is True else lora or None
        self.metric = metric
        self.early_stopping_patience = early_stopping_patience
        self.device = device
        self.trust_remote_code = trust_remote_code
        self.save_checkpoints = save_checkpoints
        self.resume_from_checkpoint = resume_from_checkpoint
        self.checkpoint_save_steps = checkpoint_save_steps
        self.report_to = report_to
        self.report: Report | None = None
        """The retriever, the base model if it is a cross-encoder, and the tuned one on
        `val_dataset`, once `finetune` has run."""

    def finetune(self, **train_kwargs: Any) -> Report | None:
        """Train, and save the model to `model_output_path`.

        Args:
            train_kwargs: none is known; they raise, where the predecessor ignored them.

        Returns:
            The comparison on `val_dataset`, or None without one.

        Raises:
            DatasetError: the data is bad, or there is nothing to learn from it.
            ArtifactError: the output folder holds something that is not ours.
            ArgumentError: the model cannot be loaded, or a setting does not fit it.
            TrainingError: training failed; what was saved before is as it was.
        """
        if train_kwargs:
            raise ArgumentError(next(iter(train_kwargs)), "finetune takes no arguments")
        if self.dataset is None:
            raise ArgumentError("dataset", "is not there: a loaded engine cannot train again")
        check_output_folder(self.model_output_path, KIND)
        from ft_crossencoder import training

        model, has_head = training.load_model(
            self.model_id,
            trust_remote_code=self.trust_remote_code,
            device=self.device,
            seed=self.settings.seed,
        )
        embed_model = self._embedding(has_head)
        dataset, validation = self._datasets(embed_model)
        loss = self._checked_loss(model, dataset)
        hashes = {"train": dataset.content_hash}
        evaluations: list[Evaluation] = []
        if validation is not None:
            hashes["validation"] = validation.content_hash
            validation = _with_relevant(validation)
            evaluations = self._baselines(model, validation, has_head)
        fingerprint = content_hash(
            [hashes, self._settings(), self.model_id, getattr(embed_model, "model_name", None)]
        )
        needs_head = not has_head and self.settings.head_pairs > 0
        passages, embedded = self._passages(model, dataset, embed_model, needs_head)
        if needs_head and embedded is not None:
            model = self._learn_head(model, dataset, embedded, fingerprint)
        chosen = self._chosen(model, dataset, passages, embedded)
        self._warn_of_cuts(model, chosen)
        self._learn(model, chosen, loss, fingerprint, validation)
        weight = self._weight(has_head)
        if validation is not None:
            weight, tuned = self._fit(model, validation, name="tuned")
            evaluations.append(tuned)
            self.report = self._report(evaluations, validation)
        self._save(model, hashes, weight)
        if not self.save_checkpoints:
            self._remove_checkpoints()
        return self.report

    def get_finetuned_model(
        self, model_name: str | None = None, top_n: int = 3, **kwargs: Any
    ) -> SentenceTransformerRerank:
        """Return the trained model as LlamaIndex's own reranker.

        It reads the first 512 tokens of a query and node, fails on nodes beyond the window of a
        model that has a smaller one, and does not look at the retriever's score; `get_reranker`
        does all three better.

        Args:
            model_name: hub name or folder of another cross-encoder.
            top_n: nodes to return.
            kwargs: passed on to `SentenceTransformerRerank`.

        Raises:
            ArtifactError: nothing has been trained into `model_output_path` yet.
        """
        from llama_index.core.postprocessor import SentenceTransformerRerank

        if model_name is None:
            read_manifest(self.model_output_path, KIND)
            model_name = self.model_output_path
        options = {"trust_remote_code": self.trust_remote_code, "device": self.device, **kwargs}
        return SentenceTransformerRerank(model=model_name, top_n=top_n, **options)

    def get_reranker(self, top_n: int | None = 3, **kwargs: Any) -> FinetunedReranker:
        """Return the trained model as the reranker that it was trained for.

        Args:
            top_n: nodes to return; None returns all.
            kwargs: arguments of `FinetunedReranker` in place of those that were saved.

        Raises:
            ArtifactError: nothing has been trained into `model_output_path` yet.
        """
        options = {"trust_remote_code": self.trust_remote_code, "device": self.device, **kwargs}
        return FinetunedReranker.load(self.model_output_path, top_n, **options)

    def push_to_hub(self, repo_id: str | None = None, **kwargs: Any) -> str:
        """Upload the trained model, with its card, and return its address.

        Args:
            repo_id: `name/model`.
            kwargs: passed on to `CrossEncoder.push_to_hub`, such as `private=True`.

        Raises:
            ArgumentError: no `repo_id`, or the hub refuses; log in with `hf auth login`.
            ArtifactError: nothing has been trained into `model_output_path` yet.
        """
        if not repo_id:
            raise ArgumentError("repo_id", 'is missing; name it as "name/model"')
        read_manifest(self.model_output_path, KIND)
        from sentence_transformers import CrossEncoder

        model = CrossEncoder(self.model_output_path, device="cpu")
        try:
            return str(model.push_to_hub(repo_id, **kwargs))
        except Exception as error:
            raise ArgumentError(
                "repo_id",
                f"{repo_id!r} cannot be written: {first_line(error)}; log in with hf auth login",
            ) from error

    @classmethod
    def load(cls, folder: Path | str, **kwargs: Any) -> Self:
        """Bring back an engine from its saved folder, without the training data.

        Raises:
            ArtifactError: the folder is missing, damaged, or of another kind.
        """
        manifest = read_manifest(folder, KIND)
        return cls(None, model_id=manifest.base_model, model_output_path=str(folder), **kwargs)

    # --- The parts of finetune -----------------------------------------------------------

    @property
    def _checkpoints(self) -> Path:
        output = Path(self.model_output_path)
        return output.with_name(f"{output.name}.checkpoints")

    def _remove_checkpoints(self) -> None:
        for stage in ("head", "labels"):
            shutil.rmtree(self._checkpoints / stage, ignore_errors=True)
        with suppress(OSError):  # whatever else is in there is not ours
            self._checkpoints.rmdir()

    @property
    def _passage_tokens(self) -> int | None:
        return self.settings.passage_tokens or None

    def _embedding(self, has_head: bool) -> BaseEmbedding | None:
        if self.embed_model is not None or has_head:
            return self.embed_model
        from ft_crossencoder.encoder import EncoderEmbedding

        return EncoderEmbedding(
            self.model_id, device=self.device, trust_remote_code=self.trust_remote_code
        )

    def _datasets(
        self, embed_model: BaseEmbedding | None
    ) -> tuple[RerankDataset, RerankDataset | None]:
        options: dict[str, Any] = {
            "source": self.retriever or embed_model or "bm25",
            "top_k": self.top_k,
            "show_progress": self.show_progress_bar,
        }
        dataset = as_rerank_dataset(self.dataset, argument="dataset", judge_all=False, **options)
        if self.val_dataset is None:
            return dataset, None
        return dataset, as_rerank_dataset(
            self.val_dataset, argument="val_dataset", judge_all=True, **options
        )

    def _checked_loss(self, model: CrossEncoder, dataset: RerankDataset) -> Any:
        """Return the loss, once it is clear that the dataset holds what it learns from."""
        from ft_crossencoder import training

        loss = self.loss or default_loss(dataset)
        named = isinstance(loss, str)
        form = LOSSES[loss if named else training.rows_of(training.custom_loss(model, loss))]
        dataset.check_trainable(form.target, within_query=form.within_query)
        return loss

    def _baselines(
        self, model: CrossEncoder, validation: RerankDataset, has_head: bool
    ) -> list[Evaluation]:
        from ft_core.evaluation import evaluate_reranker

        retrieval = evaluate_reranker(None, validation, show_progress=False)
        if self.metric not in retrieval.scores:
            raise ArgumentError(
                "metric", f"is one of {', '.join(retrieval.scores)}, not {self.metric!r}"
            )
        if not has_head:  # what a fresh head says is chance
            return [retrieval]
        return [retrieval, self._fit(model, validation, name="base").evaluation]

    def _fit(self, model: CrossEncoder, validation: RerankDataset, *, name: str) -> Fusion:
        """Score the validation candidates, and find the retriever's weight unless it is given."""
        from ft_core.training import has_fast_bf16
        from ft_crossencoder.fusion import Fusion, evaluate_fusion, fit_weight, score_candidates
        from ft_crossencoder.scoring import PairScorer

        started = time.perf_counter()
        scorer = PairScorer(
            model,
            max_length=self.settings.max_length,
            passage_tokens=self._passage_tokens,
            precision="bf16" if has_fast_bf16(model.device) else "fp32",
        )
        scores = score_candidates(scorer, validation, show_progress=self.show_progress_bar)
        seconds = time.perf_counter() - started
        if self.retrieval_weight is None:
            return fit_weight(scores, validation, self.metric, name=name, seconds=seconds)
        weight = self.retrieval_weight
        return Fusion(
            weight, evaluate_fusion(scores, validation, weight, name=name, seconds=seconds)
        )

    def _passages(
        self,
        model: CrossEncoder,
        dataset: RerankDataset,
        embed_model: BaseEmbedding | None,
        needs_head: bool,
    ) -> tuple[Passages, Embedded | None]:
        from ft_crossencoder.choosing import Embedded, Passages

        passages = Passages(dataset, model.tokenizer, self._passage_tokens)
        if embed_model is None or not (needs_head or passages.any_cut):
            return passages, None
        return passages, Embedded(
            dataset, passages.distinct(), embed_model, show_progress=self.show_progress_bar
        )

    def _chosen(
        self,
        model: CrossEncoder,
        dataset: RerankDataset,
        passages: Passages,
        embedded: Embedded | None,
    ) -> RerankDataset:
        """Return the dataset with the passage of each document that its query is about."""
        from ft_crossencoder.choosing import by_scorer, with_best_passages
        from ft_crossencoder.scoring import PairScorer

        if not passages.any_cut:
            return dataset
        scorer = PairScorer(model, max_length=self.settings.max_length)
        score: Any = embedded.scores if embedded else by_scorer(scorer)
        return with_best_passages(dataset, passages, score, show_progress=self.show_progress_bar)

    def _warn_of_cuts(self, model: CrossEncoder, dataset: RerankDataset) -> None:
        """Say how many documents are too long to be read whole."""
        from ft_crossencoder.choosing import count_cut
        from ft_crossencoder.scoring import window

        limit = window(model, self.settings.max_length)
        cut, documents = count_cut(dataset, model.tokenizer, limit)
        if cut:
            logger.warning(
                "%d of %d documents are longer than the %d tokens that the model reads of a query "
                "and a document, and their ends are cut; passage_tokens=%d reads them in passages",
                cut,
                documents,
                limit,
                min(TrainingSettings.passage_tokens, limit // 2),
            )

    def _learn_head(
        self, model: CrossEncoder, dataset: RerankDataset, embedded: Embedded, fingerprint: str
    ) -> CrossEncoder:
        """Train a fresh head, and the encoder with it, on the embedding model's scores."""
        from ft_core.training import belongs_to
        from ft_crossencoder import training
        from ft_crossencoder.choosing import head_rows

        settings = self.settings
        folder = self._checkpoints / "head"
        trained = folder / "trained"
        known = self.resume_from_checkpoint and belongs_to(folder, fingerprint) and trained.exists()
        if not known:
            rows = head_rows(dataset, embedded, pairs=settings.head_pairs, seed=settings.seed)
            logger.info("the base model has no head: learning one from %d scores", len(rows))
            training.train(model, rows, self._run("head", fingerprint, loss="mse", head=True))
            with atomic_folder(trained) as partial:
                training.save(model, partial)
        # Loaded in any case: checkpoints with LoRA name the folder that they build on.
        return training.load_model(
            str(trained), trust_remote_code=self.trust_remote_code, device=self.device
        )[0]

    def _learn(
        self,
        model: CrossEncoder,
        dataset: RerankDataset,
        loss: Any,
        fingerprint: str,
        validation: RerankDataset | None,
    ) -> None:
        """Train on the labels, or on a teacher's scores."""
        from ft_crossencoder import training

        settings = self.settings
        if not isinstance(loss, str):
            loss = training.custom_loss(model, loss)
        form = loss if isinstance(loss, str) else training.rows_of(loss)
        rows = training_rows(dataset, form, negatives=settings.negatives, seed=settings.seed)
        run = self._run("labels", fingerprint, loss=loss)
        run.lora = self.lora
        watching = self.evaluation_steps is not None or settings.epochs > 1
        if validation is not None and watching:
            run.validate = lambda current: self._means(current, validation)
        training.train(model, rows, run)

    def _means(self, model: CrossEncoder, validation: RerankDataset) -> dict[str, float]:
        return self._fit(model, validation, name="step").evaluation.means()

    def _run(self, stage: str, fingerprint: str, *, loss: Any, head: bool = False) -> Run:
        from ft_crossencoder.training import Run

        return Run(
            settings=self.settings,
            checkpoints=self._checkpoints / stage,
            fingerprint=fingerprint,
            loss=loss,
            metric=self.metric,
            patience=self.early_stopping_patience,
            evaluation_steps=self.evaluation_steps,
            resume=self.resume_from_checkpoint,
            save_steps=self.checkpoint_save_steps,
            save_limit=None if self.save_checkpoints else 1,
            report_to=self.report_to,
            show_progress=self.show_progress_bar,
            head=head,
        )

    def _weight(self, has_head: bool) -> float:
        if self.retrieval_weight is not None:
            return self.retrieval_weight
        return 0.0 if has_head else _FRESH_HEAD_WEIGHT

    def _report(self, evaluations: list[Evaluation], validation: RerankDataset) -> Report:
        from ft_core.report import Report

        report = Report(
            evaluations, validation, title="Reranking of the validation set", primary=self.metric
        )
        if report.outcome("tuned") == "better":
            logger.info("%s", report.verdict("tuned"))
        else:
            logger.warning(
                "validation does not show that reranking helps: keep the retriever's order, or "
                "train and validate on more or cleaner data. %s",
                report.verdict("tuned"),
            )
        return report

    def _settings(self) -> dict[str, Any]:
        """Return what was asked for, as `ft.json` records it."""
        loss = self.loss
        return {
            **self.settings.to_dict(),
            "loss": loss if loss is None or isinstance(loss, str) else _name(loss),
            "lora": None if self.lora is None else dict(self.lora),
            "top_k": self.top_k,
            "metric": self.metric,
        }

    def _save(self, model: CrossEncoder, hashes: dict[str, str], weight: float) -> None:
        from ft_crossencoder import training

        metrics: dict[str, Any] = {}
        if self.report is not None:
            metrics = {evaluation.name: evaluation.means() for evaluation in self.report.runs}
        manifest = Manifest(
            kind=KIND,
            base_model=self.model_id,
            data=hashes,
            settings={**self._settings(), "retrieval_weight": weight},
            metrics=metrics,
            versions=library_versions(LIBRARIES),
        )
        with saving(self.model_output_path, manifest) as folder:
            training.save(model, folder)


def _with_relevant(validation: RerankDataset) -> RerankDataset:
    """Return the queries that metrics say something of, under the ids that they had."""
    kept = [
        example.model_copy(update={"id": query})
        for query, example, documents in validation.with_ids()
        if any(document.grade for document in documents.values())
    ]
    if not kept:
        raise ArgumentError(
            "val_dataset", "no query has a document with a label of 0.5 or more; judge some"
        )
    if len(kept) < len(validation):
        logger.warning(
            "%d of %d validation queries have no relevant document and are not evaluated",
            len(validation) - len(kept),
            len(validation),
        )
    return type(validation)(examples=kept)


def _name(value: Any) -> str:
    return str(getattr(value, "__name__", None) or type(value).__name__)
