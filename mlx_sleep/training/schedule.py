"""Schedules: the share of its learning rates and the stage of its curriculum that a run is in.

A run of so many steps goes by `rate_at`. One with a budget of tokens or time goes by the share that
is spent, so that an hour and a day go through the same stages.
"""

from __future__ import annotations

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
    return max(i for i, share in enumerate(shares) if share)


def trapezoid(step: int, progress: float, warmup: int, floor: float = 0.05) -> float:
    """Share of the learning rates: linear up over `warmup` steps, and linear down to `floor` over
    the last 45% of the budget."""
    down = min(1.0, floor + (1 - floor) * (1 - progress) / 0.45)
    return min(1.0, (step + 1) / max(1, warmup)) * down


def rate_at(step: int, steps: int, warmup: int, cooldown: float) -> float:
    """Share of the learning rates: linear up over `warmup` steps, linear down over the last part.

    step      from 0, of `steps`
    cooldown  that last part, as a share of all steps
    """
    down = max(1, int(steps * cooldown))
    return min(1.0, (step + 1) / max(1, warmup), max(0.0, (steps - step) / down))
