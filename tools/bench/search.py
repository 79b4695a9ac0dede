"""Exact search and its metrics: `ft_core.evaluate_vectors` against sentence-transformers.

    uv run python tools/bench/search.py [--documents 100000] [--queries 1000] [--json]

Both get the same random vectors and compute the same metrics from the top 100. Each run is
a fresh process; the two take turns. Memory is the peak of resident memory during the run
less what was resident just before it (vectors, texts and imported libraries).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

TOP_K = 100
SIDES = ("ft_core", "sentence_transformers")
METRICS = (
    *(f"{name}@{k}" for name in ("hit_rate", "precision", "recall") for k in (1, 3, 5, 10)),
    "mrr@10",
    "ndcg@10",
    f"map@{TOP_K}",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--vectors", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(run_side(options.side, options.vectors)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_vectors(Path(folder), options.documents, options.queries, options.dimensions)
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for repeat in range(options.repeats):
            for side in SIDES if repeat % 2 == 0 else reversed(SIDES):
                runs[side].append(in_fresh_process(side, folder))
    report(options, runs)


def write_vectors(folder: Path, documents: int, queries: int, dimensions: int) -> None:
    """Random documents; query i is document i with noise, and that is its relevant one."""
    rng = np.random.default_rng(0)
    corpus = rng.standard_normal((documents, dimensions), dtype=np.float32)
    noise = rng.standard_normal((queries, dimensions), dtype=np.float32)
    np.save(folder / "corpus.npy", corpus)
    np.save(folder / "queries.npy", corpus[:queries] + 4 * noise)


def in_fresh_process(side: str, folder: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--vectors", folder]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_side(side: str, folder: Path) -> dict[str, float]:
    corpus, queries = np.load(folder / "corpus.npy"), np.load(folder / "queries.npy")
    prepare = prepare_ours if side == "ft_core" else prepare_theirs
    work = prepare(corpus, queries)
    before = reset_peak()
    start = time.perf_counter()
    scores = work()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mib": (resident("VmHWM") - before) / 1024, **scores}


def prepare_ours(corpus: np.ndarray, queries: np.ndarray) -> Callable[[], dict[str, float]]:
    from ft_core.datasets import EmbeddingQAFinetuneDataset
    from ft_core.evaluation import evaluate_vectors

    dataset = EmbeddingQAFinetuneDataset(
        queries={f"q{i}": f"query {i}" for i in range(len(queries))},
        corpus={f"d{i}": f"document {i}" for i in range(len(corpus))},
        relevant_docs={f"q{i}": [f"d{i}"] for i in range(len(queries))},
    )

    def work() -> dict[str, float]:
        evaluation = evaluate_vectors(
            queries, corpus, dataset, name="bench", metrics=METRICS, top_k=TOP_K
        )
        return {metric: evaluation.mean(metric) for metric in ("hit_rate@10", "ndcg@10")}

    return work


def prepare_theirs(corpus: np.ndarray, queries: np.ndarray) -> Callable[[], dict[str, float]]:
    import torch
    from sentence_transformers.sentence_transformer.evaluation import (
        InformationRetrievalEvaluator,
    )
    from sentence_transformers.util import cos_sim

    evaluator = InformationRetrievalEvaluator(
        queries={f"q{i}": f"query {i}" for i in range(len(queries))},
        corpus={f"d{i}": f"document {i}" for i in range(len(corpus))},
        relevant_docs={f"q{i}": {f"d{i}"} for i in range(len(queries))},
        map_at_k=[TOP_K],
        score_functions={"cosine": cos_sim},
    )

    class Precomputed:
        """Stands for the model: "encodes" the queries to the vectors at hand."""

        def encode_query(self, texts: list[str], **_: object) -> torch.Tensor:
            return torch.from_numpy(queries)

    def work() -> dict[str, float]:
        scores = evaluator.compute_all_metrics(
            Precomputed(), corpus_embeddings=torch.from_numpy(corpus)
        )["cosine"]
        return {"hit_rate@10": scores["accuracy@k"][10], "ndcg@10": scores["ndcg@k"][10]}

    return work


def reset_peak() -> int:
    """Start the peak of resident memory from here; returns what is resident, in KiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def report(options: argparse.Namespace, runs: dict[str, list[dict[str, float]]]) -> None:
    medians = {
        side: {key: statistics.median(run[key] for run in results) for key in results[0]}
        for side, results in runs.items()
    }
    ours, theirs = (medians[side] for side in SIDES)
    ratio = {key: ours[key] / theirs[key] for key in ("seconds", "peak_mib")}
    if options.json:
        print(json.dumps({"median": medians, "ratio": ratio, "runs": runs}, indent=2))
        return
    print(
        f"{options.documents} documents x {options.dimensions} x {options.queries} queries, "
        f"exact top {TOP_K}; median of {options.repeats}"
    )
    print(f"{'':24}{'seconds':>10}{'peak MiB':>10}{'hit@10':>10}{'ndcg@10':>10}")
    for side, row in medians.items():
        numbers = (row["seconds"], row["peak_mib"], row["hit_rate@10"], row["ndcg@10"])
        print(f"{side:24}" + "".join(f"{number:10.3f}" for number in numbers))
    print(f"{'ratio':24}{ratio['seconds']:10.3f}{ratio['peak_mib']:10.3f}")


if __name__ == "__main__":
    main()
