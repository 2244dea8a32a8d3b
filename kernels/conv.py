"""The kernels of conv.metal. The static convolution's definition is in ops/conv.py."""

from __future__ import annotations

import mlx.core as mx

from .checks import check
from .source import kernel

RUN = 32  # tokens a thread
WIDTH = 64  # channels a threadgroup


def forward(x, weight, state=None, mask=None):
    """y [B, T, C] and the state [B, K-1, C], both in x's dtype.

    x [B, T, C]; weight [C, K], or [B, T, C, K] for taps of their own at each token; state
    [B, K-1, C] or None for zeros; mask [B, T] bool, False for padding after a row's real tokens.
    K is at least 2.
    """
    B, T, C, K = _check(x, weight, state, mask)
    if state is None:
        state = mx.zeros((B, K - 1, C), x.dtype)
    if 0 in (B, T, C):
        return x, state.astype(x.dtype)
    return tuple(
        kernel("conv.metal", "conv_forward")(
            inputs=[x, weight, state, _lengths(x, mask), T, C],
            template=[("OutT", x.dtype), ("K", K), ("Run", RUN), ("Dynamic", weight.ndim == 4)],
            grid=(C, -(-T // RUN), B),
            threadgroup=(WIDTH, 1, 1),
            output_shapes=[x.shape, state.shape],
            output_dtypes=[x.dtype, x.dtype],
        )
    )


def backward(x, weight, state, d_y, d_state, mask=None):
    """Gradients of (x, weight, state), each of its input's shape and dtype."""
    B, T, C, K = _check(x, weight, state, mask, d_y=d_y, d_state=d_state)
    if 0 in (B, T, C):
        return x, mx.zeros_like(weight), d_state.astype(state.dtype)
    runs, dynamic = -(-T // RUN), weight.ndim == 4
    d_x, d_weight, d_state = kernel("conv.metal", "conv_backward")(
        inputs=[x, weight, state, _lengths(x, mask), d_y, d_state, T, C],
        template=[("K", K), ("Run", RUN), ("Dynamic", dynamic)],
        grid=(C, runs, B),
        threadgroup=(WIDTH, 1, 1),
        output_shapes=[x.shape, weight.shape if dynamic else (B, runs, C, K), state.shape],
        output_dtypes=[mx.float32] * 3,
    )
    if not dynamic:
        d_weight = d_weight.sum(axis=(0, 1))
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype), d_state.astype(state.dtype)


def _check(x, weight, state, mask, d_y=None, d_state=None):
    """B, T, C, K."""
    K = weight.shape[-1]
    sizes = check(
        "the conv kernels",
        x=(x, ("B", "T", "C")),
        weight=(weight, ("B", "T", "C", "K") if weight.ndim == 4 else ("C", "K")),
        state=(state, ("B", K - 1, "C")),
        mask=(mask, ("B", "T")),
        d_y=(d_y, ("B", "T", "C")),
        d_state=(d_state, ("B", K - 1, "C")),
    )
    if K < 2:
        raise ValueError(f"the conv kernels take at least 2 taps, not {K}")
    return tuple(sizes[size] for size in ("B", "T", "C", "K"))


def _lengths(x, mask):
    if mask is None:
        return mx.full((x.shape[0],), x.shape[1], mx.int32)
    return mask.sum(axis=1).astype(mx.int32)
