"""Small judges on GPT-4's verdicts: how often do they agree with GPT-4, and with people?

    uv run python tools/bench/judge.py --data ../shared/data --model FOLDER_OR_HUB_NAME \\
        --output judges [--students llm llm-base length]

DIR/judge holds LLMBar's pairs with GPT-4's verdict in both orders and people's,
`llmbar_gpt4.jsonl`, and three sets of pairs with people's verdicts and one of GPT-4's each:
`faireval_human.json`, `llmeval2_human.json` and `mt-bench_human.json`. The pairs of the first that
GPT-4 judges alike in both orders are split by instruction, 60 to 40: one part is learned from by
`PairwiseJudgeFinetuneEngine`, the other ("llmbar") and the three sets are judged, each pair in both
orders. Compared are:

- llm-base, llm: the language model of `--model` as it is, and tuned;
- encoder-base, encoder: the encoder of `--encoder` with a head that nobody trained, and tuned;
- cosine: of the question and each answer, by that encoder: what it can do untrained;
- majority, longer, length: the place that wins more often, the longer answer, and the rule by
  length that fits the training part best;
- gpt-4: its verdicts in the files, beside people's. On the three sets there is one for each pair,
  so that nothing is known of its flips there, and of six pairs none.

Every verdict is written down in `--output` as it comes and training goes on from its checkpoint, so
the same command goes on where a run was killed; change a setting and what depends on it is done
anew. p-values are those of paired randomisation tests over pairs, not adjusted for their number.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from model_assets import minilm

from ft_core.datasets import JudgeDataset, JudgeExample
from ft_core.evaluation import AnswerEvaluation, compare
from ft_core.files import content_hash
from ft_core.metrics import bootstrap_interval
from ft_judge import (
    Judgement,
    PairwiseJudgeFinetuneEngine,
    by_length,
    evaluate_judges,
    load_judge,
    longer_answer,
    majority,
    read_llmbar,
    untrained_judge,
)
from ft_judge.evaluation import TEACHER

STUDENTS = (
    *("majority", "longer", "length"),
    *("cosine", "encoder-base", "encoder"),
    *("llm-base", "llm"),
)
TUNED = {"encoder": ("encoder-base", "cosine"), "llm": ("llm-base",)}
"""What is trained, to what else the same model can do."""
LENGTH = ("length", "longer")
HUMAN_SETS = {name: f"{name}_human.json" for name in ("faireval", "llmeval2", "mt-bench")}
SETS = ("llmbar", *HUMAN_SETS)
REFERENCES = {"gpt4": "teacher", "human": "human"}
METRICS = {
    "gpt4": "agreement_teacher",
    "gpt4, both orders": "joint_agreement_teacher",
    "human": "agreement_human",
    "human, both orders": "joint_agreement_human",
}
"""A verdict in each order counts half, and the verdict that a judge has of both together."""
BEAT = 60.0
"""Seconds between lines of progress."""

Judge = Any
Row = dict[str, Any]


def main() -> None:
    options = parsed()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with tempfile.TemporaryDirectory() as scratch:
        output = options.output or Path(scratch)
        output.mkdir(parents=True, exist_ok=True)
        result = measured(options, output)
    print(json.dumps(result, indent=2)) if options.json else show(result)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with judge/")
    parser.add_argument("--model", help="hub name or folder of the language model")
    parser.add_argument("--encoder", help="hub name or folder; all-MiniLM-L6-v2 by default")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--limit", type=int, help="judge so many pairs a set, drawn at random")
    parser.add_argument("--train-limit", type=int, help="learn from so many pairs")
    parser.add_argument("--llm-settings", type=json.loads, default={}, help="JSON of SFTSettings")
    parser.add_argument(
        "--encoder-settings", type=json.loads, default={}, help="JSON of EncoderSettings"
    )
    parser.add_argument("--output", type=Path, help="keeps judges and verdicts; goes on from them")
    parser.add_argument("--device", help="cpu or cuda; the best by default")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of training")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    if options.model is None and {"llm", "llm-base"} & set(options.students):
        parser.error("--model is needed for llm and llm-base; or name other --students")
    options.encoder = options.encoder or minilm()
    return options


def measured(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    folder: Path = options.data / "judge"
    pairs = read_llmbar(folder / "llmbar_gpt4.jsonl")
    parts = pairs.consistent().split({"train": 0.6, "test": 0.4}, seed=options.seed)
    train = limited(parts["train"], options.train_limit, options.seed)
    tests = {
        name: limited(
            read_llmbar(folder / HUMAN_SETS[name]) if name in HUMAN_SETS else parts["test"],
            options.limit,
            options.seed,
        )
        for name in options.sets
    }
    seconds = {
        name: trained(options, name, train, output / name)
        for name in TUNED
        if name in options.students
    }
    return {
        "pairs": len(pairs),
        "gpt4_contradicts_itself": sum(e.verdict != e.flipped_verdict for e in pairs),
        "train": len(train),
        "training_seconds": seconds,
        "sets": {
            name: compared(options, train, name, test, output) for name, test in tests.items()
        },
    }


def limited(dataset: JudgeDataset, limit: int | None, seed: int) -> JudgeDataset:
    if limit is None or limit >= len(dataset):
        return dataset
    chosen = sorted(random.Random(seed).sample(range(len(dataset)), limit))
    return JudgeDataset(examples=[dataset.examples[place] for place in chosen])


# --- Training --------------------------------------------------------------------------------


def trained(options: argparse.Namespace, name: str, train: JudgeDataset, output: Path) -> float:
    """Train in a process of its own; return the seconds that `finetune()` took.

    Of a judge that was trained before, those of the run that ended its training.
    """
    settings = {"seed": options.seed, **settings_of(options, name)}
    if options.device is not None:
        settings["device"] = options.device
    verdicts = output.with_suffix(".train.jsonl")
    train.save(verdicts)
    arguments = {
        "verdicts": str(verdicts),
        "student": options.encoder if name == "encoder" else options.model,
        "output_dir": str(output),
        "kind": "encoder" if name == "encoder" else "local",
        **settings,
    }
    say(f"training {name} on {len(train)} pairs")
    command = [sys.executable, __file__, "--worker", json.dumps(arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return first_time(output, float(done.stdout.split("seconds:")[1]))


def first_time(output: Path, seconds: float) -> float:
    """Return the seconds noted for what is saved there; if there are none, note these."""
    note, key = output.with_suffix(".seconds.json"), content_hash(saved(output))
    noted: dict[str, float] = json.loads(note.read_text()) if note.exists() else {}
    if key not in noted:
        note.write_text(json.dumps({key: seconds}))
    return noted.get(key, seconds)


def settings_of(options: argparse.Namespace, name: str) -> dict[str, Any]:
    found: dict[str, Any] = options.encoder_settings if name == "encoder" else options.llm_settings
    return found


def work(arguments: str) -> None:
    """Train once, and print the seconds; a judge that is trained already is left as it is."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    engine = PairwiseJudgeFinetuneEngine(**json.loads(arguments))
    start = time.perf_counter()
    engine.finetune()
    print(f"seconds: {time.perf_counter() - start}")


