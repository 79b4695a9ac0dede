"""The vectors that an index already has: read from its store, without an embedding call."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ft_core.errors import ArgumentError, FTError
from ft_core.search import check_vectors

if TYPE_CHECKING:
    from llama_index.core import VectorStoreIndex

logger = logging.getLogger(__name__)

# Node id, vector, id of the document that the node was cut from (None or "None" without one).
Row = tuple[str, Any, Any]

_HINT = "pass document_vectors={node id: vector} instead"
_PAGE = 1000
# A page of a Qdrant server is JSON, and must come within the client's 5 seconds. A Qdrant in
# this process sorts all ids for each page: fewer are faster.
_SERVER_PAGE, _LOCAL_PAGE = 256, 4096


@dataclass(frozen=True)
class IndexVectors:
    """What an index holds, one row per node.

    Attributes:
        ids: the nodes' ids.
        vectors: as the store returns them, shape (nodes, d); some stores, Qdrant with cosine
            distance among them, keep unit vectors only.
        ref_doc_ids: the ids of the documents that the nodes were cut from, None without one.
    """

    ids: list[str]
    vectors: NDArray[np.float32]
    ref_doc_ids: list[str | None]


def index_vectors(index: VectorStoreIndex) -> IndexVectors:
    """Return the ids and vectors of all nodes of `index`; nothing is embedded or changed.

    Reads `SimpleVectorStore`, Qdrant, Chroma and pgvector page by page, and any other store
    whose `get_nodes` lists nodes with their vectors.

    Raises:
        ArgumentError: the index is empty, its store cannot be read, or a vector is missing,
            ragged or not finite; names the node and what to do.
    """
    from llama_index.core import VectorStoreIndex

    if not isinstance(index, VectorStoreIndex):
        raise ArgumentError("index", f"is a {type(index).__name__}, not a VectorStoreIndex")
    store = index.vector_store
    name = type(store).__name__
    matrix = _Matrix(name)
    try:
        for node_id, vector, ref_doc_id in _reader(store)(store, matrix):
            matrix.add(node_id, vector, ref_doc_id)
    except FTError:
        raise
    except Exception as error:
        raise ArgumentError("index", f"its {name} cannot be read ({error!r}); {_HINT}") from error
    return matrix.result()


def given_vectors(vectors: Mapping[str, Any]) -> IndexVectors:
    """Return vectors by node id as if an index held them, for a store that cannot be read.

    Raises:
        ArgumentError: there is none, or one is ragged or not finite; names the node.
    """
    matrix = check_vectors("document_vectors", list(vectors.values()), names=list(vectors))
    ids = [str(node) for node in vectors]
    return IndexVectors(ids, matrix.astype(np.float32), [None] * len(ids))


class _Matrix:
    """Rows of one length, checked and taken over one by one into float32."""

    def __init__(self, store: str) -> None:
        self._store = store
        self._expected = _PAGE
        self._rows: dict[str, int] = {}
        self._ref_doc_ids: list[str | None] = []
        self._vectors = np.empty((0, 0), dtype=np.float32)
        self._twice = 0

    def expect(self, rows: int) -> None:
        """Make room for so many rows at the first; more are taken, at the cost of a copy."""
        self._expected = max(rows, 1)

    def add(self, node_id: str, vector: Any, ref_doc_id: Any) -> None:
        """Add a node; one that was added before gets this vector."""
        values = self._checked(node_id, vector)
        row = self._rows.setdefault(node_id, len(self._rows))
        if row == len(self._ref_doc_ids):
            self._ref_doc_ids.append(None)
            if row == len(self._vectors):
                self._grow(len(values))
        else:
            self._twice += 1
        self._vectors[row] = values
        # LlamaIndex writes "None" for a node that was cut from nothing.
        self._ref_doc_ids[row] = None if ref_doc_id in (None, "None", "") else str(ref_doc_id)

    def result(self) -> IndexVectors:
        """Return what was added, without a copy of the vectors."""
        if not self._rows:
            raise ArgumentError(
                "index", f"its {self._store} is empty: add the documents first, or {_HINT}"
            )
        if self._twice:
            logger.warning(
                "the %s holds %d nodes more than once; the vector added last counts",
                self._store,
                self._twice,
            )
        return IndexVectors(
            list(self._rows), self._vectors[: len(self._rows)], list(self._ref_doc_ids)
        )

    def _grow(self, length: int) -> None:
        rows = len(self._vectors)
        grown = np.empty((2 * rows or self._expected, length), dtype=np.float32)
        if rows:
            grown[:rows] = self._vectors
        self._vectors = grown

    def _checked(self, node_id: str, vector: Any) -> NDArray[np.float32]:
        place = f"node {node_id!r}"
        if vector is None:
            raise ArgumentError("index", f"{place} has no vector in its {self._store}; {_HINT}")
        try:
            with np.errstate(over="ignore"):  # too large for float32: reported below
                values = np.asarray(vector, dtype=np.float32)
        except (TypeError, ValueError):  # lists of several lengths
            values = np.empty((0, 0), dtype=np.float32)
        if values.ndim != 1:
            raise ArgumentError(
                "index",
                f"{place} has several vectors, and adapters need one per node; {_HINT}",
            )
        length = self._vectors.shape[1] if self._rows else len(values)
        if len(values) != length or not length:
            raise ArgumentError(
                "index",
                f"{place} has a vector of length {len(values)}, the nodes before it {length}: "
                "build the index anew with one embedding model",
            )
        if not np.isfinite(values).all():
            raise ArgumentError(
                "index",
                f"{place} has a vector with a NaN or an infinity: delete that node, or insert "
                "it again",
            )
        return values


Reader = Callable[[Any, _Matrix], Iterator[Row]]


def _reader(store: Any) -> Reader:
    # By name: the packages of stores that are not in use need not be installed.
    for cls in type(store).__mro__:
        if cls.__name__ in _READERS:
            return _READERS[cls.__name__]
    return _from_nodes


def _from_simple(store: Any, matrix: _Matrix) -> Iterator[Row]:
    matrix.expect(len(store.data.embedding_dict))
    documents = store.data.text_id_to_ref_doc_id
    for node_id, vector in store.data.embedding_dict.items():
        yield node_id, vector, documents.get(node_id)


def _from_qdrant(store: Any, matrix: _Matrix) -> Iterator[Row]:
    client = store._client
    if client is None:
        raise ArgumentError(
            "index",
            "its QdrantVectorStore has only an async client; make it with "
            f"client=QdrantClient(...) too, or {_HINT}",
        )
    matrix.expect(client.count(store.collection_name, exact=True).count)
    local = type(getattr(client, "_client", None)).__name__ == "QdrantLocal"
    dense, page = store.dense_vector_name, None
    while True:
        points, page = client.scroll(
            store.collection_name,
            limit=_LOCAL_PAGE if local else _SERVER_PAGE,
            offset=page,
            with_payload=["_node_content", "ref_doc_id"],
            with_vectors=[dense] if dense else True,  # old collections have one without a name
        )
        for point in points:
            vector, payload = point.vector, point.payload or {}
            if isinstance(vector, Mapping):
                vector = vector.get(dense)
            yield _qdrant_id(point.id, payload), vector, payload.get("ref_doc_id")
        if page is None:
            return


def _qdrant_id(point_id: Any, payload: Mapping[str, Any]) -> str:
    """Return the node's id: Qdrant writes a hash such as "d41d8c..." as a UUID with hyphens."""
    try:
        return str(json.loads(payload["_node_content"])["id_"])
    except (KeyError, TypeError, ValueError):  # not put there by LlamaIndex
        return str(point_id)


