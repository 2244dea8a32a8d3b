"""The GGUF format: metadata and tensors of a file, or of all the parts of a split one.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The file is mapped into memory, and every
count, length and offset is held against its size before it is used, so that a damaged file ends in
one line. What the metadata and the tensors mean is not known here.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from ..utils.errors import UserError
from ..utils.files import reading

# The type of a metadata value -> its code in `struct` and NumPy, by the number in the file.
_NUMBERS = ("u1", "i1", "u2", "i2", "u4", "i4", "f4", "?", None, None, "u8", "i8", "f8")
_STRING, _ARRAY = 8, 9

_REMOVED = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}  # block types that llama.cpp no longer reads either

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)


@dataclass(frozen=True)
class Tensor:
    """kind: type of its blocks; shape: rows first, as in PyTorch; raw: its bytes, uint8 [rows,
    bytes of a row], a view of the mapped file. A vector is one row."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    raw: np.ndarray


def read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor], list[Path]]:
    """(metadata as plain Python values, name -> tensor, the files) of a model.

    `file` may be any part of a split model; the metadata is that of the first part. UserError, in
    one line, for files that are damaged, cut, big-endian, or of a block type without a name.
    """
    match = _PART.fullmatch(file.name)
    metadata, tensors = _read_one(file)
    count = metadata.get("split.count", 1)
    if count == 1:
        return metadata, tensors, [file]
    if match is None or int(match[3]) != count:
        raise UserError(
            f"{file} is one of {count} parts of a model; give the parts their names "
            f"(NAME-00001-of-{count:05}.gguf, ...) again"
        )
    parts = [file.with_name(f"{match[1]}-{i + 1:05}-of-{match[3]}.gguf") for i in range(count)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise UserError(f"{file.parent} lacks {missing[0]}, a part of the model; download it too")
    metadata, tensors = {}, {}
    for i, part in enumerate(parts):
        found, more = _read_one(part)
        if (found.get("split.no"), found.get("split.count")) != (i, count):
            raise UserError(f"{part} is another part than its name says; download it again")
        if twice := tensors.keys() & more.keys():
            raise UserError(f"{part} repeats the tensor {min(twice)} of another part")
        metadata, tensors = metadata or found, tensors | more
    if len(tensors) != metadata.get("split.tensors.count", len(tensors)):
        raise UserError(f"the parts of {file} do not belong together; download them again")
    return metadata, tensors, parts


def is_part_of(file: Path, first: Path) -> bool:
    """Whether two files are named as parts of one split model."""
    names = [_PART.fullmatch(path.name) for path in (file, first)]
    return all(names) and len({(name[1], name[3]) for name in names if name}) == 1


def _read_one(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with reading(file):
        if not file.stat().st_size:
            raise UserError(f"{file} is empty; download it again")
        data = np.asarray(np.memmap(file, np.uint8, "r"))
    try:
        return _parse(_Bytes(data), file)
    except (UnicodeDecodeError, ValueError) as error:
        reason = "text that is not UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise UserError(f"{file} is truncated or damaged ({reason}); download it again") from error


def _parse(head: _Bytes, file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if bytes(head.take(4)) != b"GGUF":
        raise UserError(f"{file} is not a GGUF file; download it again")
    version = head.number("u4")
    if version & 0xFFFF == 0:
        raise UserError(f"{file} is big-endian, which cannot be read; get the usual file")
    if version not in (2, 3):
        raise UserError(f"{file} is of GGUF version {version}; versions 2 and 3 can be read")
    tensor_count, value_count = head.number("u8"), head.number("u8")
    metadata: dict[str, Any] = {}
    for _ in range(head.fits(value_count, 12)):
        name = head.name()
        if name in metadata:
            raise ValueError(f"{name[:60]} occurs twice")
        metadata[name] = head.value()
    infos = []
    for _ in range(head.fits(tensor_count, 24)):
        name, count = head.name(), head.number("u4")
        if count > 4:
            raise ValueError(f"{name[:60]} has {count} dimensions")
        dimensions = [head.number("u8") for _ in range(count)]
        infos.append((name, dimensions, head.number("u4"), head.number("u8")))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise ValueError(f"an alignment of {alignment!r}")
    start = -(-head.at // alignment) * alignment
    tensors: dict[str, Tensor] = {}
    for name, dimensions, number, offset in infos:
        if name in tensors:
            raise ValueError(f"{name[:60]} occurs twice")
        if offset % alignment:
            raise ValueError(f"{name[:60]} is not aligned")
        kind = _kind(number, name, file)
        tensors[name] = _tensor(head.data, kind, dimensions, start + offset, name)
    _check_overlaps([(offset, tensors[name].raw.nbytes) for name, _, _, offset in infos])
    return metadata, tensors


def _kind(number: int, name: str, file: Path) -> GGMLQuantizationType:
    try:
        return GGMLQuantizationType(number)
    except ValueError:
        kind = _REMOVED.get(number, f"number {number}")
        raise UserError(
            f"{file}: {name[:60]} has blocks of type {kind}, which cannot be read; get the model "
            "in another quantization"
        ) from None


def _tensor(data: np.ndarray, kind: GGMLQuantizationType, dimensions, at: int, name: str) -> Tensor:
    size, block_bytes = GGML_QUANT_SIZES[kind]
    if not dimensions or min(dimensions) < 1 or dimensions[0] % size:
        raise ValueError(f"{name[:60]} has the shape {dimensions}")
    rows, row_bytes = math.prod(dimensions[1:]), dimensions[0] // size * block_bytes
    if at + rows * row_bytes > len(data):
        raise ValueError(f"{name[:60]} ends beyond the file")
    raw = data[at : at + rows * row_bytes].reshape(rows, row_bytes)
    return Tensor(kind, tuple(reversed(dimensions)), raw)


def _check_overlaps(places: list[tuple[int, int]]) -> None:
    end = 0
    for offset, nbytes in sorted(places):
        if offset < end:
            raise ValueError("tensors that overlap")
        end = offset + nbytes


class _Bytes:
    """A header, read from its start. ValueError where it would go on beyond the file."""

    def __init__(self, data: np.ndarray):
        self.data, self.at = data, 0

    def fits(self, count: int, least: int) -> int:
        """`count`, if as many things of at least `least` bytes can follow."""
        if count * least > len(self.data) - self.at:
            raise ValueError("its header goes on beyond its end")
        return count

    def take(self, count: int) -> np.ndarray:
        self.at += self.fits(count, 1)
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return self.take(int(code[1:])).view(f"<{code}")[0].item()

    def string(self) -> str:
        return self.take(self.number("u8")).tobytes().decode()

    def name(self) -> str:
        name = self.string()
        if not name.isprintable():  # names get into messages
            raise ValueError("a name with control characters")
        return name

    def value(self) -> Any:
        kind = self.number("u4")
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self._numbers(kind, 1)[0]
        kind, count = self.number("u4"), self.number("u8")
        if kind == _STRING:
            return [self.string() for _ in range(self.fits(count, 8))]
        return self._numbers(kind, count)

    def _numbers(self, kind: int, count: int) -> list:
        code = _NUMBERS[kind] if kind < len(_NUMBERS) else None
        if code is None:
            raise ValueError(f"a value of type {kind}")
        dtype = np.dtype(f"<{code}" if code != "?" else code)
        return self.take(self.fits(count, dtype.itemsize) * dtype.itemsize).view(dtype).tolist()