# --- Judging ---------------------------------------------------------------------------------


def compared(
    options: argparse.Namespace, train: JudgeDataset, name: str, test: JudgeDataset, output: Path
) -> dict[str, Any]:
    """Have all students judge one set; return their rows and the tests between them."""
    subsets = [example.metadata.get("subset", "") for example in test]
    runs: dict[str, AnswerEvaluation] = {}
    rows: dict[str, Row] = {}
    for student in options.students:
        make, identity = judges(options, train, output)[student]
        key = content_hash([identity, test.content_hash])[:12]
        journal = output / "verdicts" / f"{student}-{name}-{key}.jsonl"
        say(f"{name}: {student} judges {len(test)} pairs")
        with progress_of(journal, f"{name}: {student}", 2 * len(test)):
            report = evaluate_judges(
                test,
                {student: make()},
                journal=journal,
                num_workers=1,  # so that the latencies count
                include_teacher=TEACHER not in runs,
                show_progress=False,
                seed=options.seed,
            )
        for run in report.runs:
            runs[run.name] = run
            rows[run.name] = row(run, report.statistics[run.name], subsets)
        if failures := runs[student].failures:
            first = next(iter(failures.values()))
            say(f"{name}: {student} failed on {len(failures)} pairs: {first}")
    told = all(example.flipped_verdict is not None for example in test)
    if TEACHER in rows:
        rows["gpt-4"] = rows.pop(TEACHER) | {"orders": 2 if told else 1}
    return {
        "pairs": len(test),
        "students": rows,
        "tests": list(tests(runs, options.seed)),
    }


