"""The fla hybrids without PyTorch: names, options, state, sleep, training, configs."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_sleep.convert.architectures import for_source
from mlx_sleep.models import fla_gated_deltanet, fla_mamba2
from mlx_sleep.models.fla_common import powlu
from mlx_sleep.models.load import load_model, save
from mlx_sleep.sleep import consolidate
from mlx_sleep.training.losses import checkpointed_block, sleep_loss
from mlx_sleep.training.windows import Window, labelled
from mlx_sleep.utils.errors import UserError
from tests.states import kv_length

ATTN = {"layers": [1], "num_heads": 4, "num_kv_heads": 2}
DELTA = {
    "model_type": "gated_deltanet",
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "head_dim": 4,
    "num_heads": 2,
    "intermediate_size": 12,
    "attn": ATTN,
}
MAMBA = {
    "model_type": "mamba2",
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "state_size": 6,
    "n_groups": 2,
    "attn": ATTN,
}
MODULES = {"gated_deltanet": fla_gated_deltanet, "mamba2": fla_mamba2}


def make(config: dict, sleep: dict | None = None):
    """Our model of a checkpoint's config, its weights random and none of them zero or one."""
    module = MODULES[config["model_type"]]
    ours = for_source(config["model_type"]).config(config)
    args = module.ModelArgs.from_dict({**ours, "sleep": {"window": 8, **(sleep or {})}})
    model = module.Model(args)
    randomize(model)
    return model


def randomize(model):
    def fresh(name, x):
        noise = mx.random.normal(x.shape) * (x.shape[-1] ** -0.5 if x.ndim > 1 else 0.3)
        return x + noise if name.endswith(("A_log", "dt_bias", "D")) or "norm" in name else noise

    model.load_weights([(n, fresh(n, x)) for n, x in tree_flatten(model.parameters())])


def tokens(rng, *shape):
    return mx.array(rng.integers(0, 61, shape))


BOTH = pytest.mark.parametrize("config", [DELTA, MAMBA], ids=lambda c: c["model_type"])


def test_names_and_shapes_of_gated_deltanet():
    model = make({**DELTA, "attn": {**ATTN, "qkv_bias": True}, "num_v_heads": 4})
    expected = {
        "model.embeddings.weight": (61, 16),
        "model.norm.weight": (16,),
        "lm_head.weight": (61, 16),
        "model.layers.0.attn.A_log": (4,),
        "model.layers.0.attn.dt_bias": (4,),
        "model.layers.0.attn.o_norm.weight": (8,),
        "model.layers.0.attn.q_proj.weight": (8, 16),
        "model.layers.0.attn.k_proj.weight": (8, 16),
        "model.layers.0.attn.v_proj.weight": (32, 16),
        "model.layers.0.attn.g_proj.weight": (32, 16),
        "model.layers.0.attn.a_proj.weight": (4, 16),
        "model.layers.0.attn.b_proj.weight": (4, 16),
        "model.layers.0.attn.o_proj.weight": (16, 32),
        "model.layers.0.attn.q_conv1d.weight": (8, 4),
        "model.layers.0.attn.k_conv1d.weight": (8, 4),
        "model.layers.0.attn.v_conv1d.weight": (32, 4),
        "model.layers.1.attn.q_proj.weight": (16, 16),
        "model.layers.1.attn.q_proj.bias": (16,),
        "model.layers.1.attn.k_proj.weight": (8, 16),
        "model.layers.1.attn.k_proj.bias": (8,),
        "model.layers.1.attn.v_proj.weight": (8, 16),
        "model.layers.1.attn.v_proj.bias": (8,),
        "model.layers.1.attn.o_proj.weight": (16, 16),
    }
    for i in (0, 1):
        expected[f"model.layers.{i}.attn_norm.weight"] = (16,)
        expected[f"model.layers.{i}.mlp_norm.weight"] = (16,)
        expected[f"model.layers.{i}.mlp.gate_proj.weight"] = (12, 16)
        expected[f"model.layers.{i}.mlp.up_proj.weight"] = (12, 16)
        expected[f"model.layers.{i}.mlp.down_proj.weight"] = (16, 12)
    assert {n: x.shape for n, x in tree_flatten(model.parameters())} == expected


