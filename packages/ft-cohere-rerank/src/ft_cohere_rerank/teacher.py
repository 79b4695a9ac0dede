"""Score the candidates of a rerank dataset with Cohere's reranker, or one that speaks as it does.

A student learns from such scores what the teacher knows; see ft-crossencoder.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ft_cohere_rerank.client import (
    KEYS,
    ONCE,
    check_timeout,
    check_url,
    client_errors,
    find_key,
    is_foreign,
    is_temporary,
    reason,
    server_of,
    token_of,
    url_argument,
)
from ft_cohere_rerank.dataset import estimate_tokens
from ft_core.datasets.rerank import RerankDataset
from ft_core.errors import ArgumentError, GenerationError
from ft_core.files import content_hash
from ft_core.generation.journal import AnswerJournal
from ft_core.generation.runner import for_each, run
from ft_core.jobs import open_lock
from ft_core.report.text import plural
from ft_core.retries import pause_after

if TYPE_CHECKING:
    import cohere

logger = logging.getLogger(__name__)

DOCUMENTS_PER_CALL = 1_000
"""Cohere advises against more; a longer list of candidates goes in several calls."""

_UNIT_DOCUMENTS = 100  # that a search unit pays for
_UNIT_TOKENS = 500  # of a document with its query; a longer one counts as several
_MAX_TOKENS = 4_096  # Cohere's own limit where none is given
_MINUTE = 60.0  # seconds
_MALFORMED_TRIES = 3  # of a call whose answer does not fit its documents
_HOPELESS = (401, 402, 403, 404, 405, 429)  # statuses that every other call would end in, too
_LONG_WAIT = 5.0  # seconds until somebody who waits is told why


@dataclass(frozen=True)
class TeacherCost:
    """What scoring takes, by an estimate of the tokens."""

    queries: int
    documents: int
    calls: int
    """Those that a journal does not answer."""
    search_units: int
    """What Cohere bills for these calls."""
    cut: int
    """Documents that are longer than the model reads."""
    price: float | None
    """None where no price was given."""
    minutes: float | None
    """The least that the rate limit allows; None where there is none."""

    def __str__(self) -> str:
        text = (
            f"{plural(self.queries, 'query', 'queries')}, {plural(self.documents, 'document')}: "
            f"{plural(self.calls, 'call')}, about {plural(self.search_units, 'search unit')}"
        )
        if self.price is not None:
            text += f", {self.price:,.2f} in your price's currency"
        if self.minutes is not None and self.minutes >= 1:
            text += f", at least {self.minutes:,.0f} min"
        return text


@dataclass(frozen=True)
class _Batch:
    """The documents of one call."""

    key: str
    example: int
    start: int
    query: str
    texts: list[str]


class CohereRerankTeacher:
    """Scores documents through `/v2/rerank`, of Cohere or of any server with that call.

    Args:
        model: the teacher, by its name at the service.
        api_key: `COHERE_API_KEY` or `CO_API_KEY` by default. It is never written anywhere.
        base_url: another server (vLLM, Infinity and others speak this API), without "/v2".
        client: a `cohere.AsyncClientV2` to use instead of the two above.
        num_workers: calls at a time.
        calls_per_minute: a limit that is kept from here; Cohere's is 10 for a trial key and
            1,000 for a production one. None for no limit.
        max_tokens_per_doc: where the service cuts a document; Cohere's default is 4,096.
        max_retries: tries after the first of a call that the service could not take.
        price_per_thousand: of search units, for the estimate.
        max_search_units: start nothing that is estimated to take more.
        timeout: seconds until a call without an answer is repeated.
        show_progress: show a bar on stderr where that is a terminal.
    """

    def __init__(
        self,
        model: str = "rerank-v3.5",
        *,
        api_key: str | None = None,
        base_url: str | None = None,
        client: cohere.AsyncClientV2 | None = None,
        num_workers: int = 8,
        calls_per_minute: int | None = 1_000,
        max_tokens_per_doc: int | None = None,
        max_retries: int = 5,
        price_per_thousand: float | None = None,
        max_search_units: int | None = None,
        timeout: float = 60.0,
        show_progress: bool = True,
    ) -> None:
        for name, value, least in (
            ("num_workers", num_workers, 1),
            ("calls_per_minute", calls_per_minute, 1),
            ("max_tokens_per_doc", max_tokens_per_doc, 1),
            ("max_retries", max_retries, 0),
            ("max_search_units", max_search_units, 0),
        ):
            if value is not None and value < least:
                raise ArgumentError(name, f"must be at least {least}, not {value}")
        if price_per_thousand is not None and not 0 <= price_per_thousand < math.inf:
            raise ArgumentError(
                "price_per_thousand", f"must be a number from 0, not {price_per_thousand}"
            )
        rerank = getattr(getattr(client, "v2", None), "rerank", None)
        if client is not None and not inspect.iscoroutinefunction(rerank):
            raise ArgumentError("client", "must be a cohere.AsyncClientV2")
        check_timeout(timeout)
        check_url(base_url)
        self.model = model
        self.base_url = base_url
        self.num_workers = num_workers
        self.calls_per_minute = calls_per_minute
        self.max_tokens_per_doc = max_tokens_per_doc
        self.max_retries = max_retries
        self.price_per_thousand = price_per_thousand
        self.max_search_units = max_search_units
        self.timeout = timeout
        self.show_progress = show_progress
        self._api_key = api_key
        self._client = client

    def estimate(self, dataset: Any, output_path: Path | str | None = None) -> TeacherCost:
        """Return what `score` will take; nothing is sent.

        Args:
            dataset: a `RerankDataset`, or what its `coerce` takes.
            output_path: that of `score`: what its journal holds is not counted.
        """
        dataset = RerankDataset.coerce(dataset)
        journal = None if output_path is None else AnswerJournal(Path(output_path), RerankDataset)
        return self._cost(dataset, _missing(self._batches(dataset), journal))

    def score(self, dataset: Any, output_path: Path | str) -> RerankDataset:
        """Return the dataset with a `teacher_score` at every document, and write it.

        Each answer is kept in `<output_path>.journal.jsonl` as it arrives: the same call after
        a kill or an error asks only for what is missing. What this will take is logged first.

        Args:
            dataset: a `RerankDataset`, or what its `coerce` takes, for example a path.
            output_path: the JSON Lines file to write, whole or not at all.

        Raises:
            ArgumentError: the estimate is above `max_search_units`; nothing was sent.
            GenerationError: the output is a file that this did not write, and nothing was sent;
                or the service refuses, cannot be reached, or answers what does not fit the
                documents, and the answers so far are kept; or another run writes this output.
        """
        dataset = RerankDataset.coerce(dataset)
        try:
            return run(self.ascore(dataset, output_path))
        except KeyboardInterrupt:
            logger.warning("%s", self._stopped(dataset, Path(output_path)))
            raise

    async def ascore(self, dataset: Any, output_path: Path | str) -> RerankDataset:
        """Do as `score` does, from asynchronous code."""
        dataset = RerankDataset.coerce(dataset)
        with _only_run(Path(output_path)):
            return await self._score(dataset, Path(output_path))

    async def _score(self, dataset: RerankDataset, output: Path) -> RerankDataset:
        journal = AnswerJournal(output, RerankDataset)
        batches = [*self._batches(dataset)]
        journal.check_output({text for batch in batches for text in batch.texts})
        missing = _missing(batches, journal)
        cost = self._cost(dataset, missing)
        self._announce(cost)
        if missing:
            await self._ask_all(missing, journal)
        scored = self._joined(dataset, batches, journal)
        journal.save(scored)
        return scored

    def _stopped(self, dataset: RerankDataset, output: Path) -> str:
        """Return what to say after Ctrl-C."""
        journal = AnswerJournal(output, RerankDataset)
        asked = {batch.key for batch in self._batches(dataset)}
        kept = sum(journal.get(key) is not None for key in asked)
        if not kept:
            return "stopped; no answer is kept yet"
        are = "is" if kept == 1 else "are"
        return (
            f"stopped; {plural(kept, 'answer')} {are} kept in {journal.path}; the same command "
            "or call goes on"
        )

    def _announce(self, cost: TeacherCost) -> None:
        logger.info("%s scores %s", self.model, cost)
        if cost.cut:
            logger.warning(
                "%s longer, by an estimate, than %d tokens: %s scores the beginning alone",
                plural(cost.cut, "document is", "documents are"),
                self.max_tokens_per_doc or _MAX_TOKENS,
                self.model,
            )
        if self.max_search_units is not None and cost.search_units > self.max_search_units:
            raise ArgumentError(
                "max_search_units", f"is {self.max_search_units:,}, and this takes {cost}"
            )

    def _cost(self, dataset: RerankDataset, batches: list[_Batch]) -> TeacherCost:
        most = self.max_tokens_per_doc or _MAX_TOKENS
        cut = units = 0
        for batch in batches:
            lengths = [estimate_tokens(text) for text in batch.texts]
            cut += sum(length > most for length in lengths)
            units += _search_units(estimate_tokens(batch.query), [min(n, most) for n in lengths])
        price, limit = self.price_per_thousand, self.calls_per_minute
        return TeacherCost(
            queries=len(dataset),
            documents=sum(len(example.documents) for example in dataset.examples),
            calls=len(batches),
            search_units=units,
            cut=cut,
            price=None if price is None else units * price / 1000,
            minutes=None if limit is None else max(0, (len(batches) - 1) // limit),
        )

    def _batches(self, dataset: RerankDataset) -> Iterator[_Batch]:
        for number, example in enumerate(dataset.examples):
            texts = [document.text for document in example.documents]
            for start in range(0, len(texts), DOCUMENTS_PER_CALL):
                part = texts[start : start + DOCUMENTS_PER_CALL]
                key = content_hash([self.model, self.max_tokens_per_doc, example.query, part])
                yield _Batch(key, number, start, example.query, part)

    def _joined(
        self, dataset: RerankDataset, batches: list[_Batch], journal: AnswerJournal
    ) -> RerankDataset:
        by_example: list[list[float]] = [[] for _ in dataset.examples]
        for batch in batches:
            by_example[batch.example] += _kept_scores(journal, batch)
        return RerankDataset(
            examples=[
                example.model_copy(
                    update={
                        "documents": [
                            document.model_copy(update={"teacher_score": score})
                            for document, score in zip(example.documents, found, strict=True)
                        ],
                        "metadata": {**example.metadata, "teacher": self.model},
                    }
                )
                for example, found in zip(dataset.examples, by_example, strict=True)
            ]
        )

    # The calls

    async def _ask_all(self, batches: list[_Batch], journal: AnswerJournal) -> None:
        client = self._client or self._make_client()
        asking = _Asking(self, client, journal)
        refused: list[tuple[_Batch, str]] = []
        with tqdm(
            total=len(batches), desc="scoring", disable=None if self.show_progress else True
        ) as bar:

            async def work(batch: _Batch) -> None:
                try:
                    scores = await asking.scores(batch)
                except _RefusedError as error:  # the others may well be answered
                    refused.append((batch, str(error)))
                else:
                    journal.put(batch.key, [], json.dumps(scores))
                bar.update()

            try:
                await for_each(batches, work, workers=self.num_workers)
            finally:
                if self._client is None:
                    await client.__aexit__(None, None, None)  # type: ignore[no-untyped-call]
        if refused:
            batch, why = refused[0]
            raise GenerationError(
                f"{len(refused):,} of {plural(len(batches), 'call')} failed; the first, of query "
                f"{batch.query!r:.80} with {plural(len(batch.texts), 'document')}: {why}"
                + _advice(journal)
            )

    def _make_client(self) -> cohere.AsyncClientV2:
        import cohere

        key = find_key(self._api_key, self.base_url)
        return cohere.AsyncClientV2(
            api_key=key, timeout=self.timeout, **url_argument(self.base_url)
        )


class _RefusedError(Exception):
    """One call cannot be answered; says why."""


class _MalformedError(Exception):
    """An answer does not fit its documents; says how."""


class _Asking:
    """The calls of one `score`, with the rate limit that they share."""

    def __init__(self, teacher: CohereRerankTeacher, client: Any, journal: AnswerJournal) -> None:
        self._teacher = teacher
        self._client = client
        self._journal = journal
        self._told_until = 0.0  # by the clock of `time.monotonic`
        self._limit = _RateLimit(teacher.calls_per_minute)

    async def scores(self, batch: _Batch) -> list[float]:
        """Return a score for each document, in their order.

        Raises:
            _RefusedError: this call cannot be answered.
            GenerationError: no call can.
        """
        for attempt in range(1, _MALFORMED_TRIES + 1):
            answer = await self._answered(batch)
            try:
                return _scores_of(answer, len(batch.texts))
            except _MalformedError as error:
                logger.debug("answer %d for %r: %s", attempt, batch.query, error)
                problem = str(error)
        raise _RefusedError(
            f"{server_of(self._client)} answers {_MALFORMED_TRIES} times what does not fit: "
            f"{problem}"
        )

    async def _answered(self, batch: _Batch) -> Any:
        teacher, attempt, began = self._teacher, 0, time.monotonic()
        options: dict[str, Any] = {}
        if teacher.max_tokens_per_doc is not None:
            options["max_tokens_per_doc"] = teacher.max_tokens_per_doc
        while True:
            await self._limit.turn()
            try:
                return await self._client.v2.rerank(
                    model=teacher.model,
                    query=batch.query,
                    documents=batch.texts,
                    top_n=len(batch.texts),  # some servers answer fewer by default
                    request_options=ONCE,
                    **options,
                )
            except client_errors() as error:
                if attempt == teacher.max_retries or not is_temporary(error):
                    raise self._translated(error) from None  # it repeats all headers
                pause = pause_after(error, attempt)
                self._tell(error, pause, waited=time.monotonic() - began)
                await asyncio.sleep(pause)
                attempt += 1

    def _tell(self, error: Exception, pause: float, *, waited: float) -> None:
        """Say why it takes so long, once for the calls that wait at the same time."""
        now = time.monotonic()
        if waited + pause < _LONG_WAIT or now < self._told_until:
            return
        self._told_until = now + max(pause, _LONG_WAIT)
        logger.warning("%s; trying again in %.0f s", self._problem(error), pause)

    def _problem(self, error: Exception) -> str:
        """Return what the server says, or that it says nothing; never the key."""
        status, said = getattr(error, "status_code", None), reason(error)
        if token := token_of(self._client):
            said = said.replace(token, "***")
        server = server_of(self._client)
        if is_foreign(error):
            code = "" if status is None else f"{status}: "
            return f"what {server} answers is no rerank answer of Cohere's API ({code}{said})"
        if status is None:
            return f"no answer by {server} ({said})"
        if is_temporary(error):
            return f"{server} answers {status}: {said}"
        verb = "refuses" if status in _HOPELESS else "rejects it"
        return f"{server} {verb} ({status}): {said}"

    def _translated(self, error: Exception) -> Exception:
        status, problem = getattr(error, "status_code", None), self._problem(error)
        if is_foreign(error):
            return GenerationError(f"{problem}; check base_url")
        if status is None or is_temporary(error):
            kept = "the scores so far are kept, " if self._journal.path.exists() else ""
            later = "" if status is None else " later"
            return GenerationError(f"{problem}; {kept}call again{later}")
        if status in _HOPELESS:
            return GenerationError(
                f"{problem}; check the API key ({' or '.join(KEYS)}), base_url and "
                f"model={self._teacher.model!r}"
            )
        return _RefusedError(problem)


class _RateLimit:
    """Lets at most so many calls start in any minute."""

    def __init__(self, calls: int | None) -> None:
        self._calls = calls
        self._starts: deque[float] = deque()
        self._lock = asyncio.Lock()

    async def turn(self) -> None:
        """Return when the next call may start."""
        if self._calls is None:
            return
        async with self._lock:
            if len(self._starts) == self._calls:
                wait = self._starts.popleft() + _MINUTE - time.monotonic()
                if wait > 0:
                    await asyncio.sleep(wait)
            self._starts.append(time.monotonic())


@contextmanager
def _only_run(output: Path) -> Iterator[None]:
    """Keep other runs out of an output: they would pay for the same answers.

    Raises:
        GenerationError: another run is under way, or the folder cannot be written to.
    """
    try:
        lock = open_lock(output, wait=False)
    except OSError as error:
        raise GenerationError(f"{output}: cannot be written: {error}; nothing was sent") from None
    if lock is None:
        raise GenerationError(
            f"{output}: another run is scoring into it; wait for its end, or name another "
            "output. Nothing was sent"
        )
    try:
        yield
    finally:
        os.close(lock)


def _advice(journal: AnswerJournal) -> str:
    """Return how to go on after some calls failed."""
    if not journal.path.exists():
        return ""
    return (
        f". The other answers are kept in {journal.path}; call again to ask only for these, or "
        "leave them out"
    )


def _missing(batches: Iterable[_Batch], journal: AnswerJournal | None) -> list[_Batch]:
    """Return what is to be asked; of two with the same query and documents one."""
    missing = {b.key: b for b in batches if journal is None or journal.get(b.key) is None}
    return [*missing.values()]


def _kept_scores(journal: AnswerJournal, batch: _Batch) -> list[float]:
    """Return the journal's answer to a call."""
    scores: list[float] = json.loads(journal.get(batch.key) or "[]")
    return scores


