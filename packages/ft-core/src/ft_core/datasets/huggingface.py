"""Hugging Face `datasets`: three tables as BEIR has them, or one table of pairs.

The public way in and out is `EmbeddingQAFinetuneDataset.from_huggingface` and
`to_huggingface`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ft_core.datasets.beir import Judgement, content_of, join_title
from ft_core.errors import DatasetError
from ft_core.extras import import_extra

# The first name of each is what `to_tables` writes; the others are those of BEIR on the hub.
_IDS = ("id", "_id")
_QUERY_IDS = ("query_id", "query-id")
_DOCUMENT_IDS = ("corpus_id", "corpus-id")
# A table of pairs has the column names of sentence-transformers, or what is common elsewhere.
_QUERIES = ("anchor", "query", "question")
_DOCUMENTS = ("positive", "context", "document", "answer")
_NEGATIVE = "negative"
_TABLES = ("queries", "corpus", "qrels")


def to_tables(
    queries: Mapping[str, str],
    corpus: Mapping[str, str],
    qrels: Mapping[str, Mapping[str, int]],
) -> Any:
    """Return a `datasets.DatasetDict`; see `EmbeddingQAFinetuneDataset.to_huggingface`."""
    datasets = import_extra("datasets", "ft-core[hf]")
    judged = [(q, d, grade) for q, graded in qrels.items() for d, grade in graded.items()]
    columns = {
        "queries": {"id": list(queries), "text": list(queries.values())},
        "corpus": {"id": list(corpus), "text": list(corpus.values())},
        "qrels": {
            "query_id": [query for query, _, _ in judged],
            "corpus_id": [document for _, document, _ in judged],
            "score": [grade for _, _, grade in judged],
        },
    }
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_dict(table) for name, table in columns.items()}
    )


def from_tables(source: Any) -> dict[str, Any]:
    """Return the content of a dataset; see `EmbeddingQAFinetuneDataset.from_huggingface`.

    Raises:
        DatasetError: names the table, the row and the reason.
    """
    if isinstance(source, str | Path):
        source = _from_disk(Path(source))
    if hasattr(source, "column_names") and not isinstance(source, Mapping):
        return _from_pairs(source)
    if not isinstance(source, Mapping):
        raise DatasetError(f"a {type(source).__name__} is not a Dataset, DatasetDict or folder")
    missing = [name for name in _TABLES if name not in source]
    if missing:
        raise DatasetError(
            f"has {', '.join(map(str, source))} but no {', '.join(missing)}; give a DatasetDict "
            f"of {', '.join(_TABLES)}, or one split of pairs such as source['train']"
        )
    return content_of(
        _judgements(source["qrels"]),
        _texts("queries", source["queries"]),
        _texts("corpus", source["corpus"]),
    )


def _from_disk(folder: Path) -> Any:
    datasets = import_extra("datasets", "ft-core[hf]")
    try:
        return datasets.load_from_disk(str(folder))
    except FileNotFoundError:
        raise DatasetError(
            "no dataset that save_to_disk wrote; load one from a hub with datasets.load_dataset "
            "and give it here",
            source=folder,
        ) from None


def _texts(name: str, table: Any) -> dict[str, str]:
    key = _column(name, table, _IDS)
    _column(name, table, ("text",))
    texts: dict[str, str] = {}
    for number, row in enumerate(table):
        place = f"{name}, row {number}"
        identifier = _id(row[key], place)
        if identifier in texts:
            raise DatasetError(f"the id {identifier!r} stands twice", place=place)
        texts[identifier] = join_title(row.get("title"), _text(row["text"], place, blank=True))
    return texts


def _judgements(table: Any) -> list[Judgement]:
    query = _column("qrels", table, _QUERY_IDS)
    document = _column("qrels", table, _DOCUMENT_IDS)
    _column("qrels", table, ("score",))
    judgements = []
    for number, row in enumerate(table):
        place = f"qrels, row {number}"
        score = row["score"]
        if not isinstance(score, int | float) or not float(score).is_integer():
            raise DatasetError(f"the score {score!r} is not an integer", place=place)
        judgements.append(
            Judgement(_id(row[query], place), _id(row[document], place), int(score), place)
        )
    return judgements


def _from_pairs(table: Any) -> dict[str, Any]:
    """Give each distinct text an id, in order of appearance."""
    query_column = _column("the table", table, _QUERIES)
    document_column = _column("the table", table, _DOCUMENTS)
    negatives = [name for name in table.column_names if name.split("_")[0] == _NEGATIVE]
    queries: dict[str, str] = {}
    documents: dict[str, str] = {}
    relevant: dict[str, dict[str, None]] = {}
    for number, row in enumerate(table):
        place = f"row {number}"
        text = _text(row[query_column], f"{place}, column {query_column}")
        query = queries.setdefault(text, f"q{len(queries)}")
        text = _text(row[document_column], f"{place}, column {document_column}")
        document = documents.setdefault(text, f"d{len(documents)}")
        relevant.setdefault(query, {})[document] = None
        for column in negatives:
            text = _text(row[column], f"{place}, column {column}")
            documents.setdefault(text, f"d{len(documents)}")
    return {
        "queries": {key: text for text, key in queries.items()},
        "corpus": {key: text for text, key in documents.items()},
        "relevant_docs": {query: list(found) for query, found in relevant.items()},
    }


def _column(name: str, table: Any, names: tuple[str, ...]) -> str:
    for column in names:
        if column in table.column_names:
            return column
    raise DatasetError(
        f"has the columns {', '.join(table.column_names)}, but none called "
        f"{' or '.join(names)}; rename one",
        place=name,
    )


def _id(value: Any, place: str) -> str:
    if not isinstance(value, str | int):
        raise DatasetError(f"needs an id, text or number, not {value!r}", place=place)
    return str(value)


def _text(value: Any, place: str, *, blank: bool = False) -> str:
    if not isinstance(value, str):
        raise DatasetError(f"needs a text, not {value!r}", place=place)
    if not blank and not value.strip():
        raise DatasetError("the text is empty", place=place)
    return value
