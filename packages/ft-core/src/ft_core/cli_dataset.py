"""`ft dataset`: make and look at datasets."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typing_extensions import TypeIs

from ft_core.console import JsonOption, note, show
from ft_core.llms import SPEC_HELP

if TYPE_CHECKING:
    from llama_index.core.llms import LLM
    from llama_index.core.schema import TextNode

    from ft_core.datasets import (
        ChatDataset,
        EmbeddingQAFinetuneDataset,
        JudgeDataset,
        PreferenceDataset,
        RerankDataset,
        Text2SQLDataset,
    )
    from ft_core.generation import GenerationResult

    Examples = ChatDataset | PreferenceDataset | RerankDataset | JudgeDataset | Text2SQLDataset
    Dataset = EmbeddingQAFinetuneDataset | Examples

dataset_app = typer.Typer(help="Make and look at datasets.", no_args_is_help=True)

SourceArgument = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        help="Of questions and documents: a JSON file, a BEIR folder, or one that Hugging Face "
        "saved. Of conversations: a .jsonl file in OpenAI's chat or preference format. Of "
        "queries with candidates: a .jsonl file of query and documents, to train a reranker. Of "
        "judgements: a .jsonl file of task and answer, or a judge's journal. Of text-to-SQL: a "
        ".jsonl file of question and sql.",
    ),
]
BeirSplitOption = Annotated[
    str, typer.Option("--beir-split", help="Which qrels of a BEIR folder to read or write.")
]


class SplitBy(str, Enum):
    """What `ft dataset split` keeps apart."""

    query = "query"
    document = "document"
    sql = "sql"


class Corpus(str, Enum):
    """Which documents each part of a split gets."""

    own = "own"
    all = "all"


class FolderFormat(str, Enum):
    """What `ft dataset convert` writes where the target is no JSON file."""

    beir = "beir"
    huggingface = "huggingface"


@dataset_app.callback()
def _dataset() -> None:
    """Make and look at datasets."""


@dataset_app.command()
def generate(
    folder: Annotated[Path, typer.Argument(help="A folder with .md, .txt and .pdf files.")],
    llm: Annotated[str, typer.Option(help=f"The model that writes the questions: {SPEC_HELP}.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The dataset's JSON file.")] = Path(
        "qa_finetune_dataset.json"
    ),
    questions: Annotated[int, typer.Option(help="Questions a chunk.")] = 2,
    chunk_size: Annotated[int, typer.Option(help="Tokens a chunk has at most.")] = 512,
    chunk_overlap: Annotated[int, typer.Option(help="Tokens that neighbours share.")] = 0,
    workers: Annotated[int, typer.Option(help="Calls in flight at most.")] = 8,
    max_retries: Annotated[
        int, typer.Option(help="Further calls after a rate limit or a server error.")
    ] = 8,
    style: Annotated[
        str,
        typer.Option(
            help="How to ask: instruct, small (for models that cannot follow an instruction), "
            "or auto, which is small for local: models."
        ),
    ] = "auto",
    limit: Annotated[
        int | None, typer.Option(help="Use only so many chunks, picked at random by --seed.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides what is random.")] = 0,
    json: JsonOption = False,
) -> None:
    """Write questions about the documents in FOLDER with an LLM.

    Every answer is kept in OUTPUT.journal.jsonl as it arrives: after a kill or an error, the
    same command goes on where it stopped and pays for nothing twice.
    """
    from ft_core.errors import ArgumentError
    from ft_core.generation import GenerationSettings, runner
    from ft_core.generation import generate as generate_questions
    from ft_core.generation.folder import read_folder

    settings = GenerationSettings(
        num_questions_per_chunk=questions,
        workers=workers,
        seed=seed,
        max_retries=max_retries,
        style=style,
    )
    if limit is not None and limit < 1:
        raise ArgumentError("--limit", f"must be at least 1, not {limit}")
    found = read_folder(folder, chunk_size=chunk_size, chunk_overlap=chunk_overlap)
    for place in found.empty:
        note(f"Warning: {place} holds no text (a scan?) and is left out")
    nodes = _pick(found.nodes, limit, seed)
    note(f"{len(nodes)} chunks of {found.files} files")
    result = runner.run(generate_questions(nodes, _load(llm, style), output, settings))
    for node, reason in result.failures.items():
        note(f"Warning: no question about {node}: {reason}")
    show(_summary(result, output, found.empty), json=json)


@dataset_app.command()
def stats(
    source: SourceArgument, beir_split: BeirSplitOption = "test", json: JsonOption = False
) -> None:
    """Count what SOURCE holds, and measure its lengths."""
    show(_read(source, beir_split).stats(), json=json)


@dataset_app.command()
def check(
    source: SourceArgument,
    threshold: Annotated[
        float | None,
        typer.Option(help="Similarity from which two texts are near-duplicates. Default: 0.8."),
    ] = None,
    beir_split: BeirSplitOption = "test",
    json: JsonOption = False,
) -> None:
    """Check every reference or message of SOURCE, and list the duplicates.

    Bad content is an error (exit code 1); duplicates are remarks.
    """
    from ft_core.datasets import duplicates

    limit = duplicates.DEFAULT_THRESHOLD if threshold is None else threshold
    dataset = _read(source, beir_split)
    counts, found = _remarks(dataset, limit)
    lines = [
        f"{source}: every {_parts_of(dataset)} is right",
        *[f"{name}: {count}" for name, count in counts.items()],
        *[_counted(name, keys) for name, keys in found.items()],
    ]
    show({**counts, **found}, "\n".join(lines), json=json)


@dataset_app.command()
def split(
    source: SourceArgument,
    output_dir: Annotated[
        Path, typer.Option(help="Folder for the parts, NAME.json or NAME.jsonl each.")
    ],
    by: Annotated[
        SplitBy | None,
        typer.Option(
            help="query: new questions about the same documents. document: unseen documents. sql: "
            "new questions that ask for SQL which no other part has. Default: document; query for "
            "a .jsonl file."
        ),
    ] = None,
    fractions: Annotated[
        str, typer.Option(help="Each part's share of the queries or examples.")
    ] = "train=0.8,validation=0.2",
    corpus: Annotated[
        Corpus | None,
        typer.Option(
            help="Give each part its own documents or all. Default: all by query, own by document."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same parts.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing parts.")] = False,
    beir_split: BeirSplitOption = "test",
    json: JsonOption = False,
) -> None:
    """Split SOURCE so that no part holds a near-duplicate of another part's query."""
    from ft_core.errors import ArgumentError

    shares = _fractions(fractions)
    dataset = _read(source, beir_split)
    suffix = ".jsonl" if _is_examples(dataset) else ".json"
    files = {name: output_dir / f"{name}{suffix}" for name in shares}
    existing = [str(file) for file in files.values() if file.exists()]
    if existing and not overwrite:
        raise ArgumentError(
            "--output-dir", f"{existing[0]} exists; name another folder or add --overwrite"
        )
    parts = _split(dataset, shares, by, corpus, seed)
    for name, part in parts.items():
        part.save(files[name])
    document = {name: {"file": files[name], **_counts(part)} for name, part in parts.items()}
    lines = [
        f"{files[name]}: " + ", ".join(f"{count} {what}" for what, count in _counts(part).items())
        for name, part in parts.items()
    ]
    show(document, "\n".join(lines), json=json)


