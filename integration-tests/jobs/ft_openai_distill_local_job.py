"""Train a student; `test_packaging.py` runs this where ft-openai-distill[local] is installed.

The argument is the folder tools/, for the tiny language model of `model_assets`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from llama_index.core.llms import MockLLM

from ft_openai_distill import LocalFinetuneEngine, LocalLLM, OpenAIFineTuningHandler

TOWNS = ["Arlow", "Brennick", "Cawdry", "Dunmere", "Esk", "Farleigh", "Gorse", "Hexwood"]


def main(tools: str) -> None:
    handler = OpenAIFineTuningHandler("teacher.jsonl")
    teacher = MockLLM()  # repeats what it is asked
    with handler.attach(teacher):
        for town in TOWNS:
            teacher.complete(f"The {town} ferry leaves at dawn.")
    parts = handler.to_dataset(split={"train": 0.7, "validation": 0.3})

    sys.path.append(tools)
    import model_assets

    tiny = model_assets.tiny_causal_lm(Path("tiny"), [e.answer() for e in handler.to_dataset()])
    engine = LocalFinetuneEngine(
        tiny,
        parts["train"],
        val_data=parts["validation"],
        output_dir="student",
        epochs=4,
        learning_rate=1e-2,
        device="cpu",
    )
    job = engine.finetune()
    assert job.raw.metrics["validation_loss"] < job.raw.metrics["base_loss"], job.raw.metrics

    question = "The Esk ferry leaves at dawn."
    answer = engine.get_finetuned_model(max_new_tokens=8).complete(question).text
    ft = Path(sys.executable).with_name("ft")
    merge = [ft, "distill", "merge", "student", "merged", "--json"]
    merged = json.loads(subprocess.run(merge, check=True, capture_output=True).stdout)["model"]
    assert not Path(merged, "adapter_config.json").exists()
    same = LocalLLM.from_pretrained(merged, device="cpu", max_new_tokens=8).complete(question).text
    assert same == answer, (same, answer)


if __name__ == "__main__":
    main(sys.argv[1])
