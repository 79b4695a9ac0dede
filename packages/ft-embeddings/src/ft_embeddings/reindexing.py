"""Build a new index over the nodes of another one, with another embedding model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ft_core.errors import ArgumentError, FTError

if TYPE_CHECKING:
    from llama_index.core import StorageContext, VectorStoreIndex
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.schema import BaseNode
    from llama_index.core.vector_stores.types import BasePydanticVectorStore

logger = logging.getLogger(__name__)


def reindex(
    index: VectorStoreIndex,
    embed_model: BaseEmbedding,
    *,
    nodes: Sequence[BaseNode] | None = None,
    vector_store: BasePydanticVectorStore | None = None,
    storage_context: StorageContext | None = None,
    batch_size: int = 256,
    show_progress: bool = True,
) -> VectorStoreIndex:
    """Return a new `VectorStoreIndex` over the nodes of `index`, embedded with `embed_model`.

    The old index and its nodes are not touched; go on using it until this returns. Everything
    is embedded before anything is stored, so a model that fails midway leaves nothing behind.
    Ids, metadata, relationships and document hashes stay, so that `refresh_ref_docs` and
    `delete_ref_doc` work on the new index. Nothing is saved: call
    `storage_context.persist` on the new index.

    Args:
        index: its nodes come from its document store, or where the vector store keeps the
            texts (Qdrant, pgvector, ...), from that store's `get_nodes`.
        embed_model: the model of the new index; `Settings.embed_model` stays as it is.
        nodes: take these instead, for a store that cannot list its nodes or lists only some
            (Qdrant's `get_nodes` ends at 9,999).
        vector_store: where the new vectors go; in memory by default.
        storage_context: the same, with stores for nodes and indices of its own.
        batch_size: nodes that are embedded, and stored, at a time.
        show_progress: show a bar when on a terminal.

    Raises:
        ArgumentError: the nodes cannot be had, or the target is the old index's own store.
        FTError: a vector is missing, not finite, or of another length; names the node. Or the
            target store failed; says how many nodes it may hold.
    """
    from llama_index.core import VectorStoreIndex
    from llama_index.core.base.embeddings.base import BaseEmbedding

    if not isinstance(index, VectorStoreIndex):
        raise ArgumentError("index", f"is a {type(index).__name__}, not a VectorStoreIndex")
    if not isinstance(embed_model, BaseEmbedding):
        raise ArgumentError("embed_model", f"is a {type(embed_model).__name__}, no BaseEmbedding")
    if batch_size < 1:
        raise ArgumentError("batch_size", f"is at least 1, not {batch_size}")
    target = _target(index, vector_store, storage_context)
    copies = _with_text(_nodes_of(index) if nodes is None else nodes)
    vectors = _embed(copies, embed_model, batch_size, show_progress)

    new = VectorStoreIndex(
        nodes=[],
        embed_model=embed_model,
        storage_context=target,
        callback_manager=index._callback_manager,
        transformations=index._transformations,
        store_nodes_override=index._store_nodes_override,
        use_async=index._use_async,
        insert_batch_size=index._insert_batch_size,
    )
    try:
        _store(new, copies, vectors, batch_size)
    except BaseException:
        # The empty index was registered when it was made.
        target.index_store.delete_index_struct(new.index_id)
        raise
    new._object_map.update(index._object_map)
    _copy_document_hashes(index, new, copies)
    return new


def _target(
    index: VectorStoreIndex,
    vector_store: BasePydanticVectorStore | None,
    storage_context: StorageContext | None,
) -> StorageContext:
    from llama_index.core import StorageContext

    if vector_store is not None and storage_context is not None:
        raise ArgumentError("vector_store", "pass it inside storage_context, not beside it")
    context = storage_context or StorageContext.from_defaults(vector_store=vector_store)
    if _same_store(context.vector_store, index.vector_store):
        raise ArgumentError(
            "vector_store" if storage_context is None else "storage_context",
            "is the store of the old index, which must stay whole; name another collection, "
            "table or folder",
        )
    return context


def _same_store(one: Any, other: Any) -> bool:
    """Whether two stores are one, or would write to the same place."""
    from llama_index.core.vector_stores import SimpleVectorStore

    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, SimpleVectorStore):
        return one.data is other.data
    # Two clients of one collection or table have equal settings.
    return bool(one.model_dump() == other.model_dump())


def _nodes_of(index: VectorStoreIndex) -> list[BaseNode]:
    store = index.vector_store
    hint = "pass nodes=[...], for example from the ingestion pipeline"
    if store.stores_text and not index._store_nodes_override:
        try:
            return list(store.get_nodes(None))
        except Exception as error:
            raise ArgumentError(
                "index", f"its {type(store).__name__} cannot list its nodes ({error!r}); {hint}"
            ) from error
    ids = list(dict.fromkeys(index.index_struct.nodes_dict.values()))
    # `delete_nodes` takes a node out of the vector store only.
    embedded = getattr(getattr(store, "data", None), "embedding_dict", None)
    if embedded is not None:
        ids = [node_id for node_id in ids if node_id in embedded]
    found = {node.node_id: node for node in index.docstore.get_nodes(ids, raise_error=False)}
    missing = [node_id for node_id in ids if node_id not in found]
    if missing:
        raise ArgumentError(
            "index",
            f"its document store lacks {len(missing)} of its {len(ids)} nodes, first "
            f"{missing[0]!r}; {hint}",
        )
    return [found[node_id] for node_id in ids]


def _with_text(nodes: Sequence[BaseNode]) -> list[BaseNode]:
    """Return copies without vectors of the nodes that have a text; reports the others."""
    from llama_index.core.schema import MetadataMode

    kept, empty = [], []
    for node in nodes:
        if node.get_content(metadata_mode=MetadataMode.EMBED).strip():
            # Not a deep copy: an IndexNode may hold a whole query engine.
            own = {"metadata": dict(node.metadata), "relationships": dict(node.relationships)}
            kept.append(node.model_copy(update={**own, "embedding": None}))
        else:
            empty.append(node.node_id)
    if empty:
        logger.warning(
            "%d of %d nodes have no text and are not in the new index: %s%s",
            len(empty),
            len(nodes),
            ", ".join(empty[:10]),
            ", ..." if len(empty) > 10 else "",
        )
    if not kept:
        raise ArgumentError("index", "has no node with a text; there is nothing to embed")
    return kept


def _embed(
    nodes: list[BaseNode], embed_model: BaseEmbedding, batch_size: int, show_progress: bool
) -> NDArray[np.float64]:
    """Return the vectors, of shape (nodes, dimensions), in the order of the nodes."""
    from llama_index.core.schema import MetadataMode

    texts = [node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes]
    # Texts of like length in one batch need little padding; the longest first, so that a
    # batch that does not fit into memory fails at once.
    order = sorted(range(len(nodes)), key=lambda row: -len(texts[row]))
    vectors: NDArray[np.float64] | None = None
    with tqdm(
        total=len(nodes), desc="Embedding", unit="node", disable=None if show_progress else True
    ) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = embed_model.get_text_embedding_batch([texts[row] for row in rows])
            if len(batch) != len(rows):
                raise FTError(f"embed_model returned {len(batch)} vectors for {len(rows)} texts")
            if vectors is None:
                vectors = np.empty((len(nodes), len(batch[0])))
            for row, vector in zip(rows, batch, strict=True):
                _check_vector(vector, vectors.shape[1], nodes[row])
                vectors[row] = vector
            bar.update(len(rows))
    assert vectors is not None
    return vectors


def _check_vector(vector: Sequence[float], dimensions: int, node: BaseNode) -> None:
    if len(vector) != dimensions:
        raise FTError(
            f"node {node.node_id!r}: its vector has {len(vector)} dimensions, others {dimensions}"
        )
    if not np.isfinite(vector).all():
        raise FTError(
            f"node {node.node_id!r}: embed_model returned a vector that is not finite; "
            "check the model and the node's text"
        )


def _store(
    index: VectorStoreIndex,
    nodes: list[BaseNode],
    vectors: NDArray[np.float64],
    batch_size: int,
) -> None:
    for start in range(0, len(nodes), batch_size):
        batch = nodes[start : start + batch_size]
        for node, vector in zip(batch, vectors[start : start + batch_size], strict=True):
            node.embedding = vector.tolist()
        try:
            index.insert_nodes(batch)
        except Exception as error:
            raise FTError(
                f"the target {type(index.vector_store).__name__} failed ({error!r}); it may hold "
                f"up to {start + len(batch)} of {len(nodes)} nodes: clear it before another try"
            ) from error
        for node in batch:
            node.embedding = None  # the store has its own; both would double the memory


def _copy_document_hashes(
    old: VectorStoreIndex, new: VectorStoreIndex, nodes: list[BaseNode]
) -> None:
    """Copy what `refresh_ref_docs` compares; without it, every document would look new."""
    for document in dict.fromkeys(node.ref_doc_id for node in nodes):
        digest = document and old.docstore.get_document_hash(document)
        if digest:
            new.docstore.set_document_hash(document, digest)
