"""Small parts that several architectures share."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ..ops.activations import gated


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x))"""

    def __init__(self, hidden_size: int, intermediate_size: int, act: Callable):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self._act = act

    def __call__(self, x):
        return self.down_proj(gated(self._act, self.gate_proj(x), self.up_proj(x)))


def conv_init(channels: int, kernel: int):
    """Taps [channels, kernel] of a short convolution before training."""
    bound = kernel**-0.5
    return mx.random.uniform(-bound, bound, (channels, kernel))


def decay_init(heads: int):
    """A_log and dt_bias such that a head forgets over 10 to 1000 tokens at first (Mamba-2)."""
    A = mx.random.uniform(1, 16, (heads,))
    dt = mx.exp(mx.random.uniform(math.log(1e-3), math.log(1e-1), (heads,)))
    return mx.log(A), dt + mx.log(-mx.expm1(-dt))  # dt_bias = softplus^-1(dt)


def dense(linear: nn.Module) -> mx.array:
    """The weight [out, in] of a linear layer or an embedding, quantized or not, in float32."""
    if "scales" not in linear:
        return linear.weight.astype(mx.float32)
    # In 16 bits the weights would be rounded.
    biases = linear.get("biases")
    biases = None if biases is None else biases.astype(mx.float32)
    return mx.dequantize(
        linear.weight,
        linear.scales.astype(mx.float32),
        biases,
        group_size=linear.group_size,
        bits=linear.bits,
        mode=linear.mode,
    )


def dense_linear(linear: nn.QuantizedLinear) -> nn.Linear:
    """The same layer with its weight in float32."""
    weight = dense(linear)
    new = nn.Linear(1, 1, bias="bias" in linear)
    new.weight = weight
    if "bias" in linear:
        new.bias = linear.bias.astype(mx.float32)
    return new


def dense_embedding(embedding: nn.QuantizedEmbedding) -> nn.Embedding:
    """The same table in float32."""
    new = nn.Embedding(1, 1)
    new.weight = dense(embedding)
    return new
