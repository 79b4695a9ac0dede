"""Files that are whole or absent: atomic writes, strict JSON, append-only journals."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ft_core.errors import ArtifactError, DatasetError

try:  # POSIX only: without it, appends rely on O_APPEND alone
    import fcntl
except ImportError:  # pragma: no cover
    fcntl = None  # type: ignore[assignment]


_APPEND = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
_RECORD_STARTS = ("{", "[", '"')


@contextmanager
def atomic_write(path: Path | str) -> Iterator[IO[str]]:
    """Open a UTF-8 text file that replaces `path` only when the block ends without an error.

    Readers see the old content or the new, never a part. On an error, a full disk
    included, the old file is untouched and the partial one is gone.
    """
    path = Path(path).resolve()  # of a symbolic link, the file that it names is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "x", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `path` when the block ends without an error.

    On an error the folder that was at `path` is untouched. Whether it may be replaced at
    all is for the caller to decide (see `ft_core.artifacts`).
    """
    path = Path(path).resolve()  # of a symbolic link, the folder that it names is replaced
    restore_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir()
    try:
        yield partial
        _open_to_readers(partial)
        if path.exists():
            # A directory cannot be replaced in one call; `restore_folder` mends a kill here.
            replaced = _replaced(path)
            os.rename(path, replaced)
            os.rename(partial, path)
            _discard(replaced)
        else:
            os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        restore_folder(path)
        raise


def _open_to_readers(folder: Path) -> None:
    """Give the files that a library made for this user alone, as safetensors does, the usual mode.

    Else what one user trains, a service under another account could not load.
    """
    usual = folder.stat().st_mode & 0o666  # the folder has the mode that the umask leaves
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink() and stat.S_IMODE(file.stat().st_mode) == 0o600:
            file.chmod(usual)


def restore_folder(path: Path | str) -> None:
    """Put back the folder that a process killed inside `atomic_folder` had moved aside."""
    path = Path(path).resolve()
    replaced = _replaced(path)
    if not replaced.exists():
        return
    if path.exists():
        _discard(replaced)
    else:
        os.rename(replaced, path)


def _replaced(path: Path) -> Path:
    return path.parent / f".{path.name}.replaced"


def _discard(replaced: Path) -> None:
    # Renamed first: what a kill leaves half deleted must never be put back.
    doomed = replaced.with_name(f"{replaced.name}.{uuid.uuid4().hex}.partial")
    os.rename(replaced, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def read_json(path: Path | str) -> Any:
    """Parse a JSON file; an object that has a key twice is an error, not a silent overwrite.

    Raises:
        DatasetError: the file is missing, not UTF-8, not JSON, or has a duplicate key.
    """
    return parse_json(read_text(path), source=path)


def read_text(path: Path | str) -> str:
    """Read a UTF-8 file (with or without a byte order mark).

    Raises:
        DatasetError: the file is missing, a folder, unreadable, or not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DatasetError("no such file", source=path) from None
    except IsADirectoryError:
        raise DatasetError("is a folder, not a file", source=path) from None
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"byte {error.start} is not UTF-8; save the file as UTF-8", source=path
        ) from None
    except OSError as error:
        raise DatasetError(f"cannot be read: {error.strerror}", source=path) from None


def parse_json(text: str, *, source: Path | str | None = None, line: int = 1) -> Any:
    """Parse JSON text that starts at `line` of `source`; see `read_json`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise DatasetError(f"the key {twice!r} stands twice in one object", source=source)
        return result

    if not text.strip():
        raise DatasetError("is empty", source=source)
    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        # A string that never ends is reported where it begins.
        truncated = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
        what = "ends in the middle (truncated?)" if truncated else error.msg
        raise DatasetError(
            f"not JSON: {what}",
            source=source,
            place=f"line {line + error.lineno - 1}, column {error.colno}",
        ) from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a number too long
        raise DatasetError(f"not usable JSON: {error}", source=source) from None


def read_jsonl(path: Path | str) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, value) for each line of a JSON Lines file; blank lines pass.

    Raises:
        DatasetError: names the first line that is not JSON.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                value = parse_json(line, source=path, line=number)
            except DatasetError as error:
                place = error.place or f"line {number}"
                raise DatasetError(error.reason, source=path, place=place) from None
            yield number, value


def content_hash(value: Any) -> str:
    """Return the SHA-256, in hex, of a JSON-serialisable value in canonical form."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class Journal:
    """An append-only JSON Lines file that survives `kill -9` and many writers.

    Each record is one line, written by one `write` under a lock between processes, so that
    a crash loses at most the line being written; `records` skips such a torn last line, and
    the next append starts on a line of its own.

    Args:
        path: the file; it and its folder are made at the first append.
        durable: `fsync` after every record. Off, a record survives the process but
            perhaps not a power cut.
    """

    def __init__(self, path: Path | str, *, durable: bool = False) -> None:
        self.path = Path(path)
        self._durable = durable
        self._lock = threading.Lock()

    def append(self, record: Any) -> None:
        """Write one JSON-serialisable record; raises `OSError` when the disk refuses."""
        line = _encoded(record) + b"\n"
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, _APPEND, 0o666)
            try:
                if fcntl is not None:
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                start = os.fstat(descriptor).st_size
                if start:
                    os.lseek(descriptor, start - 1, os.SEEK_SET)
                    if os.read(descriptor, 1) != b"\n":
                        line = b"\n" + line
                try:
                    _write_all(descriptor, line)
                except OSError:
                    # A full disk took a part of the line: leave none of it.
                    os.ftruncate(descriptor, start)
                    raise
                if self._durable:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def records(self) -> Iterator[Any]:
        """Yield the records in order; none when the file does not exist yet.

        A line that begins as a record and does not go on as one was cut short by a crash,
        and is passed over.

        Raises:
            ArtifactError: the file holds a line that no journal wrote.
        """
        if not self.path.exists():
            return
        with open(self.path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    if line.startswith(_RECORD_STARTS):
                        continue
                    raise ArtifactError(
                        f"{self.path}: line {number} is not a journal record; "
                        "name another file, or move this one away"
                    ) from None
                yield record


def _encoded(record: Any) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as some servers send: escaped
        return json.dumps(record, separators=(",", ":")).encode()


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
