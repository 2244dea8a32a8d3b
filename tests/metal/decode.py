"""How many kernels one token of a whole model would launch on a Metal GPU, counted without one.

A token's graph is built, never run, and its primitives are counted: all but those that only look
at an array in another way. What MLX has one Metal kernel for, and its CPU backend several
operations (RMSNorm, RoPE, attention), counts as one, as does a kernel of ours. Where MLX launches
several kernels for a primitive (a concatenation of n arrays, attention over a long cache), this
counts one.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import mlx.core as mx
from mlx.utils import tree_map

from mlx_sleep.kernels import chunks, conv, delta_attention, gated_delta, ssd
from mlx_sleep.models import sleep_hybrid
from mlx_sleep.models.base import SleepModel, State
from mlx_sleep.models.inserted import Inserted
from mlx_sleep.models.load import EMBEDDED, load_model
from mlx_sleep.models.mlx_lm_model import Model, ModelArgs
from mlx_sleep.ops.paths import VARIABLE

VIEWS = set(
    "Broadcast Transpose Flatten Unflatten Slice Squeeze ExpandDims Reshape Split AsStrided "
    "StopGradient CustomTransforms".split()
)
FAST = ("rms_norm", "rope", "scaled_dot_product_attention")


def primitives(model: SleepModel, kernels: str) -> Counter:
    """The primitives of a token, by name, where the KV cache has room for it; in 16 bits.

    kernels  "metal" or "array", as MLX_SLEEP_KERNELS
    """
    model.set_dtype(mx.bfloat16)
    model.update(tree_map(_blank, model.parameters()))
    with _counting(kernels):
        _, state = model(mx.array([[1, 2, 3]]))
        _, state = model(mx.array([[4]]), _blank_state(state))  # the cache gets room
        logits, state = model(mx.array([[5]]), _blank_state(state))
    results = [x for layer in state for x in layer.values() if isinstance(x, mx.array)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "graph.dot"
        mx.export_to_dot(str(file), logits, *results)
        names = re.findall(r'label ?="([A-Za-z]\w+)"', file.read_text())
    return Counter(name for name in names if name not in VIEWS)


def _blank(x):
    """An array of the same shape and dtype that is there already."""
    return _zeros(x.shape, x.dtype) if isinstance(x, mx.array) else x


def _zeros(shape, dtype):
    zero = mx.array(0, dtype)
    mx.eval(zero)
    return mx.broadcast_to(zero, shape)


def _blank_state(state: State) -> State:
    return [{name: _blank(x) for name, x in layer.items()} for layer in state]


def _one(inputs, shapes, dtypes) -> list[mx.array]:
    """Arrays that one primitive makes of others."""
    likes = zip(shapes, dtypes, strict=True)
    blank = [_zeros(shape, dtype) for shape, dtype in likes]
    return mx.depends(blank, [x for x in inputs if isinstance(x, mx.array)])


def _fast(name: str):
    def stand_in(x, *others, **_options):
        arrays = [x, *(y for y in others if isinstance(y, mx.array))]
        return _one(arrays, [x.shape], [x.dtype])[0]

    return mock.patch.object(mx.fast, name, stand_in)


@contextlib.contextmanager
def _counting(kernels: str) -> Iterator[None]:
    def kernel(_file, _name):
        return lambda *, inputs, output_shapes, output_dtypes, **_launch: _one(
            inputs, output_shapes, output_dtypes
        )

    with contextlib.ExitStack() as stack:
        for module in (chunks, conv, delta_attention, gated_delta, ssd):
            stack.enter_context(mock.patch.object(module, "kernel", kernel))
        for name in FAST:
            stack.enter_context(_fast(name))
        stack.enter_context(mock.patch.object(mx, "default_device", lambda: mx.Device(mx.gpu)))
        stack.enter_context(mock.patch.dict(os.environ, {VARIABLE: kernels}))
        yield


def models() -> dict[str, SleepModel]:
    """The embedded model; those below have the shapes of others and weights of their own."""
    return {"embedded": load_model(EMBEDDED)[0], "SmolLM2": smollm2(), "Qwen3-Next": qwen3_next()}


def smollm2(blocks: int = 30, layers: int = 6) -> SleepModel:
    """SmolLM2-135M with sleep layers."""
    config = {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": blocks,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0,
        "tie_word_embeddings": True,
    }
    layer = {"kind": "delta_attention", "num_heads": 9, "head_dim": 64}
    befores = [blocks * (i + 1) // (layers + 1) for i in range(layers)]
    host = Model(ModelArgs.from_dict(config))
    return Inserted(host, [{"before": before, **layer} for before in befores])


def qwen3_next(periods: int = 12) -> SleepModel:
    """Qwen3-Next's mixers, three of Gated DeltaNet and one of attention, with a dense MLP each."""
    return sleep_hybrid.Model(
        sleep_hybrid.ModelArgs(
            vocab_size=1000,
            hidden_size=2048,
            intermediate_size=512,
            layer_types=["gated_deltanet"] * 3 * periods + ["attention"] * periods,
            num_attention_heads=16,
            num_key_value_heads=2,
            head_dim=256,
            linear_num_key_heads=16,
            linear_num_value_heads=32,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
        )
    )
