"""Blocks of GGUF tensors, as tensors of a safetensors file.

Q4_0, Q4_1 and Q8_0 have the layout of MLX's affine quantization in groups of 32 and stay as they
are, to the bit. All other quantized blocks are dequantized by the package `gguf` and rounded to
float16; F64 becomes float32. A tensor is decoded when it is written, not before.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as Kind

from ..utils.errors import UserError
from ..utils.safetensors import Entry
from .gguf_file import Tensor

GROUP_SIZE = 32
AFFINE = {Kind.Q4_0: 4, Kind.Q4_1: 4, Kind.Q8_0: 8}
"""Block types that MLX's affine quantization holds -> bits."""

AS_THEY_ARE = {Kind.F16: "F16", Kind.BF16: "BF16", Kind.F32: "F32"}
"""Types that safetensors has too -> their names there."""
_WEIGHTS_AT_ONCE = 1 << 22


def entries(
    layer: str, part: str, tensor: Tensor, keep: bool, order: np.ndarray | None = None
) -> list[Entry]:
    """What the tensor named `layer`.`part` becomes.

    keep   leave blocks of an AFFINE type quantized: the entries weight, scales and biases
    order  the tensor's rows in another order, [rows]

    UserError names a type of blocks that cannot be decoded.
    """
    name, shape, kind = f"{layer}.{part}", list(tensor.shape), tensor.kind

    def raw() -> np.ndarray:
        x = tensor.raw
        return x if order is None else x.reshape(shape[0], -1)[order].reshape(x.shape)

    if kind in AS_THEY_ARE:
        return [_entry(name, AS_THEY_ARE[kind], shape, GGML_QUANT_SIZES[kind][1], raw)]
    if kind == Kind.F64:
        return [_entry(name, "F32", shape, 4, lambda: _float32(raw()))]
    if keep and kind in AFFINE and part == "weight" and len(shape) == 2:
        rows, columns = shape
        weight, groups = [rows, columns * AFFINE[kind] // 32], [rows, columns // GROUP_SIZE]
        return [
            _entry(name, "U32", weight, 4, lambda: packed(raw(), kind)),
            _entry(f"{layer}.scales", "F16", groups, 2, lambda: affine(raw(), kind)[0]),
            _entry(f"{layer}.biases", "F16", groups, 2, lambda: affine(raw(), kind)[1]),
        ]
    try:  # one block of zeros tells whether the type is known
        quants.dequantize(np.zeros(GGML_QUANT_SIZES[kind][1], np.uint8), kind)
    except NotImplementedError:
        raise UserError(
            f"{name} has blocks of type {kind.name}, which cannot be read; get the model in "
            "another quantization"
        ) from None
    return [_entry(name, "F16", shape, 2, lambda: _dequantize(raw(), kind))]


def packed(raw: np.ndarray, kind: Kind) -> np.ndarray:
    """The q of raw blocks [rows, bytes] of an AFFINE type, in MLX's order: uint8 [rows, bytes]."""
    q = _blocks(raw, kind)[..., _head(kind) :]
    if kind == Kind.Q8_0:
        q = q ^ 0x80  # from int8: q + 128 is not negative
    else:  # weights 0 to 15 lie in the lower halves of the bytes, 16 to 31 in the upper
        q = np.concatenate([q & 15, q >> 4], axis=-1)
        q = q[..., 0::2] | q[..., 1::2] << 4
    return q.reshape(len(raw), -1)


def affine(raw: np.ndarray, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """(scales, biases), float16 [rows, columns / 32]: a weight is scale * q + bias.

    A bias that the block doesn't have is its scale times a power of two: no bit is lost.
    """
    halves = np.ascontiguousarray(_blocks(raw, kind)[..., : _head(kind)]).view(np.float16)
    scales = halves[..., 0]
    if kind == Kind.Q4_1:
        return scales, halves[..., 1]
    with np.errstate(over="ignore"):  # infinity is refused where it is written
        return scales, scales * np.float16(-128 if kind == Kind.Q8_0 else -8)


def _blocks(raw: np.ndarray, kind: Kind) -> np.ndarray:
    return raw.reshape(len(raw), -1, GGML_QUANT_SIZES[kind][1])


def _head(kind: Kind) -> int:
    return 4 if kind == Kind.Q4_1 else 2  # bytes of a block before its q


def _dequantize(raw: np.ndarray, kind: Kind) -> np.ndarray:
    """float16 [rows, columns]; a few rows at a time, since float32 takes twice the memory."""
    size, nbytes = GGML_QUANT_SIZES[kind]
    rows, columns = len(raw), raw.shape[1] // nbytes * size
    out = np.empty((rows, columns), np.float16)
    step = max(1, _WEIGHTS_AT_ONCE // columns)
    with np.errstate(over="ignore", invalid="ignore"):  # refused where they are written
        for i in range(0, rows, step):
            out[i : i + step] = quants.dequantize(raw[i : i + step], kind)
    return out


def _float32(raw: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # infinity is refused where it is written
        return np.ascontiguousarray(raw).view(np.float64).astype(np.float32)


def _entry(name: str, dtype: str, shape, itemsize: int, array: Callable[[], np.ndarray]) -> Entry:
    return Entry(name, dtype, shape, math.prod(shape) * itemsize, lambda: _bytes(array()))


def _bytes(x: np.ndarray) -> memoryview:
    flat = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return memoryview(flat)  # type: ignore[arg-type]  # an array is a buffer
