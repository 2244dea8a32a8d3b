"""Memories as versions before 0.2 kept them; a database is made of one when it is opened.

NAME.safetensors  what format.py reads
NAME.journal      the tokens heard since that was written. A head names it by its SHA-256. Records
                  follow, each of <count> little-endian uint32 token ids; all has a CRC-32.
NAME.lock         flock of the process that has it open
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..utils.atomic import temporary, unlink
from ..utils.errors import UserError
from .database import InUse
from .format import Contents, Damaged, decode_memory, find_sha256

_HEAD = struct.Struct("<8s32s")  # magic with the format version, SHA-256; then their CRC-32
_RECORD = struct.Struct("<II")  # count, CRC-32 of the ids; then the CRC-32 of these two
_CRC = struct.Struct("<I")
_MAGIC = b"MLXSLPJ1"


class OldFiles:
    """The files of the memory `name`. Everything raises OSError, what reads them UserError."""

    def __init__(self, folder: Path, name: str):
        self._name = name
        self._memory = folder / f"{name}.safetensors"
        self._journal = folder / f"{name}.journal"
        self._lock = folder / f"{name}.lock"

    @property
    def files(self) -> tuple[Path, ...]:
        return self._memory, self._journal

    @property
    def exist(self) -> bool:
        # A journal alone counts: its tokens were somebody's, a new memory must not bury them.
        return any(os.path.lexists(path) for path in self.files)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """No process of an earlier version has it open. InUse when one does."""
        try:
            file = os.open(self._lock, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            yield
            return
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(file, 20, 0).decode(errors="replace").strip()
                raise InUse(int(holder) if holder.isdecimal() else 0) from None
            yield
        finally:
            os.close(file)

    def read(self) -> Contents:
        """What they hold; header.previous is the SHA-256 of the first. UserError when damaged."""
        name, remedy = self._name, f"`mlx-sleep memory rm {self._name}` removes it"
        # The journal first: a commit in between makes it older, which is legal, not newer.
        journal = self._journal.read_bytes() if self._journal.exists() else None
        if not self._memory.exists() and journal is not None:
            raise UserError(
                f"{self._journal} has no {self._memory.name} beside it; put that back, or {remedy}"
            )
        raw = self._memory.read_bytes()
        old = decode_memory(raw, f"memory '{name}'", f"{remedy}; an export of it can be imported")
        sha256, previous = find_sha256(raw)[1], old.header.previous
        old = replace(old, header=replace(old.header, previous=sha256))
        away = f"move {self._journal} away to go on without the tokens in it"
        if journal is None:
            return old
        try:
            continues, heard = parse_journal(journal)
        except Damaged as damage:
            raise UserError(
                f"the journal of memory '{name}' is damaged ({damage}); {away}"
            ) from None
        if continues == sha256:
            return replace(old, pending=old.pending + heard)
        if continues == previous:
            return old  # a crash between commit and new journal: these are folded in
        raise UserError(
            f"the journal of memory '{name}' continues another file than {self._memory.name}; "
            f"put that file back, or {away}"
        )

    def remove_if(self, sha256: str) -> None:
        """Deletes what was read as the memory with this header.previous, if it is still there."""
        with contextlib.suppress(OSError, ValueError):
            if sha256 and find_sha256(self._memory.read_bytes())[1] == sha256:
                self.remove()

    def remove(self) -> None:
        for path in (self._lock, self._journal, self._memory):
            unlink(temporary(path))  # of a process that was killed
            unlink(path)


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
