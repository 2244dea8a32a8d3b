"""Ouro against PyTorch, the published sizes, and what looping does to the state."""

from __future__ import annotations

import json
from importlib.resources import files

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_sleep.convert import insert
from mlx_sleep.convert.architectures.ouro import ARCHITECTURE
from mlx_sleep.models.base import flatten_state, kv_bytes, unflatten_state
from mlx_sleep.models.load import build
from mlx_sleep.models.ouro import Model, ModelArgs, exit_distribution
from mlx_sleep.sleep import consolidate
from mlx_sleep.utils.errors import UserError
from tests import parity
from tests.parity import CASES, ouro

HARD = {"window": ouro.WINDOW}
SLIDING = {"window": ouro.WINDOW, "eviction": "sliding"}


def make(sleep=HARD, layers=ouro.SLEEP_LAYERS, **changes):
    config = {**ARCHITECTURE.config(ouro.config(sleep_layers=layers, **changes)), "sleep": sleep}
    return build(config)


def tokens(rng, *shape):
    return mx.array(rng.integers(0, 61, shape))


# --- against PyTorch ---------------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def test_parity(torch):
    cases = [case for name in ouro.ARCHITECTURES for case in parity.rows(ouro, name)]
    assert [c.case for c in cases if c.architecture == "ouro + sleep layers"] == list(CASES)
    assert [c.case for c in cases if c.architecture == "ouro"] == [*CASES[:3], CASES[-1]]
    for case in cases:
        assert case.max_logit_error < 1e-4, case
        assert case.greedy_agreement > 0.98, case


def test_parity_catches(torch, rng):
    """Each mistake that the loops invite would show in the comparison."""
    theirs = ouro.build(ouro.config(sleep_layers=ouro.SLEEP_LAYERS), SLIDING, rng).theirs.model
    x, y = (torch.tensor(rng.integers(0, 61, n)) for n in (ouro.WINDOW, 6))
    right = theirs.consolidate(x, {}, 3)
    logits, _ = theirs(y, right, len(x))

    def off(state):
        return (theirs(y, state, len(x))[0] - logits).abs().max()

    last = max(u for u, _ in right)
    one_kv = {(u, i): {**right[last, i], **_S(right[u, i])} for u, i in right}
    loop_S = {at: {**entry, **_S(right[0, at[1]])} for at, entry in right.items()}
    no_S = {at: {k: x for k, x in entry.items() if k != "S"} for at, entry in right.items()}
    assert off(right) == 0 == off(loop_S)  # a loop without an S begins from the first loop's
    assert off(theirs.consolidate(x, {}, 2)) > 1e-2
    assert off(one_kv) > 1e-3
    assert off(no_S) > 1e-2

    awake = theirs(x, {})[1]
    later, _ = theirs(y, awake, len(x))
    shared = {at: {**entry, **_S(awake[0, at[1]])} for at, entry in awake.items()}
    assert (theirs(y, shared, len(x))[0] - later).abs().max() > 1e-3


def _S(entry):
    return {"S": entry["S"]} if "S" in entry else {}


def test_gate_and_early_exit(torch):
    """The gate's logits are the published ones; at EARLY, tokens stop at every loop."""
    rng = np.random.default_rng(0)  # not with every gate: some are sure from the start
    pair = ouro.build(ouro.config(early_exit_threshold=ouro.EARLY), HARD, rng)
    x, theirs = rng.integers(0, 61, 40), pair.theirs.model
    outputs, _ = pair.ours.loop_outputs(mx.array(x[None]))
    _, gates, _ = theirs.loops(torch.tensor(x), {}, 0)
    np.testing.assert_allclose(pair.ours.gate(outputs)[0], gates, atol=1e-4)
    h, _ = pair.ours.hidden(mx.array(x[None]))
    chosen = {u for u in range(3) for t in range(40) if mx.array_equal(h[0, t], outputs[u][0, t])}
    assert chosen == {0, 1, 2}
    logits = pair.ours(mx.array(x[None]))[0][0]
    np.testing.assert_allclose(logits, theirs(torch.tensor(x), {})[0], atol=1e-4)


