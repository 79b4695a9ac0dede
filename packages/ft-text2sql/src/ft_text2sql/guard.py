"""Let single SELECT statements through, and nothing else.

`check_select` does not look for dangers in the text. It parses the statement, allows only those
parts of the language that a query is made of (`_NODES`), those functions that are known to be
harmless (`ft_text2sql.functions`) and those tables that it was given, and returns the statement
written anew from the tree. What runs is what was checked: comments, version comments, odd blanks,
escapes and unclosed quotes, which a parser and a database may read differently, are gone.

The guard is one of two layers; `ft_text2sql.database` protects the connection too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from sqlglot import exp

from ft_core.errors import ArgumentError
from ft_text2sql.errors import UnsafeSQLError
from ft_text2sql.functions import allowed_functions, fold_ascii, is_allowed_node, words
from ft_text2sql.names import check_schema as check_schema
from ft_text2sql.names import did_you_mean, identifier_key, real_tables, table_key
from ft_text2sql.parsing import parse_query, render

# Whatever is not here is refused, what a later sqlglot learns to read included.
_NODES = words(
    """
    Add Adjacent Alias All Any AtTimeZone Between BitString BitwiseAnd BitwiseLeftShift BitwiseNot
    BitwiseOr BitwiseRightShift BitwiseXor Boolean Bracket CTE Column ColumnDef Cube DPipe DataType
    DataTypeParam Distance Distinct Div EQ Escape Except Fetch Filter From GT GTE Glob Group
    GroupingSets Having HexString ILike Identifier IgnoreNulls In IntDiv Intersect Interval
    IntervalSpan Is JSONKeyValue JSONPath JSONPathKey JSONPathRoot JSONPathSubscript
    JSONPathWildcard Join Kwarg LT LTE Lateral Like Limit LimitOptions Literal Mod Mul NEQ National
    Neg Not Null NullSafeEQ NullSafeNEQ Offset Order Ordered Overlaps Paren RawString RespectNulls
    Rollup Select SimilarTo Slice Star Sub Subquery Table TableAlias Tuple Union Values Var Where
    Window WindowSpec With WithinGroup
    """
)

_REASONS = {
    "Into": "writes its rows into a table or a file (INTO)",
    "Lock": "locks rows (FOR UPDATE or FOR SHARE)",
    "Placeholder": "holds a placeholder for a value; write the value itself",
    "Parameter": "holds a parameter; write the value itself",
    "SessionParameter": "reads a setting of the session",
    "ObjectIdentifier": "casts to a type that looks into the system catalogues",
    "PseudoType": "casts to a pseudo-type",
    "ByteString": "holds a string with backslash escapes; write it without",
    "UnicodeString": "holds a string with unicode escapes; write it without",
    "Dot": "calls a function, or reads a field, by a qualified name",
    "Operator": "names an operator by its schema",
    "TableSample": "reads a sample of a table",
    "XMLTable": "calls the function XMLTABLE",
    "IndexTableHint": "holds an index hint",
    "Hint": "holds a hint for the planner",
}
_WRITES = {"Insert", "Update", "Delete", "Merge", "Create", "Drop", "Alter", "TruncateTable"}

_NAME = re.compile(r"[^\W\d][\w$]*")
"""An unquoted name: no zero-width or other invisible characters, which \\w leaves out."""
_NUMBER = re.compile(r"[0-9.]+(e[+-]?[0-9]+)?", re.IGNORECASE | re.ASCII)
_TYPE = re.compile(r"[A-Za-z][A-Za-z0-9_ ]*", re.ASCII)
_SYSTEM = re.compile(r"(sqlite_|pragma_|pg_|information_schema|dbstat$|bytecode$|tables_used$)")
_MAX_PAD = 10_000
_MAX_TRIM = 100
_OF_FUNCTIONS = {"key", "value", "ordinality"}
"""Columns that functions in FROM name themselves: `json_each`, and WITH ORDINALITY."""
_CALLED_WITHOUT_BRACKETS = words(
    """
    current_catalog current_date current_role current_schema current_time current_timestamp
    current_user localtime localtimestamp session_user system_user user
    """
)


def check_select(
    sql: str,
    *,
    dialect: str,
    tables: Collection[str] | None = None,
    functions: Collection[str] = (),
) -> str:
    """Return the SQL to run in place of `sql`, which is one SELECT and harmless.

    Args:
        sql: what a model wrote.
        dialect: the database's, as sqlglot names it ("sqlite", "postgres").
        tables: the tables and views that may be read, as the database names them; a table of
            another schema as "schema.table". None: every table that is named without a schema
            and is not one of the system's.
        functions: names of further functions that may be called, without a schema.

    Raises:
        UnsafeSQLError: says in one sentence what is not allowed. `InvalidSQLError`, which is
            one, says that it is not SQL of this dialect.
        ArgumentError: sqlglot does not know the dialect.
    """
    if isinstance(tables, str) or isinstance(functions, str):
        raise ArgumentError("tables, functions", "are lists of names, not one name")
    allowed = allowed_functions(dialect) | {fold_ascii(name) for name in functions}
    query = parse_query(sql, dialect)
    try:
        _check(query, dialect, tables, allowed)
        text = render(query, dialect)
        # The text is what runs: it is read again and checked, and must be written the same again.
        again = parse_query(text, dialect)
        _check(again, dialect, tables, allowed)
        if render(again, dialect) != text:
            raise UnsafeSQLError("can be read in two ways; write it in a simpler form")
    except RecursionError:
        raise UnsafeSQLError("is nested too deeply; write it with fewer terms") from None
    return text


def _check(
    query: exp.Query, dialect: str, tables: Collection[str] | None, functions: Collection[str]
) -> None:
    for node in query.walk():
        if isinstance(node, exp.Func):
            _check_function(node, functions)
        elif type(node).__name__ not in _NODES:
            raise UnsafeSQLError(_reason(node))
        _check_parts(node, dialect)
    _check_tables(query, dialect, tables)
    if dialect == "postgres":
        _check_attributes(query)


def _reason(node: exp.Expr) -> str:
    kind = type(node).__name__
    if kind in _WRITES:
        return f"holds a {node.key.upper()}; only SELECT is allowed, also inside WITH"
    return _REASONS.get(kind, f"holds {kind}, which is no part of a plain SELECT")


def _check_function(node: exp.Func, allowed: Collection[str]) -> None:
    if isinstance(node, exp.Pad):
        _check_pad(node)
    if isinstance(node, exp.Trim):
        _check_trim(node)
    if isinstance(node, exp.Anonymous):
        names = [node.name]
    elif is_allowed_node(type(node).__name__):
        return
    else:
        names = list(node.sql_names())
    # Only ASCII is folded: the long s and the Kelvin sign are no letters of a function's name.
    if not any(fold_ascii(name) in allowed for name in names):
        raise UnsafeSQLError(f"calls the function {names[0][:60]}, which is not allowed")


def _check_pad(node: exp.Pad) -> None:
    """`lpad(x, 1000000000)` makes a gigabyte out of a letter."""
    length = node.expression
    if not (isinstance(length, exp.Literal) and length.is_int and int(length.name) <= _MAX_PAD):
        raise UnsafeSQLError(f"pads a text to a length that is no number up to {_MAX_PAD:,}")


def _check_trim(node: exp.Trim) -> None:
    """SQLite compares each character with each of the set, and nothing can interrupt it."""
    characters = node.expression
    if characters is None:
        return
    short = isinstance(characters, exp.Literal) and len(characters.name) <= _MAX_TRIM
    if not short:
        raise UnsafeSQLError(
            f"trims characters that are not written out, or more than {_MAX_TRIM} of them"
        )


def _check_parts(node: exp.Expr, dialect: str) -> None:
    """Refuse what a node of an allowed kind should not hold."""
    if isinstance(node, exp.Identifier):
        _check_name(node, dialect)
    elif isinstance(node, exp.Literal):
        if not node.is_string and not _NUMBER.fullmatch(node.name):
            raise UnsafeSQLError(f"holds {node.name[:40]!r}, which is not a number")
    elif isinstance(node, exp.Var):
        if not _TYPE.fullmatch(node.name):
            raise UnsafeSQLError(f"holds {node.name[:40]!r} where a keyword is expected")
    elif isinstance(node, exp.DataType):
        _check_type(node)
    elif isinstance(node, exp.In):
        # SQLite reads `x IN name` as a query of the table `name`.
        if node.args.get("field") is not None:
            raise UnsafeSQLError("holds IN without brackets; write IN (SELECT ...) or IN (a, b)")
    elif isinstance(node, exp.Select):
        if not node.expressions:
            raise UnsafeSQLError("selects nothing; name columns behind SELECT")
        for part in ("kind", "hint", "into", "operation_modifiers", "locks"):
            if node.args.get(part):
                what = _REASONS.get({"into": "Into", "locks": "Lock"}.get(part, ""))
                raise UnsafeSQLError(what or f"holds a {part.replace('_', ' ')} behind SELECT")
    elif isinstance(node, exp.Table) and node.args.get("indexed"):
        raise UnsafeSQLError("names an index (INDEXED BY); leave it to the database")


def _check_name(node: exp.Identifier, dialect: str) -> None:
    if not node.args.get("quoted") and not _NAME.fullmatch(node.name):
        raise UnsafeSQLError(f"holds the name {node.name[:40]!a} without quotes")
    # PostgreSQL cuts a longer name off, and then it is another name.
    if dialect == "postgres" and len(node.name.encode()) > 63:
        raise UnsafeSQLError(f"holds a name of more than 63 bytes: {node.name[:40]!r}...")


def _check_type(node: exp.DataType) -> None:
    """Allow plain types; those of users (enums) by a plain name without a schema."""
    kind = node.args.get("kind") or node.this
    # `interval year to month` is a node of its own, whose parts are checked by themselves.
    name = "interval" if isinstance(kind, exp.Interval) else str(getattr(kind, "value", kind))
    if not _TYPE.fullmatch(name) or fold_ascii(name).startswith(("reg", "xml", "pg_")):
        raise UnsafeSQLError(f"casts to the type {name[:40]!r}, which is not allowed")


def _check_tables(query: exp.Query, dialect: str, tables: Collection[str] | None) -> None:
    allowed = None if tables is None else {table_key(name, dialect) for name in tables}
    for table in real_tables(query, dialect):
        if isinstance(table.this, exp.Func) or table.args.get("rows_from"):
            if table.args.get("db"):
                raise UnsafeSQLError("calls a function by a qualified name")
            continue  # its name was checked with the other functions
        parts = [part for part in table.parts if isinstance(part, exp.Identifier)]
        if not parts or len(parts) != len(table.parts):
            raise UnsafeSQLError("reads from something that is neither a table nor a query")
        name = ".".join(identifier_key(part, dialect) for part in parts)
        quoted = parts[0].args.get("quoted")
        if dialect == "postgres" and name in _CALLED_WITHOUT_BRACKETS and not quoted:
            raise UnsafeSQLError(f"calls the function {name} where a table is expected")
        if allowed is None:
            _check_unlisted(name, parts, dialect)
        elif name not in allowed:
            near = did_you_mean(parts[-1].name, tables or ())
            raise UnsafeSQLError(
                f"reads {'.'.join(part.name for part in parts)!r}, which is not among the tables "
                f"that may be read{near}"
            )


def _check_unlisted(name: str, parts: list[exp.Identifier], dialect: str) -> None:
    if len(parts) > 1:
        raise UnsafeSQLError(f"reads {name!r} of a schema by name; write the table alone")
    if _SYSTEM.match(fold_ascii(name)):
        raise UnsafeSQLError(f"reads {name!r}, a table of the system")


def _check_attributes(query: exp.Query) -> None:
    """Refuse calls of functions that look like columns.

    To PostgreSQL, `g.f` is `f(g)` where g has no column f, and where g is a function in FROM it is
    that function's value: `SELECT g.ts_stat FROM concat('SELECT ...') AS g` runs the text. So of
    such a g only columns are allowed that it is known to have, and what it is called is not left
    to PostgreSQL. Where g is a row, f would be a function of rows; among PostgreSQL's own, those
    read nothing but the row.
    """
    rows: set[str] = set()
    functions: dict[str, set[str]] = {}
    nameless = False
    for node in query.find_all(exp.Table, exp.Lateral, exp.Unnest, exp.Subquery, exp.Values):
        alias = node.args.get("alias") or exp.TableAlias()
        named = alias.this
        if isinstance(node, exp.Table) and isinstance(node.this, exp.Identifier):
            rows.add(identifier_key(named or node.this, "postgres"))
        elif isinstance(node, exp.Subquery | exp.Values) or isinstance(node.this, exp.Subquery):
            if named is not None:
                rows.add(identifier_key(named, "postgres"))
        elif named is None:
            # Within ROWS FROM (...) and LATERAL, what is around it has the name.
            nameless |= not isinstance(node.parent, exp.Table | exp.Lateral)
        else:
            name = identifier_key(named, "postgres")
            listed = {_column_key(column) for column in alias.args.get("columns") or ()}
            # Two of one name in different queries: only what both have.
            functions[name] = functions.get(name, listed) & listed
    for column in query.find_all(exp.Column):
        if not column.table or isinstance(column.this, exp.Star):
            continue
        if nameless:
            raise UnsafeSQLError(
                "reads from a function without a name, and names columns by their table; write "
                "FROM f(...) AS g"
            )
        source = identifier_key(column.args["table"], "postgres")
        if source in rows and source not in functions:
            continue
        known = functions.get(source, set()) | {source} | _OF_FUNCTIONS
        if identifier_key(column.this, "postgres") not in known:
            raise UnsafeSQLError(
                f"reads {source}.{column.name}, and {source!r} is a function without such a "
                f"column; list its columns, as in AS {source}(a, b)"
            )


def _column_key(column: exp.Expr) -> str:
    named = column.this if isinstance(column, exp.ColumnDef) else column
    return identifier_key(named, "postgres") if isinstance(named, exp.Identifier) else ""


def table_names(sql: str, *, dialect: str) -> Iterator[str]:
    """Yield the names of the tables that a query reads, as it writes them, CTEs left out."""
    for table in real_tables(parse_query(sql, dialect), dialect):
        if not isinstance(table.this, exp.Func):
            yield ".".join(part.name for part in table.parts)
