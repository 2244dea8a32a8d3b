"""What a memory holds, as rows of its database: written with a seal each, checked when read."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import struct
from typing import Any, NamedTuple

from ..utils.safetensors import DTYPES
from .database import APPLICATION_ID, SCHEMA, VERSION
from .format import Arrays, Contents, Damaged, Header, Message, array_bytes, array_from


def seal(*values: Any) -> bytes:
    """A digest of a row's values: their types, lengths and bytes."""
    digest = hashlib.sha256()
    for value in values:
        raw = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
        digest.update(f"{type(value).__name__} {len(raw)} ".encode())
        digest.update(raw)
    return digest.digest()


def _check(row: tuple, table: str) -> tuple:
    """The row without its seal, which is its last value."""
    *values, sealed = row
    if seal(*values) != sealed:
        raise Damaged(f"checksum mismatch in its {table}")
    return tuple(values)


# Reading


def read(db: sqlite3.Connection) -> Contents:
    """All of it. Damaged for a row that was changed or lost."""
    try:
        return _read(db)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, Damaged):
            raise
        raise Damaged("it lacks what every memory has") from error


def _read(db: sqlite3.Connection) -> Contents:
    row = db.execute(
        "SELECT fingerprint, model, created, updated, parent, previous, serial, heard, messages, "
        "settings, seal FROM memory"
    ).fetchone()
    if row is None:
        raise Damaged("it lacks what every memory has")
    *words, _, heard, said, set_ = _check(row, "head")
    sleep = _last_sleep(db)
    header = Header(
        fingerprint=words[0],
        model=words[1],
        passes=sleep.passes,
        eviction=sleep.eviction,
        window=sleep.window,
        tokens=sleep.tokens,
        sleeps=sleep.number,
        created=words[2],
        updated=words[3],
        parent=words[4],
        previous=words[5],
    )
    arrays = read_arrays(db, sleep.number)
    messages = read_messages(db)
    settings = dict(
        _check(row, "settings") for row in db.execute("SELECT key, value, seal FROM settings")
    )
    pending = read_tokens(db, sleep.tokens)
    if sleep.tokens + len(pending) != heard:
        raise Damaged("it lacks tokens that it has heard")
    if (len(messages), len(settings)) != (said, set_):
        raise Damaged("rows are missing")
    return Contents(header, arrays, pending, tuple(messages), settings)


class Sleep(NamedTuple):
    """A row of `sleeps`."""

    number: int
    tokens: int
    passes: int
    eviction: str
    window: int
    arrays: int


def _last_sleep(db: sqlite3.Connection) -> Sleep:
    sleeps = [_check(row, "sleeps") for row in db.execute("SELECT * FROM sleeps ORDER BY number")]
    if not sleeps:
        raise Damaged("it lacks what every memory has")
    return Sleep(*sleeps[-1])


def serial(db: sqlite3.Connection) -> int:
    """How many commits made it what it is."""
    row = db.execute("SELECT serial FROM memory").fetchone()
    return row[0] if row else 0


def read_sleep(db: sqlite3.Connection, number: int) -> Sleep | None:
    """The sleep of this number, or None when its state isn't kept."""
    row = db.execute("SELECT * FROM sleeps WHERE number = ?", (number,)).fetchone()
    return Sleep(*_check(row, "sleeps")) if row else None


def read_arrays(db: sqlite3.Connection, number: int) -> Arrays:
    """The state after a sleep."""
    arrays = {}
    for row in db.execute("SELECT * FROM arrays WHERE number = ?", (number,)):
        _, name, dtype, shape, data = _check(row, "arrays")
        if not isinstance(name, str):
            raise Damaged("an array without a name")
        arrays[name] = array_from(dtype, json.loads(shape), data)
    sleep = read_sleep(db, number)
    if sleep is None or len(arrays) != sleep.arrays:
        raise Damaged("arrays are missing")
    return arrays


def read_tokens(db: sqlite3.Connection, start: int) -> list[int]:
    """Ids of the tokens heard from the one numbered `start` on."""
    ids: list[int] = []
    rows = db.execute(
        "SELECT * FROM tokens WHERE start + length(ids) / 4 > ? ORDER BY start", (start,)
    )
    for row in rows:
        first, raw = _check(row, "tokens")
        if first != start + len(ids) and (ids or first > start):
            raise Damaged("it lacks tokens that it has heard")
        ids += struct.unpack(f"<{len(raw) // 4}I", raw)[max(0, start - first) :]
    return ids


def read_messages(db: sqlite3.Connection) -> list[Message]:
    """What was said, oldest first."""
    messages: list[Message] = []
    for row in db.execute("SELECT * FROM messages ORDER BY id"):
        number, position, role, text, said = _check(row, "messages")
        if number != len(messages) + 1:
            raise Damaged("messages are missing")
        messages.append(Message(role, text, position, said))
    return messages


