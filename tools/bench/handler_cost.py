"""What `RetrievalHandler` adds to a retrieval, in microseconds.

    uv run python tools/bench/handler_cost.py [--queries 2000] [--repeats 7] [--json]

A retriever returns 10 nodes of 1 kB at once, so that nothing hides the cost. Four cases take
turns: without a handler; another retriever of the same class watched; recorded, with the
nodes' texts in the journal already; and recorded with ten new texts each time. Reported per
call: the median over the repeats of the median call. The goal is under 1 ms added.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from ft_embeddings import RetrievalHandler

NODES, NODE_BYTES = 10, 1000
GOAL_MICROSECONDS = 1000


class FixedRetriever(BaseRetriever):
    def __init__(self) -> None:
        super().__init__()
        self.nodes = new_nodes()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self.nodes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    runs: dict[str, list[float]] = {case: [] for case in CASES}
    for _ in range(options.repeats):
        for case, measure in CASES.items():
            with tempfile.TemporaryDirectory() as folder:
                runs[case].append(measure(Path(folder), options.queries))
    medians = {case: statistics.median(values) for case, values in runs.items()}
    base = medians["without"]
    added = {case: value - base for case, value in medians.items() if case != "without"}
    if options.json:
        print(json.dumps({"median_us": medians, "added_us": added, "runs_us": runs}, indent=2))
        return
    print(f"{'':24}{'median':>10}{'added':>10}   (microseconds per retrieve)")
    for case, value in medians.items():
        print(f"{case:24}{value:10.1f}{added.get(case, 0):10.1f}")
    verdict = "met" if max(added.values()) < GOAL_MICROSECONDS else "MISSED"
    print(f"goal of under {GOAL_MICROSECONDS} added: {verdict}")


def without(folder: Path, queries: int) -> float:
    return median_call(FixedRetriever(), queries)


def another_watched(folder: Path, queries: int) -> float:
    with RetrievalHandler(folder / "traffic.jsonl").attach(FixedRetriever()):
        return median_call(FixedRetriever(), queries)


def recorded(folder: Path, queries: int) -> float:
    return recorded_call(folder, queries, lambda retriever: None)


def recorded_new_texts(folder: Path, queries: int) -> float:
    def renew(retriever: FixedRetriever) -> None:
        retriever.nodes = new_nodes()

    return recorded_call(folder, queries, renew)


def recorded_call(folder: Path, queries: int, before: Callable[[FixedRetriever], None]) -> float:
    handler, retriever = RetrievalHandler(folder / "traffic.jsonl"), FixedRetriever()
    with handler.attach(retriever):
        cost = median_call(retriever, queries, before)
    assert handler.path.read_text().count("\n") == queries
    assert not handler.failures
    return cost


def median_call(
    retriever: FixedRetriever,
    queries: int,
    before: Callable[[FixedRetriever], None] = lambda retriever: None,
) -> float:
    """Return the median microseconds of one `retrieve`; `before` is not timed."""
    seconds = []
    for number in range(queries):
        before(retriever)
        start = time.perf_counter()
        retriever.retrieve(f"question {number}")
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e6


def new_nodes() -> list[NodeWithScore]:
    start = str(time.perf_counter_ns())
    texts = [f"{start} {number} ".ljust(NODE_BYTES, "x") for number in range(NODES)]
    return [NodeWithScore(node=TextNode(text=text), score=0.5) for text in texts]


CASES: dict[str, Callable[[Path, int], float]] = {
    "without": without,
    "another one watched": another_watched,
    "recorded": recorded,
    "recorded, new texts": recorded_new_texts,
}

if __name__ == "__main__":
    main()
