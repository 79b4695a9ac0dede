"""Names in SQL: when they need quotes, and whose rules hold."""

from __future__ import annotations

import functools
from typing import Any

from ft_core.errors import ArgumentError

# As sqlglot calls them, and as SQLAlchemy does.
_SQLALCHEMY = {
    "mysql": "mysql",
    "oracle": "oracle",
    "postgres": "postgresql",
    "sqlite": "sqlite",
    "tsql": "mssql",
}
_SQLGLOT = {theirs: ours for ours, theirs in _SQLALCHEMY.items()} | {"mariadb": "mysql"}
_EITHER_CASE = frozenset({"mysql", "sqlite", "tsql"})


def dialect_name(name: str) -> str:
    """Return sqlglot's name for a dialect, such as "postgres", given its or SQLAlchemy's.

    Raises:
        ArgumentError: sqlglot knows no such dialect.
    """
    from sqlglot import Dialect

    ours = _SQLGLOT.get(name, name)
    try:
        Dialect.get_or_raise(ours)
    except ValueError:
        known = ", ".join(sorted(_SQLALCHEMY))
        raise ArgumentError(
            "dialect", f"{name!r} is unknown to sqlglot; write one such as {known}"
        ) from None
    return ours


def ignores_case(dialect: str) -> bool:
    """Say whether "Name" and name are one even in quotes, as in SQLite, MySQL and SQL Server."""
    return dialect in _EITHER_CASE


def quote_name(name: str, dialect: str) -> str:
    """Return a name of a table or column as SQL writes it: in quotes where it needs them.

    The reserved words are those of SQLAlchemy's dialect; for one that SQLAlchemy does not
    have, the standard's.
    """
    preparer = _preparer(dialect)
    # SQLAlchemy cannot take an empty name, and overlooks a line feed at the end.
    if not name or not name.isprintable():
        return str(preparer.quote_identifier(name))
    if ignores_case(dialect) and preparer.quote(name.lower()) == name.lower():
        return name
    return str(preparer.quote(name))


@functools.cache
def _preparer(dialect: str) -> Any:
    from sqlalchemy.dialects import registry
    from sqlalchemy.engine.default import DefaultDialect

    name = _SQLALCHEMY.get(dialect)
    return (registry.load(name)() if name else DefaultDialect()).identifier_preparer