def _from_chroma(store: Any, matrix: _Matrix) -> Iterator[Row]:
    collection = store._collection
    if inspect.iscoroutinefunction(collection.get):
        raise ArgumentError(
            "index",
            "its ChromaVectorStore has an async collection; make it with one of "
            f"chromadb.HttpClient(...), or {_HINT}",
        )
    total = collection.count()
    matrix.expect(total)
    for start in range(0, total, _PAGE):
        found = collection.get(limit=_PAGE, offset=start, include=["embeddings", "metadatas"])
        rows = zip(found["ids"], found["embeddings"], found["metadatas"], strict=True)
        for node_id, vector, metadata in rows:
            yield node_id, vector, (metadata or {}).get("ref_doc_id")


def _from_postgres(store: Any, matrix: _Matrix) -> Iterator[Row]:
    from sqlalchemy import func, select

    store._initialize()
    table = store._table_class
    rows = (
        select(table.node_id, table.embedding, table.metadata_["ref_doc_id"].astext)
        .order_by(table.id)  # of a node that was added twice, the newer row comes last
        .execution_options(yield_per=_PAGE)
    )
    with store._engine.connect() as connection:
        matrix.expect(connection.scalar(select(func.count()).select_from(table)))
        for node_id, vector, ref_doc_id in connection.execute(rows):
            # pgvector has types of its own for some columns, half precision among them.
            yield node_id, vector.to_list() if hasattr(vector, "to_list") else vector, ref_doc_id


def _from_nodes(store: Any, matrix: _Matrix) -> Iterator[Row]:
    nodes = store.get_nodes(None)
    matrix.expect(len(nodes))
    for node in nodes:
        yield node.node_id, node.embedding, node.ref_doc_id


_READERS: dict[str, Reader] = {
    "SimpleVectorStore": _from_simple,
    "QdrantVectorStore": _from_qdrant,
    "ChromaVectorStore": _from_chroma,
    "PGVectorStore": _from_postgres,
}
