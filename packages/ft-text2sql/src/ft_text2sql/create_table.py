"""Read CREATE TABLE statements token by token.

Data sets write what no grammar allows, such as a column with the name of a reserved word; so
sqlglot only cuts the text into tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlglot import Token, TokenType

from ft_core.errors import DatasetError
from ft_text2sql.schema import Column, ForeignKey, Table
from ft_text2sql.statements import tokens_of

# The words that end a column's type, and those that begin what is no column.
_CONSTRAINTS = frozenset(
    {"AS", "AUTOINCREMENT", "AUTO_INCREMENT", "CHARACTER SET", "CHECK", "COLLATE", "COMMENT"}
    | {"CONSTRAINT", "DEFAULT", "FOREIGN KEY", "GENERATED", "IDENTITY", "INVISIBLE", "NOT"}
    | {"NULL", "ON", "PRIMARY KEY", "REFERENCES", "STORED", "UNIQUE", "VIRTUAL"}
)
_NO_COLUMN = frozenset({"CONSTRAINT", "PRIMARY KEY", "FOREIGN KEY", "UNIQUE", "CHECK", "EXCLUDE"})
_INDEX = frozenset({"KEY", "INDEX", "FULLTEXT", "SPATIAL"})  # MySQL's, behind the columns
_ENDS = frozenset({TokenType.SEMICOLON, TokenType.CREATE})


def read_tables(text: str, dialect: str) -> list[Table]:
    """Return the tables; see `ft_text2sql.schema.Schema.from_sql`."""
    tokens = tokens_of(text, dialect)
    if text.strip() and not tokens:
        raise DatasetError("a quote or a comment does not end; close it")
    tables = []
    at = 0
    while at < len(tokens):
        if tokens[at].token_type is TokenType.CREATE:
            start = _behind_create_table(tokens, at)
            if start is not None:
                table, at = _read_table(text, tokens, start)
                tables.append(table)
                continue
        at += 1
    if not tables:
        raise DatasetError("there is no CREATE TABLE statement; write one for each table")
    return tables


def _behind_create_table(tokens: Sequence[Token], at: int) -> int | None:
    """Return where the table's name stands, None if something else is created."""
    at += 1
    while at < len(tokens) and _word(tokens[at]) in ("TEMP", "TEMPORARY", "UNLOGGED", "GLOBAL"):
        at += 1
    if at >= len(tokens) or _word(tokens[at]) != "TABLE":
        return None
    at += 1
    if [_word(token) for token in tokens[at : at + 3]] == ["IF", "NOT", "EXISTS"]:
        at += 3
    return at


def _read_table(text: str, tokens: Sequence[Token], at: int) -> tuple[Table, int]:
    """Return the table whose name stands at `at`, and where to go on."""
    namespace, name, at = _read_name(tokens, at)
    if not name or at >= len(tokens) or tokens[at].token_type is not TokenType.L_PAREN:
        raise DatasetError(
            "has no columns in brackets; write CREATE TABLE name (column TYPE, ...)",
            place=f"CREATE TABLE {name}".rstrip(),
        )
    end = _closing(tokens, at)
    if end is None:
        raise DatasetError("does not end; close its bracket", place=f"CREATE TABLE {name}")
    reader = _Definitions(text)
    for definition in _split(tokens[at + 1 : end]):
        reader.read(definition)
    if not reader.columns:
        raise DatasetError("has no columns", place=f"CREATE TABLE {name}")
    table = Table(
        name, tuple(reader.columns), tuple(reader.primary), tuple(reader.foreign), namespace
    )
    while end < len(tokens) and tokens[end].token_type not in _ENDS:
        end += 1  # WITHOUT ROWID, ENGINE=InnoDB
    return table, end


