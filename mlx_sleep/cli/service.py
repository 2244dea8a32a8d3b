"""`mlx-sleep service`: the server started with the user's session, by launchd or systemd."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..utils.errors import UserError
from ..utils.files import os_errors_as_user_errors
from . import output

if TYPE_CHECKING:
    from ..server.service import Service

app = typer.Typer(add_completion=False, no_args_is_help=True)

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, do nothing.")]


@app.callback()
def _services():
    """Start the server with your session, by launchd or systemd.

    Example: mlx-sleep service install --dry-run
    """


@app.command()
def install(
    options: Annotated[
        list[str] | None, typer.Argument(help="Options of `mlx-sleep serve`, after --.")
    ] = None,
    dry_run: DryRun = False,
):
    """Serve from now on, and whenever you log in. Installed again, it takes the new options.

    Example: mlx-sleep service install -- --model smollm2 --port 8080
    """
    arguments = list(options or ())
    _check(arguments)
    service = _service(arguments)
    if dry_run:
        output.line(f"# {service.file}")
        output.line(service.text.decode().rstrip("\n"))
        for command in service.start:
            output.line(f"# {' '.join(command)}")
        return
    same = service.file.is_file() and service.file.read_bytes() == service.text
    if same and _succeeds(service.status):
        output.line(f"it is installed and running: {service.file}")
        return
    from ..utils.atomic import fsync_path, make_folder, replace_file

    with os_errors_as_user_errors(f"cannot write {service.file}", "check that folder"):
        make_folder(service.file.parent)
        replace_file(service.file, service.text)
        fsync_path(service.file.parent)
    before, *start = service.start
    was_running = _succeeds(before)
    for command in start:
        # launchd says that a service is stopped before it is, and until then starts no other.
        _do(command, tries=20 if was_running else 1)
    output.line(f"installed and started: {service.file}")


@app.command()
def status():
    """Say whether the service is installed, and whether it runs: the exit code is 0 if it does.

    Example: mlx-sleep service status
    """
    service = _service([])
    if not service.file.is_file():
        output.line("not installed; mlx-sleep service install does that")
        raise typer.Exit(1)
    runs = _succeeds(service.status)
    output.line(f"installed, {'running' if runs else 'not running'}: {service.file}")
    raise typer.Exit(0 if runs else 1)


@app.command()
def remove(dry_run: DryRun = False):
    """Stop the service and take it away. Memories and models stay.

    Example: mlx-sleep service remove
    """
    service = _service([])
    if not service.file.is_file():
        output.line("not installed")
        return
    if dry_run:
        for command in service.stop:
            output.line(f"# {' '.join(command)}")
        output.line(f"# rm {service.file}")
        return
    for command in service.stop:
        _succeeds(command)  # it may not run
    with os_errors_as_user_errors(f"cannot remove {service.file}", "check that folder"):
        service.file.unlink()
    output.line(f"stopped and removed: {service.file}")


def _check(arguments: list[str]) -> None:
    """What `serve` would say to its options, now and not in a log."""
    from .serve import serve

    app = typer.Typer(add_completion=False)
    app.command("serve")(serve)
    command = typer.main.get_command(app)
    if any(word.split("=")[0] == "--api-key" for word in arguments):
        raise UserError("the service's file is no place for a key; use --api-key-file")
    command.make_context("mlx-sleep serve", list(arguments), resilient_parsing=False)


def _service(arguments: list[str]) -> Service:
    from ..server.service import service

    program = str(Path(sys.executable).with_name("mlx-sleep"))
    names = ("MLX_SLEEP_HOME", "HF_HOME", "HF_HUB_CACHE")
    environment = {name: os.environ[name] for name in names if os.environ.get(name)}
    return service(
        [program, "serve", *arguments],
        environment,
        platform=sys.platform,
        home=Path.home(),
        uid=os.getuid(),
    )


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        message = f"cannot run {command[0]}: {error.strerror}; this needs launchd or systemd"
        raise UserError(message) from error


def _succeeds(command: list[str]) -> bool:
    return _run(command).returncode == 0


def _do(command: list[str], tries: int) -> None:
    for left in reversed(range(tries)):
        done = _run(command)
        if not done.returncode:
            return
        if left:
            time.sleep(0.5)
    reason = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
    raise UserError(f"{' '.join(command)} failed: {reason}")
