"""Train with `llama_index.finetuning`, for finance_qa.py to compare with.

Runs in an environment of its own, because the package no longer imports beside today's
libraries (see finance_qa.py). Writes the model to OUTPUT and prints the seconds that its
`finetune()` took.
"""

from __future__ import annotations

import sys
import time

from llama_index.finetuning import EmbeddingQAFinetuneDataset, SentenceTransformersFinetuneEngine


def main() -> None:
    data, model, output = sys.argv[1:]
    train = EmbeddingQAFinetuneDataset.from_json(data)
    # Without a validation set it raises; two queries cost next to nothing.
    queries = dict(list(train.queries.items())[:2])
    relevant = {query: train.relevant_docs[query] for query in queries}
    documents = {document for found in relevant.values() for document in found}
    tiny = EmbeddingQAFinetuneDataset(
        queries=queries,
        corpus={document: train.corpus[document] for document in documents},
        relevant_docs=relevant,
    )
    engine = SentenceTransformersFinetuneEngine(
        train, model_id=model, model_output_path=output, val_dataset=tiny
    )
    start = time.perf_counter()
    engine.finetune()
    print(f"seconds: {time.perf_counter() - start}")


if __name__ == "__main__":
    main()
