"""GGUF files of the Llama architecture, as folders of mlx-lm's `llama`.

The tensors are rewritten as safetensors, which MLX reads lazily; MLX's own reader of GGUF trusts
the header and gets some types of blocks wrong.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..utils.errors import UserError
from ..utils.safetensors import Entry, load, write_file
from . import gguf_blocks, gguf_file, gguf_tokenizer

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
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
_ROPE_FREQS = "rope_freqs.weight"

# Fields under `llama.rope.` and `llama.attention.` that are read below; another one would change
# the result.
_KNOWN = {
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scale_linear",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "attention.key_length",
    "attention.value_length",
}


@dataclass
class Read:
    """What a GGUF holds.

    config   config.json of mlx-lm's llama
    tensors  name -> lazy array, with mlx-lm's names and shapes
    origins  name -> name in the file
    how      name -> what was done to its values, where something was
    files    all parts of a split model
    notes    what was found and ignored
    """

    config: dict
    tensors: dict[str, mx.array]
    origins: dict[str, str]
    how: dict[str, str]
    files: list[Path]
    notes: list[str] = field(default_factory=list)


def read(file: Path, folder: Path, *, keep_blocks: bool = True) -> Read:
    """Read a GGUF, or all parts of a split one. Tensors and tokenizer are written into `folder`.

    keep_blocks  leave weights quantized where MLX has the same layout

    UserError, in one line, for anything that is wrong with it or can't be expressed.
    """
    metadata, tensors, files = gguf_file.read(file)
    if metadata.get("general.type") == "adapter":
        raise UserError(
            f"{file} is a LoRA adapter, not a model; merge it into its base model with llama.cpp's "
            "llama-export-lora and convert the result"
        )
    if (kind := metadata.get("general.architecture")) != "llama":
        raise UserError(
            f"{file} holds a model of architecture {kind!r}; only llama, which Mistral's are too, "
            "can be read from GGUF; convert the PyTorch model"
        )
    config = _Config(file, metadata, tensors).read()
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    entries: list[Entry] = []
    origins: dict[str, str] = {}
    how: dict[str, str] = {}
    quantized = {}
    for name, tensor in tensors.items():
        if name == _ROPE_FREQS:
            continue
        layer, part, projection = _rename(name)
        order = None
        if count := heads.get(projection):
            order = _halves_first(name, tensor, count, file)
        try:
            made = gguf_blocks.entries(layer, part, tensor, keep_blocks, order)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        origins.update({entry.name: name for entry in made})
        if len(made) > 1:
            quantized[layer] = gguf_blocks.AFFINE[tensor.kind]
        elif tensor.kind not in gguf_blocks.AS_THEY_ARE:
            how[made[0].name] = "dequantized"
        entries += made
    if len(origins) < len(entries):
        raise UserError(f"{file} has one tensor under two names; download it again")
    if quantized:
        config["quantization"] = _quantization(quantized)
    notes = gguf_tokenizer.write(metadata, folder, file)
    staged = folder / f"{file.name}.safetensors"
    write_file(staged, entries, "mlx")
    arrays, _ = load(staged)
    ordered = {name: arrays.pop(name) for name in origins}  # as they lie on disk
    return Read(config, ordered, origins, how, files, notes)


class _Config:
    """The metadata `llama.*` as a config.json, each value held against its kind and the tensors."""

    def __init__(self, file: Path, metadata: dict, tensors: dict[str, gguf_file.Tensor]):
        self.file, self.metadata, self.tensors = file, metadata, tensors

    def read(self) -> dict:
        """The config. UserError for a missing or senseless value, or one that isn't understood."""
        self._check_known()
        heads, width = self._count("attention.head_count"), self._count("embedding_length")
        layers = self._count("block_count")
        # A damaged count could be so large that no model of it can be built.
        found = {match[1] for name in self.tensors if (match := re.match(r"blk\.(\d+)\.", name))}
        if layers != len(found):
            raise UserError(
                f"{self.file} has tensors of {len(found)} layers, but llama.block_count is "
                f"{layers}; download it again"
            )
        embedding = self.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise UserError(f"{self.file} has no token_embd.weight; download it again")
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        rows = embedding.shape[0]
        if isinstance(tokens, list) and len(tokens) > rows:
            raise UserError(
                f"{self.file} has {len(tokens)} tokens and an embedding of {rows}; download it "
                "again"
            )
        head_dim = self._count("attention.key_length", width // heads)
        config: dict[str, Any] = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": self._count("vocab_size", rows),
            "hidden_size": width,
            "intermediate_size": self._count("feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": self._count("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": self._count("context_length"),
            "rms_norm_eps": _shortest(self._positive("attention.layer_norm_rms_epsilon")),
            "rope_theta": _shortest(self._positive("rope.freq_base", 10_000.0)),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "attention_bias": any(name.endswith("attn_q.bias") for name in self.tensors),
            "mlp_bias": any(name.endswith("ffn_up.bias") for name in self.tensors),
            "hidden_act": "silu",
        }
        for name in ("rope.dimension_count", "attention.value_length"):
            if (other := self._count(name, head_dim)) != head_dim:
                raise UserError(
                    f"{self.file}: llama.{name} {other} beside heads of {head_dim} cannot be read"
                )
        if scaling := self._rope_scaling(config["rope_theta"], head_dim):
            config["rope_scaling"] = scaling
        for name in ("bos", "eos"):
            if (token := self.metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None:
                config[f"{name}_token_id"] = token
        return config

    def _check_known(self) -> None:
        for name in self.metadata:
            kind, _, rest = name.partition(".")
            if kind == "llama" and rest.startswith(("rope.", "attention.")) and rest not in _KNOWN:
                raise UserError(f"{self.file}: {name} cannot be read; convert the PyTorch model")
        if self.metadata.get("llama.expert_count"):
            raise UserError(f"{self.file} is a mixture of experts, which cannot be read from GGUF")

    def _rope_scaling(self, theta: float, head_dim: int) -> dict | None:
        """`rope_scaling` of config.json. Frequencies that the file lists are those of llama3."""
        freqs = self.tensors.get(_ROPE_FREQS)
        factor = self._positive("rope.scaling.factor", self._positive("rope.scale_linear", 1.0))
        kind = self.metadata.get("llama.rope.scaling.type", "linear" if factor != 1.0 else "none")
        if kind not in ("none", "linear"):
            raise UserError(
                f"{self.file}: llama.rope.scaling.type {kind!r} cannot be read; convert the "
                "PyTorch model"
            )
        linear = kind == "linear" and factor != 1.0
        if freqs is None:
            return {"rope_type": "linear", "factor": factor} if linear else None
        if freqs.kind != gguf_file.GGMLQuantizationType.F32 or freqs.shape != (head_dim // 2,):
            raise UserError(f"{self.file} has a damaged {_ROPE_FREQS}; download it again")
        divisors = np.ascontiguousarray(freqs.raw).view(np.float32)[0].astype(np.float64)
        if np.all(divisors == 1.0) and not linear:
            return None
        scaling = fit_llama3(divisors, theta)
        if scaling is None or linear:
            raise UserError(
                f"{self.file}: {_ROPE_FREQS} is no scaling of Llama 3.1's kind; convert the "
                "PyTorch model"
            )
        return scaling

    def _get(self, name: str, default: Any) -> Any:
        value = self.metadata.get(f"llama.{name}", default)
        if value is None:
            raise UserError(f"{self.file} lacks the metadata llama.{name}; download it again")
        return value

    def _count(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise UserError(f"{self.file}: llama.{name} must be a whole number, not {value!r:.60}")
        return value

    def _positive(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise UserError(f"{self.file}: llama.{name} must be positive, not {value!r:.60}")
        return float(value)


def fit_llama3(divisors: np.ndarray, theta: float) -> dict | None:
    """`rope_scaling` of type llama3 whose frequencies are theta's over `divisors` [head_dim / 2].

    llama.cpp writes only what it came to: 1 for short waves, `factor` for long ones, and between
    them 1 / divisor is linear in the frequency. low_freq_factor, high_freq_factor and the original
    length matter only as ratios, so low_freq_factor is taken as 1. None where no such scaling
    gives these numbers.
    """
    count = len(divisors)
    waves = 2 * np.pi * theta ** (np.arange(count) / count)
    factor = float(divisors.max())
    between = (divisors > 1.0) & (divisors < factor)
    if not np.all(np.isfinite(divisors)) or divisors.min() < 1.0 or between.sum() < 2:
        return None
    smooth = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
    # smooth = (original / wave - low) / (high - low), with low = 1
    slope, constant = np.polyfit(1 / waves[between], smooth, 1)
    if not constant < 0 < slope:
        return None
    high = 1 - 1 / constant
    original = round(slope * (high - 1))
    high = round(high, 2)
    low_wave, high_wave = original, original / high
    smooth = (original / waves - 1) / (high - 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    expected = np.where(waves > low_wave, factor, np.where(waves < high_wave, 1.0, expected))
    if not np.allclose(expected, divisors, rtol=1e-4, atol=0):
        return None
    return {
        "rope_type": "llama3",
        "factor": _shortest(factor),
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _shortest(x: float) -> float:
    """The shortest decimal of a float32: 1e-05 for 9.999999747378752e-06."""
    return float(f"{x:.7g}")


def _rename(name: str) -> tuple[str, str, str]:
    """(mlx-lm's layer, weight or bias, llama.cpp's name of the part)."""
    if match := _NAME.fullmatch(name):
        layer, part, kind = match.groups()
        if layer is None and part in _TOP:
            return _TOP[part], kind, part
        if layer is not None and part in _LAYER:
            return f"model.layers.{layer}.{_LAYER[part]}", kind, part
    layer, _, kind = name.rpartition(".")
    return layer, kind, ""  # refused later, as a tensor that the model doesn't have


def _halves_first(name: str, tensor: gguf_file.Tensor, heads: int, file: Path) -> np.ndarray:
    """The order that brings rows of q or k from pairs (0, 1), (2, 3), ... to (0, d/2), ...

    llama.cpp rotates neighbours, PyTorch and MLX rotate halves. Blocks lie within rows.
    """
    rows = tensor.shape[0]
    if rows % (2 * heads) or tensor.raw.nbytes % rows:
        raise UserError(f"{file}: {name} does not fit {heads} heads; download it again")
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _quantization(bits: dict[str, int]) -> dict:
    """The field `quantization` of config.json: the most common kind, and layers of another kind."""

    def kind(of: int) -> dict:
        return {"group_size": gguf_blocks.GROUP_SIZE, "bits": of, "mode": "affine"}

    counts = list(bits.values())
    most = max(set(counts), key=counts.count)
    return {**kind(most), **{layer: kind(x) for layer, x in bits.items() if x != most}}
