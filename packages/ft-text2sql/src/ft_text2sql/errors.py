"""What goes wrong between a question and its rows; every `reason` can be shown to a model."""

from __future__ import annotations

from ft_core.errors import FTError


class SQLError(FTError):
    """A statement that gives no rows."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        """One sentence that says why, fit for a repair turn."""
        super().__init__(reason)


class UnsafeSQLError(SQLError):
    """The guard, or the protected connection, refused the statement; nothing of it ran.

    Args:
        what: what the statement is or does, as in "is a DELETE".
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"the statement {what}")


class InvalidSQLError(UnsafeSQLError):
    """The guard refused the statement because it is not SQL of the database's dialect."""


class SchemaError(SQLError):
    """The statement names a table or a column that the database does not have."""


class QueryError(SQLError):
    """The database refused the statement, or it was stopped; `what` as in UnsafeSQLError."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the statement {what}")


class QueryTimeoutError(QueryError):
    """The statement ran longer than its time limit and was stopped."""


class QueryCancelledError(QueryError):
    """The app cancelled the statement."""


class DatabaseError(FTError):
    """The database cannot be opened, read or protected: no fault of the statement."""
