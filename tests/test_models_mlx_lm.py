"""mlx-lm's models, wrapped: against mlx-lm's own forward pass and caches, and Algorithm 1 on it."""

from __future__ import annotations

import copy
import json

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_sleep.convert import architectures
from mlx_sleep.models.base import flatten_state, state_problem
from mlx_sleep.models.inserted import Inserted
from mlx_sleep.models.load import load_model, save
from mlx_sleep.models.mlx_lm_model import NOT_IN_OLD, OLD, TESTED, Model, ModelArgs
from mlx_sleep.sleep import consolidate, passes_over
from mlx_sleep.utils.errors import UserError
from tests.states import kv_length

BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 512,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 12,
    "mamba_d_state": 10,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
}
LATENT = {
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 8,
    "v_head_dim": 7,
    "first_k_dense_replace": 1,
    "num_shared_experts": 1,
    "routed_scaling_factor": 1.5,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
CONFIGS = {
    "qwen3_next": {
        **BASE,
        **DELTA,
        **EXPERTS,
        "partial_rotary_factor": 0.5,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [],
    },
    "qwen3_5": {**BASE, **DELTA, "num_experts": 0},
    "qwen3_5_moe": {**BASE, **DELTA, **EXPERTS, "shared_expert_intermediate_size": 12},
    "olmo_hybrid": {
        **BASE,
        **DELTA,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_allow_neg_eigval": True,
        "rope_parameters": {"rope_theta": 10_000.0},
    },
    "nemotron_h": {
        **BASE,
        "hybrid_override_pattern": "M-*E",
        "mamba_num_heads": 4,
        "mamba_head_dim": 12,
        "mamba_proj_bias": False,
        "ssm_state_size": 10,
        "conv_kernel": 4,
        "n_groups": 2,
        "mlp_bias": False,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
    },
    "granitemoehybrid": {
        **BASE,
        **MAMBA,
        "layer_types": ["mamba", "attention"],
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "logits_scaling": 0.25,
        "residual_multiplier": 0.7,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 24,
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
    },
    "falcon_h1": {
        **BASE,
        **MAMBA,
        "mamba_d_ssm": 48,
        "tie_word_embeddings": True,
        "lm_head_multiplier": 4.0,
    },
    "kimi_linear": {
        **BASE,
        **LATENT,
        "linear_attn_config": {"kda_layers": [1], "num_heads": 3, "head_dim": 6},
        "model_max_length": 512,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "moe_intermediate_size": 20,
    },
    "bailing_hybrid": {
        **BASE,
        **LATENT,
        **EXPERTS,
        "n_group": 2,
        "topk_group": 1,
        "layer_group_size": 2,
        "group_norm_size": 2,
    },
    "bailing_moe_linear": {
        **BASE,
        **EXPERTS,
        "num_shared_experts": 1,
        "norm_topk_prob": True,
        "first_k_dense_replace": 1,
        "layer_group_size": 2,
        "group_norm_size": 2,
    },
    "mamba2": {
        **BASE,
        "num_heads": 4,
        "head_dim": 16,
        "state_size": 10,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_limit": [0.0, 1e30],
        "time_step_rank": "auto",
    },
    "rwkv7": {
        **BASE,
        **{f"{name}_low_rank_dim": 4 for name in ("a", "v", "gate", "decay")},
        "norm_eps": 1e-5,
    },
    "plamo2": {
        **BASE,
        "hidden_size_per_head": 8,
        "mamba_num_heads": 3,
        "mamba_d_state": 10,
        "attention_window_size": 64,
    },
    "llama": {**BASE, "tie_word_embeddings": True},
    "mistral": BASE,
    "qwen2": BASE,
    "qwen3": BASE,
    "smollm3": {**BASE, "num_hidden_layers": 4},
    "phi3": BASE,
    "gemma2": {**BASE, "tie_word_embeddings": True},
    "gemma3_text": {**BASE, "sliding_window_pattern": 2, "sliding_window": 64},
}
ATTENTION_ONLY = tuple(list(CONFIGS)[-8:])
SLEEPERS = [name for name in CONFIGS if name not in ATTENTION_ONLY]
OTHERS = {  # of the usual structure, not in TESTED
    "jamba": {
        **BASE,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 6,
        "mamba_expand": 2,
        "num_experts": 2,
        "num_experts_per_tok": 1,
    },
    "lfm2": {
        **BASE,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 32,
        "block_ff_dim": 40,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1],
    },
}


