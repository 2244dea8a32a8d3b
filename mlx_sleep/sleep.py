"""Sleep: fold a window of context into fast weights by N offline passes (arXiv 2605.26099).

`passes_over` is the consolidation of Algorithm 1 as a pure, differentiable function; training
backpropagates through it. `consolidate` is the same as a transaction: it can be watched and
cancelled, and gives a state only when that state is finite. Neither knows where the tokens came
from or what is kept on disk. The slow weights never move.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from .errors import UserError
from .models.base import State, evict, kv_bytes


class SleepCancelled(Exception):
    """The sleep was stopped by `should_stop`. The caller's state is as it was."""


class SleepFailed(Exception):
    """The sleep gave a non-finite state. The caller's state is as it was."""


@dataclass(frozen=True)
class SleepReport:
    """What one sleep did.

    tokens          tokens folded in (real ones, over the whole batch)
    passes          N
    seconds         wall time
    moved           for each pass, |S_after - S_before| / |S_after| over all layers (Frobenius)
    kv_bytes_freed  bytes of KV entries that the window held and that are gone
    """

    tokens: int
    passes: int
    seconds: float
    moved: tuple[float, ...]
    kv_bytes_freed: int


def passes_over(
    model,
    tokens: mx.array,
    state: State,
    passes: int,
    mask: mx.array | None = None,
    after_block: Callable[[int, mx.array, State], None] | None = None,
    block: Callable | None = None,
) -> State:
    """N passes of the blocks over one window, Algorithm 1: the state that crosses the boundary.

    tokens [B, T] int32, mask [B, T] bool (False is padding on the right), state as it stood at
    the START of the window. h runs on from pass to pass, S is never reset, and the KV cache is
    rebuilt from h in each pass. Blocks outside the model's `loop_range` run once.
    `after_block(pass, h, state)` is called behind every block; `block` stands in for
    `model.block`, which is how training checkpoints the passes.
    """
    block = block or model.block
    lo, hi = model.sleep.loop_range or (0, model.num_layers)
    start, state = state, list(state)
    h = model.embed(tokens)
    schedule = [(1, range(lo))]
    schedule += [(n, range(lo, hi)) for n in range(1, passes + 1)]
    schedule += [(passes, range(hi, model.num_layers))]
    for n, layers in schedule:
        for i in layers:
            before = start[i]
            if "fast_weights" in state[i]:
                before = {**before, "fast_weights": state[i]["fast_weights"]}
            h, state[i] = block(i, h, before, mask)
            if i == model.num_layers - 1:
                h = model.close_pass(h)
            if after_block:
                after_block(n, h, state)
    return evict(state, model.sleep)


def consolidate(
    model,
    state: State,
    tokens: mx.array,
    passes: int | None = None,
    *,
    mask: mx.array | None = None,
    on_pass: Callable[[int, int, float], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> tuple[State, SleepReport]:
    """Folds one window into the fast weights: the new state, and a report.

    state   the snapshot at the START of the window (never the working state: its S has already
            seen these tokens once, and Algorithm 1 would count them again)
    tokens  [B, T] int32, the window; T >= 1
    passes  N; None is the model's own
    mask    [B, T] bool, False for padding on the right
    on_pass(done, passes, moved)  after every pass
    should_stop()  asked after every block

    Nothing that was passed in is changed. Raises SleepCancelled when should_stop says so,
    SleepFailed when S is not finite, UserError for N < 1 or an empty window.
    """
    passes = model.sleep.passes if passes is None else passes
    if passes < 1:
        raise UserError(f"a sleep needs at least 1 pass, not {passes}")
    if tokens.size == 0:
        raise UserError("there is nothing to sleep over: the window is empty")
    started = time.perf_counter()
    lo, hi = model.sleep.loop_range or (0, model.num_layers)
    done, held, moved = 0, 0, []
    before = _fast_weights(state)

    def after_block(n, h, new):
        nonlocal done, before, held
        mx.eval(h, new)  # bounded memory, and a bounded wait for the cancel check
        done += 1
        if done == hi + (n - 1) * (hi - lo):  # the last block of pass n
            after = _fast_weights(new)
            moved.append(_distance(before, after))
            before = after
            if on_pass:
                on_pass(n, passes, moved[-1])
        held = max(held, kv_bytes(new))
        if should_stop and should_stop():
            raise SleepCancelled(f"stopped in pass {n} of {passes}")

    new = passes_over(model, tokens, state, passes, mask, after_block)
    mx.eval(new)
    if not all(mx.isfinite(x).all().item() for layer in new for x in _arrays(layer)):
        raise SleepFailed("the sleep gave fast weights that are not finite; nothing was changed")
    tokens_in = tokens.size if mask is None else int(mask.sum().item())
    seconds = time.perf_counter() - started
    return new, SleepReport(tokens_in, passes, seconds, tuple(moved), held - kv_bytes(new))


def _arrays(layer):
    return [x for x in layer.values() if isinstance(x, mx.array) and x.dtype != mx.bool_]


def _fast_weights(state):
    return [layer.get("fast_weights") for layer in state]


def _distance(before, after) -> float:
    """|after - before| / |after| over all layers; None stands for zero."""
    change = size = mx.array(0.0)
    for old, new in zip(before, after, strict=True):
        if new is not None:
            change = change + mx.square(new if old is None else new - old).sum()
            size = size + mx.square(new).sum()
    return mx.sqrt(change / mx.maximum(size, 1e-30)).item()
