"""The prompt of a text-to-SQL model: the one place that writes it, for training and for apps."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any, Literal, get_args

from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.prompts import ChatPromptTemplate, PromptType

from ft_core.errors import ArgumentError
from ft_text2sql.identifiers import dialect_name, quote_name
from ft_text2sql.linking import SchemaLinker, Values
from ft_text2sql.schema import Column, ForeignKey, Schema, Table

PROMPT_VERSION = 1
"""Goes up with every change of a word that a model sees."""

SchemaStyle = Literal["typed", "lines", "create"]
"""`table(column type, ..., primary key (column), column -> table.column)`, `table(column, ...)`,
or CREATE TABLE statements; a line for each table."""

SYSTEM = "Write one SQL query that answers the question. Reply with the SQL only."
USER = "Dialect: {dialect}\nSchema:\n{schema}\nQuestion: {query_str}"
_REPAIR = "That query does not work: {reason}\nWrite one that does. Reply with the SQL only."

_LONGEST_REASON = 400
_LONGEST_SQL = 1_500

# What begins the description of a table by LlamaIndex's SQLDatabase, and what its NLSQLRetriever
# adds behind it: descriptions by the app, and rows and values that were retrieved.
_DESCRIBED = re.compile(r"^Table '(.+?)' has columns: ", re.MULTILINE)
_ADDED = re.compile(
    r" The table description is: |\n(?=Here are some relevant (?:example rows|values of))"
)

_KINDS = (
    ("integer", re.compile(r"^(tiny|small|medium|big)?int(?!erval)|serial|^year")),
    ("boolean", re.compile(r"bool|^bit\b")),
    ("text", re.compile(r"char|text|clob|string|uuid|enum")),
    ("number", re.compile(r"real|floa|doub|num|dec|money")),
    ("time", re.compile(r"datetime|time")),
    ("date", re.compile(r"date")),
    ("blob", re.compile(r"blob|binary|bytea")),
)


@dataclass(frozen=True)
class SQLPrompt:
    """How a question and a schema become what a model is asked.

    Raises:
        ArgumentError: an unknown style, no room for a schema, or a version of another release.
    """

    schema_style: SchemaStyle = "typed"
    max_schema_tokens: int = 1_000
    """About how many tokens the schema may take; of a larger one only the tables are shown that
    the question may be about (see `ft_text2sql.linking.SchemaLinker`)."""
    version: int = PROMPT_VERSION

    def __post_init__(self) -> None:
        if self.schema_style not in get_args(SchemaStyle):
            styles = ", ".join(get_args(SchemaStyle))
            raise ArgumentError("schema_style", f"is one of {styles}, not {self.schema_style!r}")
        if type(self.max_schema_tokens) is not int or self.max_schema_tokens < 1:
            raise ArgumentError(
                "max_schema_tokens", f"is a whole number from 1, not {self.max_schema_tokens!r}"
            )
        if self.version != PROMPT_VERSION:
            raise ArgumentError(
                "version",
                f"the model was trained with version {self.version} of the prompt, and this "
                f"release writes version {PROMPT_VERSION}; train again, or install its release",
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as `ft.json` records them."""
        return asdict(self)

    def write(self, schema: Schema) -> str:
        """Return a schema as text, a line for each table."""
        if self.schema_style == "typed":
            return "\n".join(_typed_line(table, schema.dialect) for table in schema.tables)
        return schema.to_text(self.schema_style)

    def linker(self, schema: Schema, values: Values | None = None) -> SchemaLinker:
        """Return what chooses the tables for a question."""
        return SchemaLinker(schema, self.write, values)

    def messages(
        self, question: str, dialect: str, linker: SchemaLinker, keep: Collection[str] = ()
    ) -> list[dict[str, Any]]:
        """Return the prompt as OpenAI's messages, as training takes it.

        Args:
            question: what is asked.
            dialect: as sqlglot or SQLAlchemy names it.
            linker: of the schema, from `linker`.
            keep: tables that are shown in any case: those that the answer needs.
        """
        schema = linker.link(question, self.max_schema_tokens, keep=keep)
        filled = TEXT_TO_SQL_PROMPT.format_messages(
            dialect=dialect_name(dialect), schema=self.write(schema), query_str=question
        )
        return [{"role": one.role.value, "content": one.content} for one in filled]

    def template(self, schema: Schema, values: Values | None = None) -> ChatPromptTemplate:
        """Return the `text_to_sql_prompt` of LlamaIndex's engines and retrievers for a schema.

        They fill in LlamaIndex's own description of the tables; this prompt puts the description
        of training in its place. Descriptions of tables, rows and values that the app adds stay,
        each behind its table. What is no description of LlamaIndex's is left as it is.
        """
        linker = self.linker(schema, values)

        def shown(*, schema: str, query_str: str, **_: Any) -> str:
            return self._instead_of(schema, query_str, linker)

        def dialect(*, dialect: str, **_: Any) -> str:
            return dialect_name(dialect)

        return ChatPromptTemplate(
            message_templates=TEXT_TO_SQL_PROMPT.message_templates,
            prompt_type=PromptType.TEXT_TO_SQL,
            function_mappings={"schema": shown, "dialect": dialect},
        )

    def _instead_of(self, described: str, question: str, linker: SchemaLinker) -> str:
        added = _added(described)
        if not added or not linker.knows(added):
            return described
        schema = linker.link(question, self.max_schema_tokens, among=added)
        return "\n".join(
            self.write(Schema((table,), schema.dialect))
            + (f" -- {note}" if (note := added.get(table.name)) else "")
            for table in schema.tables
        )


