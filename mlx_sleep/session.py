"""One conversation with a model that sleeps: it feeds turns, streams replies, and sleeps.

A session holds two states. The snapshot is the state at the START of the window; the working state
is the snapshot after the window's tokens went through the model once each. A sleep consolidates the
window from the snapshot and replaces both. The session knows its window and its durable memory;
it knows no terminal and starts no thread. Only one thread may call it at a time (every array it
keeps is evaluated, so that it need not always be the same one).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, cast

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .chat_template import ChatTokenizer
from .memory import Contents, Memory
from .models.base import (
    SleepConfig,
    SleepModel,
    State,
    fast_weight_bytes,
    flatten_state,
    kv_bytes,
    state_problem,
    unflatten_state,
)
from .models.calibrate import calibrate
from .models.checkpoint import Checkpoint
from .sampling import REPETITION_CONTEXT, Sampling
from .sleep import NOTHING_TO_SLEEP_INTO, SleepFailed, SleepReport, consolidate, passes_over
from .thoughts import Split, Stream, Thinking, Thought
from .utils import limits
from .utils.errors import UserError
from .wake import READ, Mark, WorkingState

OnPass = Callable[[int, int, float], None]
ShouldStop = Callable[[], bool]
OnRead = Callable[[int, int], None]

_UNKNOWN = -1  # in place of a token that is not known yet


@dataclass(frozen=True)
class Stats:
    """Counters of a session. Tokens and sleeps count over the whole life of its memory.

    window_tokens       tokens in the window, not yet consolidated
    window              tokens that the window can hold
    passes              N of the next sleep
    kv_bytes            bytes of the KV cache in use
    fast_weight_bytes   bytes of S, whatever it remembers
    tokens              tokens consolidated so far
    sleeps              sleeps so far
    prompt_tps          tokens a second at which the last turn was read; None before the first
    generation_tps      ... at which its reply came after the first token; None for less than two
    """

    window_tokens: int
    window: int
    passes: int
    kv_bytes: int
    fast_weight_bytes: int
    tokens: int
    sleeps: int
    prompt_tps: float | None = field(default=None, compare=False)
    generation_tps: float | None = field(default=None, compare=False)


_SYSTEM = "system_prompt"  # a memory's setting


class _Turn(NamedTuple):
    """A user's turn as the past has it, up to the reply's text, and as the model is asked.

    tokens  how many went into the window, with a reply that is known
    """

    past: list[int]
    asked: list[int]
    tokens: int = 0


@dataclass
class _Apart:
    """Tokens that the working state reads in the place of pending[at:until], and a mark there."""

    at: int
    ids: list[int]
    until: int
    mark: Mark


class Session:
    """A chat with `model`, remembered in `memory` (or not at all, when that is None).

        with Session.open(memory="alice") as session:
            session.tell("My cat is called Zorvi.")
            session.sleep()
            print(session.ask("What is my cat called?"))

    passes, window  N and L; None takes the model's own
    max_tokens      longest reply, in tokens; thoughts before it may fill one window more
    temp, top_p, top_k, min_p, repetition_penalty
                    sampling, by mlx-lm's names (`Sampling`): temp 0, the default, is greedy
    seed            of the sampling; None leaves MLX's random state alone
    system_prompt   see the property; None takes the memory's, "" takes it away
    keep_thoughts   leave thoughts in the window, which a sleep folds in
    on_sleep        called with the SleepReport of every sleep, those of a full window included
    transcript      whether the memory keeps what is said as text, too

    `sampling` may be set to another between turns, and `sampler` to any of mlx-lm's:
    log-probabilities [1, V] -> token ids [1]. It is called one token ahead of the reply.
    `cut` says whether the last reply ended because it had max_tokens tokens.

    It sleeps by itself when a turn would not fit in the window, and on `close`. A memory with
    tokens that no sleep has folded in yet is replayed through the model. Errors are UserErrors;
    whatever raises leaves the states and the memory consistent.

    A model without fast weights (`can_sleep` is False) talks until its window is full, and then
    says so; its memory is the text of the window.
    """

    def __init__(
        self,
        model: SleepModel,
        tokenizer: ChatTokenizer | TokenizerWrapper,
        memory: Memory | None = None,
        *,
        passes: int | None = None,
        window: int | None = None,
        max_tokens: int = 256,
        temp: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        keep_thoughts: bool = False,
        system_prompt: str | None = None,
        on_sleep: Callable[[SleepReport], None] | None = None,
        transcript: bool = True,
    ):
        self.window = model.sleep.window if window is None else window
        self.passes = model.sleep.passes if passes is None else passes
        sampling = Sampling(temp, top_p, top_k, min_p, repetition_penalty)
        self.model, self.memory = model, memory
        self.can_sleep: bool = model.has_fast_weights
        self.tokenizer = (
            tokenizer if isinstance(tokenizer, ChatTokenizer) else ChatTokenizer(tokenizer)
        )
        self.max_tokens, self.on_sleep, self.transcript = max_tokens, on_sleep, transcript
        self.keep_thoughts = keep_thoughts
        self.sampler: Callable[[mx.array], mx.array]
        self.sampling = sampling
        self.cut = False
        self._speed: tuple[float | None, float | None] = None, None
        if seed is not None:
            self.seed(seed)
        # Loaded weights are lazy, and a lazy array can only be evaluated by its own thread.
        mx.eval(model.parameters())
        calibrate(model)

        self._tokens = self._sleeps = 0
        self._pending: list[int] = []  # tokens since the last sleep; the journal holds the same
        self._snapshot = model.init_state()
        self._apart: _Apart | None = None  # what the model is asked with, and thinks
        self._working = WorkingState(model, len(self.tokenizer))
        self._open_reply: object | None = None
        self._said: list[int] = []  # the tokens of the open reply
        self._read_memory()
        self._system: str | None = None
        self.system_prompt_waits = False
        if system_prompt is not None:
            self.system_prompt = system_prompt
        elif memory is not None:
            self._system = self._checked_system(memory.settings.get(_SYSTEM))

    def _read_memory(self) -> None:
        """Takes all from the memory, and ends a reply in which a process was killed."""
        if self.memory is not None:
            _check(self.memory, self.model)
            self._tokens, self._sleeps = self.memory.header.tokens, self.memory.header.sleeps
            self._snapshot = self.model.init_state()
            if self.memory.arrays:
                self._snapshot = unflatten_state(self.memory.arrays, len(self._snapshot))
                mx.eval(self._snapshot)
            self._pending = list(self.memory.pending)
        self._apart = None
        self._working.rewind(self._snapshot)
        end = self.tokenizer.end_ids
        if self._pending and self._pending[-len(end) :] != end:
            self._open_reply = object()
            replies = self.tokenizer.in_replies(self._pending)
            start = len(replies) - (replies[::-1].index(False) if False in replies else 0)
            self._said = self._pending[start:]
        self._end_reply()
        self._feed()

    @classmethod
    def open(
        cls,
        model: str | Path | Checkpoint | None = None,
        memory: str | None = None,
        *,
        adapter: str | Path | None = None,
        home: str | os.PathLike | None = None,
        thinking: Thinking = "auto",
        **options: Any,
    ) -> Session:
        """Loads a model and opens a memory by name.

        model is a folder of ours or of mlx-lm's, or what `mlx_sleep.open_model` makes of any other
        and of an id on Hugging Face; None is the embedded model. adapter is the folder of an
        adapter for it; home is the folder of the memories; thinking is that of `ChatTokenizer`;
        options are those of `Session`; sampling that they don't give (or give as None) is as the
        folder's generation_config.json has it.
        UserError when a folder or the memory cannot be used.
        """
        from .models.load import EMBEDDED, fingerprint, generation_of, load, open_folder

        source = model if isinstance(model, Checkpoint) else open_folder(model or EMBEDDED)
        sampling = Sampling.of(generation_of(source.path, adapter))
        for name, value in asdict(sampling).items():
            if options.get(name) is None:
                options[name] = value
        loaded, tokenizer, _ = load(source, adapter=adapter, thinking=thinking)
        loaded = cast(SleepModel, loaded)
        if memory is None:
            return cls(loaded, tokenizer, **options)
        name = "embedded" if source.path == EMBEDDED else source.name
        if adapter is not None:
            name += f" with {adapter}"
        opened = Memory.open(memory, fingerprint(source, adapter), model=name, home=home)
        try:
            return cls(loaded, tokenizer, opened, **options)
        except BaseException:
            opened.close()
            raise

    # --- talking ---------------------------------------------------------------------------

    def say(
        self,
        text: str,
        on_pass: OnPass | None = None,
        should_stop: ShouldStop | None = None,
        on_read: OnRead | None = None,
    ) -> Generator[str]:
        """Takes a user's turn and streams the reply, in pieces of text as they are generated.

        What the model thinks before its reply comes as `Thought`, a str. It is read, and left out
        of the window when the reply ends, as templates leave it out of the past.

        The turn is in the journal and on the disk when this returns; the reply, when it ends.
        A reply that is not read to its end (close the iterator to stop it) ends there, and stays
        in the window like any other. UserError for a text that is empty or
        not valid Unicode.

        on_pass and should_stop are those of `sleep`, for a window that fills up on the way.
        SleepCancelled here means that the turn was not taken; from the reply, that it ends there.
        on_read(done, total) is called while the turn is read, with tokens; what it raises ends the
        reply.
        """
        turn = self._take(text, None, on_pass, should_stop)
        self._said = []
        self._open_reply = reply = object()
        self._sync_turn(turn)
        return self._reply(reply, turn, on_pass, should_stop, on_read)

    def hear(
        self,
        text: str,
        reply: str,
        on_pass: OnPass | None = None,
        should_stop: ShouldStop | None = None,
    ) -> None:
        """Takes a user's turn with its reply, said in some other place. "" is a reply cut at once.

        Both are in the journal and on the disk when this returns, and read through the model.
        Errors are those of `say`; SleepCancelled may leave the turn to be read by the next call.
        """
        self._sync_turn(self._take(text, reply.strip(), on_pass, should_stop))
        self._feed(on_pass, should_stop)

    def _take(
        self, text: str, reply: str | None, on_pass: OnPass | None, should_stop: ShouldStop | None
    ) -> _Turn:
        """Puts a user's turn, and what is known of its reply, into the window and the journal."""
        text = text.strip()
        if not text:
            raise UserError("the text is empty; say something")
        limits.check("the length of the text", len(text), limits.TURN_CHARACTERS)
        _check_unicode(text)
        self._end_reply()
        turn = self._turn(text)
        said = [] if reply is None else self.tokenizer.encode_text(reply)
        rest = [] if reply is None else said + self.tokenizer.end_ids
        ids = turn.past + rest
        # A question and its reply belong in one window: leave some room for the reply.
        if self._no_room(len(ids)):
            raise UserError(
                f"the window of {self.window} tokens is full, and {NOTHING_TO_SLEEP_INTO}, "
                "forget, or take a longer --window"
            )
        room = len(ids) + (self.window // 8 if reply is None else 0)
        if self._pending and len(self._pending) + room > self.window and self.can_sleep:
            self._sleep(on_pass, should_stop)
            turn = self._turn(text)
        self._record(turn.past, "user", text)
        if reply is not None:
            self._record(said)
            self._record(self.tokenizer.end_ids, "assistant", reply)
        return turn._replace(tokens=len(turn.past + rest))

    def _turn(self, text: str) -> _Turn:
        """A user's turn at this place of the window."""
        first = not self._pending and (self._system is not None or not self._tokens)
        asked = self.tokenizer.turn(text, first, self._system)
        if self.keep_thoughts:
            return _Turn(asked, asked)
        return _Turn(self.tokenizer.past_turn(text, first, self._system), asked)

    @property
    def system_prompt(self) -> str | None:
        """What each window begins with, in the place that the chat template has for it.

        The memory keeps it. None is the template's own, or none, at the start of all and not again.
        What is set holds from the next window on: at once if nothing is in this one, else after a
        sleep, and `system_prompt_waits` is True until then. UserError where the template has no
        place for it, or it takes more than half the window.
        """
        return self._system

    @system_prompt.setter
    def system_prompt(self, text: str | None) -> None:
        text = self._checked_system(text)
        if self.memory is not None and text != self.memory.settings.get(_SYSTEM):
            self.system_prompt_waits = bool(self._pending)
            self.memory.set(_SYSTEM, text)
        self._system = text

    def _checked_system(self, text: str | None) -> str | None:
        if not text or not (text := text.strip()):
            return None
        _check_unicode(text)
        length = len(self.tokenizer.opening(text))
        if 2 * length > self.window:
            raise UserError(
                f"the system prompt takes {length} of the window's {self.window} tokens; shorten "
                "it, or take a longer --window"
            )
        return text

    def ask(self, text: str) -> str:
        """`say`, with the whole reply at once, and without thoughts."""
        return "".join(piece for piece in self.say(text) if not isinstance(piece, Thought))

    tell = ask

    def _reply(
        self,
        this: object,
        turn: _Turn,
        on_pass: OnPass | None,
        should_stop: ShouldStop | None,
        on_read: OnRead | None,
    ) -> Generator[str]:
        """Samples tokens until a stop id, one forward pass each, one token ahead."""
        reader = self.tokenizer.thought_reader()
        stream = Stream(lambda: self.tokenizer.detokenizer)
        left, thoughts = self.max_tokens, self.window
        self.cut = False
        self._speed = None, None
        unread, start = len(self._pending) - self._working.read, time.perf_counter()
        first, made = start, 0
        try:
            self._set_apart(turn, on_pass, should_stop, on_read)
            self._feed(on_pass, should_stop, on_read)
            token = self._sample()
            while not self.cut:
                following = None if reader.in_text and left == 1 else self._run_ahead(token)
                taken = cast(int, token.item())
                now = time.perf_counter()
                if not made:
                    first = now
                self._speed = unread / (first - start), made / (now - first) if made else None
                made += 1
                if taken in self.tokenizer.stop_ids or self._no_room(1):
                    break
                split = reader.add(taken)
                self._keep(taken, split)
                left -= len(split.text)
                thoughts -= not split.text
                self.cut = left <= 0 or thoughts <= 0
                yield from stream.add(split)
                if self._open_reply is not this:  # another turn or a sleep came in between
                    return
                if following is not None:
                    self._working.take()
                    token = following
                elif not self.cut:  # the window is full
                    self._feed(on_pass, should_stop)
                    token = self._sample()
            split = reader.finish()
            if not self.keep_thoughts:
                self._keep_text(split.text)
            yield from stream.add(split)
            yield from stream.end()
        finally:
            if self._open_reply is this:
                self._end_reply()

    # --- thoughts --------------------------------------------------------------------------

    def _set_apart(
        self,
        turn: _Turn,
        on_pass: OnPass | None,
        should_stop: ShouldStop | None,
        on_read: OnRead | None,
    ) -> None:
        """Reads up to where the model is asked for a reply in other words than the past has: from
        there on it reads those, and what it thinks, and comes back there after the reply."""
        if self.keep_thoughts or not self.tokenizer.has_thinking:
            return
        same = 0
        while turn.past[same : same + 1] == turn.asked[same : same + 1] != []:
            same += 1
        after = len(turn.past) - same
        self._feed(on_pass, should_stop, on_read, after)
        if after and self._working.read == self.window:
            self._consolidate(self.window, on_pass, should_stop)
        at = len(self._pending) - after
        mark = self._working.mark()
        self._apart = _Apart(at, turn.asked[same:], len(self._pending), mark)

    def _read(self) -> list[int]:
        """The tokens of the window as the working state reads them, thoughts included."""
        if (apart := self._apart) is None:
            return self._pending
        return [*self._pending[: apart.at], *apart.ids, *self._pending[apart.until :]]

    def _keep(self, token: int, split: Split) -> None:
        """Records what is known to be a reply's text after this token of it."""
        if self.keep_thoughts:
            self._record([token])
            self._said += split.text
            return
        if self._apart is not None:
            self._apart.ids.append(token)
        self._keep_text(split.text)

    def _keep_text(self, text: list[int]) -> None:
        """Records a reply's text, which the working state has read."""
        self._record(text)
        self._said += text
        if text and (apart := self._apart) is not None:
            if apart.ids[-len(text) :] == text:
                del apart.ids[-len(text) :]
            else:  # a token with a line break that is none of the text
                apart.until += len(text)

    def _forget_thoughts(self) -> None:
        """The working state goes back to where it was before, and reads the reply again."""
        apart, self._apart = self._apart, None
        if apart is not None and apart.ids != self._pending[apart.at : apart.until]:
            self._working.back(apart.mark)

    @property
    def sampling(self) -> Sampling:
        """How replies are sampled, from the next one on when it is set."""
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self.sampler = sampling.sampler(len(self.tokenizer))
        self._processors = sampling.processors()

    def seed(self, seed: int) -> None:
        """Seeds the sampling, which is MLX's random state. UserError for a seed out of range."""
        if not 0 <= seed < 2**64:
            raise UserError(f"the seed must be at least 0 and below 2**64, not {seed}")
        mx.random.seed(seed)

    @property
    def max_tokens(self) -> int:
        """The longest reply, in tokens."""
        return self._max_tokens

    @max_tokens.setter
    def max_tokens(self, max_tokens: int) -> None:
        if max_tokens < 1:
            raise UserError(f"max tokens must be at least 1, not {max_tokens}")
        self._max_tokens = max_tokens

    @property
    def passes(self) -> int:
        """N of the next sleep."""
        return self._passes

    @passes.setter
    def passes(self, passes: int) -> None:
        self._passes = SleepConfig(passes=passes, window=self.window).passes  # for its checks

    def _sample(self, ahead: mx.array | None = None, logits: mx.array | None = None) -> mx.array:
        """The token [1] after the pending ones and `ahead` [1], from logits [V]; not evaluated."""
        logits = self._working.logits if logits is None else logits
        assert logits is not None  # a turn has been fed
        logits = logits[None]
        if self._processors:
            so_far = mx.array(self._read()[-REPETITION_CONTEXT:])
            so_far = so_far if ahead is None else mx.concatenate([so_far, ahead])
            for process in self._processors:
                logits = process(so_far, logits)
        return self.sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    def _run_ahead(self, token: mx.array) -> mx.array | None:
        """What follows a token [1] that isn't taken yet; None where the window is full then."""
        if len(self._pending) >= self.window:
            return None
        with self._rewinding():
            end = len(self._read())
            write = self._fold(end, end + 1).get("write")
            return self._working.run_ahead(token, partial(self._sample, token), write)

    def _no_room(self, tokens: int) -> bool:
        """Whether so many and a reply's end don't fit in the window, and no sleep can make room."""
        needed = len(self._pending) + tokens + len(self.tokenizer.end_ids)
        return not self.can_sleep and needed > self.window

    # --- sleeping --------------------------------------------------------------------------

    def sleep(
        self, on_pass: OnPass | None = None, should_stop: ShouldStop | None = None
    ) -> SleepReport | None:
        """Folds the window into the fast weights, N passes: a report, or None if it is empty.

        on_pass(done, passes, moved) is called after every pass, should_stop() after every block.
        A transaction: when it raises (SleepCancelled; UserError for non-finite fast weights or
        a disk that can't be written) the states and the memory are as they were. When the window
        overflows, each full window is a transaction of its own.
        """
        report = self._sleep(on_pass, should_stop)
        # Nobody waits for a reply: the time to judge what it met (on a GPU).
        calibrate(self.model, should_stop)
        return report

    def _sleep(self, on_pass: OnPass | None, should_stop: ShouldStop | None) -> SleepReport | None:
        """`sleep`, and nothing after it."""
        self._end_reply()
        reports = []
        while self._pending:  # more than one window only if a reply has just filled the first
            count = min(len(self._pending), self.window)
            reports.append(self._consolidate(count, on_pass, should_stop))
        if len(reports) < 2:
            return reports[0] if reports else None
        return SleepReport(
            tokens=sum(report.tokens for report in reports),
            passes=self.passes,
            seconds=sum(report.seconds for report in reports),
            moved=reports[-1].moved,
            kv_bytes_freed=sum(report.kv_bytes_freed for report in reports),
        )

    def _consolidate(
        self, count: int, on_pass: OnPass | None = None, should_stop: ShouldStop | None = None
    ) -> SleepReport:
        """Sleeps over the first `count` pending tokens; the rest opens the next window."""
        window, rest = self._pending[:count], self._pending[count:]
        try:
            state, report = consolidate(
                self.model,
                self._snapshot,
                mx.array([window]),
                self.passes,
                write=self._fold(0, count).get("write"),
                on_pass=on_pass,
                should_stop=should_stop,
            )
        except SleepFailed as error:
            raise UserError(str(error)) from error
        if self.memory is not None:
            sleeps = self.memory.header.sleeps
            try:
                self.memory.commit(
                    flatten_state(state),
                    count,
                    passes=self.passes,
                    eviction=self.model.sleep.eviction,
                    window=self.window,
                )
            except BaseException:
                # A KeyboardInterrupt may come after the rename: the sleep is then on the disk.
                if self.memory.header.sleeps > sleeps:
                    self._adopt(state, window, rest)
                raise
        self._adopt(state, window, rest)
        if self.on_sleep:
            self.on_sleep(report)
        return report

    def _adopt(self, state: State, folded: list[int], rest: list[int]) -> None:
        """Takes a sleep's result for the snapshot; `rest` is the new window."""
        self._snapshot, self._pending, self._apart = state, rest, None
        self.system_prompt_waits = False
        self._tokens += len(folded)
        self._sleeps += 1
        self._working.rewind(self._snapshot)

    # --- the window ------------------------------------------------------------------------

    @property
    def pending(self) -> tuple[int, ...]:
        """Ids of the tokens that no sleep has folded in yet."""
        return tuple(self._pending)

    @property
    def snapshot(self) -> State:
        """The state at the start of the window, which the next sleep starts from."""
        return self._snapshot

    @property
    def state(self) -> State:
        """The working state. Its KV cache is copied while anybody holds it: don't keep it."""
        return self._working.state

    def stats(self) -> Stats:
        return Stats(
            window_tokens=len(self._pending),
            window=self.window,
            passes=self.passes,
            kv_bytes=kv_bytes(self.state),
            fast_weight_bytes=fast_weight_bytes(self.state),
            tokens=self._tokens,
            sleeps=self._sleeps,
            prompt_tps=self._speed[0],
            generation_tps=self._speed[1],
        )

    @contextlib.contextmanager
    def _rewinding(self) -> Iterator[None]:
        """What raises in here has lost the working state: the next call reads the window again."""
        try:
            yield
        except BaseException:
            self._working.rewind(self._snapshot)
            raise

    def _feed(
        self,
        on_pass: OnPass | None = None,
        should_stop: ShouldStop | None = None,
        on_read: OnRead | None = None,
        but: int = 0,
    ) -> None:
        """Runs the pending tokens that the working state has not seen, all but the last few.

        It sleeps when the window is full and more is to come. Thoughts have room beside it.
        """
        while (start := self._working.read) < (total := len(tokens := self._read()) - but):
            full = self.window + len(tokens) - len(self._pending)
            if start >= full:
                self._consolidate(self.window, on_pass, should_stop)
                continue
            if on_read:
                on_read(start, total)
            end = min(start + READ, full, total)
            with self._rewinding():
                self._working.feed(tokens[start:end], self._fold(start, end).get("write"))

    def _fold(self, start: int, end: int) -> dict[str, mx.array]:
        """Which of these pending tokens write into S, as `write` [1, n]; nothing when all do.

        One more than are pending is the next token of a reply, whatever it is.
        """
        if self.model.sleep.fold == "all":
            return {}
        said = self.tokenizer.in_replies([*self._read(), _UNKNOWN])
        return {"write": ~mx.array([said[start:end]])}

    def _record(
        self, ids: list[int], role: Literal["user", "assistant"] | None = None, text: str = ""
    ) -> None:
        """Puts tokens into the memory and the window. Nothing has changed if it raises.

        role: they are a user's turn, or end a reply, of this text.
        """
        if self.memory is None:
            self._pending.extend(ids)
            return
        try:
            self.memory.append(ids, role, text if self.transcript else None)
        finally:  # a KeyboardInterrupt may come after the tokens are in the journal
            self._pending.extend(self.memory.pending[len(self._pending) :])

    def _sync(self) -> None:
        if self.memory is not None:
            self.memory.sync()

    def _sync_turn(self, turn: _Turn) -> None:
        """Syncs; a turn that can't be written was not heard."""
        try:
            self._sync()
        except UserError:
            assert self.memory is not None
            self.memory.take_back(turn.tokens)
            self._pending, self._open_reply = list(self.memory.pending), None
            raise

    def _end_reply(self) -> None:
        """Closes an open reply, however it came to its end, so that the format stays legal."""
        if self._open_reply is not None:
            with self._rewinding():
                self._working.settle()
            self._forget_thoughts()
            self._record(self.tokenizer.end_ids, "assistant", self._text(self._said))
            self._open_reply = None
            self._sync()

    def _text(self, ids: list[int]) -> str:
        """What a reply of these tokens says."""
        detokenizer = self.tokenizer.detokenizer
        for token in ids:
            detokenizer.add_token(token)
        detokenizer.finalize()
        return detokenizer.text.strip()

    # --- the end ---------------------------------------------------------------------------

    def undo(self) -> Literal["turn", "sleep"] | None:
        """Takes back the last turn with its reply, or the last sleep when nothing was said since.

        Returns what it was; None when there is nothing to take back (`Memory.undo`).
        """
        if self.memory is None:
            return None
        self._end_reply()
        what = self.memory.undo()
        if what:
            self._read_memory()
        return what

    def replace(self, contents: Contents) -> None:
        """Puts other contents in place of all that the memory holds, and goes on from there."""
        if self.memory is None:
            raise ValueError("a session without a memory has nothing to replace")
        self._end_reply()
        self.memory.replace(contents)
        self._read_memory()

    def forget(self) -> None:
        """Empties the memory, on the disk too, and starts from nothing."""
        if self.memory is not None:
            self.memory.forget()
        self._tokens = self._sleeps = 0
        self._pending, self._open_reply, self._apart = [], None, None
        self._snapshot = self.model.init_state()
        self._working.rewind(self._snapshot)

    def close(
        self,
        sleep: bool = True,
        on_pass: OnPass | None = None,
        should_stop: ShouldStop | None = None,
    ) -> SleepReport | None:
        """Sleeps (unless told not to) and lets go of the memory.

        The memory is closed even when the sleep raises; its journal then keeps the window. A second
        close does nothing.
        """
        if self.memory is not None and self.memory.closed:
            return None
        try:
            self._end_reply()
            return self.sleep(on_pass, should_stop) if sleep and self.can_sleep else None
        finally:
            if self.memory is not None:
                self.memory.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(sleep=kind is None)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("the text is not valid UTF-8; check the encoding") from None


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
