"""Launches of the prefill and backward kernels, which the families share: shapes, types, grids.

`rule` is a family's name: RULE.metal holds RULE_prefill and RULE_backward. Arrays are named and
shaped as in the ops. Heads must be `checks.supported`.
"""

from __future__ import annotations

import mlx.core as mx

from .checks import FLOATS, check_heads, check_rule
from .source import kernel

MOST_BANDS = 8
"""SIMD groups of a prefill threadgroup. M1 and M2 launch 512 threads only of a kernel with at most
104 registers a thread, and these may have more; 256 threads always launch."""
BACKWARD_CHUNK = 8  # tokens; one state is kept for each
BACKWARD_GROUPS = 8  # SIMD groups of a threadgroup


def prefill(rule, q, k, v, g, beta, state=None, mask=None, extra=(), extra_template=()):
    """Any number of tokens: (o [B, T, Hv, Dv] in v's dtype, 0 at padding, state float32).

    One launch. A threadgroup holds up to 64 of Dv, and each reads q, k, g and beta; all else is
    read or written once.
    """
    _check(rule, q, k, v, g, beta, state, mask)
    B, T, Hv, Dv = v.shape
    Dk = k.shape[3]
    if state is None:
        state = mx.zeros((B, Hv, Dv, Dk), mx.float32)
    if 0 in (B, T, Hv):
        return mx.zeros(v.shape, v.dtype), state.astype(mx.float32)
    inputs = [*_inputs(q, k, v, g, beta, state), *_sizes(q, v, mask), *extra]
    return _prefill(rule, inputs, v.shape, v.dtype, mask, _chunk(Dk), False, extra_template)


def backward(
    rule,
    q,
    k,
    v,
    g,
    beta,
    state,
    d_o,
    d_state,
    mask=None,
    extra=(),
    extra_template=(),
    per_head=False,
):
    """Gradients of (q, k, v, g, beta, state), each of its input's shape and dtype.

    d_o and d_state are the gradients of prefill's two results. Two launches: S before each chunk
    of 8 tokens is computed again and kept, T/8 states a head. With per_head the kernel has one
    output more, a number for each head: its sum over the batch [Hv] float32 is the seventh.
    """
    shapes = {"d_o": (d_o, ("B", "T", "Hv", "Dv")), "d_state": (d_state, ("B", "Hv", "Dv", "Dk"))}
    _check(rule, q, k, v, g, beta, state, mask, **shapes)
    B, T, Hv, Dv = v.shape
    Hk, Dk = k.shape[2:]
    if 0 in (B, T, Hv):
        zeros = (mx.zeros_like(x) for x in (q, k, v, g, beta))
        rest = (mx.zeros((Hv,)),) if per_head else ()
        return (*zeros, d_state.astype(state.dtype), *rest)
    inputs = [*_inputs(k, k, v, g, beta, state), *_sizes(q, v, mask), *extra]
    states = (-(-T // BACKWARD_CHUNK), B, Hv, Dv, Dk)
    states, _ = _prefill(
        rule, inputs, states, mx.float32, mask, BACKWARD_CHUNK, True, extra_template
    )
    n = _largest_divisor(Dv // 8, 8)
    blocks = Dv // (8 * n)
    keys, gates = (blocks, B, T, Hv, Dk), (blocks, B, T, Hv)
    outputs = [keys, keys, v.shape, gates, gates, (B, Hv, Dv, Dk)]
    outputs += [(blocks, B, Hv)] if per_head else []
    d_q, d_k, d_v, d_g, d_beta, d_state, *rest = kernel(f"{rule}.metal", f"{rule}_backward")(
        inputs=[
            *_inputs(q, k, v, g, beta, states),
            d_o,
            d_state.astype(mx.float32),
            *_sizes(q, v, mask),
            *extra,
        ],
        template=[
            ("Dk", Dk),
            ("Dv", Dv),
            ("BV", 8 * n),
            ("SimdGroups", BACKWARD_GROUPS),
            ("HasMask", mask is not None),
            *extra_template,
        ],
        grid=(32 * BACKWARD_GROUPS, blocks, B * Hv),
        threadgroup=(32 * BACKWARD_GROUPS, 1, 1),
        output_shapes=outputs,
        output_dtypes=[mx.float32] * len(outputs),
    )
    # The blocks' sums are partial, and the heads of a group share q and k.
    d_q, d_k = (
        x.sum(axis=0).reshape(B, T, Hk, Hv // Hk, Dk).sum(axis=3).astype(like.dtype)
        for x, like in ((d_q, q), (d_k, k))
    )
    d_g, d_beta = (x.sum(axis=0).astype(like.dtype) for x, like in ((d_g, g), (d_beta, beta)))
    rest = (x.sum(axis=(0, 1)) for x in rest)
    return d_q, d_k, d_v.astype(v.dtype), d_g, d_beta, d_state.astype(state.dtype), *rest


def _check(rule, q, k, v, g, beta, state, mask, **more):
    check_rule(f"the {rule} kernels", q, k, v, g, beta, state, mask, FLOATS, **more)
    check_heads(f"the {rule} kernels", k.shape[3], v.shape[3])


def _prefill(rule, inputs, o_shape, o_dtype, mask, C, checkpoints, extra_template):
    B, _, Hv, Dv = inputs[2].shape
    Dk = inputs[1].shape[3]
    bands = _largest_divisor(Dv // 8, MOST_BANDS)
    return tuple(
        kernel(f"{rule}.metal", f"{rule}_prefill")(
            inputs=inputs,
            template=[
                ("OutT", o_dtype),
                ("Dk", Dk),
                ("Dv", Dv),
                ("C", C),
                ("Bands", bands),
                ("HasMask", mask is not None),
                ("Checkpoints", checkpoints),
                *extra_template,
            ],
            grid=(32 * bands, Dv // (8 * bands), B * Hv),
            threadgroup=(32 * bands, 1, 1),
            output_shapes=[o_shape, (B, Hv, Dv, Dk)],
            output_dtypes=[o_dtype, mx.float32],
        )
    )


def _inputs(q, k, v, g, beta, state):
    return [q, k, v, *(x.astype(mx.float32) for x in (g, beta, state))]


def _sizes(q, v, mask):
    """The mask, which is not read where there is none, and T, Hk, Hv."""
    return [mx.array([False]) if mask is None else mask, v.shape[1], q.shape[2], v.shape[2]]


def _chunk(Dk: int) -> int:
    """Tokens a chunk of prefill: q and k of a chunk must fit threadgroup memory."""
    return 16 if Dk <= 128 else 8


def _largest_divisor(n: int, most: int) -> int:
    return max(d for d in range(1, most + 1) if n % d == 0)
