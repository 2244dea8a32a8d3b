"""What the kernels of both rules must do, against the float64 oracle.

On the GPU where there is Metal, else in the harness. A case is a (Dk, Dv, dtype) that is compiled
once; shapes, lengths and inputs vary within it.
"""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import mlx.core as mx
import numpy as np
import pytest

from mlx_sleep.kernels import gated_delta, ssd
from mlx_sleep.kernels.checks import supported
from mlx_sleep.ops.ssd import ssd_naive
from tests.ops_reference import (
    arrays,
    assert_close,
    draw,
    error,
    gradients,
    reference,
    slopes,
    weights,
)
from tests.rules import (
    GATES,
    RULES,
    assert_nan_stays_in_its_row,
    draw_gates,
    nan_in_the_middle_row,
    spoil,
)

assert mlx_sleep  # imported for its effect
pytestmark = pytest.mark.kernels
C = 16  # tokens a chunk where Dk <= 128
SMALL = {"Dk": 32, "Dv": 32}


@pytest.fixture(params=RULES.values(), ids=str)
def rule(request):
    return request.param


@pytest.mark.parametrize("T", (1, 2, C - 1, C, C + 1, 37, 3 * C))
def test_prefill(rng, order, rule, T):
    inputs = draw(rng, T=T, **SMALL)
    assert_close(rule.kernels.prefill(*arrays(inputs)), reference(rule.name, *inputs), 1e-6)


@pytest.mark.parametrize("beta", (0.0, 1e-4, 1.0, 2.0))
@pytest.mark.parametrize("gate", GATES)
def test_extreme_gates(rng, rule, gate, beta):
    T = 2 * C + 3
    inputs = draw(rng, T=T, g=draw_gates(rng, gate, T), beta=beta, **SMALL)
    assert_close(rule.kernels.prefill(*arrays(inputs)), reference(rule.name, *inputs), 3e-6)


def test_padding_may_hold_anything(rng, rule):
    T, lengths = C + 5, (C + 5, C, 3, 0)
    inputs = draw(rng, B=4, T=T, **SMALL)
    mask = np.arange(T) < np.array(lengths)[:, None]
    got = rule.kernels.prefill(*arrays([*spoil(inputs, mask), inputs[5]]), mask=mx.array(mask))
    assert_close(got, reference(rule.name, *inputs, mask), 1e-6)  # the oracle's o is 0 there, too


@pytest.mark.parametrize("heads", ((1, 1), (1, 3), (3, 3), (2, 6)))
def test_heads(rng, rule, heads):
    inputs = draw(rng, B=1, T=5, Hk=heads[0], Hv=heads[1], **SMALL)
    assert_close(rule.kernels.prefill(*arrays(inputs)), reference(rule.name, *inputs), 1e-6)


def test_two_calls_are_one_and_no_state_is_zero(rng, rule):
    inputs = draw(rng, T=C + 9, **SMALL)
    inputs[5] *= 0
    *x, _ = arrays(inputs)
    o1, state = rule.kernels.prefill(*(a[:, :7] for a in x))  # not contiguous
    o2, state = rule.kernels.prefill(*(a[:, 7:] for a in x), state)
    assert_close((mx.concatenate([o1, o2], axis=1), state), reference(rule.name, *inputs), 1e-6)


@pytest.mark.parametrize("size", (1e-6, 1e6))
def test_large_and_tiny_inputs(rng, rule, size):
    inputs = draw(rng, T=C + 3, **SMALL)
    inputs[0] *= size
    inputs[2] *= size
    inputs[5] *= size
    assert_close(rule.kernels.prefill(*arrays(inputs)), reference(rule.name, *inputs), 1e-6)


def test_holes_in_the_mask(rng, rule):
    inputs = draw(rng, T=2 * C + 1, **SMALL)
    mask = rng.random((2, 2 * C + 1)) < 0.6
    got = rule.kernels.prefill(*arrays(inputs), mask=mx.array(mask))
    assert_close(got, reference(rule.name, *inputs, mask), 1e-6)


