"""The gated delta rule: every form against a float64 oracle, forward and backward."""

from __future__ import annotations

from functools import partial

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_reference import (
    arrays,
    assert_close,
    assert_gradients,
    draw,
    error,
    gradients,
    reference,
    weights,
)

from mlx_sleep.ops.gated_delta import (
    CHUNK,
    gated_delta,
    gated_delta_chunk,
    gated_delta_mlx,
    gated_delta_naive,
    gated_delta_step,
    unit_lower_inverse,
)

assert mlx_sleep  # imported for its effect

RULE = "gated_delta"
FORMS = {
    "naive": gated_delta_naive,
    "chunk": gated_delta_chunk,
    "mlx.fast": gated_delta_mlx,
    "fastest": gated_delta,
}
LENGTHS = (1, 2, 37, CHUNK - 1, CHUNK, CHUNK + 1, 131)


@pytest.fixture
def rng():
    return np.random.default_rng()


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("form", FORMS)
def test_forward(rng, form, T):
    inputs = draw(rng, T=T)
    assert_close(FORMS[form](*arrays(inputs)), reference(RULE, *inputs), 2e-6)


def test_no_state_is_a_zero_state(rng):
    *inputs, state = draw(rng, T=CHUNK + 3)
    for form in FORMS.values():
        assert_close(form(*arrays(inputs)), reference(RULE, *inputs, 0 * state), 2e-6)


@pytest.mark.parametrize("T", (1, 7, CHUNK, CHUNK + 1))
@pytest.mark.parametrize("form", FORMS)
def test_backward(rng, form, T):
    inputs = draw(rng, B=1, T=T, Hk=1, Hv=2, Dk=4, Dv=3)
    assert_gradients(RULE, FORMS[form], rng, inputs, mx.float32, 1e-5)


def test_backward_to_many_digits(rng):
    inputs = draw(rng, B=1, T=11, Hk=1, Hv=2, Dk=3, Dv=2)
    with mx.stream(mx.cpu):  # MLX's float64 exp is good to 1.5e-7, the rest to 1e-16
        chunk = partial(gated_delta_chunk, chunk=4)
        assert_gradients(RULE, chunk, rng, inputs, mx.float64, 1e-6, tries=5)


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


@settings(deadline=None, max_examples=40)
@given(shapes, st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**32 - 1), st.booleans())
def test_any_shape_and_any_mask(shape, chunk, seed, masked):
    rng = np.random.default_rng(seed)
    group = shape.pop("group")
    inputs = draw(rng, Hv=shape["Hk"] * group, **shape)
    mask = rng.random((shape["B"], shape["T"])) < 0.7 if masked else np.ones((1, 1), bool)
    mask = np.broadcast_to(mask, (shape["B"], shape["T"]))
    expected = reference(RULE, *inputs, mask)
    forms = [gated_delta_naive, partial(gated_delta_chunk, chunk=chunk)] + [gated_delta_step] * (
        shape["T"] == 1
    )
    for form in forms:
        o, state = form(*arrays(inputs), mask=mx.array(mask) if masked else None)
        real = np.where(mask[..., None, None], np.array(o), 0)
        assert_close((real, state), expected, 5e-6)


def test_step_by_step_is_the_chunk(rng):
    inputs = arrays(draw(rng, T=CHUNK + 5))
    expected, final = gated_delta_chunk(*inputs)
    *inputs, state = inputs
    o = []
    for t in range(CHUNK + 5):
        o_t, state = gated_delta(*(x[:, t : t + 1] for x in inputs), state)
        o.append(o_t)
    assert_close((mx.concatenate(o, axis=1), state), (np.array(expected), np.array(final)), 2e-6)


@pytest.mark.parametrize("cut", (1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK))
def test_two_calls_are_one(rng, cut):
    inputs = draw(rng, T=2 * CHUNK + 1)

    def split(*args):
        *args, state = args
        o1, state = gated_delta(*(x[:, :cut] for x in args), state)
        o2, state = gated_delta(*(x[:, cut:] for x in args), state)
        return mx.concatenate([o1, o2], axis=1), state

    assert_close(split(*arrays(inputs)), reference(RULE, *inputs), 2e-6)
    to = weights(rng, inputs)  # and the gradient flows through the state between them
    assert_close(gradients(split, inputs, to), gradients(gated_delta, inputs, to), 2e-5)


