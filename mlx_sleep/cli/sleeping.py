"""A sleep, watched from the command line: progress, Ctrl-C, and a line about what it did."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from .output import StatusLine, count, size

if TYPE_CHECKING:  # they import MLX
    from ..models.base import SleepModel
    from ..session import Session
    from ..sleep import SleepReport


IDLE = 10.0
"""Seconds without a key press before a chat sleeps, where nothing else is asked for."""

SYSTEM_WAITS = "the new system prompt holds after the next sleep: this window has begun without it"

DEEP = 300.0
"""Seconds without a key press, and with nothing left to fold in, before a deep sleep."""


def may_sleep(model: SleepModel, idle: float | None = None) -> bool:
    """Whether a chat may sleep when it need not: in idle time, and at its end.

    idle  what --idle says, if anything: seconds for a model that was not trained to sleep let it
    """
    return model.has_fast_weights and (model.trained_to_sleep or bool(idle))


def kind(model: SleepModel, idle: float = 0) -> str:
    """A line that says which of three kinds a model is, as far as sleep goes."""
    if not model.has_fast_weights:
        return (
            "this model has attention only: it cannot sleep, and keeps one window; "
            "mlx-sleep retrofit trains sleep layers in it"
        )
    if model.trained_to_sleep:
        return "this model was trained to sleep"
    why = "this model has fast weights but was not trained to sleep, and may forget what it folds"
    return f"{why} in" if idle else f"{why} in: it sleeps only when its window is full (or --idle)"


class Interrupts:
    """Counts Ctrl-C in a with block in place of raising KeyboardInterrupt.

    So it never strikes in the middle of a write or a forward pass. The third one does raise:
    whoever presses that often wants out.
    """

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count > 2:
            raise KeyboardInterrupt


class SleepProgress:
    """Watches one sleep through its two callbacks: `on_pass`, and `step` for should_stop.

    show(text) gets "sleeping: pass 2/4, 57%, about 0.3 s left", at most ten times a second.
    """

    def __init__(self, session: Session, show: Callable[[str], None]):
        from ..sleep import count_steps

        self._passes = session.passes
        self._blocks = count_steps(session.model, self._passes)
        self._show = show
        self._pass, self._done = 1, 0
        self._started, self._shown = time.monotonic(), 0.0

    def on_pass(self, done: int, passes: int, moved: float) -> None:
        self._pass = min(done + 1, passes)

    def step(self) -> None:
        """Call it where the sleep asks whether to stop: once after every block."""
        if self._done == self._blocks:  # the next window of a sleep over several
            self._done, self._started, self._pass = 0, time.monotonic(), 1
        self._done += 1
        now = time.monotonic()
        if now - self._shown < 0.1:
            return
        self._shown = now
        left = (now - self._started) / self._done * (self._blocks - self._done)
        self._show(
            f"sleeping: pass {self._pass}/{self._passes}, "
            f"{100 * self._done // self._blocks}%, about {left:.1f} s left"
        )


def watch(session: Session, sleep: Callable[..., SleepReport | None]) -> SleepReport | None:
    """Runs sleep(on_pass, should_stop), showing its progress on a terminal.

    Ctrl-C cancels it: SleepCancelled, as from the sleep itself.
    """
    with StatusLine() as status, Interrupts() as ctrl_c:
        progress = SleepProgress(session, status.show)

        def should_stop() -> bool:
            progress.step()
            return ctrl_c.count > 0

        return sleep(progress.on_pass, should_stop)


def describe(report: SleepReport, session: Session) -> str:
    """One line about a sleep."""
    kv = "cleared" if session.stats().kv_bytes == 0 else "trimmed"
    return (
        f"slept: {count(report.tokens, 'token')} folded in {count(report.passes, 'pass')}, "
        f"KV cache {kv} ({size(report.kv_bytes_freed)} freed)"
    )
