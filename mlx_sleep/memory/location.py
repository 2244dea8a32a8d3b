"""Where a memory's files are, by its name: its lock, and reading and creating the two together."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import platformdirs

from ..utils import atomic
from ..utils.errors import UserError
from ..utils.files import os_errors_as_user_errors
from .format import Arrays, Damaged, Header, Stored, decode_memory, encode_memory
from .journal import parse_journal
from .lock import InUse, Lock

CHECK_FOLDER = "check that folder, or set MLX_SLEEP_HOME to one you can write"

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
    def memory(self) -> Path:
        return self.folder / f"{self.name}.safetensors"

    @property
    def journal(self) -> Path:
        return self.folder / f"{self.name}.journal"

    @property
    def files(self) -> tuple[Path, Path]:
        return self.memory, self.journal

    @property
    def exists(self) -> bool:
        # A journal alone counts: its tokens were somebody's, a new memory must not bury them.
        return any(os.path.lexists(path) for path in self.files)

    def require(self) -> None:
        """UserError when there is no such memory."""
        if not self.exists:
            raise UserError(
                f"there is no memory '{self.name}' in {self.folder}; "
                "`mlx-sleep memory list` shows the existing ones"
            )

    def lock(self, *, make_folder: bool = False) -> Lock:
        """Locks the memory against every other process. UserError when one of them holds it."""
        doing = f"cannot lock memory '{self.name}' in {self.folder}"
        try:
            with os_errors_as_user_errors(doing, CHECK_FOLDER):
                if make_folder:
                    atomic.make_folder(self.folder)
                return Lock(self.folder / f"{self.name}.lock")
        except InUse as error:
            raise UserError(
                f"memory '{self.name}' is in use by "
                f"{'process ' + error.holder if error.holder else 'another process'}; "
                "leave that chat first, or choose another memory name"
            ) from None

    def load(self) -> tuple[Stored, list[int]]:
        """What the memory's file holds, and the tokens that its journal adds to `pending`."""
        remedy = f"`mlx-sleep memory rm {self.name}` removes it; an export of it can be imported"
        doing = f"cannot read memory '{self.name}' in {self.folder}"
        with os_errors_as_user_errors(doing, CHECK_FOLDER):
            # The journal first: a commit in between makes it older, which is legal, not newer.
            try:
                journal = self.journal.read_bytes()
            except FileNotFoundError:
                journal = None
            try:
                raw = self.memory.read_bytes()
            except FileNotFoundError:
                if journal is None:
                    self.require()
                raise UserError(
                    f"{self.journal} has no {self.memory.name} beside it; put that back, "
                    f"or `mlx-sleep memory rm {self.name}`"
                ) from None
        stored = decode_memory(raw, f"memory '{self.name}'", remedy)
        if journal is None:
            return stored, []
        try:
            continues, heard = parse_journal(journal)
        except Damaged as damage:
            raise UserError(
                f"the journal of memory '{self.name}' is damaged ({damage}); move {self.journal} "
                "away to go on without the tokens in it"
            ) from None
        if continues == stored.sha256:
            return stored, heard
        if continues == stored.header.previous:
            return stored, []  # a crash between commit and new journal: these are folded in
        raise UserError(
            f"the journal of memory '{self.name}' continues another file than "
            f"{self.memory.name}; put that file back, or move {self.journal} away to go on "
            "without the tokens in it"
        )

    def create(self, header: Header, arrays: Arrays, pending: list[int]) -> None:
        """Makes a memory. UserError when there is one. The caller holds the lock."""
        raw, _ = encode_memory(replace(header, previous=""), arrays, pending)
        doing = f"cannot create memory '{self.name}' in {self.folder}"
        with os_errors_as_user_errors(doing, CHECK_FOLDER):
            if self.exists:
                raise UserError(f"memory '{self.name}' exists already; choose another name")
            atomic.replace_file(self.memory, raw)
            atomic.fsync_path(self.folder)
