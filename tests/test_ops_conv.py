"""The short convolutions: against loops in NumPy and MLX's own, whole, in parts and padded."""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_sleep.kernels.source import PREFIX
from mlx_sleep.ops.conv import dynamic_conv, dynamic_conv_naive, short_conv
from mlx_sleep.ops.paths import VARIABLE
from tests.metal import harness

assert mlx_sleep  # imported for its effect

OPS = (short_conv, dynamic_conv, dynamic_conv_naive)
each_op = pytest.mark.parametrize("op", OPS[:2])


def reference(x, weight, state):
    """(y, state) of one row: x [T, C], weight [C, K] or [T, C, K], state [K-1, C]; float64."""
    K = weight.shape[-1]
    inputs = np.concatenate([state, x])
    weight = np.broadcast_to(weight, (*x.shape, K))
    y = [sum(weight[t, :, j] * inputs[t + j] for j in range(K)) for t in range(len(x))]
    return np.array(y).reshape(x.shape), inputs[len(x) :]


def draw(rng, op, B=2, T=9, C=5, K=4):
    weight = (C, K) if op is short_conv else (B, T, C, K)
    return [rng.standard_normal(shape) for shape in ((B, T, C), weight, (B, K - 1, C))]


def row(weight, b, n):
    """The weights of the n real tokens of row b."""
    return weight if weight.ndim == 2 else weight[b, :n]


def array(x):
    return mx.array(x, dtype=mx.float32)