def test_padding(rng):
    T, lengths = CHUNK + 9, (CHUNK + 9, CHUNK, 3, 0)
    inputs = draw(rng, B=len(lengths), T=T)
    mask = np.arange(T) < np.array(lengths)[:, None]
    spoiled = [
        np.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, np.nan) for x in inputs[:5]
    ]
    for form in (gated_delta_naive, gated_delta_chunk):
        o, state = form(*arrays([*spoiled, inputs[5]]), mask=mx.array(mask))
        for b, n in enumerate(lengths):
            row = [x[b : b + 1, :n] for x in inputs[:5]] + [inputs[5][b : b + 1]]
            o_row, state_row = reference(RULE, *row)
            assert error(state[b : b + 1], state_row) <= 2e-6
            if n:
                assert error(o[b : b + 1, :n], o_row) <= 2e-6


def test_backward_of_masked(rng):
    inputs = draw(rng, B=2, T=CHUNK + 2, Hk=1, Hv=2, Dk=3, Dv=2)
    mask = np.arange(CHUNK + 2) < np.array([[CHUNK + 2], [5]])
    to_o, to_s = weights(rng, inputs)
    to = to_o * mask[..., None, None], to_s  # the loss doesn't look at padding
    grads = gradients(gated_delta_chunk, inputs, to, mask=mask)
    for grad in grads[:5]:
        assert np.all(grad[1, 5:] == 0)
    short = [x[1:, :5] for x in inputs[:5]] + [inputs[5][1:]]
    expected = gradients(gated_delta_naive, short, (to[0][1:, :5], to_s[1:]))
    got = [x[1:, :5] for x in grads[:5]] + [grads[5][1:]]
    assert_close(got, expected, 2e-5)


GATES = {
    "none": 0.0,
    "almost none": -1e-6,
    "full": -100.0,
    "mixed": None,  # drawn below: a few tokens forget everything, the others little
}


@pytest.mark.parametrize("beta", (0.0, 1e-4, 1.0, 2.0))
@pytest.mark.parametrize("gate", GATES)
def test_extreme_gates(rng, gate, beta):
    T = CHUNK + 30
    g = GATES[gate]
    if g is None:
        g = np.where(rng.random((2, T, 4)) < 0.2, -100.0, -rng.exponential(0.05, (2, T, 4)))
    inputs = draw(rng, T=T, g=g, beta=beta)
    assert_close(gated_delta_chunk(*arrays(inputs)), reference(RULE, *inputs), 3e-6)
    to = weights(rng, inputs)
    got, expected = (gradients(form, inputs, to) for form in (gated_delta_chunk, gated_delta_naive))
    for x, y in zip(got, expected, strict=True):
        assert np.isfinite(x).all()
        assert np.abs(x - y).max() <= 2e-5 * max(np.abs(y).max(), 1e-3)


def test_a_nan_stays_in_its_row(rng):
    for i in range(6):
        inputs = draw(rng, B=3, T=CHUNK + 5)
        inputs[i] = np.array(inputs[i])
        inputs[i][1].flat[0] = np.nan
        expected = reference(RULE, *(x[[0, 2]] for x in inputs))
        o, state = gated_delta(*arrays(inputs))
        keep = mx.array([0, 2])
        assert_close((o[keep], state[keep]), expected, 2e-6)
        assert not np.isfinite(np.array(o[1])).all()
        grads = gradients(gated_delta, inputs, weights(rng, inputs))
        assert all(np.isfinite(x[[0, 2]]).all() for x in grads)


