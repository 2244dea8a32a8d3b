"""The kernels of ssd_*.metal. The rule itself is in ops/ssd.py."""

from __future__ import annotations

import mlx.core as mx

from . import chunks
from .checks import check, check_groups, check_heads
from .source import kernel

SIMD_GROUPS = 8  # of a threadgroup of the step


def prefill(q, k, v, g, beta, state=None, mask=None, D=None):
    """As `chunks.prefill`. D [Hv], where given, adds D v to o (the skip of Mamba-2)."""
    return chunks.prefill("ssd", q, k, v, g, beta, state, mask, **_skip(D, v))


def backward(q, k, v, g, beta, state, d_o, d_state, mask=None, D=None):
    """As `chunks.backward`, and the gradient of D last where D is given."""
    inputs = q, k, v, g, beta, state, d_o, d_state, mask
    *grads, d_D = chunks.backward("ssd", *inputs, **_skip(D, v), per_head=True)
    return tuple(grads) if D is None else (*grads, d_D.astype(D.dtype))


def _skip(D, v):
    """The kernels' last input and template argument; D is not read where there is none."""
    check("the ssd kernels", D=(D, v.shape[2:3]))
    D_or_any = mx.array([0.0]) if D is None else D
    return {"extra": (D_or_any,), "extra_template": (("HasD", D is not None),)}


def step(xBC, dt, conv, conv_weight, conv_bias, A_log, dt_bias, D, state, Hk, dt_limits):
    """One token of a Mamba-2 mixer from its projection to its norm, in one launch.

    xBC          [B, Hv Dv + 2 Hk Dk]       raw projection of v, k, q, before the convolution
    dt           [B, Hv]                    before its bias and softplus
    conv         [B, K-1, Hv Dv + 2 Hk Dk]  the inputs before this one, oldest first
    conv_weight  [Hv Dv + 2 Hk Dk, K]; conv_bias [Hv Dv + 2 Hk Dk]
    A_log, dt_bias, D [Hv]; dt_limits the least and the largest step
    state        [B, Hv, Dv, Dk] float32; begins at a multiple of 16 bytes, as every array does that
                 is no cut of a flat one

    Returns (o [B, Hv, Dv] in xBC's dtype, conv in its dtype, state float32).
    """
    B, Hv, Dv, Dk = state.shape
    K, channels = conv_weight.shape[-1], Hv * Dv + 2 * Hk * Dk
    check(
        "the ssd step",
        xBC=(xBC, (B, channels)),
        dt=(dt, (B, Hv)),
        conv=(conv, (B, K - 1, channels)),
        conv_weight=(conv_weight, (channels, K)),
        conv_bias=(conv_bias, (channels,)),
        A_log=(A_log, (Hv,)),
        dt_bias=(dt_bias, (Hv,)),
        D=(D, (Hv,)),
    )
    check_groups("the ssd step", Hk, Hv)
    check_heads("the ssd kernels", Dk, Dv)
    return tuple(
        kernel("ssd_step.metal", "ssd_step")(
            inputs=[
                xBC,
                dt,
                conv,
                conv_weight,
                conv_bias,
                A_log,
                dt_bias,
                D,
                *map(float, dt_limits),
                state.astype(mx.float32),
                Hk,
                Hv,
            ],
            template=[
                ("OutT", xBC.dtype),
                ("ConvT", conv.dtype),
                ("Dk", Dk),
                ("Dv", Dv),
                ("K", K),
                ("SimdGroups", SIMD_GROUPS),
            ],
            grid=(32 * SIMD_GROUPS, 1, B * Hv),
            threadgroup=(32 * SIMD_GROUPS, 1, 1),
            output_shapes=[(B, Hv, Dv), conv.shape, state.shape],
            output_dtypes=[xBC.dtype, conv.dtype, mx.float32],
        )
    )
