"""Mamba-2 of transformers, RWKV-7 of fla and PLaMo 2, as mlx-lm has them."""

from __future__ import annotations

import math

from ...utils.errors import UserError
from .base import Architecture, Tensor, Weights
from .fields import complete, finite, only

_HEADS = (".k_k", ".k_a", ".g_norm.weight", ".g_norm.bias")


def _mamba2(config: dict) -> dict:
    config = only(complete(config), hidden_act="silu", rms_norm=True)
    config["time_step_limit"] = finite(config.get("time_step_limit") or (0.0, math.inf))
    config.setdefault("intermediate_size", int(config.get("expand", 2) * config["hidden_size"]))
    return config


def _rwkv7(config: dict) -> dict:
    config = only(config, attn=None, norm_first=True, norm_bias=True, hidden_act="sqrelu")
    d, values = config["hidden_size"], config.get("value_dim") or config["hidden_size"]
    if set(values if isinstance(values, list) else [values]) != {d}:
        raise UserError(f"rwkv7 with value_dim {values!r} is not known to mlx-lm, only hidden_size")
    config.setdefault("norm_eps", 1e-5)
    config.setdefault("head_dim", 64)
    if not math.isclose(eps := config["head_dim"] * config["norm_eps"], 64e-5):
        raise UserError(f"rwkv7: mlx-lm wants head_dim times norm_eps to be 64e-5, not {eps:.1e}")
    wide = config["head_dim"] / 64  # fla's sizes of what is left out
    for name, most in (("decay", 2.5 * wide), ("gate", 5), ("a", 2.5 * wide), ("v", 1.7 * wide)):
        if config.get(f"{name}_low_rank_dim") is None:
            config[f"{name}_low_rank_dim"] = max(32, round(most * d**0.5 / 32) * 32)
    if config.get("intermediate_size") is None:
        config["intermediate_size"] = -(-int(d * config.get("hidden_ratio", 4.0)) // 32) * 32
    return config


def _swap_conv(name: str, x) -> Tensor:
    """A convolution's [C, 1, K] as mlx-lm's [C, K, 1], or back."""
    return name, x.moveaxis(2, 1) if name.endswith("conv1d.weight") and x.ndim == 3 else x


def _mamba2_to_ours(name: str, x) -> Tensor:
    # The original Mamba-2 checkpoints say `embedding`.
    return _swap_conv(name.replace("backbone.embedding.", "backbone.embeddings."), x)


def _rwkv7_to_ours(config: dict, weights: Weights) -> Weights:
    """Heads apart, and what early checkpoints have in one tensor x_x."""
    out: Weights = {}
    for name, x in weights.items():
        if name.endswith(".attn.x_x"):
            for part, y in zip("rwkvag", x, strict=True):
                out[name.removesuffix("x") + part] = y.reshape(1, 1, -1)
        else:
            out[name] = x.reshape(-1, config["head_dim"]) if name.endswith(_HEADS) else x
    return out


ARCHITECTURES = (
    Architecture("mamba2", ("mamba2",), _mamba2, to_ours=_mamba2_to_ours, to_theirs=_swap_conv),
    Architecture(
        "rwkv7",
        ("rwkv7",),
        _rwkv7,
        sanitize=_rwkv7_to_ours,
        unsanitize=lambda config, weights: {
            n: x.reshape(-1) if n.endswith(_HEADS) else x for n, x in weights.items()
        },
    ),
    Architecture("plamo2", ("plamo2",), dict, to_ours=_swap_conv, to_theirs=_swap_conv),
)
