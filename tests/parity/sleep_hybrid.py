"""sleep_hybrid against its PyTorch definition, on the same random weights.

The checkpoint goes through a file and the whole converter. PyTorch computes in float64.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_sleep.convert.pipeline import convert
from mlx_sleep.models.base import evict
from mlx_sleep.models.load import load_model
from mlx_sleep.sleep import passes_over

from . import CASES, Case

ARCHITECTURES = ("sleep_hybrid",)
REFERENCE = "this project's PyTorch definition, in float64"
WINDOW = 9

_SHARED = {
    "model_type": "sleep_hybrid",
    "vocab_size": 61,
    "hidden_size": 36,
    "intermediate_size": 44,
    "layer_types": ["gated_deltanet", "attention", "mamba2", "attention", "gated_deltanet"],
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "mamba_num_heads": 4,
    "mamba_n_groups": 2,
    "mamba_head_dim": 10,
    "ssm_state_size": 7,
}
CONFIGS = (
    {
        **_SHARED,
        "head_dim": 10,
        "tie_word_embeddings": False,
        "sleep": {"window": WINDOW, "eviction": "hard", "loop_range": [1, 4]},
    },
    {
        **_SHARED,
        "qk_norm": False,
        "hidden_act": "gelu",
        "linear_conv_kernel_dim": 3,
        "sleep": {"window": WINDOW, "eviction": "sliding"},
    },
)
"""One KV head, Dk unlike Dv, several value heads a key head, odd sizes, tied and untied."""


def run(architecture: str) -> Iterator[Case]:
    """The worst of CONFIGS in each case."""
    found = [compare(config, seed) for seed, config in enumerate(CONFIGS)]
    for case in CASES:
        errors, agreements = zip(*(each[case] for each in found), strict=True)
        yield Case(architecture, REFERENCE, case, max(errors), min(agreements))


def pair(config: dict, seed: int, folder: Path):
    """(ours, theirs) with the same random weights; ours went through `folder`."""
    import torch
    from safetensors.torch import save_model

    from mlx_sleep.convert.torch.sleep_hybrid import SleepHybrid

    torch.manual_seed(seed)
    theirs = SleepHybrid(config)
    with torch.no_grad():
        for name, x in theirs.named_parameters():
            if x.ndim == 1 and not name.endswith(("A_log", "dt_bias")):
                x.add_(0.3 * torch.randn_like(x))  # norms and biases that would hide a mix-up
    (folder / "torch").mkdir()
    save_model(theirs, str(folder / "torch" / "model.safetensors"))
    (folder / "torch" / "config.json").write_text(json.dumps(config))
    convert(folder / "torch", folder / "ours")
    return load_model(folder / "ours")[0], theirs.double()


def compare(config: dict, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Case -> (largest difference of logits, agreement of greedy tokens)."""
    import torch

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        ours, theirs = pair(config, seed, Path(folder))
        rng = np.random.default_rng(seed)
        first, second, prompt = (rng.integers(0, 61, (2, n)) for n in (WINDOW, 7, 5))
        there = [torch.from_numpy(x) for x in (first, second, prompt)]
        here = [mx.array(x) for x in (first, second, prompt)]
        fresh, theirs_fresh = ours.init_state(2), theirs.fresh()
        found = {}

        logits, _ = ours(here[0], fresh)
        expected = theirs(there[0], theirs_fresh)[0].numpy()
        found["prefill"] = _difference(logits, expected)

        state, steps = fresh, []
        for t in range(WINDOW):
            logits, state = ours(here[0][:, t : t + 1], state)
            steps.append(logits)
        found["steps"] = _difference(mx.concatenate(steps, 1), expected)

        found["padded"] = _padded(ours, theirs, first, second)

        for n in (1, 2, 3):
            state = passes_over(ours, here[0], fresh, n)
            their_state = theirs.consolidate(there[0], theirs_fresh, n)
            found[f"sleep_{n}"] = _difference(
                ours(here[2], state)[0], theirs(there[2], their_state)[0].numpy()
            )

        # Behind the eviction of a window that was read, and a sleep over one more.
        state = evict(ours(here[0], fresh)[1], ours.sleep)
        their_state = theirs.evict(theirs(there[0], theirs_fresh)[1])
        state = passes_over(ours, here[1], state, 2)
        their_state = theirs.consolidate(there[1], their_state, 2)
        found["evicted"] = _difference(
            ours(here[2], state)[0], theirs(there[2], their_state)[0].numpy()
        )
        return found


def _padded(ours, theirs, first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Rows of different lengths in one batch, twice, against each row alone."""
    import torch

    worst = []
    lengths = ((WINDOW, 4), (3, 7))  # of the two rows, in the two chunks
    state, their_states = ours.init_state(2), [theirs.fresh(), theirs.fresh()]
    for tokens, counts in zip((first, second), lengths, strict=True):
        mask = mx.array(np.arange(tokens.shape[1]) < np.array(counts)[:, None])
        logits, state = ours(mx.array(tokens), state, mask)
        for row, count in enumerate(counts):
            alone = torch.from_numpy(tokens[row : row + 1, :count])
            expected, their_states[row] = theirs(alone, their_states[row])
            worst.append(_difference(logits[row : row + 1, :count], expected.numpy()))
    errors, agreements = zip(*worst, strict=True)
    return max(errors), min(agreements)


def _difference(ours: mx.array, theirs: np.ndarray) -> tuple[float, float]:
    got = np.array(ours)
    return float(np.abs(got - theirs).max()), float((got.argmax(-1) == theirs.argmax(-1)).mean())
