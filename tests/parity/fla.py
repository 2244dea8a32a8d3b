"""fla_gated_deltanet and fla_mamba2 against PyTorch, over the options of their configs.

The references are fla's definitions in plain PyTorch (`convert.torch.fla`) and, for Mamba-2, the
model of transformers as it is. Weights are random, of no symmetry and without zeros; shapes are
odd.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from mlx_sleep.convert.architectures.base import Architecture
from mlx_sleep.convert.architectures.fla_gated_deltanet import ARCHITECTURE as GATED_DELTANET
from mlx_sleep.convert.architectures.fla_mamba2 import ARCHITECTURE as MAMBA2
from mlx_sleep.models.build import get_model_classes

from .cases import Pair
from .configs import MAMBA2_CONFIG

ARCHITECTURES = (GATED_DELTANET.model_type, MAMBA2.model_type)
SEED = 7
WINDOW = 12
FLA = "flash-linear-attention 0.6.0, its definitions in plain PyTorch"
TRANSFORMERS = "transformers, Mamba2ForCausalLM"

_DELTA = {
    "model_type": "gated_deltanet",
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "head_dim": 6,
    "num_heads": 3,
    "intermediate_size": 20,
    "norm_eps": 1e-6,
}
_MAMBA = {
    "model_type": "mamba2",
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "head_dim": 8,
    "state_size": 10,
    "use_conv_bias": True,
    "norm_eps": 1e-5,
}
_ONE_KV_HEAD = {"num_heads": 4, "num_kv_heads": 1}

CONFIGS: dict[str, tuple[dict, dict]] = {
    # name: (config of the checkpoint, how it sleeps)
    "delta": ({**_DELTA, "attn": {"layers": [0, 2], **_ONE_KV_HEAD}}, {}),
    "delta, bare": (  # no convolutions, no gate, more value heads, negative eigenvalues, tied
        {
            **_DELTA,
            "num_hidden_layers": 4,
            "expand_v": 1.5,
            "num_v_heads": 6,
            "use_short_conv": False,
            "use_gate": False,
            "allow_neg_eigval": True,
            "hidden_act": "powlu",
            "tie_word_embeddings": True,
            "attn": [
                {"layers": [1], "num_heads": 2, "qkv_bias": True, "window_size": 5},
                {"layers": [3], "num_heads": 3, "qk_norm": True, "rope_theta": 300.0},
            ],
        },
        {"loop_range": (1, 3)},
    ),
    "delta, 96 x 256": (
        {
            **_DELTA,
            "num_hidden_layers": 2,
            "head_dim": 96,
            "expand_v": 8 / 3,
            "num_heads": 1,
            "conv_size": 3,
            "conv_bias": True,
            "output_gate_activation": "sigmoid",
            "intermediate_size": None,
            "attn": {"layers": [1], **_ONE_KV_HEAD},
        },
        {"eviction": "sliding"},
    ),
    "mamba": (
        {
            **_MAMBA,
            "n_groups": 2,
            "dt_limit": (0.01, 0.5),
            "attn": {"layers": [1], **_ONE_KV_HEAD, "window_size": 7},
        },
        {},
    ),
    "mamba, biases": (
        {
            **_MAMBA,
            "use_bias": True,
            "use_conv_bias": False,
            "D_has_hdim": True,
            "rmsnorm": False,
            "conv_kernel": 3,
            "tie_word_embeddings": True,
            "attn": {"layers": [0], **_ONE_KV_HEAD},
        },
        {"eviction": "sliding"},
    ),
    "mamba, norm before gate": (
        {**_MAMBA, "n_groups": 3, "use_conv_bias": False, "norm_before_gate": True},
        {},
    ),
    "mamba, transformers": (
        {**MAMBA2_CONFIG, "time_step_limit": (0.0, float("inf"))},
        {},
    ),
}


def pairs(architecture: str, rng: np.random.Generator) -> Iterator[Pair]:
    """The pair of each of the configs above."""
    for name, (config, _) in CONFIGS.items():
        if _architecture(config).model_type == architecture:
            yield build(name, rng)


def _architecture(config: dict) -> Architecture:
    return GATED_DELTANET if config["model_type"] == "gated_deltanet" else MAMBA2


def build(name: str, rng: np.random.Generator) -> Pair:
    """The pair of one of CONFIGS, with fresh weights."""
    from mlx_sleep.convert.torch import fla as fla_torch

    config, sleep = CONFIGS[name]
    sleep = {"window": WINDOW, **sleep}
    from_transformers = "transformers" in name
    if from_transformers:
        theirs = fla_torch.TransformersMamba2(config)
        net = theirs.net
    else:
        theirs = net = fla_torch.Reference(config, sleep)
    randomize(net, rng)
    tensors = {name: x.detach().numpy() for name, x in net.state_dict().items()}
    return Pair(
        architecture=_architecture(config).model_type,
        reference=TRANSFORMERS if from_transformers else FLA,
        theirs=theirs,
        ours=converted(config, sleep, tensors),
    )


def converted(config: dict, sleep: dict, tensors: dict[str, np.ndarray]):
    """Our model of a checkpoint: the architecture's mapping, and every tensor accounted for."""
    architecture = _architecture(config)
    model_class, args_class = get_model_classes(architecture.model_type)
    ours = architecture.config(config)
    model = model_class(args_class.from_dict({**ours, "sleep": sleep}))
    weights = [architecture.to_ours(n, mx.array(x)) for n, x in tensors.items()]
    if config.get("tie_word_embeddings"):
        weights = [(n, x) for n, x in weights if n != "lm_head.weight"]
    model.load_weights(weights, strict=True)
    return model


def randomize(net, rng: np.random.Generator) -> None:
    """Weights of a trained model's scale in every parameter: no zeros, no ones, no equal heads."""
    import torch

    with torch.no_grad():
        for name, p in net.named_parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 1
            x = rng.normal(size=p.shape) * fan_in**-0.5
            if name.endswith("A_log"):
                x = np.log(rng.uniform(0.5, 8, p.shape))
            elif name.endswith("dt_bias"):
                x = rng.uniform(-3, 0, p.shape)
            elif "norm" in name or name.endswith(".D"):
                x = 1 + 0.3 * x
            elif p.ndim == 1:
                x = 0.3 * x
            p.copy_(torch.from_numpy(x))
