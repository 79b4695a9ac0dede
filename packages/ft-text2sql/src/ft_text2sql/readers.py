"""Read the text-to-SQL data that others publish: sql-create-context, Spider, text2sql-data."""

from __future__ import annotations

import csv
import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from ft_core import files
from ft_core.datasets.text2sql import Text2SQLDataset, Text2SQLExample
from ft_core.errors import ArgumentError, DatasetError
from ft_text2sql.entries import entries_of, list_of, placed_in, text_of
from ft_text2sql.identifiers import dialect_name
from ft_text2sql.schema import Column, Schema, Table
from ft_text2sql.spider import read_spider as read_spider

Split = Literal["question", "query"]
Variant = Literal["first", "shortest"]

_CSV_COLUMNS = ("Table Name", "Field Name", "Is Primary Key", "Is Foreign Key", "Type")


def read_sql_create_context(path: Path | str) -> Text2SQLDataset:
    """Read the JSON of b-mc2/sql-create-context: a list of question, context and answer.

    Values in double quotes, which the data has much of, come into single quotes: in standard
    SQL the others are names.

    Raises:
        DatasetError: names the file, the entry (from 0) and the reason.
    """
    from ft_text2sql.statements import values_in_quotes

    examples = []
    for index, entry in entries_of(path):
        with placed_in(path, f"[{index}]"):
            question, context = text_of(entry, "question"), text_of(entry, "context")
            sql = text_of(entry, "answer")
            examples.append(
                Text2SQLExample(
                    id=str(index),
                    question=question,
                    sql=values_in_quotes(sql, _lenient_schema(context)),
                    context=context,
                )
            )
    return Text2SQLDataset(examples=examples)


def read_text2sql_data(
    path: Path | str,
    schema_csv: Path | str | None = None,
    split: Split = "question",
    *,
    schema: Schema | None = None,
    variant: Variant = "first",
    plain: bool = False,
    dialect: str = "sqlite",
) -> dict[str, Text2SQLDataset]:
    """Read a JSON file of jkkummerfeld/text2sql-data, such as `geography.json` (GeoQuery).

    Each sentence is an example; its values stand for the variables in the question and in the
    SQL. The SQL is MySQL's; what other databases do not take is put right, and nothing else is
    touched: values in double quotes, `> ALL (...)` for SQLite, the closing semicolon. Of an
    entry with several queries, one that names an alias that is not there is left aside where
    another does not.

    Args:
        path: the JSON file.
        schema_csv: the table of columns beside it, `<name>-schema.csv`, which is taken by
            itself where it lies there. Without one, and without `schema`, the examples only
            name their database.
        split: which of the two splits of the data: by "question", or by SQL "query", where
            no query of one part, values apart, is in another.
        schema: the tables, for the examples' `context`; instead of the CSV, which may list
            tables that a copy of the database lacks.
        variant: of several queries for a sentence take the first, as the paper does, or the
            shortest.
        plain: write the SQL as `ft_text2sql.comparison.normalise_sql` does. Of the long
            aliases of this data nothing is left: shorter by half, and easier to learn.
        dialect: whose SQL to write.

    Returns:
        The parts as the file names them, "train", "dev" and "test" (or folds, by number), in
        the order of the file. The `database` of an example is the file's name.

    Raises:
        ArgumentError: an unknown split, variant or dialect.
        DatasetError: names the file, the entry (from 0), the sentence and the reason.
    """
    if split not in get_args(Split):
        raise ArgumentError("split", f'is "question" or "query", not {split!r}')
    if variant not in get_args(Variant):
        raise ArgumentError("variant", f'is "first" or "shortest", not {variant!r}')
    path = Path(path)
    if schema is None:
        beside = path.with_name(f"{path.stem}-schema.csv")
        given = schema_csv if schema_csv is not None else beside if beside.is_file() else None
        schema = None if given is None else _read_schema_csv(given, dialect)
    common: dict[str, Any] = {
        "context": "" if schema is None else schema.to_text("create"),
        "database": path.stem,
        "dialect": dialect_name(dialect),
    }
    finish = _finisher(dialect, schema, plain=plain)
    examples: dict[str, list[Text2SQLExample]] = defaultdict(list)
    for place, part, question, sql in _sentences(path, split, variant):
        with placed_in(path, place):
            name = f"{path.stem}{place.replace('.sentences', '')}"
            example = Text2SQLExample(id=name, question=question, sql=finish(sql), **common)
            examples[part].append(example)
    return {part: Text2SQLDataset(examples=found) for part, found in examples.items()}


def _sentences(path: Path, split: Split, variant: Variant) -> Iterator[tuple[str, str, str, str]]:
    """Yield the place, the part, the question and the SQL of each sentence."""
    for index, entry in entries_of(path):
        with placed_in(path, f"[{index}]"):
            query = _choose(_queries(entry), variant)
            sentences = list_of(entry, "sentences")
        for number, sentence in enumerate(sentences):
            place = f"[{index}].sentences[{number}]"
            with placed_in(path, place):
                by_question = split == "question"
                part = text_of(sentence if by_question else entry, f"{split}-split")
                filled = _filled_in(entry, sentence, query)
            yield (place, part, *filled)


