"""Sleep against the float64 reference, and against each mistake that is easily made."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_sleep.models.base import evict, flatten_state, kv_bytes, unflatten_state
from mlx_sleep.models.sleep_hybrid import Model, ModelArgs
from mlx_sleep.sleep import SleepCancelled, SleepFailed, consolidate, passes_over
from mlx_sleep.training.losses import checkpointed_block, sleep_loss
from mlx_sleep.training.windows import labelled
from mlx_sleep.utils.errors import UserError
from tests.reference import Reference, weights
from tests.states import kv_length

LAYERS = ("attention", "gated_deltanet", "attention", "mamba2")


def make(layer_types=LAYERS, **sleep) -> Model:
    model = Model(
        ModelArgs(
            vocab_size=61,
            hidden_size=24,
            intermediate_size=40,
            layer_types=list(layer_types),
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=12,
            linear_value_head_dim=8,
            mamba_num_heads=4,
            mamba_head_dim=8,
            mamba_n_groups=2,
            ssm_state_size=12,
            sleep={"window": 16, **sleep},
        )
    )
    mx.eval(model.parameters())
    return model


def tokens(rng, *shape):
    return rng.integers(0, 61, shape)


def fast_weights(state):
    return {i: np.array(s["fast_weights"]) for i, s in enumerate(state) if "fast_weights" in s}


def assert_same_S(state, reference, rtol=1e-4):
    # Deliberate mistakes are off by sixty times that or more, rounding by a fifth at most.
    ours = fast_weights(state)
    assert ours
    for i, S in ours.items():
        scale = np.abs(reference[i]["S"]).max()
        assert np.abs(S[0] - reference[i]["S"]).max() < rtol * scale


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("loop_range", [None, (1, 3)])
def test_consolidate_is_algorithm_1(rng, passes, loop_range):
    model = make(loop_range=loop_range)
    ref = Reference(model)
    state, expected = model.init_state(), ref.fresh()
    for length in (16, 5, 1):  # full, short and one-token windows, S carried from each to the next
        x = tokens(rng, length)
        state, report = consolidate(model, state, mx.array(x[None]), passes)
        expected = ref.consolidate(x, expected, passes)
        assert_same_S(state, expected)
        assert kv_length(state) == 0 and not any("conv" in layer for layer in state)
        assert report.tokens == length and report.passes == passes == len(report.moved)
        assert report.kv_bytes_freed == length * 2 * 2 * 2 * 8 * 4  # layers, K and V, heads, d
        assert all(m > 0 for m in report.moved)
    x = tokens(rng, 7)
    logits, _ = model(mx.array(x[None]), state)
    np.testing.assert_allclose(logits[0], ref.forward(x, expected)[0], atol=1e-4)


@pytest.mark.parametrize("mistake", ["S reset", "h not carried", "KV kept"])
def test_reference_catches(rng, mistake):
    """The comparison above would fail by a wide margin under each of these mistakes."""
    model = make()
    ref, x = Reference(model), tokens(rng, 16)
    wrong = ref.consolidate(x, ref.fresh(), 3, mistake)
    state, _ = consolidate(model, model.init_state(), mx.array(x[None]), 3)
    with pytest.raises(AssertionError):
        assert_same_S(state, wrong, rtol=1e-3)


def test_sleep_starts_from_the_snapshot(rng):
    """Passes on top of the wake pass count the window once too often."""
    model = make()
    x = mx.array(tokens(rng, 1, 12))
    _, awake = model(x, model.init_state())
    right, _ = consolidate(model, model.init_state(), x, 2)
    twice, _ = consolidate(model, evict(awake, model.sleep), x, 2)
    three, _ = consolidate(model, model.init_state(), x, 3)
    for i, S in fast_weights(right).items():
        assert np.abs(S - fast_weights(twice)[i]).max() > 1e-3
        assert np.abs(S - fast_weights(three)[i]).max() > 1e-3


def test_one_pass_is_the_plain_hybrid(rng):
    model = make()
    x, y = mx.array(tokens(rng, 2, 16)), mx.array(tokens(rng, 2, 6))
    slept, _ = consolidate(model, model.init_state(), x, 1)
    _, plain = model(x)
    plain = evict(plain, model.sleep)
    for a, b in zip(slept, plain, strict=True):
        assert a.keys() == b.keys()
        assert all(mx.array_equal(a[name], b[name]) for name in a)
    assert mx.array_equal(model(y, slept)[0], model(y, plain)[0])


def test_no_kv_crosses_the_boundary(rng):
    """With S = 0 after a sleep, nothing at all is left of the window."""
    model = make()
    y = mx.array(tokens(rng, 1, 5))
    after = []
    for _ in range(2):
        state, _ = consolidate(model, model.init_state(), mx.array(tokens(rng, 1, 16)), 2)
        for layer in state:
            if "fast_weights" in layer:
                layer["fast_weights"] = mx.zeros_like(layer["fast_weights"])
        after.append(model(y, state)[0])
    assert mx.allclose(after[0], after[1], atol=1e-6)
    assert mx.allclose(after[0], model(y)[0], atol=1e-6)


def test_sliding_with_one_pass_is_a_sliding_window_model(rng):
    """Slept in windows of L with N = 1, or run in one go: the same logits."""
    model = make(eviction="sliding", window=8)
    x = tokens(rng, 1, 29)
    whole, _ = model(mx.array(x))
    state, parts = model.init_state(), []
    for start in range(0, 24, 8):
        window = mx.array(x[:, start : start + 8])
        parts.append(model(window, state)[0])
        state, _ = consolidate(model, state, window, 1)
        assert kv_length(state) == min(start + 8, 7)
    parts.append(model(mx.array(x[:, 24:]), state)[0])
    np.testing.assert_allclose(mx.concatenate(parts, axis=1), whole, atol=2e-5)


@pytest.mark.parametrize("carry_conv", [None, True, False])
@pytest.mark.parametrize("passes", [1, 3])
def test_sliding_against_the_reference(rng, passes, carry_conv):
    model = make(eviction="sliding", window=6, carry_conv=carry_conv)
    ref = Reference(model)
    state, expected = model.init_state(), ref.fresh()
    for length in (6, 6, 4):
        x = tokens(rng, length)
        state, _ = consolidate(model, state, mx.array(x[None]), passes)
        expected = ref.consolidate(x, expected, passes)
        assert_same_S(state, expected)
    x = tokens(rng, 5)
    logits, _ = model(mx.array(x[None]), state)
    np.testing.assert_allclose(logits[0], ref.forward(x, expected)[0], atol=5e-4)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_padded_rows_are_rows_alone(rng, eviction):
    model = make(eviction=eviction, window=8)
    lengths = [[8, 3], [2, 7], [5, 1]]
    x = tokens(rng, 3, 2, 8)
    state = model.init_state()
    for w, pair in enumerate(lengths[:2]):
        mask = mx.arange(8) < mx.array(pair)[:, None]
        state, report = consolidate(model, state, mx.array(x[w]), 2, mask=mask)
        assert report.tokens == sum(pair)
    mask = mx.arange(8) < mx.array(lengths[2])[:, None]
    logits, state = model(mx.array(x[2]), state, mask)
    step, _ = model(mx.array([[7], [9]]), state)
    for row in range(2):
        alone = model.init_state()
        for w in range(2):
            window = mx.array(x[w, row : row + 1, : lengths[w][row]])
            alone, _ = consolidate(model, alone, window, 2)
        n = lengths[2][row]
        expected, alone = model(mx.array(x[2, row : row + 1, :n]), alone)
        np.testing.assert_allclose(logits[row, :n], expected[0], atol=5e-5)
        expected, _ = model(mx.array([[7, 9][row]])[None], alone)
        np.testing.assert_allclose(step[row], expected[0], atol=5e-5)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_steps_are_the_chunk(rng, eviction):
    model = make(eviction=eviction, window=8)
    state, _ = consolidate(model, model.init_state(), mx.array(tokens(rng, 2, 8)), 2)
    x = mx.array(tokens(rng, 2, 19))
    whole, end = model(x, state)
    parts, s = [], state
    for t in range(19):
        logits, s = model(x[:, t : t + 1], s)
        parts.append(logits)
    np.testing.assert_allclose(mx.concatenate(parts, axis=1), whole, atol=2e-5)
    for i, S in fast_weights(end).items():
        np.testing.assert_allclose(fast_weights(s)[i], S, atol=2e-5)


def copies(state):
    return {name: np.array(x) for name, x in flatten_state(state).items()}


@pytest.mark.parametrize("stop_after", [1, 3, 8])
def test_a_cancelled_sleep_changes_nothing(rng, stop_after):
    model = make(eviction="sliding")
    _, state = model(mx.array(tokens(rng, 1, 9)))
    before, asked = copies(state), []
    with pytest.raises(SleepCancelled):
        consolidate(
            model,
            state,
            mx.array(tokens(rng, 1, 9)),
            3,
            should_stop=lambda: asked.append(1) or len(asked) == stop_after,
        )
    assert len(asked) == stop_after  # once after every block
    after = copies(state)
    assert before.keys() == after.keys()
    assert all((before[n] == after[n]).all() for n in before)


def test_a_non_finite_sleep_is_refused(rng):
    model = make()
    _, state = model(mx.array(tokens(rng, 1, 9)))
    before = copies(state)
    model.layers[3].mixer.D = mx.full((4,), float("nan"))
    model.layers[1].mixer.dt_bias = mx.full((4,), float("nan"))
    with pytest.raises(SleepFailed, match="not finite"):
        consolidate(model, state, mx.array(tokens(rng, 1, 4)), 2)
    assert all((before[n] == x).all() for n, x in copies(state).items())


def test_bad_arguments(rng):
    model = make()
    with pytest.raises(UserError, match="at least 1 pass"):
        consolidate(model, model.init_state(), mx.array([[1]]), 0)
    with pytest.raises(UserError, match="empty"):
        consolidate(model, model.init_state(), mx.zeros((1, 0), mx.int32), 1)
    for wrong in ({"passes": 0}, {"window": 1}, {"eviction": "soft"}, {"loop_range": (2, 9)}):
        with pytest.raises(UserError):
            make(**wrong)


def test_callbacks_and_moved(rng):
    """moved is |S_j - S_{j-1}| / |S_j|, and on_pass hears it after each pass."""
    model = make()
    x, heard = mx.array(tokens(rng, 1, 10)), []
    _, report = consolidate(
        model, model.init_state(), x, 3, on_pass=lambda *args: heard.append(args)
    )
    assert [h[:2] for h in heard] == [(1, 3), (2, 3), (3, 3)]
    assert tuple(h[2] for h in heard) == report.moved
    flat = []
    for n in (1, 2, 3):
        state, _ = consolidate(model, model.init_state(), x, n)
        flat.append(np.concatenate([S.ravel() for S in fast_weights(state).values()]))
    assert report.moved[0] == pytest.approx(1)  # from zero
    for j in (1, 2):
        expected = np.linalg.norm(flat[j] - flat[j - 1]) / np.linalg.norm(flat[j])
        assert report.moved[j] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_state_survives_flattening(rng, eviction):
    model = make(eviction=eviction, window=6)
    state, _ = consolidate(model, model.init_state(), mx.array(tokens(rng, 1, 6)), 2)
    again = unflatten_state(flatten_state(state), model.num_layers)
    x = mx.array(tokens(rng, 1, 4))
    assert mx.array_equal(model(x, state)[0], model(x, again)[0])
    assert kv_bytes(again) == kv_bytes(state)
    with pytest.raises(UserError, match="unexpected"):
        unflatten_state({"layers.9.fast_weights": mx.zeros((1,))}, model.num_layers)


# --- training ----------------------------------------------------------------------------------


def example(rng):
    """Two windows to sleep over, one to answer in, with loss on some of its tokens."""
    sleeping = [tokens(rng, 7), tokens(rng, 4)]
    answering = tokens(rng, 9)
    w = rng.random(9) * (rng.random(9) < 0.6)
    w[0], w[5] = 0, 0.7
    ours = [*(labelled_free(x) for x in sleeping), labelled(answering[None], None, w[None])]
    return ours, [*((x, None) for x in sleeping), (answering, w)]


def labelled_free(x):
    from mlx_sleep.training.windows import Window

    return Window(mx.array(x[None]))


@pytest.mark.parametrize("passes", [1, 3])
def test_loss_is_algorithm_1(rng, passes):
    model = make()
    ours, theirs = example(rng)
    loss, _ = sleep_loss(model, ours, passes)
    assert loss.item() == pytest.approx(Reference(model).loss(theirs, passes), rel=1e-4)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradient_flows_through_the_passes(rng, passes, checkpointed):
    """Against central differences of the float64 reference, along one direction for each tensor."""
    model = make()
    ours, theirs = example(rng)
    block = checkpointed_block(model) if checkpointed else None

    def loss(parameters):
        model.update(parameters)
        return sleep_loss(model, ours, passes, block)[0]

    grads = dict(tree_flatten(mx.grad(loss)(model.parameters())))
    w = weights(model)
    assert grads.keys() == w.keys()
    for name in w:
        direction = rng.standard_normal(w[name].shape)
        direction /= np.linalg.norm(direction)
        values = [
            Reference(model, {**w, name: w[name] + e * direction}).loss(theirs, passes)
            for e in (1e-5, -1e-5)
        ]
        expected = (values[0] - values[1]) / 2e-5
        got = float((np.array(grads[name], np.float64) * direction).sum())
        assert got == pytest.approx(expected, rel=2e-3, abs=2e-5), name


def test_gradient_of_sleep_alone_reaches_every_pass(rng):
    """The loss of the answer depends on the consolidation's weights only through S."""
    model = make(layer_types=("attention", "gated_deltanet"))
    ours, _ = example(rng)
    trees = []
    for passes in (1, 2):
        grads = mx.grad(
            lambda p: (model.update(p), sleep_loss(model, ours, passes)[0])[1]  # noqa: B023
        )(model.parameters())
        trees.append(dict(tree_flatten(grads)))
    differ = [n for n in trees[0] if not mx.allclose(trees[0][n], trees[1][n], rtol=1e-3)]
    assert len(differ) > len(trees[0]) // 2


