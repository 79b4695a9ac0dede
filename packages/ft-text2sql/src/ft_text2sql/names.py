"""Which tables and columns a query means: scopes, quoting and case as the database has them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches

from sqlglot import exp
from sqlglot.errors import SqlglotError
from sqlglot.optimizer.scope import Scope, traverse_scope

from ft_text2sql.errors import SchemaError
from ft_text2sql.functions import fold_ascii
from ft_text2sql.parsing import parse_query, too_deep

_HIDDEN = {
    "sqlite": {"rowid", "oid", "_rowid_"},
    "postgres": {"ctid", "xmin", "xmax", "cmin", "cmax", "tableoid", "user"},
}
"""Columns that every table has without listing them, and words that look like a column."""

_NO_PLACE_FOR_TEXT = (
    *(exp.Select, exp.Alias, exp.AggFunc, exp.Distinct),
    *(exp.Ordered, exp.Group),
)

Columns = set[str] | None
"""The columns of a source; None where they cannot be known."""


def fold(name: str, dialect: str, *, quoted: bool = False) -> str:
    """Return a name as the database compares it.

    SQLite ignores the case of ASCII letters, in quotes too; PostgreSQL lowers what is not
    quoted. Neither folds other letters, so `str.lower`, for which the Kelvin sign is a k, would
    take two names for one.
    """
    return name if quoted and dialect == "postgres" else fold_ascii(name)


def identifier_key(node: exp.Identifier, dialect: str) -> str:
    """Return what stands for the name of an identifier in comparisons."""
    return fold(node.name, dialect, quoted=bool(node.args.get("quoted")))


def table_key(name: str, dialect: str) -> str:
    """Return what stands for a name as the database's catalogue has it."""
    return fold(name, dialect, quoted=True)


def did_you_mean(name: str, names: Collection[str]) -> str:
    """Return "; did you mean ...?" with the nearest of the names, or else all of a few."""
    by_key = {each.lower(): each for each in names}
    near = get_close_matches(name.lower(), by_key, n=3, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(repr(by_key[each]) for each in near)}?"
    if names and len(names) <= 12:
        return f"; there are {', '.join(sorted(names))}"
    return ""


def real_tables(node: exp.Expr, dialect: str) -> Iterator[exp.Table]:
    """Yield the tables and table functions that are read, those that stand for a CTE left out.

    A CTE is visible in the query that it stands before and in the later CTEs; in itself only
    after RECURSIVE: in `WITH t AS (SELECT * FROM t)` the inner t is the table. Where databases
    see more (SQLite lets a CTE name a later one), this sees a table, and the query is refused.

    Raises:
        UnsafeSQLError: it is nested too deeply.
    """
    try:
        yield from _real_tables(node, dialect, frozenset())
    except RecursionError:
        raise too_deep() from None


def _real_tables(node: exp.Expr, dialect: str, visible: frozenset[str]) -> Iterator[exp.Table]:
    head = node.args.get("with_")
    if isinstance(head, exp.With):
        for cte in head.expressions:
            name = identifier_key(cte.args["alias"].this, dialect)
            inner = visible | {name} if head.args.get("recursive") else visible
            yield from _real_tables(cte.this, dialect, inner)
            visible |= {name}
    if isinstance(node, exp.Table):
        named = isinstance(node.this, exp.Identifier) and not node.args.get("db")
        if not (named and identifier_key(node.this, dialect) in visible):
            yield node
    for child in node.iter_expressions():
        if child is not head:
            yield from _real_tables(child, dialect, visible)


def check_schema(sql: str, schema: Mapping[str, Collection[str]], dialect: str) -> None:
    """Check that every table and column of a query exists.

    What cannot be known without the database passes: columns of table functions, and of a star
    over one. SQLite takes a name in double quotes that no column has for a string; so does this
    where a string makes sense: `city = "Oslo"` passes, `max("sise")` names no column.

    Args:
        sql: one query.
        schema: table to its columns, named as the database names them.
        dialect: the database's, as sqlglot names it.

    Raises:
        SchemaError: names what does not exist, and what comes near it.
        UnsafeSQLError: it is not one query.
    """
    query = parse_query(sql, dialect)
    known = {
        table_key(table, dialect): {table_key(column, dialect) for column in columns}
        for table, columns in schema.items()
    }
    for table in real_tables(query, dialect):
        if not isinstance(table.this, exp.Identifier):
            continue
        if _catalogue_name(table, dialect, known) is None:
            raise SchemaError(f"there is no table {table.name!r}{did_you_mean(table.name, schema)}")
    for node in query.find_all(exp.Identifier):
        node.set("this", identifier_key(node, dialect))
    try:
        scopes = traverse_scope(query)
    except (SqlglotError, RecursionError):
        return  # what sqlglot cannot resolve, the database will judge
    names = _Names(scopes, known, dialect)
    seen: set[int] = set()  # a scope lists the columns of those inside it, which come first
    for scope in scopes:
        for column in scope.columns:
            if id(column) not in seen:
                seen.add(id(column))
                names.check(column, scope)


