"""Kimi-Linear and Ling (bailing): linear attention beside multi-head latent attention, experts.

Tensors go through mlx-lm's own `sanitize`. There kv_b_proj is in two, one half transposed, so the
way back joins them.
"""

from __future__ import annotations

import re

import mlx.core as mx

from ...models import mlx_lm_model
from ...utils.errors import UserError
from .base import Architecture, Weights
from .fields import complete, flat_rope, only

_ROTARY = r".*rotary_emb\.inv_freq"


def _kimi(config: dict) -> dict:
    config = only(complete(config), hidden_act="silu", q_lora_rank=None, attention_bias=False)
    n = config["num_hidden_layers"]
    if "linear_attn_config" not in config:  # as transformers writes it
        kinds = config.get("layer_types") or [
            "full_attention" if i and i % 4 == 0 else "linear_attention" for i in range(n)
        ]
        config["linear_attn_config"] = {
            "kda_layers": [i for i, kind in enumerate(kinds, 1) if kind == "linear_attention"],
            "full_attn_layers": [i for i, kind in enumerate(kinds, 1) if kind == "full_attention"],
            "num_heads": config.get("linear_num_heads", 32),
            "head_dim": config.get("linear_head_dim", 128),
            "short_conv_kernel_size": config.get("linear_conv_kernel_dim", 4),
        }
    config["first_k_dense_replace"] = _dense_layers(config, config.get("first_k_dense_replace", 1))
    config.setdefault("rope_theta", 10_000.0)  # mlx-lm wants one, and turns nothing
    config.setdefault("head_dim", config["qk_rope_head_dim"])
    if config.get("moe_layer_freq", 1) != 1:
        raise UserError("kimi_linear with moe_layer_freq is not known to transformers")
    if config.get("num_expert_group", 1) == config.get("topk_group", 1):
        config["num_expert_group"] = config["topk_group"] = 1  # all groups, so none
    return config


def _bailing(config: dict) -> dict:
    """Ling 3, as transformers has it, or an earlier one, which mlx-lm alone has."""
    names = config.get("architectures") or ["BailingHybridForCausalLM"]
    if "V2" in names[0]:
        return flat_rope(only(config, hidden_act="silu"))
    config = dict(config)
    for theirs, ours in (
        ("num_experts_per_token", "num_experts_per_tok"),
        ("num_expert_group", "n_group"),
        ("model_max_length", "max_position_embeddings"),
    ):
        if theirs in config:
            config.setdefault(ours, config[theirs])
    config = flat_rope(
        only(
            complete(config),
            hidden_act="silu",
            attention_bias=False,
            kda_safe_gate=True,
            moe_renormalize=True,
            norm_topk_prob=True,
        )
    )
    config.setdefault("moe_shared_expert_intermediate_size", config["moe_intermediate_size"])
    config["first_k_dense_replace"] = _dense_layers(config, config["first_k_dense_replace"])
    group, n = config["layer_group_size"], config["num_hidden_layers"]
    whole = n // group * group
    kinds = [
        f"{'full' if i % group == 0 or i > whole else 'linear'}_attention" for i in range(1, n + 1)
    ]
    if (config.get("layer_types") or kinds) != kinds:
        raise UserError("bailing_hybrid: mlx-lm wants full attention in every n-th layer and after")
    return {**config, "architectures": ["BailingMoeV3ForCausalLM"], "layer_group_size": group}


def _dense_layers(config: dict, default: int) -> int:
    """How many of the first layers have no experts. UserError where others have none."""
    kinds = config.get("mlp_layer_types")
    if not kinds:
        return default
    dense = kinds.index("sparse") if "sparse" in kinds else len(kinds)
    if "dense" in kinds[dense:]:
        raise UserError(f"{config['model_type']}: mlx-lm wants layers without experts to be first")
    return dense


def _mtp_layers(config: dict) -> tuple[str, ...]:
    """Layers after the last one, which predict more tokens at once."""
    n = config["num_hidden_layers"]
    more = config.get("num_nextn_predict_layers", 1) or 0
    return tuple(rf"model\.layers\.{i}\..*" for i in range(n, n + more))


