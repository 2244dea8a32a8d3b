"""Many sessions over one model: those of memories, by name, and those of guests, who have none.

A bounded number is kept in RAM. For another one the least recently used is put away: a memory
into its files, from which it is opened again; a guest's is gone, and is read again from what its
client sends. Knows no HTTP and no thread: the engine's alone may call it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..memory import Memory
from ..memory.location import Location
from ..session import Session
from ..stats import Stats
from ..utils.errors import UserError
from .conversation import Conversation, Pair, said
from .wire import ApiError


@dataclass(eq=False)
class Slot:
    """A session in RAM. name is None for a guest's. Read by other threads, changed by the engine's.

    system     the system text that a guest's conversation began with
    used       time.monotonic() of its last request
    busy       whether a job uses it
    stats      as of the last request or sleep
    progress   (pass, passes, share of the whole) of a sleep under way
    waits      why it does not sleep now, or ""
    """

    name: str | None
    session: Session
    conversation: Conversation
    stats: Stats
    system: str = ""
    used: float = field(default_factory=time.monotonic)
    busy: bool = False
    progress: tuple[int, int, float] | None = None
    waits: str = ""

    def refresh(self) -> None:
        self.stats, self.progress = self.session.stats(), None


class Sessions:
    """Sessions that are like one: its model, tokenizer, N, L and sampling.

    like         a session without a memory; it is never talked to
    fingerprint  of its model
    model        its name, as provenance of new memories
    limit        how many are kept in RAM, at least as many as are used at once
    """

    def __init__(
        self,
        like: Session,
        fingerprint: str,
        model: str,
        *,
        home: str | os.PathLike | None = None,
        limit: int = 8,
    ):
        self.like, self.model, self.home = like, model, home
        self._fingerprint, self._limit = fingerprint, limit
        self.slots: list[Slot] = []

    def named(self, name: str) -> Slot | None:
        """The memory's session, if it is in RAM."""
        return next((slot for slot in self.slots if slot.name == name), None)

    def require(self, name: str) -> None:
        """ApiError when there is no such memory."""
        if self.named(name) is None and not Location.of(name, self.home).exists:
            raise ApiError(404, f"there is no memory '{name}' here", code="memory_not_found")

    @contextlib.contextmanager
    def memory(self, name: str) -> Iterator[Slot]:
        """The session of a memory, opened or made; busy in the with block."""
        slot = self.named(name)
        if slot is None:
            self._make_room()
            try:
                memory = Memory.open(name, self._fingerprint, model=self.model, home=self.home)
            except UserError as error:
                raise ApiError(409, str(error), code="memory_unavailable") from error
            try:
                slot = self._add(name, memory)
            except BaseException:
                memory.close()
                raise
        with self._busy(slot):
            yield slot

    @contextlib.contextmanager
    def guest(self, system: str, history: list[Pair]) -> Iterator[Slot]:
        """A session that has heard nothing but a beginning of `history`, the longest that there is
        in RAM; busy in the with block."""
        fits = [
            slot
            for slot in self.slots
            if slot.name is None
            and not slot.busy
            and slot.system == system
            and slot.conversation.is_beginning_of(history)
        ]
        slot = max(fits, key=lambda slot: len(slot.conversation.turns), default=None)
        if slot is None:
            self._make_room()
            slot = self._add(None, None)
            slot.system = system
        with self._busy(slot):
            yield slot

    def drop(self, slot: Slot) -> None:
        """Puts a session away, what was said in it on the disk."""
        self.slots.remove(slot)
        slot.session.close(sleep=False)

    def close(self) -> None:
        """Puts all away. The first error is raised when it is done."""
        errors = []
        for slot in list(self.slots):
            try:
                self.drop(slot)
            except UserError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _add(self, name: str | None, memory: Memory | None) -> Slot:
        like = self.like
        session = Session(
            like.model,
            like.tokenizer,
            memory,
            passes=like.passes,
            window=like.window,
            max_tokens=like.max_tokens,
            keep_thoughts=like.keep_thoughts,
            system_prompt=None if memory and memory.settings else like.system_prompt,
            transcript=like.transcript,
        )
        heard = said(memory.messages) if memory else ()
        slot = Slot(name, session, Conversation(heard), session.stats())
        self.slots.append(slot)
        return slot

    def _make_room(self) -> None:
        idle = sorted((slot for slot in self.slots if not slot.busy), key=lambda slot: slot.used)
        for slot in idle[: max(0, len(self.slots) + 1 - self._limit)]:
            self.drop(slot)

    @contextlib.contextmanager
    def _busy(self, slot: Slot) -> Iterator[None]:
        slot.busy = True
        slot.waits = ""
        try:
            yield
        finally:
            slot.busy, slot.used = False, time.monotonic()
            slot.refresh()
