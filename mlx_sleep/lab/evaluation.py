"""What a model still knows: exact answers after sleep, with intervals (`mlx-sleep eval memory`).

Each example is a conversation that no training has seen: its windows are slept over one by one,
the KV cache is gone, and one question is answered greedily in an empty window. The same is done
with S set to zero before the question: if it is S that carries the answer, accuracy must fall to
chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

import mlx.core as mx
import numpy as np

from ..models.base import State
from ..sleep import consolidate
from .statistics import accuracy
from .tasks.memory import Example, correct


def evaluate_memory(
    model,
    task,
    decode: Callable[[list[int]], str],
    *,
    cases: Iterable[str],
    passes: Iterable[int],
    n: int = 500,
    batch: int = 50,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[dict]:
    """Rows of case, passes, accuracy, low, high (95% Wilson), n, zeroed.

    task is a `MemoryTask` of the split to be asked (its seed picks the set), decode turns ids into
    text. The conversations fill windows of the model's own length at most. on_batch(done, total)
    reports progress in conversations. UserError where that length is too short for a case.
    """
    window = model.sleep.window
    cases, passes = list(cases), list(passes)
    rows: list[dict] = []
    done, total = 0, len(cases) * len(passes) * n
    for case in cases:
        examples = list(task.evaluation(case, n, window))
        for N in passes:
            with_s = zeroed = 0
            for group in _groups(examples, batch):
                state = sleep_over(model, [e.windows for e in group], N)
                if group[0].context:  # told in the window that the question is asked in
                    tokens, mask = pad([e.context for e in group])
                    _, state = model(tokens, state, mask)

                def hits(state, group=group):
                    replies = answer(model, [e.prompt for e in group], state, task.end)
                    pairs = zip(replies, group, strict=True)
                    return sum(correct(decode(reply), e.value) for reply, e in pairs)

                with_s += hits(state)
                zeroed += hits(zero_fast_weights(state))
                done += len(group)
                if on_batch:
                    on_batch(done, total)
            rows.append(
                {
                    "case": case,
                    "passes": N,
                    **accuracy(with_s, n),
                    "n": n,
                    "zeroed": zeroed / n,
                }
            )
    return rows


def sleep_over(model, windows: list[list[list[int]]], passes: int) -> State:
    """The state after sleeping over the windows (token ids) of each row; all have as many."""
    state = model.init_state(len(windows))
    for w in range(len(windows[0])):
        tokens, mask = pad([row[w] for row in windows])
        state, _ = consolidate(model, state, tokens, passes, mask=mask)
    return state


def answer(
    model, prompts: list[list[int]], state: State, end: int, most: int = 24
) -> list[list[int]]:
    """Greedy replies (token ids without `end`), one forward pass for each token of the batch."""
    tokens, mask = pad(prompts)
    logits, state = model(tokens, state, mask)
    last = mask.sum(axis=1) - 1
    logits = mx.take_along_axis(logits, last[:, None, None], axis=1)
    replies = []
    for _ in range(most):
        token = mx.argmax(logits, axis=-1)  # [B, 1]
        mx.eval(token, state)
        replies.append(np.array(token[:, 0]))
        if (np.stack(replies, 1) == end).any(axis=1).all():
            break
        logits, state = model(token, state)
    ids = np.stack(replies, 1).tolist()
    return [row[: row.index(end)] if end in row else row for row in ids]


def zero_fast_weights(state: State) -> State:
    """The state with S = 0 in every layer."""
    return [
        {k: mx.zeros_like(x) if k == "fast_weights" else x for k, x in layer.items()}
        for layer in state
    ]


def pad(rows: list[list[int]]) -> tuple[mx.array, mx.array]:
    """(tokens [B, T] int32, mask [B, T] bool), padded on the right."""
    longest = max(len(row) for row in rows)
    tokens = [row + [0] * (longest - len(row)) for row in rows]
    mask = [[True] * len(row) + [False] * (longest - len(row)) for row in rows]
    return mx.array(tokens, mx.int32), mx.array(mask)


def _groups(examples: list[Example], batch: int) -> Iterator[list[Example]]:
    """At most `batch` examples at a time, alike in windows and in whether there is a context."""

    def kind(e):
        return len(e.windows), bool(e.context)

    for _, group in groupby(sorted(examples, key=kind), kind):
        alike = list(group)
        yield from (alike[i : i + batch] for i in range(0, len(alike), batch))
