"""Inputs that don't fit: one line that names the array, on every path, before anything runs."""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import mlx.core as mx
import pytest

from mlx_sleep.kernels import conv, delta_attention, gated_delta, ssd
from mlx_sleep.ops.paths import VARIABLE
from tests.ops_reference import NAMES, arrays, draw
from tests.rules import RULES

from .kernel_checks import (
    draw_conv,
    draw_delta_attention_mixer,
    draw_gated_delta_mixer,
    draw_ssd_mixer,
)

assert mlx_sleep  # imported for its effect
SHAPE = {"T": 3, "Dk": 32, "Dv": 40}


def fails(what, run, *args, **more):
    """run fails with one line that holds `what`."""
    with pytest.raises(ValueError) as raised:
        run(*args, **more)
    message = str(raised.value)
    assert what in message and "\n" not in message, message


@pytest.mark.parametrize("kernels", ("array", "metal"))
@pytest.mark.parametrize("rule", RULES.values(), ids=str)
def test_ranks_and_sizes(monkeypatch, rng, rule, kernels):
    monkeypatch.setenv(VARIABLE, kernels)
    inputs = arrays(draw(rng, **SHAPE))
    for i, name in enumerate(NAMES):
        what = f"{rule.name}: {name} must be ["
        for wrong in (inputs[i][0], inputs[i][:1]):
            if i == 0 and wrong.ndim == 4:  # q's sizes are those that others must have
                what = f"{rule.name}: k must be ["
            fails(what, rule.op, *inputs[:i], wrong, *inputs[i + 1 :])
    fails("mask must be [B = 2, T = 3]", rule.op, *inputs, mx.array([[True] * 4] * 2))
    fails("mask must be bool, not int32", rule.op, *inputs, mx.ones((2, 3), mx.int32))
    q, k, *rest = inputs
    three = [mx.concatenate([x, x[:, :, :1]], axis=2) for x in (q, k)]
    fails("Hv must be a multiple of Hk; they are 4 and 3", rule.op, *three, *rest)


@pytest.mark.parametrize("rule", RULES.values(), ids=str)
def test_what_only_the_kernels_refuse(rng, rule):
    inputs = arrays(draw(rng, **SHAPE))
    backward = rule.kernels.backward
    for i in (1, 5):
        low = [*inputs[:i], inputs[i].astype(mx.int32), *inputs[i + 1 :]]
        fails(f"{NAMES[i]} must be one of float32, float16, bfloat16", rule.kernels.prefill, *low)
    odd = arrays(draw(rng, T=3, Dk=36, Dv=40))
    fails("multiples of 8 from 32 to 256, not 36 and 40", rule.kernels.prefill, *odd)
    fails("multiples of 8", backward, *odd, odd[2], odd[5])
    fails("d_o must be [", backward, *inputs, inputs[2][:, :2], inputs[5])
    fails("d_state must be [", backward, *inputs, inputs[2], inputs[5][..., :8])


def test_the_skip(rng):
    inputs = arrays(draw(rng, **SHAPE))
    fails("D must be [Hv = 4]", RULES["ssd"].op, *inputs, D=mx.ones(3))
    fails("D must be [4]", ssd.prefill, *inputs, D=mx.ones((4, 1)))


STEPS = {
    "gated_delta": (
        gated_delta.step,
        lambda rng: draw_gated_delta_mixer(rng, B=2, Hk=1, Hv=2, Dk=32, Dv=40, K=4),
        ("qkv", "z", "ba", "conv", None, "A_log", "dt_bias", "norm_weight"),
    ),
    "ssd": (
        ssd.step,
        lambda rng: [*draw_ssd_mixer(rng, B=2, Hk=1, Hv=2, Dk=32, Dv=40, K=4), (0.0, 1.0)],
        ("xBC", "dt", "conv", None, "conv_bias", "A_log", "dt_bias", "D"),
    ),
    "delta_attention": (
        delta_attention.step,
        lambda rng: draw_delta_attention_mixer(rng, B=2, Hv=2, Dv=32, K=4),
        ("q", "k", "v", "z", "a", "b", "conv", None, "dt_bias", "norm_weight"),
    ),
}


@pytest.mark.parametrize("rule", STEPS)
def test_steps(rng, rule):
    step, draw_mixer, names = STEPS[rule]
    inputs = draw_mixer(rng)
    for i, name in enumerate(names):
        if name:  # the taps say what K is
            fails(
                f"the {rule} step: {name} must be [",
                step,
                *inputs[:i],
                inputs[i][:1],
                *inputs[i + 1 :],
            )
            fails(f"{name} must be [", step, *inputs[:i], inputs[i][..., None], *inputs[i + 1 :])


@pytest.mark.parametrize("dynamic", (False, True))
def test_convolutions(rng, dynamic):
    x, weight, state = arrays(draw_conv(rng, dynamic))
    fails("weight must be [", conv.forward, x, weight[..., :1, :], state)
    fails("state must be [B = 2, 3, C = 5]", conv.forward, x, weight, state[:, :2])
    fails("x must be [B, T, C]", conv.forward, x[0], weight, state)
    fails("d_y must be [", conv.backward, x, weight, state, x[:, :3], state)
    fails("at least 2 taps, not 1", conv.forward, x, weight[..., :1], state[:, :0])
