"""Durable memory: what a sleeping model keeps between processes, by name.

Knows files, locks and crashes. Knows nothing of models, tokenizers or chat: a memory is a dict of
named arrays, a header of counters and provenance, and the ids of the tokens that no sleep has
folded in yet. One process writes to a memory, one thread at a time.

Files of one memory in <home>/memories:

    NAME.safetensors  the arrays, the header (as metadata) and `pending`, the tokens that the last
                      sleep did not fold in. Replaced as a whole; its rename is the commit.
    NAME.journal      the tokens heard since then, append-only. Its head names, by SHA-256, the
                      NAME.safetensors that it continues.
    NAME.lock         flock of the process that may write, its process id inside.

A sleep replaces the first file, then starts a new journal. A crash in between leaves a journal
that continues the *previous* NAME.safetensors; the new one names its predecessor, so that journal
is recognised and dropped, and no token is folded in twice. A journal of any other file is refused.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path

import mlx.core as mx
import numpy as np
import platformdirs
import safetensors

from .errors import UserError

FORMAT = 1  # of both files; a reader refuses every other

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
class Listing:
    """A memory as seen from outside, without its model and without its lock.

    pending counts the tokens that wait for the next sleep, bytes both files. A memory that cannot
    be read has a `problem` (one line) and may have no header.
    """

    name: str
    header: Header | None
    pending: int
    bytes: int
    problem: str | None = None


def data_dir(home: str | os.PathLike | None = None) -> Path:
    """The folder that holds `memories/`: home, else $MLX_SLEEP_HOME, else the platform's own."""
    chosen = home or os.environ.get("MLX_SLEEP_HOME")
    if chosen:
        return Path(chosen).expanduser()
    return platformdirs.user_data_path("mlx-sleep", appauthor=False)


