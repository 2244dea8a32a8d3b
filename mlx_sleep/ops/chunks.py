"""What the chunkwise forms of the fast-weight rules share."""

from __future__ import annotations

import mlx.core as mx


@mx.custom_function
def decay_matrix(g):
    """Decay between the tokens of a chunk: D_tj = a_{j+1} ... a_t for j <= t, 0 above.

    g [..., C] is the log of a, and D is [..., C, C]. A running product is as exact as the
    recurrence itself, where exp(G_t - G_j) of a running sum G is not once |G| is large, and it
    can neither overflow nor meet inf - inf. It also needs C exponentials instead of C * C, which
    on the CPU is most of the time.
    """
    causal, strict = _triangles(g)
    return causal * mx.cumprod(mx.where(strict, mx.exp(g)[..., None], 1), axis=-2)


@decay_matrix.vjp
def _decay_matrix_vjp(g, cotangent, decay):
    # log D_tj is the sum of g_r over j < r <= t, so g_r gathers t >= r and j < r.
    _, strict = _triangles(g)
    return (mx.cumsum(cotangent * decay, axis=-2, reverse=True) * strict).sum(axis=-1)


def _triangles(g):
    """The lower triangle of ones [C, C] with its diagonal, and as bool without."""
    ones = mx.ones((g.shape[-1],) * 2, g.dtype)
    return mx.tril(ones), mx.tril(ones, -1).astype(mx.bool_)


@mx.custom_function
def unstack(x):
    """The rows x[0], x[1], ... as a list, with a gradient that is one stack.

    MLX's gradient of an index or of `mx.split` fills an array of x's whole size for each row, so
    that a loop over n chunks would cost n^2 in its backward pass.
    """
    return [x[i] for i in range(len(x))]


@unstack.vjp
def _unstack_vjp(_x, cotangents, _rows):
    return mx.stack(cotangents)
