"""Two fine-tuned routers for CLINC150's 150 intents, side by side: by vectors and by pairs.

    uv run python tools/bench/routers.py --data ../shared/data [--limit 500] [--json]

DIR/router holds `clinc150.json` (split to [question, intent] pairs). Both routers train at their
defaults on 20 questions an intent, from all-MiniLM-L6-v2: ft-embeddings' `RouterFinetuneEngine`,
and a cross-encoder of ft-crossencoder in its `CrossEncoderSelector`, which learns to tell an
intent from those that the untrained model retrieves for the question. Scored on the same test
questions; the intents are described by their names alone.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core.base.base_selector import BaseSelector
from llama_index.core.tools import ToolMetadata

sys.path.insert(0, str(Path(__file__).parents[1]))
from model_assets import minilm

from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.metrics import paired_randomisation_test
from ft_crossencoder import CrossEncoderFinetuneEngine, CrossEncoderSelector
from ft_embeddings import RouterFinetuneEngine

QUESTIONS_PER_INTENT = 20
SEED = 42


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with router/")
    parser.add_argument("--model", default=minilm(), help="hub name or folder of the base")
    parser.add_argument("--limit", type=int, default=500, help="test questions, by chance")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    data = json.loads((options.data / "router" / "clinc150.json").read_text())
    choices = [
        ToolMetadata(name=intent, description=intent.replace("_", " "))
        for intent in sorted({intent for _, intent in data["train"]})
    ]
    by_intent: dict[str, list[str]] = defaultdict(list)
    for question, intent in data["train"]:
        if len(by_intent[intent]) < QUESTIONS_PER_INTENT:
            by_intent[intent].append(question)
    test = random.Random(SEED).sample(data["test"], min(options.limit, len(data["test"])))
    rows, hits = [], []
    with tempfile.TemporaryDirectory() as folder:
        trainings: dict[str, Callable[[], BaseSelector]] = {
            "RouterFinetuneEngine": lambda: by_vectors(choices, by_intent, options.model, folder),
            "CrossEncoderSelector": lambda: by_pairs(choices, by_intent, options.model, folder),
        }
        for name, train in trainings.items():
            start = time.perf_counter()
            selector = train()
            seconds = time.perf_counter() - start
            found, milliseconds = route(selector, choices, test)
            hits.append(found)
            rows.append(
                {
                    "router": name,
                    "match": float(found.mean()),
                    "training_seconds": seconds,
                    "milliseconds": milliseconds,
                }
            )
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    compared = paired_randomisation_test(*hits)
    result = {
        "questions": len(test),
        "routers": rows,
        "difference": {
            "value": compared.difference,
            "low": compared.low,
            "high": compared.high,
            "p": compared.p_value,
        },
    }
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for row in rows:
        print(
            f"{row['router']:24} match rate {row['match']:.4f}   trained in "
            f"{row['training_seconds']:.0f} s   {row['milliseconds']:.1f} ms per selection"
        )
    print(
        f"difference {compared.difference:+.4f} ({compared.low:+.4f} to {compared.high:+.4f}), "
        f"p = {compared.p_value:.4f}, {len(test)} questions"
    )


def by_vectors(
    choices: list[ToolMetadata], examples: dict[str, list[str]], model: str, folder: str
) -> BaseSelector:
    router = RouterFinetuneEngine(choices, examples, model, f"{folder}/vectors")
    router.finetune()
    return router.get_finetuned_model()


def by_pairs(
    choices: list[ToolMetadata], examples: dict[str, list[str]], model: str, folder: str
) -> BaseSelector:
    pairs = [(question, intent) for intent, asked in examples.items() for question in asked]
    dataset = EmbeddingQAFinetuneDataset(
        queries={str(number): question for number, (question, _) in enumerate(pairs)},
        corpus={choice.name: choice.description for choice in choices},
        relevant_docs={str(number): [intent] for number, (_, intent) in enumerate(pairs)},
    )
    engine = CrossEncoderFinetuneEngine(dataset, model, f"{folder}/pairs")
    engine.finetune()
    return CrossEncoderSelector(f"{folder}/pairs")


def route(
    selector: BaseSelector, choices: list[ToolMetadata], test: list[list[str]]
) -> tuple[Any, float]:
    """Return whether each question went to its intent, and the milliseconds of a selection."""
    selector.select(choices, test[0][0])  # embeds the choices, where that is needed
    start = time.perf_counter()
    picked = [choices[selector.select(choices, question).ind].name for question, _ in test]
    milliseconds = 1000 * (time.perf_counter() - start) / len(test)
    found = [name == intent for name, (_, intent) in zip(picked, test, strict=True)]
    return np.array(found, dtype=float), milliseconds


if __name__ == "__main__":
    main()
