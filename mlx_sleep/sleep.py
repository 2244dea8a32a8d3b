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

from .models.base import State, evict, kv_bytes
from .utils.errors import UserError

NOTHING_TO_SLEEP_INTO = (
    "this model has attention layers only, so there is nothing to sleep into; train sleep layers "
    "in it with mlx-sleep retrofit"
)


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
    write: mx.array | None = None,
) -> State:
    """N passes of the blocks over one window, Algorithm 1: the state that crosses the boundary.

    tokens [B, T] int32, mask [B, T] bool (False is padding on the right), state as of the START of
    the window. h runs on from pass to pass, S is never reset, and the KV cache is rebuilt from h
    in each pass. Blocks outside the model's `loop_range` run once.

    In a model that loops when awake (`loops` > 1), pass n is loop n, and every pass beyond the last
    loop is the last again: it attends to the KV that this loop kept at an earlier boundary, and
    what is kept of its own KV goes to that loop, and to later ones that had no pass of their own.
    There is one S, in the slots of the first loop; S of the others is dropped.

    write [B, T] bool, False for tokens that write nothing into S; only for models that take it.
    `after_block(pass, h, state)` is called after every block; `block` replaces `model.block`, which
    is how training checkpoints the passes.
    """
    block = block or model.block
    options = {} if write is None else {"write": write}
    blocks = model.num_layers
    lo, hi = model.sleep.loop_range or (0, blocks)
    start, state = state, list(state)
    h = model.embed(tokens)
    schedule = [(1, range(lo))]
    schedule += [(n, range(lo, hi)) for n in range(1, passes + 1)]
    schedule += [(passes, range(hi, blocks))]
    for n, layers in schedule:
        loop = min(n, model.loops) - 1
        for i in layers:
            before = start[loop * blocks + i]
            if "fast_weights" in state[i]:
                before = {**before, "fast_weights": state[i]["fast_weights"]}
            h, after = block(i, h, before, mask, **options)
            # A hard eviction drops the KV of all loops: there the newest serves for each.
            first = loop if model.sleep.eviction == "sliding" and lo <= i < hi else 0
            _place(state, i, after, range(first * blocks + i, len(state), blocks))
            if i == blocks - 1:
                h = model.final_norm(h)
            if after_block:
                after_block(n, h, state)
    return evict(state, model.sleep)


def _place(state, i, after, slots):
    """Puts block i's state after a pass into the list: S into slot i, all else into `slots`."""
    rest = {name: x for name, x in after.items() if name != "fast_weights"}
    for slot in slots:
        state[slot] = rest
    if "fast_weights" in after:
        state[i] = {**state[i], "fast_weights": after["fast_weights"]}


def consolidate(
    model,
    state: State,
    tokens: mx.array,
    passes: int | None = None,
    *,
    mask: mx.array | None = None,
    write: mx.array | None = None,
    on_pass: Callable[[int, int, float], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> tuple[State, SleepReport]:
    """Folds one window into the fast weights: the new state, and a report.

    state   the snapshot at the START of the window (never the working state: its S has already
            seen these tokens once, and Algorithm 1 would count them again)
    tokens  [B, T] int32, the window; T >= 1
    passes  N; None is the model's own
    mask    [B, T] bool, False for padding on the right
    write   [B, T] bool, False for tokens that write nothing into S; see `passes_over`
    on_pass(done, passes, moved)  after every pass
    should_stop()  asked after every block

    Nothing that was passed in is changed. Raises SleepCancelled when should_stop says so,
    SleepFailed when S is not finite, UserError for N < 1, an empty window, or a model without
    fast weights.
    """
    passes = model.sleep.passes if passes is None else passes
    if passes < 1:
        raise UserError(f"a sleep needs at least 1 pass, not {passes}")
    if tokens.size == 0:
        raise UserError("there is nothing to sleep over: the window is empty")
    if not any("fast_weights" in layer for layer in state) and not model.has_fast_weights:
        raise UserError(NOTHING_TO_SLEEP_INTO)
    started = time.perf_counter()
    lo, hi = model.sleep.loop_range or (0, model.num_layers)
    done, held, before = 0, 0, state
    moved: list[float] = []

    def after_block(n, h, new):
        nonlocal done, before, held
        mx.eval(h, new)  # bounded memory, and a bounded wait for the cancel check
        done += 1
        if done == hi + (n - 1) * (hi - lo):  # the last block of pass n
            moved.append(float(fast_weights_moved(before, new)))
            before = list(new)
            if on_pass:
                on_pass(n, passes, moved[-1])
        held = max(held, kv_bytes(new))
        if should_stop and should_stop():
            raise SleepCancelled(f"stopped in pass {n} of {passes}")

    new = passes_over(model, tokens, state, passes, mask, after_block, write=write)
    mx.eval(new)
    if not all(mx.isfinite(x).all().item() for layer in new for x in _arrays(layer)):
        raise SleepFailed("the sleep gave fast weights that are not finite; nothing was changed")
    tokens_in = tokens.size if mask is None else int(mask.sum())
    seconds = time.perf_counter() - started
    return new, SleepReport(tokens_in, passes, seconds, tuple(moved), held - kv_bytes(new))


def count_steps(model, passes: int) -> int:
    """How often a whole sleep of so many passes asks should_stop: once after every block."""
    lo, hi = model.sleep.loop_range or (0, model.num_layers)
    return model.num_layers + (passes - 1) * (hi - lo)


def _arrays(layer):
    return [x for x in layer.values() if isinstance(x, mx.array) and x.dtype != mx.bool_]


def fast_weights_moved(before: State, after: State, axis=None) -> mx.array:
    """|S_after - S_before| / |S_after| over all layers (Frobenius); a layer without S has S = 0.

    A number []; with axis=(1, 2, 3) one for each row of the batch, [B].
    """
    change = size = mx.array(0.0)
    for old, new in zip(before, after, strict=True):
        if "fast_weights" in new:
            S = new["fast_weights"]
            step = S - old["fast_weights"] if "fast_weights" in old else S
            change = change + mx.square(step).sum(axis=axis)
            size = size + mx.square(S).sum(axis=axis)
    return mx.sqrt(change / mx.maximum(size, 1e-30))