def make(name: str, sleep: dict | None = None, **fields) -> Model:
    if OLD and name in NOT_IN_OLD:
        pytest.skip(f"this mlx-lm has no {name} of the kind")
    config = {"model_type": name, **(CONFIGS | OTHERS)[name], **fields}
    model = Model(ModelArgs.from_dict({**config, "sleep": {"window": 9, **(sleep or {})}}))
    moved = []
    for parameter, x in tree_flatten(model.parameters()):
        if parameter.endswith(("A_log", "dt_bias")):  # S would fade within a few tokens
            x = mx.random.uniform(-2, 0, x.shape)
        elif x.ndim == 1 or not x.any():  # 1 or 0: equal channels hide a mix-up of them
            x = x + mx.random.normal(x.shape) * 0.2
        moved.append((parameter, x))
    model.load_weights(moved)
    model.eval()
    return model


def tokens(rng, *shape):
    return mx.array(rng.integers(0, 61, shape))


def close(a, b, tolerance=2e-5):
    scale = max(1.0, np.abs(np.array(b)).max())
    np.testing.assert_allclose(np.array(a), np.array(b), atol=tolerance * scale, rtol=0)


# --- the forward pass --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS])
def test_forward_is_mlx_lms(rng, name):
    """A prompt, a second chunk and single tokens, over mlx-lm's own caches; and all in one go."""
    model = make(name)
    x, cache, state = tokens(rng, 2, 14), make_prompt_cache(model.inner), model.init_state(2)
    ours, theirs = [], []
    for start, end in [(0, 5), (5, 11), (11, 12), (12, 13), (13, 14)]:
        theirs.append(model.inner(x[:, start:end], cache=cache))
        logits, state = model(x[:, start:end], state)
        ours.append(logits)
    close(mx.concatenate(ours, 1), mx.concatenate(theirs, 1), 1e-6)
    close(model(x)[0], mx.concatenate(theirs, 1))
    attends = any(cache.kv for cache in model._caches)
    assert kv_length(state) == (14 if attends else 0)
    arrays = [x for layer in state for n, x in layer.items() if n == "fast_weights"]
    assert all(S.dtype == mx.float32 and S.shape[0] == 2 for S in arrays)
    assert model.has_fast_weights == bool(arrays) == (name not in (*ATTENTION_ONLY, "lfm2"))


@pytest.mark.parametrize("name", CONFIGS)
def test_padded_rows_are_rows_alone(rng, name):
    model = make(name)
    state, alone = model.init_state(3), [model.init_state() for _ in range(3)]
    for lengths in ([5, 3, 1], [1, 6, 3], [3, 1, 6]):
        x = tokens(rng, 3, 6)
        logits, state = model(x, state, mx.arange(6) < mx.array(lengths)[:, None])
        for row, n in enumerate(lengths):
            expected, alone[row] = model(x[row : row + 1, :n], alone[row])
            close(logits[row, :n], expected[0])
    x = tokens(rng, 3, 1)
    logits, state = model(x, state)
    for row in range(3):
        expected, alone[row] = model(x[row : row + 1], alone[row])
        close(logits[row], expected[0])
        for ours, theirs in zip(state, alone[row], strict=True):
            if "fast_weights" in ours:
                close(ours["fast_weights"][row], theirs["fast_weights"][0])


@pytest.mark.parametrize("name", ["olmo_hybrid", "nemotron_h", "qwen3_next"])
def test_a_row_of_padding_only_changes_nothing(rng, name):
    model = make(name)
    mask = mx.array([[True] * 4, [False] * 4])
    _, state = model(tokens(rng, 2, 4), None, mask)
    x = tokens(rng, 2, 3)
    close(model(x, state)[0][1], model(x[1:])[0][0])
    # Behind an eviction there is S and no left context, which only the row with tokens gets.
    slept, _ = consolidate(model, model.init_state(2), tokens(rng, 2, 5), 1)
    y = tokens(rng, 2, 4)
    logits, _ = model(x, model(y, slept, ~mask)[1])
    first, second = (
        [{n: a[r : r + 1] for n, a in layer.items()} for layer in slept] for r in (0, 1)
    )
    close(logits[0], model(x[:1], first)[0][0])
    close(logits[1], model(x[1:], model(y[1:], second)[1])[0][0])


