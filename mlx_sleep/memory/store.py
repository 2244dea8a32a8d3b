"""Durable memory: what a sleeping model keeps between processes, by name.

Knows which file is written when, and what a crash leaves; format.py knows their bytes,
utils/files.py the system calls. Knows nothing of models, tokenizers or chat: a memory is a dict of
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
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import platformdirs

from ..utils.errors import UserError
from ..utils.files import (
    fsync,
    fsync_folder,
    make_folder,
    os_errors_as_user_errors,
    replace_file,
    temporary,
    unlink,
    write_all,
)
from .format import (
    Arrays,
    Damaged,
    Header,
    Stored,
    decode_memory,
    encode_memory,
    journal_head,
    journal_record,
    parse_journal,
    stored_sha256,
)
from .lock import InUse, Lock

_CHECK_FOLDER = "check that folder, or set MLX_SLEEP_HOME to one you can write"


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
        lock = _lock(folder, name, create=create)
        try:
            for path in (_memory_path(folder, name), _journal_path(folder, name)):
                with contextlib.suppress(OSError):
                    unlink(temporary(path))  # of a process that was killed
            if create and not _exists(folder, name):
                header = Header(fingerprint, model=model, created=_now(), updated=_now())
                _create(folder, name, header, {}, [])
            return cls(folder, name, fingerprint, lock)
        except BaseException:
            lock.release()
            raise

    def __init__(self, folder: Path, name: str, fingerprint: str, lock: Lock):
        self.name = name
        self._path = _memory_path(folder, name)
        self._journal_path = _journal_path(folder, name)
        self._lock: Lock | None = lock
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
        record = journal_record(tokens)
        self._require_open()
        with self._explained():
            if self._journal is None:
                self._start_journal()
            try:
                write_all(self._journal, record)
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
        with self._explained():
            if self._journal is None:
                self._start_journal()
            else:
                try:
                    fsync(self._journal)
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
        raw, sha256 = encode_memory(header, arrays, pending)
        with self._explained():
            if self._journal is None:
                # The journal on disk must never be two files behind: it would be refused.
                self._start_journal()
            try:
                replace_file(self._path, raw)
            finally:
                # Ctrl-C may strike right after the rename: what lies on the disk decides.
                if stored_sha256(self._path) == sha256:
                    self._adopt(header, arrays, pending, sha256)
                    self._drop_journal()
                    self._unsynced = True
        # The sleep is committed, so a failure from here on is not its failure: the next append or
        # sync tries again and reports it.
        with contextlib.suppress(OSError):
            fsync_folder(self._path.parent)
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
        raw = journal_head(self._sha256) + (journal_record(heard) if heard else b"")
        replace_file(self._journal_path, raw)
        fsync_folder(self._journal_path.parent)
        self._journal = os.open(self._journal_path, os.O_WRONLY | os.O_APPEND)

    def _drop_journal(self) -> None:
        if self._journal is not None:
            journal, self._journal = self._journal, None
            os.close(journal)

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        doing = f"cannot write memory '{self.name}' in {self._path.parent}"
        return os_errors_as_user_errors(doing, _CHECK_FOLDER)

    def _require_open(self) -> None:
        if self._lock is None:
            raise ValueError(f"memory '{self.name}' is closed")


def list_memories(home: str | os.PathLike | None = None) -> list[Listing]:
    """Every memory in the data folder, by name, damaged ones too. Takes no lock."""
    folder = data_dir(home) / "memories"
    with os_errors_as_user_errors(f"cannot read {folder}", _CHECK_FOLDER):
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
    with _lock(folder, source), _lock(folder, target):
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
    with _lock(folder, name):
        stored, heard = _load(folder, name)
        raw, _ = encode_memory(
            replace(stored.header, previous=""), stored.arrays, stored.pending + heard
        )
        with os_errors_as_user_errors(
            f"cannot export to {path}", "choose a file in a folder that you can write"
        ):
            if os.path.lexists(path):
                raise UserError(f"{path} exists already; choose another file to export to")
            replace_file(path, raw)
            fsync_folder(path.parent)


def import_memory(
    path: str | os.PathLike, name: str, home: str | os.PathLike | None = None
) -> None:
    """Makes the memory `name` of an exported file. Raises UserError when the name exists or the
    file is missing, damaged or not a memory."""
    folder = _folder(home, name)
    path = Path(path).expanduser()
    with os_errors_as_user_errors(f"cannot import {path}", "check the path"):
        raw = path.read_bytes()
    stored = decode_memory(raw, str(path), "export it again")
    with _lock(folder, name, create=True):
        _create(folder, name, stored.header, stored.arrays, stored.pending)


def remove(name: str, home: str | os.PathLike | None = None) -> None:
    """Deletes a memory, damaged or not. Raises UserError when there is none or it is in use."""
    folder = _folder(home, name)
    _require(folder, name)
    with (
        _lock(folder, name),
        os_errors_as_user_errors(f"cannot remove memory '{name}' in {folder}", _CHECK_FOLDER),
    ):
        # Last the file that makes it a memory: a crash on the way leaves one that still opens.
        for path in (_journal_path(folder, name), _memory_path(folder, name)):
            unlink(temporary(path))
            unlink(path)
        fsync_folder(folder)


# Names, folders and locks

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


def _lock(folder: Path, name: str, *, create: bool = False) -> Lock:
    """The memory's lock; create: makes a missing folder. UserError when another holds it."""
    try:
        with os_errors_as_user_errors(f"cannot lock memory '{name}' in {folder}", _CHECK_FOLDER):
            if create:
                make_folder(folder)
            return Lock(folder / f"{name}.lock")
    except InUse as error:
        raise UserError(
            f"memory '{name}' is in use by "
            f"{'process ' + error.holder if error.holder else 'another process'}; "
            "leave that chat first, or choose another memory name"
        ) from None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


# Loading and creating: the two files together


def _load(folder: Path, name: str) -> tuple[Stored, list[int]]:
    """What the memory's file holds, and the tokens that its journal adds to `pending`."""
    remedy = f"`mlx-sleep memory rm {name}` removes it; an export of it can then be imported"
    memory_path, journal_path = _memory_path(folder, name), _journal_path(folder, name)
    with os_errors_as_user_errors(f"cannot read memory '{name}' in {folder}", _CHECK_FOLDER):
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
    stored = decode_memory(raw, f"memory '{name}'", remedy)
    if journal is None:
        return stored, []
    try:
        continues, heard = parse_journal(journal)
    except Damaged as damage:
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
    raw, _ = encode_memory(replace(header, previous=""), arrays, pending)
    with os_errors_as_user_errors(f"cannot create memory '{name}' in {folder}", _CHECK_FOLDER):
        if _exists(folder, name):
            raise UserError(f"memory '{name}' exists already; choose another name")
        replace_file(_memory_path(folder, name), raw)
        fsync_folder(folder)


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
