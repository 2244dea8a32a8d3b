"""Jet-Nemotron: our model against the PyTorch ones, with weights that went through a file."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_sleep.convert.architectures.jet_nemotron import ARCHITECTURE
from mlx_sleep.models.jet_nemotron import Model, ModelArgs

from .cases import Pair

ARCHITECTURES = (ARCHITECTURE.model_type,)
REFERENCE = "PyTorch model from the published code's facts, recurrence of transformers"
QWEN = "transformers Qwen2, for attention layers only"

TIED = {
    "model_type": "jet_nemotron",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "layer_types": ["jet", "attn", "jet", "swa", "jet"],
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "efficient_attention_config": {
        "jet": {
            "num_heads": 2,
            "head_dim": 6,
            "expand_v": 2.5,
            "conv_size": 3,
            "dconv_generator_reduction": 4,
            "norm_eps": "1e-3",  # in the published configs too it is a string
            "mode": "chunk",
        },
        "swa": {"window_size": 5},
    },
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
}
"""One KV head, sizes that nothing divides, hard eviction and the paper's middle loop range."""

WIDE = {
    **TIED,
    "vocab_size": 77,
    "hidden_size": 20,
    "num_hidden_layers": 3,
    "layer_types": ["jet", "swa", "attn"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "efficient_attention_config": {
        # A head of the published 2B model: Dk 96, Dv 256.
        "jet": {
            "num_heads": 1,
            "head_dim": 96,
            "expand_v": 2.6666666667,
            "conv_size": 4,
            "dconv_generator_reduction": 8,
            "norm_eps": "1e-5",
        },
        "swa": {"window_size": 6},
    },
    "tie_word_embeddings": False,
}
"""Untied, head_dim that is not hidden_size / heads, sliding eviction, all blocks looped."""

VARIANTS = (
    (TIED, {"window": 16, "loop_range": ARCHITECTURE.loop_range(TIED)}),
    (WIDE, {"window": 9, "eviction": "sliding"}),
)
SEED = 3
LENGTH = 37  # of the longest inputs: more than one chunk of the recurrence, and no multiple of one


def pairs(architecture: str, rng: np.random.Generator) -> Iterator[Pair]:
    """One pair for each of VARIANTS, and one of attention layers alone."""
    for config, sleep in VARIANTS:
        yield build(config, sleep, rng)
    yield qwen_pair(rng)


def build(config: dict, sleep: dict, rng: np.random.Generator) -> Pair:
    """The same random weights twice; theirs in float64, but for the recurrence."""
    import torch

    from mlx_sleep.convert.torch.jet_nemotron import JetNemotron, randomize

    torch.manual_seed(int(rng.integers(2**31)))
    theirs = JetNemotron(config, sleep).eval()
    randomize(theirs)
    ours = through_a_file(theirs, config, sleep)
    return Pair(ARCHITECTURES[0], REFERENCE, ours, theirs.double(), length=LENGTH)


def through_a_file(theirs, config: dict, sleep: dict) -> Model:
    """Our model, read from what a PyTorch user saves: safetensors and config.json."""
    from safetensors.torch import save_file

    tensors = {name: x.detach().contiguous() for name, x in theirs.state_dict().items()}
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]  # as transformers saves it
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.safetensors")
        save_file(tensors, file)
        weights = dict(ARCHITECTURE.to_ours(*item) for item in mx.load(str(file)).items())
        mx.eval(weights)
    config = ARCHITECTURE.config(json.loads(json.dumps(config)))
    model = Model(ModelArgs.from_dict({**config, "sleep": sleep}))
    model.load_weights(list(weights.items()))
    return model.eval()


def qwen_pair(rng: np.random.Generator) -> Pair:
    """A model of attn and swa layers alone, which is a Qwen2."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from mlx_sleep.convert.torch.jet_nemotron import randomize

    config = {**TIED, "layer_types": ["attn", "swa", "swa"], "num_hidden_layers": 3}
    kinds = {"attn": "full_attention", "swa": "sliding_attention"}
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    same += ("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings")
    model = Qwen2ForCausalLM(
        Qwen2Config(
            **{name: config[name] for name in same},
            rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
            layer_types=[kinds[kind] for kind in config["layer_types"]],
            use_sliding_window=True,
            sliding_window=config["efficient_attention_config"]["swa"]["window_size"],
            attn_implementation="eager",
        )
    ).eval()
    torch.manual_seed(int(rng.integers(2**31)))
    randomize(model)
    ours = through_a_file(model, config, {"window": 16})
    theirs = WithoutCache(model)
    return Pair(ARCHITECTURES[0], QWEN, ours, theirs, ("prefill", "steps"), LENGTH)


class WithoutCache:
    """A model of transformers that reads everything again in each call."""

    def __init__(self, model):
        self.model = model

    def fresh(self):
        return []

    def forward(self, tokens, state):
        import torch

        read = torch.cat([*(chunk["read"] for chunk in state), tokens], dim=1)
        logits = self.model(read).logits[:, -tokens.shape[1] :]
        return logits, [*state, {"read": tokens}]
