"""The pack's commands: `ft cohere export|score|train|job`.

The key is that of the environment, `COHERE_API_KEY` or `CO_API_KEY`; no command takes one.
"""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ft_core.console import JsonOption, note, progress_notes, show
from ft_core.embed_models import SPEC_HELP, load_embed_model
from ft_core.indices import load_index

if TYPE_CHECKING:
    from ft_cohere_rerank.dataset import CohereRerankerFile
    from ft_core.datasets import RerankDataset
    from ft_core.generation.journal import AnswerJournal
    from ft_core.jobs import Job

cohere = typer.Typer(
    help="Let Cohere's reranker teach a student, or fine-tune it.", no_args_is_help=True
)

_NEGATIVES = 5  # as many as Cohere advises
_NO_NEGATIVES = (
    "no candidate is labelled 0, so there are no hard negatives; Cohere advises about five a "
    "query: label some, or export questions and passages (.json) with --negatives"
)

EmbedModelOption = Annotated[str | None, typer.Option(help=f"Embedding model: {SPEC_HELP}.")]
IndexOption = Annotated[
    Path | None,
    typer.Option(help="Folder of a persisted index, built with --embed-model; its retriever."),
]
UrlOption = Annotated[
    str | None,
    typer.Option(help="Server that speaks Cohere's API, without /v2; Cohere's by default."),
]


class Negatives(str, Enum):
    """Where `ft cohere export` finds hard negatives."""

    random = "random"
    cosine_similarity = "cosine_similarity"
    bm25 = "bm25"
    retriever = "retriever"


@cohere.command()
def export(
    dataset: Annotated[
        Path,
        typer.Argument(help="Questions and passages (.json), or queries with candidates (.jsonl)."),
    ],
    output: Annotated[Path, typer.Option(help="The file to write, JSON Lines.")],
    negatives: Annotated[
        Negatives | None,
        typer.Option(help="Of a .json: where to find hard negatives. Default: random."),
    ] = None,
    num_negatives: Annotated[
        int | None,
        typer.Option(help="Of a query, at most. Default: 5 of a .json, all of a .jsonl."),
    ] = None,
    margin: Annotated[
        float,
        typer.Option(help="Leave out negatives that score within this fraction of an answer."),
    ] = 0.05,
    range_max: Annotated[
        int, typer.Option(help="Look for negatives among so many of the best ranked.")
    ] = 100,
    embed_model: EmbedModelOption = None,
    index: IndexOption = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same random ones.")] = 0,
    validation: Annotated[
        bool, typer.Option("--validation", help="It is to be the validation file.")
    ] = False,
    check_limits: Annotated[
        bool, typer.Option(help="Check it against Cohere's published limits.")
    ] = True,
    json: JsonOption = False,
) -> None:
    """Check DATASET, and write it as the file that Cohere trains rerankers on.

    Only a file that this command wrote is replaced; OUTPUT.journal.jsonl tells it.
    """
    from ft_cohere_rerank.dataset import CohereRerankerFile
    from ft_core.generation.journal import AnswerJournal

    _check_not_input(dataset, output)
    journal = AnswerJournal(output, CohereRerankerFile)
    if dataset.suffix == ".jsonl":
        file = _judged(dataset, journal, negatives, num_negatives)
    else:
        file = _mined(
            dataset, journal, negatives, num_negatives, margin, range_max, embed_model, index, seed
        )
    cut = file.check_limits(validation=validation, path=dataset) if check_limits else []
    journal.save(file)
    document: dict[str, Any] = {
        "output": output,
        "queries": len(file),
        "relevant passages": sum(len(entry.relevant_passages) for entry in file),
        "hard negatives": sum(len(entry.hard_negatives) for entry in file),
    }
    if cut:
        first = ", ".join(map(str, cut[:5])) + (", ..." if cut[5:] else "")
        shown = cut if json else f"{len(cut)} (number {first}); --json lists all"
        document["queries with a passage that is cut"] = shown
    show(document, json=json)


