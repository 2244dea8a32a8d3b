"""The SQLite database of one memory, NAME.sqlite: its schema, and connections to it.

Knows how it is opened safely, locked and committed. Knows nothing of what a session does with it.

WAL mode; every commit is synced before it returns (synchronous=FULL, and F_FULLFSYNC on macOS). A
writer holds SQLite's write lock from open to close: a transaction is always open. The lock goes
with the process. Readers need no lock and see the last commit.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from ..utils.atomic import chmod_private, unlink
from .format import Damaged
from .wal import wal_problem

APPLICATION_ID = int.from_bytes(
    b"slep", "big"
)  # `file` and SQLite's own tools tell by it whose this is
VERSION = 1
PAGE = 4096

# Every row has a seal, the digest of its values: SQLite itself notices no flipped bit in a value.
SCHEMA = (
    # One row. serial counts the commits; heard the tokens since the beginning, folded in or not.
    # holder is the process that has the memory open for writing, 0 after it was closed.
    "CREATE TABLE memory (id INTEGER PRIMARY KEY CHECK (id = 1), fingerprint TEXT NOT NULL, "
    "model TEXT NOT NULL, created TEXT NOT NULL, updated TEXT NOT NULL, parent TEXT NOT NULL, "
    "previous TEXT NOT NULL, serial INTEGER NOT NULL, heard INTEGER NOT NULL, "
    "messages INTEGER NOT NULL, settings INTEGER NOT NULL, holder INTEGER NOT NULL, "
    "seal BLOB NOT NULL)",
    # The state after a sleep, the last one and the one before; number 0 is before the first.
    # tokens counts those folded in since the beginning, arrays the rows of `arrays`.
    "CREATE TABLE sleeps (number INTEGER PRIMARY KEY, tokens INTEGER NOT NULL, "
    "passes INTEGER NOT NULL, eviction TEXT NOT NULL, window INTEGER NOT NULL, "
    "arrays INTEGER NOT NULL, seal BLOB NOT NULL)",
    "CREATE TABLE arrays (number INTEGER NOT NULL REFERENCES sleeps ON DELETE CASCADE, "
    "name TEXT NOT NULL, dtype TEXT NOT NULL, shape TEXT NOT NULL, data BLOB NOT NULL, "
    "seal BLOB NOT NULL, PRIMARY KEY (number, name))",
    # Token ids, little-endian uint32, from those that the older of the two sleeps left.
    "CREATE TABLE tokens (start INTEGER PRIMARY KEY, ids BLOB NOT NULL, seal BLOB NOT NULL)",
    # text is NULL where no transcript was kept. position counts the tokens heard before it.
    "CREATE TABLE messages (id INTEGER PRIMARY KEY, position INTEGER NOT NULL, role TEXT NOT NULL, "
    "text TEXT, said TEXT NOT NULL, seal BLOB NOT NULL)",
    "CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL, seal BLOB NOT NULL)",
)


class InUse(Exception):
    """Another process has the memory open. holder: its process id, 0 when it has not said."""

    def __init__(self, holder: int = 0):
        super().__init__(holder)
        self.holder = holder


class OtherFormat(Exception):
    """Which format a database has, and which one is read."""


def siblings(path: Path) -> tuple[Path, ...]:
    """All files of a database; -shm is an index of -wal, and holds nothing but the locks."""
    return tuple(path.with_name(path.name + end) for end in ("", "-shm", "-wal", "-journal"))


@contextlib.contextmanager
def sqlite_errors() -> Iterator[None]:
    """Damaged for a database that SQLite can't read, OSError for what the disk refuses."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        text = str(error)  # the codes come with Python 3.11
        if "disk is full" in text:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        if any(words in text for words in ("disk I/O", "unable to open", "readonly", "locked")):
            raise OSError(errno.EIO, text) from error
        raise Damaged(text) from error
    except UnicodeDecodeError as error:
        raise Damaged("text that is not UTF-8") from error


def is_half_made(path: Path) -> bool:
    """Whether a process died while it made a new one: only then SQLite uses a rollback journal,
    from which the next writer makes it empty again."""
    try:
        return siblings(path)[3].stat().st_size > 0
    except FileNotFoundError:
        return False


def check_files(path: Path) -> None:
    """What SQLite wouldn't mind. Damaged for a log that it would cut short or leave out in silence,
    OSError for a link, a pipe or a folder where a file should be."""
    for file in siblings(path):
        with contextlib.suppress(FileNotFoundError):
            info = os.lstat(file)
            if not stat.S_ISREG(info.st_mode):
                raise OSError(errno.EINVAL, f"{file.name} is not a regular file")
            if file == path and 0 < info.st_size < PAGE and not is_half_made(path):
                raise Damaged("truncated")  # SQLite takes it for an empty one
    log = siblings(path)[2]
    for attempt in range(3):  # a process that writes to it just now may look like damage
        try:
            raw = log.read_bytes()
        except FileNotFoundError:
            return
        if raw and not path.exists():
            raise Damaged(f"{log.name} has no {path.name} beside it")
        problem = wal_problem(raw)
        if problem is None:
            return
        time.sleep(0.005 * attempt)
    raise Damaged(problem)


def reader(path: Path) -> sqlite3.Connection:
    """A connection that can't write; what it reads is one snapshot. It leaves the files alone."""
    check_files(path)
    with sqlite_errors():
        db = _connect(path, "ro")
        try:
            db.execute("PRAGMA busy_timeout = 2000")
            db.execute("BEGIN")
            return db
        except BaseException:
            db.close()
            raise


