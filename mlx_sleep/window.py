"""The window: the tokens that no sleep has folded in yet, in the model and in the memory alike.

Beside its tokens a window has two states. The snapshot is the state at its START; the working state
is the snapshot after the tokens went through the model once each. A sleep consolidates the window
from the snapshot and replaces both. This module knows no text, no turn and no sampling.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import mlx.core as mx

from .chat_template import ChatTokenizer
from .memory import Memory
from .models.base import (
    SleepConfig,
    SleepModel,
    State,
    flatten_state,
    state_problem,
    unflatten_state,
)
from .sleep import SleepFailed, SleepReport, consolidate, passes_over
from .utils.errors import UserError
from .wake import READ, Mark, WorkingState

OnPass = Callable[[int, int, float], None]
ShouldStop = Callable[[], bool]
OnRead = Callable[[int, int], None]

_UNKNOWN = -1  # in place of a token that is not known yet


class Watch(NamedTuple):
    """Who looks on: on_pass and should_stop of `consolidate`, for sleeps on the way, and
    on_read(done, total), in tokens, which is called while the window is read."""

    on_pass: OnPass | None = None
    should_stop: ShouldStop | None = None
    on_read: OnRead | None = None


UNWATCHED = Watch()


@dataclass
class Aside:
    """`ids` that the working state reads in the place of tokens[start:end], and a mark before."""

    start: int
    end: int
    ids: list[int]
    mark: Mark


class Window:
    """A window of `size` tokens (L), each sleep over it with `passes` passes (N).

    memory      what is appended goes into it too, and is on the disk after `sync`; or None
    transcript  whether the memory keeps texts
    on_sleep    called with the report of every sleep
    can_sleep   whether the model has fast weights to sleep into
    tokens      ids since the last sleep; one more than `size` while a reply overflows
    unopened    whether it began within a turn or a reply, and so without a system prompt
    aside       what the working state reads instead of some of them (`step_aside`), or None
    folded, sleeps
                tokens that sleeps have folded in, and their number, over the memory's whole life

    It is empty until `load`.
    """

    def __init__(
        self,
        model: SleepModel,
        tokenizer: ChatTokenizer,
        memory: Memory | None,
        *,
        size: int,
        passes: int,
        transcript: bool,
        on_sleep: Callable[[SleepReport], None],
    ):
        self.size = size
        self.passes = passes
        self.model, self.tokenizer, self.memory = model, tokenizer, memory
        self._transcript, self._on_sleep = transcript, on_sleep
        self.can_sleep: bool = model.has_fast_weights
        self.working = WorkingState(model, len(tokenizer))
        self.clear()

    @property
    def passes(self) -> int:
        return self._passes

    @passes.setter
    def passes(self, passes: int) -> None:
        self._passes = SleepConfig(passes=passes, window=self.size).passes  # for its checks

    # --- in the memory ---------------------------------------------------------------------

    def clear(self) -> None:
        """Starts from nothing. The memory is left as it is."""
        self.folded = self.sleeps = 0
        self.tokens: list[int] = []
        self.unopened = False
        self.snapshot = self.model.init_state()
        self._restart()

    def load(self) -> None:
        """Takes all from the memory; `read` then reads the tokens. UserError for a memory that no
        window of this model has written."""
        if self.memory is None:
            return
        _check(self.memory, self.model)
        self.folded, self.sleeps = self.memory.header.tokens, self.memory.header.sleeps
        self.tokens, self.unopened = list(self.memory.pending), False
        self.snapshot = self.model.init_state()
        if self.memory.arrays:
            self.snapshot = unflatten_state(self.memory.arrays, len(self.snapshot))
            mx.eval(self.snapshot)
        self._restart()

    def append(
        self, ids: list[int], role: Literal["user", "assistant"] | None = None, text: str = ""
    ) -> None:
        """Adds tokens; `read` reads them. Nothing has changed if it raises.

        role: they are a user's turn, or end a reply, of this text.
        """
        if self.memory is None:
            self.tokens.extend(ids)
            return
        try:
            self.memory.append(ids, role, text if self._transcript else None)
        finally:  # a KeyboardInterrupt may come after the memory has them
            self.tokens.extend(self.memory.pending[len(self.tokens) :])

    def sync(self) -> None:
        """What was appended is on the disk when this returns."""
        if self.memory is not None:
            self.memory.sync()

    def take_back(self, tokens: int) -> None:
        """Drops the newest tokens, which were neither synced nor read."""
        if self.memory is not None:
            self.memory.take_back(tokens)
        del self.tokens[len(self.tokens) - tokens :]

    # --- awake -----------------------------------------------------------------------------

    def seen(self) -> list[int]:
        """The tokens as the working state reads them."""
        if (aside := self.aside) is None:
            return self.tokens
        return [*self.tokens[: aside.start], *aside.ids, *self.tokens[aside.end :]]

    def has_room(self, tokens: int) -> bool:
        """Whether so many and a reply's end fit, or a sleep can make room."""
        needed = len(self.tokens) + tokens + len(self.tokenizer.end_ids)
        return self.can_sleep or needed <= self.size

    def read(self, watch: Watch = UNWATCHED, but: int = 0) -> None:
        """Puts the tokens that the working state has not seen through it, all but the last few.

        It sleeps when the window is full and more is to come. What is aside has room beside it.
        """
        while (start := self.working.read) < (total := len(tokens := self.seen()) - but):
            full = self.size + len(tokens) - len(self.tokens)
            if start >= full:
                self._consolidate(self.size, watch)
                continue
            if watch.on_read:
                watch.on_read(start, total)
            end = min(start + READ, full, total)
            with self.rewinding():
                self.working.feed(tokens[start:end], self._write(tokens, start, end))

    def run_ahead(self, token: mx.array, sample: Callable[[mx.array], mx.array]) -> mx.array | None:
        """`WorkingState.run_ahead`; None where a sleep must come first."""
        if len(self.tokens) >= self.size:
            return None
        tokens = self.seen()
        end = len(tokens)
        with self.rewinding():
            return self.working.run_ahead(token, sample, self._write(tokens, end, end + 1))

    @contextlib.contextmanager
    def rewinding(self) -> Iterator[None]:
        """What raises in here has lost the working state: `read` begins at the snapshot again."""
        try:
            yield
        except BaseException:
            self.working.rewind(self.snapshot)
            raise

    def _restart(self) -> None:
        self.aside: Aside | None = None
        self.working.rewind(self.snapshot)

    def _write(self, tokens: list[int], start: int, end: int) -> mx.array | None:
        """Which of tokens[start:end] write into S, as `write` [1, n] bool; None when all do.

        One after the last is the next token of a reply, whatever it is.
        """
        if self.model.sleep.fold == "all":
            return None
        said = self.tokenizer.in_replies([*tokens, _UNKNOWN])
        return ~mx.array([said[start:end]])

    # --- aside -----------------------------------------------------------------------------

    def step_aside(self, last: int, ids: list[int], watch: Watch = UNWATCHED) -> None:
        """From here on the working state reads ids in the place of the last so many tokens."""
        self.read(watch, but=last)
        if last and self.working.read == self.size:
            self._consolidate(self.size, watch)
        end = len(self.tokens)
        self.aside = Aside(end - last, end, ids, self.working.mark())

    def step_back(self) -> None:
        """The working state goes back to where it stepped aside, if it has read anything else than
        the tokens there."""
        aside, self.aside = self.aside, None
        if aside is not None and aside.ids != self.tokens[aside.start : aside.end]:
            self.working.back(aside.mark)

    # --- asleep ----------------------------------------------------------------------------

    def sleep(self, watch: Watch = UNWATCHED) -> SleepReport | None:
        """Folds all in, each full window as a transaction of its own. None if there was nothing."""
        reports = []
        while self.tokens:  # more than one window only if a reply has just filled the first
            reports.append(self._consolidate(min(len(self.tokens), self.size), watch))
        if len(reports) < 2:
            return reports[0] if reports else None
        return SleepReport(
            tokens=sum(report.tokens for report in reports),
            passes=self.passes,
            seconds=sum(report.seconds for report in reports),
            moved=reports[-1].moved,
            kv_bytes_freed=sum(report.kv_bytes_freed for report in reports),
        )

    def _consolidate(self, count: int, watch: Watch) -> SleepReport:
        """Sleeps over the first `count` tokens; the rest opens the next window.

        A transaction: when it raises, states, tokens and memory are as they were.
        """
        try:
            state, report = consolidate(
                self.model,
                self.snapshot,
                mx.array([self.tokens[:count]]),
                self.passes,
                write=self._write(self.tokens, 0, count),
                on_pass=watch.on_pass,
                should_stop=watch.should_stop,
            )
        except SleepFailed as error:
            raise UserError(str(error)) from error
        self._commit(state, count)
        self._on_sleep(report)
        return report

    def _commit(self, state: State, count: int) -> None:
        """Takes what a sleep made of the first `count` tokens, once the memory has it."""
        if self.memory is not None:
            sleeps = self.memory.header.sleeps
            try:
                self.memory.commit(
                    flatten_state(state),
                    count,
                    passes=self.passes,
                    eviction=self.model.sleep.eviction,
                    window=self.size,
                )
            except BaseException:
                # A KeyboardInterrupt may come when the sleep is on the disk already.
                if self.memory.header.sleeps > sleeps:
                    self._adopt(state, count)
                raise
        self._adopt(state, count)

    def _adopt(self, state: State, count: int) -> None:
        self.snapshot, self.tokens = state, self.tokens[count:]
        self.unopened = bool(self.tokens)
        self.folded += count
        self.sleeps += 1
        self._restart()


def _check(memory: Memory, model: SleepModel) -> None:
    """UserError for a memory that no session with this model has written."""
    problem = None
    if any(token >= model.vocab_rows for token in memory.pending):
        problem = f"it has tokens beyond the model's {model.vocab_rows}"
    elif memory.arrays or memory.header.sleeps:
        # What a sleep leaves. Lazy: only names, shapes and types are asked for.
        sleep = passes_over(model, mx.zeros((1, 1), mx.int32), model.init_state(), passes=1)
        problem = state_problem(memory.arrays, flatten_state(sleep))
        if not memory.header.sleeps:
            problem = "it has a state, and no sleep"
    if problem:
        raise UserError(
            f"memory '{memory.name}' is not one of this model: {problem}; "
            "choose another memory name, or import it again"
        )
