"""`mlx-sleep chat` and `mlx-sleep generate`: a session in a pipe; terminal.py has the other one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..thoughts import Thought
from ..utils.errors import UserError
from . import output, slash
from .history import history_file
from .options import Json, MemoryName, SessionOptions, SleepOnBattery, with_session_options
from .sleeping import DEEP, SYSTEM_WAITS, Interrupts, kind, may_sleep

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
    history: Annotated[
        bool,
        typer.Option(help="Keep what is typed, for the arrow keys: a private file a memory."),
    ] = True,
    sleep_on_battery: SleepOnBattery = False,
    deep_sleep: Annotated[
        Literal["off", "auto"],
        typer.Option(
            help="auto: after five idle minutes the model is asked what it remembers; if that has "
            "faded, the memory is rebuilt from its transcript, and kept if it is better."
        ),
    ] = "off",
):
    """Chat with a model that sleeps when you are idle, and remembers when you come back.

    In a pipe each line is a turn. Idle, it does not sleep on battery, in a low power mode or when
    the machine is hot; it does when the window is full, on /sleep and at the end.

    Example: mlx-sleep chat --memory work --idle 30
    """
    if idle is not None and not 0 <= idle < float("inf"):
        raise UserError("--idle must be a number of seconds; 0 never sleeps on its own")
    memory = options.chosen.memory if memory is None else memory
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

    file = history_file(memory, options.home) if history else None
    manners = Manners(on_battery=sleep_on_battery)
    deep = DEEP if deep_sleep == "auto" else 0
    Terminal(session, options.chosen.name, idle, manners, file, deep).run()


@with_session_options
def generate(
    options: SessionOptions,
    words: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", help="What to say; - takes all of standard input.", show_default=False
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The same, as an option.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="The memory's name. (default: remember nothing)")
    ] = None,
    json: Json = False,
):
    """Say one thing, print the reply, sleep, leave.

    Example: mlx-sleep generate --memory work "My cat is called Zorvi."
    """
    if words is not None and prompt is not None:
        raise UserError("there are two prompts; give one, with or without --prompt")
    text = (words if prompt is None else prompt) or ""
    if text == "-":
        text = "".join(_lines())
    if not text.strip():
        raise UserError('the prompt is empty; say something: mlx-sleep generate "Hello"')
    session = options.open(memory)
    if memory is not None:
        _say_kind(session)
    with _closing(session, may_sleep(session.model)), Interrupts() as ctrl_c:
        if json:
            output.print_json(_reply_as_json(session, text, ctrl_c))
        else:
            _print_reply(session, text, ctrl_c)
            if session.cut and sys.stderr.isatty():
                output.note(f"cut at {session.max_tokens} tokens; --max-tokens changes that")
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


def _reply_as_json(session: Session, text: str, ctrl_c: Interrupts) -> dict:
    """A reply by the names of mlx-lm's and OpenAI's answers; without Ctrl-C it is whole."""
    pieces = list(_pieces(session, text, ctrl_c))
    reply = "".join(piece for piece in pieces if not isinstance(piece, Thought))
    stats = session.stats()
    return {
        "text": reply,
        "finish_reason": "cancelled" if ctrl_c.count else "length" if session.cut else "stop",
        "window_tokens": stats.window_tokens,
        "prompt_tps": stats.prompt_tps,
        "generation_tps": stats.generation_tps,
    }


def _pieces(session: Session, text: str, ctrl_c: Interrupts) -> Generator[str]:
    """A reply until its end or Ctrl-C."""
    from ..sleep import SleepCancelled

    def on_read(done: int, total: int) -> None:
        if ctrl_c.count:
            raise SleepCancelled

    try:
        said = session.say(text, should_stop=lambda: ctrl_c.count > 0, on_read=on_read)
        with contextlib.closing(said) as pieces:
            for piece in pieces:
                yield piece
                if ctrl_c.count:
                    break
    except SleepCancelled:  # by Ctrl-C, while it read the turn or slept because it was full
        pass


def _print_reply(session: Session, text: str, ctrl_c: Interrupts) -> None:
    thoughts, thinking = output.stderr(), False
    with contextlib.closing(_pieces(session, text, ctrl_c)) as pieces:
        for piece in pieces:
            if isinstance(piece, Thought):
                output.thought(piece, thoughts)
            elif thinking:
                output.thought("\n", thoughts)
            thinking = isinstance(piece, Thought)
            if not thinking:
                output.piece(piece)
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