# --- as published ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "layers", "count"), [("1.4b", 24, 1_434_652_673), ("2.6b", 48, 2_667_974_657)]
)
def test_published_parameters(size, layers, count):
    """Names, shapes and count of ByteDance/Ouro-1.4B and 2.6B, without weights."""
    file = files("tests.parity") / "configs" / f"ouro_{size}.json"
    config = ARCHITECTURE.config(json.loads(file.read_text()))
    model = Model(ModelArgs.from_dict(config))
    expected = {
        "model.embed_tokens.weight": (49152, 2048),
        "model.norm.weight": (2048,),
        "model.early_exit_gate.weight": (1, 2048),
        "model.early_exit_gate.bias": (1,),
        "lm_head.weight": (49152, 2048),
    }
    norms = ["input_layernorm", "post_attention_layernorm"]
    for i in range(layers):
        shapes = {f"self_attn.{x}_proj": (2048, 2048) for x in "qkvo"}
        shapes |= {f"mlp.{x}_proj": (5632, 2048) for x in ("gate", "up")}
        shapes |= {"mlp.down_proj": (2048, 5632)}
        shapes |= {name: (2048,) for name in [*norms, *(f"{n}_2" for n in norms)]}
        expected |= {f"model.layers.{i}.{name}.weight": s for name, s in shapes.items()}
    parameters = tree_flatten(model.parameters())
    assert {name: x.shape for name, x in parameters} == expected
    assert sum(x.size for _, x in parameters) == count
    assert model.loops == 4 and len(model.init_state()) == 4 * layers
    new = insert.new_layers(model, insert.plan(model))
    sizes = [x.size for layer in new for _, x in tree_flatten(layer.parameters())]
    assert len(new) == 6 and 0.03 * count < sum(sizes) < 0.1 * count  # below 10%, as in the paper


def test_config_refuses_what_it_does_not_know():
    with pytest.raises(UserError, match="RoPE"):
        ARCHITECTURE.config(ouro.config(rope_scaling={"rope_type": "yarn", "factor": 2.0}))
    new = {k: v for k, v in ouro.config().items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e4}  # as transformers 5 has it
    assert ARCHITECTURE.config(new)["rope_theta"] == 5e4
    windows = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}
    ours = ARCHITECTURE.config(ouro.config(**windows))
    assert ours["layer_types"] == ["full_attention"] * 2 + ["sliding_attention"]
    assert ours["sliding_window"] == 7
    for wrong in (
        {"total_ut_steps": 0},
        {"num_key_value_heads": 2},
        {"layer_types": ["full_attention"]},
        {"layer_types": ["sliding_attention"] * 3},
        {"hidden_act": "relu"},
    ):
        with pytest.raises(UserError):
            make(layers=None, **wrong)


def test_sliding_attention_layers(rng):
    """A published sliding_window holds whatever the eviction is: older tokens do not matter."""
    model = make(layers=None, layer_types=["sliding_attention"] * 3, sliding_window=4)
    x = tokens(rng, 1, 40)
    y = mx.concatenate([tokens(rng, 1, 3), x[:, 3:]], axis=1)
    a, b = model(x)[0], model(y)[0]
    far = 3 + 3 * model.loops * 3  # 3 tokens back in each of 3 blocks, in each loop
    assert mx.abs(a - b)[:, :far].max() > 1e-4
    assert mx.abs(a - b)[:, far:].max() < 1e-5


def test_exit_distribution():
    logits = mx.array([[-1.0, 0.5, 30.0], [2.0, -3.0, -30.0]])
    p = np.array(exit_distribution(logits))
    s = 1 / (1 + np.exp(-np.array(logits)))
    expected = np.stack([s[:, 0], (1 - s[:, 0]) * s[:, 1], (1 - s[:, 0]) * (1 - s[:, 1])], 1)
    np.testing.assert_allclose(p, expected, rtol=1e-5)


# --- the loops' state --------------------------------------------------------------------------


