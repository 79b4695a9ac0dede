"""Structured output: how many answers of a small model fit a JSON schema, base and student.

    uv run python tools/bench/distill_extraction.py [--model FOLDER_OR_NAME] [--device cuda]
        [--student FOLDER] [--output FILE] [--dry-run]

`extraction/examples.jsonl` holds notes from a repair shop, written for this benchmark, and the
order that each contains, in the schema of `extraction/schema.py`. The student trains on the
prompts that LlamaIndex's `LLMTextCompletionProgram` sends, schema and all, with the orders as
the answers (LoRA, `LocalFinetuneEngine`). Base and student then answer notes that were not
trained on, greedily, through that program. Reported are the share of answers that the program
made an object of, the share of right fields (none where there is no object), and the share of
orders that are right throughout; each with its 95 % interval and a paired test, which for
shares is McNemar's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from llama_index.core.llms import LLM, MockLLM
from llama_index.core.program import LLMTextCompletionProgram
from scipy.stats import binomtest

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.extraction.schema import RepairOrder

from ft_core import files
from ft_core.datasets.chat import ChatDataset, ChatExample
from ft_core.metrics import bootstrap_interval, paired_randomisation_test
from ft_core.sft import LocalFinetuneEngine, LocalLLM

EXAMPLES = Path(__file__).parent / "extraction" / "examples.jsonl"
TEMPLATE = "Extract the repair order from this note.\n\n{text}"
MAX_NEW_TOKENS = 320
SHARES = ("valid", "exact")
"""The metrics that are 0 or 1 for each note."""
METRICS = ("valid", "fields", "exact")


class Outcome(NamedTuple):
    """What came of one note."""

    order: RepairOrder | None
    error: str | None
    scores: dict[str, float]
    """By the names of `METRICS`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--examples", type=Path, default=EXAMPLES)
    parser.add_argument("--test-share", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=42, help="of the split and the training")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", help="cpu, cuda, mps; the best there is by default")
    parser.add_argument("--student", type=Path, help="folder to keep the student in")
    parser.add_argument("--output", type=Path, help="file for the figures and answers, JSON")
    parser.add_argument("--dry-run", action="store_true", help="only count examples and tokens")
    options = parser.parse_args()
    fractions = {"train": 1 - options.test_share, "test": options.test_share}
    parts = chat_dataset(options.examples).split(fractions, seed=options.seed)
    if options.dry_run:
        print_lengths(parts, options.model)
        return

    base = LocalLLM.from_pretrained(
        options.model, device=options.device, max_new_tokens=MAX_NEW_TOKENS
    )
    runs = {"base": evaluate("base", base, parts["test"])}
    del base
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        engine = LocalFinetuneEngine(
            options.model,
            parts["train"],
            output_dir=options.student or Path(folder) / "student",
            device=options.device,
            epochs=options.epochs,
            learning_rate=options.learning_rate,
            batch_size=options.batch_size,
            seed=options.seed,
        )
        engine.finetune()
        seconds = time.perf_counter() - start
        student = engine.get_finetuned_model(max_new_tokens=MAX_NEW_TOKENS)
        runs["student"] = evaluate("student", student, parts["test"])
    figures = {name: summary(outcomes) for name, outcomes in runs.items()}
    tests = {metric: compare(runs["base"], runs["student"], metric) for metric in METRICS}
    print_table(figures, tests, parts, seconds)
    if options.output:
        report = {
            "settings": {key: str(value) for key, value in vars(options).items()},
            "examples": {name: len(part) for name, part in parts.items()},
            "training_seconds": seconds,
            "runs": figures,
            "tests": tests,
            "answers": answers(parts["test"], runs),
        }
        with files.atomic_write(options.output) as file:
            json.dump(report, file, indent=2, ensure_ascii=False)


def program(llm: LLM) -> LLMTextCompletionProgram[RepairOrder]:
    return LLMTextCompletionProgram.from_defaults(
        output_cls=RepairOrder, prompt_template_str=TEMPLATE, llm=llm
    )


def chat_dataset(path: Path) -> ChatDataset:
    """Return each note as the program's prompt, and its order as the answer to it."""
    return ChatDataset(
        examples=[
            chat_example(row["text"], RepairOrder.model_validate_json(json.dumps(row["answer"])))
            for _, row in files.read_jsonl(path)
        ]
    )


def chat_example(text: str, order: RepairOrder) -> ChatExample:
    # The parser doubles the braces of the schema, which nothing undoes: the model sees "{{",
    # in training as in use, so nothing is tidied here.
    prompt = program(MockLLM()).prompt.format_messages(text=text)
    asked = [{"role": message.role.value, "content": message.content} for message in prompt]
    answer = {"role": "assistant", "content": order.model_dump_json()}
    # The query is what the split goes by: the schema makes all prompts near-duplicates.
    return ChatExample(messages=[*asked, answer], metadata={"query": text})


