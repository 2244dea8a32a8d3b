"""`mlx-sleep serve`: the model over HTTP, as OpenAI's API has it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..utils.errors import UserError
from ..utils.files import reading
from ..utils.pip import pip_install
from . import output
from .options import SessionOptions, SleepOnBattery, with_session_options
from .sleeping import IDLE, kind, may_sleep

QUIET = 5.0
"""Seconds without a key press on the machine before a memory sleeps, where the machine tells."""


@with_session_options
def serve(
    options: SessionOptions,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="MLX_SLEEP_API_KEY",
            help="Key that clients must send; others can see it here, not in the environment.",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with that key, which nobody else can read.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="A web page's origin that may ask, as https://app.example; repeatable."),
    ] = None,
    idle: Annotated[
        float | None,
        typer.Option(
            help="Seconds without a request before a memory sleeps; 0 is never. "
            "(default: 10; 0 for a model that was not trained to sleep)",
            show_default=False,
        ),
    ] = None,
    sleep_on_battery: SleepOnBattery = False,
    memories: Annotated[
        int, typer.Option(min=4, help="Sessions kept in RAM; the others wait on the disk.")
    ] = 8,
):
    """Serve the model to other programs: OpenAI's chat completions, and a page to chat in.

    A memory is chosen by the header X-Memory, or by the request's `user`; without one, nothing is
    remembered. Idle, a memory does not sleep on battery, in a low power mode, or when the machine
    is hot or somebody uses it.

    Example: mlx-sleep serve --port 8080
    """
    if idle is not None and not 0 <= idle < float("inf"):
        raise UserError("--idle must be a number of seconds; 0 never sleeps on its own")
    from ..manners import Manners

    try:
        from ..server import app, engine, run, sessions
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("starlette", "uvicorn", "anyio"):
            raise
        raise UserError(
            f"there is no {error.name} here; {pip_install('mlx-sleep[serve]')}"
        ) from None
    if api_key_file is not None:
        api_key = _read_key(api_key_file)
    run.check_key(host, api_key)
    with run.listen(host, port) as listener:
        chosen = options.chosen
        with output.StatusLine() as status:
            status.show(f"loading {chosen.name} ...")
            like = options.open(None)
            made = sessions.Sessions(
                like, _fingerprint(options), chosen.name, home=options.home, limit=memories
            )
        # The chat's user has left the keyboard when it sleeps; a server's may be working.
        manners = Manners(on_battery=sleep_on_battery, quiet=QUIET)
        if not may_sleep(like.model, idle):
            output.note(kind(like.model))
            idle = 0
        runs = engine.Engine(made, idle=IDLE if idle is None else idle, may_sleep=manners)
        served = app.make_app(runs, host=host, key=api_key, origins=allow_origin or ())
        name = f"[{host}]" if ":" in host else host
        port = listener.getsockname()[1]
        output.line(f"mlx-sleep serves {chosen.name} at http://{name}:{port}; Ctrl-C stops it")
        run.run(served, runs, listener)
        output.note("stopped; what was said is kept")
    # All is on the disk. An ordinary end has been seen to abort: MLX keeps threads for the engine's
    # own, which may still be going when the interpreter ends.
    sys.stdout.flush()
    os._exit(0)


def _read_key(file: Path) -> str:
    with reading(file):
        if file.stat().st_mode & 0o077:
            raise UserError(f"others can read {file}: chmod 600 {file}")
        return file.read_bytes().decode(errors="replace").strip()


def _fingerprint(options: SessionOptions) -> str:
    from ..models.source import fingerprint

    return fingerprint(options.chosen.open(), options.chosen.adapter)
