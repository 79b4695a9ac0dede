"""What importing ft_core costs, against `import llama_index.core`.

    uv run python tools/bench/import_cost.py [--repeats 10] [--json]

Each import runs in a fresh interpreter, and they take turns, so that a busy moment of the
machine meets them all. The goal is a ratio of at most 1.15.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

BASELINE = "import llama_index.core"
STATEMENTS = (
    BASELINE,
    "import ft_core",
    "import ft_core.datasets, ft_core.metrics, ft_core.evaluation",
)
TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    for statement in STATEMENTS:
        seconds(statement)  # the first run reads from disk and compiles
    runs: dict[str, list[float]] = {statement: [] for statement in STATEMENTS}
    for repeat in range(options.repeats):
        for statement in STATEMENTS if repeat % 2 == 0 else reversed(STATEMENTS):
            runs[statement].append(seconds(statement))
    medians = {statement: statistics.median(values) for statement, values in runs.items()}
    ratios = {statement: value / medians[BASELINE] for statement, value in medians.items()}
    if options.json:
        print(json.dumps({"median": medians, "ratio": ratios, "runs": runs}, indent=2))
        return
    print(f"median of {options.repeats} fresh interpreters")
    for statement, value in medians.items():
        print(f"{statement:64}{value:8.3f} s{ratios[statement]:8.3f}")


def seconds(statement: str) -> float:
    command = [sys.executable, "-c", TIMED.format(statement)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


if __name__ == "__main__":
    main()
