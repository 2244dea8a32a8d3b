"""The lives that a model learns to remember from: from two short windows to sixteen.

Both trainers of retrofits, in MLX and in PyTorch, take their batches from here. All of it is a
function of the step and the stage. NumPy alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np

from .life import Level
from .life_batches import Source, stream

STRIDE = 1 << 16  # indices of lives that a step may use


@dataclass(frozen=True)
class Stage:
    """share: of the budget. windows, window_tokens: each step draws one of them. facts: told in a
    window, at most. untold, wrong, asking, ordinary: rates (see Level)."""

    share: float
    windows: Sequence[int]
    window_tokens: Sequence[int]
    facts: int = 6
    untold: float = 0.22
    wrong: float = 0.1
    asking: float = 0.3
    ordinary: float = 0.15


# Two windows at least: what was told in the same window needs no fast weights.
STAGES = (
    Stage(0.25, (2, 3), (128, 160), facts=4, wrong=0.04),
    Stage(0.35, (2, 3, 4, 6), (128, 192, 256), facts=5, wrong=0.07),
    Stage(0.4, (2, 4, 8, 12, 16), (128, 192, 256, 320)),
    # The shortest way to a memory: nothing but telling, a sleep, and asking. For short runs.
    Stage(0.0, (2,), (112, 128), facts=3, untold=0.08, wrong=0.0, asking=1.0, ordinary=0.0),
)
SHARES = tuple(stage.share for stage in STAGES)


def level_of(step: int, stage: int) -> Level:
    """The level of a step's lives."""
    draw, s = Random(f"{step}/{stage}"), STAGES[stage]
    return Level(
        windows=draw.choice(s.windows),
        window_tokens=draw.choice(s.window_tokens),
        facts=(1, s.facts),
        untold=s.untold,
        wrong=s.wrong,
        asking=s.asking,
        ordinary=s.ordinary,
    )


def lives_of(step: int, level: Level, tokens: int) -> range:
    """Indices of a step's lives: as many as fill about `tokens`, and never those of another."""
    count = max(1, min(STRIDE, tokens // (level.windows * level.window_tokens)))
    return range(step * STRIDE, step * STRIDE + count)


def batches(
    source: Source,
    jobs: Iterable[tuple[int, int]],
    tokens: int,
    workers: int = 0,
    two_hop: float = 0.0,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of about `tokens` tokens, padding included, for each (step, stage) of jobs. two_hop:
    of the level (see Level)."""

    def lives():
        for step, stage in jobs:
            level = replace(level_of(step, stage), two_hop=two_hop)
            yield lives_of(step, level, tokens), level

    return stream(source, lives(), workers)


def held_out(source: Source, tokens: int = 8192) -> list[dict[str, np.ndarray]]:
    """Batches to evaluate on, of the last three stages' longest lives: source's split decides."""
    levels = [Level(windows=n, window_tokens=192) for n in (4, 8, 16)]
    jobs = [(lives_of(0, level, tokens), level) for level in levels]
    return list(stream(source, jobs, 0))
