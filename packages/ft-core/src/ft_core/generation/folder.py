"""Nodes from a folder of documents, with ids that are the same in every run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ft_core.errors import ArgumentError, DatasetError
from ft_core.extras import import_extra
from ft_core.files import content_hash, read_text
from ft_core.generation.sentences import split_sentences

if TYPE_CHECKING:
    from llama_index.core.schema import TextNode

SUFFIXES = (".md", ".txt", ".pdf")
"""The files that `read_folder` reads."""


@dataclass(frozen=True)
class FolderNodes:
    """The chunks of a folder's documents."""

    nodes: list[TextNode]
    """Each with `file_name` in its metadata, and for a PDF `page_label`."""
    files: int
    """How many files were read."""
    empty: list[str]
    """Files and pages of PDFs that hold no text, for example because they are scans."""


def read_folder(
    folder: Path | str, *, chunk_size: int = 512, chunk_overlap: int = 0
) -> FolderNodes:
    """Read the .md, .txt and .pdf files below a folder and split them into nodes.

    A node's id derives from its file's path in the folder and its text, so that a later run
    knows it again (LlamaIndex's own ids are random). Hidden files are passed over.

    Args:
        folder: searched with its subfolders.
        chunk_size: tokens a chunk has at most.
        chunk_overlap: tokens that neighbours share. Questions about shared text have two
            right answers, so the default is none.

    Raises:
        ArgumentError: there is no such folder, or nothing in it to read, or the sizes do
            not fit together.
        DatasetError: a file cannot be read; names it.
        MissingExtraError: `ft-core[files]` is not installed and there is a .pdf file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ArgumentError("folder", f"{folder} is no folder")
    if chunk_size < 1:
        raise ArgumentError("chunk_size", f"must be at least 1, not {chunk_size}")
    if not 0 <= chunk_overlap < chunk_size:
        raise ArgumentError(
            "chunk_overlap",
            f"must be from 0 to below chunk_size ({chunk_size}), not {chunk_overlap}",
        )
    paths = sorted(path for path in folder.rglob("*") if _wanted(path.relative_to(folder), path))
    if not paths:
        raise ArgumentError("folder", f"{folder} holds no {', '.join(SUFFIXES)} file")
    from llama_index.core.node_parser import SentenceSplitter

    splitter = SentenceSplitter(
        chunk_size=chunk_size,
        chunk_overlap=chunk_overlap,
        chunking_tokenizer_fn=split_sentences,
    )
    nodes: list[TextNode] = []
    empty: list[str] = []
    for path in paths:
        name = path.relative_to(folder).as_posix()
        seen: Counter[str] = Counter()
        for page, text in _pages(path):
            chunks = [chunk for chunk in splitter.split_text(text) if chunk.strip()]
            if not chunks:
                empty.append(f"{name}, page {page}" if page else name)
            nodes += [_node(name, page, chunk, seen) for chunk in chunks]
    if not nodes:
        raise ArgumentError("folder", f"no file in {folder} holds any text: {', '.join(empty[:5])}")
    return FolderNodes(nodes, len(paths), empty)


def _wanted(relative: Path, path: Path) -> bool:
    hidden = any(part.startswith(".") for part in relative.parts)
    return not hidden and path.suffix.lower() in SUFFIXES and path.is_file()


def _pages(path: Path) -> list[tuple[str, str]]:
    """Return (page label or "", text) pairs: one, or for a PDF one a page."""
    if path.suffix.lower() != ".pdf":
        # Markdown stays as it is: LlamaIndex's MarkdownReader cuts whatever stands in <>.
        return [("", read_text(path))]
    readers = import_extra("llama_index.readers.file", "ft-core[files]")
    try:
        documents = readers.PDFReader().load_data(path)
    except Exception as error:  # tenacity's RetryError: the reader tries three times
        cause = error.__cause__ or error
        raise DatasetError(
            f"is no PDF that can be read ({type(cause).__name__}: {cause}); "
            "mend it or take it out of the folder",
            source=path,
        ) from None
    return [(str(d.metadata.get("page_label", "")), _mended(d.text)) for d in documents]


def _node(name: str, page: str, text: str, seen: Counter[str]) -> TextNode:
    from llama_index.core.schema import TextNode

    seen[text] += 1
    digest = content_hash([name, text, seen[text]])[:16]
    metadata = {"file_name": name, "page_label": page} if page else {"file_name": name}
    return TextNode(id_=f"{name}#{digest}", text=text, metadata=metadata)


def _mended(text: str) -> str:
    """Replace halves of surrogate pairs, which PDFs with broken fonts yield."""
    return text.encode("utf-8", "replace").decode("utf-8")
