"""A batch as training takes it: a list of windows, in the order in which the model reads them."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np


class Window(NamedTuple):
    """One window of a batch.

    tokens     [B, T] int32, padded on the right
    mask       [B, T] bool, or None when nothing is padded
    positions  [B, K] int32: where the loss reads the output; None makes the window a consolidation
    targets    [B, K] int32: the tokens to be predicted there
    weights    [B, K] float32: 0 for unused slots
    scored     [B, K] bool: the labels that the reported accuracy counts (the loss does not)
    """

    tokens: mx.array
    mask: mx.array | None = None
    positions: mx.array | None = None
    targets: mx.array | None = None
    weights: mx.array | None = None
    scored: mx.array | None = None

    def count_tokens(self) -> int:
        """Tokens that are not padding."""
        return self.tokens.size if self.mask is None else int(self.mask.sum())


def labelled(tokens, mask, weights, scored=None) -> Window:
    """A prediction window from numpy arrays [B, T]: tokens, mask (or None), next-token weights.

    weights is the loss weight of predicting token t from the tokens before it in the same window;
    weights[:, 0] must be zero, since nothing in the window predicts its first token. scored bool
    marks those that the accuracy counts; None is all with a weight.
    """
    if weights[:, 0].any():
        raise ValueError("the first token of a window cannot be predicted from inside it")
    count = int((weights > 0).sum(axis=1).max())
    slots = -(-max(count, 1) // 16) * 16  # few distinct shapes, so few compilations
    slots = min(slots, tokens.shape[1] - 1)
    scored = weights > 0 if scored is None else scored & (weights > 0)
    # The labelled positions of a row first, in order.
    at = np.argsort(weights[:, 1:] <= 0, axis=1, kind="stable")[:, :slots]
    return Window(
        mx.array(tokens.astype(np.int32)),
        None if mask is None else mx.array(mask),
        mx.array(at.astype(np.int32)),
        mx.array(np.take_along_axis(tokens[:, 1:], at, axis=1).astype(np.int32)),
        mx.array(np.take_along_axis(weights[:, 1:], at, axis=1).astype(np.float32)),
        mx.array(np.take_along_axis(scored[:, 1:], at, axis=1)),
    )
