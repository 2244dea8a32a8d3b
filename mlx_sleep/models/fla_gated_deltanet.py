"""fla's GatedDeltaNetForCausalLM: Gated DeltaNet (arXiv 2412.06464), some layers with attention.

Each block is RMSNorm, mixer, RMSNorm, gated MLP. This is what the from-scratch models of arXiv
2605.26099 are. Followed: flash-linear-attention 0.6.0; parameters are named as in its checkpoints,
and only the short convolutions' taps are [C, K] where PyTorch has [C, 1, K].
"""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn

from ..ops.activations import silu
from ..ops.gated_delta import gated_delta
from ..ops.gates import decay_gates
from ..ops.mixers import gated_delta_net, l2_norm
from ..utils.errors import UserError
from ..utils.schema import Count, CountOrZero, Layers, Positive, Vocabulary
from .base import Config, SleepConfig
from .fla_common import (
    ACTIVATIONS,
    AttentionSpec,
    HybridModel,
    ShortConv,
    convolve,
    make_attention,
    mlp_width,
    taps,
)
from .layers import GatedMLP, decay_init

GATES = {"swish": silu, "silu": silu, "sigmoid": mx.sigmoid}


@dataclass
class ModelArgs(Config):
    """The fields of fla's config.json, with its defaults, and `sleep`.

    attn            {"layers": [...], "num_heads": ..., ...}: `AttentionSpec`; a list for several
    head_dim        Dk; Dv is expand_v times as much
    num_heads       of q and k; num_v_heads of v, a multiple of it
    allow_neg_eigval  b_t in (0, 2) in place of (0, 1)
    """

    vocab_size: Vocabulary
    hidden_size: Count = 2048
    num_hidden_layers: Layers = 21
    model_type: str = "fla_gated_deltanet"
    attn: dict | list | None = None
    expand_v: Positive = 2.0
    head_dim: Count = 256
    num_heads: Count = 6
    num_v_heads: CountOrZero = 0  # num_heads
    use_gate: bool = True
    output_gate_activation: str = "swish"
    use_short_conv: bool = True
    conv_size: Count = 4
    conv_bias: bool = False
    allow_neg_eigval: bool = False
    hidden_ratio: Positive | None = 4
    intermediate_size: Count | None = None
    hidden_act: str = "swish"
    norm_eps: Positive = 1e-6
    norm_first: bool = True
    attnres_block_size: int | None = None
    tie_word_embeddings: bool = False
    sleep: dict = field(default_factory=dict)

    def __post_init__(self):
        self.num_v_heads = self.num_v_heads or self.num_heads
        if self.num_v_heads % self.num_heads:
            raise UserError("num_v_heads must be a multiple of num_heads")
        value_dim = int(self.head_dim * self.expand_v)
        if abs(value_dim - self.head_dim * self.expand_v) > 1e-5 * value_dim:
            raise UserError(
                f"expand_v {self.expand_v} times head_dim {self.head_dim} is not a whole number"
            )
        if self.output_gate_activation not in GATES:
            raise UserError(f"output_gate_activation must be one of {', '.join(GATES)}")
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}")
        if self.attnres_block_size is not None:
            raise UserError("attention residuals (attnres_block_size) are not supported")
        if not self.norm_first:
            raise UserError("norms after the mixers (norm_first: false) are not supported")


