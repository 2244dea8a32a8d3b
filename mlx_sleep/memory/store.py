"""An open memory: what a sleeping model keeps between processes.

Knows which file is written when, and what a crash leaves. Knows nothing of models, tokenizers or
chat: a memory is a dict of named arrays, a header of counters and provenance, and the ids of the
tokens that no sleep has folded in yet. One process writes to a memory, one thread at a time.

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
from collections.abc import Iterable
from dataclasses import replace

from ..utils.atomic import fsync_path, replace_file, temporary, unlink
from ..utils.errors import UserError
from ..utils.files import os_errors_as_user_errors
from .format import Arrays, Header, encode_memory, stored_sha256
from .journal import Journal, journal_record
from .location import CHECK_FOLDER, Location, now
from .lock import Lock


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
    ) -> Memory:
        """Opens the memory `name`, or makes it when there is none.

        fingerprint: of the model that will use it. model: its name or path, kept as provenance
        of a new memory. Raises UserError when the memory is in use, another model's, of another
        format version, or damaged; its files are then left as they are.
        """
        location = Location.of(name, home)
        lock = location.lock(make_folder=True)
        try:
            for path in location.files:
                with contextlib.suppress(OSError):
                    unlink(temporary(path))  # of a process that was killed
            if not location.exists:
                location.create(
                    Header(fingerprint, model=model, created=now(), updated=now()), {}, []
                )
            return cls(location, fingerprint, lock)
        except BaseException:
            lock.release()
            raise

    def __init__(self, location: Location, fingerprint: str, lock: Lock):
        self.name = location.name
        self._location = location
        self._lock: Lock | None = lock
        self._journal: Journal | None = None  # not started since open or commit
        self._unsynced = False
        stored, heard = location.load()
        self._adopt(stored.header, stored.arrays, stored.pending, stored.sha256)
        self.pending += heard
        if self.header.fingerprint != fingerprint:
            raise UserError(
                f"memory '{self.name}' was made by another model "
                f"({self.header.model or 'unnamed'}, fingerprint {self.header.fingerprint[:12]}; "
                f"this one's is {fingerprint[:12]}); load that model, or choose another memory name"
            )

    @property
    def closed(self) -> bool:
        """Whether `close` was called: the lock is gone, and nothing can be written."""
        return self._lock is None

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
        with self._os_errors():
            journal = self._journal or self._start_journal()
            try:
                journal.append(record)
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
        with self._os_errors():
            if self._journal is None:
                self._start_journal()
            else:
                try:
                    self._journal.sync()
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
            updated=now(),
            previous=self._sha256,
        )
        self._replace(header, arrays, self.pending[tokens:])

    def forget(self) -> None:
        """Erases arrays, counters and pending tokens; the memory stays open, as if new."""
        header = Header(
            self.header.fingerprint,
            model=self.header.model,
            created=now(),
            updated=now(),
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
        with self._os_errors():
            if self._journal is None:
                # The journal on disk must never be two files old: it would be refused.
                self._start_journal()
            try:
                replace_file(self._location.memory, raw)
            finally:
                # Ctrl-C may strike right after the rename: what lies on the disk decides.
                if stored_sha256(self._location.memory) == sha256:
                    self._adopt(header, arrays, pending, sha256)
                    self._drop_journal()
                    self._unsynced = True
        # The sleep is committed, so a failure from here on is not its failure: the next append or
        # sync tries again and reports it.
        with contextlib.suppress(OSError):
            fsync_path(self._location.folder)
            self._start_journal()
            self._unsynced = False

    def _adopt(self, header: Header, arrays: Arrays, pending: list[int], sha256: str) -> None:
        self.header = header
        self.arrays = dict(arrays)
        self.pending = list(pending)
        self._stored = len(pending)  # how many of them NAME.safetensors holds
        self._sha256 = sha256

    def _start_journal(self) -> Journal:
        """Puts a journal in place that continues the file on disk and holds what it does not."""
        heard = self.pending[self._stored :]
        self._journal = Journal(self._location.journal, self._sha256, heard)
        return self._journal

    def _drop_journal(self) -> None:
        if self._journal is not None:
            journal, self._journal = self._journal, None
            journal.close()

    def _os_errors(self) -> contextlib.AbstractContextManager[None]:
        doing = f"cannot write memory '{self.name}' in {self._location.folder}"
        return os_errors_as_user_errors(doing, CHECK_FOLDER)

    def _require_open(self) -> None:
        if self._lock is None:
            raise ValueError(f"memory '{self.name}' is closed")
