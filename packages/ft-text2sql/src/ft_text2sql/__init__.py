"""Fine-tune a model that you own to write SQL for your database in a LlamaIndex app."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ft_core.datasets.text2sql import Text2SQLDataset, Text2SQLExample
    from ft_core.report.text2sql import Text2SQLReport
    from ft_text2sql.comparison import normalise_sql
    from ft_text2sql.database import ReadOnlyDatabase
    from ft_text2sql.engine import Text2SQLFinetuneEngine
    from ft_text2sql.evaluation import evaluate_text2sql
    from ft_text2sql.generation import generate_text2sql_dataset
    from ft_text2sql.guarded import GuardedSQLDatabase
    from ft_text2sql.handler import Text2SQLHandler
    from ft_text2sql.prompt import SQLPrompt
    from ft_text2sql.readers import read_spider, read_sql_create_context, read_text2sql_data
    from ft_text2sql.results import Limits
    from ft_text2sql.retriever import Text2SQLRetriever
    from ft_text2sql.schema import Schema

_MODULES = {
    "GuardedSQLDatabase": "ft_text2sql.guarded",
    "Limits": "ft_text2sql.results",
    "ReadOnlyDatabase": "ft_text2sql.database",
    "SQLPrompt": "ft_text2sql.prompt",
    "Schema": "ft_text2sql.schema",
    "Text2SQLDataset": "ft_core.datasets.text2sql",
    "Text2SQLExample": "ft_core.datasets.text2sql",
    "Text2SQLFinetuneEngine": "ft_text2sql.engine",
    "Text2SQLHandler": "ft_text2sql.handler",
    "Text2SQLReport": "ft_core.report.text2sql",
    "Text2SQLRetriever": "ft_text2sql.retriever",
    "evaluate_text2sql": "ft_text2sql.evaluation",
    "generate_text2sql_dataset": "ft_text2sql.generation",
    "normalise_sql": "ft_text2sql.comparison",
    "read_spider": "ft_text2sql.readers",
    "read_sql_create_context": "ft_text2sql.readers",
    "read_text2sql_data": "ft_text2sql.readers",
}

__all__ = [
    "GuardedSQLDatabase",
    "Limits",
    "ReadOnlyDatabase",
    "SQLPrompt",
    "Schema",
    "Text2SQLDataset",
    "Text2SQLExample",
    "Text2SQLFinetuneEngine",
    "Text2SQLHandler",
    "Text2SQLReport",
    "Text2SQLRetriever",
    "evaluate_text2sql",
    "generate_text2sql_dataset",
    "normalise_sql",
    "read_spider",
    "read_sql_create_context",
    "read_text2sql_data",
]


def __getattr__(name: str) -> Any:
    # A pack is imported for one of these; the others' dependencies stay unloaded.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)