TEXT_TO_SQL_PROMPT = ChatPromptTemplate(
    message_templates=[
        ChatMessage(role=MessageRole.SYSTEM, content=SYSTEM),
        ChatMessage(role=MessageRole.USER, content=USER),
    ],
    prompt_type=PromptType.TEXT_TO_SQL,
)
"""The words of every prompt; `SQLPrompt.template` returns it for one database."""


def repair_messages(messages: Sequence[ChatMessage], sql: str, reason: str) -> list[ChatMessage]:
    """Return a conversation that shows the model its SQL and why it gave no rows."""
    shown = _REPAIR.format(reason=reason[:_LONGEST_REASON])
    return [
        *messages,
        ChatMessage(role=MessageRole.ASSISTANT, content=sql[:_LONGEST_SQL]),
        ChatMessage(role=MessageRole.USER, content=shown),
    ]


def _added(described: str) -> dict[str, str]:
    """Return the tables that LlamaIndex describes, each with what the app adds to it."""
    found = list(_DESCRIBED.finditer(described))
    added = {}
    for match, following in zip_longest(found, found[1:]):
        end = following.start() if following else len(described)
        mark = _ADDED.search(described, match.end(), end)
        added[match[1]] = described[mark.end() : end].strip() if mark else ""
    return added


def _typed_line(table: Table, dialect: str) -> str:
    parts = [f"{quote_name(c.name, dialect)} {_kind(c)}".rstrip() for c in table.columns]
    if table.primary_key:
        parts.append(f"primary key ({_names(table.primary_key, dialect)})")
    parts += [_reference(key, dialect) for key in table.foreign_keys]
    return f"{_table_name(table.name, table.namespace, dialect)}({', '.join(parts)})"


def _kind(column: Column) -> str:
    """Return a type in one word: what the same column is called elsewhere, too."""
    name = column.type.lower()
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), name.split("(")[0])


def _reference(key: ForeignKey, dialect: str) -> str:
    target = _table_name(key.table, key.namespace, dialect)
    if len(key.columns) == 1:
        behind = f".{_names(key.referred, dialect)}" if key.referred else ""
        return f"{_names(key.columns, dialect)} -> {target}{behind}"
    behind = f"({_names(key.referred, dialect)})" if key.referred else ""
    return f"({_names(key.columns, dialect)}) -> {target}{behind}"


def _table_name(name: str, namespace: str | None, dialect: str) -> str:
    parts = [namespace, name] if namespace else [name]
    return ".".join(quote_name(part, dialect) for part in parts)


def _names(names: Sequence[str], dialect: str) -> str:
    return ", ".join(quote_name(name, dialect) for name in names)


def prompt_of(recorded: Mapping[str, Any]) -> SQLPrompt:
    """Return the prompt that `SQLPrompt.to_dict` recorded; other entries are passed over."""
    fields = SQLPrompt.__dataclass_fields__
    return SQLPrompt(**{name: recorded[name] for name in fields if name in recorded})
