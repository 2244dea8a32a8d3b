"""gated_delta.metal against the float64 oracle: on the GPU where there is Metal, else the harness.

A case is a (Dk, Dv, dtype) that is compiled once; shapes, lengths and inputs vary within it.
"""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import mlx.core as mx
import numpy as np
import pytest
from kernel_checks import draw_gated_delta_mixer, gated_delta_mixer
from ops_reference import (
    arrays,
    assert_close,
    draw,
    error,
    gradients,
    reference,
    slopes,
    weights,
)

from mlx_sleep.kernels import gated_delta as kernels
from mlx_sleep.kernels import harness
from mlx_sleep.kernels.chunks import supported
from mlx_sleep.ops.gated_delta import gated_delta_naive

assert mlx_sleep  # imported for its effect
pytestmark = pytest.mark.kernels
RULE = "gated_delta"
C = 16  # tokens a chunk where Dk <= 128
SMALL = {"Dk": 32, "Dv": 32}


@pytest.fixture
def rng():
    return np.random.default_rng()


@pytest.mark.parametrize("T", (1, 2, C - 1, C, C + 1, 37, 3 * C))
def test_prefill(rng, order, T):
    inputs = draw(rng, T=T, **SMALL)
    assert_close(kernels.prefill(*arrays(inputs)), reference(RULE, *inputs), 1e-6)


WIDE = {
    "jet, bfloat16": (96, 256, mx.bfloat16),
    "wide keys, float16": (256, 64, mx.float16),
    "odd": (40, 136, mx.float32),
}


@pytest.mark.parametrize("what", WIDE)
def test_prefill_of_other_heads(rng, what):
    Dk, Dv, dtype = WIDE[what]
    T = 19
    inputs = draw(rng, B=2, T=T, Hk=1, Hv=2, Dk=Dk, Dv=Dv)
    low = [*arrays(inputs[:3], dtype), *arrays(inputs[3:])]
    exact = [np.array(x.astype(mx.float32), np.float64) for x in low]
    mask = np.arange(T) < [[T], [11]]
    o, state = kernels.prefill(*low, mask=mx.array(mask))
    expected, expected_state = reference(RULE, *exact, mask)
    assert o.dtype == dtype and state.dtype == mx.float32
    rounding = {mx.bfloat16: 2**-8, mx.float16: 2**-11, mx.float32: 1e-6}[dtype]
    assert error(o.astype(mx.float32), expected) <= rounding
    assert error(state, expected_state) <= 1e-6


@pytest.mark.parametrize("beta", (0.0, 1e-4, 1.0, 2.0))
@pytest.mark.parametrize("gate", (0.0, -1e-6, -100.0, "mixed"))
def test_extreme_gates(rng, gate, beta):
    T = 2 * C + 3
    if gate == "mixed":  # a few tokens forget everything, the others little
        g = np.where(rng.random((2, T, 4)) < 0.2, -100.0, -rng.exponential(0.05, (2, T, 4)))
    else:
        g = gate
    inputs = draw(rng, T=T, g=g, beta=beta, **SMALL)
    assert_close(kernels.prefill(*arrays(inputs)), reference(RULE, *inputs), 3e-6)


@pytest.mark.parametrize("beta", (0.5, 1.0, 2.0))
def test_one_key_over_and_over(rng, beta):
    inputs = draw(rng, T=3 * C, g=-1e-3, beta=beta, **SMALL)
    inputs[1][:] = inputs[1][:, :1]
    assert_close(kernels.prefill(*arrays(inputs)), reference(RULE, *inputs), 1e-5)


@pytest.mark.parametrize("size", (1e-6, 1e6))
def test_large_and_tiny_inputs(rng, size):
    inputs = draw(rng, T=C + 3, **SMALL)
    inputs[0] *= size
    inputs[2] *= size
    inputs[5] *= size
    assert_close(kernels.prefill(*arrays(inputs)), reference(RULE, *inputs), 1e-6)


def test_padding_may_hold_anything(rng):
    T, lengths = C + 5, (C + 5, C, 3, 0)
    inputs = draw(rng, B=4, T=T, **SMALL)
    mask = np.arange(T) < np.array(lengths)[:, None]
    spoiled = [
        np.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, np.nan) for x in inputs[:5]
    ]
    got = kernels.prefill(*arrays([*spoiled, inputs[5]]), mask=mx.array(mask))
    assert_close(got, reference(RULE, *inputs, mask), 1e-6)  # the oracle's o is 0 there, too


def test_holes_in_the_mask(rng):
    inputs = draw(rng, T=2 * C + 1, **SMALL)
    mask = rng.random((2, 2 * C + 1)) < 0.6
    got = kernels.prefill(*arrays(inputs), mask=mx.array(mask))
    assert_close(got, reference(RULE, *inputs, mask), 1e-6)