class _Definitions:
    """What stands between the brackets of a table."""

    def __init__(self, text: str) -> None:
        self.columns: list[Column] = []
        self.primary: list[str] = []
        self.foreign: list[ForeignKey] = []
        self._text = text

    def read(self, tokens: Sequence[Token]) -> None:
        first = _word(tokens[0])
        # PRIMARY KEY may be a column's, and KEY or INDEX its name: `key TEXT`, but KEY k (a).
        index = first in _INDEX and any(t.token_type is TokenType.L_PAREN for t in tokens)
        typed = len(tokens) > 1 and _word(tokens[1]).isidentifier()
        if first == "CONSTRAINT" and len(tokens) > 2:
            self._constraint(tokens[2:])
        elif first in _NO_COLUMN and (first in ("PRIMARY KEY", "FOREIGN KEY") or not typed):
            self._constraint(tokens)
        elif not (index and self.columns and _is_index(tokens)):
            self._column(tokens)

    def _constraint(self, tokens: Sequence[Token]) -> None:
        words = [_word(token) for token in tokens]
        if words[0] == "PRIMARY KEY":
            self.primary += _bracketed(tokens, 0)[0]
        elif words[0] == "FOREIGN KEY" and "REFERENCES" in words:
            columns, _ = _bracketed(tokens, 0)
            self._reference(columns, tokens, words.index("REFERENCES"))

    def _column(self, tokens: Sequence[Token]) -> None:
        end = 1
        depth = 0
        while end < len(tokens) and (depth or _word(tokens[end]) not in _CONSTRAINTS):
            depth += _depth(tokens[end])
            end += 1
        kind = self._text[tokens[1].start : tokens[end - 1].end + 1] if end > 1 else ""
        name = tokens[0].text
        self.columns.append(Column(name, " ".join(kind.split())))
        words = [_word(token) for token in tokens]
        if "PRIMARY KEY" in words[end:]:
            self.primary.append(name)
        if "REFERENCES" in words[end:]:
            self._reference([name], tokens, words.index("REFERENCES", end))

    def _reference(self, columns: Sequence[str], tokens: Sequence[Token], at: int) -> None:
        namespace, table, behind = _read_name(tokens, at + 1)
        bracket = behind < len(tokens) and tokens[behind].token_type is TokenType.L_PAREN
        referred = _bracketed(tokens, behind)[0] if bracket else []
        self.foreign.append(ForeignKey(tuple(columns), table, tuple(referred), namespace))


def _is_index(tokens: Sequence[Token]) -> bool:
    """Tell KEY name (column) from a column with a type in brackets, such as key VARCHAR(20)."""
    opening = next(i for i, t in enumerate(tokens) if t.token_type is TokenType.L_PAREN)
    inside = tokens[opening + 1 : opening + 2]
    return not (inside and inside[0].token_type is TokenType.NUMBER)


def _read_name(tokens: Sequence[Token], at: int) -> tuple[str | None, str, int]:
    """Return the namespace, the name, and where it ends."""
    parts = []
    while at < len(tokens) and _is_name(tokens[at]):
        parts.append(tokens[at].text)
        at += 1
        if at >= len(tokens) or tokens[at].token_type is not TokenType.DOT:
            break
        at += 1
    name = parts.pop() if parts else ""
    return (".".join(parts) or None, name, at)


def _bracketed(tokens: Sequence[Token], at: int) -> tuple[list[str], int]:
    """Return the names in the first brackets from `at` on."""
    while at < len(tokens) and tokens[at].token_type is not TokenType.L_PAREN:
        at += 1
    end = _closing(tokens, at) or len(tokens)
    return [part[0].text for part in _split(tokens[at + 1 : end])], end


def _split(tokens: Sequence[Token]) -> list[Sequence[Token]]:
    """Cut at the commas that stand in no brackets."""
    parts: list[list[Token]] = [[]]
    depth = 0
    for token in tokens:
        depth += _depth(token)
        if token.token_type is TokenType.COMMA and not depth:
            parts.append([])
        else:
            parts[-1].append(token)
    return [part for part in parts if part]


def _closing(tokens: Sequence[Token], at: int) -> int | None:
    depth = 0
    for index in range(at, len(tokens)):
        depth += _depth(tokens[index])
        if not depth:
            return index
    return None


def _depth(token: Token) -> int:
    kind = token.token_type
    return (kind is TokenType.L_PAREN) - (kind is TokenType.R_PAREN)


def _is_name(token: Token) -> bool:
    return token.token_type in (TokenType.IDENTIFIER, TokenType.STRING) or (
        token.text[:1].isalpha() or token.text[:1] == "_"
    )


def _word(token: Token) -> str:
    """Return a keyword in capitals; "" for a name in quotes."""
    quoted = token.token_type in (TokenType.IDENTIFIER, TokenType.STRING)
    return "" if quoted else " ".join(token.text.upper().split())