def test_names_and_shapes_of_mamba2():
    model = make({**MAMBA, "use_bias": True, "tie_word_embeddings": True})
    expected = {
        "backbone.embeddings.weight": (61, 16),
        "backbone.norm_f.weight": (16,),
        "backbone.layers.0.norm.weight": (16,),
        "backbone.layers.0.mixer.A_log": (4,),
        "backbone.layers.0.mixer.D": (4,),
        "backbone.layers.0.mixer.dt_bias": (4,),
        "backbone.layers.0.mixer.in_proj.weight": (32 + 56 + 4, 16),
        "backbone.layers.0.mixer.in_proj.bias": (92,),
        "backbone.layers.0.mixer.conv1d.weight": (56, 4),
        "backbone.layers.0.mixer.conv1d.bias": (56,),
        "backbone.layers.0.mixer.norm.weight": (32,),
        "backbone.layers.0.mixer.out_proj.weight": (16, 32),
        "backbone.layers.0.mixer.out_proj.bias": (16,),
        "backbone.layers.1.norm.weight": (16,),
        "backbone.layers.1.mixer.q_proj.weight": (16, 16),
        "backbone.layers.1.mixer.k_proj.weight": (8, 16),
        "backbone.layers.1.mixer.v_proj.weight": (8, 16),
        "backbone.layers.1.mixer.o_proj.weight": (16, 16),
    }
    assert {n: x.shape for n, x in tree_flatten(model.parameters())} == expected


@BOTH
def test_there_and_back_is_the_identity(config):
    architecture = for_source(config["model_type"])
    changed = 0
    for name, x in tree_flatten(make(config).parameters()):
        theirs, y = architecture.to_theirs(name, x)
        assert theirs == name
        assert y.shape == ((x.shape[0], 1, x.shape[1]) if "conv1d.weight" in name else x.shape)
        back, z = architecture.to_ours(theirs, y)
        assert back == name and z.dtype == x.dtype and mx.array_equal(z, x)
        changed += y.shape != x.shape
    assert changed == (3 if config is DELTA else 1)


def test_the_old_name_of_the_embedding():
    x = mx.random.normal((3, 2))
    assert for_source("mamba2").to_ours("backbone.embedding.weight", x) == (
        "backbone.embeddings.weight",
        x,
    )


# Each option changes the logits of the same weights. One that no model read would not.
@pytest.mark.parametrize(
    "config, change",
    [
        (DELTA, {"allow_neg_eigval": True}),
        (DELTA, {"output_gate_activation": "sigmoid"}),
        (DELTA, {"hidden_act": "powlu"}),
        (DELTA, {"norm_eps": 0.1}),
        (DELTA, {"attn": {**ATTN, "window_size": 3}}),
        (DELTA, {"attn": {**ATTN, "rope_theta": 10.0}}),
        (MAMBA, {"norm_before_gate": True}),
        (MAMBA, {"norm_eps": 0.1}),
        (MAMBA, {"dt_limit": [0.0, 0.01]}),
        (MAMBA, {"dt_limit": [2.0, {"__float__": "Infinity"}]}),
        (MAMBA, {"attn": {**ATTN, "window_size": 3}}),
        (MAMBA, {"attn": {**ATTN, "rope_theta": 10.0}}),
    ],
    ids=lambda x: x["model_type"] if "model_type" in x else str(x),
)
def test_options_are_read(rng, config, change):
    model, other = make(config), make({**config, **change})
    other.load_weights(tree_flatten(model.parameters()))
    x = tokens(rng, 1, 12)
    assert mx.abs(model(x)[0] - other(x)[0]).max() > 1e-3


def test_a_window_sees_its_newest_tokens(rng):
    """window_size 3 in one layer: nothing from three tokens ago, everything since."""
    model = make(
        {**DELTA, "num_hidden_layers": 1, "attn": {**ATTN, "layers": [0], "window_size": 3}}
    )
    x = tokens(rng, 1, 9)
    logits = model(x)[0][0, 5]
    for changed, same in ((1, True), (2, True), (3, False), (4, False), (5, False), (6, True)):
        y = mx.array(x)
        y[0, changed] = (y[0, changed] + 1) % 61
        assert mx.allclose(model(y)[0][0, 5], logits, atol=1e-5).item() == same


