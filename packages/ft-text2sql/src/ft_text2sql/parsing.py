"""SQL text to sqlglot's tree and back, within bounds: no hang, no deep recursion, no megabyte."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import Any

from sqlglot import Dialect, exp
from sqlglot.errors import ErrorLevel, ParseError, SqlglotError, TokenError, UnsupportedError
from sqlglot.tokenizer_core import Token, TokenType

from ft_core.errors import ArgumentError
from ft_text2sql.errors import InvalidSQLError, UnsafeSQLError

MAX_CHARACTERS = 100_000
"""The longest statement; one with a vector of 1,536 numbers in it has some 35,000."""
MAX_NESTING = 32
"""The deepest nesting of brackets; 30 levels of `SELECT` in `SELECT` are more than people write."""
MAX_TOKENS = 10_000
"""The longest statement in words, numbers and signs."""
_STEPS_PER_TOKEN = 8  # ordinary statements need 1 to 5
_STEPS = 10_000

_OPENING = {TokenType.L_PAREN, TokenType.L_BRACKET, TokenType.L_BRACE}
_CLOSING = {TokenType.R_PAREN, TokenType.R_BRACKET, TokenType.R_BRACE}
_BLANKS = "\t\n\r"
_NUMERIC_AFFINITY = {
    *(exp.DType.BOOLEAN, exp.DType.DECIMAL),
    *(exp.DType.DATE, exp.DType.DATETIME, exp.DType.TIME),
    *(exp.DType.TIMESTAMP, exp.DType.TIMESTAMPNTZ),
}


def parse_query(sql: str, dialect: str) -> exp.Query:
    """Parse one statement that begins as a query; what is inside it is not looked at here.

    Raises:
        UnsafeSQLError: it is another kind of statement, several statements, too long, nested
            too deeply, or holds characters that no statement needs.
        InvalidSQLError: it is not SQL of this dialect.
    """
    _check_characters(sql)
    reader = _dialect(dialect)
    try:
        tokens = reader.tokenize(sql)
        _check_tokens(tokens)
        parser = _parser_class(reader.parser_class)(
            dialect=reader, error_level=ErrorLevel.IMMEDIATE
        )
        parser.steps_left = _STEPS + _STEPS_PER_TOKEN * len(tokens)
        statements = [each for each in parser.parse(tokens, sql) if each is not None]
    except RecursionError:
        raise too_deep() from None
    except UnsafeSQLError:
        raise
    except SqlglotError as error:
        raise InvalidSQLError(f"is not valid {dialect} SQL: {_what(error)}") from None
    except Exception as error:  # sqlglot stumbles over some nonsense: ValueError, AttributeError
        raise InvalidSQLError(f"is not valid {dialect} SQL: {_line(str(error))}") from None
    # A comment behind the last semicolon is a statement of its own to sqlglot.
    statements = [each for each in statements if not isinstance(each, exp.Semicolon)]
    if len(statements) != 1:
        raise UnsafeSQLError(f"holds {len(statements)} statements; write exactly one SELECT")
    query = statements[0]
    if not isinstance(query, exp.Select | exp.SetOperation | exp.Subquery):
        raise UnsafeSQLError(f"is a {query.key.upper()}; only SELECT is allowed")
    return query


def render(query: exp.Query, dialect: str) -> str:
    """Write a tree as SQL, without comments.

    Raises:
        UnsafeSQLError: the dialect has no way to say what the tree says.
    """
    if dialect == "sqlite":
        _free_joins(query)
        _keep_casts(query)
    if dialect == "postgres":
        _keep_to_hex(query)
    try:
        text = query.sql(dialect=dialect, comments=False, unsupported_level=ErrorLevel.RAISE)
    except RecursionError:
        raise too_deep() from None
    except (UnsupportedError, ValueError) as error:
        raise InvalidSQLError(f"is not valid {dialect} SQL: {_line(str(error))}") from None
    if len(text) > 2 * MAX_CHARACTERS:
        raise UnsafeSQLError("grows too long when it is written out")
    return text


def _free_joins(query: exp.Query) -> None:
    """Write `a, b`, which sqlglot reads as CROSS JOIN, as an INNER JOIN on what is true.

    They mean the same, but to SQLite CROSS JOIN also says: do not put the tables into another
    order. The statement would run as slowly as it was written.
    """
    for join in query.find_all(exp.Join):
        if join.kind == "CROSS":
            join.set("kind", "INNER")
            if not any(join.args.get(part) for part in ("on", "using", "method")):
                join.set("on", exp.Literal.number(1))


def _keep_casts(query: exp.Query) -> None:
    """Write casts so that SQLite does what it would have done.

    sqlglot turns CAST(x AS DATE) into DATE(x), and NUMERIC into REAL. To SQLite, all these types
    have the affinity NUMERIC, and nothing else of a type counts in a cast.
    """
    for cast in query.find_all(exp.Cast):
        if cast.to.this in _NUMERIC_AFFINITY:
            kind = exp.DType.USERDEFINED
            cast.set("to", exp.DataType(this=kind, kind="NUMERIC"))


def _keep_to_hex(query: exp.Query) -> None:
    """Write `to_hex`, which sqlglot writes as HEX, a function that PostgreSQL does not have."""
    for node in list(query.find_all(exp.Hex)):
        node.replace(exp.Anonymous(this="to_hex", expressions=[node.this]))


def _check_characters(sql: str) -> None:
    if not isinstance(sql, str) or not sql.strip():
        raise UnsafeSQLError("holds no statement; write one SELECT")
    if len(sql) > MAX_CHARACTERS:
        raise UnsafeSQLError(f"has {len(sql):,} characters; at most {MAX_CHARACTERS:,} are allowed")
    for character in sql:
        kind = unicodedata.category(character)
        # Cc: NUL ends a statement for some drivers and not for others. Cs: no UTF-8. U+FEFF:
        # a byte order mark, which is a blank to one reader and part of a name to another.
        if (kind == "Cc" and character not in _BLANKS) or kind == "Cs" or character == "\ufeff":
            raise UnsafeSQLError(
                f"holds the control character U+{ord(character):04X}; leave it out"
            )


def _check_tokens(tokens: list[Token]) -> None:
    """Refuse before parsing what parsing is not needed for, or what would be hard to parse."""
    if len(tokens) > MAX_TOKENS:
        raise UnsafeSQLError(f"has {len(tokens):,} words and signs; write a shorter one")
    while tokens and tokens[-1].token_type is TokenType.SEMICOLON:
        tokens.pop()
    kinds = [token.token_type for token in tokens]
    if TokenType.SEMICOLON in kinds:
        raise UnsafeSQLError("holds several statements; write exactly one SELECT")
    first = next((token for token in tokens if token.token_type is not TokenType.L_PAREN), None)
    if first is None or first.token_type not in (TokenType.SELECT, TokenType.WITH):
        start = first.text[:40] if first else "a bracket"
        raise UnsafeSQLError(f"begins with {start!r}; only SELECT is allowed")
    depth = 0
    for kind in kinds:
        depth += (kind in _OPENING) - (kind in _CLOSING)
        if depth > MAX_NESTING:
            raise too_deep()


@lru_cache(maxsize=16)
def _dialect(name: str) -> Dialect:
    try:
        return Dialect.get_or_raise(name)
    except ValueError:
        raise ArgumentError("dialect", f"sqlglot has none that is called {name!r}") from None


@lru_cache(maxsize=16)
def _parser_class(base: Any) -> Any:
    """Return sqlglot's parser of a dialect with a limit on its work.

    It tries one reading after another, and inside types and arrays that doubles with each level:
    `ARRAY[ARRAY[ARRAY[...` of twenty levels takes minutes (sqlglot 30.30).
    """

    class Limited(base):
        steps_left = 0

        def _advance(self, times: int = 1) -> None:
            self.steps_left -= 1
            if self.steps_left < 0:
                raise UnsafeSQLError("is too hard to read; write it with less nesting")
            super()._advance(times)

    return Limited


def too_deep() -> UnsafeSQLError:
    """Return the error of a statement that only deep recursion could follow."""
    return UnsafeSQLError("is nested too deeply; write it with fewer brackets or terms")


def _what(error: SqlglotError) -> str:
    """Return what sqlglot says, without the copy of the statement and its terminal colours."""
    if isinstance(error, ParseError) and error.errors:
        first = error.errors[0]
        place = f" at line {first.get('line')}, column {first.get('col')}"
        near = str(first.get("highlight") or "")[:40]
        return _line(f"{first.get('description')}{place}" + (f", near {near!r}" if near else ""))
    if isinstance(error, TokenError):
        return "a quote, a comment or a number has no end"
    return _line(str(error))


def _line(text: str) -> str:
    return " ".join(text.split())[:200]
