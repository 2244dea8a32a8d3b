"""Architectures that mlx-lm implements: the folder made from them is one of mlx-lm's too.

Tensors go through mlx-lm's own `sanitize` where it is right. Configs are brought to what mlx-lm
reads, and a value that mlx-lm would ignore is refused, since its model would compute something
else than PyTorch's. Where mlx-lm's form holds rounded values (1 + w of Qwen, the folded multipliers
of Falcon-H1) the way back is exact but for that rounding.
"""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx

from ...models import mlx_lm_model
from ...utils.errors import UserError
from .base import Architecture, Weights
from .fields import NO_LIMIT, complete, every, finite, flat_rope, only, text_model

_ROTARY = r".*rotary_emb\.inv_freq"
_MTP = r"(model\.)?mtp\..*"
_VISION = r"(model\.)?(visual|vision_tower)\..*"


def _qwen3_5(config: dict) -> dict:
    """The text model of a config with or without a vision tower."""
    return _qwen_text(text_model(config, "qwen3_5"))


def _qwen3_5_moe(config: dict) -> dict:
    return _qwen_text(text_model(config, "qwen3_5_moe"))


def _qwen_text(config: dict) -> dict:
    config = flat_rope(every(only(complete(config), hidden_act="silu")))
    names = ("rope_theta", "partial_rotary_factor")  # which mlx-lm reads in rope_parameters alone
    rope = config.get("rope_scaling") or {
        **(config.get("rope_parameters") or {}),
        "rope_type": "default",
    }
    rope.pop("type", None)  # which mlx-lm would take before rope_type
    return {**config, "rope_parameters": {**rope, **{name: config[name] for name in names}}}


def _qwen3_next(config: dict) -> dict:
    if not config.get("num_experts", 1):
        raise UserError("qwen3_next without experts is not known to mlx-lm")
    config = flat_rope(every(only(complete(config), hidden_act="silu")))
    return {**config, "mlp_only_layers": config.get("mlp_only_layers") or []}


def _olmo_hybrid(config: dict) -> dict:
    config = flat_rope(only(complete(config), hidden_act="silu"))
    if not config.get("rope_parameters"):
        config["rope_parameters"] = {"rope_theta": config["rope_theta"]}
    if config.get("rope_scaling"):
        raise UserError("olmo_hybrid with scaled RoPE is not known to mlx-lm")
    return config


def _nemotron_h(config: dict) -> dict:
    config = only(
        complete(config), mlp_hidden_act="relu2", mamba_hidden_act="silu", tie_word_embeddings=False
    )
    kinds = config.get("layers_block_type") or config.get("layer_types")
    if kinds and not config.get("hybrid_override_pattern"):
        letters = {"linear_attention": "M", "mamba": "M", "mlp": "-", "moe": "E"}
        letters |= {"full_attention": "*", "attention": "*"}
        config["hybrid_override_pattern"] = "".join(letters[kind] for kind in kinds)
    config["time_step_limit"] = finite(config.get("time_step_limit") or NO_LIMIT)
    # PyTorch's in_proj and out_proj have a bias by use_bias, mlx-lm's by mamba_proj_bias.
    config["mamba_proj_bias"] = bool(config.get("use_bias"))
    return config


def _granite(config: dict) -> dict:
    config = flat_rope(only(complete(config), hidden_act="silu", mamba_n_groups=1))
    if config.get("rope_scaling") and config.get("position_embedding_type") == "rope":
        raise UserError("granitemoehybrid with scaled RoPE is not known to mlx-lm")
    kinds = {"linear_attention": "mamba", "full_attention": "attention"}
    config["layer_types"] = [kinds.get(kind, kind) for kind in config["layer_types"]]
    if config.get("position_embedding_type") != "rope":
        config["position_embedding_type"] = "nope"  # mlx-lm takes a missing one for RoPE
    config["time_step_limit"] = finite(config.get("time_step_limit") or NO_LIMIT)
    if config.get("mamba_d_head") in (None, "auto"):
        inner = config.get("mamba_expand", 2) * config["hidden_size"]
        config["mamba_d_head"] = inner // config["mamba_n_heads"]
    if not config.get("num_local_experts"):
        config["intermediate_size"] = config["shared_intermediate_size"]
    return config


def _falcon_h1(config: dict) -> dict:
    config = flat_rope(only(complete(config), hidden_act="silu"))
    if config.get("mamba_rms_norm"):
        only(config, mamba_n_groups=1)
    limit = mlx_lm_model.untagged(config.get("time_step_limit") or NO_LIMIT)
    if tuple(limit) != NO_LIMIT:
        raise UserError("falcon_h1 with a time_step_limit is not known to mlx-lm")
    if config.get("mamba_d_ssm") is None:
        config["mamba_d_ssm"] = int(config["mamba_expand"] * config["hidden_size"])
    if config.get("mamba_d_head") in (None, "auto"):
        config["mamba_d_head"] = config["mamba_d_ssm"] // config["mamba_n_heads"]
    return config


