"""The kernels of gated_delta_*.metal. The rule itself is in ops/gated_delta.py."""

from __future__ import annotations

from functools import partial

import mlx.core as mx

from . import chunks
from .checks import check, check_groups, check_heads
from .source import kernel

SIMD_GROUPS = 8  # of a threadgroup of the step

prefill = partial(chunks.prefill, "gated_delta")
backward = partial(chunks.backward, "gated_delta", solves=True)


def step(qkv, z, ba, conv, conv_weight, A_log, dt_bias, norm_weight, norm_eps, state, Hk):
    """One token of a whole Gated DeltaNet mixer between its projections, in one launch.

    qkv          [B, 2 Hk Dk + Hv Dv]       raw projection, before the convolution
    z            [B, Hv, Dv]                output gate, before silu
    ba           [B, 2 Hv]                  beta before the sigmoid, then the decay's input
    conv         [B, K-1, 2 Hk Dk + Hv Dv]  the inputs before this one, oldest first
    conv_weight  [2 Hk Dk + Hv Dv, K]
    A_log, dt_bias [Hv]; norm_weight [Dv]; norm_eps a float
    state        [B, Hv, Dv, Dk] float32; begins at a multiple of 16 bytes, as every array does that
                 is no cut of a flat one

    Returns (o [B, Hv, Dv] in z's dtype, conv in its dtype, state float32).
    """
    B, Hv, Dv, Dk = state.shape
    K, channels = conv_weight.shape[-1], 2 * Hk * Dk + Hv * Dv
    check(
        "the gated_delta step",
        qkv=(qkv, (B, channels)),
        z=(z, (B, Hv, Dv)),
        ba=(ba, (B, 2 * Hv)),
        conv=(conv, (B, K - 1, channels)),
        conv_weight=(conv_weight, (channels, K)),
        A_log=(A_log, (Hv,)),
        dt_bias=(dt_bias, (Hv,)),
        norm_weight=(norm_weight, (Dv,)),
    )
    check_groups("the gated_delta step", Hk, Hv)
    check_heads("the gated_delta kernels", Dk, Dv)
    return tuple(
        kernel("gated_delta_step.metal", "gated_delta_step")(
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
                ("SimdGroups", SIMD_GROUPS),
            ],
            grid=(32 * SIMD_GROUPS, 1, B * Hv),
            threadgroup=(32 * SIMD_GROUPS, 1, 1),
            output_shapes=[z.shape, conv.shape, state.shape],
            output_dtypes=[z.dtype, conv.dtype, mx.float32],
        )
    )
