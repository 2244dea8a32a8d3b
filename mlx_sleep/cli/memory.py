"""`mlx-sleep memory ...` and `mlx-sleep sleep`: memories seen from outside a chat."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from . import config_file, options, output
from .history import history_file, remove_history
from .model_names import choose
from .output import line
from .sleeping import describe, watch
from .transcript import said

if TYPE_CHECKING:  # it imports MLX
    from ..memory import Listing, Message
    from ..models.base import SleepModel

app = typer.Typer(add_completion=False, no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The memory's name.")]


@app.callback()
def _memory(ctx: typer.Context):
    """List, copy and remove memories.

    Example: mlx-sleep memory list
    """
    if ctx.invoked_subcommand == "rebuild" and "--help" not in sys.argv:
        # By default with the model that a chat would have.
        ctx.default_map = {"rebuild": config_file.defaults("rebuild")}


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
    rows = [["NAME", "SLEEPS", "TOKENS", "WAITING", "SIZE", "LAST USE", "MODEL"]]
    for memory in memories:
        header = memory.header
        counters = [header.sleeps, header.tokens, memory.pending] if header else ["?"] * 3
        updated = header.updated[:16].replace("T", " ") if header else ""
        model = header.model if header else ""
        size = output.size(memory.bytes)
        rows.append([memory.name, *map(str, counters), size, updated, model])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells, updated, model in rows:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=False)]
        left = [updated.ljust(widths[-2]), model]
        line("  ".join([name.ljust(widths[0]), *right, *left]).rstrip())
    for memory in memories:
        if memory.problem:
            line(f"{memory.name}: {memory.problem}")


@app.command()
def show(
    name: Name,
    text: Annotated[
        bool, typer.Option("--text", help="What was said, and nothing else: the transcript.")
    ] = False,
    home: options.Home = None,
    as_json: options.Json = False,
):
    """Show one memory: its counters and where it came from.

    Example: mlx-sleep memory show smollm2 --text
    """
    from ..memory import show_memory, transcript

    if text:
        _print_messages(transcript(name, home), as_json)
        return
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


def _print_messages(messages: Iterable[Message], as_json: bool) -> None:
    if as_json:
        output.print_json({"messages": [asdict(message) for message in messages]})
        return
    for message in messages:
        line(said(message))


@app.command()
def search(
    name: Name,
    text: Annotated[str, typer.Argument(help="Words to look for in what was said.")],
    home: options.Home = None,
    as_json: options.Json = False,
):
    """Find what was said in a memory; the best match first.

    Example: mlx-sleep memory search smollm2 "blue van"
    """
    from ..memory import search as find

    found = find(name, text, home)
    _print_messages(found, as_json)
    if not found and not as_json:
        line(f"nothing with {text!r} was said in memory '{name}'")


@app.command()
def rebuild(
    name: Name,
    model: options.Model = None,
    adapter_path: options.AdapterPath = None,
    home: options.Home = None,
    passes: options.Passes = None,
    window: options.Window = None,
):
    """Rebuild a memory from its transcript: for a better model or adapter, or with more passes.

    The old one stays until the new one is whole. Ctrl-C loses nothing.

    Example: mlx-sleep memory rebuild smollm2 --passes 4
    """
    from dataclasses import replace

    from ..memory import Memory, show_memory
    from ..models.load import load
    from ..models.source import fingerprint
    from ..rebuild import rebuild as run
    from ..rebuild import turns

    show_memory(name, home)  # that it exists
    chosen = choose(model, adapter_path)
    source = chosen.open()
    with output.StatusLine() as status:
        status.show(f"loading {chosen.name} ...")
        loaded, tokenizer, _ = load(source, adapter=chosen.adapter)
        mark = fingerprint(source, chosen.adapter)
        with Memory.open(name, mark, home=home, any_model=True) as memory:
            heard = memory.header.tokens + len(memory.pending)
            pairs = turns(memory.messages, heard, name)
            header = replace(memory.header, fingerprint=mark, model=chosen.name)
            contents = run(
                cast("SleepModel", loaded),
                tokenizer,
                header,
                pairs,
                memory.settings,
                passes=passes,
                window=window,
                on_turn=lambda done, all_: status.show(f"reading turn {done} of {all_}"),
            )
            memory.replace(contents)
    after = contents.header
    held = output.holdings(after.tokens, after.sleeps, len(contents.pending))
    line(
        f"memory '{name}' was rebuilt with {chosen.name}: {output.count(len(pairs), 'turn')}, "
        + held
    )


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
