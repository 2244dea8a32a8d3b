"""The base model of a retrofit, read from a folder: config, weights, tokenizer.

A folder is Hugging Face's (config.json, safetensors) or one that `mlx-sleep convert` wrote, whose
weights may be quantized. Weights get Hugging Face's names. Needs no transformers and no MLX.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from ...utils import schema
from ...utils.errors import UserError
from ...utils.files import read_json
from ...utils.schema import Count, CountOrZero, Layers, Positive, Vocabulary


@dataclass(frozen=True)
class BaseConfig:
    """A Llama-like model: the fields of config.json that its computation needs.

    weights: the digest of the folder's weights by which an adapter knows its base (`weights_digest`
    in mlx_sleep/models/weights.py). fingerprint: of the folder, for adapters without. Both are ""
    when nobody computed one. name: of the folder.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    fingerprint: str = ""
    name: str = ""
    weights: str = ""

    @classmethod
    def from_folder(cls, folder: Path) -> BaseConfig:
        """UserError where the model is not what the trainer knows: Llama, tied, no biases."""
        config = read_json(folder / "config.json")
        wrong = [
            f"{key} {config.get(key)!r}"
            for key, known in (
                ("model_type", ("llama",)),
                ("hidden_act", (None, "silu")),
                ("attention_bias", (None, False)),
                ("mlp_bias", (None, False)),
                ("tie_word_embeddings", (True,)),
                ("rope_scaling", (None,)),
            )
            if config.get(key) not in known
        ]
        if wrong:
            raise UserError(
                f"{folder} cannot be retrofitted ({', '.join(wrong)}); the trainer takes Llama "
                "models with tied embeddings, without biases and without scaled rotary embeddings"
            )
        with schema.naming(folder / "config.json"):
            read = schema.read(_Fields, config)
        heads, rope = read.num_attention_heads, read.rope_parameters.get("rope_theta")
        return cls(
            read.vocab_size,
            read.hidden_size,
            read.intermediate_size,
            read.num_hidden_layers,
            heads,
            read.num_key_value_heads or heads,
            read.head_dim or read.hidden_size // heads,
            float(read.rope_theta or rope or 10_000.0),
            read.rms_norm_eps,
            read.fingerprint,
            folder.resolve().name,
        )


@dataclass
class _Fields:
    """What is read of config.json, with transformers' defaults."""

    vocab_size: Vocabulary
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Layers
    num_attention_heads: Count
    num_key_value_heads: CountOrZero = 0
    head_dim: CountOrZero = 0
    rope_theta: Positive | None = None
    rope_parameters: dict[str, Any] = field(default_factory=dict)
    rms_norm_eps: Positive = 1e-6
    fingerprint: str = ""


def read_weights(folder: Path, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Name -> tensor of `dtype`; quantized matrices are written out. UserError when unreadable."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"no .safetensors file in {folder}; convert the model first")
    quantization = read_json(folder / "config.json").get("quantization", {})
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                tensors.update((name, opened.get_tensor(name)) for name in opened.keys())
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {file} ({error}); convert the model again") from error
    return {name: x.to(dtype) for name, x in dense(tensors, quantization).items()}


def dense(tensors: dict[str, torch.Tensor], quantization: dict) -> dict[str, torch.Tensor]:
    """The tensors with quantized matrices written out. quantization: as in config.json."""
    weights = {}
    for name, x in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind in ("scales", "biases"):
            continue
        if f"{layer}.scales" in tensors:
            settings = quantization.get(layer, quantization)
            scales, biases = (tensors[f"{layer}.{part}"].float() for part in ("scales", "biases"))
            x = dequantize(x, scales, biases, settings["bits"])
        weights[name] = x
    return weights


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer.json of a folder. UserError where there is none, or it's damaged."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} has no tokenizer.json; convert the model again")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"cannot read {path} ({error}); convert the model again") from error


def dequantize(packed, scales, biases, bits: int):
    """MLX's affine quantization written out: float32 [R, C].

    packed [R, C * bits / 32] uint32, the lowest bits first; scales, biases [R, C / group].
    """
    if 32 % bits:
        raise UserError(f"weights of {bits} bits cannot be read; convert with 2, 4 or 8")
    shifts = torch.arange(0, 32, bits)
    values = (packed.view(torch.int32)[..., None] >> shifts) & (2**bits - 1)
    values = values.reshape(*scales.shape, -1)
    return (values * scales[..., None] + biases[..., None]).reshape(packed.shape[0], -1)