def evaluate(name: str, llm: LLM, test: ChatDataset) -> list[Outcome]:
    extract, outcomes = program(llm), []
    for example in test:
        expected = RepairOrder.model_validate_json(example.answer())
        order, error = None, None
        try:
            order = extract(text=example.asked())
        except ValueError as problem:  # no JSON in the answer, or not of this schema
            error = str(problem)
        outcomes.append(Outcome(order, error, score(order, expected)))
        valid = sum(outcome.order is not None for outcome in outcomes)
        note(f"{name}: {len(outcomes)} of {len(test)} notes, {valid} valid")
    return outcomes


def score(order: RepairOrder | None, expected: RepairOrder) -> dict[str, float]:
    if order is None:
        return dict.fromkeys(METRICS, 0.0)
    found, wanted = (leaves(one.model_dump(mode="json")) for one in (order, expected))
    paths = found.keys() | wanted.keys()  # a part too many is as wrong as one too few
    right = sum(path in found and path in wanted and found[path] == wanted[path] for path in paths)
    return {"valid": 1.0, "fields": right / len(paths), "exact": float(order == expected)}


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Return path to value, such as `parts.0.quantity`; an empty list is a value of its own."""
    if not value or not isinstance(value, dict | list):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {
        place: leaf
        for key, child in items
        for place, leaf in leaves(child, f"{path}.{key}" if path else str(key)).items()
    }


def summary(outcomes: list[Outcome]) -> dict[str, dict[str, float]]:
    return {metric: mean_and_interval(outcomes, metric) for metric in METRICS}


def mean_and_interval(outcomes: list[Outcome], metric: str) -> dict[str, float]:
    values = [outcome.scores[metric] for outcome in outcomes]
    if metric in SHARES:  # resampling would be certain of a share of 0 or 1
        low, high = binomtest(int(sum(values)), len(values)).proportion_ci(method="wilson")
    else:
        low, high = bootstrap_interval(values)
    return {"mean": statistics.fmean(values), "low": float(low), "high": float(high)}


def compare(base: list[Outcome], student: list[Outcome], metric: str) -> dict[str, float]:
    before, after = ([o.scores[metric] for o in outcomes] for outcomes in (base, student))
    # On zeros and ones, flipping the signs of the differences is McNemar's test.
    return paired_randomisation_test(before, after)._asdict()


def print_table(
    figures: dict[str, dict[str, dict[str, float]]],
    tests: dict[str, dict[str, float]],
    parts: dict[str, ChatDataset],
    seconds: float,
) -> None:
    print(
        f"{len(parts['train'])} notes to train on, {len(parts['test'])} to test; "
        f"trained in {seconds:.0f} s\n"
    )
    print(f"{'':8}{'base (95 %)':>26}{'student (95 %)':>26}{'difference (95 %)':>30}{'p':>9}")
    for metric, test in tests.items():
        means = "".join(
            f"{run[metric]['mean']:10.3f} ({run[metric]['low']:.3f} to {run[metric]['high']:.3f})"
            for run in figures.values()
        )
        change = f"{test['difference']:+.3f} ({test['low']:+.3f} to {test['high']:+.3f})"
        print(f"{metric:8}{means}{change:>30}{test['p_value']:9.4f}")


def answers(test: ChatDataset, runs: dict[str, list[Outcome]]) -> list[dict[str, Any]]:
    return [
        {"text": example.asked(), "expected": json.loads(example.answer())}
        | {name: outcome_dict(outcomes[index]) for name, outcomes in runs.items()}
        for index, example in enumerate(test)
    ]


def outcome_dict(outcome: Outcome) -> dict[str, Any]:
    order = outcome.order and outcome.order.model_dump(mode="json")
    return {"order": order, "error": outcome.error, "scores": outcome.scores}


def print_lengths(parts: dict[str, ChatDataset], model: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def tokens(messages: list[dict[str, Any]], generate: bool) -> int:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate
        )
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    for name, part in parts.items():
        prompts = [tokens(example.messages[:-1], True) for example in part]
        wholes = [tokens(example.messages, False) for example in part]
        replies = [whole - prompt for prompt, whole in zip(prompts, wholes, strict=True)]
        print(f"{name}: {len(part)} notes")
        for what, counts in {"prompt": prompts, "answer": replies, "both": wholes}.items():
            print(f"  {what:7} {statistics.median(counts):6.0f} tokens, {max(counts)} at most")


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
