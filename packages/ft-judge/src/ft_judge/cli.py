"""The pack's commands: `ft judge train` and `ft judge eval`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from ft_core.console import JsonOption, progress_notes, show, show_losses
from ft_core.options import DeviceOption, EpochsOption, SeedOption, given

judge = typer.Typer(
    help="Train a judge on a teacher's verdicts, and compare judges.", no_args_is_help=True
)

TaskOption = Annotated[str, typer.Option(help="What is judged: pairwise or correctness.")]


@judge.command()
def train(
    verdicts: Annotated[Path, typer.Argument(help="Verdicts as JSON Lines, or a journal.")],
    student: Annotated[str, typer.Option(help="Hub name or folder, or a hosted model's name.")],
    output: Annotated[Path, typer.Option(help="Folder for the judge.")],
    task: TaskOption = "pairwise",
    kind: Annotated[str, typer.Option(help="auto, local, hosted or encoder.")] = "auto",
    reasoning: Annotated[
        bool, typer.Option("--reasoning", help="Learn the teacher's words, too.")
    ] = False,
    validation: Annotated[Path | None, typer.Option(help="Held-out verdicts.")] = None,
    epochs: EpochsOption = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak; not hosted.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a step.")] = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    base_url: Annotated[
        str | None, typer.Option(help="API of an OpenAI-compatible server; OpenAI's by default.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Train a judge on VERDICTS; the same command goes on with a run that was cut short."""
    from ft_judge.students import checked_kind, kind_of

    found = checked_kind(kind)
    found = kind_of(student, {"base_url": base_url}) if found == "auto" else found
    if found == "hosted":
        passes = given(n_epochs=epochs, batch_size=batch_size)
        settings = given(base_url=base_url, seed=seed, hyperparameters=passes or None)
        for name, value in (("--learning-rate", learning_rate), ("--device", device)):
            _refuse(name, value, "a service chooses it")
    else:
        _refuse("--base-url", base_url, f"the student is {found}")
        settings = given(
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
            device=device,
        )
    engine = _engine_class(task)(
        verdicts,
        student,
        output,
        kind=found,
        reasoning=reasoning,
        val_data=validation,
        **settings,
    )
    with progress_notes("ft_judge"):
        job = engine.finetune()
    metrics = {} if found == "hosted" else job.raw.metrics
    show_losses({"judge": output, "kind": found, "model": job.model}, metrics, json=json)


@judge.command(name="eval")
def evaluate(
    dataset: Annotated[Path, typer.Argument(help="Verdicts that no judge was trained on.")],
    judges: Annotated[
        list[Path], typer.Option("--judge", help="Folder that `train` made; may be repeated.")
    ],
    task: TaskOption = "pairwise",
    base: Annotated[
        str | None, typer.Option(help="Open model, hub name or folder, to compare as it is.")
    ] = None,
    length: Annotated[
        bool, typer.Option("--length", help="Compare with preferring the longer answer.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Verdicts asked for at a time.")] = 1,
    journal: Annotated[
        Path | None, typer.Option(help="File that keeps the answers of a run cut short.")
    ] = None,
    device: DeviceOption = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as a page.")] = None,
    json: JsonOption = False,
) -> None:
    """Compare judges with the teacher's and people's verdicts in DATASET."""
    from ft_core.datasets import JudgeDataset
    from ft_core.errors import DatasetError
    from ft_judge.baselines import longer_answer
    from ft_judge.engine import untrained_judge
    from ft_judge.evaluation import evaluate_judges

    _engine_class(task)
    try:
        data = JudgeDataset.load(dataset).of_task(task)  # type: ignore[arg-type]  # just checked
    except DatasetError as error:
        raise error if error.source else error.at(dataset) from None
    targets: dict[str, Any] = {}
    names = _names(judges, given(base=base, length=length or None))
    if base is not None:
        targets["base"] = untrained_judge(task, base, device=device)  # type: ignore[arg-type]
    if length:
        targets["length"] = longer_answer
    for name, folder in names.items():
        targets[name] = _loaded(folder, task, device)
    report = evaluate_judges(data, targets, num_workers=workers, journal=journal)
    if html is not None:
        report.save_html(html)
    show(report.to_dict(), report, json=json)


def _engine_class(task: str) -> Any:
    from ft_core.errors import ArgumentError
    from ft_judge.engine import ENGINES

    if task not in ENGINES:
        raise ArgumentError("--task", f"is {' or '.join(ENGINES)}, not {task!r}")
    return ENGINES[task]


def _loaded(folder: Path, task: str, device: str | None) -> Any:
    from ft_judge.students import saved

    kind, _ = saved(folder)
    settings = {} if kind == "hosted" or device is None else {"device": device}
    return _engine_class(task).load(folder, **settings).get_finetuned_model()


def _names(folders: list[Path], others: Iterable[str]) -> dict[str, Path]:
    """Return each folder by its name, or by its whole path where another run has that name."""
    from ft_core.errors import ArgumentError
    from ft_judge.evaluation import TEACHER

    names: dict[str, Path] = {}
    taken = {"", TEACHER, *others}
    for folder in folders:
        whole = str(folder.expanduser().resolve())
        if whole in taken:
            raise ArgumentError("--judge", f"{folder} is given twice")
        names[whole if folder.name in taken else folder.name] = folder
        taken |= {whole, folder.name}
    return names


def _refuse(option: str, value: Any, reason: str) -> None:
    from ft_core.errors import ArgumentError

    if value is not None:
        raise ArgumentError(option, f"has no effect: {reason}")
