"""Indices that an app persisted, as commands take them: `--index FOLDER`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ft_core.errors import ArgumentError

if TYPE_CHECKING:
    from llama_index.core import VectorStoreIndex
    from llama_index.core.base.embeddings.base import BaseEmbedding


def load_index(
    folder: Path,
    embed_model: BaseEmbedding | None,
    *,
    option: str = "--index",
    model_option: str = "--embed-model",
) -> VectorStoreIndex:
    """Load the vector index that `index.storage_context.persist(folder)` wrote.

    Args:
        folder: it holds this one index.
        embed_model: what the index was built with; queries are embedded with it. None raises,
            so that a command need not look whether it was given one.
        option: what the user gave the folder as, for errors.
        model_option: what the user gives the embedding model as, for errors.

    Raises:
        ArgumentError: the embedding model is missing, or the folder holds no such index.
    """
    from llama_index.core import StorageContext, VectorStoreIndex, load_index_from_storage

    if embed_model is None:
        raise ArgumentError(
            option, f"needs the embedding model that it was built with, as {model_option}"
        )
    # What LlamaIndex logs while it reads a folder says nothing that the error does not.
    logger = logging.getLogger("llama_index.core.indices.loading")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        storage = StorageContext.from_defaults(persist_dir=str(folder))
        index = load_index_from_storage(storage, embed_model=embed_model)
    except (OSError, ValueError, KeyError) as error:
        raise ArgumentError(
            option, f"{folder} is no folder that one index was persisted to: {error}"
        ) from None
    finally:
        logger.setLevel(level)
    if not isinstance(index, VectorStoreIndex):
        raise ArgumentError(option, f"{folder} holds a {type(index).__name__}, no vector index")
    return index
