"""The pack's commands: `ft crossencoder train` and `ft crossencoder eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ft_core.console import JsonOption, check_html, show, show_trained
from ft_core.embed_models import SPEC_HELP, load_embed_model
from ft_core.indices import load_index
from ft_core.options import (
    EpochsOption,
    LearningRateOption,
    LoraOption,
    LossOption,
    ReportOption,
    ResumeOption,
    SeedOption,
)

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

crossencoder = typer.Typer(help="Train and evaluate rerankers.", no_args_is_help=True)

_RETRIEVER_HELP = (
    "What finds the candidates of an embedding QA dataset: bm25, or an embedding model: "
    f"{SPEC_HELP}."
)
IndexOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of a persisted index, built with the model of --retriever; its retriever."
    ),
]
TopKOption = Annotated[int, typer.Option(help="Candidates that are retrieved for each query.")]


@crossencoder.command()
def train(
    dataset: Annotated[
        Path, typer.Argument(help="Rerank dataset (.jsonl) or embedding QA dataset (.json).")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the trained model.")],
    model: Annotated[
        str, typer.Option(help="Hub name or folder of a cross-encoder, or of a plain encoder.")
    ] = "cross-encoder/ms-marco-MiniLM-L12-v2",
    validation: Annotated[
        Path | None, typer.Option(help="Held-out dataset: reports retriever, base and tuned.")
    ] = None,
    retriever: Annotated[
        str | None,
        typer.Option(
            help=f"{_RETRIEVER_HELP} By default a plain encoder that is trained, else bm25."
        ),
    ] = None,
    index: IndexOption = None,
    top_k: TopKOption = 20,
    loss: LossOption = None,
    epochs: EpochsOption = None,
    batch_size: Annotated[int | None, typer.Option(help="Pairs in a step.")] = None,
    learning_rate: LearningRateOption = None,
    negatives: Annotated[
        int | None, typer.Option(help="Other documents for each relevant one.")
    ] = None,
    passage_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a passage; 0 reads the beginning of a document.")
    ] = None,
    lora: LoraOption = False,
    seed: SeedOption = None,
    resume: ResumeOption = False,
    html: ReportOption = None,
    json: JsonOption = False,
) -> None:
    """Fine-tune a cross-encoder on DATASET and save it to OUTPUT."""
    from ft_crossencoder.engine import CrossEncoderFinetuneEngine

    check_html(html, validation)
    engine = CrossEncoderFinetuneEngine(
        dataset,
        model_id=model,
        model_output_path=output,
        batch_size=batch_size,
        val_dataset=validation,
        loss=loss,
        epochs=epochs,
        retriever=_candidate_source(retriever, index),
        top_k=top_k,
        learning_rate=learning_rate,
        negatives=negatives,
        passage_tokens=passage_tokens,
        lora=lora,
        seed=seed,
        resume_from_checkpoint=resume,
    )
    show_trained(output, engine.finetune(), html=html, json=json)


@crossencoder.command(name="eval")
def evaluate(
    dataset: Annotated[
        Path, typer.Argument(help="Rerank dataset (.jsonl) or embedding QA dataset (.json).")
    ],
    models: Annotated[
        list[str],
        typer.Option("--model", help="Trained folder, or hub name of a cross-encoder; repeatable."),
    ],
    retriever: Annotated[
        str | None, typer.Option(help=f"{_RETRIEVER_HELP} By default bm25.")
    ] = None,
    index: IndexOption = None,
    top_k: TopKOption = 20,
    html: Annotated[Path | None, typer.Option(help="Write the report as a page.")] = None,
    json: JsonOption = False,
) -> None:
    """Compare rerankers with the retriever's own order on DATASET."""
    from ft_core.evaluation import evaluate_reranker
    from ft_core.report import Report
    from ft_crossencoder.data import as_rerank_dataset

    data = as_rerank_dataset(
        dataset, _candidate_source(retriever, index) or "bm25", top_k=top_k, argument="dataset"
    )
    evaluations = [evaluate_reranker(None, data)]
    evaluations += [evaluate_reranker(_reranker(name), data, name=name) for name in models]
    report = Report(evaluations, data, title=f"Rerankers on {dataset.name}")
    if html is not None:
        report.save_html(html)
    show(report.to_dict(), report, json=json)


def _candidate_source(retriever: str | None, index: Path | None) -> Any:
    """Return what finds candidates: an index's retriever, a model, "bm25", or None for neither."""
    model = None
    if retriever is not None and retriever != "bm25":
        model = load_embed_model(retriever, option="--retriever", load_local=_encoder)
    if index is None:
        return model or retriever
    # Its depth is no matter: --top-k counts.
    return load_index(index, model, model_option="--retriever").as_retriever()


def _encoder(name: str) -> BaseEmbedding:
    from ft_crossencoder.encoder import EncoderEmbedding

    return EncoderEmbedding(name)


def _reranker(name: str) -> Any:
    """Return a trained folder's reranker as it was trained, and any other as it is."""
    from ft_core.artifacts import MANIFEST
    from ft_crossencoder.reranker import FinetunedReranker

    if (Path(name) / MANIFEST).exists():
        return FinetunedReranker.load(name)
    return FinetunedReranker(name)