def is_made(db: sqlite3.Connection) -> bool:
    """Whether it holds a memory: a process may have died while it made one.

    Damaged for a database with another schema, OtherFormat for one of another version.
    """
    found = db.execute("SELECT sql FROM sqlite_schema WHERE sql NOT NULL ORDER BY rowid").fetchall()
    (version,), (made_by,) = (
        db.execute(f"PRAGMA {name}").fetchone() for name in ("user_version", "application_id")
    )
    if not found and not version and not made_by:
        return False
    if made_by != APPLICATION_ID:
        raise Damaged("not made by mlx-sleep")
    if version != VERSION:
        raise OtherFormat(
            f"format {version}, this mlx-sleep reads format {VERSION}; "
            "use the mlx-sleep that wrote it"
        )
    if tuple(sql for (sql,) in found) != SCHEMA:
        raise Damaged("its tables are not those of a memory")
    (check,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if check != "ok":
        raise Damaged(check.splitlines()[-1])
    return True


class Writer:
    """The one connection that may write; makes the file when there is none, empty.

    Raises InUse, Damaged and OSError. A transaction is open whenever a method returns.
    """

    def __init__(self, path: Path):
        check_files(path)
        if not path.exists():
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                chmod_private(file)  # SQLite gives its other files the same mode
            finally:
                os.close(file)
        self._path = path
        self._files: list[tuple[int, int]] = []
        with sqlite_errors(), contextlib.ExitStack() as stack:
            self.db = _connect(path, "rw")
            stack.callback(self.db.close)
            # While a second connection is open, the first one puts no log away when it closes.
            self._second = _connect(path, "ro")
            stack.callback(self._second.close)
            self._lock()
            self._second.execute("SELECT count(*) FROM sqlite_schema")
            self._files = self._stat()
            stack.pop_all()

    def _lock(self) -> None:
        # The holder lets go of the lock for an instant after each commit: whoever finds it free,
        # and a holder written in the memory, looks again.
        with sqlite_errors():
            for _ in range(4):
                try:
                    self.db.execute("PRAGMA journal_mode = WAL")
                    self.db.execute("BEGIN IMMEDIATE")
                except sqlite3.OperationalError as error:
                    if "locked" in str(error) or "busy" in str(error):
                        raise InUse(_holder(self.db)) from None
                    raise
                if not _is_running(_holder(self.db)):
                    break
                self.db.execute("ROLLBACK")
                time.sleep(0.01)
            else:
                self.db.execute("BEGIN IMMEDIATE")
            self.db.execute("PRAGMA busy_timeout = 2000")

    def begin(self) -> None:
        """Takes the lock again if it isn't held: `commit` lets go of it."""
        with sqlite_errors():
            if not self.db.in_transaction:
                self.db.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        """Commits the open transaction, synced. Call `rollback` when this raises OSError."""
        if self._stat() != self._files:
            raise OSError(errno.ENOENT, f"{self._path.name} was moved or deleted while in use")
        with sqlite_errors():
            self.db.execute("COMMIT")

    def rollback(self) -> None:
        """Drops what was not committed, and keeps the lock. Raises nothing: `begin` will."""
        with contextlib.suppress(sqlite3.Error):
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            self.db.execute("BEGIN IMMEDIATE")

    def checkpoint(self) -> None:
        """Moves the log into the database. Its failure loses nothing: the log stays."""
        with contextlib.suppress(sqlite3.Error):
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.rollback()

    def _stat(self) -> list[tuple[int, int]]:
        """Which files the names stand for now: the database, the index with its lock, the log."""
        found = []
        for file in siblings(self._path)[:3]:
            try:
                info = os.stat(file)
                found.append((info.st_dev, info.st_ino))
            except FileNotFoundError:
                found.append((0, 0))
        return found

    def close(self) -> None:
        """Gives the lock back, and puts the log into the database, where the lock is still ours:
        when its file was deleted, another process may have a lock of its own."""
        ours = self._stat()[:2] == self._files[:2]
        for db in (self._second, self.db) if ours else (self.db, self._second):
            db.close()


def _is_running(process: int) -> bool:
    if process <= 0:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _holder(db: sqlite3.Connection) -> int:
    with contextlib.suppress(sqlite3.Error):
        row = db.execute("SELECT holder FROM memory").fetchone()
        return row[0] if row and isinstance(row[0], int) else 0
    return 0


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    db = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        timeout=0,
        isolation_level=None,
        check_same_thread=False,  # one thread at a time, not always the same
    )
    try:
        for pragma in (
            f"page_size = {PAGE}",  # of a new one
            "trusted_schema = OFF",
            "cell_size_check = ON",
            "foreign_keys = ON",
            "secure_delete = ON",  # what is forgotten is gone from the file
            "temp_store = MEMORY",
            "mmap_size = 0",  # a file cut short would end the process
            "synchronous = FULL",
            "fullfsync = ON",
            "checkpoint_fullfsync = ON",
            "wal_autocheckpoint = 0",  # `checkpoint` does it, after a sleep
        ):
            db.execute(f"PRAGMA {pragma}")
        if hasattr(db, "setconfig"):  # Python 3.12
            db.setconfig(getattr(sqlite3, "SQLITE_DBCONFIG_DEFENSIVE"), True)  # noqa: B009
        return db
    except BaseException:
        db.close()
        raise


def remove_database(path: Path) -> None:
    """Deletes all files. Last the one that makes it a memory."""
    for file in reversed(siblings(path)):
        unlink(file)
