"""Small checkpoints with PyTorch's names, for tests of the converter."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import typer
from mlx.utils import tree_flatten
from typer.testing import CliRunner

from mlx_sleep.cli import convert as convert_command
from mlx_sleep.convert.architectures import for_source
from mlx_sleep.models.load import build

CONFIG = {
    "model_type": "sleep_hybrid",
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,
    "layer_types": ["attention", "gated_deltanet", "mamba2"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "tie_word_embeddings": False,
    "sleep": {"passes": 2, "window": 32, "eviction": "hard"},
    "eos_token_id": 3,
}
FLA = {
    "model_type": "gated_deltanet",
    "vocab_size": 37,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "head_dim": 6,
    "expand_v": 1.5,
    "intermediate_size": 20,
    "attn": {"layers": [1], "num_heads": 3, "num_kv_heads": 1},
    "tie_word_embeddings": False,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 20,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
GRANITE = {
    "model_type": "granitemoehybrid",
    "vocab_size": 37,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 20,
    "shared_intermediate_size": 20,
    "layer_types": ["mamba", "attention"],
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "mamba_n_heads": 4,
    "mamba_d_head": 12,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 0.25,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "max_position_embeddings": 128,
    "attention_bias": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def random_weights(config: dict) -> dict[str, mx.array]:
    """Weights by PyTorch's names for a PyTorch config, none of them zero or one."""
    architecture = for_source(config["model_type"])
    ours = {**architecture.config(dict(config)), "model_type": architecture.model_type}
    weights = {
        name: (0.2 * mx.random.normal(x.shape)).astype(x.dtype)
        for name, x in tree_flatten(build(ours).parameters())
    }
    if architecture.unsanitize:
        return architecture.unsanitize(ours, weights)
    return dict(architecture.to_theirs(name, x) for name, x in weights.items())


def write(folder: Path, config: dict, weights: dict[str, mx.array]) -> Path:
    """A folder as transformers writes it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    return folder


def run_command(*arguments: str):
    """`mlx-sleep convert` in this process."""
    app = typer.Typer()
    app.command()(convert_command.convert)
    return CliRunner().invoke(app, list(arguments))
