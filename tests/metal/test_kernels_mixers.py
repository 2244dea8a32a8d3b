"""The whole mixers: one launch for a wake token, equal to the arrays, gradients and models too."""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import mlx.core as mx
import numpy as np
import pytest

from mlx_sleep.kernels.source import PREFIX
from mlx_sleep.models.sleep_hybrid import Model, ModelArgs
from mlx_sleep.ops.mixers import delta_attention, gated_delta_net, mamba2
from mlx_sleep.ops.paths import VARIABLE
from tests.ops_reference import assert_close

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
SHAPE = {"B": 2, "Hk": 1, "Hv": 2, "Dk": 32, "Dv": 40, "K": 4}
LIMITS = (0.05, 2.0)


def gated_delta_case(rng):
    """(one token's inputs, the op of them and of a mask, its definition)."""
    *inputs, eps, state, Hk = draw_gated_delta_mixer(rng, **SHAPE)

    def op(*inputs, mask=None):
        *inputs, state = inputs
        token = (x[:, None] for x in inputs[:3])
        return gated_delta_net(*token, *inputs[3:], eps, state, Hk, mask)

    return [*inputs, state], op, lambda *x: gated_delta_mixer(*x[:-1], eps, x[-1], Hk)


def ssd_case(rng):
    *inputs, Hk = draw_ssd_mixer(rng, **SHAPE)

    def op(*inputs, mask=None):
        token = (x[:, None] for x in inputs[:2])
        return mamba2(*token, *inputs[2:], Hk, SHAPE["Dk"], LIMITS, mask)

    return inputs, op, lambda *x: ssd_mixer(*x, Hk, LIMITS)


def attention_case(rng):
    *inputs, eps, state = draw_delta_attention_mixer(rng, **SHAPE)

    def op(*inputs, mask=None, write=None):
        *inputs, state = inputs
        token = (x[:, None] for x in inputs[:6])
        return delta_attention(*token, *inputs[6:], eps, state, mask, write)

    return [*inputs, state], op, lambda *x: delta_attention_mixer(*x[:-1], eps, x[-1])


CASES = {"gated_delta": gated_delta_case, "ssd": ssd_case, "delta_attention": attention_case}
CONV = {"gated_delta": 3, "ssd": 2, "delta_attention": 6}  # its place among the inputs


def names(launches):
    return [launch.name.removeprefix(PREFIX) for launch in launches]


@pytest.mark.parametrize("kernels", ("array", "metal"))
@pytest.mark.parametrize("rule", CASES)
def test_a_token_is_the_definition_and_one_launch(monkeypatch, rng, rule, kernels):
    monkeypatch.setenv(VARIABLE, kernels)
    inputs, op, definition = CASES[rule](rng)
    with harness.launches() as launches:
        o, conv, state = op(*inputs)
        mx.eval(o, conv, state)
    expected = [np.array(x) for x in definition(*inputs)]
    assert_close((o[:, 0], conv, state), expected, 5e-6)
    if not mx.metal.is_available():
        assert names(launches) == ([f"{rule}_step"] if kernels == "metal" else [])


@pytest.mark.parametrize("rule", CASES)
def test_padding_takes_the_ops(monkeypatch, rng, rule):
    """Row 1 is padding: its conv and state stay."""
    monkeypatch.setenv(VARIABLE, "metal")
    inputs, op, definition = CASES[rule](rng)
    with harness.launches() as launches:
        o, conv, state = op(*inputs, mask=mx.array([[True], [False]]))
        mx.eval(o, conv, state)
    before = inputs[CONV[rule]], inputs[-1]
    for got, expected, kept in zip((conv, state), definition(*inputs)[1:], before, strict=True):
        assert_close([got], [np.stack([np.array(expected)[0], np.array(kept)[1]])], 5e-6)
    assert f"{rule}_step" not in names(launches)


@pytest.mark.parametrize("kernels", ("array", "metal"))
def test_a_token_that_is_not_written(monkeypatch, rng, kernels):
    """Row 0 keeps its state, in one launch, too."""
    monkeypatch.setenv(VARIABLE, kernels)
    inputs, op, definition = attention_case(rng)
    with harness.launches() as launches:
        o, conv, state = op(*inputs, write=mx.array([[False], [True]]))
        mx.eval(o, conv, state)
    _, _, written = definition(*inputs)
    assert_close([state], [np.stack([np.array(inputs[-1])[0], np.array(written)[1]])], 5e-6)
    if not mx.metal.is_available():
        assert len(launches) == (kernels == "metal")


@pytest.mark.parametrize("rule", CASES)
def test_gradients_of_a_token(monkeypatch, rng, rule):
    """Of every array, through the one launch as through the arrays."""
    inputs, op, _ = CASES[rule](rng)
    to = [mx.array(rng.standard_normal(x.shape), mx.float32) for x in op(*inputs)]

    def gradients(kernels):
        monkeypatch.setenv(VARIABLE, kernels)

        def loss(*inputs):
            return sum((x * w).sum() for x, w in zip(op(*inputs), to, strict=True))

        return mx.grad(loss, argnums=range(len(inputs)))(*inputs)

    expected = [np.array(x) for x in gradients("array")]
    assert all(np.abs(x).max() > 0 for x in expected)
    assert_close(gradients("metal"), expected, 2e-5)


@pytest.mark.parametrize("dtype", (mx.float32, mx.bfloat16))
def test_wake_of_a_model(monkeypatch, dtype):
    """A prompt, then tokens one by one: the forced kernels give the logits of the arrays."""
    args = ModelArgs(
        vocab_size=19,
        hidden_size=24,
        intermediate_size=32,
        layer_types=["gated_deltanet", "attention", "mamba2"],
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        mamba_num_heads=2,
        mamba_head_dim=32,
        ssm_state_size=32,
    )
    model = Model(args)
    model.set_dtype(dtype)
    tokens = mx.random.randint(0, args.vocab_size, (1, 5))

    def run(kernels):
        monkeypatch.setenv(VARIABLE, kernels)
        logits, state = model(tokens[:, :3])
        with harness.launches() as launches:
            for t in (3, 4):
                step, state = model(tokens[:, t : t + 1], state)
                logits = mx.concatenate([logits, step], axis=1)
            mx.eval(logits, state)
        return np.array(logits.astype(mx.float32)), names(launches)

    expected, none = run("array")
    got, launched = run("metal")
    assert_close([got], [expected], 1e-5 if dtype == mx.float32 else 3e-2)
    if not mx.metal.is_available():
        assert none == [] and launched == ["gated_delta_step", "ssd_step"] * 2
