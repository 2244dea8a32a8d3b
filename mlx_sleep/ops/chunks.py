"""What the fast-weight rules share: preparing their inputs, and pieces of the chunkwise forms."""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx
import numpy as np

custom_function: Any = mx.custom_function  # in MLX's stub a call of one gives `object`


def prepare(q, k, v, g, beta, state, mask):
    """The inputs of an op in float32 (float64 when v is), masked, with a zero state for None."""
    dtype = mx.float64 if v.dtype == mx.float64 else mx.float32
    q, k, v, g, beta = (x.astype(dtype) for x in (q, k, v, g, beta))
    k, v, g, beta = masked(k, v, g, beta, mask)
    state = zero_state(k, v, dtype) if state is None else state.astype(dtype)
    return q, k, v, g, beta, state


def masked(k, v, g, beta, mask):
    """Padding that keeps S and writes nothing, whatever it holds (a NaN times 0 is a NaN)."""
    if mask is None:
        return k, v, g, beta
    mask = mask[..., None]
    g, beta = mx.where(mask, g, 0), mx.where(mask, beta, 0)
    return mx.where(mask[..., None], k, 0), mx.where(mask[..., None], v, 0), g, beta


def heads_of(k, v) -> tuple[int, int, int, int]:
    """Hk, Hv, Dk, Dv of k [B, T, Hk, Dk] and v [B, T, Hv, Dv]."""
    return k.shape[2], v.shape[2], k.shape[3], v.shape[3]


def zero_state(k, v, dtype=mx.float32):
    """S = 0 [B, Hv, Dv, Dk] for k [B, T, Hk, Dk] and v [B, T, Hv, Dv]."""
    return mx.zeros((v.shape[0], *v.shape[2:], k.shape[3]), dtype)


@custom_function
def decay_matrix(g):
    """Decay between the tokens of a chunk: D_tj = a_{j+1} ... a_t for j <= t, 0 above.

    g [..., C] is the log of a, and D is [..., C, C]. A running product is as exact as the
    recurrence itself, where exp(G_t - G_j) of a running sum G is not once |G| is large, and it
    can neither overflow nor meet inf - inf. It also needs C exponentials instead of C * C, which
    on the CPU is most of the time.
    """
    C = g.shape[-1]
    held = mx.where(triangle(C, -1, mx.bool_), mx.exp(g)[..., None], 1)
    return triangle(C, 0, g.dtype) * mx.cumprod(held, axis=-2)


@decay_matrix.vjp
def _decay_matrix_vjp(g, cotangent, decay):
    # log D_tj is the sum of g_r over j < r <= t, so g_r gathers t >= r and j < r.
    strict = triangle(g.shape[-1], -1, g.dtype)
    return (mx.cumsum(cotangent * decay, axis=-2, reverse=True) * strict).sum(axis=-1)


@functools.cache
def triangle(C: int, diagonal: int, dtype: mx.Dtype) -> mx.array:
    """Ones [C, C] on and below a diagonal (0 the main one). Made once: making it is five ops."""
    return mx.array(np.tri(C, k=diagonal), dtype)


@custom_function
def unstack(x):
    """The rows x[0], x[1], ... as a list, with a gradient that is one stack.

    MLX's gradient of an index or of `mx.split` fills an array of x's whole size for each row, so
    that a loop over n chunks would cost n^2 in its backward pass.
    """
    return [x[i] for i in range(len(x))]


@unstack.vjp
def _unstack_vjp(_x, cotangents, _rows):
    return mx.stack(cotangents)