def test_bfloat16_in_float32_arithmetic(rng):
    inputs = draw(rng, T=CHUNK + 5)
    low = [*arrays(inputs[:5], mx.bfloat16), mx.array(inputs[5], mx.float32)]
    exact = [np.array(x.astype(mx.float32), np.float64) for x in low]
    expected_o, expected_state = reference(RULE, *exact)
    for form in (gated_delta_naive, gated_delta_chunk):
        o, state = form(*low)
        assert o.dtype == mx.bfloat16 and state.dtype == mx.float32
        assert error(state, expected_state) <= 2e-6
        assert error(o, expected_o) <= 2**-8
    o, state = gated_delta_mlx(*low)  # its array path rounds what it writes to bfloat16
    assert o.dtype == mx.bfloat16 and state.dtype == mx.float32
    assert error(state, expected_state) <= 2**-6
    assert error(o, expected_o) <= 2**-6


def test_checkpointed_gradients(rng):
    inputs = draw(rng, T=CHUNK + 5)
    to = weights(rng, inputs)
    expected = gradients(gated_delta_chunk, inputs, to)
    assert_close(gradients(mx.checkpoint(gated_delta_chunk), inputs, to), expected, 1e-6)


@pytest.mark.parametrize("beta", (0.5, 1.0, 2.0))
def test_one_key_over_and_over(rng, beta):
    """The system that the chunk form solves is at its worst when all keys are the same."""
    inputs = draw(rng, T=2 * CHUNK, g=-1e-3, beta=beta)
    inputs[1][:] = inputs[1][:, :1]
    assert_close(gated_delta_chunk(*arrays(inputs)), reference(RULE, *inputs), 1e-4)
    to = weights(rng, inputs)
    expected = gradients(gated_delta_naive, inputs, to)
    assert_close(gradients(gated_delta_chunk, inputs, to), expected, 3e-4)


@pytest.mark.parametrize("C", (1, 2, 4, 16, 32, 64, 128))
def test_unit_lower_inverse(rng, C):
    A = np.tril(rng.standard_normal((3, C, C)), -1) / max(1, C**0.5)
    expected = np.linalg.inv(np.eye(C) + A)
    assert error(unit_lower_inverse(mx.array(A, dtype=mx.float32)), expected) <= 2e-5

    w = rng.standard_normal(A.shape)
    weigh = mx.array(w, dtype=mx.float32)
    grad = mx.grad(lambda A: (unit_lower_inverse(A) * weigh).sum())(mx.array(A, dtype=mx.float32))
    transposed = expected.swapaxes(-1, -2)
    assert error(grad, -transposed @ w @ transposed) <= 5e-5


def test_against_mlx_lm(rng):
    from mlx_lm.models.gated_delta import gated_delta_ops

    inputs = draw(rng, T=CHUNK + 9, Hk=2, Hv=4, Dk=16, Dv=8)
    mask = mx.array(np.arange(CHUNK + 9) < np.array([[CHUNK + 9], [11]]))
    q, k, v, g, beta, state = arrays(inputs)
    o, final = gated_delta_ops(q, k, v, mx.exp(g), beta, state, mask)
    ours, ours_final = gated_delta(*arrays(inputs), mask=mask)
    real = mask[..., None, None]
    expected = np.array(mx.where(real, o, 0)), np.array(final)
    assert_close((mx.where(real, ours, 0), ours_final), expected, 3e-6)


@pytest.mark.parametrize(
    "name", ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
)
def test_against_transformers(rng, name):
    torch = pytest.importorskip("torch")
    qwen3_next = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")

    inputs = draw(rng, T=150, Hk=2, Hv=4, Dk=16, Dv=8)
    tensors = [torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in inputs]
    q, k, v, g, beta, state = tensors
    o, final = getattr(qwen3_next, name)(
        q * 16**0.5,  # it scales q by Dk^-0.5; ours takes q as given
        k,
        v,
        g,
        beta,
        initial_state=state.swapaxes(2, 3),
        output_final_state=True,
    )
    final = final.swapaxes(2, 3)  # there [B, Hv, Dk, Dv]
    expected = o.detach().numpy(), final.detach().numpy()
    assert_close(gated_delta(*arrays(inputs)), expected, 1e-5)

    to = weights(rng, inputs)
    w_o, w_s = (torch.tensor(w, dtype=torch.float32) for w in to)
    ((o * w_o).sum() + (final * w_s).sum()).backward()
    expected = [x.grad.numpy() for x in tensors]
    assert_close(gradients(gated_delta, inputs, to), expected, 2e-5)
