"""What a model of the study gets right, and three questions about the same trained model.

A question is right when every token of its answer is. The answer's earlier tokens are given to the
model as they should be, which changes nothing: an answer that is right throughout is also what
the model says on its own, greedily.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import mlx.core as mx
import numpy as np

from ...models.base import State, evict
from ...sleep import fast_weights_moved, passes_over
from ...training.windows import Window, labelled
from ..statistics import wilson
from ..tasks.synthetic import Batch

BATCH = 250  # examples at a time


def chunks_of(batch: Batch, kept: bool = False) -> list[Window]:
    """The batch as windows of Algorithm 1; kept: as one window with everything in it."""
    if kept:
        batch = _in_one_window(batch)
    windows = [
        Window(
            mx.array(batch.context[:, w]),
            None if batch.mask is None else mx.array(batch.mask[:, w]),
        )
        for w in range(batch.context.shape[1])
    ]
    weights = (batch.question >= 0).astype(np.float32)
    return [*windows, labelled(batch.final, batch.final_mask, weights)]


def _in_one_window(batch: Batch) -> Batch:
    B = len(batch.final)
    tokens = np.concatenate([batch.context.reshape(B, -1), batch.final], axis=1)
    question = np.full(tokens.shape, -1, np.int32)
    question[:, -batch.final.shape[1] :] = batch.question
    mask = None
    if batch.mask is not None:
        mask = np.concatenate([batch.mask.reshape(B, -1), batch.final_mask], axis=1)
        order = np.argsort(~mask, axis=1, kind="stable")  # padding goes to the right
        tokens, question, mask = (
            np.take_along_axis(x, order, axis=1) for x in (tokens, question, mask)
        )
    return Batch(batch.context.reshape(B, 1, -1)[:, :0], None, tokens, mask, question)


def sleep_over(model, windows: list[Window], passes: int, B: int) -> State:
    """The state after sleeping over all windows."""
    state = model.init_state(B)
    for chunk in windows:
        state = passes_over(model, chunk.tokens, state, passes, chunk.mask)
        mx.eval(state)
    return state


def answered(model, batch: Batch, state: State, kept: bool = False) -> np.ndarray:
    """bool [B, questions]: which answers are right, in one forward pass from `state`."""
    if kept:
        batch = _in_one_window(batch)
    final = chunks_of(batch)[-1]
    h, _ = model.hidden(final.tokens, state, final.mask)
    logits = model.head(mx.take_along_axis(h, final.positions[..., None], axis=1))
    hit = np.array(mx.argmax(logits, axis=-1) == final.targets)
    slots = np.take_along_axis(batch.question[:, 1:], np.array(final.positions), axis=1)
    right = np.ones((len(slots), batch.question.max() + 1), bool)
    rows, columns = np.nonzero(~hit & (slots >= 0))
    right[rows, slots[rows, columns]] = False
    return right


def examine(
    model, task, split: str, n: int, difficulty: int, passes: int, kept: bool = False
) -> dict:
    """{"accuracy", "low", "high"} over the first n examples of a split; a 95% Wilson interval.

    It counts examples: should one have several questions, they are not independent.
    """
    share = 0.0
    for indices in _groups(n):
        batch = task.batch(split, indices, difficulty)
        windows = [] if kept else chunks_of(batch)[:-1]
        state = sleep_over(model, windows, passes, len(indices))
        share += answered(model, batch, state, kept).mean(axis=1).sum()
    return interval(share, n)


def interval(right: float, n: int) -> dict:
    low, high = wilson(right, n)
    return {"accuracy": right / n, "low": low, "high": high}


def constant(task, n: int, difficulty: int) -> float:
    """What answering always the same gets right, of the test set's first n examples."""
    batch = task.batch("test", range(n), difficulty)
    answers: dict[tuple, int] = {}
    for tokens, question in zip(batch.final, batch.question, strict=True):
        for q in range(question.max() + 1):
            answer = tuple(tokens[question == q])
            answers[answer] = answers.get(answer, 0) + 1
    return max(answers.values()) / sum(answers.values())


def retention(
    model, task, n: int, difficulty: int, passes: int, further: Iterable[int]
) -> Iterator[dict]:
    """Rows: what the first window's questions still get after so many more windows with sleep."""
    for count in further:
        share = 0.0
        for indices in _groups(n):
            batch = task.retention("test", indices, difficulty, count)
            state = sleep_over(model, chunks_of(batch)[:-1], passes, len(indices))
            share += answered(model, batch, state).mean(axis=1).sum()
        yield {
            "difficulty": difficulty,
            "passes": passes,
            "further": count,
            **interval(share, n),
        }


def halting(
    model, task, n: int, difficulty: int, most: int, thresholds: Iterable[float]
) -> Iterator[dict]:
    """Rows: each window of each example sleeps until S moves less than a threshold.

    S has moved by |S_n - S_(n-1)| / |S_n| over all layers of one example in pass n; after `most`
    passes it ends in any case. mean_passes is over windows and examples.
    """
    for threshold in thresholds:
        share = passes = 0.0
        for indices in _groups(n):
            batch = task.batch("test", indices, difficulty)
            windows = chunks_of(batch)[:-1]
            state = model.init_state(len(indices))
            for chunk in windows:
                state, used = _until_still(model, chunk, state, most, threshold)
                passes += used.sum() / len(windows)
            share += answered(model, batch, state).mean(axis=1).sum()
        yield {
            "difficulty": difficulty,
            "threshold": threshold,
            "mean_passes": passes / n,
            **interval(share, n),
        }


def _until_still(model, chunk: Window, state: State, most: int, threshold: float):
    """(state, passes used [B]) of one sleep that each row ends on its own. Hard eviction only."""
    after, blocks = [], model.num_layers
    calls = 0

    def after_block(_n, _h, new):
        nonlocal calls
        calls += 1
        if calls % blocks == 0:
            after.append(evict(new, model.sleep))

    passes_over(model, chunk.tokens, state, most, chunk.mask, after_block)
    used = np.full(len(chunk.tokens), most)
    before = state
    for n, now in enumerate(after, 1):
        moved = np.array(fast_weights_moved(before, now, axis=(1, 2, 3)))
        used = np.where((used == most) & (moved < threshold), n, used)
        before = now
    which = mx.array(used - 1)
    chosen = []
    for i, layer in enumerate(state):
        layer = {}
        if "fast_weights" in after[0][i]:
            S = mx.stack([now[i]["fast_weights"] for now in after], axis=1)
            index = which.reshape(-1, *[1] * (S.ndim - 1))
            layer["fast_weights"] = mx.take_along_axis(S, index, axis=1)[:, 0]
        chosen.append(layer)
    mx.eval(chosen)
    return chosen, used


def _groups(n: int) -> Iterator[range]:
    return (range(i, min(i + BATCH, n)) for i in range(0, n, BATCH))
