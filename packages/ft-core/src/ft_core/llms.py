"""LLMs by a short name, as commands take them: `load_llm("openai:gpt-4o-mini")`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ft_core.errors import ArgumentError, first_line
from ft_core.extras import import_extra

if TYPE_CHECKING:
    from llama_index.core.llms import LLM

SPEC_HELP = "openai:MODEL, openai-like:MODEL@URL or local:PATH_OR_HUB_NAME"
"""What a spec may be, for help texts and errors."""

_CONTEXT_WINDOW = 32_768  # of an OpenAI-like server, which does not tell


def load_llm(
    spec: str,
    *,
    max_tokens: int | None = None,
    max_retries: int | None = None,
    stop: Sequence[str] | None = None,
    **kwargs: Any,
) -> LLM:
    """Make a LlamaIndex LLM from a short name.

    - `openai:MODEL`: OpenAI's API, with the key in `OPENAI_API_KEY`.
    - `openai-like:MODEL@URL`: any server that speaks OpenAI's chat API (vLLM, Ollama,
      llama.cpp, LM Studio), at its base URL; the key in `OPENAI_API_KEY` if it wants one.
    - `local:PATH_OR_HUB_NAME`: a model in this process, by transformers, with its own chat
      template and greedy decoding, on a GPU where there is one.

    Args:
        spec: one of the above.
        max_tokens: the longest answer; None is the server's default, and 256 for a local model.
        max_retries: tries that the client makes by itself; None is its default. A local model
            has none.
        stop: texts at which an answer ends.
        kwargs: further arguments of the LLM's class (`OpenAI`, `OpenAILike`,
            `ft_core.sft.LocalLLM`), for example `temperature`.

    Raises:
        ArgumentError: the spec is none of these, the URL or the key is missing, or there is
            no such local model.
        MissingExtraError: the extra `ft-core[openai]` or `ft-core[local]` is not installed.
    """
    scheme, _, name = spec.partition(":")
    loader = _LOADERS.get(scheme)
    if loader is None:
        raise ArgumentError("llm", f"{spec!r} is none of {SPEC_HELP}")
    if not name.strip():
        raise ArgumentError("llm", f"{spec!r} names no model; write {SPEC_HELP}")
    return loader(name, max_tokens, max_retries, stop, kwargs)


def _openai(
    name: str,
    max_tokens: int | None,
    max_retries: int | None,
    stop: Sequence[str] | None,
    kwargs: dict[str, Any],
) -> LLM:
    module = import_extra("llama_index.llms.openai", "ft-core[openai]")
    if not (kwargs.get("api_key") or os.environ.get("OPENAI_API_KEY")):
        raise ArgumentError("llm", f"openai:{name} needs a key: set OPENAI_API_KEY")
    settings = _service_settings(max_tokens, max_retries, stop, kwargs)
    try:
        llm: LLM = module.OpenAI(model=name, **settings)
        _ = llm.metadata  # looks the model's context window up
    except ValueError as error:
        raise ArgumentError(
            "llm",
            f"openai:{name}: {first_line(error)}; for a model that LlamaIndex does not know, "
            f"write openai-like:{name}@URL",
        ) from None
    return llm


def _openai_like(
    name: str,
    max_tokens: int | None,
    max_retries: int | None,
    stop: Sequence[str] | None,
    kwargs: dict[str, Any],
) -> LLM:
    match = re.fullmatch(r"(?P<model>.+?)@(?P<url>https?://.+)", name)
    if match is None:
        raise ArgumentError(
            "llm",
            f"openai-like:{name} has no URL; write openai-like:MODEL@URL, for example "
            "openai-like:qwen3@http://localhost:8000/v1",
        )
    module = import_extra("llama_index.llms.openai_like", "ft-core[openai]")
    defaults = {
        "api_key": os.environ.get("OPENAI_API_KEY") or "none",
        "is_chat_model": True,
        "context_window": _CONTEXT_WINDOW,
    }
    settings = defaults | _service_settings(max_tokens, max_retries, stop, kwargs)
    llm: LLM = module.OpenAILike(model=match["model"], api_base=match["url"], **settings)
    return llm


def _local(
    name: str,
    max_tokens: int | None,
    max_retries: int | None,
    stop: Sequence[str] | None,
    kwargs: dict[str, Any],
) -> LLM:
    # Its own import error is no help: it is the extra that is missing.
    for module in ("torch", "transformers"):
        import_extra(module, "ft-core[local]")
    from ft_core.sft.llm import LocalLLM

    settings = dict(kwargs)
    if max_tokens is not None:
        settings["max_new_tokens"] = max_tokens
    try:
        llm: LLM = LocalLLM.from_pretrained(name, **{"stop": list(stop or ()), **settings})
    except ArgumentError as error:
        raise ArgumentError("llm", f"local:{error}") from None
    return llm


_LOADERS: dict[str, Callable[..., LLM]] = {
    "openai": _openai,
    "openai-like": _openai_like,
    "local": _local,
}


def _service_settings(
    max_tokens: int | None,
    max_retries: int | None,
    stop: Sequence[str] | None,
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if max_tokens is not None:
        settings["max_tokens"] = max_tokens
    if max_retries is not None:
        settings["max_retries"] = max_retries
    if stop:
        settings["additional_kwargs"] = {"stop": list(stop), **kwargs.pop("additional_kwargs", {})}
    return settings | kwargs
