"""An embedding model of a LlamaIndex app with an adapter behind it."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from llama_index.core.async_utils import run_jobs
from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from llama_index.core.utils import get_tqdm_iterable, infer_torch_device
from pydantic import BaseModel, Field, PrivateAttr
from typing_extensions import Self

from ft_core.errors import ArgumentError, FTError

if TYPE_CHECKING:
    from llama_index.core.callbacks import CallbackManager
    from torch import nn

    from ft_adapter.saved import SavedAdapter

logger = logging.getLogger(__name__)

_PASSED_ON = ("callback_manager", "embeddings_cache", "rate_limiter", "num_workers")
"""Assigned here, they are the base model's: it is the one that embeds."""


class AdapterEmbeddingModel(BaseEmbedding):
    """A base embedding model whose vectors go through an adapter: by default those of queries.

    ```python
    embed_model = AdapterEmbeddingModel(base, "adapter")
    index.as_retriever(embed_model=embed_model)  # the vectors in the index stay as they are
    ```

    All embedding is left to the public methods of the base model, so its batching, callbacks,
    events, cache and rate limits work as they do without an adapter, once per call; a cache
    holds the base model's vectors. An adapted vector has the norm of the base model's, unless
    the predecessor wrote the folder: then it is what the predecessor gave.

    Where only queries are adapted and that fails, at whatever point, the base model's own
    vector is returned, which fits the index as well; the first failure is logged.

    Args:
        base_embed_model: the model that the adapter was trained for.
        adapter_path: a saved folder, or an adapter itself, of which a copy is taken.
        adapter_cls: its class, where that is not of this pack; for one that cannot say its
            arguments (`get_config_dict`), an instance of the same shape.
        transform_query: adapt queries.
        device: `cpu`, `cuda`, `mps`; by default the best that there is.
        embed_batch_size: how many texts the base model gets at once; one larger than its own
            changes nothing. By default its own.
        callback_manager: takes the place of the base model's.
        transform_text: adapt documents too; the index must then be built with this model. By
            default what the adapter was trained for, of an adapter itself no.
        enabled: see the attribute.
        check_base: embed one short text to see that the base model is the one that a saved
            adapter was trained for.

    Raises:
        ArgumentError: an argument is of the wrong kind, or the adapter changes the dimension
            of queries only.
        ArtifactError: the folder cannot be used, or was trained for another base model.
        FTError: when embedding: documents are adapted too, and the adapter fails or gives a
            vector that is not finite.
    """

    enabled: bool = Field(
        default=True, description="Switch at any time: False gives the base model's vectors."
    )

    _base_embed_model: Any = PrivateAttr()
    _adapter: Any = PrivateAttr()
    _identity: bool = PrivateAttr()
    _keeps_norm: bool = PrivateAttr()
    _transform_query: bool = PrivateAttr()
    _transform_text: bool = PrivateAttr()
    _wanted_device: str | None = PrivateAttr()
    _device: str = PrivateAttr()
    _digest: str | None = PrivateAttr(default=None)
    _has_failed: bool = PrivateAttr(default=False)

    def __init__(
        self,
        base_embed_model: BaseEmbedding,
        adapter_path: Path | str | nn.Module | SavedAdapter,
        adapter_cls: type[nn.Module] | nn.Module | None = None,
        transform_query: bool = True,
        device: str | None = None,
        embed_batch_size: int | None = None,
        callback_manager: CallbackManager | None = None,
        *,
        transform_text: bool | None = None,
        enabled: bool = True,
        check_base: bool = True,
    ) -> None:
        if not isinstance(base_embed_model, BaseEmbedding):
            raise ArgumentError(
                "base_embed_model",
                f"is a LlamaIndex embedding model, not a {type(base_embed_model).__name__}",
            )
        adapter, saved = _resolve(adapter_path, adapter_cls)
        if transform_text is None:
            transform_text = saved is not None and saved.sides == "both"
        if not transform_text:
            _check_square(adapter)
        super().__init__(
            model_name=f"Adapter for {base_embed_model.model_name}",
            embed_batch_size=embed_batch_size or base_embed_model.embed_batch_size,
            callback_manager=base_embed_model.callback_manager,
            num_workers=base_embed_model.num_workers,
            enabled=enabled,
        )
        self._base_embed_model = base_embed_model
        self._adapter = adapter
        self._identity = saved is not None and saved.identity
        self._keeps_norm = saved is None or not saved.legacy
        self._transform_query = transform_query
        self._transform_text = transform_text
        self._wanted_device = device
        self._place()
        if callback_manager is not None:
            self.callback_manager = callback_manager
        if saved is not None and check_base:
            from ft_adapter.saved import check_base as check

            check(saved, base_embed_model)

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex serializes."""
        return "AdapterEmbeddingModel"

    @property
    def base_embed_model(self) -> BaseEmbedding:
        """The model that embeds."""
        return self._base_embed_model

    @property
    def transform_query(self) -> bool:
        """Whether queries are adapted."""
        return self._transform_query

    @property
    def transform_text(self) -> bool:
        """Whether documents are adapted, so that an index has to be built with this model."""
        return self._transform_text

    def around(self, base_embed_model: BaseEmbedding) -> Self:
        """Return the same adapter around another object of its base model.

        The new model has an `enabled` of its own; the base model is not checked again.
        """
        other = copy.copy(self)
        other._base_embed_model = base_embed_model
        other.model_name = f"Adapter for {base_embed_model.model_name}"
        other.embed_batch_size = base_embed_model.embed_batch_size
        for name in _PASSED_ON:
            setattr(other, name, getattr(base_embed_model, name))
        return other

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Describe the model, with what its vectors depend on: caches are keyed by this."""
        data: dict[str, Any] = super().to_dict(**kwargs)
        if self._digest is None:
            self._digest = _digest(self._adapter)
        return data | {
            "base_embed_model": self._base_embed_model.to_dict(**kwargs),
            "adapter": "identity" if self._identity else self._digest,
            "transform_query": self._transform_query,
            "transform_text": self._transform_text,
            "keeps_norm": self._keeps_norm,
        }

    # --- The adapter -------------------------------------------------------------------------

    def adapt(self, vectors: Sequence[Sequence[float]]) -> list[list[float]]:
        """Return the adapter's vector for each of the base model's, whatever `enabled` says.

        Args:
            vectors: the base model's, n of the same dimension.

        Raises:
            FTError: the adapter fails, or gives a vector that is not finite.
        """
        if not len(vectors):
            return []
        if self._identity:
            return [[float(number) for number in vector] for vector in vectors]
        try:
            return self._forward(vectors)
        except FTError:
            raise
        except Exception as error:
            raise FTError(
                f"the adapter failed on vectors of the base model: {error}; check that it was "
                f"trained for {self._base_embed_model.model_name!r}"
            ) from error

    def adapt_query(self, vector: Embedding) -> Embedding:
        """Return what a query with this vector of the base model is searched with.

        That is the vector itself while the model is not `enabled`, where queries are not
        adapted, and where only queries are adapted and that fails.

        Raises:
            FTError: the adapter fails, and documents are adapted too.
        """
        if not (self.enabled and self._transform_query) or self._identity:
            return vector
        try:
            return self.adapt([vector])[0]
        except FTError:
            if self._transform_text:  # the base model's vector is of another space
                raise
            if not self._has_failed:
                self._has_failed = True
                logger.warning(
                    "The adapter failed; queries are searched with the base model's vector. "
                    "Later failures are not logged.",
                    exc_info=True,
                )
            return vector

    @property
    def _adapts_texts(self) -> bool:
        return self.enabled and self._transform_text and not self._identity

    def _adapt_texts(self, vectors: list[Embedding]) -> list[Embedding]:
        return self.adapt(vectors) if self._adapts_texts else vectors

    def _forward(self, vectors: Sequence[Sequence[float]]) -> list[list[float]]:
        """Map vectors (n, d), all at once."""
        import torch

        matrix = torch.from_numpy(np.array(vectors, dtype=np.float32)).to(self._device)
        weight = next(self._adapter.parameters(), matrix)
        with torch.inference_mode():
            result = self._adapter(matrix.to(weight.dtype))
        wanted = (len(matrix), result.shape[-1] if self._transform_text else matrix.shape[1])
        if result.shape != wanted:
            raise FTError(
                f"the adapter maps vectors of shape {tuple(matrix.shape)} to "
                f"{tuple(result.shape)}, expected {wanted}; check the adapter"
            )
        result = result.float()
        if self._keeps_norm:
            # So that scores by inner product stay comparable with other retrievers'.
            norms = matrix.norm(dim=1, keepdim=True)
            result = torch.where(norms == 0, 0, result * (norms / result.norm(dim=1, keepdim=True)))
        if not torch.isfinite(result).all():
            raise FTError("the adapter gave a vector that is zero or not finite; train it again")
        numbers: list[list[float]] = result.tolist()
        return numbers

    def _place(self) -> None:
        self._device = self._wanted_device or infer_torch_device()
        try:
            self._adapter = self._adapter.to(self._device)
        except Exception as error:  # of an unknown or absent device, torch raises several types
            reason = str(error).partition("\n")[0]
            raise ArgumentError("device", f"{self._device!r} cannot be used: {reason}") from None

    # --- Embedding: the base model's public methods, then the adapter ------------------------

    def get_query_embedding(self, query: str) -> Embedding:
        """Embed a query."""
        return self.adapt_query(self._base_embed_model.get_query_embedding(query))

    async def aget_query_embedding(self, query: str) -> Embedding:
        """Embed a query."""
        return self.adapt_query(await self._base_embed_model.aget_query_embedding(query))

    def get_agg_embedding_from_queries(
        self, queries: list[str], agg_fn: Callable[..., Embedding] | None = None
    ) -> Embedding:
        """Embed several wordings of a query as one; the base model's aggregate is adapted."""
        return self.adapt_query(
            self._base_embed_model.get_agg_embedding_from_queries(queries, agg_fn)
        )

    async def aget_agg_embedding_from_queries(
        self, queries: list[str], agg_fn: Callable[..., Embedding] | None = None
    ) -> Embedding:
        """Embed several wordings of a query as one; the base model's aggregate is adapted."""
        return self.adapt_query(
            await self._base_embed_model.aget_agg_embedding_from_queries(queries, agg_fn)
        )

    def get_text_embedding(self, text: str) -> Embedding:
        """Embed a document."""
        return self._adapt_texts([self._base_embed_model.get_text_embedding(text)])[0]

    async def aget_text_embedding(self, text: str) -> Embedding:
        """Embed a document."""
        return self._adapt_texts([await self._base_embed_model.aget_text_embedding(text)])[0]

    def get_text_embedding_batch(
        self, texts: list[str], show_progress: bool = False, **kwargs: Any
    ) -> list[Embedding]:
        """Embed documents, in batches."""
        base = self._base_embed_model
        chunks = self._chunks(texts)
        if len(chunks) == 1:
            vectors = base.get_text_embedding_batch(texts, show_progress=show_progress, **kwargs)
        else:
            vectors = []
            for chunk in get_tqdm_iterable(chunks, show_progress, "Generating embeddings"):
                vectors += base.get_text_embedding_batch(chunk, **kwargs)
        return self._adapt_texts(vectors)

    async def aget_text_embedding_batch(
        self, texts: list[str], show_progress: bool = False, **kwargs: Any
    ) -> list[Embedding]:
        """Embed documents, in batches."""
        embed = self._base_embed_model.aget_text_embedding_batch
        chunks = self._chunks(texts)
        vectors: list[Embedding]
        if len(chunks) == 1:
            vectors = await embed(texts, show_progress=show_progress, **kwargs)
        else:
            parts = await run_jobs(
                [embed(chunk, **kwargs) for chunk in chunks],
                show_progress=show_progress,
                # As many at once as the base model sends by itself.
                workers=self._base_embed_model.num_workers or len(chunks),
                desc="Generating embeddings",
            )
            vectors = [vector for part in parts for vector in part]
        if not self._adapts_texts:
            return vectors
        return await asyncio.to_thread(self._adapt_texts, vectors)

    def _chunks(self, texts: list[str]) -> list[list[str]]:
        """Cut the texts where this model's batches are smaller than the base model's."""
        size = self.embed_batch_size
        if size >= self._base_embed_model.embed_batch_size or len(texts) <= size:
            return [texts]
        return [texts[start : start + size] for start in range(0, len(texts), size)]

    # What LlamaIndex's own public methods would call; here, what others may call directly.

    def _get_query_embedding(self, query: str) -> Embedding:
        return self.get_query_embedding(query)

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return await self.aget_query_embedding(query)

    def _get_text_embedding(self, text: str) -> Embedding:
        return self.get_text_embedding(text)

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return await self.aget_text_embedding(text)

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return self.get_text_embedding_batch(texts)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await self.aget_text_embedding_batch(texts)

    # --- Assignment and pickling -------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _PASSED_ON:
            setattr(self._base_embed_model, name, value)

    def __getstate__(self) -> dict[str, Any]:
        # Not LlamaIndex's own: it leaves out, in silence and of the living object too, what
        # cannot be pickled. Of the base model, which does that, a copy is pickled.
        state: dict[str, Any] = BaseModel.__getstate__(self)
        fields = {k: v for k, v in state["__dict__"].items() if k not in _PASSED_ON}
        private = state["__pydantic_private__"] | {
            "_base_embed_model": copy.copy(self._base_embed_model)
        }
        if self._device != "cpu":  # the process that reads it may have no such device
            private["_adapter"] = copy.deepcopy(self._adapter).cpu()
        return state | {"__dict__": fields, "__pydantic_private__": private}

    def __setstate__(self, state: dict[str, Any]) -> None:
        BaseModel.__setstate__(self, state)
        for name in _PASSED_ON:
            super().__setattr__(name, getattr(self._base_embed_model, name))
        self._place()


