"""What a model thinks before it replies, told from the reply token by token. Knows no state.

A template drops the thoughts of earlier turns, so a session reads them and forgets them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

Thinking = Literal["auto", "on", "off"]
"""As the template has it, or by its switch."""


class Thought(str):
    """A piece of a stream that is thought, and no part of the reply."""


class Marks(NamedTuple):
    """The ids that open a thought and end it, as `<think>` and `</think>`."""

    start: tuple[int, ...]
    end: tuple[int, ...]


class Split(NamedTuple):
    """Ids that are known to be thought now, and ids that are known to be the reply's text."""

    thought: list[int]
    text: list[int]


class ThoughtReader:
    """Splits the ids of one reply into what is thought before its text, and the text.

    marks     None where the model has none: all is text
    thinking  the prompt has opened a thought already
    decode    ids -> text
    encode    text -> ids

    A thought is taken for one only before the text. White space around it, and its marks, belong to
    neither; so does a first token that is all line breaks after it.
    """

    def __init__(
        self,
        marks: Marks | None,
        thinking: bool,
        decode: Callable[[list[int]], str],
        encode: Callable[[str], list[int]],
    ):
        self._marks, self._decode, self._encode = marks, decode, encode
        self._held: list[int] = []  # may be a mark, or white space before one
        self._after = False  # a thought has ended
        self.in_thought = thinking
        self.in_text = marks is None

    def add(self, token: int) -> Split:
        """Takes the next id."""
        if self._marks is None or self.in_text:
            return Split([], [token])
        self._held.append(token)
        if self.in_thought:
            return Split(self._until_end(self._marks.end), [])
        spaces = self._spaces()
        mark = tuple(self._held[spaces:])
        if mark == self._marks.start:
            self._held, self.in_thought = [], True
        elif mark != self._marks.start[: len(mark)]:
            return Split([], self._begin())
        return Split([], [])

    def finish(self) -> Split:
        """What was held back, at the reply's end."""
        held, self._held = self._held, []
        if self.in_thought:
            return Split(held, [])
        if self._after and not self._decode(held).strip():
            return Split([], [])
        return Split([], held)

    def _until_end(self, end: tuple[int, ...]) -> list[int]:
        """The held ids that can't be part of the mark that ends a thought."""
        if tuple(self._held) == end:
            self._held, self.in_thought, self._after = [], False, True
            return []
        for n in range(min(len(self._held), len(end) - 1), -1, -1):
            if tuple(self._held[len(self._held) - n :]) == end[:n]:
                sure = self._held[: len(self._held) - n]
                self._held = self._held[len(self._held) - n :]
                return sure
        raise AssertionError  # n = 0 always fits

    def _spaces(self) -> int:
        """How many of the held ids, from the first on, are white space."""
        n = 0
        while n < len(self._held) and not self._decode([self._held[n]]).strip():
            n += 1
        return n

    def _begin(self) -> list[int]:
        """The held ids are text."""
        self.in_text = True
        held, self._held = self._held, []
        if not self._after:
            return held
        while held and not self._decode([held[0]]).strip("\n"):
            held.pop(0)
        text = self._decode(held[:1])
        return self._encode(text.lstrip("\n")) + held[1:] if text.startswith("\n") else held


class Stream:
    """The text of split ids as it becomes certain: thoughts as `Thought`, the rest as str.

    detokenizer  makes a new one
    """

    def __init__(self, detokenizer: Callable[[], Any]):
        self._thought, self._text = detokenizer(), detokenizer()
        self._thinking = True

    def add(self, split: Split) -> Iterator[str]:
        """The new pieces."""
        for token in split.thought:
            self._thought.add_token(token)
            yield from self._thoughts()
        for token in split.text:
            yield from self._end_thoughts()
            self._text.add_token(token)
            if piece := self._text.last_segment:
                yield piece

    def end(self) -> Iterator[str]:
        """The pieces that were waiting for more."""
        yield from self._end_thoughts()
        self._text.finalize()
        if piece := self._text.last_segment:
            yield piece

    def _thoughts(self) -> Iterator[Thought]:
        if piece := self._thought.last_segment:
            yield Thought(piece)

    def _end_thoughts(self) -> Iterator[Thought]:
        if self._thinking:
            self._thinking = False
            self._thought.finalize()
            yield from self._thoughts()
