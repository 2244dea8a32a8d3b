"""Tiny configs of transformers, of odd shapes, for each architecture: see `mlx_lm.py`."""

from __future__ import annotations

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
MAMBA2_CONFIG = {
    "model_type": "mamba2",
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_heads": 6,
    "head_dim": 8,
    "state_size": 10,
    "n_groups": 2,
    "chunk_size": 8,
    "layer_norm_epsilon": 1e-5,
    "eos_token_id": 2,
}
_SLIDING = {"eviction": "sliding"}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 12,
}
_LATENT = {
    **_BASE,
    "num_key_value_heads": 4,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 8,
    "v_head_dim": 7,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_KIMI = {
    **_LATENT,
    "model_type": "kimi_linear",
    "linear_head_dim": 6,
    "linear_num_heads": 3,
    "layer_types": ["linear_attention", "full_attention"],
}
_LING = {
    **_LATENT,
    "model_type": "bailing_hybrid",
    "head_dim": 6,
    "q_lora_rank": 9,
    "layer_group_size": 2,
    "first_k_dense_replace": 1,
    "n_group": 3,
    "topk_group": 2,
    "num_mtp_layers": 0,
}

_GEMMA = {**_BASE, "hidden_size": 16, "head_dim": 8, "query_pre_attn_scalar": 5}
_LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [4.0, 5.0, 6.0],
}

ATTENTION_ONLY: dict[str, list[dict]] = {
    "llama": [{**_BASE, "model_type": "llama"}],
    "mistral": [
        {**_BASE, "model_type": "mistral", "sliding_window": 5, "head_dim": 8},
        {**_BASE, "model_type": "mistral", "sliding_window": None},
    ],
    "qwen2": [{**_BASE, "model_type": "qwen2", "tie_word_embeddings": True}],
    "qwen3": [{**_BASE, "model_type": "qwen3", "head_dim": 8}],
    "smollm3": [
        {**_BASE, "model_type": "smollm3"},
        {**_BASE, "model_type": "smollm3", "no_rope_layers": [0, 1], "tie_word_embeddings": False},
    ],
    "phi3": [
        {**_BASE, "model_type": "phi3", "sliding_window": 5, "eos_token_id": 2},
        {  # as Phi-4-mini
            **_BASE,
            "model_type": "phi3",
            "hidden_size": 32,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 64,
            "rope_scaling": _LONGROPE,
            "tie_word_embeddings": True,
            "eos_token_id": 2,
        },
    ],
    "gemma2": [{**_GEMMA, "model_type": "gemma2", "sliding_window": 5}],
    "gemma3_text": [
        {
            **_GEMMA,
            "model_type": "gemma3_text",
            "num_hidden_layers": 3,
            "sliding_window": 5,
            "sliding_window_pattern": 3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {
            **_GEMMA,
            "model_type": "gemma3_text",
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
            "tie_word_embeddings": False,
        },
    ],
}

CONFIGS: dict[str, list[tuple[dict, dict]]] = {
    # architecture: (config for transformers, how it sleeps)
    "qwen3_next": [
        (
            {
                **_QWEN,
                "model_type": "qwen3_next",
                **_EXPERTS,
            },
            {},
        )
    ],
    "qwen3_5_moe": [
        ({**_QWEN, **_EXPERTS, "model_type": "qwen3_5_moe_text"}, {}),
        ({**_QWEN, **_EXPERTS, "model_type": "qwen3_5_moe_text"}, _SLIDING),
    ],
    "kimi_linear": [
        (_KIMI, {}),
        ({**_KIMI, "linear_conv_kernel_dim": 3, "mlp_layer_types": ["dense"] * 2}, _SLIDING),
    ],
    "bailing_hybrid": [
        (_LING, {}),
        ({**_LING, "q_lora_rank": None, "first_k_dense_replace": 2}, _SLIDING),
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
    "mamba2": [
        (MAMBA2_CONFIG, {}),
        ({**MAMBA2_CONFIG, "n_groups": 1, "use_bias": True, "tie_word_embeddings": True}, {}),
    ],
    "falcon_h1": [
        (_FALCON, {}),
        ({**_FALCON, "mamba_rms_norm": True, "tie_word_embeddings": True}, _SLIDING),
    ],
    **{name: [(config, {}) for config in configs] for name, configs in ATTENTION_ONLY.items()},
}
