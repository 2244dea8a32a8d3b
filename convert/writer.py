"""Safetensors written tensor by tensor.

The libraries' own save functions want all arrays of a file at once. Here one tensor at a time is
computed, hashed, written and forgotten, so that a file may be larger than the memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..models.folder import write_json
from ..models.weights import INDEX, not_finite
from ..utils.errors import UserError

SHARD_BYTES = 5 * 10**9
"""The largest weights file, as in mlx-lm; a larger tensor gets a file of its own."""

_CODES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.uint8: "U8",
    mx.int32: "I32",
    mx.int64: "I64",
    mx.bool_: "BOOL",
}


@dataclass
class Entry:
    """A tensor to be written. dtype: as in a safetensors header; data() gives its bytes."""

    name: str
    dtype: str
    shape: list[int]
    nbytes: int
    data: Callable[[], memoryview]


def entry(name: str, x: mx.array) -> Entry:
    """An entry that evaluates the lazy array x when it is written.

    Its data() raises UserError for NaN and infinity.
    """
    if x.dtype not in _CODES:
        raise UserError(f"the tensor {name} has type {x.dtype}, which has no place in a model")

    def data() -> memoryview:
        mx.eval(x)
        if not_finite({name: x}):
            raise UserError(f"NaN or infinite weights in {name}; nothing was written")
        return memoryview(mx.view(mx.contiguous(x).reshape(-1), mx.uint8))

    return Entry(name, _CODES[x.dtype], list(x.shape), x.nbytes, data)


def write_file(
    file: Path,
    entries: list[Entry],
    format: str,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> dict[str, str]:
    """Write one safetensors file: name -> SHA-256 of each tensor's bytes.

    format    what its metadata says: "mlx" or "pt"
    on_bytes  called with the size of each tensor that was written

    `entries` is emptied on the way, so that what was written can be freed.
    """
    header: dict = {"__metadata__": {"format": format}}
    end = 0
    for e in entries:
        header[e.name] = {"dtype": e.dtype, "shape": e.shape, "data_offsets": [end, end + e.nbytes]}
        end += e.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    hashes = {}
    entries.reverse()
    with open(file, "wb") as out:
        out.write(len(raw).to_bytes(8, "little") + raw)
        while entries:
            e = entries.pop()
            data = e.data()
            if len(data) != e.nbytes:
                raise UserError(f"the tensor {e.name} has {len(data)} bytes in place of {e.nbytes}")
            out.write(data)
            hashes[e.name] = hashlib.sha256(data).hexdigest()
            on_bytes(e.nbytes)
            del e, data
            mx.clear_cache()  # MLX would keep the buffers for later
    return hashes


def write_shards(
    folder: Path,
    entries: list[Entry],
    format: str,
    on_bytes: Callable[[int], None] = lambda count: None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Write model.safetensors, or shards with an index: name -> SHA-256 of each tensor.

    See `write_file`.
    """
    shards, size = [[]], 0
    total = sum(e.nbytes for e in entries)
    for e in entries:
        if shards[-1] and size + e.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(e)
        size += e.nbytes
    entries.clear()
    if len(shards) == 1:
        return write_file(folder / "model.safetensors", shards[0], format, on_bytes)
    weight_map, hashes = {}, {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update({e.name: file for e in shard})
        hashes.update(write_file(folder / file, shard, format, on_bytes))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)
    return hashes