class Memory:
    """An open memory, locked against every other process. Use as a context manager.

    arrays: dict of mx.array, as of the last sleep; empty before the first.
    header: Header.
    pending: list of token ids appended and not yet folded in, oldest first.
    All three are for reading; the methods change them together with the files.

    Every method that writes raises UserError when the disk is full, read-only or gone. The files
    then hold what they held before, and so does this object.
    """

    @classmethod
    def open(
        cls,
        name: str,
        fingerprint: str,
        *,
        model: str = "",
        home: str | os.PathLike | None = None,
        create: bool = True,
    ) -> Memory:
        """Opens the memory `name`, or makes it when create is true and there is none.

        fingerprint: of the model that will use it. model: its name or path, kept as provenance
        of a new memory. Raises UserError when the memory is missing, in use, another model's, of
        another format version, or damaged; its files are then left as they are.
        """
        folder = _folder(home, name)
        if not create:
            _require(folder, name)
        lock = _Lock(folder, name, make_folder=create)
        try:
            for path in (_memory_path(folder, name), _journal_path(folder, name)):
                with contextlib.suppress(OSError):
                    _unlink(_temporary(path))  # of a process that was killed
            if create and not _exists(folder, name):
                header = Header(fingerprint, model=model, created=_now(), updated=_now())
                _create(folder, name, header, {}, [])
            return cls(folder, name, fingerprint, lock)
        except BaseException:
            lock.release()
            raise

    def __init__(self, folder: Path, name: str, fingerprint: str, lock: _Lock):
        self.name = name
        self._path = _memory_path(folder, name)
        self._journal_path = _journal_path(folder, name)
        self._lock: _Lock | None = lock
        self._journal: int | None = None  # file descriptor; None: not started since open or commit
        self._unsynced = False
        stored, heard = _load(folder, name)
        self._adopt(stored.header, stored.arrays, stored.pending, stored.sha256)
        self.pending += heard
        if self.header.fingerprint != fingerprint:
            raise UserError(
                f"memory '{name}' was made by another model ({self.header.model or 'unnamed'}, "
                f"fingerprint {self.header.fingerprint[:12]}; this one's is {fingerprint[:12]}); "
                "load that model, or choose another memory name"
            )

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, tokens: Iterable[int]) -> None:
        """Journals token ids (0 <= id < 2**32) as one record and adds them to `pending`.

        After this they survive the death of the process; after sync() that of the machine.
        """
        tokens = list(tokens)
        if not tokens:
            return
        record = _record(tokens)
        self._require_open()
        with _explained(f"cannot write memory '{self.name}' in {self._path.parent}"):
            if self._journal is None:
                self._start_journal()
            try:
                _write_all(self._journal, record)
                self.pending += tokens
                self._unsynced = True
            except BaseException:
                self._drop_journal()  # it may end in half a record; the next append starts afresh
                raise

    def sync(self) -> None:
        """Puts everything appended so far on the disk itself. Called once a turn."""
        if not self._unsynced:
            return
        self._require_open()
        with _explained(f"cannot write memory '{self.name}' in {self._path.parent}"):
            if self._journal is None:
                self._start_journal()
            else:
                try:
                    _fsync(self._journal)
                except BaseException:
                    # A second fsync may report success for pages that the first one lost.
                    self._drop_journal()
                    raise
        self._unsynced = False

    def commit(
        self, arrays: Arrays, tokens: int, *, passes: int, eviction: str, window: int
    ) -> None:
        """Records a sleep: arrays are the state after the oldest `tokens` of `pending` went in.

        arrays may have any shape, and any MLX dtype but float64 and complex64; the name "pending"
        is taken. The rest of `pending` stays pending. When this raises, no sleep was recorded,
        except that a KeyboardInterrupt may come after it was: `header.sleeps` tells.
        """
        if not 0 < tokens <= len(self.pending):
            raise ValueError(f"{tokens} tokens folded in, {len(self.pending)} are pending")
        header = replace(
            self.header,
            passes=passes,
            eviction=eviction,
            window=window,
            tokens=self.header.tokens + tokens,
            sleeps=self.header.sleeps + 1,
            updated=_now(),
            previous=self._sha256,
        )
        self._replace(header, arrays, self.pending[tokens:])

    def forget(self) -> None:
        """Erases arrays, counters and pending tokens; the memory stays open, as if new."""
        header = Header(
            self.header.fingerprint,
            model=self.header.model,
            created=_now(),
            updated=_now(),
            previous=self._sha256,
        )
        self._replace(header, {}, [])

    def close(self) -> None:
        """Syncs, then gives the lock back. A second close does nothing."""
        if self._lock is None:
            return
        try:
            self.sync()
        finally:
            self._drop_journal()
            lock, self._lock = self._lock, None
            lock.release()

    def _replace(self, header: Header, arrays: Arrays, pending: list[int]) -> None:
        self._require_open()
        raw, sha256 = _encode(header, arrays, pending)
        with _explained(f"cannot write memory '{self.name}' in {self._path.parent}"):
            if self._journal is None:
                # The journal on disk must never be two files behind: it would be refused.
                self._start_journal()
            try:
                _replace_file(self._path, raw)
            finally:
                # Ctrl-C may strike right after the rename: what lies on the disk decides.
                if _stored_sha256(self._path) == sha256:
                    self._adopt(header, arrays, pending, sha256)
                    self._drop_journal()
                    self._unsynced = True
        # The sleep is committed, so a failure from here on is not its failure: the next append or
        # sync tries again and reports it.
        with contextlib.suppress(OSError):
            _fsync_folder(self._path.parent)
            self._start_journal()
            self._unsynced = False

    def _adopt(self, header: Header, arrays: Arrays, pending: list[int], sha256: str) -> None:
        self.header = header
        self.arrays = dict(arrays)
        self.pending = list(pending)
        self._stored = len(pending)  # how many of them NAME.safetensors holds
        self._sha256 = sha256

    def _start_journal(self) -> None:
        """Puts a journal in place that continues the file on disk and holds what it does not."""
        heard = self.pending[self._stored :]
        raw = _journal_head(self._sha256) + (_record(heard) if heard else b"")
        _replace_file(self._journal_path, raw)
        _fsync_folder(self._journal_path.parent)
        self._journal = os.open(self._journal_path, os.O_WRONLY | os.O_APPEND)

    def _drop_journal(self) -> None:
        if self._journal is not None:
            journal, self._journal = self._journal, None
            os.close(journal)

    def _require_open(self) -> None:
        if self._lock is None:
            raise ValueError(f"memory '{self.name}' is closed")


