"""Models that only mlx-lm implements, against mlx-lm's own forward pass and caches.

Nobody else's code runs these here, so the sleep is held to Algorithm 1 written down naively over
mlx-lm's layers: each pass starts with fresh caches that hold S alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from importlib.metadata import version

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_sleep.models.mlx_lm_model import Model, ModelArgs

from .cases import Pair
from .fla import WINDOW

_BASE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 512,
}
_LING = {
    **_BASE,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "layer_group_size": 2,
    "group_norm_size": 2,
    "norm_topk_prob": True,
}
CONFIGS = {
    "bailing_hybrid": {  # Ling 2.5; Ling 3 is compared with transformers
        **_LING,
        "kv_lora_rank": 10,
        "q_lora_rank": 9,
        "qk_rope_head_dim": 6,
        "qk_nope_head_dim": 8,
        "v_head_dim": 7,
        "n_group": 2,
        "topk_group": 1,
        "partial_rotary_factor": 2 / 3,
        "routed_scaling_factor": 1.5,
    },
    "bailing_moe_linear": {**_LING, "use_qk_norm": True, "score_function": "sigmoid"},
    "plamo2": {
        **_BASE,
        "hidden_size_per_head": 6,
        "mamba_num_heads": 3,
        "mamba_d_state": 10,
        "attention_window_size": 2048,
    },
    "rwkv7": {
        **_BASE,
        **{f"{name}_low_rank_dim": 5 for name in ("a", "v", "gate", "decay")},
        "norm_eps": 1e-5,
    },
}
ARCHITECTURES = tuple(CONFIGS)
SEED = 5


def pairs(architecture: str, rng: np.random.Generator) -> Iterator[Pair]:
    """The pair of the architecture's config, with fresh weights."""
    config = {"model_type": architecture, **CONFIGS[architecture]}
    model = Model(ModelArgs.from_dict({**config, "sleep": {"window": WINDOW}}))
    weights = []
    for name, x in tree_flatten(model.parameters()):
        fan_in = x[0].size if x.ndim > 1 else 1
        noise = mx.array(rng.normal(size=x.shape) * fan_in**-0.5, mx.float32)
        if name.endswith("A_log"):
            noise = mx.array(np.log(rng.uniform(0.5, 8, x.shape)), mx.float32)
        elif name.endswith("dt_bias"):
            noise = mx.array(rng.uniform(-3, 0, x.shape), mx.float32)
        elif "norm" in name or x.ndim == 1:
            noise = x + 0.3 * noise
        weights.append((name, noise))
    model.load_weights(weights)
    model.eval()
    reference = f"mlx-lm {version('mlx-lm')}, Algorithm 1 over its caches"
    yield Pair(architecture, reference, model, Naive(model))


class Naive:
    """mlx-lm's model and caches as a reference: see Pair. A state is the list of caches."""

    def __init__(self, model: Model):
        self.inner = model.inner
        path = "backbone" if "backbone" in self.inner else "model"
        self.decoder = getattr(self.inner, path)

    def fresh(self):
        return make_prompt_cache(self.inner)

    def forward(self, tokens, state):
        state = copy.deepcopy(state)
        return np.array(self.inner(mx.array(np.asarray(tokens)), cache=state)), state

    def consolidate(self, tokens, state, passes: int):
        names = ("embed_tokens", "word_embeddings", "embeddings")
        embedding = next(self.decoder[name] for name in names if name in self.decoder)
        h, first = embedding(mx.array(np.asarray(tokens))), None
        for _ in range(passes):
            state = self._only_S(state)
            for layer, cache in zip(self.inner.layers, state, strict=True):
                kind = type(layer).__name__
                attends = not hasattr(cache, "cache")
                mask = mx.tril(mx.ones((h.shape[1],) * 2, mx.bool_)) if attends else None
                if kind == "Rwkv7Layer":
                    h, first = layer(h, first, cache)
                else:  # Ling's offset is 0, as in every window after a hard eviction
                    h = layer(h, mask=mask, cache=cache)
        return self._only_S(state)

    def _only_S(self, caches):
        fresh = self.fresh()
        for new, old in zip(fresh, caches, strict=True):
            for slot, x in enumerate(getattr(old, "cache", ())):
                if x is not None and x.ndim == 4:
                    new[slot] = x
        return fresh
