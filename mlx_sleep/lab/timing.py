"""Timing in turn: what benchmarks and studies compare.

Two things are compared by timing them in turn, A B A B, in one process: the clock speed and the
neighbours of a machine drift by more than most differences that are worth printing. This module
knows no op and no model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence


def clock(run: Callable[..., object], *args) -> Callable[[], float]:
    """A function that gives the seconds of run(*args), with its arrays (any tree) evaluated."""
    import mlx.core as mx

    def seconds() -> float:
        start = time.perf_counter()
        mx.eval(run(*args))
        return time.perf_counter() - start

    return seconds


def interleave(clocks: Sequence[Callable[[], float]], repeats: int) -> list[list[float]]:
    """The times of each clock in each of `repeats` rounds: [clock][round].

    A round asks all clocks, one after the other, and each round begins with another one: a clock
    that always came after a run that empties the caches would always seem slow. One more round
    before the first only warms up.
    """
    rounds = []
    for start in range(repeats + 1):
        order = [(start + i) % len(clocks) for i in range(len(clocks))]
        times = {i: clocks[i]() for i in order}
        rounds.append([times[i] for i in range(len(clocks))])
    return [list(times) for times in zip(*rounds[1:], strict=True)]
