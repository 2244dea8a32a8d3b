"""Sleep layers: SSM layers without an MLP, put between the blocks of a model that has none.

As the paper did with Ouro (arXiv 2605.26099): h + mixer(norm(h)), the mixer a JetBlock, Gated
DeltaNet, or delta attention, whose output has a gain for each channel. In config.json they are a
list under `sleep_layers`, beside the fields of the model that they were put into, one object for
each:

    before       the block that the layer comes before, 0 to the number of blocks (after all)
    kind         "jet", "gated_deltanet" or "delta_attention"
    num_heads, head_dim, conv_size, norm_eps; expand_v and dconv_generator_reduction, or read_eps
                 sizes, by the names of JetArgs (head_dim is Dk, head_dim * expand_v is Dv) or
                 DeltaArgs

`before` counts the model's own blocks, as does `loop_range`: a sleep layer is looped when the
block that it comes before is, and one after all blocks when the last one is. Their parameters are
sleep_layers.0, sleep_layers.1, ... in the order of the blocks; the model's own keep their names.
"""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import mlx.nn as nn

from ..utils import schema
from ..utils.errors import UserError
from . import sleep_hybrid
from .base import SleepConfig, SleepModel
from .delta_attention import DeltaArgs, DeltaAttention
from .jet_nemotron import JetArgs, JetBlock

KINDS = ("jet", "gated_deltanet", "delta_attention")


class SleepLayer(nn.Module):
    """h + mixer(norm(h)): (h [B, T, hidden], layer state, mask) -> (h, layer state).

    layer  an entry of `sleep_layers`. delta_attention also takes its mixer's `write` and
           `windows`, and adds gain * mixer(norm(h)), gain [hidden]
    """

    def __init__(self, hidden_size: int, layer: dict):
        super().__init__()
        self.mixer: nn.Module
        if layer["kind"] == "delta_attention":
            args = DeltaArgs.from_dict(layer, "sleep_layers.")
            self.norm = nn.RMSNorm(hidden_size, eps=args.norm_eps)
            self.mixer = DeltaAttention(hidden_size, args)
            self.gain = mx.full((hidden_size,), 0.05)
            return
        sizes = JetArgs.from_dict(layer, "sleep_layers.")
        self.norm = nn.RMSNorm(hidden_size, eps=sizes.norm_eps)
        if layer["kind"] == "jet":
            self.mixer = JetBlock(hidden_size, sizes)
        else:
            self.mixer = _gated_deltanet(hidden_size, sizes)

    def __call__(self, h, state, mask, **options):
        out, state = self.mixer(self.norm(h), state, mask, **options)
        if "gain" in self:
            out = (self.gain * out).astype(h.dtype)
        return h + out, state

    def silence(self):
        """Zeros the gain or the output projection: the layer then adds exactly nothing to h."""
        if "gain" in self:
            self.gain = mx.zeros_like(self.gain)
            return
        out = self.mixer.o_proj if "o_proj" in self.mixer else self.mixer.out_proj
        out.weight = mx.zeros_like(out.weight)


class Inserted(SleepModel):
    """A model with sleep layers among its blocks.

    host    the model; its parameters keep their names here, beside `sleep_layers`
    layers  `sleep_layers` of a config.json. Their weights are those of an untrained layer

    Both share their modules: what is trained or quantized here is so in `host`. UserError for a
    description that does not fit.
    """

    def __init__(self, host: SleepModel, layers: list[dict]):
        if isinstance(host, Inserted):
            raise UserError("the model has sleep layers already")
        if host.carries:
            raise UserError("nothing can be inserted between the blocks of this architecture")
        blocks = host.num_layers
        layers = check(layers, blocks)
        width = host.embed(mx.zeros((1, 1), mx.int32)).shape[-1]  # lazy: nothing is computed
        # (whether it is a sleep layer, which one of its sort), in the order of running
        order = [(False, i) for i in range(blocks)]
        for j, layer in reversed(list(enumerate(layers))):
            order.insert(layer["before"], (True, j))
        object.__setattr__(self, "host", host)  # hidden, so that parameters appear once
        super().__init__(_with_range(host.sleep, layers, blocks), len(order))
        self.loops = host.loops
        self._order = tuple(order)
        self.can_fold_user = all(layer["kind"] == "delta_attention" for layer in layers)
        for name, child in host.items():
            self[name] = child
        self.sleep_layers = [SleepLayer(width, layer) for layer in layers]

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        if name in self.host:  # quantization replaces a layer at the top
            self.host[name] = value

    @property
    def args(self):
        """The host's arguments."""
        return self.host.args

    @property
    def block_modules(self) -> list[nn.Module]:
        own = self.host.block_modules
        return [self.sleep_layers[j] if sleeps else own[j] for sleeps, j in self._order]

    @property
    def has_fast_weights(self) -> bool:
        return True

    def init_state(self, batch_size: int = 1):
        self.host.init_state(batch_size)  # some compare themselves with another implementation
        return super().init_state(batch_size)

    def embed(self, tokens):
        return self.host.embed(tokens)

    def block(self, i, h, layer_state, mask=None, **options):
        """Block i; options are those of its sleep layers."""
        sleeps, j = self._order[i]
        if sleeps:
            return self.sleep_layers[j](h, layer_state, mask, **options)
        return self.host.block(j, h, layer_state, mask)

    def final_norm(self, h):
        return self.host.final_norm(h)

    def choose(self, outputs):
        return self.host.choose(outputs)

    def head(self, h):
        return self.host.head(h)


def _with_range(sleep: SleepConfig, layers: list[dict], blocks: int) -> SleepConfig:
    """`sleep` with its loop_range in blocks and sleep layers."""
    if sleep.loop_range is None:
        return sleep
    befores = [min(layer["before"], blocks - 1) for layer in layers]
    lo, hi = (end + sum(before < end for before in befores) for end in sleep.loop_range)
    return dataclasses.replace(sleep, loop_range=(lo, hi))


def check(layers, blocks: int) -> list[dict]:
    """`sleep_layers` of a config for a model of so many blocks. UserError when it doesn't fit."""
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise UserError("sleep_layers must be a list of objects")
    for layer in layers:
        before, kind = layer.get("before"), layer.get("kind")
        if type(before) is not int or not 0 <= before <= blocks:
            raise UserError(
                f"a sleep layer comes before block 0 to {blocks}, not {schema.shown(before)}"
            )
        if kind not in KINDS:
            known = f"{', '.join(KINDS[:-1])} or {KINDS[-1]}"
            raise UserError(f"the kind of a sleep layer is {known}, not {schema.shown(kind)}")
    if [layer["before"] for layer in layers] != sorted(layer["before"] for layer in layers):
        raise UserError("sleep_layers must be in the order of the blocks that they come before")
    return layers


def _gated_deltanet(hidden_size: int, sizes: JetArgs) -> nn.Module:
    return sleep_hybrid.GatedDeltaNet(
        sleep_hybrid.ModelArgs(
            vocab_size=1,  # of the whole model: not read by the mixer
            hidden_size=hidden_size,
            intermediate_size=1,
            layer_types=["gated_deltanet"],
            head_dim=2,
            linear_num_key_heads=sizes.num_heads,
            linear_num_value_heads=sizes.num_heads,
            linear_key_head_dim=sizes.head_dim,
            linear_value_head_dim=sizes.head_v_dim,
            linear_conv_kernel_dim=sizes.conv_size,
            rms_norm_eps=sizes.norm_eps,
        )
    )