def _sanitize(config: dict, weights: Weights) -> Weights:
    """mlx-lm's own, for its model of this config; nothing is evaluated."""
    model = mlx_lm_model.Model(mlx_lm_model.ModelArgs.from_dict(config))
    return model.inner.sanitize(_as_saved(config, weights))


_FUSED = r"(.*)\.experts\.(gate_up_proj|up_proj|down_proj)"


def _as_saved(config: dict, weights: Weights) -> Weights:
    """The state_dict of a running model of transformers, named as its save_pretrained does it."""
    kind, out = config["model_type"], {}
    for name, x in weights.items():
        if kind == "nemotron_h":
            name = re.sub(r"^model\.", "backbone.", name)
        experts = kind != "qwen3_5_moe" and re.fullmatch(_FUSED, name)
        if kind == "granitemoehybrid":
            name = name.replace("moe.router.weight", "moe.router.layer.weight")
            name = name.replace("moe.experts.gate_up_proj", "moe.input_linear.weight")
            out[name.replace("moe.experts.down_proj", "moe.output_linear.weight")] = x
        elif experts:
            prefix, part = experts.groups()
            for n in range(x.shape[0]):
                parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
                for each, y in zip(parts, mx.split(x[n], len(parts)), strict=True):
                    out[f"{prefix}.experts.{n}.{each}.weight"] = y
        else:
            out[name] = x
    return _stacked(out) if kind == "qwen3_5_moe" else out


def _stacked(weights: Weights) -> Weights:
    """Experts that transformers saves one by one, stacked as mlx-lm has them."""
    experts: dict[str, dict[int, mx.array]] = {}
    out: Weights = {}
    for name, x in weights.items():
        if one := re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)\.weight", name):
            experts.setdefault(f"{one[1]}.switch_mlp.{one[3]}.weight", {})[int(one[2])] = x
        else:
            out[name] = x
    return {**out, **{n: mx.stack([xs[i] for i in sorted(xs)]) for n, xs in experts.items()}}


def _swap_conv(name: str, x: mx.array) -> mx.array:
    """A convolution's [C, 1, K] as mlx-lm's [C, K, 1], or back; other tensors unchanged."""
    return x.moveaxis(2, 1) if name.endswith("conv1d.weight") else x


def _olmo_to_ours(config: dict, weights: Weights) -> Weights:
    """With the renames that transformers makes for checkpoints of OLMo-core."""
    width = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    out = {}
    for name, x in weights.items():
        name = name.replace("attention_layer_norm", "input_layernorm")
        name = name.replace("feedforward_layer_norm", "post_attention_layernorm")
        if name.endswith(".linear_attn.conv1d.weight"):  # of a state_dict
            parts = mx.split(_swap_conv(name, x), [width, 2 * width])
            for part, y in zip("qkv", parts, strict=True):
                out[name.replace("conv1d", f"{part}_conv1d")] = y
        else:
            out[name] = _swap_conv(name, x)
    return out


def _olmo_to_theirs(config: dict, weights: Weights) -> Weights:
    return {name: _swap_conv(name, x) for name, x in weights.items()}


def _nemotron_to_theirs(config: dict, weights: Weights) -> Weights:
    """Experts one by one again."""
    parts = {"fc1": "up_proj", "fc2": "down_proj"}
    out: Weights = {}
    for name, x in weights.items():
        if stacked := re.fullmatch(r"(.*)\.switch_mlp\.(fc1|fc2)\.weight", name):
            prefix, part = stacked.groups()
            for expert in range(x.shape[0]):
                out[f"{prefix}.experts.{expert}.{parts[part]}.weight"] = x[expert]
        else:
            out[name] = _swap_conv(name, x)
    return out


def _granite_to_theirs(config: dict, weights: Weights) -> Weights:
    """gate and up side by side again, in the experts and in the MLP of a dense model."""
    out: Weights = {}
    for name, x in weights.items():
        split = re.fullmatch(r"(.*)\.(mlp|switch_mlp)\.(gate|up|down)_proj\.weight", name)
        if not split:
            out[name] = _swap_conv(name, x)
            continue
        prefix, kind, part = split.groups()
        theirs = f"{prefix}.shared_mlp" if kind == "mlp" else prefix
        if part == "down":
            out[f"{theirs}.output_linear.weight"] = x
        elif part == "gate":
            up = weights[f"{prefix}.{kind}.up_proj.weight"]
            out[f"{theirs}.input_linear.weight"] = mx.concatenate([x, up], axis=-2)
    return out


