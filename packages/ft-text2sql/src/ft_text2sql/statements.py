"""SQL statements as trees for comparison: which name stands for what, and repairs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sqlglot import Dialect, Token, TokenType, exp
from sqlglot.errors import TokenError

from ft_text2sql.errors import UnsafeSQLError
from ft_text2sql.identifiers import dialect_name
from ft_text2sql.parsing import parse_query

if TYPE_CHECKING:
    from ft_text2sql.schema import Schema


def parse(sql: str, dialect: str) -> exp.Query | None:
    """Return the tree of a query, or None for what `parse_query` refuses, or cannot read.

    Raises:
        ArgumentError: sqlglot knows no such dialect.
    """
    try:
        return parse_query(sql, dialect_name(dialect))
    except UnsafeSQLError:
        return None


def tokens_of(sql: str, dialect: str) -> list[Token]:
    """Return the tokens of any SQL text; none where a quote or a comment has no end."""
    try:
        return Dialect.get_or_raise(dialect_name(dialect)).tokenize(sql)
    except TokenError:
        return []


def standard_quotes(sql: str, is_name: Callable[[str], bool], dialect: str = "sqlite") -> str:
    """Put values in single quotes that stand in double quotes, as MySQL and SQLite allow.

    In standard SQL, PostgreSQL and sqlglot, "Texas" is a column.

    Args:
        sql: a statement; the rest of it stays as it is.
        is_name: tells whether a text in double quotes is a name that the statement may use.
        dialect: whose SQL it is.
    """
    parts, end = [], 0
    for token in tokens_of(sql, dialect):
        quoted = sql[token.start : token.start + 1] == '"'
        if not quoted or (token.token_type is TokenType.IDENTIFIER and is_name(token.text)):
            continue
        value = token.text.replace("'", "''")
        parts += [sql[end : token.start], f"'{value}'"]
        end = token.end + 1
    return "".join([*parts, sql[end:]])


def values_in_quotes(sql: str, schema: Schema | None) -> str:
    """Apply `standard_quotes`, telling values from names by the tables that the query names."""
    if '"' not in sql:
        return sql
    words = {token.text.casefold() for token in tokens_of(sql, "sqlite")}
    tables = [] if schema is None else [t for t in schema.tables if t.name.casefold() in words]
    names = {column.name.casefold() for table in tables for column in table.columns}
    names |= {table.name.casefold() for table in tables}
    names |= {name.casefold() for name in _names_in(sql)}
    return standard_quotes(sql, lambda name: name.casefold() in names, "sqlite")


def _names_in(sql: str) -> Iterator[str]:
    """Yield what can only be a name: aliases, with or without AS, and what stands at a dot."""
    tree = parse(sql, "sqlite")
    if tree is None:
        yield from re.findall(r'\bas\s+"([^"]*)"', sql, re.IGNORECASE)
        return
    for node in tree.find_all(exp.Identifier):
        bare = isinstance(node.parent, exp.Column) and not node.parent.table
        # Of a table, an alias that stands without quotes says nothing: with AS s, "S" is a value.
        if isinstance(node.parent, exp.Alias) or (node.quoted and not bare):
            yield node.name


def without_quantifiers(sql: str, dialect: str = "sqlite") -> str:
    """Write x > ALL (SELECT y ...) as x > (SELECT MAX(y) ...), for SQLite, which has no ALL.

    The two differ where the subquery has no row or a NULL: nothing is greater than no maximum.
    What holds no such condition stays as it is, to the letter.
    """
    tree = parse(sql, dialect)
    if tree is None:
        return sql
    changed = False
    for node in list(tree.walk()):
        if isinstance(node, exp.All | exp.Any):
            changed = _replace_quantifier(node) or changed
    return tree.sql(dialect=dialect_name(dialect)) if changed else sql


def _replace_quantifier(node: exp.All | exp.Any) -> bool:
    query, parent = node.this.unnest(), node.parent
    greater = isinstance(parent, exp.GT | exp.GTE)
    if not (greater or isinstance(parent, exp.LT | exp.LTE)) or node.arg_key != "expression":
        return False
    if not isinstance(query, exp.Select) or len(query.expressions) != 1 or query.args.get("limit"):
        return False
    column = query.expressions[0].unalias()
    largest = greater == isinstance(node, exp.All)
    query.set("expressions", [(exp.Max if largest else exp.Min)(this=column.copy())])
    node.replace(exp.Subquery(this=query.copy()))
    return True


@dataclass
class Source:
    """A table or subquery in a FROM clause, and the columns that name it."""

    node: exp.Table | exp.Subquery
    select: exp.Select
    local: list[exp.Column] = field(default_factory=list)
    """Of the same SELECT."""
    outer: list[exp.Column] = field(default_factory=list)
    """Of a SELECT within it."""

    @property
    def name(self) -> str:
        """The name that columns say: the alias, or the table's own."""
        return str(self.node.alias_or_name).casefold()

    @property
    def table(self) -> str:
        """The table's own name, "" for a subquery."""
        return str(self.node.name).casefold() if isinstance(self.node, exp.Table) else ""


@dataclass
class Names:
    """What the names of a statement stand for."""

    sources: dict[int, list[Source]]
    """Id of a SELECT's node to what it reads from, in the order of the text."""
    unbound: list[exp.Column]
    """Columns of a table or alias that is not there."""


def resolve(tree: exp.Query) -> Names:
    """Find out which table or subquery each column with a qualifier belongs to."""
    names = Names({}, [])
    for select in tree.find_all(exp.Select, bfs=False):
        names.sources[id(select)] = [Source(node, select) for node in _sources(select)]
    for column in tree.find_all(exp.Column, bfs=False):
        if column.table:
            _bind(column, names)
    return names


def _sources(select: exp.Select) -> Iterator[exp.Table | exp.Subquery]:
    """Yield what a SELECT reads from, also in nested joins, and nothing of its subqueries."""
    clauses = [select.args.get("from_"), *select.args.get("joins", [])]
    waiting = [clause.this for clause in reversed(clauses) if clause is not None]
    while waiting:
        node = waiting.pop()
        if isinstance(node, exp.Subquery) and not isinstance(node.this, exp.Query):
            waiting.append(node.this)  # brackets around a join
        elif isinstance(node, exp.Table | exp.Subquery):
            yield node
        elif isinstance(node, exp.Lateral | exp.Paren):
            waiting.append(node.this)
        waiting += [join.this for join in reversed(node.args.get("joins") or [])]


def _bind(column: exp.Column, names: Names) -> None:
    qualifier = column.table.casefold()
    nearest = select = column.find_ancestor(exp.Select)
    while select is not None:
        for source in names.sources[id(select)]:
            if source.name == qualifier:
                (source.local if select is nearest else source.outer).append(column)
                return
        select = select.find_ancestor(exp.Select)
    if not isinstance(nearest, exp.Select) or not nearest.find(exp.Lateral, exp.Unnest):
        names.unbound.append(column)