@dataset_app.command()
def convert(
    source: SourceArgument,
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="A file named *.json or *.jsonl, or a folder.")
    ],
    to: Annotated[
        FolderFormat, typer.Option(help="What to write where TARGET is a folder.")
    ] = FolderFormat.beir,
    beir_split: BeirSplitOption = "test",
    json: JsonOption = False,
) -> None:
    """Convert between JSON, BEIR folders and Hugging Face folders; or conversations for OpenAI.

    Of queries with candidates, the queries, texts and relevant documents are converted.

    A BEIR folder takes several splits of one corpus, one call each; otherwise TARGET is new.
    Conversations, such as a journal of calls, become the .jsonl file that OpenAI's
    fine-tuning takes: without the journal's own fields.
    """
    from ft_core.errors import ArgumentError
    from ft_core.extras import import_extra
    from ft_core.files import atomic_folder

    dataset = _convertible(source, beir_split)
    form = _form(dataset, target, to)
    exists = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if exists and (form != "beir" or not (target / "corpus.jsonl").exists()):
        raise ArgumentError("TARGET", f"{target} exists; name a new file or folder")
    if _is_conversations(dataset):
        dataset.to_openai_jsonl(target)
    elif form == "json":
        dataset.save(target)
    elif form == "beir":
        dataset.to_beir(target, beir_split)
    else:
        tables = dataset.to_huggingface()
        if not sys.stderr.isatty():
            import_extra("datasets", "ft-core[hf]").disable_progress_bars()
        with atomic_folder(target) as partial:
            tables.save_to_disk(str(partial))
    show({"output": target, "format": form, **_counts(dataset)}, json=json)


def _read(source: Path, beir_split: str) -> Dataset:
    from ft_core.datasets import EmbeddingQAFinetuneDataset

    if source.is_dir():
        if (source / "corpus.jsonl").exists():
            return EmbeddingQAFinetuneDataset.from_beir(source, beir_split)
        return EmbeddingQAFinetuneDataset.from_huggingface(source)
    if source.suffix != ".jsonl":
        return EmbeddingQAFinetuneDataset.load(source)
    return _kind(source).load(source)