@BOTH
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_steps_and_padded_rows_after_a_sleep(rng, config, eviction):
    model = make({**config, "attn": {**ATTN, "window_size": 5}}, {"eviction": eviction})
    lengths = [8, 3]
    x, y = tokens(rng, 2, 8), tokens(rng, 2, 6)
    mask = mx.arange(8) < mx.array(lengths)[:, None]
    state, _ = consolidate(model, model.init_state(), x, 2, mask=mask)
    assert kv_length(state) == (7 if eviction == "sliding" else 0)
    assert ("conv" in state[0]) == (eviction == "sliding")
    whole, _ = model(y, state)
    steps = []
    for t in range(6):
        step, state = model(y[:, t : t + 1], state)
        steps.append(step)
    np.testing.assert_allclose(mx.concatenate(steps, axis=1), whole, atol=5e-5)
    for row, n in enumerate(lengths):
        alone, _ = consolidate(model, model.init_state(), x[row : row + 1, :n], 2)
        np.testing.assert_allclose(model(y[row : row + 1], alone)[0][0], whole[row], atol=5e-5)


@BOTH
def test_sliding_with_one_pass_is_a_sliding_window_model(rng, config):
    model = make(config, {"eviction": "sliding"})
    x = tokens(rng, 1, 21)
    state = model.init_state()
    for start in (0, 8):
        state, _ = consolidate(model, state, x[:, start : start + 8], 1)
    np.testing.assert_allclose(model(x[:, 16:], state)[0], model(x)[0][:, 16:], atol=5e-5)


@BOTH
def test_it_can_be_trained_to_sleep(rng, config):
    """Algorithm 1's loss reaches every parameter, the same with and without checkpointing."""
    model = make(config)
    x, y = rng.integers(0, 61, (2, 2, 8))
    weights = np.ones((2, 8), np.float32)
    weights[:, 0] = 0
    chunks = [Window(mx.array(x)), labelled(y, None, weights)]

    def loss(block=None):
        return nn.value_and_grad(model, lambda m: sleep_loss(m, chunks, 2, block)[0])(model)

    value, grads = loss()
    again, same = loss(checkpointed_block(model))
    assert value.item() == pytest.approx(again.item(), rel=1e-5)
    other = dict(tree_flatten(same))
    for name, g in tree_flatten(grads):
        assert mx.isfinite(g).all() and mx.abs(g).max() > 0, name
        np.testing.assert_allclose(g, other[name], atol=1e-4 * mx.abs(g).max().item() + 1e-6)


def test_powlu():
    """sigmoid(x) x below zero, sigmoid(x) x^(3 / (sqrt(x) + 1)) above; a gradient everywhere."""
    x = np.array([-3.0, -0.5, 0.0, 0.25, 1.0, 4.0])
    below, above = np.minimum(x, 0), np.maximum(x, 0)
    expected = (below + above ** (3 / (np.sqrt(above) + 1))) / (1 + np.exp(-x))
    np.testing.assert_allclose(powlu(mx.array(x, mx.float32)), expected, rtol=1e-5)
    assert powlu(mx.array(x, mx.bfloat16)).dtype == mx.bfloat16
    slope = mx.grad(lambda x: powlu(x).sum())(mx.array(x, mx.float32))
    assert mx.isfinite(slope).all()


@BOTH
def test_16_bit_weights_keep_a_float32_state(config):
    # One draw in twenty has a key near 0, whose norm makes its rounding large; this one has none.
    mx.random.seed(5)
    model = make(config)
    x = tokens(np.random.default_rng(5), 1, 8)
    exact = model(x)[0]
    model.set_dtype(mx.bfloat16)
    logits, state = model(x)
    assert logits.dtype == mx.bfloat16 and state[0]["fast_weights"].dtype == mx.float32
    assert state[0]["conv"].dtype == mx.bfloat16
    assert mx.abs(logits - exact).max() < 0.1 * mx.abs(exact).max()


