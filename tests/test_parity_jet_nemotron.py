"""Jet-Nemotron: against PyTorch on the same weights, at full size without any, and bad configs.

Only the comparisons need torch and transformers.
"""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import json
from importlib import resources

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_sleep.convert.architectures.jet_nemotron import ARCHITECTURE
from mlx_sleep.convert.pipeline import convert
from mlx_sleep.models.jet_nemotron import JetArgs, JetBlock, Model, ModelArgs
from mlx_sleep.models.load import load_model, save
from mlx_sleep.sleep import consolidate, passes_over
from mlx_sleep.training.losses import checkpointed_block
from mlx_sleep.utils.errors import UserError
from tests.parity import CASES, compare, jet_nemotron

assert mlx_sleep  # imported for its effect

LIMIT = 1e-4
TIED, WIDE = jet_nemotron.TIED, jet_nemotron.WIDE


@pytest.fixture(scope="module")
def pairs():
    """One pair for each variant."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    rng = np.random.default_rng(jet_nemotron.SEED)
    return [jet_nemotron.build(config, sleep, rng) for config, sleep in jet_nemotron.VARIANTS]


@pytest.mark.parametrize("variant", (0, 1), ids=("tied", "wide"))
@pytest.mark.parametrize("case", CASES)
def test_logits(pairs, case, variant, rng):
    for c in compare(pairs[variant], rng, (case,)):
        assert c.error <= LIMIT and c.agreement >= 0.95


@pytest.mark.parametrize("case", ("prefill", "steps"))
def test_attention_layers_are_those_of_qwen2(pairs, case, rng):
    for c in compare(jet_nemotron.qwen_pair(rng), rng, (case,)):
        assert c.error <= LIMIT


def slept(pair, passes, rng):
    """The states after one sleep over the same window: ours, theirs."""
    import torch

    window = rng.integers(0, pair.ours.args.vocab_size, (2, pair.ours.sleep.window))
    mine, _ = consolidate(pair.ours, pair.ours.init_state(2), mx.array(window), passes)
    with torch.no_grad():
        return mine, pair.theirs.consolidate(torch.tensor(window), pair.theirs.fresh(), passes)


@pytest.mark.parametrize("passes", (1, 2, 3))
def test_fast_weights_after_a_sleep(pairs, passes, rng):
    for pair in pairs:
        for mine, other in zip(*slept(pair, passes, rng), strict=True):
            assert ("fast_weights" in mine) == ("S" in other)
            assert ("conv" in mine) == ("conv" in other) and ("keys" in mine) == ("k" in other)
            if "S" in other:
                S = other["S"].numpy()
                assert np.abs(np.array(mine["fast_weights"]) - S).max() <= 1e-4 * np.abs(S).max()
            if "k" in other:
                assert mine["length"] == other["k"].shape[2] and mine["offset"] == other["seen"]


def test_the_comparison_sees_a_mistake_in_algorithm_1(pairs, monkeypatch, rng):
    theirs = pairs[0].theirs

    def error():
        return max(c.error for c in compare(pairs[0], rng, ("sleep_2",)))

    assert error() <= LIMIT
    right = theirs.consolidate
    for wrong in (
        lambda tokens, state, passes: right(tokens, state, passes + 1),
        lambda tokens, state, passes: right(tokens, right(tokens, state, 1), passes - 1),
    ):
        monkeypatch.setattr(theirs, "consolidate", wrong)
        assert error() > 10 * LIMIT
    monkeypatch.setattr(theirs, "consolidate", right)
    with monkeypatch.context() as patch:
        patch.setattr(theirs, "loop", (0, 5))
        assert error() > 10 * LIMIT
    monkeypatch.setattr(theirs, "evict", lambda state: state)
    assert error() > 10 * LIMIT


# Sizes and totals of the model that the published modelling code builds from each config.
PUBLISHED = {
    "2b": {"blocks": 28, "loop": (7, 21), "tensors": 482, "total": 1_964_806_208},
    "4b": {"blocks": 36, "loop": (9, 27), "tensors": 590, "total": 3_960_424_768},
}
# Dimensions: D hidden, I of the MLP, H heads of Dk and Dv, A and V of attention's q and of its k.
BLOCK = {
    "mlp.gate_proj.weight": "ID",
    "mlp.up_proj.weight": "ID",
    "mlp.down_proj.weight": "DI",
    "input_layernorm.weight": "D",
    "post_attention_layernorm.weight": "D",
}
MIXERS = {
    "jet": {
        "q_proj.weight": "KD",
        "k_proj.weight": "KD",
        "v_proj.weight": "WD",
        "b_proj.weight": "HD",
        "a_proj.weight": "HD",
        "A_log": "H",
        "dt_bias": "H",
        "dynamic_conv1d.kernel_generator.w1.weight": "GD",
        "dynamic_conv1d.kernel_generator.w2.weight": "TG",
        "dynamic_conv1d.kernel_generator.w2.bias": "T",
        "g_proj.weight": "WD",
        "o_norm.weight": "v",
        "o_proj.weight": "DW",
    },
    "attn": {
        "q_proj.weight": "DD",
        "q_proj.bias": "D",
        "k_proj.weight": "kD",
        "k_proj.bias": "k",
        "v_proj.weight": "kD",
        "v_proj.bias": "k",
        "o_proj.weight": "DD",
    },
}
MIXERS["swa"] = MIXERS["attn"]
SIZES = {
    "2b": dict(D=1536, I=8960, H=12, K=1152, W=3072, v=256, G=384, T=12288, k=256),
    "4b": dict(D=2048, I=11008, H=16, K=2048, W=4096, v=256, G=512, T=16384, k=256),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_full_size(size):
    """Names, shapes and count equal the published ones; nothing is allocated."""
    folder = resources.files("tests.parity") / "configs"
    published = json.loads((folder / f"jet_nemotron_{size}.json").read_text())
    config = ARCHITECTURE.config(published)
    shapes = {
        "model.embed_tokens.weight": (151936, SIZES[size]["D"]),
        "model.norm.weight": (SIZES[size]["D"],),
    }
    for i, kind in enumerate(config["layer_types"]):
        mixer = {f"self_attn.{name}": dims for name, dims in MIXERS[kind].items()}
        for name, dims in {**BLOCK, **mixer}.items():
            shapes[f"model.layers.{i}.{name}"] = tuple(SIZES[size][d] for d in dims)
    before = mx.get_active_memory()
    model = Model(ModelArgs.from_dict(config))
    ours = {name: x.shape for name, x in tree_flatten(model.parameters())}
    assert ours == shapes
    assert len(ours) == PUBLISHED[size]["tensors"]
    assert sum(int(np.prod(shape)) for shape in ours.values()) == PUBLISHED[size]["total"]
    assert mx.get_active_memory() - before < 2**20
    assert model.num_layers == PUBLISHED[size]["blocks"]
    assert ARCHITECTURE.loop_range(config) == PUBLISHED[size]["loop"]


def test_loop_range_of_few_blocks():
    """The middle half, and everything (None) where there is no half to leave out."""
    of = {n: ARCHITECTURE.loop_range({"layer_types": ["jet"] * n}) for n in (1, 3, 4, 7)}
    assert of == {1: None, 3: None, 4: (1, 3), 7: (1, 6)}


def tiny(config=TIED, **sleep):
    model = Model(ModelArgs.from_dict({**config, "sleep": {"window": 8, **sleep}}))
    mx.eval(model.parameters())
    return model


def tokens(model, *shape):
    return mx.random.randint(0, model.args.vocab_size, shape)


def test_a_new_jet_block_convolves_statically():
    """Its taps are w2's bias at every token, so that training starts from a plain convolution."""
    block = JetBlock(24, JetArgs.from_dict(TIED["efficient_attention_config"]["jet"]))
    generator = block.dynamic_conv1d.kernel_generator
    taps = generator(mx.random.normal((2, 5, 24)))
    assert mx.array_equal(taps, mx.broadcast_to(generator.w2.bias, taps.shape))
    assert mx.abs(taps).max() > 0.1