def _kind(source: Path) -> type[Examples]:
    """Return what the first whole line of a file is an example of."""
    from ft_core.datasets import (
        ChatDataset,
        JudgeDataset,
        PreferenceDataset,
        RerankDataset,
        Text2SQLDataset,
    )

    fields = _first_fields(source)
    if "preferred_output" in fields:
        return PreferenceDataset
    if "messages" in fields:
        return ChatDataset
    if {"sql", "question"} & fields:
        return Text2SQLDataset
    if "answer" in fields:
        return JudgeDataset
    return RerankDataset if {"query", "documents"} & fields else ChatDataset


def _first_fields(source: Path) -> set[str]:
    """Return the keys of the first line that is a JSON object; a journal's may be torn."""
    from ft_core.errors import DatasetError
    from ft_core.files import parse_json

    try:
        with open(source, encoding="utf-8-sig") as lines:
            for line in lines:
                try:
                    value = parse_json(line)
                except DatasetError:
                    continue
                if isinstance(value, dict):
                    return set(value)
    except (OSError, UnicodeDecodeError):
        pass  # loading says what is wrong, as of the other bad files
    return set()


def _is_examples(dataset: Dataset) -> TypeIs[Examples]:
    from ft_core.datasets.examples import ExampleDataset

    return isinstance(dataset, ExampleDataset)


def _is_conversations(dataset: Dataset) -> TypeIs[ChatDataset | PreferenceDataset]:
    from ft_core.datasets import ChatDataset, PreferenceDataset

    return isinstance(dataset, ChatDataset | PreferenceDataset)


def _is_rerank(dataset: Dataset) -> TypeIs[RerankDataset]:
    from ft_core.datasets import RerankDataset

    return isinstance(dataset, RerankDataset)


def _is_judge(dataset: Dataset) -> TypeIs[JudgeDataset]:
    from ft_core.datasets import JudgeDataset

    return isinstance(dataset, JudgeDataset)


def _is_text2sql(dataset: Dataset) -> TypeIs[Text2SQLDataset]:
    from ft_core.datasets import Text2SQLDataset

    return isinstance(dataset, Text2SQLDataset)


def _parts_of(dataset: Dataset) -> str:
    """Return what is checked one by one."""
    if not _is_examples(dataset):
        return "reference"
    if _is_judge(dataset) or _is_text2sql(dataset):
        return "example"
    return "document" if _is_rerank(dataset) else "message"


def _name_of(dataset: Examples) -> str:
    """Return what the examples are."""
    if _is_judge(dataset):
        return "judgements"
    if _is_text2sql(dataset):
        return "questions with SQL"
    return "queries with candidates" if _is_rerank(dataset) else "conversations"


def _convertible(
    source: Path, beir_split: str
) -> EmbeddingQAFinetuneDataset | ChatDataset | PreferenceDataset:
    from ft_core.errors import ArgumentError

    dataset = _read(source, beir_split)
    if _is_judge(dataset) or _is_text2sql(dataset):
        raise ArgumentError(
            "SOURCE",
            f"{source} holds {_name_of(dataset)}: there is no other format for them; an engine "
            "takes the file as it is",
        )
    return dataset.to_embedding_qa() if _is_rerank(dataset) else dataset


def _counts(dataset: Dataset) -> dict[str, int]:
    if _is_examples(dataset):
        return {"examples": len(dataset)}
    return {"queries": len(dataset.queries), "documents": len(dataset.corpus)}


def _remarks(
    dataset: Dataset, threshold: float
) -> tuple[dict[str, int], dict[str, list[str] | list[list[str]]]]:
    """Return the counts of a check, and remark to the ids or example numbers that it is about."""
    from ft_core.datasets.duplicates import exact_duplicates, near_duplicates

    if _is_examples(dataset):
        questions = {str(number): e.asked() for number, e in enumerate(dataset, start=1)}
        counts = {
            **_counts(dataset),
            "repeated examples": len(dataset) - len(dataset.deduplicated()),
            **_unteachable(dataset),
        }
        return counts, {
            **_unfit(dataset),
            "examples of equal questions": exact_duplicates(questions),
            "examples of near-duplicate questions": near_duplicates(questions, threshold=threshold),
        }
    asked = {document for documents in dataset.relevant_docs.values() for document in documents}
    return _counts(dataset), {
        "documents without a query": [key for key in dataset.corpus if key not in asked],
        "equal queries": exact_duplicates(dataset.queries),
        "near-duplicate queries": near_duplicates(dataset.queries, threshold=threshold),
        "equal documents": exact_duplicates(dataset.corpus),
        "near-duplicate documents": near_duplicates(dataset.corpus, threshold=threshold),
    }