def test_no_loss_on_consolidation_windows(rng):
    """Targets come from prediction windows only: other tokens there change S, not the labels."""
    model = make()
    ours, _ = example(rng)
    flat = [(c.positions, c.targets, c.weights) for c in ours]
    assert all(x is None for triple in flat[:2] for x in triple)
    assert all(x is not None for x in flat[2])
    for i in (1, 3):  # with S cut off, nothing of the sleep is left in the loss
        out = model.layers[i].mixer.out_proj
        out.weight = mx.zeros_like(out.weight)
    first = sleep_loss(model, ours, 2)[0]
    other = [labelled_free(tokens(rng, 7)), labelled_free(tokens(rng, 4)), ours[2]]
    assert sleep_loss(model, other, 2)[0].item() == pytest.approx(first.item(), rel=1e-6)


def test_labelled_refuses_the_first_token():
    with pytest.raises(ValueError, match="first token"):
        labelled(np.array([[1, 2]]), None, np.array([[1.0, 1.0]]))


def test_passes_over_is_pure(rng):
    model = make()
    x = mx.array(tokens(rng, 1, 6))
    _, state = model(x)
    keys = [dict(layer) for layer in state]
    passes_over(model, x, state, 2)
    assert [dict(layer) for layer in state] == keys or all(
        a[k] is b[k] for a, b in zip(state, keys, strict=True) for k in b
    )


def test_checkpointed_loss_is_the_loss(rng):
    model = make(eviction="sliding", window=16)
    ours, _ = example(rng)
    plain = sleep_loss(model, ours, 2)[0]
    saved = sleep_loss(model, ours, 2, checkpointed_block(model))[0]
    assert saved.item() == pytest.approx(plain.item(), rel=1e-6)
    assert tree_unflatten(tree_flatten(model.parameters()))