@cohere.command()
def score(
    dataset: Annotated[
        Path,
        typer.Argument(
            help="Queries with candidates, a CohereRerankHandler's journal, or Cohere's training "
            "file (.jsonl); or questions and passages (.json), for which candidates are retrieved."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The file to write, JSON Lines.")],
    model: Annotated[str, typer.Option(help="The teacher.")] = "rerank-v3.5",
    base_url: UrlOption = None,
    requests_per_minute: Annotated[
        int, typer.Option(help="Calls that start in a minute, at most; 0 for no limit.")
    ] = 1_000,
    workers: Annotated[int, typer.Option(help="Calls at a time.")] = 8,
    max_tokens_per_doc: Annotated[
        int | None, typer.Option(help="Where documents are cut; the service's default.")
    ] = None,
    price: Annotated[float | None, typer.Option(help="Price of a thousand search units.")] = None,
    max_search_units: Annotated[
        int | None, typer.Option(help="Start nothing that is estimated to take more.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="Of a .json: candidates of a question.")] = 20,
    embed_model: EmbedModelOption = None,
    index: IndexOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before it starts.")] = False,
    json: JsonOption = False,
) -> None:
    """Score every candidate in DATASET with Cohere's reranker, for a student to learn from.

    What it takes is said first. Every answer is kept in OUTPUT.journal.jsonl as it arrives:
    after a kill or an error, the same command asks only for what is missing. Of questions and
    passages, candidates are what BM25 finds, or --embed-model, or --index.
    """
    from ft_cohere_rerank.client import find_key
    from ft_cohere_rerank.teacher import CohereRerankTeacher

    find_key(None, base_url)  # before anything is read or retrieved
    teacher = CohereRerankTeacher(
        model,
        base_url=base_url,
        calls_per_minute=requests_per_minute or None,
        num_workers=workers,
        max_tokens_per_doc=max_tokens_per_doc,
        price_per_thousand=price,
        max_search_units=max_search_units,
    )
    candidates = _candidates(dataset, top_k, embed_model, index)
    cost = teacher.estimate(candidates, output)
    note(f"{model} scores {cost}")
    if cost.calls and not yes:
        _ask()
    scored = teacher.score(candidates, output)
    show({"output": output, "calls": cost.calls} | scored.stats(), json=json)


@cohere.command()
def train(
    train: Annotated[Path, typer.Argument(help="Cohere's training file, as `export` writes it.")],
    validation: Annotated[
        Path | None, typer.Option(help="Held-out data; by default Cohere holds a part out.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to remember the job in; beside TRAIN by default.")
    ] = None,
    name: Annotated[str, typer.Option(help="The model's name at Cohere.")] = "exp_finetune",
    base_model: Annotated[str, typer.Option(help="english or multilingual.")] = "english",
    epochs: Annotated[int | None, typer.Option(help="Passes; Cohere's choice.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Cohere's choice.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Cohere's choice.")] = None,
    base_url: UrlOption = None,
    check_limits: Annotated[
        bool, typer.Option(help="Check the data against Cohere's published limits.")
    ] = True,
    wait: Annotated[bool, typer.Option(help="Wait for the job's end.")] = True,
    json: JsonOption = False,
) -> None:
    """Train a reranker at Cohere; a second call finds the first job.

    Cohere closed fine-tuning to most accounts on 15 September 2025; private deployments and
    older contracts still train. Where it refuses, `ft cohere score` is the next way.
    """
    from ft_cohere_rerank.engine import CohereRerankerFinetuneEngine

    numbers = {
        "train_epochs": epochs,
        "learning_rate": learning_rate,
        "train_batch_size": batch_size,
    }
    engine = CohereRerankerFinetuneEngine(
        train,
        validation,
        name,
        base_model=base_model,
        hyperparameters={key: value for key, value in numbers.items() if value is not None},
        check_limits=check_limits,
        base_url=base_url,
        job_file=None if output is None else output / "jobs.json",
    )
    with progress_notes():
        job = engine.finetune(wait=wait)
    show(_document(job), json=json)


@cohere.command()
def job(
    job_id: Annotated[str, typer.Argument(help="Id of a hosted job.")],
    base_url: UrlOption = None,
    events: Annotated[bool, typer.Option("--events", help="Show what it reported.")] = False,
    cancel: Annotated[
        bool, typer.Option("--cancel", help="Stop it, which deletes the model.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Show how a job stands."""
    from ft_cohere_rerank.engine import CohereRerankerFinetuneEngine

    engine = CohereRerankerFinetuneEngine.from_job_id(job_id, base_url=base_url)
    reported = engine.events() if events else []
    found = engine.cancel() if cancel else engine.get_current_job()
    document = _document(found)
    if not events:
        show(document, json=json)
        return
    document["events"] = [{"time": e.time.isoformat(), "message": e.message} for e in reported]
    lines = [f"{e.time:%Y-%m-%d %H:%M:%S}  {e.message}" for e in reported]
    show(document, "\n".join([*lines, f"{found.id}: {found.status.value}"]), json=json)


# --------------------------------------------------------------------------------------
# What the files hold


def _check_not_input(dataset: Path, output: Path) -> None:
    """Refuse to write over what is read."""
    from ft_core.errors import ArgumentError

    if output.exists() and dataset.exists() and output.samefile(dataset):  # links, too
        raise ArgumentError("--output", f"{output} is the file that is read; name another")


def _judged(
    dataset: Path,
    journal: AnswerJournal,
    negatives: Negatives | None,
    num_negatives: int | None,
) -> CohereRerankerFile:
    """Return what is judged in queries with candidates."""
    from ft_cohere_rerank.dataset import CohereRerankerFile
    from ft_core.errors import ArgumentError

    if negatives is not None:
        raise ArgumentError(
            "--negatives", f"are mined for a .json; {dataset} says itself what is not relevant"
        )
    candidates = _read_candidates(dataset)
    journal.check_output({document.text for each in candidates for document in each.documents})
    file = CohereRerankerFile.from_rerank(candidates, max_negatives=num_negatives)
    if num_negatives != 0 and not any(entry.hard_negatives for entry in file):
        note(_NO_NEGATIVES)
    return file


def _mined(
    dataset: Path,
    journal: AnswerJournal,
    negatives: Negatives | None,
    num_negatives: int | None,
    margin: float,
    range_max: int,
    embed_model: str | None,
    index: Path | None,
    seed: int,
) -> CohereRerankerFile:
    """Return questions and passages, with negatives."""
    from ft_cohere_rerank.dataset import generate_cohere_reranker_finetuning_dataset
    from ft_core.datasets import EmbeddingQAFinetuneDataset

    questions = EmbeddingQAFinetuneDataset.load(dataset)
    journal.check_output(set(questions.corpus.values()))
    method = negatives or Negatives.random
    model = None if embed_model is None else load_embed_model(embed_model)
    # Its depth is no matter: whoever mines makes it as deep as is needed.
    retriever = None if index is None else load_index(index, model).as_retriever()
    return generate_cohere_reranker_finetuning_dataset(
        questions,
        _NEGATIVES if num_negatives is None else num_negatives,
        range_max,
        method.value,
        finetune_dataset_file_name=None,  # its limits are checked first
        relative_margin=margin,
        embed_model=model,
        retriever=retriever,
        seed=seed,
    )


def _candidates(
    dataset: Path, top_k: int, embed_model: str | None, index: Path | None
) -> RerankDataset:
    """Return queries with candidates: those of the file, or what is retrieved for its questions."""
    from ft_core.datasets import EmbeddingQAFinetuneDataset, RerankDataset
    from ft_core.mining import retrieve_candidates

    if dataset.suffix == ".jsonl":
        return _read_candidates(dataset)
    questions = EmbeddingQAFinetuneDataset.load(dataset)
    model = None if embed_model is None else load_embed_model(embed_model)
    source = model if index is None else load_index(index, model).as_retriever()
    found = retrieve_candidates(questions, source or "bm25", top_k=top_k)
    return RerankDataset.from_embedding_qa(questions, found)


def _read_candidates(path: Path) -> RerankDataset:
    """Read queries with candidates in any of the forms that this pack writes."""
    from ft_cohere_rerank.dataset import CohereRerankerFile
    from ft_cohere_rerank.hook import CohereRerankHandler
    from ft_core.datasets import RerankDataset

    fields = _first_fields(path)
    if "relevant_passages" in fields:
        return CohereRerankerFile.load(path).to_rerank()
    if {"type", "nodes"} <= fields:
        return CohereRerankHandler.read(path).to_dataset()
    return RerankDataset.load(path)


def _first_fields(path: Path) -> set[str]:
    """Return the keys of a file's first line; of a bad file none, for loading says what is bad."""
    from ft_core.errors import DatasetError
    from ft_core.files import parse_json

    try:
        with path.open(encoding="utf-8-sig") as lines:
            value = parse_json(lines.readline())
    except (OSError, UnicodeDecodeError, DatasetError):
        return set()
    return set(value) if isinstance(value, dict) else set()


# --------------------------------------------------------------------------------------
# The terminal


def _ask() -> None:
    """Go on only if the user says so."""
    from ft_core.errors import ArgumentError, GenerationError

    if not sys.stdin.isatty():
        raise ArgumentError("--yes", "is needed where nobody can be asked; nothing was sent")
    if not typer.confirm("Start?", err=True):
        raise GenerationError("nothing was sent")


def _document(job: Job) -> dict[str, Any]:
    found = {"job": job.id, "status": job.status.value, "model": job.model, "error": job.error}
    return {name: value for name, value in found.items() if value is not None}
