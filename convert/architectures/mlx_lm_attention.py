"""Models with attention layers only, which mlx-lm implements: tensors have the same names there.

What mlx-lm leaves out of them (sliding windows, the short factors of LongRoPE) is added by
`models/mlx_lm_model.py`.
"""

from __future__ import annotations

import re

from ...utils.errors import UserError
from .base import Architecture, Tensor
from .fields import complete, flat_rope, only, text_model

_ROTARY = r".*rotary_emb\.inv_freq"
_VISION = r"(model\.)?(vision_tower|multi_modal_projector)\..*"


def _llama(config: dict) -> dict:
    return flat_rope(only(complete(config), hidden_act="silu"))


def _all_attend(config: dict) -> dict:
    """Of Llama and Mistral, whose layers are all alike: transformers reads no layer_types."""
    return {name: x for name, x in _llama(config).items() if name != "layer_types"}


def _qwen(config: dict) -> dict:
    config = _llama(config)
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    last = config.get("max_window_layers", 0)
    if "sliding_attention" in (config.get("layer_types") or ()) or (
        window and last < config["num_hidden_layers"]
    ):
        raise UserError(f"{config['model_type']} with sliding windows is not known to mlx-lm")
    return config


def _smollm3(config: dict) -> dict:
    return _llama(only(config, use_sliding_window=False))


def _gemma2(config: dict) -> dict:
    config = only(
        complete(config),
        hidden_activation="gelu_pytorch_tanh",
        attention_bias=False,
        tie_word_embeddings=True,
        use_bidirectional_attention=False,
    )
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(name, 1.0) is None:
            raise UserError(f"gemma2 without {name} is not known to mlx-lm")
    config = flat_rope(config)
    if config.get("rope_scaling"):
        raise UserError("gemma2 with scaled RoPE is not known to mlx-lm")
    return config


def _gemma3(config: dict) -> dict:
    given = text_model(config, "gemma3_text")
    config = only(
        complete(given),
        hidden_activation="gelu_pytorch_tanh",
        attention_bias=False,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        use_bidirectional_attention=False,
    )
    rope = config.pop("rope_parameters", None) or {}
    for kind, base in (
        ("full_attention", "rope_theta"),
        ("sliding_attention", "rope_local_base_freq"),
    ):
        if kind in rope:
            if rope[kind].get("rope_theta") is not None:
                config[base] = rope[kind]["rope_theta"]
            scaled = rope[kind].get("rope_type", "default") != "default"
            if scaled and kind == "sliding_attention":
                raise UserError("gemma3 with scaled RoPE in its sliding layers is not known")
            if kind == "full_attention":
                config["rope_scaling"] = dict(rope[kind]) if scaled else None
    flat_rope(config)
    kinds = config.get("layer_types")
    if kinds and "sliding_window_pattern" not in given:
        full = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
        config["sliding_window_pattern"] = full
    every = config["sliding_window_pattern"]
    if kinds and [kind == "full_attention" for kind in kinds] != [
        not i % every for i in range(1, len(kinds) + 1)
    ]:
        raise UserError("gemma3: mlx-lm wants full attention in every n-th layer")
    return config


def _gemma3_to_ours(name: str, x) -> Tensor:
    """Without the part of the name that a vision tower beside the text model brings."""
    name = re.sub(r"^(model\.)?language_model\.(?=lm_head\.)", "", name)
    return re.sub(r"^(model\.language_model\.|language_model\.model\.)", "model.", name), x


def _phi3(config: dict) -> dict:
    config = only(complete(config), hidden_act="silu")
    original = config["original_max_position_embeddings"]
    for name in ("rope_scaling", "rope_parameters"):
        if rope := config.get(name):  # transformers takes the length beside it, whatever it has
            config[name] = {**rope, "original_max_position_embeddings": original}
    config = flat_rope(config, short_factors=True)
    rope = config.get("rope_scaling")
    if not rope:
        return config
    kind = rope["rope_type"]
    if kind not in ("su", "longrope"):
        raise UserError(f"phi3 with RoPE of type {kind} is not known to mlx-lm, only longrope")
    factors = {n: rope[n] for n in ("short_factor", "long_factor")}
    return {**config, "rope_scaling": {"type": "longrope", **factors}}


def _of(model_type: str, config, sources: tuple[str, ...] = (), **mapping) -> Architecture:
    mapping.setdefault("dropped", (_ROTARY,))
    return Architecture(model_type, sources or (model_type,), config, **mapping)


ARCHITECTURES = (
    _of("llama", _all_attend),
    _of("mistral", _all_attend),
    _of("qwen2", _qwen),
    _of("qwen3", _qwen),
    _of("smollm3", _smollm3),
    _of("phi3", _phi3),
    _of("gemma2", _gemma2),
    _of(
        "gemma3_text",
        _gemma3,
        sources=("gemma3_text", "gemma3"),
        to_ours=_gemma3_to_ours,
        dropped=(_ROTARY, _VISION),
    ),
)
