"""Ouro (ByteDance/Ouro-1.4B, Ouro-2.6B): our parameters carry the checkpoints' names."""

from __future__ import annotations

from typing import Any

from ...utils.errors import UserError
from .base import Architecture

_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "hidden_act",
    "layer_types",
    "max_position_embeddings",
    "total_ut_steps",
    "early_exit_threshold",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "sleep_layers",
)


def _config(theirs: dict) -> dict:
    # transformers 5 puts the base into rope_parameters.
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError("an Ouro checkpoint with scaled RoPE is not known; convert one without")
    ours: dict[str, Any] = {"model_type": "ouro"}
    ours.update((name, theirs[name]) for name in _FIELDS if theirs.get(name) is not None)
    ours["rope_theta"] = theirs.get("rope_theta") or rope.get("rope_theta", 10_000.0)
    if theirs.get("use_sliding_window") and not theirs.get("layer_types"):
        first = theirs.get("max_window_layers", 28)
        blocks = range(theirs["num_hidden_layers"])
        ours["layer_types"] = [f"{'full' if i < first else 'sliding'}_attention" for i in blocks]
    if "sliding_attention" in ours.get("layer_types", ()) and theirs.get("sliding_window"):
        ours["sliding_window"] = theirs["sliding_window"]
    return ours


ARCHITECTURE = Architecture(
    model_type="ouro",
    sources=("ouro",),
    config=_config,
    dropped=(r".*rotary_emb\.inv_freq",),
)
