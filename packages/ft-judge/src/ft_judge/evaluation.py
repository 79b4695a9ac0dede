"""Have several judges judge the same answers, and compare them with a teacher and with people.

report = evaluate_judges(test, {"base": base, "tuned": tuned, "length": longer_answer})
rich.print(report)
report.save_html("judges.html")
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ft_core.answer_log import AnswerLog
from ft_core.datasets import JudgeDataset, JudgeExample
from ft_core.errors import ArgumentError
from ft_core.evaluation import AnswerEvaluation, in_order
from ft_core.progress import progress
from ft_core.report import JudgeReport
from ft_judge.judging import Answer, Judge, Judgement, event_loop
from ft_judge.statistics import Judged, statistics

__all__ = ["PASSES", "TEACHER", "JudgeReport", "Judgement", "evaluate_judges"]

TEACHER = "teacher"
"""The name of the recorded verdicts in the report."""

PASSES = 4.0
"""The score from which an answer passes as correct; LlamaIndex's default."""

Price = tuple[float, float] | float


def evaluate_judges(
    dataset: JudgeDataset | Path | str,
    judges: Any,
    *,
    both_orders: bool = True,
    include_teacher: bool = True,
    baseline: str | None = None,
    prices: Mapping[str, Price] | None = None,
    journal: Path | str | None = None,
    num_workers: int = 4,
    show_progress: bool = True,
    seed: int = 0,
) -> JudgeReport:
    """Return how far each judge agrees with the dataset's labels, and what sways it.

    Metrics, a value for each example, of pairs the mean over both orders:
    `agreement_teacher` and `agreement_human` (1 where the verdict is the same; of correctness
    where both pass, with a score of at least 4, or both fail); of correctness also
    `closeness_teacher` and `closeness_human` (1 less the distance of the scores over 4);
    of pairs in both orders also `joint_agreement_teacher` and `joint_agreement_human`: with the
    verdict of both together, which is what an evaluator with `enforce_consensus` says;
    `conclusive`, whether a verdict was given; `consistent`, whether both orders have the same
    verdict, where both have one; `latency`, seconds a verdict; `cost` a verdict. A judge that
    says nothing that can be read has no verdict: it agrees with nobody, and is never counted
    as a tie or as a failed answer. So is one whose call failed; the report names it.

    Statistics beside them, in `report.statistics` (see `ft_judge.statistics`): kappa with
    interval, weighted kappa, Pearson and Spearman of scores, the numbers of LlamaIndex's guide
    (`consensus_...`), flips, length bias, calibration, milliseconds.

    What the teacher said of a pair in both orders counts where it is the same.

    Args:
        dataset: examples of one task, with verdicts by a teacher or by people.
        judges: an evaluator of LlamaIndex or a function (`JudgeFunction`), or name to several;
            they do not see the verdicts. An evaluator whose result has a `probability` (see
            `Judgement`) is measured for calibration.
        both_orders: ask for each pair in both orders; otherwise only as it stands.
        include_teacher: show the recorded verdicts as a judge of their own, where people
            judged too: what the student could reach. Examples that the teacher was not asked
            about, without a verdict or a word of why there is none, do not count for it.
        baseline: the judge that the others are compared with; the first by default.
        prices: a judge's name to the prices of a million tokens in and out, or to the price
            of a verdict, in any currency, the same for all.
        journal: a file that keeps the answers, so that a run that was cut short goes on where
            it was; it must not outlive a change of the judges under the same names.
        num_workers: how many answers are asked for at the same time. For the latency of a
            model on this machine take 1: its calls wait for each other.
        show_progress: show bars on stderr where that is a terminal.
        seed: of the intervals and the tests.

    Raises:
        ArgumentError: an argument that cannot be used, several tasks, or no label at all.
        ArtifactError: the journal is another file.
        DatasetError: the file is bad.
    """
    dataset = JudgeDataset.coerce(dataset)
    examples = dataset.examples
    references = _check(dataset, num_workers, seed)
    targets = judges if isinstance(judges, Mapping) else {"judge": judges}
    _check_judges(targets, prices or {}, baseline)
    orders = 2 if both_orders and examples[0].task == "pairwise" else 1
    log = AnswerLog(journal, Answer)
    runs: dict[str, list[Judged]] = {}
    seconds: dict[str, float] = {}
    with event_loop() as loop:
        ready = [Judge(name, target, loop) for name, target in targets.items()]
        for judge in ready:
            judge.check_task(examples[0].task)
        for judge in ready:
            start = time.perf_counter()
            with judge.watched():
                asked = in_order(partial(_ask, log, judge, orders), examples, num_workers)
                answers = list(progress(asked, judge.name, len(examples), show_progress))
            runs[judge.name] = _judged(examples, answers)
            seconds[judge.name] = time.perf_counter() - start
    if include_teacher and "human" in references and "teacher" in references:
        judged = [example for example in examples if example.label is not None]
        told = all(example.flipped_verdict is not None for example in judged)
        recorded = [_recorded(example, orders if told else 1) for example in examples]
        runs[TEACHER] = _judged(examples, recorded)
        seconds[TEACHER] = 0.0
    of_run = {name: ["human"] if name == TEACHER else references for name in runs}
    digest = dataset.content_hash
    return JudgeReport(
        [
            _evaluation(name, items, of_run[name], seconds[name], digest, (prices or {}).get(name))
            for name, items in runs.items()
        ],
        {str(n): _shown(example) for n, example in enumerate(examples, 1)},
        _reference_texts(examples, references[0]),
        statistics={
            name: statistics([i for i in items if i.answers], of_run[name], seed=seed)
            for name, items in runs.items()
        },
        remarks=_remarks(examples, references),
        title=f"Judges: {examples[0].task}",
        baseline=baseline,
        primary=f"agreement_{references[0]}",
        uncompared=[TEACHER] if TEACHER in runs else [],
        seed=seed,
    )


