"""The short convolution: against loops in NumPy and MLX's own, whole, in parts and padded."""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_sleep.ops.conv import short_conv

assert mlx_sleep  # imported for its effect


def reference(x, weight, state):
    """(y, state) of one row: x [T, C], weight [C, K], state [K-1, C]; float64."""
    K = weight.shape[1]
    inputs = np.concatenate([state, x])
    y = [sum(weight[:, j] * inputs[t + j] for j in range(K)) for t in range(len(x))]
    return np.array(y).reshape(x.shape), inputs[len(x) :]


def draw(rng, B=2, T=9, C=5, K=4):
    return (
        rng.standard_normal((B, T, C)),
        rng.standard_normal((C, K)),
        rng.standard_normal((B, K - 1, C)),
    )


def array(x):
    return mx.array(x, dtype=mx.float32)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.booleans(),
)
def test_any_shape_state_and_padding(B, T, C, K, seed, carried, padded):
    rng = np.random.default_rng(seed)
    x, weight, state = draw(rng, B, T, C, K)
    state = state if carried else 0 * state
    lengths = rng.integers(0, T + 1, B) if padded else np.full(B, T)
    mask = mx.array(np.arange(T) < lengths[:, None]) if padded else None
    y, after = short_conv(array(x), array(weight), array(state) if carried else None, mask)
    assert y.shape == (B, T, C) and after.shape == (B, K - 1, C)
    for b, n in enumerate(lengths):
        expected_y, expected_state = reference(x[b, :n], weight, state[b])
        np.testing.assert_allclose(np.array(y)[b, :n], expected_y, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(np.array(after)[b], expected_state, rtol=1e-6)


def test_padding_may_hold_anything():
    rng = np.random.default_rng()
    x, weight, state = draw(rng, B=1, T=6)
    spoiled = x.copy()
    spoiled[:, 4:] = np.nan
    mask = mx.array([[True] * 4 + [False] * 2])
    y, after = short_conv(array(spoiled), array(weight), array(state), mask)
    expected_y, expected_state = short_conv(array(x[:, :4]), array(weight), array(state))
    assert mx.array_equal(y[:, :4], expected_y) and mx.array_equal(after, expected_state)


def test_in_parts_to_the_bit():
    rng = np.random.default_rng()
    x, weight, state = (array(a) for a in draw(rng, T=13, C=7))
    y, final = short_conv(x, weight, state)
    for sizes in ([1] * 13, [2, 1, 7, 3], [12, 1]):
        parts, now, at = [], state, 0
        for size in sizes:
            part, now = short_conv(x[:, at : at + size], weight, now)
            parts.append(part)
            at += size
        assert mx.array_equal(mx.concatenate(parts, axis=1), y)
        assert mx.array_equal(now, final)


def test_against_mlx():
    rng = np.random.default_rng()
    x, weight, state = (array(a) for a in draw(rng, T=40, C=16))
    theirs = mx.conv1d(mx.concatenate([state, x], axis=1), weight[..., None], groups=16)
    np.testing.assert_allclose(*map(np.array, (short_conv(x, weight, state)[0], theirs)), atol=1e-5)


@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize(("T", "K"), ((1, 4), (2, 4), (9, 4), (6, 2), (5, 1)))
def test_gradients(T, K, padded):
    """The whole map is bilinear, so central differences of the float64 loops are exact."""
    rng = np.random.default_rng()
    inputs = draw(rng, B=2, T=T, C=3, K=K)
    lengths = (T, T // 2) if padded else (T, T)
    mask = np.arange(T) < np.array(lengths)[:, None]
    w_y = rng.standard_normal(inputs[0].shape) * mask[..., None]
    w_s = rng.standard_normal(inputs[2].shape)

    def exact(x, weight, state):
        loss = 0.0
        for b, n in enumerate(lengths):
            y, after = reference(x[b, :n], weight, state[b])
            loss += (y * w_y[b, :n]).sum() + (after * w_s[b]).sum()
        return loss

    def loss(*args):
        y, after = short_conv(*args, mx.array(mask) if padded else None)
        return (y * array(w_y)).sum() + (after * array(w_s)).sum()

    grads = mx.grad(loss, argnums=(0, 1, 2))(*(array(a) for a in inputs))
    for i, grad in enumerate(grads):
        for at in np.ndindex(inputs[i].shape):
            up, down = [a.copy() for a in inputs], [a.copy() for a in inputs]
            up[i][at] += 0.5
            down[i][at] -= 0.5
            assert abs(np.array(grad)[at] - (exact(*up) - exact(*down))) <= 1e-4


def test_checkpointed_gradients_of_a_padded_batch():
    rng = np.random.default_rng()
    inputs = [array(a) for a in draw(rng)]
    mask = mx.array(np.arange(9) < np.array([[9], [2]]))

    def loss(conv):
        def of(*args):
            y, after = conv(*args, mask)
            return mx.square(y * mask[..., None]).sum() + mx.square(after).sum()

        return mx.grad(of, argnums=(0, 1, 2))(*inputs)

    for got, expected in zip(loss(mx.checkpoint(short_conv)), loss(short_conv), strict=True):
        assert mx.allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_dtype_follows_the_input():
    x, weight, state = (array(a) for a in draw(np.random.default_rng()))
    y, after = short_conv(x.astype(mx.bfloat16), weight, state)
    assert y.dtype == mx.bfloat16 and after.dtype == mx.bfloat16
