"""Sleep layers: SSM layers without an MLP, put between the blocks of a model that has none.

As the paper did with Ouro (arXiv 2605.26099): h + mixer(norm(h)), the mixer a JetBlock
or Gated DeltaNet. In config.json they are a list under `sleep_layers`, beside the fields of the
model that they were put into, one object for each:

    before       the block that the layer stands before, 0 to the number of blocks (behind all)
    kind         "jet" or "gated_deltanet"
    num_heads, head_dim, expand_v, conv_size, norm_eps, dconv_generator_reduction
                 sizes, by JetArgs' names: head_dim is Dk, head_dim * expand_v is Dv

`before` counts the model's own blocks, as does `loop_range`: a sleep layer is looped when the
block that it stands before is, and one behind all blocks when the last one is. Their parameters are
sleep_layers.0, sleep_layers.1, ... in the order of the blocks; the model's own keep their names.
"""

from __future__ import annotations

import contextlib
import dataclasses

import mlx.core as mx
import mlx.nn as nn

from ..utils.errors import UserError
from . import sleep_hybrid
from .base import SleepModel
from .jet_nemotron import JetArgs, JetBlock

KINDS = ("jet", "gated_deltanet")


class SleepLayer(nn.Module):
    """h + mixer(norm(h)): (h [B, T, hidden], layer state, mask) -> (h, layer state)."""

    def __init__(self, hidden_size: int, kind: str, sizes: JetArgs):
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=sizes.norm_eps)
        if kind == "jet":
            self.mixer = JetBlock(hidden_size, sizes)
        else:
            self.mixer = _gated_deltanet(hidden_size, sizes)

    def __call__(self, h, state, mask):
        out, state = self.mixer(self.norm(h), state, mask)
        return h + out, state

    def silence(self):
        """Zeros the output projection: the layer then adds exactly nothing to h."""
        out = self.mixer.o_proj if "o_proj" in self.mixer else self.mixer.out_proj
        out.weight = mx.zeros_like(out.weight)


class Inserted(SleepModel):
    """Mixed into a model's class by `wrap`: its blocks are then the model's and sleep layers."""

    @property
    def num_layers(self) -> int:
        return len(self._order)

    @property
    def block_modules(self) -> list[nn.Module]:
        own = super().block_modules
        return [self.sleep_layers[j] if sleeps else own[j] for sleeps, j in self._order]

    @property
    def has_fast_weights(self) -> bool:
        return True

    def init_state(self, batch_size: int = 1):
        with self._bare():  # some models compare themselves with another implementation here
            super().init_state(batch_size)
        return [{} for _ in range(self.loops * self.num_layers)]

    def block(self, i, h, layer_state, mask=None):
        sleeps, j = self._order[i]
        if sleeps:
            return self.sleep_layers[j](h, layer_state, mask)
        return super().block(j, h, layer_state, mask)

    @contextlib.contextmanager
    def _bare(self):
        """The model as it was before the insertion."""
        order, self._order = self._order, tuple(at for at in self._order if not at[0])
        try:
            yield
        finally:
            self._order = order


def wrap(model: SleepModel, config: dict) -> SleepModel:
    """`model`, which it changes, with the new sleep layers that config["sleep_layers"] describes.

    Weights are those of an untrained layer. UserError for a description that doesn't fit.
    """
    if isinstance(model, Inserted):
        raise UserError("the model has sleep layers already")
    blocks = model.num_layers
    layers = check(config["sleep_layers"], blocks)
    width = model.embed(mx.zeros((1, 1), mx.int32)).shape[-1]  # lazy: nothing is computed
    # (whether it is a sleep layer, which one of its sort), in the order of running
    order = [(False, i) for i in range(blocks)]
    for j, layer in reversed(list(enumerate(layers))):
        order.insert(layer["before"], (True, j))
    model.__class__ = type(type(model).__name__, (Inserted, type(model)), {})
    model._order = tuple(order)
    model.sleep_layers = [
        SleepLayer(width, layer["kind"], JetArgs.from_dict(layer)) for layer in layers
    ]
    if model.sleep.loop_range:
        lo, hi = model.sleep.loop_range
        befores = [min(layer["before"], blocks - 1) for layer in layers]
        grown = tuple(end + sum(before < end for before in befores) for end in (lo, hi))
        model.sleep = dataclasses.replace(model.sleep, loop_range=grown)
    return model


def check(layers, blocks: int) -> list[dict]:
    """`sleep_layers` of a config for a model of so many blocks. UserError when it doesn't fit."""
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise UserError("sleep_layers must be a list of objects")
    for layer in layers:
        before, kind = layer.get("before"), layer.get("kind")
        if type(before) is not int or not 0 <= before <= blocks:
            raise UserError(f"a sleep layer stands before block 0 to {blocks}, not {before!r}")
        if kind not in KINDS:
            raise UserError(f"the kind of a sleep layer is {' or '.join(KINDS)}, not {kind!r}")
    if [layer["before"] for layer in layers] != sorted(layer["before"] for layer in layers):
        raise UserError("sleep_layers must be in the order of the blocks that they stand before")
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