def _to_ours(config: dict, weights: Weights) -> Weights:
    """mlx-lm's `sanitize`, after the names that transformers gives a running model's tensors."""
    out: Weights = {}
    for name, x in weights.items():
        for theirs, ours in _RENAMED:
            name = re.sub(theirs, ours, name)
        if name.endswith(".A_log") and config["model_type"] == "kimi_linear":
            x = x.reshape(1, 1, -1, 1)
        if name.endswith(".kv_b_proj.weight"):  # mlx-lm's own way can't be traced
            whole = x.reshape(config["num_attention_heads"], -1, x.shape[-1])
            keys, values = mx.split(whole, [config["qk_nope_head_dim"]], axis=1)
            out[name.replace("kv_b_proj", "embed_q")] = keys.swapaxes(-1, -2)
            out[name.replace("kv_b_proj", "unembed_out")] = values
        else:
            out[name] = x
    model = mlx_lm_model.Model(mlx_lm_model.ModelArgs.from_dict(config))
    linear = [getattr(layer, "is_linear", False) for layer in model.layers]
    for name in [name for name in out if name.endswith(".attention.dense.weight")]:
        if linear[int(name.split(".")[2])]:  # transformers saves it by another name
            out[name.replace(".dense.", ".o_proj.")] = out.pop(name)
    return model.inner.sanitize(out)


_RENAMED = (
    (r"\.forget_gate\.", "."),
    (r"\.block_sparse_moe\.(gate_proj|up_proj|down_proj)\.", r".mlp.\1."),
)


def _to_theirs(config: dict, weights: Weights) -> Weights:
    """Experts one by one again, kv_b_proj whole, convolutions [C, 1, K]."""
    kimi = config["model_type"] == "kimi_linear"
    experts = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"} if kimi else {}
    out: Weights = {}
    for name, x in weights.items():
        stacked = re.fullmatch(r"(.*)\.mlp\.switch_mlp\.(\w+)\.weight", name)
        prefix = re.sub(r"\.mlp(?=\.|$)", ".block_sparse_moe", name) if kimi else name
        if stacked:
            where = f"{stacked[1]}.{'block_sparse_moe' if kimi else 'mlp'}"
            for n in range(x.shape[0]):
                out[f"{where}.experts.{n}.{experts.get(stacked[2], stacked[2])}.weight"] = x[n]
        elif name.endswith(".embed_q.weight"):
            value = weights[name.replace("embed_q", "unembed_out")]
            whole = mx.concatenate([x.swapaxes(-1, -2), value], axis=1)
            out[name.replace("embed_q", "kv_b_proj")] = whole.reshape(-1, whole.shape[-1])
        elif name.endswith("_conv.conv.weight"):
            out[name.replace("_conv.conv.", "_conv1d.")] = x.moveaxis(2, 1)
        elif name.endswith("_conv1d.weight"):
            out[name] = x.moveaxis(2, 1)
        elif name.endswith(".e_score_correction_bias"):
            out[prefix.replace(".e_score", ".gate.e_score")] = x
        elif kimi and re.search(r"\.mlp\.(gate|shared_experts)\.", name):
            out[prefix] = x
        elif not name.endswith(".unembed_out.weight"):
            out[name.replace(".gate.gate_proj.", ".gate.")] = x
    return out


def _of(model_type: str, config, **mapping) -> Architecture:
    return Architecture(
        model_type,
        (model_type,),
        config,
        sanitize=_to_ours,
        unsanitize=_to_theirs,
        **{"dropped": (_ROTARY,), **mapping},
    )


ARCHITECTURES = (
    _of("kimi_linear", _kimi, dropped=(_ROTARY, r"(model\.)?mtp\..*")),
    _of("bailing_hybrid", _bailing, dropped_for=_mtp_layers),
    _of("bailing_moe_linear", lambda config: flat_rope(only(config, norm_head=False))),
)
