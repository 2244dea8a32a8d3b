"""The gated Hebbian rule: the fast-weight update of Mamba-2, in its state space dual (SSD) form.

    S_t = a_t S_{t-1} + b_t v_t k_t^T,    o_t = S_t q_t

(arXiv 2605.26099, eq. 3; arXiv 2405.21060). In Mamba-2's letters q is C, k is B, v is x, b_t is
dt and log a_t is dt A. Shapes shared by every function here, as in `gated_delta`:

    q, k    [B, T, Hk, Dk]   used as given
    v       [B, T, Hv, Dv]   Hv is a multiple of Hk; heads of one group share q and k
    g       [B, T, Hv]       log decay, log a_t <= 0
    beta    [B, T, Hv]       b_t; 0 writes nothing
    state   [B, Hv, Dv, Dk]  float32; None is zero
    mask    [B, T] bool      False leaves the state as it is; that position's o is meaningless
    D       [Hv]             None, or the skip: adds D v_t to o_t

and every function returns (o [B, T, Hv, Dv] in v's dtype, state float32). The arithmetic is
float32 throughout, or float64 when v is float64.
"""

from __future__ import annotations

import mlx.core as mx

from ..kernels import ssd as kernels
from ..kernels.checks import check_rule
from .chunks import decay_matrix, heads_of, prepare, unstack, zero_state
from .paths import differentiable, run, shape_of

CHUNK = 64  # tokens a chunk


def ssd(q, k, v, g, beta, state=None, mask=None, D=None):
    """The gated Hebbian rule on the fastest path that this machine has. Differentiable.

    ValueError where shapes do not fit.
    """
    check_rule("ssd", q, k, v, g, beta, state, mask, D=(D, ("Hv",)))
    inputs = q, k, v, g, beta, zero_state(k, v) if state is None else state
    if D is not None:
        inputs = (*inputs, D)

    def form(rule):
        return lambda *args: rule(*args[:6], args[-1], *args[6:-1])  # D comes after the mask

    forms = {"metal": form(ssd_metal), "step": form(ssd_step), "chunk": form(ssd_chunk)}
    return run(shape_of("ssd", q.shape[1], heads_of(k, v), inputs), forms, inputs, mask)


def ssd_naive(q, k, v, g, beta, state=None, mask=None, D=None):
    """The definition: one token after the other, the equation as written."""
    dtype, (q, k, v, g, beta, state) = v.dtype, prepare(q, k, v, g, beta, state, mask)
    q, k = (mx.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))
    o = []
    for t in range(q.shape[1]):
        write = beta[:, t, :, None, None] * v[:, t, :, :, None] * k[:, t, :, None, :]
        state = mx.exp(g[:, t])[..., None, None] * state + write
        o.append((state @ q[:, t, ..., None])[..., 0])
    return _with_skip(mx.stack(o, axis=1), v, D, dtype), state


def ssd_step(q, k, v, g, beta, state=None, mask=None, D=None):
    """One token (T = 1): the wake step."""
    dtype, (q, k, v, g, beta, state) = v.dtype, prepare(q, k, v, g, beta, state, mask)
    q, k = (mx.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))
    write = (beta[:, 0, :, None] * v[:, 0])[..., None] * k[:, 0, :, None, :]
    state = mx.exp(g[:, 0])[..., None, None] * state + write
    o = (state @ q[:, 0, ..., None])[..., 0]
    return _with_skip(o[:, None], v, D, dtype), state


def ssd_metal(q, k, v, g, beta, state=None, mask=None, D=None):
    """The same through this package's Metal kernels, forward and backward."""
    state = zero_state(k, v) if state is None else state
    if D is None:
        return differentiable(kernels.prefill, kernels.backward, (q, k, v, g, beta, state), mask)

    def forward(q, k, v, g, beta, state, D, mask):
        return kernels.prefill(q, k, v, g, beta, state, mask, D)

    def backward(q, k, v, g, beta, state, D, d_o, d_state, mask):
        return kernels.backward(q, k, v, g, beta, state, d_o, d_state, mask, D)

    return differentiable(forward, backward, (q, k, v, g, beta, state, D), mask)


def ssd_chunk(q, k, v, g, beta, state=None, mask=None, D=None, chunk: int = CHUNK):
    """Matrix products within a chunk, a scan over the chunks.

    With G_t the running sum of g in a chunk and S_0 the state before it,

        o_t = exp(G_t) S_0 q_t + sum_{j <= t} exp(G_t - G_j) b_j (q_t.k_j) v_j.
    """
    dtype, (q, k, v, g, beta, state) = v.dtype, prepare(q, k, v, g, beta, state, mask)
    B, T, Hv, Dv = v.shape
    Hk, Dk = k.shape[2:]
    C = min(chunk, T)
    pad = -T % C
    # [B, T, Hk * G, D] -> [n, B, Hk, G, C, D]: G heads share a key head, and q.k is made once
    # for them all. Padded positions have g = u = 0: they keep the state and write nothing.
    q, k, u, g = (_split(x, Hk, C, pad) for x in (q, k, beta[..., None] * v, g[..., None]))
    g = g[..., 0]
    state = state.swapaxes(2, 3).reshape(B, Hk, Hv // Hk, Dk, Dv)

    decay = decay_matrix(g)  # [n, B, Hk, G, C, C]
    from_start = mx.exp(mx.cumsum(g, axis=-1))[..., None]
    to_end = mx.exp(mx.cumsum(g, axis=-1, reverse=True, inclusive=False))[..., None]
    o = (decay * (q @ k.swapaxes(-1, -2))) @ u  # what the chunk's own tokens wrote
    writes = k.swapaxes(-1, -2) @ (to_end * u)  # [n, B, Hk, G, Dk, Dv]: S^T

    before = []
    for through, write in zip(unstack(from_start[..., -1:, :]), unstack(writes), strict=True):
        before.append(state)
        state = through * state + write
    o = o + from_start * (q @ mx.stack(before))
    o = o.transpose(1, 0, 4, 2, 3, 5).reshape(B, T + pad, Hv, Dv)
    o = _with_skip(o[:, :T], v, D, dtype)
    return o, state.reshape(B, Hv, Dk, Dv).swapaxes(2, 3)


def _with_skip(o, v, D, dtype):
    return (o if D is None else o + D[:, None] * v).astype(dtype)


def _split(x, Hk, C, pad):
    """[B, T, H, D] -> [n, B, Hk, H/Hk, C, D], with T padded by zeros to a multiple of C."""
    B, T, H, D = x.shape
    if pad:
        x = mx.pad(x, [(0, 0), (0, pad), (0, 0), (0, 0)])
    return x.reshape(B, (T + pad) // C, C, Hk, H // Hk, D).transpose(1, 0, 3, 4, 2, 5)
