"""Vectors of an embedding model on disk, so that no text is embedded, or paid for, twice."""

from __future__ import annotations

import contextvars
import hashlib
import itertools
import logging
import os
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import Enum
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ft_core.errors import ArgumentError, ArtifactError
from ft_core.files import content_hash
from ft_core.progress import progress

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

logger = logging.getLogger(__name__)

Kind = Literal["query", "text"]

PROBE_TEXT = (
    "The ferry leaves the old harbour at noon, carries forty passengers and their bicycles, "
    "and reaches the island in about an hour."
)
"""What embedding models are told apart by, and whether one treats queries as documents."""

_ALIKE = 0.9999  # cosine: what a service rounds passes, an instruction before a query does not

_FORMAT = 1  # the file's `user_version`; 0 is a file that SQLite has just made
_PLACES: dict[Kind, str] = {"query": "queries", "text": "corpus"}
_LABELS: dict[Kind, str] = {"query": "Queries", "text": "Documents"}
_KEPT = "what was embedded before is kept in the cache: run again to go on from there"
_LOCK_SECONDS = 60.0
_KEYS_PER_SELECT = 500  # SQLite before 3.32 takes at most 999 parameters
_MOST_FILES = 10_000

# Settings that are secret or cannot change a vector. A new key, or another batch size, must
# not make every text be embedded again.
_SECRET = (
    r".*(api_?key|access_key|secret|password|passwd|credential|header|cookie|authorization).*"
    r"|(?!(?:pad|eos|bos|cls|sep|mask|unk)_)(.*_)?token(_provider)?|key|auth"
)
_NEUTRAL = (
    r".*(timeout|retries|retry|batch_size|callback|cache|client|progress|rate_limit|prox(y|ies)).*"
    r"|(.*_)?(workers?|threads|session|logger|verbose|parallel_process|keep_alive)"
    r"|device(_map|s)?|.*_devices?"
)
_IGNORED = re.compile(f"_*({_SECRET}|{_NEUTRAL})", re.IGNORECASE)


class VectorCache:
    """The vectors that one embedding model gave, in one SQLite file per model.

    A file holds hashes of texts and float32 vectors, no text and no secret. Models are told
    apart by class and settings; one in a local folder also by its files, so that a model
    trained anew under the same path starts anew. Several processes may use one
    folder at a time, on one machine.

    Args:
        folder: where the files are; by default `ft-adapter` in LlamaIndex's cache folder.
        embed_model: makes the vectors that are not there yet. Its settings are read at the
            first use and taken as fixed from then on.
        batch_queries: embed queries in batches too, as texts, where the model gives
            `PROBE_TEXT` the same vector as a query and as a text: LlamaIndex has no call for
            a batch of queries, and one call each is several times slower.
    """

    def __init__(
        self,
        folder: Path | str | None,
        embed_model: BaseEmbedding,
        *,
        batch_queries: bool = False,
    ) -> None:
        self._folder = None if folder is None else Path(folder)
        self._model = embed_model
        self._batch_queries = batch_queries

    @cached_property
    def identity(self) -> str:
        """What the model is, as 64 hex digits: two models that may differ have two."""
        return content_hash(_settings(self._model))

    @cached_property
    def path(self) -> Path:
        """The model's file; it is made by the first `embed`."""
        folder = self._folder
        if folder is None:
            from llama_index.core.utils import get_cache_dir

            folder = Path(get_cache_dir()) / "ft-adapter"
        return folder / f"{self.identity}.sqlite"

    def embed(
        self, texts: Mapping[str, str], kind: Kind, show_progress: bool
    ) -> NDArray[np.float32]:
        """Return the vectors, shape (texts, d), rows in the order of `texts`.

        A text that stands there twice is embedded once. Each batch of the model's
        `embed_batch_size` is stored as soon as it is there, so that a killed run loses one at
        most. Queries of a batch are embedded in the model's `num_workers` threads.

        Args:
            texts: by name; errors name `queries['...']` or `corpus['...']`.
            kind: whether the model embeds them as queries or as texts.
            show_progress: show a bar for what is not in the cache when on a terminal.

        Raises:
            ArgumentError: the model failed, or gave a vector that is missing, ragged or not
                finite; such a vector is not stored.
            ArtifactError: the cache file is damaged, locked, cannot be written, or holds
                vectors of another length than the model gives.
        """
        if kind not in _PLACES:
            raise ArgumentError("kind", f"is 'query' or 'text', not {kind!r}")
        if not texts:
            return np.empty((0, 0), dtype=np.float32)
        names: dict[str, str] = {}  # of each distinct text
        for name, text in texts.items():
            names.setdefault(text, name)
        keys = [_key(kind, text) for text in names]
        with _Store(self.path) as store:
            vectors, missing = store.read(keys)
            if missing:
                logger.info("%d of %d %s to embed", len(missing), len(keys), _LABELS[kind].lower())
                asked: Kind = "text" if kind == "query" and self._in_batches(missing) else kind
                batches = _Batches(self._model, kind, list(names), names, asked=asked)
                for rows, batch in batches.embed(missing, show_progress):
                    store.write([keys[row] for row in rows], batch)
                    if not vectors.shape[1]:
                        vectors = np.empty((len(keys), batch.shape[1]), dtype=np.float32)
                    vectors[rows] = batch
        if len(names) == len(texts):
            return vectors
        row_of = {text: row for row, text in enumerate(names)}
        return vectors[[row_of[text] for text in texts.values()]]

    def _in_batches(self, queries: list[int]) -> bool:
        if not self._batch_queries or len(queries) < 2:  # the probe itself is one
            return False
        probe = {"probe": PROBE_TEXT}
        query, text = (self.embed(probe, kind, False)[0] for kind in _PLACES)
        if query.shape != text.shape:
            return False
        lengths = float(np.linalg.norm(query) * np.linalg.norm(text))
        return bool(query @ text >= _ALIKE * lengths)


