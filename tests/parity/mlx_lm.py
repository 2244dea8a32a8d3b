"""mlx-lm's architectures, wrapped, against the PyTorch classes of transformers.

Tiny models with random weights are built by transformers, saved by its save_pretrained, converted
and compared. Shapes are odd on purpose: one KV head, Dk != Dv, 61 tokens.
Where mlx-lm and transformers differ and no test here can make them agree:
- Nemotron-H: transformers bounds the time step from below (time_step_min, 0.001) in chunks and
  not in single steps; mlx-lm takes time_step_limit in both. The weights here stay above it.
- transformers 5.23 splits OLMo-hybrid's convolution into three equal parts when it saves, so the
  keys and values here are of one width, with Dk != Dv by their numbers of heads.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mlx_sleep.convert import pipeline
from mlx_sleep.models.load import load_model

from .cases import AWAKE, CASES, Pair
from .fla import WINDOW, randomize

_BASE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "pad_token_id": None,
}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 8,
}
_QWEN = {**_BASE, **_DELTA, "full_attention_interval": 2, "head_dim": 8}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 12,
    "mamba_d_state": 10,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
_NEMOTRON = {
    **{name: value for name, value in _BASE.items() if name != "num_hidden_layers"},
    "model_type": "nemotron_h",
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"],
    "mamba_num_heads": 4,
    "mamba_head_dim": 12,
    "ssm_state_size": 10,
    "n_groups": 2,
    "chunk_size": 8,
    "head_dim": 8,
    "n_routed_experts": 4,
    "moe_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 12,
    "routed_scaling_factor": 1.5,
}
_GRANITE = {
    **_BASE,
    **_MAMBA,
    "model_type": "granitemoehybrid",
    "layer_types": ["mamba", "attention"],
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
    "shared_intermediate_size": 20,
}
_FALCON = {
    **_BASE,
    **_MAMBA,
    "model_type": "falcon_h1",
    "num_hidden_layers": 2,
    "head_dim": 8,
    "mamba_d_ssm": 48,
    "attention_in_multiplier": 1.3,
    "attention_out_multiplier": 0.9,
    "key_multiplier": 0.4,
    "embedding_multiplier": 2.5,
    "lm_head_multiplier": 0.6,
    "mlp_multipliers": [0.8, 0.6],
    "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.5,
    "ssm_multipliers": [0.9, 0.7, 0.8, 1.1, 0.6],
}
_SLIDING = {"eviction": "sliding"}

CONFIGS: dict[str, list[tuple[dict, dict]]] = {
    # architecture: (config for transformers, how it sleeps)
    "qwen3_next": [
        (
            {
                **_QWEN,
                "model_type": "qwen3_next",
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 20,
                "shared_expert_intermediate_size": 12,
            },
            {},
        )
    ],
    "qwen3_5": [
        ({**_QWEN, "model_type": "qwen3_5_text"}, {}),
        (
            {
                **_QWEN,
                "model_type": "qwen3_5_text",
                "linear_num_key_heads": 1,
                "linear_num_value_heads": 1,
                "linear_key_head_dim": 96,
                "linear_value_head_dim": 256,
                "tie_word_embeddings": True,
            },
            _SLIDING,
        ),
    ],
    "olmo_hybrid": [
        ({**_BASE, **_DELTA, "model_type": "olmo_hybrid", "linear_value_head_dim": 6}, {}),
        (
            {
                **_BASE,
                **_DELTA,
                "model_type": "olmo_hybrid",
                "linear_value_head_dim": 6,
                "linear_allow_neg_eigval": False,
                "tie_word_embeddings": True,
                "rope_parameters": {"rope_theta": None, "rope_type": "default"},
            },
            _SLIDING,
        ),
    ],
    "nemotron_h": [
        (_NEMOTRON, {}),
        ({**_NEMOTRON, "layers_block_type": ["mamba", "attention"]}, _SLIDING),
    ],
    "granitemoehybrid": [
        ({**_GRANITE, "num_local_experts": 4, "position_embedding_type": "rope"}, {}),
        ({**_GRANITE, "num_local_experts": 0, "tie_word_embeddings": True}, _SLIDING),
    ],
    "falcon_h1": [
        (_FALCON, {}),
        ({**_FALCON, "mamba_rms_norm": True, "tie_word_embeddings": True}, _SLIDING),
    ],
    "llama": [({**_BASE, "model_type": "llama"}, {})],
    "qwen2": [({**_BASE, "model_type": "qwen2", "tie_word_embeddings": True}, {})],
    "qwen3": [({**_BASE, "model_type": "qwen3", "head_dim": 8}, {})],
}
ARCHITECTURES = tuple(CONFIGS)
SEED = 11


def pairs(architecture: str, rng: np.random.Generator) -> Iterator[Pair]:
    """The pair of each of the architecture's configs above."""
    for n in range(len(CONFIGS[architecture])):
        yield build(architecture, n, rng)


def build(architecture: str, n: int, rng: np.random.Generator) -> Pair:
    """The pair of one of CONFIGS, with fresh weights."""
    import transformers

    from mlx_sleep.convert.torch.mlx_lm import Reference

    config, sleep = CONFIGS[architecture][n]
    sleep = {"window": WINDOW, **sleep}
    theirs = Reference(config, sleep)
    _randomize(theirs.net, rng)
    with tempfile.TemporaryDirectory() as folder:
        theirs.net.save_pretrained(folder)
        ours = converted(Path(folder), sleep)
    name = f"transformers {transformers.__version__}, {type(theirs.net).__name__}"
    return Pair(architecture, name, ours, theirs, CASES if ours.has_fast_weights else AWAKE)


def converted(folder: Path, sleep: dict):
    """Our model of a checkpoint, by way of a converted folder."""
    with tempfile.TemporaryDirectory() as place:
        pipeline.convert(folder, Path(place) / "ours", sleep=sleep)
        model, _ = load_model(Path(place) / "ours")
    return model


def _randomize(net, rng: np.random.Generator) -> None:
    """As `fla.randomize`, with what transformers' models have besides.

    Layers of the delta rule write less into h than they read: three passes would else blow
    rounding up to 1e-4.
    """
    import torch

    randomize(net, rng)
    delta = net.config.model_type if hasattr(net.config, "linear_num_key_heads") else ""
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim == 3 and "conv" not in name:  # experts, each a matrix
                p.mul_(p.shape[1] ** 0.5)
            if delta and re.search(_WRITES, name):
                p.mul_(0.5)
            if "qwen" in delta and re.search(_AROUND_0, name):
                p.sub_(1)  # these scale by 1 + w
        for name, b in net.named_buffers():
            if name.endswith("e_score_correction_bias"):
                b.copy_(torch.from_numpy(rng.normal(size=b.shape) * 0.1))


_WRITES = r"o_proj|out_proj|down_proj|lm_head|post_feedforward_layernorm|post_attention_layernorm"
_AROUND_0 = r"layernorm|model\.norm|[qk]_norm"
