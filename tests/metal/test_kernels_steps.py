"""The steps: a whole mixer between its projections, one token, one launch."""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from mlx_sleep.kernels import delta_attention, gated_delta, ssd
from tests.ops_reference import assert_close, error

from . import harness
from .kernel_checks import (
    delta_attention_mixer,
    draw_delta_attention_mixer,
    draw_gated_delta_mixer,
    draw_ssd_mixer,
    gated_delta_mixer,
    ssd_mixer,
)

assert mlx_sleep  # imported for its effect
pytestmark = pytest.mark.kernels
SMALL = {"B": 2, "Hk": 2, "Hv": 4, "Dk": 32, "Dv": 32, "K": 4}
ODD = {"B": 1, "Hk": 1, "Hv": 2, "Dk": 136, "Dv": 40, "K": 3}


@dataclass(frozen=True)
class Step:
    """A step and its definition, both of draw(rng, **shape) and more.

    The first `many` inputs, up to the convolution and its taps, may have 16 bits.
    """

    step: Callable
    mixer: Callable
    draw: Callable
    more: tuple = ()
    many: int = 5

    def inputs(self, rng, **shape) -> list:
        return [*self.draw(rng, **shape), *self.more]

    def expected(self, inputs) -> list[np.ndarray]:
        return [np.array(x) for x in self.mixer(*inputs)]


NO_LIMITS = (0.0, float("inf"))
GATED_DELTA = Step(gated_delta.step, gated_delta_mixer, draw_gated_delta_mixer)
SSD = Step(ssd.step, ssd_mixer, draw_ssd_mixer, (NO_LIMITS,))
ATTENTION = Step(delta_attention.step, delta_attention_mixer, draw_delta_attention_mixer, (), 8)
STEPS = {
    "gated_delta": GATED_DELTA,
    "delta_attention": ATTENTION,
    "ssd": SSD,
    "ssd, limits": Step(ssd.step, ssd_mixer, draw_ssd_mixer, ((0.5, 0.8),)),
}


@pytest.mark.parametrize("shape", (SMALL, ODD), ids=("small", "odd"))
@pytest.mark.parametrize("what", STEPS)
def test_step(rng, order, what, shape):
    step = STEPS[what]
    inputs = step.inputs(rng, **shape)
    tolerance = 5e-6 if "ssd" in what else 1e-5
    assert_close(step.step(*inputs), step.expected(inputs), tolerance)


@pytest.mark.parametrize(
    "step, shape",
    (
        (GATED_DELTA, SMALL | {"Hk": 1, "Hv": 2, "Dk": 96, "Dv": 256}),
        (SSD, ODD | {"Hv": 3}),
        (ATTENTION, SMALL | {"Dv": 64}),
    ),
    ids=("gated_delta", "ssd", "delta_attention"),
)
def test_bfloat16(rng, step, shape):
    inputs = step.inputs(rng, **shape)
    n = step.many
    low = [x.astype(mx.bfloat16) for x in inputs[:n]] + inputs[n:]
    exact = [x.astype(mx.float32) for x in low[:n]] + inputs[n:]
    o, conv, state = step.step(*low)
    expected_o, expected_conv, expected_state = step.expected(exact)
    assert o.dtype == conv.dtype == mx.bfloat16
    assert error(o.astype(mx.float32), expected_o) <= 1e-2
    assert error(conv.astype(mx.float32), expected_conv) == 0
    assert error(state, expected_state) <= 1e-5


def test_extreme_gates(rng):
    """b and a of Gated DeltaNet far from 0, where sigmoid and softplus saturate."""
    inputs = GATED_DELTA.inputs(rng, **SMALL)
    inputs[2] = inputs[2] * 30
    assert_close(gated_delta.step(*inputs), GATED_DELTA.expected(inputs), 1e-5)


def test_small_steps_keep_their_digits(rng):
    """softplus far below 0: a state that starts at 0 holds dt v k^T and nothing else."""
    *inputs, _, Hk = draw_ssd_mixer(rng, **SMALL | {"Hk": 1, "Hv": 2})
    inputs[1] = inputs[1] - mx.array([7.0, 14.0])  # dt of about 1e-3 and 1e-6
    inputs += [mx.zeros((2, 2, 32, 32)), Hk, NO_LIMITS]
    *_, got = ssd.step(*inputs)
    *_, expected = ssd_mixer(*inputs)
    for head in range(2):
        assert error(got[:, head], np.array(expected[:, head])) <= 2e-5


def test_a_row_that_is_not_written(rng):
    """It reads S and leaves it to the bit; the convolution goes on."""
    inputs = ATTENTION.inputs(rng, **SMALL)
    o, conv, state = delta_attention.step(*inputs, mx.array([False, True]))
    expected = delta_attention_mixer(*inputs, mx.array([False, True]))
    assert_close((o, conv, state), [np.array(x) for x in expected], 1e-5)
    assert mx.array_equal(state[0], inputs[-1][0]) and not mx.array_equal(state[1], inputs[-1][1])


@pytest.mark.skipif(mx.metal.is_available(), reason="only the harness counts")
def test_the_state_is_read_and_written_once(rng):
    inputs = GATED_DELTA.inputs(rng, **SMALL | {"B": 1, "Hk": 1, "Hv": 1})
    with harness.launches() as launches:
        mx.eval(gated_delta.step(*inputs))
    (launch,) = launches
    state = inputs[9].nbytes
    rest = sum(x.nbytes for x in inputs[:8])
    assert launch.counts["device_written"] == state + inputs[1].nbytes + inputs[3].nbytes
    assert state <= launch.counts["device_read"] <= state + rest


@pytest.mark.parametrize(
    "step", (GATED_DELTA, SSD, ATTENTION), ids=("gated_delta", "ssd", "delta_attention")
)
def test_other_heads_are_refused(rng, step):
    with pytest.raises(ValueError, match="multiples of 8 from 32 to 256, not 36 and"):
        step.step(*step.inputs(rng, **SMALL | {"Dk": 36, "Dv": 36}))