# Writing. The caller commits.


def create(db: sqlite3.Connection, contents: Contents) -> None:
    """Makes the tables, and a memory with these contents."""
    for statement in SCHEMA:
        db.execute(statement)
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {VERSION}")
    write(db, contents)


def write(db: sqlite3.Connection, contents: Contents) -> None:
    """Puts these contents in place of all that the memory held."""
    header = contents.header
    for table in ("arrays", "sleeps", "tokens", "messages", "settings"):
        db.execute(f"DELETE FROM {table}")
    add_sleep(db, header, contents.arrays)
    add_tokens(db, header.tokens, contents.pending)
    for number, message in enumerate(contents.messages, 1):
        add_message(db, number, message)
    for key, value in contents.settings.items():
        put_setting(db, key, value)
    put_head(db, header, header.tokens + len(contents.pending))


def put_head(db: sqlite3.Connection, header: Header, heard: int) -> None:
    """The row of `memory`, with what the other tables hold now."""
    (messages,) = db.execute("SELECT count(*) FROM messages").fetchone()
    (settings,) = db.execute("SELECT count(*) FROM settings").fetchone()
    before, holder = db.execute("SELECT serial, holder FROM memory").fetchone() or (0, 0)
    values = (
        header.fingerprint,
        header.model,
        header.created,
        header.updated,
        header.parent,
        header.previous,
        before + 1,
        heard,
        messages,
        settings,
    )
    db.execute("DELETE FROM memory")
    db.execute(
        "INSERT INTO memory VALUES (1, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*values, holder, seal(*values)),
    )


def add_sleep(db: sqlite3.Connection, header: Header, arrays: Arrays) -> None:
    """The state after the last of header.sleeps sleeps."""
    values = (
        header.sleeps,
        header.tokens,
        header.passes,
        header.eviction,
        header.window,
        len(arrays),
    )
    db.execute("INSERT INTO sleeps VALUES (?, ?, ?, ?, ?, ?, ?)", (*values, seal(*values)))
    for name, array in arrays.items():
        row = (
            header.sleeps,
            name,
            DTYPES[array.dtype],
            json.dumps(array.shape),
            array_bytes(array),
        )
        db.execute("INSERT INTO arrays VALUES (?, ?, ?, ?, ?, ?)", (*row, seal(*row)))


def drop_older(db: sqlite3.Connection, number: int) -> None:
    """Drops the states before this sleep's, and the tokens that went into them."""
    db.execute("DELETE FROM sleeps WHERE number < ?", (number,))
    db.execute(
        "DELETE FROM tokens WHERE start + length(ids) / 4 <= (SELECT min(tokens) FROM sleeps)"
    )


def drop_later(db: sqlite3.Connection, number: int) -> None:
    """Drops the states after this sleep's."""
    db.execute("DELETE FROM sleeps WHERE number > ?", (number,))


def add_tokens(db: sqlite3.Connection, start: int, ids: list[int]) -> None:
    """ids: ValueError when they are not token ids (0 <= id < 2**32)."""
    if ids:
        row = (start, token_bytes(ids))
        db.execute("INSERT OR REPLACE INTO tokens VALUES (?, ?, ?)", (*row, seal(*row)))


def token_bytes(ids: list[int]) -> bytes:
    try:
        return struct.pack(f"<{len(ids)}I", *ids)
    except struct.error as error:
        raise ValueError(f"not a list of token ids: {error}") from None


def add_message(db: sqlite3.Connection, number: int, message: Message) -> None:
    row = (number, message.position, message.role, message.text, message.said)
    db.execute("INSERT OR REPLACE INTO messages VALUES (?, ?, ?, ?, ?, ?)", (*row, seal(*row)))


def put_setting(db: sqlite3.Connection, key: str, value: str | None) -> None:
    """None removes it."""
    db.execute("DELETE FROM settings WHERE key = ?", (key,))
    if value is not None:
        db.execute("INSERT INTO settings VALUES (?, ?, ?)", (key, value, seal(key, value)))


def cut(db: sqlite3.Connection, position: int, messages: int) -> None:
    """Drops the tokens from this position on, and all but the first `messages` messages."""
    rows = db.execute("SELECT * FROM tokens WHERE start + length(ids) / 4 > ?", (position,))
    for start, ids, _ in rows.fetchall():
        db.execute("DELETE FROM tokens WHERE start = ?", (start,))
        kept = struct.unpack(f"<{len(ids) // 4}I", ids)[: max(0, position - start)]
        add_tokens(db, start, list(kept))
    db.execute("DELETE FROM messages WHERE id > ?", (messages,))
