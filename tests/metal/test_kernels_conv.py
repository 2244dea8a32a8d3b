"""conv.metal against a float64 oracle: on the GPU where there is Metal, else in the harness."""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import mlx.core as mx
import numpy as np
import pytest

from mlx_sleep.kernels import conv as kernels
from mlx_sleep.kernels.source import PREFIX
from mlx_sleep.ops.conv import short_conv
from mlx_sleep.ops.paths import VARIABLE
from tests.ops_reference import arrays, assert_close, error

from . import harness
from .kernel_checks import conv_oracle, draw_conv

assert mlx_sleep  # imported for its effect
pytestmark = pytest.mark.kernels


SHAPES = ({}, {"T": 1}, {"T": 2, "C": 70}, {"T": 32, "K": 2}, {"T": 67, "B": 3, "C": 3})


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(rng, order, shape, dynamic):
    inputs = draw_conv(rng, dynamic, **shape)
    B, T, _ = inputs[0].shape
    assert_close(kernels.forward(*arrays(inputs)), conv_oracle(*inputs, [T] * B), 1e-6)


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_padding(rng, dynamic):
    lengths = (7, 2, 0)
    inputs = draw_conv(rng, dynamic, B=3)
    mask = np.arange(7) < np.array(lengths)[:, None]
    y, state = kernels.forward(*arrays(inputs), mask=mx.array(mask))
    expected, expected_state = conv_oracle(*inputs, lengths)
    real = mask[..., None]
    assert_close((np.array(y) * real, state), (expected * real, expected_state), 1e-6)


def test_bfloat16_and_no_state(rng):
    x, weight, state = draw_conv(rng, False)
    low = [a.astype(mx.bfloat16) for a in arrays([x, weight])]
    y, after = kernels.forward(*low)
    assert y.dtype == after.dtype == mx.bfloat16
    exact = [np.array(a.astype(mx.float32)) for a in low]
    expected, expected_after = conv_oracle(*exact, 0 * state, (7, 7))
    assert error(y.astype(mx.float32), expected) <= 2**-8
    assert error(after.astype(mx.float32), expected_after) == 0


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(rng, order, shape, dynamic):
    """The op is linear in each argument, so that a difference of any size is exact."""
    inputs = draw_conv(rng, dynamic, **shape)
    lengths = rng.integers(0, inputs[0].shape[1] + 1, len(inputs[0]))
    mask = np.arange(inputs[0].shape[1]) < lengths[:, None]
    to = [rng.standard_normal(a.shape) for a in (inputs[0], inputs[2])]
    to[0] *= mask[..., None]
    got = kernels.backward(*arrays(inputs), *arrays(to), mask=mx.array(mask))

    def loss(*args):
        return sum((a * w).sum() for a, w in zip(conv_oracle(*args, lengths), to, strict=True))

    for i, grad in enumerate(got):
        d = rng.standard_normal(inputs[i].shape)
        moved = [*inputs[:i], inputs[i] + d, *inputs[i + 1 :]]
        slope = loss(*moved) - loss(*inputs)
        grad = np.array(grad, np.float64)
        assert grad.shape == d.shape
        scale = max(np.linalg.norm(grad), abs(slope), 1e-6)
        assert abs((grad * d).sum() - slope) <= 1e-5 * scale


def test_no_tokens(rng):
    x, weight, state = arrays(draw_conv(rng, False))
    y, after = kernels.forward(x[:, :0], weight, state)
    assert y.shape == (2, 0, 5) and mx.array_equal(after, state)
    got = kernels.backward(x[:, :0], weight, state, y, state)
    assert mx.array_equal(got[2], state) and not got[1].any()


def test_the_op_takes_the_kernel_when_told(rng, monkeypatch):
    """Forward and gradient of ops/conv.py, in arrays and through the kernel."""
    inputs = arrays(draw_conv(rng, False))
    mask = mx.array(np.arange(7) < [[7], [3]])
    weights = mx.array(rng.standard_normal((2, 7, 5)) * np.array(mask)[..., None], mx.float32)

    def loss(*args):
        y, state = short_conv(*args, mask)
        return (y * weights).sum() + mx.square(state).sum()

    expected = [np.array(a) for a in mx.grad(loss, argnums=range(3))(*inputs)]
    monkeypatch.setenv(VARIABLE, "metal")
    with harness.launches() as launches:
        got = mx.grad(loss, argnums=range(3))(*inputs)
        assert_close(got, expected, 1e-6)
    if not mx.metal.is_available():
        names = [x.name.removeprefix(PREFIX) for x in launches]
        assert names == ["conv_forward", "conv_backward"]
