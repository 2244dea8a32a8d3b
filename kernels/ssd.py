"""Launches of ssd.metal: shapes, types, grids. The rule itself is in ops/ssd.py."""

from __future__ import annotations

import mlx.core as mx

from .source import bands, chunk, kernel

FILE = "ssd.metal"


def prefill(q, k, v, g, beta, state=None, mask=None, D=None):
    """Any number of tokens; arguments and results as in ops/ssd.py. Needs `source.supported`.

    D [Hv], where given, adds D v to o. o is 0 at padding. One launch.
    """
    B, T, Hv, Dv = v.shape
    Hk, Dk = k.shape[2:]
    if state is None:
        state = mx.zeros((B, Hv, Dv, Dk), mx.float32)
    if 0 in (B, T, Hv):
        return mx.zeros(v.shape, v.dtype), state.astype(mx.float32)
    n = bands(Dk, Dv)
    return tuple(
        kernel(FILE, "ssd_prefill")(
            inputs=[
                q,
                k,
                v,
                g.astype(mx.float32),
                beta.astype(mx.float32),
                mx.zeros(1) if D is None else D,
                state.astype(mx.float32),
                mx.array([False]) if mask is None else mask,
                T,
                Hk,
                Hv,
            ],
            template=[
                ("OutT", v.dtype),
                ("Dk", Dk),
                ("Dv", Dv),
                ("C", chunk(Dk)),
                ("Bands", n),
                ("HasMask", mask is not None),
                ("HasD", D is not None),
            ],
            grid=(32 * n, Dv // (8 * n), B * Hv),
            threadgroup=(32 * n, 1, 1),
            output_shapes=[v.shape, (B, Hv, Dv, Dk)],
            output_dtypes=[v.dtype, mx.float32],
        )
    )


def step(xBC, dt, conv, conv_weight, conv_bias, A_log, dt_bias, D, state, Hk, dt_limits):
    """One token of a Mamba-2 mixer from its projection to its norm, in one launch.

    xBC          [B, Hv Dv + 2 Hk Dk]       raw projection of v, k, q, before the convolution
    dt           [B, Hv]                    before its bias and softplus
    conv         [B, K-1, Hv Dv + 2 Hk Dk]  the inputs before this one, oldest first
    conv_weight  [Hv Dv + 2 Hk Dk, K]; conv_bias [Hv Dv + 2 Hk Dk]
    A_log, dt_bias, D [Hv]; dt_limits the least and the largest step
    state        [B, Hv, Dv, Dk] float32

    Returns (o [B, Hv, Dv] in xBC's dtype, conv in its dtype, state float32).
    """
    B, Hv, Dv, Dk = state.shape
    groups = 8
    return tuple(
        kernel(FILE, "ssd_step")(
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
                ("K", conv_weight.shape[1]),
                ("SimdGroups", groups),
            ],
            grid=(32 * groups, 1, B * Hv),
            threadgroup=(32 * groups, 1, 1),
            output_shapes=[(B, Hv, Dv), conv.shape, state.shape],
            output_dtypes=[xBC.dtype, conv.dtype, mx.float32],
        )
    )
