"""The loss of Algorithm 1 (arXiv 2605.26099), with the gradient through all passes of a sleep."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ..models.base import LayerState, SleepModel, evict
from ..sleep import passes_over
from .windows import Window


def sleep_loss(
    model: SleepModel, windows: list[Window], passes: int, block: Callable | None = None
) -> tuple[mx.array, mx.array]:
    """Algorithm 1: (weighted mean cross-entropy, accuracy over the scored labels), both [].

    A window without positions is slept over (N passes, no loss, only S survives it); one with
    positions is run once. S starts at zero and runs on over all windows; the KV cache does not.
    `block` replaces `model.block` in the passes: see `checkpointed_block`.
    """
    state = model.init_state(windows[0].tokens.shape[0])
    total = weight = hits = labels = mx.array(0.0)
    for tokens, mask, positions, targets, weights, scored in windows:
        if positions is None or targets is None or weights is None or scored is None:
            state = passes_over(model, tokens, state, passes, mask, block=block)
            continue
        h, state = model.hidden(tokens, state, mask)
        state = evict(state, model.sleep)
        logits = model.head(mx.take_along_axis(h, positions[..., None], axis=1))
        losses = nn.losses.cross_entropy(logits, targets)
        total = total + (losses * weights).sum()
        weight = weight + weights.sum()
        hits = hits + ((mx.argmax(logits, axis=-1) == targets) & scored).sum()
        labels = labels + scored.sum()
    return total / weight, hits / mx.maximum(labels, 1)


def checkpointed_block(model: SleepModel) -> Callable:
    """`model.block` that keeps only its inputs for the backward pass: memory for time."""

    def block(i: int, h, state: LayerState, mask):
        other: LayerState = {}

        def run(h, arrays, mask):
            h, new = model.block(i, h, {**_others(state), **arrays}, mask)
            other.update(_others(new))
            return h, _arrays(new)

        h, new = nn.utils.checkpoint(model.block_modules[i], run)(h, _arrays(state), mask)
        return h, {**new, **other}

    return block


def _arrays(state: LayerState) -> LayerState:
    return {name: x for name, x in state.items() if isinstance(x, mx.array)}


def _others(state: LayerState) -> LayerState:
    return {name: x for name, x in state.items() if not isinstance(x, mx.array)}