def test_mixed_types(rng, rule):
    inputs = draw(rng, T=5, **SMALL)
    q, k, v, g, beta, state = arrays(inputs)
    low = [q.astype(mx.bfloat16), k, v.astype(mx.float16), g, beta.astype(mx.float16), state]
    o, final = rule.kernels.prefill(*low)
    exact = [np.array(x.astype(mx.float32), np.float64) for x in low]
    expected, expected_final = reference(rule.name, *exact)
    assert o.dtype == mx.float16
    assert error(o.astype(mx.float32), expected) <= 2**-10
    assert error(final, expected_final) <= 1e-6


def test_the_naive_definition_in_float64(rng, rule):
    inputs = draw(rng, T=C + 1, **SMALL)
    with mx.stream(mx.cpu):
        o, state = rule.naive(*arrays(inputs, mx.float64))
        expected = np.array(o), np.array(state)
    assert_close(rule.kernels.prefill(*arrays(inputs)), expected, 1e-6)


def test_a_nan_stays_in_its_row(rng, rule):
    for inputs in nan_in_the_middle_row(rng, T=C + 5, **SMALL):
        got = rule.kernels.prefill(*arrays(inputs))
        assert_nan_stays_in_its_row(rule, inputs, *got, 1e-6)


def test_nothing_to_do(rng, rule):
    q, k, v, g, beta, state = arrays(draw(rng, T=3, **SMALL))
    o, final = rule.kernels.prefill(*(x[:, :0] for x in (q, k, v, g, beta)), state)
    assert o.shape == (2, 0, 4, 32) and mx.array_equal(final, state)


@pytest.mark.parametrize("T", (1, 7, 8, 9, 29))
def test_backward(rng, order, rule, T):
    """Against autodiff of the naive form, and along random directions against the oracle."""
    inputs = draw(rng, T=T, **SMALL)
    to = weights(rng, inputs)
    got = rule.kernels.backward(*arrays(inputs), *arrays(to))
    assert_close(got, gradients(rule.naive, inputs, to), 5e-6)
    if T == 9:
        directions = [rng.standard_normal(x.shape) for x in inputs]
        for grad, d, slope in zip(
            got, directions, slopes(rule.name, inputs, to, directions), strict=True
        ):
            grad = np.array(grad, np.float64)
            assert abs((grad * d).sum() - slope) <= 1e-5 * np.linalg.norm(grad)


@pytest.mark.parametrize("beta", (0.0, 1.0, 2.0))
@pytest.mark.parametrize("gate", ("none", "full", "mixed"))
def test_backward_of_extreme_gates(rng, rule, gate, beta):
    T = 19
    inputs = draw(rng, T=T, g=draw_gates(rng, gate, T), beta=beta, **SMALL)
    to = weights(rng, inputs)
    got = rule.kernels.backward(*arrays(inputs), *arrays(to))
    expected = gradients(rule.naive, inputs, to)
    for x, y in zip(got, expected, strict=True):
        assert np.isfinite(np.array(x)).all()
        assert np.abs(np.array(x) - y).max() <= 1e-5 * max(np.abs(y).max(), 1e-3)


def test_backward_of_padding_and_other_heads(rng, rule):
    """Blocks of Dv, grouped heads, bfloat16, and padding that holds NaN."""
    T, lengths = 11, (11, 4, 0)
    inputs = draw(rng, B=3, T=T, Hk=1, Hv=2, Dk=40, Dv=136)
    mask = np.arange(T) < np.array(lengths)[:, None]
    to = weights(rng, inputs)
    to = to[0] * mask[..., None, None], to[1]  # the loss doesn't look at padding
    low = [*arrays(inputs[:3], mx.bfloat16), *arrays(inputs[3:])]
    exact = [np.array(x.astype(mx.float32)) for x in low]
    expected = gradients(rule.naive, exact, to, mask=mask)
    low[:5] = (
        mx.where(mx.array(mask).reshape(*mask.shape, *[1] * (x.ndim - 2)), x, mx.nan)
        for x in low[:5]
    )
    got = rule.kernels.backward(*low, *arrays(to), mask=mx.array(mask))
    for x, y, like in zip(got, expected, low, strict=True):
        assert x.dtype == like.dtype
        rounding = 2**-8 if x.dtype == mx.bfloat16 else 5e-6
        assert error(x.astype(mx.float32), y) <= rounding
    for x in got[:5]:
        x = np.array(x.astype(mx.float32))
        assert np.all(x[~mask] == 0)


