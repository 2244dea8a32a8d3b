"""Low-rank changes (LoRA, arXiv 2106.09685) of projections that stay as they are."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator

import mlx.core as mx
import mlx.nn as nn

from ..utils.errors import UserError
from .layers import dense

_NAME = re.compile(
    r"(?:.*\.)?(layers\.(?P<block>\d+)\.(?P<layer>\w+(?:\.\w+)*)\.lora_(?P<part>[ab]))"
)
_MLP = re.compile(
    r"mlp|moe|feed_forward|ffn|expert|router|(^|\.)(gate_proj|up_proj|down_proj|fc\d|w[123])$"
)


class _LowRank(nn.Module):
    """y + B (A x) beside a linear layer's y; lora_a [rank, in], lora_b [out, rank]."""

    active = True

    def __call__(self, x):
        if not self.active:
            return super().__call__(x)
        change = (x @ self.lora_a.T) @ self.lora_b.T
        return super().__call__(x) + change.astype(x.dtype)


class LoRALinear(_LowRank, nn.Linear):
    """A linear layer with a low-rank change."""


class LoRAQuantizedLinear(_LowRank, nn.QuantizedLinear):
    """A quantized linear layer with a low-rank change, which is not quantized."""


_LINEAR = (nn.Linear, nn.QuantizedLinear)


def attach(blocks: list[nn.Module], rank: int, names: Collection[str]) -> None:
    """Give projections a change of rank `rank`, zero at first.

    names  of the changes, as `canonical` gives them: "layers.0.self_attn.q_proj.lora_a", ...

    UserError where there is no such projection.
    """
    for name in sorted(names):
        match = _NAME.fullmatch(name)
        if match is None or match["part"] == "b":
            continue
        i, (*path, last) = int(match["block"]), match["layer"].split(".")
        owner = blocks[i] if i < len(blocks) else {}
        for part in path:
            owner = owner.get(part, {}) if isinstance(owner, dict) else {}
        if not isinstance(owner, dict) or type(owner.get(last)) not in _LINEAR:
            raise UserError(f"the model has no layer for the low-rank change {name}")
        owner[last] = _changed(owner[last], rank)


def projections(block: nn.Module) -> list[str]:
    """The linear layers of a block's mixers and attention, by their names in it; not the MLP's."""
    return sorted(
        name
        for name, module in block.named_modules()
        if type(module) in _LINEAR and not _MLP.search(name)
    )


def _changed(linear: nn.Linear | nn.QuantizedLinear, rank: int) -> nn.Module:
    out, inputs = linear.weight.shape
    bias = "bias" in linear
    if isinstance(linear, nn.Linear):
        new: nn.Module = LoRALinear(inputs, out, bias)
    else:
        inputs = inputs * 32 // linear.bits
        new = LoRAQuantizedLinear(
            inputs, out, bias, linear.group_size, linear.bits, mode=linear.mode
        )
    new.update(linear.parameters())
    new.lora_a = mx.random.normal((rank, inputs)) * inputs**-0.5
    new.lora_b = mx.zeros((out, rank))
    return new


@contextlib.contextmanager
def left_out(model: nn.Module) -> Iterator[None]:
    """The model without its low-rank changes, for the time of a block."""
    changed = [module for module in model.modules() if isinstance(module, _LowRank)]
    try:
        for module in changed:
            module.active = False
        yield
    finally:
        for module in changed:
            module.active = True


def fold(model: nn.Module, weights: dict[str, mx.array]) -> None:
    """Replace, in the weights of `model` by name, W and its low-rank change by their sum."""
    for name, module in model.named_modules():
        if not isinstance(module, _LowRank):
            continue
        W = dense(module)
        dtype = weights.pop(f"{name}.lora_a").dtype
        del weights[f"{name}.lora_b"]
        weights.pop(f"{name}.scales", None)
        weights.pop(f"{name}.biases", None)
        change = module.lora_b.astype(mx.float32) @ module.lora_a.astype(mx.float32)
        weights[f"{name}.weight"] = (W + change).astype(dtype)


def canonical(name: str) -> str | None:
    """The name in an adapter of a model's parameter: "layers.0.self_attn.q_proj.lora_a", or None
    for a parameter that is no low-rank change."""
    match = _NAME.fullmatch(name)
    return match[1] if match else None
