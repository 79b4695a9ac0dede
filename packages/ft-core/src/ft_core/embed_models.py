"""Embedding models by a short name, as commands take them: `openai:text-embedding-3-small`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from ft_core.errors import ArgumentError, first_line
from ft_core.extras import import_extra

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

SPEC_HELP = "openai:MODEL, openai-like:MODEL@URL, or a hub name or folder"
"""What a spec may be, for help texts and errors."""


def load_embed_model(
    spec: str,
    *,
    option: str = "--embed-model",
    pack: str | None = None,
    load_local: Callable[[str], BaseEmbedding] | None = None,
) -> BaseEmbedding:
    """Make a LlamaIndex embedding model from a short name.

    - `openai:MODEL`: OpenAI's API, with the key in `OPENAI_API_KEY`.
    - `openai-like:MODEL@URL`: any server that speaks OpenAI's embeddings API (vLLM, TEI,
      Ollama), at its base URL; the key in `OPENAI_API_KEY` if it wants one.
    - anything else: the hub name or folder of a sentence-transformers model, in this process.

    Args:
        spec: one of the above.
        option: what the user gave the spec as, for errors.
        pack: a distribution whose extras `openai` and `huggingface` bring the classes: an
            error names these where one is missing. By default LlamaIndex's own distributions.
        load_local: makes the model of a hub name or folder; `HuggingFaceEmbedding` by default.

    Raises:
        ArgumentError: a URL or key is missing, or there is no such model.
        MissingExtraError: the distribution that brings the class is not installed.
    """
    scheme, colon, name = spec.partition(":")
    hosted = _HOSTED.get(scheme) if colon else None
    if not (name if hosted else spec).strip():
        raise ArgumentError(option, f"{spec!r} names no model; give {SPEC_HELP}")
    if hosted is not None:
        return hosted(name, option, pack)
    return _local(spec, option, load_local or _hugging_face(pack))


def _openai(name: str, option: str, pack: str | None) -> BaseEmbedding:
    if not os.environ.get("OPENAI_API_KEY"):
        raise ArgumentError(option, f"openai:{name} needs a key: set OPENAI_API_KEY")
    requirement = f"{pack}[openai]" if pack else "llama-index-embeddings-openai"
    module = import_extra("llama_index.embeddings.openai", requirement)
    try:
        model: BaseEmbedding = module.OpenAIEmbedding(model=name)
    except ValueError as error:
        raise ArgumentError(
            option,
            f"openai:{name}: {first_line(error)}; for a model that LlamaIndex does not know, "
            f"write openai-like:{name}@URL",
        ) from None
    return model


def _openai_like(name: str, option: str, pack: str | None) -> BaseEmbedding:
    match = re.fullmatch(r"(?P<model>.+?)@(?P<url>https?://.+)", name)
    if match is None:
        raise ArgumentError(
            option,
            f"openai-like:{name} has no URL; write openai-like:MODEL@URL, for example "
            "openai-like:bge-m3@http://localhost:8000/v1",
        )
    requirement = f"{pack}[openai]" if pack else "llama-index-embeddings-openai-like"
    module = import_extra("llama_index.embeddings.openai_like", requirement)
    model: BaseEmbedding = module.OpenAILikeEmbedding(
        model_name=match["model"],
        api_base=match["url"],
        api_key=os.environ.get("OPENAI_API_KEY") or "none",
    )
    return model


_HOSTED: dict[str, Callable[[str, str, str | None], BaseEmbedding]] = {
    "openai": _openai,
    "openai-like": _openai_like,
}


def _hugging_face(pack: str | None) -> Callable[[str], BaseEmbedding]:
    requirement = f"{pack}[huggingface]" if pack else "llama-index-embeddings-huggingface"
    module = import_extra("llama_index.embeddings.huggingface", requirement)
    return lambda name: module.HuggingFaceEmbedding(model_name=name)


def _local(name: str, option: str, load: Callable[[str], BaseEmbedding]) -> BaseEmbedding:
    try:
        return load(name)
    except (ArgumentError, OSError, ValueError) as error:
        # A loader of ours names its own arguments, which are no options of a command.
        reason = error.__cause__ if isinstance(error, ArgumentError) else error
        raise ArgumentError(
            option, f"{name!r} cannot be loaded: {first_line(reason or error)}; give {SPEC_HELP}"
        ) from None