def test_nothing_to_differentiate(rng, rule):
    inputs = arrays(draw(rng, T=3, **SMALL))
    empty = [x[:, :0] for x in inputs[:5]]
    got = rule.kernels.backward(*empty, inputs[5], mx.zeros_like(empty[2]), inputs[5])
    assert [x.shape for x in got] == [x.shape for x in (*empty, inputs[5])]
    assert mx.array_equal(got[5], inputs[5])


WIDE = {
    "gated_delta": {
        "jet, bfloat16": (96, 256, mx.bfloat16),
        "wide keys, float16": (256, 64, mx.float16),
        "odd": (40, 136, mx.float32),
    },
    "ssd": {
        "bfloat16": (128, 64, mx.bfloat16),
        "wide keys, float16": (256, 64, mx.float16),
    },
}


@pytest.mark.parametrize("name, what", [(name, what) for name in WIDE for what in WIDE[name]])
def test_prefill_of_other_heads(rng, name, what):
    """With the skip where the rule has one."""
    Dk, Dv, dtype = WIDE[name][what]
    T = 19
    inputs = draw(rng, B=2, T=T, Hk=1, Hv=2, Dk=Dk, Dv=Dv)
    low = [*arrays(inputs[:3], dtype), *arrays(inputs[3:])]
    exact = [np.array(x.astype(mx.float32), np.float64) for x in low]
    mask = np.arange(T) < [[T], [11]]
    expected, expected_state = reference(name, *exact, mask)
    skip = {}
    if name == "ssd":
        D = rng.standard_normal(2)
        skip = {"D": mx.array(D, mx.float32)}
        expected += np.where(mask[..., None, None], D[:, None] * exact[2], 0)
    o, state = RULES[name].kernels.prefill(*low, mask=mx.array(mask), **skip)
    assert o.dtype == dtype and state.dtype == mx.float32
    rounding = {mx.bfloat16: 2**-8, mx.float16: 2**-11, mx.float32: 1e-6}[dtype]
    assert error(o.astype(mx.float32), expected) <= rounding
    assert error(state, expected_state) <= 1e-6


@pytest.mark.parametrize("beta", (0.5, 1.0, 2.0))
def test_one_key_over_and_over(rng, beta):
    """The system that the delta rule solves is at its worst then."""
    inputs = draw(rng, T=3 * C, g=-1e-3, beta=beta, **SMALL)
    inputs[1][:] = inputs[1][:, :1]
    # At beta = 2 every step is a reflection: no rounding ever fades.
    tolerance = 2e-6 if beta <= 1 else 5e-5
    got = gated_delta.prefill(*arrays(inputs))
    assert_close(got, reference("gated_delta", *inputs), tolerance)


def test_gradient_of_the_skip(rng):
    """Over blocks of Dv, several rows and heads, in D's dtype; nothing comes from padding."""
    inputs = draw(rng, T=9, Dk=32, Dv=136)
    D = rng.standard_normal(4)
    mask = np.arange(9) < [[9], [4]]
    d_o, d_state = weights(rng, inputs)
    got = ssd.backward(*arrays([*inputs, d_o, d_state]), mx.array(mask), mx.array(D, mx.float16))
    expected = (d_o * inputs[2] * mask[..., None, None]).sum(axis=(0, 1, 3))
    assert got[6].dtype == mx.float16
    assert error(got[6].astype(mx.float32), expected) <= 2**-10


@pytest.mark.parametrize("gate", (0.0, -100.0))
def test_large_steps(rng, gate):
    """beta above 2, which only Mamba-2 may have, where its dt is large."""
    inputs = draw(rng, T=C + 3, g=gate, beta=5.0, **SMALL)
    assert_close(ssd.prefill(*arrays(inputs)), reference("ssd", *inputs), 3e-6)
    to = weights(rng, inputs)
    got, expected = ssd.backward(*arrays([*inputs, *to])), gradients(ssd_naive, inputs, to)
    for x, y in zip(got, expected, strict=True):
        assert np.abs(np.array(x) - y).max() <= 1e-5 * max(np.abs(y).max(), 1e-3)


def test_supported():
    assert supported(32, 256) and supported(96, 40)
    assert not any(supported(*d) for d in ((24, 32), (33, 32), (32, 264), (32, 36)))
