"""A plain encoder as an embedding model: what it knows of texts before it is a cross-encoder."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr

from ft_core.errors import ArgumentError, first_line
from ft_core.training import has_fast_bf16, quiet_unless_terminal


class EncoderEmbedding(BaseEmbedding):
    """Embeds with an encoder through sentence-transformers, on the device that there is.

    Args:
        model_id: hub name or folder; of a model that has no pooling, its tokens' mean counts.
        device: where to compute.
        trust_remote_code: let the model's repository bring code of its own.

    Raises:
        ArgumentError: the model cannot be loaded.
    """

    _model: Any = PrivateAttr()

    def __init__(
        self, model_id: str, *, device: str | None = None, trust_remote_code: bool = False
    ) -> None:
        from sentence_transformers import SentenceTransformer

        super().__init__(model_name=model_id, embed_batch_size=32)
        try:
            with quiet_unless_terminal():
                self._model = SentenceTransformer(
                    model_id, device=device, trust_remote_code=trust_remote_code
                )
        except Exception as error:
            raise ArgumentError(
                "model_id",
                f"{model_id!r} cannot embed texts: {first_line(error)}; pass embed_model",
            ) from error

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex knows the class by."""
        return "EncoderEmbedding"

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        import torch

        device = self._model.device
        with torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bf16(device)):
            vectors = self._model.encode(
                texts, batch_size=len(texts), convert_to_tensor=True, show_progress_bar=False
            )
        embeddings: list[list[float]] = vectors.float().cpu().tolist()
        return embeddings

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)
