"""GGUF files of the Llama architecture, as folders of mlx-lm's `llama`.

Blocks of Q4_0, Q4_1 and Q8_0 have the layout of MLX's affine quantization in groups of 32 and
stay as they are; MLX reads all other types as float16.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from ..utils.errors import UserError
from ..utils.files import one_line
from . import gguf_tokenizer

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias|scales|biases)")


def read(file: Path, folder: Path) -> tuple[dict, dict[str, mx.array], dict[str, str]]:
    """(config, name -> lazy array, name -> name in the file), with names and shapes of mlx-lm.

    The tokenizer is written into `folder`.
    """
    try:
        loaded = mx.load(str(file), format="gguf", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"MLX cannot read {file} as GGUF: {one_line(error)}") from error
    tensors, found = cast(tuple[dict[str, mx.array], dict[str, Any]], loaded)
    metadata = {name: _plain(value) for name, value in found.items()}
    if (kind := metadata.get("general.architecture")) != "llama":
        raise UserError(f"{file} holds a model of architecture {kind!r}; only llama can be read")
    if "rope_freqs.weight" in tensors or metadata.get("llama.rope.scaling.type", "none") != "none":
        raise UserError(f"{file} scales its rotary embedding, which cannot be read from GGUF")
    try:
        config = _config(metadata, tensors)
    except KeyError as error:
        raise UserError(f"{file} lacks the metadata {error}; download it again") from error
    heads = config["num_attention_heads"], config["num_key_value_heads"]
    ours: dict[str, mx.array] = {}
    origins: dict[str, str] = {}
    for name in list(tensors):
        new = _rename(name)
        x = tensors.pop(name)
        for projection, count in zip((".q_proj.", ".k_proj."), heads, strict=True):
            if projection in new:
                x = _halves_first(x, count)
        ours[new], origins[new] = x, name
    if quantization := _quantization(ours):
        config["quantization"] = quantization
    gguf_tokenizer.write(metadata, folder, file)
    return config, ours, origins


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, mx.array) else value


def _config(metadata: dict, tensors: dict) -> dict:
    get = {k.removeprefix("llama."): v for k, v in metadata.items() if k.startswith("llama.")}
    heads, width = get["attention.head_count"], get["embedding_length"]
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": get.get("vocab_size", len(metadata["tokenizer.ggml.tokens"])),
        "hidden_size": width,
        "intermediate_size": get["feed_forward_length"],
        "num_hidden_layers": get["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": get.get("attention.head_count_kv", heads),
        "head_dim": get.get("attention.key_length", width // heads),
        "max_position_embeddings": get["context_length"],
        "rms_norm_eps": _shortest(get["attention.layer_norm_rms_epsilon"]),
        "rope_theta": get.get("rope.freq_base", 10_000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": any(name.endswith("attn_q.bias") for name in tensors),
        "hidden_act": "silu",
    }
    for name in ("bos", "eos"):
        if (token := metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[f"{name}_token_id"] = token
    return config


def _shortest(x: float) -> float:
    """The shortest decimal of a float32: 1e-05 for 9.999999747378752e-06."""
    return float(f"{x:.7g}")


def _rename(name: str) -> str:
    match = _NAME.fullmatch(name)
    if match:
        layer, part, kind = match.groups()
        if layer is None and part in _TOP:
            return f"{_TOP[part]}.{kind}"
        if layer is not None and part in _LAYER:
            return f"model.layers.{layer}.{_LAYER[part]}.{kind}"
    return name  # refused later, as a tensor that the model doesn't have


def _halves_first(x: mx.array, heads: int) -> mx.array:
    """Rows of q or k from pairs (0, 1), (2, 3), ... to (0, d/2), (1, d/2 + 1), ...

    llama.cpp rotates neighbours, PyTorch and MLX rotate halves. Quantized rows are rows, too.
    """
    rows, *rest = x.shape
    pairs = x.reshape(heads, rows // heads // 2, 2, *rest)
    return pairs.swapaxes(1, 2).reshape(x.shape)


def _quantization(tensors: dict[str, mx.array]) -> dict | None:
    """The field `quantization` of config.json: the most common kind, and layers of another kind."""
    kinds = {}
    for name, scales in tensors.items():
        if name.endswith(".scales"):
            layer = name.removesuffix(".scales")
            bits = tensors[f"{layer}.weight"].shape[-1] // scales.shape[-1]  # 32 in a group
            kinds[layer] = {"group_size": 32, "bits": bits, "mode": "affine"}
    if not kinds:
        return None
    counts = [kind["bits"] for kind in kinds.values()]
    most = max(set(counts), key=counts.count)
    common = {"group_size": 32, "bits": most, "mode": "affine"}
    return {**common, **{layer: kind for layer, kind in kinds.items() if kind["bits"] != most}}
