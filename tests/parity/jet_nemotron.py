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
from mlx_sleep.sleep import consolidate

from . import CASES, Case, worst_of

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
LENGTH = 37  # of the longest inputs: more than one chunk of the recurrence, and no multiple of one


def run(architecture: str) -> Iterator[Case]:
    """All cases; each is the worst of both VARIANTS. Random weights and tokens, new each time."""
    pairs = [pair(config, sleep) for config, sleep in VARIANTS]
    rng = np.random.default_rng()
    for case in CASES:
        found = [error for ours, theirs in pairs for error in compare(case, ours, theirs, rng)]
        yield worst_of(architecture, REFERENCE, case, found)
    ours, theirs = qwen_pair()
    for case in ("prefill", "steps"):
        yield worst_of(architecture, QWEN, case, compare(case, ours, theirs, rng))


def pair(config: dict, sleep: dict):
    """(ours, theirs) with the same random weights; theirs in float64, but for the recurrence."""
    from mlx_sleep.convert.torch.jet_nemotron import JetNemotron, randomize

    theirs = JetNemotron(config, sleep).eval()
    randomize(theirs)
    return through_a_file(theirs, config, sleep), theirs.double()


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


def compare(case: str, ours: Model, theirs, rng) -> list[tuple[float, float]]:
    """(largest logit difference, greedy agreement) of each comparison that belongs to the case."""
    import torch

    vocab = ours.args.vocab_size

    def reference(tokens, state=None):
        logits, state = theirs(torch.tensor(tokens), state)
        return logits.numpy(), state

    with torch.no_grad():
        if case == "padded":
            return _padded(ours, theirs, rng, reference)
        tokens = rng.integers(0, vocab, (2, LENGTH))
        if case == "prefill":
            return [difference(ours(mx.array(tokens))[0], reference(tokens)[0])]
        if case == "steps":
            state, logits = None, []
            for t in range(LENGTH):
                one, state = ours(mx.array(tokens[:, t : t + 1]), state)
                logits.append(one)
            return [difference(mx.concatenate(logits, axis=1), reference(tokens)[0])]
        windows = 2 if case == "evicted" else 1
        passes = 2 if case == "evicted" else int(case.removeprefix("sleep_"))
        L = ours.sleep.window
        found, mine, other = [], None, None
        for _ in range(windows):
            window = rng.integers(0, vocab, (2, L))
            if mine is not None:  # awake, the window is read behind what the eviction left
                found.append(
                    difference(ours(mx.array(window), mine)[0], reference(window, other)[0])
                )
            start = ours.init_state(2) if mine is None else mine
            mine, _ = consolidate(ours, start, mx.array(window), passes)
            other = theirs.sleep(torch.tensor(window), passes, other)
        answer = rng.integers(0, vocab, (2, L - 2))
        found.append(difference(ours(mx.array(answer), mine)[0], reference(answer, other)[0]))
        return found


def _padded(ours, theirs, rng, reference):
    """A batch padded on the right against its rows, each alone and without padding.

    Two chunks awake, and a sleep over the first with the second as its prediction chunk.
    """
    import torch

    first, second = (LENGTH, 6, 1), (3, 5, 4)
    found = []
    chunks = [
        (rng.integers(0, ours.args.vocab_size, (3, max(lengths))), lengths)
        for lengths in (first, second)
    ]
    masks = [mx.array(np.arange(x.shape[1]) < np.array(n)[:, None]) for x, n in chunks]
    (a, n), (b, m) = chunks
    logits, state = ours(mx.array(a), None, masks[0])
    later, _ = ours(mx.array(b), state, masks[1])
    slept, _ = consolidate(ours, ours.init_state(3), mx.array(a), 2, mask=masks[0])
    answer, _ = ours(mx.array(b), slept, masks[1])
    for row in range(3):
        x, y = a[row : row + 1, : n[row]], b[row : row + 1, : m[row]]
        alone, state = reference(x)
        found.append(difference(logits[row, : n[row]], alone[0]))
        found.append(difference(later[row, : m[row]], reference(y, state)[0][0]))
        state = theirs.sleep(torch.tensor(x), 2)
        found.append(difference(answer[row, : m[row]], reference(y, state)[0][0]))
    return found


def difference(ours: mx.array, theirs: np.ndarray) -> tuple[float, float]:
    """(largest absolute difference, part of positions with the same largest logit)."""
    ours = np.array(ours)
    same = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    return float(np.abs(ours - theirs).max()), float(same)


def qwen_pair():
    """(ours, theirs) for a model of attn and swa layers alone, which is a Qwen2."""
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
    randomize(model)

    def theirs(tokens: torch.Tensor, state=None):
        assert state is None
        return model(tokens).logits, None

    return through_a_file(model, config, {"window": 16}), theirs
