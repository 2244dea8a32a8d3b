"""Files and folders that survive a crash: whole or not at all, and on the disk itself.

The one place that syncs, for memories, model folders and training. Files made here can be read by
their owner alone. Everything raises OSError.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path


def make_folder(folder: Path) -> None:
    """Makes the folder and its parents, each durably."""
    for path in (*reversed(folder.parents), folder):
        with contextlib.suppress(FileExistsError):
            if not path.is_dir():
                os.mkdir(path, 0o700)
                os.chmod(path, 0o700)  # an odd umask may have taken the owner's bits
                fsync_path(path.parent)
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
    """os.write, until nothing is left."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def fsync(file: int) -> None:
    """Returns when the file's contents are on the disk itself."""
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync alone stops at the drive's cache
        try:
            fcntl.fcntl(file, fcntl.F_FULLFSYNC)
            return
        except OSError:
            pass  # a network folder has only fsync
    os.fsync(file)


def fsync_path(path: Path) -> None:
    """`fsync` of a file or a folder by its path: of a folder, the names in it."""
    file = os.open(path, os.O_RDONLY)
    try:
        fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot
            raise
    finally:
        os.close(file)
