"""The pack's commands: `ft distill check|train|merge|submit|job|eval`."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ft_core.console import JsonOption, progress_notes, show
from ft_core.llms import SPEC_HELP
from ft_core.options import (
    DeviceOption,
    EpochsOption,
    LearningRateOption,
    LoraRankOption,
    SeedOption,
    sft_settings,
)

if TYPE_CHECKING:
    from ft_core.jobs import Job

distill = typer.Typer(help="Distil an LLM's recorded calls into a student.", no_args_is_help=True)

_COUNTED_FOR = "gpt-4.1-mini"  # where no model is named

DataArgument = Annotated[Path, typer.Argument(help="Chat examples as JSON Lines, or a journal.")]
ValidationOption = Annotated[Path | None, typer.Option(help="Held-out examples.")]
UrlOption = Annotated[
    str | None, typer.Option(help="API of an OpenAI-compatible server; OpenAI's by default.")
]


@distill.command()
def check(
    data: DataArgument,
    model: Annotated[
        str | None, typer.Option(help="Hosted model: its tokens are counted, its limits checked.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes; the service's rule.")] = None,
    price: Annotated[float | None, typer.Option(help="Price of a million trained tokens.")] = None,
    json: JsonOption = False,
) -> None:
    """Check every example of DATA, and say what training a hosted student on it would take."""
    from ft_core.datasets import ChatDataset
    from ft_core.openai_jobs.costs import check_limits, estimate

    dataset = ChatDataset.load(data)
    lines = [example.to_openai() for example in dataset]
    found = estimate(lines, model or _COUNTED_FOR, epochs=epochs, price_per_million=price)
    if model is not None:
        size = sum(len(dumps(line, ensure_ascii=False).encode()) + 1 for line in lines)
        check_limits(found, model, size, source=str(data))
    show(dataset.stats() | {"tokens": found.tokens, "training": str(found)}, json=json)


@distill.command()
def train(
    data: DataArgument,
    base_model: Annotated[str, typer.Option(help="Hub name or folder of the model to train.")],
    output: Annotated[Path, typer.Option(help="Folder for the student.")],
    validation: ValidationOption = None,
    epochs: EpochsOption = None,
    learning_rate: LearningRateOption = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a step.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens per example.")] = None,
    lora_rank: LoraRankOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    wait: Annotated[
        bool, typer.Option(help="Wait for the end, or train in the background.")
    ] = True,
    json: JsonOption = False,
) -> None:
    """Train a student on this machine; the same command goes on with a run that was killed."""
    from ft_core.sft import LocalFinetuneEngine

    settings = sft_settings(
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        max_length=max_length,
        lora_rank=lora_rank,
        seed=seed,
    )
    engine = LocalFinetuneEngine(
        base_model,
        data,
        output_dir=output,
        val_data=validation,
        device=device,
        **settings,
    )
    with progress_notes():
        job = engine.finetune(wait=wait)
    metrics = job.raw.metrics if job.model else {}
    show(_document(job) | {"metrics": metrics}, _lines(_document(job) | metrics), json=json)


@distill.command()
def merge(
    student: Annotated[Path, typer.Argument(help="Folder that `train` made.")],
    output: Annotated[Path, typer.Argument(help="Folder for the model.")],
    json: JsonOption = False,
) -> None:
    """Write a student as one ordinary model, for vLLM, `transformers serve` or llama.cpp."""
    from ft_core.sft import LocalFinetuneEngine

    show({"model": LocalFinetuneEngine.load(student).merge(output)}, json=json)


@distill.command()
def submit(
    data: DataArgument,
    base_model: Annotated[str, typer.Option(help="Hosted model to train.")],
    validation: ValidationOption = None,
    suffix: Annotated[str | None, typer.Option(help="Part of the student's name.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes; the service's choice.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of training.")] = None,
    price: Annotated[float | None, typer.Option(help="Price of a million trained tokens.")] = None,
    base_url: UrlOption = None,
    wait: Annotated[bool, typer.Option(help="Wait for the job's end.")] = True,
    json: JsonOption = False,
) -> None:
    """Train a student at OpenAI or a compatible server; a second call finds the first job."""
    from ft_core.openai_jobs.engine import OpenAIFinetuneEngine

    engine = OpenAIFinetuneEngine(
        base_model,
        data,
        val_path=validation,
        suffix=suffix,
        hyperparameters=None if epochs is None else {"n_epochs": epochs},
        seed=seed,
        price_per_million=price,
        base_url=base_url,
    )
    with progress_notes():
        job = engine.finetune(wait=wait)
    show(_document(job), json=json)


@distill.command()
def job(
    job_id: Annotated[str, typer.Argument(help="Id of a hosted job, or a local student's folder.")],
    base_url: UrlOption = None,
    events: Annotated[bool, typer.Option("--events", help="Show what it reported.")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="Stop it.")] = False,
    json: JsonOption = False,
) -> None:
    """Show how a job stands."""
    engine = _engine_of(job_id, base_url)
    found = engine.cancel() if cancel else engine.get_current_job()
    document = _document(found)
    if not events:
        show(document, json=json)
        return
    reported = engine.events()
    document["events"] = [{"time": e.time.isoformat(), "message": e.message} for e in reported]
    lines = [f"{e.time:%Y-%m-%d %H:%M:%S}  {e.message}" for e in reported]
    show(document, "\n".join([*lines, f"{found.id}: {found.status.value}"]), json=json)


@distill.command(name="eval")
def evaluate(
    data: DataArgument,
    student: Annotated[str, typer.Option(help=f"Student, as {SPEC_HELP}.")],
    base: Annotated[str | None, typer.Option(help="Model to compare it with.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Teacher; the recorded answers by default.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of the longest answer.")] = None,
    workers: Annotated[int, typer.Option(help="Answers asked for at a time.")] = 1,
    html: Annotated[Path | None, typer.Option(help="Write the report as a page.")] = None,
    json: JsonOption = False,
) -> None:
    """Compare a student's answers with its base's and the teacher's on held-out DATA."""
    from ft_core.llms import load_llm
    from ft_openai_distill.evaluation import evaluate_distillation

    models = {
        name: load_llm(spec, max_tokens=max_tokens)
        for name, spec in (("base", base), ("student", student), ("teacher", teacher))
        if spec is not None
    }
    report = evaluate_distillation(data, num_workers=workers, **models)
    if html is not None:
        report.save_html(html)
    show(report.to_dict(), report, json=json)


def _engine_of(job_id: str, base_url: str | None) -> Any:
    if base_url is None and ("/" in job_id or _is_local(Path(job_id))):
        from ft_core.sft import LocalFinetuneEngine

        return LocalFinetuneEngine.from_job_id(job_id)
    from ft_core.openai_jobs.engine import OpenAIFinetuneEngine

    return OpenAIFinetuneEngine.from_job_id(job_id, base_url=base_url)


def _is_local(folder: Path) -> bool:
    return folder.is_dir() or folder.with_name(f"{folder.name}.training").is_dir()


def _lines(document: dict[str, Any]) -> str:
    shown = {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in document.items()}
    return "\n".join(f"{name:<16}{value}" for name, value in shown.items())


def _document(job: Job) -> dict[str, Any]:
    found = {"job": job.id, "status": job.status.value, "model": job.model, "error": job.error}
    return {name: value for name, value in found.items() if value is not None}
