"""LlamaIndex's text-to-SQL retriever with a tuned model, a guard, votes and a repair turn."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.embeddings.mock_embed_model import MockEmbedding
from llama_index.core.indices.struct_store.sql_retriever import NLSQLRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from sqlalchemy.exc import NoSuchTableError, SQLAlchemyError

from ft_core.errors import ArgumentError, FTError
from ft_text2sql.candidates import Candidate, CandidateRunner, Election, elect
from ft_text2sql.errors import DatabaseError
from ft_text2sql.guarded import GuardedSQLDatabase
from ft_text2sql.linking import values_of
from ft_text2sql.opening import check_alive
from ft_text2sql.opening import schema_of as schema_of
from ft_text2sql.prompt import SQLPrompt, repair_messages

if TYPE_CHECKING:
    from llama_index.core.llms import LLM
    from llama_index.core.utilities.sql_wrapper import SQLDatabase

    from ft_text2sql.results import QueryResult

logger = logging.getLogger(__name__)

OPTIONS = frozenset(
    {"tables", "table_retriever", "rows_retrievers", "cols_retrievers", "context_query_kwargs"}
    | {"text_to_sql_prompt", "sql_only", "callback_manager", "verbose"}
)
"""What `Text2SQLRetriever` passes on to LlamaIndex's retriever."""

_KEYS = ["sql_query", "result", "col_keys"]


