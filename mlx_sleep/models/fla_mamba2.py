"""fla's Mamba2ForCausalLM: blocks of RMSNorm and a Mamba-2 mixer (arXiv 2405.21060), no MLP.

Followed: flash-linear-attention 0.6.0, whose tensors and arithmetic the Mamba2ForCausalLM of
transformers shares. fla gives this model no attention layers. Here `attn` may name some, as in
its other models; their mixer is fla's Attention, and its tensors are named as those of Samba, its
hybrid of Mamba: `backbone.layers.N.mixer.q_proj.weight`. Parameters are named as in checkpoints,
and only the short convolution's taps are [C, K] where PyTorch has [C, 1, K].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn

from ..ops.activations import silu
from ..ops.gates import decay_gates
from ..ops.mixers import mamba2
from ..ops.ssd import ssd
from ..utils import schema
from ..utils.errors import UserError
from ..utils.schema import Count, Layers, Positive, Vocabulary
from .base import Config, SleepConfig
from .fla_common import (
    AttentionSpec,
    HybridModel,
    ShortConv,
    convolve,
    make_attention,
)
from .layers import decay_init


@dataclass
class ModelArgs(Config):
    """The fields of fla's config.json, with its defaults, and `sleep`.

    attn              {"layers": [...], "num_heads": ..., ...}: `AttentionSpec`; a list for several
    expand            the mixer is so many times as wide as hidden_size, in heads of head_dim
    D_has_hdim        the skip D is a number for each channel, not for each head
    rmsnorm           a gated RMSNorm after the mixer, over n_groups groups; else a gate alone
    norm_before_gate  norm(y) silu(z) in place of norm(y silu(z))
    dt_limit          the time steps' range; None for an open end
    residual_in_fp32  h is added to in float32 where it is held in 16 bits
    """

    vocab_size: Vocabulary
    hidden_size: Count = 2048
    num_hidden_layers: Layers = 48
    model_type: str = "fla_mamba2"
    attn: dict | list | None = None
    head_dim: Count = 64
    state_size: Count = 128
    expand: Positive = 2
    n_groups: Count = 1
    conv_kernel: Count = 4
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: str = "silu"
    D_has_hdim: bool = False
    rmsnorm: bool = True
    norm_before_gate: bool = False
    dt_limit: list[float | None] | None = None
    residual_in_fp32: bool = True
    norm_eps: Positive = 1e-5
    tie_word_embeddings: bool = False
    sleep: dict = field(default_factory=dict)

    def __post_init__(self):
        inner = int(self.expand * self.hidden_size)
        if inner % self.head_dim:
            raise UserError(f"head_dim {self.head_dim} does not divide the mixer's width {inner}")
        if (inner // self.head_dim) % self.n_groups:
            raise UserError(f"n_groups must divide the number of heads, {inner // self.head_dim}")
        if self.hidden_act not in ("silu", "swish"):
            raise UserError(
                f"hidden_act must be silu or swish, not {schema.shown(self.hidden_act)}"
            )


class GatedNorm(nn.Module):
    """RMSNorm over each of some equal groups of channels, with a gate silu(z)."""

    def __init__(self, channels: int, groups: int, eps: float, before: bool):
        super().__init__()
        self.groups, self.eps, self.norm_before_gate = groups, eps, before
        self.weight = mx.ones((channels,))

    def __call__(self, x, z):
        gate = silu(z)
        if not self.norm_before_gate:
            x = x * gate
        grouped = x.reshape(*x.shape[:-1], self.groups, -1)
        x = mx.fast.rms_norm(grouped, None, self.eps).reshape(x.shape) * self.weight
        return x * gate if self.norm_before_gate else x


class Mamba2(nn.Module):
    """The gated Hebbian rule (arXiv 2605.26099, eq. 3) with a skip D and an output gate."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.P, self.G, self.N = args.head_dim, args.n_groups, args.state_size
        self.inner = int(args.expand * args.hidden_size)
        self.H = self.inner // self.P
        low, high = args.dt_limit or (None, None)
        self._dt_limits = low or 0.0, math.inf if high is None else high
        channels = self.inner + 2 * self.G * self.N
        width = self.inner + channels + self.H
        self.in_proj = nn.Linear(args.hidden_size, width, bias=args.use_bias)
        self.conv1d = ShortConv(channels, args.conv_kernel, args.use_conv_bias)
        self.A_log, self.dt_bias = decay_init(self.H)
        self.D = mx.ones((self.inner if args.D_has_hdim else self.H,))
        if args.rmsnorm:
            self.norm = GatedNorm(self.inner, self.G, args.norm_eps, args.norm_before_gate)
        self.out_proj = nn.Linear(self.inner, args.hidden_size, bias=args.use_bias)

    def __call__(self, x, state, mask):
        B, T, _ = x.shape
        z, xBC, dt = mx.split(self.in_proj(x), [self.inner, -self.H], axis=-1)
        mix = self._mix if self.D.size == self.H else self._mix_with_channel_skip
        o, new = mix(xBC, dt, state, mask)
        o = o.reshape(B, T, -1).astype(x.dtype)
        o = self.norm(o, z) if "norm" in self else o * silu(z)
        return self.out_proj(o), new

    def _mix(self, xBC, dt, state, mask):
        bias = self.conv1d.get("bias")
        o, conv, S = mamba2(
            xBC,
            dt,
            state.get("conv"),
            self.conv1d.weight,
            mx.zeros((xBC.shape[2],), xBC.dtype) if bias is None else bias,
            self.A_log,
            self.dt_bias,
            self.D,
            state.get("fast_weights"),
            self.G,
            self.N,
            self._dt_limits,
            mask,
        )
        return o, {"fast_weights": S, "conv": conv}

    def _mix_with_channel_skip(self, xBC, dt, state, mask):
        """The same where D is a number for each channel, which `mamba2` doesn't have."""
        B, T, _ = xBC.shape
        xBC, conv = convolve(xBC, [self.conv1d], state.get("conv"), mask)
        v, k, q = mx.split(xBC, [self.inner, self.inner + self.G * self.N], axis=-1)
        v = v.reshape(B, T, self.H, self.P)
        q, k = (a.reshape(B, T, self.G, self.N) for a in (q, k))
        g, beta = decay_gates(dt, self.A_log, self.dt_bias, self._dt_limits)
        o, S = ssd(q, k, v, g, beta, state.get("fast_weights"), mask)
        return o + self.D.reshape(self.H, -1) * v, {"fast_weights": S, "conv": conv}


class Block(nn.Module):
    """h + mixer(norm(h))."""

    def __init__(self, args: ModelArgs, spec: AttentionSpec | None, sleep: SleepConfig):
        super().__init__()
        D = args.hidden_size
        self.residual_in_fp32 = args.residual_in_fp32
        self.norm = nn.RMSNorm(D, eps=args.norm_eps)
        self.mixer = make_attention(D, spec, sleep) if spec else Mamba2(args)

    def __call__(self, h, state, mask):
        out, state = self.mixer(self.norm(h), state, mask)
        if self.residual_in_fp32:
            return (h.astype(mx.float32) + out).astype(self.norm.weight.dtype), state
        return h + out, state


class Model(HybridModel):
    """The whole model."""

    def __init__(self, args: ModelArgs):
        super().__init__(args, Block, decoder="backbone", norm="norm_f")
