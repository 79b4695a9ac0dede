"""Adapters of all-MiniLM-L6-v2 on two companies' filings: ours, the predecessor's, and neither.

    uv run python tools/bench/adapter.py --data ../shared/data \\
        [--predecessor-python predecessor/bin/python] [--parts speed quality index] [--json]

DIR/finance-qa holds `train.json` (Lyft's 10-K of 2021) and `val.json` (Uber's), embedding QA
datasets. The predecessor's environment is that of finance_qa.py with
`llama-index-embeddings-huggingface` besides.

- speed: `finetune()` of the predecessor at its notebook's settings, and ours at the same
  number of epochs and at ten times it, with an empty and with a full cache of vectors. Each
  is a process of its own; loading the embedding model is not counted for either.
- quality: adapters and losses, five seeds each, in three settings. Another company: Lyft
  trains, Uber tests. New questions: of the two questions about each of Uber's chunks one
  trains and the other tests. Both filings: as new questions, and Lyft's questions train too.
- index: training on an index of 50,000 nodes, of which 395 are Uber's chunks and the others
  have random vectors around them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.finance_qa import new_questions, note
from model_assets import minilm

from ft_adapter import EmbeddingAdapterFinetuneEngine
from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.evaluation import Evaluation, compare

PARTS = ("speed", "quality", "index")
METRICS = ("ndcg@10", "hit_rate@1", "hit_rate@10", "mrr@10")
SEEDS = (1, 2, 3, 4, 5)
PREDECESSOR = Path(__file__).parent / "predecessor_adapter.py"
VARIANTS: dict[str, dict[str, Any]] = {
    "linear, full_corpus (default)": {},
    "linear, in_batch": {"loss": "in_batch"},
    "linear, hard_negatives": {"loss": "hard_negatives"},
    "linear, margin": {"loss": "margin"},
    "low_rank, full_corpus": {"adapter_model": "low_rank"},
    "residual, full_corpus": {"adapter_model": "residual"},
    "both sides, full_corpus": {"sides": "both"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with finance-qa/")
    parser.add_argument("--predecessor-python", help="interpreter that has llama-index-finetuning")
    parser.add_argument("--model", default=minilm(), help="hub name or folder of the base")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--nodes", type=int, default=50_000, help="nodes of the index")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts:
            results[part] = globals()[part](options, Path(folder))
            if not options.json:
                globals()[f"print_{part}"](results[part])
    if options.json:
        print(json.dumps(results, indent=2))


def load(options: argparse.Namespace, name: str) -> EmbeddingQAFinetuneDataset:
    return EmbeddingQAFinetuneDataset.load(options.data / "finance-qa" / f"{name}.json")


def embedding(model: str) -> Any:
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    return HuggingFaceEmbedding(model_name=model)


# --- Speed -----------------------------------------------------------------------------------


def speed(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    data = options.data / "finance-qa" / "train.json"
    test = load(options, "val")
    rows = []
    if options.predecessor_python:
        output = folder / "predecessor"
        seconds = timed([options.predecessor_python, PREDECESSOR, data, options.model, output])
        rows.append({"run": "predecessor, 4 epochs", "seconds": seconds, "adapter": str(output)})
        note(json.dumps(rows[-1]))
    for epochs in (4, 40):
        cache = folder / f"cache-{epochs}"
        for state in ("cold", "warm"):
            output = folder / f"adapter-{epochs}-{state}"
            arguments = [data, options.model, output, cache, str(epochs)]
            seconds = timed([sys.executable, __file__, "--worker", *arguments])
            run = f"ours, {epochs} epochs, {state}"
            rows.append({"run": run, "seconds": seconds, "adapter": str(output)})
            note(json.dumps(rows[-1]))
    from ft_adapter.evaluation import evaluate_adapters

    scored = evaluate_adapters(
        test,
        embedding(options.model),
        {row["run"]: row.pop("adapter") for row in rows},
        cache_dir=folder / "cache-test",
    )
    found = {run.name: run for run in scored.runs}
    for row in [*rows, {"run": "identity", "seconds": 0.0}]:
        row["metrics"] = {metric: found[row["run"]].mean(metric) for metric in METRICS}
    return rows


def timed(command: list[Any]) -> float:
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split("seconds:")[1])


def work(data: str, model: str, output: str, cache: str, epochs: str) -> None:
    """Train once with ours and print the seconds that `finetune()` took."""
    engine = EmbeddingAdapterFinetuneEngine(
        data,
        embedding(model),
        model_output_path=output,
        epochs=int(epochs),
        early_stopping_patience=0,
        bias=True,
        cache_dir=cache,
    )
    start = time.perf_counter()
    engine.finetune()
    print(f"seconds: {time.perf_counter() - start}")


def print_speed(rows: list[dict[str, Any]]) -> None:
    reference = next((row["seconds"] for row in rows if "predecessor" in row["run"]), None)
    print(f"\n{'run':30}{'seconds':>9}{'ratio':>9}" + "".join(f"{name:>13}" for name in METRICS))
    for row in rows:
        ratio = f"{row['seconds'] / reference:.4f}" if reference else ""
        figures = "".join(f"{row['metrics'][name]:13.4f}" for name in METRICS)
        print(f"{row['run']:30}{row['seconds']:9.2f}{ratio:>9}{figures}")


# --- Quality ---------------------------------------------------------------------------------


def quality(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    lyft, uber = load(options, "train"), load(options, "val")
    first, others = new_questions(uber)
    settings = {
        "another company": (lyft, uber),
        "new questions": (first, others),
        "both filings": (together(uber=first, lyft=lyft), others),
    }
    model = embedding(options.model)
    rows = []
    for setting, (train, test) in settings.items():
        for variant in options.variants:
            arguments, runs = VARIANTS[variant], []
            for seed in SEEDS:
                start = time.perf_counter()
                engine = EmbeddingAdapterFinetuneEngine(
                    train,
                    model,
                    model_output_path=folder / "adapter",
                    cache_dir=folder / "cache",
                    seed=seed,
                    **arguments,
                )
                engine.finetune()
                seconds = time.perf_counter() - start
                runs.append(outcome(options, folder, engine, test, seconds))
            rows.append({"setting": setting, "variant": variant, "runs": runs})
            note(json.dumps(rows[-1]))
    return rows


def outcome(
    options: argparse.Namespace,
    folder: Path,
    engine: EmbeddingAdapterFinetuneEngine,
    test: EmbeddingQAFinetuneDataset,
    seconds: float,
) -> dict[str, Any]:
    from ft_adapter.evaluation import evaluate_adapters

    report = evaluate_adapters(
        test, engine.embed_model, {"adapter": folder / "adapter"}, cache_dir=folder / "cache"
    )
    base, run = report.runs
    assert engine.selection is not None
    return {
        "kept": engine.selection.kept,
        "epochs": engine.selection.epochs,
        "seconds": seconds,
        "base": {metric: base.mean(metric) for metric in METRICS},
        "gain": {metric: gain(base, run, metric) for metric in METRICS},
    }


def gain(base: Evaluation, run: Evaluation, metric: str) -> dict[str, float]:
    test = compare(base, run, metric)
    return {"value": test.difference, "low": test.low, "high": test.high, "p": test.p_value}


def together(**datasets: EmbeddingQAFinetuneDataset) -> EmbeddingQAFinetuneDataset:
    """Return the datasets as one, with ids that cannot meet."""
    return EmbeddingQAFinetuneDataset(
        queries={f"{n}-{k}": text for n, d in datasets.items() for k, text in d.queries.items()},
        corpus={f"{n}-{k}": text for n, d in datasets.items() for k, text in d.corpus.items()},
        relevant_docs={
            f"{n}-{query}": [f"{n}-{document}" for document in documents]
            for n, dataset in datasets.items()
            for query, documents in dataset.relevant_docs.items()
        },
    )


def print_quality(rows: list[dict[str, Any]]) -> None:
    for setting in dict.fromkeys(row["setting"] for row in rows):
        shown = [row for row in rows if row["setting"] == setting]
        base = shown[0]["runs"][0]["base"]
        print(f"\n{setting}: base " + ", ".join(f"{m} {base[m]:.4f}" for m in METRICS))
        print(
            f"{'mean gain of ' + str(len(SEEDS)) + ' seeds':32}"
            + "".join(f"{metric:>13}" for metric in METRICS)
            + f"{'lowest':>10}{'p, lowest':>12}{'highest':>9}{'kept':>6}{'seconds':>9}"
        )
        for row in shown:
            runs = row["runs"]
            means = [np.mean([run["gain"][metric]["value"] for run in runs]) for metric in METRICS]
            lowest = min(run["gain"]["ndcg@10"]["value"] for run in runs)
            p_values = [run["gain"]["ndcg@10"]["p"] for run in runs]
            print(
                f"{row['variant']:32}"
                + "".join(f"{mean:+13.4f}" for mean in means)
                + f"{lowest:+10.4f}{min(p_values):12.4f}{max(p_values):9.4f}"
                + f"{sum(run['kept'] for run in runs):6}"
                + f"{np.mean([run['seconds'] for run in runs]):9.1f}"
            )


# --- Index -----------------------------------------------------------------------------------


def index(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train on a large index in a process of its own, whose memory is then its own too."""
    arguments = [options.data, options.model, folder / "index", str(options.nodes)]
    command = [sys.executable, __file__, "--index-worker", *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def work_on_index(data: str, model: str, output: str, count: str) -> None:
    from llama_index.core import VectorStoreIndex
    from llama_index.core.schema import TextNode
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    class Counting(HuggingFaceEmbedding):
        """Counts the documents that it is asked for."""

        documents: int = 0

        def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
            self.documents += len(texts)
            return super()._get_text_embeddings(texts)

        def _get_text_embedding(self, text: str) -> list[float]:
            self.documents += 1
            return super()._get_text_embedding(text)

    uber = EmbeddingQAFinetuneDataset.load(Path(data) / "finance-qa" / "val.json")
    base = Counting(model_name=model)
    vectors = np.array(base.get_text_embedding_batch(list(uber.corpus.values())))
    generator = np.random.default_rng(0)
    others = vectors[generator.integers(len(vectors), size=int(count) - len(vectors))]
    others = others + generator.normal(scale=0.06, size=others.shape)
    nodes = [
        TextNode(id_=key, text=text, embedding=vector.tolist())
        for (key, text), vector in zip(uber.corpus.items(), vectors, strict=True)
    ]
    nodes += [
        TextNode(id_=f"other-{number}", text=f"other {number}", embedding=vector.tolist())
        for number, vector in enumerate(others)
    ]
    built = VectorStoreIndex(nodes, embed_model=base)
    del nodes, others
    base.documents = 0
    engine = EmbeddingAdapterFinetuneEngine.from_index(
        built, uber, model_output_path=output, cache_dir=f"{output}-cache"
    )
    before = peak_mib()
    start = time.perf_counter()
    report = engine.finetune()
    result = {
        "nodes": int(count),
        "questions": len(uber.queries),
        "documents embedded": base.documents,
        "seconds": time.perf_counter() - start,
        "peak MiB before": before,
        "peak MiB after": peak_mib(),
        "vectors MiB": int(count) * vectors.shape[1] * 4 / 2**20,
        "verdict": report.verdict("adapter"),
    }
    print(json.dumps(result))


def peak_mib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def print_index(result: dict[str, Any]) -> None:
    print()
    for name, value in result.items():
        print(f"{name:20} {value:.1f}" if isinstance(value, float) else f"{name:20} {value}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
    elif sys.argv[1:2] == ["--index-worker"]:
        work_on_index(*sys.argv[2:])
    else:
        main()
