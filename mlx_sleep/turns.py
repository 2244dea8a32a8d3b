"""What a user says: checked, in tokens as the model's template has it, and put into the window.

Each window begins with the system prompt, if there is one; a window that began within a reply has
it before its next turn.
"""

from __future__ import annotations

from typing import NamedTuple

from .sleep import NOTHING_TO_SLEEP_INTO
from .utils import limits
from .utils.errors import UserError
from .window import Watch, Window

_SYSTEM = "system_prompt"  # a memory's setting


class Turn(NamedTuple):
    """A user's turn in tokens.

    past   as the past has it, up to the reply's text
    asked  as the model is asked for a reply: the same, but for what is said of thoughts
    reply  the reply with its end, where it is known; [] without
    """

    past: list[int]
    asked: list[int]
    reply: list[int]


def checked(text: str) -> str:
    """A user's text, stripped. UserError for one that is empty, too long or not valid Unicode."""
    text = text.strip()
    if not text:
        raise UserError("the text is empty; say something")
    limits.check("the length of the text", len(text), limits.TURN_CHARACTERS)
    _check_unicode(text)
    return text


class Turns:
    """The turns of a window. system_prompt is that of `Session`."""

    def __init__(self, window: Window, keep_thoughts: bool, system_prompt: str | None):
        self._window, self._keep_thoughts = window, keep_thoughts
        self._system: str | None = None
        self._set_at: int | None = None  # so many sleeps
        if system_prompt is not None:
            self.system_prompt = system_prompt
        elif window.memory is not None:
            self._system = self._checked(window.memory.settings.get(_SYSTEM))

    def take(self, text: str, reply: str | None, watch: Watch) -> Turn:
        """Puts a turn, and what is known of its reply, into a window that has room for both.

        None: the model is asked for the reply. UserError where no sleep can make room.
        """
        window, size = self._window, self._window.size
        turn = self._written(text, reply)
        length = len(turn.past) + len(turn.reply)
        if not window.has_room(length):
            raise UserError(
                f"the window of {size} tokens is full, and {NOTHING_TO_SLEEP_INTO}, "
                "forget, or take a longer --window"
            )
        # A question and its reply belong in one window: leave some room for the reply.
        room = length + (size // 8 if reply is None else 0)
        if window.tokens and len(window.tokens) + room > size and window.can_sleep:
            window.sleep(watch)
            turn = self._written(text, reply)
        window.append(turn.past, "user", text)
        window.unopened = False
        if reply is not None:
            end = len(turn.reply) - len(window.tokenizer.end_ids)
            window.append(turn.reply[:end])
            window.append(turn.reply[end:], "assistant", reply)
        return turn

    def _written(self, text: str, reply: str | None) -> Turn:
        """A turn as it is at this place of the window."""
        tokenizer, window = self._window.tokenizer, self._window
        first = not window.tokens and not window.folded
        if self._system is not None:
            first = not window.tokens or window.unopened
        past = asked = tokenizer.turn(text, first, self._system)
        if not self._keep_thoughts:
            past = tokenizer.past_turn(text, first, self._system)
        known = [] if reply is None else tokenizer.encode_text(reply) + tokenizer.end_ids
        return Turn(past, asked, known)

    @property
    def system_prompt(self) -> str | None:
        return self._system

    @system_prompt.setter
    def system_prompt(self, text: str | None) -> None:
        text, memory = self._checked(text), self._window.memory
        if text != (self._system if memory is None else memory.settings.get(_SYSTEM)):
            self._set_at = self._window.sleeps
            if memory is not None:
                memory.set(_SYSTEM, text)
        self._system = text

    @property
    def system_prompt_waits(self) -> bool:
        """Whether the window began before the system prompt was set."""
        begun = bool(self._window.tokens) and not self._window.unopened
        return begun and self._set_at == self._window.sleeps

    def _checked(self, text: str | None) -> str | None:
        if not text or not (text := text.strip()):
            return None
        _check_unicode(text)
        length = len(self._window.tokenizer.opening(text))
        if 2 * length > self._window.size:
            raise UserError(
                f"the system prompt takes {length} of the window's {self._window.size} tokens; "
                "shorten it, or take a longer --window"
            )
        return text


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("the text is not valid UTF-8; check the encoding") from None
