"""Memories from outside, by name: list, show, copy, export, import, remove."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from dataclasses import dataclass, replace

from ..utils.atomic import fsync_path, replace_file
from ..utils.errors import UserError
from ..utils.files import expanded, os_errors_as_user_errors
from .database import Writer, remove_database
from .format import Damaged, Header, Message, decode_memory, encode_memory
from .location import CHECK_FOLDER, NAME, Location, memories_folder, now

Home = str | os.PathLike | None


@dataclass(frozen=True)
class Listing:
    """A memory as seen from outside, without its model and without its lock.

    pending counts the tokens that wait for the next sleep, messages what was said, bytes all its
    files. A memory that cannot be read has a `problem` (one line) and no header.
    """

    name: str
    header: Header | None
    pending: int
    messages: int
    bytes: int
    problem: str | None = None


def list_memories(home: Home = None) -> list[Listing]:
    """Every memory in the data folder, by name, damaged ones too. Takes no lock."""
    folder = memories_folder(home)
    with os_errors_as_user_errors(f"cannot read {folder}", CHECK_FOLDER):
        try:
            suffixes = (".sqlite", ".safetensors", ".journal")
            files = [f for f in folder.iterdir() if f.suffix in suffixes]
        except FileNotFoundError:
            return []
    names = sorted({f.stem for f in files if NAME.fullmatch(f.stem)})
    locations = (Location(folder, name) for name in names)
    return [_listing(location) for location in locations if location.exists]


def show_memory(name: str, home: Home = None) -> Listing:
    """One memory as list_memories shows it. Raises UserError when there is none."""
    return _listing(Location.existing(name, home))


def transcript(name: str, home: Home = None) -> tuple[Message, ...]:
    """What was said in a memory, oldest first. Raises UserError when there is none."""
    return Location.of(name, home).load().messages


def search(name: str, text: str, home: Home = None) -> list[Message]:
    """What was said in a memory with all these words (or their beginnings), the best match first.

    The index is made when it is asked for, so that no build of SQLite needs FTS5 to open a memory
    and nothing forgotten stays in one; without FTS5 the words are looked for one by one.
    """
    messages = [m for m in transcript(name, home) if m.text]
    words = re.findall(r"\w+", text)
    if not words:
        return []
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        try:
            db.execute("CREATE VIRTUAL TABLE said USING fts5 (text)")
        except sqlite3.DatabaseError:
            lower = [word.casefold() for word in words]
            return [m for m in messages if all(w in str(m.text).casefold() for w in lower)]
        db.executemany(
            "INSERT INTO said (rowid, text) VALUES (?, ?)", enumerate(m.text for m in messages)
        )
        query = " ".join(f'"{word}"*' for word in words)
        found = db.execute("SELECT rowid FROM said WHERE said MATCH ? ORDER BY rank", (query,))
        return [messages[row] for (row,) in found]


def _listing(location: Location) -> Listing:
    header, pending, said, problem = None, 0, 0, None
    try:
        contents = location.load()
        header, pending = contents.header, len(contents.pending)
        said = len(contents.messages)
    except UserError as error:
        problem = str(error)
    size = 0
    for path in location.files:
        with contextlib.suppress(OSError):
            size += path.stat().st_size
    return Listing(location.name, header, pending, said, size, problem)


def fork(source: str, target: str, home: Home = None) -> None:
    """Copies a memory, pending tokens and transcript included, to a new name. Raises UserError
    when that exists. Of a memory in use, what was last synced is copied."""
    old, new = Location.of(source, home), Location.of(target, home)
    contents = old.load()
    header = replace(contents.header, created=now(), parent=source, previous="")
    new.create(replace(contents, header=header))


def export_memory(name: str, path: str | os.PathLike, home: Home = None) -> None:
    """Writes a memory, pending tokens and transcript included, to one safetensors file. Raises
    UserError when that exists or cannot be written."""
    contents = Location.of(name, home).load()
    path = expanded(path)
    raw = encode_memory(replace(contents, header=replace(contents.header, previous="")))
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
    path = expanded(path)
    with os_errors_as_user_errors(f"cannot import {path}", "check the path"):
        raw = path.read_bytes()
    location.create(decode_memory(raw, str(path), "export it again"))


def remove(name: str, home: Home = None) -> None:
    """Deletes a memory, damaged or not. Raises UserError when there is none or it is in use."""
    location = Location.existing(name, home)
    with location.errors("remove"), location.old.locked():
        writer = None
        try:
            writer = Writer(location.database)
        except (Damaged, OSError):
            pass  # nobody can have it open
        try:
            location.old.remove()
            remove_database(location.database)
            fsync_path(location.folder)
        finally:
            if writer:
                writer.close()
