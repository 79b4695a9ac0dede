"""Ask an LLM many things, each once: concurrent, through a journal, with a list of failures."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tqdm import tqdm

from ft_core.errors import ArgumentError, GenerationError
from ft_core.files import content_hash
from ft_core.generation import failures, runner
from ft_core.generation.journal import AnswerJournal
from ft_core.generation.prompts import Prompt

if TYPE_CHECKING:
    from llama_index.core.llms import LLM

T = TypeVar("T")

# So many calls failing in a row, with none answered in between, is an outage and no accident.
_OUTAGE = 10


class JournalledCalls:
    """The calls of one generation.

    Args:
        llm: any LlamaIndex LLM.
        journal: keeps the answers.
        identity: what makes an answer what it is, besides the LLM and the prompt.
        workers: calls in flight at most; a model in this process is called once at a time.
        max_retries, retry_limit: see `runner.Caller`.
        on_failure: "continue" notes a failure in `failed`, "fail" raises it.
        item: what a call is about, in messages: "node", say.

    Raises:
        ArgumentError: `llm` is none.
    """

    def __init__(
        self,
        llm: LLM,
        journal: AnswerJournal,
        identity: list[Any],
        *,
        workers: int,
        max_retries: int,
        retry_limit: int,
        on_failure: Literal["continue", "fail"] | str = "continue",
        item: str = "node",
    ) -> None:
        check_llm(llm)
        self.made = 0
        """Answers that were asked for in this run."""
        self.resumed = 0
        """Answers that an earlier run had journalled."""
        self.failed: dict[str, str] = {}
        """Name of what a call was about to why it failed."""
        self._llm = llm
        self._journal = journal
        self._identity = [*_identity(llm), *identity]
        self._workers = 1 if runner.is_in_process(llm) else workers
        self._retries = {"max_retries": max_retries, "retry_limit": retry_limit}
        self._fails = on_failure == "fail"
        self._item = item
        self._failed_in_a_row = 0
        self._caller: runner.Caller | None = None

    async def for_each(
        self,
        items: Collection[T],
        work: Callable[[T], Awaitable[None]],
        *,
        title: str,
        unit: str,
        verbose: bool,
    ) -> None:
        """Do `work`, which may call `answer`, for every item; the first error stops all."""
        workers = max(1, min(self._workers, len(items)))
        with (
            runner.Caller(self._llm, workers=workers, **self._retries) as self._caller,
            # None: silent unless stderr is a terminal.
            tqdm(
                total=len(items), desc=title, unit=unit, disable=None if verbose else True
            ) as progress,
        ):

            async def one(item: T) -> None:
                await work(item)
                progress.update()

            await runner.for_each(items, one, workers=workers)

    async def answer(self, prompt: Prompt, names: list[str], *identity: Any) -> str | None:
        """Return the answer, from the journal or the LLM; None, and a note of why, if it fails.

        Args:
            prompt: what to ask.
            names: of what it is about, for the journal and for `failed`.
            identity: what else makes this answer what it is.

        Raises:
            GenerationError: every other call must fail too, or failures stop the run.
        """
        if self._caller is None:
            raise RuntimeError("call it inside for_each")
        key = content_hash([*self._identity, *identity, prompt])
        kept = self._journal.get(key)
        if kept is not None:
            self.resumed += 1
            return kept
        try:
            answer = await self._caller.ask(prompt)
        except Exception as error:
            self._failure(names, error)
            return None
        self._journal.put(key, names, answer)
        self.made += 1
        self._failed_in_a_row = 0
        return answer

    def _failure(self, names: list[str], error: Exception) -> None:
        reason = failures.describe(error, getattr(self._llm, "api_key", None))
        kept = f"what was answered is kept in {self._journal.path}"
        if failures.is_fatal(error):
            raise GenerationError(
                f"the LLM refuses every call: {reason}; {kept}, so run again once this is mended"
            ) from None
        self._failed_in_a_row += 1
        self.report(names, reason)
        if self._failed_in_a_row >= _OUTAGE:
            raise GenerationError(
                f"the last {_OUTAGE} {self._item}s all failed, the latest with {reason}; {kept}, "
                "so run again once this is mended"
            ) from None

    def report(self, names: list[str], reason: str) -> None:
        """Note why nothing came of a call.

        Raises:
            GenerationError: a failure is to stop the run.
        """
        if self._fails:
            raise GenerationError(
                f"{self._item} {names[0]!r}: {reason}; what was answered is kept in "
                f"{self._journal.path}"
            ) from None
        self.failed.update(dict.fromkeys(names, reason))


def check_llm(llm: Any) -> None:
    """Check that an argument is a LlamaIndex LLM.

    Raises:
        ArgumentError: it is not.
    """
    if not hasattr(llm, "complete") or not hasattr(llm, "metadata"):
        raise ArgumentError(
            "llm",
            f"is a {type(llm).__name__} and no LlamaIndex LLM; "
            "ft_core.llms.load_llm makes one from a short name",
        )


def shorten(answer: str) -> str:
    """Return an answer as an error message quotes it."""
    answer = " ".join(answer.split())
    if not answer:
        return "(it is empty)"
    return repr(answer if len(answer) <= 80 else answer[:80] + "...")


def _identity(llm: Any) -> list[Any]:
    """Return what makes an LLM answer as it does; not its address, which may change."""
    settings = [getattr(llm, name, None) for name in ("temperature", "system_prompt")]
    return [llm.class_name(), llm.metadata.model_name, *settings, llm.metadata.num_output]
