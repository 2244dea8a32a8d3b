"""Reading files, with errors that a user can act on. atomic.py writes them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from . import limits
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


def expanded(path: str | os.PathLike) -> Path:
    """A path with ~ and ~user written out. UserError where there is no such user, and for what no
    file can be called."""
    try:
        found = Path(path).expanduser()
        found.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{str(path)!r:.200} is no path here: {one_line(error)}") from error
    return found


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turns an OSError into a UserError about the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {file}: {one_line(error)}") from error


def read_bytes(file: Path, most: int) -> bytes:
    """The contents of a file of at most so many bytes. UserError for a longer one, and for what is
    no file: a pipe would wait for a writer."""
    with reading(file):
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as opened:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                raise UserError(f"{file} is no ordinary file")
            limits.check(f"the size of {file}", about.st_size, most)
            return opened.read()


def check_zip(file: Path) -> None:
    """ValueError for a zip archive with a record that isn't what was written, by its CRC-32.

    PyTorch's files are such archives, and PyTorch doesn't look.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(one_line(error)) from error
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} is another")


def read_json(file: Path) -> dict:
    """The JSON object in a file. UserError when it holds anything else."""
    text = read_bytes(file, limits.JSON_BYTES)
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
