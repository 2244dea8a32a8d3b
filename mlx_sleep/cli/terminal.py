"""A chat at a terminal: prompt, status line, streamed replies, and a sleep while nobody types.

A second thread sleeps while the prompt waits. It and the main thread never use the session at
the same time: the main thread leaves it alone from `IdleSleeper.start` to `.stop`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..thoughts import Thought
from ..utils.errors import UserError
from . import output, slash
from .sleeping import (
    IDLE,
    SYSTEM_WAITS,
    Interrupts,
    SleepProgress,
    describe,
    kind,
    may_sleep,
    watch,
)

if TYPE_CHECKING:  # it imports MLX
    from ..session import Session


class IdleSleeper:
    """Sleeps in a thread of its own once `idle` seconds have passed without a key press.

    Between start and stop the session belongs to that thread. A key press cancels a sleep within
    one block of the model; the idle time then starts again. So it does while `typing()` says that
    a line is half typed. `show` gets each new status, `note` a line about each sleep that was
    done; all are called from the thread. idle 0 is never.
    manners tell why not to sleep now, or ""; they are asked again after another idle time. deep is
    the idle time before a deep sleep, once the window is empty; 0 is never.
    """

    def __init__(
        self,
        session: Session,
        idle: float,
        show: Callable[[str], None],
        note: Callable[[str], None],
        manners: Callable[[], str] = lambda: "",
        typing: Callable[[], bool] = lambda: False,
        deep: float = 0,
    ):
        self._manners, self._deep = manners, deep
        self._session, self._idle, self._show, self._note = session, idle, show, note
        self._typing = typing
        self._key = threading.Event()
        self._ended = threading.Event()
        self.stopping = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="sleep", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def key_pressed(self) -> None:
        self._key.set()

    def stop(self) -> None:
        """Cancels a sleep under way and waits for its end. Raises what ended the thread.

        A Ctrl-C waits too: it is raised when the session is the caller's again, not before.
        """
        self.stopping = True
        self._key.set()
        interrupt = None
        while not self._ended.is_set():  # a join that Ctrl-C cuts short takes the thread for dead
            try:
                self._ended.wait()
            except KeyboardInterrupt as error:
                interrupt = error
        if failure := self._error or interrupt:
            raise failure

    def _run(self) -> None:
        try:
            while self._session.pending and not self.stopping:
                if self._key.wait(self._idle or None):
                    self._key.clear()
                elif self._typing():
                    pass
                elif reason := self._manners():
                    self._show(f"no sleep now: {reason}; /sleep does it all the same")
                else:
                    self._sleep()
            while self._deep and not self.stopping:
                if self._key.wait(self._deep):
                    self._key.clear()
                elif not self._typing() and not self._manners() and self._sleep_deeply():
                    break
        except UserError as error:  # not again before the next turn
            self._show(f"error: {output.clean(str(error))}")
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()

    def _sleep(self) -> None:
        from ..sleep import SleepCancelled

        progress = SleepProgress(self._session, self._show)

        def should_stop() -> bool:
            progress.step()
            return self._key.is_set()

        try:
            report = self._session.sleep(progress.on_pass, should_stop)
        except SleepCancelled:
            self._show(f"sleep cancelled, nothing is lost; again after {self._idle:g} s")
        else:
            self._show(_window(self._session))
            if report:
                self._note(describe(report, self._session))

    def _sleep_deeply(self) -> bool:
        """Whether it was not cancelled; what it did is noted."""
        from ..deep_sleep import deep_sleep
        from ..sleep import SleepCancelled

        try:
            report = deep_sleep(self._session, self._key.is_set)
        except SleepCancelled:
            return False
        if report and report.kept:
            self._note(
                f"deep sleep: {output.count(report.read, 'turn')} read again; a reply costs "
                f"{report.after:.1f} nats, {report.before:.1f} before"
            )
        return True


class Terminal:
    """The chat at a terminal: a prompt with a status line, notes in grey, replies as they come."""

    def __init__(
        self,
        session: Session,
        model: str,
        idle: float | None,
        manners: Callable[[], str],
        history: Path | None = None,
        deep: float = 0,
    ) -> None:
        from .prompt import open_prompt

        self._deep = deep if may_sleep(session.model, idle) else 0
        self._manners = manners
        self._session, self._model = session, model
        self._sleeps = may_sleep(session.model, idle)
        self._idle = (IDLE if idle is None else idle) if self._sleeps else 0
        self._console = output.stdout()
        self._progress = output.StatusLine(self._console)
        self._history = history
        self._prompt = open_prompt(self._status_line, slash.completions, history)
        self._prompt.app.key_processor.before_key_press += self._on_key
        self._prompt.default_buffer.on_text_changed += self._on_key  # a dumb terminal has only that
        self._sleeper: IdleSleeper | None = None
        self._status = ""
        self._thinking = False  # the last piece was a thought
        self._in_line = False  # a reply has begun a line and not ended it

    def run(self) -> None:
        try:
            self._greet()
            self._talk()
        finally:
            self._leave()

    def _talk(self) -> None:
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
            command = slash.command(text) or slash.WORDS.get(text.lower())
            if command == "/exit":
                return
            try:
                if command:
                    for out in slash.answer(self._session, command, self._confirm):
                        self._note(out)
                        if command.startswith("/forget") and out.startswith("forgotten"):
                            self._forget_history()
                else:
                    interrupts = self._reply(text)
            except UserError as error:
                self._note(f"error: {error}", "red")

    def _greet(self) -> None:
        name = slash.memory_name(self._session)
        model = output.clean(self._model)
        self._console.print(
            f"mlx-sleep {__version__}, model {model}, memory '{name}': "
            f"{slash.holdings(self._session)}",
            style="bold",
            markup=False,
        )
        self._note(kind(self._session.model, self._idle))
        if self._session.system_prompt_waits:
            self._note(SYSTEM_WAITS)
        self._note("/help lists the commands")

    def _read(self) -> str:
        """What is typed at the prompt; meanwhile the session belongs to the sleeper."""
        from prompt_toolkit.patch_stdout import patch_stdout

        self._status = _window(self._session)
        if self._idle and self._session.pending:
            self._status += f", sleeps after {self._idle:g} s without a key"
        with patch_stdout(raw=True):
            self._sleeper = IdleSleeper(
                self._session,
                self._idle,
                self._show,
                self._note,
                self._manners,
                self._is_typing,
                self._deep,
            )
            self._sleeper.start()
            try:
                return self._prompt.prompt().strip()
            finally:
                self._sleeper.stop()

    def _is_typing(self) -> bool:
        return bool(self._prompt.default_buffer.text)

    def _status_line(self) -> str:
        return output.shorten(self._status, self._prompt.output.get_size().columns)

    def _on_key(self, _: object) -> None:
        if self._sleeper:
            self._sleeper.key_pressed()

    def _show(self, status: str) -> None:
        self._status = status
        self._prompt.app.invalidate()

    def _reply(self, text: str) -> int:
        """Streams a reply. Returns how often Ctrl-C was pressed; the first one cancels it."""
        from ..sleep import SleepCancelled

        self._session.on_sleep = lambda report: self._note(describe(report, self._session))
        progress = SleepProgress(self._session, self._show_sleep)
        taken = whole = False

        def should_stop() -> bool:
            progress.step()
            return ctrl_c.count > 0

        def on_read(done: int, total: int) -> None:
            self._progress.spin(f"reading {output.count(total, 'token')}, {100 * done // total}%")
            if ctrl_c.count:
                raise SleepCancelled

        with Interrupts() as ctrl_c:
            try:
                pieces = self._session.say(text, progress.on_pass, should_stop, on_read)
                taken = True
                with contextlib.closing(pieces):
                    for piece in pieces:
                        self._write(piece)
                        if ctrl_c.count:
                            break
                    else:
                        whole = True
            except SleepCancelled:  # of a window that was full
                pass
            finally:
                self._session.on_sleep = None
                self._end_line()
        if ctrl_c.count:
            self._note(
                "reply cancelled; what was said stays said"
                if taken
                else "sleep cancelled; what you typed was not taken"
            )
        elif whole and self._session.cut:
            self._note(f"cut at {self._session.max_tokens} tokens; /set max_tokens changes that")
        return ctrl_c.count

    def _show_sleep(self, status: str) -> None:
        """Progress of a sleep in the middle of a turn, in the place of the prompt."""
        if not self._in_line:
            self._progress.show(status)

    def _write(self, text: str) -> None:
        self._progress.clear()
        if isinstance(text, Thought) is not self._thinking:
            self._thinking = not self._thinking
            self._end_line()
        if self._thinking:
            output.thought(text, self._console)
        else:
            output.piece(text)
        if text:
            self._in_line = not text.endswith("\n")

    def _end_line(self) -> None:
        self._progress.clear()
        if self._in_line:
            output.piece("\n")
            self._in_line = False

    def _note(self, text: str, style: str = "dim") -> None:
        self._end_line()
        self._console.print(output.clean(text), style=style, markup=False)

    def _confirm(self, question: str) -> bool:
        try:
            answer = input(f"{question} It can't be undone. [y/N] ")
        except (KeyboardInterrupt, EOFError):
            self._write("\n")
            return False
        return answer.strip().lower() in ("y", "yes")

    def _forget_history(self) -> None:
        from .prompt import forget_history

        forget_history(self._prompt, self._history)

    def _leave(self) -> None:
        """Sleeps and lets go of the memory. Ctrl-C leaves at once; the journal has the window."""
        from ..sleep import SleepCancelled

        waiting = len(self._session.pending)
        try:
            report = watch(
                self._session,
                lambda on_pass, should_stop: self._session.close(
                    self._sleeps, on_pass, should_stop
                ),
            )
        except SleepCancelled:
            self._note(f"left without sleeping; {output.count(waiting, 'token')} kept for later")
        else:
            if report:
                self._note(describe(report, self._session))


def _window(session: Session) -> str:
    """ "window 134/256 tokens, KV cache 123 KB" """
    stats = session.stats()
    return (
        f"window {stats.window_tokens}/{output.count(stats.window, 'token')}, "
        f"KV cache {output.size(stats.kv_bytes)}"
    )
