"""SSM mixers between their projections: convolution, gates, fast weights, read-out.

Each is one function for any number of tokens. A single token (the wake step) is one launch where
its path is "metal"; all else is made of this package's ops. All
are differentiable in every array. Shapes shared by all, as in `gated_delta`:

    state   [B, Hv, Dv, Dk]     float32; None is zero
    conv    [B, K-1, channels]  inputs of the short convolution before these; None is zeros
    mask    [B, T] bool         padding on the right; its o is meaningless
    A_log, dt_bias [Hv]

and all return (o [B, T, Hv, Dv] in the inputs' dtype, conv, state).
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from ..kernels import delta_attention as delta_attention_kernels
from ..kernels import gated_delta as gated_delta_kernels
from ..kernels import ssd as ssd_kernels
from .activations import silu
from .conv import short_conv
from .gated_delta import gated_delta
from .gates import decay_gates
from .paths import differentiable, path, shape_of
from .ssd import ssd


def gated_delta_net(
    qkv, z, ba, conv, conv_weight, A_log, dt_bias, norm_weight, norm_eps, state, Hk, mask=None
):
    """The mixer of Gated DeltaNet (arXiv 2412.06464) between its projections.

    qkv          [B, T, 2 Hk Dk + Hv Dv]  before the convolution
    z            [B, T, Hv, Dv]           output gate, before silu
    ba           [B, T, 2 Hv]             beta before the sigmoid, then the decay's input
    conv_weight  [2 Hk Dk + Hv Dv, K]; norm_weight [Dv]
    """
    (B, T, Hv, Dv), K = z.shape, conv_weight.shape[1]
    Dk = (qkv.shape[2] - Hv * Dv) // (2 * Hk)
    conv, state = _carried(conv, state, qkv, K, (B, Hv, Dv, Dk))

    def arrays(qkv, z, ba, conv, conv_weight, A_log, dt_bias, norm_weight, state):
        x, conv = short_conv(qkv, conv_weight, conv, mask)
        q, k, v = mx.split(silu(x), [Hk * Dk, 2 * Hk * Dk], axis=-1)
        q, k = (l2_norm(a.reshape(B, T, Hk, Dk)) for a in (q, k))
        b, a = mx.split(ba, 2, axis=-1)
        g, _ = decay_gates(a, A_log, dt_bias)
        v = v.reshape(B, T, Hv, Dv)
        o, state = gated_delta(q * Dk**-0.5, k, v, g, mx.sigmoid(b), state, mask)
        return mx.fast.rms_norm(o, norm_weight, norm_eps) * silu(z), conv, state

    def launch(qkv, z, ba, conv, conv_weight, A_log, dt_bias, norm_weight, state):
        token = (x[:, 0] for x in (qkv, z, ba))
        weights = conv_weight, A_log, dt_bias, norm_weight
        o, conv, state = gated_delta_kernels.step(*token, conv, *weights, norm_eps, state, Hk)
        return o[:, None], conv, state

    inputs = qkv, z, ba, conv, conv_weight, A_log, dt_bias, norm_weight, state
    if T == 1 and mask is None and _fused("gated_delta_net", (Hk, Hv, Dk, Dv, K), inputs):
        return _one_launch(launch, arrays, inputs)
    return arrays(*inputs)


def mamba2(
    xBC,
    dt,
    conv,
    conv_weight,
    conv_bias,
    A_log,
    dt_bias,
    D,
    state,
    Hk,
    Dk,
    dt_limits=(0.0, math.inf),
    mask=None,
):
    """The mixer of Mamba-2 (arXiv 2405.21060) from its projection to its norm.

    xBC          [B, T, Hv Dv + 2 Hk Dk]  v, k, q (x, B, C) before the convolution
    dt           [B, T, Hv]               steps before bias, softplus and dt_limits
    conv_weight  [Hv Dv + 2 Hk Dk, K]; conv_bias [Hv Dv + 2 Hk Dk]; D [Hv]
    Hk, Dk       groups and state size; dt_limits the least and the largest step
    """
    (B, T, Hv), K = dt.shape, conv_weight.shape[1]
    Dv = (xBC.shape[2] - 2 * Hk * Dk) // Hv
    conv, state = _carried(conv, state, xBC, K, (B, Hv, Dv, Dk))

    def arrays(xBC, dt, conv, conv_weight, conv_bias, A_log, dt_bias, D, state):
        x, conv = short_conv(xBC, conv_weight, conv, mask)
        x = silu(x + conv_bias)
        v, k, q = mx.split(x, [Hv * Dv, Hv * Dv + Hk * Dk], axis=-1)
        v = v.reshape(B, T, Hv, Dv)
        q, k = (a.reshape(B, T, Hk, Dk) for a in (q, k))
        o, state = ssd(q, k, v, *decay_gates(dt, A_log, dt_bias, dt_limits), state, mask, D)
        return o, conv, state

    def launch(xBC, dt, conv, *rest):
        *weights, state = rest
        token = xBC[:, 0], dt[:, 0]
        o, conv, state = ssd_kernels.step(*token, conv, *weights, state, Hk, dt_limits)
        return o[:, None], conv, state

    inputs = xBC, dt, conv, conv_weight, conv_bias, A_log, dt_bias, D, state
    if T == 1 and mask is None and _fused("mamba2", (Hk, Hv, Dk, Dv, K), inputs):
        return _one_launch(launch, arrays, inputs)
    return arrays(*inputs)


def delta_attention(
    q,
    k,
    v,
    z,
    a,
    b,
    conv,
    conv_weight,
    dt_bias,
    norm_weight,
    norm_eps,
    state,
    mask=None,
    write=None,
    windows=1,
):
    """The gated delta rule with q, k, v like those of softmax attention: no activation on them.

    q, k, v      [B, T, Hv D]    before the convolution; Dk = Dv = D. `conv` has them side by side
    z            [B, T, Hv, D]   output gate, before 2 sigmoid
    a, b         [B, T, Hv]      the decay's input and beta's, before their activations
    conv_weight  [3 Hv D, K]; norm_weight [D]
    write        [B, T] bool     False reads S and leaves it as it is; None is True everywhere

    windows      so many rows on end are one sequence for S, and each a window for the convolution:
                 state is [B / windows, Hv, D, D]. Padding is then marked by `write`, not `mask`

    q and k have length 1. log a_t = -softplus(a + dt_bias), b_t = sigmoid(b). All but the
    convolution is float32 (float64 when q is).
    """
    (B, T, H, D), K = z.shape, conv_weight.shape[1]
    if conv is None:
        conv = mx.zeros((B, K - 1, 3 * H * D), q.dtype)
    if state is None:
        state = mx.zeros((B // windows, H, D, D), mx.float32)

    def arrays(q, k, v, z, a, b, conv, conv_weight, dt_bias, norm_weight, state):
        dtype = mx.float64 if q.dtype == mx.float64 else mx.float32
        qkv = mx.concatenate([q, k, v], axis=-1)
        x, conv = short_conv(qkv, conv_weight, conv, mask)
        q, k, v = (y.reshape(B, T, H, D) for y in mx.split(x.astype(dtype), 3, axis=-1))
        g, beta = -nn.softplus(a.astype(dtype) + dt_bias), mx.sigmoid(b.astype(dtype))
        if write is not None:
            g, beta = (mx.where(write[..., None], y, 0) for y in (g, beta))
        inputs = (l2_norm(q), l2_norm(k), v, g, beta)
        if windows > 1:
            inputs = tuple(y.reshape(B // windows, windows * T, *y.shape[2:]) for y in inputs)
        o, state = gated_delta(*inputs, state, mask)
        o = mx.fast.rms_norm(o.reshape(B, T, H, D), norm_weight.astype(dtype), norm_eps)
        return (o * 2 * mx.sigmoid(z.astype(dtype))).astype(qkv.dtype), conv, state

    def launch(q, k, v, z, a, b, conv, conv_weight, dt_bias, norm_weight, state):
        token = (x[:, 0] for x in (q, k, v, z, a, b))
        weights = conv_weight, dt_bias, norm_weight, norm_eps
        writes = None if write is None else write[:, 0]
        o, conv, state = delta_attention_kernels.step(*token, conv, *weights, state, writes)
        return o[:, None], conv, state

    inputs = q, k, v, z, a, b, conv, conv_weight, dt_bias, norm_weight, state
    one = T == 1 and mask is None and windows == 1
    if one and _fused("delta_attention", (H, H, D, D, K), inputs):
        return _one_launch(launch, arrays, inputs)
    return arrays(*inputs)


def l2_norm(x, eps: float = 1e-6):
    """x / |x| over the last axis, computed in float32 (float64 when x is)."""
    x32 = x if x.dtype == mx.float64 else x.astype(mx.float32)
    return (x32 * mx.rsqrt((x32 * x32).sum(-1, keepdims=True) + eps)).astype(x.dtype)


def _carried(conv, state, inputs, K, shape):
    """conv and state, with zeros for None."""
    if conv is None:
        conv = mx.zeros((inputs.shape[0], K - 1, inputs.shape[2]), inputs.dtype)
    return conv, mx.zeros(shape, mx.float32) if state is None else state


def _fused(op, sizes, inputs) -> bool:
    """Whether a token's whole mixer is one launch (`step` in kernels/)."""
    return path(shape_of(op, 1, sizes, inputs)) == "metal"


def _one_launch(launch, arrays, inputs):
    """launch(*inputs), with the gradient of the same mixer made of ops."""

    def backward(*args):
        inputs, cotangents = args[:-4], args[-4:-1]
        return mx.vjp(arrays, inputs, cotangents)[1]

    return differentiable(lambda *args: launch(*args[:-1]), backward, inputs, None)
