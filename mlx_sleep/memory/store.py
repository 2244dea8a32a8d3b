"""An open memory: what a sleeping model keeps between processes.

Knows what is written when, and what a crash leaves. Knows nothing of models, tokenizers or chat: a
memory is a dict of named arrays, a header of counters and provenance, the ids of the tokens that no
sleep has folded in yet, and what was said as text. One process has a memory open, one thread at a
time writes to it.

It is one SQLite database, <home>/memories/NAME.sqlite (database.py). What is appended is in this
object until `sync`, which is called twice a turn; each sync, sleep and change is one transaction.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal

from ..utils import atomic
from ..utils.errors import UserError
from . import rows
from .database import Writer, is_made, sqlite_errors
from .format import Arrays, Contents, Damaged, Header, Message, check_arrays
from .location import Location, now


class Memory:
    """An open memory, locked against every other process. Use as a context manager.

    arrays: dict of mx.array, as of the last sleep; empty before the first.
    header: Header.
    pending: list of token ids appended and not yet folded in, oldest first.
    messages: list of Message, what was said, oldest first.
    settings: dict of str, such as a system prompt.
    All are for reading; the methods change them together with the database.

    Every method that writes raises UserError when the disk is full, read-only or gone. The database
    then holds what it held before, and so does this object.
    """

    header: Header
    arrays: Arrays
    pending: list[int]
    messages: list[Message]
    settings: dict[str, str]
    _stored: tuple[int, int]  # tokens heard and messages, of which the database knows

    @classmethod
    def open(
        cls,
        name: str,
        fingerprint: str,
        *,
        model: str = "",
        home: str | os.PathLike | None = None,
        any_model: bool = False,
    ) -> Memory:
        """Opens the memory `name`, or makes it when there is none.

        fingerprint: of the model that will use it. model: its name or path, kept as provenance
        of a new memory. any_model: another model's memory will do (to `replace` it). Raises
        UserError when the memory is in use, another model's, of another format version, or
        damaged; its files are then left as they are.
        """
        location = Location.of(name, home)
        new = Header(fingerprint, model=model, created=now(), updated=now())
        # All refusals come before anything is written.
        contents, serial = location.peek() or (Contents(new, {}, []), 0)
        return cls(location, contents, serial, None if any_model else fingerprint, model)

    def __init__(
        self,
        location: Location,
        contents: Contents,
        serial: int,
        fingerprint: str | None,
        model: str = "",
    ):
        """contents and serial: what the files held a moment ago, or what a new memory shall.
        fingerprint and model are those of the model that will use it."""
        self.name = location.name
        self._location = location
        _check_model(self.name, contents.header, fingerprint, model)
        with location.errors("open"), contextlib.ExitStack() as stack:
            atomic.make_folder(location.folder)
            stack.enter_context(location.old.locked())
            self._writer: Writer | None = Writer(location.database)
            stack.callback(self._give_back)
            with sqlite_errors():
                if not is_made(self._db):
                    if location.old.exist:
                        contents = location.old.read()
                    rows.create(self._db, contents)
                    self._writer.commit()
                    self._writer.begin()
                    contents = rows.read(self._db)
                elif rows.serial(self._db) != serial:
                    contents = rows.read(self._db)
            _check_model(self.name, contents.header, fingerprint, model)
            location.old.remove_if(contents.header.previous)
            self._adopt(contents)
            with sqlite_errors():
                self._serial = rows.serial(self._db)
            self._sign(os.getpid())
            stack.pop_all()

    @property
    def _db(self) -> sqlite3.Connection:
        if self._writer is None:
            raise ValueError(f"memory '{self.name}' is closed")
        return self._writer.db

    @property
    def closed(self) -> bool:
        """Whether `close` was called: the lock is gone, and nothing can be written."""
        return self._writer is None

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what is heard and said ----------------------------------------------------------------

    def append(
        self,
        tokens: Iterable[int],
        role: Literal["user", "assistant"] | None = None,
        text: str | None = None,
    ) -> None:
        """Adds token ids (0 <= id < 2**32) to `pending`; after `sync` they are on the disk.

        role: they are a user's turn, or end a reply, whose words are `text` (None: not kept).
        """
        tokens = list(tokens)
        rows.token_bytes(tokens)  # for its check
        self._db  # noqa: B018  for its check
        if role is not None:
            self.messages.append(Message(role, text, self._heard, now()))
        self.pending += tokens

    def take_back(self, tokens: int) -> None:
        """Drops the newest `tokens` of `pending` and what was said with them. They were appended
        since the last sync: ValueError for more."""
        start = self._heard - tokens
        if start < self._stored[0]:
            raise ValueError(f"{tokens} tokens are more than were appended since the last sync")
        del self.pending[start - self.header.tokens :]
        while self.messages and self.messages[-1].position >= start:
            self.messages.pop()

    @property
    def _heard(self) -> int:
        return self.header.tokens + len(self.pending)

    def sync(self) -> None:
        """Puts everything appended so far on the disk itself."""
        if (self._heard, len(self.messages)) == self._stored:
            return
        header = replace(self.header, updated=now())
        self._write(lambda db: self._put_heard(db, header), lambda: self._stores(header))

    def _put_heard(self, db: sqlite3.Connection, header: Header) -> None:
        heard, said = self._stored
        rows.add_tokens(db, heard, self.pending[heard - self.header.tokens :])
        for number, message in enumerate(self.messages[said:], said + 1):
            rows.add_message(db, number, message)
        rows.put_head(db, header, self._heard)

    def _stores(self, header: Header) -> None:
        """The database holds all of this object, with this header."""
        self.header = header
        self._stored = self._heard, len(self.messages)

    # --- sleeping ------------------------------------------------------------------------------

    def commit(
        self, arrays: Arrays, tokens: int, *, passes: int, eviction: str, window: int
    ) -> None:
        """Records a sleep: arrays are the state after the oldest `tokens` of `pending` went in.

        arrays may have any shape, and any MLX dtype but float64 and complex64; the name "pending"
        is taken. The rest of `pending` stays pending. When this raises, no sleep was recorded,
        except that a KeyboardInterrupt may come after it was: `header.sleeps` tells.
        """
        if not 0 < tokens <= len(self.pending):
            raise ValueError(f"{tokens} tokens folded in, {len(self.pending)} are pending")
        check_arrays(arrays)
        before = self.header
        header = replace(
            before,
            passes=passes,
            eviction=eviction,
            window=window,
            tokens=before.tokens + tokens,
            sleeps=before.sleeps + 1,
            updated=now(),
        )

        def change(db: sqlite3.Connection) -> None:
            self._put_heard(db, header)
            rows.add_sleep(db, header, arrays)
            rows.drop_older(db, before.sleeps)  # the state before this sleep stays, for `undo`

        def adopt() -> None:
            self.arrays, self.pending = dict(arrays), self.pending[tokens:]
            self._stores(header)

        self._write(change, adopt)
        self._checkpoint()

    def undo(self) -> Literal["turn", "sleep"] | None:
        """Takes back the last turn with its reply, or the last sleep if nothing was said since.

        Returns what it was. None when there is nothing to take back: only the state before the
        last sleep is kept, and turns are known from `messages`.
        """
        self.sync()
        header, said = self.header, len(self.messages)
        arrays, position, pending = self.arrays, self._heard, self.pending
        if pending:
            turns = [i for i, message in enumerate(self.messages) if message.role == "user"]
            if not turns:
                return None
            said = turns[-1]
            position = self.messages[said].position
        if not pending or position < header.tokens:
            with self._location.errors("read"), sqlite_errors():
                sleep = rows.read_sleep(self._db, header.sleeps - 1)
                if sleep is None or position < sleep.tokens:
                    return None
                arrays = rows.read_arrays(self._db, sleep.number)
                pending = rows.read_tokens(self._db, sleep.tokens)
            header = replace(
                header,
                sleeps=sleep.number,
                tokens=sleep.tokens,
                passes=sleep.passes,
                eviction=sleep.eviction,
                window=sleep.window,
            )
        header = replace(header, updated=now())
        pending = pending[: position - header.tokens]

        def change(db: sqlite3.Connection) -> None:
            rows.drop_later(db, header.sleeps)
            rows.cut(db, position, said)
            rows.put_head(db, header, position)

        def adopt() -> None:
            self.arrays, self.pending, self.messages = arrays, pending, self.messages[:said]
            self._stores(header)

        what: Literal["turn", "sleep"] = "turn" if said < len(self.messages) else "sleep"
        self._write(change, adopt)
        self._checkpoint()
        return what

    # --- all of it -----------------------------------------------------------------------------

    def replace(self, contents: Contents) -> None:
        """Puts other contents in place of all it holds, in one transaction."""
        check_arrays(contents.arrays)
        self._write(lambda db: rows.write(db, contents), lambda: self._adopt(contents))
        self._checkpoint()

    def forget(self) -> None:
        """Erases all but the settings; the memory stays open, as if new."""
        header = Header(
            self.header.fingerprint, model=self.header.model, created=now(), updated=now()
        )
        self.replace(Contents(header, {}, [], settings=self.settings))

    def set(self, key: str, value: str | None) -> None:
        """Changes a setting; None removes it."""
        settings = {k: v for k, v in self.settings.items() if k != key}
        if value is not None:
            settings[key] = value
        header = replace(self.header, updated=now())

        def change(db: sqlite3.Connection) -> None:
            rows.put_setting(db, key, value)
            self._put_heard(db, header)

        def adopt() -> None:
            self.settings = settings
            self._stores(header)

        self._write(change, adopt)

    def close(self) -> None:
        """Syncs, then gives the lock back. A second close does nothing."""
        if self._writer is None:
            return
        try:
            self.sync()
            self._sign(0)
        finally:
            self._give_back()

    # --- the database --------------------------------------------------------------------------

    def _adopt(self, contents: Contents) -> None:
        self.arrays = dict(contents.arrays)
        self.pending = list(contents.pending)
        self.messages = list(contents.messages)
        self.settings = dict(contents.settings)
        self._stores(contents.header)

    def _write(
        self, change: Callable[[sqlite3.Connection], None], adopt: Callable[[], None]
    ) -> None:
        """One transaction, then what this object makes of it."""
        db, writer = self._db, self._writer
        assert writer is not None
        with self._location.errors("write"):
            writer.begin()
            with sqlite_errors():
                serial = rows.serial(db)
            if serial != self._serial:
                raise UserError(
                    f"memory '{self.name}' was changed by another process; close it and open it "
                    "again"
                )
            try:
                with sqlite_errors():
                    change(db)
                writer.commit()
            except BaseException:
                writer.rollback()
                # Ctrl-C may strike right after the commit: what the database holds decides.
                if self._is_written():
                    adopt()
                raise
            self._serial += 1
            adopt()
            writer.rollback()  # takes the lock again

    def _is_written(self) -> bool:
        with contextlib.suppress(sqlite3.Error):
            if rows.serial(self._db) == self._serial + 1:
                self._serial += 1
                return True
        return False

    def _checkpoint(self) -> None:
        if self._writer is not None:
            self._writer.checkpoint()

    def _sign(self, holder: int) -> None:
        """Writes into the memory who has it open. A full disk must not keep anyone from it."""
        assert self._writer is not None
        with contextlib.suppress(OSError, Damaged), sqlite_errors():
            self._writer.begin()
            self._db.execute("UPDATE memory SET holder = ?", (holder,))
            self._writer.commit()
        self._writer.rollback()

    def _give_back(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


def _check_model(name: str, header: Header, fingerprint: str | None, model: str) -> None:
    """UserError when the memory is another model's than `model`; fingerprint None fits any."""
    if fingerprint not in (None, header.fingerprint):
        assert fingerprint
        raise UserError(
            f"memory '{name}' was made by another model "
            f"({header.model or 'unnamed'}, fingerprint {header.fingerprint[:12]}; "
            f"this one's is {fingerprint[:12]}); load that model, choose another memory "
            f"name, or rebuild it for this one: mlx-sleep memory rebuild "
            f"{name} --model {model or 'MODEL'}"
        )
