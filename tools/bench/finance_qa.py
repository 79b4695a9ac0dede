"""Fine-tuning all-MiniLM-L6-v2 on a company's filing: ours, the predecessor's, and neither.

    uv run python tools/bench/finance_qa.py --data ../shared/data \\
        [--predecessor-python predecessor/bin/python] [--seeds 42] [--json]

DIR/finance-qa holds `train.json` (Lyft's 10-K of 2021) and `val.json` (Uber's), embedding QA
datasets. Two settings: another company (train on Lyft, test on Uber) and new questions (of
the two questions about each of Uber's chunks one trains and the other tests). Everything
runs with default settings, one after the other in one process tree.

The predecessor needs an environment of its own:

    uv venv -p 3.11 predecessor
    uv pip install -p predecessor llama-index-finetuning 'mistralai<2' 'transformers<5' \\
        'sentence-transformers<5.3' accelerate datasets
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from model_assets import minilm

from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.evaluation import Evaluation, compare
from ft_embeddings import SentenceTransformersFinetuneEngine
from ft_embeddings.instructions import Instructions

SETTINGS = ("another company", "new questions")
METRICS = ("ndcg@10", "hit_rate@1", "hit_rate@5", "mrr@10")
PREDECESSOR = Path(__file__).parent / "predecessor_embeddings.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with finance-qa/")
    parser.add_argument("--predecessor-python", help="interpreter that has llama-index-finetuning")
    parser.add_argument("--model", default=minilm(), help="hub name or folder of the base")
    parser.add_argument("--presets", nargs="*", default=["default", "fast"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[42])
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    lyft, uber = (
        EmbeddingQAFinetuneDataset.load(options.data / "finance-qa" / f"{name}.json")
        for name in ("train", "val")
    )
    rows = []
    for setting in options.settings:
        train, test = (lyft, uber) if setting == "another company" else new_questions(uber)
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "train.json"
            train.save(data)
            base = score(options.model, test, "base")
            rows.append(row(setting, base, base, 0.0))
            for name, train_one in trainings(options).items():
                output = Path(folder) / name
                seconds = train_one(data, output)
                rows.append(row(setting, base, score(str(output), test, name), seconds))
                note(json.dumps(rows[-1]))
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        print_table(rows)


def trainings(options: argparse.Namespace) -> dict[str, Callable[[Path, Path], float]]:
    """Return name to a function (data, output folder) that trains and returns its seconds."""
    found: dict[str, Callable[[Path, Path], float]] = {}
    if options.predecessor_python:

        def predecessor(data: Path, output: Path) -> float:
            command = [options.predecessor_python, str(PREDECESSOR), data, options.model, output]
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, cwd=output.parent
            )
            return float(done.stdout.split("seconds:")[1])

        found["predecessor"] = predecessor
    for preset in options.presets:
        for seed in options.seeds:

            def ours(data: Path, output: Path, preset: str = preset, seed: int = seed) -> float:
                # A process of its own, as the predecessor has: neither finds the other's
                # libraries or models already loaded.
                command = [sys.executable, __file__, "--worker", data, options.model, output]
                done = subprocess.run(
                    [*command, preset, str(seed)], check=True, stdout=subprocess.PIPE, text=True
                )
                return float(done.stdout.split("seconds:")[1])

            found[f"{preset}-{seed}"] = ours
    return found


def work(data: str, model: str, output: str, preset: str, seed: str) -> None:
    """Train once with ours and print the seconds that `finetune()` took."""
    engine = SentenceTransformersFinetuneEngine(
        data, model_id=model, model_output_path=output, preset=preset, seed=int(seed)
    )
    start = time.perf_counter()
    engine.finetune()
    print(f"seconds: {time.perf_counter() - start}")


def score(model: str, test: EmbeddingQAFinetuneDataset, name: str) -> Evaluation:
    from ft_embeddings import training

    return training.evaluate(training.load_model(model), test, Instructions("", ""), name=name)


def row(setting: str, base: Evaluation, run: Evaluation, seconds: float) -> dict[str, Any]:
    test = compare(base, run, "ndcg@10")
    return {
        "setting": setting,
        "run": run.name,
        "training_seconds": seconds,
        "metrics": {metric: run.mean(metric) for metric in METRICS},
        "gain": {"value": test.difference, "low": test.low, "high": test.high, "p": test.p_value},
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    header = f"{'run':18}" + "".join(f"{metric:>12}" for metric in METRICS)
    for setting in dict.fromkeys(row["setting"] for row in rows):
        print(f"\n{setting}\n{header}   nDCG@10 gain (95 %)            p   seconds   ratio")
        shown = [row for row in rows if row["setting"] == setting]
        reference = next((r["training_seconds"] for r in shown if r["run"] == "predecessor"), None)
        for row in shown:
            gain, seconds = row["gain"], row["training_seconds"]
            figures = "".join(f"{row['metrics'][metric]:12.4f}" for metric in METRICS)
            change = f"{gain['value']:+.4f} ({gain['low']:+.4f} to {gain['high']:+.4f})"
            ratio = f"{seconds / reference:.2f}" if reference and seconds else ""
            print(
                f"{row['run']:18}{figures}   {change:26}{gain['p']:8.4f}{seconds:10.0f}{ratio:>8}"
            )


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def new_questions(
    data: EmbeddingQAFinetuneDataset,
) -> tuple[EmbeddingQAFinetuneDataset, EmbeddingQAFinetuneDataset]:
    """Split so that each chunk's first question trains and its others test."""
    seen: set[str] = set()
    first = []
    for query in data.queries:
        (document,) = data.relevant_docs[query]
        if document not in seen:
            first.append(query)
        seen.add(document)
    return data.select(first), data.select(set(data.queries) - set(first))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
    else:
        main()
