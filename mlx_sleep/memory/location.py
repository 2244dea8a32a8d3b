"""Where a memory is, by its name; reading it whole, and making one. Errors are UserErrors here."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import platformdirs

from ..utils import atomic
from ..utils.errors import UserError
from ..utils.files import os_errors_as_user_errors
from . import rows
from .database import (
    InUse,
    OtherFormat,
    Writer,
    is_half_made,
    is_made,
    reader,
    siblings,
    sqlite_errors,
)
from .format import Contents, Damaged
from .format_1 import OldFiles

CHECK_FOLDER = "check that folder, or set MLX_SLEEP_HOME to one you can write"

ROOM = 64 * 1024
"""Bytes that SQLite may need for a database of any size to be opened: twice its shared memory."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def data_dir(home: str | os.PathLike | None = None) -> Path:
    """The folder that holds `memories/`: home, else $MLX_SLEEP_HOME, else the platform's own."""
    chosen = home or os.environ.get("MLX_SLEEP_HOME")
    if chosen:
        return Path(chosen).expanduser()
    return platformdirs.user_data_path("mlx-sleep", appauthor=False)


def memories_folder(home: str | os.PathLike | None = None) -> Path:
    return data_dir(home) / "memories"


def now() -> str:
    """ISO 8601 in UTC, as a header has it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Location:
    """The files of the memory `name` in `folder`, whether they exist or not."""

    folder: Path
    name: str

    @classmethod
    def of(cls, name: str, home: str | os.PathLike | None = None) -> Location:
        """UserError for a name that cannot be a memory's."""
        if not NAME.fullmatch(name):
            raise UserError(
                f"{name!r} cannot name a memory; use 1 to 64 letters, digits, dots, dashes and "
                "underscores, beginning with a letter or digit"
            )
        return cls(memories_folder(home), name)

    @classmethod
    def existing(cls, name: str, home: str | os.PathLike | None = None) -> Location:
        """As `of`; UserError too when there is no such memory."""
        location = cls.of(name, home)
        location.require()
        return location

    @property
    def database(self) -> Path:
        return self.folder / f"{self.name}.sqlite"

    @property
    def old(self) -> OldFiles:
        return OldFiles(self.folder, self.name)

    @property
    def files(self) -> tuple[Path, ...]:
        return (*siblings(self.database), *self.old.files)

    @property
    def exists(self) -> bool:
        """Whether there is such a memory; a damaged one counts, a new one must not bury it."""
        try:
            return self.peek() is not None
        except UserError:
            return True

    def require(self) -> None:
        """UserError when there is no such memory."""
        if not self.exists:
            raise self._missing()

    def _missing(self) -> UserError:
        return UserError(
            f"there is no memory '{self.name}' in {self.folder}; "
            "`mlx-sleep memory list` shows the existing ones"
        )

    @contextlib.contextmanager
    def errors(self, doing: str) -> Iterator[None]:
        """Turns what a database and a disk can raise into a UserError that says what to do."""
        try:
            where = f"cannot {doing} memory '{self.name}' in {self.folder}"
            with os_errors_as_user_errors(where, CHECK_FOLDER), self._full_disk():
                yield
        except InUse as error:
            raise UserError(
                f"memory '{self.name}' is in use by "
                f"{f'process {error.holder}' if error.holder else 'another process'}; "
                "leave that chat first, or choose another memory name"
            ) from None
        except OtherFormat as error:
            raise UserError(f"memory '{self.name}' has {error}") from None
        except Damaged as damage:
            raise UserError(
                f"memory '{self.name}' is damaged or not a memory ({damage}); `mlx-sleep memory rm "
                f"{self.name}` removes it; an export of it can be imported"
            ) from None

    @contextlib.contextmanager
    def _full_disk(self) -> Iterator[None]:
        """SQLite says "disk I/O error" where a full disk has no room for the files beside the
        database, which reading needs too."""
        try:
            yield
        except OSError as error:
            if error.errno == errno.EIO and shutil.disk_usage(self.folder).free < ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise

    def load(self) -> Contents:
        """What it holds. No lock is needed, and nothing is written."""
        found = self.peek()
        if found is None:
            raise self._missing()
        return found[0]

    def peek(self) -> tuple[Contents, int] | None:
        """What it holds, and the number of its commits (0: it has the files of an earlier version).
        None when there is no such memory."""
        with self.errors("read"):
            files = siblings(self.database)
            if any(map(os.path.lexists, files)) and not is_half_made(self.database):
                with contextlib.closing(reader(self.database)) as db, sqlite_errors():
                    if is_made(db):
                        return rows.read(db), rows.serial(db)
            return (self.old.read(), 0) if self.old.exist else None

    def create(self, contents: Contents) -> None:
        """Makes a memory. UserError when there is one."""
        with self.errors("create"):
            atomic.make_folder(self.folder)
            taken = f"memory '{self.name}' exists already; choose another name"
            if self.exists:
                raise UserError(taken)
            writer = Writer(self.database)
            try:
                with sqlite_errors():
                    if is_made(writer.db):
                        raise UserError(taken)
                    rows.create(writer.db, contents)
                writer.commit()
            except BaseException:
                writer.rollback()
                raise
            finally:
                writer.close()