def test_conv_state_is_the_last_projections_of_v():
    block = JetBlock(24, JetArgs.from_dict(TIED["efficient_attention_config"]["jet"]))
    x = mx.random.normal((1, 7, 24))
    _, state = block(x, {}, None)
    assert mx.array_equal(state["conv"], block.v_proj(x)[:, -2:])


def test_every_weight_learns_through_a_sleep():
    """Gradients through N = 2 passes and a prediction reach everything, finite and not zero."""
    model = tiny(window=8, loop_range=(1, 4))
    for layer in model.model.layers:
        if "dynamic_conv1d" in layer.self_attn:
            # It starts at zero, where it lets nothing through to w1.
            w2 = layer.self_attn.dynamic_conv1d.kernel_generator.w2
            w2.weight = mx.random.normal(w2.weight.shape) * 0.3
    window, answer = tokens(model, 2, 8), tokens(model, 2, 5)

    def gradients(block=None):
        def loss(parameters):
            model.update(parameters)
            state = passes_over(model, window, model.init_state(2), 2, block=block)
            return mx.square(model(answer, state)[0]).mean()

        parameters = model.parameters()
        grads = dict(tree_flatten(mx.grad(loss)(parameters)))
        model.update(parameters)
        return grads

    grads = gradients()
    for name, grad in grads.items():
        assert mx.isfinite(grad).all(), name
        # A key's bias moves all scores of a query alike, which softmax does not see.
        assert grad.any() or name.endswith("k_proj.bias"), name
    for name, grad in gradients(checkpointed_block(model)).items():
        assert mx.allclose(grad, grads[name], rtol=1e-3, atol=1e-6), name


