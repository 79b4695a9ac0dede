"""The tables of a database: read from CREATE TABLE statements or a live database, and written."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from ft_core.errors import ArgumentError
from ft_text2sql.identifiers import dialect_name, quote_name

Style = Literal["lines", "create"]
"""`table(column, column)`, a line each, or CREATE TABLE statements, a line each."""


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    name: str
    type: str = ""
    """As the database writes it, "VARCHAR(20)"; "" where it has none."""


@dataclass(frozen=True)
class ForeignKey:
    """Columns that refer to those of another table."""

    columns: tuple[str, ...]
    table: str
    referred: tuple[str, ...] = ()
    """Columns of `table`; empty for its primary key."""
    namespace: str | None = None
    """The schema of `table`, where it is not the default one."""


@dataclass(frozen=True)
class Table:
    """A table, or a view."""

    name: str
    columns: tuple[Column, ...]
    primary_key: tuple[str, ...] = ()
    foreign_keys: tuple[ForeignKey, ...] = ()
    namespace: str | None = None
    """What the database calls its schema, where it is not the default one."""

    @property
    def full_name(self) -> str:
        """The name with its namespace, as in "sales.orders"."""
        return f"{self.namespace}.{self.name}" if self.namespace else self.name


@dataclass(frozen=True)
class Schema:
    """The tables of a database.

    Raises:
        ArgumentError: an unknown dialect, or two tables of one name.
    """

    tables: tuple[Table, ...]
    dialect: str = "sqlite"
    """As sqlglot names it; SQLAlchemy's names do, too."""
    _by_name: dict[str, Table] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dialect", dialect_name(self.dialect))
        object.__setattr__(self, "tables", tuple(self.tables))
        by_name: dict[str, Table] = {}
        for table in self.tables:
            if by_name.setdefault(table.full_name, table) is not table:
                raise ArgumentError("tables", f"{table.full_name!r} stands twice; keep one")
        for table in self.tables:  # exact names win over those that differ in case
            by_name.setdefault(table.name, table)
            by_name.setdefault(table.full_name.casefold(), table)
            by_name.setdefault(table.name.casefold(), table)
        object.__setattr__(self, "_by_name", by_name)

    @classmethod
    def from_sql(cls, text: str, dialect: str = "sqlite") -> Schema:
        """Read the CREATE TABLE statements of a text; other statements in it are passed over.

        Names may be reserved words without quotes, as data sets have them. Of the columns'
        constraints only primary and foreign keys are kept.

        Raises:
            ArgumentError: an unknown dialect.
            DatasetError: there is no CREATE TABLE statement, or one has no columns or does
                not end; it names the table.
        """
        from ft_text2sql.create_table import read_tables

        return cls(tuple(read_tables(text, dialect_name(dialect))), dialect)

    @classmethod
    def from_database(
        cls, database: Any, tables: Collection[str] | None = None, *, views: bool = True
    ) -> Schema:
        """Read the tables of a live database.

        Args:
            database: a SQLAlchemy engine or connection, or LlamaIndex's `SQLDatabase`, of
                which only the usable tables are read.
            tables: only these; all by default.
            views: whether views count as tables.

        Raises:
            ArgumentError: a table that is not there, or something else as a database.
            DatasetError: the database cannot be read, or has no table.
        """
        from ft_text2sql.reflection import reflect

        return reflect(database, tables, views=views)

    def as_mapping(self) -> dict[str, list[str]]:
        """Return table to columns, as `ft_text2sql.names.check_schema` takes them."""
        return {table.full_name: [c.name for c in table.columns] for table in self.tables}

    def table(self, name: str) -> Table | None:
        """Return the table of this name, with or without its namespace, in any case."""
        return self._by_name.get(name) or self._by_name.get(name.casefold())

    def has_column(self, table: str, column: str) -> bool:
        """Say whether the table is there and has the column, names in any case."""
        found = self.table(table)
        wanted = column.casefold()
        return found is not None and any(c.name.casefold() == wanted for c in found.columns)

    def select(self, tables: Iterable[str]) -> Schema:
        """Return the schema of these tables alone, in the order of this one.

        Raises:
            ArgumentError: a table that is not there.
        """
        wanted = {id(self._get(name)) for name in tables}
        return Schema(tuple(t for t in self.tables if id(t) in wanted), self.dialect)

    def to_text(self, style: Style = "lines", tables: Iterable[str] | None = None) -> str:
        """Return the schema as a prompt has it.

        Args:
            style: "lines" has a line `table(column, column)` for each table: short. "create"
                has a CREATE TABLE statement on a line for each, with types and keys; `from_sql`
                reads it back.
            tables: only these; all by default.

        Raises:
            ArgumentError: an unknown style, or a table that is not there.
        """
        if style not in ("lines", "create"):
            raise ArgumentError("style", f'is "lines" or "create", not {style!r}')
        schema = self if tables is None else self.select(tables)
        write = self._line if style == "lines" else self._statement
        return "\n".join(map(write, schema.tables))

    def _line(self, table: Table) -> str:
        return f"{self._name(table)}({self._list(column.name for column in table.columns)})"

    def _statement(self, table: Table) -> str:
        parts = [f"{self._quoted(c.name)} {c.type}".rstrip() for c in table.columns]
        if table.primary_key:
            parts.append(f"PRIMARY KEY ({self._list(table.primary_key)})")
        for key in table.foreign_keys:
            target = self._name(Table(key.table, (), namespace=key.namespace))
            referred = f" ({self._list(key.referred)})" if key.referred else ""
            parts.append(f"FOREIGN KEY ({self._list(key.columns)}) REFERENCES {target}{referred}")
        return f"CREATE TABLE {self._name(table)} ({', '.join(parts)});"

    def _name(self, table: Table) -> str:
        name = self._quoted(table.name)
        return f"{self._quoted(table.namespace)}.{name}" if table.namespace else name

    def _list(self, names: Iterable[str]) -> str:
        return ", ".join(map(self._quoted, names))

    def _quoted(self, name: str) -> str:
        return quote_name(name, self.dialect)

    def _get(self, name: str) -> Table:
        table = self.table(name)
        if table is None:
            from ft_text2sql.names import did_you_mean

            near = did_you_mean(name, [table.full_name for table in self.tables])
            raise ArgumentError("tables", f"there is no table {name!r}{near}")
        return table
