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
from mlx_sleep.models import inserted
from mlx_sleep.models.base import evict
from mlx_sleep.models.ouro import Model, ModelArgs
from mlx_sleep.sleep import consolidate

from . import CASES, Case, worst

ARCHITECTURES = ("ouro", "ouro + sleep layers")
REFERENCE = "PyTorch model written after the makers' code and arXiv 2605.26099, in float64"
EARLY = 0.6  # an early_exit_threshold at which tokens stop at every loop
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
"""One before all blocks, two in a row, one of the size of Jet-Nemotron's heads, one behind all."""


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


def run(architecture: str) -> Iterator[Case]:
    """`ouro` as published, or `ouro + sleep layers`, with hard and with sliding eviction."""
    hard, sliding = {"window": WINDOW}, {"window": WINDOW, "eviction": "sliding"}
    if architecture == "ouro":
        alone = [(config(), hard), (config(early_exit_threshold=EARLY), sliding)]
        yield from compare(architecture, alone, ("prefill", "steps", "padded", "evicted"))
    else:
        sleeping = config(sleep_layers=SLEEP_LAYERS)
        yield from compare(architecture, [(sleeping, hard), (sleeping, sliding)], CASES)


def compare(architecture: str, variants: list[tuple[dict, dict]], cases) -> Iterator[Case]:
    """Each case once, the worst of all variants: (their config, how ours sleeps)."""
    pairs = [Pair(*variant) for variant in variants]
    return worst(
        architecture,
        ((REFERENCE, name, *pair.case(name)) for name in cases for pair in pairs),
    )


class Pair:
    """Ours and theirs, on the same random weights."""

    def __init__(self, theirs: dict, sleep: dict, seed: int | None = None):
        import torch

        from mlx_sleep.convert.torch.ouro import Ouro

        self.rng = np.random.default_rng(seed)
        self.theirs = Ouro(theirs, {"eviction": "hard", **sleep})
        with torch.no_grad():
            for name, p in self.theirs.named_parameters():
                p.copy_(torch.tensor(self._weight(name, tuple(p.shape))))
        self.ours = self._convert(theirs, sleep)
        self.theirs.double()

    def _weight(self, name, shape):
        """Random weights of a model that is as tame as a trained one.

        At full strength, layers in a loop make rounding grow a thousandfold, in torch as well; so
        does a norm of what a random S answers, which is near zero at times (hence norm_eps).
        """
        x = self.rng.standard_normal(shape)
        if "norm" in name or name.endswith("A_log"):
            return (1 + 0.3 * x) * (0.3 if "layernorm_2" in name else 1)
        if name.endswith("dt_bias"):
            return x - 2  # forgets over about ten tokens
        if "early_exit_gate" in name:
            return x  # sure of itself, in both directions
        x = 0.5 * x if len(shape) == 1 else x / shape[-1] ** 0.5
        quiet = name.startswith("sleep_layers") and name.split(".")[-2] in ("o_proj", "out_proj")
        return 0.3 * x if quiet else x

    def _convert(self, theirs: dict, sleep: dict):
        from safetensors.torch import save_file

        config = {**ARCHITECTURE.config(theirs), "sleep": sleep}
        model = Model(ModelArgs.from_dict(config))
        if "sleep_layers" in config:
            model = inserted.wrap(model, config)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.safetensors"
            save_file(self.theirs.state_dict(), file)
            weights = [ARCHITECTURE.to_ours(*item) for item in mx.load(str(file)).items()]
            model.load_weights(weights, strict=True)
            mx.eval(model.parameters())
        return model

    def case(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(our logits, theirs) [positions, vocab] of one case, on fresh tokens."""
        if name.startswith("sleep_"):
            return self.sleep(int(name.removeprefix("sleep_")))
        return getattr(self, name)()

    def tokens(self, *shape):
        return self.rng.integers(0, self.ours.args.vocab_size, shape)

    def prefill(self):
        """Two chunks of a batch: the second one meets the KV and the S of the first."""
        x = self.tokens(2, 13)
        first, state = self.ours(mx.array(x[:, :8]))
        second, _ = self.ours(mx.array(x[:, 8:]), state)
        return _flat([first, second]), self.rows(x, 8)

    def rows(self, x, split):
        """Their logits of each row in two chunks, in the order of `_flat`."""
        logits = [[], []]
        for row in x:
            first, state = self.wake(row[:split], {}, 0)
            logits[0].append(first)
            logits[1].append(self.wake(row[split:], state, split)[0])
        return _flat([np.stack(chunk) for chunk in logits])

    def steps(self):
        """Token by token, past the end of the window that a sliding eviction attends to."""
        x = self.tokens(WINDOW + 4)
        state, logits = self.ours.init_state(), []
        for token in x.tolist():
            out, state = self.ours(mx.array([[token]]), state)
            logits.append(out)
        return _flat(logits), self.wake(x, {}, 0)[0]

    def padded(self):
        """Two right-padded chunks; their rows run alone, without padding."""
        x, lengths = self.tokens(3, 10), ((5, 2), (1, 5), (3, 4))
        masks = [mx.arange(5) < mx.array(real)[:, None] for real in zip(*lengths, strict=True)]
        first, state = self.ours(mx.array(x[:, :5]), None, masks[0])
        second, _ = self.ours(mx.array(x[:, 5:]), state, masks[1])
        ours, theirs = [], []
        for b, (n, m) in enumerate(lengths):
            ours += [first[b, :n], second[b, :m]]
            row = np.concatenate([x[b, :n], x[b, 5 : 5 + m]])
            theirs.append(self.wake(row, {}, 0)[0])
        return _flat(ours), np.concatenate(theirs)

    def sleep(self, passes):
        """A sleep of N passes over one window, then a chunk that reads what it left."""
        x, y = self.tokens(2, WINDOW), self.tokens(2, 6)
        state, _ = consolidate(self.ours, self.ours.init_state(), mx.array(x), passes)
        theirs = [self.fall_asleep(row, {}, passes, 0) for row in x]
        ours, _ = self.ours(mx.array(y), state)
        pairs = zip(y, theirs, strict=True)
        return _flat([ours]), np.concatenate([self.wake(row, s, WINDOW)[0] for row, s in pairs])

    def evicted(self):
        """A window, an eviction, a shorter window on what is left, an eviction, and a chunk."""
        x, passes, seen = self.tokens(WINDOW + 5 + 4), (2, 4), 0
        state, theirs = self.ours.init_state(), {}
        for length, n in zip((WINDOW, 5), passes, strict=True):
            part = x[seen : seen + length]
            if self.ours.has_fast_weights:
                state, _ = consolidate(self.ours, state, mx.array(part[None]), n)
                theirs = self.fall_asleep(part, theirs, n, seen)
            else:
                _, state = self.ours(mx.array(part[None]), state)
                state = evict(state, self.ours.sleep)
                theirs = self.theirs.evict(self.wake(part, theirs, seen)[1])
            seen += length
        ours, _ = self.ours(mx.array(x[None, seen:]), state)
        return _flat([ours]), self.wake(x[seen:], theirs, seen)[0]

    def wake(self, tokens, state, seen):
        import torch

        logits, state = self.theirs(torch.tensor(tokens), state, seen)
        return logits.numpy(), state

    def fall_asleep(self, tokens, state, passes, seen):
        import torch

        return self.theirs.fall_asleep(torch.tensor(tokens), state, passes, seen)


def _flat(logits) -> np.ndarray:
    return np.concatenate([np.array(x).reshape(-1, x.shape[-1]) for x in logits])
