"""gated_delta.metal: what it does not share with the other rule (test_kernels_rules.py)."""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import mlx.core as mx
import numpy as np
import pytest

from mlx_sleep.kernels import gated_delta as kernels
from mlx_sleep.kernels.checks import supported
from tests.ops_reference import arrays, assert_close, draw, error, reference

from . import harness
from .kernel_checks import draw_gated_delta_mixer, gated_delta_mixer

assert mlx_sleep  # imported for its effect
pytestmark = pytest.mark.kernels
RULE = "gated_delta"
C = 16  # tokens a chunk where Dk <= 128
SMALL = {"Dk": 32, "Dv": 32}


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


@pytest.mark.parametrize("beta", (0.5, 1.0, 2.0))
def test_one_key_over_and_over(rng, beta):
    inputs = draw(rng, T=3 * C, g=-1e-3, beta=beta, **SMALL)
    inputs[1][:] = inputs[1][:, :1]
    # At beta = 2 every step is a reflection: no rounding ever fades.
    tolerance = 2e-6 if beta <= 1 else 5e-5
    assert_close(kernels.prefill(*arrays(inputs)), reference(RULE, *inputs), tolerance)


@pytest.mark.skipif(mx.metal.is_available(), reason="only the harness counts")
def test_device_bytes_of_prefill(rng):
    """Two threadgroups read q, k, g and beta; all else is read or written once."""
    inputs = draw(rng, B=1, T=256, Hk=1, Hv=1, Dk=128, Dv=128)
    with harness.launches() as launches:
        got = kernels.prefill(*arrays(inputs))
    assert_close(got, reference(RULE, *inputs), 1e-6)
    (launch,) = launches
    q, k, v, g, beta, state = (4 * x.size for x in inputs)
    least_written = 4 * (inputs[2].size + inputs[5].size)
    assert launch.counts["device_read"] == 2 * (q + k + g + beta) + v + state
    assert launch.counts["device_written"] == least_written
    assert launch.counts["threadgroup_memory"] <= 32 << 10
    assert launch.counts["barriers"] == 2 * (1 + 3 * 256 // C)
    assert launch.threadgroup == (256, 1, 1)


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