def judges(
    options: argparse.Namespace, train: JudgeDataset, output: Path
) -> dict[str, tuple[Callable[[], Judge], Any]]:
    """Return student to (what makes the judge, all that its verdicts depend on)."""
    device = options.device
    given = {} if device is None else {"device": device}
    untrained = [options.encoder, options.seed]
    return {
        "majority": (lambda: majority(train), train.content_hash),
        "longer": (lambda: longer_answer, ""),
        "length": (lambda: by_length(train), train.content_hash),
        "cosine": (lambda: cosine(options.encoder, device), options.encoder),
        "encoder-base": (lambda: fresh_head(*untrained, device), untrained),
        "encoder": (lambda: load_judge(output / "encoder", **given), saved(output / "encoder")),
        "llm-base": (lambda: untrained_judge("pairwise", options.model, **given), options.model),
        "llm": (lambda: load_judge(output / "llm", **given), saved(output / "llm")),
    }


def saved(folder: Path) -> str:
    """Return what tells a trained judge from another in the same folder."""
    manifest = folder / "ft.json"
    return manifest.read_text() if manifest.exists() else ""


def cosine(model: str, device: str | None) -> Callable[[JudgeExample], Judgement]:
    """Return a judge that prefers the answer whose embedding is nearer to the question's."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(model, device=device)
    encoder.encode(["warm"], show_progress_bar=False)  # the first call takes longer

    def judge(example: JudgeExample) -> Judgement:
        texts = [example.query, example.answer, example.second_answer]
        question, *answers = encoder.encode(
            texts, normalize_embeddings=True, show_progress_bar=False
        )
        first, second = (float(question @ answer) for answer in answers)
        return Judgement(float(first > second) if first != second else 0.5)

    return judge


def fresh_head(model: str, seed: int, device: str | None) -> Callable[[JudgeExample], Judgement]:
    """Return a judge by an encoder's scores; where it has no head, by one of random weights."""
    import torch
    from sentence_transformers import CrossEncoder
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # it would tell that the head is new
    torch.manual_seed(seed)
    encoder = CrossEncoder(model, num_labels=1, device=device)
    encoder.predict([("warm", "up")], show_progress_bar=False)  # the first call takes longer

    def judge(example: JudgeExample) -> Judgement:
        first, second = encoder.predict(
            [(example.query, example.answer), (example.query, example.second_answer)],
            activation_fn=torch.nn.Identity(),
            show_progress_bar=False,
        ).tolist()
        verdict = float(first > second) if first != second else 0.5
        return Judgement(verdict, 1 / (1 + math.exp(second - first)))

    return judge


