"""Number types of safetensors that MLX doesn't have: float64 becomes float32, fp8 bfloat16.

An fp8 weight is multiplied by its scales, as FP8 checkpoints of DeepSeek and Qwen have them
(`weight_scale_inv`, one for each block of 128 x 128) and those of compressed-tensors
(`weight_scale`, one for the tensor or for each row).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..utils.errors import UserError
from ..utils.safetensors import (
    MLX_DTYPES,
    Entry,
    array_bytes,
    read_header,
    read_json_header,
    write_file,
)

# Bytes of a number.
_FOREIGN = {"F64": 8, "F8_E4M3": 1, "F8_E5M2": 1}
_SCALES = ("_scale_inv", "_scale")
_UNUSED = ("input_scale", "activation_scale", "output_scale")  # of activations
_BLOCK = [128, 128]


@dataclass
class _Place:
    """Where a tensor lies: dtype's name, shape, offsets in the file."""

    file: Path
    dtype: str
    shape: list[int]
    start: int
    end: int

    def raw(self) -> np.ndarray:
        count = self.end - self.start
        if not count:
            return np.empty(0, np.uint8)
        return np.asarray(np.memmap(self.file, np.uint8, "r", self.start, (count,)))

    def values(self) -> np.ndarray:
        """float32, in its shape."""
        if self.dtype in _TABLES:
            x = _TABLES[self.dtype][self.raw()]
        elif self.dtype == "F64":
            with np.errstate(over="ignore"):  # infinity is refused where it is written
                x = self.raw().view("<f8").astype(np.float32)
        else:
            x = np.array(mx.array(self.raw()).view(MLX_DTYPES[self.dtype]).astype(mx.float32))
        return x.reshape(self.shape)


def is_fp8(quantization: dict) -> bool:
    """Whether a `quantization_config` says no more than that weights are fp8 with scales."""
    method = quantization.get("quant_method")
    floats = quantization.get("format") == "float-quantized"
    return method == "fp8" or (method == "compressed-tensors" and floats)


def stage(
    files: list[Path], folder: Path, block: list[int] | None = None
) -> tuple[list[Path], set[str], dict[str, str]]:
    """Rewrite those of the safetensors files that hold such types in `folder`.

    block  rows and columns that share a scale: weight_block_size of a quantization_config

    Returns the files to read instead, the names of scales that are used up, and what was done to
    tensors by their names. UserError where a scale doesn't fit its tensor.
    """
    places = {name: place for file in files for name, place in _places(file).items()}
    foreign = {place.file for place in places.values() if place.dtype in _FOREIGN}
    used = {
        f"{name}{scale}"
        for name, place in places.items()
        if place.dtype in _TABLES
        for scale in _SCALES
        if f"{name}{scale}" in places
    }
    if used:
        used |= {name for name in places if name.endswith(_UNUSED)}
    staged = []
    for file in files:
        if file in foreign:
            entries = [
                _entry(name, place, places, block or _BLOCK)
                for name, place in places.items()
                if place.file == file and name not in used
            ]
            file = folder / f"read-{file.name}"  # not the file itself, which may lie there
            write_file(file, entries, "pt")
        staged.append(file)
    how = {
        name: "dequantized" if place.dtype in _TABLES else "cast"
        for name, place in places.items()
        if place.dtype in _FOREIGN
    }
    return staged, used, how


def _places(file: Path) -> dict[str, _Place]:
    tensors = read_header(file, _FOREIGN)
    with open(file, "rb") as opened:
        header = json.loads(read_json_header(opened))
        start = opened.tell()
    return {
        name: _Place(file, dtype, shape, *(start + at for at in header[name]["data_offsets"]))
        for name, (dtype, shape) in tensors.items()
    }


def _entry(name: str, place: _Place, places: dict[str, _Place], block: list[int]) -> Entry:
    size = math.prod(place.shape)
    if place.dtype == "F64":
        return Entry(name, "F32", place.shape, 4 * size, lambda: _bytes(place.values()))
    if place.dtype not in _TABLES:
        raw = place.end - place.start
        return Entry(name, place.dtype, place.shape, raw, lambda: _bytes(place.raw()))
    scale = next((places[f"{name}{s}"] for s in _SCALES if f"{name}{s}" in places), None)
    if scale is not None and _broadcast(np.empty(scale.shape), place.shape, block) is None:
        raise UserError(
            f"{place.file}: the scales of {name}, {scale.shape}, do not fit its shape "
            f"{place.shape}; start from the model in bfloat16"
        )

    def data() -> memoryview:
        x = place.values()
        if scale is not None:
            x = x * _broadcast(scale.values(), place.shape, block)
        return array_bytes(mx.array(x).astype(mx.bfloat16))

    return Entry(name, "BF16", place.shape, 2 * size, data)


def _broadcast(scale: np.ndarray, shape: list[int], block: list[int]) -> np.ndarray | None:
    """Scales as an array to multiply by; None where they don't fit."""
    if scale.size == 1:
        return scale.reshape(())
    if len(shape) != 2:
        return None
    rows, columns = shape
    if scale.size == rows and scale.shape[0] == rows:
        return scale.reshape(rows, 1)
    if list(scale.shape) != [-(-rows // block[0]), -(-columns // block[1])]:
        return None
    return scale.repeat(block[0], axis=0)[:rows].repeat(block[1], axis=1)[:, :columns]


def _bytes(x: np.ndarray) -> memoryview:
    return memoryview(x.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # it is a buffer


def _e4m3() -> np.ndarray:
    """The values of the 256 bytes: 4 bits of exponent with bias 7, no infinity, two NaNs."""
    codes = np.arange(256)
    sign, exponent, mantissa = 1 - 2 * (codes >> 7), codes >> 3 & 15, codes & 7
    normal = (8 + mantissa) * 2.0 ** (exponent - 10)
    values = sign * np.where(exponent > 0, normal, mantissa * 2.0**-9)
    values[codes & 127 == 127] = np.nan
    return values.astype(np.float32)


_TABLES = {
    "F8_E4M3": _e4m3(),
    # The upper byte of a float16.
    "F8_E5M2": (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32),
}