@settings(deadline=None, max_examples=90)
@given(
    st.sampled_from(OPS),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.booleans(),
)
def test_any_shape_state_and_padding(op, B, T, C, K, seed, carried, padded):
    rng = np.random.default_rng(seed)
    x, weight, state = draw(rng, op, B, T, C, K)
    state = state if carried else 0 * state
    lengths = rng.integers(0, T + 1, B) if padded else np.full(B, T)
    mask = mx.array(np.arange(T) < lengths[:, None]) if padded else None
    y, after = op(array(x), array(weight), array(state) if carried else None, mask)
    assert y.shape == (B, T, C) and after.shape == (B, K - 1, C)
    for b, n in enumerate(lengths):
        expected_y, expected_state = reference(x[b, :n], row(weight, b, n), state[b])
        np.testing.assert_allclose(np.array(y)[b, :n], expected_y, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(np.array(after)[b], expected_state, rtol=1e-6)


@each_op
def test_padding_may_hold_anything(op, rng):
    x, weight, state = draw(rng, op, B=1, T=6)
    spoiled = x.copy()
    spoiled[:, 4:] = np.nan
    mask = mx.array([[True] * 4 + [False] * 2])
    y, after = op(array(spoiled), array(weight), array(state), mask)
    real = array(weight if weight.ndim == 2 else weight[:, :4])
    expected_y, expected_state = op(array(x[:, :4]), real, array(state))
    assert mx.array_equal(y[:, :4], expected_y) and mx.array_equal(after, expected_state)


@each_op
def test_in_parts_to_the_bit(op, rng):
    x, weight, state = (array(a) for a in draw(rng, op, T=13, C=7))
    y, final = op(x, weight, state)
    for sizes in ([1] * 13, [2, 1, 7, 3], [12, 1]):
        parts, now, at = [], state, 0
        for size in sizes:
            taps = weight if op is short_conv else weight[:, at : at + size]
            part, now = op(x[:, at : at + size], taps, now)
            parts.append(part)
            at += size
        assert mx.array_equal(mx.concatenate(parts, axis=1), y)
        assert mx.array_equal(now, final)


@each_op
def test_against_mlx(op, rng):
    x, weight, state = (array(a) for a in draw(rng, short_conv, T=40, C=16))
    theirs = mx.conv1d(mx.concatenate([state, x], axis=1), weight[..., None], groups=16)
    # The same taps at every token make the dynamic convolution a static one.
    taps = weight if op is short_conv else mx.broadcast_to(weight, (2, 40, 16, 4))
    np.testing.assert_allclose(*map(np.array, (op(x, taps, state)[0], theirs)), atol=1e-5)


@each_op
@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize(("T", "K"), ((1, 4), (2, 4), (9, 4), (6, 2), (5, 1)))
def test_gradients(op, T, K, padded, rng):
    """The map is linear in each argument, so central differences of float64 loops are exact."""
    inputs = draw(rng, op, B=2, T=T, C=3, K=K)
    lengths = (T, T // 2) if padded else (T, T)
    mask = np.arange(T) < np.array(lengths)[:, None]
    w_y = rng.standard_normal(inputs[0].shape) * mask[..., None]
    w_s = rng.standard_normal(inputs[2].shape)

    def exact(x, weight, state):
        loss = 0.0
        for b, n in enumerate(lengths):
            y, after = reference(x[b, :n], row(weight, b, n), state[b])
            loss += (y * w_y[b, :n]).sum() + (after * w_s[b]).sum()
        return loss

    def loss(*args):
        y, after = op(*args, mx.array(mask) if padded else None)
        return (y * array(w_y)).sum() + (after * array(w_s)).sum()

    grads = mx.grad(loss, argnums=(0, 1, 2))(*(array(a) for a in inputs))
    for i, grad in enumerate(grads):
        for at in np.ndindex(inputs[i].shape):
            up, down = [a.copy() for a in inputs], [a.copy() for a in inputs]
            up[i][at] += 0.5
            down[i][at] -= 0.5
            assert abs(np.array(grad)[at] - (exact(*up) - exact(*down))) <= 1e-4


def gradients(op, inputs, mask=None):
    """Of a loss that is quadratic in y and the state, so that no cotangent is a constant."""

    def loss(*args):
        y, after = op(*args, mask)
        real = 1 if mask is None else mask[..., None]
        return mx.square(y * real).sum() + mx.square(after).sum()

    return mx.grad(loss, argnums=(0, 1, 2))(*inputs)


@each_op
def test_checkpointed_and_compiled_gradients_of_a_padded_batch(op, rng):
    inputs = [array(a) for a in draw(rng, op)]
    mask = mx.array(np.arange(9) < np.array([[9], [2]]))
    expected = gradients(op, inputs, mask)
    checkpointed = gradients(mx.checkpoint(op), inputs, mask)
    compiled = mx.compile(lambda *args: gradients(op, args, mask))(*inputs)
    for got in (checkpointed, compiled):
        for x, y in zip(got, expected, strict=True):
            assert mx.allclose(x, y, rtol=1e-5, atol=1e-6)


def test_dynamic_gradients_are_those_of_the_definition(rng):
    inputs = [array(a) for a in draw(rng, dynamic_conv, B=3, T=11)]
    mask = mx.array(np.arange(11) < np.array([[11], [3], [0]]))
    expected = gradients(dynamic_conv_naive, inputs, mask)
    for x, y in zip(gradients(dynamic_conv, inputs, mask), expected, strict=True):
        assert mx.allclose(x, y, rtol=1e-5, atol=1e-5)


@each_op
def test_strided_inputs(op, rng):
    """The dynamic form reads its inputs through strides of its own."""
    x, weight, _ = (array(a) for a in draw(rng, op, B=2, T=9, C=6))
    y, after = op(x, weight)
    turned = mx.contiguous(x.transpose(0, 2, 1)).transpose(0, 2, 1)
    every_other = mx.contiguous(mx.repeat(x, 2, axis=2))[..., ::2]
    for same in (turned, every_other):
        got, got_after = op(same, weight)
        assert mx.array_equal(got, y) and mx.array_equal(got_after, after)


@each_op
def test_no_tokens(op, rng):
    x, weight, state = (array(a) for a in draw(rng, op))
    taps = weight if op is short_conv else weight[:, :0]
    y, after = op(x[:, :0], taps, state)
    assert y.shape == (2, 0, 5) and mx.array_equal(after, state)


@each_op
def test_dtype_follows_the_input(op, rng):
    x, weight, state = (array(a) for a in draw(rng, op))
    y, after = op(x.astype(mx.bfloat16), weight, state)
    assert y.dtype == mx.bfloat16 and after.dtype == mx.bfloat16


def test_dynamic_weights_of_another_shape_are_not_broadcast(rng):
    x, weight, state = (array(a) for a in draw(rng, dynamic_conv))
    for wrong in (weight[:1], weight[:, :1], weight[:, :, :1], weight[0, 0]):
        with pytest.raises(ValueError, match="needs weights"):
            dynamic_conv(x, wrong, state)


@pytest.mark.kernels
def test_the_dynamic_form_takes_the_kernel_when_told(monkeypatch, rng):
    inputs = [array(a) for a in draw(rng, dynamic_conv, T=7)]
    mask = mx.array(np.arange(7) < np.array([[7], [3]]))
    expected = [np.array(a) for a in gradients(dynamic_conv, inputs, mask)]
    monkeypatch.setenv(VARIABLE, "metal")
    with harness.launches() as launches:
        got = [np.array(a) for a in gradients(dynamic_conv, inputs, mask)]
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    if not mx.metal.is_available():
        names = [x.name.removeprefix(PREFIX) for x in launches]
        assert names == ["conv_forward", "conv_backward"]