def _unfit(dataset: Examples) -> dict[str, list[str] | list[list[str]]]:
    """Return remark to the numbers of the examples that a reranker cannot learn from."""
    from ft_core.errors import DatasetError

    if not _is_rerank(dataset):
        return {}
    try:
        scored = any(d.teacher_score is not None for e in dataset for d in e.documents)
        dataset.check_trainable("teacher_score" if scored else "label")
    except DatasetError as error:
        note(f"Warning: no reranker can learn from this: {error}")
    grades = [[document.grade for document in example.documents] for example in dataset]
    return {
        "examples without a relevant document": [
            str(number) for number, each in enumerate(grades, start=1) if not any(each)
        ],
    }


def _unteachable(dataset: Examples) -> dict[str, int]:
    """Return reason to the number of judgements that no judge can learn from."""
    from ft_core.errors import DatasetError

    if not _is_judge(dataset):
        return {}
    try:
        return dataset.consistency().dropped
    except DatasetError as error:
        note(f"Warning: no judge can learn from this: {error}")
        return {}


def _split(
    dataset: Dataset,
    shares: dict[str, float],
    by: SplitBy | None,
    corpus: Corpus | None,
    seed: int,
) -> Mapping[str, Dataset]:
    from ft_core.errors import ArgumentError
    from ft_core.splits import split_by_document, split_by_query

    if by is SplitBy.sql:
        if not _is_text2sql(dataset):
            raise ArgumentError("--by", "sql is for questions with SQL")
        if corpus is None:
            return dataset.split_by_query(shares, seed)
    if _is_examples(dataset):
        if by is SplitBy.document or corpus is not None:
            raise ArgumentError(
                "--by, --corpus", f"{_name_of(dataset)} split by query, without a corpus"
            )
        return dataset.split(shares, seed)
    function: Callable[..., dict[str, EmbeddingQAFinetuneDataset]] = (
        split_by_query if by is SplitBy.query else split_by_document
    )
    settings = {} if corpus is None else {"corpus": corpus.value}
    return function(dataset, shares, seed=seed, **settings)


def _form(dataset: Dataset, target: Path, to: FolderFormat) -> str:
    """Return the format to write."""
    from ft_core.errors import ArgumentError

    if _is_conversations(dataset) != (target.suffix == ".jsonl"):
        raise ArgumentError(
            "TARGET",
            "conversations are converted to a file named *.jsonl, and nothing else is: "
            f"{target} will not do",
        )
    if _is_conversations(dataset):
        return "openai"
    return "json" if target.suffix == ".json" else to.value


def _fractions(text: str) -> dict[str, float]:
    """Parse `train=0.8,validation=0.2`; part names become file names."""
    from ft_core.errors import ArgumentError

    shares: dict[str, float] = {}
    for part in text.split(","):
        name, equals, share = (piece.strip() for piece in part.partition("="))
        try:
            value = float(share)
        except ValueError:
            value = 0.0
        if not equals or not name or Path(name).name != name or not value > 0:
            raise ArgumentError(
                "--fractions", f"{part!r} is not NAME=SHARE; write as in train=0.8,validation=0.2"
            )
        if name in shares:
            raise ArgumentError("--fractions", f"names {name!r} twice")
        shares[name] = value
    return shares


def _counted(name: str, found: list[str] | list[list[str]]) -> str:
    """Return one line of a check: how many, and the first few of them."""
    shown = [key if isinstance(key, str) else " = ".join(key) for key in found[:3]]
    more = ", ..." if len(found) > len(shown) else ""
    return f"{name}: {len(found)}" + (f" ({', '.join(shown)}{more})" if found else "")


def _pick(nodes: list[TextNode], limit: int | None, seed: int) -> list[TextNode]:
    if limit is None or limit >= len(nodes):
        return nodes
    kept = random.Random(seed).sample(range(len(nodes)), limit)
    return [nodes[place] for place in sorted(kept)]


def _load(spec: str, style: str) -> LLM:
    from ft_core.llms import load_llm

    if spec.startswith("local:") and style != "instruct":
        # One question of one line; what a small model writes after it is not read.
        return load_llm(spec, max_tokens=64, stop=["\n"])
    return load_llm(spec, max_retries=0)  # generation does its own, and journals between


def _summary(result: GenerationResult, output: Path, empty: list[str]) -> dict[str, object]:
    return {
        "output": output,
        "documents": len(result.dataset.corpus),
        "questions": len(result.dataset.queries),
        "documents without a question": len(result.failures),
        "answers asked for": result.calls,
        "answers from the journal": result.resumed,
        "failures": result.failures,
        "empty": empty,
    }
