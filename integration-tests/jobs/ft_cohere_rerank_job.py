"""What ft-cohere-rerank does alone; `test_packaging.py` runs it where nothing else is installed.

There is no torch there. A server of a few lines speaks Cohere's rerank call, so that the real
client scores candidates and reranks in an app, which is recorded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.cohere_rerank import CohereRerank

from ft_cohere_rerank import (
    CohereRerankerFile,
    CohereRerankerFinetuneEngine,
    CohereRerankHandler,
    CohereRerankTeacher,
    RerankDataset,
    generate_cohere_reranker_finetuning_dataset,
)
from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.errors import ArgumentError, DatasetError, FTError

TOWNS = ["Arlow", "Brennick", "Cawdry", "Dunmere", "Esk", "Farleigh", "Gorse", "Hexwood"]


class Reranker(BaseHTTPRequestHandler):
    """Scores by the words that query and document share."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        given = json.loads(self.rfile.read(int(self.headers["content-length"])))
        asked = set(given["query"].split())
        scores = [len(asked & set(text.split())) / len(asked) for text in given["documents"]]
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[: given["top_n"]]
        results = [{"index": index, "relevance_score": scores[index]} for index in order]
        answer = json.dumps({"id": "1", "results": results}).encode()
        self.send_response(200 if self.path == "/v2/rerank" else 404)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *arguments: object) -> None:
        """Stay silent."""


@contextmanager
def reranking_server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Reranker)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def main() -> None:
    questions = EmbeddingQAFinetuneDataset(
        queries={f"q-{town}": f"when leaves the {town} ferry" for town in TOWNS},
        corpus={town: f"the {town} ferry leaves at dawn" for town in TOWNS},
        relevant_docs={f"q-{town}": [town] for town in TOWNS},
    )
    questions.save("train.json")
    export(questions)
    with reranking_server() as url:
        score(url)
        record(url)
    refuse()
    heavy = {"torch", "transformers", "sentence_transformers"} & set(sys.modules)
    assert not heavy, heavy


def export(questions: EmbeddingQAFinetuneDataset) -> None:
    """Write Cohere's training file, from Python and by the command."""
    file = generate_cohere_reranker_finetuning_dataset(
        questions, 2, hard_negatives_gen_method="bm25", relative_margin=None, show_progress=False
    )
    assert all(len(entry.hard_negatives) == 2 for entry in file), file
    command = ("export", "train.json", "--output", "random.jsonl", "--no-check-limits", "--json")
    assert ft_cohere(*command)["queries"] == len(TOWNS)
    assert len(CohereRerankerFile.load("random.jsonl")) == len(TOWNS)


def score(url: str) -> None:
    """Let the teacher score what the command retrieves."""
    command = ("score", "train.json", "--output", "scored.jsonl", "--top-k", "3", "--base-url", url)
    found = ft_cohere(*command, "--yes", "--json")
    assert found["with a teacher score"] == 3 * len(TOWNS), found
    scored = RerankDataset.load("scored.jsonl")
    for town, example in zip(TOWNS, scored, strict=True):
        best = max(example.documents, key=lambda document: document.teacher_score or 0)
        assert best.id == town, example


def record(url: str) -> None:
    """Record a reranker, and let the teacher fill in what Cohere did not tell."""
    reranker = CohereRerank(top_n=1, model="student", api_key="none", base_url=url)
    nodes = [
        NodeWithScore(node=TextNode(id_=town, text=f"the {town} ferry"), score=0.5)
        for town in TOWNS
    ]
    handler = CohereRerankHandler("reranks.jsonl")
    with handler.attach(reranker):
        (kept,) = reranker.postprocess_nodes(nodes, query_str="when leaves the Esk ferry")
    assert kept.node.node_id == "Esk", kept
    recorded = handler.to_dataset()
    assert [d.id for d in recorded.examples[0].documents if d.teacher_score] == ["Esk"], recorded
    teacher = CohereRerankTeacher(base_url=url, show_progress=False)
    (example,) = teacher.score(recorded, "recorded-scored.jsonl")
    assert all(d.teacher_score is not None for d in example.documents), example


def refuse() -> None:
    """Say what is missing before anything is sent."""
    os.environ.pop("COHERE_API_KEY", None)
    os.environ.pop("CO_API_KEY", None)
    message = error_of(ArgumentError, CohereRerankerFinetuneEngine("train.jsonl").finetune)
    assert "COHERE_API_KEY" in message, message
    file = CohereRerankerFile.load("train.jsonl")
    message = error_of(DatasetError, file.check_limits)
    assert f"add {256 - len(TOWNS)}" in message, message


def error_of(kind: type[FTError], action: Callable[[], object]) -> str:
    """Return the message of the error that the action must end in."""
    try:
        action()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def ft_cohere(*arguments: str) -> dict[str, object]:
    command = [Path(sys.executable).with_name("ft"), "cohere", *arguments]
    ran = subprocess.run(command, check=True, capture_output=True)
    answer: dict[str, object] = json.loads(ran.stdout)
    return answer


if __name__ == "__main__":
    main()
