"""fla_gated_deltanet and fla_mamba2 against PyTorch, over the options of their configs.

The references are fla's definitions in plain PyTorch (`convert.torch.fla`) and, for Mamba-2, the
model of transformers as it is. Weights are random, of no symmetry and without zeros; shapes are
odd.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sleep.convert.architectures.base import Architecture
from mlx_sleep.convert.architectures.fla_gated_deltanet import ARCHITECTURE as GATED_DELTANET
from mlx_sleep.convert.architectures.fla_mamba2 import ARCHITECTURE as MAMBA2
from mlx_sleep.models.load import get_model_classes
from mlx_sleep.sleep import consolidate

from . import Case, worst

ARCHITECTURES = (GATED_DELTANET.model_type, MAMBA2.model_type)
WINDOW = 12
FLA = "flash-linear-attention 0.6.0, its definitions in plain PyTorch"
TRANSFORMERS = "transformers, Mamba2ForCausalLM"

_DELTA = {
    "model_type": "gated_deltanet",
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "head_dim": 6,
    "num_heads": 3,
    "intermediate_size": 20,
    "norm_eps": 1e-6,
}
_MAMBA = {
    "model_type": "mamba2",
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "head_dim": 8,
    "state_size": 10,
    "use_conv_bias": True,
    "norm_eps": 1e-5,
}
_ONE_KV_HEAD = {"num_heads": 4, "num_kv_heads": 1}

CONFIGS: dict[str, tuple[dict, dict]] = {
    # name: (config of the checkpoint, how it sleeps)
    "delta": ({**_DELTA, "attn": {"layers": [0, 2], **_ONE_KV_HEAD}}, {}),
    "delta, bare": (  # no convolutions, no gate, more value heads, negative eigenvalues, tied
        {
            **_DELTA,
            "num_hidden_layers": 4,
            "expand_v": 1.5,
            "num_v_heads": 6,
            "use_short_conv": False,
            "use_gate": False,
            "allow_neg_eigval": True,
            "hidden_act": "powlu",
            "tie_word_embeddings": True,
            "attn": [
                {"layers": [1], "num_heads": 2, "qkv_bias": True, "window_size": 5},
                {"layers": [3], "num_heads": 3, "qk_norm": True, "rope_theta": 300.0},
            ],
        },
        {"loop_range": (1, 3)},
    ),
    "delta, 96 x 256": (
        {
            **_DELTA,
            "num_hidden_layers": 2,
            "head_dim": 96,
            "expand_v": 8 / 3,
            "num_heads": 1,
            "conv_size": 3,
            "conv_bias": True,
            "output_gate_activation": "sigmoid",
            "intermediate_size": None,
            "attn": {"layers": [1], **_ONE_KV_HEAD},
        },
        {"eviction": "sliding"},
    ),
    "mamba": (
        {
            **_MAMBA,
            "n_groups": 2,
            "dt_limit": (0.01, 0.5),
            "attn": {"layers": [1], **_ONE_KV_HEAD, "window_size": 7},
        },
        {},
    ),
    "mamba, biases": (
        {
            **_MAMBA,
            "use_bias": True,
            "use_conv_bias": False,
            "D_has_hdim": True,
            "rmsnorm": False,
            "conv_kernel": 3,
            "tie_word_embeddings": True,
            "attn": {"layers": [0], **_ONE_KV_HEAD},
        },
        {"eviction": "sliding"},
    ),
    "mamba, norm before gate": (
        {**_MAMBA, "n_groups": 3, "use_conv_bias": False, "norm_before_gate": True},
        {},
    ),
    "mamba, transformers": (
        {
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
            "time_step_limit": (0.0, float("inf")),
        },
        {},
    ),
}


@dataclass(frozen=True)
class Pair:
    """One model twice: theirs in PyTorch, ours with its weights converted."""

    architecture: str
    reference: str
    theirs: Any
    ours: Any


@dataclass(frozen=True)
class Compared:
    """Logits of one case (and S in the layers that have it), float32 numpy, ours and theirs."""

    case: str
    ours: np.ndarray
    theirs: np.ndarray
    our_S: list[np.ndarray]
    their_S: list[np.ndarray]


def run(architecture: str) -> Iterator[Case]:
    """One row a case and reference: the worst of the configs above."""
    rng = np.random.default_rng(7)
    names = [n for n, (c, _) in CONFIGS.items() if _architecture(c).model_type == architecture]
    pairs = (build(name, rng) for name in names)
    return worst(
        architecture,
        ((pair.reference, c.case, c.ours, c.theirs) for pair in pairs for c in compare(pair, rng)),
    )


def _architecture(config: dict) -> Architecture:
    return GATED_DELTANET if config["model_type"] == "gated_deltanet" else MAMBA2


def build(name: str, rng: np.random.Generator) -> Pair:
    """The pair of one of CONFIGS, with fresh weights."""
    from mlx_sleep.convert.torch import fla as fla_torch

    config, sleep = CONFIGS[name]
    sleep = {"window": WINDOW, **sleep}
    from_transformers = "transformers" in name
    if from_transformers:
        theirs = fla_torch.TransformersMamba2(config)
        net = theirs.net
    else:
        theirs = net = fla_torch.Reference(config, sleep)
    randomize(net, rng)
    tensors = {name: x.detach().numpy() for name, x in net.state_dict().items()}
    return Pair(
        architecture=_architecture(config).model_type,
        reference=TRANSFORMERS if from_transformers else FLA,
        theirs=theirs,
        ours=converted(config, sleep, tensors),
    )


def converted(config: dict, sleep: dict, tensors: dict[str, np.ndarray]):
    """Our model of a checkpoint: the architecture's mapping, and every tensor accounted for."""
    architecture = _architecture(config)
    model_class, args_class = get_model_classes(architecture.model_type)
    ours = architecture.config(config)
    model = model_class(args_class.from_dict({**ours, "sleep": sleep}))
    weights = [architecture.to_ours(n, mx.array(x)) for n, x in tensors.items()]
    if config.get("tie_word_embeddings"):
        weights = [(n, x) for n, x in weights if n != "lm_head.weight"]
    model.load_weights(weights, strict=True)
    return model


