"""The prompt of a chat at a terminal: editing, history, completion. It knows no session."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.shortcuts import CompleteStyle

from .history import open_history, remove_history

if TYPE_CHECKING:
    from prompt_toolkit.key_binding.key_processor import KeyPressEvent


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


def forget_history(prompt: PromptSession[str], file: Path | None) -> None:
    """Empties the history, on the disk too."""
    remove_history(file)
    prompt.history = prompt.default_buffer.history = open_history(file)