def _resolve(
    source: Any, adapter_cls: type[nn.Module] | nn.Module | None
) -> tuple[nn.Module, SavedAdapter | None]:
    """Return an adapter that nobody else changes, and what its folder says of it."""
    from torch import nn

    from ft_adapter.saved import SavedAdapter, load_adapter

    if isinstance(source, nn.Module):
        return copy.deepcopy(source).eval(), None
    if isinstance(source, SavedAdapter):
        return copy.deepcopy(source.adapter).eval(), source
    if not isinstance(source, str | Path):
        raise ArgumentError(
            "adapter_path",
            f"is the folder of an adapter, or a torch.nn.Module, not a {type(source).__name__}",
        )
    if isinstance(adapter_cls, nn.Module):
        saved = load_adapter(source, adapter=adapter_cls)
    else:
        saved = load_adapter(source, adapter_cls)
    return saved.adapter, saved


def _check_square(adapter: nn.Module) -> None:
    """Refuse an adapter whose queries no index of the base model's vectors could be asked."""
    sizes = [getattr(adapter, name, None) for name in ("in_features", "out_features")]
    if None not in sizes and sizes[0] != sizes[1]:
        raise ArgumentError(
            "transform_text",
            f"the adapter maps dimension {sizes[0]} to {sizes[1]}, so documents must be adapted "
            "too: pass transform_text=True and build the index with this model",
        )


def _digest(adapter: nn.Module) -> str:
    """Return a hash of all that makes up an adapter."""
    import torch

    config = adapter.get_config_dict() if hasattr(adapter, "get_config_dict") else None
    digest = hashlib.sha256(f"{type(adapter).__qualname__} {config}".encode())
    for name, value in sorted(adapter.state_dict().items()):
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