class _Batches:
    """Embeds texts by batches, and checks each before anything is done with it."""

    def __init__(
        self,
        model: BaseEmbedding,
        kind: Kind,
        texts: list[str],
        names: Mapping[str, str],
        *,
        asked: Kind,
    ) -> None:
        self._model = model
        self._kind = kind
        self._asked = asked
        self._texts = texts
        self._names = names

    def embed(self, rows: list[int], show: bool) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
        """Yield (rows, their vectors of shape (rows, d)), batch by batch; one d for all."""
        if self._asked == "text":
            # Longest first: a batch of texts of one length is padded least, and memory runs
            # out at once or never.
            rows = sorted(rows, key=lambda row: len(self._texts[row]), reverse=True)
        length = 0
        size = self._model.embed_batch_size
        starts = range(0, len(rows), size)
        for start in progress(starts, _LABELS[self._kind], len(starts), show):
            batch = rows[start : start + size]
            vectors, failure = self._ask(batch)
            if vectors:
                done = batch[: len(vectors)]
                matrix = self._checked(done, vectors, length)
                length = matrix.shape[1]
                yield done, matrix
            if failure is not None:
                raise failure

    def _ask(self, rows: list[int]) -> tuple[list[Sequence[float]], ArgumentError | None]:
        """Return the vectors; where the model failed, those before the failure, and the error."""
        if self._asked == "query":
            return self._ask_queries(rows)
        try:
            vectors = list(self._model.get_text_embedding_batch([self._texts[row] for row in rows]))
        except Exception as error:
            return [], self._failed(rows, error)
        if len(vectors) != len(rows):
            what = f"gave {len(vectors)} vectors for {self._place(rows)}"
            raise ArgumentError("embed_model", f"{what}; {_KEPT}")
        return vectors, None

    def _ask_queries(self, rows: list[int]) -> tuple[list[Sequence[float]], ArgumentError | None]:
        workers = min(self._model.num_workers or 1, len(rows))
        pool = ThreadPoolExecutor(workers) if workers > 1 else None
        try:
            asks = [self._ask_query(row, pool) for row in rows]
            vectors: list[Sequence[float]] = []
            for row, ask in zip(rows, asks, strict=True):
                try:
                    vectors.append(ask())
                except Exception as error:
                    return vectors, self._failed([row], error)
            return vectors, None
        finally:
            if pool is not None:
                pool.shutdown(cancel_futures=True)

    def _ask_query(self, row: int, pool: ThreadPoolExecutor | None) -> Any:
        """Return a function that gives the vector: asked for already where there is a pool."""
        text = self._texts[row]
        if pool is None:
            return lambda: self._model.get_query_embedding(text)
        # LlamaIndex's traces live in context variables, which a thread does not inherit.
        context = contextvars.copy_context()
        return pool.submit(context.run, self._model.get_query_embedding, text).result

    def _checked(
        self, rows: list[int], vectors: list[Sequence[float]], length: int
    ) -> NDArray[np.float32]:
        length = length or np.size(vectors[0])
        matrix = np.empty((len(rows), length), dtype=np.float32)
        for place, (row, vector) in enumerate(zip(rows, vectors, strict=True)):
            try:
                with np.errstate(over="ignore"):  # too large for float32: reported below
                    values = np.asarray(vector, dtype=np.float32)
            except (TypeError, ValueError):
                values = np.empty(0, dtype=np.float32)
            what = ""
            if values.ndim != 1 or not values.size:
                what = "something that is not a vector"
            elif len(values) != length:
                what = f"a vector of length {len(values)}, not {length} as before,"
            elif not np.isfinite(values).all():
                what = "a vector with a NaN or an infinity"
            if what:
                reason = f"gave {what} for {self._place([row])}; {_KEPT}"
                raise ArgumentError("embed_model", reason)
            matrix[place] = values
        return matrix

    def _failed(self, rows: list[int], error: Exception) -> ArgumentError:
        failure = ArgumentError(
            "embed_model", f"failed on {self._place(rows)} ({error!r}); {_KEPT}"
        )
        failure.__cause__ = error
        return failure

    def _place(self, rows: list[int]) -> str:
        name = self._names[self._texts[rows[0]]]
        first = f"{_PLACES[self._kind]}[{name!r}]"
        return first if len(rows) == 1 else f"a batch of {len(rows)} texts that begins with {first}"


