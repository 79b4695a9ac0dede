"""A model of 135M parameters on GeoQuery: does its SQL return what the right SQL returns?

    uv run python tools/bench/text2sql.py --data ../shared/data --model FOLDER_OR_HUB_NAME

DIR/text2sql holds GeoQuery as jkkummerfeld/text2sql-data publishes it, `geography.json`, and its
SQLite database, `geography.sqlite`. The question split is taken: 549 questions train, the 49 of
the dev part are for choices (`--part dev`), the 279 of the test part for the result. Compared
are, on the same prompt: the base model, the model tuned by `Text2SQLFinetuneEngine` (both
greedy), and the tuned one with `--samples` candidates that are run and voted on by their
results, with a repair turn.

Training is a process of its own, which goes on after a kill where `--output` names its folder;
`--student` scores a folder that was trained before, on this machine or another. The test of
each writer is paired with "tuned" by question.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import rich

from ft_core.datasets import Text2SQLDataset
from ft_core.report import Text2SQLReport
from ft_core.sft import LocalLLM
from ft_text2sql import Text2SQLFinetuneEngine, Text2SQLRetriever, read_text2sql_data
from ft_text2sql.database import ReadOnlyDatabase
from ft_text2sql.evaluation import evaluate_text2sql
from ft_text2sql.guarded import GuardedSQLDatabase
from ft_text2sql.prompt import SQLPrompt

WRITERS = ("base", "tuned", "voting")


def main() -> None:
    options = parsed()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as scratch:
        student, seconds = options.student, None
        if student is None and set(options.writers) != {"base"}:
            student = options.output or Path(scratch) / "student"
            seconds = trained(options, student)
        report = scored(options, student)
    if options.report:
        report.save_json(options.report)
    result = summary(options, report, seconds)
    print(json.dumps(result, indent=2)) if options.json else show(result, report)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with text2sql/")
    parser.add_argument("--model", required=True, help="hub name or folder of the base model")
    parser.add_argument("--part", choices=("test", "dev"), default="test", help="what is scored")
    parser.add_argument("--limit", type=int, help="score so many questions, drawn at random")
    parser.add_argument("--writers", nargs="+", choices=WRITERS, default=list(WRITERS))
    parser.add_argument("--student", type=Path, help="folder trained before")
    parser.add_argument("--output", type=Path, help="folder of the student; temporary by default")
    parser.add_argument("--epochs", type=int, help="passes; the engine's default")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON of SFTSettings")
    parser.add_argument("--schema-style", default="typed", help="typed, lines or create")
    parser.add_argument(
        "--variant",
        choices=("first", "shortest"),
        default="first",
        help="which of several queries to train on; the first is what is scored",
    )
    parser.add_argument("--as-written", action="store_true", help="train on the SQL as published")
    parser.add_argument("--validate", action="store_true", help="dev chooses the checkpoint")
    parser.add_argument("--samples", type=int, default=8, help="candidates that vote")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the candidates")
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--device", help="cpu or cuda; the best by default")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--journal", type=Path, help="keeps answers; a new one for new settings")
    parser.add_argument("--report", type=Path, help="JSON file for every answer")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args()


def data_of(options: argparse.Namespace) -> Path:
    path: Path = options.data / "text2sql" / "geography.json"
    return path


def database_of(options: argparse.Namespace) -> str:
    return f"sqlite:///{(options.data / 'text2sql' / 'geography.sqlite').resolve()}"


# --- Training --------------------------------------------------------------------------------


def trained(options: argparse.Namespace, output: Path) -> float:
    """Train in a process of its own; return the seconds that `finetune()` took."""
    settings = dict(options.settings, seed=options.seed)
    if options.epochs is not None:
        settings["epochs"] = options.epochs
    if options.device is not None:
        settings["device"] = options.device
    parts = read_text2sql_data(
        data_of(options), variant=options.variant, plain=not options.as_written
    )
    with tempfile.TemporaryDirectory() as scratch:
        train, dev = Path(scratch) / "train.jsonl", Path(scratch) / "dev.jsonl"
        parts["train"].save(train)
        parts["dev"].save(dev)
        arguments = {
            "train": str(train),
            "base_model": options.model,
            "output_dir": str(output),
            "val_data": str(dev) if options.validate else None,
            "database": database_of(options),
            "schema_style": options.schema_style,
            **settings,
        }
        command = [sys.executable, __file__, "--worker", json.dumps(arguments)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split("seconds:")[1])


def work(arguments: str) -> None:
    """Train once, and print the seconds."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    engine = Text2SQLFinetuneEngine(**json.loads(arguments))
    start = time.perf_counter()
    engine.finetune()
    print(f"seconds: {time.perf_counter() - start}")


# --- Scoring ---------------------------------------------------------------------------------


def scored(options: argparse.Namespace, student: Path | None) -> Text2SQLReport:
    # What is right does not depend on how the training data is written.
    test = read_text2sql_data(data_of(options))[options.part]
    if options.limit is not None and options.limit < len(test):
        chosen = sorted(random.Random(options.seed).sample(range(len(test)), options.limit))
        test = Text2SQLDataset(examples=[test.examples[place] for place in chosen])
    url = database_of(options)
    return evaluate_text2sql(
        writers(options, student, url),
        test,
        url,
        baseline="tuned" if "tuned" in options.writers else None,
        journal=options.journal,
        num_workers=1,  # so that the latencies count
        seed=options.seed,
    )


def writers(options: argparse.Namespace, student: Path | None, url: str) -> dict[str, Any]:
    given = {"device": options.device, "max_new_tokens": options.max_tokens}
    greedy: dict[str, Any] = {"n": 1, "repair": False}
    found: dict[str, Any] = {}
    engine = tuned = None
    if student is not None:
        engine = Text2SQLFinetuneEngine.load(student)
        tuned = engine.get_finetuned_model(**given)
    if "base" in options.writers:
        base = LocalLLM.from_pretrained(options.model, **given)
        prompt = SQLPrompt(options.schema_style) if engine is None else engine.prompt
        guarded: GuardedSQLDatabase = ReadOnlyDatabase(url).as_sql_database()
        found["base"] = Text2SQLRetriever(guarded, base, prompt=prompt, **greedy)
    if engine is not None and "tuned" in options.writers:
        found["tuned"] = engine.get_query_engine(url, llm=tuned, **greedy)
    if engine is not None and "voting" in options.writers:
        found["voting"] = engine.get_query_engine(
            url,
            llm=tuned,
            n=options.samples,
            temperature=options.temperature,
            seed=options.seed,
        )
    return found


# --- What is printed -------------------------------------------------------------------------


def summary(
    options: argparse.Namespace, report: Text2SQLReport, seconds: float | None
) -> dict[str, Any]:
    document = report.to_dict()
    for run in document["runs"]:
        del run["answers"]  # in --report
    return {
        "part": options.part,
        "samples": options.samples,
        "temperature": options.temperature,
        "training_seconds": seconds,
        "ms_per_question": {
            run.name: 1_000 * run.mean("latency") for run in report.runs if "latency" in run.scores
        },
        **document,
    }


def show(result: dict[str, Any], report: Text2SQLReport) -> None:
    if result["training_seconds"] is not None:
        print(f"trained in {result['training_seconds']:.0f} s")
    rich.print(report)
    for name, milliseconds in result["ms_per_question"].items():
        print(f"{name:<10}{milliseconds:>10.0f} ms a question")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2])
    else:
        main()
