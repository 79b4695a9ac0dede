"""The `ft` command: finds what the installed packs can do, and runs it.

Packs add commands through the entry-point group `ft_core.commands`; `ft_core.console` shows
how. A pack is imported when one of its commands is invoked, and all are for `ft --help`; one
that cannot be imported is listed with the reason and leaves the others alone.

Exit codes: 0 done; 1 an error that the message explains; 2 a wrong command line;
130 stopped by Ctrl-C.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import nullcontext
from importlib import import_module, metadata
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from typer.core import TyperGroup

from ft_core import __version__
from ft_core.catalogue import PACKS, installed_version
from ft_core.console import JsonOption, only_json, show
from ft_core.errors import FTError

COMMAND_GROUP = "ft_core.commands"
"""The entry-point group: command name to a `typer.Typer` with one command or several."""

_OWN_COMMANDS = {
    "dataset": "ft_core.cli_dataset:dataset_app",
    "report": "ft_core.cli_report:report_app",
}


class LazyCommands(MutableMapping[str, Any]):
    """Command name to command, each imported when it is first asked for."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}
        self._entries: dict[str, list[metadata.EntryPoint]] = {name: [] for name in _OWN_COMMANDS}
        for entry in sorted(metadata.entry_points(group=COMMAND_GROUP), key=_order):
            known = self._entries.setdefault(entry.name, [])
            # A distribution that stands twice on sys.path is no conflict.
            if entry.value not in [other.value for other in known]:
                known.append(entry)

    def packs(self) -> set[str]:
        """Return the distributions that bring a command."""
        return {_distribution(entry) for entries in self._entries.values() for entry in entries}

    def __getitem__(self, name: str) -> Any:
        if name not in self._entries and name not in self._loaded:
            raise KeyError(name)
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._loaded[name] = command

    def __delitem__(self, name: str) -> None:
        self._entries.pop(name, None)
        self._loaded.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter({**self._entries, **self._loaded})

    def __len__(self) -> int:
        return len({**self._entries, **self._loaded})

    def _load(self, name: str) -> Any:
        entries = self._entries[name]
        panel = None
        try:
            if name in _OWN_COMMANDS:
                module, attribute = _OWN_COMMANDS[name].split(":")
                app = getattr(import_module(module), attribute)
            else:
                panel = ", ".join(_distribution(entry) for entry in entries)
                if len(entries) > 1:
                    raise ImportError(f"two packs bring `{name}`, uninstall one")
                app = entries[0].load()
            if not isinstance(app, typer.Typer):
                raise TypeError(f"{entries[0].value} is not a typer.Typer")
            command: Any = typer.main.get_command(app)
        except (Exception, SystemExit) as error:  # whatever a foreign module does at import
            reason = f"cannot be loaded: {type(error).__name__}: {error}"
            command = _broken_command(f"{panel or 'ft-core'}: `ft {name}` {reason}", reason)
        # Only a program's top level can be completed, and Typer takes each pack for one.
        completion = ("install_completion", "show_completion")
        command.params = [param for param in command.params if param.name not in completion]
        command.name = name
        command.rich_help_panel = panel
        return command


class FtGroup(TyperGroup):
    """The top level of `ft`: the commands of all packs, and what else there is to install."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.commands = LazyCommands()

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names; nothing is imported."""
        return list(self.commands)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, then the packs without commands and those not installed."""
        super().format_help(ctx, formatter)
        assert isinstance(self.commands, LazyCommands)
        versions = {name: installed_version(name) for name in PACKS}
        silent = [name for name in PACKS if versions[name] and name not in self.commands.packs()]
        _print_panel("Installed, used from Python", [(n, PACKS[n]) for n in silent])
        missing = [name for name in PACKS if not versions[name]]
        _print_panel("Not installed", [(f"pip install {n}", PACKS[n]) for n in missing])


app = typer.Typer(cls=FtGroup, no_args_is_help=True, add_completion=False)


@app.callback(invoke_without_command=True)
def ft(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print versions and exit.")] = False,
    json: JsonOption = False,
) -> None:
    """Fine-tune the models of a LlamaIndex app on its own data, and prove the gain."""
    if context.invoked_subcommand is not None:
        if version or json:
            context.fail("put --json after the command; --version stands alone")
        return
    installed = {name: number for name in PACKS if (number := installed_version(name))}
    document = {
        "version": __version__,
        "python": platform.python_version(),
        "packs": installed,
        "commands": context.command.list_commands(context),  # type: ignore[attr-defined]
    }
    lines = [f"{name} {number}" for name, number in {"ft-core": __version__, **installed}.items()]
    show(document, "\n".join(lines), json=json)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `ft` with these arguments (`sys.argv` by default) and exit; the console script."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run `ft` and return its exit code: every error a user can cause is one line, no traceback."""
    json = "--json" in arguments
    try:
        with only_json() if json else nullcontext():
            try:
                typer.main.get_command(app).main(args=list(arguments), prog_name="ft")
            except SystemExit as stop:
                if json and stop.code == 2:
                    # Typer has shown the usage; its exception is what led to the exit.
                    usage = getattr(stop.__context__, "format_message", lambda: "wrong usage")()
                    show({"error": {"type": "UsageError", "message": usage}}, json=True)
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            except (FTError, OSError) as error:
                if isinstance(error, BrokenPipeError):
                    raise
                code = _fail(error, json=json)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has gone: without this, Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _fail(error: Exception, *, json: bool) -> int:
    message = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    message = " ".join(message.splitlines())
    typer.echo(f"Error: {message}", err=True)
    if json:
        show({"error": {"type": type(error).__name__, "message": message}}, json=True)
    return 1


def _broken_command(message: str, reason: str) -> Any:
    """Return a command that takes any arguments and fails with the message."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)

    @app.command(
        help=reason,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def fail(context: typer.Context) -> None:
        raise FTError(message)

    return typer.main.get_command(app)


def _distribution(entry: metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value.split(":")[0]


def _order(entry: metadata.EntryPoint) -> tuple[int, str]:
    """Sort the packs as the catalogue does, foreign ones last."""
    name = _distribution(entry)
    return (list(PACKS).index(name) if name in PACKS else len(PACKS), name)


def _print_panel(title: str, rows: Sequence[tuple[str, str]]) -> None:
    if not rows:
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold cyan")
    table.add_column()
    for row in rows:
        table.add_row(*row)
    Console().print(Panel(table, title=title, title_align="left", border_style="dim"))
