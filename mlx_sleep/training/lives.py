"""The loss of a retrofit: a life of W windows, of which S alone crosses from one to the next.

Under a hard eviction attention and MLPs see one window at a time, so with N = 1 all windows of a
life run at once: as rows of a batch for them, and as one sequence for the delta rule. More passes
need Algorithm 1 (arXiv 2605.26099) window by window, as do models with fast weights of their own.
What a batch holds is numpy's; nothing here knows where lives come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..models.base import evict
from ..models.inserted import Inserted
from ..models.lora import left_out
from ..sleep import passes_over

ROWS = 1024  # of logits at a time
VALUE_WEIGHT = 4.0  # of a value's tokens, in the loss


class LifeBatch(NamedTuple):
    """tokens [B, W, T] int32; write [B, W, T] bool: what is folded into S.

    at [N]: flat positions whose output predicts targets [N] with weights [N] float32; value and
    refusal [N] bool: targets inside a value, and in the opening of a refusal. kl_windows [n]: flat
    numbers of windows that are held to the base; kl_at [M]: flat positions of theirs whose outputs
    are compared, kl_base_at [M] the same within those windows alone. real: how many tokens are no
    padding.
    """

    tokens: mx.array
    write: mx.array
    at: mx.array
    targets: mx.array
    weights: mx.array
    value: mx.array
    refusal: mx.array
    kl_windows: mx.array
    kl_at: mx.array
    kl_base_at: mx.array
    real: int


def life_batch(arrays: dict[str, np.ndarray], fold: str = "all") -> LifeBatch:
    """From arrays of lives: tokens [B, W, T] int32 padded on the right, mask bool, weight float32
    (of predicting token t from those before it in its window), value and reply bool, kl [B, W]
    bool (windows of ordinary chat); and perhaps refusal [B, W, T] bool (`mark_refusals`), whose
    tokens weigh no more than others. fold: "all", or "user" where replies write nothing into S.
    """
    tokens, mask, weight = arrays["tokens"], arrays["mask"], arrays["weight"]
    if weight[..., 0].any():
        raise ValueError("the first token of a window cannot be predicted from inside it")
    T = tokens.shape[2]
    # Windows of ordinary chat are held to the base and to nothing else.
    target = np.flatnonzero((weight > 0) & ~arrays["kl"][..., None])
    refusal = arrays.get("refusal", np.zeros_like(mask)).reshape(-1)[target]
    value = arrays["value"].reshape(-1)[target] & ~refusal
    kl_windows = np.flatnonzero(arrays["kl"])
    replies = arrays["reply"].reshape(-1, T)[kl_windows]
    window, position = np.nonzero(replies[:, 1:])  # the output at t predicts t + 1
    write = mask & ~arrays["reply"] if fold == "user" else mask
    weights = weight.reshape(-1)[target] * np.where(value, VALUE_WEIGHT, 1.0)
    return LifeBatch(
        tokens=mx.array(tokens.astype(np.int32)),
        write=mx.array(write),
        at=mx.array(target - 1),
        targets=mx.array(tokens.reshape(-1)[target]),
        weights=mx.array(weights.astype(np.float32)),
        value=mx.array(value),
        refusal=mx.array(refusal),
        kl_windows=mx.array(kl_windows),
        kl_at=mx.array(kl_windows[window] * T + position),
        kl_base_at=mx.array(window * T + position),
        real=int(mask.sum()),
    )


def life_hidden(model, tokens, write, passes: int = 1):
    """h [B, W, T, hidden] of a SleepModel's wake pass over each window, with a sleep after each.

    tokens [B, W, T] int32, write [B, W, T] bool (False at padding too, and nowhere else in models
    that fold all); S is zero at first. The model's eviction is hard.
    """
    B, W, T = tokens.shape
    if not model.can_fold_user:
        state, hs = model.init_state(B), []
        for w in range(W):
            h, after = model.hidden(tokens[:, w], state, write[:, w])
            if passes == 1:  # the wake pass is the only pass
                state = evict(after, model.sleep)
            else:
                state = passes_over(model, tokens[:, w], state, passes, write[:, w])
            hs.append(h)
        return mx.stack(hs, axis=1)
    if passes > 1:
        state, hs = model.init_state(B), []
        for w in range(W):
            h, _ = model.hidden(tokens[:, w], state, write=write[:, w])
            state = passes_over(model, tokens[:, w], state, passes, write=write[:, w])
            hs.append(h)
        return mx.stack(hs, axis=1)
    h, rows = model.embed(tokens.reshape(B * W, T)), write.reshape(B * W, T)
    for i in range(model.num_layers):
        h, _ = model.block(i, h, {}, None, write=rows, windows=W)
    return model.final_norm(h).reshape(B, W, T, -1)


def life_loss(model, batch: LifeBatch, base, passes: int = 1):
    """(loss, value tokens right, KL) of a batch.

    loss is the weighted mean cross-entropy, plus the mean KL(base || model) over the replies of
    ordinary windows. base [M, hidden] is what `base_hidden` gave for them, or None.
    """
    h = life_hidden(model, batch.tokens, batch.write, passes)
    h = h.reshape(-1, h.shape[-1])
    total = hits = mx.array(0.0)
    for h_part, targets, weights, value in _parts(
        h[batch.at], batch.targets, batch.weights, batch.value
    ):
        loss, right = mx.checkpoint(_cross_entropy(model, targets, weights))(h_part)
        total, hits = total + loss, hits + (right & value).sum()
    loss, kl = total / mx.maximum(batch.weights.sum(), 1e-6), mx.array(0.0)
    if base is not None:
        for h_part, base_part in _parts(h[batch.kl_at], base):
            kl = kl + mx.checkpoint(_divergence(model, base_part))(h_part)
        kl = kl / base.shape[0]
        loss = loss + kl
    return loss, hits, kl


def base_hidden(model, batch: LifeBatch):
    """h [M, hidden] of the base at `kl_at`, without sleep layers; None when there are none."""
    if not batch.kl_at.size:
        return None
    windows = batch.tokens.reshape(-1, batch.tokens.shape[2])[batch.kl_windows]
    with left_out(model):
        h, _ = (model.host if isinstance(model, Inserted) else model).hidden(windows)
    return mx.stop_gradient(h.reshape(-1, h.shape[-1])[batch.kl_base_at])


def predictions(model, batch: LifeBatch, passes: int = 1) -> mx.array:
    """[N] bool: which targets are the model's likeliest token."""
    h = life_hidden(model, batch.tokens, batch.write, passes)
    h = h.reshape(-1, h.shape[-1])[batch.at]
    hits = []
    for h_part, targets in _parts(h, batch.targets):
        hits.append(mx.argmax(model.head(h_part), axis=-1) == targets)
        mx.eval(hits)
    return mx.concatenate(hits) if hits else mx.zeros((0,), mx.bool_)


def _parts(*arrays) -> Iterator[tuple]:
    """The arrays in pieces of ROWS rows: the logits of a batch are never held at once."""
    for start in range(0, arrays[0].shape[0], ROWS):
        yield tuple(x[start : start + ROWS] for x in arrays)


def _cross_entropy(model, targets, weights):
    def run(h):
        logits = model.head(h).astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, targets)
        return (losses * weights).sum(), mx.argmax(logits, axis=-1) == targets

    return run


def _divergence(model, base):
    def run(h):
        log_p, log_base = (_log_softmax(model.head(x).astype(mx.float32)) for x in (h, base))
        return (mx.exp(log_base) * (log_base - log_p)).sum()

    return run


def _log_softmax(x):
    return x - mx.logsumexp(x, axis=-1, keepdims=True)
