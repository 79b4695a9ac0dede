"""What every `ft` command prints, and how: text for people, or one JSON document.

A pack's command takes `JsonOption` and ends in one call of `show`:

    import typer
    from ft_core.console import JsonOption, note, show

    commands = typer.Typer(help="Count things.", no_args_is_help=True)

    @commands.command()
    def count(file: Path, json: JsonOption = False) -> None:
        \"\"\"Count the lines of FILE.\"\"\"
        note("reading ...")                          # stderr, in both modes
        show({"lines": len(...)}, json=json)         # or show(document, a_rich_table, json=json)

and registers it in its pyproject.toml:

    [project.entry-points."ft_core.commands"]
    count = "ft_example.cli:commands"

`ft` (`ft_core.cli`) does the rest, for all commands alike: an `FTError` becomes one line
`Error: ...` on stderr and exit code 1, with `--json` also the document
`{"error": {"type": ..., "message": ...}}` on stdout; and with `--json`, whatever a library
prints to stdout goes to stderr, so that stdout holds exactly one document.
"""

from __future__ import annotations

import json as jsonlib
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from ft_core.errors import ArgumentError

if TYPE_CHECKING:
    from ft_core.report import Report

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout instead of text.")
]
"""The type of every command's `json` parameter; its default is False."""

_TOLD = ("ft_core.jobs", "ft_core.sft", "ft_core.datasets")
"""Loggers of what every command's training tells."""

_document_stream: TextIO | None = None
# The real stdout while `only_json` holds it.


def show(document: Any, text: RenderableType | None = None, *, json: bool = False) -> None:
    """Print the result of a command on stdout: once, as its last act.

    Args:
        document: what `--json` prints: anything JSON can hold, paths and numpy numbers too;
            NaN and infinity become null.
        text: what is printed without `--json`: a string as it is, or anything rich can
            print. By default the document itself, a mapping as two columns.
        json: the command's `--json`.
    """
    if json:
        stream = _document_stream or sys.stdout
        stream.write(_dumps(document, stream) + "\n")
        stream.flush()
        return
    if text is None:
        text = _pairs(document) if isinstance(document, Mapping) else str(document)
    if isinstance(text, str):
        typer.echo(text)  # rich would wrap long paths and read [brackets] as markup
    else:
        Console().print(text)


def check_html(html: Path | None, validation: Path | None) -> None:
    """Check, before anything is trained, that there will be a report to write.

    Raises:
        ArgumentError: `--html` without `--validation`.
    """
    if html is not None and validation is None:
        raise ArgumentError("--html", "needs --validation: there is nothing to report without it")


def show_trained(model: Path, report: Report | None, *, html: Path | None, json: bool) -> None:
    """Print where a model was saved and, if one was made, its report; also as a page.

    Args:
        model: the folder.
        report: None without validation data.
        html: file for the page.
        json: the command's `--json`.
    """
    if report is None:
        show({"model": model, "report": None}, f"model: {model}", json=json)
        return
    if html is not None:
        report.save_html(html)
    note(f"model: {model}")
    show({"model": model, "report": report.to_dict()}, report, json=json)


def show_losses(document: dict[str, Any], metrics: Mapping[str, float], *, json: bool) -> None:
    """Print what training an LLM or a judge made, and its losses.

    Args:
        document: what is printed before them.
        metrics: of the training; text shows the losses alone, the document all.
        json: the command's `--json`.
    """
    losses = {name: f"{value:.4f}" for name, value in metrics.items() if "loss" in name}
    text = "\n".join(f"{name:<16}{value}" for name, value in {**document, **losses}.items())
    show(document | {"metrics": dict(metrics)}, text, json=json)


def note(message: str) -> None:
    """Print a remark on stderr: what the command does, or a warning. Never a result."""
    typer.echo(message, err=True)


@contextmanager
def progress_notes(*packs: str) -> Iterator[None]:
    """Print what engines log of their jobs, and what these packs log, until the block ends."""
    handler = _Notes(logging.INFO)
    loggers = [logging.getLogger(name) for name in (*_TOLD, *packs)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        # Above a bar that is being drawn, not behind it.
        tqdm.write(record.getMessage(), file=sys.stderr)


@contextmanager
def only_json() -> Iterator[None]:
    """Let only `show` write to stdout; what libraries print there goes to stderr."""
    global _document_stream
    stdout, before = sys.stdout, _document_stream
    _document_stream, sys.stdout = stdout, sys.stderr
    try:
        yield
    finally:
        _document_stream, sys.stdout = before, stdout


def _pairs(document: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 3))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in document.items():
        table.add_row(Text(str(key)), Text(str(value)))
    return table


def _dumps(document: Any, stream: TextIO) -> str:
    plain = _plain(document)
    text = jsonlib.dumps(plain, ensure_ascii=False, indent=2)
    try:
        text.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:  # a terminal that is not UTF-8, or a file name that is not
        text = jsonlib.dumps(plain, indent=2)
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy arrays and numbers
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
