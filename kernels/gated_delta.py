"""Launches of gated_delta.metal: shapes, types, grids. The rule itself is in ops/gated_delta.py."""

from __future__ import annotations

import mlx.core as mx

from .source import bands, chunk, kernel

FILE = "gated_delta.metal"


def prefill(q, k, v, g, beta, state=None, mask=None):
    """Any number of tokens; arguments and results as in ops/gated_delta.py. Needs `source.supported`.

    o is 0 at padding. One launch; device memory is read and written once where Dk <= 128 and
    Dv <= 128, while larger Dv read q and k once for each block of Dv.
    """
    B, T, Hv, Dv = v.shape
    Hk, Dk = k.shape[2:]
    if state is None:
        state = mx.zeros((B, Hv, Dv, Dk), mx.float32)
    if 0 in (B, T, Hv):
        return mx.zeros(v.shape, v.dtype), state.astype(mx.float32)
    n = bands(Dk, Dv)
    return tuple(
        kernel(FILE, "gated_delta_prefill")(
            inputs=[
                q,
                k,
                v,
                g.astype(mx.float32),
                beta.astype(mx.float32),
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
            ],
            grid=(32 * n, Dv // (8 * n), B * Hv),
            threadgroup=(32 * n, 1, 1),
            output_shapes=[v.shape, (B, Hv, Dv, Dk)],
            output_dtypes=[v.dtype, mx.float32],
        )
    )


def step(qkv, z, ba, conv, conv_weight, A_log, dt_bias, norm_weight, norm_eps, state, Hk):
    """One token of a whole Gated DeltaNet mixer between its projections, in one launch.

    qkv          [B, 2 Hk Dk + Hv Dv]       raw projection, before the convolution
    z            [B, Hv, Dv]                output gate, before silu
    ba           [B, 2 Hv]                  beta before the sigmoid, then the decay's input
    conv         [B, K-1, 2 Hk Dk + Hv Dv]  the inputs before this one, oldest first
    conv_weight  [2 Hk Dk + Hv Dv, K]
    A_log, dt_bias [Hv]; norm_weight [Dv]; norm_eps a float
    state        [B, Hv, Dv, Dk] float32

    Returns (o [B, Hv, Dv] in z's dtype, conv in its dtype, state float32).
    """
    B, Hv, Dv, Dk = state.shape
    K = conv_weight.shape[1]
    groups = 8
    return tuple(
        kernel(FILE, "gated_delta_step")(
            inputs=[
                qkv,
                z,
                ba,
                conv,
                conv_weight,
                A_log,
                dt_bias,
                norm_weight,
                float(norm_eps),
                state.astype(mx.float32),
                Hk,
                Hv,
            ],
            template=[
                ("OutT", z.dtype),
                ("ConvT", conv.dtype),
                ("Dk", Dk),
                ("Dv", Dv),
                ("K", K),
                ("SimdGroups", groups),
            ],
            grid=(32 * groups, 1, B * Hv),
            threadgroup=(32 * groups, 1, 1),
            output_shapes=[z.shape, conv.shape, state.shape],
            output_dtypes=[z.dtype, conv.dtype, mx.float32],
        )
    )
