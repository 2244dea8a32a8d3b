"""mlx-lm's architectures, wrapped, against the PyTorch classes of transformers.

Tiny models with random weights are built by transformers, saved by its save_pretrained, converted
and compared. Shapes are odd on purpose: one KV head, Dk != Dv, 61 tokens.
Where mlx-lm and transformers differ and no test here can make them agree:
- Nemotron-H: transformers bounds the time step from below (time_step_min, 0.001) in chunks and
  not in single steps; mlx-lm takes time_step_limit in both. The weights here stay above it.
- Gemma 3: mlx-lm rounds the embedding's factor to bfloat16, the type that these models were trained
  in; here it is 4, which is exact.
- transformers 5.23 splits OLMo-hybrid's convolution into three equal parts when it saves, so the
  keys and values here are of one width, with Dk != Dv by their numbers of heads.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mlx_sleep.convert import pipeline
from mlx_sleep.models.load import load_model

from .cases import AWAKE, CASES, Pair
from .configs import CONFIGS
from .fla import WINDOW, randomize

ARCHITECTURES = tuple(CONFIGS)
SEED = 11


def pairs(architecture: str, rng: np.random.Generator) -> Iterator[Pair]:
    """The pair of each of the architecture's configs above."""
    for n in range(len(CONFIGS[architecture])):
        yield build(architecture, n, rng)


def build(architecture: str, n: int, rng: np.random.Generator) -> Pair:
    """The pair of one of CONFIGS, with fresh weights."""
    import transformers

    config, sleep = CONFIGS[architecture][n]
    sleep = {"window": WINDOW, **sleep}
    theirs = reference(config, sleep)
    _randomize(theirs.net, rng)
    with tempfile.TemporaryDirectory() as folder:
        theirs.net.save_pretrained(folder)
        ours = converted(Path(folder), sleep)
    name = f"transformers {transformers.__version__}, {type(theirs.net).__name__}"
    return Pair(architecture, name, ours, theirs, CASES if ours.has_fast_weights else AWAKE)


def reference(config: dict, sleep: dict):
    """The model of transformers, with fresh weights, as a reference of Pair."""
    from mlx_sleep.convert.torch.fla import TransformersMamba2
    from mlx_sleep.convert.torch.mlx_lm import Reference

    mamba = config["model_type"] == "mamba2"
    return TransformersMamba2(config) if mamba else Reference(config, sleep)


def converted(folder: Path, sleep: dict):
    """Our model of a checkpoint, by way of a converted folder."""
    with tempfile.TemporaryDirectory() as place:
        pipeline.convert(folder, Path(place) / "ours", sleep=sleep)
        model, _ = load_model(Path(place) / "ours")
    return model


def _randomize(net, rng: np.random.Generator) -> None:
    """As `fla.randomize`, with what transformers' models have besides.

    Layers of the delta rule write less into h than they read: three passes would else blow
    rounding up to 1e-4.
    """
    import torch

    randomize(net, rng)
    kind = net.config.model_type
    delta = kind if hasattr(net.config, "linear_conv_kernel_dim") else ""
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim == 3 and "conv" not in name:  # experts, each a matrix
                p.mul_(p.shape[1] ** 0.5)
            if delta and re.search(_WRITES, name):
                p.mul_(0.5)
            if ("qwen" in delta or "gemma" in kind) and re.search(_AROUND_0, name):
                p.sub_(1)  # these scale by 1 + w
        for name, b in net.named_buffers():
            if name.endswith("e_score_correction_bias"):
                b.copy_(torch.from_numpy(rng.normal(size=b.shape) * 0.1))


_WRITES = r"o_proj|out_proj|down_proj|lm_head|post_feedforward_layernorm|post_attention_layernorm"
_AROUND_0 = r"layernorm|model\.norm|[qk]_norm"
