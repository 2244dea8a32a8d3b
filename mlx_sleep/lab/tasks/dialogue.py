"""What a conversation of the task `memory` is made of, and how it becomes token ids.

Knows a tokenizer only as a function from text to ids, and not who says what.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ...utils.errors import UserError

USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<pad>"

ANSWER_WEIGHT = 1.0
TALK_WEIGHT = 0.2  # acknowledgements and small talk: their choice is partly chance


@dataclass(frozen=True)
class Level:
    """Difficulty of a conversation.

    windows: consolidation windows before the final one (0: everything in one window).
    window_tokens, final_tokens: most tokens of a consolidation window and of the final window.
    facts: least and most facts told. two_hop: chance that a conversation holds chains of two facts.
    correction: chance, for each fact, of being corrected later. unknown: share of questions about
    things never told. small_talk: chance of small talk before each message. noise: share of user
    turns with careless case, punctuation or spelling. asking: chance, for each consolidation window
    but the first, that it holds only questions on what was told before, with the right replies.
    """

    windows: int = 1
    window_tokens: int = 64
    final_tokens: int = 96
    facts: tuple[int, int] = (2, 4)
    two_hop: float = 0.3
    correction: float = 0.1
    unknown: float = 0.15
    small_talk: float = 0.2
    noise: float = 0.2
    # Not in the repr, which seeds a conversation: those of older levels stay as they were.
    asking: float = field(default=0.0, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "facts", tuple(self.facts))  # a list, when it comes from JSON
        if min(self.window_tokens, self.final_tokens) < 32:
            raise UserError(
                "a window of the memory task needs room for 32 tokens; make window_tokens, "
                "final_tokens or the model's window longer"
            )


@dataclass(frozen=True)
class Question:
    """case: known, corrected, two_hop or never_told. value: "" when never told. hops: how many
    facts the answer takes."""

    case: str
    text: str
    reply: str
    value: str
    hops: int
    told: bool


@dataclass(frozen=True)
class Turn:
    """What the user says and the assistant replies. kind: tell, talk or ask.

    facts: (subject, attribute, topic, value) of what is told, newest last.
    """

    user: str
    assistant: str
    kind: str
    asks: Question | None = None
    facts: tuple[tuple[str, str, str, str], ...] = ()


@dataclass(frozen=True)
class Conversation:
    """windows: turns of each window, the final one last (a cut turn is listed where it begins).
    chunks: token ids of the consolidation windows. final: token ids of the final window;
    weights: loss weight for predicting each of them; values: True on value tokens of answers."""

    windows: list[list[Turn]]
    chunks: list[list[int]]
    final: list[int]
    weights: list[float]
    values: list[bool]


@dataclass(frozen=True)
class Example:
    """One evaluation item: windows to consolidate, then context (same window, no sleep; may be
    empty), then the prompt, which ends with <|assistant|>. All are token ids."""

    case: str
    windows: list[list[int]]
    context: list[int]
    prompt: list[int]
    question: Question

    @property
    def reply(self) -> str:
        return self.question.reply

    @property
    def value(self) -> str | None:
        return self.question.value if self.question.told else None


class TurnEncoder:
    """Turns as token ids.

    encode: text -> token ids, of a segment on its own. specials: ids of <|user|>, <|assistant|>,
    <|end|> and <pad>.
    """

    def __init__(self, encode: Callable[[str], list[int]], specials: Mapping[str, int]):
        self.encode = encode
        self.user, self.assistant = specials[USER], specials[ASSISTANT]
        self.end, self.pad = specials[END], specials[PAD]
        self._cache: dict[str, list[int]] = {}

    def _encode_often(self, text: str) -> list[int]:
        """encode() for texts that come back: openings of replies, small talk."""
        ids = self._cache.get(text)
        if ids is None:
            if len(self._cache) > 20_000:
                self._cache.clear()
            ids = self._cache[text] = self.encode(text)
        return ids

    def turn_tokens(self, turn: Turn) -> list[int]:
        """<|user|> TEXT <|assistant|> REPLY <|end|> as ids."""
        reply = self.encode(turn.assistant) if turn.asks else self._encode_often(turn.assistant)
        return [self.user, *self.encode(turn.user), self.assistant, *reply, self.end]

    def prompt_tokens(self, text: str) -> list[int]:
        return [self.user, *self.encode(text), self.assistant]

    def marks(self, turn: Turn, tokens: list[int]) -> tuple[list[float], list[bool]]:
        """Loss weights and value marks of one turn's tokens."""
        start = tokens.index(self.assistant) + 1
        weight = ANSWER_WEIGHT if turn.kind == "ask" else TALK_WEIGHT
        weights = [0.0] * start + [weight] * (len(tokens) - start)
        values = [False] * len(tokens)
        if turn.asks and turn.asks.told:
            value = turn.asks.value
            head = turn.asks.reply[: -len(value) - 1].rstrip()
            first = start + len(self._encode_often(head))
            for i in range(first, first + len(self.encode(value))):
                values[i] = True
        return weights, values
