"""Routing CLINC150's questions to their 150 intents, described by their names alone.

    uv run python tools/bench/router.py --data ../shared/data [--seeds 42] [--split test] [--json]

DIR/router holds `clinc150.json` (split to [question, intent] pairs). The router trains on 20
questions an intent and is scored on the test split; the figures to compare with are the
untrained model in the same selector, and LlamaIndex's own `EmbeddingSingleSelector`, whose
embedding calls are counted beside ours.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from llama_index.core.base.base_selector import BaseSelector
from llama_index.core.selectors import EmbeddingSingleSelector
from llama_index.core.tools import ToolMetadata
from llama_index.embeddings.huggingface import HuggingFaceEmbedding

sys.path.insert(0, str(Path(__file__).parents[1]))
from model_assets import minilm

from ft_embeddings import EmbeddingSelector, RouterFinetuneEngine

QUESTIONS_PER_INTENT = 20
SELECTIONS = 20
"""How many selections are counted and timed; LlamaIndex's selector takes seconds for each."""


class CountingEmbedding(HuggingFaceEmbedding):
    """Counts the texts that it embeds, queries included."""

    def _embed(self, inputs: Any, prompt_name: str | None = None) -> Any:
        COUNT["texts"] += len(inputs)
        return super()._embed(inputs, prompt_name)


COUNT = {"texts": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with router/")
    parser.add_argument("--model", default=minilm(), help="hub name or folder of the base")
    parser.add_argument("--seeds", nargs="*", type=int, default=[42])
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, help="test questions; all by default")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    data = json.loads((options.data / "router" / "clinc150.json").read_text())
    intents = sorted({intent for _, intent in data["train"]})
    choices = [ToolMetadata(name=i, description=i.replace("_", " ")) for i in intents]
    test = data[options.split][: options.limit]

    base = CountingEmbedding(model_name=options.model)
    rows = [{"run": "base", "match": match(EmbeddingSelector(base), choices, test)}]
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            router = RouterFinetuneEngine(
                choices, examples(data["train"]), options.model, f"{folder}/router", seed=seed
            )
            start = time.perf_counter()
            router.finetune()
            seconds = time.perf_counter() - start
            found = match(router.get_finetuned_model(), choices, test)
            rows.append({"run": f"tuned, seed {seed}", "match": found, "seconds": seconds})
    costs = [cost("ours", EmbeddingSelector(base), choices, test)]
    costs.append(cost("LlamaIndex's", EmbeddingSingleSelector(base), choices, test))
    if options.json:
        print(json.dumps({"match": rows, "cost": costs}, indent=2))
        return
    for row in rows:
        trained = f"   trained in {row['seconds']:.0f} s" if "seconds" in row else ""
        print(f"{row['run']:18} match rate {row['match']:.4f}{trained}")
    for row in costs:
        print(
            f"{row['selector']:18} {row['texts']:.1f} texts embedded and "
            f"{row['milliseconds']:.1f} ms per selection"
        )


def examples(pairs: list[list[str]]) -> dict[str, list[str]]:
    by_intent: dict[str, list[str]] = defaultdict(list)
    for question, intent in pairs:
        if len(by_intent[intent]) < QUESTIONS_PER_INTENT:
            by_intent[intent].append(question)
    return by_intent


def match(selector: BaseSelector, choices: list[ToolMetadata], test: list[list[str]]) -> float:
    hits = [
        choices[selector.select(choices, question).ind].name == intent for question, intent in test
    ]
    return sum(hits) / len(hits)


def cost(
    name: str, selector: BaseSelector, choices: list[ToolMetadata], test: list[list[str]]
) -> dict[str, Any]:
    """Count and time selections after the first, which embeds the choices."""
    selector.select(choices, test[0][0])
    COUNT["texts"] = 0
    start = time.perf_counter()
    for question, _ in test[:SELECTIONS]:
        selector.select(choices, question)
    seconds = time.perf_counter() - start
    return {
        "selector": name,
        "texts": COUNT["texts"] / SELECTIONS,
        "milliseconds": 1000 * seconds / SELECTIONS,
    }


if __name__ == "__main__":
    main()