def test_layers_with_a_sliding_window(rng):
    """mlx-lm keeps the newest entries of such a layer; here the mask does it."""
    kinds = ["sliding_attention", "full_attention"]
    model = make("llama", layer_types=kinds, sliding_window=4)
    x, cache = tokens(rng, 1, 13), make_prompt_cache(model.inner)
    theirs = [model.inner(x[:, :6], cache=cache)]
    theirs += [model.inner(x[:, t : t + 1], cache=cache) for t in range(6, 13)]
    close(model(x)[0], mx.concatenate(theirs, 1))
    state, ours = model.init_state(), []
    for t in range(13):
        logits, state = model(x[:, t : t + 1], state)
        ours.append(logits)
    close(mx.concatenate(ours, 1), mx.concatenate(theirs, 1))


def test_bfloat16_keeps_S_in_float32(rng):
    for name in (name for name in SLEEPERS if not (OLD and name in NOT_IN_OLD)):
        model = make(name)
        model.set_dtype(mx.bfloat16)
        _, state = model(tokens(rng, 1, 3))
        logits, state = model(tokens(rng, 1, 1), state)
        assert logits.dtype == mx.bfloat16, name
        for layer in state:
            for entry, x in layer.items():
                if isinstance(x, mx.array):
                    wanted = mx.float32 if entry == "fast_weights" else mx.bfloat16
                    assert x.dtype == wanted, (name, entry)


# --- sleep -------------------------------------------------------------------------------------


def naive_sleep(inner, decoder, x, caches, passes):
    """Algorithm 1 by mlx-lm's own caches and layers; hard eviction. Gives caches with S alone."""
    h = decoder.embed_tokens(x) * getattr(decoder, "embedding_multiplier", 1.0)
    for _ in range(passes):
        caches = only_S(inner, caches)
        for layer, cache in zip(inner.layers, caches, strict=True):
            causal = "causal" if x.shape[1] > 1 else None
            if hasattr(layer, "feed_forward") and hasattr(layer, "mamba"):  # Falcon-H1
                h = layer(h, cache=cache, attn_mask=causal, mamba_mask=None)
            else:
                h = layer(h, mask=causal if hasattr(layer, "self_attn") else None, cache=cache)
    return only_S(inner, caches)


def only_S(inner, caches):
    fresh = make_prompt_cache(inner)
    for new, old in zip(fresh, caches, strict=True):
        new, old = (c[0] if hasattr(c, "caches") else c for c in (new, old))
        if hasattr(old, "cache"):
            new[len(old.cache) - 1] = old.cache[-1]
    return fresh


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("name", ["qwen3_5", "olmo_hybrid", "granitemoehybrid", "falcon_h1"])
def test_sleep_is_algorithm_1(rng, name, passes):
    model = make(name)
    owner = model.inner.language_model if "language_model" in model.inner else model.inner
    decoder = owner.model
    state, caches = model.init_state(), make_prompt_cache(model.inner)
    for length in (9, 4):
        x = tokens(rng, 1, length)
        state, _ = consolidate(model, state, x, passes)
        caches = naive_sleep(model.inner, decoder, x, caches, passes)
        assert kv_length(state) == 0 and not any("conv" in layer for layer in state)
    x = tokens(rng, 1, 5)
    close(model(x, state)[0], model.inner(x, cache=copy.deepcopy(caches)))
    other, _ = consolidate(model, model.init_state(), tokens(rng, 1, 9), passes)
    assert np.abs(np.array(model(x, other)[0] - model(x, state)[0])).max() > 1e-4


@pytest.mark.parametrize("name", ["nemotron_h", "falcon_h1", "olmo_hybrid"])
def test_sliding_with_one_pass_is_a_sliding_window_model(rng, name):
    model = make(name, sleep={"eviction": "sliding", "window": 6})
    x = tokens(rng, 1, 21)
    whole, _ = model(x)
    state, parts = model.init_state(), []
    for start in range(0, 18, 6):
        parts.append(model(x[:, start : start + 6], state)[0])
        state, _ = consolidate(model, state, x[:, start : start + 6], 1)
    parts.append(model(x[:, 18:], state)[0])
    close(mx.concatenate(parts, 1), whole)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("name", SLEEPERS)
