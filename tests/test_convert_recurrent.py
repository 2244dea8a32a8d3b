"""Mamba-2, RWKV-7 and PLaMo 2 of PyTorch, as mlx-lm reads them."""

from __future__ import annotations

import json
import re

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_sleep.convert import pipeline
from mlx_sleep.convert.architectures import for_source
from mlx_sleep.convert.export import export
from mlx_sleep.models.load import load_model
from mlx_sleep.models.mlx_lm_model import OLD, Model, ModelArgs
from mlx_sleep.utils.errors import UserError

BASE = {"vocab_size": 61, "hidden_size": 128, "num_hidden_layers": 2, "tie_word_embeddings": False}
CONFIGS = {
    "mamba2": {**BASE, "num_heads": 4, "head_dim": 64, "state_size": 10, "n_groups": 1},
    "rwkv7": {
        **BASE,
        **{f"{name}_low_rank_dim": 4 for name in ("a", "v", "gate", "decay")},
        "hidden_act": "sqrelu",
        "norm_eps": 1e-5,
        "head_dim": 64,
        "hidden_ratio": 2.0,
    },
    "plamo2": {
        **BASE,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_size_per_head": 64,
        "mamba_num_heads": 2,
        "mamba_d_state": 10,
        "rms_norm_eps": 1e-6,
    },
}


def checkpoint(folder, model_type: str, rng) -> dict[str, mx.array]:
    """Random weights with PyTorch's names and shapes."""
    config = {"model_type": model_type, **CONFIGS[model_type]}
    architecture = for_source(model_type, config)
    ours = architecture.config(dict(config))
    parameters = tree_flatten(Model(ModelArgs.from_dict({**ours, "sleep": {}})).parameters())
    weights = {n: mx.array(rng.normal(size=x.shape) * 0.1, mx.float32) for n, x in parameters}
    if architecture.unsanitize:
        weights = architecture.unsanitize(ours, weights)
    else:
        weights = dict(architecture.to_theirs(n, x) for n, x in weights.items())
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return weights


@pytest.mark.skipif(OLD, reason="mlx-lm 0.32")
@pytest.mark.parametrize("model_type", CONFIGS)
def test_mlx_lm_reads_the_folder_and_export_gives_the_checkpoint(tmp_path, rng, model_type):
    weights = checkpoint(tmp_path / "theirs", model_type, rng)
    pipeline.convert(tmp_path / "theirs", tmp_path / "ours", sleep={"window": 8})
    model, config = load_model(tmp_path / "ours")
    assert config["model_type"] == model_type and model.has_fast_weights
    theirs, _ = mlx_lm.utils.load_model(tmp_path / "ours")
    x = mx.arange(11)[None]
    # Of PyTorch's shapes, as mlx-lm itself reads such a checkpoint.
    np.testing.assert_allclose(np.array(model(x)[0]), np.array(theirs(x)), atol=1e-4)
    export(tmp_path / "ours", tmp_path / "again")
    again = mx.load(str(tmp_path / "again" / "model.safetensors"))
    assert again.keys() == weights.keys()
    assert all(mx.array_equal(x, weights[n]) for n, x in again.items())


@pytest.mark.parametrize(
    ("fields", "ours"),
    [
        ({}, "mamba2"),
        ({"layer_norm_epsilon": 1e-6}, "fla_mamba2"),  # mlx-lm has 1e-5 in each layer
        ({"norm_eps": 1e-5}, "fla_mamba2"),
    ],
)
def test_which_mamba_2_mlx_lm_computes(fields, ours):
    config = {"model_type": "mamba2", **CONFIGS["mamba2"], **fields}
    assert for_source("mamba2", config).model_type == ours


def test_rwkv_7_as_early_checkpoints_have_it():
    kind = for_source("rwkv7")
    given = {n: x for n, x in CONFIGS["rwkv7"].items() if "low_rank" not in n}
    config = kind.config({"model_type": "rwkv7", **given, "hidden_size": 768})
    ranks = [config[f"{name}_low_rank_dim"] for name in ("decay", "gate", "a", "v")]
    assert ranks == [64, 128, 64, 32] and config["intermediate_size"] == 1536
    x = mx.arange(12.0).reshape(6, 2)
    parts = kind.sanitize(config, {"model.layers.0.attn.x_x": x})
    assert parts["model.layers.0.attn.x_v"].tolist() == [[[6.0, 7.0]]] and len(parts) == 6


def test_lings_layers_that_predict_more_tokens_are_left_out():
    patterns = for_source("bailing_hybrid").dropped_for({"num_hidden_layers": 3})
    name = "model.layers.{}.attention.q_proj.weight"
    assert any(re.fullmatch(p, name.format(3)) for p in patterns)
    assert not any(re.fullmatch(p, name.format(i)) for i in (2, 30) for p in patterns)


def test_transformers_defaults_of_a_mamba_2_that_mlx_lm_does_not_compute():
    config = {"model_type": "mamba2", "layer_norm_epsilon": 1e-6}
    ours = for_source("mamba2", config).config(config)
    assert ours["n_groups"] == 8 and ours["num_heads"] == 128 and ours["norm_eps"] == 1e-6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attn": {"layers": [1]}}, "rwkv7 with attn"),
        ({"norm_eps": 1e-6}, "64e-5, not 6.4e-05"),
        ({"value_dim": [64, 128]}, "value_dim"),
    ],
)
def test_what_mlx_lms_rwkv_7_would_ignore_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        for_source("rwkv7").config({"model_type": "rwkv7", **CONFIGS["rwkv7"], **fields})
