"""Both fast-weight rules: every form against a float64 oracle, forward and backward."""

from __future__ import annotations

from functools import partial

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_sleep.ops.gates import decay_gates
from mlx_sleep.ops.paths import VARIABLE
from mlx_sleep.ops.ssd import ssd
from tests import ops_transformers
from tests.ops_reference import (
    arrays,
    assert_close,
    assert_gradients,
    draw,
    error,
    gradients,
    reference,
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


def cases(lengths):
    """Parameters: each rule in each form with each of lengths(chunk)."""
    found = [(r, f, T) for r in RULES.values() for f in r.forms for T in lengths(r.CHUNK)]
    return pytest.mark.parametrize(("rule", "form", "T"), found, ids=str)


@pytest.fixture(params=RULES.values(), ids=str)
def rule(request):
    return request.param


@cases(lambda C: (1, 2, 37, C - 1, C, C + 1, 131))
def test_forward(rng, rule, form, T):
    inputs = draw(rng, T=T)
    assert_close(rule.forms[form](*arrays(inputs)), reference(rule.name, *inputs), 2e-6)


def test_no_state_is_a_zero_state(rng, rule):
    *inputs, state = draw(rng, T=rule.CHUNK + 3)
    for form in rule.forms.values():
        assert_close(form(*arrays(inputs)), reference(rule.name, *inputs, 0 * state), 2e-6)


@cases(lambda C: (1, 7, C, C + 1))
def test_backward(rng, rule, form, T):
    inputs = draw(rng, B=1, T=T, Hk=1, Hv=2, Dk=4, Dv=3)
    assert_gradients(rule.name, rule.forms[form], rng, inputs, mx.float32, 1e-5)


def test_backward_to_many_digits(rng, rule):
    inputs = draw(rng, B=1, T=11, Hk=1, Hv=2, Dk=3, Dv=2)
    with mx.stream(mx.cpu):  # MLX's float64 exp is good to 1.5e-7, the rest to 1e-16
        chunk = partial(rule.chunk, chunk=4)
        assert_gradients(rule.name, chunk, rng, inputs, mx.float64, 1e-6, tries=5)


shapes = st.fixed_dictionaries(
    {
        "B": st.integers(1, 3),
        "T": st.integers(1, 21),
        "Hk": st.integers(1, 3),
        "group": st.integers(1, 3),
        "Dk": st.integers(1, 5),
        "Dv": st.integers(1, 5),
    }
)


@pytest.mark.parametrize("rule", RULES.values(), ids=str)
@settings(deadline=None, max_examples=40)
@given(shapes, st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**32 - 1), st.booleans())
def test_any_shape_and_any_mask(rule, shape, chunk, seed, masked):
    rng = np.random.default_rng(seed)
    group = shape.pop("group")
    inputs = draw(rng, Hv=shape["Hk"] * group, **shape)
    mask = rng.random((shape["B"], shape["T"])) < 0.7 if masked else np.ones((1, 1), bool)
    mask = np.broadcast_to(mask, (shape["B"], shape["T"]))
    expected = reference(rule.name, *inputs, mask)
    forms = [rule.naive, partial(rule.chunk, chunk=chunk)] + [rule.step] * (shape["T"] == 1)
    for form in forms:
        o, state = form(*arrays(inputs), mask=mx.array(mask) if masked else None)
        real = np.where(mask[..., None, None], np.array(o), 0)
        assert_close((real, state), expected, 5e-6)


def test_step_by_step_is_the_chunk(rng, rule):
    inputs = arrays(draw(rng, T=rule.CHUNK + 5))
    expected, final = rule.chunk(*inputs)
    *inputs, state = inputs
    o = []
    for t in range(rule.CHUNK + 5):
        o_t, state = rule.op(*(x[:, t : t + 1] for x in inputs), state)
        o.append(o_t)
    assert_close((mx.concatenate(o, axis=1), state), (np.array(expected), np.array(final)), 2e-6)


@pytest.mark.parametrize("chunks, more", ((0, 1), (1, -1), (1, 0), (1, 1), (2, 0)))
def test_two_calls_are_one(rng, rule, chunks, more):
    cut = chunks * rule.CHUNK + more
    inputs = draw(rng, T=2 * rule.CHUNK + 1)

    def split(*args):
        *args, state = args
        o1, state = rule.op(*(x[:, :cut] for x in args), state)
        o2, state = rule.op(*(x[:, cut:] for x in args), state)
        return mx.concatenate([o1, o2], axis=1), state

    assert_close(split(*arrays(inputs)), reference(rule.name, *inputs), 2e-6)
    to = weights(rng, inputs)  # and the gradient flows through the state between them
    assert_close(gradients(split, inputs, to), gradients(rule.op, inputs, to), 2e-5)


def test_padding(rng, rule):
    T, lengths = rule.CHUNK + 9, (rule.CHUNK + 9, rule.CHUNK, 3, 0)
    inputs = draw(rng, B=len(lengths), T=T)
    mask = np.arange(T) < np.array(lengths)[:, None]
    for form in (rule.naive, rule.chunk):
        o, state = form(*arrays([*spoil(inputs, mask), inputs[5]]), mask=mx.array(mask))
        for b, n in enumerate(lengths):
            row = [x[b : b + 1, :n] for x in inputs[:5]] + [inputs[5][b : b + 1]]
            o_row, state_row = reference(rule.name, *row)
            assert error(state[b : b + 1], state_row) <= 2e-6
            if n:
                assert error(o[b : b + 1, :n], o_row) <= 2e-6


