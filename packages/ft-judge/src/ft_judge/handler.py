"""Journal what the evaluators of a live app are shown and what they say of it."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from llama_index.core.base.llms.base import BaseLLM
from typing_extensions import Self

from ft_core.datasets import JudgeDataset, JudgeExample
from ft_core.errors import ArgumentError, ArtifactError, DatasetError
from ft_core.files import Journal
from ft_core.hooks import Attachment, Call, Hook, clean_text, find_components
from ft_judge.evaluators import (
    EVALUATORS,
    LLM_METHODS,
    answer_of,
    inputs_of,
    is_evaluator,
    is_llm,
    label_of,
    model_of,
    prompt_of,
    raised_label,
)

_ONE_ORDER = "_get_eval_result"
"""The method of `PairwiseComparisonEvaluator` that judges a pair in one order."""


@dataclass
class _Judgement:
    """One call of an evaluator, as far as it has come."""

    content: dict[str, Any]
    """What is judged, taken down before the app can change it."""
    time: str = field(default_factory=lambda: _now())
    calls: list[dict[str, Any]] = field(default_factory=list)
    """Prompt and answer of each call of an LLM that ended well."""
    failed: bool = False
    """Whether the last call of an LLM failed."""
    orders: dict[str, tuple[float | None, str | None, str | None]] = field(default_factory=dict)
    """Of a pair: "" and "flipped_" to verdict for the order given, words, and why no verdict."""


class JudgeHandler(Hook):
    """Records each judgement of a live app's evaluators in a journal that trains a student.

    ```python
    handler = JudgeHandler("verdicts.jsonl")
    handler.attach(evaluator)  # or a BatchEvalRunner; or `with handler.attach(...): ...`
    result = evaluator.evaluate(query=..., response=..., second_response=...)
    handler.mark(result, human=0.0, feedback="The second answer is right.")
    dataset = handler.to_dataset()
    ```

    Watches `CorrectnessEvaluator`, `PairwiseComparisonEvaluator`, `FaithfulnessEvaluator`,
    `RelevancyEvaluator`, `GuidelineEvaluator` and classes derived from them. A record holds
    what was judged, verdict or score, the judge's words, whether it passed, seconds, model,
    and of each LLM call the prompt and the raw answer. Where `PairwiseComparisonEvaluator`
    asks in both orders (`enforce_consensus`), the record holds both verdicts as they were, so
    that `JudgeDataset.consistent` can tell a tie from a judge that follows the order.

    An answer that cannot be read, or is off the scale, is recorded without a verdict, also
    where the evaluator raises because of it. A judgement that fails for another reason, as
    when the LLM cannot be reached, is not recorded.

    The journal is a `JudgeDataset` file as it stands: an engine takes its path. Safe with
    threads, asyncio and several processes on one file. Nothing that goes wrong while the app
    runs reaches it: see `ft_core.hooks.Hook`.

    Args:
        path: the journal, JSON Lines; one that exists is continued.
        redact: applied to each text before it is written: question, answers, contexts,
            guideline, the judge's words, prompts, feedback. Where it raises, nothing is written.
        prompts: write the prompts and raw answers too. They make a line about twice as long.

    Raises:
        ArgumentError: `path` is a folder.
        ArtifactError: `path` is a file that no `JudgeHandler` wrote.
    """

    methods = ("aevaluate", _ONE_ORDER, *LLM_METHODS)

    def __init__(
        self,
        path: Path | str,
        *,
        redact: Callable[[str], str] | None = None,
        prompts: bool = True,
    ) -> None:
        super().__init__()
        self.path = Path(path)
        self._journal = Journal(self.path)
        self._redact = redact
        self._prompts = prompts
        self._results: dict[int, tuple[Any, str]] = {}
        if self.path.is_dir():
            raise ArgumentError("path", f"{self.path} is a folder; name a file in it")
        next(self.records(), None)

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Return a handler on a journal that exists, to export it or to go on with it.

        Raises:
            ArtifactError: there is no such file, or no `JudgeHandler` wrote it.
        """
        if not Path(path).exists():
            raise ArtifactError(f"{path}: no such journal")
        return cls(path)

    def components(self) -> tuple[type, ...]:
        """Watch the evaluators, and for prompts and raw answers what LLMs do for them."""
        return (*EVALUATORS, BaseLLM)

    def attach(self, target: Any) -> Attachment:
        """Record what every evaluator inside `target` says; see `Hook.attach`.

        Raises:
            ArgumentError: there is none inside, so nothing would be recorded.
        """
        if not find_components(target, tuple(EVALUATORS)):
            names = ", ".join(kind.__name__ for kind in EVALUATORS)
            raise ArgumentError(
                "target",
                f"found none of {names} inside a {type(target).__name__}; attach to the "
                "evaluator itself, to a BatchEvalRunner, or to a list or dict of them",
            )
        return super().attach(target)

    # --- While the app runs ------------------------------------------------------------------

    def wants(self, call: Call) -> bool:
        """Report the outermost evaluator's call, and what it does inside it."""
        judging = [outer for outer in call.outer if is_evaluator(outer.target)]
        if call.method == "aevaluate":
            return not judging
        if call.method == _ONE_ORDER:
            return bool(judging) and judging[-1].target is call.target
        return bool(judging) and not is_llm(call.outer[-1].target)

    def started(self, call: Call) -> None:
        """Take down what is judged, before the app can change it."""
        if call.method == "aevaluate":
            call.state = _Judgement(inputs_of(call.target, call.args, call.kwargs))
        elif is_llm(call.target):
            call.state = prompt_of(call.args, call.kwargs)

    def observe(self, call: Call) -> None:
        """Take in a step of a judgement, or write the judgement that has ended."""
        if call.method == "aevaluate":
            if isinstance(call.state, _Judgement) and _is_judged(call):
                self._write(call)
            return
        judgement = call.outer[0].state
        if not isinstance(judgement, _Judgement):
            return
        if call.method == _ONE_ORDER:
            _take_order(judgement, call)
        else:
            judgement.failed = call.error is not None
            if call.error is None and call.complete:
                answer = answer_of(call.result)
                judgement.calls.append({"prompt": call.state, "answer": answer})

    def _write(self, call: Call) -> None:
        judgement: _Judgement = call.state
        judgement_id = uuid.uuid4().hex
        said, why = _said(call, judgement)
        metadata = {
            "id": judgement_id,
            "time": judgement.time,
            "seconds": round(call.seconds, 6),
            "model": model_of(call.target),
            "evaluator": type(call.target).__name__,
            "passing": getattr(call.result, "passing", None),
            "inconclusive": self._cleaned(why),  # it may quote the answer
        }
        if self._prompts:
            metadata["calls"] = judgement.calls
        metadata = {key: value for key, value in metadata.items() if value not in (None, [])}
        content = self._cleaned({**judgement.content, **said})
        calls = {"calls": self._cleaned(metadata["calls"])} if "calls" in metadata else {}
        # Checked first: what a dataset would refuse must not stand in the journal.
        example = JudgeExample(**content, metadata=metadata | calls)
        self._journal.append(example.content())
        if call.result is not None:
            self._remember(call.result, judgement_id)

    def _remember(self, result: Any, judgement_id: str) -> None:
        key = id(result)
        ref = weakref.ref(result, lambda _: self._results.pop(key, None))
        self._results[key] = (ref, judgement_id)

    def id_of(self, result: Any) -> str | None:
        """Return the id of the record of an `EvaluationResult` that the app holds, or None."""
        ref, judgement_id = self._results.get(id(result), (None, None))
        return judgement_id if ref is not None and ref() is result else None

    def mark(
        self,
        judgement: Any,
        human: float | bool | None = None,
        feedback: str | None = None,
    ) -> None:
        """Append what a person says of a judgement. Never raises, as the rest.

        A later mark of the same judgement takes the place of an earlier one.

        Args:
            judgement: the `EvaluationResult` that the evaluator returned, or the record's id.
            human: the right verdict or score, on the scale of the task: of a pair 1 for the
                first answer, 0 for the second, 0.5 for a tie; 1 to 5 for correctness; whether
                it passes for the others.
            feedback: in words.
        """
        try:
            found = judgement if isinstance(judgement, str) else self.id_of(judgement)
            if found is None:
                raise ArgumentError(
                    "judgement", "is neither a recorded EvaluationResult nor the id of a record"
                )
            if feedback is not None and not isinstance(feedback, str):
                raise ArgumentError("feedback", f"is a text, not {feedback!r}")
            if human is not None and not isinstance(human, int | float):
                raise ArgumentError("human", f"is a number or a boolean, not {human!r}")
            record: dict[str, Any] = {"mark": found, "metadata": {"time": _now()}}
            if human is not None:
                record["human"] = float(human)
            if feedback is not None:
                record["user_feedback"] = self._cleaned(feedback)
            self._journal.append(record)
        except Exception as error:
            self._failed(error)

    def _cleaned(self, value: Any) -> Any:
        """Return a value with each text in it redacted, and such that a UTF-8 file can hold it."""
        if isinstance(value, dict):
            names = ("task", "role")  # ours, not the app's
            return {k: v if k in names else self._cleaned(v) for k, v in value.items()}
        if isinstance(value, list):
            return [self._cleaned(item) for item in value]
        return clean_text(value, self._redact) if isinstance(value, str) else value

    # --- From the file -----------------------------------------------------------------------

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the records and marks in the file.

        Raises:
            ArtifactError: the file holds something that no `JudgeHandler` wrote.
        """
        for record in self._journal.records():
            metadata = record.get("metadata") if isinstance(record, dict) else None
            ours = isinstance(metadata, dict) and (
                "mark" in record or ({"task", "answer"} <= record.keys() and "id" in metadata)
            )
            if not ours:
                raise ArtifactError(
                    f"{self.path}: holds a line that no JudgeHandler wrote; name another file"
                )
            yield record

    def ids(self, query: str) -> list[str]:
        """Return the ids of the records of a query, oldest first; reads the whole journal."""
        query = self._cleaned(query)
        return [
            record["metadata"]["id"]
            for record in self.records()
            if "mark" not in record and record.get("query", "") == query
        ]

    def to_dataset(self) -> JudgeDataset:
        """Return what is recorded, by this process and others, with the marks in it.

        Raises:
            DatasetError: nothing is recorded; says what to do.
            ArtifactError: the file holds something that no `JudgeHandler` wrote.
        """
        if not any("mark" not in record for record in self.records()):
            raise DatasetError(
                "no judgement is recorded; attach the handler to the evaluator and use it (and "
                "see handler.failures for what could not be recorded)",
                source=self.path,
            )
        return JudgeDataset.load(self.path)


def _take_order(judgement: _Judgement, call: Call) -> None:
    """Take in the verdict on a pair in one order, expressed for the order that was given."""
    if call.error is not None:
        return
    given = judgement.content
    shown = call.args[1] if len(call.args) > 1 else call.kwargs.get("response")
    same = given.get("answer") == given.get("second_answer")
    flipped = bool(judgement.orders) if same else shown != given.get("answer")
    verdict, why = label_of("pairwise", call.result)
    if verdict is not None and flipped:
        verdict = 1 - verdict
    judgement.orders["flipped_" if flipped else ""] = (verdict, call.result.feedback, why)


def _is_judged(call: Call) -> bool:
    """Say whether a judge answered, though it may be that the evaluator could not read it."""
    if call.error is None:
        return call.complete
    judgement: _Judgement = call.state
    return isinstance(call.error, Exception) and bool(judgement.calls) and not judgement.failed


def _said(call: Call, judgement: _Judgement) -> tuple[dict[str, Any], str | None]:
    """Return verdict or score with the judge's words, as fields; and why there is none."""
    task = judgement.content["task"]
    if task == "pairwise":
        return _pair_said(call, judgement)
    if call.error is not None:
        said = {"reasoning": judgement.calls[-1]["answer"]}
        raised = (
            raised_label(call.target, call.error) if isinstance(call.error, Exception) else None
        )
        if raised is not None:
            return said | {"score": raised}, None
        return said, f"{type(call.error).__name__} in reading the answer"
    score, why = label_of(task, call.result)
    return {"score": score, "reasoning": call.result.feedback}, why


def _pair_said(call: Call, judgement: _Judgement) -> tuple[dict[str, Any], str | None]:
    orders = dict(judgement.orders)
    if not orders and call.error is None:
        # A subclass that judges in its own way: what it returns is for the order given,
        # unless both orders disagreed, which is no verdict.
        verdict, why = label_of("pairwise", call.result)
        if (
            str(getattr(call.result.pairwise_source, "value", call.result.pairwise_source))
            == "neither"
        ):
            verdict, why = None, "the two orders disagree"
        orders[""] = (verdict, call.result.feedback, why)
    said: dict[str, Any] = {}
    for order, (verdict, words, _) in orders.items():
        said |= {f"{order}verdict": verdict, f"{order}reasoning": words}
    reasons = [why for _, _, why in orders.values() if why]
    if call.error is not None:
        reasons.append(f"{type(call.error).__name__} in reading the answer")
    return said, reasons[0] if reasons else None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
