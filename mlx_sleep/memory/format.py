"""The bytes of a memory file, NAME.safetensors: header, arrays and pending tokens.

Knows how they are laid out and checked. Knows nothing of folders, locks or the journal.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import safetensors

from ..utils.errors import UserError
from ..utils.safetensors import DTYPES, MLX_DTYPES, encode_header, read_json_header

FORMAT = 1  # of this file and of the journal; a reader refuses every other

Arrays = dict[str, mx.array]


@dataclass(frozen=True)
class Header:
    """Provenance and counters of a memory.

    passes, eviction and window are those of the last sleep (0, "" and 0 before the first).
    tokens and sleeps count from the beginning: tokens folded in, sleeps committed. Times are ISO
    8601 in UTC. parent is the memory that this one was forked from, or "". previous is the SHA-256
    of the file that this one replaced, or "".
    """

    fingerprint: str
    model: str = ""
    passes: int = 0
    eviction: str = ""
    window: int = 0
    tokens: int = 0
    sleeps: int = 0
    created: str = ""
    updated: str = ""
    parent: str = ""
    previous: str = ""
    format_version: int = FORMAT


@dataclass(frozen=True)
class Stored:
    """What a NAME.safetensors holds."""

    header: Header
    arrays: Arrays
    pending: list[int]
    sha256: str


class Damaged(ValueError):
    """What is wrong with a file, in a few words."""


# The memory file is safetensors. Not written by the package, whose numpy side has no bfloat16; read
# through the package, which checks the layout.

# Bytes of an element -> the unsigned type that carries its bits through numpy.
_BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}

# Occurs once in a file: inside a string, JSON would escape its quotes.
_SHA256_KEY = b'"sha256":"'
_BLANK = "0" * 64


def encode_memory(header: Header, arrays: Arrays, pending: list[int]) -> tuple[bytearray, str]:
    """The bytes of a memory file and their SHA-256, which is in them (zeros while it is taken)."""
    if "pending" in arrays:
        raise ValueError("an array cannot be named 'pending'")
    tensors = {}
    for name, array in arrays.items():
        if array.dtype not in DTYPES:
            raise ValueError(f"array '{name}' is {array.dtype}, which a memory cannot hold")
        size = array.dtype.size
        data = np.array(array.view(_BITS[size])).astype(f"<u{size}", copy=False).tobytes()
        tensors[name] = (DTYPES[array.dtype], array.shape, data)
    tensors["pending"] = ("U32", (len(pending),), struct.pack(f"<{len(pending)}I", *pending))

    metadata = {f.name: str(getattr(header, f.name)) for f in fields(header)}
    # Wide elements first, so that each tensor is aligned.
    order = sorted(tensors, key=lambda name: (-MLX_DTYPES[tensors[name][0]].size, name))
    raw = bytearray(
        encode_header(
            ((name, *tensors[name][:2], len(tensors[name][2])) for name in order),
            {**metadata, "sha256": _BLANK},
        )
    )
    for name in order:
        raw += tensors[name][2]
    start, sha256 = _sha256(raw)
    raw[start : start + 64] = sha256.encode()
    return raw, sha256


def decode_memory(raw: bytes, what: str, remedy: str) -> Stored:
    """Reads a memory file's bytes. `what` names it in the UserError, `remedy` says what to do."""
    try:
        try:
            tensors = dict(safetensors.deserialize(raw))
        except safetensors.SafetensorError as error:
            raise Damaged("truncated, or not a safetensors file") from error
        metadata = json.loads(read_json_header(io.BytesIO(raw))).get("__metadata__") or {}
        version = metadata.get("format_version", "")
        if version.isdecimal() and version != str(FORMAT):
            raise UserError(
                f"{what} has format {version}, this mlx-sleep reads format {FORMAT}; "
                "use the mlx-sleep that wrote it"
            )
        try:
            start, sha256 = _sha256(raw)
            values: dict[str, Any] = {
                f.name: (int if f.type == "int" else str)(metadata[f.name]) for f in fields(Header)
            }
            header = Header(**values)
            if not 0 <= header.sleeps <= header.tokens or min(header.passes, header.window) < 0:
                raise ValueError("counters that no sleeps have made")
        except (KeyError, ValueError) as error:
            raise Damaged("it lacks what every memory has") from error
        if raw[start : start + 64] != sha256.encode():
            raise Damaged("checksum mismatch")
        pending = tensors.pop("pending", None)
        if pending is None or pending["dtype"] != "U32" or len(pending["shape"]) != 1:
            raise Damaged("it lacks what every memory has")
        arrays = {}
        for name, tensor in tensors.items():
            if tensor["dtype"] not in MLX_DTYPES:
                raise Damaged(f"array '{name}' has dtype {tensor['dtype']}")
            dtype = MLX_DTYPES[tensor["dtype"]]
            flat = np.frombuffer(tensor["data"], f"<u{dtype.size}")
            arrays[name] = mx.array(flat.reshape(tensor["shape"])).view(dtype)
        return Stored(header, arrays, np.frombuffer(pending["data"], "<u4").tolist(), sha256)
    except Damaged as damage:
        raise UserError(f"{what} is damaged or not a memory ({damage}); {remedy}") from None


def _sha256(raw: bytes | bytearray) -> tuple[int, str]:
    """Where in the file its SHA-256 is, and what it should be. ValueError when it has none."""
    start = raw.index(_SHA256_KEY) + len(_SHA256_KEY)
    view = memoryview(raw)
    digest = hashlib.sha256(view[:start])
    digest.update(_BLANK.encode())
    digest.update(view[start + 64 :])
    return start, digest.hexdigest()


def stored_sha256(path: Path) -> str:
    """The SHA-256 that a memory file claims, without reading its arrays."""
    with path.open("rb") as file:
        head = read_json_header(file)
    start = head.index(_SHA256_KEY) + len(_SHA256_KEY)
    return head[start : start + 64].decode()
