"""Folders of multimodal models as mlx-lm and mlx-vlm write them: the text model is opened."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_sleep.convert import pipeline
from mlx_sleep.models.load import load_model
from mlx_sleep.models.mlx_lm_model import Model, ModelArgs

TEXT = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
}
DELTA = {
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 1,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "full_attention_interval": 2,
}
EXPERTS = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
QUANTIZATION = {"group_size": 32, "bits": 4}
CONFIGS = {
    "qwen3_5": {**TEXT, **DELTA, "tie_word_embeddings": False},
    "qwen3_5_moe": {**TEXT, **DELTA, **EXPERTS, "tie_word_embeddings": True},
    "gemma3": {**TEXT, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
}


def write(folder, model_type: str, *, quantized: bool = True):
    """A folder with a vision tower beside the text model, and the text model's logits."""
    text = CONFIGS[model_type]
    config = {"model_type": model_type, "text_config": {**text, "model_type": f"{model_type}_text"}}
    config |= {"vision_config": {"depth": 1}, "vocab_size": 61, "eos_token_id": 2}
    model = Model(ModelArgs.from_dict({**config, "sleep": {"window": 8}}))
    if quantized:
        nn.quantize(
            model,
            **QUANTIZATION,
            class_predicate=lambda _, m: (
                hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0
            ),
        )
        config["quantization"] = QUANTIZATION
    weights = dict(tree_flatten(model.parameters()))
    extra = {"vision_tower.blocks.0.weight": mx.ones((2, 3)), "vision_tower.norm": mx.ones(2)}
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), {**weights, **extra}, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return model(mx.arange(7)[None])[0], weights


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_text_model_is_opened(tmp_path, model_type, quantized):
    logits, weights = write(tmp_path / "model", model_type, quantized=quantized)
    model, config = load_model(tmp_path / "model")
    assert mx.array_equal(model(mx.arange(7)[None])[0], logits)
    assert dict(tree_flatten(model.parameters())).keys() == weights.keys()
    assert config["sleep"]["window"] == 2048


def test_converting_one_leaves_the_vision_tower_out(tmp_path):
    logits, _ = write(tmp_path / "model", "qwen3_5")
    pipeline.convert(tmp_path / "model", tmp_path / "ours")
    model, _ = load_model(tmp_path / "ours")
    assert mx.array_equal(model(mx.arange(7)[None])[0], logits)


def test_an_old_folder_of_gemma_3_with_a_head_keeps_it(tmp_path):
    """mlx-lm once wrote the tied head out, and config.json says nothing of it."""
    folder = tmp_path / "model"
    _, weights = write(folder, "gemma3", quantized=False)
    head = mx.random.normal((61, 64))
    weights["language_model.lm_head.weight"] = head
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    model, _ = load_model(folder)
    assert mx.array_equal(model.inner.language_model.lm_head.weight, head)
