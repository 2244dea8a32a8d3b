"""The gated Hebbian rule: what it does not share with the other one (test_ops_rules.py)."""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import mlx.core as mx
import numpy as np
import pytest

from mlx_sleep.ops.chunks import decay_matrix, unstack
from mlx_sleep.ops.gates import decay_gates
from mlx_sleep.ops.ssd import ssd, ssd_chunk, ssd_naive, ssd_step
from tests.ops_reference import arrays, assert_close, draw, error, gradients, reference, weights

assert mlx_sleep  # imported for its effect


def test_decay_matrix(rng):
    g = -rng.exponential(3.0, (3, 9))
    total = np.array(
        [[[g[b, j + 1 : t + 1].sum() for j in range(9)] for t in range(9)] for b in range(3)]
    )
    causal = np.tril(np.ones((9, 9)))
    expected = np.exp(total) * causal
    got = np.array(decay_matrix(mx.array(g, dtype=mx.float32)))
    # Each entry to its own last digits, not only the largest.
    np.testing.assert_allclose(got, expected, rtol=2e-6)

    w = rng.standard_normal(expected.shape)
    weigh = mx.array(w, dtype=mx.float32)
    grad = mx.grad(lambda g: (decay_matrix(g) * weigh).sum())(mx.array(g, dtype=mx.float32))
    slope = [[(w[b, r:, :r] * expected[b, r:, :r]).sum() for r in range(9)] for b in range(3)]
    np.testing.assert_allclose(np.array(grad), slope, rtol=1e-4, atol=1e-6)


def test_unstack(rng):
    x = mx.array(rng.standard_normal((5, 2, 3)))

    def loss(x):  # one row twice, another not at all
        rows = unstack(x)
        return sum((n * row * row).sum() for n, row in enumerate(rows[:4])) + rows[2].sum()

    expected = np.array([0, 2, 4, 6, 0])[:, None, None] * np.array(x)
    expected[2] += 1
    assert error(mx.grad(loss)(x), expected) <= 1e-6


def test_against_mlx_lm(rng):
    from mlx_lm.models.ssm import ssm_attn

    inputs = draw(rng, T=300, Hk=2, Hv=4, Dk=16, Dv=8)
    q, k, v, _, _, state = arrays(inputs)
    A_log, bias = (mx.array(rng.standard_normal(4), dtype=mx.float32) for _ in range(2))
    raw = mx.array(rng.standard_normal((2, 300, 4)), dtype=mx.float32)
    theirs = ssm_attn(v, A_log, k, q, mx.zeros(4), raw, bias, state, time_step_limit=(0.0, 1e9))
    dt = mx.logaddexp(raw + bias, 0)
    ours = ssd(q, k, v, -mx.exp(A_log) * dt, dt, state)
    assert_close(ours, [np.array(x) for x in theirs], 1e-5)


@pytest.mark.parametrize("T", (1, 70))
def test_the_skip(rng, T):
    """o + D v in every form, and the gradient of D against its definition."""
    inputs = draw(rng, T=T)
    D = rng.standard_normal(4)
    o, state = reference("ssd", *inputs)
    expected = o + D[:, None] * inputs[2], state
    to = weights(rng, inputs)
    d_D = (to[0] * inputs[2]).sum(axis=(0, 1, 3))
    forms = [ssd_naive, ssd_chunk, ssd] + [ssd_step] * (T == 1)
    for form in forms:

        def op(*args, form=form):
            return form(*args[:6], D=args[6])

        assert_close(op(*arrays([*inputs, D])), expected, 2e-6)
        *_, grad = gradients(op, [*inputs, D], to)
        assert_close([grad], [d_D], 2e-6)


def test_gates_of_mamba2(rng):
    """Small steps keep their digits; a step at a limit has no gradient."""
    raw = np.array([[[-30.0, -7.0, 0.5, 30.0]]])
    A_log, bias = rng.standard_normal((2, 4))
    g, beta = decay_gates(*arrays([raw, A_log, bias]))
    step = np.log1p(np.exp(-np.abs(raw + bias))) + np.maximum(raw + bias, 0)
    np.testing.assert_allclose(np.array(beta), step, rtol=2e-5)
    np.testing.assert_allclose(np.array(g), -np.exp(A_log) * step, rtol=2e-5)

    limits = (1e-2, 5.0)
    inputs = arrays([raw, A_log, bias])
    _, clipped = decay_gates(*inputs, limits)
    np.testing.assert_allclose(np.array(clipped), np.clip(step, *limits), rtol=2e-5)
    grad = mx.grad(lambda *x: decay_gates(*x, limits)[1].sum())(*inputs)
    slope = np.where((limits[0] < step) & (step < limits[1]), 1 / (1 + np.exp(-raw - bias)), 0)
    np.testing.assert_allclose(np.array(grad), slope, rtol=2e-5)
