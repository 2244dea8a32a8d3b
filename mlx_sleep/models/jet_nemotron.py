"""Jet-Nemotron (arXiv 2508.15884): JetBlocks, and a few layers of softmax attention.

A JetBlock is the gated delta rule after a dynamic short convolution of v: a small generator reads
the layer's input and gives every token convolution taps of its own. q and k have no convolution.
Attention has biases on q, k and v; `attn` layers see all of the KV cache and `swa` layers its
newest `window_size` tokens, whatever the eviction keeps. Parameters are named as in the published
checkpoints.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from typing import Annotated

import mlx.core as mx
import mlx.nn as nn

from ..ops.activations import silu
from ..ops.conv import dynamic_conv
from ..ops.gated_delta import gated_delta
from ..ops.gates import decay_gates
from ..ops.mixers import l2_norm
from ..utils import limits, schema
from ..utils.errors import UserError
from ..utils.schema import Count, CountOrZero, Positive, Range, Vocabulary
from .attention import Attention, check_heads
from .base import Config, SleepConfig
from .decoder import DecoderModel
from .layers import GatedMLP, decay_init
from .sleep_hybrid import ACTIVATIONS

LAYER_TYPES = ("jet", "attn", "swa")


@dataclass
class JetArgs(Config):
    """Sizes of a JetBlock, by the names of the published efficient_attention_config["jet"].

    head_dim is that of q and k, head_dim * expand_v that of v; the hidden size of the kernel
    generator is that of v over all heads, divided by dconv_generator_reduction (None is 1).
    """

    num_heads: Count = 6
    head_dim: Count = 256
    expand_v: Positive = 2.0
    conv_size: Count = 4
    dconv_generator_reduction: Count | None = 8
    norm_eps: Positive = 1e-5

    @classmethod
    def from_dict(cls, config: dict, where: str = "") -> JetArgs:
        """From an object of a config.json. UserError for a field that is wrong."""
        eps = config.get("norm_eps")
        if isinstance(eps, str):  # as the published configs have it
            with contextlib.suppress(ValueError):
                config = {**config, "norm_eps": float(eps)}
        return schema.read(cls, config, where)

    def __post_init__(self):
        self.head_v_dim = round(self.head_dim * self.expand_v)
        if not math.isclose(self.head_dim * self.expand_v, self.head_v_dim, rel_tol=1e-5):
            raise UserError(
                f"expand_v {self.expand_v} times head_dim {self.head_dim} is not a whole number"
            )


@dataclass
class SlidingArgs(Config):
    """efficient_attention_config["swa"]: newest tokens that such a layer sees."""

    window_size: Count | None = None


@dataclass
class ModelArgs(Config):
    """The fields of config.json, named as in the published ones."""

    vocab_size: Vocabulary
    hidden_size: Count
    intermediate_size: Count
    layer_types: Annotated[list[str], Range(0, limits.LAYERS)]
    num_attention_heads: Count
    num_key_value_heads: Count
    model_type: str = "jet_nemotron"
    head_dim: CountOrZero = 0  # hidden_size / num_attention_heads
    efficient_attention_config: dict[str, dict] = field(default_factory=dict)
    hidden_act: str = "silu"
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive = 10_000.0
    tie_word_embeddings: bool = False
    sleep: dict = field(default_factory=dict)

    def __post_init__(self):
        wrong = sorted(set(self.layer_types) - set(LAYER_TYPES))
        if wrong or not self.layer_types:
            raise UserError(
                f"layer_types must be some of {', '.join(LAYER_TYPES)}; got {schema.shown(wrong)}"
            )
        for kind in {"jet", "swa"} & set(self.layer_types):
            if kind not in self.efficient_attention_config:
                raise UserError(f"efficient_attention_config lacks {kind}, which layer_types names")
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}")
        check_heads(self)
        efficient = self.efficient_attention_config
        where = "efficient_attention_config"
        self.jet = JetArgs.from_dict(efficient.get("jet", {}), f"{where}.jet.")
        swa = SlidingArgs.from_dict(efficient.get("swa", {}), f"{where}.swa.")
        self.swa_window = swa.window_size
        if "swa" in self.layer_types and not self.swa_window:
            raise UserError(f"{where}.swa lacks a window_size")


class KernelGenerator(nn.Module):
    """x [B, T, hidden] -> K taps for each token and channel [B, T, C * K].

    At first a static convolution: the taps are w2's bias, whatever x is.
    """

    def __init__(self, hidden_size: int, inner: int, channels: int, kernel: int):
        super().__init__()
        self.w1 = nn.Linear(hidden_size, inner, bias=False)
        self.w2 = nn.Linear(inner, channels * kernel)
        self.w2.weight = mx.zeros_like(self.w2.weight)
        self.w2.bias = mx.random.uniform(-(kernel**-0.5), kernel**-0.5, self.w2.bias.shape)

    def __call__(self, x):
        return self.w2(silu(self.w1(x)))


class DynamicConv(nn.Module):
    """silu of the dynamic convolution of v [B, T, C], with taps generated from x."""

    def __init__(self, hidden_size: int, channels: int, kernel: int, reduction: int | None):
        super().__init__()
        inner = channels // (reduction or 1)
        self.kernel_generator = KernelGenerator(hidden_size, inner, channels, kernel)

    def __call__(self, v, x, state, mask):
        taps = self.kernel_generator(x).reshape(*v.shape, -1)
        v, state = dynamic_conv(v, taps, state, mask)
        return silu(v), state


class JetBlock(nn.Module):
    """The gated delta rule on a dynamically convolved v, with an output gate.

    (x [B, T, hidden], layer state, mask) -> (out [B, T, hidden], layer state); the state's `conv`
    is the last K - 1 projections of v.
    """

    def __init__(self, hidden_size: int, jet: JetArgs):
        super().__init__()
        D, self.H, self.Dk, self.Dv = hidden_size, jet.num_heads, jet.head_dim, jet.head_v_dim
        values = self.H * self.Dv
        self.q_proj = nn.Linear(D, self.H * self.Dk, bias=False)
        self.k_proj = nn.Linear(D, self.H * self.Dk, bias=False)
        self.v_proj = nn.Linear(D, values, bias=False)
        self.b_proj = nn.Linear(D, self.H, bias=False)
        self.a_proj = nn.Linear(D, self.H, bias=False)
        self.g_proj = nn.Linear(D, values, bias=False)
        self.A_log, self.dt_bias = decay_init(self.H)
        self.dynamic_conv1d = DynamicConv(D, values, jet.conv_size, jet.dconv_generator_reduction)
        self.o_norm = nn.RMSNorm(self.Dv, eps=jet.norm_eps)
        self.o_proj = nn.Linear(values, D, bias=False)

    def __call__(self, x, state, mask):
        B, T, _ = x.shape
        q, k = (
            l2_norm(silu(project(x)).reshape(B, T, self.H, self.Dk))
            for project in (self.q_proj, self.k_proj)
        )
        v, conv = self.dynamic_conv1d(self.v_proj(x), x, state.get("conv"), mask)
        v = v.reshape(B, T, self.H, self.Dv)
        beta = mx.sigmoid(self.b_proj(x))
        g, _ = decay_gates(self.a_proj(x), self.A_log, self.dt_bias)
        o, S = gated_delta(q * self.Dk**-0.5, k, v, g, beta, state.get("fast_weights"), mask)
        z = self.g_proj(x).reshape(B, T, self.H, self.Dv)
        o = self.o_norm(o) * silu(z)
        return self.o_proj(o.reshape(B, T, -1)), {"fast_weights": S, "conv": conv}


class Block(nn.Module):
    """h + mixer(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, args: ModelArgs, kind: str, sleep: SleepConfig):
        super().__init__()
        self.self_attn: nn.Module
        if kind == "jet":
            self.self_attn = JetBlock(args.hidden_size, args.jet)
        else:
            window = sleep.attention_window(args.swa_window if kind == "swa" else None)
            self.self_attn = Attention.from_args(args, window, qkv_bias=True)
        self.mlp = GatedMLP(args.hidden_size, args.intermediate_size, ACTIVATIONS[args.hidden_act])
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, h, state, mask):
        out, state = self.self_attn(self.input_layernorm(h), state, mask)
        h = h + out
        return h + self.mlp(self.post_attention_layernorm(h)), state


class Decoder(nn.Module):
    """Embedding, blocks and the last norm, under the name that checkpoints give them."""

    def __init__(self, args: ModelArgs, sleep: SleepConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args, kind, sleep) for kind in args.layer_types]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)


class Model(DecoderModel):
    """The whole decoder."""

    def __init__(self, args: ModelArgs):
        super().__init__(args, len(args.layer_types))
        self.model = Decoder(args, self.sleep)
        self.add_head()

    @property
    def decoder(self) -> nn.Module:
        return self.model

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.embed_tokens

    @property
    def layers(self) -> list[nn.Module]:
        """The modules of the blocks, in order."""
        return self.block_modules

    def head(self, h):
        return self.unembed(self.model.norm(h))
