"""`mlx-sleep chat` and `mlx-sleep generate`: a session in a pipe; terminal.py has the other one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from ..thoughts import Thought
from ..utils.errors import UserError
from . import output, slash
from .options import MemoryName, SessionOptions, SleepOnBattery, with_session_options
from .sleeping import SYSTEM_WAITS, Interrupts, kind, may_sleep

if TYPE_CHECKING:  # it imports MLX
    from ..session import Session


@with_session_options
def chat(
    options: SessionOptions,
    memory: MemoryName = None,
    idle: Annotated[
        float | None,
        typer.Option(
            help="Seconds without a key press before it sleeps; 0 is never. "
            "(default: 10; 0 for a model that was not trained to sleep)",
            show_default=False,
        ),
    ] = None,
    sleep_on_battery: SleepOnBattery = False,
):
    """Chat with a model that sleeps when you are idle, and remembers when you come back.

    In a pipe each line is a turn. Idle, it does not sleep on battery, in a low power mode or when
    the machine is hot; it does when the window is full, on /sleep and at the end.

    Example: mlx-sleep chat --memory work --idle 30
    """
    if idle is not None and not 0 <= idle < float("inf"):
        raise UserError("--idle must be a number of seconds; 0 never sleeps on its own")
    memory = memory or options.chosen.memory
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        session = options.open(memory)
        _say_kind(session)
        _run_in_pipe(session, sleeps=may_sleep(session.model, idle))
        return
    with output.StatusLine() as status:
        status.show(f"loading {options.chosen.name} ...")
        session = options.open(memory)
    from ..manners import Manners
    from .terminal import Terminal

    manners = Manners(on_battery=sleep_on_battery)
    Terminal(session, options.chosen.name, idle, manners).run()


@with_session_options
def generate(
    options: SessionOptions,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="What to say; - takes all of standard input.")
    ],
    memory: Annotated[
        str | None, typer.Option(help="The memory's name. (default: remember nothing)")
    ] = None,
):
    """Say one thing, print the reply, sleep, leave.

    Example: mlx-sleep generate --memory work --prompt "My cat is called Zorvi."
    """
    if prompt == "-":
        prompt = "".join(_lines())
    if not prompt.strip():
        raise UserError('the prompt is empty; give one with --prompt "..."')
    session = options.open(memory)
    if memory is not None:
        _say_kind(session)
    with _closing(session, may_sleep(session.model)), Interrupts() as ctrl_c:
        _print_reply(session, prompt, ctrl_c)
    if ctrl_c.count:
        raise typer.Exit(130)


# --- in a pipe -----------------------------------------------------------------------------


def _say_kind(session: Session) -> None:
    """A line about a model that doesn't sleep by itself; nothing of one that does. And one about a
    system prompt that waits."""
    if session.system_prompt_waits:
        output.note(SYSTEM_WAITS)
    if not session.model.trained_to_sleep:
        output.note(kind(session.model))


def _run_in_pipe(session: Session, sleeps: bool) -> None:
    """A turn for each line until the end of the input; then it sleeps, if it may."""
    with _closing(session, sleeps):
        for line in _lines():
            text = line.strip()
            if not text:
                continue
            if command := slash.command(text):
                if command == "/exit":
                    break
                for out in slash.answer(session, command, confirm=None):
                    output.line(out)
                continue
            with Interrupts() as ctrl_c:
                _print_reply(session, text, ctrl_c)
            if ctrl_c.count > 1:
                break


@contextlib.contextmanager
def _closing(session: Session, sleeps: bool) -> Iterator[None]:
    """Sleeps, if it may, and closes on the way out, also when nobody reads the output any more.

    After any other error it only closes: what was said is in the journal.
    """
    try:
        yield
    except BrokenPipeError:
        session.close(sleep=sleeps)
        kept = f"; memory '{session.memory.name}' keeps what was said" if session.memory else ""
        output.note(f"error: nobody reads the output any more{kept}")
        raise
    except BaseException:
        session.close(sleep=False)
        raise
    session.close(sleep=sleeps)


def _print_reply(session: Session, text: str, ctrl_c: Interrupts) -> None:
    from ..sleep import SleepCancelled

    thoughts, thinking = output.stderr(), False
    try:
        said = session.say(text, should_stop=lambda: ctrl_c.count > 0)
        with contextlib.closing(said) as pieces:
            for piece in pieces:
                if isinstance(piece, Thought):
                    output.thought(piece, thoughts)
                elif thinking:
                    output.thought("\n", thoughts)
                thinking = isinstance(piece, Thought)
                if not thinking:
                    output.piece(piece)
                if ctrl_c.count:
                    break
    except SleepCancelled:  # by Ctrl-C, while the window slept because it was full
        pass
    output.line()


def _lines() -> Iterator[str]:
    """Lines of standard input. UserError when one isn't UTF-8, whatever the locale says."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise UserError(
                f"line {number} of the input is not UTF-8; convert it, for example with iconv"
            ) from None
