"""A task's arrays as the windows of Algorithm 1."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..training.windows import Window


def windows_of(tokens: np.ndarray, mask: np.ndarray | None, last: Window) -> list[Window]:
    """tokens [B, W, L] int32 as W windows to be slept over, and `last` after them.

    mask [B, W, L] bool: False for padding on the right; None when nothing is padded.
    """
    slept = [
        Window(mx.array(tokens[:, w]), None if mask is None else mx.array(mask[:, w]))
        for w in range(tokens.shape[1])
    ]
    return [*slept, last]
