"""Embedding models by a short name, as commands take them: `openai:text-embedding-3-small`."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from ft_core.errors import ArgumentError, first_line
from ft_core.extras import import_extra

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

SPEC_HELP = "openai:MODEL, openai-like:MODEL@URL, or a hub name or folder"
"""What a spec may be, for help texts and errors."""


def load_embed_model(spec: str) -> BaseEmbedding:
    """Make a LlamaIndex embedding model from a short name.

    - `openai:MODEL`: OpenAI's API, with the key in `OPENAI_API_KEY`.
    - `openai-like:MODEL@URL`: any server that speaks OpenAI's embeddings API (vLLM, TEI,
      Ollama), at its base URL; the key in `OPENAI_API_KEY` if it wants one.
    - anything else: the hub name or folder of a sentence-transformers model, in this process.

    Raises:
        ArgumentError: a URL or key is missing, or there is no such model.
        MissingExtraError: the extra that brings the class is not installed.
    """
    scheme, _, name = spec.partition(":")
    if scheme == "openai":
        return _openai(name)
    if scheme == "openai-like":
        return _openai_like(name)
    return _huggingface(spec)


def _openai(name: str) -> BaseEmbedding:
    if not os.environ.get("OPENAI_API_KEY"):
        raise ArgumentError("embed-model", f"openai:{name} needs a key: set OPENAI_API_KEY")
    module = import_extra("llama_index.embeddings.openai", "ft-adapter[openai]")
    try:
        model: BaseEmbedding = module.OpenAIEmbedding(model=name)
    except ValueError as error:
        raise ArgumentError("embed-model", f"openai:{name}: {first_line(error)}") from None
    return model


def _openai_like(name: str) -> BaseEmbedding:
    match = re.fullmatch(r"(?P<model>.+?)@(?P<url>https?://.+)", name)
    if match is None:
        raise ArgumentError(
            "embed-model",
            f"openai-like:{name} has no URL; write openai-like:MODEL@URL, for example "
            "openai-like:bge-m3@http://localhost:8000/v1",
        )
    module = import_extra("llama_index.embeddings.openai_like", "ft-adapter[openai]")
    model: BaseEmbedding = module.OpenAILikeEmbedding(
        model_name=match["model"],
        api_base=match["url"],
        api_key=os.environ.get("OPENAI_API_KEY") or "none",
    )
    return model


def _huggingface(name: str) -> BaseEmbedding:
    module = import_extra("llama_index.embeddings.huggingface", "ft-adapter[huggingface]")
    try:
        model: BaseEmbedding = module.HuggingFaceEmbedding(model_name=name)
    except (OSError, ValueError) as error:
        raise ArgumentError(
            "embed-model", f"{name!r} cannot be loaded: {first_line(error)}; give {SPEC_HELP}"
        ) from None
    return model
