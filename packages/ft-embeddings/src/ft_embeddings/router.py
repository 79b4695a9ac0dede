"""Fine-tune which of several tools a question goes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_core.artifacts import read_manifest
from ft_core.choices import choice_text
from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.errors import ArgumentError, DatasetError
from ft_embeddings.engine import SentenceTransformersFinetuneEngine, load_embedding

if TYPE_CHECKING:
    from ft_core.report import Report
    from ft_embeddings.selector import EmbeddingSelector

KIND = "router"

DEFAULTS = {"metric": "hit_rate@1", "epochs": 6, "base_weight": 0.0, "frozen_share": 0.0}
"""Every choice is seen in training, so there is nothing unseen to hold the base back for."""


class RouterFinetuneEngine:
    """Fine-tune an embedding model to pick the right choice, and return it as a selector.

    Every choice is a negative in every batch, which is affordable because choices are few
    and short.

    Args:
        choices: tools, their metadata, or descriptions, as a `RouterQueryEngine` has them.
        examples: questions for each choice, by the choice's name, or by its description
            where it has no name.
        model_id: hub name or folder of a sentence-transformers model.
        model_output_path: folder for the trained model, as in
            `SentenceTransformersFinetuneEngine`.
        val_examples: held-out questions in the same form; with them `finetune` reports the
            match rate (`hit_rate@1`) before and after.
        settings: further arguments of `SentenceTransformersFinetuneEngine`.

    Raises:
        ArgumentError: two choices read the same, or a choice has no text.
    """

    def __init__(
        self,
        choices: Sequence[Any],
        examples: Mapping[str, Sequence[str]] | None,
        model_id: str = "BAAI/bge-small-en",
        model_output_path: str = "router",
        *,
        val_examples: Mapping[str, Sequence[str]] | None = None,
        **settings: Any,
    ) -> None:
        self.choices = [getattr(choice, "metadata", choice) for choice in choices]
        self.model_output_path = model_output_path
        dataset = None if examples is None else self._dataset(examples, "examples")
        validation = None if val_examples is None else self._dataset(val_examples, "val_examples")
        self._engine = SentenceTransformersFinetuneEngine(
            dataset,
            model_id,
            model_output_path,
            val_dataset=validation,
            **{**DEFAULTS, **settings},
        )
        self._engine.kind = KIND
        self._engine.every_document = True

    def finetune(self) -> Report | None:
        """Train and save; see `SentenceTransformersFinetuneEngine.finetune`."""
        return self._engine.finetune()

    def get_finetuned_model(self, **model_kwargs: Any) -> EmbeddingSelector:
        """Return a selector for `RouterQueryEngine(selector=...)`.

        Args:
            model_kwargs: passed on to `HuggingFaceEmbedding`.

        Raises:
            ArtifactError: nothing has been trained into `model_output_path` yet.
        """
        from ft_embeddings.selector import EmbeddingSelector

        return EmbeddingSelector(load_embedding(self.model_output_path, KIND, **model_kwargs))

    @classmethod
    def load(cls, folder: Path | str) -> RouterFinetuneEngine:
        """Bring back an engine from its saved folder, without the training data.

        Raises:
            ArtifactError: the folder is missing, damaged, or holds no router.
        """
        return cls([], None, read_manifest(folder, KIND).base_model, str(folder))

    def _dataset(
        self, examples: Mapping[str, Sequence[str]], argument: str
    ) -> EmbeddingQAFinetuneDataset:
        texts = [choice_text(choice) for choice in self.choices]
        if len(set(texts)) < len(texts):
            twice = next(text for text in texts if texts.count(text) > 1)
            raise ArgumentError("choices", f"two choices read {twice!r}: no text tells them apart")
        names = [getattr(choice, "name", None) or choice_text(choice) for choice in self.choices]
        queries: dict[str, str] = {}
        relevant: dict[str, list[str]] = {}
        for name, questions in examples.items():
            if name not in names:
                raise ArgumentError(argument, f"{name!r} is not the name of a choice")
            for question in questions:
                query = f"{name}/{len(queries)}"
                queries[query] = question
                relevant[query] = [str(names.index(name))]
        corpus = {str(index): text for index, text in enumerate(texts)}
        try:
            return EmbeddingQAFinetuneDataset(
                queries=queries, corpus=corpus, relevant_docs=relevant
            )
        except DatasetError as error:
            raise error.at(argument) from None