class _Store:
    """One SQLite file of vectors by key; every method raises `ArtifactError` naming the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> _Store:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(
                f"{self._path.parent}: the cache folder cannot be made ({error.strerror}); "
                "name another one"
            ) from None
        with self._explained():
            self._file = sqlite3.connect(self._path, timeout=_LOCK_SECONDS, isolation_level=None)
        try:
            with self._explained():
                self._prepare()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def read(self, keys: Sequence[bytes]) -> tuple[NDArray[np.float32], list[int]]:
        """Return a matrix of shape (keys, d) and the rows that are missing, not filled.

        d is 0 for a file without vectors.
        """
        with self._explained():
            length = self._length()
            vectors = np.empty((len(keys), length), dtype=np.float32)
            found = np.zeros(len(keys), dtype=bool)
            row_of = {key: row for row, key in enumerate(keys)}
            for start in range(0, len(keys) if length else 0, _KEYS_PER_SELECT):
                chunk = keys[start : start + _KEYS_PER_SELECT]
                marks = ",".join("?" * len(chunk))
                query = f"SELECT key, vector FROM vectors WHERE key IN ({marks})"
                for key, blob in self._file.execute(query, chunk):
                    row = row_of[key]
                    if len(blob) != 4 * length:
                        raise self._damaged(f"a vector has {len(blob)} bytes, not {4 * length}")
                    vectors[row] = np.frombuffer(blob, dtype="<f4")
                    found[row] = True
        if not np.isfinite(vectors[found]).all():
            raise self._damaged("a vector holds a NaN or an infinity")
        return vectors, np.flatnonzero(~found).tolist()

    def write(self, keys: Sequence[bytes], vectors: NDArray[np.float32]) -> None:
        """Store the rows of `vectors`, all or none; a key that is there already stays."""
        length = vectors.shape[1]
        rows = [(key, row.astype("<f4").tobytes()) for key, row in zip(keys, vectors, strict=True)]
        with self._explained(), self._transaction():
            self._file.execute("INSERT OR IGNORE INTO length VALUES (0, ?)", (length,))
            before = self._length()
            if before != length:
                raise self._other_length(before, length)
            self._file.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?)", rows)

    def _prepare(self) -> None:
        self._write_ahead()
        if self._version() == 0:
            with self._transaction():
                if self._version() == 0:  # no other process was faster
                    self._file.execute("CREATE TABLE vectors (key BLOB PRIMARY KEY, vector BLOB)")
                    self._file.execute("CREATE TABLE length (id INTEGER PRIMARY KEY, value INT)")
                    self._file.execute(f"PRAGMA user_version = {_FORMAT}")
        if self._version() != _FORMAT:
            raise self._damaged(f"its format is {self._version()}, not {_FORMAT}")

    def _write_ahead(self) -> None:
        # A commit is appended to a log: no wait for the disk, which would cost more than to
        # embed a small batch, and a power cut damages nothing.
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                self._file.execute("PRAGMA journal_mode = WAL")
                self._file.execute("PRAGMA synchronous = NORMAL")
                return
            except sqlite3.OperationalError as error:
                # SQLite itself does not wait here for another process that does the same.
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _version(self) -> int:
        return int(self._file.execute("PRAGMA user_version").fetchone()[0])

    def _length(self) -> int:
        row = self._file.execute("SELECT value FROM length").fetchone()
        return int(row[0]) if row else 0

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        # IMMEDIATE waits for the other writers here; a lock taken later could deadlock.
        self._file.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._file.execute("COMMIT")
        except BaseException:
            if self._file.in_transaction:
                self._file.execute("ROLLBACK")
            raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise ArtifactError(
                    f"{self._path}: another process has held this cache file for more than "
                    f"{_LOCK_SECONDS:.0f} seconds; let it end, or name another cache folder"
                ) from None
            if "no such" in str(error):
                raise self._damaged(str(error)) from None
            raise ArtifactError(
                f"{self._path}: this cache file cannot be used ({error}); check that its folder "
                "can be written and the disk is not full, or name another cache folder"
            ) from None
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from None

    def _damaged(self, what: str) -> ArtifactError:
        return ArtifactError(
            f"{self._path}: this cache file is damaged ({what}); delete it: the vectors in it "
            "will be computed again"
        )

    def _other_length(self, before: int, length: int) -> ArtifactError:
        return ArtifactError(
            f"{self._path}: this cache file holds vectors of length {before}, and the embedding "
            f"model gives {length}: it is another model with the same settings; delete the file, "
            "or name another cache folder"
        )


def _key(kind: Kind, text: str) -> bytes:
    # Half of a surrogate pair, as some parsers leave: embedded like any other text.
    return hashlib.sha256(f"{kind}\0{text}".encode("utf-8", "surrogatepass")).digest()


def _settings(model: BaseEmbedding) -> dict[str, Any]:
    """Return, as JSON, all that tells this model from another and is neither secret nor neutral."""
    cls = type(model)
    try:
        given = model.to_dict()
    except Exception:  # a field that cannot be serialised
        given = {"model_name": getattr(model, "model_name", None)}
    private = getattr(model, "__pydantic_private__", None) or {}
    return {
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "settings": _plain(given),
        # A model around another one may name it nowhere else.
        "inner": {
            name: _settings(value)
            for name, value in private.items()
            if value is not model and _is_embedding(value)
        },
    }


def _is_embedding(value: Any) -> bool:
    from llama_index.core.base.embeddings.base import BaseEmbedding

    return isinstance(value, BaseEmbedding)


def _plain(value: Any, name: str = "") -> Any:
    """Return a JSON value that is the same in every process for the same setting."""
    if isinstance(value, Enum):
        return _plain(value.value, name)
    if isinstance(value, (str, os.PathLike)):
        return _with_files(os.fspath(value), name, not isinstance(value, str))
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        items = sorted((str(key), item) for key, item in value.items())
        return {key: _plain(item, key) for key, item in items if not _IGNORED.fullmatch(key)}
    if isinstance(value, (list, tuple)):
        return [_plain(item, name) for item in value]
    if isinstance(value, np.ndarray):
        return [str(value.dtype), *value.shape, hashlib.sha256(value.tobytes()).hexdigest()]
    if _is_embedding(value):
        return _settings(value)
    if hasattr(value, "__qualname__"):  # a class or a function
        return f"{value.__module__}.{value.__qualname__}"
    # The default text of an object has its address, which the next process does not share.
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _with_files(value: str | bytes, name: str, is_path: bool) -> Any:
    """Return a setting; where it names a folder or file, with the files' sizes and times."""
    text = os.fsdecode(value)
    # A plain word is a path only where a model's name is expected: "data" may be a mode.
    if (
        not (is_path or name.startswith("model") or "/" in text or os.sep in text)
        or not text.strip()
    ):
        return text
    try:
        path = Path(text).expanduser().resolve()
        if not path.exists():
            return text
        return [str(path), *(_stamp(file) for file in _files(path))]
    except (OSError, ValueError, RuntimeError):  # no path at all: too long, a null byte, no home
        return text


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return list(itertools.islice(_walk(path), _MOST_FILES))


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        # In place, as `os.walk` wants it. Hidden files change without the model: `.git`, ...
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__pycache__")))
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))


def _stamp(file: Path) -> list[Any]:
    try:
        status = file.stat()
    except FileNotFoundError:  # a dangling link, or gone since it was listed
        return [str(file)]
    return [str(file), status.st_size, status.st_mtime_ns]
