"""Seconds a node of question generation against a server that answers in 200 ms.

    uv run python tools/bench/generation.py [--predecessor-python predecessor/bin/python] [--json]

A server of integration-tests/openai_server.py runs in a process of its own. Ours asks it
about 640 nodes with 32 workers, and about the same 100 nodes as the predecessor does; then
both again while a fifth of the calls fails with 429 and 500. Each generation runs in a fresh
process with one call before the clock starts, so that imports and the first connection do not
count. Every run is checked: each node has its two questions.

The predecessor needs an environment of its own:

    uv venv -p 3.11 predecessor
    uv pip install -p predecessor llama-index-finetuning 'mistralai<2' 'transformers<5' \\
        'sentence-transformers<5.3' accelerate llama-index-llms-openai-like
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SERVER = Path(__file__).resolve().parents[2] / "integration-tests" / "openai_server.py"

RUN = """
import json, sys, time
url, output, count, module, arguments = sys.argv[1:]
generate = __import__(module, fromlist=["x"]).generate_qa_embedding_pairs
from llama_index.core.schema import TextNode
from llama_index.llms.openai_like import OpenAILike
llm = OpenAILike(model="test", api_base=url, api_key="none", is_chat_model=True)
template = "<passage>\\n{context_str}\\n</passage>\\nWrite {num_questions_per_chunk} questions."
nodes = [
    TextNode(text=f"Pump number {i} feeds valve {7 * i} of the waterworks.", id_=f"n{i}")
    for i in range(int(count))
]
generate(nodes[:1], llm, template, output_path=output + ".warm", verbose=False)
begin = time.perf_counter()
dataset = generate(nodes, llm, template, output_path=output, verbose=False, **json.loads(arguments))
seconds = time.perf_counter() - begin
asked = {node for nodes in dataset.relevant_docs.values() for node in nodes}
print(json.dumps({"seconds": seconds, "nodes": len(nodes), "lost": len(nodes) - len(asked)}))
"""


@contextmanager
def server(latency: float, failure_rate: float) -> Iterator[str]:
    command = [sys.executable, str(SERVER), "--latency", str(latency)]
    command += ["--failure-rate", str(failure_rate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def stats(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url.removesuffix("/v1") + "/stats") as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def measure(
    python: str, module: str, url: str, count: int, arguments: dict[str, Any]
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder) / "questions.json")
        command = [python, "-W", "ignore", "-c", RUN, url, output, str(count), module]
        done = subprocess.run(
            [*command, json.dumps(arguments)], capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        raise SystemExit(f"{python}: {done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result["seconds a node"] = result["seconds"] / count
    return result


def run(predecessor: str | None, failure_rate: float, latency: float) -> dict[str, Any]:
    """Measure ours, and the predecessor where there is one, each on a server of its own."""
    setting: dict[str, Any] = {"failure rate": failure_rate}
    for name, count in (("ours, 640 nodes", 640), ("ours, 100 nodes", 100)):
        with server(latency, failure_rate) as url:
            arguments = {"workers": 32}
            setting[name] = measure(sys.executable, "ft_core.generation", url, count, arguments)
            setting[name]["server"] = stats(url)
    if predecessor:
        with server(latency, failure_rate) as url:
            module = "llama_index.finetuning.embeddings.common"
            setting["predecessor, 100 nodes"] = measure(predecessor, module, url, 100, {})
            setting["predecessor, 100 nodes"]["server"] = stats(url)
        theirs = setting["predecessor, 100 nodes"]["seconds a node"]
        for name in ("ours, 640 nodes", "ours, 100 nodes"):
            setting[name]["times faster"] = theirs / setting[name]["seconds a node"]
    return setting


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--predecessor-python", help="the interpreter of its environment")
    parser.add_argument("--latency", type=float, default=0.2, help="seconds an answer takes")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    settings = [run(options.predecessor_python, rate, options.latency) for rate in (0.0, 0.2)]
    if options.json:
        print(json.dumps(settings, indent=2))
        return
    for setting in settings:
        print(f"{setting.pop('failure rate'):.0%} of the calls fail")
        for name, result in setting.items():
            faster = f", {result['times faster']:.1f} x" if "times faster" in result else ""
            print(
                f"  {name}: {result['seconds']:.2f} s, {1000 * result['seconds a node']:.1f} ms "
                f"a node, {result['lost']} lost, {result['server']['calls']} calls{faster}"
            )


if __name__ == "__main__":
    main()
