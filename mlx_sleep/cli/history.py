"""What was typed at the prompt of earlier chats, in a private file beside each memory."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils import atomic
from .output import note

if TYPE_CHECKING:
    from prompt_toolkit.history import History

KEPT = 1000
"""Lines of history that a new chat starts with."""


def history_file(memory: str, home: Path | None) -> Path:
    """Where the history of a memory's chats is."""
    from ..memory.location import memories_folder

    return memories_folder(home) / f"{memory}.history"


def open_history(file: Path | None) -> History:
    """Lines typed in earlier chats, kept in a file of mode 0600; None keeps this chat's alone.

    Where the file can't be used, a note says so, and nothing is kept.
    """
    from prompt_toolkit.history import InMemoryHistory

    if file is None:
        return InMemoryHistory()
    try:
        _make_private(file)
        history = _private_history(file)
        lines = list(history.load_history_strings())
        if len(lines) > 2 * KEPT:
            atomic.replace_file(file, b"")
            for line in reversed(lines[:KEPT]):
                history.store_string(line)
    except OSError as error:
        note(f"no history: {file}: {error.strerror or error}")
        return InMemoryHistory()
    return history


def _private_history(file: Path) -> History:
    from prompt_toolkit.history import FileHistory

    class PrivateHistory(FileHistory):
        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):  # a full disk: the chat goes on without it
                _make_private(file)
                super().store_string(string)

    return PrivateHistory(str(file))


def remove_history(file: Path | None) -> None:
    """Deletes the file of a history, if there is one."""
    if file is not None:
        atomic.unlink(file)


def _make_private(file: Path) -> None:
    """Makes the file if it isn't there, its owner's alone. OSError for anything but a file."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    opened = os.open(file, flags, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            raise OSError(0, "not a file")
        atomic.chmod_private(opened)
    finally:
        os.close(opened)
