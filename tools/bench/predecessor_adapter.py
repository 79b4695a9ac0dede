"""Train an adapter with `llama_index.finetuning`, for adapter.py to compare with.

Runs in an environment of its own (see finance_qa.py, and add
`llama-index-embeddings-huggingface`). Uses the settings of the predecessor's notebook: four
epochs, with bias. Writes the adapter to OUTPUT and prints the seconds of its `finetune()`.
"""

from __future__ import annotations

import sys
import time

from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from llama_index.finetuning import EmbeddingAdapterFinetuneEngine, EmbeddingQAFinetuneDataset


def main() -> None:
    data, model, output = sys.argv[1:]
    engine = EmbeddingAdapterFinetuneEngine(
        EmbeddingQAFinetuneDataset.from_json(data),
        HuggingFaceEmbedding(model_name=model),
        model_output_path=output,
        bias=True,
        epochs=4,
    )
    start = time.perf_counter()
    engine.finetune()
    print(f"seconds: {time.perf_counter() - start}")


if __name__ == "__main__":
    main()
