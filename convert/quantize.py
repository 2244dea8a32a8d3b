"""Copies of a model folder in another number type, quantized, or with other sleep settings.

Quantization is MLX's own, as mlx-lm writes it (`quantization` in config.json). Only weights are
touched: fast weights are state, and float32 whatever the weights are.
"""

from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import UserError
from ..models.base import SleepConfig
from ..models.load import MODEL_TYPES, load_model, read_config, save

BITS = (4, 8)
GROUP_SIZES = (32, 64)
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}

# The decay of S: an error here is raised to the power of the tokens that pass.
_STAY_FLOAT32 = ("A_log", "dt_bias")


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    bits: int | None = None,
    group_size: int = 64,
    dtype: str | None = None,
    sleep: dict | None = None,
) -> list[str]:
    """Write a converted copy of the model folder `source` as the new folder `dest`.

    bits, group_size  quantize with so many bits (4 or 8) in groups of 32 or 64; None: don't
    dtype             float16, bfloat16 or float32 for what is not quantized; None: as it is
    sleep             fields of SleepConfig that replace those in config.json

    Returns the names of the layers that stay unquantized because `group_size` does not divide
    their inputs. Raises UserError; `dest` then does not exist.
    """
    source, dest = Path(source).expanduser(), Path(dest).expanduser()
    if os.path.lexists(dest):
        raise UserError(f"{dest} exists already; choose another name for the copy")
    model_type = read_config(source).get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(
            f"cannot convert model_type {model_type!r}: only folders of {', '.join(MODEL_TYPES)} "
            "can be converted for now, checkpoints of other families come later"
        )
    model, config = load_model(source)
    if sleep:
        config["sleep"] = {**config.get("sleep", {}), **sleep}
        SleepConfig(**config["sleep"])  # UserError before the work, not after
    if dtype is not None:
        cast(model, dtype)
    skipped: list[str] = []
    if bits is not None:
        if "quantization" in config:
            raise UserError(f"{source} is quantized already; start from the full-precision folder")
        skipped = quantize(model, bits, group_size)
        config["quantization"] = {"group_size": group_size, "bits": bits, "mode": "affine"}
    save(dest, model, config, tokenizer_source=source)
    return skipped


def cast(model: nn.Module, dtype: str) -> None:
    """Change the floating weights of `model`, in place, to one of DTYPES.

    A_log and dt_bias stay float32. UserError for another name.
    """
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    weights = [
        (name, x.astype(DTYPES[dtype]))
        for name, x in tree_flatten(model.parameters())
        if mx.issubdtype(x.dtype, mx.floating) and not name.endswith(_STAY_FLOAT32)
    ]
    model.update(tree_unflatten(weights))


def quantize(model: nn.Module, bits: int, group_size: int) -> list[str]:
    """Quantize linear layers and embeddings of `model` in place (MLX's affine mode).

    Returns the names of those that stay as they are: `group_size` does not divide their inputs.
    """
    if bits not in BITS:
        raise UserError(f"quantization takes {' or '.join(map(str, BITS))} bits, not {bits}")
    if group_size not in GROUP_SIZES:
        sizes = " or ".join(map(str, GROUP_SIZES))
        raise UserError(f"the quantization group size must be {sizes}, not {group_size}")
    skipped = []

    def fits(name: str, module: nn.Module) -> bool:
        if not hasattr(module, "to_quantized"):
            return False
        if module.weight.shape[-1] % group_size:
            skipped.append(name)
            return False
        return True

    nn.quantize(model, group_size=group_size, bits=bits, class_predicate=fits)
    return skipped
