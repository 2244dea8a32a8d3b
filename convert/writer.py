"""The weights files of a converted model, written tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from ..models.folder import write_json
from ..models.weights import INDEX, not_finite
from ..utils.errors import UserError
from ..utils.safetensors import DTYPES, Entry, array_bytes, write_file

SHARD_BYTES = 5 * 10**9
"""The largest weights file, as in mlx-lm; a larger tensor gets a file of its own."""


def entry(name: str, x: mx.array) -> Entry:
    """An entry that evaluates the lazy array x when it is written.

    Its data() raises UserError for NaN and infinity.
    """
    if x.dtype not in DTYPES:
        raise UserError(f"the tensor {name} has type {x.dtype}, which no weights file can hold")

    def data() -> memoryview:
        mx.eval(x)
        if not_finite({name: x}):
            raise UserError(f"NaN or infinite weights in {name}; nothing was written")
        return array_bytes(x)

    return Entry(name, DTYPES[x.dtype], list(x.shape), x.nbytes, data)


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
    shards: list[list[Entry]] = [[]]
    size = 0
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
    weight_map: dict[str, str] = {}
    hashes: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update({e.name: file for e in shard})
        hashes.update(write_file(folder / file, shard, format, on_bytes))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)
    return hashes
