"""What the hybrids of flash-linear-attention (fla) have in common: attention, MLP, convolution.

fla is PyTorch and Triton, github.com/fla-org/flash-linear-attention; its layers are followed as of
version 0.6.0, and parameters carry its names. A layer is one function for a chunk of any length
and for a single token, over the state of `base`.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..errors import UserError
from ..ops.activations import silu
from ..ops.conv import short_conv
from .attention import attend
from .base import LayerState, SleepConfig


def from_config(cls, config: dict):
    """An instance of the dataclass cls from a config.json; fields that it lacks are left out.

    UserError names what is missing.
    """
    names = inspect.signature(cls).parameters
    missing = [n for n, p in names.items() if p.default is p.empty and n not in config]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}")
    return cls(**{name: value for name, value in config.items() if name in names})


@dataclass
class AttentionSpec:
    """Softmax attention in some layers of a hybrid: an entry of fla's config field `attn`.

    window_size is the number of newest tokens that a token sees, itself included; None for all.
    qk_norm is an option of fla's Attention layer that its model classes leave off.
    """

    layers: list[int]
    num_heads: int
    num_kv_heads: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    window_size: int | None = None
    rope_theta: float | None = 10_000.0

    def check(self, hidden_size: int) -> None:
        self.num_kv_heads = self.num_kv_heads or self.num_heads
        if hidden_size % (2 * self.num_heads):
            raise UserError(f"attn: {self.num_heads} heads do not share {hidden_size} evenly")
        if self.num_heads % self.num_kv_heads:
            raise UserError("attn: num_heads must be a multiple of num_kv_heads")
        if self.window_size is not None and self.window_size < 1:
            raise UserError(f"attn: window_size must be at least 1, not {self.window_size}")


def attention_layers(attn, hidden_size: int, layers: int) -> dict[int, AttentionSpec]:
    """Which layers attend, and how: fla's `attn`, which is one entry, a list of them, or None.

    UserError for a layer outside the model or named twice.
    """
    found: dict[int, AttentionSpec] = {}
    for entry in [attn] if isinstance(attn, dict) else attn or []:
        try:
            spec = from_config(AttentionSpec, entry)
        except UserError as error:
            raise UserError(f"attn: {error}") from error
        spec.check(hidden_size)
        for i in spec.layers:
            if not 0 <= i < layers or i in found:
                raise UserError(f"attn.layers must be different numbers below {layers}; got {i}")
            found[i] = spec
    return found


class Attention(nn.Module):
    """Causal softmax attention with RoPE over matching halves, and grouped KV heads."""

    def __init__(self, hidden_size: int, spec: AttentionSpec, sleep: SleepConfig):
        super().__init__()
        self.num_heads, self.num_kv_heads = spec.num_heads, spec.num_kv_heads
        self.head_dim = hidden_size // spec.num_heads
        self.rope_theta = spec.rope_theta
        windows = [spec.window_size, sleep.window if sleep.eviction == "sliding" else None]
        self.sliding = min((w for w in windows if w is not None), default=None)
        kv = self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, kv, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, kv, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        if spec.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-5)  # whatever the model's norm_eps is
            self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-5)

    def __call__(self, x, state: LayerState, mask):
        B, T, _ = x.shape
        q = self.q_proj(x).reshape(B, T, self.num_heads, self.head_dim)
        k = self.k_proj(x).reshape(B, T, self.num_kv_heads, self.head_dim)
        v = self.v_proj(x).reshape(B, T, self.num_kv_heads, self.head_dim)
        if "q_norm" in self:
            q, k = self.q_norm(q), self.k_norm(k)
        o, state = attend(q, k, v, state, mask, rope_theta=self.rope_theta, sliding=self.sliding)
        return self.o_proj(o), state


class ShortConv(nn.Module):
    """The taps [C, K] of a short convolution, and its bias [C]."""

    def __init__(self, channels: int, kernel: int, bias: bool):
        super().__init__()
        bound = kernel**-0.5
        self.weight = mx.random.uniform(-bound, bound, (channels, kernel))
        if bias:
            self.bias = mx.zeros((channels,))


def taps(convs: list[ShortConv]):
    """(weight [C, K], bias [C] or None) of convolutions that stand side by side."""
    if len(convs) == 1:
        return convs[0].weight, convs[0].get("bias")
    weight = mx.concatenate([conv.weight for conv in convs])
    return weight, mx.concatenate([c.bias for c in convs]) if "bias" in convs[0] else None


def convolve(x, convs: list[ShortConv], state, mask):
    """silu of the short convolution of x [B, T, C]; convs stand side by side over its channels.

    Returns (y [B, T, C], the new state [B, K-1, C]).
    """
    weight, bias = taps(convs)
    y, state = short_conv(x, weight, state, mask)
    return silu(y if bias is None else y + bias), state


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) with act "swish" or fla's "powlu"."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self._act = ACTIVATIONS[hidden_act]

    def __call__(self, x):
        return self.down_proj(self._act(self.gate_proj(x)) * self.up_proj(x))


def powlu(x, power: float = 3.0):
    """sigmoid(x) x where x <= 0, and sigmoid(x) x^(power / (sqrt(x) + 1)) above."""
    x, dtype = x.astype(mx.float32), x.dtype
    above = mx.where(x > 0, x, 1)  # the other branch's gradient must not meet log(0)
    grown = mx.exp(power / (mx.sqrt(above) + 1) * mx.log(above))
    return (mx.sigmoid(x) * mx.where(x > 0, grown, x)).astype(dtype)


ACTIVATIONS = {"swish": silu, "silu": silu, "powlu": powlu}


def mlp_width(hidden_size: int, hidden_ratio: int | None, intermediate_size: int | None) -> int:
    """The MLP's inner size: as given, or 2/3 of hidden_ratio * hidden_size up to 256ths."""
    if intermediate_size is not None:
        return intermediate_size
    return 256 * -(-int(hidden_size * (hidden_ratio or 4) * 2 / 3) // 256)


def l2_norm(x, eps: float = 1e-6):
    """x / |x| over the last axis, computed in float32."""
    x32 = x.astype(mx.float32)
    return (x32 * mx.rsqrt((x32 * x32).sum(-1, keepdims=True) + eps)).astype(x.dtype)


def decay_init(heads: int):
    """A_log and dt_bias such that a head forgets over 10 to 1000 tokens at first (Mamba-2)."""
    A = mx.random.uniform(1, 16, (heads,))
    dt = mx.exp(mx.random.uniform(math.log(1e-3), math.log(1e-1), (heads,)))
    return mx.log(A), dt + mx.log(-mx.expm1(-dt))  # dt_bias = softplus^-1(dt)
