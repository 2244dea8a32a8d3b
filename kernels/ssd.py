"""The kernels of ssd.metal. The rule itself is in ops/ssd.py."""

from __future__ import annotations

from functools import partial

import mlx.core as mx

from . import chunks
from .source import kernel

SIMD_GROUPS = 8  # of a threadgroup of the step

_NO_D = {"extra": (mx.array([0.0]),), "extra_template": (("HasD", False),)}
backward = partial(chunks.backward, "ssd", **_NO_D)


def prefill(q, k, v, g, beta, state=None, mask=None, D=None):
    """As `chunks.prefill`. D [Hv], where given, adds D v to o (the skip of Mamba-2)."""
    skip = _NO_D if D is None else {"extra": (D,), "extra_template": (("HasD", True),)}
    return chunks.prefill("ssd", q, k, v, g, beta, state, mask, **skip)


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
    return tuple(
        kernel("ssd.metal", "ssd_step")(
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
                ("SimdGroups", SIMD_GROUPS),
            ],
            grid=(32 * SIMD_GROUPS, 1, B * Hv),
            threadgroup=(32 * SIMD_GROUPS, 1, 1),
            output_shapes=[(B, Hv, Dv), conv.shape, state.shape],
            output_dtypes=[xBC.dtype, conv.dtype, mx.float32],
        )
    )
