"""The fields of config.json and generation_config.json that are read here, and their types.

An architecture's own fields are in its ModelArgs, or in mlx-lm's. What several have, and what the
converter reads, is checked here before anything computes with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ..utils import limits, schema
from ..utils.errors import UserError
from ..utils.files import read_json
from ..utils.schema import Count, CountOrZero, Layers, Positive, Range, Vocabulary

_Ids = int | list[int]  # -1 is none in old configs
_Kinds = Annotated[list[str], Range(0, limits.LAYERS)]
_EachLayer = Annotated[list, Range(0, limits.LAYERS)]  # some models have a size for each layer


@dataclass
class Fields:
    """Fields that have one meaning in every config.json, and may be absent or null."""

    text_config: Fields | None = None
    vocab_size: Vocabulary | None = None
    hidden_size: Count | None = None
    intermediate_size: CountOrZero | _EachLayer | None = None
    num_hidden_layers: Layers | None = None
    num_layers: Layers | None = None
    n_layers: Layers | None = None
    n_layer: Layers | None = None
    layer_types: _Kinds | None = None
    layers_block_type: _Kinds | None = None
    hybrid_override_pattern: Annotated[str, Range(1, limits.LAYERS)] | _Kinds | None = None
    full_attention_interval: Count | None = None
    num_attention_heads: Count | _EachLayer | None = None
    num_key_value_heads: CountOrZero | _EachLayer | None = None
    head_dim: CountOrZero | None = None
    hidden_act: str | None = None
    rms_norm_eps: Positive | str | None = None
    max_position_embeddings: Annotated[int, Range(1, 2**40)] | None = None
    max_window_layers: int | None = None
    use_sliding_window: bool | None = None
    sliding_window: int | None = None
    rope_theta: Positive | None = None
    rope_scaling: dict | None = None
    rope_parameters: dict | None = None
    num_experts: CountOrZero | None = None
    num_local_experts: CountOrZero | None = None
    shared_intermediate_size: CountOrZero | None = None
    linear_num_key_heads: Count | None = None
    linear_key_head_dim: Count | None = None
    mamba_expand: Positive | None = None
    mamba_n_heads: Count | None = None
    mamba_n_groups: Count | None = None
    mamba_d_ssm: Count | None = None
    mamba_d_state: Count | None = None
    mamba_d_head: Count | str | None = None
    mamba_rms_norm: bool | None = None
    mlp_multipliers: list[float] | None = None
    ssm_multipliers: list[float] | None = None
    attention_in_multiplier: float | None = None
    attention_out_multiplier: float | None = None
    embedding_multiplier: float | None = None
    key_multiplier: float | None = None
    lm_head_multiplier: float | None = None
    ssm_in_multiplier: float | None = None
    ssm_out_multiplier: float | None = None
    position_embedding_type: str | None = None
    use_bias: bool | None = None
    time_step_limit: list | dict | None = None
    tie_word_embeddings: bool | None = None
    bos_token_id: _Ids | None = None
    eos_token_id: _Ids | None = None
    pad_token_id: _Ids | None = None
    efficient_attention_config: dict | None = None
    quantization: dict | None = None
    quantization_config: dict | None = None
    sleep: dict | None = None
    sleep_training: dict | None = None
    sleep_layers: Annotated[list[dict], Range(0, limits.LAYERS)] | None = None
    source_config: dict | None = None
    fingerprint: str | None = None


@dataclass
class Quantization:
    """How MLX quantized weights: the field `quantization`, or a layer's own entry in it."""

    group_size: Annotated[int, Range(1, 2**16)]
    bits: Annotated[int, Range(1, 16)]
    mode: str = "affine"


@dataclass
class Generation:
    """Of generation_config.json."""

    bos_token_id: _Ids | None = None
    eos_token_id: _Ids | None = None
    pad_token_id: _Ids | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, Range(0)] | None = None
    top_p: Annotated[float, Range(0, 1)] | None = None
    top_k: CountOrZero | None = None
    min_p: Annotated[float, Range(0, 1)] | None = None
    repetition_penalty: Positive | None = None

    @property
    def eos_token_ids(self) -> list[int] | None:
        """The ids that end a reply; None where the file doesn't say."""
        ids = self.eos_token_id
        return [ids] if isinstance(ids, int) else ids


def read_config(path: Path) -> dict:
    """The contents of config.json, with the types of `Fields`. UserError when there is none."""
    if not path.is_dir():
        raise UserError(f"no model folder at {path}; give the path of a folder with a config.json")
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path} has no config.json: it is not a model folder")
    config = read_json(file)
    with schema.naming(file):
        schema.read(Fields, config)
    return config


def read_generation_config(path: Path, over: dict | None = None) -> Generation:
    """Of the folder's generation_config.json, with the fields `over` it; empty without either."""
    file = path / "generation_config.json"
    fields = read_json(file) if file.is_file() else {}
    with schema.naming(file):
        return schema.read(Generation, {**fields, **(over or {})})


def check_quantization(quantization: Any) -> Quantization:
    """The field `quantization`. UserError where it or a layer's entry in it has a wrong type."""
    common = schema.read(Quantization, quantization, "quantization.")
    for name, entry in quantization.items():
        if name not in ("group_size", "bits", "mode") and isinstance(entry, dict):
            schema.read(Quantization, entry, f"quantization.{name}.")
    return common