@pytest.mark.parametrize("heads", ((1, 1), (1, 3), (3, 3), (2, 6)))
def test_heads(rng, heads):
    inputs = draw(rng, B=1, T=5, Hk=heads[0], Hv=heads[1], **SMALL)
    assert_close(kernels.prefill(*arrays(inputs)), reference(RULE, *inputs), 1e-6)


def test_two_calls_are_one_and_no_state_is_zero(rng):
    inputs = draw(rng, T=C + 9, **SMALL)
    inputs[5] *= 0
    *x, _ = arrays(inputs)
    o1, state = kernels.prefill(*(a[:, :7] for a in x))  # not contiguous
    o2, state = kernels.prefill(*(a[:, 7:] for a in x), state)
    assert_close((mx.concatenate([o1, o2], axis=1), state), reference(RULE, *inputs), 1e-6)


def test_mixed_types(rng):
    inputs = draw(rng, T=5, **SMALL)
    q, k, v, g, beta, state = arrays(inputs)
    low = [q.astype(mx.bfloat16), k, v.astype(mx.float16), g, beta.astype(mx.float16), state]
    o, final = kernels.prefill(*low)
    exact = [np.array(x.astype(mx.float32), np.float64) for x in low]
    expected, expected_final = reference(RULE, *exact)
    assert o.dtype == mx.float16
    assert error(o.astype(mx.float32), expected) <= 2**-10
    assert error(final, expected_final) <= 1e-6


def test_the_naive_definition_in_float64(rng):
    inputs = draw(rng, T=C + 1, **SMALL)
    with mx.stream(mx.cpu):
        o, state = gated_delta_naive(*arrays(inputs, mx.float64))
        expected = np.array(o), np.array(state)
    assert_close(kernels.prefill(*arrays(inputs)), expected, 1e-6)


def test_a_nan_stays_in_its_row(rng):
    for i in range(6):
        inputs = draw(rng, B=3, T=C + 5, **SMALL)
        inputs[i] = np.array(inputs[i])
        inputs[i][1].flat[0] = np.nan
        o, state = kernels.prefill(*arrays(inputs))
        keep = mx.array([0, 2])
        expected = reference(RULE, *(x[[0, 2]] for x in inputs))
        assert_close((o[keep], state[keep]), expected, 1e-6)
        assert not np.isfinite(np.array(o[1])).all()


def test_nothing_to_do(rng):
    q, k, v, g, beta, state = arrays(draw(rng, T=3, **SMALL))
    o, final = kernels.prefill(*(x[:, :0] for x in (q, k, v, g, beta)), state)
    assert o.shape == (2, 0, 4, 32) and mx.array_equal(final, state)


@pytest.mark.parametrize("T", (1, 7, 8, 9, 29))
def test_backward(rng, order, T):
    """Against autodiff of the naive form, and along random directions against the oracle."""
    inputs = draw(rng, T=T, **SMALL)
    to = weights(rng, inputs)
    got = kernels.backward(*arrays(inputs), *arrays(to))
    assert_close(got, gradients(gated_delta_naive, inputs, to), 5e-6)
    if T == 9:
        directions = [rng.standard_normal(x.shape) for x in inputs]
        for grad, d, slope in zip(
            got, directions, slopes(RULE, inputs, to, directions), strict=True
        ):
            grad = np.array(grad, np.float64)
            assert abs((grad * d).sum() - slope) <= 1e-5 * np.linalg.norm(grad)


@pytest.mark.parametrize("beta", (0.0, 1.0, 2.0))
@pytest.mark.parametrize("gate", (0.0, -100.0, "mixed"))
def test_backward_of_extreme_gates(rng, gate, beta):
    T = 19
    g = np.where(rng.random((2, T, 4)) < 0.2, -100.0, -0.05) if gate == "mixed" else gate
    inputs = draw(rng, T=T, g=g, beta=beta, **SMALL)
    to = weights(rng, inputs)
    got = kernels.backward(*arrays(inputs), *arrays(to))
    expected = gradients(gated_delta_naive, inputs, to)
    for x, y in zip(got, expected, strict=True):
        assert np.isfinite(np.array(x)).all()
        assert np.abs(np.array(x) - y).max() <= 1e-5 * max(np.abs(y).max(), 1e-3)


