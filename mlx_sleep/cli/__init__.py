"""The command line. Commands are thin: each reads its options and calls the library.

A command's module is imported when it is asked for, and imports MLX only when it runs, so that
`mlx-sleep --version` and a wrong option answer at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from .. import __version__
from ..utils import limits
from ..utils.errors import UserError, message_of
from ..utils.malloc import keep_freed_memory
from . import config_file, output

# name -> module of this package and what it has: a function, or a Typer with commands of its own
COMMANDS = {
    "chat": ("chat", "chat"),
    "generate": ("chat", "generate"),
    "serve": ("serve", "serve"),
    "service": ("service", "app"),
    "sleep": ("memory", "sleep"),
    "memory": ("memory", "app"),
    "train": ("train", "train"),
    "retrofit": ("retrofit", "retrofit"),
    "eval": ("evaluate", "evaluate"),
    "study": ("study", "study"),
    "bench": ("bench", "app"),
    "convert": ("convert", "convert"),
    "export": ("convert", "export"),
    "fuse": ("models", "fuse"),
    "models": ("models", "app"),
    "config": ("config", "app"),
    "doctor": ("doctor", "doctor"),
}


class _Commands(typer.core.TyperGroup):
    """Looks commands up in COMMANDS."""

    def list_commands(self, ctx):
        return list(COMMANDS)

    def get_command(self, ctx, name):
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name]
        target = getattr(importlib.import_module(f".{module}", __package__), attribute)
        if not isinstance(target, typer.Typer):
            function, target = target, typer.Typer(add_completion=False)
            target.command(name)(function)
        command = typer.main.get_command(target)
        command.name = name
        return command


app = typer.Typer(cls=_Commands, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        output.line(f"mlx-sleep {__version__}")
        raise typer.Exit()


@app.callback(no_args_is_help=True)
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="The version.")
    ] = False,
    no_limits: Annotated[
        bool,
        typer.Option("--no-limits", help="Read files that ask for more than any known model has."),
    ] = False,
):
    """A language model that sleeps: it folds what it hears into its fast weights.

    Example: mlx-sleep chat
    """
    if no_limits:
        limits.lift()
    if ctx.invoked_subcommand in config_file.COMMANDS and "--help" not in sys.argv:
        ctx.default_map = {ctx.invoked_subcommand: config_file.defaults(ctx.invoked_subcommand)}


# typer's own class, or click's in a typer that has none: what both raise for a wrong option.
_UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def main() -> NoReturn:
    """The entry point. An error is one line on standard error; the exit code is 2 where typer
    could not read the command line, 1 for a UserError."""
    _open_standard_streams()
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a reply may not fit the locale's encoding
            stream.reconfigure(errors="replace")
    try:
        code = app(prog_name="mlx-sleep", standalone_mode=False)
    except _UsageError as error:
        message = error.format_message()
        if not message or "\n" in message:  # no error: a group called alone shows its help
            output.line(message.rstrip("\n"))
            sys.exit(error.exit_code)
        command = error.ctx.command_path if getattr(error, "ctx", None) else "mlx-sleep"
        _fail(f"{message.rstrip('.')}; see {command} --help", error.exit_code)
    except typer.Abort:
        _fail("aborted")
    except (UserError, OSError) as error:
        if isinstance(error, OSError):  # what could not be written must not be tried again at exit
            sys.stdout = open(os.devnull, "w")
        _fail(message_of(error))
    else:
        sys.exit(code)  # that of a typer.Exit; commands return None


def _fail(message: str, code: int = 1) -> NoReturn:
    output.note(f"error: {' '.join(message.split())}")
    sys.exit(code)


def _open_standard_streams() -> None:
    """Gives a stream that the caller closed (`<&-`) the null device.

    Else the next file would get its number: MLX cannot read from file 0, and a library that
    prints would write into a memory.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
