"""A decoder-only hybrid of attention and SSM blocks, the architecture of arXiv 2605.26099.

Each block is RMSNorm, mixer, RMSNorm, gated MLP, with the mixer one of softmax attention,
Gated DeltaNet (arXiv 2412.06464) or Mamba-2 (arXiv 2405.21060; the paper's eq. 3). A block is
one function for a chunk of any length and for a single token: h and state in, h and state out.
This file doesn't know how a model sleeps, only which numbers its config gives for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import mlx.core as mx
import mlx.nn as nn

from ..ops.activations import gated, silu
from ..ops.mixers import gated_delta_net, mamba2
from ..utils import limits, schema
from ..utils.errors import UserError
from ..utils.schema import Count, CountOrZero, Positive, Range, Vocabulary
from .attention import Attention, check_heads
from .base import Config, SleepConfig
from .decoder import DecoderModel
from .layers import GatedMLP, conv_init, decay_init

LAYER_TYPES = ("attention", "gated_deltanet", "mamba2")
ACTIVATIONS = {"silu": silu, "relu": nn.relu, "gelu": nn.gelu}


@dataclass
class ModelArgs(Config):
    """The fields of config.json. Sizes are free; names are those of the ecosystem's configs."""

    vocab_size: Vocabulary
    hidden_size: Count
    intermediate_size: Count
    layer_types: Annotated[list[str], Range(0, limits.LAYERS)]
    model_type: str = "sleep_hybrid"
    num_attention_heads: Count = 4
    num_key_value_heads: CountOrZero = 0  # num_attention_heads
    head_dim: CountOrZero = 0  # hidden_size / num_attention_heads
    qk_norm: bool = True
    rope_theta: Positive = 10_000.0
    linear_num_key_heads: Count = 4
    linear_num_value_heads: Count = 4
    linear_key_head_dim: Count = 64
    linear_value_head_dim: Count = 64
    linear_conv_kernel_dim: Count = 4
    mamba_num_heads: Count = 4
    mamba_head_dim: Count = 64
    mamba_n_groups: Count = 1
    ssm_state_size: Count = 64
    hidden_act: str = "silu"
    rms_norm_eps: Positive = 1e-6
    tie_word_embeddings: bool = True
    sleep: dict = field(default_factory=dict)

    def __post_init__(self):
        wrong = sorted(set(self.layer_types) - set(LAYER_TYPES))
        if wrong or not self.layer_types:
            raise UserError(
                f"layer_types must be some of {', '.join(LAYER_TYPES)}; got {schema.shown(wrong)}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}")
        check_heads(self)
        for many, few in (
            ("linear_num_value_heads", "linear_num_key_heads"),
            ("mamba_num_heads", "mamba_n_groups"),
        ):
            if getattr(self, many) % getattr(self, few):
                raise UserError(f"{many} must be a multiple of {few}")


class GatedDeltaNet(nn.Module):
    """Gated DeltaNet: the gated delta rule after a short convolution, with an output gate."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        D = args.hidden_size
        self.Hk, self.Hv = args.linear_num_key_heads, args.linear_num_value_heads
        self.Dk, self.Dv = args.linear_key_head_dim, args.linear_value_head_dim
        channels = 2 * self.Hk * self.Dk + self.Hv * self.Dv
        self.in_proj_qkv = nn.Linear(D, channels, bias=False)
        self.in_proj_z = nn.Linear(D, self.Hv * self.Dv, bias=False)
        self.in_proj_ba = nn.Linear(D, 2 * self.Hv, bias=False)
        self.conv_weight = conv_init(channels, args.linear_conv_kernel_dim)
        self.A_log, self.dt_bias = decay_init(self.Hv)
        self.norm = nn.RMSNorm(self.Dv, eps=args.rms_norm_eps)
        self.out_proj = nn.Linear(self.Hv * self.Dv, D, bias=False)

    def __call__(self, x, state, mask):
        B, T, _ = x.shape
        o, conv, S = gated_delta_net(
            self.in_proj_qkv(x),
            self.in_proj_z(x).reshape(B, T, self.Hv, self.Dv),
            self.in_proj_ba(x),
            state.get("conv"),
            self.conv_weight,
            self.A_log,
            self.dt_bias,
            self.norm.weight,
            self.norm.eps,
            state.get("fast_weights"),
            self.Hk,
            mask,
        )
        return self.out_proj(o.reshape(B, T, -1)), {"fast_weights": S, "conv": conv}


class Mamba2(nn.Module):
    """Mamba-2: the gated Hebbian rule (eq. 3 of the paper) in its SSD form."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        D, self.H, self.P = args.hidden_size, args.mamba_num_heads, args.mamba_head_dim
        self.G, self.N = args.mamba_n_groups, args.ssm_state_size
        self.inner, self.eps = self.H * self.P, args.rms_norm_eps
        channels = self.inner + 2 * self.G * self.N
        self.in_proj = nn.Linear(D, self.inner + channels + self.H, bias=False)
        self.conv_weight = conv_init(channels, args.linear_conv_kernel_dim)
        self.conv_bias = mx.zeros((channels,))
        self.A_log, self.dt_bias = decay_init(self.H)
        self.D = mx.ones((self.H,))
        self.norm = nn.RMSNorm(self.inner, eps=args.rms_norm_eps)
        self.out_proj = nn.Linear(self.inner, D, bias=False)

    def __call__(self, x, state, mask):
        B, T, _ = x.shape
        z, xBC, dt = mx.split(self.in_proj(x), [self.inner, -self.H], axis=-1)
        o, conv, S = mamba2(
            xBC,
            dt,
            state.get("conv"),
            self.conv_weight,
            self.conv_bias,
            self.A_log,
            self.dt_bias,
            self.D,
            state.get("fast_weights"),
            self.G,
            self.N,
            mask=mask,
        )
        o = self.norm(gated(silu, z, o.reshape(B, T, -1)))
        return self.out_proj(o), {"fast_weights": S, "conv": conv}


class Block(nn.Module):
    """h + mixer(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, args: ModelArgs, layer_type: str, sleep: SleepConfig):
        super().__init__()
        self.mixer: nn.Module
        if layer_type == "attention":
            norm_eps = args.rms_norm_eps if args.qk_norm else None
            self.mixer = Attention.from_args(args, sleep.attention_window(), qk_norm_eps=norm_eps)
        else:
            self.mixer = {"gated_deltanet": GatedDeltaNet, "mamba2": Mamba2}[layer_type](args)
        self.mixer_norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.mlp_norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.mlp = GatedMLP(args.hidden_size, args.intermediate_size, ACTIVATIONS[args.hidden_act])

    def __call__(self, h, state, mask):
        out, state = self.mixer(self.mixer_norm(h), state, mask)
        h = h + out
        return h + self.mlp(self.mlp_norm(h)), state


class Model(DecoderModel):
    """The whole decoder."""

    def __init__(self, args: ModelArgs):
        super().__init__(args, len(args.layer_types))
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args, kind, self.sleep) for kind in args.layer_types]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.add_head()

    @property
    def embedding(self) -> nn.Embedding:
        return self.embed_tokens

    def head(self, h):
        return self.unembed(self.norm(h))
