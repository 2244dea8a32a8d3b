"""The cases: one way to compare our model of an architecture with a reference in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sleep.models.base import SleepModel, evict
from mlx_sleep.sleep import consolidate

CASES = ("prefill", "steps", "padded", "sleep_1", "sleep_2", "sleep_3", "evicted")
AWAKE = CASES[:3]
"""The cases of an architecture that has nothing to sleep into."""


@dataclass(frozen=True)
class Pair:
    """One model twice, with the same weights.

    architecture  ours (model_type)
    reference     whose PyTorch code the other one is
    ours          our model
    theirs        the reference. It has fresh() -> state, forward(tokens [B, T], state) -> (logits
                  [B, T, vocab], state), consolidate(tokens, state, passes) -> state and, without
                  fast weights, evict(state) -> state. It pads nothing
    cases         what the two are compared in
    length        tokens of the longest input; None is a few more than the window
    """

    architecture: str
    reference: str
    ours: SleepModel
    theirs: Any
    cases: tuple[str, ...] = CASES
    length: int | None = None


@dataclass(frozen=True)
class Compared:
    """Logits of one case [..., vocab], and S of the layers that have it; ours and theirs."""

    case: str
    ours: np.ndarray
    theirs: np.ndarray
    our_S: list[np.ndarray]
    their_S: list[np.ndarray]

    @property
    def error(self) -> float:
        """The largest difference of logits; NaN if there is one."""
        return float(np.abs(self.ours - self.theirs).max())

    @property
    def agreement(self) -> float:
        """The part of positions, 0 to 1, where both have the same largest logit."""
        return float((self.ours.argmax(-1) == self.theirs.argmax(-1)).mean())


def compare(pair: Pair, rng: np.random.Generator, cases=None) -> Iterator[Compared]:
    """The cases of one pair (or some of them), on fresh tokens."""
    cases = pair.cases if cases is None else cases
    ours, theirs = _Ours(pair.ours), _Theirs(pair.theirs)
    L, vocab = pair.ours.sleep.window, pair.ours.args.vocab_size

    def tokens(*shape) -> np.ndarray:
        return rng.integers(0, vocab, shape)

    def both(case, run) -> Compared:
        (a, our_state), (b, their_state) = run(ours), run(theirs)
        return Compared(case, a, b, _S(our_state), _S(their_state))

    x = tokens(2, pair.length or L + 7)
    if "prefill" in cases:
        yield both("prefill", lambda model: model.forward(x, model.fresh()))
    if "steps" in cases:

        def steps(model):
            state, logits = model.fresh(), []
            for t in range(L + 1):  # past what a sliding eviction attends to
                one, state = model.forward(x[:, t : t + 1], state)
                logits.append(one)
            return np.concatenate(logits, 1), state

        yield both("steps", steps)
    if "padded" in cases:
        yield _padded(ours, theirs, tokens)

    first, second, question = tokens(2, L), tokens(2, L - 3), tokens(2, 7)
    for n in (1, 2, 3):
        if f"sleep_{n}" in cases:
            yield both(
                f"sleep_{n}",
                lambda model, n=n: model.forward(
                    question, model.consolidate(first, model.fresh(), n)
                ),
            )
    if "evicted" in cases:

        def evicted(model):
            state = model.fresh()
            for window in (first, second):
                if pair.ours.has_fast_weights:
                    state = model.consolidate(window, state, 2)
                else:
                    state = model.evict(model.forward(window, state)[1])
            return model.forward(question, state)

        yield both("evicted", evicted)


def _padded(ours: _Ours, theirs: _Theirs, tokens) -> Compared:
    """Right-padded chunks of a batch, against each row alone in chunks of its own length; then the
    second chunk after a sleep over the first."""
    chunks = [(tokens(2, 9), np.array(lengths)) for lengths in ((9, 4), (2, 7), (5, 1))]
    state, alone = ours.fresh(), [theirs.fresh(), theirs.fresh()]
    our_logits, their_logits = [], []

    def read(x, lengths):
        nonlocal state
        logits, state = ours.forward(x, state, _mask(lengths))
        for row, n in enumerate(lengths):
            expected, alone[row] = theirs.forward(x[row : row + 1, :n], alone[row])
            our_logits.append(logits[row, :n])
            their_logits.append(expected[0])

    for x, lengths in chunks:
        read(x, lengths)
    S, rows_S = _S(state), zip(*map(_S, alone), strict=True)
    if ours.model.has_fast_weights:
        (x, lengths), question = chunks[0], chunks[1]
        state = ours.consolidate(x, ours.fresh(), 2, _mask(lengths))
        for row, n in enumerate(lengths):
            alone[row] = theirs.consolidate(x[row : row + 1, :n], theirs.fresh(), 2)
        read(*question)
    return Compared(
        "padded",
        np.concatenate(our_logits),
        np.concatenate(their_logits),
        S,
        [np.concatenate(rows) for rows in rows_S],
    )


def _mask(lengths: np.ndarray) -> np.ndarray:
    return np.arange(9) < lengths[:, None]


class _Ours:
    """Our model with the methods of a reference, on NumPy arrays."""

    def __init__(self, model: SleepModel):
        self.model = model

    def fresh(self):
        return self.model.init_state()

    def forward(self, tokens, state, mask=None):
        mask = None if mask is None else mx.array(mask)
        logits, state = self.model(mx.array(tokens), state, mask)
        return np.array(logits), state

    def consolidate(self, tokens, state, passes, mask=None):
        mask = None if mask is None else mx.array(mask)
        return consolidate(self.model, state, mx.array(tokens), passes, mask=mask)[0]

    def evict(self, state):
        return evict(state, self.model.sleep)


class _Theirs:
    """A reference on NumPy arrays, without gradients."""

    def __init__(self, model):
        self.model = model

    def fresh(self):
        return self.model.fresh()

    def forward(self, tokens, state):
        import torch

        with torch.no_grad():
            logits, state = self.model.forward(torch.from_numpy(tokens), state)
        return np.asarray(logits), state

    def consolidate(self, tokens, state, passes):
        import torch

        with torch.no_grad():
            return self.model.consolidate(torch.from_numpy(tokens), state, passes)

    def evict(self, state):
        return self.model.evict(state)


def _S(state) -> list[np.ndarray]:
    """S [B, H, Dv, Dk] of every layer that has one, from any kind of state."""
    if state is None:
        return []
    if isinstance(state, list) and any(hasattr(cache, "state") for cache in state):  # mlx-lm's
        arrays = (x for cache in state for x in getattr(cache, "cache", ()))
        return [np.array(x) for x in arrays if x is not None and x.ndim == 4]
    if not isinstance(state, list):  # a cache of transformers
        return [np.asarray(layer.recurrent_states[0]) for layer in state.layers]
    names = ("fast_weights", "S")
    return [np.asarray(layer[name]) for layer in state for name in names if name in layer]