def _queries(entry: Mapping[str, Any]) -> list[str]:
    found = entry.get("sql")
    queries = [found] if isinstance(found, str) else found
    if not isinstance(queries, list) or not queries or not all(isinstance(q, str) for q in queries):
        raise DatasetError("is one SQL query or a list of them", place="sql")
    return queries


def _choose(queries: list[str], variant: Variant) -> str:
    from ft_text2sql.statements import parse, resolve

    if len(queries) == 1:
        return queries[0]
    trees = {query: parse(query, "mysql") for query in queries}
    sound = [query for query, tree in trees.items() if tree and not resolve(tree).unbound]
    return min(sound or queries, key=len if variant == "shortest" else lambda _: 0)


def _filled_in(entry: Mapping[str, Any], sentence: Any, query: str) -> tuple[str, str]:
    """Return the question and the SQL with the values of the variables."""
    if not isinstance(sentence, Mapping):
        raise DatasetError("is not an object")
    values = sentence.get("variables") or {}
    if not isinstance(values, Mapping) or not all(isinstance(v, str) for v in values.values()):
        raise DatasetError("maps names to texts", place="variables")
    described = entry.get("variables") or []
    if not isinstance(described, list):
        raise DatasetError("of the entry are not a list", place="variables")
    examples: dict[str, Any] = {
        variable["name"]: variable.get("example")
        for variable in described
        if isinstance(variable, Mapping) and isinstance(variable.get("name"), str)
    }
    if "" in values or "" in examples:
        raise DatasetError("one has no name, here or in the entry", place="variables")
    filled: dict[str, str] = {}
    for name in {*values, *(name for name in examples if name in query)}:
        # A variable of the SQL alone has its value in the entry.
        value = values.get(name) or examples.get(name)
        if not isinstance(value, str) or not value:
            raise DatasetError(f"{name!r} has no value, here or in the entry", place="variables")
        filled[name] = value
    question = _replace(text_of(sentence, "text"), filled, lambda value: value)
    return question, _replace(query, filled, lambda value: value.replace('"', '""'))


def _replace(text: str, values: Mapping[str, str], quote: Callable[[str], str]) -> str:
    if not values:
        return text
    longest_first = sorted(values, key=len, reverse=True)  # name10 is not name1 and a 0
    pattern = "|".join(map(re.escape, longest_first))
    return re.sub(pattern, lambda match: quote(values[match.group()]), text)


def _finisher(dialect: str, schema: Schema | None, *, plain: bool) -> Callable[[str], str]:
    """Return what makes of a query of the data one that the dialect takes."""
    from ft_text2sql.comparison import normalise_sql
    from ft_text2sql.statements import standard_quotes, without_quantifiers

    dialect = dialect_name(dialect)

    @functools.lru_cache(maxsize=1024)
    def finish(sql: str) -> str:
        sql = sql.strip().rstrip("; ")
        if dialect != "mysql":
            sql = standard_quotes(sql, lambda _: False, "mysql")
        if dialect == "sqlite":
            sql = without_quantifiers(sql, dialect)
        return normalise_sql(sql, dialect, schema) if plain else sql

    return finish


def _read_schema_csv(path: Path | str, dialect: str) -> Schema:
    """Read `<name>-schema.csv`: a line for each column; a line of dashes between tables.

    Which table a foreign key refers to is not in it.
    """
    lines = files.read_text(path).splitlines()
    rows = csv.reader(lines, skipinitialspace=True)
    header = [cell.strip() for cell in next(rows, [])]
    missing = [name for name in _CSV_COLUMNS if name not in header]
    if missing:
        raise DatasetError(f"has no column {missing[0]!r}", source=path, place="line 1")
    columns: dict[str, list[Column]] = defaultdict(list)
    primary: dict[str, list[str]] = defaultdict(list)
    for number, row in enumerate(rows, start=2):
        cells = dict(zip(header, (cell.strip() for cell in row), strict=False))
        table, name = cells.get("Table Name", ""), cells.get("Field Name", "")
        if set(table) <= {"-"}:
            continue
        if not name:
            raise DatasetError("names no field", source=path, place=f"line {number}")
        columns[table].append(Column(name, cells.get("Type", "")))
        if cells.get("Is Primary Key", "").lower() in ("y", "yes", "true"):
            primary[table].append(name)
    if not columns:
        raise DatasetError("lists no table", source=path)
    tables = [Table(name, tuple(found), tuple(primary[name])) for name, found in columns.items()]
    return Schema(tuple(tables), dialect)


@functools.lru_cache(maxsize=256)
def _lenient_schema(context: str) -> Schema | None:
    """Return the schema of a text, None where it is no CREATE TABLE statement."""
    try:
        return Schema.from_sql(context)
    except (ArgumentError, DatasetError):
        return None
