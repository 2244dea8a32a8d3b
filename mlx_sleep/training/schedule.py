"""When a run ends, which stage of its curriculum it is in, and its learning rates' share.

All by the share of the budget that is spent, so a run of an hour and one of a day go through the
same stages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Tokens, or seconds of training, that a run may spend."""

    tokens: int | None = None
    seconds: float | None = None

    def __post_init__(self):
        if (self.tokens is None) == (self.seconds is None):
            raise ValueError("a budget is of tokens or of seconds")

    def progress(self, tokens: int, seconds: float) -> float:
        """The share that is spent, in [0, 1]."""
        if self.tokens is not None:
            return min(1.0, tokens / max(1, self.tokens))
        assert self.seconds is not None
        return min(1.0, seconds / max(1e-9, self.seconds))


def stage_at(shares: Sequence[float], progress: float) -> int:
    """The number of the stage at `progress`; shares of the budget, one for each stage."""
    end = 0.0
    for i, share in enumerate(shares):
        end += share / sum(shares)
        if progress < end:
            return i
    return len(shares) - 1


def cosine(step: int, progress: float, warmup: int, floor: float = 0.05) -> float:
    """Share of the learning rates: linear up over `warmup` steps, then a half cosine to floor."""
    fall = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    return min(1.0, (step + 1) / max(1, warmup)) * fall
