"""The demo's gain for several seeds of training: base and tuned on its held-out questions.

uv run python tools/bench/demo.py [--seeds 1 2 3 4 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from ft_embeddings.demo import story


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    rows = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            outcome = story.run(Path(folder), seed=seed)
        base, tuned = (outcome.report.measures[run.name] for run in outcome.report.runs)
        for metric in ("hit_rate@1", "ndcg@10"):
            difference = tuned[metric].difference
            assert difference is not None
            rows.append(
                {
                    "seed": seed,
                    "metric": metric,
                    "base": base[metric].mean,
                    "tuned": tuned[metric].mean,
                    "low": difference.low,
                    "high": difference.high,
                    "p": difference.p_adjusted,
                    "training_seconds": outcome.training_seconds,
                }
            )
            if not options.json:
                print("  ".join(f"{key} {show(value)}" for key, value in rows[-1].items()))
                sys.stdout.flush()
    if options.json:
        print(json.dumps(rows, indent=2))


def show(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