def list_memories(home: str | os.PathLike | None = None) -> list[Listing]:
    """Every memory in the data folder, by name, damaged ones too. Takes no lock."""
    folder = data_dir(home) / "memories"
    with _explained(f"cannot read {folder}"):
        try:
            files = [f for f in folder.iterdir() if f.suffix in (".safetensors", ".journal")]
        except FileNotFoundError:
            return []
    names = sorted({f.stem for f in files if _NAME.fullmatch(f.stem)})
    return [_listing(folder, name) for name in names]


def show_memory(name: str, home: str | os.PathLike | None = None) -> Listing:
    """One memory as list_memories shows it. Raises UserError when there is none."""
    folder = _folder(home, name)
    _require(folder, name)
    return _listing(folder, name)


def fork(source: str, target: str, home: str | os.PathLike | None = None) -> None:
    """Copies a memory, pending tokens included, to a new name. Raises UserError when that exists,
    or when either is in use."""
    folder = _folder(home, source)
    _folder(home, target)
    _require(folder, source)
    if source == target:
        raise UserError(f"memory '{target}' exists already; choose another name for the fork")
    with _Lock(folder, source), _Lock(folder, target):
        stored, heard = _load(folder, source)
        header = replace(stored.header, created=_now(), parent=source)
        _create(folder, target, header, stored.arrays, stored.pending + heard)


def export_memory(
    name: str, path: str | os.PathLike, home: str | os.PathLike | None = None
) -> None:
    """Writes a memory, pending tokens included, to one safetensors file. Raises UserError when
    that exists or cannot be written, or when the memory is in use."""
    folder = _folder(home, name)
    _require(folder, name)
    path = Path(path).expanduser()
    with _Lock(folder, name):
        stored, heard = _load(folder, name)
        raw, _ = _encode(replace(stored.header, previous=""), stored.arrays, stored.pending + heard)
        with _explained(f"cannot export to {path}", "choose a file in a folder that you can write"):
            if os.path.lexists(path):
                raise UserError(f"{path} exists already; choose another file to export to")
            _replace_file(path, raw)
            _fsync_folder(path.parent)


def import_memory(
    path: str | os.PathLike, name: str, home: str | os.PathLike | None = None
) -> None:
    """Makes the memory `name` of an exported file. Raises UserError when the name exists or the
    file is missing, damaged or not a memory."""
    folder = _folder(home, name)
    path = Path(path).expanduser()
    with _explained(f"cannot import {path}", "check the path"):
        raw = path.read_bytes()
    stored = _decode(raw, str(path), "export it again")
    with _Lock(folder, name, make_folder=True):
        _create(folder, name, stored.header, stored.arrays, stored.pending)


def remove(name: str, home: str | os.PathLike | None = None) -> None:
    """Deletes a memory, damaged or not. Raises UserError when there is none or it is in use."""
    folder = _folder(home, name)
    _require(folder, name)
    with _Lock(folder, name), _explained(f"cannot remove memory '{name}' in {folder}"):
        # Last the file that makes it a memory: a crash on the way leaves one that still opens.
        for path in (_journal_path(folder, name), _memory_path(folder, name)):
            _unlink(_temporary(path))
            _unlink(path)
        _fsync_folder(folder)


# Names and folders

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _folder(home: str | os.PathLike | None, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} cannot name a memory; use 1 to 64 letters, digits, dots, dashes and "
            "underscores, beginning with a letter or digit"
        )
    return data_dir(home) / "memories"


def _memory_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _journal_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.journal"


def _exists(folder: Path, name: str) -> bool:
    # A journal alone counts: its tokens were somebody's, a new memory must not bury them.
    return any(os.path.lexists(p(folder, name)) for p in (_memory_path, _journal_path))


def _require(folder: Path, name: str) -> None:
    if not _exists(folder, name):
        raise UserError(
            f"there is no memory '{name}' in {folder}; "
            "`mlx-sleep memory list` shows those there are"
        )


def _make_folder(folder: Path) -> None:
    for path in (*reversed(folder.parents), folder):
        with contextlib.suppress(FileExistsError):
            if not path.is_dir():
                os.mkdir(path, 0o700)
                os.chmod(path, 0o700)  # an odd umask may have taken the owner's bits
                _fsync_folder(path.parent)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


# Loading and creating: the two files together


@dataclass(frozen=True)
class _Stored:
    """What a NAME.safetensors holds."""

    header: Header
    arrays: Arrays
    pending: list[int]
    sha256: str


