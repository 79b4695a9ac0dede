"""Read a folder of Spider: questions, SQL, and the schemas of many databases."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ft_core.datasets.text2sql import Text2SQLDataset, Text2SQLExample
from ft_core.errors import DatasetError
from ft_text2sql.entries import entries_of, list_of, placed_in, text_of
from ft_text2sql.schema import Column, ForeignKey, Schema, Table

_SPIDER_PARTS = {
    "train": "train_spider.json",
    "train_others": "train_others.json",
    "dev": "dev.json",
    "test": "test.json",
}


def read_spider(folder: Path | str) -> dict[str, Text2SQLDataset]:
    """Read a folder of Spider (https://yale-lily.github.io/spider), or one of its form.

    The schema is that of `tables.json`; of a database that is not in it, that of the SQLite
    file `database/<db_id>/<db_id>.sqlite`. Values in double quotes come into single quotes.

    Args:
        folder: holds `tables.json` or `database`, and one or more of `train_spider.json`,
            `train_others.json`, `dev.json` and `test.json`.

    Returns:
        The parts that are there: "train", "train_others", "dev", "test". The `database` of an
        example is its `db_id`.

    Raises:
        DatasetError: names the file, the entry (from 0) and the reason.
    """
    folder = Path(folder)
    parts = {part: folder / name for part, name in _SPIDER_PARTS.items()}
    parts = {part: path for part, path in parts.items() if path.is_file()}
    if not parts:
        wanted = ", ".join(_SPIDER_PARTS.values())
        raise DatasetError(f"has none of {wanted}; name Spider's folder", source=folder)
    schemas = _SpiderSchemas(folder)
    return {part: _read_spider_part(path, schemas) for part, path in parts.items()}


def _read_spider_part(path: Path, schemas: _SpiderSchemas) -> Text2SQLDataset:
    from ft_text2sql.statements import values_in_quotes

    examples = []
    for index, entry in entries_of(path):
        with placed_in(path, f"[{index}]"):
            database = text_of(entry, "db_id")
            schema, context = schemas.get(database)
            examples.append(
                Text2SQLExample(
                    id=f"{path.stem}-{index}",
                    question=text_of(entry, "question").strip(),
                    sql=values_in_quotes(text_of(entry, "query"), schema),
                    context=context,
                    database=database,
                    dialect="sqlite",
                )
            )
    return Text2SQLDataset(examples=examples)


class _SpiderSchemas:
    """The schema of each database of a Spider folder, read when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries: dict[str, tuple[Path, int, Mapping[str, Any]]] = {}
        self._found: dict[str, tuple[Schema, str]] = {}
        for path in (folder / "tables.json", folder / "test_tables.json"):
            if path.is_file():
                for index, entry in entries_of(path):
                    with placed_in(path, f"[{index}]"):
                        self._entries.setdefault(text_of(entry, "db_id"), (path, index, entry))

    def get(self, database: str) -> tuple[Schema, str]:
        """Return the schema and its CREATE TABLE statements."""
        if database not in self._found:
            schema = self._read(database)
            self._found[database] = schema, schema.to_text("create")
        return self._found[database]

    def _read(self, database: str) -> Schema:
        if database in self._entries:
            path, index, entry = self._entries[database]
            with placed_in(path, f"[{index}] ({database})"):
                return _spider_schema(entry)
        if Path(database).name != database:
            raise DatasetError(f"{database!r} is no name of a folder", place="db_id")
        path = self._folder / "database" / database / f"{database}.sqlite"
        if not path.is_file():
            raise DatasetError(
                f"the database {database!r} is neither in tables.json nor in "
                f"database/{database}/{database}.sqlite",
                place="db_id",
            )
        return _reflect_sqlite(path)


def _reflect_sqlite(path: Path) -> Schema:
    import sqlite3

    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    uri = f"{path.resolve().as_uri()}?mode=ro"
    engine = create_engine(
        "sqlite://", creator=lambda: sqlite3.connect(uri, uri=True), poolclass=NullPool
    )
    try:
        return Schema.from_database(engine)
    except DatasetError as error:
        raise error.at(path) from None
    finally:
        engine.dispose()


def _spider_schema(entry: Mapping[str, Any]) -> Schema:
    """Read an entry of `tables.json`; columns are numbered across tables, from 0, the star."""
    names = list_of(entry, "table_names_original")
    types = _optional_list(entry, "column_types")
    columns: list[tuple[int, Column]] = []
    for number, pair in enumerate(list_of(entry, "column_names_original")):
        place = f"column_names_original[{number}]"
        if not (isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int):
            raise DatasetError("is a table's number and a name", place=place)
        if not 0 <= pair[0] < len(names) and pair != [-1, "*"]:
            raise DatasetError(f"there is no table {pair[0]}", place=place)
        kind = types[number] if number < len(types) and isinstance(types[number], str) else ""
        columns.append((pair[0], Column(str(pair[1]), "" if kind == "others" else kind.upper())))

    def column(number: Any, place: str) -> tuple[int, str]:
        if type(number) is not int or not 0 < number < len(columns) or columns[number][0] < 0:
            raise DatasetError(f"there is no column {number!r}", place=place)
        return columns[number][0], columns[number][1].name

    primary: dict[int, list[str]] = defaultdict(list)
    for key in _optional_list(entry, "primary_keys"):
        for number in key if isinstance(key, list) else [key]:
            table, name = column(number, "primary_keys")
            primary[table].append(name)
    foreign: dict[int, list[ForeignKey]] = defaultdict(list)
    for pair in _optional_list(entry, "foreign_keys"):
        if not (isinstance(pair, list) and len(pair) == 2):
            raise DatasetError("is a list of pairs of columns", place="foreign_keys")
        (table, name), (other, referred) = (column(number, "foreign_keys") for number in pair)
        foreign[table].append(ForeignKey((name,), str(names[other]), (referred,)))
    return Schema(
        tuple(
            Table(
                str(name),
                tuple(found for table, found in columns if table == number),
                tuple(primary[number]),
                tuple(foreign[number]),
            )
            for number, name in enumerate(names)
        )
    )


def _optional_list(entry: Mapping[str, Any], key: str) -> list[Any]:
    """Return a list of an entry, an empty one where it has none."""
    value = entry.get(key)
    if value is not None and not isinstance(value, list):
        raise DatasetError("is not a list", place=key)
    return value or []