class GatedDeltaNet(nn.Module):
    """The gated delta rule, with or without short convolutions and output gate."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        D, eps = args.hidden_size, args.norm_eps
        self.Hk, self.Hv = args.num_heads, args.num_v_heads
        self.Dk, self.Dv = args.head_dim, int(args.head_dim * args.expand_v)
        self.allow_neg_eigval = args.allow_neg_eigval
        keys, values = self.Hk * self.Dk, self.Hv * self.Dv
        self.q_proj = nn.Linear(D, keys, bias=False)
        self.k_proj = nn.Linear(D, keys, bias=False)
        self.v_proj = nn.Linear(D, values, bias=False)
        self.a_proj = nn.Linear(D, self.Hv, bias=False)
        self.b_proj = nn.Linear(D, self.Hv, bias=False)
        self.A_log, self.dt_bias = decay_init(self.Hv)
        if args.use_short_conv:
            self.q_conv1d = ShortConv(keys, args.conv_size, args.conv_bias)
            self.k_conv1d = ShortConv(keys, args.conv_size, args.conv_bias)
            self.v_conv1d = ShortConv(values, args.conv_size, args.conv_bias)
        if args.use_gate:
            self.g_proj = nn.Linear(D, values, bias=False)
        self.o_norm = nn.RMSNorm(self.Dv, eps=eps)
        self.o_proj = nn.Linear(values, D, bias=False)
        self._gate = GATES[args.output_gate_activation]
        self._usual = (
            args.use_short_conv
            and args.use_gate
            and not (args.conv_bias or args.allow_neg_eigval)
            and self._gate is silu
        )

    def __call__(self, x, state, mask):
        qkv = mx.concatenate([self.q_proj(x), self.k_proj(x), self.v_proj(x)], axis=-1)
        convs = [self.q_conv1d, self.k_conv1d, self.v_conv1d] if "q_conv1d" in self else []
        mix = self._mix if self._usual else self._mix_with_options
        o, new = mix(x, qkv, convs, state, mask)
        return self.o_proj(o.reshape(*x.shape[:2], -1)), new

    def _mix(self, x, qkv, convs, state, mask):
        B, T, _ = x.shape
        o, conv, S = gated_delta_net(
            qkv,
            self.g_proj(x).reshape(B, T, self.Hv, self.Dv),
            mx.concatenate([self.b_proj(x), self.a_proj(x)], axis=-1),
            state.get("conv"),
            taps(convs)[0],
            self.A_log,
            self.dt_bias,
            self.o_norm.weight,
            self.o_norm.eps,
            state.get("fast_weights"),
            self.Hk,
            mask,
        )
        return o, {"fast_weights": S, "conv": conv}

    def _mix_with_options(self, x, qkv, convs, state, mask):
        """The same where an option asks for what `gated_delta_net` doesn't have."""
        B, T, _ = x.shape
        new = {}
        if convs:
            qkv, new["conv"] = convolve(qkv, convs, state.get("conv"), mask)
        else:
            qkv = silu(qkv)
        q, k, v = mx.split(qkv, [self.Hk * self.Dk, 2 * self.Hk * self.Dk], axis=-1)
        q, k = (l2_norm(a.reshape(B, T, self.Hk, self.Dk)) for a in (q, k))
        v = v.reshape(B, T, self.Hv, self.Dv)
        beta = mx.sigmoid(self.b_proj(x).astype(mx.float32))
        if self.allow_neg_eigval:
            beta = 2 * beta
        g, _ = decay_gates(self.a_proj(x), self.A_log, self.dt_bias)
        o, new["fast_weights"] = gated_delta(
            q * self.Dk**-0.5, k, v, g, beta, state.get("fast_weights"), mask
        )
        o = self.o_norm(o)
        if "g_proj" in self:
            o = o * self._gate(self.g_proj(x).reshape(o.shape))
        return o, new


class Block(nn.Module):
    """h + mixer(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, args: ModelArgs, spec: AttentionSpec | None, sleep: SleepConfig):
        super().__init__()
        D = args.hidden_size
        self.attn_norm = nn.RMSNorm(D, eps=args.norm_eps)
        self.attn = make_attention(D, spec, sleep) if spec else GatedDeltaNet(args)
        self.mlp_norm = nn.RMSNorm(D, eps=args.norm_eps)
        width = mlp_width(D, args.hidden_ratio, args.intermediate_size)
        self.mlp = GatedMLP(D, width, ACTIVATIONS[args.hidden_act])

    def __call__(self, h, state, mask):
        out, state = self.attn(self.attn_norm(h), state, mask)
        h = h + out
        return h + self.mlp(self.mlp_norm(h)), state


class Model(HybridModel):
    """The whole model."""

    def __init__(self, args: ModelArgs):
        super().__init__(args, Block, decoder="model", norm="norm")