def _load(folder: Path, name: str) -> tuple[_Stored, list[int]]:
    """What the memory's file holds, and the tokens that its journal adds to `pending`."""
    remedy = f"`mlx-sleep memory rm {name}` removes it; an export of it can then be imported"
    memory_path, journal_path = _memory_path(folder, name), _journal_path(folder, name)
    with _explained(f"cannot read memory '{name}' in {folder}"):
        # The journal first: a commit that passes by makes it older, which is legal, not newer.
        try:
            journal = journal_path.read_bytes()
        except FileNotFoundError:
            journal = None
        try:
            raw = memory_path.read_bytes()
        except FileNotFoundError:
            if journal is None:
                _require(folder, name)
            raise UserError(
                f"{journal_path} has no {memory_path.name} beside it; put that back, "
                f"or `mlx-sleep memory rm {name}`"
            ) from None
    stored = _decode(raw, f"memory '{name}'", remedy)
    if journal is None:
        return stored, []
    try:
        continues, heard = _parse_journal(journal)
    except _Damaged as damage:
        raise UserError(
            f"the journal of memory '{name}' is damaged ({damage}); move {journal_path} away to "
            "go on without the tokens in it"
        ) from None
    if continues == stored.sha256:
        return stored, heard
    if continues == stored.header.previous:
        return stored, []  # a crash came between commit and new journal: these are folded in
    raise UserError(
        f"the journal of memory '{name}' continues another file than {memory_path.name}; put that "
        f"file back, or move {journal_path} away to go on without the tokens in it"
    )


def _create(folder: Path, name: str, header: Header, arrays: Arrays, pending: list[int]) -> None:
    """Puts a memory in place that was not there. The caller holds its lock."""
    raw, _ = _encode(replace(header, previous=""), arrays, pending)
    with _explained(f"cannot create memory '{name}' in {folder}"):
        if _exists(folder, name):
            raise UserError(f"memory '{name}' exists already; choose another name")
        _replace_file(_memory_path(folder, name), raw)
        _fsync_folder(folder)


def _listing(folder: Path, name: str) -> Listing:
    header, pending, problem = None, 0, None
    try:
        stored, heard = _load(folder, name)
        header, pending = stored.header, len(stored.pending) + len(heard)
    except UserError as error:
        problem = str(error)
    size = 0
    for path in (_memory_path(folder, name), _journal_path(folder, name)):
        with contextlib.suppress(OSError):
            size += path.stat().st_size
    return Listing(name, header, pending, size, problem)


# The memory file: https://github.com/huggingface/safetensors#format. Written here because the
# package's numpy side has no bfloat16; read through the package, which checks the layout.


class _Damaged(ValueError):
    """What is wrong with a file, in a few words."""


# MLX dtype -> (safetensors' name, the unsigned type that carries its bits through numpy)
_DTYPES = {
    mx.bool_: ("BOOL", mx.uint8),
    mx.uint8: ("U8", mx.uint8),
    mx.int8: ("I8", mx.uint8),
    mx.uint16: ("U16", mx.uint16),
    mx.int16: ("I16", mx.uint16),
    mx.float16: ("F16", mx.uint16),
    mx.bfloat16: ("BF16", mx.uint16),
    mx.uint32: ("U32", mx.uint32),
    mx.int32: ("I32", mx.uint32),
    mx.float32: ("F32", mx.uint32),
    mx.uint64: ("U64", mx.uint64),
    mx.int64: ("I64", mx.uint64),
}
_BY_NAME = {name: (dtype, f"<u{bits.size}") for dtype, (name, bits) in _DTYPES.items()}

# Stands once in a file: inside a string, JSON would escape its quotes.
_SHA256_KEY = b'"sha256":"'
_BLANK = "0" * 64


