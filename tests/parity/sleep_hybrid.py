"""sleep_hybrid against its PyTorch definition, on the same random weights.

The checkpoint goes through a file and the whole converter. PyTorch computes in float64.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mlx_sleep.convert.pipeline import convert
from mlx_sleep.models.load import load_model

from .cases import Pair

ARCHITECTURES = ("sleep_hybrid",)
REFERENCE = "this project's PyTorch definition, in float64"
SEED = 5
WINDOW = 9

_SHARED = {
    "model_type": "sleep_hybrid",
    "vocab_size": 61,
    "hidden_size": 36,
    "intermediate_size": 44,
    "layer_types": ["gated_deltanet", "attention", "mamba2", "attention", "gated_deltanet"],
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "mamba_num_heads": 4,
    "mamba_n_groups": 2,
    "mamba_head_dim": 10,
    "ssm_state_size": 7,
}
CONFIGS = (
    {
        **_SHARED,
        "head_dim": 10,
        "tie_word_embeddings": False,
        "sleep": {"window": WINDOW, "eviction": "hard", "loop_range": [1, 4]},
    },
    {
        **_SHARED,
        "qk_norm": False,
        "hidden_act": "gelu",
        "linear_conv_kernel_dim": 3,
        "sleep": {"window": WINDOW, "eviction": "sliding"},
    },
)
"""One KV head, Dk unlike Dv, several value heads a key head, odd sizes, tied and untied."""


def pairs(architecture: str, rng: np.random.Generator) -> Iterator[Pair]:
    """The pair of each of CONFIGS."""
    for config in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = build(config, rng, Path(folder))
        yield Pair(architecture, REFERENCE, ours, theirs)


def build(config: dict, rng: np.random.Generator, folder: Path):
    """(ours, theirs) with the same random weights; ours went through `folder`."""
    import torch
    from safetensors.torch import save_model

    from mlx_sleep.convert.torch.sleep_hybrid import SleepHybrid

    torch.manual_seed(int(rng.integers(2**31)))
    theirs = SleepHybrid(config)
    with torch.no_grad():
        for name, x in theirs.named_parameters():
            if x.ndim == 1 and not name.endswith(("A_log", "dt_bias")):
                x.add_(0.3 * torch.randn_like(x))  # norms and biases that would hide a mix-up
    (folder / "torch").mkdir()
    save_model(theirs, str(folder / "torch" / "model.safetensors"))
    (folder / "torch" / "config.json").write_text(json.dumps(config))
    convert(folder / "torch", folder / "ours")
    return load_model(folder / "ours")[0], theirs.double()