def randomize(net, rng: np.random.Generator) -> None:
    """Weights of a trained model's scale in every parameter: no zeros, no ones, no equal heads."""
    import torch

    with torch.no_grad():
        for name, p in net.named_parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 1
            x = rng.normal(size=p.shape) * fan_in**-0.5
            if name.endswith("A_log"):
                x = np.log(rng.uniform(0.5, 8, p.shape))
            elif name.endswith("dt_bias"):
                x = rng.uniform(-3, 0, p.shape)
            elif "norm" in name or name.endswith(".D"):
                x = 1 + 0.3 * x
            elif p.ndim == 1:
                x = 0.3 * x
            p.copy_(torch.from_numpy(x))


def compare(pair: Pair, rng: np.random.Generator) -> Iterator[Compared]:
    """All cases of one pair, on fresh tokens."""
    ours, theirs = _Ours(pair.ours), pair.theirs
    vocab = pair.ours.args.vocab_size

    def tokens(*shape):
        return rng.integers(0, vocab, shape)

    def both(case, run):
        a, b = run(ours), run(theirs)
        return Compared(case, _numpy(a[0]), _numpy(b[0]), _S(a[1]), _S(b[1]))

    x = tokens(2, 19)
    yield both("prefill", lambda m: m.forward(x, m.fresh()))

    def steps(m):
        state, logits = m.fresh(), []
        for t in range(13):
            out, state = m.forward(x[:, t : t + 1], state)
            logits.append(_numpy(out))
        return np.concatenate(logits, 1), state

    yield both("steps", steps)
    yield _padded(pair, tokens)

    first, second, question = tokens(2, WINDOW), tokens(2, WINDOW - 3), tokens(2, 7)
    for n in (1, 2, 3):

        def slept(m, n=n):
            return m.forward(question, m.consolidate(first, m.fresh(), n))

        yield both(f"sleep_{n}", slept)

    def evicted(m):
        return m.forward(question, m.consolidate(second, m.consolidate(first, m.fresh(), 2), 2))

    yield both("evicted", evicted)


def _padded(pair: Pair, tokens) -> Compared:
    """Two right-padded chunks of a batch, against each row alone in chunks of its own length."""
    lengths, chunks = [[9, 4], [2, 7], [5, 1]], []
    state, alone = pair.ours.init_state(2), [pair.theirs.fresh() for _ in range(2)]
    ours, theirs, S = [], [], [None, None]
    for pair_of_lengths in lengths:
        x = tokens(2, 9)
        chunks.append(x)
        mask = mx.arange(9) < mx.array(pair_of_lengths)[:, None]
        logits, state = pair.ours(mx.array(x), state, mask)
        for row, n in enumerate(pair_of_lengths):
            expected, alone[row] = pair.theirs.forward(x[row : row + 1, :n], alone[row])
            ours.append(np.array(logits[row, :n]))
            theirs.append(_numpy(expected)[0])
            S[row] = _S(alone[row])
    rows = [np.concatenate(layer) for layer in zip(*S, strict=True)]
    return Compared("padded", np.concatenate(ours), np.concatenate(theirs), _S(state), rows)


class _Ours:
    """Our model with the methods of a reference."""

    def __init__(self, model):
        self.model = model

    def fresh(self):
        return self.model.init_state()

    def forward(self, x, state):
        return self.model(mx.array(x), state)

    def consolidate(self, x, state, passes):
        return consolidate(self.model, state, mx.array(x), passes)[0]


def _numpy(x) -> np.ndarray:
    return np.asarray(x, dtype=np.float32)


def _S(state) -> list[np.ndarray]:
    """S of every layer that has one, from any of the three kinds of state."""
    if not isinstance(state, list):  # a cache of transformers
        return [_numpy(layer.recurrent_states[0]) for layer in state.layers]
    names = ("fast_weights", "S")
    return [_numpy(layer[n]) for layer in state for n in names if n in layer]