def _falcon_factors(config: dict) -> dict[str, tuple[Any, Any]]:
    """End of a layer's name -> the multipliers that mlx-lm wants in its weight and its bias.

    mlx-lm's own `sanitize` leaves out the multiplier of the keys, and that of the values' input.
    """
    attention, keys = config["attention_in_multiplier"], config["key_multiplier"]
    gate, down = config["mlp_multipliers"]
    sizes = [config["mamba_d_ssm"]] * 2
    sizes += [config["mamba_n_groups"] * config["mamba_d_state"]] * 2
    sizes += [config["mamba_n_heads"]]
    each = zip(config["ssm_multipliers"], sizes, strict=True)
    channels = mx.concatenate([mx.full((size,), multiplier) for multiplier, size in each])
    return {
        "embed_tokens": (config["embedding_multiplier"], 1.0),
        "lm_head": (config["lm_head_multiplier"], 1.0),
        "self_attn.q_proj": (attention, 1.0),
        "self_attn.k_proj": (attention * keys, keys),
        "self_attn.v_proj": (attention, 1.0),
        "self_attn.o_proj": (config["attention_out_multiplier"],) * 2,
        "mamba.in_proj": (config["ssm_in_multiplier"] * channels[:, None], channels),
        "mamba.out_proj": (config["ssm_out_multiplier"],) * 2,
        "feed_forward.gate_proj": (gate,) * 2,
        "feed_forward.down_proj": (down,) * 2,
    }


def _falcon(config: dict, weights: Weights, sign: int) -> Weights:
    """Weights times their multipliers, or divided by them (sign -1)."""
    factors = _falcon_factors(complete({**config, "model_type": "falcon_h1"}))
    out = {}
    for name, x in weights.items():
        layer, _, kind = name.rpartition(".")
        of = next((pair for suffix, pair in factors.items() if layer.endswith(suffix)), None)
        if of is not None and kind in ("weight", "bias"):
            factor = of[kind == "bias"]
            x = (x * factor if sign > 0 else x / factor).astype(x.dtype)
        out[name] = _swap_conv(name, x)
    return out


def _falcon_to_ours(config: dict, weights: Weights) -> Weights:
    return _falcon(config, weights, 1)


def _falcon_to_theirs(config: dict, weights: Weights) -> Weights:
    return _falcon(config, weights, -1)


_ONE_MORE = r"(.*\.(input_layernorm|post_attention_layernorm|q_norm|k_norm)|model\.norm)\.weight"


def _qwen_to_theirs(config: dict, weights: Weights) -> Weights:
    """w again in place of 1 + w, and experts one by one."""
    out: Weights = {}
    for name, x in weights.items():
        name = name.removeprefix("language_model.")
        if stacked := re.fullmatch(r"(.*)\.switch_mlp\.(\w+)\.weight", name):
            for n in range(x.shape[0]):
                out[f"{stacked[1]}.experts.{n}.{stacked[2]}.weight"] = x[n]
        elif re.fullmatch(_ONE_MORE, name):
            out[name] = (x.astype(mx.float32) - 1).astype(x.dtype)
        else:
            out[name] = _swap_conv(name, x)
    return out


def as_mlx_lm(model_type: str) -> Architecture:
    """Any other of mlx-lm's: nobody here has compared it with PyTorch's."""
    return _of(model_type, flat_rope, sanitize=_plain_sanitize)


def _plain_sanitize(config: dict, weights: Weights) -> Weights:
    model = mlx_lm_model.Model(mlx_lm_model.ModelArgs.from_dict(config))
    return model.inner.sanitize(weights) if hasattr(model.inner, "sanitize") else weights


def _of(model_type: str, config, sources: tuple[str, ...] = (), **mapping) -> Architecture:
    mapping.setdefault("dropped", (_ROTARY,))
    return Architecture(model_type, sources or (model_type,), config, **mapping)


ARCHITECTURES = (
    _of("olmo_hybrid", _olmo_hybrid, sanitize=_olmo_to_ours, unsanitize=_olmo_to_theirs),
    _of(
        "nemotron_h",
        _nemotron_h,
        sanitize=_sanitize,
        unsanitize=_nemotron_to_theirs,
        dropped=(_ROTARY, _MTP),
    ),
    _of("granitemoehybrid", _granite, sanitize=_sanitize, unsanitize=_granite_to_theirs),
    _of("falcon_h1", _falcon_h1, sanitize=_falcon_to_ours, unsanitize=_falcon_to_theirs),
    _of(
        "qwen3_next",
        _qwen3_next,
        sanitize=_sanitize,
        unsanitize=_qwen_to_theirs,
        dropped=(_ROTARY, _MTP),
    ),
    _of(
        "qwen3_5",
        _qwen3_5,
        sources=("qwen3_5_text", "qwen3_5"),
        sanitize=_sanitize,
        unsanitize=_qwen_to_theirs,
        dropped=(_ROTARY, _MTP, _VISION),
    ),
    _of(
        "qwen3_5_moe",
        _qwen3_5_moe,
        sources=("qwen3_5_moe_text", "qwen3_5_moe"),
        sanitize=_sanitize,
        unsanitize=_qwen_to_theirs,
        dropped=(_ROTARY, _MTP, _VISION),
    ),
)
