"""What several commands share: options, words for numbers, Ctrl-C, progress of a sleep."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..utils.errors import UserError

if TYPE_CHECKING:  # it imports MLX
    from ..session import Session
    from ..sleep import SleepReport

Model = Annotated[
    str | None, typer.Option(help="The model's folder. (default: the embedded model)")
]
Home = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the memories. (default: $MLX_SLEEP_HOME, else the user's data folder)"
    ),
]
Passes = Annotated[int | None, typer.Option(help="Passes of a sleep. (default: the model's)")]
Window = Annotated[
    int | None, typer.Option(help="Tokens that fit before it must sleep. (default: the model's)")
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-m", help="Longest reply, in tokens.")]
Temp = Annotated[float, typer.Option(help="Sampling temperature; 0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens of this mass.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the sampling.")]


def count(number: int, noun: str) -> str:
    """ "1 token", "2 tokens", "4 passes" """
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def numbers(option: str, text: str) -> list[int]:
    """ "1,2,4" as numbers. UserError names the option unless all are whole and at least 1."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise UserError(f"{option} takes whole numbers >= 1 with commas, as in 1,2,4; not {text!r}")
    return values


def size(number: int) -> str:
    """Bytes in decimal units: "640 B", "123 KB", "1.2 MB"."""
    value, unit = float(number), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.1f} {unit}" if unit != "B" and value < 9.95 else f"{value:.0f} {unit}"


def describe(report: SleepReport, session: Session) -> str:
    """One line about a sleep."""
    kv = "cleared" if session.stats().kv_bytes == 0 else "trimmed"
    return (
        f"slept: {count(report.tokens, 'token')} folded in {count(report.passes, 'pass')}, "
        f"KV cache {kv} ({size(report.kv_bytes_freed)} freed)"
    )


def printable(text: str) -> str:
    """A model's text without control characters, which could drive the terminal."""
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))


class Interrupts:
    """Counts Ctrl-C in a with block in place of raising KeyboardInterrupt.

    So it never strikes in the middle of a write or a forward pass. The third one does raise:
    whoever presses that often wants out.
    """

    def __init__(self):
        self.count = 0

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, *_):
        self.count += 1
        if self.count > 2:
            raise KeyboardInterrupt


class Progress:
    """Watches one sleep through its two callbacks: `on_pass`, and `step` for should_stop.

    show(text) gets "sleeping: pass 2/4, 57%, about 0.3 s left", at most ten times a second.
    """

    def __init__(self, session: Session, show: Callable[[str], None]):
        model, self._passes = session.model, session.passes
        lo, hi = model.sleep.loop_range or (0, model.num_layers)
        self._blocks = model.num_layers + (self._passes - 1) * (hi - lo)
        self._show = show
        self._pass, self._done = 1, 0
        self._started, self._shown = time.monotonic(), 0.0

    def on_pass(self, done: int, passes: int, moved: float):
        self._pass = min(done + 1, passes)

    def step(self):
        """Call it where the sleep asks whether to stop: once behind every block."""
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
    terminal = sys.stdout.isatty()

    def show(text):
        if terminal:
            sys.stdout.write(f"\r\x1b[K{text}")
            sys.stdout.flush()

    progress = Progress(session, show)
    with Interrupts() as ctrl_c:

        def should_stop():
            progress.step()
            return ctrl_c.count > 0

        try:
            return sleep(progress.on_pass, should_stop)
        finally:
            show("")