def _encode(header: Header, arrays: Arrays, pending: list[int]) -> tuple[bytearray, str]:
    """The bytes of a memory file and their SHA-256, which stands in them (as zeros when taken)."""
    if "pending" in arrays:
        raise ValueError("an array cannot be named 'pending'")
    tensors = {}
    for name, array in arrays.items():
        if array.dtype not in _DTYPES:
            raise ValueError(f"array '{name}' is {array.dtype}, which a memory cannot hold")
        code, bits = _DTYPES[array.dtype]
        data = np.array(array.view(bits)).astype(f"<u{bits.size}", copy=False).tobytes()
        tensors[name] = (code, array.shape, data)
    tensors["pending"] = ("U32", (len(pending),), struct.pack(f"<{len(pending)}I", *pending))

    metadata = {f.name: str(getattr(header, f.name)) for f in fields(header)}
    entries: dict[str, dict] = {"__metadata__": {**metadata, "sha256": _BLANK}}
    body = bytearray()
    # Wide elements first, so that each tensor is aligned.
    for name in sorted(tensors, key=lambda n: (-_BY_NAME[tensors[n][0]][0].size, n)):
        code, shape, data = tensors[name]
        offsets = [len(body), len(body) + len(data)]
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": offsets}
        body += data
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    raw = bytearray(struct.pack("<Q", len(head)) + head + body)
    start, sha256 = _sha256(raw)
    raw[start : start + 64] = sha256.encode()
    return raw, sha256


def _decode(raw: bytes, what: str, remedy: str) -> _Stored:
    """Reads a memory file's bytes. `what` names it in the UserError, `remedy` says what to do."""
    try:
        try:
            tensors = dict(safetensors.deserialize(raw))
        except safetensors.SafetensorError as error:
            raise _Damaged("truncated, or not a safetensors file") from error
        metadata = (
            json.loads(raw[8 : 8 + struct.unpack_from("<Q", raw)[0]]).get("__metadata__") or {}
        )
        version = metadata.get("format_version", "")
        if version.isdecimal() and version != str(FORMAT):
            raise UserError(
                f"{what} has format {version}, this mlx-sleep reads format {FORMAT}; "
                "use the mlx-sleep that wrote it"
            )
        try:
            start, sha256 = _sha256(raw)
            header = Header(
                **{
                    f.name: (int if f.type == "int" else str)(metadata[f.name])
                    for f in fields(Header)
                }
            )
        except (KeyError, ValueError) as error:
            raise _Damaged("it lacks what every memory has") from error
        if raw[start : start + 64] != sha256.encode():
            raise _Damaged("checksum mismatch")
        pending = tensors.pop("pending", None)
        if pending is None or pending["dtype"] != "U32" or len(pending["shape"]) != 1:
            raise _Damaged("it lacks what every memory has")
        arrays = {}
        for name, tensor in tensors.items():
            if tensor["dtype"] not in _BY_NAME:
                raise _Damaged(f"array '{name}' has dtype {tensor['dtype']}")
            dtype, bits = _BY_NAME[tensor["dtype"]]
            flat = np.frombuffer(tensor["data"], bits)
            arrays[name] = mx.array(flat.reshape(tensor["shape"])).view(dtype)
        return _Stored(header, arrays, np.frombuffer(pending["data"], "<u4").tolist(), sha256)
    except _Damaged as damage:
        raise UserError(f"{what} is damaged or not a memory ({damage}); {remedy}") from None


def _sha256(raw: bytes | bytearray) -> tuple[int, str]:
    """Where the file's SHA-256 stands in it, and what it should be. ValueError: nowhere."""
    start = raw.index(_SHA256_KEY) + len(_SHA256_KEY)
    view = memoryview(raw)
    digest = hashlib.sha256(view[:start])
    digest.update(_BLANK.encode())
    digest.update(view[start + 64 :])
    return start, digest.hexdigest()


def _stored_sha256(path: Path) -> str:
    """The SHA-256 that a memory file claims, without reading its arrays."""
    with path.open("rb") as file:
        head = file.read(struct.unpack("<Q", file.read(8))[0])
    start = head.index(_SHA256_KEY) + len(_SHA256_KEY)
    return head[start : start + 64].decode()


# The journal: a head, then records, each of <count> little-endian uint32 token ids.

_HEAD = struct.Struct("<8s32s")  # magic with the format version, SHA-256; then their CRC-32
_RECORD = struct.Struct("<II")  # count, CRC-32 of the ids; then the CRC-32 of these two
_CRC = struct.Struct("<I")
_MAGIC = b"MLXSLPJ%d" % FORMAT


def _journal_head(sha256: str) -> bytes:
    head = _HEAD.pack(_MAGIC, bytes.fromhex(sha256))
    return head + _CRC.pack(zlib.crc32(head))


