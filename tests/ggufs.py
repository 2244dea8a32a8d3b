"""Small GGUF files of the Llama architecture, written by the package `gguf`."""

from __future__ import annotations

from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGUFValueType as Value
from mlx.utils import tree_flatten

HEADS, KV_HEADS, D = 3, 1, 8
CONFIG = {
    "model_type": "llama",
    "vocab_size": 262,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": D,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "tie_word_embeddings": True,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
Tensors = dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]
"""name -> (raw bytes, uint8 [rows, bytes of a row], or an array; type of its blocks)"""


def metadata(config: dict) -> dict:
    """The fields of a config.json, as llama.cpp's converter writes them."""
    return {
        "llama.block_count": config["num_hidden_layers"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.key_length": config["head_dim"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": config["rope_theta"],
    }


def byte_level() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def bpe_metadata() -> dict:
    tokens = ["<end>", *byte_level(), "he", "ll", "hell", "hello", "Ġhello"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["h e", "l l", "he ll", "hell o", "Ġ hello"],
        "tokenizer.ggml.token_type": [3] + [1] * 261,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}<end>{% endfor %}",
    }


def neighbours_first(x, d: int):
    """Rows of q or k as llama.cpp has them, said with an index for each row.

    Pair i is the rows i and i + d/2 of a head, side by side.
    """
    rows = []
    for head in range(len(x) // d):
        for pair in range(d // 2):
            rows += [head * d + pair, head * d + pair + d // 2]
    return x[np.array(rows)]


def name_of(name: str) -> str:
    """llama.cpp's name of a parameter of mlx-lm's llama."""
    part, _, kind = name.rpartition(".")
    layer = ""
    if name.startswith("model.layers."):
        _, _, i, part = part.split(".", 3)
        layer = f"blk.{i}."
    return f"{layer}{NAMES[part]}.{kind}"


def tensors(model, d: int = D) -> Tensors:
    """The weights of a model of mlx-lm's llama."""
    out = {}
    for name, x in tree_flatten(model.parameters()):
        y = np.array(x.astype(mx.float32))
        if name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
            y = neighbours_first(y, d)
        out[name_of(name)] = y, gguf.GGMLQuantizationType.F32
    return out


def write(file: Path, tensors: Tensors, metadata: dict) -> Path:
    """Values of metadata that are None are left out."""
    metadata = {"general.architecture": "llama", **metadata}
    writer = gguf.GGUFWriter(str(file), metadata["general.architecture"])
    for name, value in metadata.items():
        if name != "general.architecture" and value is not None:
            _add(writer, name, value)
    for name, (x, kind) in tensors.items():
        writer.add_tensor(name, x, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add(writer: gguf.GGUFWriter, name: str, value) -> None:
    kinds = {bool: Value.BOOL, int: Value.UINT32, float: Value.FLOAT32, str: Value.STRING}
    if isinstance(value, list):
        writer.add_key_value(name, value, Value.ARRAY, kinds[type(value[0])])
    else:
        writer.add_key_value(name, value, kinds[type(value)])
