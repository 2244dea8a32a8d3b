"""The task `memory`: made conversations in plain English, told facts, and questions about them.

A user tells facts over some consolidation windows and asks about them in a final window. Everything
is a pure function of (seed, split, index, level), the same in every process. The text lives in
phrases.py and words.py, conversations.py decides who says what when; this module makes batches and
evaluation items of it. It knows a tokenizer only as a function from text to ids, and no model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from random import Random

import numpy as np

from ...utils.errors import UserError
from . import words
from .conversations import Writer
from .dialogue import (
    ASSISTANT,
    END,
    PAD,
    USER,
    Conversation,
    Example,
    Level,
    Question,
    Turn,
    TurnEncoder,
)
from .phrases import NEVER_TOLD

__all__ = [
    "ASSISTANT",
    "CASES",
    "END",
    "PAD",
    "USER",
    "Conversation",
    "Example",
    "Level",
    "MemoryTask",
    "Question",
    "Turn",
    "correct",
]

# Facts that all find room in one window, then windows of questions on all of them.
RE_ASKED = Level(facts=(6, 6), two_hop=0.0, correction=0.0, unknown=0.0, small_talk=0.0, asking=1.0)
# What is asked of a trained model: case -> how its conversations are made.
CASES: dict[str, Level] = {
    "same_window": Level(windows=1, facts=(1, 8), correction=0.0),
    "after_1_sleep": Level(windows=1, facts=(1, 8), correction=0.0),
    "after_5_sleeps": Level(windows=5, facts=(20, 20), correction=0.0),
    "corrected": Level(windows=2, facts=(2, 8), correction=0.4),
    "never_told": Level(windows=1, facts=(1, 8)),
    "two_hop": Level(windows=1, facts=(6, 8), two_hop=1.0, correction=0.0),
    **{f"re_asked_{day}": replace(RE_ASKED, windows=day) for day in (1, 4, 8, 16)},
}


def correct(reply: str, value: str | None) -> bool:
    """Whether `reply` claims exactly `value`, or says that it was never told when value is None.

    Case, outer space and a final full stop are ignored. A canonical reply is one sentence that ends
    with its value; a second sentence, an "or", or words after the value claim more and are wrong.
    """
    text = " ".join(reply.split()).rstrip(" .!").casefold()
    never = NEVER_TOLD.rstrip(".").casefold()
    if value is None:
        return text == never
    if never in text or re.search(r"[.!?;,]|\b(and|or)\b", text):
        return False
    return re.search(rf"(?<!\w){re.escape(value.casefold())}$", text) is not None


class MemoryTask:
    """Conversations of one split.

    encode: text -> token ids, of a segment on its own. specials: ids of <|user|>, <|assistant|>,
    <|end|> and <pad>. split: train, valid or test.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        specials: Mapping[str, int],
        split: str,
        seed: int = 0,
    ):
        if split not in words.SPLITS:
            raise ValueError(f"split must be one of {words.SPLITS}, not {split!r}")
        self.encoder = TurnEncoder(encode, specials)
        self.split = split
        self.seed = seed
        self.end, self.pad = specials[END], specials[PAD]

    def rng(self, index: int, level: object) -> Random:
        text = repr((self.seed, self.split, index, level)).encode()
        return Random(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))

    def _writer(self, level: Level, index: int, draw: object) -> Writer:
        return Writer(self.encoder, self.split, level, self.rng(index, draw))

    def conversation(self, index: int, level: Level) -> Conversation:
        """The conversation of this index: the same in every process, in any order of calls."""
        return self._writer(level, index, level).conversation()

    def batch(self, indices: Sequence[int], level: Level) -> dict[str, np.ndarray]:
        """Arrays for a training step; B conversations, W windows of L tokens, F final tokens.

        tokens [B, W, L] int32 padded on the right, mask [B, W, L] bool (True: a real token);
        final_tokens [B, F] int32, final_mask [B, F] bool, final_loss [B, F] float32 (entry t weighs
        predicting token t from those before it), final_value [B, F] bool (value tokens of answers).
        """
        b, w, n, f = len(indices), level.windows, level.window_tokens, level.final_tokens
        out = {
            "tokens": np.full((b, w, n), self.pad, np.int32),
            "mask": np.zeros((b, w, n), bool),
            "final_tokens": np.full((b, f), self.pad, np.int32),
            "final_mask": np.zeros((b, f), bool),
            "final_loss": np.zeros((b, f), np.float32),
            "final_value": np.zeros((b, f), bool),
        }
        for row, index in enumerate(indices):
            conversation = self.conversation(int(index), level)
            for j, chunk in enumerate(conversation.chunks):
                out["tokens"][row, j, : len(chunk)] = chunk
                out["mask"][row, j, : len(chunk)] = True
            size = len(conversation.final)
            out["final_tokens"][row, :size] = conversation.final
            out["final_mask"][row, :size] = True
            out["final_loss"][row, :size] = conversation.weights
            out["final_value"][row, :size] = conversation.values
        return out

    def evaluation(self, case: str, n: int = 500, window_tokens: int = 128) -> Iterator[Example]:
        """`n` conversations of `case` with one question each, all facts told (see CASES).

        window_tokens: most tokens of a window (with its question, for same_window). The same
        examples in every process; the i-th doesn't depend on n. ValueError for an unknown case,
        UserError where the window is too short for one.
        """
        if case not in CASES:
            raise ValueError(f"case must be one of {', '.join(CASES)}, not {case!r}")
        level = replace(CASES[case], window_tokens=window_tokens)
        for index in range(n):
            for attempt in range(1000):  # until a conversation fits its windows and has such a fact
                example = self._writer(level, index, (case, attempt, level)).example(case)
                if example is not None:
                    yield example
                    break
            else:
                raise UserError(
                    f"the case {case} does not fit windows of {window_tokens} tokens; use a model "
                    f"with a longer window, or other cases"
                )
