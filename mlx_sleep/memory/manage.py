"""Memories from outside, by name: list, show, copy, export, import, remove."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from ..utils.atomic import fsync_path, replace_file, temporary, unlink
from ..utils.errors import UserError
from ..utils.files import os_errors_as_user_errors
from .format import Header, decode_memory, encode_memory
from .location import CHECK_FOLDER, NAME, Location, memories_folder, now

Home = str | os.PathLike | None


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


def list_memories(home: Home = None) -> list[Listing]:
    """Every memory in the data folder, by name, damaged ones too. Takes no lock."""
    folder = memories_folder(home)
    with os_errors_as_user_errors(f"cannot read {folder}", CHECK_FOLDER):
        try:
            files = [f for f in folder.iterdir() if f.suffix in (".safetensors", ".journal")]
        except FileNotFoundError:
            return []
    names = sorted({f.stem for f in files if NAME.fullmatch(f.stem)})
    return [_listing(Location(folder, name)) for name in names]


def show_memory(name: str, home: Home = None) -> Listing:
    """One memory as list_memories shows it. Raises UserError when there is none."""
    return _listing(Location.existing(name, home))


def _listing(location: Location) -> Listing:
    header, pending, problem = None, 0, None
    try:
        stored, heard = location.load()
        header, pending = stored.header, len(stored.pending) + len(heard)
    except UserError as error:
        problem = str(error)
    size = 0
    for path in location.files:
        with contextlib.suppress(OSError):
            size += path.stat().st_size
    return Listing(location.name, header, pending, size, problem)


def fork(source: str, target: str, home: Home = None) -> None:
    """Copies a memory, pending tokens included, to a new name. Raises UserError when that exists,
    or when either is in use."""
    old, new = Location.of(source, home), Location.of(target, home)
    old.require()
    if source == target:
        raise UserError(f"memory '{target}' exists already; choose another name for the fork")
    with old.lock(), new.lock():
        stored, heard = old.load()
        header = replace(stored.header, created=now(), parent=source)
        new.create(header, stored.arrays, stored.pending + heard)


def export_memory(name: str, path: str | os.PathLike, home: Home = None) -> None:
    """Writes a memory, pending tokens included, to one safetensors file. Raises UserError when
    that exists or cannot be written, or when the memory is in use."""
    location = Location.existing(name, home)
    path = Path(path).expanduser()
    with location.lock():
        stored, heard = location.load()
        raw, _ = encode_memory(
            replace(stored.header, previous=""), stored.arrays, stored.pending + heard
        )
        with os_errors_as_user_errors(
            f"cannot export to {path}", "choose a file in a folder that you can write"
        ):
            if os.path.lexists(path):
                raise UserError(f"{path} exists already; choose another file to export to")
            replace_file(path, raw)
            fsync_path(path.parent)


def import_memory(path: str | os.PathLike, name: str, home: Home = None) -> None:
    """Makes the memory `name` from an exported file. Raises UserError when the name exists or the
    file is missing, damaged or not a memory."""
    location = Location.of(name, home)
    path = Path(path).expanduser()
    with os_errors_as_user_errors(f"cannot import {path}", "check the path"):
        raw = path.read_bytes()
    stored = decode_memory(raw, str(path), "export it again")
    with location.lock(make_folder=True):
        location.create(stored.header, stored.arrays, stored.pending)


def remove(name: str, home: Home = None) -> None:
    """Deletes a memory, damaged or not. Raises UserError when there is none or it is in use."""
    location = Location.existing(name, home)
    doing = f"cannot remove memory '{name}' in {location.folder}"
    with location.lock(), os_errors_as_user_errors(doing, CHECK_FOLDER):
        # Last the file that makes it a memory: a crash on the way leaves one that still opens.
        for path in (location.journal, location.memory):
            unlink(temporary(path))
            unlink(path)
        fsync_path(location.folder)
