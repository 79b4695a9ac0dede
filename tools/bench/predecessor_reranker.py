"""Train with `llama_index.finetuning`'s cross-encoder engine, for reranking.py to compare with.

Runs in an environment of its own, because the package no longer imports beside today's
libraries (see reranking.py). SAMPLES is a JSON list of [query, text, score]. Writes the model
to OUTPUT and prints the seconds that its `finetune()` took.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from llama_index.finetuning.cross_encoders import CrossEncoderFinetuneEngine
from llama_index.finetuning.cross_encoders.dataset_gen import CrossEncoderFinetuningDatasetSample


def main() -> None:
    data, model, output = sys.argv[1:]
    samples = [
        CrossEncoderFinetuningDatasetSample(query=query, context=text, score=score)
        for query, text, score in json.loads(Path(data).read_text())
    ]
    # Without a validation set it raises; it evaluates every 50 steps, and keeps the model
    # that is best there, so that this must be a real one: every tenth sample.
    engine = CrossEncoderFinetuneEngine(
        samples, model_id=model, model_output_path=output, val_dataset=samples[::10]
    )
    start = time.perf_counter()
    engine.finetune()
    print(f"seconds: {time.perf_counter() - start}")


if __name__ == "__main__":
    main()
