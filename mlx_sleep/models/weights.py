"""The weights of a model folder before they are read: which files, which tensors, are they sound.

MLX reads weights lazily, when an error can no longer be told to anyone, so all that can be known
from the headers of the files is checked here.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import mlx.core as mx

from ..utils import schema
from ..utils.errors import UserError
from ..utils.files import reading
from ..utils.safetensors import DTYPES, read_header, read_json_header

_QUANTIZED = (mx.uint32, mx.uint8)  # all else is floating
_FLOATS = tuple(DTYPES[dtype] for dtype in (mx.float32, mx.float16, mx.bfloat16))
# Exponent bits: all ones in NaN and infinity.
_EXPONENT = {
    mx.float32: (mx.uint32, 0x7F800000),
    mx.float16: (mx.uint16, 0x7C00),
    mx.bfloat16: (mx.uint16, 0x7F80),
}
INDEX = "model.safetensors.index.json"
"""Says which shard holds which tensor."""


@dataclass
class _Index:
    weight_map: dict[str, str] = field(default_factory=dict)


def weight_files(path: Path, index: str = INDEX) -> list[Path]:
    """model.safetensors, or the shards that its index names."""
    single = path / index.removesuffix(".index.json")
    if single.is_file():
        return [single]
    if not (path / index).is_file():
        raise UserError(f"{path} has neither {single.name} nor {index}")
    names = schema.read_file(_Index, path / index).weight_map
    if not names:
        raise UserError(f"{path / index} has no weight_map")
    files = []
    for name in sorted(set(names.values())):
        if Path(name).name != name:
            raise UserError(f"{path / index} names {name!r}, which is outside the folder")
        with reading(path / index):
            there = (path / name).is_file()
        if not there:
            raise UserError(f"{path} lacks the weights file {name} that its index names")
        files.append(path / name)
    return files


def read_headers(files: list[Path]) -> dict[str, tuple[str, list[int]]]:
    """Name -> (dtype's name, shape) of every tensor in the files, from their headers alone."""
    tensors: dict[str, tuple[str, list[int]]] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in tensors:
                raise UserError(f"{file} repeats the tensor {name} of another weights file")
            tensors[name] = entry
    return tensors


def weights_digest(path: Path) -> str:
    """What the weights of a folder are, wherever in its files they are: a SHA-256 in hexadecimal.

    It covers each tensor's name, type, shape and first 4 KiB, in the order of the names. So it is
    the same for two conversions of one checkpoint, which `fingerprint` need not be.
    """
    found = []
    for file in weight_files(path):
        headers = read_header(file)  # checks it
        with reading(file), open(file, "rb") as stream:
            header = json.loads(read_json_header(stream))
            data = stream.tell()
            for name, (dtype, shape) in headers.items():
                start, end = header[name]["data_offsets"]
                stream.seek(data + start)
                head = stream.read(min(end - start, 4096))
                found.append((name, dtype, shape, hashlib.sha256(head).hexdigest()))
    return digest_of(found)


def digest_of(tensors: Iterable[tuple[str, str, list[int], str]]) -> str:
    """One SHA-256 of (name, dtype's name, shape, SHA-256 of the first 4 KiB) of each tensor."""
    lines = [" ".join(map(str, tensor)) for tensor in sorted(tensors)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def check_tensors(path: Path, wanted: dict[str, mx.array], tensors) -> None:
    """UserError unless the tensors of `path` are the wanted ones: same names, shapes and kinds."""
    if missing := [name for name in wanted if name not in tensors]:
        spare = [name for name in tensors if name not in wanted]
        close = nearest(missing[0], spare)
        hint = f"; nearest to {missing[0]} is {close}" if close else ""
        raise UserError(f"{path} lacks weights: {abbreviate(missing)}{hint}")
    if unexpected := [name for name in tensors if name not in wanted]:
        raise UserError(
            f"{path} has weights that its config does not ask for: {abbreviate(unexpected)}"
        )
    wrong = []
    for name, array in wanted.items():
        dtype, shape = tensors[name]
        if shape != list(array.shape):
            wrong.append(f"{name} is {shape}, not {list(array.shape)}")
        elif dtype not in ((DTYPES[array.dtype],) if array.dtype in _QUANTIZED else _FLOATS):
            wrong.append(f"{name} is of type {dtype}")
    if wrong:
        raise UserError(f"the weights in {path} do not fit its config: {abbreviate(wrong)}")


_OTHER_PARTS = re.compile(
    r"(model\.)?(visual|vision_tower|vision_model|multi_modal_projector|audio_tower)\..*"
    r"|(language_model\.)?(model\.)?mtp\..*"
)


def is_of_text_model(name: str) -> bool:
    """Whether a tensor is the language model's: not of a vision tower beside it, nor of heads that
    predict more tokens at once."""
    return _OTHER_PARTS.fullmatch(name) is None


def load_arrays(file: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file by name, unread."""
    return cast(dict[str, mx.array], mx.load(str(file)))


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of `names`, if any is similar."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1)), None)


def abbreviate(items: list[str], most: int = 3) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def not_finite(weights: dict[str, mx.array]) -> list[str]:
    """The names of arrays that hold a NaN or an infinity."""
    bad = []
    for name, x in weights.items():
        if x.dtype not in _EXPONENT or x.size == 0:
            continue
        bits, ones = _EXPONENT[x.dtype]
        if (mx.view(x, bits) & ones).max().item() == ones:  # 10 times faster than mx.isfinite
            bad.append(name)
    return bad