def test_backward_of_masked(rng, rule):
    inputs = draw(rng, B=2, T=rule.CHUNK + 2, Hk=1, Hv=2, Dk=3, Dv=2)
    mask = np.arange(rule.CHUNK + 2) < np.array([[rule.CHUNK + 2], [5]])
    to_o, to_s = weights(rng, inputs)
    to = to_o * mask[..., None, None], to_s  # the loss doesn't look at padding
    grads = gradients(rule.chunk, inputs, to, mask=mask)
    for grad in grads[:5]:
        assert np.all(grad[1, 5:] == 0)
    short = [x[1:, :5] for x in inputs[:5]] + [inputs[5][1:]]
    expected = gradients(rule.naive, short, (to[0][1:, :5], to_s[1:]))
    got = [x[1:, :5] for x in grads[:5]] + [grads[5][1:]]
    assert_close(got, expected, 2e-5)


@pytest.mark.parametrize("beta", (0.0, 1e-4, 1.0, 2.0))
@pytest.mark.parametrize("gate", GATES)
def test_extreme_gates(rng, rule, gate, beta):
    T = rule.CHUNK + 30
    inputs = draw(rng, T=T, g=draw_gates(rng, gate, T), beta=beta)
    # At beta = 2 every write is a reflection, and rounding does not fade.
    tolerance = 1e-5 if beta == 2 else 3e-6
    assert_close(rule.chunk(*arrays(inputs)), reference(rule.name, *inputs), tolerance)
    to = weights(rng, inputs)
    got, expected = (gradients(form, inputs, to) for form in (rule.chunk, rule.naive))
    for x, y in zip(got, expected, strict=True):
        assert np.isfinite(x).all()
        assert np.abs(x - y).max() <= 2e-5 * max(np.abs(y).max(), 1e-3)


def test_a_nan_stays_in_its_row(rng, rule):
    for inputs in nan_in_the_middle_row(rng, T=rule.CHUNK + 5):
        assert_nan_stays_in_its_row(rule, inputs, *rule.op(*arrays(inputs)), 2e-6)
        grads = gradients(rule.op, inputs, weights(rng, inputs))
        assert all(np.isfinite(x[[0, 2]]).all() for x in grads)


def test_bfloat16_in_float32_arithmetic(rng, rule):
    inputs = draw(rng, T=rule.CHUNK + 5)
    low = [*arrays(inputs[:5], mx.bfloat16), mx.array(inputs[5], mx.float32)]
    exact = [np.array(x.astype(mx.float32), np.float64) for x in low]
    expected_o, expected_state = reference(rule.name, *exact)
    for form in (rule.naive, rule.chunk):
        o, state = form(*low)
        assert o.dtype == mx.bfloat16 and state.dtype == mx.float32
        assert error(state, expected_state) <= 2e-6
        assert error(o, expected_o) <= 2**-8


def test_checkpointed_gradients(rng, rule):
    inputs = draw(rng, T=rule.CHUNK + 5)
    to = weights(rng, inputs)
    expected = gradients(rule.chunk, inputs, to)
    assert_close(gradients(mx.checkpoint(rule.chunk), inputs, to), expected, 1e-6)


KERNELS = ("array", pytest.param("metal", marks=pytest.mark.kernels))
SHAPES = {
    "array": {"T": 150, "Hk": 2, "Hv": 4, "Dk": 16, "Dv": 8},
    "metal": {"T": 37, "Hk": 1, "Hv": 2, "Dk": 32, "Dv": 40},
}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", ops_transformers.GATED_DELTA)
def test_gated_delta_against_transformers(monkeypatch, rng, name, kernels):
    monkeypatch.setenv(VARIABLE, kernels)
    op = RULES["gated_delta"].op
    inputs = draw(rng, **SHAPES[kernels])
    to = weights(rng, inputs)
    results, grads = ops_transformers.gated_delta(name, inputs, to)
    assert_close(op(*arrays(inputs)), results, 1e-5)
    assert_close(gradients(op, inputs, to), grads, 2e-5)


@pytest.mark.parametrize("limits", ((0.0, float("inf")), (0.2, 1.0)))
@pytest.mark.parametrize("kernels", KERNELS)
def test_mamba2_against_transformers(monkeypatch, rng, kernels, limits):
    """With groups of heads, the skip D, the bias of dt and its limits, some of them reached."""
    monkeypatch.setenv(VARIABLE, kernels)
    q, k, v, g, _, state = draw(rng, **SHAPES[kernels])
    A_log, dt_bias, D = rng.standard_normal((3, v.shape[2]))
    inputs = [q, k, v, rng.standard_normal(g.shape), A_log, dt_bias, D, state]

    def op(q, k, v, dt, A_log, dt_bias, D, state):
        return ssd(q, k, v, *decay_gates(dt, A_log, dt_bias, limits), state, D=D)

    to = weights(rng, [q, k, v, g, g, state])
    results, grads = ops_transformers.mamba2(inputs, to, limits)
    assert_close(op(*arrays(inputs)), results, 1e-5)
    assert_close(gradients(op, inputs, to), grads, 2e-5)