def test_every_sleep_leaves_a_state_of_the_same_arrays(rng, name, eviction):
    """Of the same names, types and shapes: what a saved state is checked against."""
    model = make(name, {"window": 8, "eviction": eviction})
    fresh = passes_over(model, mx.array([[0]]), model.init_state(), 1)
    state = model.init_state()
    for length in (1, 8, 5):
        state, _ = consolidate(model, state, tokens(rng, 1, length), 2)
        assert state_problem(flatten_state(state), flatten_state(fresh)) is None


@pytest.mark.parametrize("name", ATTENTION_ONLY)
def test_without_fast_weights_there_is_nothing_to_sleep_into(rng, name):
    model = make(name)
    with pytest.raises(UserError, match="retrofit"):
        consolidate(model, model.init_state(), tokens(rng, 1, 5), 1)


def test_nothing_goes_between_the_blocks_of_rwkv_7():
    """They hand on the first layer's values beside h."""
    layer = {"before": 1, "kind": "jet", "num_heads": 2, "head_dim": 8}
    with pytest.raises(UserError, match="nothing can be inserted"):
        Inserted(make("rwkv7"), [layer])


def test_gradients_flow_through_a_sleep(rng):
    model = make("qwen3_5")
    x, y = tokens(rng, 1, 6), tokens(rng, 1, 4)
    model.train()  # mlx-lm's kernels have no backward pass

    def loss(parameters):
        model.update(parameters)
        return model(y, passes_over(model, x, model.init_state(), 2))[0].square().mean()

    grads = dict(tree_flatten(mx.grad(loss)(model.parameters())))
    assert all(mx.abs(g).max() > 0 for name, g in grads.items() if "linear_attn" in name)


# --- folders, quantization, structure ----------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3_5", "nemotron_h", "falcon_h1"])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_folder_is_mlx_lms_too(rng, tmp_path, name, bits):
    model = make(name)
    config = {"model_type": name, **CONFIGS[name]}
    if bits:
        nn.quantize(
            model,
            group_size=32,
            bits=bits,
            class_predicate=lambda _, m: (
                hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0
            ),
        )
        config["quantization"] = {"group_size": 32, "bits": bits}
        assert isinstance(
            model.get("lm_head", nn.QuantizedLinear(32, 8, group_size=32)), nn.QuantizedLinear
        )
    x = tokens(rng, 1, 7)
    logits, _ = model(x)
    close(logits, model.inner(x))
    save(tmp_path / "model", model, config)
    again, _ = load_model(tmp_path / "model")
    assert mx.array_equal(again(x)[0], logits)
    theirs, _ = mlx_lm.utils.load_model(tmp_path / "model")
    assert mx.array_equal(theirs(x), model.inner(x))


def test_nothing_is_computed_when_a_large_model_is_built():
    """Qwen3-Next 80B: building it takes no memory, so a config can be checked without weights."""
    before = mx.get_active_memory()
    model = Model(
        ModelArgs.from_dict(
            {
                **CONFIGS["qwen3_next"],
                "model_type": "qwen3_next",
                "vocab_size": 151936,
                "hidden_size": 2048,
                "num_hidden_layers": 48,
                "num_experts": 512,
                "moe_intermediate_size": 512,
            }
        )
    )
    assert model.num_layers == 48 and model.has_fast_weights
    assert mx.get_active_memory() - before < 1e7


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "no_such_model"}, "no architecture"),
        ({"model_type": "../llama"}, "must be a name"),
        ({"model_type": "cache"}, "no architecture"),
        ({**BASE, "model_type": "llama", "model_file": "model.py"}, "never runs"),
        ({"model_type": "llama", "hidden_size": 8}, "cannot build.*num_hidden_layers"),
        ({**BASE, "model_type": "llama", "sleep": {"passes": 0}}, "passes"),
    ],
)
def test_bad_configs(config, message):
    with pytest.raises(UserError, match=message):
        Model(ModelArgs.from_dict(config))