@contextmanager
def progress_of(journal: Path, label: str, total: int) -> Iterator[None]:
    """Say every minute how many verdicts there are."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(BEAT):
            done = len(journal.read_bytes().splitlines()) if journal.exists() else 0
            say(f"{label}: {done} of {total} verdicts")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# --- Numbers ---------------------------------------------------------------------------------


def row(run: AnswerEvaluation, statistics: dict[str, Any], subsets: list[str]) -> Row:
    found: Row = {
        name: share(list(run.scores[metric].values()))
        for name, metric in METRICS.items()
        if metric in run.scores
    }
    for name, statistic in (
        ("flips", "flips"),
        ("inconclusive", "inconclusive"),
        ("prefers_longer", "prefers_longer"),
        ("ms_per_verdict", "ms_per_verdict"),
        *((f"ece_{name}", f"calibration_error_{label}") for name, label in REFERENCES.items()),
    ):
        found[name] = statistics[statistic].value if statistic in statistics else None
    if any(subsets):
        found["subsets"] = by_subset(run, subsets)
    return found


def share(values: list[float]) -> Row:
    low, high = bootstrap_interval(values)
    return {"mean": math.fsum(values) / len(values), "low": low, "high": high, "n": len(values)}


def by_subset(run: AnswerEvaluation, subsets: list[str]) -> dict[str, Row]:
    """Return subset, and family of subsets, to agreement."""
    families = {"LLMBar/Natural": "Natural", "LLMBar/Adversarial": "Adversarial"}
    groups: dict[str, list[str]] = {}
    for key, subset in enumerate(subsets, start=1):
        name = subset.removeprefix("LLMBar/")
        family = next(
            (f for start, f in families.items() if subset.startswith(start)), "Case study"
        )
        groups.setdefault(family, []).append(str(key))
        if name != family:
            groups.setdefault(name, []).append(str(key))
    return {
        group: {
            name: share([scores[key] for key in keys if key in scores])
            for name, reference in REFERENCES.items()
            if (scores := run.scores.get(f"agreement_{reference}"))
            and any(key in scores for key in keys)
        }
        for group, keys in sorted(groups.items())
    }


def tests(runs: dict[str, AnswerEvaluation], seed: int) -> Iterator[Row]:
    """Yield the paired test of each tuned student against its base and the rules by length."""
    for student, bases in TUNED.items():
        for against in (*bases, *LENGTH):
            if student not in runs or against not in runs:
                continue
            for name, metric in METRICS.items():
                if metric not in runs[student].scores:
                    continue
                test = compare(runs[against], runs[student], metric, seed=seed)
                yield {
                    "student": student,
                    "against": against,
                    "with": name,
                    "difference": test.difference,
                    "low": test.low,
                    "high": test.high,
                    "p": test.p_value,
                    "n": test.n,
                }


# --- What is printed -------------------------------------------------------------------------


def say(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)


def show(result: dict[str, Any]) -> None:
    print(
        f"GPT-4 contradicts itself on {result['gpt4_contradicts_itself']} of {result['pairs']} "
        f"pairs of LLMBar, which are left out; {result['train']} others are learned from."
    )
    for name, seconds in result["training_seconds"].items():
        print(f"{name}: trained in {seconds:.0f} s")
    for name, found in result["sets"].items():
        print(f"\n{name}: {found['pairs']} pairs, each in both orders")
        show_students(found["students"])
        for test in found["tests"]:
            print(
                f"  {test['student']} against {test['against']}, agreement with {test['with']}: "
                f"{test['difference']:+.3f} ({test['low']:+.3f} to {test['high']:+.3f}), "
                f"p = {test['p']:.4f}"
            )
        show_subsets(found["students"])


def show_students(rows: dict[str, Row]) -> None:
    columns = ("flips", "inconclusive", "prefers_longer", "ece_gpt4", "ms_per_verdict")
    heads = "".join(f"{head:>16}" for head in columns)
    print(f"{'':14}{''.join(f'{name:>24}' for name in METRICS)}{heads}")
    for name, found in rows.items():
        agreement = "".join(f"{shown(found.get(name)):>24}" for name in METRICS)
        once = found.get("orders") == 1
        figures = "".join(
            f"{figure(None if once and column == 'flips' else found[column], column):>16}"
            for column in columns
        )
        print(f"{name:14}{agreement}{figures}")


def show_subsets(rows: dict[str, Row]) -> None:
    groups = Counter(group for found in rows.values() for group in found.get("subsets", {}))
    for name, _ in REFERENCES.items() if groups else ():
        print(f"  agreement with {name} by subset")
        for group in sorted(groups):
            cells = {
                student: found["subsets"][group][name]
                for student, found in rows.items()
                if name in found["subsets"].get(group, {})
            }
            size = max(cell["n"] for cell in cells.values())
            means = ", ".join(f"{student} {cell['mean']:.3f}" for student, cell in cells.items())
            print(f"    {group} ({size}): {means}")


def shown(cell: Row | None) -> str:
    return "-" if cell is None else f"{cell['mean']:.3f} ({cell['low']:.3f} to {cell['high']:.3f})"


def figure(value: float | None, column: str) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if column == "ms_per_verdict" else f"{value:.3f}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2])
    else:
        main()
