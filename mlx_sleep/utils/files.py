"""Reading files, with errors that a user can act on. atomic.py writes them."""

from __future__ import annotations

import contextlib
import errno
import json
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
