"""A chat at a pseudo-terminal, for tests: what its user types, what its user sees."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time

# On a machine that says nothing of itself: a test's sleep must not depend on a battery.
PROGRAM = [
    sys.executable,
    "-c",
    "from mlx_sleep import manners; manners.conditions = manners.Conditions;"
    "from mlx_sleep.cli import main; main()",
]
ENVIRONMENT = {**os.environ, "TERM": "xterm-256color"}


class Screen:
    """The little of a terminal that prompt_toolkit and rich use: text, cursor moves, erasing."""

    ESCAPE = re.compile(r"\x1b\[([?>]?)([\d;]*)([A-Za-z])")

    def __init__(self):
        self.lines, self.row, self.column, self.rest = [[]], 0, 0, ""
        self.wants_position = False

    def feed(self, text: str):
        text, at = self.rest + text, 0
        while at < len(text):
            character = text[at]
            if character == "\x1b":
                match = self.ESCAPE.match(text, at)
                if match is None and len(text) - at < 16:
                    break  # the rest of it comes with the next read
                if match:
                    self._escape(match[1], match[2], match[3])
                at = match.end() if match else at + 1
                continue
            if character == "\r":
                self.column = 0
            elif character == "\n":
                self._move(self.row + 1, self.column)
            elif character == "\b":
                self.column -= 1
            elif character >= " ":
                line = self.lines[self.row]
                line += " " * (self.column + 1 - len(line))
                line[self.column] = character
                self.column += 1
            at += 1
        self.rest = text[at:]

    def _move(self, row, column):
        self.row, self.column = max(0, row), max(0, column)
        while len(self.lines) <= self.row:
            self.lines.append([])

    def _escape(self, private, digits, letter):
        number = int(digits.split(";")[0] or 0)
        if private:
            return
        if letter == "n":
            self.wants_position = True
        elif letter in "AB":
            self._move(self.row + max(1, number) * (1 if letter == "B" else -1), self.column)
        elif letter in "CD":
            self._move(self.row, self.column + max(1, number) * (1 if letter == "C" else -1))
        elif letter == "K":
            del self.lines[self.row][self.column :]
        elif letter == "J":
            del self.lines[self.row][self.column :]
            del self.lines[self.row + 1 :]

    def __str__(self):
        return "\n".join("".join(line).rstrip() for line in self.lines)


class Terminal:
    """A chat at a pseudo-terminal: type into it, wait for words on its screen."""

    def __init__(self, *arguments, term: str = "xterm-256color", columns: int = 250):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 60, columns, 0, 0))

        def own_terminal():
            os.setsid()
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [*PROGRAM, "chat", *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**ENVIRONMENT, "TERM": term},
            preexec_fn=own_terminal,
        )
        os.close(slave)
        self.screen = Screen()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)

    def type(self, text: str):
        os.write(self.master, text.encode())

    def read(self, seconds: float) -> bool:
        """Takes what has come within some time. False when the other side is gone."""
        if select.select([self.master], [], [], seconds)[0]:
            try:
                data = os.read(self.master, 65536)
            except OSError:
                return False
            self.screen.feed(data.decode(errors="replace"))
            if self.screen.wants_position:
                self.screen.wants_position = False
                self.type(f"\x1b[{self.screen.row + 1};{self.screen.column + 1}R")
            return bool(data)
        return True

    def wait_for(self, words: str, seconds: float = 20) -> str:
        """The screen once it matches a regular expression."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            alive = self.read(0.05)
            if re.search(words, str(self.screen)):
                return str(self.screen)
            if not alive:
                break
        raise AssertionError(f"no {words!r} on the screen:\n{self.screen}")

    def say(self, text: str):
        """A turn or command, and all that comes of it: an empty prompt and its status line."""
        self.type(text + "\r")
        self.wait_for(rf"(?s)> {re.escape(text)}\n.*\n>\s*window")

    def leave(self, keys: str = "", seconds: float = 20) -> int:
        """The exit code, once the process has ended by itself."""
        self.type(keys)
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            self.read(0.05)
        while self.read(0) and select.select([self.master], [], [], 0)[0]:
            pass
        assert self.process.poll() is not None, f"still running:\n{self.screen}"
        return self.process.returncode
