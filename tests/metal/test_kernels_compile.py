"""The ops under mx.compile, with their gradients.

The harness can't run inside a compiled graph: it needs values where a graph has none. So the array
paths are compared in numbers. The Metal path is traced with stand-ins of arrays in the kernels'
place, which show that launchers ask for no value and that a graph is made once for each shape.
"""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import mlx.core as mx
import numpy as np
import pytest

from mlx_sleep.kernels import chunks, conv, delta_attention, gated_delta, source, ssd
from mlx_sleep.ops import mixers
from mlx_sleep.ops.conv import short_conv
from mlx_sleep.ops.mixers import gated_delta_net, mamba2
from mlx_sleep.ops.paths import VARIABLE
from tests.ops_reference import arrays, assert_close, draw
from tests.rules import RULES

from .kernel_checks import (
    draw_conv,
    draw_delta_attention_mixer,
    draw_gated_delta_mixer,
    draw_ssd_mixer,
)

assert mlx_sleep  # imported for its effect


def gated_delta_token(rng):
    *inputs, eps, state, Hk = draw_gated_delta_mixer(rng, B=1, Hk=1, Hv=2, Dk=32, Dv=32, K=4)
    token = [x[:, None] for x in inputs[:3]]
    return [*token, *inputs[3:], state], lambda *x: gated_delta_net(*x[:-1], eps, x[-1], Hk)


def ssd_token(rng):
    *inputs, Hk = draw_ssd_mixer(rng, B=1, Hk=1, Hv=2, Dk=32, Dv=32, K=4)
    token = [x[:, None] for x in inputs[:2]]
    return [*token, *inputs[2:]], lambda *x: mamba2(*x, Hk, 32, (0.1, 1.0))


def attention_token(rng):
    *inputs, eps, state = draw_delta_attention_mixer(rng, B=1, Hv=2, Dv=32, K=4)
    token = [x[:, None] for x in inputs[:6]]
    return [*token, *inputs[6:], state], lambda *x: mixers.delta_attention(*x[:-1], eps, x[-1])


def rule_case(name, **more):
    def case(rng):
        mask = mx.array(np.arange(5) < [[5], [3]])
        inputs = arrays(draw(rng, T=5, Dk=32, Dv=32)) + arrays(more.values())
        return inputs, lambda *x: RULES[name].op(*x[:6], mask, *x[6:])

    return case


CASES = {
    "gated_delta": rule_case("gated_delta"),
    "ssd": rule_case("ssd", D=np.ones(4)),
    "conv": lambda rng: (arrays(draw_conv(rng, dynamic=False)), short_conv),
    "gated_delta_net, a token": gated_delta_token,
    "mamba2, a token": ssd_token,
    "delta attention, a token": attention_token,
}


def with_gradients(op, inputs, to):
    """The results of op and the gradients of their sum weighed by `to`, as one function."""

    def run(*inputs):
        def loss(*inputs):
            return sum((x * w).sum() for x, w in zip(op(*inputs), to, strict=True))

        return [*op(*inputs), *mx.grad(loss, argnums=range(len(inputs)))(*inputs)]

    return run


@pytest.mark.parametrize("what", ("gated_delta", "mlx.fast", "ssd", "conv"))
def test_the_array_path(monkeypatch, rng, what):
    monkeypatch.setenv(VARIABLE, "array")
    if what == "mlx.fast":
        inputs, op = arrays(draw(rng, T=5)), RULES["gated_delta"].forms["mlx.fast"]
    else:
        inputs, op = CASES[what](rng)
    to = arrays(rng.standard_normal(x.shape) for x in op(*inputs))
    run = with_gradients(op, inputs, to)
    compiled = mx.compile(run)
    mx.eval(compiled(*(x + 1 for x in inputs)))  # other values, the same graph
    assert_close(compiled(*inputs), [np.array(x) for x in run(*inputs)], 2e-6)


@pytest.mark.parametrize("what", CASES)
def test_the_metal_path(monkeypatch, rng, what):
    monkeypatch.setenv(VARIABLE, "metal")
    calls = []

    def kernel(file, name):
        known = source.read(file)[name]

        def stand_in(*, inputs, template, grid, threadgroup, output_shapes, output_dtypes):
            assert len(inputs) == len(known.inputs) and len(output_shapes) == len(known.outputs)
            assert all(isinstance(value, (int, bool, mx.Dtype)) for _, value in template)
            assert all(isinstance(n, int) for n in (*grid, *threadgroup))
            calls.append(name)
            number = sum(mx.array(x, mx.float32).astype(mx.float32).sum() for x in inputs)
            outputs = zip(output_shapes, output_dtypes, strict=True)
            return [mx.full(shape, number, dtype) for shape, dtype in outputs]

        return stand_in

    for module in (chunks, conv, delta_attention, gated_delta, ssd):
        monkeypatch.setattr(module, "kernel", kernel)
    inputs, op = CASES[what](rng)
    run = with_gradients(op, inputs, arrays(rng.standard_normal(x.shape) for x in op(*inputs)))
    calls.clear()
    expected = run(*inputs)
    names = list(calls)
    compiled = mx.compile(run)
    for _ in range(2):
        got = compiled(*inputs)  # never evaluated: MLX would compile its graph with g++ first
        assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in expected]
    assert calls == names * 2 and names  # once uncompiled and once for the graph
    assert any("step" in name for name in names) == ("token" in what)
    assert ("token" in what) or any("backward" in name for name in names)
