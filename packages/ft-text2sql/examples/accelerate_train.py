"""Train on several GPUs of one machine; the same script trains on one GPU or on a CPU.

    accelerate launch --multi_gpu --num_processes 4 accelerate_train.py train.jsonl \\
        --base-model Qwen/Qwen2.5-Coder-1.5B-Instruct --database sqlite:///shop.db --output sql

Each process trains on its share of every step's examples, one of them saves the folder, and
the run is the same as with one process but for the time it takes: `--batch-size` counts the
examples of all processes together. The same command goes on with a run that was killed.

Without GPUs, `accelerate launch` asks for MPI; PyTorch's own launcher does not:

    ACCELERATE_USE_CPU=true python -m torch.distributed.run --standalone --nproc-per-node 2 \\
        accelerate_train.py train.jsonl --base-model ... --output sql --device cpu
"""

from __future__ import annotations

import argparse
import os

from ft_text2sql import Text2SQLFinetuneEngine


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", help="questions with SQL, JSON Lines")
    parser.add_argument("--validation", help="held-out questions; the best checkpoint is kept")
    parser.add_argument("--base-model", required=True, help="hub name or folder")
    parser.add_argument("--output", default="sql", help="folder of the result")
    parser.add_argument("--database", help="URL of the database, where the data has no schemas")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8, help="of all processes together")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--device", help="cpu, cuda or mps; the best by default")
    options = parser.parse_args()

    engine = Text2SQLFinetuneEngine(
        options.train,
        options.base_model,
        options.output,
        val_data=options.validation,
        database=options.database,
        device=options.device,
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
    )
    job = engine.finetune()
    if os.environ.get("RANK", "0") == "0":  # the others have nothing to add
        print(f"{job.status.value}: {engine.output_dir}")


if __name__ == "__main__":
    main()
