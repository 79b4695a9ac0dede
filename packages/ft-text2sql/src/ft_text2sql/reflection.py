"""Read the tables of a live database by SQLAlchemy."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ft_core.errors import ArgumentError, DatasetError
from ft_text2sql.identifiers import dialect_name
from ft_text2sql.schema import Column, ForeignKey, Schema, Table


def reflect(database: Any, tables: Collection[str] | None, *, views: bool) -> Schema:
    """Return the tables; see `ft_text2sql.schema.Schema.from_database`."""
    from sqlalchemy import exc, inspect

    engine, namespace, usable = _opened(database)
    try:
        inspector = inspect(engine)
    except exc.NoInspectionAvailable:
        raise ArgumentError(
            "database",
            f"is a SQLAlchemy engine or LlamaIndex's SQLDatabase, not a {type(database).__name__}",
        ) from None
    except exc.SQLAlchemyError as error:
        raise _unreadable(error) from None
    try:
        found = _reflected(inspector, namespace, views=views)
    except exc.SQLAlchemyError as error:
        raise _unreadable(error) from None
    if usable is not None:
        found = [table for table in found if table.name in usable]
    schema = Schema(tuple(found), dialect_name(inspector.dialect.name))
    if not found:
        raise DatasetError("the database has no table that can be read; is it the right one?")
    return schema if tables is None else schema.select(tables)


def _opened(database: Any) -> tuple[Any, str | None, set[str] | None]:
    """Return the engine, the schema to read, and the usable tables of a `SQLDatabase`."""
    if not hasattr(database, "get_usable_table_names"):
        return database, None, None
    # There is no public way to the schema that it was made for.
    namespace = getattr(database, "_schema", None)
    return database.engine, namespace, set(database.get_usable_table_names())


def _unreadable(error: Exception) -> DatasetError:
    # What SQLAlchemy says first is the driver's message: it never quotes the URL's password.
    reason = str(getattr(error, "orig", None) or type(error).__name__).strip().splitlines()
    return DatasetError(f"the database cannot be read: {reason[0] if reason else error}")


def _reflected(inspector: Any, namespace: str | None, *, views: bool) -> list[Table]:
    """Read all tables at once: for 500 of them, a few queries and not thousands."""
    from sqlalchemy.engine.reflection import ObjectKind, ObjectScope

    given = {
        "schema": namespace,
        "kind": ObjectKind.ANY if views else ObjectKind.TABLE,
        "scope": ObjectScope.DEFAULT,
    }
    columns = inspector.get_multi_columns(**given)
    primary = inspector.get_multi_pk_constraint(**given)
    foreign = inspector.get_multi_foreign_keys(**given)
    return [
        Table(
            name=str(name),
            columns=tuple(_column(column, inspector.dialect) for column in found),
            primary_key=tuple((primary.get((schema, name)) or {}).get("constrained_columns", ())),
            foreign_keys=_foreign_keys(foreign.get((schema, name)) or ()),
            namespace=schema,
        )
        for (schema, name), found in sorted(columns.items(), key=lambda item: item[0][1])
        if found
    ]


def _column(column: Mapping[str, Any], dialect: Any) -> Column:
    from sqlalchemy import exc

    try:
        kind = column["type"].compile(dialect=dialect)
    except exc.SQLAlchemyError:  # a type without a name, as SQLite allows
        kind = ""
    return Column(str(column["name"]), "" if kind == "NULL" else kind)


def _foreign_keys(found: Sequence[Mapping[str, Any]]) -> tuple[ForeignKey, ...]:
    return tuple(
        ForeignKey(
            tuple(map(str, key["constrained_columns"])),
            str(key["referred_table"]),
            tuple(map(str, key["referred_columns"])),
            key.get("referred_schema"),
        )
        for key in found
    )
