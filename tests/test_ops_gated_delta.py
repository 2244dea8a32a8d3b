"""The gated delta rule: what it does not share with the other one (test_ops_rules.py)."""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import mlx.core as mx
import numpy as np
import pytest

from mlx_sleep.ops.gated_delta import (
    CHUNK,
    gated_delta,
    gated_delta_chunk,
    gated_delta_mlx,
    gated_delta_naive,
    unit_lower_inverse,
)
from tests.ops_reference import arrays, assert_close, draw, error, gradients, reference, weights

assert mlx_sleep  # imported for its effect

RULE = "gated_delta"


@pytest.mark.parametrize("beta", (0.5, 1.0, 2.0))
def test_one_key_over_and_over(rng, beta):
    """The system that the chunk form solves is at its worst when all keys are the same."""
    inputs = draw(rng, T=2 * CHUNK, g=-1e-3, beta=beta)
    inputs[1][:] = inputs[1][:, :1]
    assert_close(gated_delta_chunk(*arrays(inputs)), reference(RULE, *inputs), 1e-4)
    to = weights(rng, inputs)
    expected = gradients(gated_delta_naive, inputs, to)
    assert_close(gradients(gated_delta_chunk, inputs, to), expected, 3e-4)


@pytest.mark.parametrize("C", (1, 2, 4, 16, 32, 64, 128))
def test_unit_lower_inverse(rng, C):
    A = np.tril(rng.standard_normal((3, C, C)), -1) / max(1, C**0.5)
    expected = np.linalg.inv(np.eye(C) + A)
    assert error(unit_lower_inverse(mx.array(A, dtype=mx.float32)), expected) <= 2e-5

    w = rng.standard_normal(A.shape)
    weigh = mx.array(w, dtype=mx.float32)
    grad = mx.grad(lambda A: (unit_lower_inverse(A) * weigh).sum())(mx.array(A, dtype=mx.float32))
    transposed = expected.swapaxes(-1, -2)
    assert error(grad, -transposed @ w @ transposed) <= 5e-5


def test_against_mlx_lm(rng):
    from mlx_lm.models.gated_delta import gated_delta_ops

    inputs = draw(rng, T=CHUNK + 9, Hk=2, Hv=4, Dk=16, Dv=8)
    mask = mx.array(np.arange(CHUNK + 9) < np.array([[CHUNK + 9], [11]]))
    q, k, v, g, beta, state = arrays(inputs)
    o, final = gated_delta_ops(q, k, v, mx.exp(g), beta, state, mask)
    ours, ours_final = gated_delta(*arrays(inputs), mask=mask)
    real = mask[..., None, None]
    expected = np.array(mx.where(real, o, 0)), np.array(final)
    assert_close((mx.where(real, ours, 0), ours_final), expected, 3e-6)


def test_bfloat16_of_mlx(rng):
    """Arithmetic in float32: only what goes in and comes out is rounded."""
    inputs = draw(rng, T=CHUNK + 5)
    low = [*arrays(inputs[:5], mx.bfloat16), mx.array(inputs[5], mx.float32)]
    exact = [np.array(x.astype(mx.float32), np.float64) for x in low]
    expected_o, expected_state = reference(RULE, *exact)
    o, state = gated_delta_mlx(*low)
    assert o.dtype == mx.bfloat16 and state.dtype == mx.float32
    assert error(state, expected_state) <= 2e-6
    assert error(o, expected_o) <= 2**-8