class Text2SQLRetriever(NLSQLRetriever):
    """Writes SQL for a question, runs it read-only, and returns its rows.

    ```python
    retriever = Text2SQLRetriever(sql_database, engine.get_finetuned_model(), n=8)
    nodes = retriever.retrieve("Which rivers run through Texas?")
    ```

    With `n` above 1, that many queries are written, the greedy one first, and the result that
    most of them have is taken (`ft_text2sql.candidates.elect`). Where none of them runs, the
    model gets one more turn, in which it sees its greedy query and the error.

    The metadata is LlamaIndex's (`sql_query`, `result`, `col_keys`) and besides
    `truncated` (whether a limit left rows out), `error` (why there is no result, or None),
    `candidates` (of each its `sql`, number of `rows`, `error` and `mean_logprob`), `votes` (how
    many have the result) and `repaired` (whether the query is of the additional turn).

    Args:
        sql_database: one that is not guarded yet is guarded, with its tables as the allow-list.
        llm: the tuned model; `Settings.llm` by default. One of `ft_core.sft` writes all
            candidates in one batch; any other is asked `n` times.
        prompt: how the model was trained to be asked.
        n: candidates.
        temperature: of all candidates but the first.
        seed: of the candidates, where the model takes one.
        repair: whether there is an additional turn.
        handle_sql_errors: False raises the `SQLError` of a question without rows; True makes
            it the text, "Error: ...", as LlamaIndex does.
        others: of `NLSQLRetriever`: `tables` for the prompt, `table_retriever`,
            `rows_retrievers`, `cols_retrievers`, `context_query_kwargs`, `sql_only`,
            `callback_manager`, `verbose`, and `text_to_sql_prompt` in the place of the trained
            one.

    Raises:
        ArgumentError: `n` or the temperature is out of range, or an argument is unknown.
        DatabaseError: the database cannot be read or protected; retrieving, too.
    """

    def __init__(
        self,
        sql_database: SQLDatabase,
        llm: LLM | None = None,
        *,
        prompt: SQLPrompt | None = None,
        n: int = 1,
        temperature: float = 0.7,
        seed: int = 0,
        repair: bool = True,
        handle_sql_errors: bool = True,
        return_raw: bool = True,
        **others: Any,
    ) -> None:
        if type(n) is not int or n < 1:
            raise ArgumentError("n", f"is a whole number from 1, not {n!r}")
        if n > 1 and not 0 < temperature < float("inf"):
            raise ArgumentError("temperature", f"is a number above 0, not {temperature!r}")
        guarded = GuardedSQLDatabase.around(sql_database)
        schema = schema_of(guarded)
        prompt = prompt or SQLPrompt()
        template = prompt.template(schema, values_of(guarded.read_only, schema))
        for name in others.keys() - OPTIONS:
            raise ArgumentError(name, f"is no argument; others are {', '.join(sorted(OPTIONS))}")
        # LlamaIndex would load its default embedding model, which is of no use here.
        defaults = {
            "embed_model": MockEmbedding(embed_dim=1),
            "text_to_sql_prompt": template,
            "tables": [table.name for table in schema.tables],
        }
        given = {name: value for name, value in others.items() if value is not None}
        super().__init__(
            guarded,
            llm=llm,
            handle_sql_errors=handle_sql_errors,
            return_raw=return_raw,
            **defaults | given,
        )
        self.n, self.temperature, self.seed, self.repair = n, temperature, seed, repair
        self._dialect = guarded.read_only.dialect
        self._runner = CandidateRunner(guarded.read_only, schema)

    def retrieve_with_metadata(
        self, str_or_query_bundle: str | QueryBundle
    ) -> tuple[list[NodeWithScore], dict[str, Any]]:
        """Return the rows as one node (a node for each row without `return_raw`), and metadata.

        Raises:
            SQLError: nothing runs; only without `handle_sql_errors`.
            QueryCancelledError: the app cancelled it (`ReadOnlyDatabase.cancel`); always.
            DatabaseError: the database cannot be read.
        """
        bundle = _bundle(str_or_query_bundle)
        given = self._given(bundle)
        if self._sql_only:
            return self._sql_alone(self._written_alone(given, bundle))
        election = elect(self._runner.run(self._written(given, bundle)), self._dialect)
        if self._needs_repair(election):
            repaired = self._runner.run(self._rewritten(election.winner, given, bundle))
            return self._answer(election, repaired)
        return self._answer(election)

    async def aretrieve_with_metadata(
        self, str_or_query_bundle: str | QueryBundle
    ) -> tuple[list[NodeWithScore], dict[str, Any]]:
        """Do what `retrieve_with_metadata` does."""
        bundle = _bundle(str_or_query_bundle)
        given = await asyncio.to_thread(self._given, bundle)
        if self._sql_only:
            return self._sql_alone(await self._awritten_alone(given, bundle))
        election = elect(
            await self._runner.arun(await self._awritten(given, bundle)), self._dialect
        )
        if self._needs_repair(election):
            rewritten = await self._arewritten(election.winner, given, bundle)
            return self._answer(election, await self._runner.arun(rewritten))
        return self._answer(election)

    # --- Writing -------------------------------------------------------------------------------

    def _given(self, bundle: QueryBundle) -> dict[str, str]:
        """Return what the prompt's template takes."""
        check_alive(self._sql_database.read_only)
        try:
            described = self._get_table_context(bundle)
        except NoSuchTableError as error:
            raise DatabaseError(f"there is no table {error}; make the retriever anew") from None
        except SQLAlchemyError as error:
            reason = str(getattr(error, "orig", None) or type(error).__name__)
            raise DatabaseError(f"the tables cannot be read: {reason}") from None
        return {
            "query_str": bundle.query_str,
            "schema": described,
            "dialect": self._sql_database.dialect,
        }

    def _written_alone(self, given: Mapping[str, str], bundle: QueryBundle) -> list[Candidate]:
        return [self._parsed(self._llm.predict(self._text_to_sql_prompt, **given), bundle)]

    async def _awritten_alone(
        self, given: Mapping[str, str], bundle: QueryBundle
    ) -> list[Candidate]:
        return [self._parsed(await self._llm.apredict(self._text_to_sql_prompt, **given), bundle)]

    def _written(self, given: Mapping[str, str], bundle: QueryBundle) -> list[Candidate]:
        if self.n == 1:
            return self._written_alone(given, bundle)
        messages = self._messages(given)
        if callable(getattr(self._llm, "sample", None)):
            return self._sampled(messages, bundle)
        texts = [self._llm.predict(self._text_to_sql_prompt, **given)]
        for _ in range(self.n - 1):
            texts.append(_text(self._llm.chat(messages, temperature=self.temperature)))
        return [self._parsed(text, bundle) for text in texts]

    async def _awritten(self, given: Mapping[str, str], bundle: QueryBundle) -> list[Candidate]:
        if self.n == 1:
            return await self._awritten_alone(given, bundle)
        messages = self._messages(given)
        if callable(getattr(self._llm, "sample", None)):
            return await asyncio.to_thread(self._sampled, messages, bundle)
        others = [
            self._llm.achat(messages, temperature=self.temperature) for _ in range(self.n - 1)
        ]
        first, *rest = await asyncio.gather(
            self._llm.apredict(self._text_to_sql_prompt, **given), *others
        )
        return [self._parsed(text, bundle) for text in (first, *map(_text, rest))]

    def _sampled(self, messages: Sequence[Any], bundle: QueryBundle) -> list[Candidate]:
        samples = self._llm.sample(
            messages, self.n, temperature=self.temperature, seed=self.seed, greedy_first=True
        )
        return [self._parsed(one.text, bundle, one.mean_logprob) for one in samples]

    def _rewritten(
        self, failed: Candidate, given: Mapping[str, str], bundle: QueryBundle
    ) -> list[Candidate]:
        try:
            answer = self._llm.chat(self._repair_messages(failed, given))
        except FTError as error:  # the conversation is longer than the model's window
            logger.info("no repair turn: %s", error)
            return []
        return [self._parsed(_text(answer), bundle)]

    async def _arewritten(
        self, failed: Candidate, given: Mapping[str, str], bundle: QueryBundle
    ) -> list[Candidate]:
        try:
            answer = await self._llm.achat(self._repair_messages(failed, given))
        except FTError as error:
            logger.info("no repair turn: %s", error)
            return []
        return [self._parsed(_text(answer), bundle)]

    def _messages(self, given: Mapping[str, str]) -> list[Any]:
        messages: list[Any] = self._text_to_sql_prompt.format_messages(llm=self._llm, **given)
        return messages

    def _repair_messages(self, failed: Candidate, given: Mapping[str, str]) -> list[Any]:
        assert failed.error is not None
        return repair_messages(self._messages(given), failed.sql, failed.error.reason)

    def _parsed(
        self, text: str, bundle: QueryBundle, mean_logprob: float | None = None
    ) -> Candidate:
        sql = self._sql_parser.parse_response_to_sql(text, bundle)
        if self._verbose:
            print(f"> Predicted SQL query: {sql}")
        return Candidate(sql, mean_logprob)

    # --- Answering -----------------------------------------------------------------------------

    def _needs_repair(self, election: Election) -> bool:
        return self.repair and election.winner.error is not None

    def _sql_alone(
        self, written: Sequence[Candidate]
    ) -> tuple[list[NodeWithScore], dict[str, Any]]:
        sql = written[0].sql
        return [NodeWithScore(node=TextNode(text=sql))], {"sql_query": sql, "result": sql}

    def _answer(
        self, election: Election, repaired: Sequence[Candidate] = ()
    ) -> tuple[list[NodeWithScore], dict[str, Any]]:
        winner, votes = election.winner, election.votes
        is_repaired = any(one.result is not None for one in repaired)
        if is_repaired:
            winner, votes = repaired[0], 1
        steps = {
            "truncated": winner.result is not None and winner.result.truncated,
            "error": None if winner.error is None else winner.error.reason,
            "candidates": [one.to_dict() for one in (*election.candidates, *repaired)],
            "votes": votes,
            "repaired": is_repaired,
        }
        if winner.result is not None:
            nodes, metadata = self._nodes(winner.sql, winner.result)
        elif winner.error is not None and not self._handle_sql_errors:
            raise winner.error
        else:
            nodes, metadata = [NodeWithScore(node=TextNode(text=f"Error: {winner.error}"))], {}
        return nodes, {"sql_query": winner.sql, **metadata, **steps}

    def _nodes(self, sql: str, result: QueryResult) -> tuple[list[NodeWithScore], dict[str, Any]]:
        """Return the rows as LlamaIndex's SQLRetriever does, without running the SQL again."""
        text, metadata = self._sql_database.shown(result)
        if not self._sql_retriever._return_raw:
            nodes = self._sql_retriever._format_node_results(metadata["result"], result.columns)
            return nodes, metadata
        node = TextNode(
            text=text,
            metadata={"sql_query": sql, **metadata},
            excluded_embed_metadata_keys=_KEYS,
            excluded_llm_metadata_keys=_KEYS,
        )
        return [NodeWithScore(node=node)], metadata


def _bundle(question: str | QueryBundle) -> QueryBundle:
    return QueryBundle(question) if isinstance(question, str) else question


def _text(response: Any) -> str:
    return response.message.content or ""
