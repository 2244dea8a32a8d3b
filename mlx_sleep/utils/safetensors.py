"""The safetensors format: names of dtypes, headers, files that are written tensor by tensor.

https://github.com/huggingface/safetensors#format: the header's length as 8 little-endian bytes,
the header (JSON), then the tensors' bytes. The libraries' own save functions want all arrays of a
file at once; `write_file` computes, hashes, writes and frees one at a time, so that a file may be
larger than the memory. Which tensors belong to a model is not known here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, BinaryIO, cast

import mlx.core as mx

from . import limits, schema
from .errors import UserError
from .files import reading
from .schema import Range

DTYPES = {
    mx.bool_: "BOOL",
    mx.uint8: "U8",
    mx.int8: "I8",
    mx.uint16: "U16",
    mx.int16: "I16",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.float32: "F32",
    mx.uint64: "U64",
    mx.int64: "I64",
}
"""MLX dtype -> its name in a header: what MLX can read and write."""
_AGAIN = "download it again"
MLX_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
_NAMES = {str(dtype).removeprefix("mlx.core."): name for dtype, name in DTYPES.items()}


def dtype_name(dtype: Any) -> str | None:
    """A header's name of a dtype of MLX, NumPy or PyTorch, which name theirs alike; None: it has
    none."""
    return _NAMES.get(str(dtype).rpartition(".")[2])


def read_json_header(file: BinaryIO) -> bytes:
    """The JSON of the header of an open file, which is then at its data.

    ValueError when the file is too short to be a safetensors file.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError("truncated or not a safetensors file")
    limits.check("the size of the header of a safetensors file", length, limits.HEADER_BYTES)
    return file.read(length)


def read_header(
    file: Path, more: Mapping[str, int] = MappingProxyType({})
) -> dict[str, tuple[str, list[int]]]:
    """Name -> (dtype's name, shape) of the tensors in a file, which is as long as it says.

    more  types to accept that MLX doesn't have: dtype's name -> bytes of a number

    UserError for a file that can't be read, is damaged or holds types that MLX doesn't have.
    """
    with reading(file), open(file, "rb") as stream:
        try:
            raw = read_json_header(stream)
        except ValueError as error:
            raise UserError(f"{file} is {error}") from error
        data_bytes = os.fstat(stream.fileno()).st_size - 8 - len(raw)
    damaged = f"{file} has a damaged header; download it again"
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_without_repeats)
    except (RecursionError, ValueError) as error:
        raise UserError(damaged) from error
    sizes = {**{name: dtype.size for name, dtype in MLX_DTYPES.items()}, **more}
    entries = _entries(file, header)
    tensors, end = {}, 0
    for name, entry in entries.items():
        if entry.dtype not in sizes:
            known = ", ".join(sizes)
            raise UserError(f"{file}: {name} has type {entry.dtype[:20]}; known types: {known}")
        start, stop = entry.data_offsets
        if stop - start != math.prod(entry.shape) * sizes[entry.dtype] or start < 0:
            raise UserError(f"{file} has a damaged header ({name}: data_offsets); {_AGAIN}")
        tensors[name] = entry.dtype, entry.shape
    places = sorted(entry.data_offsets for entry in entries.values())
    last = max((stop for _, stop in places), default=0)
    if data_bytes < last:
        raise UserError(f"{file} is truncated: {last - data_bytes} bytes are missing; {_AGAIN}")
    for start, stop in places:
        if start != end:
            raise UserError(damaged)  # tensors that overlap, or a hole
        end = stop
    if data_bytes > end:
        raise UserError(f"{file} has {data_bytes - end} bytes that are of no tensor; {_AGAIN}")
    return tensors


@dataclass
class _Listed:
    """A tensor's entry in a header."""

    dtype: str
    shape: Annotated[list[Annotated[int, Range(0)]], Range(0, 32)]
    data_offsets: tuple[int, int]


def _entries(file: Path, header: Any) -> dict[str, _Listed]:
    with schema.naming(f"{file} has a damaged header"):
        if not isinstance(header, dict):
            raise UserError(f"the header must be an object; {_AGAIN}")
        limits.check("the number of tensors", len(header), limits.TENSORS)
        metadata = header.pop("__metadata__", None)
        schema.check(dict[str, str] | None, metadata, "__metadata__")
        for name in header:
            schema.check(str, name, "a tensor's name")
            limits.check("the length of a tensor's name", len(name), limits.NAME_CHARACTERS)
        return {name: schema.read(_Listed, x, f"{name}: ") for name, x in header.items()}


def read_metadata(file: Path) -> dict[str, str]:
    """What a file says of itself: {"format": "mlx"}. Empty where it says nothing sound."""
    try:
        with open(file, "rb") as stream:
            found = json.loads(read_json_header(stream)).get("__metadata__")
    except (OSError, ValueError, RecursionError, AttributeError):
        return {}  # `read_header` says what is wrong with it
    return found if isinstance(found, dict) else {}


def _without_repeats(pairs: list) -> dict:
    # A dict would keep the last of two tensors of one name, and say nothing.
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def load(file: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """(name -> lazy array, metadata) of a file whose header has been checked."""
    arrays, metadata = mx.load(str(file), format="safetensors", return_metadata=True)
    return cast(dict[str, mx.array], arrays), cast(dict[str, str], metadata)


def array_bytes(x: mx.array) -> memoryview:
    """The bytes of an array, which is evaluated; in row-major order, as in a file."""
    flat = mx.view(mx.contiguous(x).reshape(-1), mx.uint8)
    return memoryview(flat)  # type: ignore[arg-type]  # an array is a buffer; its stubs omit it


def encode_header(
    tensors: Iterable[tuple[str, str, Iterable[int], int]], metadata: dict[str, str]
) -> bytes:
    """What comes before the data of a file with these (name, dtype's name, shape, bytes), in
    their order."""
    header: dict[str, dict] = {"__metadata__": metadata}
    end = 0
    for name, dtype, shape, nbytes in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


@dataclass
class Entry:
    """A tensor to be written. dtype: its name in a header; data() gives its bytes."""

    name: str
    dtype: str
    shape: list[int]
    nbytes: int
    data: Callable[[], memoryview]


def write_file(
    file: Path,
    entries: list[Entry],
    format: str,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> dict[str, str]:
    """Write one file: name -> SHA-256 of each tensor's bytes.

    format    what its metadata says: "mlx" or "pt"
    on_bytes  called with the size of each tensor that was written

    `entries` is emptied on the way, so that what was written can be freed.
    """
    head = encode_header(
        ((e.name, e.dtype, e.shape, e.nbytes) for e in entries), {"format": format}
    )
    hashes = {}
    entries.reverse()
    with open(file, "wb") as out:
        out.write(head)
        while entries:
            e = entries.pop()
            data = e.data()
            if len(data) != e.nbytes:
                raise UserError(f"the tensor {e.name} has {len(data)} bytes, not {e.nbytes}")
            out.write(data)
            hashes[e.name] = hashlib.sha256(data).hexdigest()
            on_bytes(e.nbytes)
            del e, data
            mx.clear_cache()  # MLX would keep the buffers for later
    return hashes
