"""Scaled RoPE of checkpoints: what mlx-lm would compute otherwise than transformers is refused."""

from __future__ import annotations

import pytest

from mlx_sleep.convert.architectures.fields import check_scaling
from mlx_sleep.convert.architectures.mlx_lm import _granite
from mlx_sleep.utils.errors import UserError

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "rope, message",
    [
        ({"rope_type": "yarn", "factor": 4.0}, "without original_max_position_embeddings"),
        ({**YARN, "truncate": False}, "truncate"),
        ({**YARN, "mscale": 0.7}, "mscale"),
        ({**YARN, "attention_factor": 1.0}, "attention_factor 1.0"),
        ({"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}, "short_factor"),
    ],
)
def test_scaled_rope_that_mlx_lm_ignores_is_refused(rope, message):
    with pytest.raises(UserError, match=message):
        check_scaling(rope)


def test_scaled_rope_that_mlx_lm_computes_is_not():
    for rope in ({}, {"type": "linear", "factor": 4.0}, YARN, {**YARN, "truncate": True}):
        check_scaling(rope)
    check_scaling({**YARN, "mscale": 1.0, "mscale_all_dim": 1.0})
    check_scaling({**YARN, "factor": 8.0, "attention_factor": 1.2079441541679836})


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
