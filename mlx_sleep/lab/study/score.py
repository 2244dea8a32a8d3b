"""What a model of the study answers correctly.

A question is answered correctly when every token of its answer is right. The answer's earlier
tokens are given to the model as they should be, which changes nothing: an answer that is right
throughout is also what the model says on its own, greedily.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from ...models.base import State
from ...sleep import passes_over
from ...training.windows import Window, labelled
from ..statistics import accuracy
from ..tasks.synthetic import Batch
from ..windows import windows_of
from .task import Task

EXAMPLES = 250  # at a time


def batch_windows(batch: Batch, kept: bool = False) -> list[Window]:
    """The batch as windows of Algorithm 1; kept: as one window with everything in it."""
    if kept:
        batch = _in_one_window(batch)
    weights = (batch.question >= 0).astype(np.float32)
    last = labelled(batch.final, batch.final_mask, weights)
    return windows_of(batch.context, batch.mask, last)


def _in_one_window(batch: Batch) -> Batch:
    B = len(batch.final)
    tokens = np.concatenate([batch.context.reshape(B, -1), batch.final], axis=1)
    question = np.full(tokens.shape, -1, np.int32)
    question[:, -batch.final.shape[1] :] = batch.question
    mask = None
    if batch.mask is not None and batch.final_mask is not None:
        mask = np.concatenate([batch.mask.reshape(B, -1), batch.final_mask], axis=1)
        order = np.argsort(~mask, axis=1, kind="stable")  # padding goes to the right
        tokens, question, mask = (
            np.take_along_axis(x, order, axis=1) for x in (tokens, question, mask)
        )
    return Batch(batch.context.reshape(B, 1, -1)[:, :0], None, tokens, mask, question)


def sleep_over(model, windows: Sequence[Window], passes: int, B: int) -> State:
    """The state after sleeping over all windows, of B rows.

    A model without fast weights may sleep too, it then only forgets; and S that is not finite is
    left for the score to show.
    """
    state = model.init_state(B)
    for window in windows:
        state = passes_over(model, window.tokens, state, passes, window.mask)
        mx.eval(state)
    return state


def correct_answers(model, batch: Batch, state: State, kept: bool = False) -> np.ndarray:
    """bool [B, questions]: which answers are right, in one forward pass from `state`."""
    if kept:
        batch = _in_one_window(batch)
    final = batch_windows(batch)[-1]
    assert final.positions is not None  # it has labels
    h, _ = model.hidden(final.tokens, state, final.mask)
    logits = model.head(mx.take_along_axis(h, final.positions[..., None], axis=1))
    hit = np.array(mx.argmax(logits, axis=-1) == final.targets)
    slots = np.take_along_axis(batch.question[:, 1:], np.array(final.positions), axis=1)
    correct = np.ones((len(slots), batch.question.max() + 1), bool)
    rows, columns = np.nonzero(~hit & (slots >= 0))
    correct[rows, slots[rows, columns]] = False
    return correct


def examine(
    model, task: Task, split: str, n: int, difficulty: int, passes: int, kept: bool = False
) -> dict[str, float]:
    """{"accuracy", "low", "high"} over the first n examples of a split; a 95% Wilson interval.

    It counts examples: should one have several questions, they are not independent.
    """
    correct = 0.0
    for indices in groups(n):
        batch = task.batch(split, indices, difficulty)
        windows = [] if kept else batch_windows(batch)[:-1]
        state = sleep_over(model, windows, passes, len(indices))
        correct += correct_answers(model, batch, state, kept).mean(axis=1).sum()
    return accuracy(correct, n)


def constant(task: Task, n: int, difficulty: int) -> float:
    """The share that one answer to everything gets, of the test set's first n examples."""
    batch = task.batch("test", range(n), difficulty)
    answers: dict[tuple, int] = {}
    for tokens, question in zip(batch.final, batch.question, strict=True):
        for q in range(question.max() + 1):
            answer = tuple(tokens[question == q])
            answers[answer] = answers.get(answer, 0) + 1
    return max(answers.values()) / sum(answers.values())


def groups(n: int) -> Iterator[range]:
    """The first n indices, EXAMPLES at a time."""
    return (range(i, min(i + EXAMPLES, n)) for i in range(0, n, EXAMPLES))
