"""`mlx-sleep chat` and `mlx-sleep generate`: a session at a terminal or in a pipe.

On a terminal a second thread sleeps while the prompt waits. It and the main thread never use the
session at the same time: the main thread leaves it alone from `IdleSleeper.start` to `.stop`.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from .. import __version__
from ..errors import UserError
from . import common

if TYPE_CHECKING:  # it imports MLX
    from ..session import Session

HELP = """\
/sleep   fold the window into the fast weights now
/memory  what the memory holds
/stats   window, KV cache and fast weights
/forget  empty the memory
/help    this list
/exit    leave; so do Ctrl-D, and Ctrl-C twice"""


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
    from ..session import Session

    if not 0 <= idle < float("inf"):
        raise UserError("--idle must be a number of seconds; 0 never sleeps on its own")
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if on_terminal:
        sys.stdout.write(f"loading {model or 'the embedded model'} ...")
        sys.stdout.flush()
    try:
        session = Session.open(
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
    finally:
        if on_terminal:
            sys.stdout.write("\r\x1b[K")
            sys.stdout.flush()
    if on_terminal:
        _Terminal(session, model or "embedded", idle).run()
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
    from ..session import Session

    session = Session.open(
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
    with _closing(session), common.Interrupts() as ctrl_c:
        _print_reply(session, prompt, ctrl_c)
    if ctrl_c.count:
        raise typer.Exit(130)


# --- in a pipe -----------------------------------------------------------------------------


def _run_in_pipe(session: Session):
    """A turn for each line until the end of the input; then it sleeps."""
    with _closing(session):
        for line in _lines():
            text = line.strip()
            if not text:
                continue
            if command := _command(text):
                if command == "/exit":
                    break
                for out in _answer(session, command, confirm=lambda: True):
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
    with contextlib.closing(session.say(text)) as pieces:
        for piece in pieces:
            sys.stdout.write(common.printable(piece))
            sys.stdout.flush()
            if ctrl_c.count:
                break
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


# --- commands of a chat --------------------------------------------------------------------


def _command(text: str) -> str | None:
    """The command in a line, or None: "/etc/hosts is a file" is none."""
    word = text.split()[0]
    return word if re.fullmatch(r"/[A-Za-z]*", word) else None


def _answer(session: Session, command: str, confirm: Callable[[], bool]) -> Iterator[str]:
    """Does what a command says, and gives the lines to show."""
    if command == "/help":
        yield HELP
    elif command == "/sleep":
        yield _sleep_now(session)
    elif command == "/memory":
        yield f"memory '{session.memory.name}': {_holdings(session)}"
    elif command == "/stats":
        stats = session.stats()
        yield f"window        {stats.window_tokens} of {common.count(stats.window, 'token')}"
        yield f"KV cache      {common.size(stats.kv_bytes)}"
        yield f"fast weights  {common.size(stats.fast_weight_bytes)}"
        yield f"sleeps        {stats.sleeps}, of {common.count(stats.passes, 'pass')} from now on"
        yield f"tokens        {stats.tokens + stats.window_tokens:,} heard and said"
    elif command == "/forget":
        if confirm():
            session.forget()
            yield "forgotten: the memory is empty"
        else:
            yield "nothing was forgotten"
    else:
        yield f"unknown command {command}; /help lists them"


def _sleep_now(session: Session) -> str:
    from ..sleep import SleepCancelled

    try:
        report = common.watch(session, session.sleep)
    except SleepCancelled:
        return "sleep cancelled; nothing is lost"
    return common.describe(report, session) if report else "nothing to sleep over"


def _holdings(session: Session) -> str:
    """ "134 tokens in 2 sleeps, 12 more wait for the next" """
    stats = session.stats()
    waiting = stats.window_tokens
    if not stats.sleeps:
        return f"{common.count(waiting, 'token')} wait for the first sleep" if waiting else "empty"
    slept = f"{common.count(stats.tokens, 'token')} in {common.count(stats.sleeps, 'sleep')}"
    return f"{slept}, {waiting} more wait for the next" if waiting else slept


# --- on a terminal -------------------------------------------------------------------------


class IdleSleeper:
    """Sleeps in a thread of its own once `idle` seconds have passed without a key press.

    Between start and stop the session belongs to that thread. A key press cancels a sleep within
    one block of the model; the idle time then starts again. `show` gets each new status, `note`
    a line about each sleep that was done; both are called from the thread. idle 0 is never.
    """

    def __init__(
        self,
        session: Session,
        idle: float,
        show: Callable[[str], None],
        note: Callable[[str], None],
    ):
        self._session, self._idle, self._show, self._note = session, idle, show, note
        self._key = threading.Event()
        self._ended = threading.Event()
        self._stopped = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="sleep", daemon=True)

    def start(self):
        self._thread.start()

    def key_pressed(self):
        self._key.set()

    def stop(self):
        """Cancels a sleep under way and waits for its end. Raises what the thread died of.

        A Ctrl-C waits too: it is raised when the session is the caller's again, not before.
        """
        self._stopped = True
        self._key.set()
        interrupt = None
        while not self._ended.is_set():  # a join that Ctrl-C cuts short takes the thread for dead
            try:
                self._ended.wait()
            except KeyboardInterrupt as error:
                interrupt = error
        if error := self._error or interrupt:
            raise error

    def _run(self):
        try:
            while self._session.pending and not self._stopped:
                if self._key.wait(self._idle or None):
                    self._key.clear()
                else:
                    self._sleep()
        except UserError as error:  # not again before the next turn
            self._show(f"error: {error}")
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()

    def _sleep(self):
        from ..sleep import SleepCancelled

        progress = common.Progress(self._session, self._show)

        def should_stop():
            progress.step()
            return self._key.is_set()

        try:
            report = self._session.sleep(progress.on_pass, should_stop)
        except SleepCancelled:
            self._show(f"sleep cancelled, nothing is lost; again after {self._idle:g} s")
        else:
            self._show(_window(self._session))
            self._note(common.describe(report, self._session))


class _Terminal:
    """The chat at a terminal: a prompt with a status line, notes in grey, replies as they come."""

    def __init__(self, session: Session, model: str, idle: float):
        from prompt_toolkit import PromptSession
        from rich.console import Console

        self._session, self._model, self._idle = session, model, idle
        self._console = Console(highlight=False)
        self._prompt = PromptSession("> ", bottom_toolbar=lambda: self._status)
        self._prompt.app.key_processor.before_key_press += self._on_key
        self._prompt.default_buffer.on_text_changed += self._on_key  # a dumb terminal has only that
        self._sleeper: IdleSleeper | None = None
        self._status = ""
        self._in_line = False  # a reply has begun a line and not ended it

    def run(self):
        try:
            self._greet()
            self._talk()
        finally:
            self._leave()

    def _talk(self):
        interrupts = 0
        while interrupts < 2:
            try:
                text = self._read()
            except KeyboardInterrupt:
                # Over a half-typed line it is about that line, and the first of two.
                interrupts = 1 if self._prompt.default_buffer.text else interrupts + 1
                if interrupts < 2:
                    self._note("Ctrl-C again leaves, as does Ctrl-D")
                continue
            except EOFError:
                return
            interrupts = 0
            if not text:
                continue
            command = _command(text)
            if command == "/exit":
                return
            try:
                if command:
                    for out in _answer(self._session, command, self._confirm):
                        self._note(out)
                else:
                    interrupts = self._reply(text)
            except UserError as error:
                self._note(f"error: {error}", "red")

    def _greet(self):
        name = self._session.memory.name
        self._console.print(
            f"mlx-sleep {__version__}, model {self._model}, memory '{name}': "
            f"{_holdings(self._session)}",
            style="bold",
            markup=False,
        )
        self._note("/help lists the commands")

    def _read(self) -> str:
        """A line from the prompt; meanwhile the session belongs to the sleeper."""
        from prompt_toolkit.patch_stdout import patch_stdout

        self._status = _window(self._session)
        if self._idle and self._session.pending:
            self._status += f", sleeps after {self._idle:g} s without a key"
        with patch_stdout(raw=True):
            self._sleeper = IdleSleeper(self._session, self._idle, self._show, self._note)
            self._sleeper.start()
            try:
                return self._prompt.prompt().strip()
            finally:
                self._sleeper.stop()

    def _on_key(self, _):
        self._sleeper.key_pressed()

    def _show(self, status: str):
        self._status = status
        self._prompt.app.invalidate()

    def _reply(self, text: str) -> int:
        """Streams a reply. Returns how often Ctrl-C was pressed; the first one cancels it."""
        self._session.on_sleep = lambda report: self._note(common.describe(report, self._session))
        try:
            with (
                common.Interrupts() as ctrl_c,
                contextlib.closing(self._session.say(text)) as pieces,
            ):
                for piece in pieces:
                    self._write(common.printable(piece))
                    if ctrl_c.count:
                        break
        finally:
            self._session.on_sleep = None
            self._end_line()
        if ctrl_c.count:
            self._note("reply cancelled; what was said stays said")
        return ctrl_c.count

    def _write(self, text: str):
        sys.stdout.write(text)
        sys.stdout.flush()
        if text:
            self._in_line = not text.endswith("\n")

    def _end_line(self):
        if self._in_line:
            self._write("\n")

    def _note(self, text: str, style: str = "dim"):
        self._end_line()
        self._console.print(text, style=style, markup=False)

    def _confirm(self) -> bool:
        name = self._session.memory.name
        try:
            answer = input(f"forget all of memory '{name}'? It can't be undone. [y/N] ")
        except (KeyboardInterrupt, EOFError):
            self._write("\n")
            return False
        return answer.strip().lower() in ("y", "yes")

    def _leave(self):
        """Sleeps and lets go of the memory. Ctrl-C leaves at once; the journal has the window."""
        from ..sleep import SleepCancelled

        waiting = len(self._session.pending)
        try:
            report = common.watch(
                self._session,
                lambda on_pass, should_stop: self._session.close(
                    on_pass=on_pass, should_stop=should_stop
                ),
            )
        except SleepCancelled:
            self._note(f"left without sleeping; {common.count(waiting, 'token')} kept for later")
        else:
            if report:
                self._note(common.describe(report, self._session))


def _window(session: Session) -> str:
    """ "window 134/256 tokens, KV cache 123 KB" """
    stats = session.stats()
    return (
        f"window {stats.window_tokens}/{common.count(stats.window, 'token')}, "
        f"KV cache {common.size(stats.kv_bytes)}"
    )
