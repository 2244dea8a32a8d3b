"""What the hybrids of flash-linear-attention (fla) share: attention, MLP, convolution.

fla is PyTorch and Triton, github.com/fla-org/flash-linear-attention; its layers are followed as of
version 0.6.0, and parameters carry its names. A layer is one function for a chunk of any length
and for a single token, over the state of `base`.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..ops.activations import silu
from ..ops.conv import short_conv
from ..utils.errors import UserError
from ..utils.schema import Count, CountOrZero, Positive
from .attention import Attention
from .base import Config, SleepConfig
from .decoder import DecoderModel


@dataclass
class AttentionSpec(Config):
    """Softmax attention in some layers of a hybrid: an entry of fla's config field `attn`.

    window_size is the number of newest tokens that a token sees, itself included; None for all.
    qk_norm is an option of fla's Attention layer that its model classes leave off.
    """

    layers: list[int]
    num_heads: Count
    num_kv_heads: CountOrZero = 0  # num_heads
    qkv_bias: bool = False
    qk_norm: bool = False
    window_size: int | None = None
    rope_theta: Positive | None = 10_000.0

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
        spec = AttentionSpec.from_dict(entry, "attn.")
        spec.check(hidden_size)
        for i in spec.layers:
            if not 0 <= i < layers or i in found:
                raise UserError(f"attn.layers must be different numbers below {layers}; got {i}")
            found[i] = spec
    return found


def make_attention(hidden_size: int, spec: AttentionSpec, sleep: SleepConfig) -> Attention:
    """An attention layer as `spec` describes it."""
    return Attention(
        hidden_size,
        spec.num_heads,
        spec.num_kv_heads,
        hidden_size // spec.num_heads,
        rope_theta=spec.rope_theta,
        sliding=sleep.attention_window(spec.window_size),
        qkv_bias=spec.qkv_bias,
        qk_norm_eps=1e-5 if spec.qk_norm else None,  # whatever the model's norm_eps is
    )


class ShortConv(nn.Module):
    """The taps [C, K] of a short convolution, and its bias [C]."""

    def __init__(self, channels: int, kernel: int, bias: bool):
        super().__init__()
        bound = kernel**-0.5
        self.weight = mx.random.uniform(-bound, bound, (channels, kernel))
        if bias:
            self.bias = mx.zeros((channels,))


def taps(convs: list[ShortConv]):
    """(weight [C, K], bias [C] or None) of convolutions side by side."""
    if len(convs) == 1:
        return convs[0].weight, convs[0].get("bias")
    weight = mx.concatenate([conv.weight for conv in convs])
    return weight, mx.concatenate([c.bias for c in convs]) if "bias" in convs[0] else None


def convolve(x, convs: list[ShortConv], state, mask):
    """silu of the short convolution of x [B, T, C]; convs are side by side over its channels.

    Returns (y [B, T, C], the new state [B, K-1, C]).
    """
    weight, bias = taps(convs)
    y, state = short_conv(x, weight, state, mask)
    return silu(y if bias is None else y + bias), state


def powlu(x, power: float = 3.0):
    """sigmoid(x) x where x <= 0, and sigmoid(x) x^(power / (sqrt(x) + 1)) above."""
    x, dtype = x.astype(mx.float32), x.dtype
    above = mx.where(x > 0, x, 1)  # the other branch's gradient must not meet log(0)
    grown = mx.exp(power / (mx.sqrt(above) + 1) * mx.log(above))
    return (mx.sigmoid(x) * mx.where(x > 0, grown, x)).astype(dtype)


ACTIVATIONS = {"swish": silu, "silu": silu, "powlu": powlu}


def mlp_width(hidden_size: int, hidden_ratio: float | None, intermediate_size: int | None) -> int:
    """The MLP's inner size: as given, or 2/3 of hidden_ratio * hidden_size up to 256ths."""
    if intermediate_size is not None:
        return intermediate_size
    return 256 * -(-int(hidden_size * (hidden_ratio or 4) * 2 / 3) // 256)


class Decoder(nn.Module):
    """Embedding, blocks, and a final norm under the name `norm`."""

    def __init__(self, args, block, norm: str, sleep: SleepConfig):
        super().__init__()
        attends = attention_layers(args.attn, args.hidden_size, args.num_hidden_layers)
        self.embeddings = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [block(args, attends.get(i), sleep) for i in range(args.num_hidden_layers)]
        self[norm] = nn.RMSNorm(args.hidden_size, eps=args.norm_eps)


class HybridModel(DecoderModel):
    """A whole model of fla, but for its blocks.

    block(args, AttentionSpec or None, SleepConfig) makes one; decoder and norm are the names that
    checkpoints give to all but the head, and to the final norm in it.
    """

    def __init__(self, args, block, decoder: str, norm: str):
        super().__init__(args, args.num_hidden_layers)
        self._names = decoder, norm
        self[decoder] = Decoder(args, block, norm, self.sleep)
        self.add_head()

    @property
    def decoder(self) -> Decoder:
        return self[self._names[0]]

    @property
    def embedding(self) -> nn.Embedding:
        return self.decoder.embeddings

    @property
    def layers(self) -> list[nn.Module]:
        """The modules of the blocks, in order."""
        return self.block_modules

    def head(self, h):
        return self.unembed(self.decoder[self._names[1]](h))
