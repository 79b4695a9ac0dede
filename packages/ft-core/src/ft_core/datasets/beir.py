"""Folders in the form of BEIR: `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv`.

Source of the form: Thakur et al. 2021, and the loader of the `beir` package. The public way
in and out is `EmbeddingQAFinetuneDataset.from_beir` and `to_beir`.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ft_core.errors import ArgumentError, DatasetError
from ft_core.files import atomic_write, read_jsonl, read_text

logger = logging.getLogger(__name__)

HEADER = ("query-id", "corpus-id", "score")


class Judgement(NamedTuple):
    """One line of a qrels file."""

    query: str
    document: str
    grade: int
    place: str
    """Where it stands, for an error."""


def read_beir(folder: Path | str, split: str) -> dict[str, Any]:
    """Return the content of an `EmbeddingQAFinetuneDataset`; see its `from_beir`.

    Raises:
        DatasetError: names file, line and reason.
    """
    folder = Path(folder)
    qrels = _qrels_path(folder, split)
    if not qrels.is_file():
        splits = sorted(path.stem for path in folder.glob("qrels/*.tsv"))
        raise DatasetError(
            f"no such file; the splits there are: {', '.join(splits) or 'none'}", source=qrels
        )
    corpus = _read_texts(folder / "corpus.jsonl")
    queries = _read_texts(folder / "queries.jsonl")
    judgements = list(_read_qrels(qrels))
    return content_of(judgements, queries, corpus, source=qrels)


def content_of(
    judgements: list[Judgement],
    queries: Mapping[str, str],
    corpus: Mapping[str, str],
    *,
    source: Path | str | None = None,
) -> dict[str, Any]:
    """Return what a dataset holds: the queries that have a relevant document, and the corpus.

    A grade of 0 or less says that somebody found the document not relevant: it is left out,
    as is a document without text that no query needs.

    Raises:
        DatasetError: a judgement names what is not there or without text, or a pair has two
            different grades.
    """
    grades: dict[str, dict[str, int]] = {}
    judged: dict[tuple[str, str], int] = {}
    for query, document, grade, place in judgements:
        for what, key, texts in (("query", query, queries), ("document", document, corpus)):
            if key not in texts:
                raise DatasetError(f"there is no {what} {key!r}", source=source, place=place)
            if grade > 0 and not texts[key].strip():
                raise DatasetError(
                    f"the text of {what} {key!r} is empty", source=source, place=place
                )
        if judged.setdefault((query, document), grade) != grade:
            raise DatasetError(
                f"query {query!r} and document {document!r} have another score before",
                source=source,
                place=place,
            )
        if grade > 0:
            grades.setdefault(query, {})[document] = grade
    if not grades:
        raise DatasetError("has no relevant document, so no query to use", source=source)
    blank = sum(not text.strip() for text in corpus.values())
    if blank:
        logger.warning("%s: %d documents have no text and are left out", source, blank)
    return {
        "queries": {key: text for key, text in queries.items() if key in grades},
        "corpus": {key: text for key, text in corpus.items() if text.strip()},
        "relevant_docs": {key: list(grades[key]) for key in queries if key in grades},
        "grades": {
            query: above
            for query, graded in grades.items()
            if (above := {key: grade for key, grade in graded.items() if grade > 1})
        },
    }


def join_title(title: Any, text: str) -> str:
    """Return title and text, a line each, or what there is of them."""
    if not isinstance(title, str) or not title.strip():
        return text
    return f"{title}\n{text}" if text.strip() else title


def write_beir(
    folder: Path | str,
    split: str,
    queries: Mapping[str, str],
    corpus: Mapping[str, str],
    qrels: Mapping[str, Mapping[str, int]],
) -> None:
    """Write one split into a folder; see `EmbeddingQAFinetuneDataset.to_beir`.

    Raises:
        DatasetError: the folder holds another corpus, or another text for one of the queries,
            or an id is empty or of several lines.
    """
    folder = Path(folder)
    path = _qrels_path(folder, split)
    for key in (*queries, *corpus):
        if len(key.splitlines()) != 1:
            raise DatasetError(f"a table of qrels cannot hold the id {key!r}; rename it")
    corpus_path, queries_path = folder / "corpus.jsonl", folder / "queries.jsonl"
    if corpus_path.exists() and _read_texts(corpus_path) != dict(corpus):
        raise DatasetError(
            "holds another corpus, which the splits of one folder share; name a new folder",
            source=corpus_path,
        )
    every_query = _read_texts(queries_path) if queries_path.exists() else {}
    for key, text in queries.items():
        if every_query.setdefault(key, text) != text:
            raise DatasetError(
                f"the query {key!r} has another text there; name a new folder",
                source=queries_path,
            )
    # The qrels come last: a folder that was cut short has no split rather than a wrong one.
    _write_texts(corpus_path, corpus)
    _write_texts(queries_path, every_query)
    with atomic_write(path) as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(HEADER)
        for query, graded in qrels.items():
            writer.writerows((query, document, grade) for document, grade in graded.items())


def _qrels_path(folder: Path, split: str) -> Path:
    if not split or Path(split).name != split:
        raise ArgumentError("split", f"is the name of a file in qrels, not {split!r}")
    return folder / "qrels" / f"{split}.tsv"


def _read_texts(path: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    for number, row in read_jsonl(path):
        place = f"line {number}"
        if not isinstance(row, dict):
            raise DatasetError("is not a JSON object", source=path, place=place)
        for key in ("_id", "text"):
            if not isinstance(row.get(key), str):
                raise DatasetError(f"needs a string {key!r}", source=path, place=place)
        if row["_id"] in texts:
            raise DatasetError(f"the id {row['_id']!r} stands twice", source=path, place=place)
        texts[row["_id"]] = join_title(row.get("title"), row["text"])
    return texts


def _write_texts(path: Path, texts: Mapping[str, str]) -> None:
    with atomic_write(path) as file:
        for key, text in texts.items():
            json.dump({"_id": key, "text": text}, file, ensure_ascii=False)
            file.write("\n")


def _read_qrels(path: Path) -> Iterator[Judgement]:
    rows = csv.reader(io.StringIO(read_text(path), newline=""), delimiter="\t", strict=True)
    try:
        for row in rows:
            place = f"line {rows.line_num}"
            if not row or (rows.line_num == 1 and tuple(row) == HEADER):
                continue
            if len(row) != len(HEADER):
                raise DatasetError(
                    f"needs three columns with tabs between ({', '.join(HEADER)}), not {len(row)}",
                    source=path,
                    place=place,
                )
            try:
                grade = int(row[2])
            except ValueError:
                raise DatasetError(
                    f"the score {row[2]!r} is not an integer", source=path, place=place
                ) from None
            yield Judgement(row[0], row[1], grade, place)
    except csv.Error as error:
        raise DatasetError(str(error), source=path, place=f"line {rows.line_num}") from None