@pytest.mark.parametrize(
    ("name", "fields", "why"),
    [
        ("gpt2", {"n_ctx": 64, "n_embd": 32, "n_head": 4, "n_layer": 2}, "no decoder"),
        ("baichuan_m1", {"sliding_window": 8, "sliding_window_layers": [0]}, r"\[4, 4\] axes"),
    ],
)
def test_an_unknown_structure_is_named(name, fields, why):
    rest = {"n_positions": 64, "layer_norm_epsilon": 1e-5, "conv_window": 2, "norm_eps": 1e-5}
    with pytest.raises(UserError, match=f"{name} is built in a way .*{why}"):
        Model(ModelArgs.from_dict({**BASE, **rest, **fields, "model_type": name}))


@pytest.mark.parametrize("mistake", ["embed", "state"])
def test_an_architecture_that_computes_something_else_is_refused(monkeypatch, mistake):
    """One that isn't tested is compared with mlx-lm before its first use."""
    assert set(TESTED) == set(CONFIGS)
    model = make("jamba")
    if mistake == "embed":
        monkeypatch.setattr(model, "embed", lambda tokens: 1.1 * Model.embed(model, tokens))
    else:
        recurrent = model._caches[0].recurrent
        view = recurrent.view
        monkeypatch.setattr(recurrent, "view", lambda layer, mask: view({}, mask))
    for _ in range(2):  # and no second try gets through
        with pytest.raises(UserError, match="use it with mlx-lm"):
            model.init_state()


# --- conversion, without torch -----------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["llama", "olmo_hybrid", "nemotron_h", "granitemoehybrid", "dense"]
)
def test_there_and_back_is_the_identity(rng, name):
    fields = {}
    if name == "dense":
        name, fields = "granitemoehybrid", {"num_local_experts": 0}
    model = make(name, **fields)
    config = {"model_type": name, **CONFIGS[name], **fields}
    architecture = architectures.for_ours(name)
    ours = dict(tree_flatten(model.parameters()))
    if architecture.sanitize:
        theirs = architecture.unsanitize(config, ours)
        back = architecture.sanitize(config, theirs)
    else:
        theirs = dict(architecture.to_theirs(n, x) for n, x in ours.items())
        back = dict(architecture.to_ours(n, x) for n, x in theirs.items())
    assert back.keys() == ours.keys()
    assert all(mx.array_equal(back[n], x) for n, x in ours.items())
    assert all(x.shape[1] == 1 for n, x in theirs.items() if n.endswith("conv1d.weight"))
    assert sum(x.size for x in theirs.values()) == sum(x.size for x in ours.values())


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "sliding windows"),
        ("granitemoehybrid", {"mamba_n_groups": 2}, "mamba_n_groups 2"),
        ("falcon_h1", {"time_step_limit": [0.1, 1.0]}, "time_step_limit"),
        ("qwen3_next", {"num_experts": 0}, "without experts"),
        (
            "qwen3_5",
            {"layer_types": ["full_attention", "linear_attention"], "full_attention_interval": 2},
            "every n-th layer",
        ),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "layer to layer"),
    ],
)
def test_what_mlx_lm_would_ignore_is_refused(model_type, fields, message):
    theirs = {"model_type": model_type, **CONFIGS[model_type], **fields}
    with pytest.raises(UserError, match=message):
        architectures.for_source(model_type).config(theirs)


def test_scaled_rope_of_transformers_5():
    """rope_parameters in place of rope_theta and rope_scaling, which mlx-lm's Llama reads."""
    rope = {"rope_theta": 500_000.0, "rope_type": "linear", "factor": 4.0}
    old = {**BASE, "model_type": "llama", "rope_theta": 500_000.0, "rope_scaling": rope}
    new = {n: x for n, x in old.items() if not n.startswith("rope")} | {"rope_parameters": rope}
    config = architectures.for_source("llama").config
    models = [Model(ModelArgs.from_dict(json.loads(json.dumps(config(c))))) for c in (old, new)]
    models[1].update(models[0].parameters())
    x = mx.arange(20)[None]
    assert mx.array_equal(models[0](x)[0], models[1](x)[0])
    plain = make("llama", rope_theta=500_000.0, tie_word_embeddings=False)
    plain.update(models[0].parameters())
    assert not mx.allclose(models[0](x)[0], plain(x)[0], atol=1e-3)
