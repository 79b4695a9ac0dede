"""Train on a GPU at Modal (https://modal.com), and take the model home.

    pip install modal
    modal setup
    modal run modal_train.py --data train.jsonl --base-model Qwen/Qwen2.5-Coder-1.5B-Instruct
    modal volume get ft-text2sql shop/sql .

Uploads the questions to a volume, trains beside them, and leaves the model there; the last
line fetches it. Then it is used where the database is, and nothing of Modal is needed:

    Text2SQLFinetuneEngine.load("sql").get_query_engine("sqlite:///shop.db")

The database stays at home, too: each example must hold its schema in `context`, as those of
sql-create-context, of Spider, of a live app's journal and of `generate_text2sql_dataset` do.

The checkpoints lie on the volume. Where Modal takes the container away or the time is up, the
function starts again and goes on with the last one; so does the same command after a failure.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import modal

GPU = "L40S"  # or "T4", "A100-80GB", "H100"
HOURS = 4
RUNS = "/runs"
HUB = "/hub"

app = modal.App("ft-text2sql")
image = (
    modal.Image.debian_slim(python_version="3.12")
    .uv_pip_install("ft-text2sql[local]")
    .env({"HF_HOME": HUB})
)
runs = modal.Volume.from_name("ft-text2sql", create_if_missing=True)
hub = modal.Volume.from_name("ft-text2sql-hub", create_if_missing=True)  # base models


def train(folder: Path, base_model: str, settings: dict[str, Any]) -> dict[str, float]:
    """Train on `train.jsonl` of the folder, write its `sql`, and return the last losses.

    A `validation.jsonl` beside it chooses the checkpoint. `settings` are arguments of
    `Text2SQLFinetuneEngine`. What it imports is in the image, and need not be at home.
    """
    from ft_text2sql import Text2SQLFinetuneEngine

    validation = folder / "validation.jsonl"
    engine = Text2SQLFinetuneEngine(
        folder / "train.jsonl",
        base_model,
        folder / "sql",
        val_data=validation if validation.exists() else None,
        **settings,
    )
    metrics: dict[str, float] = engine.finetune().raw.metrics
    return metrics


@app.function(
    image=image,
    gpu=GPU,
    timeout=HOURS * 60 * 60,
    volumes={RUNS: runs, HUB: hub},
    retries=modal.Retries(max_retries=3),
)
def train_on_gpu(run: str, base_model: str, settings: dict[str, Any]) -> dict[str, float]:
    """Train one run of the volume."""
    try:
        return train(Path(RUNS) / run, base_model, settings)
    finally:
        runs.commit()  # the checkpoints, where it fails


@app.local_entrypoint()
def main(
    data: str,
    base_model: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
    validation: str = "",
    run: str = "shop",
    epochs: int = 3,
    learning_rate: float = 5e-4,
) -> None:
    """Upload the questions, train, and say how to fetch the model.

    A run with other data or settings needs another name.
    """
    with runs.batch_upload(force=True) as batch:
        batch.put_file(data, f"/{run}/train.jsonl")
        if validation:
            batch.put_file(validation, f"/{run}/validation.jsonl")
    settings = {"epochs": epochs, "learning_rate": learning_rate}
    for name, value in train_on_gpu.remote(run, base_model, settings).items():
        print(f"{name:<18}{value:.4f}")
    print(f"modal volume get ft-text2sql {run}/sql .")