def test_backward_of_padding_and_other_heads(rng):
    """Blocks of Dv, grouped heads, bfloat16, and padding that holds NaN."""
    T, lengths = 11, (11, 4, 0)
    inputs = draw(rng, B=3, T=T, Hk=1, Hv=2, Dk=40, Dv=136)
    mask = np.arange(T) < np.array(lengths)[:, None]
    to = weights(rng, inputs)
    to = to[0] * mask[..., None, None], to[1]  # the loss doesn't look at padding
    low = [*arrays(inputs[:3], mx.bfloat16), *arrays(inputs[3:])]
    exact = [np.array(x.astype(mx.float32)) for x in low]
    expected = gradients(gated_delta_naive, exact, to, mask=mask)
    low[:5] = (
        mx.where(mx.array(mask).reshape(*mask.shape, *[1] * (x.ndim - 2)), x, mx.nan)
        for x in low[:5]
    )
    got = kernels.backward(*low, *arrays(to), mask=mx.array(mask))
    for x, y, like in zip(got, expected, low, strict=True):
        assert x.dtype == like.dtype
        rounding = 2**-8 if x.dtype == mx.bfloat16 else 5e-6
        assert error(x.astype(mx.float32), y) <= rounding
    for x in got[:5]:
        x = np.array(x.astype(mx.float32))
        assert np.all(x[~mask] == 0)


def test_nothing_to_differentiate(rng):
    inputs = arrays(draw(rng, T=3, **SMALL))
    empty = [x[:, :0] for x in inputs[:5]]
    got = kernels.backward(*empty, inputs[5], mx.zeros_like(empty[2]), inputs[5])
    assert [x.shape for x in got] == [x.shape for x in (*empty, inputs[5])]
    assert mx.array_equal(got[5], inputs[5])


@pytest.mark.skipif(mx.metal.is_available(), reason="only the harness counts")
def test_device_bytes_of_prefill(rng):
    """At most 1.3 times the least, every input read once and every output written once."""
    inputs = draw(rng, B=1, T=256, Hk=1, Hv=1, Dk=128, Dv=128)
    with harness.launches() as launches:
        got = kernels.prefill(*arrays(inputs))
    assert_close(got, reference(RULE, *inputs), 1e-6)
    (launch,) = launches
    least_read = 4 * sum(x.size for x in inputs)
    least_written = 4 * (inputs[2].size + inputs[5].size)
    assert launch.counts["device_read"] == least_read
    assert launch.counts["device_written"] == least_written
    assert launch.counts["threadgroup_memory"] <= 32 << 10
    assert launch.counts["barriers"] == 1 + 3 * 256 // C


@pytest.mark.parametrize(
    "shape",
    (
        {"B": 2, "Hk": 2, "Hv": 4, "Dk": 32, "Dv": 32, "K": 4},
        {"B": 1, "Hk": 1, "Hv": 2, "Dk": 136, "Dv": 40, "K": 3},
    ),
)
def test_step(rng, order, shape):
    inputs = draw_gated_delta_mixer(rng, **shape)
    expected = [np.array(x) for x in gated_delta_mixer(*inputs)]
    assert_close(kernels.step(*inputs), expected, 1e-5)


def test_step_of_bfloat16(rng):
    inputs = draw_gated_delta_mixer(rng, B=2, Hk=1, Hv=2, Dk=96, Dv=256, K=4)
    low = [x.astype(mx.bfloat16) for x in inputs[:5]] + inputs[5:]
    exact = [x.astype(mx.float32) for x in low[:5]] + inputs[5:]
    o, conv, state = kernels.step(*low)
    expected_o, expected_conv, expected_state = (np.array(x) for x in gated_delta_mixer(*exact))
    assert o.dtype == conv.dtype == mx.bfloat16
    assert error(o.astype(mx.float32), expected_o) <= 1e-2
    assert error(conv.astype(mx.float32), expected_conv) == 0
    assert error(state, expected_state) <= 1e-5


def test_step_of_extreme_gates(rng):
    """b and a far from 0, where sigmoid and softplus saturate."""
    inputs = draw_gated_delta_mixer(rng, B=2, Hk=2, Hv=4, Dk=32, Dv=32, K=4)
    inputs[2] = inputs[2] * 30
    expected = [np.array(x) for x in gated_delta_mixer(*inputs)]
    assert_close(kernels.step(*inputs), expected, 1e-5)


@pytest.mark.skipif(mx.metal.is_available(), reason="only the harness counts")
def test_step_reads_and_writes_the_state_once(rng):
    inputs = draw_gated_delta_mixer(rng, B=1, Hk=1, Hv=1, Dk=32, Dv=32, K=4)
    with harness.launches() as launches:
        mx.eval(kernels.step(*inputs))
    (launch,) = launches
    state = inputs[9].nbytes
    rest = sum(x.nbytes for x in inputs[:8])
    assert launch.counts["device_written"] == state + inputs[1].nbytes + inputs[3].nbytes
    assert state <= launch.counts["device_read"] <= state + rest


def test_supported():
    assert supported(32, 256) and supported(96, 40)
    assert not any(supported(*d) for d in ((24, 32), (33, 32), (32, 264), (32, 36)))