def _scores_of(answer: Any, count: int) -> list[float]:
    """Return the scores in the order of the documents, whatever order the answer has.

    Raises:
        _MalformedError: a document has none or several, or there are others.
    """
    results = getattr(answer, "results", None) or ()  # JSON's null is no answer
    if not isinstance(results, list | tuple):
        raise _MalformedError(f"results that are no list: {results!r:.80}")
    scores: dict[int, float] = {}
    for result in results:
        index = getattr(result, "index", None)
        score = getattr(result, "relevance_score", None)
        if not isinstance(index, int) or not 0 <= index < count:
            raise _MalformedError(f"index {index!r}, where {count} documents were sent")
        if not isinstance(score, int | float) or not math.isfinite(score):
            raise _MalformedError(f"the score {score!r} for document {index}")
        if scores.setdefault(index, float(score)) != score:
            raise _MalformedError(f"two scores for document {index}: {scores[index]} and {score}")
    if len(scores) < count:
        first = next(index for index in itertools.count() if index not in scores)
        raise _MalformedError(
            f"{len(scores)} scores for {count} documents; document {first} has none"
        )
    return [scores[index] for index in range(count)]


def _search_units(query_tokens: int, lengths: list[int]) -> int:
    """Return what Cohere bills for documents of these tokens."""
    room = max(1, _UNIT_TOKENS - query_tokens)
    pieces = sum(max(1, math.ceil(length / room)) for length in lengths)
    return math.ceil(pieces / _UNIT_DOCUMENTS)