def _ask(
    log: AnswerLog[Answer], judge: Judge, orders: int, example: JudgeExample
) -> tuple[Answer, ...]:
    """Return the answers in each order, expressed for the example's own."""

    def answer(shown: JudgeExample) -> Answer:
        return log.ask([judge.identity, shown.content()], lambda: judge.ask(shown))

    shown = example.unjudged()
    first = answer(shown)
    return (first,) if orders == 1 else (first, answer(shown.flipped()).flipped())


def _recorded(example: JudgeExample, orders: int) -> tuple[Answer, ...]:
    """Return what the teacher said in each order; nothing where it was not asked."""
    if example.label is None and "inconclusive" not in example.metadata:
        return ()
    first = Answer(example.label, feedback=example.reasoning or "")
    if orders == 1:
        return (first,)
    return (first, Answer(example.flipped_verdict, feedback=example.flipped_reasoning or ""))


def _judged(
    examples: Sequence[JudgeExample], answers: Sequence[tuple[Answer, ...]]
) -> list[Judged]:
    return [
        Judged(example, given, _teacher(example), example.human)
        for example, given in zip(examples, answers, strict=True)
    ]


def _teacher(example: JudgeExample) -> float | None:
    """Return the teacher's label, None where its verdict on a pair depends on the order."""
    if example.task == "pairwise" and example.flipped_verdict is not None:
        return example.consistent_label
    return example.label


# --- Scores ----------------------------------------------------------------------------------


def _evaluation(
    name: str,
    items: Sequence[Judged],
    references: Sequence[str],
    seconds: float,
    digest: str,
    price: Price | None,
) -> AnswerEvaluation:
    keyed = {str(number): item for number, item in enumerate(items, 1)}
    asked = {key: item for key, item in keyed.items() if item.answers}
    scores: dict[str, dict[str, float]] = {}
    for reference in references:
        scores[f"agreement_{reference}"] = _each(asked, partial(_agreement, reference))
        if items[0].example.task == "correctness":
            scores[f"closeness_{reference}"] = _each(asked, partial(_closeness, reference))
        else:
            scores[f"joint_agreement_{reference}"] = _each(asked, partial(_joint, reference))
    scores["conclusive"] = _each(asked, _conclusive)
    scores["consistent"] = _each(asked, _consistent)
    scores["latency"] = _each(asked, _latency)
    if price is not None:
        scores["cost"] = _each(asked, partial(_cost, price))
    failures = {
        key: next(a.error for a in item.answers if a.error)
        for key, item in keyed.items()
        if any(answer.error for answer in item.answers)
    }
    return AnswerEvaluation(
        name=name,
        dataset_hash=digest,
        scores={metric: values for metric, values in scores.items() if values},
        seconds=seconds,
        answers={key: _said(item) for key, item in keyed.items()},
        failures={key: error for key, error in failures.items() if error},
    )


def _each(items: Mapping[str, Judged], value: Callable[[Judged], float | None]) -> dict[str, float]:
    values = {key: value(item) for key, item in items.items()}
    return {key: number for key, number in values.items() if number is not None}


def _agreement(reference: str, item: Judged) -> float | None:
    right = item.right(reference)
    if right is None:
        return None
    given = [answer.verdict for answer in item.answers]
    if item.example.task == "correctness":
        agree = [v is not None and (v >= PASSES) == (right >= PASSES) for v in given]
    else:
        agree = [v == right for v in given]
    return sum(agree) / len(agree)


def _joint(reference: str, item: Judged) -> float | None:
    right = item.right(reference)
    if right is None or len(item.answers) < 2:
        return None
    return float(item.consensus == right)


def _closeness(reference: str, item: Judged) -> float | None:
    right, (answer,) = item.right(reference), item.answers
    if right is None:
        return None
    return 0.0 if answer.verdict is None else 1 - abs(answer.verdict - right) / 4


def _conclusive(item: Judged) -> float:
    return sum(a.verdict is not None for a in item.answers) / len(item.answers)


def _consistent(item: Judged) -> float | None:
    if len(item.answers) < 2 or any(answer.verdict is None for answer in item.answers):
        return None
    return float(item.answers[0].verdict == item.answers[1].verdict)


