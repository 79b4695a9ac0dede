"""A student of 135M parameters on real GPT-4 answers: does it come nearer to its teacher?

    uv run python tools/bench/distill.py --data ../shared/data --model FOLDER_OR_HUB_NAME

DIR/distill holds `gpt4_rag_events.jsonl`: 61 calls of a LlamaIndex query engine on GPT-4. They
are split by question; the student is trained on one part by `LocalFinetuneEngine` with its
defaults, and both base and student are scored on the other: the mean negative log-likelihood
of GPT-4's tokens (teacher-forced), and ROUGE-L of greedy answers against GPT-4's. Calls about
one question are averaged first, so that the paired test counts questions.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core.llms import ChatMessage

from ft_core.datasets.chat import ChatDataset
from ft_core.metrics import bootstrap_interval, paired_randomisation_test, rouge_l
from ft_core.sft import LocalFinetuneEngine, LocalLLM
from ft_core.sft.evaluation import answer_losses
from ft_core.sft.models import load_model

MAX_ANSWER = 200
"""Tokens of a written answer; GPT-4's have about 80."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with distill/")
    parser.add_argument("--file", default="gpt4_rag_events.jsonl")
    parser.add_argument("--model", required=True, help="hub name or folder of SmolLM2-135M")
    parser.add_argument("--test-share", type=float, default=0.4)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--no-answers", action="store_true", help="losses only, no ROUGE-L")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON of SFTSettings")
    parser.add_argument("--output", type=Path, help="folder of the student; temporary by default")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    data = ChatDataset.load(options.data / "distill" / options.file)
    shares = {"train": 1 - options.test_share, "test": options.test_share}
    parts = data.split(shares, seed=options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        output = options.output or Path(scratch) / "student"
        engine = LocalFinetuneEngine(
            options.model, parts["train"], output_dir=output, seed=options.seed, **options.settings
        )
        started = time.perf_counter()
        engine.finetune()
        seconds = time.perf_counter() - started
        scores = {
            name: scored(model, parts["test"], not options.no_answers)
            for name, model in (("base", options.model), ("student", str(output)))
        }
    result = {
        "train": len(parts["train"]),
        "test": len(parts["test"]),
        "questions": len(next(iter(scores["base"].values()))),
        "seconds": seconds,
        "metrics": {name: compared(scores, name) for name in scores["base"]},
    }
    print(json.dumps(result, indent=2)) if options.json else print_table(result)


def scored(model: str, test: ChatDataset, with_answers: bool) -> dict[str, list[float]]:
    """Return metric name to a value for each question."""
    loaded, tokenizer = load_model(model)
    found = {"loss": list(answer_losses(loaded, tokenizer, test))}
    if with_answers:
        llm = LocalLLM(loaded, tokenizer, max_new_tokens=MAX_ANSWER)
        found["ROUGE-L"] = [rouge_l(answer(llm, example), example.answer()) for example in test]
    return {name: by_question(values, test) for name, values in found.items()}


def answer(llm: LocalLLM, example: Any) -> str:
    prompt = [ChatMessage(role=m["role"], content=m["content"]) for m in example.messages[:-1]]
    text = llm.chat(prompt).message.content or ""
    logging.info("%s ... %s", example.asked()[:60], text[:100].replace("\n", " "))
    return text


def by_question(values: list[float], test: ChatDataset) -> list[float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for value, example in zip(values, test, strict=True):
        groups[example.asked()].append(value)
    return [float(np.mean(group)) for group in groups.values()]


def compared(scores: dict[str, dict[str, list[float]]], metric: str) -> dict[str, Any]:
    base, student = scores["base"][metric], scores["student"][metric]
    test = paired_randomisation_test(base, student)
    row: dict[str, Any] = {
        name: {"mean": float(np.mean(values)), "interval": interval(values)}
        for name, values in (("base", base), ("student", student))
    }
    return row | {
        "difference": float(np.mean(student) - np.mean(base)),
        "difference_interval": interval(np.subtract(student, base)),
        "p": test.p_value,
    }


def interval(values: Any) -> list[float]:
    found = bootstrap_interval(values)
    return [found.low, found.high]


def print_table(result: dict[str, Any]) -> None:
    print(
        f"{result['train']} examples trained in {result['seconds']:.0f} s; "
        f"{result['test']} held out, {result['questions']} questions"
    )
    print(f"{'metric':<10}{'base':>10}{'student':>10}{'difference':>26}{'p':>9}")
    for name, row in result["metrics"].items():
        low, high = row["difference_interval"]
        difference = f"{row['difference']:+.4f} ({low:+.4f} to {high:+.4f})"
        base, student = row["base"]["mean"], row["student"]["mean"]
        print(f"{name:<10}{base:>10.4f}{student:>10.4f}{difference:>26}{row['p']:>9.4f}")


if __name__ == "__main__":
    main()
