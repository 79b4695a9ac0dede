"""Reranking what all-MiniLM-L6-v2 retrieves from a filing: ours, the predecessor's, and neither.

    uv run python tools/bench/reranking.py --data ../shared/data \\
        [--predecessor-python predecessor/bin/python] [--limit 790] [--json]

DIR/finance-qa holds `train.json` (Lyft's 10-K of 2021) and `val.json` (Uber's), embedding QA
datasets. The retriever's top 20 are reranked by a cross-encoder that is trained on Lyft's
questions, from the retriever's own weights with a fresh head, and tested on Uber's. Both engines
train at their defaults on the same samples: of each question its relevant chunk and three mined
ones. Each trains in a process of its own, one after the other.

Besides, two rows that train nothing: the retriever's own order, and the retriever's model
reading passages of the chunks, the best of which counts (the chunks are longer than its window).

The predecessor needs an environment of its own:

    uv venv -p 3.11 predecessor
    uv pip install -p predecessor llama-index-finetuning 'mistralai<2' 'transformers<5' \\
        'sentence-transformers<5.3' accelerate datasets
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from model_assets import minilm

from ft_core.datasets import EmbeddingQAFinetuneDataset, RerankDataset
from ft_core.evaluation import Evaluation, compare, evaluate_reranker
from ft_core.mining import mine_hard_negatives, retrieve_candidates
from ft_crossencoder import CrossEncoderFinetuneEngine, FinetunedReranker
from ft_crossencoder.choosing import Embedded, Passages
from ft_crossencoder.encoder import EncoderEmbedding

METRICS = ("ndcg@10", "mrr@10", "hit_rate@1")
MINED = 3
TOP_K = 20
SEED = 42
PREDECESSOR = Path(__file__).parent / "predecessor_reranker.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with finance-qa/")
    parser.add_argument("--predecessor-python", help="interpreter that has llama-index-finetuning")
    parser.add_argument("--model", default=minilm(), help="hub name or folder of the base")
    parser.add_argument("--limit", type=int, help="test questions; all by default")
    parser.add_argument("--keep", type=Path, help="folder to leave the models in")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    lyft, uber = (
        EmbeddingQAFinetuneDataset.load(options.data / "finance-qa" / f"{name}.json")
        for name in ("train", "val")
    )
    if options.limit:
        uber = uber.select(list(uber.queries)[: options.limit])
    embedding = EncoderEmbedding(options.model)
    train = samples(lyft, embedding)
    test = RerankDataset.from_embedding_qa(
        uber, retrieve_candidates(uber, embedding, top_k=TOP_K), negatives="all"
    )
    base = evaluate_reranker(None, test)
    rows = [row(base, base), row(base, by_passages(test, embedding))]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        for name, (train_one, reading) in runs(options).items():
            seconds = train_one(train, folder / name)
            reranker = reading(folder / name)
            rows.append(row(base, evaluate_reranker(reranker, test, name=name), seconds))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        print_table(rows)


def samples(lyft: EmbeddingQAFinetuneDataset, embedding: EncoderEmbedding) -> RerankDataset:
    """Return each question's candidates, with labels for the relevant one and the mined ones."""
    mined = mine_hard_negatives(
        lyft,
        embedding,
        num_negatives=MINED,
        range_max=TOP_K,
        relative_margin=None,
        sampling_strategy="random",
        seed=SEED,
    )
    found = retrieve_candidates(lyft, embedding, top_k=TOP_K)
    return RerankDataset.from_embedding_qa(lyft, found, negatives=mined)


def by_passages(test: RerankDataset, embedding: EncoderEmbedding) -> Evaluation:
    """Rerank with the retriever's own model, reading the chunks whole in passages."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedding.model_name)
    passages = Passages(test, tokenizer, 100)
    vectors = Embedded(test, passages.distinct(), embedding, show_progress=False)

    def score(query: str, texts: list[str]) -> list[float]:
        return [float(vectors.scores(query, passages.of[text]).max()) for text in texts]

    return evaluate_reranker(score, test, name="retriever's model by passages")


Train = Callable[[RerankDataset, Path], float]
Load = Callable[[Path], FinetunedReranker]


def runs(options: argparse.Namespace) -> dict[str, tuple[Train, Load]]:
    """Return name to (a function that trains and returns its seconds, one that loads)."""
    found: dict[str, tuple[Train, Load]] = {}
    if options.predecessor_python:

        def predecessor(train: RerankDataset, output: Path) -> float:
            rows = [
                (example.query, document.text, document.label)
                for example in train
                for document in example.documents
                if document.label is not None
            ]
            data = output.with_suffix(".json")
            data.write_text(json.dumps(rows))
            command = [options.predecessor_python, str(PREDECESSOR), data, options.model, output]
            return seconds_of(command, output.parent)

        # What LlamaIndex's SentenceTransformerRerank reads of a node.
        found["predecessor"] = (
            predecessor,
            lambda folder: FinetunedReranker(str(folder), max_length=512, precision="bf16"),
        )

    def ours(train: RerankDataset, output: Path) -> float:
        data = output.with_suffix(".jsonl")
        train.save(data)
        command = [sys.executable, __file__, "--worker", data, options.model, output]
        return seconds_of(command, output.parent)

    found["ours"] = (ours, lambda folder: FinetunedReranker.load(folder, precision="bf16"))
    return found


def seconds_of(command: list[Any], folder: Path) -> float:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=folder)
    return float(done.stdout.split("seconds:")[1])


def work(data: str, model: str, output: str) -> None:
    """Train once with ours and print the seconds that `finetune()` took."""
    engine = CrossEncoderFinetuneEngine(
        data, model_id=model, model_output_path=output, negatives=MINED
    )
    start = time.perf_counter()
    engine.finetune()
    print(f"seconds: {time.perf_counter() - start}")


def row(base: Evaluation, run: Evaluation, seconds: float | None = None) -> dict[str, Any]:
    test = compare(base, run, "ndcg@10")
    pairs = len(run.values("ndcg@10")) * TOP_K
    return {
        "run": run.name,
        "training_seconds": seconds,
        "pairs_per_second": pairs / run.seconds if seconds else None,
        "metrics": {metric: run.mean(metric) for metric in METRICS},
        "gain": {"value": test.difference, "low": test.low, "high": test.high, "p": test.p_value},
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    header = "".join(f"{metric:>12}" for metric in METRICS)
    print(f"{'run':30}{header}   nDCG@10 gain (95 %)             p   train s   pairs/s")
    for each in rows:
        gain, seconds = each["gain"], each["training_seconds"]
        figures = "".join(f"{each['metrics'][metric]:12.4f}" for metric in METRICS)
        change = f"{gain['value']:+.4f} ({gain['low']:+.4f} to {gain['high']:+.4f})"
        speed = f"{seconds:10.0f}{each['pairs_per_second']:10.1f}" if seconds else ""
        print(f"{each['run']:30}{figures}   {change:26}{gain['p']:8.4f}{speed}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
    else:
        main()
