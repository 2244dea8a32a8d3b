"""Measured shares with their intervals, and ratios of times."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def wilson(correct: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% Wilson interval of a share: `correct` of n, where an example may be half correct."""
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy(correct: float, n: int) -> dict[str, float]:
    """{"accuracy", "low", "high"}: the share and its 95% Wilson interval."""
    low, high = wilson(correct, n)
    return {"accuracy": correct / n, "low": low, "high": high}


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median over rounds of over/under; a slow round slows both."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))
