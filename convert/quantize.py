"""Number types of the result: which weights are quantized or cast, and how.

Quantization is MLX's own, as mlx-lm writes it (`quantization` in config.json, with an entry for
each layer that differs). Only weights are touched: fast weights are state, and float32 whatever
the weights are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..utils.errors import UserError

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")

# The decay of S: an error here is raised to the power of the number of tokens.
_STAY_FLOAT32 = ("A_log", "dt_bias")


@dataclass
class NumberTypes:
    """What is asked for.

    bits        quantize to this many bits; None: don't
    group_size  weights that share a scale
    recipe      one of RECIPES, mlx-lm's mixtures of bits, instead of `bits`
    layers      (regular expression to search for in a layer's name, bits or None not to quantize
                it); the first that matches decides
    dtype       one of DTYPES for what is not quantized; None: unchanged
    """

    bits: int | None = None
    group_size: int = 64
    recipe: str | None = None
    layers: tuple[tuple[str, int | None], ...] = ()
    dtype: str | None = None

    def __post_init__(self):
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UserError(f"unknown dtype {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        if self.recipe is not None and self.recipe not in RECIPES:
            raise UserError(f"unknown recipe {self.recipe!r}; choose one of {', '.join(RECIPES)}")
        for bits in (self.bits, *(bits for _, bits in self.layers)):
            if bits is not None and bits not in BITS:
                raise UserError(f"quantization takes {_either(BITS)} bits, not {bits}")
        if self.quantizes and self.group_size not in GROUP_SIZES:
            raise UserError(
                f"the quantization group size must be {_either(GROUP_SIZES)}, not {self.group_size}"
            )
        for pattern, _ in self.layers:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{pattern!r} is not a regular expression: {error}") from error
        if self.layers and not self.quantizes:
            raise UserError("a choice for single layers needs quantization: add -q")

    @property
    def quantizes(self) -> bool:
        """Whether weights are quantized."""
        return self.bits is not None or self.recipe is not None


def _either(values: tuple[int, ...]) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}"


@dataclass
class Choice:
    """quantization: of config.json, or None; layers: name -> its parameters; skipped: layers that
    stay as they are because `group_size` does not divide their inputs."""

    quantization: dict | None
    layers: dict[str, dict] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


def choose(model: nn.Module, types: NumberTypes) -> Choice:
    """Which layers of a model (arrays need not be evaluated) are quantized, and how."""
    if not types.quantizes:
        return Choice(None)
    rule, bits = getattr(model, "quant_predicate", None), types.bits
    if types.recipe is not None:
        rule = _recipe(types.recipe, model, types.group_size)
        bits = int(types.recipe.split("_")[1]) if bits is None else bits
    common = {"group_size": types.group_size, "bits": bits, "mode": "affine"}
    quantization: dict[str, Any] = dict(common)
    choice = Choice(quantization)
    for name, module in model.named_modules():
        if not name or not hasattr(module, "to_quantized"):
            continue
        if module.weight.shape[-1] % types.group_size:
            choice.skipped.append(name)
            continue
        decided = rule(name, module) if rule else True
        for pattern, layer_bits in types.layers:
            if re.search(pattern, name):
                decided = layer_bits is not None and {"bits": layer_bits}
                break
        if decided is False:
            quantization[name] = False
            continue
        layer = {**common, **(decided if isinstance(decided, dict) else {})}
        if layer != common:
            quantization[name] = layer
        choice.layers[name] = layer
    choice.skipped.sort()
    return choice


def _recipe(name: str, model: nn.Module, group_size: int):
    from mlx_lm.convert import mixed_quant_predicate_builder

    try:
        return mixed_quant_predicate_builder(name, model, group_size)
    except ValueError as error:
        raise UserError(f"{name} does not fit this model: {error}") from error


def apply(
    name: str, x: mx.array, model: nn.Module, types: NumberTypes, choice: Choice
) -> list[tuple[str, mx.array]]:
    """The lazy arrays that a tensor becomes: itself, cast, or its quantized parts."""
    x = cast(name, x, model, types.dtype)
    layer = name.removesuffix(".weight")
    if layer == name or layer not in choice.layers:
        return [(name, x)]
    parameters = choice.layers[layer]
    parts = mx.quantize(x, group_size=parameters["group_size"], bits=parameters["bits"])
    names = (f"{layer}.{part}" for part in ("weight", "scales", "biases"))
    return list(zip(names, parts, strict=True))


def cast(name: str, x: mx.array, model: nn.Module, dtype: str | None) -> mx.array:
    """x in another floating type. A_log, dt_bias and what mlx-lm excepts stay float32."""
    may = getattr(model, "cast_predicate", None)
    stays = name.endswith(_STAY_FLOAT32) or (may is not None and not may(name))
    if dtype is None or stays or not mx.issubdtype(x.dtype, mx.floating):
        return x
    return x.astype(DTYPES[dtype])
