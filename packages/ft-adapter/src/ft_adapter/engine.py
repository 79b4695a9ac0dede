"""Train an adapter for any embedding model, and keep it only if it helps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from ft_adapter.settings import TrainingSettings
from ft_core.artifacts import Manifest, check_output_folder, library_versions
from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.errors import ArgumentError, DatasetError
from ft_core.files import content_hash

if TYPE_CHECKING:
    from llama_index.core import VectorStoreIndex
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.indices.vector_store import VectorIndexRetriever

    from ft_adapter.embedding import AdapterEmbeddingModel
    from ft_adapter.index_vectors import IndexVectors
    from ft_adapter.retriever import AdaptedRetriever
    from ft_adapter.saved import SavedAdapter
    from ft_adapter.training import HeldOut, Selection
    from ft_adapter.vector_cache import VectorCache
    from ft_adapter.vectors import Vectors
    from ft_core.report import Report

logger = logging.getLogger(__name__)

ADAPTERS = ("linear", "low_rank", "residual", "two_layer")

_DEFAULT_NEGATIVES = 5


class EmbeddingAdapterFinetuneEngine:
    """Learn a small map of the query embedding that brings questions closer to their answers.

    The embedding model is a black box, and each distinct text is embedded once, ever: vectors
    are cached on disk. The adapter is judged on questions that it was not trained on
    (`val_dataset`, or each fold of the training questions in turn), and where no epoch is
    better than the identity by a paired test, the identity is what is saved.

    The positional arguments are those of `llama_index.finetuning`. The constructor only keeps
    them: data is read, texts are embedded and everything else is checked by `finetune`.

    Args:
        dataset: what to train on: an `EmbeddingQAFinetuneDataset`, LlamaIndex's own, or the
            path of its JSON.
        embed_model: any LlamaIndex embedding model.
        batch_size: pairs of a question and its document in a step.
        epochs: passes over the data, at most; the best one is kept.
        adapter_model: one of `ADAPTERS`, or a `BaseAdapter` or other `torch.nn.Module` that
            takes and returns tensors of shape (..., d). It is not changed: a copy is trained.
        dim: the embedding's dimension, where you want it checked.
        device: `cpu`, `cuda`, `mps`; the best there is by default.
        model_output_path: folder for the adapter. It is replaced only by a whole new one, and
            only if this engine saved it.
        model_checkpoint_path: folder for a copy of the adapter every `checkpoint_save_steps`
            steps of the final training, each in `step_<n>`.
        checkpoint_save_steps: see above.
        verbose: log the held-out gain of each epoch.
        bias: give the linear or low-rank adapter an offset.
        val_dataset: held-out data, in any form that `dataset` takes.
        negatives: for the losses `hard_negatives` and `margin`: how many to mine per question,
            or question id to document ids.
        learning_rate, weight_decay, identity_pull, loss, scale, margin, sides, folds,
        early_stopping_patience, significance, metric, seed: see `TrainingSettings`.
        cache_dir: where vectors are cached; `ft-adapter` in LlamaIndex's cache folder by
            default. It holds vectors and hashes of texts, never a text.
        show_progress: only ever shown on a terminal.
    """

    kind = "embedding-adapter"

    def __init__(
        self,
        dataset: Any,
        embed_model: BaseEmbedding,
        batch_size: int | None = None,
        epochs: int | None = None,
        adapter_model: Any = None,
        dim: int | None = None,
        device: Any = None,
        model_output_path: str | Path = "model_output",
        model_checkpoint_path: str | Path | None = None,
        checkpoint_save_steps: int = 100,
        verbose: bool = False,
        bias: bool = False,
        *,
        val_dataset: Any = None,
        negatives: int | Mapping[str, Sequence[str]] = 0,
        learning_rate: float | None = None,
        weight_decay: float | None = None,
        identity_pull: float | None = None,
        loss: str | None = None,
        scale: float | None = None,
        margin: float | None = None,
        sides: str | None = None,
        folds: int | None = None,
        early_stopping_patience: int | None = None,
        significance: float | None = None,
        metric: str | None = None,
        seed: int | None = None,
        cache_dir: str | Path | None = None,
        show_progress: bool = True,
    ) -> None:
        self.settings = TrainingSettings.of(
            batch_size=batch_size,
            epochs=epochs,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            identity_pull=identity_pull,
            loss=loss,
            scale=scale,
            margin=margin,
            sides=sides,
            folds=folds,
            early_stopping_patience=early_stopping_patience,
            significance=significance,
            metric=metric,
            seed=seed,
        )
        if isinstance(adapter_model, str) and adapter_model not in ADAPTERS:
            raise ArgumentError(
                "adapter_model", f"is one of {', '.join(ADAPTERS)}, not {adapter_model!r}"
            )
        if checkpoint_save_steps < 1:
            raise ArgumentError("checkpoint_save_steps", "is at least 1")
        self.dataset = dataset
        self.embed_model = embed_model
        self.adapter_model = "linear" if adapter_model is None else adapter_model
        self.dim = dim
        self.device = device
        self.model_output_path = Path(model_output_path)
        self.model_checkpoint_path = model_checkpoint_path
        self.checkpoint_save_steps = checkpoint_save_steps
        self.verbose = verbose
        self.bias = bias
        self.val_dataset = val_dataset
        self.negatives = negatives
        self.cache_dir = cache_dir
        self.show_progress = show_progress
        self._index: VectorStoreIndex | None = None
        self._document_vectors: Mapping[str, Sequence[float]] | None = None
        self._check_index = True
        self.report: Report | None = None
        """Identity against adapter on held-out questions, once `finetune` has run."""
        self.selection: Selection | None = None
        """Which epoch was the best, and whether it was kept, once `finetune` has run."""

    @classmethod
    def from_index(
        cls,
        index: VectorStoreIndex,
        dataset: Any,
        embed_model: BaseEmbedding | None = None,
        *,
        document_vectors: Mapping[str, Sequence[float]] | None = None,
        check_index: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Return an engine that takes the documents' vectors out of an index.

        Only questions are embedded. The dataset's document ids are ids of nodes of the index,
        or of documents that its nodes were cut from.

        Args:
            index: any `VectorStoreIndex` whose vector store can list its vectors.
            dataset: as for the constructor.
            embed_model: the model that the index was built with; the index's own by default.
            document_vectors: node id to vector, for a store whose vectors cannot be read.
            check_index: refuse an index where relevant documents are no closer to their
                questions than others, since it then seems to be of another model.
            kwargs: as for the constructor.
        """
        if kwargs.get("sides") == "both":
            raise ArgumentError(
                "sides", '"both" needs a new index of adapted documents; use the constructor'
            )
        engine = cls(dataset, embed_model or index._embed_model, **kwargs)
        engine._index = index
        engine._document_vectors = document_vectors
        engine._check_index = check_index
        return engine

    @classmethod
    def from_model_path(
        cls,
        dataset: Any,
        embed_model: BaseEmbedding,
        model_path: str | Path,
        model_cls: type[Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Return an engine that goes on training a saved adapter, ours or the predecessor's.

        Raises:
            ArtifactError: there is no adapter, or it needs `model_cls`.
        """
        from ft_adapter.saved import load_adapter

        adapter = load_adapter(model_path, model_cls).adapter
        return cls(dataset, embed_model, adapter_model=adapter, **kwargs)

    @classmethod
    def load(cls, folder: Path | str, embed_model: BaseEmbedding, **kwargs: Any) -> Self:
        """Bring back an engine from its saved folder, without the training data.

        Args:
            folder: what an engine saved.
            embed_model: the one that the adapter was trained for.
            kwargs: as for the constructor; `adapter_model`, an instance of the saved shape,
                where the adapter is of a class of your own.

        Raises:
            ArtifactError: the folder is missing, damaged or foreign, or the adapter was
                trained for another embedding model.
        """
        from ft_adapter.saved import check_base

        engine = cls(None, embed_model, model_output_path=folder, **kwargs)
        check_base(engine._saved(), embed_model)
        return engine

    def finetune(self, **train_kwargs: Any) -> Report:
        """Train, decide, and save the adapter, or the identity, to `model_output_path`.

        Args:
            train_kwargs: none is known; they raise, where the predecessor ignored them.

        Returns:
            The comparison of identity and adapter on held-out questions.

        Raises:
            DatasetError: the data is bad; names file, place and reason.
            ArtifactError: the output folder holds something that is not ours.
            ArgumentError: the embedding model or the adapter fails or does not fit. What was
                embedded until then is in the cache.
            TrainingError: training failed; what was saved before is as it was.
        """
        if train_kwargs:
            raise ArgumentError(next(iter(train_kwargs)), "finetune takes no arguments")
        if self.dataset is None:
            raise ArgumentError("dataset", "is not there: a loaded engine cannot train again")
        check_output_folder(self.model_output_path, self.kind)
        train_data = EmbeddingQAFinetuneDataset.coerce(self.dataset)
        validation = (
            None
            if self.val_dataset is None
            else EmbeddingQAFinetuneDataset.coerce(self.val_dataset)
        )
        _check_enough(train_data)
        if validation is not None:
            _warn_of_overlap(train_data, validation)

        from ft_adapter import training
        from ft_adapter.vector_cache import VectorCache

        # On an index, no call may be one for documents.
        in_batches = self._index is None
        cache = VectorCache(self.cache_dir, self.embed_model, batch_queries=in_batches)
        vectors, held_out = self._vectors(cache, train_data, validation)
        negatives = self._hard_negatives(train_data, vectors)
        runs = (
            self._folds(train_data, vectors)
            if held_out is None
            else [training.HeldOut(vectors, held_out)]
        )
        threads = training.few_threads(vectors.dimension, self.settings)
        with _seeded(self.settings.seed), threads:
            adapter = self._adapter(vectors.dimension)
            training.check_adapter(adapter, vectors, self.settings)
            self.selection = training.select_epoch(
                adapter,
                runs,
                self.settings,
                negatives=negatives,
                show_progress=self.show_progress,
            )
            self._log(self.selection)
            if self.selection.kept:
                self._train(adapter, vectors, negatives)
        judged = train_data if validation is None else validation
        qrels = (vectors if held_out is None else held_out).qrels
        if self.selection.kept and held_out is not None:
            rows = training.retrieved(adapter, held_out, self.settings.sides)
            adapted = training.ids_of(held_out, rows)
        else:
            adapted = self.selection.adapted
        self.report = self._report(judged, qrels, adapted)
        self._save(adapter, cache, train_data, validation, vectors.dimension)
        return self.report

    def get_finetuned_model(self, **model_kwargs: Any) -> AdapterEmbeddingModel:
        """Return the embedding model with the adapter on top, for LlamaIndex.

        Args:
            model_kwargs: passed on to `AdapterEmbeddingModel`.

        Raises:
            ArtifactError: nothing has been trained into `model_output_path` yet, or the
                adapter was trained for another embedding model.
        """
        from ft_adapter.embedding import AdapterEmbeddingModel

        given = {"device": self.device, **model_kwargs}
        # Whoever names the class reads the folder with it.
        source = self.model_output_path if "adapter_cls" in given else self._saved()
        return AdapterEmbeddingModel(self.embed_model, source, **given)

    def get_finetuned_retriever(
        self, index_or_retriever: VectorStoreIndex | VectorIndexRetriever, **kwargs: Any
    ) -> AdaptedRetriever:
        """Return a retriever over the index as it is, whose queries go through the adapter.

        Args:
            index_or_retriever: a `VectorStoreIndex` or `VectorIndexRetriever`; not changed.
            kwargs: of `index.as_retriever`, such as `similarity_top_k` and `filters`.
        """
        from ft_adapter.retriever import AdaptedRetriever

        return AdaptedRetriever(index_or_retriever, self.get_finetuned_model(), **kwargs)

    def _vectors(
        self,
        cache: VectorCache,
        train_data: EmbeddingQAFinetuneDataset,
        validation: EmbeddingQAFinetuneDataset | None,
    ) -> tuple[Vectors, Vectors | None]:
        from ft_adapter.index_vectors import given_vectors, index_vectors
        from ft_adapter.vectors import embedded, from_index

        stored: IndexVectors | None = None
        if self._document_vectors is not None:
            stored = given_vectors(self._document_vectors)
        elif self._index is not None:
            stored = index_vectors(self._index)

        def of(data: EmbeddingQAFinetuneDataset) -> Vectors:
            if stored is None:
                return embedded(data, cache, self.show_progress)
            return from_index(data, stored, cache, self.show_progress, check=self._check_index)

        vectors = of(train_data)
        if self.dim is not None and self.dim != vectors.dimension:
            raise ArgumentError(
                "dim", f"is {self.dim}, but embed_model gives dimension {vectors.dimension}"
            )
        return vectors, None if validation is None else of(validation)

    def _hard_negatives(
        self, dataset: EmbeddingQAFinetuneDataset, vectors: Vectors
    ) -> Mapping[str, Sequence[str]] | None:
        from ft_adapter.negatives import mined

        negatives: Mapping[str, Sequence[str]] | None = None
        if isinstance(self.negatives, Mapping):
            negatives = _checked_negatives(self.negatives, vectors)
        elif self.negatives or self.settings.loss == "hard_negatives":
            count = self.negatives or _DEFAULT_NEGATIVES
            negatives = mined(dataset, vectors, count, self.settings.seed)
        if self.settings.loss == "hard_negatives" and not any((negatives or {}).values()):
            raise ArgumentError(
                "negatives",
                "none was found for any question; the corpus is too small or too uniform, use "
                'loss="full_corpus"',
            )
        return negatives

    def _folds(self, dataset: EmbeddingQAFinetuneDataset, vectors: Vectors) -> list[HeldOut]:
        from ft_adapter.training import HeldOut
        from ft_core.splits import split_by_query

        count = min(self.settings.folds, len(dataset.queries))
        fractions = {str(number): 1.0 for number in range(count)}
        try:
            parts = split_by_query(dataset, fractions, seed=self.settings.seed)
        except DatasetError:
            raise DatasetError(
                f"its questions are too much alike for {count} folds that share none; pass other "
                "questions as val_dataset, or fewer folds"
            ) from None
        row = {query: number for number, query in enumerate(vectors.query_ids)}
        folds = []
        for part in parts.values():
            out = {row[query] for query in part.queries}
            rest = [number for number in range(len(row)) if number not in out]
            folds.append(HeldOut(vectors.select(rest), vectors.select(sorted(out))))
        return folds

    def _adapter(self, dimension: int) -> Any:
        import copy

        from ft_adapter import adapters
        from ft_core.training import device_named

        made: dict[str, Callable[[], Any]] = {
            "linear": lambda: adapters.LinearLayer(dimension, dimension, bias=self.bias),
            "low_rank": lambda: adapters.LowRankLayer(
                dimension, min(32, dimension), bias=self.bias
            ),
            "residual": lambda: adapters.ResidualNN(dimension),
            "two_layer": lambda: adapters.TwoLayerNN(
                dimension, dimension, dimension, add_residual=True
            ),
        }
        given = self.adapter_model
        adapter = made[given]() if isinstance(given, str) else copy.deepcopy(given)
        return adapter.to(device_named(self.device))

    def _train(
        self, adapter: Any, vectors: Vectors, negatives: Mapping[str, Sequence[str]] | None
    ) -> None:
        """Train in place, on all of the data, for as many epochs as were found best."""
        from ft_adapter.saved import save_adapter
        from ft_adapter.training import trained

        def checkpoint(step: int) -> None:
            if self.model_checkpoint_path and step % self.checkpoint_save_steps == 0:
                folder = Path(self.model_checkpoint_path) / f"step_{step}"
                save_adapter(folder, adapter, sides=self.settings.sides)

        assert self.selection is not None
        training = trained(
            adapter, vectors, self.settings, negatives=negatives, after_step=checkpoint
        )
        for epoch in training:
            if epoch == self.selection.epochs:
                break

    def _log(self, selection: Selection) -> None:
        if self.verbose:
            for epoch, gain in enumerate(selection.curve, start=1):
                logger.info("epoch %d: held-out %s %+.4f", epoch, self.settings.metric, gain)
        if not selection.kept:
            logger.warning(
                "no epoch is better than the identity on held-out questions (best: epoch %d, "
                "%s %+.4f, p = %.3f): the identity is kept. More questions help most",
                selection.epochs,
                self.settings.metric,
                selection.gain,
                selection.p_value,
            )

    def _report(
        self,
        dataset: EmbeddingQAFinetuneDataset,
        qrels: Mapping[str, Mapping[str, int]],
        adapted: dict[str, list[str]],
    ) -> Report:
        from ft_adapter.evaluation import IDENTITY, scored
        from ft_core.evaluation import DEFAULT_METRICS
        from ft_core.report import Report

        assert self.selection is not None
        metrics = list(dict.fromkeys([*DEFAULT_METRICS, self.settings.metric]))
        evaluations = [
            scored(name, dataset, qrels, rankings, metrics=metrics)
            for name, rankings in ((IDENTITY, self.selection.identity), ("adapter", adapted))
        ]
        decided = "the adapter is kept" if self.selection.kept else "the identity is kept"
        return Report(
            evaluations,
            dataset,
            title=f"Identity and adapter on held-out questions: {decided}",
            primary=self.settings.metric,
        )

    def _save(
        self,
        adapter: Any,
        cache: VectorCache,
        train_data: EmbeddingQAFinetuneDataset,
        validation: EmbeddingQAFinetuneDataset | None,
        dimension: int,
    ) -> None:
        from ft_adapter.adapters import LinearLayer
        from ft_adapter.saved import LIBRARIES, base_of, save_adapter
        from ft_adapter.vector_cache import PROBE_TEXT

        assert self.selection is not None
        # A query: the model of an index of 50,000 nodes is never asked for a document.
        probe = cache.embed({"probe": PROBE_TEXT}, "query", show_progress=False)[0]
        base = base_of(self.embed_model, probe)
        data = {"train": train_data.content_hash}
        if validation is not None:
            data["validation"] = validation.content_hash
        manifest = Manifest(
            kind=self.kind,
            base_model=base.name,
            data=data,
            settings=self._settings(),
            metrics={
                "kept": "adapter" if self.selection.kept else "identity",
                "metric": self.settings.metric,
                "gain": self.selection.gain,
                "p_value": self.selection.p_value,
                "epochs": self.selection.epochs,
            },
            versions=library_versions(LIBRARIES),
        )
        identity = not self.selection.kept
        save_adapter(
            self.model_output_path,
            LinearLayer(dimension, dimension) if identity else adapter,
            sides="query" if identity else self.settings.sides,
            base=base,
            manifest=manifest,
            identity=identity,
        )

    def _settings(self) -> dict[str, Any]:
        given = self.adapter_model
        negatives = self.negatives
        return {
            **self.settings.to_dict(),
            "adapter_model": given if isinstance(given, str) else type(given).__name__,
            "bias": self.bias,
            "negatives": (
                content_hash({query: list(named) for query, named in negatives.items()})
                if isinstance(negatives, Mapping)
                else negatives
            ),
            "documents": "dataset" if self._index is None else "index",
        }

    def _saved(self) -> SavedAdapter:
        """Read `model_output_path`; an adapter of the user's own needs the instance given."""
        from ft_adapter.adapters import BUILT_IN
        from ft_adapter.saved import load_adapter

        given = self.adapter_model
        if isinstance(given, str) or type(given) in BUILT_IN.values():
            return load_adapter(self.model_output_path)
        return load_adapter(self.model_output_path, adapter=given)


def _check_enough(dataset: EmbeddingQAFinetuneDataset) -> None:
    answers = {document for ids in dataset.relevant_docs.values() for document in ids}
    if len(dataset.queries) < 2 or len({dataset.corpus[document] for document in answers}) < 2:
        raise DatasetError(
            f"{len(dataset.queries)} question(s) about {len(answers)} document(s): training "
            "needs at least two questions with different answers, and hundreds to help"
        )


def _warn_of_overlap(
    train_data: EmbeddingQAFinetuneDataset, validation: EmbeddingQAFinetuneDataset
) -> None:
    shared = set(train_data.queries.values()) & set(validation.queries.values())
    if shared:
        logger.warning(
            "%d questions of val_dataset are in the training data too: what it says will be "
            "too good, and the adapter may be kept where it harms",
            len(shared),
        )


def _checked_negatives(
    negatives: Mapping[str, Sequence[str]], vectors: Vectors
) -> Mapping[str, Sequence[str]]:
    for query, documents in negatives.items():
        if query not in vectors.qrels:
            raise ArgumentError("negatives", f"there is no query {query!r} in the dataset")
        for document in documents:
            if document not in vectors.rows:
                raise ArgumentError("negatives", f"there is no document {document!r} ({query!r})")
    return negatives


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch for the block; the app's own random state is as it was afterwards."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
