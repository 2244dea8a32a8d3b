"""Thorough checks for each Metal kernel, and the array forms of what the fused kernels do.

`CHECKS` is what the mutation script runs against every changed kernel, so that checks are made to
miss nothing: several heads, groups, chunks, blocks of rows, padding, a length no chunk divides.
The first check of a kernel is a cheap one, which finds most of the changes.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_sleep.kernels import conv, delta_attention, gated_delta, ssd
from mlx_sleep.ops.conv import short_conv
from mlx_sleep.ops.gated_delta import gated_delta_naive
from mlx_sleep.ops.ssd import ssd_naive
from tests.ops_reference import arrays, assert_close, draw, gradients, reference, weights

HEADS = {"B": 2, "T": 37, "Hk": 2, "Hv": 4, "Dk": 40, "Dv": 136}
ONE_HEAD = HEADS | {"B": 1, "T": 19, "Hk": 1, "Hv": 1, "Dv": 40}
WIDE = ONE_HEAD | {"Dk": 136, "Dv": 112}


def gated_delta_mixer(qkv, z, ba, conv, weight, A_log, dt_bias, norm, eps, state, Hk):
    """The mixer of models/sleep_hybrid.py between its projections, for one token, in arrays."""
    B, Hv, Dv, Dk = state.shape
    x, conv = short_conv(qkv[:, None], weight, conv)
    x = nn.silu(x)
    q, k, v = (
        a.reshape(B, 1, -1, d)
        for a, d in zip(mx.split(x, [Hk * Dk, 2 * Hk * Dk], axis=-1), (Dk, Dk, Dv), strict=True)
    )
    q, k = (a * mx.rsqrt((a * a).sum(-1, keepdims=True) + 1e-6) for a in (q, k))
    b, a = mx.split(ba, 2, axis=-1)
    g = -mx.exp(A_log) * nn.softplus(a + dt_bias)
    o, state = gated_delta_naive(q * Dk**-0.5, k, v, g[:, None], mx.sigmoid(b)[:, None], state)
    o = mx.fast.rms_norm(o[:, 0], norm, eps) * nn.silu(z)
    return o, conv, state


def draw_gated_delta_mixer(rng, B, Hk, Hv, Dk, Dv, K):
    channels = 2 * Hk * Dk + Hv * Dv
    shapes = [
        (B, channels),
        (B, Hv, Dv),
        (B, 2 * Hv),
        (B, K - 1, channels),
        (channels, K),
        (Hv,),
        (Hv,),
        (Dv,),
    ]
    arrays_ = [mx.array(rng.standard_normal(s), mx.float32) for s in shapes]
    return [*arrays_, 1e-5, mx.array(rng.standard_normal((B, Hv, Dv, Dk)), mx.float32), Hk]


def ssd_mixer(xBC, dt, conv, weight, bias, A_log, dt_bias, D, state, Hk, limits):
    """The mixer of models/sleep_hybrid.py from its projection to its norm, in arrays."""
    B, Hv, Dv, Dk = state.shape
    x, conv = short_conv(xBC[:, None], weight, conv)
    x = nn.silu(x + bias)
    v, k, q = mx.split(x, [Hv * Dv, Hv * Dv + Hk * Dk], axis=-1)
    v = v.reshape(B, 1, Hv, Dv)
    q, k = (a.reshape(B, 1, Hk, Dk) for a in (q, k))
    dt = mx.clip(nn.softplus(dt + dt_bias), *limits)[:, None]
    o, state = ssd_naive(q, k, v, -mx.exp(A_log) * dt, dt, state)
    return (o + D[:, None] * v)[:, 0], conv, state


def draw_ssd_mixer(rng, B, Hk, Hv, Dk, Dv, K):
    channels = Hv * Dv + 2 * Hk * Dk
    shapes = [(B, channels), (B, Hv), (B, K - 1, channels), (channels, K), (channels,)]
    shapes += [(Hv,)] * 3 + [(B, Hv, Dv, Dk)]
    return [*(mx.array(rng.standard_normal(s), mx.float32) for s in shapes), Hk]


def delta_attention_mixer(q, k, v, z, a, b, conv, weight, dt_bias, norm, eps, state, write=None):
    """The mixer of models/delta_attention.py between its projections, for one token, in arrays."""
    B, H, D = z.shape
    x, conv = short_conv(mx.concatenate([q, k, v], axis=-1)[:, None], weight, conv)
    q, k, v = (y.reshape(B, 1, H, D) for y in mx.split(x, 3, axis=-1))
    q, k = (y * mx.rsqrt((y * y).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
    g, beta = -nn.softplus(a + dt_bias)[:, None], mx.sigmoid(b)[:, None]
    if write is not None:
        g, beta = (mx.where(write[:, None, None], y, 0) for y in (g, beta))
    o, state = gated_delta_naive(q, k, v, g, beta, state)
    return mx.fast.rms_norm(o[:, 0], norm, eps) * 2 * mx.sigmoid(z), conv, state


def draw_delta_attention_mixer(rng, B, Hv, Dv, K, **_same):
    H, D = Hv, Dv
    shapes = [(B, H * D)] * 3 + [(B, H, D), (B, H), (B, H), (B, K - 1, 3 * H * D)]
    shapes += [(3 * H * D, K), (H,), (D,)]
    arrays_ = [mx.array(rng.standard_normal(s), mx.float32) for s in shapes]
    return [*arrays_, 1e-5, mx.array(rng.standard_normal((B, H, D, D)), mx.float32)]


def draw_conv(rng, dynamic, B=2, T=7, C=5, K=4):
    """Random [x, weight, state] in float64."""
    weight = (B, T, C, K) if dynamic else (C, K)
    return [rng.standard_normal(s) for s in ((B, T, C), weight, (B, K - 1, C))]


def conv_oracle(x, weight, state, lengths):
    """(y, state) from the definition, a token at a time."""
    T, K = x.shape[1], weight.shape[-1]
    inputs = np.concatenate([state, x], axis=1)
    y = np.zeros(x.shape)
    for t in range(T):
        taps = weight[:, t] if weight.ndim == 4 else weight
        y[:, t] = (inputs[:, t : t + K].transpose(0, 2, 1) * taps).sum(-1)
    return y, np.stack([row[n : n + K - 1] for row, n in zip(inputs, lengths, strict=True)])


def _mask(rng, B, T):
    """Holes in the first row, and padding on the right of the second."""
    mask = np.arange(T) < np.array([[T], [T // 2]])[:B]
    mask[0] &= rng.random(T) < 0.8
    return mask


def _prefill(rule, kernels, shape, **extra):
    rng = np.random.default_rng()
    inputs = draw(rng, **shape)
    mask = _mask(rng, shape["B"], shape["T"])
    o, state = reference(rule, *inputs, mask)
    if "D" in extra:
        o += np.where(mask[..., None, None], np.array(extra["D"])[:, None] * inputs[2], 0)
    spoiled = [
        np.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, np.nan) for x in inputs[:5]
    ]
    got = kernels.prefill(*arrays([*spoiled, inputs[5]]), mask=mx.array(mask), **extra)
    assert_close(got, (o, state), 2e-6)


def _backward(kernels, naive, shape, *D):
    rng = np.random.default_rng()
    inputs = [x.astype(np.float32) for x in draw(rng, **shape)] + [np.array(d) for d in D]
    mask = _mask(rng, shape["B"], shape["T"])
    to = weights(rng, inputs)
    # With v in it, the gradient of a head's D is no sum that cancels.
    to = (to[0] + inputs[2]) * mask[..., None, None], to[1]

    def op(*args, mask):
        return naive(*args[:6], mask, *args[6:])

    def backward(d_o):
        args = *arrays(inputs[:6]), *arrays((d_o, to[1])), mx.array(mask)
        return kernels.backward(*args, *arrays(inputs[6:]))

    got = backward(to[0])
    with mx.stream(mx.cpu):  # in float64: the definition in float32 is the less exact of the two
        expected = gradients(op, inputs, to, mx.float64, mask)
    assert_close(got, expected, 5e-6)
    # o is meaningless at padding, and so is its gradient.
    again = backward(to[0] + np.where(mask[..., None, None], 0, np.nan))
    assert all(mx.array_equal(x, y) for x, y in zip(got, again, strict=True))


def _step(kernels, draw_mixer, mixer, B, *more, Dv=40):
    rng = np.random.default_rng()
    Hk, Hv = (2, 4) if B > 1 else (1, 1)
    inputs = [*draw_mixer(rng, B=B, Hk=Hk, Hv=Hv, Dk=136, Dv=Dv, K=4), *more]
    assert_close(kernels.step(*inputs), [np.array(x) for x in mixer(*inputs)], 5e-6)


def _conv(backward, dynamic):
    rng = np.random.default_rng()
    for lengths in ((67, 40, 1), (2, 1, 2)):
        T = max(lengths)
        inputs = draw_conv(rng, dynamic, B=3, T=T, C=70)
        mask = np.arange(T) < np.array(lengths)[:, None]
        y, state = conv_oracle(*inputs, lengths)
        if not backward:
            got, after = conv.forward(*arrays(inputs), mask=mx.array(mask))
            real = mask[..., None]
            assert_close((np.array(got) * real, after), (y * real, state), 1e-6)
            continue
        to = [rng.standard_normal(y.shape), rng.standard_normal(state.shape)]
        got = conv.backward(*arrays(inputs), *arrays(to), mask=mx.array(mask))
        for i, grad in enumerate(got):  # linear in each argument: any difference is exact
            d = rng.standard_normal(inputs[i].shape)
            moved = [*inputs[:i], inputs[i] + d, *inputs[i + 1 :]]
            ends = conv_oracle(*moved, lengths)
            slope = sum(((a - b) * w).sum() for a, b, w in zip(ends, (y, state), to, strict=True))
            grad = np.array(grad, np.float64)
            assert abs((grad * d).sum() - slope) <= 1e-5 * np.linalg.norm(grad)


D = mx.array([0.5, -1.0, 2.0, 1.5])
# HEADS have two blocks of Dv in the backward pass, and in prefill a last SIMD group with fewer
# tiles than the others. WIDE have chunks of 8 tokens, two parts of the keys, and two blocks.
CHECKS = {
    "gated_delta_prefill": (
        lambda: _prefill("gated_delta", gated_delta, ONE_HEAD),
        lambda: _prefill("gated_delta", gated_delta, HEADS),
        lambda: _prefill("gated_delta", gated_delta, WIDE),
    ),
    "gated_delta_backward": (
        lambda: _backward(gated_delta, gated_delta_naive, ONE_HEAD),
        lambda: _backward(gated_delta, gated_delta_naive, HEADS),
        lambda: _backward(gated_delta, gated_delta_naive, WIDE),
    ),
    "gated_delta_step": (
        lambda: _step(gated_delta, draw_gated_delta_mixer, gated_delta_mixer, 1),
        lambda: _step(gated_delta, draw_gated_delta_mixer, gated_delta_mixer, 2),
    ),
    "ssd_prefill": (
        lambda: _prefill("ssd", ssd, ONE_HEAD, D=D[:1]),
        lambda: _prefill("ssd", ssd, HEADS, D=D),
        lambda: _prefill("ssd", ssd, WIDE),
    ),
    "ssd_backward": (
        lambda: _backward(ssd, ssd_naive, ONE_HEAD, D[:1]),
        lambda: _backward(ssd, ssd_naive, HEADS, D),
        lambda: _backward(ssd, ssd_naive, WIDE),
    ),
    "ssd_step": (
        lambda: _step(ssd, draw_ssd_mixer, ssd_mixer, 1, (0.1, 1.5)),
        lambda: _step(ssd, draw_ssd_mixer, ssd_mixer, 2, (0.1, 1.5)),
    ),
    "delta_attention_step": (
        lambda: _step(delta_attention, draw_delta_attention_mixer, delta_attention_mixer, 1),
        lambda: _step(
            delta_attention,
            draw_delta_attention_mixer,
            delta_attention_mixer,
            2,
            mx.array([False, True]),
        ),
        lambda: _step(
            delta_attention, draw_delta_attention_mixer, delta_attention_mixer, 1, Dv=136
        ),
    ),
    "conv_forward": (lambda: _conv(False, False), lambda: _conv(False, True)),
    "conv_backward": (lambda: _conv(True, False), lambda: _conv(True, True)),
}
"""The checks of each kernel, the cheapest first."""
