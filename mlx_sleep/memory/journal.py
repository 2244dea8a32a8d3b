"""The journal of a memory, NAME.journal: the tokens heard since its NAME.safetensors was written.

A head names, by SHA-256, the memory file that the journal continues. Records follow, each of
<count> little-endian uint32 token ids; everything has a CRC-32.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

from ..utils.atomic import fsync, fsync_path, replace_file, write_all
from .format import FORMAT, Damaged

_HEAD = struct.Struct("<8s32s")  # magic with the format version, SHA-256; then their CRC-32
_RECORD = struct.Struct("<II")  # count, CRC-32 of the ids; then the CRC-32 of these two
_CRC = struct.Struct("<I")
_MAGIC = b"MLXSLPJ%d" % FORMAT


def journal_head(sha256: str) -> bytes:
    """The head of a journal that continues the memory file of this SHA-256."""
    head = _HEAD.pack(_MAGIC, bytes.fromhex(sha256))
    return head + _CRC.pack(zlib.crc32(head))


def journal_record(tokens: list[int]) -> bytes:
    """One record of a journal. ValueError when these are not token ids (0 <= id < 2**32)."""
    try:
        ids = struct.pack(f"<{len(tokens)}I", *tokens)
    except struct.error as error:
        raise ValueError(f"not a list of token ids: {error}") from None
    head = _RECORD.pack(len(tokens), zlib.crc32(ids))
    return head + _CRC.pack(zlib.crc32(head)) + ids


def parse_journal(raw: bytes) -> tuple[str, list[int]]:
    """The SHA-256 that the journal continues, and its tokens. A torn last record is left out.

    Torn is what a crash leaves: a record cut short, or zeros where its bytes did not arrive. The
    count has a checksum of its own, so that a damaged one cannot pass for a record cut short.
    """
    at = _HEAD.size + _CRC.size
    if len(raw) < at:
        raise Damaged("truncated")
    if _CRC.pack(zlib.crc32(raw[: _HEAD.size])) != raw[_HEAD.size : at]:
        raise Damaged("checksum mismatch")
    magic, sha256 = _HEAD.unpack_from(raw)
    if magic != _MAGIC:
        raise Damaged("of another format version")
    tokens: list[int] = []
    while len(raw) - at >= _RECORD.size + _CRC.size:
        head = raw[at : at + _RECORD.size]
        start = at + _RECORD.size + _CRC.size
        count, crc = _RECORD.unpack(head)
        if _CRC.pack(zlib.crc32(head)) != raw[at + _RECORD.size : start]:
            if not any(raw[at:]):
                break
            raise Damaged(f"checksum mismatch at byte {at}")
        ids = raw[start : start + 4 * count]
        if len(ids) < 4 * count:
            break
        if zlib.crc32(ids) != crc:
            raise Damaged(f"checksum mismatch at byte {at}")
        tokens += struct.unpack(f"<{count}I", ids)
        at = start + len(ids)
    return sha256.hex(), tokens


class Journal:
    """A journal that is open for appending. Everything raises OSError."""

    def __init__(self, path: Path, sha256: str, tokens: list[int]):
        """Puts a new journal in place, durably, with `tokens` in it."""
        raw = journal_head(sha256) + (journal_record(tokens) if tokens else b"")
        replace_file(path, raw)
        fsync_path(path.parent)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def append(self, record: bytes) -> None:
        """What `journal_record` gives. When this raises, the file may end in half a record."""
        write_all(self._file, record)

    def sync(self) -> None:
        """After this the records survive the end of the machine."""
        fsync(self._file)

    def close(self) -> None:
        os.close(self._file)
