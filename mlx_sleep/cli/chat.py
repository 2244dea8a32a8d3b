"""`mlx-sleep chat` and `mlx-sleep generate`: a session in a pipe; terminal.py has the other one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from ..utils.errors import UserError
from . import common, slash

if TYPE_CHECKING:  # it imports MLX
    from ..session import Session


def chat(
    model: common.Model = None,
    memory: Annotated[str, typer.Option(help="The memory's name.")] = "default",
    home: common.Home = None,
    idle: Annotated[
        float, typer.Option(help="Seconds without a key press before it sleeps; 0 is never.")
    ] = 10.0,
    passes: common.Passes = None,
    window: common.Window = None,
    max_tokens: common.MaxTokens = 256,
    temp: common.Temp = 0.0,
    top_p: common.TopP = 1.0,
    seed: common.Seed = None,
):
    """Chat with a model that sleeps when you are idle, and remembers when you come back.

    In a pipe each line is a turn.

    Example: mlx-sleep chat --memory work --idle 30
    """
    if not 0 <= idle < float("inf"):
        raise UserError("--idle must be a number of seconds; 0 never sleeps on its own")
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if on_terminal:
        sys.stdout.write(f"loading {model or 'the embedded model'} ...")
        sys.stdout.flush()
    try:
        session = _open(model, memory, home, passes, window, max_tokens, temp, top_p, seed)
    finally:
        if on_terminal:
            sys.stdout.write("\r\x1b[K")
            sys.stdout.flush()
    if on_terminal:
        from .terminal import Terminal

        Terminal(session, model or "embedded", idle).run()
    else:
        _run_in_pipe(session)


def generate(
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="What to say; - takes all of standard input.")
    ],
    model: common.Model = None,
    memory: Annotated[
        str | None, typer.Option(help="The memory's name. (default: remember nothing)")
    ] = None,
    home: common.Home = None,
    passes: common.Passes = None,
    window: common.Window = None,
    max_tokens: common.MaxTokens = 256,
    temp: common.Temp = 0.0,
    top_p: common.TopP = 1.0,
    seed: common.Seed = None,
):
    """Say one thing, print the reply, sleep, leave.

    Example: mlx-sleep generate --memory work --prompt "My cat is called Zorvi."
    """
    if prompt == "-":
        prompt = "".join(_lines())
    if not prompt.strip():
        raise UserError('the prompt is empty; give one with --prompt "..."')
    session = _open(model, memory, home, passes, window, max_tokens, temp, top_p, seed)
    with _closing(session), common.Interrupts() as ctrl_c:
        _print_reply(session, prompt, ctrl_c)
    if ctrl_c.count:
        raise typer.Exit(130)


def _open(model, memory, home, passes, window, max_tokens, temp, top_p, seed) -> Session:
    from ..session import Session

    return Session.open(
        model,
        memory,
        home=home,
        passes=passes,
        window=window,
        max_tokens=max_tokens,
        temp=temp,
        top_p=top_p,
        seed=seed,
    )


# --- in a pipe -----------------------------------------------------------------------------


def _run_in_pipe(session: Session):
    """A turn for each line until the end of the input; then it sleeps."""
    with _closing(session):
        for line in _lines():
            text = line.strip()
            if not text:
                continue
            if command := slash.command(text):
                if command == "/exit":
                    break
                for out in slash.answer(session, command, confirm=lambda: True):
                    print(out, flush=True)
                continue
            with common.Interrupts() as ctrl_c:
                _print_reply(session, text, ctrl_c)
            if ctrl_c.count > 1:
                break


@contextlib.contextmanager
def _closing(session: Session) -> Iterator[None]:
    """Sleeps and closes on the way out, also when nobody reads the output any more.

    After any other error it only closes: what was said is in the journal.
    """
    try:
        yield
    except BrokenPipeError:
        session.close()
        kept = f"; memory '{session.memory.name}' keeps what was said" if session.memory else ""
        print(f"error: nobody reads the output any more{kept}", file=sys.stderr)
        raise
    except BaseException:
        session.close(sleep=False)
        raise
    session.close()


def _print_reply(session: Session, text: str, ctrl_c: common.Interrupts):
    from ..sleep import SleepCancelled

    try:
        said = session.say(text, should_stop=lambda: ctrl_c.count > 0)
        with contextlib.closing(said) as pieces:
            for piece in pieces:
                sys.stdout.write(common.printable(piece))
                sys.stdout.flush()
                if ctrl_c.count:
                    break
    except SleepCancelled:  # by Ctrl-C, while the window slept because it was full
        pass
    print(flush=True)


def _lines() -> Iterator[str]:
    """Lines of standard input. UserError when one isn't UTF-8, whatever the locale says."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise UserError(
                f"line {number} of the input is not UTF-8; convert it, for example with iconv"
            ) from None
