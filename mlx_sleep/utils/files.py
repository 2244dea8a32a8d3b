"""Files that survive crashes: atomic replacement, fsync.

What is made here, its owner alone can read. What cannot be read is said in one line.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError


@contextlib.contextmanager
def os_errors_as_user_errors(doing: str, elsewhere: str) -> Iterator[None]:
    """Turns an OSError into a UserError that says what to do next: `elsewhere`, or make room."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space there and try again" if full else elsewhere
        raise UserError(f"{doing}: {error.strerror or error}; {remedy}") from error


def make_folder(folder: Path) -> None:
    """Makes the folder and its parents, each durably."""
    for path in (*reversed(folder.parents), folder):
        with contextlib.suppress(FileExistsError):
            if not path.is_dir():
                os.mkdir(path, 0o700)
                os.chmod(path, 0o700)  # an odd umask may have taken the owner's bits
                fsync_folder(path.parent)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def temporary(path: Path) -> Path:
    """Where replace_file prepares the new contents of path."""
    return path.with_name(path.name + ".tmp")


def replace_file(path: Path, data: bytes | bytearray) -> None:
    """Replaces path by data, or leaves it as it was. The caller syncs the folder."""
    new = temporary(path)
    unlink(new)
    file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        try:
            chmod_private(file)
            write_all(file, data)
            fsync(file)
        finally:
            os.close(file)
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unlink(new)
        raise


def unlink(path: Path) -> None:
    """Deletes a file that may be gone already."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def chmod_private(file: int) -> None:
    """Makes a file its owner's alone, where the file system has modes."""
    # An odd umask may have taken the owner's bits; a USB stick may have no modes at all.
    with contextlib.suppress(PermissionError):
        os.fchmod(file, 0o600)


def write_all(file: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def fsync(file: int) -> None:
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync alone stops at the drive's cache
        try:
            fcntl.fcntl(file, fcntl.F_FULLFSYNC)
            return
        except OSError:
            pass  # a network folder has only fsync
    os.fsync(file)


def fsync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot
            raise
    finally:
        os.close(file)


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turns an OSError into a UserError about the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {file}: {one_line(error)}") from error


def read_json(file: Path) -> dict:
    """The JSON object in a file. UserError when it holds anything else."""
    with reading(file):
        text = file.read_bytes()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} must hold one JSON object")
    return value


def one_line(error: BaseException) -> str:
    """An exception's message on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
