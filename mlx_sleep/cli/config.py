"""`mlx-sleep config`: the user's config file."""

from __future__ import annotations

from typing import Annotated

import typer

from . import config_file
from .options import Json
from .output import line, print_json

app = typer.Typer(add_completion=False, no_args_is_help=True)

Key = Annotated[str, typer.Argument(help="A setting; mlx-sleep config list shows them.")]


@app.callback()
def _config():
    """Defaults of chat and generate: model, memory and options, kept in a file.

    A flag is stronger than an environment variable, and that than the file.

    Example: mlx-sleep config set model smollm2
    """


@app.command("list")
def list_settings(json: Json = False):
    """Show what is set, and what could be.

    Example: mlx-sleep config list
    """
    values = config_file.read()
    if json:
        print_json(values)
        return
    for key in config_file.KEYS:
        line(f"{key:<19} {values.get(key, '-')}")


@app.command()
def get(key: Key):
    """Print one setting; nothing, and exit code 1, if it isn't set.

    Example: mlx-sleep config get model
    """
    config_file.check_key(key)
    values = config_file.read()
    if key not in values:
        raise typer.Exit(1)
    line(str(values[key]))


@app.command("set")
def set_setting(
    key: Key,
    value: Annotated[str | None, typer.Argument(help="Its value; none takes it out.")] = None,
):
    """Change a setting.

    Example: mlx-sleep config set temp 0.7
    """
    config_file.put(key, value)
    line(f"{key} = {value}" if value is not None else f"{key} is not set")


@app.command()
def path():
    """Print where the file is, whether it exists or not.

    Example: mlx-sleep config path
    """
    line(str(config_file.path()))
