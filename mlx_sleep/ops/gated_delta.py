"""The gated delta rule: the fast-weight update of Gated DeltaNet.

    S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T,    o_t = S_t q_t

(arXiv 2605.26099, section 2; arXiv 2412.06464). Shapes shared by every function here:

    q, k    [B, T, Hk, Dk]   used as given: the caller normalises k and scales q
    v       [B, T, Hv, Dv]   Hv is a multiple of Hk; heads of one group share q and k
    g       [B, T, Hv]       log decay, log a_t <= 0
    beta    [B, T, Hv]       b_t; 0 writes nothing, 1 replaces, up to 2 reflects
    state   [B, Hv, Dv, Dk]  float32; None is zero
    mask    [B, T] bool      False leaves the state as it is; that position's o is meaningless

and every function returns (o [B, T, Hv, Dv] in v's dtype, state float32). The arithmetic is
float32 throughout, or float64 when v is float64.
"""

from __future__ import annotations

import functools

import mlx.core as mx
import numpy as np

from ..kernels import gated_delta as kernels
from ..kernels.checks import check_rule
from .chunks import (
    custom_function,
    decay_matrix,
    heads_of,
    prepare,
    triangle,
    unstack,
    zero_state,
)
from .paths import differentiable, run, shape_of

CHUNK = 32  # tokens a chunk; a power of two


def gated_delta(q, k, v, g, beta, state=None, mask=None):
    """The gated delta rule on the fastest path that this machine has. Differentiable.

    ValueError where shapes do not fit.
    """
    check_rule("gated_delta", q, k, v, g, beta, state, mask)
    inputs = q, k, v, g, beta, zero_state(k, v) if state is None else state
    forms = {
        "metal": gated_delta_metal,
        "mlx.fast": gated_delta_mlx,
        "step": gated_delta_step,
        "chunk": gated_delta_chunk,
    }
    return run(shape_of("gated_delta", q.shape[1], heads_of(k, v), inputs), forms, inputs, mask)


def gated_delta_naive(q, k, v, g, beta, state=None, mask=None):
    """The definition: one token after the other, the equation as written."""
    dtype, (q, k, v, g, beta, state) = v.dtype, _prepare(q, k, v, g, beta, state, mask)
    o = []
    for t in range(q.shape[1]):
        q_t, k_t, v_t, b_t = q[:, t], k[:, t], v[:, t], beta[:, t, :, None]
        state = mx.exp(g[:, t])[..., None, None] * state  # a_t S_{t-1}
        held = (state @ k_t[..., None])[..., 0]  # what S already answers to k_t
        state = state + (b_t * (v_t - held))[..., None] * k_t[..., None, :]
        o.append((state @ q_t[..., None])[..., 0])
    return mx.stack(o, axis=1).astype(dtype), state


def gated_delta_step(q, k, v, g, beta, state=None, mask=None):
    """One token (T = 1): the wake step, two matrix-vector products and one outer product."""
    dtype, (q, k, v, g, beta, state) = v.dtype, _prepare(q, k, v, g, beta, state, mask)
    q_t, k_t, v_t, b_t = q[:, 0], k[:, 0], v[:, 0], beta[:, 0, :, None]
    # S k and S q in one pass over the state; the update of S is folded into o by hand.
    decay = mx.exp(g[:, 0])[..., None, None]
    read = decay * (state @ mx.stack([k_t, q_t], axis=-1))
    u = b_t * (v_t - read[..., 0])
    o = read[..., 1] + u * (k_t * q_t).sum(-1, keepdims=True)
    state = decay * state + u[..., None] * k_t[..., None, :]
    return o[:, None].astype(dtype), state


def gated_delta_metal(q, k, v, g, beta, state=None, mask=None):
    """The same through this package's Metal kernels, forward and backward."""
    state = zero_state(k, v) if state is None else state
    return differentiable(kernels.prefill, kernels.backward, (q, k, v, g, beta, state), mask)


def gated_delta_mlx(q, k, v, g, beta, state=None, mask=None):
    """The same through `mx.fast.gated_delta_update` (MLX >= 0.32).

    MLX rounds the decays to q's dtype, and in bfloat16 one above 0.998 becomes 1: float32 goes in.
    """
    dtype, (q, k, v, g, beta, state) = v.dtype, prepare(q, k, v, g, beta, state, mask)
    o, state = mx.fast.gated_delta_update(q, k, v, mx.exp(g), beta, state)
    return o.astype(dtype), state


