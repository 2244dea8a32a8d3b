"""The prompt of a chat at a terminal: editing, history, completion. It knows no session."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.shortcuts import CompleteStyle

from ..utils import atomic
from .output import note

if TYPE_CHECKING:
    from prompt_toolkit.key_binding.key_processor import KeyPressEvent

KEPT = 1000
"""Lines of history that a new chat starts with."""


def open_prompt(
    status: Callable[[], str], words: Callable[[str], Iterable[str]], history: Path | None
) -> PromptSession[str]:
    """A prompt of one or more lines; Enter ends it.

    status   the line below it
    words    what may stand where the text before the cursor ends, for the Tab key
    history  a file that keeps what is typed; None keeps nothing
    """
    return PromptSession(
        "> ",
        multiline=True,
        prompt_continuation="  ",
        key_bindings=_keys(),
        completer=_Words(words),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,  # the others keep eight lines free
        history=open_history(history),
        enable_suspend=True,
        bottom_toolbar=status,
    )


def _keys() -> KeyBindings:
    """Enter sends; Alt-Enter, or Enter after a backslash, begins another line."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class _Words(Completer):
    """Completes the last word of a line that begins with a slash."""

    def __init__(self, words: Callable[[str], Iterable[str]]):
        self._words = words

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
        before = document.text_before_cursor
        if not before.startswith("/"):
            return
        start, space, last = before.rpartition(" ")
        for word in self._words(start + space):
            if word.startswith(last.lower()):
                yield Completion(word, start_position=-len(last))


# --- history -------------------------------------------------------------------------------


class _PrivateHistory(FileHistory):
    """A file of mode 0600. What can't be written is not kept; a chat goes on without it."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string)


def open_history(file: Path | None) -> History:
    """Lines typed in earlier chats. Where the file can't be used, a note says so and only this
    chat's are kept."""
    if file is None:
        return InMemoryHistory()
    try:
        atomic.make_folder(file.parent)
        _open_private(file)
        history = _PrivateHistory(str(file))
        lines = list(history.load_history_strings())
        if len(lines) > KEPT:
            atomic.replace_file(file, b"")
            for line in reversed(lines[:KEPT]):
                history.store_string(line)
    except (OSError, UnicodeError) as error:
        note(f"no history: {file}: {getattr(error, 'strerror', None) or error}")
        return InMemoryHistory()
    return history


def _open_private(file: Path) -> None:
    """Makes the file if it isn't there, its owner's alone. OSError for anything but a file."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    opened = os.open(file, flags, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            raise OSError(0, "not a file")
        atomic.chmod_private(opened)
    finally:
        os.close(opened)


def forget_history(prompt: PromptSession[str], file: Path | None) -> None:
    """Empties the history, on the disk too."""
    if file is not None:
        atomic.unlink(file)
    prompt.history = prompt.default_buffer.history = open_history(file)
