"""What a memory holds, and its bytes in one safetensors file, as `memory export` writes it.

Knows how they are laid out and checked. Knows nothing of folders and databases.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import mlx.core as mx
import numpy as np
import safetensors

from ..utils.errors import UserError
from ..utils.safetensors import DTYPES, MLX_DTYPES, encode_header, read_json_header

FORMAT = 1  # of this file; a reader refuses every other

Arrays = dict[str, mx.array]
ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Header:
    """Provenance and counters of a memory.

    passes, eviction and window are those of the last sleep (0, "" and 0 before the first).
    tokens and sleeps count from the beginning: tokens folded in, sleeps committed. Times are ISO
    8601 in UTC. parent is the memory that this one was forked from, or "". previous is the SHA-256
    of the NAME.safetensors that this memory was read from (see migrate.py), or "".
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
class Message:
    """Something that was said. text is None where no transcript was kept.

    position counts the tokens that the memory had heard before: of a user's turn those before its
    first, of a reply those before its end mark. said is a time, ISO 8601 in UTC.
    """

    role: str
    text: str | None
    position: int
    said: str


@dataclass(frozen=True)
class Contents:
    """All that a memory holds. pending: ids of the tokens that no sleep has folded in."""

    header: Header
    arrays: Arrays
    pending: list[int]
    messages: tuple[Message, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)


class Damaged(ValueError):
    """What is wrong with a file, in a few words."""


# Not written by the safetensors package, whose numpy side has no bfloat16; read through it, as it
# checks the layout.

# Bytes of an element -> the unsigned type that carries its bits through numpy.
_BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}

# Occurs once in a file: inside a string, JSON would escape its quotes.
_SHA256_KEY = b'"sha256":"'
_BLANK = "0" * 64


def check_arrays(arrays: Arrays) -> None:
    """ValueError for arrays that a memory cannot hold."""
    if "pending" in arrays:
        raise ValueError("an array cannot be named 'pending'")
    for name, array in arrays.items():
        if array.dtype not in DTYPES:
            raise ValueError(f"array '{name}' is {array.dtype}, which a memory cannot hold")


def array_bytes(array: mx.array) -> bytes:
    """Its elements, little-endian, to the bit."""
    size = array.dtype.size
    return np.array(array.view(_BITS[size])).astype(f"<u{size}", copy=False).tobytes()


def array_from(dtype: str, shape: list[int], data: bytes) -> mx.array:
    """The array of these bytes; dtype as safetensors names it. Damaged for an unknown one."""
    if dtype not in MLX_DTYPES:
        raise Damaged(f"dtype {dtype}")
    kind = MLX_DTYPES[dtype]
    return mx.array(np.frombuffer(data, f"<u{kind.size}").reshape(shape)).view(kind)


def encode_memory(contents: Contents) -> bytearray:
    """The bytes of a memory file. Their SHA-256 is in them (zeros while it is taken)."""
    header, pending = contents.header, contents.pending
    check_arrays(contents.arrays)
    tensors = {
        name: (DTYPES[array.dtype], array.shape, array_bytes(array))
        for name, array in contents.arrays.items()
    }
    tensors["pending"] = ("U32", (len(pending),), struct.pack(f"<{len(pending)}I", *pending))

    metadata = {f.name: str(getattr(header, f.name)) for f in fields(header)}
    # Not there in files of earlier versions, which leave such keys alone when they read one.
    metadata["messages"] = json.dumps([asdict(message) for message in contents.messages])
    metadata["settings"] = json.dumps(contents.settings)
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
    start, sha256 = find_sha256(raw)
    raw[start : start + 64] = sha256.encode()
    return raw


def decode_memory(raw: bytes, what: str, remedy: str) -> Contents:
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
            start, sha256 = find_sha256(raw)
            values: dict[str, Any] = {
                f.name: (int if f.type == "int" else str)(metadata[f.name]) for f in fields(Header)
            }
            header = Header(**values)
            if not 0 <= header.sleeps <= header.tokens or min(header.passes, header.window) < 0:
                raise ValueError("counters that no sleeps have made")
            messages = tuple(Message(**m) for m in json.loads(metadata.get("messages", "[]")))
            settings = json.loads(metadata.get("settings", "{}"))
            check_words(messages, settings)
        except (KeyError, TypeError, ValueError) as error:
            raise Damaged("it lacks what every memory has") from error
        if raw[start : start + 64] != sha256.encode():
            raise Damaged("checksum mismatch")
        pending = tensors.pop("pending", None)
        if pending is None or pending["dtype"] != "U32" or len(pending["shape"]) != 1:
            raise Damaged("it lacks what every memory has")
        arrays = {}
        for name, tensor in tensors.items():
            try:
                arrays[name] = array_from(tensor["dtype"], tensor["shape"], tensor["data"])
            except Damaged as damage:
                raise Damaged(f"array '{name}' has {damage}") from None
        tokens = np.frombuffer(pending["data"], "<u4").tolist()
        return Contents(header, arrays, tokens, messages, settings)
    except Damaged as damage:
        raise UserError(f"{what} is damaged or not a memory ({damage}); {remedy}") from None


def check_words(messages: tuple[Message, ...], settings: object) -> None:
    """ValueError for what can't be a transcript and settings."""
    for m in messages:
        if m.role not in ROLES or not isinstance(m.text, (str, type(None))):
            raise ValueError("not a message")
        if not isinstance(m.position, int) or m.position < 0 or not isinstance(m.said, str):
            raise ValueError("not a message")
    if not isinstance(settings, dict) or any(not isinstance(v, str) for v in settings.values()):
        raise ValueError("not settings")


def find_sha256(raw: bytes | bytearray) -> tuple[int, str]:
    """Where in the file its SHA-256 is, and what it should be. ValueError when it has none."""
    start = raw.index(_SHA256_KEY) + len(_SHA256_KEY)
    view = memoryview(raw)
    digest = hashlib.sha256(view[:start])
    digest.update(_BLANK.encode())
    digest.update(view[start + 64 :])
    return start, digest.hexdigest()