def _catalogue_name(
    table: exp.Table, dialect: str, known: Mapping[str, Collection[str]]
) -> str | None:
    """Return the key of a table in the schema, by its own name or "schema.name"."""
    parts = [
        identifier_key(part, dialect) for part in table.parts if isinstance(part, exp.Identifier)
    ]
    return next((name for name in (".".join(parts), parts[-1]) if name in known), None)


class _Names:
    """The columns that can be named in each scope of one query, all names folded."""

    def __init__(self, scopes: list[Scope], known: dict[str, set[str]], dialect: str) -> None:
        self._known = known
        self._dialect = dialect
        self._hidden = _HIDDEN.get(dialect, set())
        self._outputs: dict[int, Columns] = {}
        for scope in scopes:  # inner scopes come first
            self._outputs[id(scope)] = self._output(scope)

    def check(self, column: exp.Column, scope: Scope) -> None:
        """Raise SchemaError if no source of the scope, or of one around it, has the column."""
        name = column.name
        if isinstance(column.this, exp.Star) or name in self._hidden:
            return
        if column.table:
            self._check_qualified(column, scope)
            return
        candidates: set[str] = set()
        for each in _outwards(scope):
            for source in each.sources:
                columns = self._columns(each, source)
                if columns is None:
                    return
                candidates |= columns
                if name == source:  # the row as a whole, in PostgreSQL
                    return
            if isinstance(each.expression, exp.SetOperation):
                candidates |= {select.alias_or_name for select in _selects(each)}
            else:
                candidates |= {select.alias for select in _selects(each) if select.alias}
        if name in candidates:
            return
        if self._dialect == "sqlite" and column.this.args.get("quoted") and _may_be_text(column):
            return
        raise SchemaError(f"there is no column {name!r}{did_you_mean(name, candidates)}")

    def _check_qualified(self, column: exp.Column, scope: Scope) -> None:
        source = column.table
        owner = next((each for each in _outwards(scope) if source in each.sources), None)
        if owner is None:
            names = {name for each in _outwards(scope) for name in each.sources}
            raise SchemaError(
                f"{source}.{column.name} names {source!r}, which is neither a table of this "
                f"query nor an alias{did_you_mean(source, names)}"
            )
        columns = self._columns(owner, source)
        if columns is not None and column.name not in columns:
            near = did_you_mean(column.name, columns)
            raise SchemaError(f"there is no column {column.name!r} in {source!r}{near}")

    def _columns(self, scope: Scope, source: str) -> Columns:
        origin = scope.sources[source]
        if isinstance(origin, Scope):
            columns = self._outputs.get(id(origin))
            alias = None
        else:
            table = origin if isinstance(origin, exp.Table) else None
            key = table and isinstance(table.this, exp.Identifier) and self._key(table)
            columns = self._known.get(key) if key else None
            alias = table.args.get("alias") if table else None
        if alias is not None and alias.args.get("columns"):
            return None  # t AS a(x, y): renamed
        return columns

    def _key(self, table: exp.Table) -> str | None:
        parts = [part.name for part in table.parts]
        return next((name for name in (".".join(parts), parts[-1]) if name in self._known), None)

    def _output(self, scope: Scope) -> Columns:
        """Return the names of the columns that a query gives."""
        alias = scope.expression.parent
        listed = alias.args.get("alias") if alias is not None else None
        if isinstance(listed, exp.TableAlias) and listed.args.get("columns"):
            return {column.name for column in listed.args["columns"]}
        result: set[str] = set()
        for select in _selects(scope):
            star = select.this if isinstance(select, exp.Column) else select
            if not isinstance(star, exp.Star):
                result.add(select.alias_or_name)
                continue
            table = select.table if isinstance(select, exp.Column) else ""
            for source in scope.sources if not table else [table]:
                columns = self._columns(scope, source) if source in scope.sources else None
                if columns is None:
                    return None
                result |= columns
        return result


def _may_be_text(column: exp.Column) -> bool:
    """Whether a string in the place of a column would change what a query returns."""
    node: exp.Expr = column
    while isinstance(node.parent, exp.Paren):
        node = node.parent
    parent = node.parent
    if isinstance(parent, _NO_PLACE_FOR_TEXT):
        return False
    if isinstance(parent, exp.Predicate):  # of two constants, one is meant to be a column
        others = [each for each in parent.iter_expressions() if each is not node]
        return any(each.find(exp.Column, exp.Query) for each in others)
    return True


def _outwards(scope: Scope) -> Iterator[Scope]:
    current: Scope | None = scope
    while current is not None:
        yield current
        current = current.parent


def _selects(scope: Scope) -> list[exp.Expr]:
    query = scope.expression
    if isinstance(query, exp.SetOperation):
        while isinstance(query, exp.SetOperation | exp.Subquery):
            query = query.this
    return list(query.expressions) if isinstance(query, exp.Select) else []
