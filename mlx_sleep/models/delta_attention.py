"""Delta attention: softmax attention's q, k, v and output over fast weights.

It can start as a copy of an attention layer (`from_attention`), and then reads and writes S with
what that layer looks for and finds. After arXiv 2412.06464, with no activation on q, k and v; the
short convolution begins as the identity, and heads forget over hundreds to tens of thousands of
tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..ops.mixers import delta_attention
from ..utils.errors import UserError
from ..utils.schema import Count, Positive
from .base import Config
from .layers import dense

HALF_LIVES = (700, 40_000)
"""Tokens over which S halves at first: those of the first head and of the last."""


@dataclass
class DeltaArgs(Config):
    """Sizes, by the names in config.json: Dk = Dv = head_dim.

    read_eps is that of the RMSNorm of what is read from S, None for norm_eps. A small one makes a
    faint read as loud as any; one near the mean square of a read leaves it faint, which is how the
    model can tell that it never was told.
    """

    num_heads: Count
    head_dim: Count
    conv_size: Count = 4
    norm_eps: Positive = 1e-5
    read_eps: Positive | None = None


class DeltaAttention(nn.Module):
    """(x [B, T, hidden], layer state, mask, write, windows) -> (out [B, T, hidden], layer state).

    write and windows are those of `ops.mixers.delta_attention`. The state's `conv` is the last
    K - 1 projections of q, k and v, side by side.
    """

    def __init__(self, hidden_size: int, args: DeltaArgs):
        super().__init__()
        self.H, self.D = args.num_heads, args.head_dim
        self.eps = args.norm_eps if args.read_eps is None else args.read_eps
        width = self.H * self.D
        self.q_proj = nn.Linear(hidden_size, width, bias=False)
        self.k_proj = nn.Linear(hidden_size, width, bias=False)
        self.v_proj = nn.Linear(hidden_size, width, bias=False)
        self.g_proj = nn.Linear(hidden_size, width, bias=False)
        self.a_proj = nn.Linear(hidden_size, self.H, bias=False)
        self.b_proj = nn.Linear(hidden_size, self.H)
        for gate in (self.a_proj, self.b_proj):
            gate.weight = 0.02 * mx.random.normal(gate.weight.shape)
        self.b_proj.bias = mx.zeros((self.H,))
        self.g_proj.weight = mx.zeros_like(self.g_proj.weight)
        self.dt_bias = slow_decay(self.H)
        taps = 0.02 * mx.random.normal((3 * width, args.conv_size))
        self.conv_weight = taps + (mx.arange(args.conv_size) == args.conv_size - 1)
        self.o_norm = nn.RMSNorm(self.D, eps=self.eps)
        self.o_proj = nn.Linear(width, hidden_size, bias=False)

    def __call__(self, x, state, mask=None, write=None, windows=1):
        B, T, _ = x.shape
        o, conv, S = delta_attention(
            self.q_proj(x),
            self.k_proj(x),
            self.v_proj(x),
            self.g_proj(x).reshape(B, T, self.H, self.D),
            self.a_proj(x),
            self.b_proj(x),
            state.get("conv"),
            self.conv_weight,
            self.dt_bias,
            self.o_norm.weight,
            self.eps,
            state.get("fast_weights"),
            mask,
            write,
            windows,
        )
        return self.o_proj(o.reshape(B, T, -1)), {"fast_weights": S, "conv": conv}


def slow_decay(heads: int):
    """dt_bias [heads] such that heads forget over HALF_LIVES, spread evenly in their logarithm."""
    first, last = (math.log(n) for n in HALF_LIVES)
    half_lives = mx.exp(mx.linspace(first, last, heads))
    rate = math.log(2) / half_lives  # softplus(dt_bias)
    return rate + mx.log(-mx.expm1(-rate))


def sizes_of(attention: nn.Module) -> dict:
    """num_heads and head_dim of an attention layer that `from_attention` can copy.

    UserError for a layer of another build.
    """
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    if not all(isinstance(getattr(attention, n, None), LINEAR) for n in names):
        raise UserError(
            "delta_attention copies attention with q_proj, k_proj, v_proj and o_proj, as Llama, "
            "Qwen2, Qwen3, Mistral, Gemma and SmolLM3 have it; other layers can be inserted by "
            "mlx-sleep convert --insert N --insert-kind jet"
        )
    heads = getattr(attention, "n_heads", None) or attention.num_heads
    width = attention.q_proj.scales if "scales" in attention.q_proj else attention.q_proj.weight
    return {"num_heads": heads, "head_dim": width.shape[0] // heads}


LINEAR = (nn.Linear, nn.QuantizedLinear)


def scale_of(norm: nn.Module) -> mx.array:
    """[n] float32: what an RMSNorm multiplies by. That is its weight, but in Gemma one more."""
    return norm(mx.full(norm.weight.shape, 1024.0))  # so large that eps is nothing


def from_attention(attention: nn.Module, norm: nn.Module) -> dict[str, mx.array]:
    """The parameters of a sleep layer that start as an attention layer's, by name, float32.

    norm  the RMSNorm before it. k and v are repeated over their group, and a norm of q and k goes
    into the rows of their projections (its scale; unit length comes anyway).
    Biases have no place: they are left out.
    """
    sizes = sizes_of(attention)
    H, D = sizes["num_heads"], sizes["head_dim"]
    weights = {n: dense(getattr(attention, f"{n}_proj")) for n in ("q", "k", "v", "o")}
    for name in ("q", "k"):
        if f"{name}_norm" in attention:
            rows = weights[name].reshape(-1, D, weights[name].shape[1])
            scale = scale_of(attention[f"{name}_norm"])
            weights[name] = (rows * scale[:, None]).reshape(weights[name].shape)
    for name in ("k", "v"):
        groups = weights[name].reshape(-1, D, weights[name].shape[1])
        weights[name] = mx.repeat(groups, H // len(groups), axis=0).reshape(H * D, -1)
    start = {f"mixer.{name}_proj.weight": x for name, x in weights.items()}
    return {**start, "norm.weight": scale_of(norm)}
