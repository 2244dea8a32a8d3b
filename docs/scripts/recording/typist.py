"""Types a script at a pseudo-terminal, as a person would, and keeps what comes back.

A script has one thing a line; lines that begin with # are comments:

    $ make test        typed when the cursor stands after "$ " and nothing else
    > hello            the same, after "> "
    (until slept:)     waits for such a prompt below a line that begins with "slept:"
"""

from __future__ import annotations

import codecs
import os
import random
import select
import time
from collections.abc import Callable

import pyte
from ptyprocess import PtyProcess

from .cast import Cast
from .screen import Screen

PROMPTS = "$ ", "> "
KEY, BEFORE, ENTER, AFTER = 0.045, 0.7, 0.35, 1.0
"""Seconds: a key, a breath before a line, one before Enter, and the last look at the screen."""


def record(command: list[str], script: str, cast: Cast, env: dict[str, str], limit: float) -> None:
    """Runs a command, types the script, and appends what comes to cast.events.

    limit  seconds that any line of the script may have to wait
    TimeoutError, with the screen, when that was not enough; EOFError when the command has ended.
    """
    size = (cast.rows, cast.columns)
    process = PtyProcess.spawn(command, env=env, dimensions=size)
    try:
        typist = _Typist(process, cast, limit)
        for line in script.splitlines():
            if line.strip() and not line.startswith("#"):
                typist.do(line)
        typist.look(AFTER)
    finally:
        process.terminate(force=True)


class _Typist:
    def __init__(self, process: PtyProcess, cast: Cast, limit: float) -> None:
        self._fd, self._cast, self._limit = process.fd, cast, limit
        self._screen = Screen(cast.columns, cast.rows, self._press)
        self._stream = pyte.Stream(self._screen)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._started = time.monotonic()
        self._random = random.Random(0)  # the rhythm of a hand, the same each time

    def do(self, line: str) -> None:
        if line.startswith(PROMPTS):
            self._wait(line, lambda: self._screen.left_of_cursor == line[:2])
            self._type(line[2:])
        elif line.startswith("(until ") and line.endswith(")"):
            words = line[len("(until ") : -1]
            self._wait(
                line,
                lambda: (
                    self._screen.above_cursor.startswith(words)
                    and self._screen.left_of_cursor in PROMPTS
                ),
            )
        else:
            raise ValueError(f"a line of a script that means nothing: {line}")

    def look(self, seconds: float) -> None:
        """Takes what comes within some time."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._read(left)

    def _type(self, text: str) -> None:
        self.look(BEFORE)
        for character in text:
            self._press(character)
            self.look(KEY * self._random.uniform(0.5, 1.5))
        self.look(ENTER)
        self._press("\r")
        self.look(KEY)

    def _press(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def _read(self, seconds: float) -> None:
        if not select.select([self._fd], [], [], max(0, seconds))[0]:
            return
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # how Linux says it
            data = b""
        if not data:
            raise EOFError(f"the program has ended:\n{self._shown()}")
        text = self._decoder.decode(data)
        self._cast.events.append((time.monotonic() - self._started, text))
        self._stream.feed(text)

    def _wait(self, line: str, ready: Callable[[], bool]) -> None:
        end = time.monotonic() + self._limit
        while not ready():
            if time.monotonic() > end:
                raise TimeoutError(f"{line}: not after {self._limit:g} s:\n{self._shown()}")
            self._read(0.1)

    def _shown(self) -> str:
        return "\n".join(row.rstrip() for row in self._screen.display).rstrip()