def test_residual_in_float32(rng):
    """h stays in the norms' type; it is added to in float32."""
    models = [make({**MAMBA, "residual_in_fp32": flag}) for flag in (True, False)]
    models[1].load_weights(tree_flatten(models[0].parameters()))
    for model in models:
        model.set_dtype(mx.bfloat16)
        model.backbone.layers[0].norm.weight = model.backbone.layers[0].norm.weight.astype(
            mx.float32
        )
    h = models[0].embed(tokens(rng, 1, 4))
    kept, plain = (model.block(0, h, {})[0] for model in models)
    assert h.dtype == mx.bfloat16 and kept.dtype == mx.float32
    assert mx.allclose(kept, plain, atol=0.05 * mx.abs(kept).max())


@BOTH
def test_a_model_folder(rng, tmp_path, config):
    model = make(config)
    ours = for_source(config["model_type"]).config({**config, "sleep": {"window": 8}})
    save(tmp_path / "m", model, ours)
    assert "Infinity" not in json.dumps(ours)
    loaded, _ = load_model(tmp_path / "m")
    x = tokens(rng, 1, 5)
    assert mx.array_equal(loaded(x)[0], model(x)[0])


def test_width_of_the_mlp():
    """fla's default: two thirds of hidden_ratio times the width, up to the next multiple of 256."""
    for width, ratio, inner in ((16, 4, 256), (1024, 4, 2816), (768, None, 2048), (768, 3, 1536)):
        config = {**DELTA, "hidden_size": width, "intermediate_size": None, "hidden_ratio": ratio}
        config = {**config, "num_hidden_layers": 1, "attn": None}
        model = fla_gated_deltanet.Model(
            fla_gated_deltanet.ModelArgs.from_dict(for_source("gated_deltanet").config(config))
        )
        assert model.layers[0].mlp.gate_proj.weight.shape == (inner, width)


def test_configs_of_transformers_and_early_fla():
    theirs = {
        **MAMBA,
        "layer_norm_epsilon": 1e-3,
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
    }
    ours = for_source("mamba2").config(theirs)
    args = fla_mamba2.ModelArgs.from_dict(ours)
    assert args.norm_eps == 1e-3 and args.dt_limit == [0.0, None]
    assert ours["model_type"] == "fla_mamba2" and theirs["model_type"] == "mamba2"


@pytest.mark.parametrize(
    "config, change, word",
    [
        (DELTA, {"num_v_heads": 3}, "num_v_heads"),
        (DELTA, {"expand_v": 1.3}, "expand_v"),
        (DELTA, {"output_gate_activation": "relu"}, "output_gate_activation"),
        (DELTA, {"hidden_act": "gelu"}, "hidden_act"),
        (DELTA, {"attnres_block_size": 2}, "attnres"),
        (DELTA, {"norm_first": False}, "norm_first"),
        (DELTA, {"attn": {"layers": [0]}}, "num_heads"),
        (DELTA, {"attn": {**ATTN, "layers": [2]}}, "layers"),
        (DELTA, {"attn": [ATTN, ATTN]}, "layers"),
        (DELTA, {"attn": {**ATTN, "num_heads": 3}}, "heads"),
        (DELTA, {"attn": {**ATTN, "num_kv_heads": 3}}, "num_kv_heads"),
        (DELTA, {"attn": {**ATTN, "window_size": 0}}, "window_size"),
        (DELTA, {"attn": "all"}, "attn"),
        (MAMBA, {"head_dim": 5}, "head_dim"),
        (MAMBA, {"n_groups": 3}, "n_groups"),
        (MAMBA, {"hidden_act": "relu"}, "hidden_act"),
        (MAMBA, {"dt_limit": 3}, "dt_limit"),
    ],
    ids=lambda x: x["model_type"] if "model_type" in x else str(x),
)
def test_configs_that_do_not_fit(config, change, word):
    with pytest.raises(UserError, match=word) as error:
        make({**config, **change})
    assert "\n" not in str(error.value)
