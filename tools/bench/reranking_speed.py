"""Pairs per second of `FinetunedReranker` and of LlamaIndex's `SentenceTransformerRerank`.

    uv run python tools/bench/reranking_speed.py [--model FOLDER] [--nodes 20 50 200]

Both rerank the same nodes of very different lengths (10 to 400 words of made-up text) with the
same weights, in turn, in one process; reported are, for each number of nodes, the medians, their
ratio and how far the scores are apart. Without `--model` the weights are all-MiniLM-L6-v2's with
an untrained head: what a model knows changes no speed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from model_assets import minilm

WORDS = """
harbour tower garden station market library bridge museum opens closes costs gates
ticket price four coins adults doors bell dusk dawn keeper late fee week card lost river
"""
QUERY = "what does a lost library card cost in the harbour market"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a cross-encoder")
    parser.add_argument("--nodes", type=int, nargs="+", default=[20, 50, 200])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or untrained(folder)
        results = [measure(model, count, options.repeats) for count in options.nodes]
    if options.json:
        print(json.dumps(results, indent=2))
        return
    for result in results:
        print(f"{result['nodes']} nodes")
        for name, rate in result["pairs_per_second"].items():
            print(f"  {name:28} {rate:8.1f} pairs/s")
        difference = result["score_difference"]
        print(f"  ratio {result['ratio']:.2f}, scores at most {difference:.1e} apart")


def measure(model: str, count: int, repeats: int) -> dict[str, Any]:
    from llama_index.core.postprocessor import SentenceTransformerRerank

    from ft_crossencoder import FinetunedReranker

    theirs = SentenceTransformerRerank(model=model, top_n=count, device="cpu")
    ours = FinetunedReranker(model, count, max_length=512, device="cpu")
    seconds: dict[str, list[float]] = {"SentenceTransformerRerank": [], "FinetunedReranker": []}
    scores: list[dict[str, float]] = []
    for repeat in range(repeats + 1):  # the first warms up
        for name, reranker in zip(seconds, (theirs, ours), strict=True):
            nodes = made_up(count)
            start = time.perf_counter()
            ranked = reranker.postprocess_nodes(nodes, query_str=QUERY)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
            scores.append({node.node.node_id: float(node.score or 0.0) for node in ranked})
    rates = {name: count / statistics.median(values) for name, values in seconds.items()}
    return {
        "nodes": count,
        "pairs_per_second": rates,
        "ratio": rates["FinetunedReranker"] / rates["SentenceTransformerRerank"],
        "score_difference": max(abs(scores[1][key] - scores[0][key]) for key in scores[0]),
    }


def made_up(count: int) -> list[Any]:
    """Return nodes in a random order of lengths; the same ones each time."""
    from llama_index.core.schema import NodeWithScore, TextNode

    rng, words = random.Random(0), WORDS.split()
    texts = [" ".join(rng.choices(words, k=round(10 * 40 ** rng.random()))) for _ in range(count)]
    return [
        NodeWithScore(node=TextNode(id_=str(number), text=text), score=0.5)
        for number, text in enumerate(texts)
    ]


def untrained(folder: str) -> str:
    from sentence_transformers import CrossEncoder

    CrossEncoder(minilm(), num_labels=1).save_pretrained(f"{folder}/model")
    return f"{folder}/model"


if __name__ == "__main__":
    main()
