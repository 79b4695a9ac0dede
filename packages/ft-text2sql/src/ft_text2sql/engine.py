"""Fine-tune a model that you own to write SQL, and put it into a query engine."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from ft_core.artifacts import read_manifest
from ft_core.datasets.chat import ChatDataset
from ft_core.datasets.text2sql import Text2SQLDataset
from ft_core.errors import ArgumentError, ArtifactError
from ft_core.sft.engine import LocalFinetuneEngine
from ft_core.sft.models import KIND
from ft_core.sft.settings import SFTSettings
from ft_text2sql.linking import values_of
from ft_text2sql.prompt import SchemaStyle, SQLPrompt, prompt_of

if TYPE_CHECKING:
    from llama_index.core.indices.struct_store.sql_query import BaseSQLTableQueryEngine
    from llama_index.core.llms import LLM
    from llama_index.core.prompts import ChatPromptTemplate
    from llama_index.core.utilities.sql_wrapper import SQLDatabase
    from sqlalchemy.engine import URL, Engine

    from ft_text2sql.results import Limits

logger = logging.getLogger(__name__)

RECORD = "text2sql"
"""Where, among the settings in `ft.json`, the prompt is recorded."""

_DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-4,
    "epochs": 3,
    "batch_size": 8,
    "lora_rank": 16,
}


class Text2SQLFinetuneEngine(LocalFinetuneEngine):
    """Trains an open model to write the SQL of your schema, on this machine.

    ```python
    engine = Text2SQLFinetuneEngine("train.jsonl", database="sqlite:///shop.db", output_dir="sql")
    engine.finetune()
    query_engine = engine.get_query_engine(sql_database)
    print(query_engine.query("How many customers are from Oslo?").metadata["sql_query"])
    ```

    LoRA of rank 16 on all linear layers, with the loss on the SQL only. It resumes, reports and
    cancels as `ft_core.sft.LocalFinetuneEngine` does, and trains on several devices under
    `accelerate launch`.

    Args:
        train: questions with SQL: a `Text2SQLDataset`, or its file.
        base_model: hub name or folder of a causal language model with a chat template.
        output_dir: folder of the result.
        val_data: questions for the validation loss; the checkpoint with the lowest is kept.
        database: the live database that the questions are about (LlamaIndex's SQLDatabase, a
            SQLAlchemy engine or a URL), or a mapping of the examples' `database` to one each.
            The schema is then read there, as the app will. By default it is each example's
            `context`.
        dialect: of examples that name none, where there is no database; "sqlite" by default.
        schema_style: how the prompt writes the schema, see `ft_text2sql.prompt.SchemaStyle`.
        max_schema_tokens: about how many tokens the schema may take; of a larger one the prompt
            shows the tables that the question may be about.
        settings: numbers of the training, or give them by name: `epochs=5`. The defaults are
            those of `SFTSettings`, but for a learning rate of 5e-4.
        others: of `LocalFinetuneEngine` (`device`, `lora`, `callbacks`, `report_to`,
            `show_progress`), and fields of `SFTSettings`.
    """

    def __init__(
        self,
        train: Path | str | Text2SQLDataset | None,
        base_model: Path | str = "HuggingFaceTB/SmolLM2-135M-Instruct",
        output_dir: Path | str = "sql",
        *,
        val_data: Path | str | Text2SQLDataset | None = None,
        database: SQLDatabase | Engine | URL | str | Mapping[str, Any] | None = None,
        dialect: str | None = None,
        schema_style: SchemaStyle = "typed",
        max_schema_tokens: int = 1_000,
        settings: SFTSettings | None = None,
        **others: Any,
    ) -> None:
        super().__init__(
            base_model,
            None,
            output_dir=output_dir,
            settings=settings or SFTSettings(**_DEFAULTS),
            **others,
        )
        self.train_data = train
        self.val_data: Any = val_data
        self.database = database
        self.dialect = dialect
        self.prompt = SQLPrompt(schema_style, max_schema_tokens)

    @classmethod
    def load(cls, folder: Path | str, **kwargs: Any) -> Self:
        """Bring back an engine from its saved folder, without the training data.

        Raises:
            ArtifactError: the folder is missing, damaged or of another kind, or its model was
                trained with the prompt of another release.
        """
        manifest = read_manifest(folder, KIND)
        record, prompt = _recorded(folder)
        engine = cls(None, manifest.base_model, folder, **kwargs)
        engine.job_id = str(engine.output_dir)
        engine.prompt, engine.extra = prompt, {RECORD: record}
        return engine

    @classmethod
    def from_job_id(cls, job_id: str, **settings: Any) -> Self:
        """Return an engine for a job that was started before: its id is its output folder.

        Raises:
            ArtifactError: there is no such job.
        """
        job = LocalFinetuneEngine.from_job_id(job_id)
        engine = cls(None, job.base_model, job.output_dir, **settings)
        engine.job_id = job.job_id
        return engine

    def get_prompt(self, sql_database: SQLDatabase | Engine | URL | str) -> ChatPromptTemplate:
        """Return the trained prompt for LlamaIndex's own engines and retrievers.

        ```python
        NLSQLTableQueryEngine(sql_database, llm=engine.get_finetuned_model(),
                              text_to_sql_prompt=engine.get_prompt(sql_database))
        ```

        These have no guard unless the database is a `GuardedSQLDatabase`.

        Raises:
            ArtifactError: nothing is trained yet.
            DatabaseError: the database cannot be read.
        """
        from ft_text2sql.opening import guarded, schema_of

        database = guarded(sql_database)
        schema = schema_of(database)
        prompt = _recorded(self.output_dir)[1]
        return prompt.template(schema, values_of(database.read_only, schema))

    def get_query_engine(
        self,
        sql_database: SQLDatabase | Engine | URL | str,
        *,
        n: int = 1,
        temperature: float = 0.7,
        seed: int = 0,
        repair: bool = True,
        synthesis_llm: LLM | None = None,
        tables: Collection[Any] | None = None,
        table_retriever: Any = None,
        limits: Limits | None = None,
        llm: LLM | None = None,
        **others: Any,
    ) -> BaseSQLTableQueryEngine:
        """Return LlamaIndex's query engine with the trained model, over the guarded database.

        Args:
            sql_database: LlamaIndex's SQLDatabase, a SQLAlchemy engine or a URL; what is not
                guarded yet is guarded.
            n: how many queries are written for a question; their results are voted on. 1 is
                plain greedy.
            temperature: of all queries but the first, which is greedy.
            seed: of the others.
            repair: whether the model sees the error and writes once more where nothing runs.
            synthesis_llm: words the answer; without one the response is the rows.
            tables: the only tables that may be read; of a database that is guarded already, those
                that the prompt shows.
            table_retriever: chooses tables for a question; the engine is then LlamaIndex's
                `SQLTableRetrieverQueryEngine`, and `NLSQLTableQueryEngine` otherwise.
            limits: time and rows of each query.
            llm: the model, where it has been loaded, or is served elsewhere.
            others: of `Text2SQLRetriever` and of LlamaIndex's engine.

        Returns:
            The engine; `response.metadata` has `sql_query`, `result` and `col_keys` as LlamaIndex
            has them, and what `Text2SQLRetriever` adds.

        Raises:
            ArtifactError: nothing is trained yet.
            DatabaseError: the database cannot be read or protected.
            ArgumentError: an argument is out of range.
        """
        from ft_text2sql import query_engine as engines
        from ft_text2sql.opening import guarded
        from ft_text2sql.retriever import OPTIONS, Text2SQLRetriever

        shared = {"callback_manager", "verbose"}
        for_retriever = {k: v for k, v in others.items() if k in OPTIONS}
        for_engine = {k: v for k, v in others.items() if k not in OPTIONS or k in shared}
        for name in for_engine.keys() - shared - engines.OPTIONS:
            raise ArgumentError(name, "is no argument of the retriever or the query engine")
        database = guarded(sql_database, tables, limits)
        record, prompt = _recorded(self.output_dir)
        _say_if_other_dialect(record.get("dialects", ()), database.read_only.dialect)
        if tables is None:
            _say_if_tables_lack(record.get("tables", ()), database.get_usable_table_names())
        retriever = Text2SQLRetriever(
            database,
            llm or self.get_finetuned_model(),
            prompt=prompt,
            n=n,
            temperature=temperature,
            seed=seed,
            repair=repair,
            tables=None if tables is None else list(tables),
            table_retriever=table_retriever,
            **for_retriever,
        )
        kind = (
            engines.Text2SQLQueryEngine
            if table_retriever is None
            else engines.Text2SQLTableRetrieverQueryEngine
        )
        return kind(retriever, synthesis_llm, **for_engine)

    def _data(self) -> tuple[ChatDataset, ChatDataset | None]:
        """Return the conversations to learn from; what the engine of `ft_core` trains on."""
        if self.train_data is None:
            raise ArgumentError("train", "is not there: a loaded engine cannot train again")
        from ft_text2sql.training import ChatMaker

        validation = None
        with closing(ChatMaker(self.prompt, self.database, self.dialect)) as maker:
            data = maker.dataset(Text2SQLDataset.coerce(self.train_data), "train")
            if self.val_data is not None:
                validation = maker.dataset(Text2SQLDataset.coerce(self.val_data), "val_data")
        trained = {"dialects": sorted(maker.dialects), "tables": sorted(maker.tables)}
        self.extra = {RECORD: self.prompt.to_dict() | trained}
        return data, validation


def _recorded(folder: Path | str) -> tuple[dict[str, Any], SQLPrompt]:
    """Return what `ft.json` says of the prompt, and the prompt.

    Raises:
        ArtifactError: there is no such folder, or it is not one of this engine's.
    """
    record = read_manifest(folder, KIND).settings.get(RECORD)
    if not isinstance(record, Mapping):
        raise ArtifactError(
            f"{folder}: holds a language model that was not trained to write SQL here; load it "
            "with ft_core.sft.LocalFinetuneEngine"
        )
    try:
        return dict(record), prompt_of(record)
    except ArgumentError as error:
        raise ArtifactError(f"{folder}: {error}") from error


def _say_if_tables_lack(trained: Sequence[str], usable: Iterable[str]) -> None:
    lacking = sorted(set(trained) - set(usable))
    if lacking:
        logger.warning(
            "the model was trained with tables that this database does not list: %s; of views, "
            "make the SQLDatabase with view_support=True, or train with the same SQLDatabase",
            ", ".join(lacking[:5]) + (", ..." if len(lacking) > 5 else ""),
        )


def _say_if_other_dialect(trained: Sequence[str], dialect: str) -> None:
    if trained and dialect not in trained:
        logger.warning(
            "the model was trained on SQL of %s, and the database speaks %s: expect errors, or "
            "train on its SQL",
            ", ".join(trained),
            dialect,
        )