def test_a_chunk_is_its_tokens_one_by_one(rng):
    """Awake, before and after a sleep: which a loop that reads the S of another would break."""
    model = make()
    state, _ = consolidate(model, model.init_state(), tokens(rng, 1, 9), 2)
    x = tokens(rng, 1, 7)
    for start in (model.init_state(), state):
        whole, _ = model(x, start)
        one_by_one = start
        for t in range(7):
            logits, one_by_one = model(x[:, t : t + 1], one_by_one)
            assert mx.abs(logits[:, 0] - whole[:, t]).max() < 1e-3
    begun, _ = model(x[:, :3], state)
    _, middle = model(x[:, :3], state)
    rest, _ = model(x[:, 3:], middle)
    assert mx.abs(mx.concatenate([begun, rest], 1) - model(x, state)[0]).max() < 1e-3


def test_sleep_of_a_loop_model(rng):
    """One S a layer, no KV, and the report counts what the window held in all loops."""
    model = make()
    x = tokens(rng, 2, 9)
    _, awake = model(x)
    passes = []
    state, report = consolidate(
        model, model.init_state(), x, 4, on_pass=lambda n, *_: passes.append(n)
    )
    blocks = model.num_layers
    assert blocks == 7 and len(state) == 3 * blocks
    assert [i for i, layer in enumerate(state) if layer] == [0, 3, 4, 6]
    assert all(layer.keys() <= {"fast_weights"} for layer in state)
    assert report.kv_bytes_freed == kv_bytes(awake) > 0 == kv_bytes(state)
    assert passes == [1, 2, 3, 4] and all(m > 0 for m in report.moved)
    assert all(("fast_weights" in a) == (i % blocks in (0, 3, 4, 6)) for i, a in enumerate(awake))


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_sliding_eviction_keeps_the_kv_of_each_loop(rng, passes):
    """Loop u keeps pass u + 1; loops without a pass, and passes without a loop, take the last."""
    model = make(SLIDING)
    x = tokens(rng, 1, 9)
    state, _ = consolidate(model, model.init_state(), x, passes)
    blocks = model.num_layers
    kept = []  # of block 1, an attention block
    for n in range(1, passes + 1):
        alone, _ = consolidate(model, model.init_state(), x, n)
        kept.append(alone[2 * blocks + 1]["keys"])  # the last loop's is the last pass's
    for u in range(3):
        expected = kept[-1] if u == 2 else kept[min(u, passes - 1)]
        layer = state[u * blocks + 1]
        assert layer["length"] == ouro.WINDOW - 1 and layer["offset"] == 9
        assert mx.array_equal(layer["keys"], expected)
        assert "conv" in state[u * blocks]
        assert ("fast_weights" in state[u * blocks]) == (u == 0)
    assert passes == 1 or not mx.array_equal(kept[0], kept[1])
    again = unflatten_state(flatten_state(state), len(model.init_state()))
    y = tokens(rng, 1, 4)
    assert mx.array_equal(model(y, state)[0], model(y, again)[0])


def test_loop_range(rng):
    """Blocks outside run once, and what they keep is in every loop; S is the first loop's."""
    model = make({**SLIDING, "loop_range": [1, 2]})
    blocks = model.num_layers
    assert model.sleep.loop_range == (2, 3)  # of 7: block 1 of the model, no sleep layer with it
    state, _ = consolidate(model, model.init_state(), tokens(rng, 1, 9), 3)
    for i in (1, 5):
        keys = [state[u * blocks + i]["keys"] for u in range(3)]
        assert mx.array_equal(keys[0], keys[1]) and mx.array_equal(keys[0], keys[2])
    keys = [state[u * blocks + 2]["keys"] for u in range(3)]
    assert not mx.array_equal(keys[0], keys[1]) and not mx.array_equal(keys[1], keys[2])


def test_nothing_to_sleep_into(rng):
    model = make(layers=None)
    assert not model.has_fast_weights
    with pytest.raises(UserError, match="nothing to sleep into; train sleep layers"):
        consolidate(model, model.init_state(), tokens(rng, 1, 5), 2)
    assert make().has_fast_weights