def test_half_precision_keeps_s_in_float32():
    model = tiny(WIDE)
    model.set_dtype(mx.bfloat16)
    state = model.init_state()
    for x in (tokens(model, 1, 9), tokens(model, 1, 1)):
        logits, state = model(x, state)
        assert logits.dtype == mx.bfloat16 and mx.isfinite(logits).all()
        assert state[0]["fast_weights"].dtype == mx.float32


@pytest.mark.parametrize("config", (TIED, WIDE), ids=("tied", "wide"))
def test_a_saved_folder_loads_again(tmp_path, config):
    config = {**ARCHITECTURE.config(config), "sleep": {"window": 8}}
    model = Model(ModelArgs.from_dict(config))
    save(tmp_path / "jet", model, config)
    again, _ = load_model(tmp_path / "jet")
    x = tokens(model, 2, 11)
    assert mx.array_equal(model(x)[0], again(x)[0])


@pytest.mark.parametrize("config", (TIED, WIDE), ids=("tied", "wide"))
def test_a_checkpoint_in_the_published_form_converts_and_goes_back(tmp_path, config):
    model = Model(ModelArgs.from_dict({**config, "sleep": {"window": 8}}))
    weights = dict(tree_flatten(model.parameters()))
    source = tmp_path / "theirs"
    source.mkdir()
    mx.save_safetensors(str(source / "model.safetensors"), weights, {"format": "pt"})
    published = {**config, "auto_map": {"AutoConfig": "a.B"}, "torch_dtype": "float32"}
    (source / "config.json").write_text(json.dumps(published))
    convert(source, tmp_path / "ours")
    ours, found = load_model(tmp_path / "ours")
    x = tokens(model, 2, 11)
    assert mx.array_equal(ours(x)[0], model(x)[0])
    assert ours.sleep.loop_range == ARCHITECTURE.loop_range(config)
    assert "auto_map" not in found
    back = dict(ARCHITECTURE.to_theirs(*item) for item in tree_flatten(ours.parameters()))
    assert back.keys() == weights.keys()
    assert all(mx.array_equal(back[name], weights[name]) for name in weights)


def changed(path, value):
    """TIED with the entry at a dotted path changed, or removed for None."""
    config = json.loads(json.dumps(TIED))
    *parents, last = path.split(".")
    at = config
    for name in parents:
        at = at[name]
    at.update({last: value}) if value is not None else at.pop(last)
    return config


@pytest.mark.parametrize(
    ("path", "value", "says"),
    (
        ("layer_types", ["jet", "mamba"], "jet, attn, swa"),
        ("layer_types", [], "jet, attn, swa"),
        ("hidden_size", None, "lacks hidden_size"),
        ("efficient_attention_config.jet", None, "lacks jet"),
        ("efficient_attention_config.swa", None, "lacks swa"),
        ("efficient_attention_config.swa", {}, "window_size"),
        ("efficient_attention_config.jet.expand_v", 2.55, "whole number"),
        ("hidden_act", "tanh", "hidden_act"),
        ("num_key_value_heads", 2, "multiple"),
        ("head_dim", 7, "even"),
    ),
)
def test_configs_that_cannot_be(path, value, says):
    with pytest.raises(UserError, match=says):
        ModelArgs.from_dict(changed(path, value))


def test_conversion_of_the_config():
    ours = ARCHITECTURE.config(
        {**TIED, "auto_map": {"AutoConfig": "x.Y"}, "torch_dtype": "float16"}
    )
    assert "auto_map" not in ours and "torch_dtype" not in ours
    assert ours["model_type"] == "jet_nemotron" and ours["rope_theta"] == 1_000_000.0
    written_by_transformers_5 = {"rope_type": "default", "rope_theta": 5e5}
    ours = ARCHITECTURE.config({**TIED, "rope_parameters": written_by_transformers_5})
    assert ours["rope_theta"] == 5e5
    for scaling in ({"rope_type": "yarn", "factor": 4.0}, {"type": "linear", "factor": 2.0}):
        with pytest.raises(UserError, match="rope_type"):
            ARCHITECTURE.config({**TIED, "rope_scaling": scaling})
    with pytest.raises(UserError, match="layer_types names 5"):
        ARCHITECTURE.config({**TIED, "num_hidden_layers": 6})
