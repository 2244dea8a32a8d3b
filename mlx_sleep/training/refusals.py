"""Which tokens of a batch begin a refusal: an answer to what was never told. NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

REFUSAL = "You have not told me"
"""How a refusal begins."""


def mark_refusals(arrays: dict[str, np.ndarray], opening: Sequence[int]) -> np.ndarray:
    """[B, W, T] bool: the tokens that begin a refusal, `opening`, where a loss is."""
    tokens, marks = arrays["tokens"], np.zeros_like(arrays["mask"])
    last = tokens.shape[-1] - len(opening) + 1
    found = np.ones_like(marks[..., :last])
    for i, token in enumerate(opening):
        found &= (tokens[..., i : last + i] == token) & (arrays["weight"][..., i : last + i] > 0)
    for i in range(len(opening)):
        marks[..., i : last + i] |= found
    return marks
