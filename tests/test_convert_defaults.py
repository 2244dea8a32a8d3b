"""Fields that a config.json leaves out take the maker's defaults, as in transformers."""

from __future__ import annotations

import inspect

import pytest
from mlx_lm.models import qwen3_5
from transformers import CONFIG_MAPPING

from mlx_sleep.convert.architectures import architectures
from mlx_sleep.convert.architectures.fields import complete
from mlx_sleep.models.compat import has_mlx_lm_model, mlx_lm_classes

# What the converter sets itself, or mlx-lm reads for nothing.
ELSEWHERE = {"time_step_limit", "time_step_min", "time_step_max", "initializer_range"}
ELSEWHERE |= {"mamba_d_head", "model_type"}
ALL = {
    a.model_type: a
    for a in architectures()
    if a.sources[0] in CONFIG_MAPPING and has_mlx_lm_model(a.model_type)
}


def arguments(model_type: str) -> set[str]:
    """The fields that mlx-lm reads."""
    if model_type.startswith("qwen3_5"):
        return set(inspect.signature(qwen3_5.TextModelArgs).parameters)
    names = ["BailingMoeV3ForCausalLM"]
    _, args = mlx_lm_classes({"model_type": model_type, "architectures": names})
    return set(inspect.signature(args).parameters)


def default(cls, field: str):
    """The class's own default, not one that follows from other fields; None for none."""
    names = dict(cls.attribute_map)
    names.update({theirs: ours for ours, theirs in names.items()})
    for name in (field, names.get(field)):
        value = inspect.getattr_static(cls, name, None) if name else None
        if isinstance(value, bool | int | float | str | list):
            return value
    return None


@pytest.mark.parametrize("model_type", ALL)
def test_every_default_is_the_makers(model_type):
    cls = CONFIG_MAPPING[ALL[model_type].sources[0]]
    ours = complete({"model_type": model_type})
    for field in sorted(arguments(model_type) - ELSEWHERE):
        value = default(cls, field)
        if value is not None:
            assert ours[field] == value, field
    rope = getattr(cls(), "rope_parameters", None) or {}
    if "full_attention" in rope:  # Gemma 3
        local = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
        assert ours["rope_local_base_freq"] == local
    for field in {"rope_theta", "partial_rotary_factor"} & arguments(model_type) & rope.keys():
        if rope[field] is not None:
            assert ours[field] == rope[field], field


@pytest.mark.parametrize("model_type", ALL)
def test_what_is_said_stands(model_type):
    said = {"model_type": model_type, "vocab_size": 7, "rms_norm_eps": 0.5, "rope_theta": 3.0}
    assert complete(said).items() >= said.items()


@pytest.mark.parametrize("model_type", ALL)
def test_null_is_left_out(model_type):
    """Not where it can be meant."""
    defaults = complete({"model_type": model_type})
    found = complete(dict.fromkeys(defaults) | {"model_type": model_type})
    meant = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "head_dim")
    assert found == defaults | {n: None for n in meant if n in defaults}


def test_left_out_fields_reach_the_model():
    """Those that were wrong in silence: mlx-lm has other bases of RoPE, and other multipliers."""
    config = {a.model_type: a.config for a in ALL.values()}
    assert config["qwen2"]({"model_type": "qwen2"})["rope_theta"] == 10_000.0
    assert config["qwen2"]({"model_type": "qwen2"})["tie_word_embeddings"] is False
    falcon = config["falcon_h1"]({"model_type": "falcon_h1"})
    assert falcon["rope_theta"] == 10_000.0 and falcon["key_multiplier"] == 1.0
    assert falcon["mlp_multipliers"] == [1.0, 1.0] and falcon["mamba_d_head"] == 8
    qwen = config["qwen3_5"]({"model_type": "qwen3_5_text", "rope_theta": 5.0})
    assert qwen["rope_parameters"]["rope_theta"] == 5.0
    assert qwen["rope_parameters"]["partial_rotary_factor"] == 0.25
    wrapped = {"model_type": "qwen3_5", "text_config": {}, "tie_word_embeddings": True}
    assert config["qwen3_5"](wrapped)["tie_word_embeddings"] is True
    assert config["qwen3_next"]({"model_type": "qwen3_next"})["mlp_only_layers"] == []
    assert config["gemma2"]({"model_type": "gemma2"})["query_pre_attn_scalar"] == 256
    kinds = ["sliding_attention", "full_attention"]
    gemma = config["gemma3_text"]({"model_type": "gemma3_text", "layer_types": kinds})
    assert gemma["sliding_window_pattern"] == 2
