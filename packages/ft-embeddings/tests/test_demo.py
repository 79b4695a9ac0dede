from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import model_assets
import pytest

from ft_core.datasets.duplicates import exact_duplicates, near_duplicates
from ft_embeddings.demo import corpus


def test_the_corpus_is_as_large_as_it_says_and_leaks_nothing() -> None:
    train, heldout = corpus.training(), corpus.heldout()
    assert train.corpus == heldout.corpus
    assert (len(train.corpus), len(train.queries), len(heldout.queries)) == (180, 540, 180)
    assert {len(train.relevant_docs[q]) for q in train.queries} == {1}
    assert not near_duplicates(train.corpus)
    both = {**train.queries, **heldout.queries}
    assert len(both) == 720  # the ids of the two do not collide
    assert not exact_duplicates(both)
    for group in near_duplicates(both):
        # Two training questions may resemble each other; one on each side would be a leak.
        assert len({key in train.queries for key in group}) == 1, [both[key] for key in group]


@pytest.fixture(scope="module")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    texts = [*corpus.passages().values(), *corpus.training().queries.values()]
    return model_assets.tiny_sentence_transformer(Path(tmp_path_factory.mktemp("demo")), texts)


@pytest.mark.slow
def test_the_demo_runs_to_its_end(demo_model: str, tmp_path: Path) -> None:
    """With a tiny model: what MiniLM gains is `tools/bench/demo.py`'s to show."""
    output = tmp_path / "demo"
    command = [Path(sys.executable).with_name("ft"), "demo", "--json", "--model", demo_model]
    done = subprocess.run(
        [*command, "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["question"] in corpus.heldout().queries.values()
    assert {shown["before"], shown["after"], shown["right"]} <= set(corpus.passages().values())
    assert {run["name"] for run in shown["report"]["runs"]} == {"base", "tuned"}
    for name in ("train.json", "heldout.json", "report.html", "report.json", "model/ft.json"):
        assert (output / name).exists(), name
    assert "4/4" in done.stderr
    assert "Traceback" not in done.stderr