def gated_delta_chunk(q, k, v, g, beta, state=None, mask=None, chunk: int = CHUNK):
    """The chunkwise (WY) form: matrix products within a chunk, a scan over the chunks.

    With G_t the running sum of g in a chunk and u_t = b_t (v_t - a_t S_{t-1} k_t), what the
    delta rule really writes, S_t = a_t S_{t-1} + u_t k_t^T and the u of a chunk solve

        (I + A) U = b (V - exp(G) K S_0^T),   A_tj = b_t exp(G_t - G_j) k_t.k_j  (j < t).
    """
    dtype, (q, k, v, g, beta, state) = v.dtype, _prepare(q, k, v, g, beta, state, mask)
    B, T, H, _ = q.shape
    C = min(chunk, 1 << max(T - 1, 0).bit_length())  # a short call needs no full chunk
    pad = -T % C
    # [B, T, H, D] -> [n, B, H, C, D]: padded positions have g = beta = 0 and write nothing.
    q, k, v, g, beta = (_split(x, C, pad) for x in (q, k, v, g[..., None], beta[..., None]))
    g = g[..., 0]

    decay = decay_matrix(g)  # exp(G_t - G_j), [n, B, H, C, C]
    from_start = mx.exp(mx.cumsum(g, axis=-1))[..., None]
    to_end = mx.exp(mx.cumsum(g, axis=-1, reverse=True, inclusive=False))[..., None]
    # k and q meet the keys and then S: together, in products of twice the height.
    kq = mx.concatenate([k, q], axis=-2)  # [n, B, H, 2C, Dk]
    scores = kq @ k.swapaxes(-1, -2)
    inverse = unit_lower_inverse(beta * (decay * triangle(C, -1, g.dtype)) * scores[..., :C, :])
    within = decay * scores[..., C:, :]
    readers = kq * mx.concatenate([beta * from_start, from_start], axis=-2)
    through = from_start[..., -1:, :]
    rows = (readers, k * to_end, beta * v, inverse, within, through)

    o, state = [], state.swapaxes(-1, -2)  # S^T: all products with it are then of whole rows
    for r_i, k_i, v_i, inverse_i, within_i, through_i in zip(*map(unstack, rows), strict=True):
        read = r_i @ state
        u = inverse_i @ (v_i - read[..., :C, :])
        o.append(mx.addmm(read[..., C:, :], within_i, u))
        state = mx.addmm(through_i * state, k_i.swapaxes(-1, -2), u)
    joined = mx.stack(o).transpose(1, 0, 3, 2, 4).reshape(B, T + pad, H, -1)
    # Laid out as a file gives it back: BLAS rounds a transposed matrix otherwise.
    return joined[:, :T].astype(dtype), mx.contiguous(state.swapaxes(-1, -2))


@custom_function
def unit_lower_inverse(A: mx.array) -> mx.array:
    """(I + A)^-1 for strictly lower triangular A [..., C, C], C a power of two.

    Blocks are merged in pairs, [[P, 0], [R, Q]]^-1 = [[P', 0], [-Q' R P', Q']] with ' for the
    inverse. The power series of A costs as much, but loses all its digits when keys repeat.
    """
    C = A.shape[-1]
    if C > 16:  # by quarters, both on the diagonal at once
        h = C // 2
        P, Q = unstack(unit_lower_inverse(mx.stack([A[..., :h, :h], A[..., h:, h:]])))
        R = -(Q @ A[..., h:, :h] @ P)
        top = mx.concatenate([P, mx.zeros_like(R)], axis=-1)
        return mx.concatenate([top, mx.concatenate([R, Q], axis=-1)], axis=-2)
    # All blocks of one size at once; the products are too small to be worth taking apart.
    inverse = triangle(C, 0, A.dtype) - triangle(C, -1, A.dtype)
    for size in (1, 2, 4, 8)[: C.bit_length() - 1]:
        off = A * _lower_left(C, size, A.dtype)
        inverse = inverse - (off if size == 1 else inverse @ off @ inverse)
    return mx.broadcast_to(inverse, A.shape)


@functools.cache
def _lower_left(C: int, size: int, dtype: mx.Dtype) -> mx.array:
    """Ones [C, C] in the lower left quarter of each block of 2 * size on the diagonal."""
    rows = np.arange(C) // size
    return mx.array((rows[:, None] == rows + 1) & (rows % 2 == 0), dtype)


@unit_lower_inverse.vjp
def _unit_lower_inverse_vjp(_primal, cotangent, inverse):
    transposed = inverse.swapaxes(-1, -2)
    return -(transposed @ cotangent @ transposed)


def _prepare(q, k, v, g, beta, state, mask):
    """`prepare`, with grouped heads of q and k repeated."""
    q, k, v, g, beta, state = prepare(q, k, v, g, beta, state, mask)
    if v.shape[2] != k.shape[2]:
        q, k = (mx.repeat(x, v.shape[2] // k.shape[2], axis=2) for x in (q, k))
    return q, k, v, g, beta, state


def _split(x, C, pad):
    """[B, T, H, D] -> [n, B, H, C, D] with T padded by zeros to a multiple of C."""
    B, T, H, D = x.shape
    if pad:
        x = mx.pad(x, [(0, 0), (0, pad), (0, 0), (0, 0)])
    return x.reshape(B, (T + pad) // C, C, H, D).transpose(1, 0, 3, 2, 4)
