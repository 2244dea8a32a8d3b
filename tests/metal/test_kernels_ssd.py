"""ssd.metal: what it does not share with the other rule (test_kernels_rules.py)."""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import mlx.core as mx
import numpy as np
import pytest

from mlx_sleep.kernels import ssd as kernels
from mlx_sleep.ops.ssd import ssd_naive
from tests.ops_reference import arrays, assert_close, draw, error, gradients, reference, weights

from . import harness
from .kernel_checks import draw_ssd_mixer, ssd_mixer

assert mlx_sleep  # imported for its effect
pytestmark = pytest.mark.kernels
RULE = "ssd"
C = 16  # tokens a chunk where Dk <= 128
SMALL = {"Dk": 32, "Dv": 32}


WIDE = {
    "bfloat16": (128, 64, mx.bfloat16),
    "wide keys, float16": (256, 64, mx.float16),
}


@pytest.mark.parametrize("what", WIDE)
def test_prefill_of_other_heads_with_skip(rng, what):
    Dk, Dv, dtype = WIDE[what]
    T = 19
    inputs = draw(rng, B=2, T=T, Hk=1, Hv=2, Dk=Dk, Dv=Dv)
    low = [*arrays(inputs[:3], dtype), *arrays(inputs[3:])]
    exact = [np.array(x.astype(mx.float32), np.float64) for x in low]
    mask = np.arange(T) < [[T], [11]]
    D = rng.standard_normal(2)
    o, state = kernels.prefill(*low, mask=mx.array(mask), D=mx.array(D, mx.float32))
    expected, expected_state = reference(RULE, *exact, mask)
    expected += np.where(mask[..., None, None], D[:, None] * exact[2], 0)
    assert o.dtype == dtype and state.dtype == mx.float32
    assert error(o.astype(mx.float32), expected) <= (2**-8 if dtype == mx.bfloat16 else 2**-11)
    assert error(state, expected_state) <= 1e-6


@pytest.mark.skipif(mx.metal.is_available(), reason="only the harness counts")
def test_device_bytes_of_prefill(rng):
    inputs = draw(rng, B=1, T=64, Hk=1, Hv=1, **SMALL)
    with harness.launches() as launches:
        mx.eval(kernels.prefill(*arrays(inputs)))
    (launch,) = launches
    assert launch.counts["device_read"] == 4 * sum(x.size for x in inputs)
    assert launch.counts["device_written"] == 4 * (inputs[2].size + inputs[5].size)
    assert launch.counts["barriers"] == 1 + 3 * 64 // C


@pytest.mark.parametrize("limits", ((0.0, float("inf")), (0.5, 0.8)))
def test_step(rng, order, limits):
    inputs = [*draw_ssd_mixer(rng, B=2, Hk=2, Hv=4, Dk=32, Dv=32, K=4), limits]
    expected = [np.array(x) for x in ssd_mixer(*inputs)]
    assert_close(kernels.step(*inputs), expected, 5e-6)


def test_step_of_bfloat16(rng):
    inputs = [*draw_ssd_mixer(rng, B=1, Hk=1, Hv=3, Dk=136, Dv=40, K=3), (0.001, 100.0)]
    low = [x.astype(mx.bfloat16) for x in inputs[:5]] + inputs[5:]
    exact = [x.astype(mx.float32) for x in low[:5]] + inputs[5:]
    o, conv, state = kernels.step(*low)
    expected_o, expected_conv, expected_state = (np.array(x) for x in ssd_mixer(*exact))
    assert o.dtype == conv.dtype == mx.bfloat16
    assert error(o.astype(mx.float32), expected_o) <= 1e-2
    assert error(conv.astype(mx.float32), expected_conv) == 0
    assert error(state, expected_state) <= 1e-5


def test_small_steps_keep_their_digits(rng):
    """softplus far below 0: a state that starts at 0 holds dt v k^T and nothing else."""
    *inputs, _, Hk = draw_ssd_mixer(rng, B=2, Hk=1, Hv=2, Dk=32, Dv=32, K=4)
    inputs[1] = inputs[1] - mx.array([7.0, 14.0])  # dt of about 1e-3 and 1e-6
    inputs += [mx.zeros((2, 2, 32, 32)), Hk, (0.0, float("inf"))]
    *_, got = kernels.step(*inputs)
    *_, expected = ssd_mixer(*inputs)
    for head in range(2):
        assert error(got[:, head], np.array(expected[:, head])) <= 2e-5


def test_gradient_of_the_skip(rng):
    """Over blocks of Dv, several rows and heads, in D's dtype; nothing comes from padding."""
    inputs = draw(rng, T=9, Dk=32, Dv=136)
    D = rng.standard_normal(4)
    mask = np.arange(9) < [[9], [4]]
    d_o, d_state = weights(rng, inputs)
    got = kernels.backward(
        *arrays([*inputs, d_o, d_state]), mx.array(mask), mx.array(D, mx.float16)
    )
    expected = (d_o * inputs[2] * mask[..., None, None]).sum(axis=(0, 1, 3))
    assert got[6].dtype == mx.float16
    assert error(got[6].astype(mx.float32), expected) <= 2**-10


@pytest.mark.parametrize("gate", (0.0, -100.0))
def test_large_steps(rng, gate):
    """Above 2, which only this rule may take, where Mamba-2's dt is large."""
    inputs = draw(rng, T=C + 3, g=gate, beta=5.0, **SMALL)
    assert_close(kernels.prefill(*arrays(inputs)), reference(RULE, *inputs), 3e-6)
    to = weights(rng, inputs)
    got, expected = kernels.backward(*arrays([*inputs, *to])), gradients(ssd_naive, inputs, to)
    for x, y in zip(got, expected, strict=True):
        assert np.abs(np.array(x) - y).max() <= 1e-5 * max(np.abs(y).max(), 1e-3)
