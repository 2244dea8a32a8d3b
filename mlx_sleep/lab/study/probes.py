"""Two questions beyond the paper about a trained model: what it retains, and when it may wake."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import mlx.core as mx
import numpy as np

from ...models.base import State, evict
from ...sleep import fast_weights_moved, passes_over
from ...training.windows import Window
from ..statistics import accuracy
from .score import batch_windows, correct_answers, groups, sleep_over
from .task import Task


def retention(
    model, task: Task, n: int, difficulty: int, passes: int, further: Iterable[int]
) -> Iterator[dict]:
    """Rows: the accuracy on the first window's questions after so many further windows."""
    for count in further:
        correct = 0.0
        for indices in groups(n):
            batch = task.retention("test", indices, difficulty, count)
            state = sleep_over(model, batch_windows(batch)[:-1], passes, len(indices))
            correct += correct_answers(model, batch, state).mean(axis=1).sum()
        yield {
            "difficulty": difficulty,
            "passes": passes,
            "further": count,
            **accuracy(correct, n),
        }


def halting(
    model, task: Task, n: int, difficulty: int, most: int, thresholds: Iterable[float]
) -> Iterator[dict]:
    """Rows: each window of each example sleeps until S moves less than a threshold.

    S has moved by |S_n - S_(n-1)| / |S_n| over all layers of one example in pass n; after `most`
    passes it ends in any case. mean_passes is over windows and examples.
    """
    for threshold in thresholds:
        correct = passes = 0.0
        for indices in groups(n):
            batch = task.batch("test", indices, difficulty)
            windows = batch_windows(batch)[:-1]
            state = model.init_state(len(indices))
            for window in windows:
                state, used = sleep_until_still(model, window, state, most, threshold)
                passes += used.sum() / len(windows)
            correct += correct_answers(model, batch, state).mean(axis=1).sum()
        yield {
            "difficulty": difficulty,
            "threshold": threshold,
            "mean_passes": passes / n,
            **accuracy(correct, n),
        }


def sleep_until_still(
    model, window: Window, state: State, most: int, threshold: float
) -> tuple[State, np.ndarray]:
    """(state, passes used [B]) of one sleep that each row ends on its own. Hard eviction only."""
    after: list[State] = []
    blocks = model.num_layers
    calls = 0

    def after_block(_n, _h, new):
        nonlocal calls
        calls += 1
        if calls % blocks == 0:
            after.append(evict(new, model.sleep))

    passes_over(model, window.tokens, state, most, window.mask, after_block)
    used = np.full(len(window.tokens), most)
    before = state
    for n, now in enumerate(after, 1):
        moved = np.array(fast_weights_moved(before, now, axis=(1, 2, 3)))
        used = np.where((used == most) & (moved < threshold), n, used)
        before = now
    which = mx.array(used - 1)
    chosen = []
    for i in range(len(state)):
        layer = {}
        if "fast_weights" in after[0][i]:
            S = mx.stack([now[i]["fast_weights"] for now in after], axis=1)
            index = which.reshape(-1, *[1] * (S.ndim - 1))
            layer["fast_weights"] = mx.take_along_axis(S, index, axis=1)[:, 0]
        chosen.append(layer)
    mx.eval(chosen)
    return chosen, used
