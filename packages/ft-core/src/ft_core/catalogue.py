"""The packs that exist, known by name only: what `ft --help` says one could install."""

from __future__ import annotations

from importlib import metadata

PACKS = {
    "ft-embeddings": "Fine-tune the embedding model, or the router, of an app",
    "ft-adapter": "Improve any embedding model by a small adapter, without re-indexing",
    "ft-openai-distill": "Distil the LLM of an app into a cheaper student, hosted or your own",
    "ft-judge": "Fine-tune the judge that evaluates an app",
    "ft-crossencoder": "Fine-tune the reranker of an app",
    "ft-cohere-rerank": "Fine-tune, teach from and record Cohere's reranker",
    "ft-text2sql": "Fine-tune a model to write SQL for your database",
}
"""Distribution name to a one-line summary."""


def installed_version(distribution: str) -> str | None:
    """Return the version of a distribution, or None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
