"""Launches of the prefill and backward kernels, which the families share: shapes, types, grids.

`rule` is a family's name, of RULE_prefill.metal and RULE_backward.metal. Arrays are named and
shaped as in the ops. Heads must be `checks.supported`.
"""

from __future__ import annotations

import mlx.core as mx

from .checks import FLOATS, check_heads, check_rule
from .source import kernel

MOST_GROUPS = 8
"""SIMD groups of a threadgroup. M1 and M2 launch 512 threads only of a kernel with at most 104
registers a thread, and these may have more; 256 threads always launch."""
MOST_TILES = 32
"""8 x 8 tiles of S or of its gradient that a SIMD group holds: two registers a tile, and a thread
has 128."""


def prefill(rule, q, k, v, g, beta, state=None, mask=None, extra=(), extra_template=()):
    """Any number of tokens: (o [B, T, Hv, Dv] in v's dtype, 0 at padding, state float32).

    One launch. A threadgroup holds as many of Dv as fit its registers (all up to Dk Dv = 128 x 128,
    and more for narrow keys), and each reads q, k, g and beta; all else is read or written once.
    """
    _check(rule, q, k, v, g, beta, state, mask)
    B, T, Hv, Dv = v.shape
    Dk = k.shape[3]
    if state is None:
        state = mx.zeros((B, Hv, Dv, Dk), mx.float32)
    if 0 in (B, T, Hv):
        return mx.zeros(v.shape, v.dtype), state.astype(mx.float32)
    inputs = [*_inputs(q, k, v, g, beta, state), *_sizes(q, v, mask), *extra]
    outputs = (v.shape, v.dtype), ((B, Hv, Dv, Dk), mx.float32)
    return _prefill(rule, inputs, outputs, mask, 0, extra_template)


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
    solves=False,
    per_head=False,
):
    """Gradients of (q, k, v, g, beta, state), each of its input's shape and dtype.

    d_o and d_state are the gradients of prefill's two results. Two launches: the first computes S
    again and keeps it before every 32 tokens (16 where Dk > 128). With `solves`, for a rule that
    reads S before it writes, it also keeps what comes of v [B, T, Hv, Dv]. With per_head the kernel
    has one output more, a number for each head: its sum over the batch [Hv] float32 is the seventh.
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
    every, grid = 2 * _chunk(Dk), backward_grid(Dk, Dv)
    solved = v.shape if solves else (B, Hv, Dv, Dk)  # or the last state, which nobody reads
    outputs = ((-(-T // every), B, Hv, Dv, Dk), mx.float32), (solved, mx.float32)
    states, y = _prefill(rule, inputs, outputs, mask, every, extra_template)
    blocks = -(-Dv // grid["BV"])
    keys, gates = (blocks, B, T, Hv, Dk), (blocks, B, T, Hv)
    outputs = [keys, keys, v.shape, gates, gates, (B, Hv, Dv, Dk)]
    outputs += [(blocks, B, Hv)] if per_head else []
    d_q, d_k, d_v, d_g, d_beta, d_state, *rest = kernel(
        f"{rule}_backward.metal", f"{rule}_backward"
    )(
        inputs=[
            *_inputs(q, k, y if solves else v, g, beta, states),
            d_o,
            d_state.astype(mx.float32),
            *_sizes(q, v, mask),
            *extra,
        ],
        template=[
            ("Dk", Dk),
            ("Dv", Dv),
            *grid.items(),
            ("C", _chunk(Dk)),
            ("HasMask", mask is not None),
            *extra_template,
        ],
        grid=(32 * grid["Groups"], blocks, B * Hv),
        threadgroup=(32 * grid["Groups"], 1, 1),
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


def _prefill(rule, inputs, outputs, mask, checkpoints, extra_template):
    """outputs: shape and dtype of each. checkpoints: tokens between states that are kept, or 0."""
    B, _, Hv, Dv = inputs[2].shape
    Dk = inputs[1].shape[3]
    grid = prefill_grid(Dk, Dv)
    threads = 32 * grid["Bands"] * grid["Parts"]
    return tuple(
        kernel(f"{rule}_prefill.metal", f"{rule}_prefill")(
            inputs=inputs,
            template=[
                ("OutT", outputs[0][1]),
                ("Dk", Dk),
                ("Dv", Dv),
                ("C", _chunk(Dk)),
                *grid.items(),
                ("HasMask", mask is not None),
                ("Checkpoints", checkpoints),
                *extra_template,
            ],
            grid=(threads, -(-Dv // (8 * grid["Tiles"] * grid["Bands"])), B * Hv),
            threadgroup=(threads, 1, 1),
            output_shapes=[shape for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
        )
    )


def prefill_grid(Dk: int, Dv: int) -> dict[str, int]:
    """How a prefill shares out S among SIMD groups.

    Parts   of the keys: two where one SIMD group could hold no two tiles of columns
    Tiles   of columns of S^T, each with all keys of a part, in a SIMD group; two at least, so that
            an operand serves two products
    Bands   such SIMD groups (of each part) in a threadgroup
    """
    parts = 1 if Dk <= 128 else 2
    keys, columns, most_bands = -(-Dk // 8 // parts), Dv // 8, MOST_GROUPS // parts
    most = min(MOST_TILES // keys, 4)
    blocks = -(-columns // (most_bands * most))
    columns = -(-columns // blocks)
    tiles = max(2, -(-columns // most_bands))
    return {"Bands": -(-columns // tiles), "Tiles": tiles, "Parts": parts}


def backward_grid(Dk: int, Dv: int) -> dict[str, int]:
    """How a backward pass shares out dS: BV rows a threadgroup, Groups SIMD groups with Tiles
    tiles of columns each."""
    tiles = -(-Dk // 8 // MOST_GROUPS)
    rows = Dv // 8
    blocks = -(-rows // min(16, MOST_TILES // tiles))
    return {"BV": 8 * -(-rows // blocks), "Groups": -(-Dk // 8 // tiles), "Tiles": tiles}


def _inputs(q, k, v, g, beta, state):
    return [q, k, v, *(x.astype(mx.float32) for x in (g, beta, state))]


def _sizes(q, v, mask):
    """The mask, which is not read where there is none, and T, Hk, Hv."""
    return [mx.array([False]) if mask is None else mask, v.shape[1], q.shape[2], v.shape[2]]


def _chunk(Dk: int) -> int:
    """Tokens a chunk: what is kept of a chunk must fit threadgroup memory, or the registers."""
    return 16 if Dk <= 128 else 8
