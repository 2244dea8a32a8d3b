"""Ouro, and Ouro with sleep layers, against PyTorch on the same random weights.

The PyTorch side (`convert.torch.ouro`) computes in float64, row by row and token by token; ours in
float32, in batches and chunks, from tensors that went through the checkpoint's file and the
converter's mapping. Ouro alone has no fast weights: its cases are those without a sleep.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_sleep.convert.architectures.ouro import ARCHITECTURE
from mlx_sleep.models.load import build as build_model

from .cases import AWAKE, Pair

ARCHITECTURES = ("ouro", "ouro + sleep layers")
REFERENCE = "PyTorch model written after the makers' code and arXiv 2605.26099, in float64"
EARLY = 0.6  # an early_exit_threshold at which tokens stop at every loop
SEED = 13
WINDOW = 9

_JET = {
    "kind": "jet",
    "num_heads": 2,
    "head_dim": 6,
    "expand_v": 1.5,
    "conv_size": 4,
    "norm_eps": 1e-2,
    "dconv_generator_reduction": 3,
}
_GATED_DELTANET = {
    "kind": "gated_deltanet",
    "num_heads": 3,
    "head_dim": 10,
    "expand_v": 0.7,
    "conv_size": 3,
    "norm_eps": 2e-2,
}
SLEEP_LAYERS = [
    {"before": 0, **_JET},
    {"before": 2, **_GATED_DELTANET},
    {"before": 2, **_JET, "head_dim": 96, "expand_v": 256 / 96, "num_heads": 1},
    {"before": 3, **_JET},
]
"""One before all blocks, two in a row, one of the size of Jet-Nemotron's heads, one after all."""


def config(**changes) -> dict:
    """A small checkpoint's config.json, in the makers' fields: one KV head, odd sizes."""
    return {
        "model_type": "ouro",
        "vocab_size": 61,
        "hidden_size": 26,
        "intermediate_size": 23,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "total_ut_steps": 3,
        "early_exit_threshold": 1.0,
        "tie_word_embeddings": False,
        **changes,
    }


def pairs(architecture: str, rng: np.random.Generator) -> Iterator[Pair]:
    """`ouro` as published, or `ouro + sleep layers`, with hard and with sliding eviction."""
    hard, sliding = {"window": WINDOW}, {"window": WINDOW, "eviction": "sliding"}
    if architecture == "ouro":
        yield build(config(), hard, rng)
        yield build(config(early_exit_threshold=EARLY), sliding, rng)
    else:
        for sleep in (hard, sliding):
            yield build(config(sleep_layers=SLEEP_LAYERS), sleep, rng)


def build(theirs: dict, sleep: dict, rng: np.random.Generator) -> Pair:
    """The pair of a checkpoint's config, with fresh weights. Without sleep layers nothing sleeps:
    a window is read and evicted."""
    import torch

    from mlx_sleep.convert.torch.ouro import Ouro

    reference = Ouro(theirs, {"eviction": "hard", **sleep})
    with torch.no_grad():
        for name, p in reference.named_parameters():
            p.copy_(torch.tensor(_weight(name, tuple(p.shape), rng)))
    ours = _convert(reference, theirs, sleep)
    if "sleep_layers" in theirs:
        return Pair(ARCHITECTURES[1], REFERENCE, ours, Rows(reference.double()))
    cases = (*AWAKE, "evicted")
    return Pair(ARCHITECTURES[0], REFERENCE, ours, Rows(reference.double()), cases)


def _weight(name: str, shape: tuple[int, ...], rng: np.random.Generator):
    """Random weights of a model that is as tame as a trained one.

    At full strength, layers in a loop make rounding grow a thousandfold, in torch as well; so
    does a norm of what a random S answers, which is near zero at times (hence norm_eps).
    """
    x = rng.standard_normal(shape)
    if "norm" in name or name.endswith("A_log"):
        return (1 + 0.3 * x) * (0.3 if "layernorm_2" in name else 1)
    if name.endswith("dt_bias"):
        return x - 2  # forgets over about ten tokens
    if "early_exit_gate" in name:
        return x / 2  # sure of itself, in both directions, and never so that a sum rounds to 1
    x = 0.5 * x if len(shape) == 1 else x / shape[-1] ** 0.5
    quiet = name.startswith("sleep_layers") and name.split(".")[-2] in ("o_proj", "out_proj")
    return 0.3 * x if quiet else x


def _convert(reference, theirs: dict, sleep: dict):
    from safetensors.torch import save_file

    config = {**ARCHITECTURE.config(theirs), "sleep": sleep}
    model = build_model(config)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file(reference.state_dict(), file)
        weights = [ARCHITECTURE.to_ours(*item) for item in mx.load(str(file)).items()]
        model.load_weights(weights, strict=True)
        mx.eval(model.parameters())
    return model


class RowStates(list):
    """The states of some rows, and tokens seen; as a list, S [B, H, Dv, Dk] of each loop's blocks,
    in the order of our state."""

    def __init__(self, rows: list[dict], seen: int):
        import torch

        places = [[row[at] for row in rows] for at in sorted(rows[0])]
        super().__init__(
            {"S": torch.stack([entry["S"] for entry in entries])} if "S" in entries[0] else {}
            for entries in places
        )
        self.rows, self.seen = rows, seen


class Rows:
    """The reference, which runs one row at a time, on batches."""

    def __init__(self, model):
        self.model = model

    def fresh(self):
        return None

    def forward(self, tokens, state):
        import torch

        rows, seen = self._open(tokens, state)
        pairs = [self.model(x, row, seen) for x, row in zip(tokens, rows, strict=True)]
        logits, rows = zip(*pairs, strict=True)
        return torch.stack(logits), RowStates(list(rows), seen + tokens.shape[1])

    def consolidate(self, tokens, state, passes):
        rows, seen = self._open(tokens, state)
        rows = [
            self.model.consolidate(x, row, passes, seen)
            for x, row in zip(tokens, rows, strict=True)
        ]
        return RowStates(rows, seen + tokens.shape[1])

    def evict(self, state: RowStates) -> RowStates:
        return RowStates([self.model.evict(row) for row in state.rows], state.seen)

    def _open(self, tokens, state: RowStates | None):
        return (state.rows, state.seen) if state is not None else ([{} for _ in tokens], 0)
