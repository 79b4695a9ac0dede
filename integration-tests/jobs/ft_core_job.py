"""What ft-core does with no extra installed; `test_packaging.py` runs it in such an environment."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

import ft_core
from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.datasets.duplicates import near_duplicates
from ft_core.errors import DatasetError, FTError, MissingExtraError
from ft_core.evaluation import evaluate_vectors
from ft_core.metrics import score_run
from ft_core.mining import mine_hard_negatives
from ft_core.report import Report
from ft_core.splits import split_by_document

FACTS = {
    "kiln": "The tunnel kiln fires stoneware at 1,240 degrees for nine hours.",
    "glaze": "Celadon glaze holds two per cent of iron and wants a reducing flame.",
    "clay": "Ball clay shrinks by an eighth while it dries, so plates are thrown larger.",
    "wheel": "The wheel turns counter-clockwise in Europe and clockwise in Japan.",
    "slip": "Slip is clay thinned with water until it pours like cream.",
    "cone": "A pyrometric cone bends when the ware has had enough heat.",
}
QUESTIONS = {
    "kiln": "How long does stoneware stay in the tunnel kiln?",
    "glaze": "Which flame does celadon need?",
    "clay": "Why are plates thrown larger than they end up?",
    "wheel": "Which way do Japanese potters spin?",
    "slip": "What do you get from clay with much water?",
    "cone": "What shows that the heat was enough?",
}


def main() -> None:
    for module in pkgutil.walk_packages(ft_core.__path__, "ft_core."):
        # No other needs an extra to be imported.
        if module.name not in ("ft_core.sft.trainer", "ft_core.sft.training"):
            importlib.import_module(module.name)

    path = Path("pottery.json")
    write(path, relevant="kiln")
    dataset = EmbeddingQAFinetuneDataset.load(path)
    write(Path("broken.json"), relevant="oven")
    message = error_of(DatasetError, lambda: EmbeddingQAFinetuneDataset.load("broken.json"))
    assert "broken.json" in message, message
    assert "oven" in message, message

    parts = split_by_document(dataset, {"train": 0.5, "test": 0.5})
    corpora = [set(part.corpus) for part in parts.values()]
    assert len(corpora) == 2, corpora
    assert all(corpora), corpora
    assert corpora[0].isdisjoint(corpora[1]), corpora
    assert corpora[0] | corpora[1] == set(FACTS), corpora

    typo = {**dataset.queries, "typo": "Which flame does a celadon need?"}
    assert near_duplicates(typo) == [["q-glaze", "typo"]], near_duplicates(typo)

    scores = score_run({"q": {"a": 1}}, {"q": {"b": 2.0, "a": 1.0}}, ["mrr@10", "hit_rate@1"])
    assert scores == {"mrr@10": {"q": 0.5}, "hit_rate@1": {"q": 0.0}}, scores

    mined = mine_hard_negatives(dataset, "bm25", num_negatives=2, show_progress=False)
    assert all(key not in mined[f"q-{key}"] for key in FACTS), mined

    report = compare(dataset)
    assert report.to_dict()
    message = error_of(MissingExtraError, lambda: report.save_html("report.html"))
    assert "pip install 'ft-core[report]'" in message, message
    assert not Path("report.html").exists()

    ft = Path(sys.executable).with_name("ft")
    help_page = subprocess.run([ft, "--help"], check=True, capture_output=True, text=True).stdout
    assert "dataset" in help_page, help_page
    assert "pip install ft-embeddings" in help_page, help_page
    stats = [ft, "dataset", "stats", path, "--json"]
    answer = json.loads(subprocess.run(stats, check=True, capture_output=True).stdout)
    assert answer["queries"] == len(FACTS), answer


def write(path: Path, *, relevant: str) -> None:
    """Write the predecessor's JSON; `relevant` answers the question about the kiln."""
    content = {
        "queries": {f"q-{key}": text for key, text in QUESTIONS.items()},
        "corpus": FACTS,
        "relevant_docs": {f"q-{key}": [key] for key in FACTS} | {"q-kiln": [relevant]},
    }
    path.write_text(json.dumps(content), encoding="utf-8")


def error_of(kind: type[FTError], action: Callable[[], object]) -> str:
    """Return the message of the error that the action must end in."""
    try:
        action()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def compare(dataset: EmbeddingQAFinetuneDataset) -> Report:
    """Evaluate vectors that are right against vectors that are random."""
    right = np.eye(len(FACTS), dtype=np.float32)
    random = np.random.default_rng(0).normal(size=right.shape)
    runs = [
        evaluate_vectors(random, right, dataset, name="random"),
        evaluate_vectors(right, right, dataset, name="right"),
    ]
    assert runs[1].mean("ndcg@10") == 1.0, runs[1].scores
    assert runs[0].mean("ndcg@10") < 1.0, runs[0].scores
    return Report(runs, dataset)


if __name__ == "__main__":
    main()
