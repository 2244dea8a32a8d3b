"""A lock on a file that goes with its process."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from .atomic import chmod_private


class InUse(Exception):
    """Another process holds the lock. holder: its process id, "" when it has not said."""

    def __init__(self, holder: str):
        super().__init__(holder)
        self.holder = holder


class Lock:
    """An exclusive flock on a file with this process's id in it. Gone with the process.

    Raises InUse when it is held, OSError when the file cannot be made.
    """

    def __init__(self, path: Path):
        self._path = path
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
                raise InUse(holder) from None
            except BaseException:
                os.close(self._file)
                raise
            os.close(self._file)
        # For the message of InUse only; a full disk must not keep anyone from a lock.
        with contextlib.suppress(OSError):
            chmod_private(self._file)
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        try:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
        finally:
            os.close(self._file)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
