"""The kernel of delta_attention_step.metal. The mixer itself is in ops/mixers.py."""

from __future__ import annotations

import mlx.core as mx

from .checks import check, check_heads
from .source import kernel

SIMD_GROUPS = 8  # of a threadgroup


def step(q, k, v, z, a, b, conv, conv_weight, dt_bias, norm_weight, norm_eps, state, write=None):
    """One token of a whole delta attention mixer between its projections, in one launch.

    q, k, v      [B, H D]            raw projections, before the convolution
    z            [B, H, D]           output gate, before 2 sigmoid
    a, b         [B, H]              the decay's input and beta's, before their activations
    conv         [B, K-1, 3 H D]     the inputs before these, of q, k and v side by side
    conv_weight  [3 H D, K]
    dt_bias      [H]; norm_weight [D]; norm_eps a float
    state        [B, H, D, D] float32; begins at a multiple of 16 bytes, as every array does that is
                 no cut of a flat one
    write        [B] bool            False reads S and leaves it as it is; None is True everywhere

    Returns (o [B, H, D] in z's dtype, conv in its dtype, state float32).
    """
    B, H, D, _ = state.shape
    K, channels = conv_weight.shape[-1], 3 * H * D
    check(
        "the delta_attention step",
        q=(q, (B, H * D)),
        k=(k, (B, H * D)),
        v=(v, (B, H * D)),
        z=(z, (B, H, D)),
        a=(a, (B, H)),
        b=(b, (B, H)),
        conv=(conv, (B, K - 1, channels)),
        conv_weight=(conv_weight, (channels, K)),
        dt_bias=(dt_bias, (H,)),
        norm_weight=(norm_weight, (D,)),
        state=(state, (B, H, D, D)),
    )
    check_heads("the delta_attention kernels", D, D)
    writes = mx.array([True]) if write is None else write
    weights = conv_weight, dt_bias, norm_weight, float(norm_eps)
    return tuple(
        kernel("delta_attention_step.metal", "delta_attention_step")(
            inputs=[q, k, v, z, a, b, conv, *weights, state.astype(mx.float32), writes, H],
            template=[
                ("OutT", z.dtype),
                ("ConvT", conv.dtype),
                ("D", D),
                ("K", K),
                ("SimdGroups", SIMD_GROUPS),
                ("HasWrite", write is not None),
            ],
            grid=(32 * SIMD_GROUPS, 1, B * H),
            threadgroup=(32 * SIMD_GROUPS, 1, 1),
            output_shapes=[z.shape, conv.shape, state.shape],
            output_dtypes=[z.dtype, conv.dtype, mx.float32],
        )
    )
