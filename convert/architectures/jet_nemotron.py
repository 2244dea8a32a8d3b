"""Jet-Nemotron: our parameters have the names and shapes of the published checkpoints."""

from __future__ import annotations

from ...utils.errors import UserError
from .base import Architecture

_FIELDS = (
    "bos_token_id",
    "efficient_attention_config",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
)


def config(theirs: dict) -> dict:
    """Their config.json -> ours: the same fields, less those that choose PyTorch code."""
    rope = theirs.get("rope_parameters") or {}  # where transformers 5 writes what was two fields
    scaling = theirs.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or rope.get("rope_type") or "default"
    if kind != "default":
        raise UserError(f"rope_type {kind!r} of jet_nemotron is not known; only default RoPE is")
    layers, types = theirs.get("num_hidden_layers"), theirs.get("layer_types") or []
    if layers is not None and layers != len(types):
        raise UserError(f"num_hidden_layers is {layers}, but layer_types names {len(types)} layers")
    if "rope_theta" in rope:
        theirs = {**theirs, "rope_theta": rope["rope_theta"]}
    return {name: theirs[name] for name in _FIELDS if name in theirs}


def loop_range(config: dict) -> tuple[int, int] | None:
    """The middle half of the blocks, as in arXiv 2605.26099: [7, 21) of the 28 of the 2B."""
    layers = len(config["layer_types"])
    outside = layers // 4
    return (outside, layers - outside) if outside else None


ARCHITECTURE = Architecture(
    model_type="jet_nemotron",
    sources=("jet_nemotron",),
    config=config,
    loop_range=loop_range,
    dropped=(r".*rotary_emb\.inv_freq",),
)
