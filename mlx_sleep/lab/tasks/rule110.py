"""The task `rule110`: run a cellular automaton in the head (arXiv 2605.26099, section 4).

The context is k random strings of w bits. Asked is the first bit of each string after t steps of
Rule 110 with a periodic boundary, all k in one forward pass. The length of the context never
changes with t: what changes is how much must be computed to answer. The difficulty is t.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...utils.errors import UserError
from .synthetic import Batch, check_int, check_split, draws, window_count

ASK = 2  # tokens 0 and 1 are the bits


class Rule110:
    """k strings of w bits. window: tokens between two sleeps; None is w, one string a window.

    A row is one question: it is right when all k labels are. UserError for numbers out of range.
    """

    vocab_size = 3
    trained_apart = True  # t is not in the input, so each t is a model of its own

    def __init__(self, width: int = 24, strings: int = 4, window: int | None = None, seed: int = 0):
        self.width = check_int("width (bits of a string)", width, 3)
        self.strings = check_int("strings", strings, 2)
        self.window = self.width if window is None else window
        self.windows = window_count(self.width * self.strings, self.window)
        self.final_tokens = self.strings + 1
        self.seed = seed

    def check(self, difficulty: int | None) -> None:
        """UserError unless the difficulty is one that this task has."""
        check_int("t (steps of the automaton)", difficulty, 1)

    def batch(self, split: str, indices: Sequence[int], difficulty: int) -> Batch:
        """The examples `indices`, all with t = difficulty."""
        check_split(split)
        self.check(difficulty)
        bits = self._strings(split, indices, self.strings)
        return _asked(bits, evolve(bits, difficulty)[:, :, 0], self.windows, self.window)

    def retention(self, split: str, indices: Sequence[int], difficulty: int, further: int) -> Batch:
        """The label of the first string alone, asked after `further` more windows of bits."""
        check_split(split)
        self.check(difficulty)
        if self.window < self.width:
            raise UserError("retention needs a window that holds a whole string")
        bits = self._strings(split, indices, -(-(1 + further) * self.window // self.width))
        label = evolve(bits[:, :1], difficulty)[:, :, 0]
        return _asked(bits, label, 1 + further, self.window)

    def _strings(self, split: str, indices: Sequence[int], count: int) -> np.ndarray:
        """bool [B, count, w]"""
        words = -(-self.width // 64)
        numbers = draws(("rule110", self.seed, split), indices, count * words)
        bits = (numbers[..., None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
        return bits.reshape(len(bits), count, words * 64)[..., : self.width].astype(bool)


def _asked(bits: np.ndarray, labels: np.ndarray, windows: int, window: int) -> Batch:
    """The strings bool [B, k, w] in their windows, then ASK and the labels bool [B, n]."""
    B = len(bits)
    context = bits.reshape(B, -1)[:, : windows * window].reshape(B, windows, window)
    final = np.concatenate([np.full((B, 1), ASK), labels], axis=1).astype(np.int32)
    question = np.zeros_like(final)
    question[:, 0] = -1
    return Batch(context.astype(np.int32), None, final, None, question)


def evolve(bits: np.ndarray, steps: int) -> np.ndarray:
    """bool [..., w] after so many steps: a cell is on unless it and its right neighbour are off,
    or it and both neighbours are on (rule 110, bits 01101110)."""
    for _ in range(steps):
        left, right = np.roll(bits, 1, axis=-1), np.roll(bits, -1, axis=-1)
        bits = (bits | right) & ~(left & bits & right)
    return bits
