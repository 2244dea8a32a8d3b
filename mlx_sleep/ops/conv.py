"""The short causal convolution before the fast weights of every SSM mixer.

Depthwise: each channel has its own K taps, the same at every token (`short_conv`) or one set for
each token (`dynamic_conv`, the Jet layer's). No activation or bias is applied here. The last K - 1
inputs are the state. This module does not know whether the caller carries that state over a
boundary (the paper's hard eviction does not).
"""

from __future__ import annotations

import mlx.core as mx

from ..kernels import conv as kernels
from .paths import differentiable, run, shape_of


def short_conv(x, weight, state=None, mask=None):
    """y_t = sum_j weight[:, j] x_{t-K+1+j}, so that weight[:, K-1] meets the newest input.

    x       [B, T, C]
    weight  [C, K]
    state   [B, K-1, C]: the inputs before x, oldest first; None is zeros
    mask    [B, T] bool: False is padding, after the real tokens of its row

    Returns (y [B, T, C], state [B, K-1, C]), both in x's dtype; the state holds the last K - 1
    real inputs of each row, reaching back into the given state where a row is shorter than that.
    y is meaningless at padding. Differentiable in x, weight and state.
    """
    return _convolve(
        "short_conv", x, weight, state, mask, lambda inputs, w: _correlate(inputs, w.T)
    )


def dynamic_conv(x, weight, state=None, mask=None):
    """y_t = sum_j weight[t, :, j] x_{t-K+1+j}: every token has its own taps (arXiv 2508.15884).

    weight is [B, T, C, K]; all else is as for `short_conv`. ValueError for a weight of another
    shape, which would otherwise be broadcast.
    """
    if weight.shape[:-1] != x.shape:
        raise ValueError(f"x {x.shape} needs weights [*x.shape, K], not {weight.shape}")
    return _convolve("dynamic_conv", x, weight, state, mask, _weigh)


def dynamic_conv_naive(x, weight, state=None, mask=None):
    """The definition of `dynamic_conv`: one token after the other, the equation as written."""
    B, T, C, K = weight.shape
    last = mx.zeros((B, K - 1, C), x.dtype) if state is None else state.astype(x.dtype)
    y = []
    for t in range(T):
        window = mx.concatenate([last, x[:, t : t + 1]], axis=1)
        y.append(sum(weight[:, t, :, j].astype(x.dtype) * window[:, j] for j in range(K)))
        real = mx.array(True) if mask is None else mask[:, t, None, None]
        last = mx.where(real, window[:, 1:], last)
    return mx.stack(y, axis=1), last


def _convolve(op, x, weight, state, mask, on_arrays):
    """What both share: the path, the inputs as one sequence, and the state after it."""
    T, C, before = x.shape[1], x.shape[2], weight.shape[-1] - 1
    if state is None:
        state = mx.zeros((x.shape[0], before, C), x.dtype)

    def metal(*args):
        *inputs, mask = args
        return differentiable(kernels.forward, kernels.backward, tuple(inputs), mask)

    def array(x, weight, state, mask):
        inputs = mx.concatenate([state.astype(x.dtype), x], axis=1)
        y = on_arrays(inputs, weight.astype(x.dtype))
        if mask is None:
            # A copy: a slice would keep the whole chunk's inputs alive for as long as the state.
            return y, mx.contiguous(inputs[:, T:])
        # Indices have no gradient, which mx.checkpoint must be told.
        newest = mx.stop_gradient(mask.sum(axis=1)[:, None] + mx.arange(before))
        return y, mx.take_along_axis(inputs, newest[..., None], axis=1)

    inputs = x, weight, state
    shape = shape_of(op, T, (C, before + 1), inputs)
    return run(shape, {"metal": metal, "array": array}, inputs, mask)


@mx.custom_function
def _correlate(inputs, taps):
    """[B, T+K-1, C] and [K, C] -> [B, T, C].

    K multiply-adds over shifted views: on the CPU five times faster than `mx.conv1d` with a group
    for each channel. The backward pass is the same sum over shifts, four times faster than what
    MLX derives from K slices.
    """
    K = taps.shape[0]
    T = inputs.shape[1] - K + 1
    y = inputs[:, :T] * taps[0]
    for j in range(1, K):
        y = y + inputs[:, j : j + T] * taps[j]
    return y


@_correlate.vjp
def _correlate_vjp(primals, cotangent, _y):
    inputs, taps = primals
    K, T = taps.shape[0], cotangent.shape[1]
    padded = mx.pad(cotangent, [(0, 0), (K - 1, K - 1), (0, 0)])
    d_taps = [(cotangent * inputs[:, j : j + T]).sum(axis=(0, 1)) for j in range(K)]
    return _correlate(padded, taps[::-1]), mx.stack(d_taps)


@mx.custom_function
def _weigh(inputs, weight):
    """[B, T+K-1, C] and [B, T, C, K] -> [B, T, C].

    One product over a view of the inputs in which windows overlap. MLX's own gradient of K
    shifted slices is three to four times slower than the one below.
    """
    return (_windows(inputs, weight.shape[3]) * weight).sum(axis=-1)


@_weigh.vjp
def _weigh_vjp(primals, cotangent, _y):
    inputs, weight = primals
    K, L = weight.shape[3], inputs.shape[1]
    reached = cotangent[..., None] * weight
    # Input i reaches y_{i-j} through tap j.
    reached = mx.pad(reached, [(0, 0), (K - 1, K - 1), (0, 0), (0, 0)])
    d_inputs = reached[:, K - 1 : K - 1 + L, :, 0]
    for j in range(1, K):
        d_inputs = d_inputs + reached[:, K - 1 - j : K - 1 - j + L, :, j]
    return d_inputs, cotangent[..., None] * _windows(inputs, K)


def _windows(inputs, K: int):
    """[B, T+K-1, C] -> a view [B, T, C, K] of the K inputs that each token sees, oldest first."""
    B, L, C = inputs.shape
    return mx.as_strided(inputs, (B, L - K + 1, C, K), (L * C, C, 1, C))
