"""Lives as token ids: a chat template, encoded texts, and which tokens are replies and values.

Knows a tokenizer only as a function from text to ids and their places in the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .world import Turn

Encode = Callable[[str], tuple[Sequence[int], Sequence[tuple[int, int]]]]
OPENING = 4.0
"""Weight of an answer's first token: it says whether the model knows, or was never told."""
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def fast(tokenizer: Any) -> Encode:
    """encode() of a `tokenizers.Tokenizer`, without special tokens."""

    def encode(text: str):
        found = tokenizer.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    return encode


@dataclass(frozen=True)
class Template:
    """Token ids around the texts of a chat: opening TEXT*, where a turn is
    before + user's text + between + reply + end. The first id of `end` ends the reply."""

    opening: tuple[int, ...]
    before: tuple[int, ...]
    between: tuple[int, ...]
    end: tuple[int, ...]
    pad: int = 0

    @classmethod
    def chatml(cls, encode: Encode, system: str = SMOLLM2_SYSTEM, pad: int = 0) -> Template:
        """<|im_start|>ROLE newline TEXT<|im_end|> newline, as SmolLM2 and Qwen write chats. encode
        must know the two marks as special tokens."""

        def ids(text: str) -> tuple[int, ...]:
            return tuple(encode(text)[0])

        opening = ids(f"<|im_start|>system\n{system}<|im_end|>\n") if system else ()
        before = ids("<|im_start|>user\n")
        return cls(
            opening, before, ids("<|im_end|>\n<|im_start|>assistant\n"), ids("<|im_end|>\n"), pad
        )


@dataclass
class Pieces:
    """Parallel lists over tokens: ids; weight of predicting each from those before it; whether it
    is of a value that an answer hangs on; whether the assistant said it (end mark included)."""

    ids: list[int] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    value: list[bool] = field(default_factory=list)
    reply: list[bool] = field(default_factory=list)

    @classmethod
    def unlearnt(cls, ids: Sequence[int]) -> Pieces:
        """Tokens that are only read: nobody's reply, and none of them is predicted."""
        n = len(ids)
        return cls(list(ids), [0.0] * n, [False] * n, [False] * n)

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, other: Pieces) -> None:
        self.ids += other.ids
        self.weight += other.weight
        self.value += other.value
        self.reply += other.reply

    def cut(self, at: int) -> tuple[Pieces, Pieces]:
        def part(at: slice) -> Pieces:
            return Pieces(self.ids[at], self.weight[at], self.value[at], self.reply[at])

        return part(slice(at)), part(slice(at, None))


class LifeEncoder:
    def __init__(self, encode: Encode, template: Template):
        self.encode, self.template = encode, template
        self._cache: dict[str, tuple[list[int], list[tuple[int, int]]]] = {}

    def often(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """encode() for texts that come back: acknowledgements, refusals, ordinary chat."""
        found = self._cache.get(text)
        if found is None:
            if len(self._cache) > 20_000:
                self._cache.clear()
            ids, offsets = self.encode(text)
            found = self._cache[text] = (list(ids), list(offsets))
        return found

    def opening(self) -> Pieces:
        return Pieces.unlearnt(self.template.opening)

    def prompt(self, user: str) -> list[int]:
        """A user's turn up to where the reply begins."""
        t = self.template
        return [*t.before, *self.encode(user)[0], *t.between]

    def turn(self, turn: Turn) -> Pieces:
        t = self.template
        encode = self.often if turn.kind == "chat" else self.encode
        user = encode(turn.user)[0]
        ids, offsets = (self.encode if turn.asked else self.often)(turn.reply)
        before = len(t.before) + len(user) + len(t.between)
        said, rest = len(ids) + 1, len(t.end) - 1  # the end mark is said, a newline is not
        value = [any(a < end and b > start for start, end in turn.spans) for a, b in offsets]
        tail = [False] * rest
        weight = [turn.weight] * said
        if turn.asked and not value[0]:
            weight[0] *= OPENING
        return Pieces(
            [*t.before, *user, *t.between, *ids, *t.end],
            [0.0] * before + weight + [0.0] * rest,
            [False] * before + value + [False] + tail,
            [False] * before + [True] * said + tail,
        )
