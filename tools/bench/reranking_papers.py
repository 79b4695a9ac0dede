"""Reranking the chunks of scientific papers: the test of LlamaIndex's guide, cross-validated.

    uv run python tools/bench/reranking_papers.py --data ../shared/data [--folds 5] [--json]

DIR/qasper holds `reranking_test.csv`: 38 papers with 85 questions, each with the passage that
answers it. Papers are cut into chunks of 256 tokens, all-MiniLM-L6-v2 retrieves 8 of a paper for
each of its questions, and a reranker keeps 3. A hit is a chunk among the 3 that shares at least
half of itself, or of the passage, with the passage.

A cross-encoder from the retriever's own weights is trained at its defaults for each fold of
papers on the questions about the others, never on one about a paper of the fold.
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core.node_parser import SentenceSplitter

sys.path.insert(0, str(Path(__file__).parents[1]))
from model_assets import minilm

from ft_core.datasets import RerankDataset, RerankDocument, RerankExample
from ft_core.datasets.rerank import is_visible, merge_repeats
from ft_core.generation.sentences import split_sentences
from ft_core.metrics import paired_randomisation_test
from ft_crossencoder import CrossEncoderFinetuneEngine
from ft_crossencoder.encoder import EncoderEmbedding

RETRIEVED, KEPT = 8, 3
SEED = 42


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with qasper/")
    parser.add_argument("--model", default=minilm(), help="hub name or folder of the base")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    papers = list(read_papers(options.data / "qasper" / "reranking_test.csv"))
    embedding = EncoderEmbedding(options.model)
    examples = {number: list(candidates(paper, embedding)) for number, paper in enumerate(papers)}
    order = list(examples)
    random.Random(SEED).shuffle(order)
    before: list[bool] = []
    after: list[bool] = []
    possible = seconds = 0.0
    for fold in range(options.folds):
        held_out = set(order[fold :: options.folds])
        train = [e for number in order if number not in held_out for e in examples[number]]
        test = [e for number in order if number in held_out for e in examples[number]]
        with tempfile.TemporaryDirectory() as folder:
            engine = CrossEncoderFinetuneEngine(
                RerankDataset(examples=train), options.model, f"{folder}/reranker"
            )
            start = time.perf_counter()
            engine.finetune()
            seconds += time.perf_counter() - start
            reranker = engine.get_reranker(top_n=None)
            for example in test:
                found = example.candidates
                before.append(is_hit(found[:KEPT]))
                after.append(is_hit(reranked(reranker, example)[:KEPT]))
                possible += is_hit(found)
        # One paper is empty: its question is missed.
        missed = sum(len(papers[number][1]) - len(examples[number]) for number in held_out)
        before += [False] * missed
        after += [False] * missed
        note(f"fold {fold + 1}: {sum(before)} hits before, {sum(after)} after, {len(after)} asked")
    test_of = paired_randomisation_test(np.array(before, float), np.array(after, float))
    result = {
        "questions": len(before),
        "hits in the 8 retrieved": int(possible),
        "hits without reranker": sum(before),
        "hits reranked": sum(after),
        "difference": test_of.difference,
        "low": test_of.low,
        "high": test_of.high,
        "p": test_of.p_value,
        "training seconds": seconds,
    }
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result.items():
        print(f"{name:25} {value:.4f}" if isinstance(value, float) else f"{name:25} {value}")


def read_papers(path: Path) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield each paper's text with its questions and the passages that answer them."""
    csv.field_size_limit(sys.maxsize)
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            questions, passages = (ast.literal_eval(row[name]) for name in ("questions", "context"))
            yield row["paper"], list(zip(questions, passages, strict=True))


def candidates(
    paper: tuple[str, list[tuple[str, str]]], embedding: EncoderEmbedding
) -> Iterator[RerankExample]:
    """Yield each question with the paper's retrieved chunks, and those that answer it."""
    text, asked = paper
    splitter = SentenceSplitter(
        chunk_size=256, chunk_overlap=20, chunking_tokenizer_fn=split_sentences
    )
    chunks = [chunk for chunk in dict.fromkeys(splitter.split_text(text)) if is_visible(chunk)]
    if not chunks:
        return
    vectors = np.array(embedding.get_text_embedding_batch(chunks))
    for question, passage in asked:
        scores = vectors @ np.array(embedding.get_query_embedding(question))
        ranked = [int(place) for place in np.argsort(-scores, kind="stable")]
        documents = [
            RerankDocument(
                text=chunks[place],
                label=float(overlaps(chunks[place], passage, text)),
                retrieval_score=float(scores[place]),
                retrieved=rank < RETRIEVED,
            )
            for rank, place in enumerate(ranked)
            if rank < RETRIEVED or overlaps(chunks[place], passage, text)
        ]
        yield RerankExample(query=question, documents=merge_repeats(documents))


def overlaps(chunk: str, passage: str, paper: str) -> bool:
    """Say whether half of the chunk is of the passage, or half of the passage in the chunk."""
    spans = []
    for part in (chunk, passage):
        start = paper.find(part)
        if start < 0:
            return chunk in passage or passage in chunk
        spans.append((start, start + len(part)))
    shared = min(end for _, end in spans) - max(start for start, _ in spans)
    return shared >= min(len(chunk), len(passage)) / 2


def is_hit(documents: list[RerankDocument]) -> bool:
    return any(document.label for document in documents)


def reranked(reranker: Any, example: RerankExample) -> list[RerankDocument]:
    from llama_index.core.schema import NodeWithScore, TextNode

    nodes = [
        NodeWithScore(node=TextNode(id_=str(place), text=d.text), score=d.retrieval_score)
        for place, d in enumerate(example.candidates)
    ]
    ranked = reranker.postprocess_nodes(nodes, query_str=example.query)
    return [example.candidates[int(node.node.node_id)] for node in ranked]


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
