"""The pack's commands: `ft demo`, `ft embeddings train` and `ft embeddings eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ft_core.console import JsonOption, check_html, note, show, show_trained
from ft_core.options import (
    EpochsOption,
    LearningRateOption,
    LoraOption,
    LossOption,
    ReportOption,
    ResumeOption,
    SeedOption,
)

demo = typer.Typer(
    help="Fine-tune an embedding model on a small corpus and prove the gain, start to finish."
)
embeddings = typer.Typer(help="Train and evaluate embedding models.", no_args_is_help=True)

ModelOption = Annotated[
    str | None, typer.Option("--model", help="Hub name or folder of the base model.")
]


@demo.command()
def run_demo(
    output: Annotated[Path, typer.Option(help="Folder for data, model and report.")] = Path(
        "ft-demo"
    ),
    model: ModelOption = None,
    seed: Annotated[int, typer.Option(help="Seed of training.")] = 42,
    json: JsonOption = False,
) -> None:
    """Build a dataset, fine-tune an embedding model, prove the gain, answer through the result."""
    from rich.console import Group
    from rich.text import Text

    from ft_embeddings.demo import story

    outcome = story.run(output, model_id=model, seed=seed, say=note)
    answer = outcome.answer
    document = {
        "report": outcome.report.to_dict(),
        "question": answer.question,
        "before": answer.before,
        "after": answer.after,
        "right": answer.right,
        "model": outcome.model,
        "html": outcome.html,
        "training_seconds": outcome.training_seconds,
    }
    lines = [
        "",
        f"Q: {answer.question}",
        f"base first finds:  {_first_line(answer.before)}{_mark(answer.before == answer.right)}",
        f"tuned first finds: {_first_line(answer.after)}{_mark(answer.after == answer.right)}",
        "",
        f"trained in {outcome.training_seconds:.0f} s",
        f"model:  {outcome.model}",
        f"report: {outcome.html}",
        "",
        "In your app:",
        "    from ft_embeddings import SentenceTransformersFinetuneEngine",
        f'    engine = SentenceTransformersFinetuneEngine.load("{outcome.model}")',
        "    index = VectorStoreIndex(nodes, embed_model=engine.get_finetuned_model())",
    ]
    show(document, Group(outcome.report, Text("\n".join(lines))), json=json)


@embeddings.command()
def train(
    dataset: Annotated[
        Path, typer.Argument(help="JSON of questions, passages and which answers which.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the trained model.")],
    model: Annotated[str, typer.Option(help="Hub name or folder of the base model.")],
    validation: Annotated[
        Path | None, typer.Option(help="Held-out JSON: reports base against tuned.")
    ] = None,
    preset: Annotated[str, typer.Option(help="default or fast.")] = "default",
    epochs: EpochsOption = None,
    batch_size: Annotated[int | None, typer.Option(help="Documents per batch.")] = None,
    learning_rate: LearningRateOption = None,
    loss: LossOption = None,
    lora: LoraOption = False,
    negatives: Annotated[int, typer.Option(help="Hard negatives to mine per query.")] = 0,
    seed: SeedOption = None,
    resume: ResumeOption = False,
    html: ReportOption = None,
    json: JsonOption = False,
) -> None:
    """Fine-tune MODEL on DATASET and save it to OUTPUT."""
    from ft_embeddings.engine import SentenceTransformersFinetuneEngine

    check_html(html, validation)
    engine = SentenceTransformersFinetuneEngine(
        dataset,
        model_id=model,
        model_output_path=str(output),
        batch_size=batch_size,
        val_dataset=validation,
        loss=loss,
        epochs=epochs,
        resume_from_checkpoint=resume,
        preset=preset,
        learning_rate=learning_rate,
        seed=seed,
        lora=lora,
        negatives=negatives,
    )
    show_trained(output, engine.finetune(), html=html, json=json)


@embeddings.command(name="eval")
def evaluate(
    dataset: Annotated[Path, typer.Argument(help="JSON to score on.")],
    models: Annotated[
        list[str], typer.Option("--model", help="Hub name or folder; the first is the baseline.")
    ],
    html: Annotated[Path | None, typer.Option(help="Write the report as a page.")] = None,
    json: JsonOption = False,
) -> None:
    """Score one or more models on DATASET and compare them."""
    from ft_core.datasets import EmbeddingQAFinetuneDataset
    from ft_core.report import Report
    from ft_embeddings import training
    from ft_embeddings.engine import saved_instructions

    data = EmbeddingQAFinetuneDataset.load(dataset)
    evaluations = []
    for name in models:
        loaded = training.load_model(name)
        evaluations.append(training.evaluate(loaded, data, saved_instructions(name), name=name))
    report = Report(evaluations, data, title=f"Models on {dataset.name}")
    if html is not None:
        report.save_html(html)
    show(report.to_dict(), report, json=json)


def _first_line(text: str) -> str:
    return text.split("\n", 1)[0]


def _mark(right: bool) -> str:
    return "  (right)" if right else "  (wrong)"
