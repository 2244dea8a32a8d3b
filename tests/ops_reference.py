"""The two fast-weight rules in NumPy float64, and what the tests of the ops share.

Written from the equations alone, one matrix product at a time, as an oracle that has no line in
common with mlx_sleep.ops.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

NAMES = ("q", "k", "v", "g", "beta", "state")


def reference(rule, q, k, v, g, beta, state, mask=None):
    """(o, state) of the rule "gated_delta" or "ssd" in float64."""
    B, T, Hv, _ = v.shape
    group = Hv // k.shape[2]
    o, state = np.zeros(v.shape), np.array(state, np.float64)
    for b, h, t in np.ndindex(B, Hv, T):
        if mask is not None and not mask[b, t]:
            continue
        key, value, S = k[b, t, h // group], v[b, t, h], state[b, h]
        a, write = np.exp(g[b, t, h]), beta[b, t, h]
        if rule == "gated_delta":
            S = a * S @ (np.eye(len(key)) - write * np.outer(key, key))
        else:
            S = a * S
        state[b, h] = S + write * np.outer(value, key)
        o[b, t, h] = state[b, h] @ q[b, t, h // group]
    return o, state


def draw(rng, B=2, T=10, Hk=2, Hv=4, Dk=6, Dv=5, g=None, beta=None):
    """Random [q, k, v, g, beta, state] in float64; k and q of unit length, as models make them."""
    q, k = rng.standard_normal((2, B, T, Hk, Dk))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = rng.standard_normal((B, T, Hv, Dv))
    gates = (B, T, Hv)
    g = -rng.exponential(0.2, gates) if g is None else np.broadcast_to(g, gates)
    beta = rng.uniform(0, 1, gates) if beta is None else np.broadcast_to(beta, gates)
    return [q, k, v, g, beta, rng.standard_normal((B, Hv, Dv, Dk))]


def arrays(inputs, dtype=mx.float32):
    """NumPy inputs as MLX arrays."""
    return [mx.array(x, dtype=dtype) for x in inputs]


def error(got, expected):
    """Largest difference relative to the largest expected entry; inf when `got` isn't finite."""
    if isinstance(got, mx.array):
        got = np.array(got.astype(mx.float32) if got.dtype == mx.bfloat16 else got)
    assert got.shape == expected.shape
    if not np.isfinite(got).all():
        return np.inf
    return np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30)


def assert_close(got, expected, tolerance):
    """Every array of `got` within the relative tolerance of its counterpart."""
    errors = [error(x, y) for x, y in zip(got, expected, strict=True)]
    assert max(errors) <= tolerance, f"relative errors {errors}, allowed {tolerance}"


def weights(rng, inputs):
    """Random weights that make one number of (o, state), so that both carry a gradient."""
    return rng.standard_normal(inputs[2].shape), rng.standard_normal(inputs[5].shape)


def gradients(op, inputs, to, dtype=mx.float32, mask=None):
    """Gradients of sum(o * to[0]) + sum(state * to[1]) in all inputs, as NumPy arrays."""
    w_o, w_s = arrays(to, dtype)

    def loss(*args):
        o, state = op(*args, **({} if mask is None else {"mask": mx.array(mask)}))
        return (o * w_o).sum() + (state * w_s).sum()

    return [np.array(x) for x in mx.grad(loss, argnums=range(len(inputs)))(*arrays(inputs, dtype))]


def slopes(rule, inputs, to, directions, mask=None, step=1e-5):
    """Central differences of the float64 oracle's loss: one slope for each input's direction."""

    def loss(i, x):
        moved = [*inputs[:i], x, *inputs[i + 1 :]]
        return sum((y * w).sum() for y, w in zip(reference(rule, *moved, mask), to, strict=True))

    return [
        (loss(i, x + step * d) - loss(i, x - step * d)) / (2 * step)
        for i, (x, d) in enumerate(zip(inputs, directions, strict=True))
    ]


def assert_gradients(rule, op, rng, inputs, dtype, tolerance, mask=None, tries=2):
    """The op's gradients agree with the oracle's slopes along random directions."""
    to = weights(rng, inputs)
    grads = gradients(op, inputs, to, dtype, mask)
    for _ in range(tries):
        directions = [rng.standard_normal(x.shape) for x in inputs]
        expected = slopes(rule, inputs, to, directions, mask)
        for name, grad, d, slope in zip(NAMES, grads, directions, expected, strict=True):
            # A random direction meets a gradient at about its norm.
            scale = max(np.linalg.norm(grad), abs(slope), 1e-12)
            off = abs((grad * d).sum() - slope) / scale
            assert off <= tolerance, f"gradient of {name}: off by {off}, allowed {tolerance}"
