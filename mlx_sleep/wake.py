"""Awake: the tokens of a window go through the model once each, and a reply is decoded.

Decoding runs one token ahead, as in mlx-lm: while a token is on its way to the reader, the model
already computes the next one. The state never does: it has seen the tokens that were taken, and
no other. This module knows no text, no memory and no sleep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from .models.base import SleepModel, State, lend_kv

READ = 512
"""Tokens that are read at once: more would take memory, and nobody could stop it in between."""


class _Ahead(NamedTuple):
    """What comes after the token that the reader has not taken yet."""

    state: State
    logits: mx.array


class Mark(NamedTuple):
    """Where a working state has been: its state, logits and read."""

    state: State
    logits: mx.array | None
    read: int


class WorkingState:
    """A state that reads on from a snapshot, and the logits after its last token.

    rows    of the head that are ids of the tokenizer; some models have more
    state   after `read` tokens; evaluated, or on its way to be
    logits  [rows] float32 after the last of them; None before the first
    read    tokens since the snapshot
    """

    def __init__(self, model: SleepModel, rows: int):
        self._model, self._rows = model, rows
        self.rewind(model.init_state())

    def rewind(self, snapshot: State) -> None:
        """Goes back to the start of the window."""
        self.state: State = snapshot
        self.logits: mx.array | None = None
        self.read = 0
        self._ahead: _Ahead | None = None

    def mark(self) -> Mark:
        """To come back to. MLX copies the KV cache once while anybody holds it."""
        return Mark(self.state, self.logits, self.read)

    def back(self, mark: Mark) -> None:
        """Goes back to a mark of this window."""
        self._ahead = None
        self.state, self.logits, self.read = mark

    def feed(self, tokens: Sequence[int], write: mx.array | None = None) -> None:
        """Reads tokens, and computes the logits of the last one only.

        write [1, T] bool is that of `SleepModel.hidden`. The state is lost when this raises:
        rewind then, and read the window again.
        """
        self._ahead = None
        # MLX appends to a KV cache in place only when nothing else holds the old arrays.
        state, self.state = self.state, []
        logits, state = self._forward(mx.array([tokens]), state, write)
        mx.eval(logits, state)
        self.state, self.logits = state, logits
        self.read += len(tokens)

    def run_ahead(
        self, token: mx.array, sample: Callable[[mx.array], mx.array], write: mx.array | None = None
    ) -> mx.array:
        """Starts on what follows `token` [1], which need not be known yet: the next token [1].

        sample is called with its logits. `take` goes on from there; without it the token was not
        read. As with `feed`, the state is lost when this raises.
        """
        before, self.state = self.state, []
        logits, after = self._forward(token[None], before, write)
        following = sample(logits)
        self.state = lend_kv(before, after)
        del before  # nothing may hold the old KV when it is evaluated
        self._ahead = _Ahead(after, logits)
        mx.async_eval(following, logits, after)
        return following

    def take(self) -> None:
        """The token of the last `run_ahead` has been read."""
        assert self._ahead is not None
        self.state, self.logits = self._ahead
        self._ahead = None
        self.read += 1

    def settle(self) -> None:
        """Waits for what was started, and drops what was not taken: another thread may go on."""
        self._ahead = None
        mx.eval(self.state)

    def _forward(
        self, tokens: mx.array, state: State, write: mx.array | None
    ) -> tuple[mx.array, State]:
        """Logits [rows] of the last of tokens [1, T], and the state after them."""
        h, state = self._model.hidden(tokens, state, **({} if write is None else {"write": write}))
        return self._model.head(h[:, -1:])[0, -1, : self._rows].astype(mx.float32), state
