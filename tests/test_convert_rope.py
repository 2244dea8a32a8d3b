"""Scaled RoPE of checkpoints: what mlx-lm would compute otherwise than transformers is refused."""

from __future__ import annotations

import pytest

from mlx_sleep.convert.architectures import for_source
from mlx_sleep.convert.architectures.fields import check_scaling, flat_rope
from mlx_sleep.convert.architectures.mlx_lm import _granite
from mlx_sleep.utils.errors import UserError

LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0],
    "long_factor": [1.0],
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "rope, message",
    [
        ({"rope_type": "yarn", "factor": 4.0}, "without original_max_position_embeddings"),
        ({**YARN, "truncate": False}, "truncate"),
        ({**YARN, "mscale": 0.7}, "mscale"),
        ({**YARN, "attention_factor": 1.0}, "attention_factor 1.0"),
        ({**YARN, "factor": "4"}, 'with factor "4"'),
        ({**LONG, "long_factor": [2.0]}, "short_factor"),
        ({**LONG, "attention_factor": 1.5}, "attention_factor 1.5"),
        ({**LONG, "factor": 2.0}, "with a factor, 2.0"),
        ({**LLAMA_3, "low_freq_factor": None}, "without low_freq_factor"),
        ({"rope_type": "linear"}, "without factor"),
        ({"type": "mrope", "mrope_section": [1, 1, 2]}, 'type "mrope" is not known'),
        ({"rope_type": ["linear"], "factor": 4.0}, "is not known"),
        *(
            ({n: x for n, x in LLAMA_3.items() if n != name}, f"without {name}")
            for name in LLAMA_3
            if name != "rope_type"
        ),
    ],
)
def test_scaled_rope_that_mlx_lm_ignores_is_refused(rope, message):
    with pytest.raises(UserError, match=message):
        check_scaling(rope, 64)


def test_scaled_rope_that_mlx_lm_computes_is_not():
    for rope in ({}, {"type": "linear", "factor": 4.0}, YARN, {**YARN, "truncate": True}):
        check_scaling(rope)
    check_scaling({**YARN, "mscale": 1.0, "mscale_all_dim": 1.0})
    check_scaling(LLAMA_3)
    check_scaling({**LONG, "factor": 4.0}, 64)
    check_scaling({**YARN, "factor": 8.0, "attention_factor": 1.2079441541679836})


def test_what_stands_in_rope_scaling_comes_first():
    """As in transformers: before rope_parameters, and before the same field outside."""
    outside = {"rope_theta": 1e4, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}
    found = flat_rope({**outside, "rope_scaling": {**LLAMA_3, "rope_theta": 50.0}})
    assert (found["rope_theta"], found["rope_scaling"]["rope_type"]) == (50.0, "llama3")
    found = flat_rope({**outside, "rope_scaling": {"rope_theta": 50.0}})
    assert (found["rope_theta"], found["rope_scaling"]) == (50.0, None)
    found = flat_rope({"rope_scaling": {**LLAMA_3, "type": "linear"}})
    assert found["rope_scaling"] == LLAMA_3  # mlx-lm would take the type


def test_qwen_3_5_has_it_where_mlx_lm_looks():
    read = for_source("qwen3_5_text").config
    config = {"model_type": "qwen3_5_text", "rope_scaling": {**YARN, "type": "linear"}}
    rope = read(config)["rope_parameters"]
    assert rope == {**YARN, "rope_theta": 10_000.0, "partial_rotary_factor": 0.25}
    sections = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 5.0}
    config = {"model_type": "qwen3_5_text", "rope_parameters": sections}
    assert read(config)["rope_parameters"] == {**sections, "partial_rotary_factor": 0.25}


def test_phi_3_takes_the_length_beside_its_scaling():
    config = {
        "model_type": "phi3",
        "original_max_position_embeddings": 32,
        "max_position_embeddings": 64,
        "rope_scaling": {**LONG, "factor": 2.0},
    }
    found = for_source("phi3").config(config)
    assert found["original_max_position_embeddings"] == 32
    assert found["rope_scaling"] == {
        "type": "longrope",
        "short_factor": [1.0],
        "long_factor": [1.0],
    }
    with pytest.raises(UserError, match="with a factor, 3.0"):
        for_source("phi3").config({**config, "rope_scaling": {**LONG, "factor": 3.0}})


def test_granite_has_no_scaled_rope():
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    with pytest.raises(UserError, match="granitemoehybrid with scaled RoPE"):
        _granite(
            {
                "model_type": "granitemoehybrid",
                "position_embedding_type": "rope",
                "rope_parameters": rope,
            }
        )
