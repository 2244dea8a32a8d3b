"""What transformers computes in some architectures and mlx-lm's implementation leaves out.

mlx-lm's attention sees the whole text where the maker's has a sliding window, and takes the long
factors of LongRoPE for short texts too. The folders stay mlx-lm's: only what runs here is changed.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma2
from mlx_lm.models.rope_utils import SuScaledRoPE

from ..utils.errors import UserError
from .base import SleepConfig
from .fla_mamba2 import GatedNorm


def windows(config: dict) -> list[int | None]:
    """For each layer the newest tokens that a token sees, itself included; None for all.

    Empty where mlx-lm's own caches say it, or where nothing slides. UserError for a window of no
    length in layers that slide.
    """
    kind, layers = config.get("model_type"), config.get("num_hidden_layers", 0)
    window = config.get("sliding_window")
    if "sliding_attention" in (config.get("layer_types") or ()):
        given = "sliding_window" in config or kind in ("llama", "mistral")  # else a default
        if given and not (type(window) is int and window > 0):
            raise UserError(
                f"sliding_window must be a whole number above 0 where layers slide, not {window!r}"
            )
    if kind in ("mistral", "phi3") and not config.get("layer_types"):
        return [window] * layers
    if kind == "gemma2":
        kinds = config.get("layer_types") or ("sliding_attention", "full_attention") * layers
        window = config.get("sliding_window", 4096)
        return [window if kinds[i] == "sliding_attention" else None for i in range(layers)]
    return []


def grouped_scores(layer: nn.Module) -> bool:
    """Whether a layer's attention scores have an axis for the groups of its heads (Gemma 2)."""
    attention = layer.get("self_attn")
    return isinstance(attention, gemma2.Attention) and attention.repeats > 1


def tie_head(inner: Any, config: dict) -> None:
    """Takes away the head of a model whose config ties it to the embedding, or says nothing, where
    mlx-lm waits for the weights to say so (Gemma 3)."""
    owner = inner.get("language_model", inner)
    tied = config.get("tie_word_embeddings", True) and owner.get("lm_head") is not None
    if tied and getattr(owner, "tie_word_embeddings", None) is False:
        owner.tie_word_embeddings = True
        owner.pop("lm_head")


def set_latent_eps(inner: Any, config: dict) -> None:
    """Gives the norms of latent attention the eps that its makers leave at 1e-6 in Kimi-Linear and
    Ling 3; mlx-lm takes rms_norm_eps."""
    ling_3 = "BailingMoeV3ForCausalLM" in (config.get("architectures") or ())
    if config["model_type"] != "kimi_linear" and not ling_3:
        return
    for name, module in inner.named_modules():
        if name.endswith(("kv_a_layernorm", "q_a_layernorm")):
            module.eps = 1e-6


def group_norms(inner: nn.Module, config: dict) -> None:
    """Gives Mamba-2's gated norm its groups: transformers norms each by itself."""
    if config["model_type"] == "mamba2" and config["n_groups"] > 1:
        for layer in inner.layers:
            norm = layer.mixer.norm
            layer.mixer.norm = GatedNorm(norm.weight.size, config["n_groups"], norm.eps, False)


def use_short_factors(inner: nn.Module, config: dict, sleep: SleepConfig) -> None:
    """Gives LongRoPE its short factors, which transformers takes up to the original length.

    mlx-lm always takes the long ones. UserError where a window may be longer than that length.
    """
    scaling = config.get("rope_scaling") or {}
    short = scaling.get("short_factor")
    if short is None or short == scaling.get("long_factor"):
        return
    ropes = [m for m in inner.modules() if isinstance(m, SuScaledRoPE)]
    for rope in ropes:
        length = rope.original_max_position_embeddings
        if sleep.window > length or sleep.eviction != "hard":
            raise UserError(
                f"LongRoPE is known here for windows of up to {length} tokens with hard eviction; "
                f"the window is {sleep.window} tokens, the eviction {sleep.eviction}"
            )
        base = config.get("rope_theta", 10_000.0)
        exponents = mx.arange(0, rope.dim, 2, dtype=mx.float32) / rope.dim
        rope._freqs = mx.array(short, dtype=mx.float32) * base**exponents
