"""Ouro, the looped language model of arXiv 2510.25741: all blocks run total_ut_steps times.

A block is attention and a gated MLP, each between two norms; the final norm comes after every
loop, so that a loop reads what the head would. An early-exit gate gives after each loop the logit
of stopping there.

Awake, a token goes through all loops, and loop u of a block sees the KV that loop u of the same
block wrote: the state has a slot for each loop and block, number u * num_layers + i. An
early_exit_threshold below 1 chooses for each token which loop the head reads, as the published
code does: all loops run all the same, because later tokens attend to the KV of each. At 1, the
value of the checkpoints, it is the last loop's.

A sleep of N passes runs the blocks N times, whatever total_ut_steps is: a pass of Algorithm 1 is
a loop (`mlx_sleep.sleep.passes_over`). Ouro has no fast weights of its own; sleep layers that were
put between its blocks (`mlx_sleep.models.inserted`) bring them. There is one S for each of these
after a sleep, but awake one for each loop: if loop 2 read the S that loop 1 has just written, it
would meet later tokens of the same chunk, and a chunk would differ from its tokens one by one. So
a loop without an S begins from that of the first loop, as it was before the chunk, and from then
on writes its own. What a boundary keeps besides S under a sliding eviction (KV, the convolution's
left context) is each loop's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn

from ..ops.activations import silu
from ..utils import schema
from ..utils.errors import UserError
from ..utils.schema import Count, CountOrZero, Layers, Positive, Vocabulary
from .attention import Attention, check_heads
from .base import Config, SleepConfig
from .decoder import DecoderModel
from .layers import GatedMLP


@dataclass
class ModelArgs(Config):
    """The fields of config.json, under the checkpoints' names.

    layer_types     "full_attention" or "sliding_attention" (sliding_window tokens) for each block;
                    empty is "full_attention" for all
    total_ut_steps  loops of a wake pass
    """

    vocab_size: Vocabulary
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Layers
    num_attention_heads: Count
    model_type: str = "ouro"
    num_key_value_heads: CountOrZero = 0  # num_attention_heads
    head_dim: CountOrZero = 0  # hidden_size / num_attention_heads
    rope_theta: Positive = 10_000.0
    rms_norm_eps: Positive = 1e-6
    hidden_act: str = "silu"
    layer_types: list[str] = field(default_factory=list)
    sliding_window: Count | None = None
    total_ut_steps: Layers = 4
    early_exit_threshold: float | None = 1.0
    tie_word_embeddings: bool = False
    sleep: dict = field(default_factory=dict)

    def __post_init__(self):
        self.layer_types = self.layer_types or ["full_attention"] * self.num_hidden_layers
        check_heads(self)
        if self.hidden_act != "silu":
            raise UserError(f"hidden_act must be silu, not {schema.shown(self.hidden_act)}")
        if len(self.layer_types) != self.num_hidden_layers:
            raise UserError("layer_types must name each of the num_hidden_layers layers")
        if wrong := sorted(set(self.layer_types) - {"full_attention", "sliding_attention"}):
            raise UserError(f"unknown layer_types {schema.shown(wrong)}")
        if "sliding_attention" in self.layer_types and not self.sliding_window:
            raise UserError("layers of sliding_attention need a sliding_window")


class Block(nn.Module):
    """h + norm(attention(norm(h))), then h + norm(mlp(norm(h)))."""

    def __init__(self, args: ModelArgs, layer_type: str, sleep: SleepConfig):
        super().__init__()
        own = args.sliding_window if layer_type == "sliding_attention" else None
        self.self_attn = Attention.from_args(args, sleep.attention_window(own))
        self.mlp = GatedMLP(args.hidden_size, args.intermediate_size, silu)
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.input_layernorm_2 = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm_2 = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, h, state, mask):
        out, state = self.self_attn(self.input_layernorm(h), state, mask)
        h = h + self.input_layernorm_2(out)
        out = self.mlp(self.post_attention_layernorm(h))
        return h + self.post_attention_layernorm_2(out), state


class Decoder(nn.Module):
    """What the checkpoints call `model`: all but the head."""

    def __init__(self, args: ModelArgs, sleep: SleepConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args, kind, sleep) for kind in args.layer_types]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.early_exit_gate = nn.Linear(args.hidden_size, 1)


class Model(DecoderModel):
    """The whole decoder."""

    def __init__(self, args: ModelArgs):
        super().__init__(args, args.num_hidden_layers)
        self.loops = args.total_ut_steps
        self.model = Decoder(args, self.sleep)
        self.add_head()

    @property
    def decoder(self) -> nn.Module:
        return self.model

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.embed_tokens

    def final_norm(self, h):
        return self.model.norm(h)

    def head(self, h):
        return self.unembed(h)

    def choose(self, outputs):
        threshold = self.args.early_exit_threshold
        if threshold is None or threshold >= 1:
            return outputs[-1]
        reached = mx.cumsum(exit_distribution(self.gate(outputs)), axis=-1) >= threshold
        # Rounding may leave even the sum of all below a threshold near 1.
        reached = mx.concatenate([reached[..., :-1], mx.ones_like(reached[..., -1:])], axis=-1)
        first = mx.argmax(reached, axis=-1)[..., None, None]  # [B, T, 1, 1]
        return mx.take_along_axis(mx.stack(outputs, axis=2), first, axis=2)[:, :, 0]

    def gate(self, outputs):
        """The early-exit gate's logits [B, T, loops] for h after each loop."""
        logits = [self.model.early_exit_gate(h) for h in outputs]
        return mx.concatenate(logits, axis=-1)


def exit_distribution(logits):
    """The probability of stopping after each loop, from the gate's logits [..., loops].

    p_u = s_u (1 - s_1) ... (1 - s_{u-1}) with s the sigmoid; the last loop takes what is left.
    """
    left, p = mx.ones_like(logits[..., 0]), []
    for u in range(logits.shape[-1] - 1):
        stop = mx.sigmoid(logits[..., u])
        p.append(stop * left)
        left = left * (1 - stop)
    return mx.stack([*p, left], axis=-1)
