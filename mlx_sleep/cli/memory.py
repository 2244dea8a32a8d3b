"""`mlx-sleep memory ...` and `mlx-sleep sleep`: memories seen from outside a chat."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options, output
from .history import history_file, remove_history
from .model_names import choose
from .output import line
from .sleeping import describe, watch

if TYPE_CHECKING:  # it imports MLX
    from ..memory import Listing

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="List, copy and remove memories.\n\nExample: mlx-sleep memory list",
)

Name = Annotated[str, typer.Argument(help="The memory's name.")]


@app.command("list")
def list_(home: options.Home = None, as_json: options.Json = False):
    """List every memory, with what it holds.

    Example: mlx-sleep memory list --json
    """
    from ..memory import data_dir, list_memories

    memories = list_memories(home)
    if as_json:
        output.print_json({"memories": [_as_dict(memory) for memory in memories]})
        return
    if not memories:
        line(f"no memories in {data_dir(home)}; `mlx-sleep chat` makes one")
        return
    rows = [["NAME", "SLEEPS", "TOKENS", "WAITING", "SIZE", "UPDATED"]]
    for memory in memories:
        header = memory.header
        counters = [header.sleeps, header.tokens, memory.pending] if header else ["?"] * 3
        updated = header.updated[:16].replace("T", " ") if header else ""
        rows.append([memory.name, *map(str, counters), output.size(memory.bytes), updated])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells, updated in rows:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=False)]
        line("  ".join([name.ljust(widths[0]), *right, updated]).rstrip())
    for memory in memories:
        if memory.problem:
            line(f"{memory.name}: {memory.problem}")


@app.command()
def show(name: Name, home: options.Home = None, as_json: options.Json = False):
    """Show one memory: its counters and where it came from.

    Example: mlx-sleep memory show default
    """
    from ..memory import show_memory

    memory = show_memory(name, home)
    if as_json:
        output.print_json(_as_dict(memory))
        return
    lines: dict[str, object] = {"name": name, "size": output.size(memory.bytes)}
    if header := memory.header:
        lines |= {
            "model": f"{header.model or '?'} (fingerprint {header.fingerprint[:12]})",
            "sleeps": header.sleeps,
            "tokens": f"{header.tokens} folded in, {memory.pending} waiting for the next sleep",
            "created": header.created,
            "updated": header.updated,
        }
        if header.sleeps:
            lines["last sleep"] = (
                f"{output.count(header.passes, 'pass')}, window {header.window}, "
                f"{header.eviction} eviction"
            )
        if header.parent:
            lines["fork of"] = header.parent
    if memory.problem:
        lines["problem"] = memory.problem
    width = max(map(len, lines))
    for label, value in lines.items():
        line(f"{label:{width}}  {value}")


@app.command()
def fork(
    source: Annotated[str, typer.Argument(help="The memory to copy.")],
    target: Annotated[str, typer.Argument(help="The name of the copy.")],
    home: options.Home = None,
):
    """Copy a memory to a new name; the two then go separate ways.

    Example: mlx-sleep memory fork default experiment
    """
    from ..memory import fork as run

    run(source, target, home)
    line(f"memory '{target}' is now a copy of '{source}'")


@app.command("export")
def export(
    name: Name,
    file: Annotated[Path, typer.Argument(help="The file to write; it must not exist.")],
    home: options.Home = None,
):
    """Write a memory to one safetensors file.

    Example: mlx-sleep memory export default backup.safetensors
    """
    from ..memory import export_memory

    export_memory(name, file, home)
    line(f"wrote {file}")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="An exported memory.")],
    name: Annotated[str, typer.Argument(help="The name to give it; it must not exist.")],
    home: options.Home = None,
):
    """Make a memory from an exported file.

    Example: mlx-sleep memory import backup.safetensors restored
    """
    from ..memory import import_memory

    import_memory(file, name, home)
    line(f"imported memory '{name}'; `mlx-sleep chat --memory {name}` uses it")


@app.command()
def rm(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    home: options.Home = None,
):
    """Delete a memory for good.

    Example: mlx-sleep memory rm experiment --yes
    """
    from ..memory import remove, show_memory

    show_memory(name, home)  # that it exists, before asking
    if not yes and not typer.confirm(f"delete memory '{name}' for good?"):
        raise typer.Exit(1)
    remove(name, home)
    remove_history(history_file(name, home))
    line(f"deleted memory '{name}'")


def sleep(
    memory: options.MemoryName = None,
    model: options.Model = None,
    adapter_path: options.AdapterPath = None,
    revision: options.Revision = None,
    local_files_only: options.LocalFilesOnly = False,
    home: options.Home = None,
    passes: options.Passes = None,
    window: options.Window = None,
):
    """Fold what a memory has heard since its last sleep into its fast weights.

    Example: mlx-sleep sleep --memory work --passes 4
    """
    from ..memory import show_memory
    from ..session import Session
    from ..sleep import SleepCancelled

    chosen = choose(model, adapter_path, revision, local_files_only)
    memory = memory or chosen.memory
    show_memory(memory, home)  # a chat makes memories, a sleep doesn't
    with Session.open(
        chosen.open(), memory, adapter=chosen.adapter, home=home, passes=passes, window=window
    ) as session:
        try:
            report = watch(session, session.sleep)
        except SleepCancelled:
            output.note("sleep cancelled; nothing is lost")
            raise typer.Exit(130) from None
        if report is None:
            line(f"nothing to sleep over: memory '{memory}' has heard nothing new")
        else:
            line(describe(report, session))


def _as_dict(memory: Listing) -> dict:
    fields = asdict(memory)
    return {"name": fields.pop("name"), **(fields.pop("header") or {}), **fields}
