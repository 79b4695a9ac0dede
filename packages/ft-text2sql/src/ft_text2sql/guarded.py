"""LlamaIndex's SQLDatabase with a guard: what its query engines run, they run read-only."""

from __future__ import annotations

from typing import Any, NoReturn

from llama_index.core.utilities.sql_wrapper import SQLDatabase

from ft_core.errors import ArgumentError
from ft_text2sql.database import ReadOnlyDatabase
from ft_text2sql.results import QueryResult


class GuardedSQLDatabase(SQLDatabase):
    """A SQLDatabase whose `run_sql` goes through a `ReadOnlyDatabase`.

    ```python
    guarded = GuardedSQLDatabase.around(sql_database)
    query_engine = NLSQLTableQueryEngine(guarded, tables=["city"])
    ```

    Descriptions of tables come from the database as before. A statement that may not run, or that
    fails, raises a `SQLError`, which a query engine shows to the LLM that words the answer.

    Args:
        read_only: what runs the statements.
        original: what describes the tables.
    """

    def __init__(self, read_only: ReadOnlyDatabase, original: SQLDatabase) -> None:
        # The tables have been read already: its attributes are taken as they are.
        self.__dict__.update(original.__dict__)
        self.read_only = read_only
        """What runs the statements."""

    @classmethod
    def around(cls, sql_database: SQLDatabase, **options: Any) -> GuardedSQLDatabase:
        """Return a guard around a SQLDatabase, with its tables as the allow-list.

        Args:
            sql_database: any; one that is guarded already is returned as it is.
            options: of `ReadOnlyDatabase`.
        """
        if isinstance(sql_database, GuardedSQLDatabase):
            return sql_database
        return cls(ReadOnlyDatabase(sql_database, **options), sql_database)

    def run_sql(self, command: str) -> tuple[str, dict[str, Any]]:
        """Run one SELECT; return its rows as text, and the rows and names of the columns.

        Raises:
            SQLError: it may not run, or failed.
            DatabaseError: the database cannot be read.
        """
        return self.shown(self.read_only.execute(command))

    def shown(self, result: QueryResult) -> tuple[str, dict[str, Any]]:
        """Return what `run_sql` does of a statement with this result, without running it again.

        Long texts are cut to the `max_string_length` of the original.
        """
        rows = [
            tuple(self.truncate_word(cell, length=self._max_string_length) for cell in row)
            for row in result.rows
        ]
        return str(rows), {"result": rows, "col_keys": result.columns}

    def insert_into_table(self, table_name: str, data: dict[str, Any]) -> NoReturn:
        """Refuse: nothing is written through this object.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError("table_name", "a guarded database is read-only; use the app's own")