def _latency(item: Judged) -> float | None:
    came = [a.seconds for a in item.answers if a.error is None and a.seconds]
    return math.fsum(came) / len(came) if came else None


def _cost(price: Price, item: Judged) -> float | None:
    if not isinstance(price, tuple):
        return None if any(a.error for a in item.answers) else float(price)
    told = [a.tokens for a in item.answers if a.tokens is not None]
    if len(told) < len(item.answers):
        return None
    total = sum(into * price[0] + out * price[1] for into, out in told) / 1e6
    return total / len(told)


# --- What is shown and checked ---------------------------------------------------------------


def _shown(example: JudgeExample) -> str:
    if example.second_answer is None:
        return f"{example.query}\n\nAnswer: {example.answer}".strip()
    return f"{example.query}\n\nFirst: {example.answer}\n\nSecond: {example.second_answer}"


def _reference_texts(examples: Sequence[JudgeExample], reference: str) -> dict[str, str]:
    texts = {}
    for number, example in enumerate(examples, 1):
        label = _teacher(example) if reference == "teacher" else example.human
        words = example.reasoning if reference == "teacher" else example.user_feedback
        texts[str(number)] = _worded(example.task, label, words)
    return texts


def _said(item: Judged) -> str:
    if not item.answers:
        return "[not judged]"
    parts = [_worded(item.example.task, a.verdict, a.feedback) for a in item.answers]
    if len(parts) == 1:
        return parts[0]
    return f"As shown: {parts[0]}\nIn the other order: {parts[1]}"


def _worded(task: str, label: float | None, words: str | None) -> str:
    names = {1.0: "first", 0.0: "second", 0.5: "tie"}
    if label is None:
        verdict = "no verdict"
    elif task == "pairwise":
        verdict = names[label]
    else:
        verdict = f"{label:g}" if task == "correctness" else ("passes" if label else "fails")
    return f"[{verdict}] {words or ''}".strip()


def _remarks(examples: Sequence[JudgeExample], references: Sequence[str]) -> list[str]:
    torn = sum(
        example.verdict is not None
        and example.flipped_verdict is not None
        and example.verdict != example.flipped_verdict
        for example in examples
    )
    remarks = []
    if torn and "teacher" in references:
        remarks.append(
            f"The teacher contradicts itself on {torn} of {len(examples)} pairs when the order "
            "changes; agreement with it is measured on the others."
        )
    for name in references:
        said = [e.label if name == "teacher" else e.human for e in examples]
        if silent := said.count(None):
            who = "The teacher" if name == "teacher" else "People"
            remarks.append(f"{who} gave no verdict on {silent} of {len(examples)} examples.")
    repeats = len(examples) - len({example.judged_content() for example in examples})
    if repeats:
        remarks.append(f"{repeats} of {len(examples)} examples repeat the answers of another.")
    return remarks


def _check(dataset: JudgeDataset, num_workers: int, seed: int) -> list[str]:
    """Return whom judges can be compared with: `teacher`, `human` or both."""
    if num_workers < 1:
        raise ArgumentError("num_workers", f"must be at least 1, not {num_workers}")
    if seed < 0:
        raise ArgumentError("seed", f"must be 0 or more, not {seed}")
    tasks = sorted({example.task for example in dataset})
    if len(tasks) > 1:
        raise ArgumentError(
            "dataset",
            f"holds {', '.join(tasks)}; evaluate one, as of dataset.of_task({tasks[0]!r})",
        )
    found = {
        "teacher": any(_teacher(example) is not None for example in dataset),
        "human": any(example.human is not None for example in dataset),
    }
    references = [name for name, there in found.items() if there]
    if not references:
        raise ArgumentError("dataset", "has no verdict by a teacher or a person to compare with")
    return references


def _check_judges(
    judges: Mapping[str, Any], prices: Mapping[str, Price], baseline: str | None
) -> None:
    if not judges:
        raise ArgumentError("judges", "is empty; name at least one")
    for name in judges:
        if not isinstance(name, str):
            raise ArgumentError("judges", f"go by names, which are texts; {name!r} is none")
    if TEACHER in judges:
        raise ArgumentError("judges", f"{TEACHER!r} is the name of the recorded verdicts")
    if baseline == TEACHER:
        raise ArgumentError(
            "baseline",
            f"{TEACHER!r} is whom the judges should agree with; name one of {list(judges)}",
        )
    if baseline is not None and baseline not in list(judges):
        raise ArgumentError("baseline", f"{baseline!r} is not evaluated; there is {list(judges)}")
    for name, price in prices.items():
        if name not in judges:
            raise ArgumentError("prices", f"{name!r} is not evaluated; there is {list(judges)}")
        numbers = price if isinstance(price, tuple) and len(price) == 2 else (price,)
        for number in numbers:
            if not isinstance(number, int | float) or not 0 <= number < math.inf:
                raise ArgumentError(
                    "prices",
                    f"{name!r} needs (price in, price out) of a million tokens, or the price of "
                    f"a verdict, not {price!r}",
                )