def _record(tokens: list[int]) -> bytes:
    try:
        ids = struct.pack(f"<{len(tokens)}I", *tokens)
    except struct.error as error:
        raise ValueError(f"not a list of token ids: {error}") from None
    head = _RECORD.pack(len(tokens), zlib.crc32(ids))
    return head + _CRC.pack(zlib.crc32(head)) + ids


def _parse_journal(raw: bytes) -> tuple[str, list[int]]:
    """The SHA-256 that the journal continues, and its tokens. A torn last record is left out.

    Torn is what a crash leaves: a record cut short, or zeros where its bytes did not arrive. The
    count has a checksum of its own, so that a damaged one cannot pass for a record cut short.
    """
    at = _HEAD.size + _CRC.size
    if len(raw) < at:
        raise _Damaged("truncated")
    if _CRC.pack(zlib.crc32(raw[: _HEAD.size])) != raw[_HEAD.size : at]:
        raise _Damaged("checksum mismatch")
    magic, sha256 = _HEAD.unpack_from(raw)
    if magic != _MAGIC:
        raise _Damaged("of another format version")
    tokens: list[int] = []
    while len(raw) - at >= _RECORD.size + _CRC.size:
        head = raw[at : at + _RECORD.size]
        start = at + _RECORD.size + _CRC.size
        count, crc = _RECORD.unpack(head)
        if _CRC.pack(zlib.crc32(head)) != raw[at + _RECORD.size : start]:
            if not any(raw[at:]):
                break
            raise _Damaged(f"checksum mismatch at byte {at}")
        ids = raw[start : start + 4 * count]
        if len(ids) < 4 * count:
            break
        if zlib.crc32(ids) != crc:
            raise _Damaged(f"checksum mismatch at byte {at}")
        tokens += struct.unpack(f"<{count}I", ids)
        at = start + len(ids)
    return sha256.hex(), tokens


# Files


class _Lock:
    """An exclusive flock on NAME.lock with this process's id in it. Gone with the process."""

    def __init__(self, folder: Path, name: str, *, make_folder: bool = False):
        self._path = folder / f"{name}.lock"
        with _explained(f"cannot lock memory '{name}' in {folder}"):
            if make_folder:
                _make_folder(folder)
            while True:
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
                try:
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # The last holder may have unlinked the file between our open and our flock.
                    with contextlib.suppress(FileNotFoundError):
                        if os.path.samestat(os.fstat(self._file), os.stat(self._path)):
                            break
                except BlockingIOError:
                    holder = os.pread(self._file, 20, 0).decode(errors="replace").strip()
                    os.close(self._file)
                    raise UserError(
                        f"memory '{name}' is in use by "
                        f"{'process ' + holder if holder else 'another process'}; "
                        "leave that chat first, or choose another memory name"
                    ) from None
                except BaseException:
                    os.close(self._file)
                    raise
                os.close(self._file)
        # For the message above only; a full disk must not keep anyone from `memory rm`.
        with contextlib.suppress(OSError):
            _chmod_private(self._file)
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        try:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
        finally:
            os.close(self._file)

    def __enter__(self) -> _Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@contextlib.contextmanager
def _explained(
    doing: str, elsewhere: str = "check that folder, or set MLX_SLEEP_HOME to one you can write"
) -> Iterator[None]:
    """Turns an OSError into a UserError that says what to do next."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space there and try again" if full else elsewhere
        raise UserError(f"{doing}: {error.strerror or error}; {remedy}") from error


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _replace_file(path: Path, data: bytes | bytearray) -> None:
    """Replaces path by data, or leaves it as it was. The caller syncs the folder."""
    temporary = _temporary(path)
    _unlink(temporary)
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        try:
            _chmod_private(file)
            _write_all(file, data)
            _fsync(file)
        finally:
            os.close(file)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            _unlink(temporary)
        raise


def _unlink(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _chmod_private(file: int) -> None:
    # An odd umask may have taken the owner's bits; a USB stick may have no modes at all.
    with contextlib.suppress(PermissionError):
        os.fchmod(file, 0o600)


def _write_all(file: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _fsync(file: int) -> None:
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync alone stops at the drive's cache
        try:
            fcntl.fcntl(file, fcntl.F_FULLFSYNC)
            return
        except OSError:
            pass  # a network folder has only fsync
    os.fsync(file)


def _fsync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        _fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot
            raise
    finally:
        os.close(file)
